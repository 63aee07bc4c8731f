"""Step: how fast a training step is, and what each idea in it brings.

    preset --> one made-up batch --> train.train_step ------------------+
                                          |                             +--> ratio, by pairs
                                     the same step, an idea taken out --+
                                          |
    matrix products counted  /  seconds  /  the device's matrix ceiling = share of the hardware

Idea     A speed means something beside two others, from the same minute on the same machine:
         what the hardware can do at most, and what the plain way of doing it (plain.py) costs.
Paper    none; share of the ceiling: "model FLOPs utilisation" of PaLM (Chowdhery 2022) appendix
         B
Try      python -m bench step shapes --steps 3 --plain
Change   another stage is one line in Step.breakdown
Tests    pytest tests/bench/test_step.py
"""

import contextlib
import ctypes
import gc
import itertools
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
from images.data import Images, cached, in_channels, open_images
from machinery.clock import Clock, time_when_done
from machinery.flags import UsageError
from machinery.process import Process, keep_freed_memory, peak_memory_gb
from training.config import Config as TrainingConfig
from training.optim import OPTIMIZERS, LossScale, parameter_groups


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
    plain: bool = False  # beside it the plain version of the same step, in the same precision
    without: Literal["none", "each", *IDEAS, "bf16", "compile"] = "none"  # less one idea


# ----------------------------------------------------------------------------------------------
# One step, timed


def noise(count: int, channels: int = 3) -> Images:
    """Images of no content and of ImageNet's usual size."""
    image = in_channels(torch.randint(256, (channels, 375, 500), dtype=torch.uint8), channels)
    return Images("noise", ([image] * count).__getitem__, [f"noise-{i}" for i in range(count)])


def made_up_batch(config: Config, process: Process) -> dict:
    """A batch as the loader makes it, of noise; its crops are on the device already."""
    alone = replace(config, num_workers=0)
    loader = train.batches_from(0, 1, noise(config.batch_size_per_gpu, config.in_chans), alone,
                                Process(process.device))
    batch = next(iter(loader))
    return batch | {k: batch[k].to(process.device) for k in ("global_crops", "local_crops")}


class Stopwatch:
    """Seconds by stage. Of stages within stages, each second belongs to the innermost."""

    def __init__(self, process: Process):
        self.process, self.seconds, self.inside = process, defaultdict(float), ["nothing"]
        self.mark = time_when_done(process)

    def lap(self):
        schedule = time_when_done(self.process)
        self.seconds[self.inside[-1]] += schedule - self.mark
        self.mark = schedule

    def stage(self, name: str, function):
        """The function, its time booked under that name."""

        def timed(*args, **kwargs):
            self.lap()
            self.inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.lap()
                self.inside.pop()

        return timed


class Memory:
    """The most memory held at once since `begin`. Where it cannot be reset: since the start."""

    forget = Path("/proc/self/clear_refs")  # Linux: 5 written there resets the peak

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.forget.exists():
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
            self.forget.write_text("5")

    def peak_gb(self) -> float:
        if self.device.type == "cpu" and self.forget.exists():
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 2**20
        return peak_memory_gb(self.device)


