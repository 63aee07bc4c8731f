"""Count: the work of a step without doing it, and what the hardware does at most.

    student without content --> FlopCounter --> operations of the matrix products, by part
    one large matrix product, timed          --> operations a second: the ceiling

Idea     A share of the hardware needs both numbers: how much there is to do, and how fast it
         could be done by a program that did nothing else.
Paper    PaLM (Chowdhery 2022) appendix B
Try      python -m bench plan dinov2_vitl14 --gpus 32 --kind h100
Change   another part of the work is one entry of `work` in count_work
Tests    pytest tests/bench/test_count.py
"""

from functools import partial

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train
from bench.plain import without
from machinery.clock import time_when_done
from machinery.process import LOW, Process
from training.config import Config
from training.memory import fake_step_inputs


def meta_student(config: Config, drop: bool = True) -> train.Network:
    """A student without content."""
    with torch.device("meta"):
        student = train.Network(config, config.drop_path_rate if drop else 0.0)
    student.backbone.activation_checkpointing = config.activation_checkpointing
    return student


def count_work(config: Config, masked: int | None = None, drop: bool = True) -> dict[str, int]:
    """Floating-point operations of a step's matrix products, by part; `sum(...)` is the step's.

    Only what has to be done: `masked` patches in the heads, nothing twice, dropped samples left
    out (drop=False: as if none were). A student's backward pass is twice its forward pass, less
    the gradients of the pixels, which nobody asks for.
    """
    student = meta_student(config, drop)
    call = partial(torch.func.functional_call, student)
    work = {}
    # SDPA is counted by the products it stands for: the counter does not know all of its
    # kernels.
    with (FakeTensorMode(allow_non_fake_inputs=True), without(["sdpa"]),
          FlopCounterMode(display=False) as counter):
        state, arguments = fake_step_inputs(student, config, torch.device("cpu"), masked)
        views, plan, masks, mask_indices = arguments
        with torch.no_grad():
            call(state, (views[:1],), dict(mask_indices=mask_indices))
        work["teacher"] = counter.get_total_flops()
        out = call(state, (views, plan, masks, mask_indices))
        work["student"] = counter.get_total_flops() - sum(work.values())
        sum(x.sum() for x in out.values()).backward()
        work["backward"] = counter.get_total_flops() - sum(work.values())
    return work


def matrix_ceiling(precision: str, process: Process) -> float:
    """Operations a second in one large matrix product, the best of three."""
    side = 8192 if process.device.type == "cuda" else 1536
    kind = LOW.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=process.device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(4):  # the first one warms up
        begun = time_when_done(process)
        a @ b
        times.append(time_when_done(process) - begun)
    return 2 * side**3 / min(times[1:])
