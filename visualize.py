"""Figures: what a Vision Transformer looks at, and how its training went.

    photo --> resized, cut to whole patches --> get_attention --> row of the class token (nh, h, w)
                                                                    |
                          every head | their mean | the patches that hold 60 % of the mass

Idea     The class token gathers what it needs by attending to patches. Nobody told the network
         where objects are; the map shows that it found out, which is what made DINO famous.
Paper    DINO fig. 1 and 3, sec. 4.2.2 and H (mass threshold)
Try      python visualize.py attention PHOTO --weights RUN_OR_FILE_OR_NAME
         python visualize.py curves RUN
Change   a new figure is one draw_* function and one branch in main
Tests    pytest tests/test_visualize.py

Letters  B images, nh heads, h w patches down and across, R registers.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

import runtime
from augment import RGB, Pixels, center_crop, normalise
from data import read_file
from recipes import read_config
from runtime import UsageError, require
from vit import VisionTransformer
from weights import load_backbone


def pyplot():
    """matplotlib, without needing a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# ------------------------------------------------------------------------------------------------
# Attention


@torch.no_grad()
def class_attention(model: VisionTransformer, images: Tensor, block: int = -1,
                    pixels: Pixels = RGB) -> Tensor:
    """Images (B, C, H, W) -> how the class token attends to patches, (B, nh, h, w).

    Columns of the class token itself and of the registers are left out, so a map sums to less than
    one: the rest of the attention went to them.
    """
    attention = model.get_attention(normalise(images, pixels), block)  # (B, nh, N, N)
    h, w = model.grid(images)
    return attention[:, :, 0, 1 + model.num_register_tokens:].unflatten(2, (h, w))


def top_mass(attention: Tensor, share: float = 0.6) -> Tensor:
    """The smallest set of patches that holds `share` of each map's mass: bool, as (..., h, w)."""
    flat = attention.flatten(-2)
    values, order = flat.sort(-1)
    mass = values.cumsum(-1) / values.sum(-1, keepdim=True)
    # Sorted upwards: whatever comes after the first 1 - share of the mass belongs to the set.
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, mass > 1 - share)
    return keep.view_as(attention)


