"""Copies: is the original of an edited copy found among many other images?

    image --> jpeg, crop, blur, rotation, print --> class token and GeM of patches --> whitened
                                                                                          |
                              originals and distractors, described alike  --> ranking by cosine

Idea     Pictures that are uploaded again have been compressed, cropped or blurred. Good
         features change little under such edits, but differ between any two pictures: the
         original is then the nearest neighbour of its copy.
Paper    DINO sec. 4.2.1 (copy detection); Radenovic 2017 (GeM); Berman 2019 (GeM and whitening)
Try      python -m evaluation.copies       draws the edits of one picture into edits.png
         python evaluate.py copies --weights RUN
Change   another edit is one line in EDITS
Tests    pytest tests/evaluation/test_copies.py

Letters  n images, D width, P patches.
"""

import io
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from augment import ChannelStats, squash
from evaluation import protocol
from evaluation.protocol import Extractor
from evaluation.retrieval import mean_scores
from images.data import Images, open_images
from machinery.flags import UsageError, require

# ----------------------------------------------------------------------------------------------
# What describes an image

AT_ONCE = 8192  # rows of features that are whitened at once


def gem(patches: Tensor, p: float = 4.0) -> Tensor:
    """Generalised mean over patches: (B, P, D) -> (B, D). Radenovic 2017, eq. 3.

    It is (mean of x^p)^(1/p): the mean at p = 1, the maximum for large p. Example: .1 and .9
    have the mean .5, and at p = 4 (.33)^(1/4) = .76. Negative values count as 0.
    """
    return patches.clamp(min=1e-6).pow(p).mean(1).pow(1 / p)


class Descriptor(nn.Module):
    """Class token and GeM of the patches, for copy detection: (B, 2*D). DINO sec. 4.2.1."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        out = self.model.forward_features(images)
        return torch.cat([out["x_norm_clstoken"], gem(out["x_norm_patchtokens"].float())], 1)


class Whitening:
    """PCA whitening learned on the features of any images: (n, D) -> (n, D) of unit length.

    In raw features a few directions in which all images differ strongly decide about every
    cosine. Whitening turns features to their principal axes and divides each by its spread, so
    that all directions count alike. As in DINO's code the mean is subtracted from what is
    whitened, but not from what the second moments are computed from.
    """

    def __init__(self, features: Tensor):
        # Sums are in float64, of some rows at a time: a copy of a million rows would be 3 GB for
        # a width of 384.
        self.mean = features.mean(0, dtype=torch.float64)
        moments = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64,
                              device=features.device)  # (D, D)
        for rows in features.split(AT_ONCE):
            rows = rows.double()
            moments += rows.T @ rows / len(features)

        # A direction in which features hardly vary has an eigenvalue near 0. Dividing by its
        # root would blow up rounding errors: 1e-5 of the largest is the least to be divided by.
        strength, self.axes = torch.linalg.eigh(moments)
        self.scale = strength.clamp(min=1e-5 * strength.max().item()).rsqrt()

    def __call__(self, features: Tensor) -> Tensor:
        whitened = torch.empty_like(features)  # (n, D)
        for rows, out in zip(features.split(AT_ONCE), whitened.split(AT_ONCE)):
            white = (rows.double() - self.mean) @ self.axes * self.scale
            out.copy_(F.normalize(white, dim=1))
        return whitened


# ----------------------------------------------------------------------------------------------
# What people do to pictures before they upload them again. image (3, H, W) uint8 -> image


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Written as JPEG and read again. quality: 1 to 100."""
    file = io.BytesIO()
    TF.to_pil_image(image).save(file, "JPEG", quality=quality)
    return TF.pil_to_tensor(Image.open(file))


def removed(image: Tensor, percent: int) -> Tensor:
    """The centre of the image, after `percent` of its area was cut away around it."""
    # An area of .64 is left by sides of .8: the root.
    keep = (1 - percent / 100)**0.5
    height, width = image.shape[-2:]
    return TF.center_crop(image, [max(1, round(height * keep)), max(1, round(width * keep))])


def blurred(image: Tensor, share: float) -> Tensor:
    """Blurred with a Gaussian whose sigma is `share` of the short side."""
    # The kernel reaches two sigmas to each side.
    sigma = max(0.3, share * min(image.shape[-2:]))
    return TF.gaussian_blur(image, 2 * round(2 * sigma) + 1, sigma)


