"""Process: the device and the precision of this process, and the processes that it works with.

    python train.py ...                     one process
    torchrun --nproc_per_node=8 train.py    eight, by rank --> start_process() -> Process

Idea     A program asks once where it runs, and hands the answer to every function that needs
         it. With one process every exchange gives back what was put in, so the same code runs
         on a laptop and on a cluster.
Paper    none
Try      python -m machinery.process      what this machine would run with
Change   another kind of accelerator is one entry of `available` in start_process; it runs in
         float32 unless fast_precisions gets a branch for it
Tests    pytest tests/machinery/test_process.py
"""

import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import signal
import threading

import torch
import torch.distributed as dist

from machinery.flags import UsageError


@dataclasses.dataclass
class Process:
    """Where this process runs, and among how many.

    torchrun starts the same program several times, usually once per GPU. Each of these
    processes has a rank, from 0 to world_size - 1. The one of rank 0 is the main process: it
    alone prints, and writes what is to be written once.

    Rule for everything below that talks to other processes (barrier, broadcast, all_gather): if
    one process calls it, all have to, or those that do will wait for ever. So such a call never
    stands inside `if process.main`.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    node_size: int = 1  # how many of them run on this machine, a node of the cluster

    @property
    def main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def print(self, *words):
        """print, from the main process only, and at once even into a file."""
        if not self.main:
            return
        try:
            print(*words, flush=True)
        except OSError as error:  # EIO: the terminal was closed; nobody can read it any more
            if error.errno != errno.EIO:
                raise

    def barrier(self):
        """Wait until all processes have come here."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value):
        """The main process's value, on all processes; what the others hand in is ignored."""
        if self.world_size == 1:
            return value
        # PyTorch writes the received values into a list, here of one.
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def all_gather(self, value) -> list:
        """The values of all processes, in the order of their ranks, on all processes."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def start_process(device: str = "auto") -> Process:
    """Choose the device and, under torchrun, join the other processes.

    device: auto (a GPU if there is one), or cpu, cuda, cuda:1, mps. UsageError for one that
    this machine does not have.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
        if device == "cpu":
            warn_of_unused_gpu()
    available = {
        "cpu": True, "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available()}
    kind, _, number = device.partition(":")
    if not available.get(kind) or not (number or "0").isdigit() or device.endswith(":"):
        choices = ", ".join(name for name, is_there in available.items() if is_there)
        raise UsageError(f"--device {device}: not available here; choose from auto, {choices}")

    # torchrun tells each process its number by environment variables. LOCAL_RANK is the number
    # among the processes of this machine, so each takes another GPU.
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda" and max(int(number or 0), local_rank) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: this machine has {torch.cuda.device_count()} GPUs, numbered "
            "from 0; give another number, or start fewer processes (--nproc_per_node)")

    # Without these variables this is the only process. Whatever PyTorch puts on "the current
    # GPU", such as pinned memory, shall be on its own one, and not on the first.
    if "WORLD_SIZE" not in os.environ:
        if kind == "cuda" and number:
            torch.cuda.set_device(int(number))
        return Process(torch.device(device))
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        device = f"cuda:{torch.cuda.current_device()}"

    # NCCL exchanges tensors between GPUs, Gloo between CPUs.
    if not dist.is_initialized():
        for name in sorted({"RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)):
            raise UsageError(f"WORLD_SIZE without {name}: start with torchrun, or unset it")
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    world_size = dist.get_world_size()
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Process(torch.device(device), dist.get_rank(), world_size, node_size)


@functools.cache  # once, however often a program asks
def warn_of_unused_gpu():
    """Say so where a machine has Nvidia's driver, but PyTorch finds no GPU that it can use."""
    # This is before the processes of torchrun know each other, so the rank is read from the
    # environment.
    if shutil.which("nvidia-smi") and os.environ.get("RANK", "0") == "0":
        built_for = torch.version.cuda or "no CUDA"
        print(
            f"warning: nvidia-smi is there, but PyTorch {torch.__version__} (built for "
            f"{built_for}) finds no GPU that works: this runs on the CPU", flush=True)


def spare_cores() -> int:
    """How many helpers, such as the workers of a loader, each process should start: 2 to 16.

    The usable cores are shared among the processes of this machine, and each keeps one for
    itself. Example: 96 cores and 8 processes leave 96 / 8 - 1 = 11.
    """
    # A cluster may let a job use only some of the cores. Not every system can tell.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(cores // processes - 1, 2), 16)


# What asks a program to end. Windows has no SIGHUP.
STOPPING = [
    getattr(signal, f"SIG{n}") for n in ("TERM", "INT", "HUP") if hasattr(signal, f"SIG{n}")]


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGHUP inside its `with` block instead of dying of them.

    A cluster sends SIGTERM to a job when it wants its machine back; Ctrl-C sends SIGINT, and a
    terminal that is closed SIGHUP. The loop asks `agreed` after every step. If the answer is not
    0 it saves, and leaves with the exit code 128 + signal: 143 for SIGTERM, 130 for SIGINT, 129
    for SIGHUP.

    With several processes a signal may reach one during step 100 and another during step 101,
    or only one at all. If each obeyed its own, they would stop at different steps, and those
    that go on would wait for ever. `agreed` gives the same answer to all of them.
    """

    asked = 0  # how often the processes have asked each other since the program started

    def __init__(self, process: Process):
        self.signal = 0  # the number of the signal that this process got
        self.before = {}  # the handlers that were there, by signal

        # They exchange it by the store through which they found each other at the start: a
        # dictionary in one of the processes, or in torchrun. With NCCL the answer would be on
        # the GPU, and reading it would wait for all its work.
        self.world_size = process.world_size
        if self.world_size > 1:
            self.store = dist.distributed_c10d._get_default_store()

    def __enter__(self):
        # Python lets only the main thread of a program set handlers. `nohup` ignores SIGHUP, so
        # that a program outlives its terminal, and so it stays. SIGINT is noted in any case: a
        # shell ignores it for what runs in the background, where `kill -INT` is meant.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        """The handler: Python calls it when a signal comes."""
        # Whoever presses Ctrl-C a second time does not want to wait for the save. SIGTERM may
        # come twice without any such meaning: `timeout` sends it to its command, and then to
        # the group of processes to which the command belongs.
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self) -> int:
        """The signal that any of the processes got, 0 if none did; the same on all of them."""
        if self.world_size == 1:
            return self.signal

        # Who got a signal says so before it is counted. So the last one to come knows all of
        # them, and gives the answer for which the others wait.
        StopSignal.asked += 1
        key = f"stop/{StopSignal.asked}"
        if self.signal:
            self.store.set(f"{key}/signal", str(self.signal))
        if self.store.add(f"{key}/count", 1) == self.world_size:
            got_one = self.store.check([f"{key}/signal"])
            answer = self.store.get(f"{key}/signal") if got_one else "0"
            self.store.set(f"{key}/answer", answer)

            # All have come here, so nobody still reads what was asked the time before.
            for name in ("signal", "count", "answer"):
                self.store.delete_key(f"stop/{StopSignal.asked - 1}/{name}")
        return int(self.store.get(f"{key}/answer"))


# One second stream for each GPU: a stream is made once and used in every step.
side_stream_of = functools.cache(lambda device: torch.cuda.Stream(device))


@contextlib.contextmanager
def side_stream(device: torch.device):
    """Runs its `with` block on a second CUDA stream; elsewhere than on CUDA it just runs.

    A GPU works through the operations of one stream in their order, but two streams at the same
    time. So a batch can be copied to the GPU and prepared while the step before it is still
    computed:

        stream 1   step 7 ........... step 8 ........... step 9
        stream 2   batch 8 ...        batch 9 ...        batch 10 ...

    After the block stream 1 waits for what was started in it. Yields a list: append to it every
    tensor that is made inside and used afterwards, so that its memory is not given away before
    stream 1 has used it. Inside, use nothing that stream 1 may still be computing: stream 2
    does not wait for it.
    """
    made_inside = []
    if device.type != "cuda":
        yield made_inside
        return

    first = torch.cuda.current_stream(device)
    second = side_stream_of(device)
    with torch.cuda.stream(second):
        yield made_inside

    # From here on the first stream waits for the second one. Only the GPU waits: the program
    # goes on and hands out work.
    first.wait_stream(second)

    # PyTorch gives the memory of a dropped tensor to the next tensor of the stream on which it
    # was made. That is the second one, which knows nothing of the first: it would overwrite a
    # batch that is still in use. record_stream tells it to wait until the first has come by.
    for tensor in made_inside:
        tensor.record_stream(first)


def has_compiler() -> bool:
    """Whether this machine has the C compiler that torch.compile needs; GPUs need it, too."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


# ----------------------------------------------------------------------------------------------
# Precision

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precisions below float32


def fast_precisions(device: torch.device) -> tuple[str, ...]:
    """Those below float32 in which the hardware multiplies matrices, the best one first.

    Hardware without such instructions computes bf16 by converting to float32 and back, which is
    slower than float32 itself.
    """
    # Nvidia GPUs from the A100 on (compute capability 8.0) have all of them. V100 (7.0) and T4
    # (7.5) have fp16 only, whose small range needs a loss scale (training/optim.py).
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return "bf16", "fp16", "tf32"
        return ("fp16",) if capability >= (7, 0) else ()
    if device.type == "cpu":
        instructions = torch.cpu.get_capabilities()
        if instructions.get("amx_bf16") or instructions.get("avx512_bf16"):
            return ("bf16",)
    return ()  # float32 alone, which all devices can


def resolve_precision(precision: str, device: torch.device, candidates=("bf16", "fp16")) -> str:
    """auto -> the first of `candidates` that the hardware is fast in, else fp32.

    UsageError for tf32 on hardware that does not have it, and for bf16 on a GPU that only
    imitates it, at a fraction of the speed of float32.
    """
    fast = fast_precisions(device)
    if precision == "auto":
        return next((name for name in candidates if name in fast), "fp32")
    imitated = precision == "bf16" and device.type == "cuda"
    if precision not in fast and (precision == "tf32" or imitated):
        raise UsageError(f"--precision {precision}: {device} has no instructions for it; "
                         f"choose from {', '.join([*fast, 'fp32'])}")
    return precision


def autocast(precision: str, device: torch.device):
    """A context in which matrix products run in `precision`; parameters stay float32.

    The parameters have to: one step often changes a parameter by less than a thousandth, and
    bfloat16, which has 8 bits for the digits of a number, would round that away.

    tf32 is float32 whose products read 11 of the 24 bits of each factor. It is no type of
    tensors but a switch of the process, which stays after the context: backward passes obey it.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return torch.autocast(device.type, LOW.get(precision), enabled=precision in LOW)


if __name__ == "__main__":
    process = start_process()
    precision = resolve_precision("auto", process.device)
    print(f"device {process.device}, precision {precision}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
