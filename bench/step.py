"""Step: how fast a training step is, and what each idea in it brings.

    preset --> one made-up batch --> train.train_step ------------------+
                                          |                             +--> ratio, by pairs
                                     the same step, an idea taken out --+
                                          |
    matrix products counted  /  seconds  /  the device's matrix ceiling = share of the hardware

Idea     Seconds alone say little, because they depend on the machine and on what else it does.
         So a step is compared with two things that are measured in the same minutes on the same
         machine: the most that the hardware can do, and the plain code of the same step
         (plain.py).
Paper    PaLM (Chowdhery 2022) appendix B: the share of the ceiling, there "model FLOPs
         utilisation"
Try      python -m bench step shapes --steps 3 --plain
Change   another stage of the breakdown is one entry of `stages` in Step.stages
Tests    pytest tests/bench/test_step.py

Letters  B images of the batch. A version is the step with some ideas taken out: "ours" with
         none of them, "plain" with all of them.
"""

import contextlib
import ctypes
import gc
import itertools
import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor

import train
from bench.count import count_work, matrix_ceiling
from bench.plain import IDEAS, DefaultAdamW, without
from images.data import Images, cached, open_images
from images.files import in_channels
from machinery.clock import FIRST_STEPS, Clock, time_when_done
from machinery.flags import UsageError
from machinery.process import Process
from training.config import Config as TrainingConfig
from training.memory import keep_freed_memory, peak_memory_gb
from training.optim import OPTIMIZERS, LossScale, parameter_groups

# ----------------------------------------------------------------------------------------------
# How versions of a step are compared
#
# All versions run in one process, on the same networks and the same batch, by turns. A machine
# becomes slower and faster from minute to minute, as other programs come and go and as it heats
# up. What runs within one turn meets the same conditions; so ratios are formed within a turn,
# and the median of these ratios is what is told. Every second turn goes backwards through the
# versions, so that none of them is always the later one.
#
# Example: two versions, three turns. During the second one another program takes half of the
# machine, and it ends before the third turn does.
#
#     turn   order          ours     plain    plain / ours
#       1    ours, plain    2.0 s    3.0 s        1.50
#       2    plain, ours    4.0 s    6.2 s        1.55
#       3    ours, plain    3.0 s    3.1 s        1.03
#     median                3.0 s    3.1 s        1.50
#
# The ratio that is told is 1.50. The medians of the seconds have the ratio 3.1 / 3.0 = 1.03,
# since they come from different turns.

# ----------------------------------------------------------------------------------------------
# Settings

# What --without may name. Half precision and compiling are ideas, too, but need no plain code:
# it is enough to switch them off.
WITHOUT = ("none", "each", *IDEAS, "bf16", "compile")


@dataclass
class Config(TrainingConfig):
    """What every benchmark needs: the settings of a training run, and these."""

    # -- bench
    steps: int = 8  # steps or batches that are timed, after a few that are not
    images: int = 0  # images in the data set, for --auto_scale; 0: as many as the preset's has
    json: str = ""  # a file for all that was measured


@dataclass
class StepConfig(Config):
    # -- step
    plain: bool = False  # time the plain version of the step, too, in the same precision
    without: Literal[*WITHOUT] = "none"  # time the step with this idea taken out, too; or each


# ----------------------------------------------------------------------------------------------
# What measures: seconds by stage, and the most memory


class Stopwatch:
    """Seconds by stage. Of stages within stages, each second belongs to the innermost one.

    Example: the student's forward pass takes 5 seconds, 2 of them in its heads. Then 3 are
    booked under "student forward" and 2 under "heads", and the stages add up to the whole.
    """

    def __init__(self, process: Process):
        self.process = process
        self.seconds = defaultdict(float)  # by the name of the stage
        self.inside = ["nothing"]  # the stages that have begun and not ended; the last counts
        self.mark = time_when_done(process)

    def lap(self):
        """Book the time since the last lap under the innermost stage."""
        moment = time_when_done(self.process)
        self.seconds[self.inside[-1]] += moment - self.mark
        self.mark = moment

    def stage(self, name: str, function):
        """The function, with its time booked under that name."""

        def timed(*args, **kwargs):
            # What ran until here belongs to the stage around this one, and so does what comes
            # after it; hence a lap at either end.
            self.lap()
            self.inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.lap()
                self.inside.pop()

        return timed


