"""Claims
1. A run writes what the README says, and a finished one says so; run again it does nothing. A run
   without images to judge with says how to get them, and ends without their figures.
2. The same directory with another configuration is refused, with what differs and with what to
   do; what does not change the result may differ; --no_resume starts anew.
3. --auto_scale is settled when a run begins, and keeps no flag that was dropped.
4. Killed between its last save and its end, a run is completed.
5. A second program is refused in a folder in which one trains; one that was killed does not
   keep others out, even while a child of it lives.
6. metrics.jsonl forgets what was logged after the checkpoint, and a half-written line.
7. Files of the code that have changed since the run began are named when it is continued.
"""

import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import TINY, metrics_of, same_tensors, start, teacher_of, tiny_config

import machinery.process
import train
from figures import story
from machinery.flags import UsageError, parse
from machinery.process import Process, start_process
from training.check import check
from training.config import Config
from training.recipes import PRESETS
from training.rundir import forget_metrics_after, locked, match_stored_run, record

FIGURES = {"story.png", "story.pdf"}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(folder, summary, what was printed) of a whole tiny run, its figures and all."""
    run = tmp_path_factory.mktemp("first") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        summary = train.run(tiny_config(run))
    return run, summary, printed.getvalue()


@pytest.fixture
def run(first, tmp_path):
    """A copy of that run's folder, to do with as one likes."""
    return shutil.copytree(first[0], tmp_path / "run")


# ----------------------------------------------------------------------------------------------
# What is in it


def test_a_run_and_its_directory(first):
    run, summary, printed = first
    names = ("config.json metrics.jsonl checkpoint teacher.pt heads.pt summary.json card.md "
             "code lock snapshots")
    assert {path.name for path in run.iterdir()} == FIGURES.union(names.split())
    assert f"loss {summary['loss']:.3f}" in (run / "card.md").read_text()
    names = ("knn knn_untrained knn_pixels minutes peak_memory_gb collapsed steps "
             "images_per_second loss preset seed").split()
    assert set(names) <= set(summary)
    assert summary["steps"] == 16 and 0 < summary["loss"] < 2 * math.log(32)
    assert json.loads((run / "summary.json").read_text()) == summary
    assert "next:  python visualize.py attention" in printed
    parts = printed[printed.index("expects "):].splitlines()[0]
    assert "two networks" in parts and "kept for backward" in parts


def test_a_run_without_images_to_judge_with(tmp_path, capsys):
    run = tmp_path / "run"
    summary = train.run(tiny_config(run, "--val_data", "", "--val_share", "0", "--epochs", "1"))
    printed = capsys.readouterr().out
    assert ": 64 images of shapes:64, 8 steps" in printed and summary["knn"] is None
    assert printed.count("give --val_data, or hold images out by --val_share") == 1
    assert "k-NN" not in printed and f"wrote {run}/story.png and teacher.pt" in printed
    assert FIGURES <= {path.name for path in run.iterdir()}


def test_the_code_is_kept_with_the_run(first):
    code = first[0] / "code"
    for name in ("train.py", "vit.py", "training/config.py", "machinery/flags.py",
                 "images/data.py"):
        assert (code / name).read_text().startswith('"""'), name
    assert not list(code.rglob("test_*.py"))


# ----------------------------------------------------------------------------------------------
# The same directory again


def test_a_finished_run_says_so(first, run, capsys, quick_runs):
    before = teacher_of(run)
    assert train.run(tiny_config(run)) == first[1]
    assert "is finished" in capsys.readouterr().out
    assert same_tensors(before, teacher_of(run))


def test_checkpoints_that_cannot_be_read(run, capsys):
    """A finished run needs none. Another is not begun anew, which would remove all of it."""
    manifests = sorted((run / "checkpoint").glob("*/manifest.json"))
    for manifest in manifests:
        manifest.write_text("{")
    train.run(tiny_config(run))
    assert "is finished" in capsys.readouterr().out

    (run / "summary.json").unlink()
    rows = metrics_of(run)
    with pytest.raises(UsageError, match="none of its checkpoints can be read"):
        train.run(tiny_config(run))
    assert metrics_of(run) == rows and all(manifest.exists() for manifest in manifests)


def test_a_run_that_was_judged_by_its_own_images_may_go_on(run, tmp_path):
    same = ("--data", "shapes:64", "--val_data", "shapes:64")
    check(tiny_config(run, *same))
    for config in (tiny_config(run, *same, "--no_resume"), tiny_config(tmp_path / "new",
                                                                       *same)):
        with pytest.raises(UsageError, match="--val_data shapes:64 is --data itself"):
            check(config)


def test_code_that_has_changed_is_named(run, capsys):
    train.run(tiny_config(run))
    assert "changed after" not in capsys.readouterr().out
    (run / "code" / "losses.py").write_text("# before the student's change")
    (run / "code" / "images" / "gone.py").write_text("# a file that is no more")
    train.run(tiny_config(run))
    printed = capsys.readouterr().out
    assert "warning: images/gone.py, losses.py changed after this run began" in printed
    assert "--no_resume starts anew" in printed and "is finished" in printed


