"""Claims
1. A device that is not there is refused with the choices; one process exchanges with itself, and
   has the GPU of its flag as the current one.
2. --precision auto is bf16 where the hardware multiplies matrices in it, fp16 on GPUs that have
   nothing better, and tf32 for frozen networks; what a GPU does not have is refused by its flag.
3. SIGTERM and SIGHUP are noted, however often they come, and so is a first Ctrl-C; a second one
   interrupts. What is ignored stays ignored; afterwards the handlers are as before. A terminal
   that is gone is no reason to fail.
4. A GPU that PyTorch cannot use is mentioned once, by the main process.
5. Each process gets its share of the usable cores, less one, from 2 to 16.

What several processes tell each other is checked in tests/test_distributed.py.
"""

import errno
import os
import signal

import pytest
import torch

from machinery.flags import UsageError
from machinery.process import (Process, StopSignal, autocast, resolve_precision, spare_cores,
                               start_process, warn_of_unused_gpu)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_device_is_checked():
    with pytest.raises(UsageError,
                       match="--device tpu: not available here; choose from auto, cpu"):
        start_process("tpu")
    for device in ("cpu:", "cpu:foo"):
        with pytest.raises(UsageError, match=f"--device {device}: not available here"):
            start_process(device)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="--device cuda:9: this machine has 1 GPUs"):
        start_process("cuda:9")

    # The fourth of four processes, which torchrun has started for a single GPU.
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UsageError, match="--device cuda: .* 1 GPUs, .*--nproc_per_node"):
        start_process("cuda")


@pytest.mark.parametrize("device, chosen", [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_the_current_gpu_is_that_of_the_flag(device, chosen, monkeypatch):
    """PyTorch pins memory, for example, on the current GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert start_process(device).device == torch.device(device) and current == chosen


def test_half_of_what_torchrun_says(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UsageError, match="WORLD_SIZE without RANK: start with torchrun"):
        start_process("cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UsageError, match="WORLD_SIZE without MASTER_ADDR: start with torchrun"):
        start_process("cpu")


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


@pytest.mark.parametrize("capability, training, frozen", [((6, 1), "fp32", "fp32"),
                                                          ((7, 0), "fp16", "fp32"),
                                                          ((7, 5), "fp16", "fp32"),
                                                          ((8, 0), "bf16", "tf32"),
                                                          ((9, 0), "bf16", "tf32")])
def test_auto_follows_the_generation_of_the_gpu(capability, training, frozen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", CUDA) == training
    assert resolve_precision("auto", CUDA, ("tf32",)) == frozen
    assert resolve_precision("fp32", CUDA) == "fp32"
    assert resolve_precision("fp16", CUDA) == "fp16"
    for precision in ("bf16", "tf32"):
        if capability >= (8, 0):
            assert resolve_precision(precision, CUDA) == precision
            continue
        with pytest.raises(UsageError, match=f"--precision {precision}: cuda has no.*fp32"):
            resolve_precision(precision, CUDA)


def test_tf32_is_for_gpus_and_stays_on():
    with pytest.raises(UsageError, match="--precision tf32: cpu has no instructions"):
        resolve_precision("tf32", CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    with autocast("tf32", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert torch.get_float32_matmul_precision() == "high"  # for the backward pass
    with autocast("bf16", CPU):
        pass
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_that_does_not_work_is_mentioned_once(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    warn_of_unused_gpu.cache_clear()
    start_process("auto")
    start_process("auto")
    assert capsys.readouterr().out.count("warning: nvidia-smi is there, but PyTorch") == 1
    warn_of_unused_gpu.cache_clear()
    monkeypatch.setenv("RANK", "1")
    warn_of_unused_gpu()
    warn_of_unused_gpu.cache_clear()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("shutil.which", lambda name: None)
    warn_of_unused_gpu()
    start_process("cpu")  # the CPU was asked for
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16),
                                              ("fp16", torch.float16)])
def test_products_have_the_precision(precision, dtype):
    matrix = torch.ones(2, 2)
    with autocast(precision, CPU):
        assert (matrix @ matrix).dtype == dtype
    assert matrix.dtype == torch.float32


def test_stop_signal(terminal):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(Process(CPU)) as stop_signal:
        assert stop_signal.agreed() == 0
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert stop_signal.agreed() == number
        with pytest.raises(KeyboardInterrupt):  # Ctrl-C twice: do not wait for the save
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(Process(CPU)) as stop_signal:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_signal.agreed() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone(monkeypatch):
    """The save that SIGHUP asks for must not fail because nobody can read its line."""

    def gone(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.print", gone)
    Process(CPU).print("saved")
    monkeypatch.setattr(
        "builtins.print", lambda *args, **kwargs:
        (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        Process(CPU).print("saved")


@pytest.mark.parametrize("cores, processes, spare", [(1, 1, 2), (2, 1, 2), (8, 1, 7),
                                                     (64, 1, 16), (96, 8, 11), (8, 8, 2)])
def test_spare_cores(cores, processes, spare, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert spare_cores() == spare
