"""Claims
1. Killed (SIGKILL) at any instant, inside a save too, one process with a worker or two with
   FSDP: the run goes on from a complete checkpoint, loses at most one save interval, leaves
   nothing lying about, and ends with the weights of a run that was never killed, bit for bit.
2. Asked to stop (SIGTERM) twice in a row, workers and all, a run is saved and gone, with exit
   code 143 and without a complaint; under torchrun, too.

KILLS=50 pytest -m slow tests/training/test_kills.py     the long form, some ten minutes
"""

import multiprocessing
import os
import random
import re
import signal
import sys
import time

import pytest
import torch.distributed.run
from conftest import TINY, finish, same_tensors, saved, start, tiny_config, without_figures

import train

KILLS = os.environ.get("KILLS")
SAVE_EVERY, EPOCH = 4, 8  # steps
PATIENCE = 300  # seconds after which a test gives up; nothing is said about how fast a run is
# What is to be renamed where a save sleeps: before its manifest, before it is complete, after.
INSIDE = ("manifest.json.tmp", "tmp-*", "teacher.pt.tmp")

# What a run with so many processes is like, beside its number of steps.
KINDS = {1: "--num_workers 1", 2: "--num_workers 0 --parallel fsdp"}


def train_in(rank, folder, world, pause, epochs):
    """A process of a run. pause: in its first save it says so by a file, and sleeps."""
    # Its workers are forked from it, as those of a program are on Linux, and a group with it,
    # which can get a signal together.
    multiprocessing.set_start_method("fork", force=True)
    os.setpgrp()
    sys.stdout = sys.stderr = open(folder / f"log-{rank}", "a", buffering=1)
    replace = os.replace

    def paused(path, to):
        if pause and path.match(pause):
            (folder / "inside").touch()
            time.sleep(2 * PATIENCE)
        return replace(path, to)

    os.replace = paused
    flags = f"--epochs {epochs} --save_every {SAVE_EVERY} --batch_size_per_gpu {8 // world}"
    flags += f" --knn_every 0 {KINDS[world]}"
    with without_figures():
        train.run(tiny_config(folder / "run", *flags.split()))


def begin(folder, world=1, pause="", epochs=2):
    folder.mkdir(exist_ok=True)
    (folder / "inside").unlink(missing_ok=True)
    return start(train_in, folder, world, pause, epochs, world=world)


def wait_for(condition, processes):
    """Until the condition holds, or a process is gone."""
    while not condition() and all(p.is_alive() for p in processes):
        time.sleep(0.01)


def newest(folder):
    """Step of the newest complete checkpoint, 0 without any."""
    manifests = (folder / "run/checkpoint").glob("step-*/manifest.json")
    return max((int(path.parent.name[5:]) for path in manifests), default=0)


def kill_once(folder, world, inside, wait, epochs):
    """Start or continue the run in a folder, and kill it; the last step that it logged.

    It is killed inside a save, or `wait` seconds after its first log line.
    """
    log = folder / "log-0"
    before = len(log.read_text()) if log.exists() else 0
    processes = begin(folder, world, inside, epochs)
    if inside:
        wait_for((folder / "inside").exists, processes)
        assert (folder / "inside").exists()
    else:
        wait_for(lambda: log.exists() and "step  " in log.read_text()[before:], processes)
        time.sleep(wait)
    for p in processes:
        p.kill()
    for p in processes:
        p.join()
    logged = re.findall(r"^step +(\d+)/", log.read_text()[before:], re.M)
    return max(map(int, logged), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_any_instant(world, tmp_path):
    rng = random.Random(world)
    # In the short form two processes are killed once, inside their first save.
    wanted = int(KILLS or {1: 2, 2: 1}[world])
    epochs = 2 if KILLS or world == 1 else 1
    steps = epochs * EPOCH
    kills, runs = 0, 0
    whole = tmp_path / "whole"
    unbroken = begin(whole, world, epochs=epochs)
    while kills < wanted:
        broken = tmp_path / f"broken-{runs}"
        runs += 1
        while kills < wanted and newest(broken) < steps:
            # Every other time inside a save; two processes begin with it.
            inside = INSIDE[(kills // 2 + world) % 3] if (kills + world) % 2 == 0 else ""
            before = newest(broken)
            logged = kill_once(broken, world, inside, rng.uniform(0, 1.5), epochs)
            assert newest(broken) >= max(before, logged - SAVE_EVERY)
            kills += 1
        finish(begin(broken, world, epochs=epochs))

        log = (broken / "log-0").read_text()
        begun_at = [int(step) for step in re.findall(r"continuing from step (\d+)", log)]
        assert begun_at == sorted(begun_at) and all(step % SAVE_EVERY == 0 for step in begun_at)
        left = {p.name for p in (broken / "run/checkpoint").iterdir()}
        assert left == {f"step-{steps}", f"step-{steps - SAVE_EVERY}"}
        assert not list((broken / "run").rglob("*.tmp"))
        finish(unbroken)
        states = [saved(folder / "run/checkpoint")[1] for folder in (whole, broken)]
        assert same_tensors(*states)


def steps_logged(log):
    return log.exists() and "step  " in log.read_text()


@pytest.mark.slow
def test_asked_to_stop(tmp_path):
    """Every process of it gets the signal, and gets it twice, as from `timeout`."""
    processes = begin(tmp_path / "run", epochs=1000)  # it does not end by itself
    log = tmp_path / "run/log-0"
    wait_for(lambda: steps_logged(log), processes)
    for _ in range(2):
        os.killpg(processes[0].pid, signal.SIGTERM)
        time.sleep(0.02)
    processes[0].join(PATIENCE)
    assert processes[0].exitcode == 143
    assert newest(tmp_path / "run") > 0
    assert "SIGTERM: stopped after step" in log.read_text().splitlines()[-1]


def torchrun(rank, folder, flags):
    """torchrun in this process, which has imported torch already."""
    sys.stdout = sys.stderr = open(folder / "log-0", "a", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    torch.distributed.run.main(["--standalone", "--nproc_per_node=2", "train.py", *flags])


@pytest.mark.slow
def test_asked_to_stop_under_torchrun(tmp_path):
    """Each of the two processes has two workers; all six get the signal from torchrun."""
    flags = "--epochs 1000 --batch_size_per_gpu 4 --num_workers 2 --knn_every 0".split()
    flags = [*TINY, *flags, "--output_dir", str(tmp_path / "run")]
    [process] = start(torchrun, tmp_path, flags, world=1)
    log = tmp_path / "log-0"
    wait_for(lambda: steps_logged(log), [process])
    process.terminate()
    process.join(PATIENCE)
    text = log.read_text()
    assert "SIGTERM: stopped after step" in text and "DataLoader worker" not in text, text
    assert newest(tmp_path) > 0
