"""Snapshots: what a run keeps of its past, for the page that tells it.

    step 0, the middle, the end --> snapshots/step-N.pt   the backbone, as it was then
    six held-out images         --> snapshots/images.pt   what it is asked about

Idea     What a network has learned shows best beside what it was: the same images, seen by the
         same network, before, during and after its training. Checkpoints are too large to be
         kept for that, and the images may be gone when the page is drawn.
Paper    none
Try      python train.py --epochs 1 --warmup_epochs 0      and look into snapshots/ of the run
Change   how many images are kept: IMAGES
Tests    pytest tests/figures/test_story.py
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from augment import center_crop
from images.data import Images
from machinery.checkpoints import save_tensors
from training.config import Config

IMAGES = 6  # as many as stand side by side on the page


def page_side(size: int, patch: int) -> int:
    """The side in pixels at which a network that was trained at `size` is asked for its page.

    A network of 40 pixels has 8 x 8 patches of 5: too few to see a shape in them. Its positions
    can be resampled, so it is asked at six times its size, up to 480 pixels, in whole patches.
    """
    return max(size, min(6 * size, 480)) // patch * patch


def keep_snapshot(run: Path, step: int, backbone: nn.Module, val: Images, images: Images,
                  config: Config):
    """Write snapshots/step-N.pt, and snapshots/images.pt if it is not there yet.

    val: the held-out images; images: those of the training, which stand in where none are held
    out.
    """
    folder = run / "snapshots"
    folder.mkdir(exist_ok=True)
    if not (folder / "images.pt").exists():
        keep_images(folder / "images.pt", val if len(val) else images, bool(len(val)), config)

    # Numbers of 16 bits need half the room (a ViT-L has 0.6 GB then), and in a picture nobody
    # sees the difference. Counters, which BatchNorm has, stay as they are.
    state = {}
    for name, value in backbone.state_dict().items():
        state[name] = (value.half() if value.is_floating_point() else value).cpu()
    save_tensors(folder / f"step-{step}.pt", state)


def keep_images(file: Path, images: Images, held_out: bool, config: Config):
    """A file of IMAGES images (n, C, side, side), chosen by the seed, and whether held out."""
    # Photographs are enlarged to the side at which the network is asked; the images of
    # shapes.py are drawn at that size. center_crop cuts the middle of 8/7 of it.
    patch = 1 if config.convnet else config.patch_size
    side = page_side(config.global_crops_size, patch)
    chosen = []
    for i in np.random.default_rng(config.seed).permutation(len(images)):
        # An image that does not decode is left out. Decoders raise exceptions of many kinds.
        with contextlib.suppress(Exception):
            chosen.append(center_crop(images.read_at(int(i), round(side * 8 / 7)), side))
        if len(chosen) == IMAGES:
            break
    if chosen:
        save_tensors(file, {"images": torch.stack(chosen), "held_out": held_out})
