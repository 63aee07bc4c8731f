"""Augmentation: from one image to what each network sees.

    image (3, H, W) uint8 --> MultiCrop: G large and L small crops, flips   geometry, in workers
                                     |   + the drawn colours (V, 8)
                              uint8 crops + masks of patches, one transfer to the device
                                     |
                              photometry(crops, parameters)                 colour, on the device
                                     |
                              normalised floats: teacher sees G, student sees G + L

Idea     A network that gives two crops of one image the same answer, whatever their colours, must
         have understood what stays: the thing itself. Small crops must be recognised as parts.
Paper    SwAV (Caron 2020) multi-crop; BYOL (Grill 2020) appendix B photometry; DINO sec. 3.1 and A;
         masks: BEiT (Bao 2021) Alg. 1, iBOT sec. 3.1, DINOv2 sec. 4
Try      python augment.py [PHOTO]      draws the ten views of an image into views.png
Change   the chances of each operation stand in PHOTOMETRY; a new operation is one column of COLUMNS
Tests    pytest tests/test_augment.py

Letters  G global, L local crops, V = G + L; B images, H W and h w pixels, n crops of one size,
         P patches of a global crop, M hidden patches of a batch, padded to a fixed number.

All randomness enters as numbers drawn beforehand, so that the device part is a pure function. The
draws are a function of (seed, epoch, image): workers, batches and processes do not change them.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF


class Pixels(NamedTuple):
    """What a network takes for a pixel: mean and spread of each channel, black 0, white 1."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet, as everywhere in the papers
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def channels(self) -> int:
        return len(self.mean)


RGB = Pixels()


