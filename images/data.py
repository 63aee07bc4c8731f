"""Data: images by name, in an order that can be taken up again anywhere.

    "shapes" | "folder:PATH" | "shards:PATTERN" | a torchvision class   (--cache: decoded once)
                                   |
                  Images: read(i) -> (C, H, W), labels, names
                                   |
    Sampler: (epoch, step, index) from the seed --> Views: read, crop, draw colours --> DataLoader

Idea     Nothing random has a history. The order of an epoch follows from (seed, epoch), the
         crops of an image from (seed, epoch, index). A resumed run starts counting at a later
         step, with any number of workers, and another number of processes sees the same images
         in turn.
Paper    none; DINOv2's released loader reseeds itself on resume, which changes the order
Try      python -m images.data [NAME ...]      what a data set holds, by name
Change   a new data set is one function and one line in DATASETS
Tests    pytest tests/images/test_data.py
"""

import contextlib
import inspect
import io
import os
import signal
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from augment import RGB, Masking, MultiCrop, Pixels, collate, luma

ARRAYS = (".npy",)  # (H, W), (C, H, W) or (H, W, C); integers, or floats from 0 to 1
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


@dataclass
class Images:
    """A set of images. `labels` is None where there are none; `names` tell the images apart."""

    name: str
    read: Callable[[int], Tensor]  # index -> (C, H, W), see in_channels; raises if it cannot
    names: list[str]
    labels: list[int] | None = None
    classes: list[str] | None = None
    # Where reading in any order is slow: generator -> an order to read in. Else any
    # permutation.
    order: Callable[[np.random.Generator], np.ndarray] | None = None
    pixels: Pixels = RGB  # what a network will be fed them as

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices) -> "Images":
        indices = [int(i) for i in indices]
        return replace(self, read=partial(_read_through, self.read,
                                          indices), names=[self.names[i] for i in indices],
                       labels=self.labels and [self.labels[i] for i in indices],
                       order=self.order and partial(_order_of_some, self.order, indices))


def _read_through(read, indices, i):
    return read(indices[i])


def _order_of_some(order, indices, rng):
    whole = order(rng)
    new_index = np.full(len(whole), -1)
    new_index[indices] = np.arange(len(indices))
    return new_index[whole][new_index[whole] >= 0]


# ----------------------------------------------------------------------------------------------
# Files of any kind


def in_channels(image: Tensor, channels: int) -> Tensor:
    """(c, H, W), uint8 or floats from 0 to 1 -> (channels, H, W): uint8 if they are three, as
    photographs come; else floats, which keep what a camera of 16 bits saw.
    """
    if len(image) == 1 and channels == 3:
        image = image.expand(3, -1, -1)
    if len(image) == 3 and channels == 1:
        image = luma((image / 255 if image.dtype == torch.uint8 else image)[None])[0]
    if len(image) != channels:
        raise ValueError(f"{len(image)} channels, expected --in_chans {channels}")
    if channels == 3:
        return image if image.dtype == torch.uint8 else (image * 255).round().byte()
    return image / 255 if image.dtype == torch.uint8 else image


def from_array(array: np.ndarray, channels: int) -> Tensor:
    """(H, W), (C, H, W) or (H, W, C) of integers, or of floats from 0 to 1 -> as
    in_channels.
    """
    if array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"an array {array.shape} of {array.dtype}, expected an image")
    first, last = array.shape[0], array.shape[-1]
    if array.ndim == 3 and first != channels and (last == channels or last < first):
        array = array.transpose(2, 0, 1)
    if np.issubdtype(array.dtype, np.integer):
        array = array / np.float32(np.iinfo(array.dtype).max)
    image = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"values from {image.min():g} to {image.max():g}, expected 0 to 1, or "
                         "integers of 8 or 16 bits")
    return in_channels(image if image.ndim == 3 else image[None], channels)


def read_file(file: Path | io.BytesIO, channels: int = 3) -> Tensor:
    """Any image file, or a .npy -> (channels, H, W), turned upright as its EXIF says."""
    with open(file, "rb") if isinstance(file, Path) else file as stream:
        if stream.read(6) == b"\x93NUMPY":
            stream.seek(0)
            return from_array(np.load(stream, allow_pickle=False), channels)
        with Image.open(stream) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, in a type that may have more
                return from_array(np.asarray(image) / np.float32(65535), channels)
            if image.mode == "F" or (channels not in (1, 3)
                                     and len(image.getbands()) == channels):
                return from_array(np.asarray(image), channels)
            return in_channels(pil_to_tensor(image.convert("RGB")), channels)


def _read_path(root: Path, names: list[str], channels: int, i: int) -> Tensor:
    return read_file(root / names[i], channels)


# ----------------------------------------------------------------------------------------------
# Data sets by name: argument, split, root, download, channels -> Images


