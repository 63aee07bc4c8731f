"""Forecast: how the cost of a step grows, and what a whole run would take elsewhere.

    one setting at a time, smaller and larger --> seconds and memory, as curves    (growth)
    counted work / assumed share of a GPU's peak --> days, GB                      (plan)

Idea     What is measured and what is assumed are kept apart: growth runs every point, plan runs
         nothing and says so.
Paper    none
Try      python -m bench growth dino_vits16 --batch_size_per_gpu 2
         python -m bench plan dinov2_vitl14 --gpus 32 --kind h100
Change   another GPU is one line in GPUS, another thing that grows one line in GROWTH
Tests    pytest tests/bench/test_forecast.py
"""

import json
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
import visualize
import vit
from bench.count import count_work, meta_student
from bench.step import Config, Memory, Step, made_up_batch
from images.data import open_images
from machinery.flags import UsageError
from machinery.process import Process, keep_freed_memory
from training.config import Config as TrainingConfig
from training.memory import expected_memory

# ----------------------------------------------------------------------------------------------
# How the cost grows: one thing at a time, all else as the preset has it

GROWTH = {  # what grows -> times as much as the preset has of it
    "global_crops_size": (0.5, 1, 1.5, 2), "patch_size": (0.5, 1, 2),
    "local_crops_number": (0, 0.5, 1, 2), "n_prototypes": (1 / 64, 1 / 8, 1, 2),
    "depth": (0.25, 0.5, 1, 2), "batch_size_per_gpu": (0.5, 1, 2, 4)}


def growth(config: Config, process: Process) -> dict:
    """Seconds and memory of a step as one thing grows, and images/s of more processes.

    Each point is the fastest of its steps, in a process of its own. Draws growth.png.
    """
    if config.convnet:
        raise UsageError(
            f"--arch {config.arch}: growth is of a ViT, which has patches and a depth")
    depth, found = vit.ARCHS[config.arch]["depth"], {name: [] for name in GROWTH}
    alone = dict(mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    print(f"{'':20s}    value  seconds  ms/image  peak GB")
    with ProcessPoolExecutor(1, **alone) as pool:
        for name, factors in GROWTH.items():
            now = depth if name == "depth" else getattr(config, name)
            values = dict.fromkeys(int(now * factor) for factor in factors)
            for value in (v for v in values if v or name == "local_crops_number"):
                row = pool.submit(point, config, process, name, value).result()
                found[name].append(row)
                print(
                    f"{name:20s} {value:8,d} {row['step_seconds']:8.3f} "
                    f"{1e3 * row['seconds_per_image']:9.1f} {row['peak_memory_gb']:8.2f}",
                    flush=True)
    found["processes"] = rates_of_processes(config, process)
    print(f"wrote {draw_growth(found, Path('growth.png'))}")
    return {"growth": found}


def point(config: Config, process: Process, name: str, value: int) -> dict:
    """A step where `name`, a flag or the network's depth, is that value."""
    keep_freed_memory(process)
    if name == "depth":
        vit.ARCHS[config.arch] |= {"depth": value}
    else:
        config = replace(config, **{name: value})
    networks = *train.build(config, process), train.build_centerings(config).to(process.device)
    version = Step(networks, made_up_batch(config, process), config, process)
    version()
    memory = Memory(process.device)
    memory.begin()
    fastest = min(version() for _ in range(config.steps + 1))
    return {
        "value": value, "step_seconds": fastest, "peak_memory_gb": memory.peak_gb(),
        "seconds_per_image": fastest / config.batch_size_per_gpu}


def rates_of_processes(config: Config, process: Process) -> list[dict]:
    """Images/s of train.py with 1, 2, 4 ... processes, a GPU or a core each, on drawn
    shapes.
    """
    most = torch.cuda.device_count() if process.device.type == "cuda" else os.cpu_count()
    rows, B, flags = [], config.batch_size_per_gpu, []
    for name in set(config.given) & set(TrainingConfig.__dataclass_fields__):
        value = getattr(config, name)
        flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    for count in (2**i for i in range(most.bit_length())):
        with tempfile.TemporaryDirectory() as folder:
            steps = config.steps + 4
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={count}",
                str(Path(train.__file__)), config.preset, *flags, "--data",
                f"shapes:{B * count * steps}", "--val_data", "shapes:1:val", "--device",
                process.device.type, "--precision", config.precision, "--batch_size_per_gpu",
                str(B), "--epochs", "1", "--warmup_epochs", "0", "--epoch_length",
                str(steps), "--output_dir", folder]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.run(command, stdout=subprocess.DEVNULL, env=one_thread).returncode:
                raise UsageError(f"train.py with {count} processes failed, as it says above")
            summary = json.loads((Path(folder) / "summary.json").read_text())
        rows.append({"value": count, "images_per_second": summary["images_per_second"]})
        print(f"{'processes':20s} {count:8,d} {rows[-1]['images_per_second']:8.2f} images/s",
              flush=True)
    return rows