def test_another_configuration_is_refused(run):
    with pytest.raises(UsageError, match="--lr 0.5 .the run has 0.001.*--no_resume"):
        train.run(tiny_config(run, "--lr", "0.5"))
    with pytest.raises(UsageError, match="--batch_size_per_gpu 4.*a global batch of 8"):
        train.run(tiny_config(run, "--batch_size_per_gpu", "4"))


def test_other_images_are_refused(run):
    with pytest.raises(UsageError, match="began with 64 images, --data has 72: give the same"):
        train.run(tiny_config(run, "--data", "shapes:72"))


def test_what_does_not_change_the_result_may_differ(run, capsys):
    # There is a --val_data, so that nothing is held out of --data, whatever a preset says.
    config = tiny_config(run, *"--num_workers 1 --log_every 3".split())
    train.run(dataclasses.replace(config, val_share=0.1))
    assert "is finished" in capsys.readouterr().out


def test_started_anew(run, quick_runs):
    before = teacher_of(run)
    summary = train.run(tiny_config(run, "--lr", "0.5", "--no_resume", "--epochs", "1"))
    assert summary["steps"] == 8
    assert not same_tensors(before, teacher_of(run))
    assert max(row["step"] for row in metrics_of(run)) == 8  # the old rows are gone


def test_killed_between_the_last_save_and_the_end(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(story, "draw_story", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(tiny_config(run, "--epochs", "1"))
    (run / "teacher.pt").unlink()
    summary = train.run(tiny_config(run, "--epochs", "1"))
    assert summary["steps"] == 8 and math.isfinite(summary["loss"])
    assert (run / "teacher.pt").exists() and FIGURES <= {path.name for path in run.iterdir()}


# ----------------------------------------------------------------------------------------------
# --auto_scale


def test_auto_scale_is_settled_when_a_run_begins(tmp_path, capsys, quick_runs):
    run = tmp_path / "run"
    with pytest.raises(UsageError, match="--warmup_epochs"):  # a flag, which the rules obey
        train.run(tiny_config(run, *"--auto_scale --epochs 1 --warmup_epochs 2".split()))
    scaled = tiny_config(run, "--auto_scale", "--epochs", "1")
    train.run(scaled)
    assert "--auto_scale: momentum_teacher 0.98 " in capsys.readouterr().out
    stored = json.loads((run / "config.json").read_text())
    assert stored["momentum_teacher"] == 0.98  # a flag
    assert stored["ibot_n_prototypes"] == 256 and stored["local_crops_scale"] == [0.25, 0.6]
    train.run(scaled)  # the same command finds its run
    assert "is finished" in capsys.readouterr().out


def test_a_convnet_learns_in_float32_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(machinery.process, "fast_precisions", lambda device: ("bf16",))
    for arch, expected in (("vit_pico", "bf16"), ("resnet18", "fp32")):
        config = tiny_config(tmp_path / arch, "--arch", arch, "--precision", "auto")
        alone = Process(torch.device("cpu"))
        assert match_stored_run(config, tmp_path / arch, alone, 64).precision == expected


def test_auto_scale_does_not_keep_a_flag_that_was_dropped(tmp_path, quick_runs):
    flags = [*TINY, "--auto_scale", "--epochs", "1", "--output_dir", str(tmp_path / "run")]
    train.run(parse(Config, flags, PRESETS))
    lr = flags.index("--lr")
    dropped = parse(Config, flags[:lr] + flags[lr + 2:], PRESETS)
    dropped.lr = 0.5  # what another preset would say
    with pytest.raises(UsageError, match="--lr 0.5"):
        train.run(dropped)


# ----------------------------------------------------------------------------------------------
# One program at a time


def hold(rank, folder, pipe):
    """Lock the folder, start a child, say so, and stay until killed."""
    with locked(folder, start_process("cpu")):
        child = os.fork()
        while not child:
            time.sleep(1)
        pipe.send(child)
        time.sleep(1000)


def test_one_program_at_a_time(tmp_path, capsys):
    pytest.importorskip("fcntl")
    here, there = multiprocessing.Pipe()
    [owner] = start(hold, tmp_path, there, world=1)
    child = here.recv()
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--output_dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "another program is training there" in error
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}

    owner.kill()
    owner.join()
    with locked(tmp_path, start_process("cpu")):
        os.kill(child, signal.SIGKILL)


# ----------------------------------------------------------------------------------------------
# metrics.jsonl


def test_metrics_after_a_checkpoint_are_forgotten(tmp_path):
    process = start_process("cpu")
    for step in (2, 4, 6):
        record(tmp_path, {"step": step, "loss": 1.0}, process)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    forget_metrics_after(tmp_path / "metrics.jsonl", 4, process)
    assert [row["step"] for row in metrics_of(tmp_path)] == [2, 4]
    record(tmp_path, {"step": 4, "knn": 0.5}, process)
    forget_metrics_after(tmp_path / "metrics.jsonl", 4, process)
    assert [row["step"] for row in metrics_of(tmp_path)] == [2, 4, 4]
    forget_metrics_after(tmp_path / "metrics.jsonl", 4, process, judged=False)
    assert ["loss" in row for row in metrics_of(tmp_path)] == [True, True]
    forget_metrics_after(tmp_path / "none.jsonl", 4, process)
    assert not (tmp_path / "none.jsonl").exists()
