"""Attention: what a Vision Transformer looks at in a photo.

    photo --> resized to whole patches --> get_attention --> row of the class token, or of the
                                                             patch --query: (nh, h, w)
                                                               |
                     every head | their mean | the patches that hold 60 % of the mass

Idea     The class token collects what it needs by attending to patches. No label ever told the
         network where objects are; the maps of a trained network show them nevertheless, and
         that made DINO famous.
Paper    DINO fig. 1 and 3, sec. 4.2.2 (mass threshold), appendix G (a patch that looks)
Try      python visualize.py attention PHOTO --weights RUN_OR_FILE_OR_NAME
Change   the page of a photograph: draw_attention; of several: draw_attention_sheet
Tests    pytest tests/figures/test_attention.py

Letters  B images, nh heads, h w patches down and across, N tokens, H W pixels.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from augment import normalise
from evaluation.masks import top_mass
from figures import inputs
from figures.inputs import (about, enlarge, fit, mark, networks, patch_at, photographs, read)
from machinery.flags import UsageError, require
from machinery.page import MAPS, fitting, name_row, picture, pyplot, rows_of_pictures, save, show
from vit import VisionTransformer

OUTLINE = (1.0, 0.85, 0.2)  # red, green and blue of the line around a mask

# ----------------------------------------------------------------------------------------------
# From tokens to maps


@torch.no_grad()
def attention_maps(model: VisionTransformer, image: Tensor, block: int = -1,
                   queries: tuple[str, ...] = ()) -> list[Tensor]:
    """Where tokens of one image (C, H, W) look: a map (nh, h, w) for each query "X,Y".

    Without queries the one map of the class token.
    """
    images = normalise(image[None], model.channel_stats)
    if not queries:
        return [model.get_class_attention(images, block)[0]]

    # The row of a patch in the matrix of all pairs of tokens comes after those of the class
    # token and of the registers; so do the columns of the patches, which are the map.
    first_patch = 1 + model.num_register_tokens
    grid = model.grid(images)
    rows = []
    for query in queries:
        row, column = patch_at(query, grid)
        rows.append(first_patch + row * grid[1] + column)
    attention = model.get_attention(images, block, rows)[0, :, :, first_patch:]  # (nh, r, P)
    return list(attention.unflatten(2, grid).transpose(0, 1))  # r times (nh, h, w)


def spread_of(attention: Tensor) -> Tensor:
    """How far each map is spread over its patches: (..., h, w) -> (...), in nats.

    The entropy of the map as shares: 0 if one patch has all of it, ln(h*w) if all are equal.
    """
    shares = attention.flatten(-2)  # (..., h*w)
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1)


# ----------------------------------------------------------------------------------------------
# From a map to a picture


def show_map(axis, grid: Tensor, patch: int, title: str = ""):
    """Draw a map (h, w) of attention, bright where there is much of it.

    Behind a title stands what the darkest and the brightest colour mean, as multiples of the
    mean. So a map of 0.2 to 6 and one of 0.9 to 1.1 have the same colours, but not the same
    title: the second network hardly prefers any patch.
    """
    low, high = colour_range(grid)
    mean = float(grid.mean()) or 1.0
    if title:
        title += f"  {low / mean:.2f}–{high / mean:.2f}×"
    show(axis, enlarge(grid, patch), title, cmap=MAPS["attention"], vmin=low, vmax=high)


def colour_range(grid: Tensor) -> tuple[float, float]:
    """The values of a map (h, w) that get the darkest and the brightest colour.

    A few patches may get most of the attention. The brightest 2 % share one colour, and the
    darkest 2 % another, so that the rest can be told apart. What is below the mean is never the
    brightest.
    """
    low, high = grid.flatten().quantile(torch.tensor([0.02, 0.98])).tolist()
    return low, max(high, float(grid.mean()), low + 1e-12)


def overlaid(image: Tensor, grid: Tensor, patch: int) -> Tensor:
    """The attention in colours over the image in grey: (H, W, 3).

    The more attention, the less of the image is left: a fifth of it where there is most.
    """
    colours = pyplot().colormaps[MAPS["overlay"]]
    low, high = colour_range(grid)
    # A grey photograph has no colours that could be taken for those of the attention.
    values = enlarge(((grid - low) / (high - low)).clamp(0, 1), patch)  # (H, W)
    heat = torch.from_numpy(colours(values.numpy())[..., :3]).float()
    grey = picture(image).mean(-1, keepdim=True)
    share = 0.8 * values[..., None]
    return (1 - share) * 0.7 * grey + share * heat


def outlined(image: Tensor, mask: Tensor, patch: int) -> Tensor:
    """The image at the patches of a mask (h, w), dark and grey at the others: (H, W, 3).

    A line surrounds the patches of which most neighbours are in the mask. It would be a tangle
    if it went around each single one.
    """
    # Without colours and light the other patches can still be recognised.
    bright = picture(image)
    grey = 0.35 * bright.mean(-1, keepdim=True).expand_as(bright)
    result = torch.where(enlarge(mask, patch)[..., None], bright, grey)

    # Five of the nine patches of a 3 x 3 square, itself included, are most of them. At the
    # border of the image only those that exist are counted.
    neighbours = F.avg_pool2d(mask[None].float(), 3, 1, 1, count_include_pad=False)[0]
    solid = enlarge(neighbours > 0.5, patch)  # (H, W)

    # The line are the pixels of these patches that lie near a pixel outside.
    width = max(1, int(math.sqrt(solid.numel())) // 200)
    near_outside = F.max_pool2d((~solid)[None].float(), 2 * width + 1, 1, width)[0] > 0
    return torch.where((solid & near_outside)[..., None], torch.tensor(OUTLINE), result)


# ----------------------------------------------------------------------------------------------
# The pages


@dataclass
class View:
    """What one token of one network sees in one photograph."""

    image: Tensor  # (C, H, W)
    heads: Tensor  # (nh, h, w)
    patch: int  # pixels
    name: str  # of the network
    query: str  # "X,Y" or, for the class token, empty
    title: str  # of the photograph

    @property
    def shape(self) -> float:
        """Width by height."""
        return self.image.shape[2] / self.image.shape[1]

    def show_photograph(self, axis):
        show(axis, picture(self.image), fitting(self.title, axis))
        if self.query:
            mark(axis, *patch_at(self.query, self.heads.shape[1:]), self.patch)

    def show_mask(self, axis, grid: Tensor, share: float):
        show(axis, outlined(self.image, top_mass(grid, share), self.patch), f"top {share:.0%}")


def draw_attention(view: View, path: Path, share: float, caption: str) -> Path:
    """One page for one view: the mean of the heads large, below it every head, with masks."""
    mean = view.heads.mean(0)
    nh = len(view.heads)

    # Up to three heads have map and mask beside each other in one row. More of them have a row
    # of at most six maps above their six masks. Example: 12 heads have two such pairs of rows.
    bands = math.ceil(nh / 6)
    columns = math.ceil(nh / bands)
    paired = nh <= 3
    rows = [[view.shape] * 4]
    if nh > 1:
        rows += [[view.shape] * 2 * nh] if paired else [[view.shape] * columns] * 2 * bands
    figure, axes = rows_of_pictures(rows)

    # The mean comes first, because it needs no choice of a head.
    view.show_photograph(axes[0][0])
    show_map(axes[0][1], mean, view.patch, "mean of heads" if nh > 1 else "one head")
    show(axes[0][2], overlaid(view.image, mean, view.patch), "overlay")
    view.show_mask(axes[0][3], mean, share)
    for i, grid in enumerate(view.heads if nh > 1 else []):
        if paired:
            map_axis = axes[1][2 * i]
            mask_axis = axes[1][2 * i + 1]
        else:
            row = 1 + 2 * (i // columns)
            map_axis = axes[row][i % columns]
            mask_axis = axes[row + 1][i % columns]
        show_map(map_axis, grid, view.patch, f"head {i}")
        view.show_mask(mask_axis, grid, share)
    return save(figure, path, caption)


def draw_attention_sheet(views: list[View], path: Path, share: float, caption: str) -> Path:
    """A row for each view: photograph, mean of the heads, its mask, the sharpest heads."""
    # A row holds at most four heads, the least spread ones, in the order of their numbers.
    most = min(4, max(len(view.heads) for view in views))
    figure, axes = rows_of_pictures([[view.shape] * (4 + most) for view in views], 1.9)

    # Only where there are several networks the rows are named after them.
    several = len({view.name for view in views}) > 1
    for row, view in zip(axes, views):
        mean = view.heads.mean(0)
        view.show_photograph(row[0])
        show_map(row[1], mean, view.patch, "mean")
        show(row[2], overlaid(view.image, mean, view.patch), "overlay")
        view.show_mask(row[3], mean, share)
        sharpest = spread_of(view.heads).argsort()[:most].sort().values
        for axis, i in zip(row[4:], sharpest.tolist()):
            show_map(axis, view.heads[i], view.patch, f"head {i}")
        if several:
            name_row(row[0], view.name)
    return save(figure, path, caption)


def write_separate(view: View, folder: Path, share: float):
    """One PNG for the photograph, each head and each mask, under DINO's own names."""
    # imsave writes a pixel for each pixel, without title and margin, for other programs.
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    plt.imsave(folder / "img.png", picture(view.image).numpy())
    for j, grid in enumerate(view.heads):
        values = enlarge(grid, view.patch).numpy()
        plt.imsave(folder / f"attn-head{j}.png", values, cmap=MAPS["attention"])
        mask = outlined(view.image, top_mass(grid, share), view.patch)
        plt.imsave(folder / f"mask_th{share:g}_head{j}.png", mask.numpy())


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "PHOTO_OR_FOLDER ... --weights RUN_OR_FILE_OR_NAME ..."


