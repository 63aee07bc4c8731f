"""Pairs: images, each together with a map that has one number for every pixel of it.

    "shapes" | "pairs:PATH" | "ade20k:PATH" | VOCSegmentation ...
                  |
    Pairs: read(i) -> image (C, H, W), map (H, W): the class of each pixel, or metres to it

Idea     Segmentation and depth learn from the same kind of data: a picture, and a second
         picture of the same size that holds an answer for every pixel. Pixels without an answer
         are marked in the map itself, by IGNORE for classes and by 0 for metres; no loss and no
         figure counts them.
Paper    DINOv2 sec. 7.4 (ADE20k, Cityscapes, Pascal VOC; NYUd, KITTI, SUN RGB-D)
Try      python -m images.pairs [NAME]      what is in a set of pairs
Change   a new data set is a function that returns Pairs, and one line in MASKS or DEPTHS
Tests    pytest tests/images/test_pairs.py

Letters  C channels, H W pixels.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image
from torch import Tensor

from augment import RGB, ChannelStats
from images.data import held_out
from images.files import EXTENSIONS, in_channels, read_file
from images.names import list_images
from machinery.flags import command, user_errors

IGNORE = -1  # in a map of classes: this pixel has no answer, and does not count


@dataclass
class Pairs:
    """Images and their maps, which are read one by one by their numbers 0, 1, 2, ..."""

    name: str  # of the data set, as in --data
    # number -> image (C, H, W) as images.files.read_file gives it, and its map (H, W): int64
    # classes with IGNORE, or float32 metres with 0 where nothing was measured.
    read: Callable[[int], tuple[Tensor, Tensor]]
    names: list[str]  # one for each pair
    classes: list[str] | None = None  # of maps of classes: their names, where they are known
    channel_stats: ChannelStats = RGB  # the channels, mean and spread that a network will be fed
    # Where pairs are drawn: (number, side) -> the same pair, drawn with `side` pixels.
    draw: Callable[[int, int], tuple[Tensor, Tensor]] | None = None
    root: Path | None = None  # where names are files: the folder that they are relative to

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Pair i; ValueError with its name if it does not decode, or if image and map misfit."""
        # Decoders raise exceptions of many kinds, most of which do not say which file it was.
        try:
            image, map = self.read(i)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self.name}: {self.names[i]} does not decode ({reason})") from None

        if image.shape[-2:] != map.shape:
            raise ValueError(
                f"{self.names[i]}: an image of {image.shape[-1]} x {image.shape[-2]} pixels "
                f"with a map of {map.shape[-1]} x {map.shape[-2]}; expected the same size")
        # A class without a name is a mistake in the list of names, or a number for "ignored"
        # that nobody has told.
        if self.classes and int(map.max()) >= len(self.classes):
            raise ValueError(f"{self.names[i]}: its mask has the class {int(map.max())}, and "
                             f"there are {len(self.classes)}; is --ignore_label right?")
        return image, map

    def drawn_at(self, side: int) -> "Pairs":
        """The same pairs drawn with `side` pixels, if they are drawn; else as they are."""
        return replace(self, read=partial(_drawn_pair, self.draw, side)) if self.draw else self

    def subset(self, indices) -> "Pairs":
        """The pairs of these numbers alone; they are numbered anew, from 0."""
        # numpy's integers become Python's, which every table takes. Example: subset([4, 2]) has
        # two pairs, and its pair 1 is pair 2 of these.
        indices = [int(i) for i in indices]
        draw = self.draw and partial(_draw_part, self.draw, indices)
        return replace(self, read=partial(_read_part, self.read, indices), draw=draw,
                       names=[self.names[i] for i in indices])

    def spread_out(self, most: int) -> "Pairs":
        """At most `most` of the pairs, evenly spread: files are often sorted by what they show.
        """
        # Example: at most 3 of 11 are the numbers 0, 5 and 10.
        count = min(len(self), most)
        return self.subset(np.linspace(0, len(self) - 1, count).astype(int))


# As in images/data.py, what goes to worker processes stands at the top level of the file, where
# pickle finds it by its name.


def _drawn_pair(draw, side: int, i: int):
    return draw(i, side)


def _read_part(read, indices: list[int], i: int):
    return read(indices[i])


def _draw_part(draw, indices: list[int], i: int, side: int):
    return draw(indices[i], side)


# ----------------------------------------------------------------------------------------------
# Files of maps


