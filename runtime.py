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
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import typing
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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
    """Decorator of a program's main(argv): a UsageError becomes one line on stderr and exit 2,
    control-C, where nobody waits for it, one line and exit 130."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


# ------------------------------------------------------------------------------------------------
# Flags from a dataclass: the comment beside a field is its help, a ruled comment its group


@functools.cache
def describe(config_class) -> dict[str, tuple[str, str]]:
    """Field -> (group, help), read from the source of the dataclass."""
    group, out = "options", {}
    classes = [cls for cls in reversed(config_class.__mro__) if dataclasses.is_dataclass(cls)]
    for line in (line for cls in classes for line in inspect.getsource(cls).splitlines()):
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


def not_negative(kind):
    """int or float as the type of a flag, from 0 up."""
    def number(text):
        value = kind(text)
        if not value >= 0:
            raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
        return value

    number.__name__ = kind.__name__  # for argparse's own message
    return number


def require(config, rule, words: str, *names: str):
    """Refuse each of these fields that breaks the rule, which `words` say."""
    for name in names:
        value = getattr(config, name)
        if not rule(value):
            given = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UsageError(f"--{name} {given}: expected {words}")


def parse(config_class, argv: list[str], presets: dict[str, dict] | None = None, usage: str = ""):
    """argv -> config. Rising authority: the field's default, the preset (first word), flags.

    No number of ours means anything below 0, unless its default is there.
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
            options = dict(nargs=many, type=not_negative(inner[0]), metavar=field.name.upper()[0])
        elif kind is str or field.default < 0:
            options = dict(type=kind, metavar=kind.__name__)
        else:
            options = dict(type=not_negative(kind), metavar=kind.__name__)
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

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def agree(self, thing):
        """What the main process has, on all processes."""
        if self.world_size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def everyone(self, thing) -> list:
        """What each process has, in the order of their ranks, on all processes."""
        things = [thing] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(things, thing)
        return things


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
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Place(torch.device(device), dist.get_rank(), dist.get_world_size())


def keep_freed_memory(place: Place):
    """For training on a CPU: what a step frees the next one needs again; have it keep the pages.

    glibc gives large blocks back to the system at once, and to have them cleared and mapped anew
    takes some tenth of a step. See mallopt(3): no block is too large to be kept (-4, M_MMAP_MAX),
    none is ever given back (-1, M_TRIM_THRESHOLD). With another library nothing is done.
    """
    if place.device.type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)
        mallopt(-1, -1)


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


second_stream = functools.cache(lambda device: torch.cuda.Stream(device))


@contextlib.contextmanager
def beside(device: torch.device):
    """On a GPU, what is inside goes to a second stream, beside what the first still computes.

    The list that it yields takes the tensors that the first will use: it waits for them, nobody
    else does. The host is ahead of a device that it never asks, by a step or so.
    """
    made = []
    if device.type != "cuda":
        yield made
        return
    first, second = torch.cuda.current_stream(device), second_stream(device)
    with torch.cuda.stream(second):
        yield made
    first.wait_stream(second)
    for x in made:
        x.record_stream(first)  # until then its memory is not given to another


LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """auto -> bf16 where the hardware multiplies matrices in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return "bf16" if can.get("amx_bf16") or can.get("avx512_bf16") else "fp32"
    return "fp32"


def autocast(precision: str, device: torch.device):
    """A context in which matrix products run in `precision`; parameters stay float32."""
    return torch.autocast(device.type, LOW.get(precision), enabled=precision in LOW)


def memory_gb(device: torch.device) -> float:
    """What the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held at once: of the GPU, or of this process and its largest worker."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, kilobytes elsewhere
    return sum(resource.getrusage(who).ru_maxrss for who in
               (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / unit


# ------------------------------------------------------------------------------------------------
# Networks larger than one device


def shard(network: nn.Module, cheap: list[nn.Module], exact: list[nn.Module], place: Place,
          precision: str):
    """Split parameters, gradients and moments over all processes, in place: FSDP2.

    Each module of the lists is gathered by itself when it runs and let go afterwards; the rest of
    the network is one more such unit. `cheap` ones are gathered, and their gradients summed, in the
    low precision, on GPUs; `exact` ones and the rest in float32. (A CPU's LayerNorm refuses
    parameters in less than its input has, and there is no wire to spare.)
    """
    # It warns of outputs that are views, for those who would write into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(place.device.type, (place.world_size,))
    low = LOW.get(precision) if place.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low, cast_forward_inputs=False)
    for module in cheap:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in [*exact, network]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def whole_state(network: nn.Module) -> dict:
    """The state dict with every tensor whole, on every process."""
    return dcp_state.get_model_state_dict(
        network, options=dcp_state.StateDictOptions(full_state_dict=True))


def live_state(networks: dict[str, nn.Module], optimizer=None, of: str = "") -> dict:
    """The tensors themselves, by the names of their parameters: what is saved, and filled on load.

    optimizer: whose moments, by the names of the parameters of networks[of].
    """
    state = {name: net.state_dict() for name, net in networks.items()}
    if optimizer is not None:
        state["optimizer"] = dcp_state.get_optimizer_state_dict(networks[of], optimizer)["state"]
    return state


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


# ------------------------------------------------------------------------------------------------
# Checkpoints: PyTorch's distributed ones, of tensors alone, each complete with its manifest

INDEX = {  # all that the index of such a checkpoint is made of
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype))},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}