class Step:
    """train.train_step on a made-up batch with some ideas taken out. A call returns seconds."""

    def __init__(self, networks, batch: dict, config: Config, process: Process,
                 out: tuple = ()):
        self.student, self.teacher, self.centerings = networks
        self.batch, self.process, self.out = batch, process, out
        self.config = replace(config, precision="fp32") if "bf16" in out else config
        plain = "foreach" in out and config.optimizer == "adamw"
        make = DefaultAdamW if plain else OPTIMIZERS[config.optimizer]
        self.optimizer = make(
            parameter_groups(self.student, config.layerwise_decay, config.patch_embed_lr_mult))
        fp16 = self.config.precision == "fp16"
        self.scaler = LossScale().to(process.device) if fp16 else None

    def share_moments(self, other: "Step"):
        """Versions with the same optimiser need not keep its moments twice."""
        if type(self.optimizer) is type(other.optimizer):
            self.optimizer = other.optimizer

    @contextlib.contextmanager
    def taken_out(self):
        eager = "compile" in self.out
        with (without([idea for idea in self.out if idea in IDEAS]),
              torch.compiler.set_stance("force_eager" if eager else "default")):
            yield

    def run(self, batch: dict | None = None) -> dict:
        # A step from the middle of a run, where nothing rests. The functions are looked up
        # here, because `without` and Stopwatch replace them for a while.
        schedule = train.schedules(500, 100, 1000, self.config, self.process)
        learner = train.Learner(self.student, self.teacher, self.centerings, self.optimizer,
                                self.scaler, train.ema_update)
        return train.train_step(learner, batch or self.batch, schedule, self.config,
                                self.process)

    def __call__(self) -> float:
        with self.taken_out():
            begun = time_when_done(self.process)
            self.run()
            return time_when_done(self.process) - begun

    def peak_gb(self) -> float:
        """Of two steps, which also warm up. Let go of afterwards: the optimiser's moments."""
        memory = Memory(self.process.device)
        memory.begin()
        self(), self()
        self.optimizer.state.clear()
        return memory.peak_gb()

    def breakdown(self, steps: int = 2) -> dict:
        """Seconds of a step by stage; the device is waited for at every border."""
        watch = Stopwatch(self.process)
        heads = [
            head for network in (self.student, self.teacher)
            for head in network.heads().values()]
        centerings = [
            (m, name) for m in self.centerings.values() for name in ("forward", "update")]
        stages = {
            "views": [(train, "to_device")], "teacher": [(self.teacher, "forward")],
            "student forward": [(self.student, "forward")], "heads": [
                (head, "forward") for head in heads], "loss": centerings + [
                    (train, name)
                    for name in ("make_targets", "view_pair_loss", "patch_loss", "koleo_loss")],
            "backward": [(Tensor, "backward")], "optimiser": [
                (train, "clip_gradients"), (self.optimizer, "step")], "EMA": [
                    (train, "ema_update")], "log": [(train, "step_figures")], "other": [
                        (self, "run")]}
        with self.taken_out(), contextlib.ExitStack() as stack:
            for name, places in stages.items():
                for owner, attribute in places:
                    timed = watch.stage(name, getattr(owner, attribute))
                    stack.enter_context(patch.object(owner, attribute, timed))
            for _ in range(steps):
                self.run()
        return {name: watch.seconds[name] / steps for name in stages}


# ----------------------------------------------------------------------------------------------
# The task


def in_use(config: Config, process: Process) -> list[str]:
    """The ideas that this configuration has, and that can therefore be taken out."""
    has_blocks = not config.convnet
    compiled = config.compile
    if compiled is None:  # the default of train.compile_blocks
        compiled = process.device.type == "cuda"
    has = dict(packing=has_blocks and config.local_crops_number > 0 and config.dino_weight > 0,
               sdpa=has_blocks, skipping=has_blocks and config.drop_path_rate > 0,
               bf16=config.precision == "bf16", compile=compiled)
    return [name for name in (*IDEAS, "bf16", "compile") if has.get(name, True)]