def read_mask(file: Path, ignore_label: int = 255) -> Tensor:
    """A picture of class numbers -> (H, W) int64, IGNORE where it has `ignore_label`.

    Its pixels are the numbers themselves: grey of 8 or 16 bits, or indices into a palette.
    ValueError for a picture of colours.
    """
    # The colours of a palette are for the eye. np.asarray gives the indices, which are classes;
    # converting the picture to RGB or to grey would lose them.
    with Image.open(file) as image:
        if len(image.getbands()) > 1:
            raise ValueError(f"{file}: a mask in colours ({image.mode}); expected one number "
                             "for each pixel, as grey or with a palette")
        classes = torch.from_numpy(np.array(image).astype(np.int64))  # (H, W)
    return classes.masked_fill(classes == ignore_label, IGNORE)


def read_depth(file: Path, scale: float = 1000.0) -> Tensor:
    """Depths -> metres (H, W) float32, 0 where nothing was measured.

    A .npy holds metres, and so does a picture of floats. A picture of integers has `scale` of them
    in a metre (1000: they are millimetres). "Not measured" is 0, the largest number of 16 bits,
    or among floats NaN and infinity. ValueError for colours, for an array that is not (H, W), and
    for a .npy of integers, whose unit nobody can tell.
    """
    # 65,535 is the largest number of 16 bits, which some cameras write for "too far". NumPy's
    # files are read without pickles, which could run code.
    if file.suffix.lower() == ".npy":
        values = np.load(file, allow_pickle=False)
        if values.dtype.kind != "f":
            raise ValueError(f"{file}: an array of {values.dtype}, expected metres in floats")
        metres = values.astype(np.float32)
    else:
        with Image.open(file) as image:
            values = np.array(image)
        metres = values.astype(np.float32)
        if values.dtype.kind != "f":
            metres = np.where(values == 65535, 0, metres) / np.float32(scale)
    if metres.ndim != 2:
        raise ValueError(f"{file}: an array {metres.shape}, expected one depth for each pixel")

    # All ways to say "not measured" become 0, which is less than any depth.
    metres = np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32)
    return torch.from_numpy(metres)


# ----------------------------------------------------------------------------------------------
# Sets of pairs by name
#
# Each function takes (argument, split, root, download, channels, read_map) and returns Pairs.
# Of "pairs:PATH:val", PATH is the argument and val the split, which is "" where none is named;
# root and download are --data_root and --download; channels are those of the images; read_map
# reads the file of a map.


def open_folder(kind: str, argument: str, split: str, root: str, download: bool, channels: int,
                read_map) -> Pairs:
    """pairs:PATH, the folders PATH/images and PATH/masks, or PATH/depth: `kind` says which.

    A map has the name of its image, but for the ending. Where PATH has a folder of the split's
    name, as PATH/val/images, that one is meant; where it has no such folders, the pairs are
    divided by their names (held_out). A file PATH/classes.txt names the classes, one on each
    line.
    """
    # PATH/val/images is the layout of a set with a training and a validation part; a set that
    # has only one part is PATH/images. That may also be the training part beside PATH/val.
    path = Path(os.path.expanduser(argument))
    part = path / (split or "train")
    parts = [name for name in ("train", "val") if (path / name).is_dir()]
    if not split and len(parts) == 2:
        raise ValueError(f"pairs:{argument} has train and val in it: give one of them, as in "
                         f"pairs:{argument}:train")
    beside_val = split == "train" and (path / "images").is_dir()
    if split and parts and split not in parts and not beside_val:
        raise ValueError(f"pairs:{argument}:{split}: there is no folder {part}")
    top = part if part.is_dir() else path

    # Depths may be arrays of metres, masks are pictures of class numbers.
    pictures = (".png", ".tif", ".tiff")
    images = _files(top / "images", EXTENSIONS, f"pairs:{argument}")
    maps = _files(top / kind, pictures if kind == "masks" else (*pictures, ".npy"),
                  f"pairs:{argument}")

    # Matched by their names without the ending: 0001.jpg belongs to 0001.png. One image without
    # a map, or one map without an image, often means that a whole folder is the wrong one, so
    # that nothing is read by half.
    map_of = {Path(name).with_suffix(""): name for name in maps}
    missing = [name for name in images if Path(name).with_suffix("") not in map_of]
    if missing or not len(map_of) == len(maps) == len(images):
        first = f"; {missing[0]} has no map" if missing else ""
        raise ValueError(f"pairs:{argument}: {len(images)} images in {top / 'images'} and "
                         f"{len(maps)} maps in {top / kind}{first}; expected one map of the "
                         "same name for each image")
    files = []
    for name in images:
        files.append((top / "images" / name, top / kind / map_of[Path(name).with_suffix("")]))

    # Line 3 of classes.txt is the name of the class 2, as classes are counted from 0. The names
    # are the same for all splits, so they may lie beside these. Depths have no classes.
    classes = None
    for listed in (top / "classes.txt", path / "classes.txt"):
        if kind == "masks" and listed.exists():
            classes = [line.strip() for line in listed.read_text("utf-8-sig").split("\n")]
            while classes and not classes[-1]:
                classes.pop()
            if "" in classes:
                raise ValueError(
                    f"{listed}: line {classes.index('') + 1} is empty; expected the "
                    f"name of class {classes.index('')}")
            break
    pairs = Pairs("pairs", partial(_read_files, files, channels, read_map), images, classes,
                  root=top)
    return part_of_pairs(pairs, f"pairs:{argument}", split) if split and not parts else pairs


