"""Read once: what one process reads from a disk that all share, and hands to the others.

    process 0    reads ---> the result, or its error ---+---> the result, or the error
    process 1    waits                                  +---> the same
    process 2    waits                                  +---> the same

Idea     A hundred processes that list the same millions of files, or read the same gigabytes,
         keep a disk busy a hundred times as long as one of them. The wires between the
         processes are faster than the disk. If the reading fails all have to learn of it:
         those that only wait would wait for ever.
Paper    none
Try      pytest tests/machinery/test_read_once.py
Change   which errors go to all processes: TOLD
Tests    pytest tests/machinery/test_read_once.py
"""

import datetime
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor

from machinery.flags import UsageError
from machinery.process import Process

# About what the user gave, what the system refuses, or a checkpoint of another network. Any
# other error is a bug: the process that has it prints its traceback and ends, and torchrun ends
# the others.
TOLD = (UsageError, ValueError, OSError, CheckpointException)

meetings = 0  # how often the processes of this program have waited for each other


def wait_for_all(process: Process):
    """A barrier for work that takes long: no process goes on before all have called it."""
    if process.world_size == 1:
        return

    # NCCL gives an exchange up after 10 minutes and gloo after 30, and torchrun then ends the
    # process that still works. So nobody waits in an exchange, but for an entry of the store
    # through which the processes found each other at the start (see StopSignal). The last one to
    # come writes it.
    global meetings
    meetings += 1
    store = dist.distributed_c10d._get_default_store()
    if store.add(f"meeting/{meetings}", 1) == process.world_size:
        store.set(f"meeting/{meetings}/all", "here")
    store.wait([f"meeting/{meetings}/all"], datetime.timedelta(days=7))


def read_once(read: Callable, process: Process):
    """What read() returns in the main process, in all of them; or the error that it raises.

    All processes have to call it. The result goes to the others as a pickle.
    """
    if process.world_size == 1:
        return read()

    outcome = None
    if process.main:
        try:
            outcome = read(), None
        except TOLD as error:
            outcome = None, error

    wait_for_all(process)

    # The error is raised where it was caught and in all other processes, so that no process
    # goes on alone, and each ends with the same line.
    result, error = process.broadcast(outcome)
    if error is not None:
        raise error
    return result


def fill_once(read: Callable, state: dict, process: Process):
    """Fill the tensors of `state` in place, by read(alone) in as few processes as will do.

    alone: whether this process reads without the others, who do not call `read` then.

    All processes have to call it, with the same names in `state`, nested dictionaries. Where
    its tensors are whole, one process reads alone and sends them to the others; where they are
    split (FSDP), each has to read its own parts, with `alone` false.

    Example: a ViT-L with its heads, its average and two moments of each weight are 6.4 GB. On
    96 processes that is one reading of 6.4 GB, and not 96 of them.
    """
    # A single process reads alone in any case. So does the main one of several, if all values are
    # whole tensors: others could not be filled in place, nor be sent.
    alone = process.world_size == 1
    tensors = leaves(state)
    whole = all(isinstance(x, Tensor) and not isinstance(x, DTensor) for x in tensors)
    if alone or not whole:
        read(alone)
        return

    # NCCL sends what is on a GPU only, and a few small tensors may be on the CPU.
    read_once(lambda: read(True), process)
    for x in tensors:
        sent = x.to(process.device)
        dist.broadcast(sent, 0)
        x.copy_(sent)


def leaves(state: dict) -> list:
    """The values of nested dictionaries, in the order of their keys."""
    values = []
    for value in state.values():
        values += leaves(value) if isinstance(value, dict) else [value]
    return values
