"""Masks: the class token's attention, taken for a segmentation of what is in the image.

    image --> attention of the class token, a map for each head --> patches that hold 60 % of it
                                                                      |
              Jaccard with the mask of the things in the image <-- enlarged to the pixels

Idea     Nobody told the network what a thing is. If the patches that its class token looks at
         are those of the thing, then it has found out by itself. Heads look at different
         things, so the best one for each image is compared with the truth, and their mean.
Paper    DINO sec. 4.2.2 and fig. 4 (mass threshold of 60 %, Pascal VOC 2012)
Try      python evaluate.py masks --weights RUN
Change   another way to a mask: top_mass
Tests    pytest tests/evaluation/test_masks.py

Letters  B images, nh heads, N tokens, h w patches down and across, H W pixels.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from augment import RGB, normalise
from backbones.weights import architecture, load_backbone
from evaluation.contours import region_similarity
from evaluation.dense import (PairsConfig, can_judge, in_order, open_for_patches,
                              require_numbers, side_of_crops)
from evaluation.protocol import Extractor
from images.pairs import IGNORE, MASKS, Pairs, read_mask
from machinery.clock import Progress
from machinery.flags import UsageError, require
from machinery.process import Process, autocast
from vit import VisionTransformer

# ----------------------------------------------------------------------------------------------
# From images to masks


def top_mass(attention: Tensor, share: float = 0.6) -> Tensor:
    """The smallest set of patches that holds `share` of each map's mass: bool, (..., h, w).

    Example with four patches and a share of .6:

        attention, sorted upwards     .1   .2   .3   .4
        running sum                   .1   .3   .6   1.
        above 1 - .6 = .4             no   no   yes  yes     these two hold .7, one alone .4
    """
    flat = attention.flatten(-2)
    values, order = flat.sort(-1)
    running_sum = values.cumsum(-1) / values.sum(-1, keepdim=True)

    # The patches are sorted upwards, so that what comes after the first 1 - share of the mass
    # is the set. `scatter` takes the answers back to where their patches were.
    in_set = running_sum > 1 - share
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, in_set)
    return keep.view_as(attention)


def jaccard(masks: Tensor, truth: Tensor, ignored: Tensor) -> Tensor:
    """Masks (nh, H, W), the truth and what is ignored (H, W), all bool -> (nh,), from 0 to 1.

    The Jaccard index is the number of pixels in both masks, divided by the number in either.
    Example: a mask of 6 pixels and a truth of 8 that share 4 have 4 / (6 + 8 - 4) = .4.
    """
    return region_similarity(masks & ~ignored, (truth & ~ignored).expand_as(masks))


def mass_on(attention: Tensor, truth: Tensor, ignored: Tensor) -> Tensor:
    """The share of the attention that lies on the things: maps (..., h, w) -> (...,).

    truth and ignored are masks of pixels (H, W). A patch that a thing covers in part counts by
    that part. A map that is the same everywhere has the share of the picture that things cover;
    one that picks a few patches of a thing has nearly 1, though its mask is small.
    """
    masks = torch.stack([truth & ~ignored, ~ignored])[None].float()
    on_things, known = F.interpolate(masks, attention.shape[-2:], mode="area")[0]  # (h, w)
    return (attention * on_things).sum((-2, -1)) / (attention * known).sum((-2, -1))


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(PairsConfig):
    data: str = field(default="shapes",
                      metadata={"no_flag": True})  # no flag: nothing is learned here
    # -- masks
    others: tuple[str, ...] = ()  # further networks, for the same table
    ignore_label: int = 255  # pairs:PATH: the number in a mask of pixels that have no class
    background: int = 0  # the class in a mask that is no thing
    share: float = 0.6  # the share of the attention that a mask holds
    block: int = -1  # the block whose attention it is; -1 is the last
    most: int = 500  # how many of the images are judged, at most

    def check(self):
        require(self, lambda x: 0 < x < 1, "between 0 and 1", "share")
        require(self, lambda x: x >= 1, "at least 1", "most")


def on_report_card(config: Config, model) -> Config | None:
    """For `evaluate.py all`: None where there are no maps of pixels, or no patch tokens."""
    return config if can_judge(model, config.val_data, MASKS) else None


def run(extractor: Extractor) -> dict:
    """The class token's attention, taken for a mask of the things. DINO sec. 4.2.2, fig. 4."""
    config = extractor.config
    process = extractor.process
    size = side_of_crops(config.image_size, extractor.model)
    read = partial(read_mask, ignore_label=config.ignore_label)
    pairs = open_for_patches(extractor, MASKS, "val_data", read, size).spread_out(config.most)

    # The network itself; one that has the same shape and random weights, which shows what the
    # figure is worth; and whatever else was asked for.
    networks = {config.weights: extractor.model}
    networks["the same, untrained"] = untrained_like(extractor.model).to(process.device)
    for what in config.others:
        # load_backbone speaks of --weights, where this name was given by another flag.
        try:
            other = load_backbone(what, config.checkpoint_key, config.num_heads)
        except ValueError as error:
            raise UsageError(str(error).replace("--weights", "--others")) from None
        if not hasattr(other, "blocks"):
            raise UsageError(f"--others {what}: a convnet has no attention; expected Vision "
                             "Transformers")
        if other.channel_stats.channels != pairs.channel_stats.channels:
            raise UsageError(
                f"--others {what}: takes {other.channel_stats.channels} channels, and "
                f"--weights {config.weights} {pairs.channel_stats.channels}")
        networks[what] = other.to(process.device)

    # Networks may differ in depth, and a block is asked for by one number for all of them.
    for name, model in networks.items():
        if not -model.depth <= config.block < model.depth:
            raise UsageError(f"--block {config.block}: {name} has the blocks 0 to "
                             f"{model.depth - 1}")

    # A row for each network, as soon as it is judged.
    table = {}
    process.print(
        f"masks: top {config.share:.0%} of the attention of block {config.block}, "
        f"{size} px, {len(pairs):,d} images of {config.val_data}\n"
        f"  {'Jaccard of':20s} {'best head':>11s} "
        f"{'one head':>9s} {'all heads':>10s} {'mean head':>10s}   attention on things")
    for name, model in networks.items():
        table[name] = figures = judge(model, pairs, size, config, process)
        process.print(f"  {name[-20:]:20s} {figures['best']:11.2%} {figures['one_head']:9.2%} "
                      f"{figures['all_heads']:10.2%} {figures['mean_head']:10.2%} "
                      f"{figures['on_things']:21.2%}")
    return {
        "masks": table, "protocol": f"{config.share:g} of block {config.block}, {size} px",
        "image_size": size,
        "headline": {"attention masks, Jaccard": table[config.weights]["best"]}}


