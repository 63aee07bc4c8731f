"""Ablate: what happens to training when one ingredient is taken out.

    preset --> a short run as it is ------------------+
           --> a short run without centering ---------+--> table: k-NN, H, KL, rank, verdict
           --> a short run without sharpening, ... ---+--> ablate.png: healthy, and collapsed

Idea     Centering and sharpening pull in opposite directions. Without centering every image gets
         the same prototype; without sharpening every image gets all prototypes alike. The
         entropy of the targets tells the two apart, which the loss does not. What the preset
         does not have is added and not taken out, so that every ingredient has a row.
Paper    DINO sec. 5.3 and fig. 7 (both collapses), table 7 (ingredients)
Try      python -m bench ablate shapes --without centering --epoch_length 100
Change   another ingredient is one entry of INGREDIENTS
Tests    pytest tests/bench/test_ablate.py
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.speedrun import MeasuredRun, open_run
from bench.step import Config
from machinery.flags import UsageError
from machinery.page import pyplot, require_kind, save
from machinery.process import Process
from training.check import check
from training.log import diagnose
from training.recipes import SMALL_IBOT

# ----------------------------------------------------------------------------------------------
# What can be taken out


@dataclass
class Ingredient:
    """One ingredient of the method: whether a run has it, and the settings without and with it.

    Settings are names and values of training/config.py.
    """

    has: Callable[[Config], bool]
    without: Callable[[Config], dict]
    added: dict  # the settings that bring it to a run which has none


def as_soft_as_the_student(config: Config) -> dict:
    """A teacher without sharpening: its temperature is the student's, from the first step on."""
    return dict(teacher_temp=config.student_temp, warmup_teacher_temp=config.student_temp)


INGREDIENTS = {
    # the bias that keeps all prototypes in use
    "centering": Ingredient(lambda c: c.centering != "none", lambda c: dict(centering="none"),
                            dict(centering="ema")),
    # a teacher that is more certain than the student
    "sharpening": Ingredient(lambda c: c.teacher_temp < c.student_temp, as_soft_as_the_student,
                             dict(teacher_temp=0.04, warmup_teacher_temp=0.04)),
    # a teacher that is the average of past students; without: the student of the step before
    "ema": Ingredient(lambda c: c.momentum_teacher > 0,
                      lambda c: dict(momentum_teacher=0.0, final_momentum_teacher=0.0),
                      dict(momentum_teacher=0.99, final_momentum_teacher=1.0)),
    # local crops, which only the student sees
    "multicrop": Ingredient(lambda c: c.local_crops_number > 0,
                            lambda c: dict(local_crops_number=0), dict(local_crops_number=2)),
    # features of different images pushed apart
    "koleo": Ingredient(lambda c: c.koleo_weight > 0, lambda c: dict(koleo_weight=0.0),
                        dict(koleo_weight=0.1)),
    # targets that are balanced within each batch, in place of DINO's running centre
    "sinkhorn": Ingredient(lambda c: c.centering == "sinkhorn", lambda c: dict(centering="ema"),
                           dict(centering="sinkhorn")),
    # masked patches, whose targets are the teacher's (iBOT)
    "mask": Ingredient(lambda c: c.learns_patches, lambda c: dict(ibot_weight=0.0), SMALL_IBOT)}


@dataclass
class AblateConfig(Config):
    # -- ablate
    without: tuple[str, ...] = tuple(INGREDIENTS)  # ingredients, with blanks or commas between
    output: str = "ablate.png"  # file of the figure


def versions_of(config: AblateConfig) -> dict[str, Config]:
    """The runs by name: the preset as it is, and one for each ingredient; UsageError for others.
    """
    # A collapse shows within one epoch of a small preset, which is a minute on a laptop. That
    # leaves no epoch for a warm-up, of the learning rate or of the teacher's temperature, nor for
    # prototypes that rest.
    if "epochs" not in config.given:
        config = replace(config, epochs=1)
        for name in ("warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer_epochs"):
            if name not in config.given:
                config = replace(config, **{name: 0})
    versions = {"as it is": config}

    # A convnet has no patches to mask, so of all ingredients it is spared this one.
    names = config.without
    if config.convnet and "without" not in config.given:
        names = tuple(name for name in names if name != "mask")

    # Both `--without a,b` and `--without a b`.
    for name in filter(None, ",".join(names).split(",")):
        if name not in INGREDIENTS:
            raise UsageError(f"--without {name}: choose from {', '.join(INGREDIENTS)}")
        ingredient = INGREDIENTS[name]
        if ingredient.has(config):
            title = f"without {name}"
            settings = ingredient.without(config)
        else:
            title = f"with {name}"
            settings = ingredient.added

        # --auto_scale leaves alone what a flag has named, such as the momentum of the teacher.
        given = (*config.given, *settings)
        versions[title] = replace(config, given=given, **settings)

    for version in versions.values():
        check(version)
    return versions


# ----------------------------------------------------------------------------------------------
# The runs


class ShortRun(MeasuredRun):
    """A run that is judged at its end alone: what it had to beat is the same for all of them."""

    def judge_the_start(self):
        self.figures["untrained"] = self.untrained
        if self.untrained is None:
            self.figures["untrained"] = self.judge(self.whole_backbone())

    def evaluate(self):
        # Without the line and the warning of train.Run: the table says both.
        self.take_off(lambda: self.figures.update(knn=self.judge(self.whole_backbone())))


