"""Bench: how fast a step is, what it could be, and what each idea in it brings.

    preset --> one made-up batch --> train.train_step ------------------+
                                          |                             +--> ratio, by pairs
                                     the same step, an idea taken out --+
                                          |
    matrix products counted  /  seconds  /  the device's matrix ceiling = share of the hardware

Idea     A speed means something beside two others, from the same minute on the same machine: what
         the hardware can do at most, and what the plain way of doing it (plain.py) costs.
Paper    none; share of the ceiling: "model FLOPs utilisation" of PaLM (Chowdhery 2022) appendix B
Try      python bench.py step shapes --steps 3 --plain
         python bench.py data --data folder:PATH        images per second and core, by stage
         python bench.py eval                           features and neighbours
         python bench.py attention dino_vits16          SDPA's kernels at these lengths
         python bench.py growth dino_vits16 --batch_size_per_gpu 2    cost by size, as curves
         python bench.py plan dinov2_vitl14 --gpus 32 --kind h100
Change   another stage is one line in Step.breakdown, another GPU one in KINDS
Tests    pytest tests/test_bench.py
"""

import contextlib
import ctypes
import gc
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

import recipes
import runtime
import train
import visualize
import vit
from data import Images, cached, in_channels, open_images
from features import MOST, extract, knn_vote, top_neighbours
from plain import IDEAS, DefaultAdamW, crop_by_crop, without
from runtime import Place, UsageError, require


@dataclass
class Config(recipes.Config):
    # -- bench
    steps: int = 8  # steps or batches that are timed, after a few that are not
    plain: bool = False  # step, data: beside it the plain version; its precision is the same
    without: Literal["none", "each", "packing", "sdpa", "skipping", "fused_loss", "foreach",
                     "compile", "bf16"] = "none"  # step: beside it the same step without one idea
    bank: int = 20_000  # eval: features that vote
    queries: int = 5_000  # eval: features that are judged
    gpus: int = 8  # plan: how many
    kind: Literal["a100", "h100", "h200"] = "h100"  # plan: of which kind
    utilisation: float = 0.35  # plan: share of the kind's peak that is reached, an assumption
    images: int = 0  # in the data set; 0: as many as the preset's has
    json: str = ""  # a file for all of this


# ------------------------------------------------------------------------------------------------
# One step, timed


def noise(count: int, channels: int = 3) -> Images:
    """Images of no content and of ImageNet's usual size."""
    image = in_channels(torch.randint(256, (channels, 375, 500), dtype=torch.uint8), channels)
    return Images("noise", ([image] * count).__getitem__, [f"noise-{i}" for i in range(count)])


def made_up_batch(config: Config, place: Place) -> dict:
    """A batch as the loader makes it, of noise; its crops are on the device already."""
    alone = replace(config, num_workers=0)
    loader = train.batches_from(0, 1, noise(config.batch_size_per_gpu, config.in_chans),
                                  alone, Place(place.device))
    batch = next(iter(loader))
    return batch | {k: batch[k].to(place.device) for k in ("global_crops", "local_crops")}