def time_step(config: StepConfig, process: Process) -> dict:
    """One training step: speed, memory, share of the hardware, and beside it what was asked
    for.
    """
    keep_freed_memory(process)
    ideas = in_use(config, process)
    if config.without not in ("none", "each", *ideas):
        raise UsageError(f"--without {config.without}: this step does without it already "
                         f"(--precision {config.precision}, --compile, --drop_path_rate "
                         f"{config.drop_path_rate}); it has {', '.join(ideas)}")
    wanted = {"ours": ()}
    if config.plain:  # the papers' code computed in half precision, too
        wanted["plain"] = tuple(idea for idea in ideas if idea != "bf16")
    one = ideas if config.without == "each" else [config.without]
    wanted |= {f"without {idea}": (idea,) for idea in one if idea != "none"}

    begun = time.perf_counter()
    networks = *train.build(config, process), train.build_centerings(config).to(process.device)
    batch = made_up_batch(config, process)
    versions = {
        name: Step(networks, batch, config, process, out)
        for name, out in wanted.items()}
    for version, other in itertools.combinations(versions.values(), 2):
        other.share_moments(version)
    versions["ours"]()
    first = time.perf_counter() - begun
    peaks = {name: version.peak_gb() for name, version in versions.items()}
    for version in versions.values():  # its moments anew
        version()
    # In turns, there and back, so that whatever else the machine does falls on all alike.
    times, ceiling = {name: [] for name in versions}, 0.0
    for turn in range(config.steps):
        ceiling = max(ceiling, matrix_ceiling(config.precision, process))
        for name in list(versions)[::-1 if turn % 2 else 1]:
            times[name].append(versions[name]())

    B = config.batch_size_per_gpu
    masked = int((batch["mask_weights"] > 0).sum()) if "mask_weights" in batch else 0
    done, nominal = (sum(count_work(config, masked, drop).values()) for drop in (True, False))
    rows = {}
    for name in versions:
        typical = median(times[name])
        rows[name] = {
            "images_per_second": B / typical, "step_seconds": typical,
            "peak_memory_gb": peaks[name], "share_of_ceiling": done / typical / ceiling,
            "share_nominal": nominal / typical / ceiling,
            "ratio": median(t / ours for t, ours in zip(times[name], times["ours"])),
            "memory_ratio": peaks["ours"] / peaks[name]}
        if name in ("ours", "plain"):
            rows[name]["breakdown"] = versions[name].breakdown()
    print(f"{'':20s}  seconds  images/s  peak GB   of the ceiling   times our seconds")
    for name, r in rows.items():
        print(f"{name:20s} {r['step_seconds']:8.3f} {r['images_per_second']:9.1f} "
              f"{r['peak_memory_gb']:8.2f} {r['share_of_ceiling']:8.1%} "
              f"({r['share_nominal']:5.1%})" + f"{r['ratio']:15.2f} x" * (name != "ours"))
    print(
        f"ceiling {ceiling / 1e12:.3g} TFLOP/s, one product of {config.precision}; counted are "
        f"{done / B / 1e9:.1f} GFLOP an image ({nominal / B / 1e9:.1f} without skipping)")
    print_stages({name: row["breakdown"] for name, row in rows.items() if "breakdown" in row})
    result = rows.pop("ours") | {
        "first_step_seconds": first, "ceiling_tflops": ceiling / 1e12,
        "gflop_per_image": done / B / 1e9}
    del result["ratio"], result["memory_ratio"]  # to itself
    if "plain" in rows:
        result |= {
            "plain": rows["plain"], "ratio": rows["plain"]["ratio"],
            "memory_ratio": rows["plain"]["memory_ratio"]}
    result["without"] = {n.split()[1]: r for n, r in rows.items() if n.startswith("without")}
    if "data" in config.given:
        result["from_files"] = from_files(versions["ours"], config, process)
    return result


def print_stages(columns: dict[str, dict]):
    print(f"\n{'stage':20s}" + "".join(f"{name:>24s}" for name in columns))
    for stage in columns["ours"]:
        print(f"{stage:20s}" + "".join(f"{c[stage]:14.4f} s {c[stage] / sum(c.values()):7.1%}"
                                       for c in columns.values()))


def from_files(version: Step, config: Config, process: Process) -> dict:
    """The same step fed by the loader, and the share of time that it waits for it."""
    images = open_images(config.data, config.data_root, config.download, "--data",
                         config.pixels)
    images = cached(images, config.cache, config.cache_side, config.num_workers)
    total = config.steps + 5
    clock = Clock(0, total)
    batches = iter(train.batches_from(0, total, images, config, process))
    for _ in range(total):
        version.run(clock.wait(batches))
        time_when_done(process)
        clock.tick()
    rate = config.batch_size_per_gpu / clock.step_seconds
    print(f"\nfrom {config.data}, {config.num_workers} workers: {rate:.1f} images/s, "
          f"{clock.waiting:.0%} of the time spent waiting for them")
    return {"images_per_second": rate, "waiting": clock.waiting}