def pixels_of(channels: int, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Pixels:
    """With what is known of them; else ImageNet's, or its average where there are not three."""
    usual = RGB if channels == 3 else Pixels((0.449,) * channels, (0.226,) * channels)
    return Pixels(mean or usual.mean, std or usual.std)


GRAY = (0.2989, 0.587, 0.114)  # luma weights of torchvision

# Chances for (first global, second global, local) crops, and the strengths of the colour jitter.
# DINO appendix A; the same as BYOL's.
PHOTOMETRY = {
    "dino": dict(jitter=(0.8, 0.8, 0.8), gray=(0.2, 0.2, 0.2), blur=(1.0, 0.1, 0.5),
                 solarize=(0.0, 0.2, 0.0), strength=(0.4, 0.4, 0.2, 0.1)),
    # The official code of DINOv2 hands 1 - p to an operation that wants p: its released models saw
    # the first global crop never blurred, the second nine times in ten. So do these.
    "dinov2": dict(jitter=(0.8, 0.8, 0.8), gray=(0.2, 0.2, 0.2), blur=(0.0, 0.9, 0.5),
                   solarize=(0.0, 0.2, 0.0), strength=(0.4, 0.4, 0.2, 0.1)),
    # For crops of 64 pixels and less: without blur, which would wipe out the texture of so few.
    "small": dict(jitter=(0.8, 0.8, 0.8), gray=(0.2, 0.2, 0.2), blur=(0.0, 0.0, 0.0),
                  solarize=(0.0, 0.2, 0.0), strength=(0.4, 0.4, 0.2, 0.1)),
    "none": dict(jitter=(0.0,) * 3, gray=(0.0,) * 3, blur=(0.0,) * 3, solarize=(0.0,) * 3,
                 strength=(0.0,) * 4),
}
BLUR_TAPS, BLUR_SIGMA = 9, (0.1, 2.0)
SOLARIZE_THRESHOLD = 128 / 255

# One row of photometry parameters, drawn in the worker, applied on the device. `order` counts the
# 24 orders of the four jitter operations; -1 stands for "no jitter", sigma 0 for "no blur".
COLUMNS = ("order", "brightness", "contrast", "saturation", "hue", "gray", "sigma", "solarize")
ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue
HUE = 3

# ------------------------------------------------------------------------------------------------
# Geometry: one image at a time, on bytes, in the loader's workers


def crop_box(height: int, width: int, scale: tuple[float, float], draws: np.ndarray):
    """A random box (top, left, h, w) covering a share of the image drawn from `scale`.

    The rule of torchvision's RandomResizedCrop: area uniform, aspect ratio log-uniform in
    (3/4, 4/3), ten tries, else the largest centred box. draws (10, 4) uniform in [0, 1).
    """
    for area, ratio, y, x in draws:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_photometry(kind: str, view: int, rng: np.random.Generator) -> np.ndarray:
    """One row of COLUMNS for a view: 0 first global, 1 further globals, 2 local."""
    chance = {name: PHOTOMETRY[kind][name][view] for name in ("jitter", "gray", "blur", "solarize")}
    brightness, contrast, saturation, hue = PHOTOMETRY[kind]["strength"]
    u = rng.random(len(COLUMNS) + 3)  # always as many draws, whatever comes of them

    def around(strength, draw, centre=1.0):
        return centre + strength * (2 * draw - 1)

    return np.array([
        int(u[0] * 24) if u[8] < chance["jitter"] else -1,
        around(brightness, u[1]),
        around(contrast, u[2]),
        around(saturation, u[3]),
        around(hue, u[4], centre=0.0),
        u[5] < chance["gray"],
        BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[6] if u[9] < chance["blur"] else 0.0,
        u[7] < chance["solarize"],
    ], dtype=np.float32)


class MultiCrop:
    """One image -> global crops, local crops and the colours they will get. DINO sec. 3.1.

    Called with an image (C, H, W) and a generator; returns a dictionary with global_crops
    (G, C, s, s), local_crops (L, C, t, t), both of the image's type, and photometry (G + L, 8)
    float32.
    """

    def __init__(
        self,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        global_crops_number: int = 2,
        local_crops_number: int = 8,
        global_crops_scale: tuple[float, float] = (0.4, 1.0),
        local_crops_scale: tuple[float, float] = (0.05, 0.4),
        photometry: str = "dino",
    ):
        self.views = [(global_crops_size, global_crops_scale, min(i, 1))
                      for i in range(global_crops_number)]
        self.views += [(local_crops_size, local_crops_scale, 2)] * local_crops_number
        self.global_crops_number, self.local_crops_size = global_crops_number, local_crops_size
        self.photometry = photometry

    def crop(self, image: Tensor, size: int, scale, rng: np.random.Generator) -> Tensor:
        top, left, h, w = crop_box(*image.shape[-2:], scale, rng.random((10, 4)))
        out = TF.resize(image[:, top:top + h, left:left + w], [size, size],
                        interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
        return out.flip(-1) if rng.random() < 0.5 else out

    def __call__(self, image: Tensor, rng: np.random.Generator) -> dict:
        crops = [self.crop(image, size, scale, rng) for size, scale, _ in self.views]
        colours = [draw_photometry(self.photometry, view, rng) for _, _, view in self.views]
        G, t = self.global_crops_number, self.local_crops_size
        none = torch.empty(0, len(image), t, t, dtype=image.dtype)
        return {
            "global_crops": torch.stack(crops[:G]),
            "local_crops": torch.stack(crops[G:]) if crops[G:] else none,
            "photometry": torch.from_numpy(np.stack(colours)),
        }


def center_crop(image: Tensor, size: int, short: int = 0) -> Tensor:
    """How features are judged: short side to 8/7 of size (256), then the centre (224). uint8.

    short: another length for the short side.
    """
    height, width = image.shape[-2:]
    short = short or round(size * 8 / 7)
    h, w = (short, max(short, int(short * width / height))) if height <= width else (
        max(short, int(short * height / width)), short)
    image = TF.resize(image, [h, w], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(image, [size, size])


def fit_inside(image: Tensor, longest: int) -> Tensor:
    """The whole image with its shape kept, made smaller if its long side is beyond `longest`."""
    height, width = image.shape[-2:]
    scale = min(1.0, longest / max(height, width))
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    return TF.resize(image, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


def squash(image: Tensor, size: int) -> Tensor:
    """The whole image as a square, whatever its shape."""
    return TF.resize(image, [size, size], interpolation=TF.InterpolationMode.BICUBIC,
                     antialias=True)


# ------------------------------------------------------------------------------------------------
# Masks: which patches of the global crops the student does not get to see


def block_mask(grid: tuple[int, int], target: int, min_patches: int,
               rng: np.random.Generator) -> np.ndarray:
    """Rectangles on an (h, w) grid until `target` patches are hidden, never more. BEiT Alg. 1.

    Each rectangle covers min_patches or more, with an aspect ratio log-uniform in (.3, 1/.3), and
    less than the grid's height and width. One that would hide too many, or nothing new, is drawn
    again, ten times; then the mask is left as it is: in 92 of 100 masks it is full.
    """
    (height, width), mask = grid, np.zeros(grid, dtype=bool)
    while (missing := target - mask.sum()) > 0:
        room = min(missing, height * width // 2)
        for area, ratio, y, x in rng.random((10, 4)):
            area = min_patches + (room - min_patches) * area
            ratio = math.exp((2 * ratio - 1) * math.log(1 / 0.3))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h >= height or w >= width:
                continue
            top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
            block = mask[top:top + h, left:left + w]
            if 0 < block.size - block.sum() <= room:
                block[:] = True
                break
        else:
            break
    return mask


def random_mask(grid: tuple[int, int], target: int, min_patches: int,
                rng: np.random.Generator) -> np.ndarray:
    """Exactly `target` patches, each by itself. iBOT's "rand"."""
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[rng.permutation(mask.size)[:target]] = True
    return mask.reshape(grid)


MASK_SHAPES = {"block": block_mask, "random": random_mask}


def hidden_places(masks: Tensor, most: int) -> dict:
    """masks (crops, P) bool -> the same; mask_indices (M,), places of hidden patches among all
    crops*P; mask_weights (M,), 1 / (hidden patches of that crop). Both end in zeros: M is `most`.
    """
    indices, weights = torch.zeros(most, dtype=torch.int64), torch.zeros(most)
    hidden = masks.flatten().nonzero()[:, 0]
    indices[:len(hidden)] = hidden
    weights[:len(hidden)] = 1 / masks.sum(1)[hidden // masks.shape[1]]
    return {"masks": masks, "mask_indices": indices, "mask_weights": weights}


class Masking:
    """Masks for all global crops of a batch, as a function of (seed, step, rank).

    A share `probability` of the crops gets a mask; the i-th of them hides a share of its patches
    drawn from the i-th slice of `ratio`, so that every batch has small and large masks; then they
    are dealt to the crops at random. An image may have both, one or none of its crops masked.
    """

    def __init__(self, grid: tuple[int, int], ratio: tuple[float, float] = (0.1, 0.5),
                 probability: float = 0.5, shape: str = "block", min_patches: int = 4,
                 seed: int = 0, rank: int = 0):
        self.grid, self.ratio, self.probability = grid, ratio, probability
        self.draw, self.min_patches = MASK_SHAPES[shape], min_patches
        self.seed, self.rank = seed, rank

    def __call__(self, crops: int, step: int) -> dict:
        """hidden_places of new masks. M depends on `crops` alone, so that shapes are the same at
        every step and on every process.
        """
        rng = np.random.default_rng([self.seed, step, self.rank, 2])
        patches, edges = self.grid[0] * self.grid[1], self.edges(crops)
        shares = edges[:-1] + (edges[1:] - edges[:-1]) * rng.random(len(edges) - 1)
        masks = np.zeros((crops, *self.grid), dtype=bool)
        for place, share in zip(rng.permutation(crops), shares):
            masks[place] = self.draw(self.grid, int(patches * share), self.min_patches, rng)
        return hidden_places(torch.from_numpy(masks).flatten(1), self.most(crops))

    def edges(self, crops: int) -> np.ndarray:
        """Where the slices of `ratio` begin and end, one more than there are masks."""
        return np.linspace(*self.ratio, int(crops * self.probability) + 1)

    def most(self, crops: int) -> int:
        """M: as many patches as the masks can hide."""
        return sum(int(self.grid[0] * self.grid[1] * edge) for edge in self.edges(crops)[1:])


def collate(samples: list[dict], masking: Masking | None = None) -> dict:
    """Samples -> one batch, crop-major: crop 0 of all images, then crop 1, ... (V, B, ...)."""
    batch = {key: torch.stack([s[key] for s in samples], 1)
             for key in ("global_crops", "local_crops", "photometry")}
    batch["index"] = torch.tensor([s["index"] for s in samples])
    batch["broken"] = [name for s in samples for name in s.get("broken", ())]
    if masking:
        batch |= masking(len(batch["global_crops"]) * len(samples), samples[0]["step"])
    return batch


# ------------------------------------------------------------------------------------------------
# Photometry: whole batches, on the device, each image with its own draw


def send(x: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it still computes. (MPS would read x too late.)"""
    return x.to(device, non_blocking=device.type != "mps")


def luma(images: Tensor) -> Tensor:
    """(n, 3, h, w) -> grey (n, 1, h, w); of other channels than colours, their mean."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = send(torch.tensor(GRAY, dtype=images.dtype)[None, None], images.device)  # (1, 1, 3)
    return (weights @ images.flatten(2)).view(len(images), 1, *images.shape[-2:])  # (n, 1, h, w)


def rotate_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift` (n, 1, 1) turns, in place; saturation and value stay.

    In closed form: asking each pixel which of its channels is the largest is what makes the usual
    way through HSV slow.
    """
    r, g, b = images.unbind(1)
    value, low = images.amax(1), images.amin(1)  # (n, h, w)
    spread = value - low
    # In sixths of a turn: how far from red, on the side of green (+) or of blue (-).
    hue = torch.copysign(g + b - r + value - 2 * low, g - b) / spread.clamp(min=1e-12)
    hue = hue + 6 * shift
    hue = hue - 6 * (hue / 6).floor()  # red at 0 (and 6), green at 2, blue at 4
    shares = (hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()
    for channel, share in enumerate(shares):
        torch.addcmul(low, spread, share.clamp_(0, 1), out=images[:, channel])
    return images


def around_hue(order: tuple) -> tuple:
    """Three places before hue and three after it, filled with the blends in their order."""
    before, after = order[:order.index(HUE)], order[order.index(HUE) + 1:]
    return tuple((*part, HUE, HUE, HUE)[:3] for part in (before, after))  # HUE: nothing to blend


SLOTS = torch.tensor([around_hue(order) for order in ORDERS]).flatten(1)  # (24, 6)


def jitter(images: Tensor, params: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in the order that each image drew; in place.

    Three of the four are blends with something grey, so one step serves images that are at
    different operations. Only hue is costly, and each image has it once: up to three blends come
    before it, up to three after, and a place that an image leaves empty blends with factor 1.
    """
    slots = SLOTS[params[:, 0].long()]  # (n, 6)
    nothing = torch.ones(len(params), 1)
    factors = torch.cat([params[:, 1:4], nothing], 1).gather(1, slots)  # (n, 6)
    on_device = send(torch.stack([factors, slots == 1, slots == 2]), images.device)  # (3, n, 6)
    for i in range(6):
        if i == 3 and images.shape[1] == 3:
            rotate_hue(images, send(params[:, 4], images.device)[:, None, None])
        if (slots[:, i] == HUE).all():
            continue
        factor, contrast, saturation = on_device[:, :, i, None, None, None]  # (n, 1, 1, 1) each
        gray = luma(images)
        other = contrast * gray.mean((2, 3), keepdim=True) + saturation * gray  # (n, 1, h, w)
        images.lerp_(other, 1 - factor).clamp_(0, 1)
    return images


def grayscale(images: Tensor, params: Tensor) -> Tensor:
    return luma(images).repeat(1, 3, 1, 1)


def blur(images: Tensor, params: Tensor) -> Tensor:
    """Gaussian blur with reflected borders, each image with its own sigma, in pixels."""
    sigma, pad = send(params[:, 6, None], images.device), BLUR_TAPS // 2
    reach = torch.arange(-pad, pad + 1, device=images.device)
    kernel = torch.exp(-0.5 * (reach / sigma) ** 2)  # (n, taps)
    kernel = kernel / kernel.sum(1, keepdim=True)
    n, c, h, w = images.shape
    kernel = kernel.repeat_interleave(c, 0)  # (n*c, taps)
    x = F.pad(images, (pad, pad, pad, pad), mode="reflect")  # (n, c, h + 2*pad, w + 2*pad)
    x = x.reshape(1, n * c, h + 2 * pad, w + 2 * pad)
    # A Gaussian in two dimensions is one along rows, then one along columns.
    x = F.conv2d(x, kernel[:, None, None, :], groups=n * c)  # (1, n*c, h + 2*pad, w)
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * c)  # (1, n*c, h, w)
    return x.view(n, c, h, w)


def solarize(images: Tensor, params: Tensor) -> Tensor:
    """Invert everything at least half bright. A sum, as a choice for each pixel is slower."""
    return images + (1 - 2 * images) * (images >= SOLARIZE_THRESHOLD)


def photometry(crops: Tensor, params: Tensor, pixels: Pixels = RGB) -> Tensor:
    """Crops (n, C, h, w) on any device, their params (n, 8) on the CPU -> normalised floats.

    Equal, image by image, to torchvision's functionals in the order that was drawn. Which images
    need what is read from the parameters on the CPU, so that the device is never waited for.
    Crops are uint8, or floats from 0 to 1. Unless they have three channels these are no colours:
    brightness, contrast, blur and solarize are left.
    """
    mean, std = (send(torch.tensor(v), crops.device).view(1, -1, 1, 1) for v in pixels)
    if pixels.channels != 3:
        params = params * params.new_tensor([1, 1, 1, 0, 0, 0, 1, 1])  # saturation, hue, gray
        params[:, 3] = 1  # times the saturation that it has
    # Images with equally many blends before hue go together, so that `jitter` has no empty places.
    before = (SLOTS[params[:, 0].long(), :3] != HUE).sum(1)
    order = torch.where(params[:, 0] < 0, 4, before).argsort(stable=True)  # 4: no jitter
    # A cache holds some 6 MB of pixels well; on a GPU the whole batch goes at once.
    step = max(1, 1572864 // crops[0].numel()) if crops.device.type == "cpu" else len(crops)
    out = torch.empty(crops.shape, device=crops.device)
    for rows in order.split(step):
        p, rows = params[rows], send(rows, crops.device)
        y = crops.index_select(0, rows).to(torch.float32)
        if crops.dtype == torch.uint8:
            y = y.div_(255)
        wanted = {jitter: p[:, 0] >= 0, grayscale: p[:, 5] > 0, blur: p[:, 6] > 0,
                  solarize: p[:, 7] > 0}
        for op, some in wanted.items():
            if some.all():
                y = op(y, p)
            elif some.any():
                some = some.nonzero()[:, 0]
                where = send(some, y.device)
                y.index_copy_(0, where, op(y.index_select(0, where), p[some]))
        out.index_copy_(0, rows, y.sub_(mean).div_(std))
    return out


def normalise(images: Tensor, pixels: Pixels = RGB) -> Tensor:
    """(n, C, h, w), uint8 or 0 to 1 -> floats of mean 0 and spread 1; what evaluations feed."""
    return photometry(images, torch.tensor([[-1.0] + [0.0] * 7]).expand(len(images), -1), pixels)


if __name__ == "__main__":
    import sys

    import matplotlib.pyplot as plt
    from PIL import Image

    if sys.argv[1:]:
        image = TF.pil_to_tensor(Image.open(sys.argv[1]).convert("RGB"))
    else:  # no photograph at hand: a disc on a slope of colours
        y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
        image = torch.stack([128 + 100 * x, 128 + 100 * y, 200 - 60 * x]).clamp(0, 255)
        image = torch.where(x**2 + y**2 < 0.4, 255 - image.flip(0), image).byte()
    sample = MultiCrop()(image, np.random.default_rng(0))
    colours = sample["photometry"]
    views = [*photometry(sample["global_crops"], colours[:2]),
             *photometry(sample["local_crops"], colours[2:])]
    names = ["image", "global 1", "global 2"] + [f"local {i + 1}" for i in range(8)]
    fig, axes = plt.subplots(1, 11, figsize=(16, 1.9))
    for axis, name, view in zip(axes, names, [normalise(image[None])[0], *views]):
        view = view * torch.tensor(RGB.std)[:, None, None] + torch.tensor(RGB.mean)[:, None, None]
        axis.imshow(view.permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(f"{name}\n{view.shape[1]} px", fontsize=8)
        axis.axis("off")
    fig.savefig("views.png", dpi=120, bbox_inches="tight")
    print("wrote views.png: what the teacher (globals) and the student (all) are shown")