def verdict_of(run: ShortRun) -> str:
    """What the log would have warned of at the end of the run, or "learns"."""
    illness = diagnose(run.last_row, run.config)
    if not illness and run.figures["knn"] is not None:
        illness = run.judge.diagnose(run.figures)
    return illness[0] if illness else "learns"


def ablate(config: AblateConfig, process: Process) -> dict:
    """Short runs without one ingredient each: k-NN, entropies, rank and what became of them.

    One epoch each, unless --epochs says otherwise. Draws ablate.png (--output).
    """
    # Asked before the first run, and not after the last one.
    path = Path(config.output)
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}")
    require_kind(path)

    rows = []
    curves = {}  # name of the run -> its rows of the log
    untrained = None
    for name, version in versions_of(config).items():
        print(f"\n-- {name}")

        # One run after the other, all with the same seed: they see the same images and crops.
        with tempfile.TemporaryDirectory() as folder:
            run = open_run(ShortRun, version, Path(folder), process, untrained=untrained)
            run.begin(None)
            run.train()

        # Before training the networks are the same, but for parts that an ingredient adds. So the
        # first of them is judged for all.
        untrained = run.figures["untrained"]
        rows.append(row_of(name, run))
        curves[name] = run.rows

    print_table(rows, untrained, run.judge.protocol)
    print(f"wrote {draw(rows, curves, run.judge.protocol, path)}")
    return {"untrained": untrained, "runs": rows, "curves": curves}


def row_of(name: str, run: ShortRun) -> dict:
    """The figures of a finished run that the table shows; those of targets are in shares of ln K.
    """
    # The objective of the class tokens, or the only one that there is.
    term, prototypes = next(iter(run.config.objectives.items()))
    ln_k = math.log(prototypes)
    last = run.last_row
    return {
        "run": name, "knn": run.figures["knn"], "entropy": last[f"{term}_entropy"] / ln_k,
        "mean_entropy": last[f"{term}_mean_entropy"] / ln_k, "kl": last[f"{term}_kl"],
        "loss": last[term], "ln_k": ln_k, "term": term, "rank": run.judge.rank,
        "verdict": verdict_of(run), "seconds": run.cost()["seconds"]}


def print_table(rows: list[dict], untrained: float | None, protocol: str):
    """The rows in Markdown, ready for a page; a dash where nothing was judged."""
    start = "" if untrained is None else f", {untrained:.1%} before training"
    print(
        f"\n| run | {protocol}{start} | loss | H / ln K | mean H / ln K | KL | rank | verdict |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        knn = "-" if row["knn"] is None else f"{row['knn']:.1%}"
        print(f"| {row['run']} | {knn} | {row['loss']:.2f} | {row['entropy']:.2f} | "
              f"{row['mean_entropy']:.2f} | {row['kl']:.2f} | {row['rank']:.1f} | "
              f"{row['verdict']} |")


# ----------------------------------------------------------------------------------------------
# The figure

# What a panel shows -> the verdicts of the runs that it may show, the first of which is drawn.
PANELS = {
    "healthy": ("learns",), "all prototypes alike": ("uniform collapse",),
    "one prototype for all": ("one prototype",)}
CAPTION = (
    "Targets of the teacher over the steps of short runs, in shares of ln K, the entropy of a "
    "target that says nothing. Healthy: a target says more (H) than the mean of all, so targets "
    "differ. All prototypes alike: H stays at 1, and there is nothing to learn (KL is 0). One "
    "prototype for all: both entropies are 0.")


def draw(rows: list[dict], curves: dict[str, list[dict]], protocol: str, path: Path) -> Path:
    """A panel for each kind of ending: entropies and KL of a run over its steps. DINO fig. 7.

    protocol: what the runs were judged by, as Judge.protocol says it.
    """
    # One scale for all panels: what is compared are heights.
    plt = pyplot()
    fig, axes = plt.subplots(1, len(PANELS), figsize=(3.2 * len(PANELS), 2.9), sharey=True,
                             layout="constrained")
    for axis, (title, verdicts) in zip(axes, PANELS.items()):
        # Of several runs that ended alike the first is shown, which for the healthy ones is the
        # preset as it is.
        chosen = next((row for row in rows if row["verdict"] in verdicts), None)
        if chosen is None:
            axis.set_title(f"{title}: none of these runs")
            axis.axis("off")
            continue

        # In shares of ln K, the entropy of "all alike": all figures go from 0 to about 1.
        term = chosen["term"]
        steps = [row["step"] for row in curves[chosen["run"]]]
        figures = {
            f"{term}_entropy": "entropy of a target (H)",
            f"{term}_mean_entropy": "entropy of the mean target", f"{term}_kl": "KL: to learn"}
        for name, label in figures.items():
            values = [row[name] / chosen["ln_k"] for row in curves[chosen["run"]]]
            axis.plot(steps, values, label=label)
        # Without images to judge with there is no figure.
        judged = "" if chosen["knn"] is None else f"\n{protocol} {100 * chosen['knn']:.0f} %"
        axis.set_title(f"{title}\n{chosen['run']}{judged}")
        axis.set_xlabel("step")
    axes[0].set_ylabel("share of ln K")

    # One legend for all panels, from the first that has curves.
    drawn = next((axis for axis in axes if axis.lines), None)
    if drawn:
        fig.legend(*drawn.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return save(fig, path, CAPTION)
