"""Embed: a feature for each image of a pool, by a network or by the PCA hash, kept on the disk.

    images --> network: class token, or class token + GeM --> whitened --> unit length
           --> 16 x 16 grey pixels: PCA axes --> signs: 64 bits              |
                                                              features/*.npy (n, D) float16

Idea     Curation only compares images. So each is looked at once, and what remains of it is a
         vector of unit length: the product of two of them is their cosine. Which vector suits
         depends on the question. Copies are found by what edits do not change, similar things
         by the class token, and files that are there twice by a hash that needs no network.
Paper    DINOv2 sec. 3 (SSCD's features to find copies, a ViT-H's to retrieve, PCA hash)
Try      python curate.py embed folder:PHOTOS --weights pca_hash --output_dir curations/hash
Change   another way to describe an image is one line in DESCRIPTORS
Tests    pytest tests/curation/test_embed.py

Letters  n images, B of them in a batch, F numbers that describe an image at first, D that are
         kept.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import RGB, ChannelStats, center_crop, luma, normalise, squash
from curation.pieces import claim, make_pieces, save_array
from evaluation import protocol
from evaluation.copies import Descriptor, Whitening
from evaluation.protocol import Extractor
from images.data import Images, begin_worker, first_line, open_images
from machinery.checkpoints import digest, write_json
from machinery.flags import UsageError, require
from machinery.process import Process, autocast
from machinery.read_once import read_once

SAMPLE = 5000  # images on which the axes of a whitening, or of the PCA hash, are learned
HASH = "pca_hash"  # what --weights says in the place of a network
HASH_PIXELS = 16  # the side of the small grey image that the hash is made of
HASH_BITS = 64

# ----------------------------------------------------------------------------------------------
# What describes an image


class Thumbnail(nn.Module):
    """The image itself, small and grey, less its mean: (B, 3, S, S) -> (B, S*S)."""

    def forward(self, images: Tensor) -> Tensor:
        # Less its mean, and divided by its spread: a copy that is brighter or of less contrast
        # is then the same.
        grey = luma(images).flatten(1)  # (B, F)
        grey = grey - grey.mean(1, keepdim=True)

        # Of an image of one colour nothing is left, and zeros stand for what did not decode. All
        # such images are the same to a hash, so they get the same numbers.
        grey = torch.where((grey.abs() < 1e-4).all(1, keepdim=True), torch.ones_like(grey),
                           grey)
        return F.normalize(grey, dim=1)


# Name -> (side of the images of the papers' protocol, what shrinks an image to it, network ->
# what reads it). A copy may be a crop, so that nothing of the image may be cut off.
DESCRIPTORS = {
    "class": (224, center_crop, lambda model: model), "copy": (320, squash, Descriptor)}


@dataclass
class Reader:
    """How an image becomes F numbers."""

    module: nn.Module  # normalised images (B, C, S, S) -> (B, F)
    prepare: Callable[[Tensor], Tensor]  # an image as it is -> (C, S, S)
    channel_stats: ChannelStats
    facts: dict  # what its numbers depend on


def hash_reader() -> Reader:
    """Small grey images, of which the hash is made."""
    shrink = partial(squash, size=HASH_PIXELS)
    return Reader(Thumbnail(), shrink, RGB, {"weights": HASH})


def network_reader(config, process: Process) -> Reader:
    """The network of --weights, read as --descriptor says."""
    size, shrink, read = DESCRIPTORS[config.descriptor]
    # The Extractor of all evaluations: any network, at the size that suits it.
    extractor = Extractor(config, process).at(size)
    facts = {
        "weights": extractor.sha256, "network": extractor.network,
        "descriptor": config.descriptor, "image_size": extractor.size,
        "precision": config.precision}
    return Reader(
        read(extractor.model).eval(), partial(shrink, size=extractor.size),
        extractor.model.channel_stats, facts)


class Tolerant(torch.utils.data.Dataset):
    """Image i ready for the network, and what was wrong with it: "" if nothing was."""

    def __init__(self, images: Images, rows, prepare):
        self.images = images
        self.rows = rows
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        # In a large pool some files are always broken, and none of them may end the work of
        # days. A grey image takes the place of one that does not decode.
        row = int(self.rows[i])
        try:
            return self.prepare(self.images.read(row)), ""
        except Exception as error:  # decoders raise exceptions of many kinds
            grey = torch.full((self.images.channel_stats.channels, 64, 64), 128,
                              dtype=torch.uint8)
            name = f"{self.images.names[row]}: {first_line(error)}"
            return self.prepare(in_kind(grey, self.images)), name


def in_kind(grey: Tensor, images: Images) -> Tensor:
    """Bytes for photographs; floats for images of other channels: as they would be read."""
    return grey if images.channel_stats.channels == 3 else grey / 255


@torch.no_grad()
def describe(reader: Reader, images: Images, rows, config, process: Process):
    """The F numbers of these images: (m, F) float32, and a line for each that is broken.

    The rows of broken images are zeros. UsageError if a network gives what is no number.
    """
    # One process alone: pieces are shared among processes, not images.
    data = Tolerant(images, rows, reader.prepare)
    workers = min(config.num_workers, (len(rows) - 1) // config.batch_size)
    loader = torch.utils.data.DataLoader(data, config.batch_size, num_workers=workers,
                                         worker_init_fn=begin_worker)
    parts = []
    broken = []
    for batch, errors in loader:
        normalised = normalise(batch.to(process.device), reader.channel_stats)
        with autocast(config.precision, process.device):
            numbers = reader.module(normalised).float().cpu()  # (B, F)

        # The numbers of a broken image were computed from the grey one, so they become zeros.
        fine = torch.tensor([not error for error in errors])
        if not numbers[fine].isfinite().all():
            raise UsageError(f"--weights {config.weights}: it gives features that are no "
                             "numbers")
        parts.append(torch.where(fine[:, None], numbers, 0.0))
        broken += filter(None, errors)
    return torch.cat(parts), broken


# ----------------------------------------------------------------------------------------------
# From F numbers to D: axes that are learned on a sample of the pool


def learned_axes(sample: Tensor, binary: bool) -> Tensor:
    """The mean and the axes of a sample (m, F), side by side: (F, 1 + D)."""
    if not binary:
        # The axes come with the strongest last. How far images spread along the weak ones can
        # be told from many images only: of a small sample the strong ones are kept, one for
        # every four images.
        whitening = Whitening(sample)
        kept = max(1, min(sample.shape[1], len(sample) // 4))
        axes = (whitening.axes * whitening.scale)[:, -kept:]  # (F, D)
        return torch.cat([whitening.mean[:, None], axes], 1)

    # PCA: the directions in which images differ most. eigh gives the strongest last. Of small
    # grey images they are smooth waves, coarse ones first, and what is fine is left out. Here,
    # too, a small sample tells the strong ones only: on which side of the others an image lies
    # is chance, and two copies would not have the same bits. So it is one for every two images.
    sample = sample.double()
    mean = sample.mean(0)
    centred = sample - mean
    _, axes = torch.linalg.eigh(centred.T @ centred)  # (F, F)
    kept = max(1, min(HASH_BITS, len(sample) // 2))
    return torch.cat([mean[:, None], axes.flip(1)[:, :kept]], 1)


def on_axes(numbers: Tensor, axes: Tensor | None, binary: bool) -> Tensor:
    """(m, F) -> (m, D) of unit length, along the axes of learned_axes; a broken image stays 0.

    binary: only on which side of the mean an image lies along each axis: +1 or -1, divided by
    the root of D. The cosine of two such rows counts the bits that differ. Example: of 64 bits
    8 differ: (56 - 8) / 64 = .75.
    """
    if axes is None:
        return F.normalize(numbers, dim=1)
    # In float64, because axes of little spread are divided by small numbers.
    moved = (numbers.double() - axes[:, 0]) @ axes[:, 1:]  # (m, D)
    # An image that is exactly the mean, such as the only one of a pool, has no direction. It is
    # given one, because a row of zeros means an image that does not decode.
    moved[(moved == 0).all(1), 0] = 1.0
    if binary:
        moved = torch.where(moved > 0, 1.0, -1.0)
    unit = F.normalize(moved, dim=1)
    return unit.float() * (numbers != 0).any(1, keepdim=True)


def given_axes(folder: str, facts: dict) -> Path:
    """The file of the axes of --axes_of. UsageError if it is not there, or of other features.

    facts: those of the Reader whose features will be laid along the axes.
    """
    file = Path(folder) / "axes.npy"
    if not file.exists():
        raise UsageError(f"--axes_of {folder}: there is no {file}; give the folder of a pool "
                         f"that was embedded with --whiten, or by --weights {HASH}")
    stage = Path(folder) / "stage.json"
    if not stage.exists():  # the axes come first, the features after them
        raise UsageError(
            f"--axes_of {folder}: that pool is not embedded to its end; repeat its "
            "command first")
    learned_with = json.loads(stage.read_text())["embedding"]
    different = [name for name in facts if facts[name] != learned_with.get(name)]
    if different:
        raise UsageError(
            f"--axes_of {folder}: its axes were learned with another {different[0]} "
            f"({learned_with.get(different[0])!s:.60}, here {facts[different[0]]!s:.60})")
    return file


def axes_of(config, reader: Reader, images: Images, folder: Path, process: Process):
    """The axes of this pool, from its folder; they are learned if they are not there yet.

    None where features are kept as they are. --axes_of: those of another pool, so that features
    of the two can be compared.
    """
    binary = config.weights == HASH
    if not (binary or config.whiten or config.axes_of):
        return None
    file = folder / "axes.npy"

    def axes_in_file() -> np.ndarray:
        if file.exists():
            return np.load(file)
        if config.axes_of:
            axes = np.load(given_axes(config.axes_of, reader.facts))
        else:
            # Images that are spread evenly over the pool, broken ones left out.
            count = min(len(images), SAMPLE)
            rows = np.linspace(0, len(images) - 1, count).astype(int)
            numbers, _ = describe(reader, images, rows, config, process)
            numbers = numbers[(numbers != 0).any(1)]
            if not len(numbers):
                raise UsageError(f"{images.name}: none of its images decodes")
            axes = learned_axes(numbers, binary).numpy()
        save_array(file, axes)
        return axes

    # One process describes the sample, which takes minutes on a CPU, while the others wait.
    return torch.from_numpy(read_once(axes_in_file, process))


# ----------------------------------------------------------------------------------------------
# The stage

ARGUMENTS = "DATA --weights RUN_OR_FILE_OR_NAME"


@dataclass
class Config(protocol.NetworkConfig):
    # -- what to judge
    # A pool is named by the word behind the name of the stage.
    data: str = dataclasses.field(default="", metadata={"no_flag": True})  # not a flag
    # -- features
    descriptor: Literal[
        *DESCRIPTORS] = "class"  # what of a network: class token; copy, with GeM
    whiten: bool = False  # make all directions of the features count alike, for copies
    axes_of: str = ""  # a folder of features whose whitening, or PCA, is taken over
    shard_size: int = 8192  # images in each file of features; 100000 for very large pools
    # -- machine
    batch_size: int = 128  # images at once on each process
    # -- where to
    output_dir: str = ""  # the folder for the features; empty: curations/embed

    def check(self):
        super().check()
        require(self, lambda x: x >= 1, "at least 1", "shard_size")


def run(words: list[str], config: Config, process: Process) -> dict:
    """A feature for each image of DATA: by a network, or --weights pca_hash."""
    reader = hash_reader() if config.weights == HASH else network_reader(config, process)
    images = read_once(
        partial(open_images, words[0], config.data_root, config.download, "DATA",
                reader.channel_stats), process)
    names_sha256 = digest_of_names(images, words[0])
    folder = Path(config.output_dir or "curations/embed")

    # The axes of another pool are looked for before anything is written. Their content counts:
    # that pool may have been made anew since.
    axes_file = given_axes(config.axes_of, reader.facts) if config.axes_of else None

    # Everything that a feature depends on. The names stand for the images: a file that has got
    # other pixels under its old name is not noticed.
    inputs = {
        "data": words[0], "names": names_sha256, **reader.facts, "whiten": config.whiten,
        "axes_of": digest(axes_file) if axes_file else "", "shard_size": config.shard_size}
    claim(folder, inputs, process)
    axes = axes_of(config, reader, images, folder, process)
    binary = config.weights == HASH

    def features(start: int, end: int) -> np.ndarray:
        numbers, broken = describe(reader, images, range(start, end), config, process)
        for line in broken:
            print(f"left out, because it does not decode: {line}", flush=True)
        return on_axes(numbers, axes, binary).half().numpy()

    # This also makes the folder into which the pieces go.
    claim(folder / "features", inputs, process)
    table = make_pieces(folder / "features", len(images), config.shard_size, features, process,
                        "images")

    # No feature is zero but that of an image that did not decode.
    decoded = [
        numbers[(chunk != 0).any(1)] for numbers, chunk in table.chunks(np.arange(len(table)))]
    rows = np.concatenate(decoded)
    if not len(rows):
        raise UsageError(f"{words[0]}: none of its {len(images):,d} images decodes")
    # The report goes back over the list of a stage, as long as it is still this list.
    list_sha256 = ""
    if words[0].startswith("list:") and (images.root / "stage.json").exists():
        listed = images.root / "list.txt"
        list_sha256 = digest(listed) if listed.exists() else ""
    facts = {
        "stage": "embed", "images": len(rows), "broken": len(images) - len(rows),
        "width": table.width, "data": words[0], "data_root": config.data_root,
        "root": str(images.root.resolve()) if images.root else "", "classes": images.classes,
        "shard_size": config.shard_size, "names_sha256": names_sha256,
        "embedding": dict(reader.facts,
                          axes=digest(folder / "axes.npy") if axes is not None else None)}
    # Left out for other pools, whose stage.json, and with it its hash, is the same as before this
    # note existed.
    if list_sha256:
        facts["list_sha256"] = list_sha256
    if process.main:
        write_pool(folder, images, rows, facts)
    process.barrier()
    broken = f"; {facts['broken']} do not decode" if facts["broken"] else ""
    process.print(f"embed: {len(rows):,d} images of {words[0]}, {table.width} numbers each"
                  f"{broken}")
    return facts


def digest_of_names(images: Images, data: str) -> str:
    """The hash of all names. UsageError for a name that a list could not hold."""
    sha256 = hashlib.sha256()
    for name in images.names:
        if any(letter in name for letter in "\n\r\t"):
            raise UsageError(
                f"{data}: {name!r} has a line break or a tab in its name, and lists "
                "have a name in each line; rename it")
        sha256.update(name.encode(errors="surrogateescape") + b"\n")
    return sha256.hexdigest()


def write_pool(folder: Path, images: Images, rows: np.ndarray, facts: dict):
    """What curation.pool.open_pool takes up; stage.json comes last."""
    # Names in one file, labels in another: neither needs the data set to be opened again.
    save_array(folder / "rows.npy", rows)
    if images.labels:
        save_array(folder / "labels.npy", np.array(images.labels))
    if images.root:
        temporary = folder / "names.txt.tmp"
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in images.names)
        temporary.replace(folder / "names.txt")
    write_json(folder / "stage.json", facts)
