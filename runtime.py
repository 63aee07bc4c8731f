"""Runtime: what every program needs and no paper mentions. Do not think about it.

    flags --> Config (a dataclass) --> device, precision, processes --> the program
                                                                       |
                                            checkpoint/step-N  <--> state, written aside, renamed

Idea     A checkpoint exists when its manifest does, and the manifest is written last. So a run that
         is killed at any moment finds the old checkpoint or the new one, never half of one.
Paper    none
Try      python runtime.py      what this machine would run with
Change   flags are fields of a program's Config: there is no second list of them
Tests    pytest tests/test_runtime.py
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import typing
from pathlib import Path

import torch
import torch.distributed as dist

# ------------------------------------------------------------------------------------------------
# Errors that are the user's to mend: one line, exit code 2


class UsageError(Exception):
    """What was given, what was expected, which flag to touch."""


@contextlib.contextmanager
def usage():
    """Inside, a ValueError is about the user's input; elsewhere it is a bug and keeps its trace."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def command(main):
    """Decorator of a program's main(argv): a UsageError becomes one line on stderr and exit 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


# ------------------------------------------------------------------------------------------------
# Flags from a dataclass: the comment beside a field is its help, a ruled comment its group


def describe(config_class) -> dict[str, tuple[str, str]]:
    """Field -> (group, help), read from the source of the dataclass."""
    group, out = "options", {}
    for line in inspect.getsource(config_class).splitlines():
        if match := re.match(r"\s*# -- (.+)", line):
            group = match[1].strip()
        elif match := re.match(r"\s*(\w+): [^#]+?(?:#\s*(.*))?$", line):
            out[match[1]] = (group, match[2] or "")
    return out


class Parser(argparse.ArgumentParser):
    def error(self, message):
        if match := re.search(r"unrecognized arguments: (--\S+)", message):
            given = match[1].split("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(given, known, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists them"
            message = f"there is no flag {given}; {hint}"
        raise UsageError(message.replace("argument --", "--"))


def to_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        return text.lower() in ("true", "1", "yes", "on")
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def parse(config_class, argv: list[str], presets: dict[str, dict] | None = None, usage: str = ""):
    """argv -> config. Rising authority: the field's default, the preset (first word), flags.

    A config with a field `given` keeps the names of the flags there.
    """
    parser = Parser(allow_abbrev=False, usage=usage or None,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100))
    if presets:
        parser.add_argument("preset", nargs="?", help=", ".join(presets))
    about, types = describe(config_class), typing.get_type_hints(config_class)
    groups = {}
    for field in dataclasses.fields(config_class):
        if field.name in ("preset", "given"):
            continue
        group, text = about[field.name]
        kind, options = types[field.name], {}
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag = f"--{field.name}"
        if kind in (bool, bool | None):  # None: the program decides
            options = dict(nargs="?", const=True, type=to_bool, metavar="true|false")
            groups[group].add_argument(f"--no_{field.name}", dest=field.name, action="store_false",
                                       default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        elif typing.get_origin(kind) is typing.Literal:
            options = dict(choices=typing.get_args(kind), type=type(typing.get_args(kind)[0]))
        elif typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            many = "+" if inner[-1] is Ellipsis else len(inner)
            options = dict(nargs=many, type=inner[0], metavar=field.name.upper()[0])
        else:
            options = dict(type=kind, metavar=kind.__name__)
        if field.default is not None:
            text = f"{text} [{field.default}]"
        text = text.replace("%", "%%").strip()
        groups[group].add_argument(flag, default=argparse.SUPPRESS, help=text, **options)
    given = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    values = {}
    if presets:
        name = given.pop("preset") or next(iter(presets))
        if name not in presets:
            near = difflib.get_close_matches(name, presets, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"there is no preset {name!r}; {hint}choose from {', '.join(presets)}")
        values = dict(presets[name], preset=name)
    if "given" in types:
        values["given"] = tuple(given)
    return config_class(**{**values, **given})


# ------------------------------------------------------------------------------------------------
# Device, precision, processes


@dataclasses.dataclass
class Place:
    """Where this process runs, and among how many."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def print(self, *words):
        if self.main:
            print(*words, flush=True)


