"""Augmentation: from one image to what each network sees.

    image (3, H, W) uint8 --> MultiCrop: G large and L small crops, flips   geometry, in workers
                                     |   + 8 numbers for the colours of each (V, 8)
                              uint8 crops + masks of patches, one transfer to the device
                                     |
                              photometry(crops, parameters)                 colour, on the device
                                     |
                              normalised floats: teacher sees G, student sees G + L

Idea     A network that gives two crops of one image the same answer, whatever their colours,
         has to represent what they share: what the image shows. Small crops must be recognised
         as parts of it. Masks hide patches of the large crops from the student.
Paper    SwAV (Caron 2020) multi-crop; BYOL (Grill 2020) appendix B photometry; DINO sec. 3.1
         and 3.2; masks: BEiT (Bao 2021) Alg. 1, iBOT sec. 3.1, DINOv2 sec. 4
Try      python augment.py [PHOTO]      draws the ten views of an image into views.png
Change   the chances of each operation: an entry of PHOTOMETRY; another shape of masks:
         MASK_SHAPES; a new operation: a column in COLUMNS, its draw in draw_photometry, a line
         in OPERATIONS
Tests    pytest tests/test_augment.py

Letters  G global, L local crops, V = G + L; B images, H W and h w pixels, n crops of one size,
         P patches of a global crop, M masked patches of a batch, padded to a fixed number.

All randomness enters as numbers that are drawn beforehand, so the part that runs on the device
is a pure function. The draws for crops and colours are a function of (seed, epoch, image): the
number of workers, of images in a batch and of processes does not change them. Masks are a
function of (seed, step, rank).
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF


class ChannelStats(NamedTuple):
    """What the channels of images are normalised with: their means and standard deviations.

    Both are on the scale on which pixels go from 0 to 1.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet, as everywhere in the papers
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def channels(self) -> int:
        return len(self.mean)


RGB = ChannelStats()