def part_of_pairs(pairs: Pairs, spec: str, split: str) -> Pairs:
    """The part "val" of pairs that no folder divides: what held_out says; "train": the others."""
    # As for images (see images/data.py): an image is in the same part in every run.
    chosen = [i for i, name in enumerate(pairs.names) if held_out(name) == (split == "val")]
    if not chosen:
        raise ValueError(
            f"{spec}:{split}: by their names none of its {len(pairs)} pairs is for "
            f"{split}; give another set")
    if os.environ.get("RANK", "0") == "0":
        print(f"{spec}:{split}: no folder divides this set; these are {len(chosen):,d} of its "
              f"{len(pairs):,d} pairs, chosen by their names")
    return pairs.subset(chosen)


def open_ade20k(argument: str, split: str, root: str, download: bool, channels: int,
                read_map) -> Pairs:
    """ade20k:PATH, the folder ADEChallengeData2016 as it is unpacked: 150 classes."""
    # images/training/ADE_train_00000001.jpg has its mask in the same place of annotations/.
    path = Path(os.path.expanduser(argument))
    part = "validation" if split == "val" else "training"
    images = _files(path / "images" / part, (".jpg",), f"ade20k:{argument}")
    files = []
    for name in images:
        mask = path / "annotations" / part / Path(name).with_suffix(".png")
        files.append((path / "images" / part / name, mask))
    return Pairs("ade20k", partial(_read_files, files, channels, _read_ade20k), images,
                 [f"class {c}" for c in range(150)], root=path / "images" / part)


def _read_ade20k(file: Path) -> Tensor:
    """0 is "other objects", which has no answer; the classes 1 to 150 become 0 to 149."""
    return read_mask(file, ignore_label=0).sub(1).clamp(min=IGNORE)


def _files(folder: Path, endings: tuple[str, ...], flag: str) -> list[str]:
    """The names of the files below a folder that end so, sorted; ValueError without any."""
    names = sorted(list_images(folder, endings))
    if not names:
        raise ValueError(f"{flag}: no {', '.join(endings)} files in {folder}")
    return names


def _read_files(files: list[tuple[Path, Path]], channels: int, read_map, i: int):
    image, map = files[i]

    # A photograph may have to be turned, as its EXIF says. Whether its map was made before or
    # after that nobody can tell, and where both have the same size nothing would look wrong.
    if image.suffix.lower() != ".npy":
        with Image.open(image) as photo:
            orientation = photo.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in range(2, 9):  # 1 is upright; others have no meaning
            raise ValueError(
                f"{image} is to be turned by its EXIF (orientation {orientation}), "
                "and its map is not: save it upright")
    return read_file(image, channels), read_map(map)


def open_shapes(kind: str, argument: str, split: str, root: str, download: bool, channels: int,
                read_map) -> Pairs:
    """shapes, or shapes:N for N of them: the drawn world has a mask and a depth for each image.

    Masks have the class 0 for the ground and 1 to 10 for the ten kinds of things.
    """
    from images.shapes import SIZE, Shapes

    if argument and not argument.isdigit():
        raise ValueError(f"shapes:{argument}: expected a number of images, or nothing")
    # Pairs are drawn when they are asked for, at 64 pixels (SIZE), or at the side that
    # `drawn_at` is told.
    split = split or "train"
    world = Shapes(split, int(argument or 0) or None)
    draw = partial(_draw_scene, world, channels, kind)
    names = [f"{split}-{i:06d}" for i in range(len(world))]
    classes = ["ground", *world.classes] if kind == "masks" else None
    return Pairs("shapes", partial(_drawn_pair, draw, SIZE), names, classes, draw=draw)


def _draw_scene(world, channels: int, kind: str, i: int, side: int):
    from images.shapes import render

    # The mask is 1 where the thing is. Times the number of its kind, plus 1, it is the class of
    # each pixel: kind 0 is class 1, and the ground stays 0.
    image, mask, depth = render(world.scene(i), side)
    if kind == "depth":
        map = torch.from_numpy(depth)
    else:
        map = torch.from_numpy(mask * np.int64(1 + world.labels[i]))
    return in_channels(torch.from_numpy(image), channels), map


