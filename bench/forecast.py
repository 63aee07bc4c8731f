"""Forecast: how the cost of a step grows, and what a whole run would take elsewhere.

    one setting at a time, smaller and larger --> seconds and memory, as curves    (growth)
    counted work and memory traffic / what a GPU can do at most --> days, GB       (plan)

Idea     What is measured and what is assumed are kept apart. growth runs a step for every point
         that it draws. plan runs nothing; it says so, and names the rates that it assumes.
Paper    Roofline (Williams 2009), for plan
Try      python -m bench growth dino_vits16 --batch_size_per_gpu 2
         python -m bench plan dinov2_vitl14 --gpus 32 --kind h100
Change   another GPU is one line in GPUS; another flag that grows, a whole number, is one line
         in GROWTH
Tests    pytest tests/bench/test_forecast.py

Letters  B images per process and step.
"""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import train
import vit
from bench.count import count_work, meta_student
from bench.step import Config, Memory, Step, made_up_batch
from images.data import open_images
from machinery.clock import FIRST_STEPS
from machinery.flags import UsageError
from machinery.page import pyplot
from machinery.process import Process
from training.config import Config as TrainingConfig
from training.memory import expected_memory, keep_freed_memory

# ----------------------------------------------------------------------------------------------
# How the cost grows: one thing at a time, all else as the preset has it

# What grows, a field of Config or the network's depth -> times as much as the preset has of it.
# Example: dino_vits16 has patches of 16 pixels, so 8, 16 and 32 are measured. Where the preset
# has none, of registers for example, the factors themselves are the numbers that are measured.
GROWTH = {
    # how finely an image is seen: attention compares all tokens of a crop with each other
    "global_crops_size": (0.5, 1, 1.5, 2),
    "patch_size": (0.5, 1, 2),
    # what multi-crop adds for the student alone; 0 is DINO without it
    "local_crops_number": (0, 0.5, 1, 2),
    # K, the width of the largest matrices of a step
    "n_prototypes": (1 / 64, 1 / 8, 1, 2),
    "depth": (0.25, 0.5, 1, 2),
    # more images at once: a step takes longer, but perhaps an image does not
    "batch_size_per_gpu": (0.5, 1, 2, 4)}

# The unit of what grows, for the figure; without an entry the name stands alone.
UNITS = {
    "global_crops_size": "pixels", "patch_size": "pixels",
    "local_crops_number": "crops per image", "n_prototypes": "count; k = 1,024",
    "depth": "blocks", "batch_size_per_gpu": "images", "processes": "one core or GPU each"}


def growth(config: Config, process: Process) -> dict:
    """Seconds and memory of a step as one thing grows, and images/s of more processes.

    Each point is the fastest of its steps, in a process of its own. Draws growth.png.
    """
    if config.convnet:
        raise UsageError(
            f"--arch {config.arch}: growth is of a ViT, which has patches and a depth")

    # The peak memory of a process cannot be reset everywhere, and memory that one point leaves
    # behind would count for the next. So each point has a fresh process, one after the other:
    # "spawn" starts it anew, where a fork would be a copy of this one.
    points = {}
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    print(f"{'':20s}    value  seconds  ms/image  peak GB")
    with pool:
        for name in GROWTH:
            points[name] = []
            for value in values_of(name, config):
                # One point that is too large leaves the others as they are.
                try:
                    row = pool.submit(point, config, process, name, value).result()
                except torch.OutOfMemoryError:
                    print(f"{name:20s} {value:8,d} out of memory", flush=True)
                    continue
                points[name].append(row)
                print(
                    f"{name:20s} {value:8,d} {row['step_seconds']:8.3f} "
                    f"{1e3 * row['seconds_per_image']:9.1f} {row['peak_memory_gb']:8.2f}",
                    flush=True)

    # What was measured is drawn before whole runs are started, which may fail.
    points = {name: rows for name, rows in points.items() if rows}
    draw_growth(points, Path("growth.png"))
    points["processes"] = rates_of_processes(config, process)
    print(f"wrote {draw_growth(points, Path('growth.png'))}")
    return {"growth": points}


def values_of(name: str, config: Config) -> list[int]:
    """The values that are measured of one thing, each once.

    Example: of a depth of 4, GROWTH's factors .25, .5, 1 and 2 make [1, 2, 4, 8]. Where a
    factor leaves nothing, such as 1/64 of 32 prototypes, that value is left out; but a run
    without local crops is one that can be measured, and so is any 0 of the preset itself.
    """
    usual = vit.ARCHS[config.arch]["depth"] if name == "depth" else getattr(config, name)
    values = []
    for factor in GROWTH[name]:
        value = int((usual or 1) * factor)
        may_be_zero = name == "local_crops_number" or not usual
        if value not in values and (value or may_be_zero):
            values.append(value)
    return values


