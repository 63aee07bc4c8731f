"""Claims
1. What the system refuses (a full disk, a file in the place of a folder) is one line that says
   what and where, exit code 2; so is a loader process that was killed.
2. Where nobody reads the output, a program ends silently. A bug keeps its traceback.
3. An exception of one of several processes is told at once, whatever the others wait for.
"""

import contextlib
import errno
import os
import sys
import time
from multiprocessing.connection import Client

import pytest
import torch
import torch.distributed as dist
from conftest import start
from torch.distributed.checkpoint import CheckpointException

from machinery.checkpoints import save_checkpoint, save_tensors, write_text
from machinery.flags import UsageError, command
from machinery.process import Process, start_process

PATIENCE = 100  # seconds after which a test gives up

# What one process tells another of a full disk: without the reason behind it.
TORCH_SAYS = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7 vs 5")


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "No space left", "runs/x/file"), "runs/x/file: No space left; "),
    (OSError(errno.EFBIG, "File too large"), "error: File too large; "),
    (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "lost or refused (refused); try"),
    (FileNotFoundError(errno.ENOENT, "No such file",
                       "x"), "x: No such file; look at the paths"),
    (UsageError(
        "Caught UsageError in DataLoader worker process 0.\nTraceback:\n  File x, line 1\n"
        "machinery.flags.UsageError: --data: ten images"), "error: --data: ten images"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nMore."),
     "error: DataLoader worker (pid 7) is killed by signal: Killed; "),
    (RuntimeError(
        "[enforce fail at alloc_cpu.cpp:132] data. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 4000000000000 bytes. Error code 12"),
     "give smaller batches or images"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ..."),
     "error: CUDA out of memory; give smaller batches or images (train.py: --batch_size_per_gpu"
     ), (CheckpointException("write", {1: (TORCH_SAYS, None)}), "the disk may be full; ")])
def test_what_the_system_refuses(error, words, capsys):

    @command
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        main([])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and words in printed and printed.count("\n") == 1
    assert ("--num_workers" in printed) == ("killed" in words)
    assert ("--output_dir" in printed) == any(w in words for w in ("left", "large", "full"))


def test_a_worker_that_is_gone(capsys):

    @command
    def main(argv):
        Client(("127.0.0.1", 1))  # where nobody listens

    with pytest.raises(SystemExit):
        main([])
    assert "DataLoader worker is gone (Connection refused)" in capsys.readouterr().err


@contextlib.contextmanager
def nearly_full_disk(size):
    """Inside, no file can grow beyond so many bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def writes_checkpoint(folder):
    state = {"net": {"weight": torch.zeros(1000)}}
    save_checkpoint(folder, 1, state, {}, Process(torch.device("cpu")))


@pytest.mark.parametrize("write", [
    writes_checkpoint, lambda folder: save_tensors(folder / "x", torch.zeros(1000)),
    lambda folder: write_text(folder / "x", 1000 * "x")])
def test_a_full_disk(write, tmp_path, capsys):
    with nearly_full_disk(500), pytest.raises(SystemExit) as stop:
        command(lambda argv: write(tmp_path))([])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1
    assert "File too large; " in printed and "--output_dir" in printed
    assert not list(tmp_path.glob("step-*")) and not (tmp_path / "x").exists()


def test_a_bug_keeps_its_traceback():

    @command
    def main(argv):
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        main([])


def to_files(folder, rank):
    """What this process writes to stderr goes to FOLDER/RANK."""
    os.dup2(os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = open(2, "w", closefd=False)


def prints_to_nobody(rank, folder):
    """A program whose output goes into a pipe that nobody reads any more."""
    to_files(folder, rank)
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)
    command(lambda argv: print("a line"))([])


def test_a_closed_pipe(tmp_path):
    [process] = start(prints_to_nobody, tmp_path, world=1)
    process.join(PATIENCE)
    assert process.exitcode == 141 and (tmp_path / "0").read_text() == ""


def one_fails(rank, folder):
    """Process 1 fails while process 0 waits for it, and to take leave of each other hangs."""
    to_files(folder, rank)
    process = start_process("cpu")
    dist.destroy_process_group = lambda: time.sleep(2 * PATIENCE)

    @command
    def main(argv):
        if rank == 0:
            process.barrier()
        raise ZeroDivisionError("a bug")

    main([])


def test_one_of_two_fails(tmp_path):
    processes = start(one_fails, tmp_path)
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [1, 1]
    said = (tmp_path / "1").read_text()
    assert said.startswith("Traceback") and "ZeroDivisionError: a bug" in said
