"""Claims
1. A plan adds up, and meets runs that were published, by an estimate of products and of memory
   traffic, or by the share of the peak that is given. It splits a network over the GPUs that
   are planned for, without torchrun. With --curriculum it is the sum of its stages, and its
   memory that of the last.
2. Cost grows point by point: each point is the fastest of its steps, of the network it names;
   what the preset has none of grows, too.
3. The processes that growth starts train what was asked, and their failure is told.

Time is that of a clock which the work under test moves (bench_helpers.FakeClock).
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch.distributed.run
from bench_helpers import CPU, FakeClock, config_of
from conftest import PROCESSES, TINY

import bench.forecast
import bench.step
import train
import vit
from bench.__main__ import main
from bench.count import count_work
from bench.forecast import growth, point, rates_of_processes, values_of
from bench.step import Config
from machinery.flags import UsageError
from training.check import check

# -- 1


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """The work of a step does not depend on the GPU: of each preset it is counted once here."""
    counts = {}

    def count(config):
        step = repr(replace(config, gpus=1, kind="h100", utilisation=0.0, json="", given=()))
        if step not in counts:
            counts[step] = count_work(config)
        return counts[step]

    with patch("bench.forecast.count_work", count):
        yield


def test_plan_adds_up_and_meets_a_published_run(tmp_path, capsys):
    """By calculation alone: nothing is measured."""
    out = tmp_path / "out.json"
    flags = "--gpus 32 --kind a100 --utilisation 0.34".split()
    main(["plan", "dinov2_vitl16_in1k", *flags, "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["memory_gb"] == pytest.approx(sum(result["memory_parts"].values()))
    rate = 32 * 0.34 * 312e12 / (result["gflop_per_image"] * 1e9)
    assert result["images_per_second"] == pytest.approx(rate)
    assert result["days"] == pytest.approx(100 * 1250 * 32 * 64 / rate / 86400)
    # DINOv2's README: 32 A100s, about a day, 93 images a second and GPU, at a third of the peak.
    assert 0.8 < result["days"] < 1.2
    assert "an estimate" in capsys.readouterr().out


def test_a_plan_splits_what_it_is_told_to_split(monkeypatch):
    """FSDP over all GPUs that are planned for, HSDP over the eight of a node."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    flags = "shapes --no_use_bn_in_head --gpus 16".split()
    parts = {
        name: main(["plan", *flags, "--parallel", name])["memory_parts"]
        for name in ("ddp", "fsdp", "hsdp")}
    assert parts["ddp"]["moments"] == pytest.approx(16 * parts["fsdp"]["moments"])
    assert parts["ddp"]["moments"] == pytest.approx(8 * parts["hsdp"]["moments"])


