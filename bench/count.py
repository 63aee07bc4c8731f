"""Count: the work of a step without doing it, and what the hardware does at most.

    student without content --> FlopCounter --> operations of the matrix products, by part
    one large matrix product, timed          --> operations a second: the ceiling

Idea     The share of the hardware that a step uses is made of two numbers: how many operations
         it has to do, and how many the hardware does in a second when it does nothing else.
         Matrix products are nearly all of a step's operations, so only they are counted.
Paper    PaLM (Chowdhery 2022) appendix B
Try      python -m bench plan dinov2_vitl14 --gpus 32 --kind h100
Change   another part of the work is one entry of `work` in count_work
Tests    pytest tests/bench/test_count.py
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from bench.plain import without
from machinery.clock import time_when_done
from machinery.process import LOW, Process
from training.config import Config
from training.memory import fake_step_inputs


def meta_student(config: Config, drop: bool = True) -> train.Network:
    """A student whose tensors have shapes but no numbers: even a ViT-g takes no memory.

    drop=False: without stochastic depth.
    """
    with torch.device("meta"):
        student = train.Network(config, config.drop_path_rate if drop else 0.0)
    student.backbone.activation_checkpointing = config.activation_checkpointing
    return student


def count_work(config: Config, masked: int | None = None, drop: bool = True) -> dict[str, int]:
    """Operations of a step's matrix products, by part: teacher, student, backward.

    A multiplication and an addition are two operations; the sum of the parts is the step's.
    Counted is only what has to be done: `masked` patches in the heads (None: as many as may be
    masked at most), nothing twice, dropped samples left out. drop=False: as if none were
    dropped. A backward pass has twice the operations of the forward pass, less the gradients by
    the pixels, which nobody asks for.

    Example: a linear layer from 384 to 1,536 numbers on 197 tokens has 2 * 197 * 384 * 1,536 =
    232 million operations forward; backward it has as many for the gradient of its weights, and
    as many for that of its input.
    """
    student = meta_student(config, drop)
    # --activation_checkpointing computes blocks a second time in the backward pass, which has
    # not to be done.
    student.backbone.activation_checkpointing = False
    work = {}

    # On the device "meta" a step runs on shapes alone, and the counter adds up the products
    # that pass. It does not know all kernels of SDPA. So attention is counted by the two
    # products that its formula has (plain.py), which are what every kernel has to compute.
    _, arguments = fake_step_inputs(student, config, torch.device("meta"), masked)
    crops, plan, masks, mask_indices = arguments
    counter = FlopCounterMode(display=False)
    with without(["sdpa"]), counter:

        # The teacher is as large as the student, sees the global crops alone, and drops
        # nothing.
        with torch.no_grad():
            student(crops[:1], mask_indices=mask_indices)
        work["teacher"] = counter.get_total_flops()

        # The counter goes on from there: what is new is the total less the parts so far.
        out = student(crops, plan, masks, mask_indices)
        work["student"] = counter.get_total_flops() - sum(work.values())

        # The losses themselves have no matrix products that matter. A sum of all outputs sends
        # a gradient to each of them, which is all that the backward pass needs.
        sum(x.sum() for x in out.values()).backward()
        work["backward"] = counter.get_total_flops() - sum(work.values())
    return work


def matrix_ceiling(precision: str, process: Process) -> float:
    """Operations a second in one large matrix product, the best of three."""
    # Large enough to keep all units of the device busy; small enough for a CPU to do it in a
    # fraction of a second.
    side = 8192 if process.device.type == "cuda" else 1536
    kind = LOW.get(precision, torch.float32)
    a = torch.randn(side, side, device=process.device, dtype=kind)
    b = torch.randn(side, side, device=process.device, dtype=kind)

    # The best and not the median: whatever else the machine does can only make it slower.
    times = []
    for _ in range(4):
        begun = time_when_done(process)
        a @ b
        times.append(time_when_done(process) - begun)
    fastest = min(times[1:])  # the first one warms up

    # Each of the side * side results takes `side` multiplications and as many additions.
    return 2 * side**3 / fastest
