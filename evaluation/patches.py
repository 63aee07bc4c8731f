"""Patches: segmentation without any training, by the vote of the nearest labelled patches.

    images, masks --> patch tokens, each with the class that fills most of its patch: the bank
    image --> patch tokens --> the 20 nearest of the bank vote --> class of each patch --> mIoU

Idea     What k-NN is for class tokens. Nothing is learned that could hide a bad feature, and it
         takes seconds, so a training run can watch by it whether its patch tokens still get
         better (--dense_every): they may get worse while the class token improves.
Paper    none as a protocol; DINOv2 sec. 7.4 judges the same tokens by a linear layer
Try      python evaluate.py patches --weights RUN
Change   the vote: vote_for_classes
Tests    pytest tests/evaluation/test_patches.py

Letters  n patches, D width, k neighbours, K classes, h w patches down and across, H W pixels.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from augment import normalise
from backbones.dense_heads import at_pixels, frame, patch_maps
from evaluation.dense import (PairsConfig, can_judge, in_order, open_for_patches, remedy,
                              require_numbers, shape_at, side_of_crops, with_common_classes)
from evaluation.knn import top_neighbours
from evaluation.protocol import Extractor, require_other_images
from evaluation.segment import confusion, scores
from images.pairs import IGNORE, MASKS, Pairs, read_mask
from machinery.flags import UsageError, require
from machinery.process import Process, autocast

# ----------------------------------------------------------------------------------------------
# The vote


def classes_of_patches(mask: Tensor, shape: tuple[int, int], patch_size: int,
                       classes: int) -> Tensor:
    """The class that fills most of each patch of an image, (h, w); IGNORE where none does.

    mask (H, W); shape: height and width at which the network sees the image.
    """
    # The mask takes the way of the image: resized (by nearest pixels, because the mean of two
    # classes is none), then padded to whole patches, where what is added has no answer.
    mask = TF.resize(mask[None], list(shape), interpolation=TF.InterpolationMode.NEAREST)[0]
    mask = F.pad(mask, frame(*shape, patch_size), value=IGNORE)

    # Counted by one-hot maps, whose mean over a patch is the share of each class; the last map
    # is that of ignored pixels, and wins where most of the patch has no answer. Example of 4 x
    # 4 pixels: 7 of class 0, 5 of class 2 and 4 ignored have the shares .44, 0, .31 and .25, so
    # the class of the patch is 0.
    one_hot = F.one_hot(mask.where(mask != IGNORE, classes), classes + 1)  # (H, W, K + 1)
    shares = F.avg_pool2d(one_hot.permute(2, 0, 1).float(), patch_size)  # (K + 1, h, w)
    winner = shares.argmax(0)
    return winner.where(winner < classes, IGNORE)


def vote_for_classes(queries: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int = 20,
                     temperature: float = 0.07) -> Tensor:
    """Shares of the vote that each class gets from the k nearest patches, (n, K).

    queries (n, D), bank (n_bank, D), labels (n_bank,). The weights are those of
    evaluation.knn.knn_vote; here all classes keep their share, so that the map can be enlarged
    before the largest is chosen.
    """
    # The weights of a patch's neighbours sum to 1. Each is added to the share of its class.
    # Example: the weights .5, .3 and .2 of patches of the classes 2, 0 and 2 give (.3, 0, .7).
    similarities, rows = top_neighbours(queries, bank, min(k, len(bank)))
    weights = (similarities / temperature).softmax(1)  # (n, k)
    votes = weights.new_zeros(len(queries), classes)
    return votes.scatter_add_(1, labels[rows], weights)


def patch_tokens(model: nn.Module, pairs: Pairs, i: int, size: int, process: Process,
                 precision: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Pair i -> (tokens of its patches (D, h, w), mask (H, W), the size that was seen)."""
    # Height and width keep their proportions, so that a thing looks as it did in training.
    image, mask = pairs[i]
    shape = tuple(shape_at(*mask.shape, size))
    scaled = TF.resize(image, list(shape), antialias=True)[None].to(process.device)
    with autocast(precision, process.device):
        maps = patch_maps(model, normalise(scaled, pairs.channel_stats), [model.depth - 1])
    tokens = maps[0][0][0].float()
    require_numbers(tokens, "--weights")
    return tokens, mask, shape


