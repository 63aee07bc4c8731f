"""Claims
1. A run ends at the first evaluation whose accuracy reaches the target; a run that never does
   trains to its end and is told as such. Evaluations come every so many steps, or epochs.
2. Until then it is the run of train.py: the judge says the same at the same steps.
3. Seconds are those of training, without the judge's; images and operations are those of the
   steps, with those of each stage of --curriculum.
4. Stopped by a signal it says that nothing is kept.
5. Bad input is one line that names the flag.

Time is that of a clock which the work under test moves (bench_helpers.FakeClock).
"""

import json
import os
import signal

import pytest
from bench_helpers import FakeClock, config_of
from conftest import TINY, metrics_of, tiny_config

import bench.speedrun
import train
from bench.__main__ import main
from bench.count import count_work
from bench.speedrun import SpeedrunConfig
from evaluation.judge import Judge

pytestmark = pytest.mark.usefixtures("quick_runs")


def judge_says(monkeypatch, *figures):
    """The judge says these, one after the other: first of the pixels, then of the networks."""
    figures = iter(figures)
    monkeypatch.setattr(Judge, "__call__", lambda self, _: next(figures))


def speedrun(*flags, json_file):
    main(["speedrun", *TINY, *flags, "--json", str(json_file)])
    return json.loads(json_file.read_text())["runs"]


# A tiny run has 2 epochs of 8 steps.
@pytest.mark.parametrize("flags, steps", [("--every 3", [3, 6, 9]), ("--knn_every 1", [8, 16])])
def test_it_ends_at_the_target(flags, steps, tmp_path, monkeypatch, capsys):
    accuracies = [0.3, 0.6, 0.7][-len(steps):]
    judge_says(monkeypatch, 0.2, 0.1, *accuracies, 0.2, 0.1, *[0.5] * 9)
    flags = [*flags.split(), "--target", "70", "--seeds", "4", "5"]
    first, second = speedrun(*flags, json_file=tmp_path / "out.json")
    assert first["seed"] == 4 and first["passed"] and first["step"] == steps[-1]
    assert [row["step"] for row in first["history"]] == steps
    assert first["accuracy"] == pytest.approx(70) and first["untrained"] == pytest.approx(10)

    assert second["seed"] == 5 and not second["passed"]
    assert second["step"] == 16 == second["history"][-1]["step"]
    printed = capsys.readouterr().out
    assert "1 of 2 seeds reached it" in printed and "median of these" in printed


def test_it_is_the_run_of_train(tmp_path):
    flags = ["--knn_every", "1", "--epochs", "2"]
    train.run(tiny_config(tmp_path / "run", *flags))
    rows = [row for row in metrics_of(tmp_path / "run") if "knn" in row]
    found, = speedrun(*flags, "--target", "100", "--seeds", "0",
                      json_file=tmp_path / "out.json")
    expected = [(row["step"], pytest.approx(100 * row["knn"])) for row in rows]
    judged = [(row["step"], row["accuracy"]) for row in found["history"]]
    assert [(0, found["untrained"]), *judged] == expected


def test_what_it_costs(tmp_path, monkeypatch):
    """A step takes 1 second and a judge 100; 8 steps have crops of 16 pixels, then of 24."""
    clock = FakeClock()
    monkeypatch.setattr(bench.speedrun, "time", clock)
    monkeypatch.setattr(bench.speedrun, "time_when_done", clock)
    monkeypatch.setattr(train, "train_step", clock.takes(1, train.train_step))
    judge_says(monkeypatch, 0.2, 0.1, 0.2, 0.3, 0.9)
    monkeypatch.setattr(Judge, "__call__", clock.takes(100, Judge.__call__))
    flags = "--curriculum 0.5 0.67 --every 4 --target 80 --seeds 0".split()
    found, = speedrun(*flags, json_file=tmp_path / "out.json")
    assert found["step"] == found["seconds"] == found["cpu_seconds"] == 12
    assert found["images"] == 12 * 8
    assert [row["seconds"] for row in found["history"]] == [4, 8, 12]

    small, large = (sum(
        count_work(
            config_of([*TINY, "--global_crops_size", side, "--local_crops_size", local],
                      SpeedrunConfig)).values()) for side, local in ((16, 16), (24, 16)))
    assert small < large and found["operations"] == 8 * small + 4 * large


def test_stopped_it_keeps_nothing(monkeypatch, capsys):
    train_step = train.train_step

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", signalled)
    with pytest.raises(SystemExit) as stop:
        main(["speedrun", *TINY])
    printed = capsys.readouterr().out
    assert stop.value.code == 128 + signal.SIGINT
    assert "SIGINT: stopped after step 1, and nothing of it is kept" in printed
    assert "saved" not in printed


def test_seeds_that_have_ended_are_told(monkeypatch, capsys):
    train_step, calls = train.train_step, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 3:  # the first step of the second seed
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", signalled)
    flags = "--seeds 5 6 --epochs 1 --epoch_length 2 --warmup_epochs 0 --target 100"
    with pytest.raises(SystemExit):
        main(["speedrun", *TINY, *flags.split()])
    printed = capsys.readouterr().out
    assert "0 of 1 seeds reached it" in printed and "     5       no        2" in printed


@pytest.mark.parametrize("flags, words", [
    ("--target 101", "--target 101"), ("--seeds a", "--seeds"), ("--every -1", "--every"),
    ("--val_data shapes:1:val", "--val_data: there are no images to judge with")])
def test_misuse(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["speedrun", *TINY, *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