def printed(image: Tensor, seed: int) -> Tensor:
    """As if printed, crumpled and photographed: Copydays' "strong" copies, imitated."""
    # Seen at an angle: each corner moves by up to 18 % of the sides.
    rng = np.random.default_rng(seed)
    height, width = image.shape[-2:]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=float)
    moved_corners = corners + rng.uniform(-0.18, 0.18, (4, 2)) * (width, height)
    image = TF.perspective(image, corners.tolist(), moved_corners.tolist(), fill=[200.0] * 3)

    # A printer with or without colours, and the light of a room.
    if rng.random() < 0.5:
        image = TF.rgb_to_grayscale(image, 3)
    image = TF.adjust_contrast(image, rng.uniform(0.4, 0.7))
    image = TF.adjust_brightness(image, rng.uniform(0.7, 1.4))

    # A small camera: noise with a spread of 12 of 255, a little out of focus, JPEG.
    noise = torch.from_numpy(rng.normal(0, 12, image.shape))
    noisy = (image + noise).clamp(0, 255).to(torch.uint8)
    return jpeg(blurred(noisy, 0.01), 20)


def rotated(image: Tensor, i: int) -> Tensor:
    """Turned by 10, 20, 30 or 40 degrees, the direction changing from image to image."""
    degrees = 10 + i % 4 * 10
    return TF.rotate(image, (-1)**i * degrees, expand=True)


# Name -> (image, number of the image) -> the edited image. Copydays' JPEG qualities, its crops
# (in per cent of the area that is removed), and three more kinds.
EDITS = {}
for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75):
    EDITS[f"jpeg {quality}"] = lambda image, i, quality=quality: jpeg(image, quality)
for percent in range(10, 90, 10):
    EDITS[f"crop {percent} %"] = lambda image, i, percent=percent: removed(image, percent)
EDITS["blur"] = lambda image, i: blurred(image, 0.03)
EDITS["rotation"] = rotated
EDITS["strong"] = printed

# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.Config):
    # -- copies
    val_data: str = "shapes:val"  # the images that get copied; those of --data are distractors
    n_originals: int = 157  # how many of --val_data get copied; Copydays has 157
    whitening_data: str = ""  # images to learn the whitening on; empty: those of --data
    copydays: str = ""  # the folder of Copydays, with original, strong, ...; empty: make copies

    def check(self):
        require(self, lambda x: x >= 1, "at least 1", "n_originals")
        protocol.require_val_data(self, "copydays")


def read_edited(read, edit: str, i: int) -> Tensor:
    """Image i after an edit. A function of the module, so that loader processes can get it."""
    return EDITS[edit](read(i), i)


def made_copies(extractor: Extractor) -> tuple[Images, dict[str, Images]]:
    """(originals, edit -> copies): some of --val_data, and what EDITS make of each."""
    # The originals are spread evenly over --val_data. Nothing is written: a copy is made when
    # it is read, and has the name of its original.
    val = extractor.open("val_data")
    chosen = {round(i) for i in np.linspace(0, len(val) - 1, extractor.config.n_originals)}
    originals = val.subset(sorted(chosen))
    copies = {}
    for edit in EDITS:
        copies[edit] = replace(originals, read=partial(read_edited, originals.read, edit))
    return originals, copies


def copydays(config: Config, stats: ChannelStats) -> tuple[Images, dict[str, Images]]:
    """(originals, folder -> copies) of the data set Copydays.

    UsageError for another folder.
    """
    # The first four digits of a file's name say which original it shows: 200000.jpg is one, and
    # 200001.jpg a copy of it. So these digits become the names.
    images = open_images(f"folder:{config.copydays}", flag="--copydays", channel_stats=stats)
    folders = {}
    for i, name in enumerate(images.names):
        folders.setdefault(os.path.dirname(name), []).append(i)
    images.names = [Path(name).stem[:4] for name in images.names]
    parts = {name: images.subset(rows) for name, rows in folders.items()}
    if "original" not in parts or len(parts) < 2:
        raise UsageError(
            f"--copydays {config.copydays}: expected the folders original, strong, "
            "crops/10, jpegqual/3, ...")
    return parts.pop("original"), parts


