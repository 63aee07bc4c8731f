"""Claims
1. The operations that are counted are those that the sizes of the layers say.
2. The memory that a run expects is what autograd really keeps; FSDP splits it over processes.
3. The ceiling is the best of three matrix products, after one that warms up.
"""

from dataclasses import replace

import pytest
import torch
from bench_helpers import CPU, config_of, networks_of
from conftest import EVERYTHING, TINY

import bench.count
from bench.count import count_work, matrix_ceiling, meta_student
from bench.step import Step, made_up_batch
from training.memory import expected_memory

# -- 1


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_operations_are_those_of_the_layers(ffn):
    config = config_of([*TINY, *EVERYTHING, "--ffn_layer", ffn, "--drop_path_rate", 0.5])
    B, M, D, depth, R = 8, 13, 64, 4, 1
    hidden = {"mlp": 2 * 4 * D * D, "swiglu": 3 * ((4 * D * 2 // 3 + 7) // 8 * 8) * D}[ffn]

    # All of these count multiply-adds; an operation is a multiplication or an addition.
    def trunk(b, n, kept):
        """The blocks for b crops of n tokens; stochastic depth leaves `kept` of the b."""
        return depth * kept * n * (4 * D * D + 2 * n * D + hidden)

    def patches(b, n):
        """The patch embedding of b crops of n tokens."""
        return b * (n - 1 - R) * 3 * 8 * 8 * D

    def head(rows, bottleneck, k):
        return rows * (D * 32 + 32 * 32 + 32 * bottleneck + bottleneck * k)

    large, small = (2 * B, 9 + 1 + R), (2 * B, 4 + 1 + R)
    patch_head = head(M, 256, 24)
    teacher = trunk(*large, kept=2 * B) + patches(*large) + head(2 * B, 16, 32) + patch_head
    embed = patches(*large) + patches(*small)
    blocks = trunk(*large, kept=B) + trunk(*small, kept=B) + head(4 * B, 16, 32) + patch_head
    work = count_work(config, M)
    assert work["teacher"] == 2 * teacher
    assert work["student"] == 2 * (blocks + embed)
    assert work["backward"] == 2 * (2 * blocks + embed)  # pixels need no gradient
    dropped = trunk(*large, kept=B) + trunk(*small, kept=B)  # the other half of the samples
    assert count_work(config, M, drop=False)["student"] == 2 * (blocks + dropped + embed)


# -- 2


def test_memory_is_what_autograd_keeps():
    """Bytes of tensors, counted: nothing here depends on what the machine has or holds."""
    config = config_of([*TINY, *EVERYTHING])
    networks = networks_of(config)
    batch = made_up_batch(config, CPU)
    weights = {p.untyped_storage().data_ptr() for p in networks[0].parameters()}
    kept = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        Step(networks, batch, config, CPU).run()
    masked = len(batch["mask_indices"])
    assert masked == config.masking().most(len(batch["masks"]))
    expected = expected_memory(networks[0], config, CPU)["kept for backward"] * 2**30
    assert expected == pytest.approx(sum(kept.values()), rel=0.02)  # KoLeo is left out


def test_plan_splits_states_with_fsdp():
    config = config_of([*TINY, "--precision", "bf16"])
    student = meta_student(config)
    eight_processes = replace(CPU, world_size=8)
    ddp = expected_memory(student, config, eight_processes)
    config.parallel = "fsdp"
    fsdp = expected_memory(student, config, eight_processes)
    assert ddp["moments"] == pytest.approx(8 * fsdp["moments"])
    assert ddp["kept for backward"] == fsdp["kept for backward"]
    in_one_piece = sum(p.nbytes for p in student.backbone.parameters())
    assert fsdp["backbone in one piece"] == in_one_piece / 2**30

    # HSDP splits them over the processes of one machine.
    config.parallel = "hsdp"
    hsdp = expected_memory(student, config, replace(eight_processes, node_size=4))
    assert ddp["moments"] == pytest.approx(4 * hsdp["moments"])
    parameters = sum(p.numel() for p in student.parameters())
    assert ddp["two networks"] == pytest.approx(8 * parameters / 2**30)


# -- 3


def test_ceiling_is_the_best_of_three(monkeypatch):
    """By a clock that shows these times before and after each of the four products."""
    times = iter([0, 1, 10, 14, 20, 22, 30, 35])  # they last 1, which warms up, then 4, 2 and 5
    monkeypatch.setattr(bench.count, "time_when_done", lambda process: next(times))
    assert matrix_ceiling("fp32", CPU) == 2 * 1536**3 / 2