def seconds(place: Place) -> float:
    """The time when all work so far is done."""
    if place.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds by stage. Of stages within stages, each second belongs to the innermost."""

    def __init__(self, place: Place):
        self.place, self.seconds, self.inside = place, defaultdict(float), ["nothing"]
        self.mark = seconds(place)

    def lap(self):
        now = seconds(self.place)
        self.seconds[self.inside[-1]] += now - self.mark
        self.mark = now

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
        return runtime.peak_memory_gb(self.device)


class Step:
    """train.train_step on a made-up batch with some ideas taken out. A call returns seconds."""

    def __init__(self, networks, batch: dict, config: Config, place: Place, out: tuple = ()):
        self.student, self.teacher, self.makers = networks
        self.batch, self.place, self.out = batch, place, out
        self.config = replace(config, precision="fp32") if "bf16" in out else config
        plain = "foreach" in out and config.optimizer == "adamw"
        make = DefaultAdamW if plain else train.OPTIMIZERS[config.optimizer]
        self.optimizer = make(train.parameter_groups(
            self.student, config.layerwise_decay, config.patch_embed_lr_mult))
        fp16 = self.config.precision == "fp16"
        self.scaler = train.LossScale().to(place.device) if fp16 else None

    def share_moments(self, other: "Step"):
        """Versions with the same optimiser need not keep its moments twice."""
        if type(self.optimizer) is type(other.optimizer):
            self.optimizer = other.optimizer

    @contextlib.contextmanager
    def taken_out(self):
        eager = "compile" in self.out
        with without([idea for idea in self.out if idea in IDEAS]), \
                torch.compiler.set_stance("force_eager" if eager else "default"):
            yield

    def run(self, batch: dict | None = None) -> dict:
        now = train.schedules(500, 100, 1000, self.config, self.place)  # in full swing
        return train.train_step(self.student, self.teacher, self.makers, self.optimizer,
                                batch or self.batch, now, self.config, self.place,
                                train.ema_update, self.scaler)

    def __call__(self) -> float:
        with self.taken_out():
            begun = seconds(self.place)
            self.run()
            return seconds(self.place) - begun

    def peak_gb(self) -> float:
        """Of two steps, which also warm up. Let go of afterwards: the optimiser's moments."""
        memory = Memory(self.place.device)
        memory.begin()
        self(), self()
        self.optimizer.state.clear()
        return memory.peak_gb()

    def breakdown(self, steps: int = 2) -> dict:
        """Seconds of a step by stage; the device is waited for at every border."""
        watch = Stopwatch(self.place)
        heads = [head for network in (self.student, self.teacher)
                 for name, head in network.named_children() if name != "backbone"]
        makers = [(m, name) for m in self.makers.values() for name in ("forward", "update")]
        stages = {
            "views": [(train, "to_device")], "teacher": [(self.teacher, "forward")],
            "student forward": [(self.student, "forward")],
            "heads": [(head, "forward") for head in heads],
            "loss": makers + [(train, name) for name in ("make_targets", "view_pair_loss",
                                                         "patch_loss", "koleo_loss")],
            "backward": [(Tensor, "backward")],
            "optimiser": [(train, "clip_gradients"), (self.optimizer, "step")],
            "EMA": [(train, "ema_update")], "log": [(train, "entropies")], "other": [(self, "run")],
        }
        with self.taken_out(), contextlib.ExitStack() as stack:
            for name, places in stages.items():
                for owner, attribute in places:
                    timed = watch.stage(name, getattr(owner, attribute))
                    stack.enter_context(patch.object(owner, attribute, timed))
            for _ in range(steps):
                self.run()
        return {name: watch.seconds[name] / steps for name in stages}


# ------------------------------------------------------------------------------------------------
# What it could be: work counted without doing it, and what the hardware does at most


def meta_student(config: Config, drop: bool = True) -> train.Network:
    """A student without content."""
    with torch.device("meta"):
        student = train.Network(config, config.drop_path_rate if drop else 0.0)
    student.backbone.activation_checkpointing = config.activation_checkpointing
    return student


def count_work(config: Config, hidden: int | None = None, drop: bool = True) -> dict[str, int]:
    """Floating-point operations of a step's matrix products, by part; `sum(...)` is the step's.

    Only what has to be done: `hidden` patches in the heads, nothing twice, dropped samples left out
    (drop=False: as if none were). A student's backward pass is twice its forward pass, less pixels'
    gradients.
    """
    student, work = meta_student(config, drop), {}
    call = partial(torch.func.functional_call, student)
    # SDPA is counted by the products it stands for: the counter knows not all of its kernels.
    with (FakeTensorMode(allow_non_fake_inputs=True), without(["sdpa"]),
          FlopCounterMode(display=False) as counter):
        state, (views, *more, places) = train.imagined(student, config, torch.device("cpu"),
                                                       hidden)
        with torch.no_grad():
            call(state, (views[:1],), dict(mask_indices=places))
        work["teacher"] = counter.get_total_flops()
        out = call(state, (views, *more, places))
        work["student"] = counter.get_total_flops() - sum(work.values())
        sum(x.sum() for x in out.values()).backward()
        work["backward"] = counter.get_total_flops() - sum(work.values())
    return work


