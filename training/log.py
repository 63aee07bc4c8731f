"""Log: what the numbers of a step mean, and which of them show that training has failed.

    step 300  dino 3.406 = H 0.994 + KL 2.412 (ln K 5.55, mean H 2.62)  rank 4 ...
                   |           |         |           |         |
                 loss   what the      what is     knowing   are all
                        teacher       still to    nothing   prototypes
                        leaves open   learn                 in use?

Idea     The loss alone cannot tell learning from collapse. A cross-entropy is the sum of an
         entropy and a divergence: only the two apart show whether the teacher says nothing, or
         the student has not learned yet what it says.
Paper    DINO sec. 5.3 and fig. 7 (collapse); RankMe (Garrido 2023) for the effective rank
Try      python train.py --epochs 1 --warmup_epochs 0 --log_every 5
Change   another illness is one more branch in `diagnose`; one of the features in
         evaluation/judge.py (Judge.diagnose)
Tests    pytest tests/training/test_log.py

Letters  n rows (views times images), K prototypes, M masked patches.
"""

import math

import torch
from torch import Tensor

from images.data import Images
from losses import all_sum, effective_rank, entropies
from machinery.clock import Clock
from machinery.flags import UsageError
from training.config import Config

# ----------------------------------------------------------------------------------------------
# Of one step, on the device


@torch.no_grad()
def step_figures(means: dict, targets: dict, weights: Tensor | None, crops: int) -> dict:
    """What the log wants to know of one step beside its losses; tensors that nothing waits for.

    means: the step's losses by name; targets: those of each objective, (n, K); weights (M,) of
    the masked patches; crops: how many global crops the batch has.
    """
    # Entropy of each target, and entropy of their mean. Sharp targets that differ have a small
    # first and a large second figure. Rows of padding (weight 0) do not count.
    figures = {}
    for name, target in targets.items():
        each, of_mean = entropies(target, weights if name == "ibot" else None)
        figures[f"{name}_entropy"] = each
        figures[f"{name}_mean_entropy"] = of_mean

    # The iBOT loss is a mean over all global crops, also those without a mask. To be comparable
    # with the entropy of a target it is shown as a mean over the crops that have one: their
    # weights add up to the number of these crops. Example: 4 crops, of which 2 are masked; a
    # loss of 2.5 is shown as 2.5 * 4 / 2 = 5.
    if "ibot" in means:
        figures["ibot"] = means["ibot"] * crops / weights.sum().clamp(min=1)
    return figures


# ----------------------------------------------------------------------------------------------
# Of an interval: what the figures mean


def collapse(row: dict, term: str, ln_k: float) -> str:
    """The name of the collapse that the targets of an objective show, or nothing.

    row: means of `step_figures` and of the losses, as LogWindow.read gives them.
    """
    # Every target is the uniform distribution, and the student answers it exactly.
    if row[f"{term}_entropy"] > 0.99 * ln_k and row[f"{term}_kl"] < 0.01 * ln_k:
        return "uniform collapse"

    # The targets are sharp, and the same for all images: their mean is sharp, too.
    return "one prototype" if row[f"{term}_mean_entropy"] < 0.05 * ln_k else ""


def diagnose(row: dict, config: Config) -> tuple[str, str] | None:
    """(name, sentence with a remedy) if the targets show one of three failures, else None."""
    # Uniform answers cost ln K, so entropies and losses are compared with it. Example with
    # K = 256, ln K = 5.55: at its end the default run, which is healthy, has H 1.5, KL 1.6
    # and mean H 3.4.
    for term, prototypes in config.objectives.items():
        ln_k = math.log(prototypes)
        illness = collapse(row, term, ln_k)
        if illness == "uniform collapse":
            return illness, (
                f"uniform collapse of {term}: every answer is 1/K (H is ln K); lower "
                "--teacher_temp or raise --lr")
        if illness:
            return illness, (
                f"one prototype of {term} answers for all images (entropy of the mean target "
                "near 0); use --centering ema or sinkhorn, or raise --teacher_temp")

        # The targets tell images apart, but the student still answers as at its first step.
        if abs(row[term] - ln_k) < 0.01 * ln_k and row[f"{term}_entropy"] < 0.5 * ln_k:
            return "ignored teacher", (
                f"the student ignores a teacher of {term} that has something to say (loss is "
                "ln K, H is not); raise --lr, or --freeze_last_layer_epochs")
    return None