def start(device: str = "auto") -> Place:
    """Choose the device and, under torchrun, join the other processes."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    kind = device.split(":")[0]
    if not available.get(kind):
        found = ", ".join(name for name, here in available.items() if here)
        raise UsageError(f"--device {device}: not available here; choose from auto, {found}")
    if "WORLD_SIZE" not in os.environ:
        return Place(torch.device(device))
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device = f"cuda:{torch.cuda.current_device()}"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Place(torch.device(device), dist.get_rank(), dist.get_world_size())


class Farewell:
    """SIGTERM and SIGINT: finish the step, save, and go with the exit code 143 or 130.

    A signal reaches processes at different steps; `agreed` is asked after every step and gives the
    same answer to all of them. It talks over gloo on the CPU, so no device is waited for.
    """

    def __init__(self, place: Place):
        self.signal, self.before = 0, {}
        self.group = dist.new_group(backend="gloo") if place.world_size > 1 else None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.signal:  # asked twice: at once
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self) -> int:
        """The signal that any process got, 0 if none."""
        if self.group is None:
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return int(flag)


def resolve_precision(precision: str, device: torch.device) -> str:
    """auto -> bf16 where the hardware multiplies matrices in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16" if device.type == "cpu" and amx() else "fp32"


def autocast(precision: str, device: torch.device):
    """A context in which matrix products run in bf16; parameters and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held at once: of the GPU, or of this process and its largest worker."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, kilobytes elsewhere
    return sum(resource.getrusage(who).ru_maxrss for who in
               (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / unit


# ------------------------------------------------------------------------------------------------
# Files that are whole or not there


def write_text(path: Path, text: str):
    """Write aside, then rename."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def write_json(path: Path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def save(path: Path, state):
    """torch.save, aside, flushed to the disk, then renamed."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 2):
    """state -> folder/step-N/. Complete with its manifest.json; older ones beyond `keep` go."""
    aside, final = folder / f"tmp-{step}", folder / f"step-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save(aside / "state.pt", state)
    file = aside / "state.pt"
    write_json(aside / "manifest.json",
               {"state.pt": {"bytes": file.stat().st_size, "sha256": digest(file)}})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Folders step-N, newest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: -int(p.name[5:]))


def load_checkpoint(folder: Path, say=print) -> dict | None:
    """The newest checkpoint that agrees with its manifest; a damaged one is named and passed over.

    Read with weights_only=True: a checkpoint from elsewhere can hold no code.
    """
    for path in checkpoints(folder):
        try:
            for name, known in json.loads((path / "manifest.json").read_text()).items():
                if (path / name).stat().st_size != known["bytes"]:
                    raise ValueError(f"{name} has not the size that its manifest states")
                if digest(path / name) != known["sha256"]:
                    raise ValueError(f"{name} does not match the checksum in its manifest")
            return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError) as error:
            say(f"{path} is damaged ({error}); trying the one before it")
    return None


# ------------------------------------------------------------------------------------------------
# Time


class Clock:
    """Rate and time left, from steps alone: evaluations, saves and first steps do not count."""

    def __init__(self, step: int, total: int, skip: int = 5):
        self.first, self.step, self.total, self.skip = step, step, total, skip
        self.begun, self.counted, self.seconds, self.waited = time.time(), 0, 0.0, 0.0
        self.mark = time.perf_counter()

    def wait(self, batches):
        """next(batches), with the time it took booked as waiting for data."""
        before = time.perf_counter()
        batch = next(batches)
        if self.skip <= 0:
            self.waited += time.perf_counter() - before
        return batch

    def tick(self):
        now = time.perf_counter()
        self.step, self.skip = self.step + 1, self.skip - 1
        if self.skip < 0:
            self.counted, self.seconds = self.counted + 1, self.seconds + now - self.mark
        self.mark = now

    @contextlib.contextmanager
    def pause(self):
        before = time.perf_counter()
        yield
        self.mark += time.perf_counter() - before

    @property
    def step_seconds(self) -> float:
        if self.counted:
            return self.seconds / self.counted
        # Nothing but first steps so far: a first guess, warm-up and all.
        return (time.time() - self.begun) / max(self.step - self.first, 1)

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting for data."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def eta(self) -> str:
        left = int((self.total - self.step) * self.step_seconds)
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


if __name__ == "__main__":
    here = start()
    print(f"device {here.device}, precision {resolve_precision('auto', here.device)}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
