"""Dense: what segmentation and depth share: crops of pairs, large images in parts, the page.

    pair --> the same random resize, crop and mirror for image and map --> batches to learn from
    large image --> overlapping windows --> their answers, averaged where they overlap

Idea     A head on patch tokens learns from crops of a fixed size, and has to answer for images
         of any size. An image that is larger than the crops is worked through in windows of
         their size, so that the network never sees a grid of patches that it did not train on.
Paper    DINOv2 sec. 7.4, whose heads were trained with mmsegmentation: its random resize and
         crop, and its sliding window
Try      python evaluate.py segment --help
Change   another way to cut crops: PairCrops.__getitem__
Tests    pytest tests/evaluation/test_dense.py

Letters  B images, C channels, K classes or channels of an answer, H W pixels, s side of a crop.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from augment import ChannelStats, normalise
from evaluation import protocol
from evaluation.extract import collate_or_text, spread
from evaluation.protocol import Extractor
from images.data import Sampler, begin_worker
from images.names import beside_validation
from images.pairs import IGNORE, Pairs, open_pairs
from machinery.clock import Progress
from machinery.flags import UsageError
from machinery.page import pyplot
from machinery.process import Process


@dataclass
class PairsConfig(protocol.WeightsConfig):
    """What every protocol that judges single pixels needs."""

    # -- what to judge
    val_data: str = "shapes:val"  # the pairs that are judged
    data_root: str = "data"  # the folder where torchvision keeps its data sets
    download: bool = False  # let torchvision fetch the data set
    image_size: int = 0  # side of the images in pixels; 0: 4 times the training's, up to 320

    def check(self):
        protocol.require_val_data(self)


def side_of_crops(image_size: int, model) -> int:
    """--image_size, or the side at which the patch tokens of this network are read.

    A network of small images has few patches: 8 x 8 for crops of 64 pixels and patches of 8.
    Its positions can be resampled, so it is asked at four times the size that it was trained
    at, up to 320 pixels; one that was trained at more is asked at its own size.
    """
    # Examples: a network of 64 pixels is asked at 256, one of 96 at 320, one of 224 at 320, and
    # one of 518 at 518. For the first that means a grid of 32 x 32 patches in place of 8 x 8.
    side = image_size or max(model.img_size, min(4 * model.img_size, 320))
    if side < model.patch_size:
        raise UsageError(f"--image_size {side} is smaller than one patch of {model.patch_size}")
    return side


def with_protocol(config, protocols: dict[str, dict]):
    """The config with the settings of its --protocol, except for the flags that were given."""
    # `given` has the names of the flags on the command line: who types --steps 7 wants 7 steps,
    # whatever the protocol says.
    settings = protocols[config.protocol]
    return replace(config, **{k: v for k, v in settings.items() if k not in config.given})


def can_judge(model, spec: str, table: dict) -> bool:
    """Whether `evaluate.py all` can judge this network by the data: by patch tokens, and maps.

    spec: --data or --val_data. Of folder:PATH there are labels of images at most.
    """
    return hasattr(model, "blocks") and spec.partition(":")[0] in table


def open_for_patches(extractor: Extractor, table: dict, flag: str, read_map,
                     size: int) -> Pairs:
    """The pairs of a flag such as "data"; drawn ones are drawn with `size` pixels.

    UsageError for a network without patch tokens.
    """
    # A convnet is told apart by its lack of blocks. Its last map has one place for 32 x 32
    # pixels of a ResNet-50, which is too coarse for a comparison with patches of 8 or 14
    # pixels.
    config = extractor.config
    if not hasattr(extractor.model, "blocks"):
        raise UsageError(
            f"--weights {config.weights}: a convnet has no patch tokens; this task "
            "needs a Vision Transformer")
    # Beside X:val the name X stands for X:train, as it does for images with labels.
    spec = getattr(config, flag)
    if flag == "data":
        spec = beside_validation(spec, config.val_data)
    pairs = open_pairs(table, spec, read_map, config.data_root, config.download, f"--{flag}",
                       extractor.model.channel_stats)

    # Files have the size that they have, and are resized later. Drawn pairs are drawn anew at
    # the size that the network sees, because enlarged drawings would have blurred edges.
    return pairs.drawn_at(size)


def remedy(flag: str) -> str:
    """What to do where the masks of this flag have too few answers; train.py has one way only."""
    if flag in ("--data", "--val_data"):
        return "; is --ignore_label right?"
    return "; 255 in a mask means that there is no answer"


def require_two_classes(pairs: Pairs, flag: str):
    """UsageError if all pixels of all masks that have an answer have the same one."""
    # A mask of 0 and 255 has one class, because 255 is what --ignore_label leaves out; then every
    # answer would be right. Most sets have a second class in their first mask.
    found = set()
    for i in range(len(pairs)):
        found.update(pairs[i][1].unique().tolist())
        if len(found - {IGNORE}) > 1:
            return
    found.discard(IGNORE)
    if not found:
        raise UsageError(f"{flag}: every pixel of every mask is ignored{remedy(flag)}")
    raise UsageError(
        f"{flag}: the masks have the class {pairs.classes[found.pop()]} alone, beside "
        f"what is ignored{remedy(flag)}")


def with_common_classes(
    train: Pairs, val: Pairs, process: Process,
    flags: tuple[str, str] = ("--data", "--val_data")) -> tuple[Pairs, Pairs]:
    """Two sets with the same names of the classes 0, 1, ...; UsageError if theirs differ.

    Where one set has names, they are those of the other, too, whose masks then may have no
    further class: Pairs refuses a mask that has. Where nothing names the classes, there are as
    many as the largest number in any of the masks says.
    """
    # A head answers with numbers. If class 3 were a road in one set and the sky in the other,
    # the figures would mean nothing, and nobody would see why.
    if train.classes and val.classes and train.classes != val.classes:
        raise UsageError(f"{flags[1]} has other classes than {flags[0]}: {val.classes[:3]} ... "
                         f"instead of {train.classes[:3]} ...")
    names = train.classes or val.classes
    if names:
        named = replace(train, classes=names), replace(val, classes=names)
        for pairs, flag in zip(named, flags):
            require_two_classes(pairs, flag)
        return named

    # All masks of both have to be read once for this.
    largest = -1
    for pairs, flag in ((train, flags[0]), (val, flags[1])):
        report = Progress(f"reading the masks of {flag}", len(pairs), process)
        for i in range(process.rank, len(pairs), process.world_size):
            largest = max(largest, int(pairs[i][1].max()))
            report(i + 1)
    largest = max(process.all_gather(largest))
    if largest < 0:
        raise UsageError(f"{flags[0]}: every pixel of every mask is ignored{remedy(flags[0])}")
    if largest == 0:
        raise UsageError(f"{flags[0]}: the masks have the class 0 alone, beside what is "
                         f"ignored{remedy(flags[0])}")
    names = [f"class {c}" for c in range(largest + 1)]
    return replace(train, classes=names), replace(val, classes=names)


# ----------------------------------------------------------------------------------------------
# To learn from: random crops


class PairCrops(torch.utils.data.Dataset):
    """Key (epoch, step, index) -> a crop (C, s, s) of an image, and of its map (s, s).

    scale: the range of the short side after the random resize, as multiples of `size`.
    no_answer: what stands in the map beside the image, where the crop is larger than it.
    """

    def __init__(self, pairs: Pairs, size: int, scale: tuple[float, float], no_answer: float,
                 seed: int = 0):
        self.pairs = pairs
        self.size = size
        self.scale = scale
        self.no_answer = no_answer
        self.seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, Tensor] | str:
        epoch, _, index = key
        # What is wrong with a pair is said in one line. As an exception of a worker it would come
        # with the traceback of that process, so it is handed on as a text (see collate_or_text).
        try:
            image, map = self.pairs[index]
        except ValueError as error:
            return str(error)

        # As in images.data.Views: the crop depends on the seed, the pass and the image alone.
        rng = np.random.default_rng([self.seed, epoch, index])

        # Resize. A class between two classes means nothing, and neither does a depth between
        # that of a thing and that of the wall behind it: so maps take the nearest pixel.
        side = max(1, round(self.size * rng.uniform(*self.scale)))
        image, map = resize_short_side(image, map, side)

        # Where the image is smaller than the crop, the rest is filled with the mean colour and
        # with "no answer".
        image = fill(image, self.size, mean_colour(image, self.pairs.channel_stats))
        map = fill(map[None], self.size, self.no_answer)[0]

        # The same box of both, so that a pixel of the map still belongs to the pixel of the
        # image at its place. Mirrored with a chance of 1/2: left and right mean nothing to a
        # class.
        top = rng.integers(map.shape[0] - self.size + 1)
        left = rng.integers(map.shape[1] - self.size + 1)
        box = (..., slice(top, top + self.size), slice(left, left + self.size))
        image = image[box]
        map = map[box]
        if rng.random() < 0.5:
            return image.flip(-1), map.flip(-1)
        return image, map


def shape_at(height: int, width: int, side: float) -> list[int]:
    """Height and width in the same proportions, the shorter one `side` pixels. Rounded."""
    factor = side / min(height, width)
    return [round(height * factor), round(width * factor)]


def resize_short_side(image: Tensor, map: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Image (C, H, W) and map (H, W) -> both with a short side of `side` pixels."""
    shape = shape_at(*map.shape, side)
    image = TF.resize(image, shape, interpolation=TF.InterpolationMode.BILINEAR, antialias=True)
    return image, TF.resize(map[None], shape, interpolation=TF.InterpolationMode.NEAREST)[0]


