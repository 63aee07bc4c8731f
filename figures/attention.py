"""Attention: what a Vision Transformer looks at in a photo.

    photo --> resized, cut to patches --> get_attention --> row of the class token (nh, h, w)
                                                              |
                    every head | their mean | the patches that hold 60 % of the mass

Idea     The class token collects what it needs by attending to patches. No label ever told the
         network where objects are; the maps of a trained network show them nevertheless, and
         that made DINO famous.
Paper    DINO fig. 1 and 3, sec. 4.2.2 and H (mass threshold)
Try      python visualize.py attention PHOTO --weights RUN_OR_FILE_OR_NAME
Change   another row of the page of a run: draw_attention_page
Tests    pytest tests/figures/test_attention.py

Letters  B images, nh heads, h w patches down and across, N tokens, H W pixels.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

import training.config
from augment import RGB, Pixels, center_crop, normalise
from backbones.weights import load_backbone
from evaluation.masks import top_mass
from images.data import Images, read_file
from machinery.flags import UsageError, require
from machinery.page import picture, pyplot, save, show
from vit import VisionTransformer


def fit(image: Tensor, side: int, patch: int) -> Tensor:
    """Shorter side to `side` pixels, then cut to whole patches: (C, H, W) uint8.

    ValueError if not even one patch fits.
    """
    if side < patch:
        raise ValueError(f"--image_size {side} is smaller than one patch of {patch} pixels")
    image = TF.resize(image, [side], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)

    # At most one patch less a pixel is cut off at the right and at the bottom.
    height, width = image.shape[-2:]
    return image[:, :height // patch * patch, :width // patch * patch]


def enlarge(grid: Tensor, patch: int) -> Tensor:
    """(..., h, w) -> (..., H, W), each patch a flat square.

    Smoothing would show more detail than the network computed: one number for each patch.
    """
    return grid.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """The image, at a quarter of its brightness where the mask (H, W) is False: (H, W, 3)."""
    return torch.where(mask[..., None], picture(image), 0.25 * picture(image))


def show_map(axis, grid: Tensor, patch: int, title: str = ""):
    """Draw a map (h, w) of attention, bright where there is much of it.

    A few patches may get most of the attention. The brightest 2 % share one colour, so that the
    rest can be told apart.
    """
    brightest = float(grid.flatten().quantile(0.98))
    show(axis, enlarge(grid, patch), title, cmap="viridis", vmin=0, vmax=brightest)


@torch.no_grad()
def draw_attention(model: VisionTransformer, image: Tensor, path: Path, block: int = -1,
                   share: float = 0.6, pixels: Pixels = RGB):
    """One image (C, H, W): every head, their mean, and the mask of the top mass of each."""
    plt = pyplot()
    heads = model.get_class_attention(normalise(image[None], pixels), block)[0]  # (nh, h, w)
    maps = torch.cat([heads.mean(0, keepdim=True), heads])  # (1 + nh, h, w)
    masks = top_mass(maps, share)
    names = ["mean of heads"] + [f"head {i}" for i in range(len(heads))]

    # The page has bands of two rows: maps above, their masks below. A band holds 7 maps beside
    # the column of the image. Example: ViT-B has 12 heads, 13 maps with their mean, two bands.
    columns = min(len(maps), 7)
    bands = math.ceil(len(maps) / columns)

    # Sizes are in inches: 1.9 for the width of a picture, and .3 of height for its title.
    ratio = image.shape[1] / image.shape[2]
    size = (1.9 * (columns + 1), 2 * bands * (1.9 * ratio + 0.3))
    fig, axes = plt.subplots(2 * bands, columns + 1, squeeze=False, figsize=size,
                             layout="constrained")
    for axis in axes.flat:
        axis.axis("off")  # places that stay empty

    show(axes[0, 0], picture(image), "image")
    for i, (name, grid, mask) in enumerate(zip(names, maps, masks)):
        row = 2 * (i // columns)
        column = 1 + i % columns
        map_axis = axes[row, column]
        mask_axis = axes[row + 1, column]
        show_map(map_axis, grid, model.patch_size, name)
        show(mask_axis, masked(image, enlarge(mask, model.patch_size)), f"top {share:.0%}")
    save(fig, path)


def sharpest_head(attention: Tensor) -> int:
    """The head whose attention is least spread over the patches: (B, nh, h, w) -> its
    number.
    """
    shares = attention.flatten(2)  # (B, nh, h*w)
    shares = shares / shares.sum(-1, keepdim=True)
    spread = torch.special.entr(shares).sum(-1)  # (B, nh), in nats: ln(h*w) if all are equal
    return int(spread.mean(0).argmin())


def page_side(size: int, patch: int) -> int:
    """The side in pixels at which a network that was trained at `size` is asked for its page.

    A network of 40 pixels has 8 x 8 patches of 5: too few to see a shape in them. Its positions
    can be resampled, so it is asked at six times its size, up to 480 pixels, in whole patches.
    """
    return max(size, min(6 * size, 480)) // patch * patch


@torch.no_grad()
def draw_attention_page(model: VisionTransformer, images: list[Tensor], side: int, path: Path,
                        pixels: Pixels = RGB):
    """Several images, one column each: the image, the mean of the heads, the sharpest head.

    A training run draws it at its end, of images that were held out, at `page_side` pixels.
    """
    plt = pyplot()
    images = torch.stack([center_crop(image, side) for image in images])

    # The network may be anywhere, and in training mode: it is left as it was. One image at a
    # time, because the weights of all pairs of tokens are large.
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    maps = []
    for image in images:
        batch = normalise(image[None].to(device), pixels)
        maps.append(model.get_class_attention(batch))
    attention = torch.cat(maps).cpu()  # (B, nh, h, w)
    model.train(was_training)

    # Heads look for different things, some for the ground behind an object: their mean shows
    # all of it, the least spread one mostly a thing or its edges.
    head = sharpest_head(attention)
    sharpest = attention[:, head]  # (B, h, w)
    masks = top_mass(sharpest, 0.9)
    fig, axes = plt.subplots(4, len(images), figsize=(1.6 * len(images), 6.5), squeeze=False)
    for i, image in enumerate(images):
        show(axes[0, i], picture(image))
        show_map(axes[1, i], attention[i].mean(0), model.patch_size)
        show_map(axes[2, i], sharpest[i], model.patch_size)
        show(axes[3, i], masked(image, enlarge(masks[i], model.patch_size)))

    # One title for each row, over its first picture.
    titles = ("image", "attention of the class token, mean of heads",
              f"head {head}, the sharpest", "the patches that get 90 % of it")
    for axis, title in zip(axes[:, 0], titles):
        axis.set_title(title, fontsize=8, loc="left")
    save(fig, path)


def draw_held_out(model: VisionTransformer, images: Images, config: training.config.Config,
                  folder: Path):
    """attention.png of a training run: where the class token looks in eight of `images`.

    A convnet has no class token that looks anywhere: of it nothing is drawn.
    """
    # Photographs are enlarged to the side at which the network is asked; the images of
    # shapes.py are drawn at that size. center_crop cuts the middle of 8/7 of it. Compiling for
    # eight images of another size does not pay.
    side = page_side(config.global_crops_size, config.patch_size)
    order = np.random.default_rng(config.seed).permutation(len(images))
    photos = [images.read_at(int(i), round(side * 8 / 7)) for i in order[:8]]
    if photos and not config.convnet:
        with torch.compiler.set_stance("force_eager"):
            draw_attention_page(model, photos, side, folder / "attention.png", config.pixels)


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "PHOTO --weights RUN_OR_FILE_OR_NAME"


@dataclass
class Config:
    # -- attention
    weights: str = ""  # the network: a run, a released name such as dino_vits8, a URL, a file
    checkpoint_key: Literal["teacher",
                            "student"] = "teacher"  # which network of a training's two
    num_heads: int = 0  # attention heads, for a file that does not tell them; 0: of width 64
    image_size: int = 480  # shorter side of the photo in pixels, before it is cut to patches
    block: int = -1  # the block whose attention is drawn; -1: the last
    share: float = 0.6  # share of the attention that the patches of a mask hold together
    output: str = ""  # the picture to write; empty: attention.png in this folder


def draw(arguments: list[str], config: Config) -> Path:
    """Where the class token looks in one photo: every head, their mean, masks."""
    photo = arguments[0]
    if not config.weights:
        raise UsageError("--weights: give a run, a file, or a released name such as dino_vits8")
    require(config, lambda x: 0 < x < 1, "between 0 and 1", "share")
    model = load_backbone(config.weights, config.checkpoint_key, config.num_heads)
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"--weights {config.weights}: a convnet, which has no attention")

    # The photo is read in the channels that the network was trained on: grey, colours, or more.
    try:
        image = read_file(Path(photo), model.pixels.channels)
    except (OSError, ValueError) as error:
        raise UsageError(f"{photo}: not a readable image ({error})") from None
    image = fit(image, config.image_size, model.patch_size)
    path = Path(config.output or "attention.png")
    draw_attention(model, image, path, config.block, config.share, model.pixels)
    return path
