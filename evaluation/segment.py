"""Segment: which class every pixel belongs to, by a linear layer on frozen patch tokens.

    crops, masks --> backbone, frozen --> (B, n*D, h, w) --> BatchNorm, 1 x 1 convolution
                                                               |
    cross-entropy of every pixel <-- enlarged to the crop <-- logits (B, K, h, w)

    judged: windows (and scales, mirrored) --> classes of all pixels --> mIoU

Idea     A patch token says what stands in its patch, though nobody ever told the network what
         that is called. A linear layer learns the names; how sharp its maps are shows how much
         of a place the tokens keep.
Paper    DINOv2 sec. 7.4: "linear", and "+ms" (--last_blocks 4, several scales)
Try      python -m evaluation.segment     what accuracy hides, and mIoU shows
         python evaluate.py segment --weights RUN
Change   another head: backbones/dense_heads.py; another protocol: PROTOCOLS
Tests    pytest tests/evaluation/test_segment.py

Letters  B images, D width, n blocks, h w the grid of patches, H W pixels, K classes.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from augment import normalise
from backbones.dense_heads import SegmentationHead, Segmenter, at_pixels, read_dense_head
from backbones.weights import load_strictly
from evaluation.dense import (PairsConfig, can_judge, crop_batches, hash_of_pairs, in_windows,
                              open_for_patches, over_flips, page_of_rows, require_numbers,
                              shape_at, side_of_crops, source_of, with_common_classes,
                              with_protocol)
from evaluation.extract import gather
from evaluation.protocol import (Extractor, keep_earlier, require_other_images, results_folder)
from evaluation.unfinished import SAVE_EVERY, Unfinished
from images.pairs import IGNORE, MASKS, Pairs, read_mask
from machinery.checkpoints import live_state, save_tensors
from machinery.clock import Progress
from machinery.flags import UsageError, require
from machinery.page import picture, pyplot, save
from machinery.process import Process, autocast

# ----------------------------------------------------------------------------------------------
# The figures


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts (K, K): entry (t, p) is how many pixels of class t were taken for class p.

    Pixels whose truth is IGNORE do not count. ValueError for a truth that is no class.
    """
    # A larger class cannot be counted in the matrix. It would mean that the masks of --val_data
    # have a class that those of --data do not have.
    judged = truth != IGNORE
    truth = truth[judged]
    if len(truth) and int(truth.max()) >= classes:
        raise ValueError(f"a mask has the class {int(truth.max())}, and there are {classes}")

    # A pair (t, p) is one number t*K + p, so that one count of numbers counts all pairs.
    # Example of three classes: truth 2 taken for 1 is 2*3 + 1 = 7, which is row 2, column 1 of
    # the matrix.
    pairs = truth * classes + predicted[judged]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def scores(counts: Tensor) -> dict:
    """The figures of a confusion matrix (K, K): miou, accuracy, and iou of each class.

    The IoU of a class is the number of pixels in both its truth and its prediction, divided by
    the number in either. Example with two classes:

                   taken for 0   for 1
        class 0         6          2      IoU of 0: 6 / (6 + 2 + 1) = .67
        class 1         1          3      IoU of 1: 3 / (3 + 1 + 2) = .50,  mIoU .58

    A class that is neither there nor predicted has no IoU (None), and does not count.
    """
    # Of class k the row sum is how many pixels it has, the column sum how many were taken for
    # it. Pixels in both are in both sums, so they are taken off once.
    counts = counts.double()
    both = counts.diag()  # (K,)
    either = counts.sum(0) + counts.sum(1) - both
    iou = both / either  # NaN where a class does not occur
    occurs = either > 0
    return {
        "miou": iou[occurs].mean().item(), "accuracy": (both.sum() / counts.sum()).item(),
        "iou": [value if there else None for value, there in zip(iou.tolist(), occurs)]}


# ----------------------------------------------------------------------------------------------
# The protocol

# What the papers' protocols set, where no flag says otherwise. Batch, steps and the random
# resize are those of mmsegmentation, with which DINOv2's heads were trained.
LINEAR = {"image_size": 512, "steps": 40_000, "head_batch": 16, "resize": (0.5, 2.0)}
MULTISCALE = LINEAR | {
    "image_size": 640, "last_blocks": 4, "scales": (1.0, 1.32, 1.73), "flip": True}
PROTOCOLS = {
    "short": {},  # the flags as they are: short enough for a laptop, on a network of small images
    # DINOv2's: the same settings for all three data sets. None of them was run here.
    "ade20k": LINEAR,
    "cityscapes": LINEAR,
    "voc2012": LINEAR,
    "ade20k_ms": MULTISCALE,
    "cityscapes_ms": MULTISCALE,
    "voc2012_ms": MULTISCALE}