def matrix_ceiling(precision: str, place: Place) -> float:
    """Operations a second in one large matrix product, the best of three."""
    side = 8192 if place.device.type == "cuda" else 1536
    kind = runtime.LOW.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=place.device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(4):  # the first one warms up
        begun = seconds(place)
        a @ b
        times.append(seconds(place) - begun)
    return 2 * side**3 / min(times[1:])


# ------------------------------------------------------------------------------------------------
# The tasks


def in_use(config: Config, place: Place) -> list[str]:
    """The ideas that this configuration has, and that can therefore be taken out."""
    vit_only, compiled = not config.convnet, config.compile
    has = dict(
        packing=vit_only and config.local_crops_number > 0 and config.dino_weight > 0,
        sdpa=vit_only, skipping=vit_only and config.drop_path_rate > 0, fused_loss=True,
        foreach=True, bf16=config.precision == "bf16",
        compile=place.device.type == "cuda" if compiled is None else compiled,
    )
    return [name for name in has if has[name]]


def step(config: Config, place: Place) -> dict:
    """One training step: speed, memory, share of the hardware, and beside it what was asked for."""
    runtime.keep_freed_memory(place)
    ideas = in_use(config, place)
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
    networks = *train.build(config, place), train.target_makers(config).to(place.device)
    batch = made_up_batch(config, place)
    versions = {name: Step(networks, batch, config, place, out) for name, out in wanted.items()}
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
        ceiling = max(ceiling, matrix_ceiling(config.precision, place))
        for name in list(versions)[::-1 if turn % 2 else 1]:
            times[name].append(versions[name]())

    B = config.batch_size_per_gpu
    hidden = int((batch["mask_weights"] > 0).sum()) if "mask_weights" in batch else 0
    done, nominal = (sum(count_work(config, hidden, drop).values()) for drop in (True, False))
    rows = {}
    for name in versions:
        typical = median(times[name])
        rows[name] = {
            "images_per_second": B / typical, "step_seconds": typical,
            "peak_memory_gb": peaks[name], "share_of_ceiling": done / typical / ceiling,
            "share_nominal": nominal / typical / ceiling,
            "ratio": median(t / ours for t, ours in zip(times[name], times["ours"])),
            "memory_ratio": peaks["ours"] / peaks[name],
        }
        if name in ("ours", "plain"):
            rows[name]["breakdown"] = versions[name].breakdown()
    print(f"{'':20s}  seconds  images/s  peak GB   of the ceiling   times our seconds")
    for name, r in rows.items():
        print(f"{name:20s} {r['step_seconds']:8.3f} {r['images_per_second']:9.1f} "
              f"{r['peak_memory_gb']:8.2f} {r['share_of_ceiling']:8.1%} "
              f"({r['share_nominal']:5.1%})" + f"{r['ratio']:15.2f} x" * (name != "ours"))
    print(f"ceiling {ceiling / 1e12:.3g} TFLOP/s, one product of {config.precision}; counted are "
          f"{done / B / 1e9:.1f} GFLOP an image ({nominal / B / 1e9:.1f} without skipping)")
    print_stages({name: row["breakdown"] for name, row in rows.items() if "breakdown" in row})
    result = rows.pop("ours") | {"first_step_seconds": first, "ceiling_tflops": ceiling / 1e12,
                                 "gflop_per_image": done / B / 1e9}
    del result["ratio"], result["memory_ratio"]  # to itself
    if "plain" in rows:
        result |= {"plain": rows["plain"], "ratio": rows["plain"]["ratio"],
                   "memory_ratio": rows["plain"]["memory_ratio"]}
    result["without"] = {n.split()[1]: r for n, r in rows.items() if n.startswith("without")}
    if "data" in config.given:
        result["from_files"] = from_files(versions["ours"], config, place)
    return result


