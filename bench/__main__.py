"""Bench: python -m bench TASK [PRESET] [--flag value ...]

    TASK: step | data | photometry | eval | attention | probes | growth | plan | search
          | speedrun | ablate                               --> a table, and --json FILE

Idea     One command for every question about cost. This file reads the flags and chooses the
         device; how something is measured is told in the file of its task.
Paper    none
Try      python -m bench step shapes --steps 3 --plain
         python -m bench plan dinov2_vitl14 --gpus 32 --kind h100
Change   another benchmark is one function in a file of bench/ and one line in TASKS
Tests    pytest tests/bench
"""

import time
from pathlib import Path

import torch

import train
from bench.ablate import AblateConfig, ablate
from bench.forecast import PlanConfig, growth, images_of, plan
from bench.speedrun import SpeedrunConfig, speedrun
from bench.stages import (EvaluationConfig, InputConfig, ProbesConfig, SearchConfig,
                          time_attention, time_evaluation, time_input, time_photometry,
                          time_probes, time_search)
from bench.step import Config, StepConfig, time_step
from bench.table import table
from machinery.checkpoints import write_json
from machinery.flags import UsageError, command, require, user_errors
from machinery.process import Process, resolve_precision, start_process
from training.check import check
from training.recipes import PRESETS, auto_scale
from training.warmstart import config_from_init

# The name of a benchmark -> the function that runs it, and the dataclass of its flags. The
# function is called with the configuration and the process, prints a table, and returns what
# --json writes. The first line of its docstring is what --help says of it.
TASKS = {
    "step": (time_step, StepConfig), "data": (time_input, InputConfig),
    "eval": (time_evaluation, EvaluationConfig), "attention": (time_attention, Config),
    "photometry": (time_photometry, Config), "probes": (time_probes, ProbesConfig),
    "search": (time_search, SearchConfig), "growth": (growth, Config),
    "plan": (plan, PlanConfig), "speedrun": (speedrun,
                                             SpeedrunConfig), "ablate": (ablate, AblateConfig)}
USAGE = "python -m bench TASK [PRESET] [--flag value ...]"


def overview() -> str:
    """What `python -m bench --help` prints: the tasks, and how to see the flags of one."""
    lines = [f"usage: {USAGE}", "", "TASK is one of"]
    for name, (function, _) in TASKS.items():
        about = (function.__doc__ or "").split("\n")[0]
        lines.append(f"  {name:10s} {about}")
    lines += [
        "", "python -m bench TASK --help lists the flags of that task",
        "python -m bench table FILE ... makes rows in Markdown of what step --json wrote"]
    return "\n".join(lines)


def read_flags(name: str, argv: list[str]) -> Config:
    """The configuration of a task; UsageError for numbers that mean nothing."""
    # train.read_flags takes the first preset where none is named. What a step costs is asked of a
    # paper's recipe more often than of the drawn shapes, which train.py begins with.
    presets = {"dino_vits16": PRESETS["dino_vits16"], **PRESETS}
    config = train.read_flags(argv, TASKS[name][1], presets, f"-m bench {name}")

    # The weights of --init decide what the network is. A plan is not worth a download.
    if config.init and (name != "plan" or Path(config.init).expanduser().exists()):
        config = config_from_init(config)
    elif config.init:
        print(f"--init {config.init} is not on this machine: what follows is for "
              f"--arch {config.arch} --patch_size {config.patch_size}")

    # Each task has some of these fields only.
    counts = []
    for field in ("steps", "gpus", "bank", "queries", "classes", "width", "k"):
        if hasattr(config, field):
            counts.append(field)
    require(config, lambda x: x >= 1, "at least 1", *counts)
    if hasattr(config, "utilisation"):
        require(config, lambda x: 0 <= x <= 1, "0 (the estimate) to 1", "utilisation")

    # Asked now and not when the file is written, which may be hours later: all that was
    # measured by then would be lost.
    if config.json and not Path(config.json).parent.is_dir():
        raise UsageError(f"--json {config.json}: there is no folder {Path(config.json).parent}")
    if config.json and Path(config.json).is_dir():
        raise UsageError(f"--json {config.json}: it is a folder; give the name of a file")
    check(config, is_plan=name == "plan")
    return config


@command
def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(overview())
        return None

    # This task only reads files that others wrote, so no flag, preset or device concerns it.
    if argv[:1] == ["table"]:
        print(table(argv[1:]))
        return None
    if not argv or argv[0] not in TASKS:
        given = argv[0] if argv else ""
        raise UsageError(f"task {given!r}: choose from {', '.join(TASKS)}; usage: {USAGE}")
    name = argv[0]
    config = read_flags(name, argv[1:])

    # A plan runs nothing. So it needs no device, and "auto" is not what this machine multiplies
    # fastest in: plan decides that for the machine that it is about.
    is_plan = name == "plan"
    process = start_process("cpu" if is_plan else config.device)
    if process.world_size > 1 and name not in ("speedrun", "ablate"):
        raise UsageError(f"{name} times one process, and torchrun has started "
                         f"{process.world_size}: start it with python; growth times several")
    if not is_plan:
        config.precision = resolve_precision(config.precision, process.device)

    # --auto_scale sets what depends on the number of images and on the batch of all processes:
    # of all GPUs of a plan, else of the one process that is timed. Whole runs set it themselves,
    # for all their processes and for the epochs that they really have.
    if config.auto_scale and name not in ("speedrun", "ablate"):
        batch = config.batch_size_per_gpu * (config.gpus if is_plan else 1)
        with user_errors():
            config = auto_scale(config, images_of(config), batch)

    # Seconds without the machine that they are from say nothing, so both the table and the
    # file begin with it.
    about = {
        "task": name, "preset": config.preset, "device": device_name(process),
        "precision": config.precision, "batch_size_per_gpu": config.batch_size_per_gpu,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "day": time.strftime("%b %d").replace(" 0", " ")}

    # A plan measures nothing on this machine, so it is not told about it either.
    if not is_plan:
        print("  ".join(f"{key} {value}" for key, value in about.items()))
    run_task = TASKS[name][0]
    with user_errors():
        result = about | run_task(config, process)
    if config.json:
        write_json(Path(config.json), result)
    return result


def device_name(process: Process) -> str:
    """The name of the GPU, such as "NVIDIA H100 80GB HBM3", or else cpu or mps."""
    if process.device.type == "cuda":
        return torch.cuda.get_device_name()
    return process.device.type


if __name__ == "__main__":
    main()