class Memory:
    """The most memory, in GB, that was held at once since `begin`.

    That of the GPU, or else of this process. Where the system does not let the peak be reset
    (it does on Linux), it is the peak since the process started.
    """

    forget = Path("/proc/self/clear_refs")  # on Linux; "5" written there resets the peak

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.forget.exists():
            # Memory that an earlier version has freed must not count for the next one. Python
            # lets go of what only cycles hold, and the C library returns its free pages to the
            # system, which training has told it to keep (keep_freed_memory).
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            self.forget.write_text("5")

    def peak_gb(self) -> float:
        if self.device.type == "cpu" and self.forget.exists():
            # VmHWM, the "high water mark" of resident memory, is a line such as
            # "VmHWM:  3145728 kB".
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 2**20
        return peak_memory_gb(self.device)


# ----------------------------------------------------------------------------------------------
# What a step is fed


def noise(count: int, channels: int = 3) -> Images:
    """Images of no content and of ImageNet's usual size, 500 x 375 pixels."""
    # One image serves for all: what a step costs does not depend on what its images show.
    image = in_channels(torch.randint(256, (channels, 375, 500), dtype=torch.uint8), channels)
    return Images("noise", ([image] * count).__getitem__, [f"noise-{i}" for i in range(count)])


def made_up_batch(config: Config, process: Process) -> dict:
    """A batch as the loader makes it, of noise; its crops are on the device already."""
    # No workers, which would only cost time to start, and no other processes.
    alone = replace(config, num_workers=0)
    images = noise(config.batch_size_per_gpu, config.in_chans)
    loader = train.stage_loader(0, 1, images, alone, Process(process.device))
    batch = next(iter(loader))

    # The step shall be timed without the way to the device: that is the loader's business, and
    # `python -m bench data` and `from_files` below are about it.
    for name in ("global_crops", "local_crops"):
        batch[name] = batch[name].to(process.device)
    return batch


# ----------------------------------------------------------------------------------------------
# One version of the step


class Step:
    """train.train_step on a made-up batch, with some ideas taken out.

    networks: (student, teacher, centerings). out: the ideas that are taken out, names of IDEAS,
    "bf16" or "compile". A call does some steps, by default one, and returns the seconds of one.
    """

    def __init__(self, networks, batch: dict, config: Config, process: Process,
                 out: tuple = ()):
        self.student, self.teacher, self.centerings = networks
        self.batch = batch
        self.process = process
        self.out = out
        self.config = replace(config, precision="fp32") if "bf16" in out else config

        # The fused AdamW is part of the idea "foreach", but it is an object that lives as long
        # as the version; so it is chosen here and not replaced in `taken_out`.
        make_optimizer = OPTIMIZERS[config.optimizer]
        if "foreach" in out and config.optimizer == "adamw":
            make_optimizer = DefaultAdamW
        groups = parameter_groups(self.student, config.layerwise_decay,
                                  config.patch_embed_lr_mult)
        self.optimizer = make_optimizer(groups)
        fp16 = self.config.precision == "fp16"
        self.scaler = LossScale().to(process.device) if fp16 else None

    def share_moments(self, other: "Step"):
        """Versions with the same optimizer need not keep its moments twice."""
        if type(self.optimizer) is type(other.optimizer):
            self.optimizer = other.optimizer

    @contextlib.contextmanager
    def taken_out(self):
        """Inside, train.train_step is this version: it does without the ideas in `out`."""
        replaced = [idea for idea in self.out if idea in IDEAS]
        # "force_eager" runs compiled functions as they were before they were compiled.
        stance = "force_eager" if "compile" in self.out else "default"
        # The versions compile the same functions in different ways. PyTorch keeps eight graphs of
        # a function and would run the ninth one, of some later version, without compiling it.
        more_graphs = torch._dynamo.config.patch(recompile_limit=128)
        with without(replaced), torch.compiler.set_stance(stance), more_graphs:
            yield

    def run(self, batch: dict | None = None) -> dict:
        """One step on `batch`, by default the made-up one; returns the figures of the step."""
        # Step 500 of 1,000, with epochs of 100 steps: at the start of a run some parts rest,
        # and a step without them would be too cheap.
        schedule = train.schedules(500, 100, 1000, self.config, self.process)

        # train.ema_update and train.train_step are looked up here, at every step, because
        # `without` and Stopwatch put others in their place for a while.
        learner = train.Learner(self.student, self.teacher, self.centerings, self.optimizer,
                                self.scaler, train.ema_update)
        return train.train_step(learner, batch or self.batch, schedule, self.config,
                                self.process)

    def __call__(self, count: int = 1) -> float:
        # Replacing the functions is no part of the step, so the clock starts after it.
        with self.taken_out():
            begun = time_when_done(self.process)
            for _ in range(count):
                self.run()
            return (time_when_done(self.process) - begun) / count

    def peak_gb(self) -> float:
        """The most memory during two steps, which also warm up, in GB."""
        memory = Memory(self.process.device)
        memory.begin()
        self()  # makes the optimizer's moments where there are none yet, at its end
        self()  # so this one is the first that holds moments and activations at the same time

        # The moments are freed again, so that they do not count for another version, which may
        # have moments of its own.
        self.optimizer.state.clear()
        return memory.peak_gb()

    def stages(self) -> dict[str, list[tuple[object, str]]]:
        """The stages of a step by name -> the functions in it: (whose, under which name).

        A stage may lie within another one: heads within the forward passes, and all of them
        within "other", which is the whole step and so gets the seconds of no other stage.
        """
        heads = [*self.student.heads().values(), *self.teacher.heads().values()]
        losses = []
        for centering in self.centerings.values():
            losses += [(centering, "forward"), (centering, "update")]
        for name in ("make_targets", "view_pair_loss", "patch_loss", "koleo_loss"):
            losses.append((train, name))

        # One line for each stage, in the order of the table.
        stages = {}
        stages["views"] = [(train, "make_views")]
        stages["teacher"] = [(self.teacher, "forward")]
        stages["student forward"] = [(self.student, "forward")]
        stages["heads"] = [(head, "forward") for head in heads]
        stages["loss"] = losses
        stages["backward"] = [(Tensor, "backward")]
        stages["optimiser"] = [(train, "clip_gradients"), (self.optimizer, "step")]
        stages["EMA"] = [(train, "ema_update")]
        stages["log"] = [(train, "step_figures")]
        stages["other"] = [(self, "run")]
        return stages

    def breakdown(self, steps: int = 2) -> dict:
        """Seconds of a step by stage; the device is waited for at every border of a stage."""
        # Waiting keeps the host from running ahead of a GPU, so these seconds may add up to
        # more than a step takes. They tell where the time goes, not how much of it there is.
        watch = Stopwatch(self.process)
        with self.taken_out(), contextlib.ExitStack() as stack:
            stages = self.stages()
            for stage, functions in stages.items():
                for owner, name in functions:
                    # Inside `taken_out`, getattr finds the plain code where it is in place.
                    timed = watch.stage(stage, getattr(owner, name))
                    stack.enter_context(patch.object(owner, name, timed))
            for _ in range(steps):
                self.run()
        return {name: watch.seconds[name] / steps for name in stages}


