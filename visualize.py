"""Figures: what a Vision Transformer looks at, and how its training went.

    photo --> resized, cut to patches --> get_attention --> row of the class token (nh, h, w)
                                                              |
                    every head | their mean | the patches that hold 60 % of the mass

    RUN/metrics.jsonl --> losses | balance | k-NN | schedules --> RUN/curves.png

Idea     The class token collects what it needs by attending to patches. No label ever told the
         network where objects are; the maps of a trained network show them nevertheless, and
         that made DINO famous.
Paper    DINO fig. 1 and 3, sec. 4.2.2 and H (mass threshold)
Try      python visualize.py attention PHOTO --weights RUN_OR_FILE_OR_NAME
         python visualize.py curves RUN
Change   a new figure is one draw_* function, a dataclass of its flags, and a line in FIGURES
Tests    pytest tests/test_visualize.py

Letters  B images, nh heads, h w patches down and across, N tokens, H W pixels.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from augment import RGB, Pixels, center_crop
from backbones.weights import load_backbone
from evaluation.dense import picture, pyplot
from evaluation.masks import class_attention, top_mass
from images.data import read_file
from machinery.flags import (UsageError, command, did_you_mean, near_path, parse, require,
                             user_errors)
from training.config import read_config
from vit import VisionTransformer

# ----------------------------------------------------------------------------------------------
# Attention maps


def fit(image: Tensor, side: int, patch: int) -> Tensor:
    """Shorter side to `side` pixels, then cut to whole patches: (C, H, W) uint8.

    ValueError if not even one patch fits.
    """
    if side < patch:
        raise ValueError(f"--image_size {side} is smaller than one patch of {patch} pixels")
    image = TF.resize(image, [side], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)

    # At most one patch less a pixel is cut off at the right and at the bottom.
    height, width = image.shape[-2:]
    return image[:, :height // patch * patch, :width // patch * patch]


def enlarge(grid: Tensor, patch: int) -> Tensor:
    """(..., h, w) -> (..., H, W), each patch a flat square.

    Smoothing would show more detail than the network computed: one number for each patch.
    """
    return grid.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """The image, at a quarter of its brightness where the mask (H, W) is False: (H, W, 3)."""
    return torch.where(mask[..., None], picture(image), 0.25 * picture(image))


def show(axis, picture: Tensor, title: str = "", **options):
    """Draw a picture (H, W, 3) or a map (H, W) without axes: pixels need no scale."""
    axis.imshow(picture.numpy(), **options)
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def show_map(axis, grid: Tensor, patch: int, title: str = ""):
    """Draw a map (h, w) of attention, bright where there is much of it.

    A few patches may get most of the attention. The brightest 2 % share one colour, so that the
    rest can be told apart.
    """
    brightest = float(grid.flatten().quantile(0.98))
    show(axis, enlarge(grid, patch), title, cmap="viridis", vmin=0, vmax=brightest)


def draw_attention(model: VisionTransformer, image: Tensor, path: Path, block: int = -1,
                   share: float = 0.6, pixels: Pixels = RGB):
    """One image (C, H, W): every head, their mean, and the mask of the top mass of each."""
    plt = pyplot()
    heads = class_attention(model, image[None], block, pixels)[0]  # (nh, h, w)
    maps = torch.cat([heads.mean(0, keepdim=True), heads])  # (1 + nh, h, w)
    masks = top_mass(maps, share)
    names = ["mean of heads"] + [f"head {i}" for i in range(len(heads))]

    # The page has bands of two rows: maps above, their masks below. A band holds 7 maps beside
    # the column of the image. Example: ViT-B has 12 heads, 13 maps with their mean, two bands.
    columns = min(len(maps), 7)
    bands = math.ceil(len(maps) / columns)

    # Sizes are in inches: 1.9 for the width of a picture, and .3 of height for its title.
    ratio = image.shape[1] / image.shape[2]
    size = (1.9 * (columns + 1), 2 * bands * (1.9 * ratio + 0.3))
    fig, axes = plt.subplots(2 * bands, columns + 1, squeeze=False, figsize=size,
                             layout="constrained")
    for axis in axes.flat:
        axis.axis("off")  # places that stay empty

    show(axes[0, 0], picture(image), "image")
    for i, (name, grid, mask) in enumerate(zip(names, maps, masks)):
        row = 2 * (i // columns)
        column = 1 + i % columns
        map_axis = axes[row, column]
        mask_axis = axes[row + 1, column]
        show_map(map_axis, grid, model.patch_size, name)
        show(mask_axis, masked(image, enlarge(mask, model.patch_size)), f"top {share:.0%}")
    fig.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(fig)


def sharpest_head(attention: Tensor) -> int:
    """The head whose attention is least spread over the patches: (B, nh, h, w) -> its
    number.
    """
    shares = attention.flatten(2)  # (B, nh, h*w)
    shares = shares / shares.sum(-1, keepdim=True)
    spread = torch.special.entr(shares).sum(-1)  # (B, nh), in nats: ln(h*w) if all are equal
    return int(spread.mean(0).argmin())


def page_side(size: int, patch: int) -> int:
    """The side in pixels at which a network that was trained at `size` is asked for its page.

    A network of 40 pixels has 8 x 8 patches of 5: too few to see a shape in them. Its positions
    can be resampled, so it is asked at six times its size, up to 480 pixels, in whole patches.
    """
    return max(size, min(6 * size, 480)) // patch * patch


def draw_attention_page(model: VisionTransformer, images: list[Tensor], side: int, path: Path,
                        pixels: Pixels = RGB):
    """Several images, one column each: the image, the mean of the heads, the sharpest head.

    A training run draws it at its end, of images that were held out, at `page_side` pixels.
    """
    plt = pyplot()
    images = torch.stack([center_crop(image, side) for image in images])

    # The network may be anywhere, and in training mode: it is left as it was. One image at a
    # time, because the weights of all pairs of tokens are large.
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    maps = [class_attention(model, image[None].to(device), -1, pixels) for image in images]
    attention = torch.cat(maps).cpu()  # (B, nh, h, w)
    model.train(was_training)

    # Heads look for different things, some for the ground behind an object: their mean shows
    # all of it, the least spread one mostly a thing or its edges.
    head = sharpest_head(attention)
    sharpest = attention[:, head]  # (B, h, w)
    masks = top_mass(sharpest, 0.9)
    fig, axes = plt.subplots(4, len(images), figsize=(1.6 * len(images), 6.5), squeeze=False)
    for i, image in enumerate(images):
        show(axes[0, i], picture(image))
        show_map(axes[1, i], attention[i].mean(0), model.patch_size)
        show_map(axes[2, i], sharpest[i], model.patch_size)
        show(axes[3, i], masked(image, enlarge(masks[i], model.patch_size)))

    # One title for each row, over its first picture.
    titles = ("image", "attention of the class token, mean of heads",
              f"head {head}, the sharpest", "the patches that get 90 % of it")
    for axis, title in zip(axes[:, 0], titles):
        axis.set_title(title, fontsize=8, loc="left")
    fig.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(fig)


# ----------------------------------------------------------------------------------------------
# Curves of a run: one function for each panel
#
# metrics.jsonl has a line of JSON for each log line ("loss", "dino", "dino_entropy", ...,
# means over the steps since the line before) and one for each evaluation ("knn"). The panels
# get these rows as dictionaries; training/log.py says what the numbers mean.

LINE_STYLES = {"dino": "-", "ibot": "--"}  # class tokens solid, patches dashed


def read_metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """(rows of steps, rows of evaluations) of a run directory; ValueError if there is none."""
    file = run / "metrics.jsonl"
    if not run.exists():
        raise ValueError(f"{run}: there is no such directory of a run{near_path(run)}")
    if not file.exists():
        raise ValueError(f"{run}: no metrics.jsonl in it; is it the directory of a run?")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise ValueError(f"{run}: its metrics.jsonl has no step yet")
    return steps, [row for row in rows if "knn" in row]


def marker(rows: list[dict]) -> str:
    """Dots for a short run: a line through a single point would be invisible."""
    return "." if len(rows) < 10 else ""


def draw_losses(axis, steps: list[dict], prototypes: dict[str, int]):
    """The loss of each objective and its two parts, in nats, below the line of ln K.

    prototypes: K of each objective, by name.
    """
    x = [row["step"] for row in steps]
    for term, K in prototypes.items():
        # Both objectives have the same three colours. Only the first is named in the legend:
        # matplotlib leaves out labels that begin with an underscore.
        hidden = "" if term == next(iter(prototypes)) else "_"
        style = LINE_STYLES[term]
        curves = {
            term: "loss = H + KL", f"{term}_entropy": "H, entropy of a target",
            f"{term}_kl": "KL, still to be learned"}
        for i, (key, label) in enumerate(curves.items()):
            axis.plot(x, [row[key] for row in steps],
                      marker(steps) + style, color=f"C{i}", label=hidden + label)
        # A uniform answer costs ln K, whatever the target: there the network knows nothing.
        axis.axhline(math.log(K), color="gray", ls=":", label=f"{hidden}ln K, uniform answers")

    if not prototypes:  # distillation of features alone: a loss without prototypes
        axis.plot(x, [row["loss"] for row in steps], marker(steps) + "-", label="loss")
    title = "losses; dashed: of patches" if len(prototypes) > 1 else "losses"
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("nats" if prototypes else "loss")


def draw_balance(axis, steps: list[dict], prototypes: dict[str, int]):
    """Whether prototypes and directions of the features are in use: both fall in a collapse."""
    x = [row["step"] for row in steps]
    for term, K in prototypes.items():
        style = marker(steps) + LINE_STYLES[term]
        entropies = [row[f"{term}_mean_entropy"] for row in steps]
        axis.plot(x, entropies, style, color="C0", label=f"mean target, {term}")
        hidden = "" if term == next(iter(prototypes)) else "_"
        axis.axhline(math.log(K), color="gray", ls=":", label=f"{hidden}ln K, all in use")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("entropy of the mean target, nats")
    if not prototypes:
        axis.set_yticks([])
        axis.set_ylabel("no prototypes, no entropy")

    # The rank is a number of directions and no entropy, so it gets an axis of its own at the
    # right, in the colour of its curve. A tenth of the height stays free above the curve.
    ranks = [row["rank"] for row in steps]
    right = axis.twinx()
    right.plot(x, ranks, marker(steps) + "-", color="tab:green")
    right.set_ylim(0, 1.1 * max(ranks))
    right.set_ylabel("effective rank (green)", color="tab:green")
    right.tick_params(axis="y", labelcolor="tab:green")
    axis.set_title("balance: what is in use", fontsize=10)


def draw_knn(axis, evaluations: list[dict]):
    """How often the teacher's neighbours are right, and what raw pixels reach."""
    x = [row["step"] for row in evaluations]
    axis.plot(x, [100 * row["knn"] for row in evaluations], "o-", label="teacher")
    first = evaluations[0]
    if "pixels" in first:
        axis.axhline(100 * first["pixels"], color="gray", ls=":", label="raw pixels")

    # Images without labels are judged by other-view retrieval (evaluation/judge.py). Runs of
    # earlier versions have not written down which of the two it was.
    protocol = first.get("protocol", "k-NN(20), or other-view retrieval")
    axis.set_title("the teacher's features; step 0: before training", fontsize=10)
    axis.set_ylabel(f"{protocol}, %")