def point(config: Config, process: Process, name: str, value: int) -> dict:
    """A step where `name`, a flag or the network's depth, is that value."""
    keep_freed_memory(process)  # as in training
    if name == "depth":
        # There is no flag for it: the architecture itself is changed, in this process only.
        vit.ARCHS[config.arch] |= {"depth": value}
    else:
        config = replace(config, **{name: value})

    student, teacher = train.build(config, process)
    centerings = train.build_centerings(config).to(process.device)
    version = Step((student, teacher, centerings), made_up_batch(config, process), config,
                   process)
    version()  # warms up

    # The fastest and not the median: points are minutes apart, and what else the machine did
    # meanwhile must not bend the curve.
    memory = Memory(process.device)
    memory.begin()
    fastest = min(version() for _ in range(config.steps + 1))
    return {
        "value": value, "step_seconds": fastest, "peak_memory_gb": memory.peak_gb(),
        "seconds_per_image": fastest / config.batch_size_per_gpu}


def rates_of_processes(config: Config, process: Process) -> list[dict]:
    """Images/s of train.py on drawn shapes, with 1, 2, 4, ... processes.

    Each has a GPU or a core for itself. UsageError if train.py fails.
    """
    if process.device.type == "cuda":
        most = torch.cuda.device_count()
    else:
        most = os.cpu_count()
    B = config.batch_size_per_gpu

    # What was asked of bench is asked of train.py, as far as train.py knows the flag. On a CPU
    # each process draws its own images, because workers would take the cores of the others.
    flags = ["--num_workers", "0"] if process.device.type == "cpu" else []
    for name in set(config.given) & set(TrainingConfig.__dataclass_fields__):
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else [value]
        flags += [f"--{name}", *map(str, values)]

    # The clock of train.py leaves its first, slow steps out: so many more are trained.
    steps = config.steps + FIRST_STEPS
    rows = []

    # Powers of two up to `most`. Example: 6 has the bits 110, so these are 2**0, 2**1, 2**2.
    for count in (2**i for i in range(most.bit_length())):
        with tempfile.TemporaryDirectory() as folder:
            # One epoch of `steps` steps on as many images as they need, with one image to judge
            # by. These flags come after those of the user, and the last one counts.
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={count}",
                str(Path(train.__file__)), config.preset, *flags, "--data",
                f"shapes:{B * count * steps}", "--val_data", "shapes:1:val", "--device",
                process.device.type, "--precision", config.precision, "--batch_size_per_gpu",
                str(B), "--epochs", "1", "--warmup_epochs", "0", "--warmup_teacher_temp_epochs",
                "0", "--freeze_last_layer_epochs", "0", "--epoch_length",
                str(steps), "--output_dir", folder]
            # One thread each: otherwise the first process would use all cores by itself, and
            # further ones would seem to bring nothing.
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.DEVNULL, env=one_thread)
            if done.returncode:
                raise UsageError(f"train.py with {count} processes failed, as it says above")
            summary = json.loads((Path(folder) / "summary.json").read_text())
        rate = summary["images_per_second"]
        rows.append({"value": count, "images_per_second": rate})
        print(f"{'processes':20s} {count:8,d} {rate:8.2f} images/s", flush=True)
    return rows


# ----------------------------------------------------------------------------------------------
# The figure of growth