@dataclass
class Config(PairsConfig):
    num_workers: int = 2  # loader processes for each process
    # -- segmentation
    protocol: Literal[*PROTOCOLS] = "short"  # whose settings: short, or DINOv2's for a data set
    ignore_label: int = 255  # pairs:PATH: the number in a mask of pixels that have no class
    last_blocks: int = 1  # how many of the last blocks the head reads
    scales: tuple[float, ...] = (
        1.0,)  # sizes at which an image is judged, times --image_size; their mean answers
    flip: bool = False  # judge the mirror image, too
    steps: int = 300  # of training the head
    head_batch: int = 16  # crops of a step, on all processes together
    resize: tuple[float, float] = (
        1.0, 2.0)  # range of the short side before cropping, times the side of a crop
    head_lr: float = 1e-3  # peak of the head's learning rate
    head: str = ""  # judge this head, a file or a released NAME, and train none
    resume: bool = True  # continue a training in --output_dir that was stopped before its end
    seed: int = 0  # the seed of the head's first weights, the order of the pairs, and the crops

    def check(self):
        require(self, lambda x: x >= 1, "at least 1", "last_blocks", "steps", "head_batch")
        require(self, lambda x: 0 < x[0] <= x[1], "0 < low <= high", "resize")
        require(self, lambda x: x and all(s > 0 for s in x), "positive numbers", "scales")


def on_report_card(config: Config, model) -> Config | None:
    """For `evaluate.py all`: None where there are no maps of pixels, or no patch tokens."""
    return config if can_judge(model, config.data, MASKS) else None


def run(extractor: Extractor) -> dict:
    """A linear layer on frozen patch tokens names the class of each pixel. DINOv2 sec. 7.4."""
    config = with_protocol(extractor.config, PROTOCOLS)
    process = extractor.process
    size = side_of_crops(config.image_size, extractor.model)
    read = partial(read_mask, ignore_label=config.ignore_label)
    train = open_for_patches(extractor, MASKS, "data", read, size)
    val = open_for_patches(extractor, MASKS, "val_data", read, size)
    if not config.head:  # with a head --data only tells the classes
        require_other_images(train, val, config.data, config.val_data)
    train, val = with_common_classes(train, val, process)
    classes = train.classes

    # The head is read from a file, or trained here. All processes train the same head on the
    # same batches, so one of them saves it.
    if config.head:
        segmenter = read_segmenter(config.head, extractor.model, len(classes))
    else:
        settings = {
            "data": hash_of_pairs(train), "ignore_label": config.ignore_label, "crops": size,
            "last_blocks": config.last_blocks, "steps": config.steps, "resize": config.resize,
            "head_batch": config.head_batch, "head_lr": config.head_lr}
        unfinished = Unfinished(extractor, "segment", settings, config.resume)
        segmenter = train_segmenter(extractor.model, train, len(classes), size, config, process,
                                    unfinished)
        if process.main:
            file = results_folder(config, "segment") / "head.pt"
            keep_earlier(file)
            save_tensors(file, segmenter.decode_head.state_dict())
        unfinished.remove()

    # The table: one line for each class, and the two figures that papers report.
    counts, shown = judge(segmenter, val, len(classes), size, config, process)
    if not counts.any():
        raise UsageError(f"--val_data {config.val_data}: every pixel of every mask is ignored; "
                         "is --ignore_label right?")
    figures = scores(counts)
    trained = f"head {config.head}" if config.head else f"{config.steps} steps"
    how = (f"last {len(segmenter.blocks)} blocks, {trained}, crops of {size} px, scales "
           f"{' '.join(map(str, config.scales))}{', mirrored' if config.flip else ''}")
    process.print(f"segment: {how}, {len(val):,d} images of {config.val_data} judged")
    for name, iou in zip(classes, figures["iou"]):
        process.print(f"  {name:20s} " + ("-" if iou is None else f"{iou:7.2%}"))
    process.print(f"  mIoU {figures['miou']:.2%}, accuracy {figures['accuracy']:.2%}")
    if process.main:
        draw_page(shown, len(classes), results_folder(config, "segment") / "segment.png")
    return {
        "segment": figures | {"classes": list(classes)}, "protocol": how, "image_size": size,
        "headline": {"segmentation, mIoU": figures["miou"]}}


