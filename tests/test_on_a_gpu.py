"""Claims
1. A run on a GPU has the losses of the same run on a CPU, for all ingredients, eager and compiled.
2. In bf16, fp16 and tf32 the losses are those of float32 but for rounding.
3. A run that dies on a GPU and is continued ends as if it had never stopped.
4. Sharded by FSDP (NCCL, one process) and with checkpointed blocks it has the same losses; in
   bf16 FSDP has them but for rounding.
5. Every evaluation gives on a GPU what it gives on a CPU.
6. Colours are those of the CPU, compiled or not.

All of these need a GPU and are left out without one (`pytest -m gpu` runs them alone). What can
be checked without one stands in test_without_a_gpu.py.
"""

import os
import socket

import numpy as np
import pytest
import torch
from conftest import (EVERYTHING, finish, killed_in_step, metrics_of, start, teacher_of,
                      tiny_config, without_figures)

import augment
import evaluate
import losses
import train
from augment import draw_photometry, photometry
from evaluation import logreg
from machinery.process import Process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("quick_runs", "not_compiled_afterwards")]

METHODS = {"dino": (), "everything": tuple(EVERYTHING), "lars": ("--optimizer", "lars")}


@pytest.fixture
def not_compiled_afterwards(monkeypatch):
    for module in (losses, augment):
        monkeypatch.setattr(module, "COMPILE", False)


def losses_of(folder, *flags):
    """The loss of each log line of a tiny run with these flags, (8,) or (4,)."""
    train.run(tiny_config(folder, "--knn_every", "0", *flags))
    return torch.tensor([row["loss"] for row in metrics_of(folder) if "loss" in row])


def on_gpu(folder, *flags):
    return losses_of(folder, "--device", "cuda", *flags)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The losses of each method on the CPU, in float32."""
    with without_figures():
        return {
            name: losses_of(tmp_path_factory.mktemp(name), *flags)
            for name, flags in METHODS.items()}


# -- 1


@pytest.mark.parametrize("compiled", ("--compile", "--no_compile"))
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_cpu(method, compiled, on_cpu, tmp_path):
    found = on_gpu(tmp_path, *METHODS[method], compiled)
    # The first line comes from nearly the same weights; later ones add up what rounding did to
    # the weights, of which AdamW makes steps of full length.
    torch.testing.assert_close(found[0], on_cpu[method][0], rtol=1e-3, atol=0)
    torch.testing.assert_close(found, on_cpu[method], rtol=1e-2, atol=0)


# -- 2


@pytest.mark.parametrize("precision", ("bf16", "fp16", "tf32"))
def test_lower_precisions_begin_with_nearly_the_same_losses(precision, on_cpu, tmp_path):
    found = on_gpu(tmp_path, *EVERYTHING, "--precision", precision)
    # The first line, of two steps: in fp16 the scaler leaves out the first steps, until it has
    # found its factor, so the weights of later lines are others.
    torch.testing.assert_close(found[0], on_cpu["everything"][0], rtol=4e-2, atol=0)
    assert found.isfinite().all()


# -- 3


def flat(tensors):
    """All numbers of a dictionary of tensors in one row, in the order of the names."""
    return torch.cat([tensors[name].float().cpu().flatten() for name in sorted(tensors)])


def test_a_run_that_died_ends_as_if_it_had_not(tmp_path):
    whole = on_gpu(tmp_path / "whole", *EVERYTHING, "--save_every", "2")
    with killed_in_step(6):
        on_gpu(tmp_path / "died", *EVERYTHING, "--save_every", "2")
    continued = on_gpu(tmp_path / "died", *EVERYTHING, "--save_every", "2")

    # On a GPU the order in which parallel sums add up is not fixed. The weights have moved much
    # further since the first save than these sums can make them differ.
    torch.testing.assert_close(continued, whole, rtol=1e-3, atol=0)
    end, other_end = (flat(teacher_of(tmp_path / name)) for name in ("whole", "died"))
    begin = flat(
        train.build(tiny_config(tmp_path, *EVERYTHING),
                    Process(torch.device("cpu")))[1].backbone.state_dict())
    assert (end - other_end).norm() < 0.05 * (end - begin).norm()


# -- 4


def sharded_run(rank, folder):
    """A run in a process group of one, as torchrun --nproc_per_node=1 would start it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port}
    with without_figures():
        found = {
            precision: on_gpu(folder / precision, "--parallel", "fsdp", "--precision",
                              precision)
            for precision in ("fp32", "bf16")}
    torch.save(found, folder / "losses.pt")


def test_a_sharded_run_has_the_same_losses(on_cpu, tmp_path):
    finish(start(sharded_run, tmp_path, world=1))
    found = torch.load(tmp_path / "losses.pt")
    torch.testing.assert_close(found["fp32"], on_cpu["dino"], rtol=1e-2, atol=0)

    # In bf16 FSDP rounds the norms and LayerScale of the blocks as well.
    torch.testing.assert_close(found["bf16"][0], on_cpu["dino"][0], rtol=4e-2, atol=0)
    assert found["bf16"].isfinite().all()


def test_checkpointed_blocks_have_the_same_losses(on_cpu, tmp_path):
    found = on_gpu(tmp_path, *EVERYTHING, "--activation_checkpointing")
    torch.testing.assert_close(found, on_cpu["everything"], rtol=1e-2, atol=0)


# -- 5

LEARNING = "--data shapes:48 "  # what most tasks learn from or search in
TASKS = {
    "knn": LEARNING + "--nb_knn 1 5", "linear": LEARNING + "--epochs 2", "logreg": LEARNING,
    "finetune": LEARNING + "--epochs 1 --batch_size 8", "segment": LEARNING + "--steps 3",
    "depth": LEARNING + "--steps 3", "patches": LEARNING, "copies": "--n_originals 8",
    "masks": ""}

# Seconds, and settings that were chosen on a few images, may differ where the figures agree.
NO_FIGURES = ("minutes", "C", "lr", "blocks", "avgpool", "chosen_by")


def numbers_in(value):
    """All figures of a result, however deep, in order."""
    if isinstance(value, dict):
        parts = [part for name, part in value.items() if name not in NO_FIGURES]
        return [number for part in parts for number in numbers_in(part)]
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in numbers_in(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("task", TASKS)
def test_evaluations_are_those_of_the_cpu(task, small_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logreg, "PENALTIES", logreg.PENALTIES[8:28:4])  # all 45 take a while
    # So few images would be fitted on the CPU in both cases.
    monkeypatch.setattr(logreg, "device_of_fit", lambda rows, classes, process: process.device)
    found = {}
    for device in ("cpu", "cuda"):
        line = (f"{task} --weights {small_backbone} --val_data shapes:32:val {TASKS[task]} "
                f"--device {device} --precision fp32 --output_dir {device}")
        found[device] = torch.tensor(numbers_in(evaluate.main(line.split())))
    # Shares from 0 to 1, one image of 32 being 0.03: three images may change sides. Depths are
    # in metres.
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=0.05, atol=0.1)


# -- 6


@pytest.mark.parametrize("compiled", (False, True))
def test_colours_are_those_of_the_cpu(compiled, monkeypatch):
    monkeypatch.setattr(augment, "COMPILE", compiled)
    crops = torch.randint(256, (64, 3, 40, 40), dtype=torch.uint8)
    rng = np.random.default_rng(0)
    params = np.stack([draw_photometry("dino", view % 3, rng) for view in range(64)])
    params = torch.from_numpy(params)
    found = photometry(crops.cuda(), params).cpu()
    torch.testing.assert_close(found, photometry(crops, params), rtol=1e-3, atol=1e-3)