def fit(image: Tensor, side: int, patch: int) -> Tensor:
    """Shorter side to `side` pixels, then cut to whole patches: (3, H, W) uint8."""
    if side < patch:
        raise ValueError(f"--image_size {side} is smaller than one patch of {patch} pixels")
    image = TF.resize(image, [side], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    h, w = (s // patch * patch for s in image.shape[-2:])
    return image[:, :h, :w]


def enlarge(grid: Tensor, patch: int) -> Tensor:
    """(..., h, w) -> (..., H, W), each patch a flat square: no detail that was not computed."""
    return grid.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def picture(image: Tensor) -> Tensor:
    """(C, H, W) -> (H, W, 3), from 0 to 1; of other channels than colours, their mean."""
    image = image / 255 if image.dtype == torch.uint8 else image
    if len(image) != 3:
        image = image.mean(0, keepdim=True).expand(3, -1, -1)
    return image.permute(1, 2, 0).clamp(0, 1)


def show(axis, picture, title: str = "", **how):
    axis.imshow(picture.numpy(), **how)
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """The image where the mask is, darkened elsewhere: (H, W, 3)."""
    return torch.where(mask[..., None], picture(image), 0.25 * picture(image))


def draw_attention(model: VisionTransformer, image: Tensor, path: Path, block: int = -1,
                   share: float = 0.6, pixels: Pixels = RGB):
    """One image (C, H, W): every head, their mean, and the mask of the top mass of each."""
    plt = pyplot()
    heads = class_attention(model, image[None], block, pixels)[0]  # (nh, h, w)
    maps = torch.cat([heads.mean(0, keepdim=True), heads])
    masks = top_mass(maps, share)
    names = ["mean of heads"] + [f"head {i}" for i in range(len(heads))]
    columns = min(len(maps), 7)
    bands = math.ceil(len(maps) / columns)  # many heads need several bands of two rows
    ratio = image.shape[1] / image.shape[2]
    fig, axes = plt.subplots(2 * bands, columns + 1, squeeze=False,
                             figsize=(1.9 * (columns + 1), 2 * bands * (1.9 * ratio + 0.3)))
    for axis in axes.flat:
        axis.axis("off")
    show(axes[0, 0], picture(image), "image")
    for i, (name, grid, mask) in enumerate(zip(names, maps, masks)):
        row, column = 2 * (i // columns), 1 + i % columns
        show(axes[row, column], enlarge(grid, model.patch_size), name, cmap="viridis")
        show(axes[row + 1, column], masked(image, enlarge(mask, model.patch_size)),
             f"top {share:.0%}")
    fig.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(fig)


def draw_attention_page(model: VisionTransformer, images: list[Tensor], size: int, path: Path,
                        pixels: Pixels = RGB):
    """Several images, one column each: image, mean attention, top 60 %. Closes a training run."""
    plt = pyplot()
    device = next(model.parameters()).device
    images = torch.stack([center_crop(image, size) for image in images])
    was_training = model.training
    maps = class_attention(model.eval(), images.to(device), -1, pixels).mean(1).cpu()  # (B, h, w)
    model.train(was_training)
    masks = top_mass(maps)
    fig, axes = plt.subplots(3, len(images), figsize=(1.6 * len(images), 4.9), squeeze=False)
    for i, image in enumerate(images):
        show(axes[0, i], picture(image))
        show(axes[1, i], enlarge(maps[i], model.patch_size), cmap="viridis")
        show(axes[2, i], masked(image, enlarge(masks[i], model.patch_size)))
    for axis, title in zip(axes[:, 0], ("image", "class token's attention", "top 60 % of it")):
        axis.set_title(title, fontsize=8, loc="left")
    fig.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(fig)


# ------------------------------------------------------------------------------------------------
# Curves


def draw_curves(run: Path) -> Path:
    """metrics.jsonl -> curves.png: the loss and its parts, balance, k-NN, schedules."""
    file = run / "metrics.jsonl"
    if not file.exists():
        raise ValueError(f"{run}: no metrics.jsonl in it; is it the directory of a run?")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    config = read_config(run / "config.json")
    steps = [r for r in rows if "loss" in r]
    knn = [r for r in rows if "knn" in r]
    if not steps:
        raise ValueError(f"{run}: its metrics.jsonl has no step yet")
    plt, x = pyplot(), [r["step"] for r in steps]
    own = config["separate_head"]
    prototypes = {"dino": config["n_prototypes"],
                  "ibot": config["ibot_n_prototypes"] if own else config["n_prototypes"]}
    fig, axes = plt.subplots(1, 4, figsize=(16, 3.2), layout="constrained")
    terms = [term for term in ("dino", "ibot") if term in steps[0]]
    for term, style, also in zip(terms, ("-", "--"), ("", "_")):  # "_..." stays out of the legend
        for color, (key, name) in enumerate(((term, "loss = H + KL"),
                                             (f"{term}_entropy", "H, entropy of a target"),
                                             (f"{term}_kl", "KL, still to learn"))):
            axes[0].plot(x, [r[key] for r in steps], style, color=f"C{color}", label=also + name)
        axes[1].plot(x, [r[f"{term}_mean_entropy"] for r in steps], style, color="C0",
                     label=f"entropy of the mean target, {term}")
        for axis in axes[:2]:
            axis.axhline(math.log(prototypes[term]), color="gray", ls=":", label=also + "ln K")
    if not terms:  # others, which know no ln K
        axes[0].plot(x, [r["loss"] for r in steps], label="loss")
    dashed = "; dashed: patches" if len(terms) > 1 else ""
    axes[0].set_title(f"losses, nats: at ln K nothing is known{dashed}", fontsize=10)
    axes[1].set_ylim(bottom=0)
    right = axes[1].twinx()
    right.plot(x, [r["rank"] for r in steps], color="tab:green", label="effective rank (right)")
    right.set_ylim(bottom=0)
    right.legend(loc="lower right", fontsize=7)
    axes[1].set_title("balance: at ln K all prototypes are in use", fontsize=10)
    axes[2].plot([r["step"] for r in knn], [100 * r["knn"] for r in knn], "o-", label="teacher")
    if knn and "pixels" in knn[0]:
        axes[2].axhline(100 * knn[0]["pixels"], color="gray", ls=":", label="raw pixels")
    axes[2].set_title("k-NN of the teacher, %; at step 0 untrained", fontsize=10)
    for key in ("lr", "weight_decay", "teacher_temp"):
        top = max(r[key] for r in steps) or 1
        axes[3].plot(x, [r[key] / top for r in steps], label=f"{key} / {top:.2g}")
    axes[3].set_title("schedules, as a share of their peak", fontsize=10)
    for axis in axes:
        axis.set_xlabel("step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, framealpha=0.5)
    fig.savefig(run / "curves.png", dpi=110)
    plt.close(fig)
    return run / "curves.png"


def draw_growth(found: dict[str, list[dict]], path: Path) -> Path:
    """What `bench.py growth` found, a panel for each thing that grows; the last one is a legend."""
    plt = pyplot()
    fig, axes = plt.subplots(2, 4, figsize=(14, 5.6), layout="constrained")
    for axis, (name, rows) in zip(axes.flat, found.items()):
        x = [row["value"] for row in rows]
        axis.set_xscale("symlog" if 0 in x else "log", base=2)
        axis.set_xticks(x, [f"{n // 1024}k" if n > 9999 else f"{n}" for n in x])
        axis.minorticks_off()
        axis.set_xlabel(name)
        if name == "processes":
            rate = [row["images_per_second"] for row in rows]
            lines = [(axis, rate, "^-", "tab:green"),
                     (axis, [rate[0] * n for n in x], ":", "gray")]
        else:
            lines = [(axis, [1e3 * row["seconds_per_image"] for row in rows], "o-", "tab:blue"),
                     (axis.twinx(), [row["peak_memory_gb"] for row in rows], "s--", "tab:orange")]
        for side, y, style, color in lines:
            side.plot(x, y, style, color=color)
            side.set_ylim(0, 1.1 * max(y))
    for style, color, label in (("o-", "tab:blue", "milliseconds an image (left)"),
                                ("s--", "tab:orange", "peak memory, GB (right)"),
                                ("^-", "tab:green", "images a second, all processes"),
                                (":", "gray", "the same if nothing were lost")):
        axes.flat[-1].plot([], [], style, color=color, label=label)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(loc="center", frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    # -- attention
    weights: str = ""  # a run, a released name such as dino_vits8, a URL, or a file
    image_size: int = 480  # shorter side of the photo in pixels, before cutting to whole patches
    block: int = -1  # which block's attention; -1 is the last
    share: float = 0.6  # share of the mass that the mask holds
    output: str = ""  # the picture to write; empty: attention.png here


USAGE = "python visualize.py attention PHOTO --weights RUN_OR_FILE_OR_NAME | curves RUN"


@runtime.command
def main(argv):
    what, target, rest = argv[:1], argv[1:2], argv[2:]
    if argv[:1] in (["-h"], ["--help"]):
        return runtime.parse(Config, argv, usage=USAGE)
    if what not in (["attention"], ["curves"]) or not target or target[0].startswith("--"):
        raise UsageError(f"usage: {USAGE}")
    with runtime.usage():
        if what == ["curves"]:
            runtime.parse(Config, rest, usage=USAGE)
            path = draw_curves(Path(target[0]))
        else:
            config = runtime.parse(Config, rest, usage=USAGE)
            if not config.weights:
                raise UsageError("--weights: give a run, a file, or a released name such as "
                                 "dino_vits8")
            require(config, lambda x: 0 < x < 1, "between 0 and 1", "share")
            model, path = load_backbone(config.weights), Path(config.output or "attention.png")
            if not isinstance(model, VisionTransformer):
                raise UsageError(f"--weights {config.weights}: a convnet, which has no attention")
            try:
                image = read_file(Path(target[0]), model.pixels.channels)
            except (OSError, ValueError) as error:
                raise UsageError(f"{target[0]}: not a readable image ({error})") from None
            image = fit(image, config.image_size, model.patch_size)
            draw_attention(model, image, path, config.block, config.share, model.pixels)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
