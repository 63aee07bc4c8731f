"""Inputs: the photographs and the networks that a figure was asked for.

    a.jpg b.png FOLDER      --> photographs --> read --> fit: whole patches (C, H, W)
    --weights RUN untrained --> networks    --> features of each patch (h, w, D)

Idea     All figures of photographs take the same words and the same flags, so that a command
         for one of them works for the others: any photographs, any networks beside each other.
Paper    none
Try      python visualize.py attention PHOTO --weights RUN untrained
Change   a flag that every figure of photographs shall have is a field of Config
Tests    pytest tests/figures/test_inputs.py

Letters  C channels, H W pixels, h w patches down and across, D width of the features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from augment import normalise
from backbones.weights import load_backbone
from evaluation.masks import untrained_like
from images.files import EXTENSIONS, read_file
from images.names import list_images
from machinery.flags import UsageError, near_path, require
from machinery.page import GAP, PAGE, fitting, name_row, picture, rows_of_pictures, show
from vit import VisionTransformer

COLUMNS = 8  # photographs side by side on a sheet, at most
LONGEST = 4  # the long side of a photograph is at most so many times --image_size


@dataclass
class Config:
    # -- photographs and networks
    # The word untrained, behind a network, is the same network with random weights.
    weights: tuple[str, ...] = ()  # networks: runs, files, URLs, released names; untrained
    checkpoint_key: Literal["teacher",
                            "student"] = "teacher"  # which network of a training's two
    num_heads: int = 0  # attention heads, for a file that does not tell them; 0: of width 64
    image_size: int = 480  # shorter side of a photograph in pixels, rounded to whole patches
    block: int = -1  # the block whose output or attention is drawn; -1: the last
    most: int = 6  # how many photographs of a folder are drawn, at most, spread evenly over it


# ----------------------------------------------------------------------------------------------
# Photographs


def photographs(arguments: list[str], most: int) -> list[Path]:
    """The files that were named; of a folder, at most `most` of the images in it."""
    files = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if not path.is_dir():
            files.append(path)
            continue

        # Names in a folder are sorted, often by class, so that the first ones would be alike.
        # Example: 3 of 10 images are numbers 0, 3 and 6.
        names = list(list_images(path, EXTENSIONS))
        if not names:
            raise UsageError(f"{argument}: found no image in this folder")
        count = min(most, len(names))
        files += [path / names[i * len(names) // count] for i in range(count)]
    return files


def read(file: Path, model: VisionTransformer) -> Tensor:
    """A photograph in the channels that the network was trained on: (C, H, W)."""
    try:
        return read_file(file, model.channel_stats.channels)
    except Exception as error:  # decoders raise exceptions of many kinds
        raise unreadable(file, error) from None


def unreadable(file: Path, error: Exception) -> UsageError:
    """What is said of a photograph that cannot be read, with a name that may have been meant."""
    hint = "" if file.exists() else near_path(file)
    return UsageError(f"{file}: not a readable image ({error}){hint}")


def short(file: Path, most: int = 20) -> str:
    """The name of a photograph without its ending; of a long name the end, which differs."""
    return file.stem if len(file.stem) <= most else "…" + file.stem[-most:]


def fit(image: Tensor, side: int, patch: int) -> Tensor:
    """Shorter side to about `side` pixels, both sides to whole patches: (C, H, W).

    The image is stretched by less than a patch rather than cut, so that the map and the
    photograph show the same. ValueError if not even one patch fits.
    """
    if side < patch:
        raise ValueError(f"--image_size {side} is smaller than one patch of {patch} pixels")

    # The cost of attention grows with the square of the patches, so a panorama gets a shorter
    # side below `side`. Example: 1,000 x 10,000 pixels at 480 become 192 x 1,920.
    height, width = image.shape[-2:]
    scale = min(side / min(height, width), LONGEST * side / max(height, width))
    shape = [max(1, round(length * scale / patch)) * patch for length in (height, width)]
    return TF.resize(image, shape, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


def patch_at(query: str, grid: tuple[int, int]) -> tuple[int, int]:
    """"X,Y" in shares of the width and of the height -> the patch there, (row, column).

    Shares hold for a photograph of any size. Example: "0.5,0.1" on a grid of 30 x 40 patches is
    row 3, column 20. UsageError for what is no such pair, or lies outside.
    """
    try:
        x, y = (float(number) for number in query.split(","))
        inside = 0 <= x <= 1 and 0 <= y <= 1
    except ValueError:
        inside = False
    if not inside:
        raise UsageError(
            f"--query {query}: expected X,Y inside the photograph, as shares of its "
            "width and height: 0,0 is the top left, 0.5,0.5 the middle")
    # The right and the lower border of the photograph belong to the last patch.
    h, w = grid
    return min(int(y * h), h - 1), min(int(x * w), w - 1)


# ----------------------------------------------------------------------------------------------
# Networks


def check_numbers(model: torch.nn.Module, what: str):
    """UsageError if a weight of the network of --weights `what` is NaN or infinite."""
    # Every feature would be NaN: a figure of them is empty, or its drawing fails somewhere.
    state = model.state_dict()
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise UsageError(
            f"--weights {what}: {len(bad)} of {len(state)} tensors have weights that "
            f"are no numbers, the first {bad[0]}")


def networks(config: Config) -> dict[str, VisionTransformer]:
    """The networks of --weights by the names that the figure gives them, all of them ViTs."""
    if not config.weights:
        raise UsageError("--weights: give a run, a file, or a released name such as dino_vits8")
    require(config, lambda most: most >= 1, "at least 1", "most")
    # In the order in which they were named, as the rows of the figure will be.
    models = {}
    model = None
    for what in config.weights:
        # Random weights show what of a figure comes from the architecture alone.
        if what == "untrained":
            if model is None:
                raise UsageError("--weights untrained: name the network first whose shape the "
                                 "untrained one shall have, as in --weights RUN untrained")
            channel_stats = model.channel_stats
            model = untrained_like(model)
            model.channel_stats = channel_stats
        else:
            model = load_backbone(what, config.checkpoint_key, config.num_heads)
            check_numbers(model, what)
        # What cannot be drawn is said here, before any photograph is read.
        if not isinstance(model, VisionTransformer):
            raise UsageError(f"--weights {what}: a convnet, which has no attention and no "
                             "patch tokens")
        if not -model.depth <= config.block < model.depth:
            raise UsageError(
                f"--block {config.block}: {what} has blocks 0 to {model.depth - 1}")

        # The last part of a path is enough, unless two of them end alike.
        name = Path(what).name or what
        name = what if name in models else name
        if name in models:
            raise UsageError(f"--weights {' '.join(config.weights)}: {what} is there twice")
        models[name] = model
    return models


def about(models: dict[str, VisionTransformer], config: Config) -> str:
    """What a caption says of the networks and of the photographs that they got."""
    # Networks of which the same is to be said share a sentence.
    names = {}
    for name, model in models.items():
        patch = model.patch_size
        side = round(config.image_size / patch) * patch
        text = (f"block {config.block % model.depth} of 0 to {model.depth - 1}, patches of "
                f"{patch} pixels, photographs with a shorter side of {side} pixels, less for "
                "panoramas")
        names.setdefault(text, []).append(name)
    return "; ".join(f"{', '.join(group)}: {text}" for text, group in names.items())


@torch.no_grad()
def patch_features(model: VisionTransformer, image: Tensor, block: int = -1) -> Tensor:
    """The patch tokens of one image (C, H, W) after the final norm: (h, w, D)."""
    # The final norm makes tokens comparable: before it a few of them may be very long.
    images = normalise(image[None], model.channel_stats)
    [features] = model.get_intermediate_layers(images, [block % model.depth], reshape=True)
    return features[0].permute(1, 2, 0)  # (h, w, D)


# ----------------------------------------------------------------------------------------------
# From patches to pixels


def enlarge(grid: Tensor, patch: int) -> Tensor:
    """(..., h, w) -> (..., H, W), each patch a flat square.

    Smoothing would show more detail than the network computed: one number for each patch.
    """
    return grid.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def sheet(images: list[Tensor], files: list[Path], rows: int) -> tuple:
    """A page of photographs and `rows` rows of maps: (figure, axes of the rows, empty yet).

    The photographs, with their names, stand in a row above the maps. Of a single photograph all
    stands in one row, and each row of maps has one place in it. More photographs than COLUMNS
    are parted into bands below each other, each with its own rows of maps; a row of axes goes on
    through all bands.
    """
    shapes = [image.shape[2] / image.shape[1] for image in images]
    if len(files) == 1:
        figure, [[photo, *maps]] = rows_of_pictures([shapes * (1 + rows)])
        show(photo, picture(images[0]), fitting(files[0].stem, photo))
        return figure, [[axis] for axis in maps]

    # The pictures of the last band are as large as those of the others, though it has fewer.
    bands = [shapes[i:i + COLUMNS] for i in range(0, len(shapes), COLUMNS)]
    tallest = min(3.2, (PAGE - GAP * COLUMNS) / max(sum(band) for band in bands))
    layout = [band for band in bands for _ in range(1 + rows)]
    figure, axes = rows_of_pictures(layout, tallest, titled=range(0, len(layout), 1 + rows))

    # Of each band the first row is for the photographs, the others for the maps.
    photos, *maps = [sum(axes[i::1 + rows], []) for i in range(1 + rows)]
    for axis, image, file in zip(photos, images, files):
        show(axis, picture(image), fitting(file.stem, axis))
    return figure, maps


def name_rows(row: list, name: str):
    """Write a name at the left of a row of a sheet, in every band."""
    for axis in row[::COLUMNS]:
        name_row(axis, name)


def mark(axis, row: int, column: int, patch: int, colour: str = "#ff3d7f"):
    """A ring of this colour around a patch: what the map beside it was asked for."""
    # The middle of a patch; pixel 0 reaches from -0.5 to 0.5 in matplotlib. A white ring below
    # the coloured one keeps it visible on any ground.
    x = (column + 0.5) * patch - 0.5
    y = (row + 0.5) * patch - 0.5
    axis.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor="white",
              markeredgewidth=3.5)
    axis.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor=colour,
              markeredgewidth=2)
