"""Curves: how one training went, or several, on one page.

    RUN/metrics.jsonl ... --> History ... --> a panel for each loss | in use | rank | k-NN | ...

Idea     The loss alone says little: it may rise while the features get better, and be lowest in
         a collapse. Its two parts, what is in use, and how good the features are tell the story
         together. Where a run has collapsed, its panels are shaded.
Paper    DINO fig. 7 (H and KL of a collapse)
Try      python visualize.py curves RUN
         python visualize.py curves RUN ANOTHER_RUN      the second drawn over the first
Change   another panel is one more draw_* function, and an entry in `panels`; a new term of the
         loss gets a panel by itself
Tests    pytest tests/figures/test_curves.py

metrics.jsonl has a line of JSON for each log line ("loss", "dino", "dino_entropy", ..., means
over the steps since the line before) and one for each evaluation ("knn", "patch_miou"). The
panels get these rows as dictionaries; training/log.py says what the numbers mean.
"""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from machinery.flags import near_path
from machinery.page import pyplot, save
from training.stored import read_config
from training.log import collapse

# How the curves of a panel are told apart, the first, the second, ...: by dashes, because the
# colours belong to the runs where several are drawn.
DASHES = ("-", "--", ":", "-.")

OBJECTIVES = {"dino": "class tokens", "ibot": "masked patches"}  # what each of them is about
SCHEDULES = ("lr", "weight_decay", "teacher_temp", "momentum")

# What a row of metrics.jsonl has beside its losses. Any other name is a term of the loss.
NO_LOSSES = {
    "step", "loss", "rank", "grad_norm", "images_per_second", "waiting", "memory_gb",
    *SCHEDULES}

# The colour of a shade: an illness of training.log.collapse -> its colour.
SHADES = {"one prototype": "tab:red", "uniform collapse": "tab:purple"}

CAPTION = (
    "H: entropy of a target, what the teacher leaves open. KL: what the student still has to "
    "learn. mean H: entropy of the mean target. ln K: what a uniform answer costs. Shaded: all "
    "images get one answer (one prototype), or every answer is 1/K (uniform collapse).")

# ----------------------------------------------------------------------------------------------
# What a run has written


@dataclass
class History:
    """One run: its settings, and what it wrote while it trained."""

    name: str
    config: dict  # the fields of its config.json
    steps: list[dict]  # the rows of log lines
    evaluations: list[dict]  # the rows of evaluations
    patch_evaluations: list[dict]  # those of the patch tokens, by --dense_every
    colour: str = ""  # of all its curves; empty, for a run alone: each curve has its own

    @property
    def prototypes(self) -> dict[str, int]:
        """The objectives of this run by name, and K of each."""
        # Patches have a number of their own where they have a head of their own.
        of_patches = "ibot_n_prototypes" if self.config["separate_head"] else "n_prototypes"
        fields = {"dino": "n_prototypes", "ibot": of_patches}
        return {
            term: self.config[field]
            for term, field in fields.items() if f"{term}_kl" in self.steps[0]}

    @property
    def further_terms(self) -> list[str]:
        """The terms of the loss that have no targets, such as koleo; new ones, too."""
        known = set(NO_LOSSES)
        for term in self.prototypes:
            for ending in ("", "_entropy", "_kl", "_mean_entropy", "_in_use"):
                known.add(term + ending)
        names = {name: None for row in self.steps for name in row}  # each once, in order
        return [name for name in names if name not in known]


def read_history(run: Path) -> History:
    """What is in a run directory; ValueError if there is none, or no step in it yet."""
    file = run / "metrics.jsonl"
    if not run.exists():
        raise ValueError(f"{run}: there is no such directory of a run{near_path(run)}")
    if not file.exists():
        raise ValueError(f"{run}: no metrics.jsonl in it; is it the directory of a run?")

    # A row with a loss is of a log line, one with a k-NN or an mIoU is of an evaluation.
    # The last line of a run that was killed may be half written: it is left out.
    rows = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise ValueError(f"{run}: its metrics.jsonl has no step yet")
    evaluations = [row for row in rows if "knn" in row]
    patch_evaluations = [row for row in rows if "patch_miou" in row]
    return History(run.resolve().name, read_config(run / "config.json"), steps, evaluations,
                   patch_evaluations)


def collapsed_spans(history: History, term: str) -> list[tuple[float, float, str]]:
    """Where the targets of an objective say that it has collapsed: (from step, to step, name).

    A row is about the steps since the row before. Example: of the rows 20, 40, 60 and 80 those
    at 40 and 60 are collapsed, so the answer is (20, 60, "one prototype").
    """
    spans = []
    before = 0
    for row in history.steps:
        illness = collapse(row, term, math.log(history.prototypes[term]))
        if illness and spans and spans[-1][1:] == (before, illness):
            spans[-1] = (spans[-1][0], row["step"], illness)  # the same one goes on
        elif illness:
            spans.append((before, row["step"], illness))
        before = row["step"]
    return spans


