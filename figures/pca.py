"""PCA: three directions in which the patches of some photographs differ most, as colours.

    photographs --> patch tokens of all of them --> first component --> foreground?
                                                                           |
            red, green, blue <-- three components of a second PCA <-- foreground only

Idea     One basis for all photographs: where a wing and another wing have the same colour, the
         network has the same features for both, though nobody told it what a wing is. The
         first component mostly parts things from what is behind them, so it takes the
         background away, and a second PCA spends its three colours on the things.
Paper    DINOv2 fig. 1 and 9, sec. 7.5
Try      python visualize.py pca PHOTO PHOTO PHOTO --weights RUN_OR_FILE_OR_NAME
Change   which patches are foreground: find_foreground
Tests    pytest tests/figures/test_pca.py

Letters  n patches of all photographs, D width of the features, h w patches down and across.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from figures import inputs
from figures.inputs import (about, enlarge, fit, name_rows, networks, patch_features,
                            photographs, read, sheet)
from machinery.page import save, show

# ----------------------------------------------------------------------------------------------
# From features to colours


def components(features: Tensor, count: int = 3) -> Tensor:
    """The first principal components of rows (n, D): (n, count), those of the rows' differences
    from their mean.

    The sign of a component is arbitrary. Here its largest entry is positive, so that the same
    photographs have the same colours every time.
    """
    # Eigenvectors of the D x D covariance are the right singular vectors of the n x D matrix,
    # which may be large. In float64, because the covariance squares the features.
    centred = (features - features.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # by rising eigenvalue
    projected = centred @ vectors[:, -count:].flip(-1)  # (n, count)
    largest = projected.abs().argmax(0, keepdim=True)  # (1, count)
    return (projected * projected.gather(0, largest).sign()).float()


def border(h: int, w: int) -> Tensor:
    """True at the outermost patches of a grid: bool (h, w)."""
    mask = torch.ones(h, w, dtype=torch.bool)
    mask[1:-1, 1:-1] = False
    return mask


def find_foreground(grids: list[Tensor]) -> list[Tensor]:
    """Features (h, w, D) of some photographs -> which patches are foreground: bool (h, w) each.

    The first component of all patches is cut in two at the best place (`threshold`). Which of
    the two sides is the background is decided by the border of the photographs: a photographer
    puts the thing into the middle, so the border has mostly background.
    """
    first = components(torch.cat([grid.flatten(0, 1) for grid in grids]), 1)[:, 0]  # (n,)
    edge = torch.cat([border(*grid.shape[:2]).flatten() for grid in grids])  # (n,)
    above = first > threshold(first)

    # The border has to hold a smaller share of the foreground than the inside has.
    inside = above[~edge].float().mean() if (~edge).any() else 1.0
    if above[edge].float().mean() > inside:
        above = ~above

    # The answers stand end to end, as the patches did; each photograph gets its own back.
    sizes = [grid.shape[0] * grid.shape[1] for grid in grids]
    return [part.view(grid.shape[:2]) for part, grid in zip(above.split(sizes), grids)]


def threshold(values: Tensor, bins: int = 256) -> float:
    """Where values (n,) are best cut into two groups: Otsu's rule.

    The cut is there where the means of the two groups are furthest apart, in the sense that the
    variance between the groups is largest. Example: 0 0 1 8 9 9 is cut between 1 and 8.
    """
    low, high = values.aminmax()
    counts = torch.histc(values.double(), bins, float(low), float(high))
    edges = torch.linspace(float(low), float(high), bins + 1, dtype=torch.float64)
    centres = (edges[:-1] + edges[1:]) / 2

    # For a cut behind each bin: how many values lie below it, and the sum of those.
    n = counts.cumsum(0)
    sums = (counts * centres).cumsum(0)
    total = sums[-1]
    apart = (sums * n[-1] - total * n)**2 / (n * (n[-1] - n)).clamp(min=1)
    # Between two groups far apart all cuts are equally good, and the middle one is taken.
    best = (apart >= apart.max() * (1 - 1e-9)).nonzero().flatten()
    return float(edges[1 + best[len(best) // 2]])


def colours(values: Tensor) -> Tensor:
    """Components (n, 3) -> red, green, blue from 0 to 1.

    The 2 % at either end of a component share one colour, so that a single odd patch does not
    make all others grey.
    """
    if not len(values):
        return values
    low, high = values.quantile(torch.tensor([0.02, 0.98]), 0)  # (3,) each
    return ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def pictures(grids: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """The patches of some photographs in colours of one joint PCA; black outside the masks.

    Features (h, w, D) and masks (h, w) -> (h, w, 3) each.
    """
    # Joined, so that all photographs have one basis and one range of colours; then parted.
    kept = [grid[mask] for grid, mask in zip(grids, masks)]  # (n of this photograph, D)
    joined = torch.cat(kept)
    painted = colours(components(joined)) if len(joined) else joined[:, :3]
    results = []
    for mask, part in zip(masks, painted.split([len(rows) for rows in kept])):
        image = torch.zeros(*mask.shape, 3)
        image[mask] = part
        results.append(image)
    return results


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "PHOTO_OR_FOLDER ... --weights RUN_OR_FILE_OR_NAME ..."


@dataclass
class Config(inputs.Config):
    # -- pca
    # "joint" is the paper's way. One component and one cut for all photographs ask more of the
    # network: things that differ from one another have to differ more from every background.
    foreground: Literal["each",
                        "joint"] = "each"  # found in each photograph, or in all together
    output: str = ""  # the picture to write; empty: pca.png in this folder


def draw(arguments: list[str], config: Config) -> Path:
    """Patch features of photographs as colours: three principal components, foreground."""
    models = networks(config)
    files = photographs(arguments, config.most)

    # Two rows for each network: the components of all patches, and those of the foreground.
    rows = {}
    for name, model in models.items():
        images = [fit(read(file, model), config.image_size, model.patch_size) for file in files]
        grids = [patch_features(model, image, config.block) for image in images]
        everywhere = [torch.ones(grid.shape[:2], dtype=torch.bool) for grid in grids]
        whole = pictures(grids, everywhere)
        if config.foreground == "joint":
            masks = find_foreground(grids)
        else:
            masks = [find_foreground([grid])[0] for grid in grids]
        things = pictures(grids, masks)
        before = f"{name}: " if len(models) > 1 else ""
        rows[before + "all patches"] = [enlarge_colours(x, model.patch_size) for x in whole]
        rows[before + "foreground"] = [enlarge_colours(x, model.patch_size) for x in things]

    # The photographs are shown as the last network got them: others differ by less than a patch.
    alone = len(files) == 1
    figure, axes = sheet(images, files, len(rows))
    for row, (name, row_of_pictures) in zip(axes, rows.items()):
        for axis, colour in zip(row, row_of_pictures):
            show(axis, colour, name if alone else "")
        if not alone:
            name_rows(row, name)
    caption = ("The first three principal components of the patch features, one basis for all "
               "photographs of a row, as red, green and blue. ")
    return save(figure, Path(config.output or "pca.png"), caption + about(models, config))


def enlarge_colours(image: Tensor, patch: int) -> Tensor:
    """(h, w, 3) -> (H, W, 3), each patch a flat square."""
    return enlarge(image.permute(2, 0, 1), patch).permute(1, 2, 0)