def open_folder(argument: str, split: str, root: str, download: bool, channels: int) -> Images:
    """folder:PATH. Where all images lie in folders, the first one is the label; else no
    labels.
    """
    path = Path(argument).expanduser()
    if not argument or not path.is_dir():
        raise ValueError(f"folder:{argument}: there is no such folder")
    files = sorted(
        os.path.relpath(os.path.join(where, file), path)
        for where, _, files in os.walk(path, followlinks=True) for file in files
        if not file.startswith("."))
    names = [name for name in files if name.lower().endswith(EXTENSIONS)]
    names = names or [name for name in files if name.lower().endswith(ARRAYS)]
    if not names:
        raise ValueError(f"folder:{argument}: found 0 images under it; expected "
                         f"{', '.join(EXTENSIONS + ARRAYS)} files, or folders of them")
    read = partial(_read_path, path, names, channels)
    tops = [Path(name).parts[0] for name in names]
    classes = sorted(set(tops))
    if any(top == name for top, name in zip(tops, names)) or len(classes) < 2:
        return Images("folder", read, names)
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[top] for top in tops]
    return Images("folder", read, names, labels, classes)


class _Drawn:
    """Draws each image of a world once and keeps it: drawing takes longer than cropping.

    A small world is drawn before there are workers, so that all of them have it.
    """

    def __init__(self, world):
        self.world, self.kept = world, {}
        for i in range(len(world) if len(world) <= 10_000 else 0):
            self(i)

    def __call__(self, i: int) -> Tensor:
        if i not in self.kept:
            self.kept[i] = torch.from_numpy(self.world[i][0])
        return self.kept[i]


@cache
def _drawn(split: str, count: int | None) -> _Drawn:
    from images.shapes import Shapes  # the embedded world: other data sets do not need it

    return _Drawn(Shapes(split, count))


def _converted(read, channels: int, i: int) -> Tensor:
    return in_channels(read(i), channels)


def open_shapes(argument: str, split: str, root: str, download: bool, channels: int) -> Images:
    """shapes, or shapes:N for N images: the world of shapes.py."""
    if argument and not argument.isdigit():
        raise ValueError(f"shapes:{argument}: expected a number of images, or nothing")
    drawn = _drawn(split, int(argument or 0) or None)
    names = [f"{split}-{i:06d}" for i in range(len(drawn.world))]
    return Images("shapes", partial(_converted, drawn, channels), names, drawn.world.labels,
                  drawn.world.classes)


def _read_torchvision(dataset, channels: int, i: int) -> Tensor:
    return in_channels(pil_to_tensor(dataset[i][0].convert("RGB")), channels)


def open_torchvision(argument: str, split: str, root: str, download: bool,
                     channels: int) -> Images:
    """Any classification set of torchvision, by its class name: CIFAR10, Flowers102, ..."""
    cls = getattr(torchvision.datasets, argument)
    takes = inspect.signature(cls).parameters
    options = [{}]
    if "train" in takes:
        options = [{"train": split == "train"}]
    elif "split" in takes:
        options = [{"split": s} for s in (["train"] if split == "train" else ["val", "test"])]
    more = {"download": download} if "download" in takes else {}
    errors = []
    for option in options:
        try:
            dataset = cls(root, **option, **more)
            break
        except Exception as error:  # every set complains in its own way
            errors.append(str(error).split("\n")[0])
    else:
        raise ValueError(
            f"{argument} in --data_root {root}: {errors[0]} (--download fetches it)")
    homes = [a for a in ("targets", "labels", "_labels", "y") if hasattr(dataset, a)]
    labels = list(map(int, getattr(dataset, homes[0]))) if homes else None
    if labels is None:
        labels = [int(dataset[i][1]) for i in range(len(dataset))]
    names = [f"{argument}-{split}-{i:07d}" for i in range(len(dataset))]
    return Images(argument, partial(_read_torchvision, dataset, channels), names, labels,
                  getattr(dataset, "classes", None))


def _read_shards(shards, channels: int, i: int) -> Tensor:
    return read_file(io.BytesIO(shards.bytes(i)), channels)


def open_shards(argument: str, split: str, root: str, download: bool, channels: int) -> Images:
    """shards:PATTERN, tar files of images, read nearly in order. Labels: see store.Shards."""
    from images import store  # tar files: few runs need them

    shards = store.Shards(argument, EXTENSIONS + ARRAYS)
    return Images("shards", partial(_read_shards, shards, channels), shards.names,
                  shards.labels, shards.classes, shards.order)


DATASETS = {"shapes": open_shapes, "folder": open_folder, "shards": open_shards}


def open_images(spec: str, root: str = "data", download: bool = False, flag: str = "--data",
                pixels: Pixels = RGB) -> Images:
    """NAME[:ARGUMENT][:val] -> Images. ValueError names the flag and the choices."""
    body, _, tail = spec.rpartition(":")
    spec, split = (body, tail) if body and tail in ("train", "val") else (spec, "train")
    name, _, argument = spec.partition(":")
    if name not in DATASETS and not inspect.isclass(getattr(torchvision.datasets, name, None)):
        raise ValueError(
            f"{flag} {spec!r}: choose from {', '.join(DATASETS)} (as in folder:PATH), "
            "or a torchvision class name such as CIFAR10")
    try:
        if name in DATASETS:
            images = DATASETS[name](argument, split, root, download, pixels.channels)
        else:
            images = open_torchvision(name, split, root, download, pixels.channels)
        if pixels.channels != 3:  # whether it has them: better asked now than by the first batch
            with contextlib.suppress(OSError):
                images.read(0)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None
    return replace(images, pixels=pixels)