def draw_growth(points: dict[str, list[dict]], path: Path) -> Path:
    """What growth measured, a panel for each thing that grows, and a legend in the last one.

    points: what grows -> its rows, as growth returns them.
    """
    plt = pyplot()
    # As many lines of four panels as hold everything that grows, and the legend.
    columns = 4
    lines = math.ceil((len(points) + 1) / columns)
    fig, axes = plt.subplots(lines, columns, figsize=(16, 2.8 * lines), layout="constrained",
                             squeeze=False)
    for axis, (name, rows) in zip(axes.flat, points.items()):
        x = [row["value"] for row in rows]
        draw_values(axis, name, x)
        if name == "processes":
            draw_rates(axis, x, [row["images_per_second"] for row in rows])
        else:
            draw_costs(axis, x, rows)

    # The panels that are left over have no axes; the last of them holds the legend of all.
    for axis in axes.flat[len(points):]:
        axis.axis("off")
    legend = axes.flat[-1]
    legend.plot([], [], "o-", color="tab:blue", label="milliseconds per image (left)")
    legend.plot([], [], "s--", color="tab:orange", label="peak memory (right)")
    legend.plot([], [], "^-", color="tab:green", label="images per second, all processes")
    legend.plot([], [], ":", color="gray", label="the same if nothing were lost")
    legend.legend(loc="center", frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def draw_values(axis, name: str, x: list[int]):
    """The x axis: a tick at each value, at distances that show factors, not differences."""
    # A logarithmic axis has no place for 0; "symlog" is linear near it.
    axis.set_xscale("symlog" if 0 in x else "log", base=2)
    axis.set_xticks(x, [f"{n // 1024}k" if n > 9999 else f"{n}" for n in x])
    axis.minorticks_off()
    axis.set_xlabel(f"{name} ({UNITS[name]})" if name in UNITS else name)


def draw_costs(axis, x: list[int], rows: list[dict]):
    """Milliseconds on the left axis, memory on the right one; both begin at 0."""
    # Per image and not per step, so that a larger batch is no more expensive by itself.
    milliseconds = [1e3 * row["seconds_per_image"] for row in rows]
    axis.plot(x, milliseconds, "o-", color="tab:blue")
    axis.set_ylim(0, 1.1 * max(milliseconds))
    axis.set_ylabel("time per image (ms)", color="tab:blue")

    # Two curves of different units share the x axis only. Each y axis has the colour of its
    # curve.
    memory = [row["peak_memory_gb"] for row in rows]
    right = axis.twinx()
    right.plot(x, memory, "s--", color="tab:orange")
    right.set_ylim(0, 1.1 * max(memory))
    right.set_ylabel("peak memory (GB)", color="tab:orange")


def draw_rates(axis, x: list[int], rates: list[float]):
    """Images a second of all processes, and what it were if each were as fast as one alone."""
    ideal = [rates[0] * n for n in x]
    axis.plot(x, rates, "^-", color="tab:green")
    axis.plot(x, ideal, ":", color="gray")
    axis.set_ylim(0, 1.1 * max(rates + ideal))
    axis.set_ylabel("speed (images per second)")


# ----------------------------------------------------------------------------------------------
# What a run would cost elsewhere

# Dense operations a second in bf16 (V100 and T4: fp16), bytes a second from and to the memory,
# and GB of memory, as Nvidia's data sheets state them; A100, H100 and V100 are those with SXM.
GPUS = {
    "a100": (312e12, 2.04e12, 80), "h100": (989e12, 3.35e12, 80), "h200": (989e12, 4.8e12, 141),
    "v100": (125e12, 0.9e12, 32), "t4": (65e12, 0.32e12, 16)}
# Of other precisions the operations a second, from the same sheets. V100 and T4 have no TF32.
SLOWER = {
    "fp32": {"a100": 19.5e12, "h100": 67e12, "h200": 67e12, "v100": 15.7e12, "t4": 8.1e12},
    "tf32": {"a100": 156e12, "h100": 495e12, "h200": 495e12}}
NODE = 8  # how many of them one machine usually has

# What a step takes of that. A GPU either multiplies matrices, which is limited by its units, or
# does something small with many numbers (a LayerNorm, a GELU, a sum), which is limited by its
# memory. A step needs the time of the one and of the other.
#
# These four were not derived. They were fitted to the runs on A100s which DINOv2's authors
# published, and with them each of the three comes out within 15 %: 0.94 days for "about a day"
# (ViT-L/16 on ImageNet), 2.92 for 3.3 (ViT-L/14), 3.80 for 3.6 (ViT-g/14); see
# test_forecast.py. So that they agree is calibration. On one H100 two of their estimates were
# compared with steps: 203 images a second for 198 (ViT-L/14), but 1,747 for 1,387 (ViT-S/16).
SHARE_OF_PEAK = 0.5  # reached by products: half of the operations that the maker states
SHARE_OF_BANDWIDTH = 0.85
PASSES_OF_KEPT = 7  # a byte that autograd keeps is written and read so often, all steps added
PASSES_OF_WEIGHTS = 3  # the same of a byte of weights, gradients or moments: clip, AdamW, EMA

# However small its work, a step has to be started, kernel by kernel, by Python on the CPU. So
# a plan gives no step less than this, in seconds: 40 ms for 4 blocks, 80 ms for 12. These are
# middle values of single timings beside one H100, some with other programs running: 42 to 49 ms
# for the preset of the shapes, 59 to 100 ms for those of Imagenette. A slower CPU needs longer.
START_OF_A_STEP = 0.02
START_OF_A_BLOCK = 0.005

# Images for training in the data sets that need not be at hand for a plan.
SIZES = {"shapes": 5_000, "CIFAR10": 50_000, "Imagenette": 9_469, "ImageNet": 1_281_167}


def images_of(config: Config) -> int:
    """How many images the run learns from: as --images says, or the data set."""
    if config.images:
        return config.images
    if config.data in SIZES:
        return SIZES[config.data]
    return len(open_images(config.data, config.data_root, config.download))


def peak_of(config) -> float:
    """Operations a second of --kind in --precision; UsageError where it has none."""
    rates = SLOWER.get(config.precision)
    if rates is None:
        return GPUS[config.kind][0]
    if config.kind not in rates:
        raise UsageError(f"--precision {config.precision}: --kind {config.kind} has no such "
                         "products; give bf16, fp16 or fp32")
    return rates[config.kind]


@dataclass
class PlanConfig(Config):
    # -- plan
    gpus: int = 8  # how many GPUs
    kind: Literal[*GPUS] = "h100"  # of which kind
    utilisation: float = 0.0  # share of the kind's peak that is reached; 0: as estimated


def plan(config: PlanConfig, process: Process) -> dict:
    """Memory, speed and days of a whole run elsewhere: an estimate, and what it is made of.

    seconds of a step = operations / (share of peak) + bytes / (share of bandwidth). Example:
    ViT-S/16 with 512 images on a H100: 56e12 operations at half of 989e12 a second take 0.11
    s, and 511e9 bytes at 85 % of 3.35e12 a second 0.18 s: 1,750 images a second, 19 % of the
    peak. A step takes at least as long as Python needs to start its kernels. What GPUs send to
    each other, and waiting for images, is not counted.
    """
    # "auto" would look at this machine; the GPUs of the table multiply fastest in 16 bits. Whether
    # they are those of bfloat16 or of float16 makes no difference to memory or time.
    precision = "bf16" if config.precision == "auto" else config.precision
    config = replace(config, precision=precision)
    B = config.batch_size_per_gpu

    # An epoch is --epoch_length steps, or one pass over the images, whose last, incomplete
    # batch is left out.
    batch = B * config.gpus
    images = images_of(config)
    if batch > images:
        raise UsageError(
            f"--gpus {config.gpus}: a global batch of {batch:,d} is larger than the "
            f"data set of {images:,d} images")
    epoch_steps = config.epoch_length or images // batch
    steps = config.epochs * epoch_steps

    # Each stage of --curriculum has a cost of its own; without it the run is one stage.
    stages = []
    done = 0
    for last, stage in config.stages(steps):
        cost = cost_of_stage(stage)
        cost["steps"] = last - done
        cost["days"] = cost["steps"] * batch / cost["images_per_second"] / 86400
        stages.append(cost)
        done = last

    # The last stage has the largest crops, so it decides about memory. The other figures are
    # means over all steps.
    parts = stages[-1]["memory_parts"]
    days = sum(cost["days"] for cost in stages)
    rate = steps * batch / days / 86400
    gflop = sum(cost["gflop_per_image"] * cost["steps"] for cost in stages) / steps
    utilisation = rate * gflop * 1e9 / config.gpus / peak_of(config)

    # The assumptions are printed beside what follows from them.
    print(f"{config.preset} on {config.gpus} {config.kind}, {B} images each: an estimate, "
          "nothing here was measured\n")
    print_cost(stages[-1], config)
    print(f"{'images/s':20s} {rate:9.0f}, {rate / config.gpus:.0f} on each")
    print(f"{'steps':20s} {steps:9,d} of {batch:,d} images")
    print(f"{'days':20s} {days:9.2f}\n")
    print_memory(parts, config)
    if config.curriculum:
        print("\nThe lines above the rate, and the memory, are those of the last stage of:")
        print_stages(stages)

    return {
        "images_per_second": rate, "days": days, "memory_gb": sum(parts.values()),
        "memory_parts": parts, "gflop_per_image": gflop, "steps": steps,
        "utilisation": utilisation, "stages": stages}


def cost_of_stage(config: PlanConfig) -> dict:
    """Operations, seconds, rate and memory of steps with the crop sizes of `config`."""
    B = config.batch_size_per_gpu
    peak = peak_of(config)
    bandwidth = GPUS[config.kind][1]

    # What a process of the planned run holds; one of several, since FSDP splits the weights
    # over all of them, and HSDP over those of a node.
    node_size = min(config.gpus, NODE)
    if config.parallel == "hsdp" and config.gpus % node_size:
        raise UsageError(f"--parallel hsdp: --gpus {config.gpus} are no whole nodes of {NODE}; "
                         f"give a multiple of {NODE}, or --parallel fsdp")
    one_of_them = Process(torch.device("cpu"), world_size=config.gpus, node_size=node_size)
    parts = expected_memory(meta_student(config), config, one_of_them, on_gpu=True)

    # The seconds of one step, by the estimate or by the share of the peak that was given.
    work = count_work(config)
    operations = sum(work.values())
    # Checkpointing computes the student's blocks a second time, which has not to be done, but
    # takes as long.
    again = work["student"] if config.activation_checkpointing else 0
    seconds = {"products": (operations + again) / (SHARE_OF_PEAK * peak)}
    seconds["memory"] = traffic(config) / (SHARE_OF_BANDWIDTH * bandwidth)
    blocks = 0 if config.convnet else vit.ARCHS[config.arch]["depth"]  # no convnet was timed
    seconds["start"] = START_OF_A_STEP + START_OF_A_BLOCK * blocks
    longest = max(seconds["products"] + seconds["memory"], seconds["start"])
    utilisation = config.utilisation or operations / longest / peak
    return {
        "crops": (config.global_crops_size, config.local_crops_size), "work": work,
        "seconds": seconds, "utilisation": utilisation,
        "images_per_second": config.gpus * B * utilisation * peak / operations,
        "memory_parts": parts, "gflop_per_image": operations / B / 1e9}


def print_cost(cost: dict, config: PlanConfig):
    """What a step of a stage is made of, and the assumptions behind its seconds."""
    peak = peak_of(config)
    bandwidth = GPUS[config.kind][1]
    for name, count in cost["work"].items():
        print(f"{name:20s} {count / config.batch_size_per_gpu / 1e9:9.1f} GFLOP an image")
    if not config.utilisation:
        print(f"{'products':20s} {1e3 * cost['seconds']['products']:9.0f} ms a step, at "
              f"{SHARE_OF_PEAK:.0%} of the peak")
        print(f"{'memory traffic':20s} {1e3 * cost['seconds']['memory']:9.0f} ms a step, at "
              f"{SHARE_OF_BANDWIDTH:.0%} of {bandwidth / 1e12:.2f} TB/s")
        print(f"{'start of kernels':20s} {1e3 * cost['seconds']['start']:9.0f} ms a step "
              "at least, while the other two go on")
    print(f"{'peak':20s} {peak / 1e12:9.0f} TFLOP/s, of which {cost['utilisation']:.0%} are "
          "reached, by these assumptions (--utilisation: by yours)")
    print("not counted         what the GPUs send to each other, and waiting for images")


def print_memory(parts: dict[str, float], config: PlanConfig):
    """The memory of one GPU by part, and whether it has as much."""
    for name, size in parts.items():
        print(f"{name:20s} {size:9.2f} GB")

    # A data sheet's GB are 10**9 bytes, and all GB that we print are 2**30. Example: a GPU of
    # 80 GB holds 74.5 of ours. It may have a little more, which the libraries need.
    memory = sum(parts.values())
    room = GPUS[config.kind][2] * 1e9 / 2**30
    advice = ""
    if memory > room:
        advice = ": too much; fewer images each, or --parallel fsdp"
    print(f"{'in all':20s} {memory:9.2f} GB of {room:.1f} a GPU{advice}")


def print_stages(stages: list[dict]):
    """A line for each stage of --curriculum: its crops, and what they cost."""
    print("  crops, px      steps  GFLOP an image   images/s      days        GB")
    for cost in stages:
        crops = " and ".join(map(str, cost["crops"]))
        memory = sum(cost["memory_parts"].values())
        print(f"  {crops:10s} {cost['steps']:9,d} {cost['gflop_per_image']:15.1f} "
              f"{cost['images_per_second']:10.0f} {cost['days']:9.2f} {memory:9.2f}")


def traffic(config: PlanConfig) -> float:
    """The bytes that a step reads from the GPU's memory and writes to it, beside its products.

    Each tensor that is kept for the backward pass is the result of one small operation and the
    input of others, forward and backward.
    """
    # As if nothing were saved: with checkpointing fewer tensors are kept, but all of them are
    # still computed and used. With FSDP a process holds a part of the weights, and has its share
    # of their traffic; but it receives the others, which takes longer than reading its own.
    # So that a plan does not look better by it, its traffic is that of DDP.
    full = replace(config, activation_checkpointing=False, parallel="ddp")
    parts = expected_memory(meta_student(full), full, Process(torch.device("cpu")), on_gpu=True)
    of_weights = parts["two networks"] + parts["gradients"] + parts["moments"]
    return (PASSES_OF_KEPT * parts["kept for backward"]
            + PASSES_OF_WEIGHTS * of_weights) * 2**30
