"""Plant: a pool in which the copies are known, to find a threshold and to say what it is worth.

    images of a data set --> files of PNG, some with an edited copy --> groups.csv: path, group

Idea     A threshold belongs to one network and one kind of images. Whether two images of a pool
         are copies nobody has written down; but if we copy some of them ourselves, we know it
         of these. The threshold that finds them again is the one to use.
Paper    none; the edits are those of copy detection (DINO sec. 4.2.1, Copydays)
Try      python curate.py plant shapes:100 --share 0.1 --output_dir curations/planted
Change   another edit is one line of EDITS in evaluation/copies.py
Tests    pytest tests/curation/test_plant.py
"""

import csv
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.transforms.v2.functional import to_pil_image

from curation.pieces import claim
from evaluation.copies import EDITS
from images.data import first_line, open_images
from machinery.clock import Progress
from machinery.flags import UsageError, did_you_mean, require
from machinery.process import Process

ARGUMENTS = "DATA"


@dataclass
class Config:
    # -- copies
    share: float = 0.1  # how many images get a copy; 0 only writes the images as files
    edits: tuple[str, ...] = ()  # names of edits, as "crop 10 %"; empty: all that there are
    seed: int = 0  # of the choice of images and edits
    # -- where from
    data_root: str = "data"  # the folder where torchvision keeps its data sets
    download: bool = False  # let torchvision fetch the data set
    # -- where to
    output_dir: str = ""  # the folder for images/ and groups.csv; empty: curations/plant
    device: str = dataclasses.field(default="cpu", metadata={"no_flag": True})  # not a flag

    def check(self):
        require(self, lambda x: x <= 1, "from 0 to 1", "share")
        # The names of edits have spaces in them, and are easily mistyped.
        for name in self.edits:
            if name not in EDITS:
                raise UsageError(f"--edits {name!r}: choose from {', '.join(EDITS)}"
                                 f"{did_you_mean(name, EDITS)}")


def run(words: list[str], config: Config, process: Process) -> dict:
    """The images of DATA as files, some with an edited copy; groups.csv says which."""
    images = open_images(words[0], config.data_root, config.download, "DATA")
    folder = Path(config.output_dir or "curations/plant")
    edits = list(config.edits or EDITS)
    inputs = {"data": words[0], "share": config.share, "edits": edits, "seed": config.seed}
    claim(folder, inputs, process)

    # Which images get a copy, and which edit makes it, follows from the seed alone.
    rng = np.random.default_rng(config.seed)
    copied = rng.permutation(len(images))[:round(config.share * len(images))]
    edit_of = {int(i): edits[rng.integers(len(edits))] for i in copied}

    # The first folder of a file is its class, as in any folder of images.
    names = []
    for i in range(len(images)):
        label = images.classes[images.labels[i]].replace("/", "-") if images.labels else ""
        names.append(Path("images") / label / f"{i:07d}.png")
    broken = 0
    copies = len(edit_of)

    # One process writes. It is no work for a large pool: to find a threshold some thousand
    # images are enough.
    if process.main:
        report = Progress("written", len(images), process)
        rows = []
        for i, name in enumerate(names):
            try:
                image = images.read(i)
            except Exception as error:  # decoders raise exceptions of many kinds
                process.print(f"left out: {images.names[i]}: {first_line(error)}")
                broken += 1
                copies -= i in edit_of
                continue
            write_png(folder / name, image)
            rows.append((name, i, ""))
            if i in edit_of:
                # "_" comes after ".", so that an original stands before its copy, and stays.
                copy = name.with_name(f"{name.stem}_copy.png")
                write_png(folder / copy, EDITS[edit_of[i]](image, i))
                rows.append((copy, i, edit_of[i]))
            report(i + 1)

        # An image without a copy is a group of its own.
        with open(folder / "groups.csv", "w", newline="", encoding="utf-8",
                  errors="surrogateescape") as file:
            csv.writer(file).writerows([("path", "group", "edit"), *rows])
    process.barrier()
    process.print(
        f"plant: {len(images) - broken:,d} images of {words[0]} and {copies:,d} copies "
        f"in {folder}/images")
    return {"images": len(images) - broken, "copies": copies}


def write_png(path: Path, image):
    """(3, H, W) uint8 -> a file."""
    # PNG loses nothing, so that an image is compared with what was copied. Level 1 packs less
    # tightly, and is several times as fast.
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(image).save(path, compress_level=1)