def draw_schedules(axis, steps: list[dict]):
    """Learning rate, weight decay and the teacher's temperature, each divided by its peak."""
    x = [row["step"] for row in steps]
    for key in ("lr", "weight_decay", "teacher_temp"):
        values = [row[key] for row in steps]
        peak = max(values)
        axis.plot(x, [value / (peak or 1) for value in values],
                  marker(steps) + "-", label=f"{key}, peak {peak:.2g}")
    axis.set_ylim(bottom=0)
    axis.set_title("schedules", fontsize=10)
    axis.set_ylabel("share of the peak")


def draw_curves(run: Path, path: Path | None = None) -> Path:
    """metrics.jsonl of a run -> a page of four panels; returns its path, RUN/curves.png.

    A run that judged nothing has three: without the one of k-NN. ValueError where there is no
    run, or no step in it yet.
    """
    steps, evaluations = read_metrics(run)

    # How many prototypes each objective of this run has. Patches have a number of their own
    # where they have a head of their own.
    config = read_config(run / "config.json")
    of_patches = "ibot_n_prototypes" if config["separate_head"] else "n_prototypes"
    field_of = {"dino": "n_prototypes", "ibot": of_patches}
    prototypes = {term: config[field] for term, field in field_of.items() if term in steps[0]}

    plt = pyplot()
    panels = 4 if evaluations else 3
    fig, axes = plt.subplots(1, panels, figsize=(4.25 * panels, 4), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12)  # inches between the panels
    fig.suptitle(run.resolve().name, fontsize=11)
    draw_losses(axes[0], steps, prototypes)
    draw_balance(axes[1], steps, prototypes)
    if evaluations:
        draw_knn(axes[2], evaluations)
    draw_schedules(axes[-1], steps)

    # The legends stand below the panels, where they cannot hide a curve.
    for axis in axes:
        axis.set_xlabel("step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8,
                        frameon=False)
    path = path or run / "curves.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