# ----------------------------------------------------------------------------------------------
# The task: build the versions, measure their memory, time them in turns, and tell


def time_step(config: StepConfig, process: Process) -> dict:
    """One training step: speed, memory, share of the hardware, and versions of it beside."""
    keep_freed_memory(process)  # as in training
    taken_out = ideas_taken_out(config, process)

    # Opened before anything is timed, so that a wrong --data is said at once.
    images = None
    if "data" in config.given:
        images = open_images(config.data, config.data_root, config.download, "--data",
                             config.channel_stats)
        if len(images) < config.batch_size_per_gpu:
            raise UsageError(f"--data {config.data} has {len(images)} images, fewer than "
                             f"--batch_size_per_gpu {config.batch_size_per_gpu}")
        images = cached(images, config.cache, config.cache_side, config.num_workers)

    # How long one waits for a first step: building the networks, and compiling them.
    begun = time.perf_counter()
    versions = build_versions(taken_out, config, process)
    versions["ours"]()
    first_step_seconds = time.perf_counter() - begun

    peaks = measure_memory(versions)
    fitting = {name: version for name, version in versions.items() if name in peaks}
    times, ceiling = time_in_turns(fitting, config, process)

    # Two counts of the operations: those of a step with stochastic depth, which skips work, and
    # those of a step that skips none. Papers report utilisation by the second, larger one.
    B = config.batch_size_per_gpu
    masked = masked_patches(versions["ours"].batch)
    done = sum(count_work(config, masked, drop=True).values())
    nominal = sum(count_work(config, masked, drop=False).values())

    rows = {}
    for name, version in versions.items():
        if name not in fitting:
            rows[name] = {"out_of_memory": True}
            continue
        typical = median(times[name])
        # Pairs of the same turn: see the example at the top of this file.
        ratios = [seconds / ours for seconds, ours in zip(times[name], times["ours"])]
        rows[name] = {
            "images_per_second": B / typical, "step_seconds": typical,
            "peak_memory_gb": peaks[name], "share_of_ceiling": done / typical / ceiling,
            "share_nominal": nominal / typical / ceiling, "ratio": median(ratios),
            "memory_ratio": peaks["ours"] / peaks[name]}
        if name in ("ours", "plain"):
            rows[name]["breakdown"] = version.breakdown()

    print_versions(rows)
    print(
        f"ceiling {ceiling / 1e12:.3g} TFLOP/s, one product of {config.precision}; counted are "
        f"{done / B / 1e9:.1f} GFLOP an image ({nominal / B / 1e9:.1f} without skipping)")
    print_stages({name: row["breakdown"] for name, row in rows.items() if "breakdown" in row})

    measured = {
        "first_step_seconds": first_step_seconds, "ceiling_tflops": ceiling / 1e12,
        "gflop_per_image": done / B / 1e9}
    result = result_of(rows, measured)
    if images is not None:
        result["from_files"] = from_files(versions["ours"], images, config, process)
    return result


