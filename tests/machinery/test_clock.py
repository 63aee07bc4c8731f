"""Claims
1. The time of a step counts neither pauses nor the first, slow steps; until then it is a guess.
   It is a mean over the last thousand steps or so: a run that becomes slow says so.
2. Time spent waiting for data is told as a share of the time that counts.
3. The time left is that of the steps left.
4. Progress is told every half minute where there is no terminal, on one line where there is
   one, and by the main process alone.
5. A time is taken when the device of the process has done all that it was given.

The tests have a clock of their own, so they say nothing about the speed of this machine.
"""

import sys

import pytest
import torch

import machinery.clock
from machinery.clock import Clock, Progress, time_when_done
from machinery.process import Process

ALONE = Process(torch.device("cpu"))


class FakeTime:
    """Takes the place of the module time: it goes on only when it is told to."""

    def __init__(self):
        self.seconds = 1000.0

    def time(self):
        return self.seconds

    perf_counter = time

    def sleep(self, seconds):
        self.seconds += seconds


@pytest.fixture
def fake(monkeypatch):
    time = FakeTime()
    monkeypatch.setattr(machinery.clock, "time", time)
    return time


def test_clock_does_not_count_pauses(fake):
    clock = Clock(0, 10, skip=1)
    fake.sleep(5)
    clock.tick()
    assert clock.counted == 0 and clock.step_seconds == 5  # a first guess
    for _ in range(3):
        fake.sleep(1)
        with clock.pause():
            fake.sleep(200)
        fake.sleep(1)
        clock.tick()
    assert clock.counted == pytest.approx(3,
                                          rel=2e-3) and clock.step_seconds == pytest.approx(2)


def test_a_run_that_becomes_slow_says_so(fake):
    """50,000 steps of 0.1 s without waiting, then 5,000 of 0.3 s, of which 0.2 s are waiting."""
    clock = Clock(0, 65_000, skip=0)

    def batches():
        while True:
            fake.sleep(0.2 if clock.step >= 50_000 else 0.0)
            yield

    source = batches()
    for step in range(55_000):
        clock.wait(source)
        fake.sleep(0.1)
        clock.tick()
    assert clock.step_seconds == pytest.approx(0.3, rel=0.01)
    assert clock.waiting == pytest.approx(2 / 3, rel=0.02) and clock.eta.startswith("0:49:")


def test_time_left(fake):
    clock = Clock(100, 4000, skip=0)  # continues a run, at step 100
    for _ in range(10):
        fake.sleep(2)
        clock.tick()
    assert clock.step == 110
    assert clock.eta == "2:09:40"  # 3,890 steps of two seconds


def test_share_of_waiting(fake):

    def slow_batches():
        while True:
            fake.sleep(1)
            yield "batch"

    clock, batches = Clock(0, 10, skip=1), slow_batches()
    assert clock.waiting == 0
    fake.sleep(50)
    clock.wait(batches)  # the first step does not count, nor does its waiting
    clock.tick()
    for _ in range(4):
        assert clock.wait(batches) == "batch"
        fake.sleep(3)
        clock.tick()
    assert clock.waiting == pytest.approx(1 / 4)


def test_progress_without_a_terminal(fake, capsys):
    progress = Progress("images", 1000, ALONE)
    for done in range(100, 1001, 100):
        fake.sleep(10)
        progress(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "images: 300 of 1,000, 0:01:10 left", "images: 600 of 1,000, 0:00:40 left",
        "images: 900 of 1,000, 0:00:10 left"]


def test_progress_on_a_terminal(fake, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("images", 1000, ALONE)
    for done in range(100, 1001, 100):
        fake.sleep(0.1)
        progress(done)
    parts = [part.strip() for part in capsys.readouterr().err.split("\r")[1:]]
    assert parts[-1] == "images: 1,000 of 1,000, 0:00:00 left"
    assert 2 < len(parts) < 10  # not at every call, and always at the end


def test_progress_of_another_process_is_silent(fake, capsys):
    progress = Progress("images", 10, Process(ALONE.device, rank=1, world_size=2))
    fake.sleep(100)
    progress(10)
    assert capsys.readouterr().err == ""


def test_time_when_done(fake):
    begun = time_when_done(ALONE)
    fake.sleep(3)
    assert time_when_done(ALONE) - begun == 3


def test_it_waits_for_the_device_of_the_process(fake, monkeypatch):
    """And not for the current one, which is another where --device cuda:1 was given."""
    waited_for = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited_for.append)
    time_when_done(Process(torch.device("cuda:1")))
    assert waited_for == [torch.device("cuda:1")]
    time_when_done(ALONE)  # a CPU has done what it was given
    assert len(waited_for) == 1
