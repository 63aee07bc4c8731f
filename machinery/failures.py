"""Failures: how a program ends when something has failed.

    exception --> the user can mend it --> one line, exit code 2     wrong flag, full disk, ...
              --> nobody has to        --> exit code 130 or 141      Ctrl-C; a closed pipe
              --> a bug                --> its traceback, exit code 1

Idea     A traceback helps those who know the code. Whoever runs a program wants to know what
         happened, and which flag or which disk to look at. With several processes the message
         also has to come at once: the one that fails must not wait for the others first.
Paper    none
Try      python train.py --output_dir /proc/run
Change   another failure that a user can mend is one more branch in `mendable`
Tests    pytest tests/machinery/test_failures.py
"""

import errno
import os
import sys
import traceback

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from machinery.flags import UsageError


def end(error: BaseException):
    """End the program because of this exception; returns where Python itself does it right."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    code, message = outcome(error)

    # SystemExit is no failure: --help, or a signal that all processes have agreed to obey. The
    # traceback of a bug is printed by Python, and a debugger wants the exception as it is.
    if isinstance(error, SystemExit) or (code == 1 and not together):
        return
    if message:
        print(message, file=sys.stderr, flush=True)

    # Python writes out what is left of the output when it ends. Where nobody reads it, this
    # would fail once more, so it goes to nowhere.
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    # Before the end of a program, `command` takes leave of the other processes
    # (destroy_process_group). On GPUs that waits for them, while they may be waiting for this
    # one in an exchange. So it ends here; torchrun sees that it is gone, and ends the others.
    if together:
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code) from None


def outcome(error: BaseException) -> tuple[int, str]:
    """(exit code, what stderr is to say)."""
    # 128 + n is the shell's code for signal n: SIGINT is 2. SIGPIPE, 13, is what ends other
    # programs silently when nobody reads their output any more, as in `python train.py | head`.
    if isinstance(error, KeyboardInterrupt):
        return 128 + 2, "interrupted"
    if isinstance(error, BrokenPipeError):
        return 128 + 13, ""

    line = str(error) if isinstance(error, UsageError) else mendable(error)

    # What a worker of a loader has raised arrives with the traceback of that process before it.
    if line.startswith("Caught UsageError in DataLoader worker"):
        line = line.strip().splitlines()[-1].partition(": ")[2]
    if line:
        return 2, f"error: {line}"
    return 1, "".join(traceback.format_exception(error))


def mendable(error: BaseException) -> str:
    """What happened, and what to do, if it was not the program that failed; "" otherwise."""
    # If memory is short, the system kills a process of its choice.
    if str(error).startswith("DataLoader worker"):
        what = str(error).splitlines()[0].rstrip(" .")
        return f"{what}; the same command continues, or give fewer --num_workers"

    # The GPU, or the machine, has less memory left than was asked for. PyTorch's message goes on
    # with advice for its allocator, of which only the first sentence is told.
    no_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, torch.OutOfMemoryError) or no_memory:
        what = str(error).split(". ")[0]
        return (f"{what}; give smaller batches or images (train.py: --batch_size_per_gpu or "
                "--activation_checkpointing; others: --batch_size or --image_size)")

    # A worker that was killed may have promised a batch, which nobody hands over any more. (A
    # download that breaks off is a ConnectionError, too, and not of that module.)
    calls = traceback.extract_tb(error.__traceback__)
    of_worker = any("multiprocessing" in call.filename for call in calls)
    if isinstance(error, ConnectionError) and of_worker:
        return (f"DataLoader worker is gone ({error.strerror}); the same command continues, or "
                "give fewer --num_workers")

    if isinstance(error, ConnectionError):
        return (f"a connection was lost or refused ({error.strerror or error}); try again, or "
                "download the file by hand and give its path")

    # DCP, which writes the checkpoints, holds one failure for each process that had one.
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]

    # What the system refuses is an OSError: a full disk, a folder without the right to write, a
    # file in the place of a folder. When torch's writer (inline_container) is refused, it fails
    # once more while it closes its file, with "unexpected pos 704 vs 598"; the OSError stands
    # behind that. It is lost where one process tells another of its failure.
    if "inline_container" in str(error):
        error = error.__context__ or OSError(errno.ENOSPC,
                                             "a file cannot be written, the disk may be full")
    if isinstance(error, OSError) and error.strerror:
        path = error.filename2 or error.filename  # of a copy, that which is written
        what = f"{path}: {error.strerror}" if path else error.strerror

        # The same error may come from a place to write to, or from a file that was to be read.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            return f"{what}; give a place with room (--output_dir, --output)"
        return f"{what}; look at the paths that were given, and at the right to read or write"
    return ""
