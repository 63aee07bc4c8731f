"""Retrieval: is the same thing, or a copy of it, found before everything else?

    features of queries (q, D) --+
                                 +--> cosine --> order --> junk out --> average precision
    features of images (n, D) ---+                          ^
                                        which are right, which do not count

Idea     A ranking has no threshold to choose: average precision is 1 when all that is right comes
         before all that is wrong. Images that are too hard to call are junk: they are passed over.
Paper    DINO sec. 4.2.1 (retrieval, copy detection); Radenovic 2018 (revisited Oxford and Paris);
         Radenovic 2017 (GeM); Berman 2019 (copy detection with GeM and whitening)
Try      python retrieval.py       draws the edits of one picture into edits.png
Change   another edit is one line in EDITS
Tests    pytest tests/test_retrieval.py

Letters  q queries, n images, D width, P patches.
"""

import csv
import io
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

KAPPAS = (1, 5, 10)  # how many of the first images mP@k looks at


# ------------------------------------------------------------------------------------------------
# Judging one ranking


def average_precision(ranks: Tensor) -> float:
    """ranks: places (from 0, ascending, junk not counted) of all that is right.

    The area under precision over recall by trapezoids: mean of the precision just before and just
    after each hit. Radenovic 2018's, older than the step-wise one, and a little lower.
    """
    ranks = ranks.double()
    found = torch.arange(len(ranks), dtype=torch.float64)
    before = torch.where(ranks > 0, found / ranks.clamp(min=1), 1.0)
    after = (found + 1) / (ranks + 1)
    return ((before + after) / 2).mean().item()


def judge(similarities: Tensor, right: Tensor, junk: Tensor) -> list[float]:
    """One query: similarities (n,), right and junk (n,) bool -> [AP, P@1, P@5, P@10].

    Ties keep the order of the images. nan where nothing is right: such a query is left out of the
    means. P@k ends at the last right image, when that comes before k.
    """
    if not right.any():
        return [float("nan")] * (1 + len(KAPPAS))
    order = similarities.argsort(descending=True, stable=True)
    order = order[~junk[order]]
    ranks = right[order].nonzero()[:, 0]
    ends = [min(int(ranks[-1]) + 1, k) for k in KAPPAS]
    return [average_precision(ranks), *(int((ranks < end).sum()) / end for end in ends)]


# ------------------------------------------------------------------------------------------------
# Features


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


# ------------------------------------------------------------------------------------------------
# What is right: files of ground truth

HARMLESS = {  # all that lists, numbers and arrays are made of, by the numpy of any year
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in (
        "multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")),
    "numpy.ndarray", "numpy.dtype", "_codecs.encode", "__builtin__.bytes", "builtins.bytes",
}


class ArrayUnpickler(pickle.Unpickler):
    """Lists, dictionaries, numbers and arrays: a pickle can ask for any function to be run."""

    def find_class(self, module, name):
        if f"{module}.{name}" not in HARMLESS:
            raise ValueError(f"it asks for {module}.{name}, which has no place there")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_revisited(path: str | Path) -> dict:
    """gnd_roxford5k.pkl, gnd_rparis6k.pkl: names of images (imlist) and of queries (qimlist), and
    for each query its box (bbx) and lists of easy, hard and junk images (gnd). Runs nothing.
    """
    try:
        with open(path, "rb") as file:
            truth = ArrayUnpickler(file, encoding="latin1").load()
        queries, images, about = truth["qimlist"], truth["imlist"], truth["gnd"]
        if len(queries) != len(about):
            raise ValueError(f"{len(queries)} queries, but the truth about {len(about)}")
        for each in about:
            for part in ("easy", "hard", "junk"):
                each[part] = torch.as_tensor(np.asarray(each[part], dtype=np.int64))
                if len(each[part]) and not 0 <= each[part].min() <= each[part].max() < len(images):
                    raise ValueError(f"a list of {part} images goes beyond the {len(images)}")
    except Exception as error:  # a pickle that is no pickle fails in any way
        raise ValueError(f"--ground_truth {path}: not the ground truth of revisited Oxford or "
                         f"Paris ({error!s:.200})") from None
    return truth


# Which lists are right, and which are junk, at the three levels of difficulty. Radenovic 2018.
LEVELS = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}


def relevance(about: dict, level: str, count: int) -> tuple[Tensor, Tensor]:
    """One entry of gnd -> right and junk, (count,) bool each."""
    out = torch.zeros(2, count, dtype=torch.bool)
    for row, parts in zip(out, LEVELS[level]):
        for part in parts:
            row[about[part]] = True
    return out[0], out[1]


def read_groups(path: str | Path, names: list[str]) -> list[str]:
    """A .csv with columns path and group -> the group of each name. Paths may be longer than names.

    Images of one group are right for each other.
    """
    try:
        with open(path, newline="") as file:
            rows = [(Path(row["path"]), row["group"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"--groups {path}: expected a .csv file with the columns path and group "
                         f"({error!s:.100})") from None
    groups = {}
    for place, group in rows:
        for i in range(len(place.parts)):
            groups.setdefault(str(Path(*place.parts[i:])), group)
    missing = [name for name in names if str(Path(name)) not in groups]
    if missing:
        raise ValueError(f"--groups {path}: {len(missing)} of {len(names)} images are not in it, "
                         f"the first {missing[0]}")
    return [groups[str(Path(name))] for name in names]


# ------------------------------------------------------------------------------------------------
# Copies: what people do to pictures before they upload them again. image (3, H, W) uint8 -> image


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Written and read again. quality: 1 to 100."""
    file = io.BytesIO()
    TF.to_pil_image(image).save(file, "JPEG", quality=quality)
    return TF.pil_to_tensor(Image.open(file))


def removed(image: Tensor, percent: int) -> Tensor:
    """The centre, `percent` of the area cut away around it."""
    keep = (1 - percent / 100) ** 0.5
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
    **{f"jpeg {q}": lambda image, i, q=q: jpeg(image, q)
       for q in (3, 5, 8, 10, 15, 20, 30, 50, 75)},
    **{f"crop {p} %": lambda image, i, p=p: removed(image, p) for p in range(10, 90, 10)},
    "blur": lambda image, i: blurred(image, 0.03),
    "rotation": lambda image, i: TF.rotate(image, (-1) ** i * (10 + i % 4 * 10), expand=True),
    "strong": printed,
}


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
    print("wrote edits.png; a ranking with hits at places 1, 2 and 5 has the average precision "
          f"{average_precision(torch.tensor([0, 1, 4])):.4f}")
