"""Match: patches of two photographs that are each other's nearest.

    photographs A and B --> patch tokens --> foreground --> cosines (a, b)
                                                               |
          lines <-- spread over the thing <-- best first <-- nearest in both directions

Idea     A feature that means "the left wing" is found again in another bird, in another pose,
         even in a drawing of one. A patch of A whose nearest patch in B has, in turn, that
         patch of A as its nearest is such a pair: nobody marked any point.
Paper    DINOv2 fig. 10, sec. 7.5 (there by distance and an assignment of all patches)
Try      python visualize.py match PHOTO PHOTO --weights RUN_OR_FILE_OR_NAME
Change   which pairs are kept: mutual; which of them are drawn: spread_out
Tests    pytest tests/figures/test_match.py

Letters  a b foreground patches of the two photographs, m pairs, h w patches down and across.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from figures import inputs
from figures.inputs import (about, enlarge, fit, networks, patch_features, photographs, read,
                            short)
from figures.pca import find_foreground
from machinery.flags import UsageError, require
from machinery.page import MAPS, name_row, picture, pyplot, rows_of_pictures, save, show

# ----------------------------------------------------------------------------------------------
# From features to pairs


def mutual(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (a, D) and (b, D) -> pairs of rows (m, 2) and their cosines (m,), the best first.

    In a pair each row is the most similar one of all to the other.
    """
    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T  # (a, b)
    there = cosines.argmax(1)  # (a,), the nearest row of `second`
    back = cosines.argmax(0)  # (b,), the nearest row of `first`
    own = torch.arange(len(first))
    is_mutual = back[there] == own
    pairs = torch.stack([own, there], 1)[is_mutual]  # (m, 2)
    values = cosines[pairs[:, 0], pairs[:, 1]]
    order = values.argsort(descending=True, stable=True)
    return pairs[order], values[order]


def spread_out(places: Tensor, count: int, apart: float) -> list[int]:
    """Which of some places (m, 2) to keep: at most `count`, the first ones first.

    A place nearer than `apart` to one that was kept is left out: the best pairs often lie side
    by side, and their lines would hide each other.
    """
    kept = []
    for i, place in enumerate(places):
        if len(kept) == count:
            break
        others = places[kept].float()
        if not kept or (others - place).norm(dim=1).min() >= apart:
            kept.append(i)
    return kept


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "PHOTO PHOTO --weights RUN_OR_FILE_OR_NAME ..."


@dataclass
class Config(inputs.Config):
    # -- match
    lines: int = 24  # how many pairs are drawn, at most
    output: str = ""  # the picture to write; empty: match.png in this folder


def draw(arguments: list[str], config: Config) -> Path:
    """Patches of two photographs that are each other's nearest, joined by lines."""
    require(config, lambda lines: lines >= 1, "at least 1", "lines")
    models = networks(config)
    files = photographs(arguments, config.most)
    if len(files) != 2:
        raise UsageError(f"match compares two photographs, not {len(files)}")

    # One row for each network.
    rows = []
    for name, model in models.items():
        images = [fit(read(file, model), config.image_size, model.patch_size) for file in files]
        rows.append((name, model.patch_size, images,
                     *pairs_of(model, images, config.lines, config.block)))

    # Between the two photographs is room for the lines to be told apart.
    shapes = [image.shape[2] / image.shape[1] for image in images]
    figure, axes = rows_of_pictures([[shapes[0], 0.15, shapes[1]]] * len(rows), 4.5, range(1))
    for (left, middle, right), (name, patch, images, masks, pairs, total) in zip(axes, rows):
        middle.axis("off")
        draw_pairs(figure, left, right, images, masks, pairs, patch)
        name_row(left, f"{name}: {len(pairs)} of {total} mutual pairs")
    axes[0][0].set_title(short(files[0]), fontsize=9)
    axes[0][2].set_title(short(files[1]), fontsize=9)
    caption = ("Foreground patches that are each other's nearest; a colour for each direction "
               "from the middle of the left thing. ")
    caption += about(models, config)
    return save(figure, Path(config.output or "match.png"), caption)


def pairs_of(model, images: list[Tensor], lines: int, block: int = -1):
    """(masks of the foreground, pairs to draw (m, 2, 2) as row and column, number of all)."""
    grids = [patch_features(model, image, block) for image in images]
    # Each photograph is parted by itself: two of them often differ more from one another, in
    # light or in place, than the things in them differ from what is behind them.
    masks = [find_foreground([grid])[0] for grid in grids]
    places = [mask.nonzero() for mask in masks]  # (a, 2), (b, 2): rows and columns
    for mask in masks:
        if not mask.any():
            height, width = mask.shape
            raise ValueError(
                f"no foreground was found on a grid of {height} x {width} patches; "
                "give a larger --image_size")
    pairs, _ = mutual(grids[0][masks[0]], grids[1][masks[1]])
    first = places[0][pairs[:, 0]]  # (m, 2)
    second = places[1][pairs[:, 1]]

    # Lines are spread over the thing if each has about an equal part of it: they begin with the
    # distance of the squares of a board with as many fields as lines. Where the pairs are nearer
    # than that, it is halved until there are as many lines as were asked for.
    apart = math.sqrt(len(places[0]) / lines)
    kept = spread_out(first, lines, apart)
    while len(kept) < min(lines, len(pairs)):
        apart /= 2
        kept = spread_out(first, lines, apart)
    return masks, torch.stack([first[kept], second[kept]], 1), len(pairs)


def draw_pairs(figure, left, right, images: list[Tensor], masks: list[Tensor], pairs: Tensor,
               patch: int):
    """Both photographs, the background darker, and a line for each pair (m, 2, 2)."""
    # Imported here, as all of matplotlib is: most programs draw nothing.
    from matplotlib.patches import ConnectionPatch

    for axis, image, mask in zip((left, right), images, masks):
        bright = picture(image)
        dark = 0.5 * bright.mean(-1, keepdim=True).expand_as(bright)
        show(axis, torch.where(enlarge(mask, patch)[..., None], bright, dark))

    # A colour for each direction from the middle of the left places, so that what lies beside
    # each other has similar colours, and a swap of left and right is seen.
    palette = pyplot().colormaps[MAPS["direction"]]
    centre = pairs[:, 0].float().mean(0) if len(pairs) else None
    for pair in pairs:
        up, across = (pair[0] - centre).tolist()
        colour = palette(math.atan2(up, across) / math.tau % 1)
        points = [
            ((column + 0.5) * patch, (row + 0.5) * patch) for row, column in pair.tolist()]
        figure.add_artist(
            ConnectionPatch(points[0], points[1], "data", "data", axesA=left, axesB=right,
                            color=colour, linewidth=1.4, alpha=0.9))
        for axis, point in zip((left, right), points):
            axis.plot(*point, "o", color=colour, markersize=6, markeredgecolor="white",
                      markeredgewidth=0.8)