# ----------------------------------------------------------------------------------------------
# The panels: each is drawn into an axis, of one run or of several


def draw_line(axis, history: History, rows: list[dict], key: str, label: str, number: int = 0,
              scale: float = 1.0):
    """One curve over the steps: `key` of all rows that have it, as the number-th of a panel."""
    x = [row["step"] for row in rows if key in row]
    y = [scale * row[key] for row in rows if key in row]
    if not x:  # another run has this curve
        return

    # A short run has dots as well, because a line through a single point would be invisible.
    axis.plot(x, y, "." * (len(x) < 10) + DASHES[number % len(DASHES)], label=label,
              color=history.colour or f"C{number}")


def draw_level(axis, y: float, label: str, colour: str = ""):
    """A horizontal line to compare the curves with."""
    axis.axhline(y, color=colour or "gray", ls=(0, (1, 2)), lw=1.2, label=label)


def shade(axis, histories: list[History], term: str):
    """Shade where the objective has collapsed: in the colour of the illness, or of the run."""
    # A shade is pale and lies behind the curves: those of a run that is well stay readable.
    for history in histories:
        for first, last, illness in collapsed_spans(history, term):
            axis.axvspan(first, last, color=history.colour or SHADES[illness], alpha=0.15, lw=0,
                         label=illness)


def draw_objective(axis, histories: list[History], term: str):
    """The loss of one objective and its two parts, in nats, beside the line of ln K."""
    histories = [history for history in histories if term in history.prototypes]
    curves = {term: "loss = H + KL", f"{term}_entropy": "H", f"{term}_kl": "KL"}

    # The three share one scale, which begins at 0: H and KL are seen to add up to the loss.
    for history in histories:
        for i, (key, label) in enumerate(curves.items()):
            draw_line(axis, history, history.steps, key, label, i)

    # A uniform answer costs ln K, whatever the target: there the network knows nothing.
    for K in dict.fromkeys(history.prototypes[term] for history in histories):
        draw_level(axis, math.log(K), f"ln K = {math.log(K):.2f}")
    shade(axis, histories, term)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.set_title(f"{term}: {OBJECTIVES[term]}")
    axis.set_ylabel("nats")


def draw_use(axis, histories: list[History]):
    """Whether all prototypes are in use: the entropy of the mean target is then near ln K."""
    # exp of this entropy is a number of prototypes. Example: 5.43 nats are 228 of K = 256, as if
    # 228 were used equally and the others never.
    for history in histories:
        for i, (term, K) in enumerate(history.prototypes.items()):
            draw_line(axis, history, history.steps, f"{term}_mean_entropy", f"mean H, {term}",
                      i)
            draw_level(axis, math.log(K), f"ln K = {math.log(K):.2f}")
            shade(axis, [history], term)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.set_title("prototypes in use")
    axis.set_ylabel("nats")


def draw_rank(axis, histories: list[History]):
    """In how many directions the features spread: near 1 in a collapse."""
    for history in histories:
        draw_line(axis, history, history.steps, "rank", "effective rank")
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.set_title("rank of the features")
    axis.set_ylabel("directions")


def draw_knn(axis, histories: list[History]):
    """How often the teacher's neighbours are right, and what raw pixels reach."""
    # Images without labels are judged by other-view retrieval (evaluation/judge.py). Runs of
    # earlier versions have not written down which of the two it was.
    protocols = {}
    for history in histories:
        if not history.evaluations:
            continue
        first = history.evaluations[0]
        protocols[first.get("protocol", "k-NN(20), or other-view retrieval")] = None
        draw_line(axis, history, history.evaluations, "knn", "teacher", scale=100)
        if "pixels" in first:
            draw_level(axis, 100 * first["pixels"], "raw pixels", history.colour)
    axis.set_title("the teacher's features")
    axis.set_ylabel(f"{' or '.join(protocols)}, %")


def draw_patches(axis, histories: list[History]):
    """How well labelled patches name the patches of other images: --dense_every."""
    for history in histories:
        draw_line(axis, history, history.patch_evaluations, "patch_miou", "teacher", scale=100)
    axis.set_title("the teacher's patch tokens")
    axis.set_ylabel("patch k-NN, mIoU, %")


def draw_term(axis, histories: list[History], name: str):
    """A term of the loss as it is, or the whole loss."""
    for history in histories:
        draw_line(axis, history, history.steps, name, name)
    axis.set_title("loss: all terms, weighted" if name == "loss" else name)
    axis.set_ylabel(name)


def draw_schedules(axis, histories: list[History]):
    """Learning rate, weight decay, temperature and momentum, each divided by its peak."""
    # They differ by factors of thousands, so each is shown as a share of its own peak. The peak of
    # a run alone stands in the legend; several runs have several.
    for history in histories:
        for i, key in enumerate(SCHEDULES):
            peak = max(row.get(key, 0) for row in history.steps)
            label = key if history.colour else f"{key} ({peak:.2g})"
            draw_line(axis, history, history.steps, key, label, i, 1 / (peak or 1))
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.set_title("schedules")
    axis.set_ylabel("share of the largest so far")