def on_report_card(config: Config, model) -> Config | None:
    """For `evaluate.py all`: None for networks of other channels than photographs have."""
    # The copies are JPEGs, blurred, printed in grey, ...: edits of photographs.
    return config if model.channel_stats.channels == 3 else None


def run(extractor: Extractor) -> dict:
    """Copies are looked for among originals and --data. DINO sec. 4.2.1, at 320 pixels.

    Class token and GeM of patches, whitened on --whitening_data or on --data; images squashed
    to a square. The copies are those of --copydays, or made on the spot of --n_originals of
    --val_data.
    """
    extractor = extractor.at(320)
    config = extractor.config
    process = extractor.process
    model = extractor.model
    if model.channel_stats.channels != 3:
        raise UsageError(
            f"--weights {config.weights}: a network for {model.channel_stats.channels} "
            "channels; copies are made of photographs, which have three")
    distractors = extractor.open("data")
    if config.copydays:
        originals, copies = copydays(config, model.channel_stats)
    else:
        originals, copies = made_copies(extractor)
        # An original that is among the distractors, too, would be found there and count as wrong.
        protocol.require_other_images(distractors, originals, config.data, config.val_data)

    # DINO's code learns the whitening on images that are not searched in. Without such images
    # it is learned on the distractors, which at least show nothing that is asked for. All
    # images are squashed to a square, so that nothing of them is cut off.
    read = Descriptor(model)
    square = partial(squash, size=extractor.size)
    distractor_rows = extractor(distractors, "copies-data", read, square)
    whitening_rows = distractor_rows
    if config.whitening_data:
        images = extractor.open("whitening_data")
        whitening_rows = extractor(images, "copies-whitening_data", read, square)
    whiten = Whitening(whitening_rows)
    original_rows = extractor(originals, "copies-originals", read, square)
    rows = whiten(torch.cat([original_rows, distractor_rows]))

    # Right is the original of the same name; nothing is junk.
    names = np.array([*originals.names, *[""] * len(distractors)])
    no_junk = torch.zeros(len(rows), dtype=torch.bool)
    figures = {}
    for edit, images in copies.items():
        name = f"copies-{re.sub('[^a-z0-9]+', '-', edit)}"
        queries = whiten(extractor(images, name, read, square))

        def same_name(i, images=images):  # as a default, because `images` goes on changing
            return torch.from_numpy(names == images.names[i]), no_junk

        figures[edit] = mean_scores(queries, rows, same_name, process)[0].item()

    # The table, and what goes on the report card: the mean, and the hardest kind alone.
    mean = sum(figures.values()) / len(figures)
    process.print(
        f"copy detection: class token + GeM, whitened, {extractor.size} px; copies of "
        f"{len(originals)} images of {config.copydays or config.val_data} among "
        f"{len(rows):,d}\n  mAP")
    for edit, value in (*figures.items(), ("mean", mean)):
        process.print(f"  {edit:12s} {value:7.2%}")
    headline = {"copies mAP, mean": mean}
    if "strong" in figures:
        headline["copies mAP, strong"] = figures["strong"]
    source = f"Copydays in {config.copydays}" if config.copydays else "made copies"
    whitening = "--whitening_data" if config.whitening_data else "--data"
    judged = {"val_data": "", "copydays": config.copydays} if config.copydays else {}
    return judged | {
        "copies": figures, "mean": mean, "n_originals": len(originals), "headline": headline,
        "image_size": extractor.size,
        "protocol": f"class token + GeM of patches, PCA whitening on {whitening}, {source}"}


if __name__ == "__main__":
    import matplotlib.pyplot as plt

    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    image = (255 * F.interpolate(coarse, (160, 200), mode="bicubic").clamp(0, 1))[0].byte()
    fig, axes = plt.subplots(2, 10, figsize=(15, 3.6))
    for axis, (name, edit) in zip(axes.flat, EDITS.items()):
        axis.imshow(edit(image, 8).permute(1, 2, 0).numpy())
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    fig.savefig("edits.png", dpi=110, bbox_inches="tight")
    print("wrote edits.png: what copies of one picture may look like")