def mean_colour(image: Tensor, stats: ChannelStats) -> Tensor:
    """The mean of each channel in the unit of the image, (C, 1, 1): normalised it becomes 0."""
    # Images of files are bytes from 0 to 255, those of more or fewer than three channels floats
    # from 0 to 1, and the mean of `stats` is in the unit of the latter.
    mean = torch.tensor(stats.mean)
    if image.dtype == torch.uint8:
        mean = (mean * 255).round().byte()
    return mean.view(-1, 1, 1).to(image.dtype)


def fill(image: Tensor, size: int, value) -> Tensor:
    """(C, h, w) -> at least `size` high and wide; what is added below and at the right is
    `value`.
    """
    channels, height, width = image.shape
    if height >= size and width >= size:
        return image
    # torch's pad takes one number for all channels, and a colour has one for each: so an image
    # of the value alone is made first, and the given one is laid over it.
    filled = image.new_empty(channels, max(height, size), max(width, size))
    filled[:] = value
    filled[:, :height, :width] = image
    return filled


def crop_batches(pairs: Pairs, size: int, scale: tuple[float, float], no_answer: float,
                 batch_size: int, steps: int, process: Process, num_workers: int = 0,
                 seed: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each batch: crops (b, C, s, s), normalised, and maps (b, s, s).

    From step `start` to step `steps`. batch_size counts the crops of all processes together, and
    the batches are the same for any number of processes.
    """

    # Every process draws the numbers of the whole batches, and reads the images of its share
    # alone. Example of two processes: of the batch (7, 3, 0, 5) the first one reads 7 and 0,
    # the second one 3 and 5.
    batches = Sampler(len(pairs), min(batch_size, len(pairs)), steps, start, seed)
    shares = [spread(keys, process) for keys in batches]
    crops = PairCrops(pairs, size, scale, no_answer, seed)
    loader = torch.utils.data.DataLoader(crops, batch_sampler=shares, num_workers=num_workers,
                                         collate_fn=collate_or_text,
                                         worker_init_fn=begin_worker)
    for batch in loader:
        if isinstance(batch, str):
            raise ValueError(f"--data {batch}")
        images, maps = batch
        yield normalise(images.to(process.device), pairs.channel_stats), maps.to(process.device)


def hash_of_pairs(pairs: Pairs) -> str:
    """A hash of all names, and of image and map of 16 pairs, to recognise a set again."""
    names = "\n".join([*pairs.names, *(pairs.classes or [])])
    digest = hashlib.sha256(names.encode(errors="surrogateescape"))
    for i in np.linspace(0, len(pairs) - 1, 16).astype(int).tolist():
        for part in pairs[i]:
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------
# To be judged: images of any size


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover `length` pixels.

    The last one is moved back to end with the image. Example: 20 pixels, windows of 8, stride
    5: they begin at 0, 5, 10 and 12 (and not 15, where one would end at 23).
    """
    # The windows that begin early enough to have another one behind them, and then the last.
    # For an image that is no longer than a window that is one window, at 0.
    starts = list(range(0, max(length - window, 0), stride))
    return [*starts, max(length - window, 0)]


def in_windows(predict: Callable[[Tensor], Tensor], image: Tensor, window: int,
               stride: int) -> Tensor:
    """predict(image (1, C, H, W)) -> (1, K, H, W), asked window by window.

    An image that fits into one window is asked as a whole. Where windows overlap, the answer is
    the mean of theirs. Only one window is in the network at a time, so memory does not grow
    with the image, but for the answer itself.
    """
    height, width = image.shape[-2:]
    if height <= window and width <= window:
        return predict(image)

    # Sums of the answers, and of how many there are for each pixel. How many channels K an
    # answer has is only known when the first one is there. Example: two windows of 8 pixels
    # that begin at 0 and 5 share the pixels 5, 6 and 7, whose sums are divided by 2.
    total = None
    count = image.new_zeros(height, width)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            box = (..., slice(top, top + window), slice(left, left + window))
            answer = predict(image[box])
            if total is None:
                total = answer.new_zeros(1, answer.shape[1], height, width)
            total[box] += answer
            count[box] += 1
    return total.div_(count)


def over_flips(predict: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """The mean of the answers for an image and, turned back, for its mirror image."""
    # The network was trained on crops of both kinds, but answers a little differently for them:
    # for the mean of two answers the errors that they do not share are halved.
    return (predict(image) + predict(image.flip(-1)).flip(-1)) / 2


def require_numbers(answer: Tensor, source: str):
    """UsageError, which names the flags in `source`, for an answer with NaN or infinity in it."""
    # The largest of several NaN is class 0, so that a table of plausible figures would come of it.
    if not answer.isfinite().all():
        raise UsageError(f"{source}: it gives answers that are no numbers")


def source_of(config) -> str:
    """The flags that decide what a head says, for messages."""
    if config.head:
        return f"--head {config.head} on --weights {config.weights}"
    return f"--weights {config.weights}, or a head of --head_lr {config.head_lr:g}"


def in_order(own: dict, process: Process) -> list:
    """number -> value of each process's own images; all values, in the order of the numbers.

    Figures are summed in this order, so that they are the same to the last bit for any number
    of processes: in floating point (a + b) + c is not always a + (b + c).
    """
    by_number = {}
    for part in process.all_gather(own):
        by_number |= part
    return [by_number[i] for i in sorted(by_number)]


# ----------------------------------------------------------------------------------------------
# To be looked at


def page_of_rows(names: tuple[str, ...], columns: int) -> tuple:
    """(figure, panels [row, column]): a row of empty panels for each name, without ticks."""
    # Sizes are in inches; panels of 2.6 x 2.2 suit pictures of 4 : 3 with a name at their left.
    fig, axes = pyplot().subplots(len(names), columns, squeeze=False, layout="constrained",
                                  figsize=(2.6 * columns, 2.2 * len(names)))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], names):
        axis.set_ylabel(name)
    return fig, axes