def panels(histories: list[History]) -> dict[str, Callable]:
    """What there is to draw of these runs: name of a panel -> function(axis, histories)."""
    objectives = {term: None for history in histories for term in history.prototypes}
    further = {term: None for history in histories for term in history.further_terms}
    chosen = {term: partial(draw_objective, term=term) for term in objectives}

    # The weighted sum says something new only where it has not exactly one part with a panel.
    if len(objectives) + len(further) != 1:
        chosen["loss"] = partial(draw_term, name="loss")
    chosen |= {term: partial(draw_term, name=term) for term in further}

    # TO ADD A PANEL: one entry more here, a function of an axis and the runs.
    if objectives:
        chosen["use"] = draw_use
    chosen["rank"] = draw_rank
    if any(history.evaluations for history in histories):
        chosen["knn"] = draw_knn
    if any(history.patch_evaluations for history in histories):
        chosen["patches"] = draw_patches
    return chosen | {"schedules": draw_schedules}


def finish_panel(axis, histories: list[History]):
    """The axis of steps, and a legend below the panel, where it cannot hide a curve."""
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)

    # Curves of several runs, and shades that come again, have the same labels.
    handles, labels = axis.get_legend_handles_labels()
    entries = dict(zip(labels[::-1], handles[::-1]))  # of equal labels the first one stays
    if len(entries) < 2:  # the axis has the name of the only curve
        return

    # The legend hangs half an inch below the panel, as a share of its height.
    inches = axis.get_window_extent().height / axis.figure.dpi
    names = list(dict.fromkeys(labels))
    legend = axis.legend([entries[name] for name in names], names, loc="upper center",
                         bbox_to_anchor=(0.5, -0.42 / inches), ncols=2, frameon=False,
                         columnspacing=1.2, borderpad=0)

    # The same curve of several runs has one entry, in grey: the colour is that of the run.
    if histories[0].colour:
        for entry in (*legend.get_lines(), *legend.get_patches()):
            entry.set_color("0.3")


def draw_curves(runs: list[Path], path: Path) -> Path:
    """metrics.jsonl of these runs -> a page of panels at `path`, which is returned.

    ValueError where there is no run, or no step in it yet.
    """
    # Runs of equal names, such as a/run and b/run, are told apart by their paths.
    histories = [read_history(run) for run in runs]
    if len({history.name for history in histories}) < len(runs):
        for history, run in zip(histories, runs):
            history.name = str(run)

    # A run alone has a colour for each curve of a panel, several have one each. matplotlib has ten
    # that are told apart easily; more runs go through the rainbow, in the order in which they
    # were named.
    plt = pyplot()
    if len(histories) > 10:
        rainbow = plt.get_cmap("turbo")
        for i, history in enumerate(histories):
            history.colour = rainbow(i / (len(histories) - 1))
    elif len(histories) > 1:
        for i, history in enumerate(histories):
            history.colour = f"C{i}"

    # Four panels side by side at most, and as many in each row. Example: five make rows of three
    # and two.
    drawn = list(panels(histories).values())
    rows = math.ceil(len(drawn) / 4)
    columns = math.ceil(len(drawn) / rows)

    # In inches: a panel is 2.5 wide and 1.9 high. To its left stands a scale, below it a legend.
    # Above all stands the name of the run, or a legend of four names in each row.
    head = 0.45 + 0.25 * math.ceil(len(histories) / 4)
    width = 3.3 * columns
    height = 3.4 * rows + head - 0.5
    fig = plt.figure(figsize=(width, height))
    grid = fig.add_gridspec(rows, columns, left=0.7 / width, right=1 - 0.1 / width,
                            top=1 - head / height, bottom=1 / height, wspace=0.8 / 2.5,
                            hspace=1.5 / 1.9)
    for draw_panel, place in zip(drawn, grid):
        axis = fig.add_subplot(place)
        draw_panel(axis, histories)
        finish_panel(axis, histories)

    # Which run is drawn, or which colour belongs to which.
    names = [history.name for history in histories]
    if len(names) == 1:
        fig.suptitle(names[0], fontsize=12, y=1 - 0.1 / height, va="top")
    else:
        lines = [plt.Line2D([], [], color=history.colour, lw=3) for history in histories]
        fig.legend(lines, names, ncols=4, frameon=False, loc="upper center", fontsize=11)
    return save(fig, path, CAPTION)


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "RUN [RUN ...]"


@dataclass
class Config:
    # -- curves
    output: str = ""  # the picture to write; empty: curves.png in the run, of several runs here


def draw(arguments: list[str], config: Config) -> Path:
    """Losses, what is in use, k-NN and schedules of one run, or of several in one picture."""
    runs = [Path(run) for run in arguments]
    path = runs[0] / "curves.png" if len(runs) == 1 else Path("curves.png")
    return draw_curves(runs, Path(config.output) if config.output else path)
