"""Similarity: which patches, of any photograph, are most like one patch.

    patch X,Y of the first photograph --> its feature (D)
                                               |  cosine
    patches of every photograph ------> features (h, w, D) --> a map for each photograph

Idea     What belongs together has similar features: the other eye, the rest of the wing, the
         same part of another animal. One patch is enough to ask for it.
Paper    DINOv2 sec. 7.5 and fig. 10 match by distance; a cosine map is ours
Try      python visualize.py similarity PHOTO PHOTO --weights RUN_OR_FILE_OR_NAME
Change   another measure of similarity: cosine_map
Tests    pytest tests/figures/test_similarity.py

Letters  h w patches down and across, D width of the features.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from figures import inputs
from figures.inputs import (about, enlarge, fit, mark, name_rows, networks, patch_at,
                            patch_features, photographs, read, sheet)
from machinery.page import MAPS, save, show


def cosine_map(feature: Tensor, grid: Tensor) -> Tensor:
    """The cosine of the angle between a feature (D) and those of (h, w, D): (h, w), -1 to 1."""
    return F.cosine_similarity(feature, grid, dim=-1)


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "PHOTO_OR_FOLDER ... --weights RUN_OR_FILE_OR_NAME ..."


@dataclass
class Config(inputs.Config):
    # -- similarity
    # X and Y are shares of the width and of the height of the first photograph.
    query: tuple[str, ...] = ("0.5,0.5",)  # patches that ask, X,Y from 0 to 1
    output: str = ""  # the picture to write; empty: similarity.png in this folder


def draw(arguments: list[str], config: Config) -> Path:
    """Which patches are most like one patch, in its own photograph and in others."""
    models = networks(config)
    files = photographs(arguments, config.most)

    # A row of maps for each network and each query; a column for each photograph.
    rows = []
    for name, model in models.items():
        images = [fit(read(file, model), config.image_size, model.patch_size) for file in files]
        grids = [patch_features(model, image, config.block) for image in images]
        for query in config.query:
            row, column = patch_at(query, grids[0].shape[:2])
            maps = [cosine_map(grids[0][row, column], grid) for grid in grids]
            rows.append((name, model.patch_size, (row, column), maps))

    alone = len(files) == 1
    figure, axes = sheet(images, files, len(rows))
    for row_axes, (name, patch, place, maps) in zip(axes, rows):
        # All maps of a row have one scale, so that colours can be compared between photographs.
        # Half a per cent of the patches, at least the one that asks, may be above it, and two
        # per cent below it: the title says which cosines have the outermost colours.
        values = torch.cat([grid.flatten() for grid in maps])
        low, high = values.quantile(torch.tensor([0.02, 0.995])).tolist()
        for axis, grid in zip(row_axes, maps):
            show(axis, enlarge(grid, patch), cmap=MAPS["similarity"], vmin=low,
                 vmax=max(high, low + 1e-12))

        # A ring in the first photograph shows which patch asked.
        mark(row_axes[0], *place, patch)
        title = f"{name}\ncosine {low:.2f} to {high:.2f}"
        if alone:
            row_axes[0].set_title(title, fontsize=9)
        else:
            name_rows(row_axes, title)
    caption = (
        "Cosine of the features with that of the ringed patch, dark to bright. The numbers "
        "are those of the outermost colours, which the lowest 2 % and the highest 0.5 % of "
        "the patches share. ")
    caption += about(models, config)
    return save(figure, Path(config.output or "similarity.png"), caption)
