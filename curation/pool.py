"""Pool: the images that a stage works on, and what it leaves for the next one.

    embed/  stage.json  names.txt  features/    -->  Pool: names, features, rows that are in
    dedup/  stage.json  rows.npy   list.txt     -->  the same Pool, with fewer rows
    ...

Idea     Every stage chooses among the images of a pool. So what it leaves is a list of rows,
         and the folder in which the pool's features are. A stage notes the hash of what it
         started from: when that has been made anew since, what follows is refused.
Paper    DINOv2 sec. 3 and fig. 3 name the stages
Try      python curate.py embed folder:PHOTOS --weights dino_vits16 --output_dir curations/pool
Change   what a stage leaves: finish; what the next one takes up: open_pool
Tests    pytest tests/curation/test_pool.py

Letters  n images of the pool, D width.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from curation.pieces import Table, piece_files, save_array
from images.data import Images, open_images
from images.files import read_file
from images.names import Names
from machinery.checkpoints import digest, write_json
from machinery.flags import UsageError
from machinery.process import Process


@dataclass
class Pool:
    """Images with a feature for each, and which of them are still in."""

    images: Images  # all that were embedded
    features: Table  # (n, D) float16 of unit length; zeros where an image did not decode
    rows: np.ndarray  # the numbers of the images that are in, ascending
    facts: dict  # what stage.json of `embed` says
    history: list[tuple[Path, dict]]  # folder and stage.json of every stage, from embed on

    @property
    def sha256(self) -> str:
        """The hash of what the last stage has noted: it identifies these images and features."""
        return digest(self.history[-1][0] / "stage.json")

    def path(self, row: int) -> str:
        """The file of an image. UsageError where the images are no files of their own."""
        # A path is absolute, so that the list can be read from any folder.
        if self.images.root is None:
            raise UsageError(f"{self.facts['data']}: its images are no files that a list could "
                             "name; write them to files by curate.py plant --share 0")
        return os.path.abspath(self.images.root / self.images.names[row])

    def label(self, row: int) -> str | None:
        """The name of the class of an image, None where there are no classes."""
        return self.images.classes[self.images.labels[row]] if self.images.labels else None


def read_stage(folder: Path, flag: str) -> dict:
    """stage.json of a folder; UsageError if no stage has finished there."""
    # stage.json is written last, so that a folder without it is one in which work goes on, or
    # none of ours.
    try:
        return json.loads((folder / "stage.json").read_text())
    except (OSError, ValueError):
        begun = (folder / "inputs.json").exists()
        state = "its stage has not finished: start it again" if begun else (
            "expected the folder of a stage, such as python curate.py embed leaves")
        raise UsageError(f"{flag} {folder}: {state}") from None


def open_pool(folder: str, flag: str = "POOL") -> Pool:
    """What the stage of this folder has left. UsageError if it is not there, or out of date."""
    # From the last stage back to `embed`. On the way every hash is compared: a stage that was
    # run again, with other flags or on other images, makes what was built on it meaningless.
    path = Path(folder).absolute()
    history = [(path, read_stage(path, flag))]
    while history[0][1]["stage"] != "embed":
        source = history[0][1]["source"]
        earlier = Path(os.path.normpath(history[0][0] / source["folder"]))
        facts = read_stage(earlier, flag)
        if digest(earlier / "stage.json") != source["sha256"]:
            raise UsageError(f"{flag} {folder}: {earlier} has been made anew since "
                             f"{history[0][0].name} was; run {history[0][1]['stage']} again")
        history.insert(0, (earlier, facts))

    # The place of a file among the others says which rows it holds, so all of them have to be
    # there: without one, all rows behind it would be taken for other images.
    embedded, facts = history[0]
    count = facts["images"] + facts["broken"]
    files = piece_files(embedded / "features", count, facts["shard_size"])
    missing = next((file for file in files if not file.exists()), None)
    if missing:
        raise UsageError(f"{flag} {folder}: expected {len(files):,d} files of features, but "
                         f"{missing} is missing; repeat the command of embed, which makes it")
    return Pool(stored_images(embedded, facts), Table(files, facts["shard_size"]),
                np.load(path / "rows.npy"), facts, history)


def stored_images(folder: Path, facts: dict) -> Images:
    """The images that `embed` saw, by what it noted of them."""
    # Of files the names are enough: the folder or list need not be gone through again. What is
    # no file, as a drawn picture, is opened by the name of the data set.
    if not facts["root"]:
        return open_images(facts["data"], facts["data_root"])
    root = Path(facts["root"])
    with open(folder / "names.txt", encoding="utf-8", errors="surrogateescape") as lines:
        names = Names(line.rstrip("\n") for line in lines)
    labels = None
    if facts["classes"]:
        labels = np.load(folder / "labels.npy").tolist()
    return Images("pool", partial(_read_stored, root, names), names, labels, facts["classes"],
                  root=root)


def _read_stored(root: Path, names: Names, i: int) -> Tensor:
    return read_file(root / names[i])


def same_embedding(pool: Pool, other: Pool, flag: str):
    """UsageError unless the features of both came about in the same way."""
    # A cosine between features of two networks is a number, but it means nothing.
    # What is compared: weights, description, size of the images, precision, and axes.
    for key, value in pool.facts["embedding"].items():
        other_value = other.facts["embedding"].get(key)
        if other_value != value:
            # A hash and a whitening have axes, which each pool learns unless it is told not to.
            remedy = f"--axes_of {pool.history[0][0]}" if key == "axes" else "the flags of the pool"
            raise UsageError(
                f"{flag} {other.history[0][0]}: its features have another {key} "
                f"({other_value!s:.16}, those of the pool {value!s:.16}); embed it with {remedy}"
            )


def can_be_listed(pool: Pool, curated: Pool | None = None):
    """UsageError where no list could name the images of a pool, or the curated ones.

    Drawn images and those in tar files are no files. It is asked before hours of work.
    """
    for part in (pool, curated):
        if part:
            part.path(int(part.rows[0]))


def some_are_left(rows: np.ndarray, pool: Pool, stage: str):
    """UsageError where a stage would leave nothing."""
    if not len(rows):
        raise UsageError(f"{stage}: of the {len(pool.rows):,d} images of the pool none is left")


def reopen(folder: Path, process: Process):
    """Before a stage that is repeated in its folder replaces the first of its files there."""
    # A kill between two of the files would leave some of the old result beside some of the new
    # one. Without stage.json nobody takes the mixture for a result.
    if process.main:
        (folder / "stage.json").unlink(missing_ok=True)


def finish(folder: Path, stage: str, pool: Pool, rows: np.ndarray, facts: dict,
           process: Process, curated: Pool | None = None) -> dict:
    """Write what the next stage takes up, stage.json last -> the content of stage.json.

    rows: the images that are left, ascending. UsageError if none is. Their paths and labels go
    into list.txt, on which `--data list:FILE` trains, and those of `curated` behind them. The
    number of images that is noted is that of the lines of list.txt.
    """
    some_are_left(rows, pool, stage)

    # The folder of the stage before is noted as seen from this one, so that all of them can be
    # moved together.
    earlier = os.path.relpath(pool.history[-1][0], folder.absolute())
    source = {"folder": earlier, "sha256": pool.sha256}
    listed = 0
    reopen(folder, process)
    if process.main:
        save_array(folder / "rows.npy", rows)
        listed = write_list(folder / "list.txt", pool, rows, curated)
    content = {"stage": stage, "source": source, "images": process.broadcast(listed), **facts}

    # stage.json is the last file: its presence says that the others are complete.
    if process.main:
        write_json(folder / "stage.json", content)
    process.barrier()
    return content


def files_to_list(pool: Pool, rows: np.ndarray,
                  curated: Pool | None) -> Iterator[tuple[str, Pool, int]]:
    """(path, its pool, its row) of these images of the pool, and behind them the curated ones.

    A file that is in both sets comes once, where it is in the pool.
    """
    # The curated set is the small one, so its paths are in memory, and those of the pool are not.
    only_curated = {curated.path(row): row for row in curated.rows.tolist()} if curated else {}
    for row in rows.tolist():
        path = pool.path(row)
        only_curated.pop(path, None)
        yield path, pool, row
    for path, row in only_curated.items():
        yield path, curated, row


def write_list(path: Path, pool: Pool, rows: np.ndarray, curated: Pool | None = None) -> int:
    """The list of files_to_list, with labels where there are some -> the number of its lines."""
    # Either all lines of a list have a label, or none: see images/names.py.
    labelled = all(part.images.labels for part in (pool, curated) if part)
    # Names may be of any bytes, as files are on Linux: "surrogateescape" keeps those that are no
    # text as they are.
    lines = 0
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        for name, part, row in files_to_list(pool, rows, curated):
            file.write(name + (f"\t{part.label(row)}" if labelled else "") + "\n")
            lines += 1
    os.replace(temporary, path)
    return lines
