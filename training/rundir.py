"""Run directory: what a run leaves behind, and whether this command continues it.

    runs/PRESET/ config.json metrics.jsonl checkpoint/ snapshots/ teacher.pt heads.pt ...

Idea     A run is its directory. The same command continues it; a command that would change its
         result is refused, with the flags that differ; and nothing is overwritten unless
         --no_resume says so.
Paper    none
Try      python train.py && python train.py      the second one says that the run is finished
Change   a setting that may differ between two parts of one run is a name in NEUTRAL of
         training/config.py
Tests    pytest tests/training/test_rundir.py
"""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

from machinery.checkpoints import write_json, write_text
from machinery.flags import UsageError
from machinery.process import Process, resolve_precision
from training.config import NEUTRAL, Config
from training.recipes import SCALED, auto_scale

# ----------------------------------------------------------------------------------------------
# May this command go on with what is there?


def match_stored_run(config: Config, folder: Path, process: Process, images: int) -> Config:
    """`config` as it continues the run in `folder`; UsageError with the flags that differ.

    Where there is no run to continue, what was left open is settled here: --precision auto, and
    the settings of --auto_scale, for which the number of `images` must be known.
    """
    stored_file = folder / "config.json"
    global_batch = config.batch_size_per_gpu * process.world_size
    config = dataclasses.replace(config)  # a copy: the caller's stays as it is

    # A new run.
    if not (config.resume and stored_file.exists()):
        if config.auto_scale:
            config = auto_scale(config, images, global_batch)
        # On a CPU PyTorch's gradient of a convolution in bfloat16 is wrong where an image is one
        # pixel (2.14), as small crops are in the last layers of a ResNet.
        kinds = () if config.convnet and process.device.type == "cpu" else ("bf16", "fp16")
        config.precision = resolve_precision(config.precision, process.device, kinds)
        return config

    # Imported here, because a new run has nothing to read.
    from training.stored import read_config, warn_of_changed_code

    warn_of_changed_code(folder, process)

    # What was settled when the run began is not asked again: the machine may be another one.
    stored = read_config(stored_file, type(config))
    if config.auto_scale:
        for name in SCALED:
            decided = (*config.given, *config.taken_over, *stored["given"],
                       *stored["taken_over"])
            if name not in decided:
                setattr(config, name, stored[name])
    if config.precision == "auto":
        config.precision = stored["precision"]

    # The global batch decides what is learned; the number of processes that share it does not.
    # Example: a run of 2 processes with 32 images each continues on 4 processes with 16 each,
    # without another flag. A --batch_size_per_gpu other than the run's asks for another global
    # batch, unless it comes to the same: 16 on 4 processes.
    if config.batch_size_per_gpu == stored["batch_size_per_gpu"]:
        global_batch = stored["global_batch"]
    if global_batch % process.world_size:
        raise UsageError(f"the run's global batch of {global_batch} does not divide over "
                         f"{process.world_size} processes")
    config.batch_size_per_gpu = global_batch // process.world_size

    # The number of images decides how many steps an epoch has, and in which order they come.
    if stored.get("images") not in (None, images):
        raise UsageError(
            f"{folder} began with {stored['images']:,d} images, --data has {images:,d}: "
            "give the same images, or --no_resume to start anew, or begin another "
            f"run with --init {folder}")

    # Everything else has to be the same, except for what cannot change the result. A field that
    # the run's config.json lacks has its default there (read_config).
    asked = dataclasses.asdict(config)
    may_differ = NEUTRAL | {"batch_size_per_gpu", "preset"}

    # With --val_data nothing is held out of --data, whatever its share would be.
    if config.val_data:
        may_differ = may_differ | {"val_share"}
    differences = []
    for name, value in asked.items():
        if name not in may_differ and value != stored.get(name):
            differences.append(f"--{name} {value} (the run has {stored.get(name)})")
    if global_batch != stored["global_batch"]:
        differences.append(
            f"--batch_size_per_gpu {config.batch_size_per_gpu} on {process.world_size} "
            f"processes (the run has a global batch of {stored['global_batch']})")
    if differences:
        raise UsageError(
            f"{folder} holds a run of another configuration: {', '.join(differences)}; "
            "give the same flags, another --output_dir, or --no_resume to start anew")
    return config


@contextlib.contextmanager
def locked(folder: Path, process: Process):
    """Inside, no other program can train in this folder; UsageError if one does already.

    The folder is made if it is not there.
    """
    lock = contextlib.nullcontext()
    taken = False
    if process.main:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")

        # The system takes this lock away when the process ends, however it ends. (Of its two
        # kinds of locks lockf is the one that children do not hold on to: workers may live for
        # some seconds longer than a process that was killed.) Windows has no fcntl, and some
        # network disks know no locks: there nobody is kept out.
        try:
            import fcntl

            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            taken = True
        except (ImportError, OSError):
            pass

    with lock:
        # The main process alone asks, but all have to leave together.
        if process.broadcast(taken):
            raise UsageError(f"{folder}: another program is training there; wait until it has "
                             "ended, or give another --output_dir")
        yield


def create_run_dir(folder: Path, config: Config, process: Process, images: int):
    """Write what a run directory holds from the start: its settings and its code.

    With --no_resume an old run in the same place is removed first.
    """
    # Only what a run has written is removed, by name: the folder may hold other files. The heads
    # of a distillation's teacher are a run of their own, which begins anew by the same flag.
    if not config.resume:
        for name in ("checkpoint", "code", "snapshots"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.jsonl", "summary.json", "card.md", "config.json", "teacher.pt",
                     "heads.pt", "story.png", "story.pdf", "trace.json"):
            (folder / name).unlink(missing_ok=True)
    if (folder / "config.json").exists():
        return

    # The global batch is stored, because the number of processes is not a setting; and so is the
    # number of images, because files may come or go.
    stored = dataclasses.asdict(config)
    stored["global_batch"] = config.batch_size_per_gpu * process.world_size
    stored["images"] = images
    write_json(folder / "config.json", stored)

    # The code as it was when the run began: the files at the top and those of each room.
    top = Path(__file__).resolve().parent.parent
    rooms = [init.parent for init in top.glob("*/__init__.py")]
    for source in (top, *rooms):
        target = folder / "code" / source.relative_to(top)
        target.mkdir(parents=True, exist_ok=True)
        for file in source.glob("*.py"):
            shutil.copy(file, target)


# ----------------------------------------------------------------------------------------------
# metrics.jsonl: one line of JSON for each log line and each evaluation


def record(folder: Path, row: dict, process: Process):
    """Append one row to metrics.jsonl, from the main process."""
    # One write of one short line, so that a run that is killed leaves whole lines behind, but
    # for the last one at most.
    if process.main:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def forget_metrics_after(file: Path, step: int, process: Process, judged: bool = True):
    """Drop the rows of metrics.jsonl after `step`; without `judged` those of its judges, too.

    A run that was killed may have logged steps after its last checkpoint. It takes these steps
    once more, and would log them twice.
    """
    if not process.main or not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        # The last line may be half written: then it is no JSON, and goes as well.
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row["step"] < step or row["step"] == step and (judged or "loss" in row):
                kept.append(line + "\n")
    write_text(file, "".join(kept))
