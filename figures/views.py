"""Views: what teacher and student get to see of one photograph.

    photo --> MultiCrop --> boxes in the photo
                  |
                  +--> global crops, colours -----------> teacher
                  +--> the same, some patches masked ---> student
                  +--> local crops, colours ------------> student

Idea     The student has to give a part of a photograph the answer that the teacher gives to
         (nearly) all of it. How hard this is depends on sizes, colours and masks, which a
         recipe sets by numbers: here they can be seen.
Paper    DINO fig. 2 and sec. 3.1; iBOT fig. 3 (masks)
Try      python visualize.py views PHOTO --preset dino_vits16
Change   what is written above a crop: words_of; the colours of the boxes: BOX_COLOURS
Tests    pytest tests/figures/test_views.py

Letters  G global, L local crops, C channels, H W pixels of the photo, s pixels of a crop.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from augment import COLUMNS, MultiCrop, crop_box, photometry
from figures.inputs import enlarge, unreadable
from images.files import read_file
from machinery.flags import UsageError, require
from machinery.page import COLOURS, picture, pyplot, save
from training.config import Config as TrainingConfig
from training.recipes import PRESETS, auto_scale

# The colours of the first, second, ... global crop, and of all local ones.
BOX_COLOURS = COLOURS[:4]
LOCAL_COLOUR = COLOURS[4]


class Box(NamedTuple):
    """Where a crop was cut from the photo, in pixels, and whether it was mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def boxes_of(multi_crop: MultiCrop, image: Tensor, rng: np.random.Generator) -> list[Box]:
    """The boxes of all crops that multi_crop(image, rng) would cut, in its order."""
    # MultiCrop gives crops and not boxes, because training needs no more. The boxes follow from
    # the same draws, made in the same order: ten tries of a box, and one for the mirror.
    boxes = []
    for _, scale, _ in multi_crop.views:
        box = crop_box(*image.shape[-2:], scale, rng.random((10, 4)))
        boxes.append(Box(*box, mirrored=bool(rng.random() < 0.5)))
    return boxes


class Views(NamedTuple):
    """What the networks see of one photo."""

    boxes: list[Box]  # of the G global crops, then of the L local ones
    crops: list[Tensor]  # the same crops with their colours, (s, s, 3) from 0 to 1
    words: list[str]  # what was done to the colours of each
    masks: Tensor | None  # (G, s, s) bool of the global crops; None without an iBOT loss


def words_of(params: Tensor) -> str:
    """What was done to the colours of a crop: its row of augment.COLUMNS in words."""
    value = dict(zip(COLUMNS, params.tolist()))
    words = []
    if value["order"] >= 0:
        words.append("jitter")
    if value["gray"]:
        words.append("grey")
    if value["sigma"]:
        words.append(f"blur {value['sigma']:.1f} px")
    if value["solarize"]:
        words.append("solarized")
    return ", ".join(words) or "colours as they are"


def views_of(image: Tensor, config: TrainingConfig) -> Views:
    """The views that a run of this config cuts of its image 0 in epoch 0 and step 0."""
    multi_crop = MultiCrop(config.global_crops_size, config.local_crops_size,
                           config.global_crops_number, config.local_crops_number,
                           config.global_crops_scale, config.local_crops_scale,
                           config.photometry)

    # The same generator twice: once for the boxes, and once for the crops (images/data.py).
    seed = [config.seed, 0, 0]
    boxes = boxes_of(multi_crop, image, np.random.default_rng(seed))
    sample = multi_crop(image, np.random.default_rng(seed))
    params = sample["photometry"]

    # Networks see numbers of mean 0. For the eye they are taken back to the range from 0 to 1.
    mean = torch.tensor(config.channel_stats.mean)[:, None, None]
    std = torch.tensor(config.channel_stats.std)[:, None, None]
    crops = []
    for row, crop in zip(params, [*sample["global_crops"], *sample["local_crops"]]):
        normalised = photometry(crop[None], row[None], config.channel_stats)[0]
        crops.append(picture(normalised * std + mean))

    # Masks are drawn for all global crops of a batch together: here for those of one image.
    masks = None
    masking = config.masking()
    if masking:
        G = config.global_crops_number
        grids = masking(G, 0)["masks"].unflatten(1, masking.grid)
        masks = enlarge(grids, config.patch_size)
    return Views(boxes, crops, [words_of(row) for row in params], masks)


# ----------------------------------------------------------------------------------------------
# The page
#
# The photo with the boxes stands at the left. At its right the teacher's row is above the
# student's. Local crops are drawn in two lines beside the global ones, at about half of their
# size, as the networks see them. All lengths are in inches, and the places are computed here.

SPACE = 0.15  # between two crops
TITLE = 0.42  # the height of two lines of text above a crop
GLOBAL = 1.9  # the side of a global crop
LOCAL = (GLOBAL - TITLE / 2 - SPACE) / 2  # the side of a local crop
PHOTO = 2 * (GLOBAL + TITLE) + 0.6  # the photo fits into a square of this side