# The segmentation sets of torchvision: how each calls its splits, and what the numbers in its
# masks mean, as number -> class (a number that is not listed is ignored).
def _voc(split: str) -> tuple[dict, dict]:
    # 0 is the background, 1 to 20 are things, 255 the border between them.
    return dict(image_set=split), {i: i for i in range(21)}


def _pets(split: str) -> tuple[dict, dict]:
    # A "trimap": 1 is the animal, 2 the background, 3 the border between them.
    options = dict(split="trainval" if split == "train" else "test",
                   target_types="segmentation")
    return options, {1: 1, 2: 0}


def _cityscapes(split: str) -> tuple[dict, dict]:
    # 34 numbers, of which 19 are judged; torchvision has the table.
    classes = {c.id: c.train_id for c in torchvision.datasets.Cityscapes.classes}
    judged = {i: c for i, c in classes.items() if 0 <= c < 255}
    return dict(split=split, mode="fine", target_type="semantic"), judged


TORCHVISION = {"VOCSegmentation": _voc, "OxfordIIITPet": _pets, "Cityscapes": _cityscapes}


def open_torchvision(name: str, argument: str, split: str, root: str, download: bool,
                     channels: int, read_map) -> Pairs:
    """A segmentation set of torchvision in --data_root, by its class name."""
    # Most of these classes fetch their files where download=True asks for it; Cityscapes has no
    # such argument, because its files need an account.
    split = split or "train"
    cls = getattr(torchvision.datasets, name)
    options, class_of = TORCHVISION[name](split)
    if "download" in inspect.signature(cls).parameters:
        options["download"] = download
    try:
        dataset = cls(root, **options)
    except Exception as error:  # each class raises exceptions of its own kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} in --data_root {root}: {reason}") from None

    # A table from every number of 8 bits to its class: one look-up translates a whole mask.
    # Example of the pets: table[1] is 1, table[2] is 0, and all others are IGNORE.
    table = torch.full((256,), IGNORE)
    for number, c in class_of.items():
        table[number] = c
    names = [f"{name}-{split}-{i:07d}" for i in range(len(dataset))]
    classes = [f"class {c}" for c in range(1 + max(class_of.values()))]
    return Pairs(name, partial(_read_torchvision, dataset, channels, table), names, classes)


def _read_torchvision(dataset, channels: int, table: Tensor, i: int):
    # torchvision gives PIL images. np.array of a palette image are its indices, as in
    # read_mask.
    image, mask = dataset[i]
    pixels = torchvision.transforms.v2.functional.pil_to_tensor(image.convert("RGB"))
    return in_channels(pixels, channels), table[torch.from_numpy(np.array(mask)).long()]


MASKS = {
    "shapes": partial(open_shapes, "masks"), "pairs": partial(open_folder, "masks"),
    "ade20k": open_ade20k}
MASKS |= {name: partial(open_torchvision, name) for name in TORCHVISION}
DEPTHS = {"shapes": partial(open_shapes, "depth"), "pairs": partial(open_folder, "depth")}


def open_pairs(table: dict, spec: str, read_map, root: str = "data", download: bool = False,
               flag: str = "--data", channel_stats: ChannelStats = RGB) -> Pairs:
    """NAME[:ARGUMENT][:train or :val] -> Pairs with these statistics, by a line of MASKS or DEPTHS.

    read_map reads the file of a map: read_mask or read_depth, with its options. A ValueError
    names the flag, and for an unknown name the choices.
    """
    # The last word is the split only if it is train or val. Example: of pairs:/data/rooms:val
    # the argument is /data/rooms; pairs:C:/rooms has no split, and its argument is C:/rooms.
    split = ""
    before, _, last = spec.rpartition(":")
    if before and last in ("train", "val"):
        spec = before
        split = last
    name, _, argument = spec.partition(":")
    if name not in table:
        raise ValueError(f"{flag} {spec!r}: this task needs a map for each image; choose from "
                         f"{', '.join(table)} (as in pairs:PATH, with the folders PATH/images "
                         f"and PATH/{'masks' if table is MASKS else 'depth'})")

    # Whatever a data set has to complain of, the message begins with the flag that named it.
    try:
        pairs = table[name](argument, split, root, download, channel_stats.channels, read_map)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None
    return replace(pairs, channel_stats=channel_stats)


@command
def main(argv):
    """How many pairs the named sets have, and the classes of the first one."""
    for spec in argv or ["shapes:100"]:
        with user_errors():
            pairs = open_pairs(MASKS, spec, read_mask)
            image, mask = pairs[0]
        shares = torch.bincount(mask[mask != IGNORE]) / mask.numel()
        listed = ", ".join(f"{c}: {share:.1%}" for c, share in enumerate(shares) if share)
        print(f"{spec}: {len(pairs):,d} pairs, the first {tuple(image.shape)}, with the "
              f"classes {listed}")


if __name__ == "__main__":
    main()