def judge(model: VisionTransformer, pairs: Pairs, size: int, config,
          process: Process) -> dict[str, float]:
    """Four Jaccard indices and a share of the attention, means over the images.

    best: the best head of each image. one_head: the head that is best over all images.
    all_heads: one mask, from the mean of the heads' maps. mean_head: the mean over the heads.
    on_things: how much of the mean of the heads' maps lies on things (mass_on; ours).
    """
    own = {}
    report = Progress("masks", len(pairs), process)
    for i in range(process.rank, len(pairs), process.world_size):
        image, classes = pairs[i]
        truth = (classes != config.background) & (classes != IGNORE)
        # An image without any thing has no mask to be found.
        if truth.any():
            maps = attention_at(model, image, size, config, process)  # (nh, h, w)

            # The mean of the heads is treated as one head more.
            maps = torch.cat([maps, maps.mean(0, keepdim=True)])  # (nh + 1, h, w)
            # The map is small, so the mask made of it is enlarged to the pixels of the truth.
            masks = top_mass(maps, config.share)
            masks = F.interpolate(masks[None].float(), classes.shape, mode="nearest")[0] > 0
            indices = jaccard(masks, truth, classes == IGNORE)  # (nh + 1,)
            share = mass_on(maps[-1:], truth, classes == IGNORE)  # (1,), of all heads
            own[i] = torch.cat([indices, share])  # (nh + 2,)
        report(i + 1)

    by_image = in_order(own, process)
    if not by_image:
        raise UsageError(f"--val_data {config.val_data}: no image has a pixel that is not "
                         f"--background {config.background} or --ignore_label "
                         f"{config.ignore_label}")

    # Rows are images, columns are heads. "best" takes the maximum of each row and then the
    # mean, which is what DINO reports; "one_head" the mean of each column and then the maximum,
    # which needs no truth to choose a head for every single image, and is lower.
    rows = torch.stack(by_image)  # (n, nh + 2)
    heads = rows[:, :-2]
    return {
        "best": heads.max(1).values.mean().item(), "one_head": heads.mean(0).max().item(),
        "all_heads": rows[:, -2].mean().item(), "mean_head": heads.mean().item(),
        "on_things": rows[:, -1].mean().item()}


@torch.no_grad()
def attention_at(model: VisionTransformer, image: Tensor, size: int, config,
                 process: Process) -> Tensor:
    """The attention of an image (C, H, W) with a short side of `size` pixels, (nh, h, w)."""
    height, width = image.shape[-2:]
    factor = size / min(height, width)

    # Whole patches: an image is stretched by less than a patch rather than cut, so that the map
    # and the mask cover the same picture.
    patch = model.patch_size
    shape = [max(1, round(side * factor / patch)) * patch for side in (height, width)]
    scaled = TF.resize(image, shape, antialias=True)
    # Each network gets the image as its own training normalised it.
    scaled = normalise(scaled[None].to(process.device), model.channel_stats)
    with autocast(config.precision, process.device):
        maps = model.get_class_attention(scaled, config.block)
    require_numbers(maps, f"--weights {config.weights}, or one of --others")
    return maps[0].float().cpu()


def untrained_like(model: VisionTransformer) -> VisionTransformer:
    """A network of the same shape with random weights, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = VisionTransformer(**architecture(model.state_dict(), None, model.num_heads))
    fresh.pos_embed_resize = model.pos_embed_resize
    fresh.channel_stats = getattr(model, "channel_stats", RGB)
    return fresh.eval()
