"""Story: a training run on one page.

    RUN/config.json -----------------> what was trained, in words
    RUN/metrics.jsonl ---------------> curves                               } RUN/story.png
    RUN/snapshots/step-0, middle, end --> attention and PCA of the images } RUN/story.pdf

Idea     Numbers say that a run went well; pictures show what it has learned. The same held-out
         images are shown to the network as it was at the start, in the middle and at the end of
         its training. No label told it where the objects are.
Paper    DINO fig. 1 (attention), DINOv2 fig. 1 (PCA); the page is ours
Try      python train.py --epochs 1 --warmup_epochs 0      writes it at its end
         python visualize.py story RUN
Change   another kind of pictures: what_it_sees and BLOCKS; which curves are drawn: CURVES
Tests    pytest tests/figures/test_story.py

Letters  n images, h w patches down and across, D width of the features, C H W of an image.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from augment import normalise
from backbones.weights import load_backbone
from figures.curves import History, finish_panel, panels, read_history
from figures.pca import find_foreground, pictures
from machinery.flags import UsageError
from machinery.page import MAPS, picture, pyplot, save, show
from training.optim import peak_lr
from vit import ARCHS, VisionTransformer

SIZE = (13.33, 8.0)  # inches: a little higher than a slide of 16 : 9
CURVES = ("dino", "ibot", "loss", "use", "rank", "knn")  # the panels of figures/curves.py here

# ----------------------------------------------------------------------------------------------
# What the page says


def in_words(history: History) -> str:
    """The configuration of a run, and its length, in two lines."""
    # A convnet has no patches.
    config = history.config
    patches = ""
    if config["arch"] in ARCHS:
        patches = f" with patches of {config['patch_size']} pixels"

    # Only losses that are part of the run, with their weights: "dino 1, koleo 0.1".
    losses = [
        f"{name.removesuffix('_weight')} {value:g}" for name, value in config.items()
        if name.endswith("_weight") and value]

    # Class tokens and patches may have different numbers of prototypes; distillation of features
    # has none. Local crops serve the loss of the class tokens alone.
    numbers = " and ".join(f"{K:,d}" for K in dict.fromkeys(history.prototypes.values()))
    crops = f"{config['global_crops_number']} of {config['global_crops_size']} pixels"
    if config["dino_weight"]:
        crops += f", {config['local_crops_number']} of {config['local_crops_size']} pixels"

    # Of the path of a folder the last two parts, which tell it from others.
    kind, colon, path = config["data"].partition(":")
    data = kind + colon + "/".join(Path(path).parts[-2:])
    peak = peak_lr(config["lr"], config["lr_scaling"], config["global_batch"])
    return (
        f"{config['arch']}{patches}, on {data[:60]}, without labels: "
        f"{history.steps[-1]['step']:,d} steps of {config['global_batch']} images, crops of "
        f"an image: {crops}, seed {config['seed']}\n"
        f"losses and weights: {', '.join(losses)}; {numbers or 'no'} prototypes, centering "
        f"{config['centering']}; optimizer {config['optimizer']}, peak learning rate "
        f"{peak:.1e}")


# ----------------------------------------------------------------------------------------------
# What the network sees, at each snapshot


def snapshots(run: Path) -> list[Path]:
    """The snapshots of a run, earliest first; ValueError if there is none, or no image."""
    files = sorted((run / "snapshots").glob("step-*.pt"), key=step_of)
    if not files or not (run / "snapshots" / "images.pt").exists():
        raise ValueError(f"{run}: no snapshots in it, which a run of this version keeps in "
                         f"snapshots/; python visualize.py curves {run} needs none")
    return files


def step_of(file: Path) -> int:
    """snapshots/step-120.pt -> 120"""
    return int(file.stem.removeprefix("step-"))


@torch.no_grad()
def what_it_sees(file: Path, images: Tensor, device: torch.device) -> dict[str, Tensor]:
    """One snapshot, asked about images (n, C, H, W): the name of a picture -> n of them.

    "attention" (n, h, w): of the class token, mean of the heads; a convnet has none. "PCA"
    (n, h, w, 3): colours of the patch features.
    """
    model = load_backbone(file).to(device)
    attention = []
    features = []

    # One image at a time, because the weights of all pairs of tokens are large.
    for image in images:
        batch = normalise(image[None].to(device), model.channel_stats)
        if isinstance(model, VisionTransformer):
            attention.append(model.get_class_attention(batch).mean(1).cpu())  # (1, h, w)
        features.append(model.forward_features(batch)["x_norm_patchtokens"].cpu())  # (1, hw, D)

    # The images are squares, and so are their grids of patches. What is an object and what is
    # background is decided in each image by itself; the colours are those of all images together,
    # so that what the network finds alike has one colour.
    features = torch.cat(features)  # (n, h*w, D)
    side = round(features.shape[1]**0.5)
    grids = list(features.float().unflatten(1, (side, side)))  # n of (h, w, D)
    masks = [find_foreground([grid])[0] for grid in grids]
    pca = {"PCA": torch.stack(pictures(grids, masks))}
    return {"attention": torch.cat(attention)} | pca if attention else pca


# ----------------------------------------------------------------------------------------------
# The page

BLOCKS = {
    "attention": "attention of the class token: yellow much, violet little, each picture by itself",
    "PCA": "PCA of the patch features: colours of the foreground; black is background"}


def draw_pictures(figure, images: Tensor, seen: dict[int, dict], last: int):
    """Blocks of pictures beside each other: a row of images, and one for each snapshot.

    seen: the step of a snapshot -> what_it_sees; last: the newest step of the run.
    """
    kinds = list(next(iter(seen.values())))
    rows = 1 + len(seen)
    for kind, left in zip(kinds, (0.075, 0.575)):  # the two halves of the page
        grid = figure.add_gridspec(rows, len(images), left=left, right=left + 0.42, top=0.535,
                                   bottom=0.01, wspace=0.07, hspace=0.07)
        axes = grid.subplots(squeeze=False)
        figure.text(left, 0.545, BLOCKS[kind], fontsize=11)
        for axis, image in zip(axes[0], images):
            show(axis, picture(image))

        # A few patches may get most of the attention. The brightest 2 % of a map share one
        # colour, so that the rest can be told apart. A patch is a flat square: smoothing would
        # show more detail than the network computed. The scale begins at 0, so that a network
        # that looks everywhere alike gives a flat map.
        for row, step in zip(axes[1:], seen):
            for axis, grid in zip(row, seen[step][kind]):
                show(axis, grid, cmap=MAPS["attention"], vmin=0, interpolation="nearest",
                     vmax=float(grid.flatten().quantile(0.98)))
            moment = {0: "start", last: "end"}.get(step, "middle")
            label_row(row[0], f"{moment}\nstep {step:,d}")
        label_row(axes[0, 0], "image")


def label_row(axis, name: str):
    """Write a name at the left of the first picture of a row."""
    axis.text(-0.08, 0.5, name, ha="right", va="center", fontsize=10, transform=axis.transAxes)


def draw_story(run: Path, device: torch.device | str = "cpu", path: Path | None = None) -> Path:
    """The page of a run, as .png and .pdf; returns the path of the first, RUN/story.png.

    ValueError for a directory that is no run, or one without snapshots. device: on which the
    networks are asked.
    """
    # All that can be missing is read before anything is computed.
    history = read_history(run)
    files = snapshots(run)
    kept = torch.load(run / "snapshots" / "images.pt", weights_only=True)
    images = kept["images"]
    seen = {step_of(file): what_it_sees(file, images, device) for file in files}

    # From above: name and words, the curves, the pictures. Places are shares of the page.
    plt = pyplot()
    fig = plt.figure(figsize=SIZE)
    fig.text(0.02, 0.985, history.name, fontsize=16, fontweight="bold", va="top")
    fig.text(0.02, 0.94, in_words(history), fontsize=11, va="top", linespacing=1.4)

    # Five panels at most stand beside each other: the legends of six would overlap. So where two
    # objectives are drawn, their weighted sum is left out.
    available = panels([history])
    if len(history.prototypes) > 1:
        del available["loss"]

    # The only loss of a run may have a name of its own, such as "feature" of a distillation; then
    # there is no weighted sum either.
    names = CURVES
    if not history.prototypes and "loss" not in available:
        names = (*history.further_terms, *CURVES)
    drawn = [available[name] for name in names if name in available]
    grid = fig.add_gridspec(1, len(drawn), left=0.05, right=0.99, top=0.845, bottom=0.695,
                            wspace=0.3)
    for draw_panel, place in zip(drawn, grid):
        axis = fig.add_subplot(place)
        draw_panel(axis, [history])
        finish_panel(axis, [history])
    draw_pictures(fig, images, seen, history.steps[-1]["step"])

    # Which images these are. The same page once more, for print and for zooming in.
    caption = "Images that were held out." if kept["held_out"] else (
        "Images of the training, because none were held out.")
    path = path or run / "story.png"
    save(fig, path.with_suffix(".pdf"), caption)
    return save(fig, path)


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "RUN"


@dataclass
class Config:
    # -- story
    output: str = ""  # the picture to write, and a .pdf beside it; empty: story.png in the run


def draw(arguments: list[str], config: Config) -> Path:
    """One page on a run: its settings, its curves, and what it saw at start, middle and end."""
    if len(arguments) > 1:
        raise UsageError(f"story tells one run, not {len(arguments)}: {' '.join(arguments)}")
    path = Path(config.output) if config.output else None
    return draw_story(Path(arguments[0]), path=path)