@dataclass
class Config(inputs.Config):
    # -- attention
    # X and Y of a query are shares of the width and of the height: 0.5,0.5 is the middle.
    query: tuple[str, ...] = ()  # patches that look, X,Y from 0 to 1; none: the class token
    share: float = 0.6  # share of the attention that the patches of a mask hold together
    separate: bool = False  # also one PNG for each head and each mask, beside the page
    output: str = ""  # the picture to write; empty: attention.png in this folder


def draw(arguments: list[str], config: Config) -> Path:
    """Where the class token, or any patch, looks: every head, their mean, masks."""
    require(config, lambda x: 0 < x < 1, "between 0 and 1", "share")
    models = networks(config)
    files = photographs(arguments, config.most)

    # A view for each photograph, each network and each token that looks, in this order, so that
    # what is to be compared stands in rows below each other.
    views = []
    for file in files:
        for name, model in models.items():
            image = fit(read(file, model), config.image_size, model.patch_size)
            maps = attention_maps(model, image, config.block, config.query)
            for query, heads in zip(config.query or ("",), maps):
                views.append(View(image, heads, model.patch_size, name, query, file.stem))

    # One view has a page on which it is shown in full, several share a sheet.
    path = Path(config.output or "attention.png")
    looking = "the ringed patch" if config.query else "the class token"
    caption = (
        f"Attention of {looking}; in the titles what the darkest and the brightest colour "
        "stand for, as multiples of the mean over the patches. The darkest 2 % of the "
        f"patches share a colour, and so do the brightest. {about(models, config)}")
    if len(views) > 1:
        if config.separate:
            raise UsageError(f"--separate: give one photograph, one network and one --query, "
                             f"not {len(views)} in all")
        return draw_attention_sheet(views, path, config.share, caption)
    if config.separate:
        write_separate(views[0], path.parent, config.share)
    return draw_attention(views[0], path, config.share, caption)