def in_use(config: Config, process: Process) -> list[str]:
    """The ideas that this configuration has, and that can therefore be taken out."""
    has_blocks = not config.convnet
    has_local_crops = config.local_crops_number > 0 and config.dino_weight > 0
    compiled = config.compile
    if compiled is None:  # the default of train.compile_blocks
        compiled = process.device.type == "cuda"

    # Ideas that are not listed here are in use in every configuration.
    has = {}
    has["packing"] = has_blocks and has_local_crops  # with one crop size nothing is packed
    # In bfloat16 on a CPU vit.attention writes the formula out by itself while training.
    writes_out = process.device.type == "cpu" and config.precision == "bf16"
    has["sdpa"] = has_blocks and not writes_out
    has["skipping"] = has_blocks and config.drop_path_rate > 0
    has["bf16"] = config.precision == "bf16"
    has["compile"] = compiled
    return [name for name in (*IDEAS, "bf16", "compile") if has.get(name, True)]


def ideas_taken_out(config: StepConfig, process: Process) -> dict[str, tuple[str, ...]]:
    """The versions that were asked for, by name -> the ideas that are taken out of each.

    Example: --plain --without packing gives {"ours": (), "plain": ("packing", "sdpa", ...),
    "without packing": ("packing",)}. UsageError for an idea that is not in use.
    """
    ideas = in_use(config, process)
    if config.without not in ("none", "each", *ideas):
        raise UsageError(f"--without {config.without}: this step does without it already "
                         f"(--precision {config.precision}, --compile, --drop_path_rate "
                         f"{config.drop_path_rate}); it has {', '.join(ideas)}")

    taken_out = {"ours": ()}
    if config.plain:
        # The precision stays, because the papers' code computed in half precision, too.
        taken_out["plain"] = tuple(idea for idea in ideas if idea != "bf16")
    if config.without == "each":
        single = ideas
    else:
        single = [config.without] if config.without != "none" else []
    for idea in single:
        taken_out[f"without {idea}"] = (idea,)
    return taken_out


def build_versions(taken_out: dict[str, tuple[str, ...]], config: Config,
                   process: Process) -> dict[str, Step]:
    """The versions by name. All of them train the same two networks on the same batch."""
    student, teacher = train.build(config, process)
    centerings = train.build_centerings(config).to(process.device)
    batch = made_up_batch(config, process)
    versions = {}
    for name, out in taken_out.items():
        versions[name] = Step((student, teacher, centerings), batch, config, process, out)

    # Each version takes over the optimizer of the first one that has an equal one.
    for version, other in itertools.combinations(versions.values(), 2):
        other.share_moments(version)
    return versions


def measure_memory(versions: dict[str, Step]) -> dict[str, float]:
    """The most memory that each version holds during a step, in GB; all are warm afterwards.

    A version that needs more memory than the GPU has is missing. Without "ours" there is
    nothing to compare with, so then PyTorch's error goes on.
    """
    peaks = {}
    for name, version in versions.items():
        try:
            peaks[name] = version.peak_gb()
        except torch.OutOfMemoryError:
            if name == "ours":
                raise
            # Like the others, it leaves no moments behind that would count for the next one.
            version.optimizer.state.clear()

    # Measuring has let go of the moments. One more step of each makes them anew, so that no
    # step that is timed has to.
    for name in peaks:
        versions[name]()
    return peaks