def judge(segmenter: Segmenter, val: Pairs, classes: int, size: int, config,
          process: Process) -> tuple[Tensor, list]:
    """(confusion matrix (K, K) of all images, the first of them as (image, truth, prediction)).
    """
    # Each process judges every W-th image, and their counts are added up: these are integers,
    # so the figures do not depend on the number of processes. IoU is computed from the counts
    # of all images together, because a mean over images would count a class of ten pixels in
    # one image as much as the same class where it fills another.
    counts = torch.zeros(classes, classes, dtype=torch.long)
    shown = []
    report = Progress("segment", len(val), process)
    for i in range(process.rank, len(val), process.world_size):
        image, truth = val[i]
        predicted = segment(segmenter, image, val.channel_stats, size, config,
                            process)  # (H, W)
        counts += confusion(truth, predicted, classes)
        if len(shown) < 4:
            shown.append((image, truth, predicted))
        report(i + 1)
    return sum(process.all_gather(counts)), shown


def train_segmenter(backbone, train: Pairs, classes: int, size: int, config, process: Process,
                    unfinished: Unfinished | None = None) -> Segmenter:
    """A head for this backbone, trained on random crops of `size` pixels."""
    # AdamW, as DINOv2's heads were trained by. The optimizer gets the parameters of the head
    # alone: nothing of the backbone changes.
    torch.manual_seed(config.seed)
    n = config.last_blocks
    if n > backbone.depth:
        raise UsageError(f"--last_blocks {n}: the network has {backbone.depth}")
    head = SegmentationHead(n * backbone.embed_dim, classes)
    segmenter = Segmenter(backbone, head, n).to(process.device)
    optimizer = torch.optim.AdamW(head.parameters(), config.head_lr, weight_decay=1e-4)

    # A set of fewer pairs than a batch has gives smaller batches. mmsegmentation's warm-up has
    # 1,500 of 40,000 steps; of the 300 steps of the short protocol it has 30.
    batch = min(config.head_batch, len(train))
    warmup = min(1500, config.steps // 10)
    answers = torch.zeros(classes, dtype=torch.long,
                          device=process.device)  # pixels of each class

    def state():
        return {"answers": answers, **live_state({"head": head}, optimizer, of="head")}

    start = unfinished.restore(state) if unfinished else 0
    batches = crop_batches(train, size, config.resize, IGNORE, batch, config.steps, process,
                           config.num_workers, config.seed, start)
    report = Progress("training the head", config.steps - start, process)
    for step, (images, masks) in enumerate(batches, start):
        # Each process runs the backbone on its share. The head sees the whole batch on all of
        # them, because its BatchNorm needs all of it. Its work is little, but its logits at all
        # pixels are large: 16 crops of 512 x 512 pixels and 150 classes are 2.5 GB, and a step
        # needs more than three times as much on each process.
        with torch.no_grad(), autocast(config.precision, process.device):
            features = segmenter.features(images)  # (b, n*D, h, w)
        features = gather(features.float(), batch, process)  # (B, n*D, h, w)
        masks = gather(masks, batch, process)  # (B, s, s)

        # The learning rate grows over the warm-up, and then falls on a straight line to 0. With
        # 300 steps, of which 30 are warm-up, it is 1/30 of its peak at step 0, the peak at step
        # 30, and half of it at step 165.
        rate = min((step + 1) / max(warmup, 1), (config.steps - step) / (config.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = config.head_lr * min(rate, 1)

        # The loss asks for the class of every pixel. With cross_entropy's mean a batch without
        # any answer would be 0 / 0, so the sum is divided here.
        logits = at_pixels(head(features), masks.shape[-2:], backbone.patch_size)
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum")
        count = masks[masks != IGNORE].bincount(minlength=classes)  # (K,)
        loss = loss / count.sum().clamp(min=1)
        answers += count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step + 1 - start)
        done = step + 1
        if unfinished and done % SAVE_EVERY == 0 and done < config.steps:
            unfinished.save(done, state())

    if not answers.any():
        raise UsageError(
            f"--data {config.data}: in no crop has a pixel a class, so the head has "
            "learned nothing; is --ignore_label right?")

    # Masks of the numbers 0 and 5 have the classes 1 to 4 beside them, of which no crop has a
    # pixel. An answer of one of them would be wrong everywhere, and would count in the mean with
    # an IoU of 0. With this bias its probability is 0, and it stays so when the head is read from
    # its file. (-inf would become NaN where it is enlarged with a weight of 0.)
    with torch.no_grad():
        head.conv_seg.bias[answers == 0] = -1e4
    return segmenter.eval()


@torch.no_grad()
def segment(segmenter: Segmenter, image: Tensor, stats, size: int, config,
            process: Process) -> Tensor:
    """The class of every pixel of an image (C, H, W), (H, W) on the CPU.

    The image is judged at each of config.scales, where 1 means a short side of `size` pixels,
    in windows of that size. The probabilities of all scales are averaged at its own size.
    """
    # Probabilities are averaged, and not logits, so that no scale counts more than another
    # because its logits are larger.
    height, width = image.shape[-2:]
    total = 0
    for scale in config.scales:
        scaled = TF.resize(image, shape_at(height, width, scale * size), antialias=True)
        scaled = normalise(scaled[None].to(process.device), stats)  # (1, C, H', W')

        def predict(part):
            with autocast(config.precision, process.device):
                return segmenter(part).float()

        # Windows overlap by a third, because a patch at the border of one sees only half of
        # what is around it: windows of 512 pixels begin 341 pixels apart. The answer is enlarged
        # or shrunk to the image itself, at which the mask is given.
        def answer(whole):
            logits = in_windows(predict, whole, size, stride=size * 2 // 3)
            logits = F.interpolate(logits, (height, width), mode="bilinear",
                                   align_corners=False)
            return logits.softmax(1)

        total = total + (over_flips(answer, scaled) if config.flip else answer(scaled))
    require_numbers(total, source_of(config))
    return total.argmax(1)[0].cpu()


# ----------------------------------------------------------------------------------------------
# Heads in files, ours and the released ones


def read_segmenter(what: str, backbone, classes: int) -> Segmenter:
    """The backbone with a head of a file; how many blocks it reads follows from its width.

    UsageError for another kind of file, another width, or another number of classes.
    """
    try:
        state, _ = read_dense_head(what)
        weight = state["conv_seg.weight"]  # (K, n*D, 1, 1)
    except Exception as error:  # torch.load raises different exceptions for different damage
        raise UsageError(f"--head {what}: no segmentation head ({error!r})") from None

    # The number of blocks n follows from the width of the layer, n*D. Example: a head of 1,536
    # channels on a ViT-S of width 384 reads four blocks, and on a ViT-g of width 1,536 one.
    n = weight.shape[1] // backbone.embed_dim
    if n * backbone.embed_dim != weight.shape[1] or not 1 <= n <= backbone.depth:
        raise UsageError(f"--head {what} reads {weight.shape[1]} channels, which are no blocks "
                         f"of a network of width {backbone.embed_dim}")
    if len(weight) != classes:
        raise UsageError(f"--head {what} knows {len(weight)} classes, --data has {classes}")
    head = SegmentationHead(weight.shape[1], classes)
    load_strictly(head, state, f"--head {what}")
    device = next(backbone.parameters()).device
    return Segmenter(backbone, head, n).to(device).eval()


# ----------------------------------------------------------------------------------------------
# The page


def draw_page(shown: list, classes: int, path: Path):
    """Images, their truth and the prediction, a row each, with one colour for each class."""
    plt = pyplot()
    fig, axes = page_of_rows(("image", "truth", "prediction"), len(shown))

    # Pixels without an answer are black, in the prediction as well, where nobody can say
    # whether it is right. More than twenty classes share the colours of a map of twenty.
    palette = [plt.get_cmap("tab20")(c % 20)[:3] for c in range(classes)] + [(0, 0, 0)]
    palette = np.array(palette)  # (K + 1, 3)
    for column, (image, truth, predicted) in zip(axes.T, shown):
        column[0].imshow(picture(image).numpy())
        # IGNORE is -1, which is the last row of the palette.
        column[1].imshow(palette[truth.numpy()])
        column[2].imshow(palette[predicted.where(truth != IGNORE, IGNORE).numpy()])
    save(fig, path)


if __name__ == "__main__":
    # A picture of 40 x 40 pixels: a square of 10 x 10 of class 1 on a ground of class 0. It is
    # found one pixel too far to the right, two pixels, ... What the accuracy hides, the IoU
    # shows.
    truth = torch.zeros(40, 40, dtype=torch.long)
    truth[15:25, 15:25] = 1
    for shift in (0, 1, 2, 5, 10):
        counts = confusion(truth, truth.roll(shift, 1), 2)
        figures = scores(counts)
        ground, square = figures["iou"]
        print(f"{shift:2d} pixels aside: counts {counts.tolist()}, accuracy "
              f"{figures['accuracy']:.1%}, IoU {ground:.1%} and {square:.1%}, mIoU "
              f"{figures['miou']:.1%}")