def channel_stats_of(
    channels: int, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> ChannelStats:
    """What is not given is ImageNet's, or its average unless there are 3 channels."""
    # One number for all channels where nothing is known of them: they may be infrared or depth.
    usual = RGB if channels == 3 else ChannelStats((0.449,) * channels, (0.226,) * channels)
    return ChannelStats(mean or usual.mean, std or usual.std)


# Chances for (first global, second global, local) crops, and the strengths of the colour
# jitter. DINO sec. 3.2; the same as BYOL's.
PHOTOMETRY = {
    "dino": dict(jitter=(0.8, 0.8, 0.8), gray=(0.2, 0.2, 0.2), blur=(1.0, 0.1, 0.5),
                 solarize=(0.0, 0.2, 0.0), strength=(0.4, 0.4, 0.2, 0.1)),
    # The official code of DINOv2 hands 1 - p to an operation that wants p: its released models
    # saw the first global crop never blurred, the second nine times in ten. This entry repeats
    # what they saw, and not what the paper says.
    "dinov2": dict(jitter=(0.8, 0.8, 0.8), gray=(0.2, 0.2, 0.2), blur=(0.0, 0.9, 0.5),
                   solarize=(0.0, 0.2, 0.0), strength=(0.4, 0.4, 0.2, 0.1)),
    # For crops of 64 pixels and less: without blur, which would wipe out the texture of so few.
    "small": dict(jitter=(0.8, 0.8, 0.8), gray=(0.2, 0.2, 0.2), blur=(0.0, 0.0, 0.0),
                  solarize=(0.0, 0.2, 0.0), strength=(0.4, 0.4, 0.2, 0.1)),
    "none": dict(jitter=(0.0, 0.0, 0.0), gray=(0.0, 0.0, 0.0), blur=(0.0, 0.0, 0.0),
                 solarize=(0.0, 0.0, 0.0), strength=(0.0, 0.0, 0.0, 0.0))}
# Width of the blur's kernel in pixels, along rows and along columns: that of DINOv2's code. A
# sigma of 2 spreads a point by 1.85 pixels in it, as the tails of the curve are cut off.
BLUR_TAPS = 9
BLUR_SIGMA = (0.1, 2.0)  # pixels
SOLARIZE_THRESHOLD = 128 / 255

# The parameters of one crop, drawn in the worker and applied on the device: a row of 8 numbers.
# `order` counts the 24 orders of the four jitter operations, -1 is "no jitter"; `gray` and
# `solarize` are 0 or 1; `sigma` is that of the blur, 0 is "no blur".
COLUMNS = ("order", "brightness", "contrast", "saturation", "hue", "gray", "sigma", "solarize")
ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue


def column(params: Tensor, name: str) -> Tensor:
    """One parameter of all crops, by its name: (n, 8) -> (n,)."""
    return params[:, COLUMNS.index(name)]


# ----------------------------------------------------------------------------------------------
# Geometry: one image at a time, on bytes, in the loader's workers


def crop_box(height: int, width: int, scale: tuple[float, float], draws: np.ndarray):
    """A random box (top, left, h, w) that covers a share of the image drawn from `scale`.

    The rule of torchvision's RandomResizedCrop: area uniform, aspect ratio log-uniform in
    (3/4, 4/3), ten tries, else the largest centred box. draws (10, 4) uniform in [0, 1).
    """
    # One row of draws for each try, whether it is needed or not: what is drawn afterwards does
    # not depend on how many tries failed.
    for area, ratio, y, x in draws:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        # Uniform in the logarithm, so that 3:4 and 4:3 are equally likely.
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        # A large or long box may not fit. A try that fails costs four of the draws and nothing
        # more.
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w

    # No try fits, as in a long panorama: the largest box in the middle that is at most 4:3 or
    # 3:4.
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_photometry(kind: str, view: int, rng: np.random.Generator) -> np.ndarray:
    """One row of COLUMNS for a view: 0 first global, 1 further globals, 2 local."""
    chances = PHOTOMETRY[kind]
    brightness, contrast, saturation, hue = chances["strength"]
    # The same number of draws every time: changing one chance leaves the other draws as they
    # were. u[0] to u[7] belong to the columns, in their order; u[8] and u[9] decide on jitter
    # and blur. u[10] is free for a new operation; with more than 11 draws every seed would give
    # other crops and colours than before.
    u = rng.random(11)

    def around(strength, draw, centre=1.0):
        """Uniform in centre - strength to centre + strength."""
        return centre + strength * (2 * draw - 1)

    jittered = u[8] < chances["jitter"][view]
    blurred = u[9] < chances["blur"][view]
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[6]
    row = {
        "order": int(u[0] * len(ORDERS)) if jittered else -1,
        "brightness": around(brightness, u[1]), "contrast": around(contrast, u[2]),
        "saturation": around(saturation, u[3]), "hue": around(hue, u[4], centre=0.0),
        "gray": u[5] < chances["gray"][view], "sigma": sigma if blurred else 0.0,
        "solarize": u[7] < chances["solarize"][view]}
    return np.array([row[name] for name in COLUMNS], dtype=np.float32)


class MultiCrop:
    """One image -> global crops, local crops and the colours they will get. DINO sec. 3.1.

    Called with an image (C, H, W) and a generator; returns a dictionary with global_crops
    (G, C, s, s), local_crops (L, C, t, t), both of the image's type, and photometry (G + L, 8)
    float32.
    """

    def __init__(self, global_crops_size: int = 224, local_crops_size: int = 96,
                 global_crops_number: int = 2, local_crops_number: int = 8,
                 global_crops_scale: tuple[float, float] = (0.4, 1.0),
                 local_crops_scale: tuple[float,
                                          float] = (0.05, 0.4), photometry: str = "dino"):
        # One entry (size, scale, column of chances) for each view. The two global crops of the
        # papers get different colours; a third one would be treated as the second.
        self.views = []
        for i in range(global_crops_number):
            self.views.append((global_crops_size, global_crops_scale, min(i, 1)))
        for _ in range(local_crops_number):
            self.views.append((local_crops_size, local_crops_scale, 2))
        self.global_crops_number = global_crops_number
        self.local_crops_size = local_crops_size
        self.photometry = photometry

    def crop(self, image: Tensor, size: int, scale, rng: np.random.Generator) -> Tensor:
        """A random box of the image, resized to a square, and mirrored with a chance of 1/2."""
        top, left, h, w = crop_box(*image.shape[-2:], scale, rng.random((10, 4)))
        box = image[:, top:top + h, left:left + w]
        # Photographs stay bytes, a quarter of the memory of floats, in the worker and on the
        # way to the device.
        out = TF.resize(box, [size, size], interpolation=TF.InterpolationMode.BICUBIC,
                        antialias=True)
        return out.flip(-1) if rng.random() < 0.5 else out

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict:
        # First all geometry, then all colours: another order of the draws would change every
        # seeded run.
        crops = [self.crop(image, size, scale, rng) for size, scale, _ in self.views]
        colours = [draw_photometry(self.photometry, view, rng) for _, _, view in self.views]
        G = self.global_crops_number
        # Without local crops there is a tensor of 0 crops, so that every batch has the same
        # keys.
        side = self.local_crops_size
        no_crops = torch.empty(0, len(image), side, side, dtype=image.dtype)
        return {
            "global_crops": torch.stack(crops[:G]),
            "local_crops": torch.stack(crops[G:]) if crops[G:] else no_crops,
            "photometry": torch.from_numpy(np.stack(colours))}


def center_crop(image: Tensor, size: int, short: int = 0) -> Tensor:
    """How features are judged: short side to 8/7 of size (256), then the centre (224).

    short: another length for the short side. Bytes stay bytes, and floats floats.
    """
    height, width = image.shape[-2:]
    short = short or round(size * 8 / 7)
    # int() and not round() for the long side, as torchvision's Resize(256) computes it.
    if height <= width:
        h, w = short, max(short, int(short * width / height))
    else:
        h, w = max(short, int(short * height / width)), short
    image = TF.resize(image, [h, w], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(image, [size, size])


def fit_inside(image: Tensor, longest: int) -> Tensor:
    """The whole image with its shape kept, made smaller if its long side is beyond
    `longest`.
    """
    # A small image is left as it is: enlarging it would add pixels, but no detail.
    height, width = image.shape[-2:]
    scale = min(1.0, longest / max(height, width))
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    return TF.resize(image, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


def squash(image: Tensor, size: int) -> Tensor:
    """The whole image as a square, whatever its shape."""
    return TF.resize(image, [size, size], interpolation=TF.InterpolationMode.BICUBIC,
                     antialias=True)


# ----------------------------------------------------------------------------------------------
# Masks: which patches of the global crops the student does not get to see


def block_mask(grid: tuple[int, int], target: int, min_patches: int,
               rng: np.random.Generator) -> np.ndarray:
    """Rectangles on an (h, w) grid until `target` patches are masked, never more. BEiT Alg. 1.

    Rectangles, because a single hidden patch could be guessed from its neighbours. Each aims at
    min_patches to as many as are missing (rounding may make it a little smaller), with an aspect
    ratio log-uniform in (.3, 1/.3), and is lower and narrower than the grid. Where fewer than
    min_patches are missing it aims in between, and most tries fail; after ten in vain the mask
    is left a little too small. A shape must never mask more than `target`: the lists of masked
    patches have a fixed length.
    """
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    while (missing := target - mask.sum()) > 0:
        room = min(missing, height * width // 2)

        # Ten tries for the next rectangle. It is refused if it does not fit into the grid, if
        # it would mask more than is missing or more than half of the grid, or if everything in
        # it is masked already.
        for area, ratio, y, x in rng.random((10, 4)):
            area = min_patches + (room - min_patches) * area
            ratio = math.exp((2 * ratio - 1) * math.log(1 / 0.3))
            h = round(math.sqrt(area * ratio))
            w = round(math.sqrt(area / ratio))
            if h >= height or w >= width:
                continue
            top = int(y * (height - h + 1))
            left = int(x * (width - w + 1))
            block = mask[top:top + h, left:left + w]
            if 0 < block.size - block.sum() <= room:
                block[:] = True
                break
        else:
            # All ten were refused. On a 14 x 14 grid, at the default settings, 93 of 100 masks
            # are full.
            break
    return mask


def random_mask(grid: tuple[int, int], target: int, min_patches: int,
                rng: np.random.Generator) -> np.ndarray:
    """Exactly `target` patches, each by itself. iBOT's "rand"."""
    # min_patches is for rectangles; the argument is here so that all shapes are called alike.
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[rng.permutation(mask.size)[:target]] = True
    return mask.reshape(grid)


MASK_SHAPES = {"block": block_mask, "random": random_mask}


def mask_tensors(masks: Tensor, most: int) -> dict:
    """masks (crops, P) bool -> the three mask tensors of a batch.

    masks: the same; mask_indices (M,): which of all crops*P patches are masked; mask_weights
    (M,): 1 / (masked patches of that crop). Both end in zeros, because M is always `most`: for
    lengths that change, PyTorch compiles the passes of losses.py for any length, and slower.
    """
    # Example: two crops of 4 patches, [0 1 0 1] and [0 0 1 0], most = 5.
    #   mask_indices  [1, 3, 6, 0, 0]      patch 2 of crop 1 is number 4 + 2
    #   mask_weights  [.5, .5, 1, 0, 0]    each crop counts as one; padding has weight 0
    # The padding points at patch 0 of crop 0, a real patch: only its weight makes it count for
    # nothing.
    indices = torch.zeros(most, dtype=torch.int64)
    weights = torch.zeros(most)
    masked = masks.flatten().nonzero()[:, 0]
    indices[:len(masked)] = masked
    crop_of_each = masked // masks.shape[1]
    weights[:len(masked)] = 1 / masks.sum(1)[crop_of_each]
    return {"masks": masks, "mask_indices": indices, "mask_weights": weights}


class Masking:
    """Masks for all global crops of a batch, as a function of (seed, step, rank). DINOv2 sec.
    4.

    A share `probability` of the crops gets a mask. The i-th of these hides a share of its
    patches that is drawn from the i-th slice of `ratio`, so that every batch has small and
    large masks; then they are dealt to the crops at random. An image may have both, one or none
    of its crops masked.
    """

    def __init__(self, grid: tuple[int, int], ratio: tuple[float, float] = (0.1, 0.5),
                 probability: float = 0.5, shape: str = "block", min_patches: int = 4,
                 seed: int = 0, rank: int = 0):
        self.grid = grid
        self.ratio = ratio
        self.probability = probability
        self.draw = MASK_SHAPES[shape]
        self.min_patches = min_patches
        self.seed = seed
        self.rank = rank

    def __call__(self, crops: int, step: int) -> dict:
        """The three mask tensors of `mask_tensors` for this many crops, numbered
        crop-major.
        """
        rng = np.random.default_rng([self.seed, step, self.rank, 2])
        patches = self.grid[0] * self.grid[1]

        # Example: 8 crops, probability .5 and ratio (.1, .5) make 4 masks, and the slices
        # .1-.2, .2-.3, .3-.4, .4-.5: one share is drawn from each. zip ends with the shares, so
        # the other 4 crops stay unmasked.
        edges = self.edges(crops)
        shares = edges[:-1] + (edges[1:] - edges[:-1]) * rng.random(len(edges) - 1)
        masks = np.zeros((crops, *self.grid), dtype=bool)
        for crop, share in zip(rng.permutation(crops), shares):
            masks[crop] = self.draw(self.grid, int(patches * share), self.min_patches, rng)
        return mask_tensors(torch.from_numpy(masks).flatten(1), self.most(crops))

    def edges(self, crops: int) -> np.ndarray:
        """Where the slices of `ratio` begin and end: one number more than there are masks."""
        return np.linspace(*self.ratio, int(crops * self.probability) + 1)

    def most(self, crops: int) -> int:
        """M: as many patches as the masks can hide, the same at every step."""
        patches = self.grid[0] * self.grid[1]
        return sum(int(patches * edge) for edge in self.edges(crops)[1:])


def collate(samples: list[dict], masking: Masking | None = None) -> dict:
    """Samples -> one batch, crop-major: crop 0 of all images, then crop 1, ... (V, B, ...)."""
    # Crop-major, because the two networks work on all first crops, all second crops, ...: on
    # the device (V, B, ...) becomes (V*B, ...) without moving a number.
    batch = {}
    for key in ("global_crops", "local_crops", "photometry"):
        batch[key] = torch.stack([sample[key] for sample in samples], 1)
    batch["index"] = torch.tensor([sample["index"] for sample in samples])
    # "name: error" of images that did not decode and were replaced by others.
    batch["broken"] = [name for sample in samples for name in sample.get("broken", ())]
    if masking:
        crops = len(batch["global_crops"]) * len(samples)
        batch |= masking(crops, samples[0]["step"])
    return batch


# ----------------------------------------------------------------------------------------------
# Photometry: whole batches, on the device, each image with its own draw


def photometry(crops: Tensor, params: Tensor, stats: ChannelStats = RGB) -> Tensor:
    """Crops (n, C, h, w) on any device, their params (n, 8) on the CPU -> normalised floats.

    Equal, image by image, to torchvision's functionals in the order that was drawn. Crops are
    uint8, or floats from 0 to 1. Channels other than three are no colours: for them only
    brightness, contrast, blur and solarize are applied.
    """
    mean, std = (send(torch.tensor(v), crops.device).view(1, -1, 1, 1) for v in stats)
    # Brightness and contrast mean something for any channel; saturation, hue and gray do not.
    if stats.channels != 3:
        params = without_colours(params)

    # Images that use the same slots of colour jitter (explained below, at "Colour jitter") are
    # processed together, because a slot that none of them uses is left out. On a CPU a few
    # images at a time, so that they stay in the cache.
    order = jitter_order(params)
    at_once = len(crops)
    if crops.device.type == "cpu":
        at_once = max(1, CACHED_NUMBERS // crops[0].numel())

    out = torch.empty(crops.shape, device=crops.device)
    for rows in order.split(at_once):
        p = params[rows]
        rows_there = send(rows, crops.device)
        x = crops.index_select(0, rows_there).to(torch.float32)
        if crops.dtype == torch.uint8:
            x = x.div_(255)

        # Which images an operation is for is read from the parameters, which are on the CPU.
        # Asking the device for it would make the CPU wait until all earlier work is done.
        for operation, is_wanted in OPERATIONS.values():
            wanted = is_wanted(p)
            if wanted.all():
                x = operation(x, p)
            elif wanted.any():
                some = wanted.nonzero()[:, 0]
                some_on_device = send(some, x.device)
                changed = operation(x.index_select(0, some_on_device), p[some])
                x.index_copy_(0, some_on_device, changed)
        out.index_copy_(0, rows_there, x.sub_(mean).div_(std))
    return out


def normalise(images: Tensor, stats: ChannelStats = RGB) -> Tensor:
    """(n, C, h, w), uint8 or 0 to 1 -> floats of mean 0 and spread 1, as for training.

    Evaluations give such images to the network.
    """
    nothing = torch.zeros(1, len(COLUMNS))
    nothing[:, COLUMNS.index("order")] = -1  # no jitter; zeros switch off everything else
    return photometry(images, nothing.expand(len(images), -1), stats)


def without_colours(params: Tensor) -> Tensor:
    """Parameters for images whose channels are no colours: no saturation, hue and grayscale."""
    params = params.clone()
    column(params, "saturation").fill_(1)  # a factor of 1: unchanged
    column(params, "hue").fill_(0)
    column(params, "gray").fill_(0)
    return params


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting. On MPS it waits: x could be freed before it is read."""
    # A GPU reads by itself only memory that the system may not move, which is called pinned.
    # Batches come in such memory (training_loader), what is computed from them does not.
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = torch.empty_like(x, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=device.type != "mps")


def luma(images: Tensor) -> Tensor:
    """(n, 3, h, w) -> grey (n, 1, h, w); of other channels than colours, their mean."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    # Green looks brightest to the eye, blue darkest: torchvision's weights. One matrix product.
    weights = torch.tensor((0.2989, 0.587, 0.114), dtype=images.dtype)[None, None]  # (1, 1, 3)
    gray = send(weights, images.device) @ images.flatten(2)  # (n, 1, h*w)
    return gray.view(len(images), 1, *images.shape[-2:])


def grayscale(images: Tensor, params: Tensor) -> Tensor:
    # Three equal channels: the network still expects colours.
    return luma(images).repeat(1, 3, 1, 1)


def blur(images: Tensor, params: Tensor) -> Tensor:
    """Gaussian blur with reflected borders, each image with its own sigma, in pixels."""
    sigma = send(column(params, "sigma")[:, None], images.device)  # (n, 1)
    pad = BLUR_TAPS // 2

    # The kernel is the bell curve at whole pixels, -4 to 4, made to add up to one.
    reach = torch.arange(-pad, pad + 1, device=images.device)
    kernel = torch.exp(-0.5 * (reach / sigma)**2)  # (n, taps)
    kernel = kernel / kernel.sum(1, keepdim=True)

    # Every image has a kernel of its own. So the channels of all images become the channels of
    # one large image, and a grouped convolution gives each of them its kernel.
    n, c, h, w = images.shape
    kernel = kernel.repeat_interleave(c, 0)  # (n*c, taps)
    x = F.pad(images, (pad, pad, pad, pad), mode="reflect")  # (n, c, h + 2*pad, w + 2*pad)
    x = x.reshape(1, n * c, h + 2 * pad, w + 2 * pad)

    # A Gaussian in two dimensions is one along rows, then one along columns: 2 x 9 products for
    # each pixel in place of 81.
    x = F.conv2d(x, kernel[:, None, None, :], groups=n * c)  # (1, n*c, h + 2*pad, w)
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * c)  # (1, n*c, h, w)
    return x.view(n, c, h, w)


def solarize(images: Tensor, params: Tensor) -> Tensor:
    """Invert everything at least half bright: x -> 1 - x = x + (1 - 2x)."""
    # As a sum with a mask of 0 and 1: choosing for each pixel (torch.where) is slower.
    return images + (1 - 2 * images) * (images >= SOLARIZE_THRESHOLD)


def rotate_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift` (n, 1, 1) turns, in place; saturation and value stay.

    In closed form: the usual way through HSV asks each pixel which of its channels is the
    largest, which is slow.
    """
    r, g, b = images.unbind(1)
    value = images.amax(1)  # (n, h, w)
    low = images.amin(1)  # (n, h, w)
    spread = value - low

    # The hue in sixths of a turn, counted from red: positive towards green, negative towards
    # blue. Red alone would be 0. One sum serves for all three cases:
    #     r is the largest:  r and value cancel; low is g or b, so g + b - 2 low = |g - b|
    #     g is the largest:  2 (g - low) + b - r. Divided by the spread it is 2, two sixths of the
    #                        turn, which is green, and from there towards blue
    #     b is the largest:  2 (b - low) + g - r, the same seen from blue, with a minus in front
    # Three examples:
    #     r  orange (1, .5, 0):      +(.5 + 0 - 1 + 1 - 0) / 1 = .5, half of the way to yellow
    #     g  green (.2, .8, .4):     +(.8 + .4 - .2 + .8 - .4) / .6 = 2.33, from 2 towards blue
    #     b  blue (.2, .4, .8):      -(.4 + .8 - .2 + .8 - .4) / .6 = -2.33, which is 3.67
    hue = torch.copysign(g + b - r + value - 2 * low, g - b) / spread.clamp(min=1e-12)
    hue = hue + 6 * shift
    hue = hue - 6 * (hue / 6).floor()  # red at 0 (and 6), green at 2, blue at 4

    # A channel is full within one sixth of its own hue, and empty two sixths away from it. The hue
    # of green is 2 and that of blue 4. That of red is 0 and 6, as far as possible from 3.
    shares = ((hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs())
    for channel, share in enumerate(shares):
        images[:, channel] = torch.addcmul(low, spread, share.clamp_(0, 1))
    return images


# ----------------------------------------------------------------------------------------------
# Colour jitter: four operations, in another order for each image
#
# Brightness, contrast and saturation blend an image with something grey (black, its mean grey,
# its own grey picture). So the same line of code can blend one image for its brightness, the
# next one for its contrast and a third one for its saturation. Hue is different, and costly; each
# image has it once. Therefore each image gets six slots: three for the blends before its hue,
# three for those after it. Unused slots blend with factor 1.
#
#     order of an image                          slots before | hue | slots after
#     contrast, hue, brightness, saturation      C . .        |  *  | B S .
#     brightness, saturation, contrast, hue      B S C        |  *  | . . .
#
# A batch then takes: slot 0, 1, 2 for all images, hue for all, slot 3, 4, 5 for all. A slot
# that is unused in all images of a part of the batch is skipped: that is why `jitter_order`
# sorts images by the number of blends before hue.

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # as ORDERS counts them
UNUSED = HUE  # in a slot, where hue itself never stands
CACHED_NUMBERS = 6 * 2**18  # float32 numbers, 6 MB: what a processor's cache holds well
COMPILE = False  # train.compile_blocks sets it where it compiles the networks


def slots_of(order: tuple[int, ...]) -> list[int]:
    """Six slots for one order of the four operations: three before hue and three after it."""
    # Filled up with UNUSED and cut to three: (contrast,) becomes contrast, unused, unused.
    at = order.index(HUE)
    before = [*order[:at], UNUSED, UNUSED, UNUSED][:3]
    after = [*order[at + 1:], UNUSED, UNUSED, UNUSED][:3]
    return before + after


SLOTS = torch.tensor([slots_of(order) for order in ORDERS])  # (24, 6)


def jitter_order(params: Tensor) -> Tensor:
    """The images (n,), sorted by their number of blends before hue; those without jitter
    last.
    """
    # "No jitter" (-1) would look up the last order: it is sent to the end. The sort is stable,
    # so that the same images share a chunk, and round alike, whatever sorting algorithm is
    # used.
    order = column(params, "order")
    blends_before = (SLOTS[order.long(), :3] != UNUSED).sum(1)
    return torch.where(order < 0, 4, blends_before).argsort(stable=True)


@functools.cache  # PyTorch keeps whatever a call of torch.compile makes: one for all steps
def compiled(function):
    return torch.compile(function, dynamic=True)


def jitter(images: Tensor, params: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in the order that each image drew; in place."""
    # The factor of each slot: that of its operation, and 1 where it is unused, which changes
    # nothing: x.lerp(other, 1 - factor) is x * factor + other * (1 - factor).
    slots = SLOTS[column(params, "order").long()]  # (n, 6)
    factors = torch.stack([
        column(params, "brightness"),
        column(params, "contrast"),
        column(params, "saturation"),
        torch.ones(len(params))], 1).gather(1, slots)  # (n, 6)
    is_contrast = slots == CONTRAST
    is_saturation = slots == SATURATION
    on_device = send(torch.stack([factors, is_contrast, is_saturation]),
                     images.device)  # (3, n, 6)

    # On a GPU each of some 35 operations of rotate_hue would read and write a whole channel;
    # compiled they are one kernel. It is compiled for any number of images ("dynamic"), because
    # that changes from batch to batch.
    turn_colours = compiled(rotate_hue) if COMPILE else rotate_hue

    for i in range(6):
        if i == 3 and images.shape[1] == 3:
            turn_colours(images, send(column(params, "hue"), images.device)[:, None, None])
        if (slots[:, i] == UNUSED).all():
            continue
        factor, contrast, saturation = on_device[:, :, i, None, None, None]  # (n, 1, 1, 1) each
        # What an image is blended with: its mean grey, its grey picture, or 0, which is black.
        gray = luma(images)  # (n, 1, h, w)
        other = contrast * gray.mean((2, 3), keepdim=True) + saturation * gray  # (n, 1, h, w)
        images.lerp_(other, 1 - factor).clamp_(0, 1)
    return images


# The operations in the order of the papers: (images, params) -> images, and which images want
# it.
OPERATIONS = {
    "jitter": (jitter, lambda params: column(params, "order") >= 0),
    "gray": (grayscale, lambda params: column(params, "gray") > 0),
    "blur": (blur, lambda params: column(params, "sigma") > 0),
    "solarize": (solarize, lambda params: column(params, "solarize") > 0)}

if __name__ == "__main__":
    import sys

    import matplotlib.pyplot as plt
    from PIL import Image, ImageOps

    if sys.argv[1:]:  # a camera that was held sideways says so beside the pixels
        image = TF.pil_to_tensor(
            ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB"))
    else:  # no photograph at hand: a disc on a slope of colours
        side = torch.linspace(-1, 1, 256)
        y, x = torch.meshgrid(side, side, indexing="ij")
        image = torch.stack([128 + 100 * x, 128 + 100 * y, 200 - 60 * x]).clamp(0, 255)
        image = torch.where(x**2 + y**2 < 0.4, 255 - image.flip(0), image).byte()
    sample = MultiCrop()(image, np.random.default_rng(0))
    colours = sample["photometry"]
    views = [
        *photometry(sample["global_crops"], colours[:2]),
        *photometry(sample["local_crops"], colours[2:])]
    names = ["image", "global 1", "global 2"] + [f"local {i + 1}" for i in range(8)]
    fig, axes = plt.subplots(1, 11, figsize=(16, 1.9))
    mean, std = (torch.tensor(v)[:, None, None] for v in RGB)
    for axis, name, view in zip(axes, names, [normalise(image[None])[0], *views]):
        view = view * std + mean
        axis.imshow(view.permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(f"{name}\n{view.shape[1]} px", fontsize=8)
        axis.axis("off")
    fig.savefig("views.png", dpi=120, bbox_inches="tight")
    print("wrote views.png: what the teacher (globals) and the student (all) are shown")