# ----------------------------------------------------------------------------------------------
# The program: a table of figures, each with its own flags


@dataclass
class AttentionConfig:
    # -- attention
    weights: str = ""  # the network: a run, a released name such as dino_vits8, a URL, a file
    checkpoint_key: Literal["teacher",
                            "student"] = "teacher"  # which network of a training's two
    num_heads: int = 0  # attention heads, for a file that does not tell them; 0: of width 64
    image_size: int = 480  # shorter side of the photo in pixels, before it is cut to patches
    block: int = -1  # the block whose attention is drawn; -1: the last
    share: float = 0.6  # share of the attention that the patches of a mask hold together
    output: str = ""  # the picture to write; empty: attention.png in this folder


@dataclass
class CurvesConfig:
    # -- curves
    output: str = ""  # the picture to write; empty: curves.png in the run's directory


def draw_photo(photo: str, config: AttentionConfig) -> Path:
    """Where the class token looks in one photo: every head, their mean, masks."""
    if not config.weights:
        raise UsageError("--weights: give a run, a file, or a released name such as dino_vits8")
    require(config, lambda x: 0 < x < 1, "between 0 and 1", "share")
    model = load_backbone(config.weights, config.checkpoint_key, config.num_heads)
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"--weights {config.weights}: a convnet, which has no attention")

    # The photo is read in the channels that the network was trained on: grey, colours, or more.
    try:
        image = read_file(Path(photo), model.pixels.channels)
    except (OSError, ValueError) as error:
        raise UsageError(f"{photo}: not a readable image ({error})") from None
    image = fit(image, config.image_size, model.patch_size)
    path = Path(config.output or "attention.png")
    draw_attention(model, image, path, config.block, config.share, model.pixels)
    return path