def log_line(row: dict, total: int, config: Config, clock: Clock) -> str:
    """One line for the terminal; README.md, "How to read the log", explains its fields."""
    # Where the run is, and of each objective its loss with the two parts of it.
    parts = [f"step {row['step']:6d}/{total} {row['step'] / total:4.0%}"]
    for term, prototypes in config.objectives.items():
        parts.append(f"{term} {row[term]:.3f} = H {row[term + '_entropy']:.3f} + "
                     f"KL {row[term + '_kl']:.3f} (ln K {math.log(prototypes):.2f}, "
                     f"mean H {row[term + '_mean_entropy']:.2f})")

    # Losses without targets, such as KoLeo, have no entropy to be split off.
    for name in row:
        if name not in config.objectives and hasattr(config, f"{name}_weight"):
            parts.append(f"{name} {row[name]:.2f}")

    # The features, the schedules, the machine.
    parts += [
        f"rank {row['rank']:.0f}", f"lr {row['lr']:.1e}", f"m {row['momentum']:.4f}",
        f"{row['images_per_second']:.0f} img/s", f"wait {clock.waiting:.0%}",
        f"{row['memory_gb']:.1f} GB", f"eta {clock.eta}"]
    return "  ".join(parts)


class LogWindow:
    """The figures of the steps since the last log line, kept on the device until they are
    read.
    """

    def __init__(self, images: Images, config: Config):
        self.images = images
        self.config = config
        self.steps = []  # (step, indices of its images, names of broken ones, figures)

    def add(self, step: int, batch: dict, figures: dict):
        """Keep the figures of a step, which may not be computed yet: nothing is read here."""
        # Only the features of the newest step are needed. The indices are copied, because a
        # tensor that comes from a worker holds a file open as long as it lives.
        self.features = figures.pop("features")
        self.steps.append((step, batch["index"].clone(), batch["broken"], figures))

    def read(self, totals: dict, images_seen: int) -> dict:
        """Means over the window, which is empty afterwards.

        UsageError over more steps that were not finite than --nonfinite_steps, or too many images
        that do not decode; totals ["nonfinite"] and ["broken"] count them over the whole run.
        """
        # One transfer for all figures of all steps: here the CPU waits for the GPU.
        names = list(self.steps[-1][-1])
        table = torch.stack([
            torch.stack([figures[name].float() for name in names])
            for *_, figures in self.steps]).tolist()

        # A step that was not finite has changed nothing, which train_step has seen to. It is
        # noticed here, some steps later, and the means are those of the others.
        rows = [dict(zip(names, values)) for values in table]
        for (step, index, _, _), row in zip(self.steps, rows):
            if not row["ok"]:
                self.leave_out(step, index, row, totals)
        finite = [row for row in rows if row["ok"]] or rows

        # A cross-entropy is H + KL: what the teacher leaves open, and what is still to be
        # learned. exp(entropy of the mean target) is the number of prototypes in use, as if all
        # of them were used equally.
        means = {name: sum(row[name] for row in finite) / len(finite) for name in names}
        for term in self.config.objectives:
            means[f"{term}_kl"] = means[term] - means[f"{term}_entropy"]
            means[f"{term}_in_use"] = math.exp(means[f"{term}_mean_entropy"])
        means["rank"] = effective_rank(self.features.nan_to_num()).item()
        del means["ok"]

        self.count_broken(totals, images_seen, self.features.device)
        self.steps.clear()
        return means

    def leave_out(self, step: int, index: Tensor, row: dict, totals: dict):
        """Name the loss and the images of a step that was not finite; too many end the run."""
        # Where all losses are finite, a gradient was not: it overflowed in the backward pass.
        losses = [name for name in row if hasattr(self.config, f"{name}_weight")] + ["loss"]
        ill = [name for name in losses if not math.isfinite(row[name])]
        what = f"the loss ({ill[0]})" if ill else "a gradient"
        images = ", ".join(self.images.names[i] for i in index[:8].tolist())
        found = f"step {step}: {what} is not finite. Images of this process: {images}, ..."
        totals["nonfinite"] = totals.get("nonfinite", 0) + 1
        if totals["nonfinite"] <= self.config.nonfinite_steps:
            print(f"{found} The step is left out", flush=True)
            return
        raise UsageError(
            f"{found} The same command would come to the same step from the last checkpoint: "
            "leave such steps out with --nonfinite_steps 3, or start anew with --no_resume and a "
            "lower --lr, or with --precision fp32")

    def count_broken(self, totals: dict, images_seen: int, device: torch.device):
        """Name the images that were replaced; more than one in a hundred end the run."""
        broken = [name for _, _, names, _ in self.steps for name in names]
        for name in broken:
            print(f"replaced an image that does not decode: {name}", flush=True)

        # All processes add up their numbers, so that all of them stop together. Three broken
        # images are forgiven in any case: a run of a few images would else stop at the first.
        totals["broken"] += int(all_sum(torch.tensor(float(len(broken)), device=device)))
        if totals["broken"] > max(3, 0.01 * images_seen):
            raise UsageError(
                f"--data: {totals['broken']} of {images_seen} images did not decode, more "
                "than one in a hundred; the last are named above")
