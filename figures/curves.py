"""Curves: how a training went, on one page.

    RUN/metrics.jsonl --> losses | balance | k-NN | schedules --> RUN/curves.png

Idea     The loss alone says little: it may rise while the features get better, and be lowest in
         a collapse. Its two parts, what is in use, and how good the features are tell the story
         together.
Paper    DINO fig. 7 (H and KL of a collapse)
Try      python visualize.py curves RUN
Change   another panel is one more draw_* function, called by draw_curves
Tests    pytest tests/figures/test_curves.py

metrics.jsonl has a line of JSON for each log line ("loss", "dino", "dino_entropy", ..., means
over the steps since the line before) and one for each evaluation ("knn", "patch_miou"). The
panels get these rows as dictionaries; training/log.py says what the numbers mean.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from machinery.flags import UsageError, near_path
from machinery.page import pyplot, save
from training.config import read_config

LINE_STYLES = {"dino": "-", "ibot": "--"}  # class tokens solid, patches dashed


def read_metrics(run: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """(rows of steps, of k-NN, of patch k-NN) of a run directory; ValueError if there is none."""
    file = run / "metrics.jsonl"
    if not run.exists():
        raise ValueError(f"{run}: there is no such directory of a run{near_path(run)}")
    if not file.exists():
        raise ValueError(f"{run}: no metrics.jsonl in it; is it the directory of a run?")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise ValueError(f"{run}: its metrics.jsonl has no step yet")
    judged = [[row for row in rows if name in row] for name in ("knn", "patch_miou")]
    return steps, *judged


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


def draw_patches(axis, evaluations: list[dict]):
    """How well labelled patches name the patches of other images: --dense_every."""
    x = [row["step"] for row in evaluations]
    axis.plot(x, [100 * row["patch_miou"] for row in evaluations], "o-", label="teacher")
    axis.set_title("the teacher's patch tokens; step 0: before training", fontsize=10)
    axis.set_ylabel("patch k-NN, mIoU, %")


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

    A run that judged nothing has three: without the one of k-NN. One with --dense_every has a
    panel more. ValueError where there is no run, or no step in it yet.
    """
    steps, evaluations, patch_evaluations = read_metrics(run)

    # How many prototypes each objective of this run has. Patches have a number of their own
    # where they have a head of their own.
    config = read_config(run / "config.json")
    of_patches = "ibot_n_prototypes" if config["separate_head"] else "n_prototypes"
    field_of = {"dino": "n_prototypes", "ibot": of_patches}
    prototypes = {term: config[field] for term, field in field_of.items() if term in steps[0]}

    plt = pyplot()
    panels = 3 + bool(evaluations) + bool(patch_evaluations)
    fig, axes = plt.subplots(1, panels, figsize=(4.25 * panels, 4), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12)  # inches between the panels
    fig.suptitle(run.resolve().name, fontsize=11)
    draw_losses(axes[0], steps, prototypes)
    draw_balance(axes[1], steps, prototypes)
    if evaluations:
        draw_knn(axes[2], evaluations)
    if patch_evaluations:
        draw_patches(axes[-2], patch_evaluations)
    draw_schedules(axes[-1], steps)

    # The legends stand below the panels, where they cannot hide a curve.
    for axis in axes:
        axis.set_xlabel("step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8,
                        frameon=False)
    return save(fig, path or run / "curves.png")


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "RUN"


@dataclass
class Config:
    # -- curves
    output: str = ""  # the picture to write; empty: curves.png in the run's directory


def draw(arguments: list[str], config: Config) -> Path:
    """Losses, balance, k-NN and schedules of one training run over its steps."""
    if len(arguments) > 1:
        raise UsageError(f"curves draws one run, not {len(arguments)}: {' '.join(arguments)}")
    return draw_curves(Path(arguments[0]), Path(config.output) if config.output else None)
