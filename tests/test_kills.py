"""Claims
1. Killed (SIGKILL) at any instant, inside a save too, one process or two: the run goes on from a
   complete checkpoint, loses at most one save interval, leaves nothing lying about, and ends with
   the weights of a run that was never killed, bit for bit.
2. Asked to stop (SIGTERM), a run is saved and gone within 30 seconds, with exit code 143.

KILLS=50 pytest -m slow tests/test_kills.py     the long form, some ten minutes
"""

import os
import random
import re
import sys
import time

import pytest
import torch

import train
from conftest import TINY, finish, saved, start

KILLS = os.environ.get("KILLS")
SAVE_EVERY, STEPS = 4, 24
# What is to be renamed where a save sleeps: before its manifest, before it is complete, after.
INSIDE = ("manifest.json.tmp", "tmp-*", "teacher.pt.tmp")


def train_in(rank, folder, world, pause):
    """A process of a run. pause: in its first save it says so by a file, and sleeps."""
    sys.stdout = sys.stderr = open(folder / f"log-{rank}", "a", buffering=1)
    replace = os.replace

    def paused(path, to):
        if pause and path.match(pause):
            (folder / "inside").touch()
            time.sleep(600)
        return replace(path, to)

    os.replace = paused
    flags = [*TINY, "--epochs", "3", "--save_every", str(SAVE_EVERY), "--num_workers", "0"]
    flags += ["--batch_size_per_gpu", str(8 // world), "--output_dir", str(folder / "run")]
    train.run(train.read_flags(flags))


def begin(folder, world=1, pause=""):
    folder.mkdir(exist_ok=True)
    (folder / "inside").unlink(missing_ok=True)
    return start(train_in, folder, world, pause, world=world)


def wait_for(condition, processes, seconds=60):
    end = time.time() + seconds
    while not condition() and time.time() < end and all(p.is_alive() for p in processes):
        time.sleep(0.01)


def newest(folder):
    """Step of the newest complete checkpoint, 0 without any."""
    found = (folder / "run/checkpoint").glob("step-*/manifest.json")
    return max((int(p.parent.name[5:]) for p in found), default=0)


def kill_once(folder, world, inside, wait):
    """Start the run that is there, or a new one; kill it inside a save, or `wait` seconds after
    its first step. Returns the last step that it logged."""
    log = folder / "log-0"
    before = len(log.read_text()) if log.exists() else 0
    processes = begin(folder, world, inside)
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
    return max(map(int, re.findall(r"^step +(\d+)/", log.read_text()[before:], re.M)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_any_instant(world, tmp_path):
    whole, rng, kills, lives = tmp_path / "whole", random.Random(world), 0, 0
    wanted = int(KILLS or {1: 3, 2: 2}[world])
    unbroken = begin(whole, world)
    while kills < wanted:
        broken = tmp_path / f"broken-{lives}"
        lives += 1
        while kills < wanted and newest(broken) < STEPS:
            inside, before = INSIDE[(kills // 2 + world) % 3] if kills % 2 else "", newest(broken)
            logged = kill_once(broken, world, inside, wait=rng.uniform(0, 1.5))
            assert newest(broken) >= max(before, logged - SAVE_EVERY)
            kills += 1
        finish(begin(broken, world))
        begins = [int(n) for n in re.findall(r"continuing from step (\d+)",
                                             (broken / "log-0").read_text())]
        assert begins == sorted(begins) and all(n % SAVE_EVERY == 0 for n in begins)
        left = {p.name for p in (broken / "run/checkpoint").iterdir()}
        assert left == {f"step-{STEPS}", f"step-{STEPS - SAVE_EVERY}"}
        assert not list((broken / "run").rglob("*.tmp"))
        finish(unbroken)
        weights, state = (saved(folder / "run/checkpoint")[1] for folder in (whole, broken))
        assert all(torch.equal(weights[k], state[k]) for k in weights)


@pytest.mark.slow
def test_asked_to_stop(tmp_path):
    processes = begin(tmp_path / "run")
    log = tmp_path / "run/log-0"
    wait_for(lambda: log.exists() and "step  " in log.read_text(), processes)
    processes[0].terminate()
    begun = time.time()
    processes[0].join(40)
    assert processes[0].exitcode == 143 and time.time() - begun < 30
    assert newest(tmp_path / "run") > 0