class IndexUnpickler(pickle.Unpickler):
    """Builds an index and nothing else: a pickle can ask for any function to be run."""

    def find_class(self, module, name):
        if name not in INDEX.get(module, ()):
            raise ValueError(f"its index asks for {module}.{name}, which has no place there")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """DCP's reader, for files that may come from anywhere. Tensors are read with weights_only."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            index = IndexUnpickler(file).load()
        files = set(json.loads((Path(self.path) / "manifest.json").read_text())["files"])
        if not {str(info.relative_path) for info in index.storage_data.values()} <= files:
            raise ValueError("its index names files that its manifest does not")
        index.storage_meta.load_id = self.load_id
        return index


def quiet():
    """DCP warns of a single process, which is what we mean."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def save_checkpoint(folder: Path, step: int, state: dict, facts: dict, place: Place, keep: int = 2):
    """Nested dictionaries of tensors, sharded or not, -> folder/step-N, written by all processes.

    Complete with its manifest.json, which is written last and holds `facts`. Those beyond the
    newest `keep` go.
    """
    aside, final = folder / f"tmp-{step}", folder / f"step-{step}"
    if place.main:
        for rest in folder.glob("tmp-*"):  # of a save that was killed
            shutil.rmtree(rest)
        aside.mkdir(parents=True)
    place.barrier()
    alone = place.world_size == 1
    with quiet():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(aside), no_dist=alone)
    mine = {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)}
            for file in aside.glob(f"__{place.rank}_*")}  # each process vouches for what it wrote
    files = place.everyone(mine)
    if place.main:
        index = aside / ".metadata"
        files.append({index.name: {"bytes": index.stat().st_size, "sha256": digest(index)}})
        write_json(aside / "manifest.json", {"step": step, **facts, "files": {
            name: about for part in files for name, about in part.items()}})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    place.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """Folders step-N, newest first."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: -int(p.name[5:]))


def find_checkpoint(folder: Path, place: Place) -> tuple[Path, dict] | None:
    """The newest checkpoint that agrees with its manifest, and that; the same on all processes.

    A damaged or foreign one is named and passed over. Nothing in it is run.
    """
    found = None
    for path in checkpoints(folder) if place.main else ():
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            for name, known in manifest["files"].items():
                if (path / name).stat().st_size != known["bytes"]:
                    raise ValueError(f"{name} has not the size that its manifest states")
                if digest(path / name) != known["sha256"]:
                    raise ValueError(f"{name} does not match the checksum in its manifest")
            Reader(path).read_metadata()
            found = path, manifest
            break
        except Exception as error:  # a pickle that is no pickle fails in any way
            place.print(f"{path} is damaged ({error!s:.200}); trying the one before it")
    return place.agree(found)


def load_checkpoint(path: Path, state: dict, place: Place):
    """Fill the tensors of `state`, in place, whatever number of processes wrote them."""
    try:
        with quiet():
            dcp.load(state, storage_reader=Reader(path), no_dist=place.world_size == 1)
    except dcp.CheckpointException as error:  # no Exception, but a BaseException
        first = next(iter(error.failures.values()))[0]
        raise UsageError(f"{path} does not fit this run: {first!s:.300}") from None


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


class Progress:
    """Called with the number done: tells it and the time left, on stderr of the main process.

    On a terminal one line that is rewritten, elsewhere a line every half minute.
    """

    def __init__(self, what: str, total: int, place: Place):
        self.what, self.total, self.place = what, total, place
        self.live = sys.stderr.isatty()
        self.begun = self.told = time.perf_counter()

    def __call__(self, done: int):
        now, last = time.perf_counter(), done >= self.total
        if not self.place.main or now - self.told < (0.2 if self.live else 30) and not (
                last and self.live):
            return
        self.told, left = now, int((now - self.begun) * (self.total / max(done, 1) - 1))
        text = (f"{self.what}: {done:,d} of {self.total:,d}, "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        print(f"\r{text:79s}" if self.live else text, end="\n" if last or not self.live else "",
              file=sys.stderr, flush=True)


if __name__ == "__main__":
    here = start()
    print(f"device {here.device}, precision {resolve_precision('auto', here.device)}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