def print_stages(columns: dict[str, dict]):
    print(f"\n{'stage':20s}" + "".join(f"{name:>24s}" for name in columns))
    for stage in columns["ours"]:
        print(f"{stage:20s}" + "".join(
            f"{c[stage]:14.4f} s {c[stage] / sum(c.values()):7.1%}" for c in columns.values()))


def from_files(version: Step, config: Config, place: Place) -> dict:
    """The same step fed by the loader, and the share of time that it waits for it."""
    images = open_images(config.data, config.data_root, config.download, "--data", config.pixels)
    images = cached(images, config.cache, config.cache_side, config.num_workers)
    total = config.steps + 5
    clock = runtime.Clock(0, total)
    batches = iter(train.batches_from(0, total, images, config, place))
    for _ in range(total):
        version.run(clock.wait(batches))
        seconds(place)
        clock.tick()
    rate = config.batch_size_per_gpu / clock.step_seconds
    print(f"\nfrom {config.data}, {config.num_workers} workers: {rate:.1f} images/s, "
          f"{clock.waiting:.0%} of the time spent waiting for them")
    return {"images_per_second": rate, "waiting": clock.waiting}


def data(config: Config, place: Place) -> dict:
    """Images per second and core, from file to what the network is fed, stage by stage.

    In the seconds of one thread of this process, so that others on the machine do not count.
    --plain: beside it the papers' worker, one PIL image after another, by turns. Both decode alike.
    """
    images = open_images(config.data, config.data_root, config.download, "--data", config.pixels)
    images = cached(images, config.cache, config.cache_side, config.num_workers)
    size = min(config.batch_size_per_gpu, len(images))
    loader = train.batches_from(0, 1, images.subset(range(size)), replace(
        config, batch_size_per_gpu=size), Place(torch.device("cpu")))
    views, collate = loader.dataset, loader.collate_fn
    plainly = crop_by_crop(views.multi_crop.views, config.photometry, config.pixels)
    spent, order = defaultdict(float), itertools.cycle(range(len(images)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(config.steps + 2):
            marks, batch = [time.process_time()], [next(order) for _ in range(size)]
            pixels = [images.read(index) for index in batch]
            marks.append(time.process_time())
            samples = [dict(views.multi_crop(image, np.random.default_rng([i, index])),
                            index=index, step=i) for image, index in zip(pixels, batch)]
            marks.append(time.process_time())
            crops = collate(samples)
            marks.append(time.process_time())
            train.to_device(crops, config.pixels, torch.device("cpu"))
            marks.append(time.process_time())
            for stage, a, b in zip(("decode", "geometry", "collate", "photometry"), marks,
                                   marks[1:]):
                spent[stage] += (b - a) * (i >= 2)  # the first two warm up
            if config.plain:
                begun = time.process_time()
                for image in pixels:
                    plainly(to_pil_image(image))
                spent["plain"] += (time.process_time() - begun + marks[1] - marks[0]) * (i >= 2)
    finally:
        torch.set_num_threads(threads)
    count, plain = size * config.steps, spent.pop("plain", None)
    spent["worker"] = spent["decode"] + spent["geometry"] + spent["collate"]
    spent["whole"] = spent["worker"] + spent["photometry"]
    if plain:
        spent["plain"] = plain
    print(f"{'stage':12s}  ms/image   images/s and core")
    for stage, time_spent in spent.items():
        print(f"{stage:12s} {1000 * time_spent / count:9.2f} {count / time_spent:12.1f}")
    print("worker: what a core of the loader does; on a GPU photometry is not the cores' work")
    result = {"images_per_second_per_core": {s: count / t for s, t in spent.items()}}
    if plain:
        result["ratio"] = plain / spent["worker"]
        print(f"plain: the same by PIL, all in the worker: {result['ratio']:.1f} times the "
              f"worker's seconds, {plain / spent['whole']:.1f} times the whole's")
    return result


def evaluation(config: Config, place: Place) -> dict:
    """Features of images of noise, and k-NN (k = 200) beside the bare matrix product in it."""
    _, teacher = train.build(config, place)
    size, steps = config.batch_size_per_gpu, config.steps
    how = dict(batch_size=size, precision=config.precision, num_workers=config.num_workers)
    extract(teacher.backbone, noise(size), config.global_crops_size, place, **how)
    begun = seconds(place)
    extract(teacher.backbone, noise(size * steps), config.global_crops_size, place, **how)
    rate = size * steps / (seconds(place) - begun)

    bank, queries = (torch.randn(n, teacher.backbone.embed_dim, device=place.device)
                     for n in (config.bank, config.queries))
    labels, memory = torch.randint(1000, (len(bank),), device=place.device), Memory(place.device)
    k = min(200, len(bank))

    def bare():
        for part in queries.split(max(1, MOST // len(bank))):
            part @ bank.T

    def vote():
        similarities, rows = top_neighbours(queries, bank, k)
        knn_vote(similarities, labels[rows])

    def timed(function):
        begun = seconds(place)
        function()
        return seconds(place) - begun

    bare(), memory.begin()
    before = memory.peak_gb()
    pairs = [(timed(vote), timed(bare)) for _ in range(3)]
    knn, product = (median(column) for column in zip(*pairs))
    ratio, grown = median(a / b for a, b in pairs), memory.peak_gb() - before
    print(f"extraction   {rate:10.1f} images/s at {config.global_crops_size} px, with "
          f"{config.num_workers} workers")
    print(f"k-NN({k})    {len(queries) / knn:10.1f} queries/s against {len(bank):,d}: "
          f"{knn:.2f} s, {ratio:.2f} times its matrix product, {grown:.2f} GB")
    return {"extraction_images_per_second": rate, "knn_seconds": knn, "matmul_seconds": product,
            "knn_ratio": ratio, "knn_memory_gb": grown}


def attention(config: Config, place: Place) -> dict:
    """SDPA's kernels at the lengths of this preset, forward and backward: seconds of one block."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if config.convnet:
        raise UsageError(f"--arch {config.arch} has no attention")
    shape, results = vit.ARCHS[config.arch], {}
    kind = runtime.LOW.get(config.precision, torch.float32)
    groups = [(config.global_crops_number, config.global_crops_size)]
    groups += [(config.local_crops_number, config.local_crops_size)] * bool(
        config.local_crops_number)
    for number, side in groups:
        b, n = number * config.batch_size_per_gpu, 1 + config.num_register_tokens + (
            side // config.patch_size) ** 2
        q, k, v = (torch.randn(b, shape["num_heads"], n, 64, device=place.device, dtype=kind,
                               requires_grad=True) for _ in range(3))

        def once():
            begun = seconds(place)
            F.scaled_dot_product_attention(q, k, v).sum().backward()
            return seconds(place) - begun

        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            try:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    once(), once()
                    typical = median(once() for _ in range(config.steps))
            except RuntimeError:  # not on this device, or not for this type
                print(f"{b:6d} x {n:4d} tokens  {name.lower():20s} not here")
                continue
            # Two products forward, four backward, besides one that flash does again.
            rate = 6 * 2 * b * shape["num_heads"] * n * n * 64 / typical
            results[f"{b} x {n} {name.lower()}"] = typical
            print(f"{b:6d} x {n:4d} tokens  {name.lower():20s} {1e6 * typical:10.0f} us "
                  f"{rate / 1e12:8.3g} TFLOP/s")
    return {"seconds": results}


# ------------------------------------------------------------------------------------------------
# How the cost grows: one thing at a time, all else as the preset has it

GROWTH = {  # what grows -> times as much as the preset has of it
    "global_crops_size": (0.5, 1, 1.5, 2), "patch_size": (0.5, 1, 2),
    "local_crops_number": (0, 0.5, 1, 2), "n_prototypes": (1 / 64, 1 / 8, 1, 2),
    "depth": (0.25, 0.5, 1, 2), "batch_size_per_gpu": (0.5, 1, 2, 4),
}


def growth(config: Config, place: Place) -> dict:
    """Seconds and memory of a step as one thing grows, and images/s of more processes.

    Each point is the fastest of its steps, in a process of its own. Draws growth.png.
    """
    if config.convnet:
        raise UsageError(f"--arch {config.arch}: growth is of a ViT, which has patches and a depth")
    depth, found = vit.ARCHS[config.arch]["depth"], {name: [] for name in GROWTH}
    alone = dict(mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    print(f"{'':20s}    value  seconds  ms/image  peak GB")
    with ProcessPoolExecutor(1, **alone) as pool:
        for name, factors in GROWTH.items():
            now = depth if name == "depth" else getattr(config, name)
            values = dict.fromkeys(int(now * factor) for factor in factors)
            for value in (v for v in values if v or name == "local_crops_number"):
                row = pool.submit(point, config, place, name, value).result()
                found[name].append(row)
                print(f"{name:20s} {value:8,d} {row['step_seconds']:8.3f} "
                      f"{1e3 * row['seconds_per_image']:9.1f} {row['peak_memory_gb']:8.2f}",
                      flush=True)
    found["processes"] = processes(config, place)
    print(f"wrote {visualize.draw_growth(found, Path('growth.png'))}")
    return {"growth": found}


def point(config: Config, place: Place, name: str, value: int) -> dict:
    """A step where `name`, a flag or the network's depth, is that value."""
    runtime.keep_freed_memory(place)
    if name == "depth":
        vit.ARCHS[config.arch] |= {"depth": value}
    else:
        config = replace(config, **{name: value})
    networks = *train.build(config, place), train.target_makers(config).to(place.device)
    version = Step(networks, made_up_batch(config, place), config, place)
    version()
    memory = Memory(place.device)
    memory.begin()
    fastest = min(version() for _ in range(config.steps + 1))
    return {"value": value, "step_seconds": fastest, "peak_memory_gb": memory.peak_gb(),
            "seconds_per_image": fastest / config.batch_size_per_gpu}


def processes(config: Config, place: Place) -> list[dict]:
    """Images/s of train.py with 1, 2, 4 ... processes, a GPU or a core each, on drawn shapes."""
    most = torch.cuda.device_count() if place.device.type == "cuda" else os.cpu_count()
    rows, B, flags = [], config.batch_size_per_gpu, []
    for name in set(config.given) & set(recipes.Config.__dataclass_fields__):
        value = getattr(config, name)
        flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    for count in (2**i for i in range(most.bit_length())):
        with tempfile.TemporaryDirectory() as folder:
            steps = config.steps + 4
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       f"--nproc_per_node={count}", str(Path(train.__file__)), config.preset,
                       *flags, "--data", f"shapes:{B * count * steps}",
                       "--val_data", "shapes:1:val",
                       "--device", place.device.type, "--precision", config.precision,
                       "--batch_size_per_gpu", str(B), "--epochs", "1", "--warmup_epochs", "0",
                       "--epoch_length", str(steps), "--output_dir", folder]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.run(command, stdout=subprocess.DEVNULL, env=one_thread).returncode:
                raise UsageError(f"train.py with {count} processes failed, as it says above")
            summary = json.loads((Path(folder) / "summary.json").read_text())
        rows.append({"value": count, "images_per_second": summary["images_per_second"]})
        print(f"{'processes':20s} {count:8,d} {rows[-1]['images_per_second']:8.2f} images/s",
              flush=True)
    return rows


# ------------------------------------------------------------------------------------------------
# What a run would cost elsewhere

# Dense bf16 operations a second and GB of memory, as their maker states them.
KINDS = {"a100": (312e12, 80), "h100": (989e12, 80), "h200": (989e12, 141)}
SIZES = {"shapes": 5_000, "CIFAR10": 50_000, "Imagenette": 9_469, "ImageNet": 1_281_167}


def images_of(config: Config) -> int:
    if config.images or config.data in SIZES:
        return config.images or SIZES[config.data]
    return len(open_images(config.data, config.data_root, config.download))


def plan(config: Config, place: Place) -> dict:
    """Memory, speed and days of a whole run elsewhere: an estimate, and what it is made of."""
    config = replace(config, precision="bf16" if config.precision == "auto" else config.precision)
    B, (peak, available) = config.batch_size_per_gpu, KINDS[config.kind]
    work = count_work(config)
    there = Place(torch.device("cpu"), world_size=config.gpus)
    parts = train.expected_memory(meta_student(config), config, there)
    total = sum(work.values()) / B
    rate = config.gpus * config.utilisation * peak / total
    batch = B * config.gpus
    steps = config.epochs * (config.epoch_length or max(images_of(config) // batch, 1))
    days = steps * batch / rate / 86400
    print(f"{config.preset} on {config.gpus} {config.kind}, {B} images each: an estimate, nothing "
          "here was measured\n")
    for name, operations in work.items():
        print(f"{name:20s} {operations / B / 1e9:9.1f} GFLOP an image")
    print(f"{'peak':20s} {peak / 1e12:9.0f} TFLOP/s, of which {config.utilisation:.0%} are assumed "
          "to be reached (--utilisation)\n"
          f"{'images/s':20s} {rate:9.0f}, {rate / config.gpus:.0f} on each\n"
          f"{'steps':20s} {steps:9,d} of {batch:,d} images\n{'days':20s} {days:9.2f}\n")
    for name, value in parts.items():
        print(f"{name:20s} {value:9.2f} GB")
    memory = sum(parts.values())
    print(f"{'in all':20s} {memory:9.2f} GB of {available} a GPU"
          + (": too much; fewer images each, or --parallel fsdp" if memory > available else ""))
    return {"images_per_second": rate, "days": days, "memory_gb": memory, "memory_parts": parts,
            "gflop_per_image": total / 1e9, "steps": steps,
            "utilisation": config.utilisation}


TASKS = {"step": step, "data": data, "eval": evaluation, "attention": attention,
         "growth": growth, "plan": plan}


@runtime.command
def main(argv):
    usage = f"python bench.py {{{','.join(TASKS)}}} [PRESET] [--flag value ...]"
    presets = {"dino_vits16": recipes.PRESETS["dino_vits16"], **recipes.PRESETS}
    if argv[:1] and argv[0] in ("-h", "--help"):
        return runtime.parse(Config, argv, presets, usage)
    if not argv or argv[0] not in TASKS:
        given = argv[0] if argv else ""
        raise UsageError(f"task {given!r}: choose from {', '.join(TASKS)}; {usage}")
    config = runtime.parse(Config, argv[1:], presets, usage)
    require(config, lambda x: x >= 1, "at least 1", "steps", "gpus", "bank", "queries")
    require(config, lambda x: 0 < x <= 1, "above 0, at most 1", "utilisation")
    if argv[0] == "data" and "data" not in config.given:
        raise UsageError("--data is missing: the images to read, as in --data folder:PATH")
    if argv[0] == "data" and config.plain and config.in_chans != 3:
        raise UsageError(f"--plain with --in_chans {config.in_chans}: the papers' worker knows PIL "
                         "images of three channels; leave it out")
    if config.json and not Path(config.json).parent.is_dir():
        raise UsageError(f"--json {config.json}: there is no folder {Path(config.json).parent}")
    recipes.check(config)
    place = runtime.start(config.device if argv[0] != "plan" else "cpu")
    if argv[0] != "plan":
        config.precision = runtime.resolve_precision(config.precision, place.device)
    if config.auto_scale:
        batch = config.batch_size_per_gpu * (config.gpus if argv[0] == "plan" else 1)
        with runtime.usage():
            config = recipes.auto_scale(config, images_of(config), batch)
    about = {"task": argv[0], "preset": config.preset, "device": device_name(place),
             "precision": config.precision, "batch_size_per_gpu": config.batch_size_per_gpu,
             "threads": torch.get_num_threads(), "torch": torch.__version__}
    if argv[0] != "plan":
        print("  ".join(f"{k} {v}" for k, v in about.items()))
    with runtime.usage():
        result = about | TASKS[argv[0]](config, place)
    if config.json:
        runtime.write_json(Path(config.json), result)
    return result


def device_name(place: Place) -> str:
    return torch.cuda.get_device_name() if place.device.type == "cuda" else place.device.type


if __name__ == "__main__":
    main()