def test_a_plan_refuses_what_torchrun_would(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for flags, said in (("plan shapes_dino --gpus 12 --parallel hsdp --no_use_bn_in_head",
                         "whole nodes"), ("plan shapes_dino --gpus 1000",
                                          "larger than the data set"),
                        ("plan shapes_dino --parallel fsdp", "BatchNorm"),
                        ("step shapes --parallel fsdp --no_use_bn_in_head",
                         "torchrun"), ("plan shapes --json .", "it is a folder")):
        with pytest.raises(SystemExit) as stop:
            main(flags.split())
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and said in printed and printed.count("\n") == 1


def days_of(flags):
    """The days of a plan, and the share of the peak that it estimates."""
    result = main(["plan", *flags.split()])
    return result["days"], result["utilisation"]


@pytest.mark.parametrize(
    "flags, published, factor",
    [
        ("dinov2_vitl16_in1k --gpus 32 --kind a100", 1.0, 1.15),  # DINOv2's README: about a day
        ("dinov2_vitl14 --gpus 96 --kind a100", 3.3, 1.15),  # the same
        ("dinov2_vitg14 --gpus 256 --kind a100", 3.6, 1.15),  # 22,000 GPU hours
        # DINO's README. Its code, of 2021, has no idea of bench/plain.py and reads by PIL.
        ("dino_vits16 --gpus 8 --kind v100", 1.75, 4)])
def test_the_estimate_meets_published_runs(flags, published, factor):
    """The rates of bench/forecast.py were fitted to the three runs on A100s; they stay so."""
    days, _ = days_of(flags)
    assert published / factor < days < published * (1.15 if factor < 2 else 1)


def test_a_plan_of_stages_adds_up(capsys):
    """A stage costs what a run at its sizes costs, for its share of the steps."""
    whole = main("plan dino_vits16 --gpus 8 --kind a100".split())
    half = main("plan dino_vits16 --gpus 8 --kind a100 --global_crops_size 112 "
                "--local_crops_size 48".split())
    both = main("plan dino_vits16 --gpus 8 --kind a100 --curriculum 0.75 0.5".split())
    assert both["days"] == pytest.approx(0.75 * half["days"] + 0.25 * whole["days"])
    assert both["memory_gb"] == whole["memory_gb"] > 2 * half["memory_gb"]
    assert both["gflop_per_image"] == pytest.approx(0.75 * half["gflop_per_image"]
                                                    + 0.25 * whole["gflop_per_image"])
    assert [cost["crops"] for cost in both["stages"]] == [(112, 48), (224, 96)]
    assert [cost["steps"] for cost in both["stages"]] == [187_650, 62_550]
    assert "112 and 48   187,650" in capsys.readouterr().out


def test_a_step_takes_as_long_as_its_kernels_take_to_start():
    """Sixteen images of a ViT of 12 blocks: 20 ms and 12 times 5; of 64 the GPU is busy longer."""
    few, many = (main(f"plan dino_vits16 --gpus 1 --kind a100 --batch_size_per_gpu {B}".split())
                 for B in (16, 64))
    assert few["images_per_second"] == pytest.approx(16 / 0.08)
    assert many["images_per_second"] < 64 / 0.08


def test_the_estimate_follows_the_network():
    """By stages, counted by hand, a H100 reaches 24 % with ViT-S and 41 % with ViT-L of the 700
    TFLOP/s that it sustains: 17 and 29 % of its nominal peak."""
    _, small = days_of("dino_vits16 --gpus 1 --kind h100 --batch_size_per_gpu 512")
    _, large = days_of("dinov2_vitl14 --gpus 1 --kind h100")
    assert small == pytest.approx(0.17, rel=0.2)
    assert large == pytest.approx(0.29, rel=0.2)


def test_a_gpu_holds_80e9_bytes(capsys, monkeypatch):
    """What needs 75 * 2**30 bytes is too much for it, though 75 is less than 80."""
    for needed, too_much in ((74, False), (75, True)):
        parts = {"two networks": needed, "gradients": 0, "moments": 0, "kept for backward": 0}
        monkeypatch.setattr(bench.forecast, "expected_memory", Mock(return_value=parts))
        main("plan shapes_dino --gpus 1 --kind h100".split())
        printed = capsys.readouterr().out
        assert f"{needed:.2f} GB of 74.5 a GPU" in printed
        assert ("too much" in printed) == too_much


def test_checkpointing_takes_the_students_forward_pass_once_more():
    """By products alone it is that much slower; traffic is that of all tensors, kept or not."""
    flags = "plan dinov2_vitl14 --gpus 1 --batch_size_per_gpu 64"
    usual, checkpointed = (main(f"{flags} {more}".split())["stages"][0]
                           for more in ("", "--activation_checkpointing"))
    work = usual["work"]
    more = 1 + work["student"] / sum(work.values())
    for name, factor in (("products", more), ("memory", 1), ("start", 1)):
        assert checkpointed["seconds"][name] == pytest.approx(factor * usual["seconds"][name])
    assert checkpointed["images_per_second"] < usual["images_per_second"]
    assert sum(checkpointed["memory_parts"].values()) < sum(usual["memory_parts"].values())


def test_a_plan_of_split_weights_is_not_faster(monkeypatch, capsys):
    """What FSDP exchanges is not counted, so what it saves of the traffic is not counted either."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    days = [
        days_of(f"shapes --no_use_bn_in_head --gpus 16 --parallel {name}")[0]
        for name in ("ddp", "fsdp", "hsdp")]
    assert days[0] == days[1] == days[2]
    assert "not counted         what the GPUs send to each other" in capsys.readouterr().out


def test_a_plan_in_other_precisions(capsys):
    """An A100 multiplies 16 times as fast in bf16 as in fp32; a V100 has no TF32."""
    flags = "plan dinov2_vitl14 --gpus 1 --kind a100 --precision"
    products = [
        main([*flags.split(), name])["stages"][0]["seconds"]["products"]
        for name in ("auto", "fp32", "tf32")]
    assert products[1] == pytest.approx(16 * products[0])
    assert products[2] == pytest.approx(2 * products[0])
    with pytest.raises(SystemExit):
        main("plan dino_vits16 --kind v100 --precision tf32".split())
    assert "--kind v100 has no such products" in capsys.readouterr().err


# -- 2


@pytest.fixture
def clock(monkeypatch):
    """A clock by which steps last 9 seconds, which warms up, then 5, 3, 4, and 9 again."""
    clock = FakeClock()
    durations = iter([9, 5, 3, 4, 9])
    monkeypatch.setattr(bench.step, "time_when_done", clock)
    monkeypatch.setattr(train, "train_step", clock.takes(durations, train.train_step))
    monkeypatch.setattr(bench.forecast.Memory, "peak_gb", lambda memory: 1.5)
    return clock


def test_a_point_is_the_fastest_of_its_steps(clock):
    config = config_of([*TINY, "--steps", "2"], Config)
    assert point(config, CPU, "local_crops_number", 1) == {
        "value": 1, "step_seconds": 3, "seconds_per_image": 3 / 8, "peak_memory_gb": 1.5}


def test_what_the_preset_has_none_of_grows(monkeypatch):
    monkeypatch.setitem(bench.forecast.GROWTH, "num_register_tokens", (0, 1, 2, 4))
    usual = config_of(["shapes_dino"], Config)
    without = config_of(["shapes_dino", "--local_crops_number", "0"], Config)
    assert values_of("num_register_tokens", usual) == [0, 1, 2, 4]
    assert values_of("local_crops_number", usual) == [0, 1, 2, 4]  # the preset has 2
    assert values_of("local_crops_number", without) == [0, 1, 2]
    assert values_of("depth", usual) == [1, 2, 4, 8]


@pytest.mark.parametrize("name, value", [("depth", 2), ("batch_size_per_gpu", 4)])
def test_a_point_is_of_what_it_names(name, value, clock, monkeypatch):
    config = config_of([*TINY, "--steps", "1"], Config)
    monkeypatch.setitem(vit.ARCHS, config.arch, dict(vit.ARCHS[config.arch]))  # it changes that
    trained = []
    real_step = train.train_step

    def note(learner, batch, *args):
        trained.append((len(learner.student.backbone.blocks), len(batch["index"])))
        return real_step(learner, batch, *args)

    monkeypatch.setattr(train, "train_step", note)
    row = point(config, CPU, name, value)
    expected = {"depth": vit.ARCHS[config.arch]["depth"], "batch_size_per_gpu": 8, name: value}
    assert set(trained) == {(expected["depth"], expected["batch_size_per_gpu"])}
    assert row["seconds_per_image"] == row["step_seconds"] / expected["batch_size_per_gpu"]


@pytest.mark.slow
def test_growth(tmp_path, monkeypatch, quick_runs):
    """From the flags to the figure, with two things that grow, and train.py in one process."""
    monkeypatch.chdir(tmp_path)
    table = {"depth": (0.25,), "local_crops_number": (0, 0.4)}
    monkeypatch.setattr(bench.forecast, "GROWTH", table)
    monkeypatch.setattr(bench.forecast, "os", only_one_core())
    # Importing torch anew is most of what it costs. So its processes come from a server that has
    # done so, and this process does what torchrun would start.
    monkeypatch.setattr(bench.forecast.multiprocessing, "get_context", lambda kind: PROCESSES)
    monkeypatch.setattr(bench.forecast.subprocess, "run", torchrun_here)
    flags = "--batch_size_per_gpu 2 --steps 1 --device cpu --precision fp32".split()
    result = main(["growth", "shapes_dino", *flags])["growth"]
    values = {name: [row["value"] for row in rows] for name, rows in result.items()}
    # The preset has a depth of 4 and 2 local crops; 0.4 of 2 is no crop once more.
    assert values == {"depth": [1], "local_crops_number": [0], "processes": [1]}
    for row in (*result["depth"], *result["local_crops_number"]):
        assert set(row) == {"value", "step_seconds", "seconds_per_image", "peak_memory_gb"}
    assert set(result["processes"][0]) == {"value", "images_per_second"}
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def only_one_core():
    """The module os as bench.forecast uses it, on a machine of one core."""
    return SimpleNamespace(environ=bench.forecast.os.environ, cpu_count=lambda: 1)


def torchrun_here(command, env, **_):
    """Do in this process what torchrun would start by this command: one process of train.py."""
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert env["OMP_NUM_THREADS"] == "1"
    options = torch.distributed.run.parse_args(command[3:])  # as torchrun understands them
    assert options.nproc_per_node == "1"
    assert Path(options.training_script).samefile(train.__file__)
    train.main(options.training_script_args)
    return subprocess.CompletedProcess(command, 0)


class FullPool:
    """In the place of a pool of processes: points of a large batch do not fit."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, point, config, process, name, value):
        if value > 2:
            result = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
        else:
            row = {
                "value": value, "step_seconds": 1.0, "seconds_per_image": 1.0,
                "peak_memory_gb": 1.0}
            result = Mock(return_value=row)
        return SimpleNamespace(result=result)


def test_a_point_that_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    """So is a thing of which none fits; all else is drawn, also where train.py fails afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        bench.forecast, "GROWTH",
        {"batch_size_per_gpu": (0.25, 1), "depth": (2,), "local_crops_number": (0,)})
    monkeypatch.setattr(bench.forecast, "ProcessPoolExecutor", FullPool)
    monkeypatch.setattr(bench.forecast.subprocess, "run",
                        lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(UsageError, match="with 1 processes failed"):
        growth(config_of([*TINY], Config), CPU)
    printed = capsys.readouterr().out
    assert "batch_size_per_gpu          8 out of memory" in printed
    assert (tmp_path / "growth.png").exists()


def test_growth_is_of_a_vit():
    config = config_of(["shapes_dino", "--arch", "resnet18"], Config)
    with pytest.raises(UsageError, match="growth is of a ViT"):
        growth(config, CPU)


# -- 3


def test_growth_of_processes_trains_what_was_asked(monkeypatch):
    commands = []

    def fails(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(bench.forecast.subprocess, "run", fails)
    flags = ["dino_vits16_300ep", "--arch", "vit_pico", "--mask_ratio", 0.2, 0.4]
    config = config_of(flags, Config)
    with pytest.raises(UsageError, match="with 1 processes failed"):
        rates_of_processes(config, CPU)
    line = " ".join(commands[0])
    assert "--arch vit_pico" in line
    assert "--mask_ratio 0.2 0.4" in line
    assert "--num_workers 0" in line  # workers would take the cores of the other processes
    assert "--steps" not in line  # that is a flag of bench, not of train.py

    # train.py takes it, although this preset has 30 epochs of a rising temperature.
    begin = commands[0].index(train.__file__) + 1
    check(train.read_flags(commands[0][begin:]))