def patch_bank(model: nn.Module, train: Pairs, classes: int, size: int, process: Process,
               most: int, precision: str) -> tuple[Tensor, Tensor]:
    """The patches that vote: tokens (n_bank, D) and classes (n_bank,), on all processes."""
    # Neighbouring patches of an image are nearly the same, so a few of every image say more
    # than all of a few. Example: of 20,000 patches and 500 images each image gives 40 of its
    # 1,024. No image gives less than one.
    each = max(1, most // len(train))
    own = {}
    for i in range(process.rank, len(train), process.world_size):
        tokens, mask, shape = patch_tokens(model, train, i, size, process, precision)
        labels = classes_of_patches(mask, shape, model.patch_size, classes).flatten()  # (h*w,)
        labelled = (labels != IGNORE).nonzero()[:, 0]

        # Drawn by the number of the image: any number of processes draws the same patches.
        drawn = np.random.default_rng([0, i]).permutation(len(labelled))[:each]
        chosen = labelled[torch.from_numpy(drawn)]
        own[i] = (tokens.flatten(1).T.cpu()[chosen], labels[chosen])

    # Every process needs the whole bank, because each of its patches may be the nearest one:
    # 20,000 tokens of width 384 are 31 MB.
    parts = in_order(own, process)
    bank = torch.cat([tokens for tokens, _ in parts])  # (n_bank, D)
    labels = torch.cat([chosen for _, chosen in parts])  # (n_bank,)
    return bank.to(process.device), labels.to(process.device)


@torch.no_grad()
def patch_knn(
    model: nn.Module, train: Pairs, val: Pairs, classes: int, size: int, process: Process,
    k: int = 20, most: int = 20_000, precision: str = "fp32",
    flags: tuple[str, str] = ("--data", "--val_data")) -> dict:
    """The figures of evaluation.segment.scores for the vote of patches, on all processes.

    most: how many patches vote; they are drawn evenly from all images, and at least one of each.
    flags: those that named the two sets, for messages.
    """
    # A training run calls this for its teacher, and gets it back in the mode that it was in.
    was_training = model.training
    model.eval()
    bank, labels = patch_bank(model, train, classes, size, process, most, precision)
    if not len(labels):
        raise UsageError(f"{flags[0]}: no patch has a class{remedy(flags[0])}")

    # The vote, image by image. The shares of the vote are enlarged, and the largest is chosen
    # at each pixel: outlines then run between the patches, and not along their sides.
    counts = torch.zeros(classes, classes, dtype=torch.long)
    for i in range(process.rank, len(val), process.world_size):
        tokens, mask, shape = patch_tokens(model, val, i, size, process, precision)
        votes = vote_for_classes(tokens.flatten(1).T, bank, labels, classes, k)  # (h*w, K)
        votes = votes.T.view(1, classes, *tokens.shape[-2:])  # (1, K, h, w)
        votes = at_pixels(votes, shape, model.patch_size)
        votes = F.interpolate(votes, mask.shape, mode="bilinear", align_corners=False)
        counts += confusion(mask, votes.argmax(1)[0].cpu(), classes)
    model.train(was_training)
    counts = sum(process.all_gather(counts))
    if not counts.any():
        raise UsageError(f"{flags[1]}: every pixel of every mask is ignored{remedy(flags[1])}")
    return scores(counts)


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(PairsConfig):
    # -- vote of patches
    ignore_label: int = 255  # pairs:PATH: the number in a mask of pixels that have no class
    neighbours: int = 20  # how many of the nearest patches vote
    most_patches: int = 20_000  # how many patches there are to vote; at least one of each image
    most: int = 500  # how many images of --data and of --val_data are used, at most

    def check(self):
        require(self, lambda x: x >= 1, "at least 1", "neighbours", "most_patches", "most")


def on_report_card(config: Config, model) -> Config | None:
    """For `evaluate.py all`: None where there are no maps of pixels, or no patch tokens."""
    return config if can_judge(model, config.data, MASKS) else None


def run(extractor: Extractor) -> dict:
    """The nearest labelled patches vote for the class of each patch; nothing is trained."""
    config = extractor.config
    process = extractor.process
    size = side_of_crops(config.image_size, extractor.model)
    read = partial(read_mask, ignore_label=config.ignore_label)

    train = open_for_patches(extractor, MASKS, "data", read, size)
    val = open_for_patches(extractor, MASKS, "val_data", read, size)
    require_other_images(train, val, config.data, config.val_data)

    # 500 images of each kind are enough for a figure that is stable, and take seconds. Files
    # are often sorted by what they show, so they are taken evenly spread from the whole set.
    train = train.spread_out(config.most)
    val = val.spread_out(config.most)
    train, val = with_common_classes(train, val, process)
    figures = patch_knn(extractor.model, train, val, len(train.classes), size, process,
                        config.neighbours, config.most_patches, config.precision)
    how = f"{config.neighbours} neighbours, {len(train):,d} images vote, {size} px"
    process.print(f"patches: {how}, {len(val):,d} images of {config.val_data} judged\n"
                  f"  mIoU {figures['miou']:.2%}, "
                  f"accuracy {figures['accuracy']:.2%}")
    return {
        "patches": figures, "protocol": how, "image_size": size,
        "headline": {"patch k-NN, mIoU": figures["miou"]}}
