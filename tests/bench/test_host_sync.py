"""Claims
1. Between two log lines the host never waits for the device.
2. A wait that is hidden in a step, of whatever kind, would be caught.
3. Batches that are sent and coloured beside other work arrive whole (on a GPU).

How that can be seen without a GPU. A GPU works through a queue: the host puts work into it and goes
on, unless it asks for a number, as `.item()` does; then it waits until the queue is empty. So we
run steps on PyTorch's "meta" device, whose tensors have a shape and a type but no numbers. Whoever
asks such a tensor for a number gets an error, at the very line that would have waited on a GPU.

One kind of wait needs more. A copy of numbers from the host to the device waits too, unless it is
told not to (non_blocking), and to the meta device any copy is allowed. PyTorch lets us see every
operation that it is about to run: that is a "dispatch mode", a context manager whose
__torch_dispatch__ is called with each operation. NoCopyThatWaits is one. It looks for copies
between two devices and raises an error at those that would wait.

The meta device lacks two things that a step uses. It has no autocast, so `train.autocast` and
`torch.autocast` are patched to do nothing; and no fused AdamW, so the plain one takes its place.
"""

import contextlib
from unittest.mock import patch

import pytest
import torch
from bench_helpers import CPU, config_of, networks_of
from conftest import EVERYTHING, TINY
from torch.utils._python_dispatch import TorchDispatchMode

import train
from bench.plain import DefaultAdamW
from images.data import open_images
from machinery.clock import Clock
from machinery.process import Process


class NoCopyThatWaits(TorchDispatchMode):
    """Inside, an error is raised by each copy between devices that waits for all work before it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten  # PyTorch's operations under their own names
        waits = False
        if func == aten._to_copy.default:  # x.to(device)
            target = kwargs.get("device") or args[0].device
            waits = target != args[0].device and not kwargs.get("non_blocking")
        elif func == aten.copy_.default:  # x.copy_(y); the third argument is non_blocking
            waits = args[0].device != args[1].device and not any(args[2:])
        elif func == aten.lift_fresh.default:  # torch.tensor(numbers, device=...), in newer torch
            waits = args[0].device.type != "cpu"
        if waits:
            raise RuntimeError(f"{func} to meta waits for the device")
        return func(*args, **kwargs)


def steps_on_meta(steps=3):
    """What train.Run does between two log lines, on the meta device: (window, last figures)."""
    meta = Process(torch.device("meta"))
    config = config_of([*TINY, *EVERYTHING])
    student, teacher, centerings = (network.to("meta") for network in networks_of(config))
    optimizer = DefaultAdamW(train.parameter_groups(student))
    learner = train.Learner(student, teacher, centerings, optimizer)
    images = open_images("shapes:16")
    window = train.LogWindow(images, config)
    batches = iter(train.batches_from(0, steps, images, config, CPU))
    clock = Clock(0, steps)

    def no_autocast(*args, **kwargs):
        return contextlib.nullcontext()

    with patch("train.autocast", no_autocast), patch("torch.autocast", no_autocast):
        for step in range(steps):
            batch = clock.wait(batches)
            schedule = train.schedules(step, 2, steps, config, meta)
            with NoCopyThatWaits():
                figures = train.train_step(learner, batch, schedule, config, meta)
            window.add(step, batch, figures)
            clock.tick()
    return window, figures


# -- 1


def test_the_host_never_waits_between_log_lines():
    window, figures = steps_on_meta()
    assert len(window.steps) == 3
    assert all(value.is_meta for value in figures.values())
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        window.read({"broken": 0}, 24)  # the one place that may ask for numbers


# -- 2

WAITS = {
    "item": lambda x: x.item(), "float": lambda x: float(x.detach()), "if": bool,
    "boolean index": lambda x: x[x > 0], "tolist": lambda x: x.cpu().tolist(),
    "copy": lambda x: torch.ones(3).to(x.device), "copy_": lambda x: x.copy_(torch.ones(()))}


@pytest.mark.parametrize("wait", WAITS.values(), ids=list(WAITS))
def test_a_hidden_wait_would_be_caught(wait, monkeypatch):
    koleo_loss = train.koleo_loss

    def loss_that_waits(features):
        value = koleo_loss(features)
        wait(value)
        return value

    monkeypatch.setattr(train, "koleo_loss", loss_that_waits)
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        steps_on_meta(1)


# -- 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has a second stream")
def test_batches_are_whole_that_come_beside_other_work():
    """The GPU multiplies matrices while batches come; they equal those that the CPU makes."""
    config = config_of([*TINY, *EVERYTHING])
    device = torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    pairs = []
    for batch in train.batches_from(0, 5, open_images("shapes:64"), config, CPU):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        on_gpu = train.make_views(batch, config.channel_stats, device)
        pairs.append((train.make_views(batch, config.channel_stats, CPU.device), on_gpu))
    for (views, masks), (gpu_views, gpu_masks) in pairs:
        for view, gpu_view in zip(views, gpu_views, strict=True):
            torch.testing.assert_close(gpu_view.cpu(), view, rtol=1e-3, atol=1e-3)
        assert all(torch.equal(gpu_masks[name].cpu(), masks[name]) for name in masks)
