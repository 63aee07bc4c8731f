"""Claims
1. The memory that is expected is found without touching a weight, part by part.
2. Networks have the size of the weights, gradients and moments that of the weights that learn;
   what is kept for the backward pass grows with the batch and shrinks with activation
   checkpointing.
3. Crops, the teacher's logits and the gradient of the student's have the sizes of these
   tensors; a GPU holds the next batch as well, and what it takes to colour it.
4. A GPU never keeps the weights of attention, n x n for n tokens; a CPU does in bf16.
5. A system that cannot tell how much memory it has is no reason to fail.
6. Batches of the workers that do not fit into shared memory are named, with the flags.
7. The frozen teacher of a distillation is counted beside the two networks.
8. Freed memory is kept on a CPU: the same block, needed again, is not mapped anew.

That it is what autograd really keeps is checked in tests/bench/test_count.py.
"""

import ctypes
import math
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import same_tensors, tiny_config

import train
from bench.plain import without
from machinery.process import Process, start_process
from training.memory import (expected_memory, keep_freed_memory, memory_gb, memory_report,
                             peak_memory_gb, shared_memory_warning)


def test_expected_memory(tmp_path):
    process = start_process("cpu")
    variants = {
        "once": "", "twice the batch": "--batch_size_per_gpu 16",
        "checkpointing": "--activation_checkpointing"}
    expected = {}
    for name, flags in variants.items():
        config = tiny_config(tmp_path, *flags.split())
        student, _ = train.build(config, process)
        before = {key: value.clone() for key, value in student.state_dict().items()}
        expected[name] = expected_memory(student, config, process)
        assert same_tensors(before, student.state_dict())

    # The lengths of the prototypes do not learn (--norm_last_layer).
    weights = sum(p.numel() * 4 for p in student.parameters()) / 2**30
    learns = sum(p.numel() * 4 for p in student.parameters() if p.requires_grad) / 2**30
    for name in ("once", "twice the batch"):
        assert expected[name]["two networks"] == 2 * weights
        assert expected[name]["gradients"] == learns
        assert expected[name]["moments"] == 2 * learns  # AdamW has two for each weight
    kept = {name: parts["kept for backward"] for name, parts in expected.items()}
    assert kept["twice the batch"] == pytest.approx(2 * kept["once"], rel=0.05)
    assert kept["once"] > kept["checkpointing"] > 0


@pytest.mark.parametrize("optimizer, moments", [("adamw", 2), ("sgd", 1), ("lars", 1)])
def test_moments_of_each_optimiser(optimizer, moments, tmp_path):
    process = start_process("cpu")
    config = tiny_config(tmp_path, "--optimizer", optimizer)
    student, _ = train.build(config, process)
    expected = expected_memory(student, config, process)
    assert expected["moments"] == moments * expected["gradients"]


def test_crops_and_logits(tmp_path):
    process = start_process("cpu")
    config = tiny_config(tmp_path)
    student, _ = train.build(config, process)
    on_cpu = expected_memory(student, config, process)
    on_gpu = expected_memory(student, config, process, on_gpu=True)
    B, G, L, K = 8, 2, 2, 32
    large, small = (3 * 4 * B * number * side**2 for number, side in ((G, 24), (L, 16)))
    assert on_cpu["crops"] == (large + small) / 2**30
    assert on_gpu["crops"] == (2 * (large + small) + 3 * large) / 2**30
    assert on_cpu["teacher's logits"] == 4 * G * B * K / 2**30
    assert on_cpu["logits' gradient"] == 4 * (G + L) * B * K / 2**30


def kept_by_tokens(tmp_path, on_gpu, precision):
    """What the blocks keep for global crops of 10, 26 and 50 tokens, in GB, without others."""
    process = start_process("cpu")
    kept = []
    for side in ("24", "40", "56"):  # patches of 8 pixels, and the class token
        flags = [
            "--global_crops_size", side, "--local_crops_number", "0", "--precision", precision]
        config = tiny_config(tmp_path, *flags)
        student, _ = train.build(config, process)
        kept.append(expected_memory(student, config, process, on_gpu)["kept for backward"])
    return kept


@pytest.mark.parametrize("on_gpu, precision, ideas, is_linear",
                         [(True, "bf16", [], True), (True, "fp32", [], True),
                          (False, "bf16", [], False), (True, "bf16", ["sdpa"], False)])
def test_attention_of_a_gpu_keeps_no_weights(on_gpu, precision, ideas, is_linear, tmp_path):
    with without(ideas):
        ten, some, fifty = kept_by_tokens(tmp_path, on_gpu, precision)
    assert ((some - ten) / 16 == pytest.approx((fifty - some) / 24, rel=1e-6)) == is_linear


def test_memory_that_is_not_known(monkeypatch):
    process = start_process("cpu")
    assert memory_gb(process.device) > 0
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert math.isnan(memory_gb(process.device))


@pytest.mark.parametrize("workers, is_enough", [(0, True), (2, True), (3, False)])
def test_shared_memory(workers, is_enough, tmp_path, monkeypatch):
    """Batches of 8 images with 2 crops of 24 and 2 of 16 pixels: 39,936 bytes."""
    one_batch = 8 * 3 * 2 * (24**2 + 16**2)
    usage = SimpleNamespace(free=4 * 2 * 2 * one_batch + 1)  # 4 processes, 2 workers, 2 batches
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    config = tiny_config(tmp_path, "--num_workers", str(workers))
    warning = shared_memory_warning(config, Process(torch.device("cpu"), 0, 8, node_size=4))
    assert (warning == "") == is_enough
    assert is_enough or "--shm-size" in warning


def test_a_backbone_that_does_not_learn(tmp_path):
    process = start_process("cpu")
    config = tiny_config(tmp_path)
    student, _ = train.build(config, process)
    whole = expected_memory(student, config, process)
    backbone = sum(p.nbytes for p in student.backbone.parameters()) / 2**30
    student.backbone.requires_grad_(False)
    heads_alone = expected_memory(student, config, process)
    assert heads_alone["gradients"] == pytest.approx(whole["gradients"] - backbone)
    assert heads_alone["moments"] == pytest.approx(whole["moments"] - 2 * backbone)
    assert heads_alone["two networks"] == whole["two networks"]


def test_a_frozen_teacher_counts(tmp_path):
    process = start_process("cpu")
    config = tiny_config(tmp_path)
    student, teacher = train.build(config, process)
    frozen = torch.nn.Linear(2**14, 2**13, bias=False)  # half a GB
    alone = sum(expected_memory(student, config, process).values())
    line = memory_report(student, config, process, [frozen])[0]
    assert line.startswith(f"expects {alone + 0.5:.2f} of") and "frozen teacher 0.50" in line


def test_peak_that_is_not_known(monkeypatch):
    assert peak_memory_gb(torch.device("cpu")) > 0
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setitem(sys.modules, "resource", None)  # so that importing it fails
    assert math.isnan(peak_memory_gb(torch.device("cpu")))


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