def time_in_turns(versions: dict[str, Step], config: Config,
                  process: Process) -> tuple[dict[str, list[float]], float]:
    """(the seconds of each version, one for each turn; the ceiling in operations a second).

    The versions go there and back, as said at the top of this file: a b c, c b a, a b c, ...
    A turn is one step, or on a GPU up to five. All turns together are --steps steps, rounded up
    to whole turns, and at least two turns where two steps or more were asked for.
    """
    # A GPU prepares the next batch beside the present step, but not if it is waited for after
    # each. So it is waited for after blocks of steps. A block is at most half of the steps,
    # because a single turn has no way back, and its ratio is no median.
    block = max(1, min(5, config.steps // 2)) if process.device.type == "cuda" else 1
    times = {name: [] for name in versions}
    ceiling = 0.0
    there = list(versions)
    back = there[::-1]
    for turn in range(math.ceil(config.steps / block)):
        # The ceiling is what the hardware can do, so it is the best of all turns. It is
        # measured beside the steps, because a CPU's clock depends on how warm it is.
        ceiling = max(ceiling, matrix_ceiling(config.precision, process))
        for name in there if turn % 2 == 0 else back:
            times[name].append(versions[name](block))
    return times, ceiling


def masked_patches(batch: dict) -> int:
    """How many patches the student has to guess; 0 where nothing is masked."""
    if "mask_weights" not in batch:
        return 0
    return int((batch["mask_weights"] > 0).sum())  # padding has the weight 0


def print_versions(rows: dict[str, dict]):
    """A line for each version: seconds, speed, memory, shares, and the ratio to "ours"."""
    print(f"{'':20s}  seconds  images/s  peak GB   of the ceiling   times our seconds")
    for name, row in rows.items():
        if "out_of_memory" in row:
            print(f"{name:20s} out of memory")
            continue
        ratio = "" if name == "ours" else f"{row['ratio']:15.2f} x"
        print(f"{name:20s} {row['step_seconds']:8.3f} {row['images_per_second']:9.1f} "
              f"{row['peak_memory_gb']:8.2f} {row['share_of_ceiling']:8.1%} "
              f"({row['share_nominal']:5.1%}){ratio}")


def print_stages(columns: dict[str, dict]):
    """A line for each stage, and a column for each version: seconds, and share of the sum."""
    heading = "".join(f"{name:>24s}" for name in columns)
    print(f"\n{'stage':20s}{heading}")
    for stage in columns["ours"]:
        line = f"{stage:20s}"
        for seconds in columns.values():
            share = seconds[stage] / sum(seconds.values())
            line += f"{seconds[stage]:14.4f} s {share:7.1%}"
        print(line)


def result_of(rows: dict[str, dict], measured: dict) -> dict:
    """What --json writes: our row at the top, the other versions inside."""
    rows = dict(rows)
    ours = dict(rows.pop("ours"))
    # Of ours to itself these are 1. At the top the two names stand for the plain version.
    del ours["ratio"]
    del ours["memory_ratio"]
    result = ours | measured
    if "plain" in rows:
        result["plain"] = rows["plain"]
        for name in ("ratio", "memory_ratio"):
            if name in rows["plain"]:  # not where plain was out of memory
                result[name] = rows["plain"][name]

    # "without packing" -> "packing"
    result["without"] = {}
    for name, row in rows.items():
        if name.startswith("without"):
            result["without"][name.split()[1]] = row
    return result


# ----------------------------------------------------------------------------------------------
# The same step with images from files


def from_files(version: Step, images: Images, config: Config, process: Process) -> dict:
    """The step fed by the loader: images a second, and the share of time that it waits."""
    # The clock leaves its first five steps out: the workers begin with full queues, or empty
    # ones, and neither says how fast they are in the long run.
    total = config.steps + FIRST_STEPS
    clock = Clock(0, total)
    batches = iter(train.stage_loader(0, total, images, config, process))
    # As in training nobody waits for the device between two steps, so that the next batch is
    # copied and coloured beside the present one.
    for step in range(total):
        if step == FIRST_STEPS:
            begun = time_when_done(process)
        version.run(clock.wait(batches))
        clock.tick()
    seconds = (time_when_done(process) - begun) / config.steps

    rate = config.batch_size_per_gpu / seconds
    print(f"\nfrom {config.data}, {config.num_workers} workers: {rate:.1f} images/s, "
          f"{clock.waiting:.0%} of the time spent waiting for them")
    return {"images_per_second": rate, "waiting": clock.waiting}
