"""Norms: how long the tokens of the patches are, and where some are far too long.

    photos --> all blocks --> |token| of each patch --> map, distribution, norms block by block

Idea     A large network without registers keeps notes about the whole image in a few patches of
         the background. Their tokens are several times as long as all others, and attention
         maps and dense tasks suffer. Registers are tokens that such notes can be kept in
         instead: with them the long tokens disappear.
Paper    registers (Darcet 2024) fig. 3 and 4, sec. 2
Try      python visualize.py norms PHOTO --weights dinov2_vitl14 dinov2_vitl14_reg
Change   which tokens count as too long: longest_normal
Tests    pytest tests/figures/test_norms.py

Letters  h w patches down and across, P patches, D width, L blocks.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from augment import normalise
from figures import inputs
from figures.inputs import about, enlarge, fit, networks, photographs, read, short
from machinery.page import MAPS, picture, pyplot, save, show
from vit import VisionTransformer

MARK = "#ff3d7f"  # the colour of what is too long


def longest_normal(norms: Tensor) -> float:
    """The norm above which a patch counts as too long, of the norms of one photo.

    It is three times the range of the middle half of the patches above that half, and at least
    twice the median. Example: with a quarter of the norms below 40, half of them below 45 and
    three quarters below 50 it is max(50 + 3 * 10, 2 * 45) = 90. The paper cuts at 150, for one
    network whose patches are long above 200.
    """
    # A photo of a thing on an empty ground has short tokens and long ones, too, but many of
    # each: these are no outliers, and the range of the middle half is wide.
    low, median, high = norms.flatten().quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return max(high + 3 * (high - low), 2 * median)


@dataclass
class Norms:
    """The lengths of the tokens of one image, before the final norm, which would hide them."""

    patches: Tensor  # (L, h, w), after each block
    class_token: Tensor  # (L,)
    registers: Tensor  # (R,), after the last block

    def too_long(self, block: int = -1) -> Tensor:
        """Which patches have a norm above longest_normal after a block: bool (h, w)."""
        return self.patches[block] > longest_normal(self.patches[block])


@torch.no_grad()
def token_norms(model: VisionTransformer, image: Tensor) -> Norms:
    """The norms of one image (C, H, W)."""
    images = normalise(image[None], model.channel_stats)
    layers = model.get_intermediate_layers(images, model.depth, return_class_token=True,
                                           norm=False)
    patches = torch.stack([tokens[0].norm(dim=-1) for tokens, _ in layers])  # (L, P)
    class_token = torch.stack([token[0].norm() for _, token in layers])  # (L,)

    # The intermediate layers leave out the registers, which are of interest after the last one.
    tokens = model.forward_features(images)["x_prenorm"][0]  # (N, D)
    registers = tokens[1:1 + model.num_register_tokens].norm(dim=-1)  # (R,)
    return Norms(patches.unflatten(1, model.grid(images)), class_token, registers)


# ----------------------------------------------------------------------------------------------
# The page


def draw_map(axis, norms: Tensor, too_long: Tensor, patch: int, title: str):
    """The norms of a photo's patches as a map, its scale beside it; long ones have a frame."""
    show(axis, enlarge(norms, patch), title, cmap=MAPS["attention"], vmin=0)
    # The scale is as high as the picture, whatever shape that has.
    bar = axis.figure.colorbar(axis.images[0], cax=axis.inset_axes((1.03, 0, 0.04, 1)))
    bar.outline.set_visible(False)

    # A patch of 14 pixels in a photo of 480 is small on the page, so a ring shows where it is.
    rows, columns = too_long.nonzero(as_tuple=True)
    axis.plot((columns + 0.5) * patch - 0.5, (rows + 0.5) * patch - 0.5, "o", markersize=7,
              markerfacecolor="none", markeredgecolor=MARK, markeredgewidth=1.2)


def draw_distribution(axis, norms: Norms, block: int):
    """How many patches have which norm. The scale is logarithmic: the long ones are few."""
    values = norms.patches[block].flatten()
    axis.hist(values.numpy(), bins=50, color="C0", log=True)
    axis.axvline(longest_normal(values), color=MARK, ls="--", label="longest that is normal")
    axis.axvline(float(norms.class_token[block]), color="black", label="class token")

    # The norms of the registers are known after the last block only.
    is_last = block % len(norms.patches) == len(norms.patches) - 1
    for i, norm in enumerate(norms.registers.tolist() if is_last else []):
        axis.axvline(norm, color="C2", ls=":", label="registers" if i == 0 else "_")
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter("{x:g}")  # 10 and 100, not powers of ten
    axis.yaxis.set_minor_formatter("")  # nothing at the ticks between them
    axis.set_xlabel("norm")
    axis.set_ylabel("patches")


def draw_blocks(axis, norms: Norms):
    """The norms after each block: where in the network the long tokens appear."""
    flat = norms.patches.flatten(1)  # (L, P)
    x = range(len(flat))
    axis.plot(x, flat.amax(1), color=MARK, label="longest patch")
    axis.fill_between(x, flat.quantile(0.05, 1), flat.quantile(0.95, 1), color="C0", alpha=0.25,
                      lw=0, label="5 to 95 % of the patches")
    axis.plot(x, flat.median(1).values, color="C0", label="median patch")
    axis.plot(x, norms.class_token, color="black", label="class token")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("block")
    axis.set_ylabel("norm")


def draw_norms(rows: list[tuple[str, Tensor, int, Norms]], block: int = -1):
    """A row for each (title, image, patch size, norms): the figure of matplotlib."""
    plt = pyplot()
    fig, axes = plt.subplots(len(rows), 4, squeeze=False, figsize=(13, 2.9 * len(rows)),
                             layout="constrained")
    for row, (title, image, patch, norms) in zip(axes, rows):
        too_long = norms.too_long(block)
        show(row[0], picture(image), title)
        count = f"{int(too_long.sum())} of {too_long.numel():,d}"
        draw_map(row[1], norms.patches[block], too_long, patch, f"norms; too long: {count}")
        draw_distribution(row[2], norms, block)
        draw_blocks(row[3], norms)

    # One legend for all rows, below the last, where it cannot hide a curve.
    for axis in axes[-1, 2:]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, frameon=False)
    return fig


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "PHOTO_OR_FOLDER ... --weights RUN_OR_FILE_OR_NAME ..."


@dataclass
class Config(inputs.Config):
    # -- norms
    output: str = ""  # the picture to write; empty: norms.png in this folder


def draw(arguments: list[str], config: Config) -> Path:
    """Norms of the patch tokens of photos: the long ones that registers remove."""
    # A row for each photo and network. Networks have patches of different sizes, so each of them
    # gets the photo cut to its own.
    models = networks(config)
    rows = []
    for file in photographs(arguments, config.most):
        for name, model in models.items():
            image = fit(read(file, model), config.image_size, model.patch_size)
            title = f"{short(file)}, {name}" if len(models) > 1 else short(file)
            rows.append((title, image, model.patch_size, token_norms(model, image)))
    caption = "Norms of the tokens before the final norm; rings: patches that are too long. "
    path = Path(config.output or "norms.png")
    return save(draw_norms(rows, config.block), path, caption + about(models, config))
