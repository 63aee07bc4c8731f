"""Claims
1. A device that is not there is refused with the choices; one process exchanges with itself.
2. --precision auto is bf16 where the hardware multiplies matrices in it.
3. A first SIGTERM is noted and a second one interrupts; afterwards the handlers are as before.
4. Freed memory is kept on a CPU: the same block, needed again, is not mapped anew.

What several processes tell each other is checked in tests/test_distributed.py.
"""

import ctypes
import os
import signal

import pytest
import torch

from machinery.flags import UsageError
from machinery.process import (Process, StopSignal, autocast, keep_freed_memory,
                               resolve_precision, start_process)

CPU = torch.device("cpu")


def test_device_is_checked():
    with pytest.raises(UsageError,
                       match="--device tpu: not available here; choose from auto, cpu"):
        start_process("tpu")


def test_one_process_exchanges_with_itself(capsys):
    process = start_process("cpu")
    assert process == Process(CPU, rank=0, world_size=1) and process.main
    assert process.broadcast("a") == "a" and process.all_gather("a") == ["a"]
    process.barrier()  # nobody is waited for
    process.print("from", "the main process")
    Process(CPU, rank=1, world_size=2).print("from another")
    assert capsys.readouterr().out == "from the main process\n"


@pytest.mark.parametrize("capabilities, expected",
                         [({"amx_bf16": True}, "bf16"), ({}, "fp32"),
                          ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
                          ({"avx512_bf16": False}, "fp32")])
def test_auto_is_bf16_where_a_cpu_multiplies_in_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16),
                                              ("fp16", torch.float16)])
def test_products_have_the_precision(precision, dtype):
    matrix = torch.ones(2, 2)
    with autocast(precision, CPU):
        assert (matrix @ matrix).dtype == dtype
    assert matrix.dtype == torch.float32


def test_stop_signal():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(Process(CPU)) as stop_signal:
        assert stop_signal.agreed() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal.agreed() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):  # whoever asks twice does not want to wait
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_freed_memory_is_kept():
    resource = pytest.importorskip("resource")
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("another C library than glibc")
    keep_freed_memory(start_process("cpu"))
    mapped = []  # pages, up to now
    for _ in range(40):  # after some of these the heap has a block that is large enough
        torch.ones(10_000_000)  # 40 MB, some 10,000 pages
        mapped.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert mapped[-1] - mapped[-6] < 1000, mapped  # the last five found their pages there