def draw_growth(found: dict[str, list[dict]], path: Path) -> Path:
    """What `python -m bench growth` found, a panel for each thing that grows; the last one is a
    legend.
    """
    plt = visualize.pyplot()
    fig, axes = plt.subplots(2, 4, figsize=(14, 5.6), layout="constrained")
    for axis, (name, rows) in zip(axes.flat, found.items()):
        x = [row["value"] for row in rows]
        axis.set_xscale("symlog" if 0 in x else "log", base=2)
        axis.set_xticks(x, [f"{n // 1024}k" if n > 9999 else f"{n}" for n in x])
        axis.minorticks_off()
        axis.set_xlabel(name)
        if name == "processes":
            rate = [row["images_per_second"] for row in rows]
            lines = [(axis, rate, "^-", "tab:green"),
                     (axis, [rate[0] * n for n in x], ":", "gray")]
        else:
            lines = [
                (axis, [1e3 * row["seconds_per_image"] for row in rows], "o-", "tab:blue"),
                (axis.twinx(), [row["peak_memory_gb"] for row in rows], "s--", "tab:orange")]
        for side, y, style, color in lines:
            side.plot(x, y, style, color=color)
            side.set_ylim(0, 1.1 * max(y))
    for style, color, label in (("o-", "tab:blue", "milliseconds an image (left)"),
                                ("s--", "tab:orange", "peak memory, GB (right)"),
                                ("^-", "tab:green", "images a second, all processes"),
                                (":", "gray", "the same if nothing were lost")):
        axes.flat[-1].plot([], [], style, color=color, label=label)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(loc="center", frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


# ----------------------------------------------------------------------------------------------
# What a run would cost elsewhere

# Dense bf16 operations a second and GB of memory, as their maker states them.
GPUS = {"a100": (312e12, 80), "h100": (989e12, 80), "h200": (989e12, 141)}

SIZES = {"shapes": 5_000, "CIFAR10": 50_000, "Imagenette": 9_469, "ImageNet": 1_281_167}


def images_of(config: Config) -> int:
    if config.images or config.data in SIZES:
        return config.images or SIZES[config.data]
    return len(open_images(config.data, config.data_root, config.download))


@dataclass
class PlanConfig(Config):
    # -- plan
    gpus: int = 8  # how many GPUs
    kind: Literal[*GPUS] = "h100"  # of which kind
    utilisation: float = 0.35  # share of the kind's peak that is reached, an assumption


def plan(config: PlanConfig, process: Process) -> dict:
    """Memory, speed and days of a whole run elsewhere: an estimate, and what it is made of."""
    config = replace(config,
                     precision="bf16" if config.precision == "auto" else config.precision)
    B, (peak, available) = config.batch_size_per_gpu, GPUS[config.kind]
    work = count_work(config)
    there = Process(torch.device("cpu"), world_size=config.gpus)
    parts = expected_memory(meta_student(config), config, there)
    total = sum(work.values()) / B
    rate = config.gpus * config.utilisation * peak / total
    batch = B * config.gpus
    steps = config.epochs * (config.epoch_length or max(images_of(config) // batch, 1))
    days = steps * batch / rate / 86400
    print(
        f"{config.preset} on {config.gpus} {config.kind}, {B} images each: an estimate, nothing "
        "here was measured\n")
    for name, operations in work.items():
        print(f"{name:20s} {operations / B / 1e9:9.1f} GFLOP an image")
    print(
        f"{'peak':20s} {peak / 1e12:9.0f} TFLOP/s, of which {config.utilisation:.0%} are assumed "
        "to be reached (--utilisation)\n"
        f"{'images/s':20s} {rate:9.0f}, {rate / config.gpus:.0f} on each\n"
        f"{'steps':20s} {steps:9,d} of {batch:,d} images\n{'days':20s} {days:9.2f}\n")
    for name, value in parts.items():
        print(f"{name:20s} {value:9.2f} GB")
    memory = sum(parts.values())
    print(f"{'in all':20s} {memory:9.2f} GB of {available} a GPU"
          + (": too much; fewer images each, or --parallel fsdp" if memory > available else ""))
    return {
        "images_per_second": rate, "days": days, "memory_gb": memory, "memory_parts": parts,
        "gflop_per_image": total / 1e9, "steps": steps, "utilisation": config.utilisation}
