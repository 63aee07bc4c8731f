"""Copies: is an edited copy of an image found among many others?

    image --> jpeg, crop, blur, rotation, print --> class token and GeM of patches --> whitened
                                                                                          |
                              originals and distractors, described alike  --> ranking by cosine

Idea     Whoever uploads a picture again has changed it. What describes it must not have
         changed.
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

from augment import squash
from evaluation import protocol
from evaluation.protocol import Extractor
from evaluation.retrieval import mean_scores
from images.data import Images, open_images
from machinery.flags import UsageError, require

# ----------------------------------------------------------------------------------------------
# What describes an image


def gem(patches: Tensor, p: float = 4.0) -> Tensor:
    """Generalised mean over patches: (B, P, D) -> (B, D). p = 1 is the mean, large p the
    maximum.

    Radenovic 2017, eq. 3.
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

    As in DINO's code the mean is taken off what is whitened, but not off what the covariance is
    computed from. Directions with less than 1e-5 of the strongest are not blown up further.
    """

    def __init__(self, features: Tensor):
        features = features.double()
        self.mean = features.mean(0)
        strength, self.axes = torch.linalg.eigh(features.T @ features / len(features))
        self.scale = strength.clamp(min=1e-5 * strength.max().item()).rsqrt()

    def __call__(self, features: Tensor) -> Tensor:
        white = (features.double() - self.mean) @ self.axes * self.scale  # (n, D)
        return F.normalize(white, dim=1).to(features.dtype)


# ----------------------------------------------------------------------------------------------
# What people do to pictures before they upload them again. image (3, H, W) uint8 -> image


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Written and read again. quality: 1 to 100."""
    file = io.BytesIO()
    TF.to_pil_image(image).save(file, "JPEG", quality=quality)
    return TF.pil_to_tensor(Image.open(file))


def removed(image: Tensor, percent: int) -> Tensor:
    """The centre, `percent` of the area cut away around it."""
    keep = (1 - percent / 100)**0.5
    h, w = (max(1, round(side * keep)) for side in image.shape[-2:])
    return TF.center_crop(image, [h, w])


def blurred(image: Tensor, share: float) -> Tensor:
    """Out of focus by `share` of the short side."""
    sigma = max(0.3, share * min(image.shape[-2:]))
    return TF.gaussian_blur(image, 2 * round(2 * sigma) + 1, sigma)


def printed(image: Tensor, seed: int) -> Tensor:
    """Printed, crumpled, photographed: seen at an angle, pale, grey, noisy, blurred, JPEG."""
    rng = np.random.default_rng(seed)
    height, width = image.shape[-2:]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=float)
    shift = rng.uniform(-0.18, 0.18, (4, 2)) * (width, height)
    seen = TF.perspective(image, corners.tolist(), (corners + shift).tolist(), fill=[200.0] * 3)
    seen = TF.rgb_to_grayscale(seen, 3) if rng.random() < 0.5 else seen
    seen = TF.adjust_contrast(seen, rng.uniform(0.4, 0.7))
    seen = TF.adjust_brightness(seen, rng.uniform(0.7, 1.4))
    noise = torch.from_numpy(rng.normal(0, 12, seen.shape))
    return jpeg(blurred((seen + noise).clamp(0, 255).to(torch.uint8), 0.01), 20)


# Copydays' JPEG qualities and crops (per cent of the area removed), and three more kinds.
EDITS = {
    **{
        f"jpeg {q}": lambda image, i, q=q: jpeg(image, q)
        for q in (3, 5, 8, 10, 15, 20, 30, 50, 75)},
    **{f"crop {p} %": lambda image, i, p=p: removed(image, p)
       for p in range(10, 90, 10)}, "blur": lambda image, i: blurred(image, 0.03),
    "rotation": lambda image, i: TF.rotate(image, (-1)**i *
                                           (10 + i % 4 * 10), expand=True), "strong": printed}

# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.Config):
    # -- copies
    val_data: str = "shapes:val"  # the images that get copied; those of --data are distractors
    n_originals: int = 157  # how many of --val_data get copied
    copydays: str = ""  # the folder of Copydays, with original, strong, ...; else copies are made

    def check(self):
        require(self, lambda x: x >= 1, "at least 1", "n_originals")


def read_edited(read, edit: str, i: int) -> Tensor:
    return EDITS[edit](read(i), i)


def made_copies(extractor: Extractor) -> tuple[Images, dict[str, Images]]:
    """Some of --val_data, evenly spaced, and their copies by each of EDITS, named as they
    are.
    """
    val = extractor.open("val_data")
    chosen = {round(i) for i in np.linspace(0, len(val) - 1, extractor.config.n_originals)}
    originals = val.subset(sorted(chosen))
    copies = {}
    for edit in EDITS:
        copies[edit] = replace(originals, read=partial(read_edited, originals.read, edit))
    return originals, copies


def copydays(config: Config) -> tuple[Images, dict[str, Images]]:
    """The originals and the copies by folder. A name's first four digits say what it shows."""
    images = open_images(f"folder:{config.copydays}", flag="--copydays")
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


def run(extractor: Extractor) -> dict:
    """Copies are looked for among their originals and --data. DINO sec. 4.2.1: --image_size
    320.

    Class token and GeM of patches, whitened on --data; images squashed to a square. The copies
    are those of --copydays, or made on the spot of --n_originals of --val_data.
    """
    config, process, model = extractor.config, extractor.process, extractor.model
    if model.pixels.channels != 3:
        raise UsageError(f"--weights {config.weights}: a network for {model.pixels.channels} "
                         "channels; copies are made of photographs, which have three")
    distractors = extractor.open("data")
    originals, copies = copydays(config) if config.copydays else made_copies(extractor)

    # The whitening is learned on the distractors, which show nothing that is asked for.
    read = Descriptor(model)
    square = partial(squash, size=extractor.size)
    distractor_rows = extractor(distractors, "copies-data", read, square)
    whiten = Whitening(distractor_rows)
    original_rows = extractor(originals, "copies-originals", read, square)
    rows = whiten(torch.cat([original_rows, distractor_rows]))

    # Right is the original of the same name; nothing is junk.
    names = np.array(originals.names + [""] * len(distractors))
    no_junk = torch.zeros(len(rows), dtype=torch.bool)
    figures = {}
    for edit, images in copies.items():
        name = f"copies-{re.sub('[^a-z0-9]+', '-', edit)}"
        queries = whiten(extractor(images, name, read, square))

        def same_name(i, images=images):
            return torch.from_numpy(names == images.names[i]), no_junk

        figures[edit] = mean_scores(queries, rows, same_name, process)[0].item()

    mean = sum(figures.values()) / len(figures)
    process.print(
        f"copy detection: class token + GeM, whitened, {extractor.size} px; copies of "
        f"{len(originals)} images among {len(rows):,d}\n  mAP")
    for edit, value in (*figures.items(), ("mean", mean)):
        process.print(f"  {edit:12s} {value:7.2%}")
    headline = {"copies mAP, mean": mean}
    if "strong" in figures:
        headline["copies mAP, strong"] = figures["strong"]
    source = f"Copydays in {config.copydays}" if config.copydays else "made copies"
    return {
        "copies": figures, "mean": mean, "n_originals": len(originals), "headline": headline,
        "protocol": f"class token + GeM of patches, PCA whitening on --data, {source}"}


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