def draw_run(run: str, config: CurvesConfig) -> Path:
    """Losses, balance, k-NN and schedules of one training run over its steps."""
    return draw_curves(Path(run), Path(config.output) if config.output else None)


@dataclass
class Figure:
    """One command of this program."""

    arguments: str  # what has to be typed after its name
    flags: type  # a dataclass
    draw: Callable  # (photo or run, the dataclass with its values) -> path of the picture


FIGURES = {
    "attention": Figure("PHOTO --weights RUN_OR_FILE_OR_NAME", AttentionConfig, draw_photo),
    "curves": Figure("RUN", CurvesConfig, draw_run)}

USAGE = "python visualize.py " + " | ".join(f"{name} {figure.arguments}"
                                            for name, figure in FIGURES.items())


def overview() -> str:
    """The answer to `python visualize.py`: the figures, and where their flags are."""
    lines = [f"usage: {USAGE}", "", "The figures:"]
    for name, figure in FIGURES.items():
        lines.append(f"  {name:10s} {figure.draw.__doc__.splitlines()[0]}")
    lines += ["", "python visualize.py FIGURE --help lists the flags of that figure"]
    return "\n".join(lines)


@command
def main(argv):
    help_flags = ("-h", "--help")
    if not argv or argv[0] in help_flags:
        print(overview())
        return None
    if argv[0] not in FIGURES:
        raise UsageError(f"usage: {USAGE}{did_you_mean(argv[0], FIGURES)}")
    figure = FIGURES[argv[0]]
    usage = f"python visualize.py {argv[0]} {figure.arguments} [--flag ...]"

    # The second word is the photo or the run; only --help may stand in its place.
    if argv[1:] and argv[1] in help_flags:
        return parse(figure.flags, argv[1:], usage=usage)
    if not argv[1:] or argv[1].startswith("--"):
        raise UsageError(f"usage: {USAGE}")
    target = argv[1]
    with user_errors():
        config = parse(figure.flags, argv[2:], usage=usage)
        path = figure.draw(target, config)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