def cached(images: Images, folder: str, side: int, num_workers: int = 0) -> Images:
    """The same images from a store.Cache in `folder`, made where it is not; "": from the
    source.
    """
    if not folder:
        return images

    def report(done):
        if sys.stderr.isatty() and (done % 100 == 0 or done == len(images)):
            print(f"\r--cache: {done:,d} of {len(images):,d} images", end="", file=sys.stderr,
                  flush=True)

    if side < 0:
        raise ValueError(f"--cache_side {side}: expected pixels, or 0 for images as they are")
    try:
        from images import store  # a cache: few runs need one

        cache = store.build(Path(folder), images.read, images.names, side, num_workers, report)
    except (ValueError, OSError) as error:
        raise ValueError(f"--cache {error}") from None
    return replace(images, read=cache.read)


def held_out(name: str, share: int = 20) -> bool:
    """One image in `share`, chosen by a hash of its name: the same ones whatever else is
    there.
    """
    return zlib.crc32(name.encode()) % share == 0


# ----------------------------------------------------------------------------------------------
# Order, and the loader of training batches


class Sampler:
    """Batches of keys (epoch, step, index) for one process, from `start` up to `steps`.

    An epoch here is one pass over the data: floor(length / global batch) steps, the rest left
    out. Step s of the pass takes the s-th global batch of its permutation, process r the r-th
    slice. `order` draws the permutation (Images.order).
    """

    def __init__(self, length: int, batch_size: int, steps: int, start: int = 0, seed: int = 0,
                 rank: int = 0, world_size: int = 1, order=None):
        self.length, self.batch_size, self.steps, self.start = length, batch_size, steps, start
        self.seed, self.rank, self.global_batch = seed, rank, batch_size * world_size
        self.order = order or (lambda rng: rng.permutation(length))
        self.steps_per_pass = length // self.global_batch
        if not self.steps_per_pass:
            raise ValueError(
                f"--batch_size_per_gpu {batch_size}: a global batch of "
                f"{self.global_batch} is larger than the data set of {length} images; "
                f"give at most {max(1, length // world_size)}")

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self):
        epoch, order = None, None
        for step in range(self.start, self.steps):
            if epoch != step // self.steps_per_pass:
                epoch = step // self.steps_per_pass
                order = self.order(np.random.default_rng([self.seed, epoch]))
            first = step % self.steps_per_pass * self.global_batch + self.rank * self.batch_size
            yield [(epoch, step, int(i)) for i in order[first:first + self.batch_size]]


class Views(torch.utils.data.Dataset):
    """Key (epoch, step, index) -> the crops of one image and the colours they will get."""

    def __init__(self, images: Images, multi_crop: MultiCrop, seed: int = 0):
        self.images, self.multi_crop, self.seed = images, multi_crop, seed

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        epoch, step, index = key
        image, broken = self.read(epoch, index)
        rng = np.random.default_rng([self.seed, epoch, index])
        return dict(self.multi_crop(image, rng), index=index, step=step, broken=broken)

    def read(self, epoch: int, index: int) -> tuple[Tensor, list[str]]:
        """The image, or one chosen from the seed in place of a broken one, which is named."""
        broken, others = [], np.random.default_rng([self.seed, epoch, index, 1])
        for _ in range(10):
            try:
                return self.images.read(index), broken
            except Exception as error:  # whatever a decoder raises
                broken.append(f"{self.images.names[index]}: {str(error).splitlines()[0]}")
                index = int(others.integers(len(self.images)))
        raise RuntimeError(f"ten images in a row do not decode, the last: {broken[-1]}")


def _begin_worker(worker: int):
    torch.set_num_threads(1)  # workers are the parallelism
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler of the process that made it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which will end it, after its last step


def training_loader(views: Views, sampler: Sampler, num_workers: int, pin_memory: bool = False,
                    masking: Masking | None = None):
    """An iterator over the batches of augment.collate, from the sampler's start to its end."""
    return torch.utils.data.DataLoader(views, batch_sampler=sampler, num_workers=num_workers,
                                       collate_fn=partial(collate, masking=masking),
                                       pin_memory=pin_memory, worker_init_fn=_begin_worker,
                                       prefetch_factor=4 if num_workers else None)


if __name__ == "__main__":
    for spec in sys.argv[1:] or ["shapes:100", "shapes:100:val"]:
        images = open_images(spec)
        kinds = f"{len(set(images.labels))} classes" if images.labels else "no labels"
        print(
            f"{spec}: {len(images):,d} images, {kinds}, the first {tuple(images.read(0).shape)}, "
            f"{sum(map(held_out, images.names)):,d} of them held out by name")
    print(
        "step 0 of two processes with batch 3:",
        *([i for *_, i in next(iter(Sampler(100, 3, 9, rank=r, world_size=2)))]
          for r in (0, 1)))
    print("step 0 of one process with batch 6:  ",
          [i for _, _, i in next(iter(Sampler(100, 6, 9)))])