def draw_views(image: Tensor, views: Views, G: int):
    """The page of one photo as a figure of matplotlib; G: the number of global crops."""
    plt = pyplot()
    from matplotlib.patches import Rectangle

    # The page is as wide as the student's row, and as high as both rows.
    photo_scale = PHOTO / max(image.shape[1:])
    photo_height = photo_scale * image.shape[1]
    photo_width = photo_scale * image.shape[2]
    columns = -(-len(views.crops[G:]) // 2)  # of local crops
    first = photo_width + 3 * SPACE
    width = first + G * (GLOBAL + SPACE) + columns * (LOCAL + SPACE)
    height = PHOTO
    fig = plt.figure(figsize=(width, height))

    # Every picture and every word stands at a place of its own, counted in inches from the upper
    # left corner; matplotlib counts from the lower left one, in shares of the page.
    def place(left, top, w, h, colour=None, line=2.0):
        """Axes without scales, at so many inches from the left and from the top."""
        axis = fig.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(colour is not None)
            spine.set(color=colour, linewidth=line)
        return axis

    def write(left, top, text, **style):
        fig.text(left / width, 1 - top / height, text, va="top", **style)

    # Local boxes come last, so that their thin lines are over the thick ones. A dark line below
    # each coloured one keeps it visible on every ground.
    axis = place(0, (PHOTO - photo_height) / 2, photo_width, photo_height)
    axis.imshow(picture(image).numpy(), aspect="auto")
    for i, box in enumerate(views.boxes):
        colour = BOX_COLOURS[i % len(BOX_COLOURS)] if i < G else LOCAL_COLOUR
        line = 3.0 if i < G else 1.4
        for shade, thickness in (("black", line + 1.6), (colour, line)):
            axis.add_patch(
                Rectangle((box.left - 0.5, box.top - 0.5), box.width, box.height, fill=False,
                          ec=shade, lw=thickness))
        # A number in the corner of a box leads to its crop.
        axis.text(box.left, box.top, f"{i + 1 if i < G else i - G + 1}", fontsize=8, va="top",
                  color="white" if i < G else "black", bbox=dict(fc=colour, ec="none", pad=1.5))

    # The teacher's row and the student's: global crops, of which the student's may have masks.
    for row, heading in enumerate(
        ("teacher: the global crops", "student: global and local crops")):
        top = row * (GLOBAL + TITLE + 0.4)
        write(first, top, heading, fontsize=10, weight="bold")
        for i in range(G):
            left = first + i * (GLOBAL + SPACE)
            crop = views.crops[i]
            name = f"global {i + 1}" + (", mirrored" if views.boxes[i].mirrored else "")
            words = views.words[i]
            # The teacher sees every patch. Hidden ones are drawn grey in the student's row.
            if row and views.masks is not None:
                crop = torch.where(views.masks[i][..., None], 0.5, crop)
                words = f"{views.masks[i].float().mean():.0%} of the patches masked"
            write(left, top + 0.25, f"{name}\n{words}", fontsize=7.5, linespacing=1.3)
            axis = place(left, top + 0.25 + TITLE - 0.1, GLOBAL, GLOBAL,
                         BOX_COLOURS[i % len(BOX_COLOURS)])
            axis.imshow(crop.numpy(), aspect="auto")

    # The local crops of the student, in two lines beside its global ones.
    for i, crop in enumerate(views.crops[G:]):
        left = first + G * (GLOBAL + SPACE) + i % columns * (LOCAL + SPACE)
        line_top = top + 0.25 + TITLE - 0.1 + i // columns * (LOCAL + TITLE / 2 + SPACE)
        mirrored = ", mirrored" if views.boxes[G + i].mirrored else ""
        write(left, line_top - TITLE / 2 + 0.04, f"{i + 1}{mirrored}", fontsize=7)
        axis = place(left, line_top, LOCAL, LOCAL, LOCAL_COLOUR)
        axis.imshow(crop.numpy(), aspect="auto")
    return fig


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "PHOTO"


@dataclass
class Config:
    # -- views
    preset: Literal[
        *PRESETS] = "dino_vits16"  # the recipe whose crops, colours, masks are drawn
    images: int = 5000  # number of images of the run, for presets with --auto_scale
    seed: int = 0  # seed of what is drawn at random
    output: str = ""  # the picture to write; empty: views.png in this folder


def draw(arguments: list[str], config: Config) -> Path:
    """What teacher and student see of one photo: crops, colours, masks."""
    if len(arguments) > 1:
        raise UsageError(f"views draws one photo, not {len(arguments)}: {' '.join(arguments)}")
    require(config, lambda x: x >= 1, "at least 1", "images")
    try:
        image = read_file(Path(arguments[0]))
    except Exception as error:  # decoders raise exceptions of many kinds
        raise unreadable(Path(arguments[0]), error) from None

    # Small recipes choose the size of the local crops by the number of images.
    settings = TrainingConfig(**PRESETS[config.preset] | {"seed": config.seed})
    if settings.auto_scale:
        settings = auto_scale(settings, config.images, settings.batch_size_per_gpu)
    fig = draw_views(image, views_of(image, settings), settings.global_crops_number)
    return save(fig, Path(config.output or "views.png"), caption_of(config, settings))


def caption_of(config: Config, settings: TrainingConfig) -> str:
    """The numbers of the recipe that decide on its views."""
    low, high = settings.global_crops_scale
    text = (f"{config.preset}: {settings.global_crops_number} global crops of "
            f"{settings.global_crops_size} px, {low:.0%} to {high:.0%} of the photo")
    if settings.local_crops_number:
        low, high = settings.local_crops_scale
        text += (f"; {settings.local_crops_number} local crops of {settings.local_crops_size} "
                 f"px, {low:.0%} to {high:.0%}")
    return f"{text}; seed {config.seed}"
