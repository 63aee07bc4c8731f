"""What the tests of bench/ share: a configuration from flags, networks, and a clock for tests."""

import torch

import train
from bench.step import StepConfig
from machinery.flags import parse
from machinery.process import Process
from training.check import check
from training.recipes import PRESETS

CPU = Process(torch.device("cpu"))


def config_of(flags, kind=StepConfig):
    """The configuration that `python -m bench TASK FLAGS` would use."""
    config = parse(kind, [str(flag) for flag in flags], PRESETS)
    check(config)
    return config


def networks_of(config):
    """(student, teacher, centerings), apart from each other as in the middle of training."""
    student, teacher = train.build(config, CPU)
    centerings = train.build_centerings(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in [*teacher.parameters(), *centerings.buffers()]:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return student, teacher, centerings


class FakeClock:
    """A clock that moves only when a test says so, so that every measured time is known exactly.

    Called like time_when_done(process), which it replaces in the module under test; its other
    methods have the names of Python's `time` module and replace that. A test gives a function a
    duration by `takes`. per_reading: how many seconds it moves whenever somebody reads it.
    """

    def __init__(self, per_reading: float = 0.0):
        self.now = 0.0
        self.per_reading = per_reading

    def __call__(self, process=None) -> float:
        self.now += self.per_reading
        return self.now

    perf_counter = process_time = time = __call__

    def takes(self, seconds, function):
        """The same function, which now takes that long by this clock.

        seconds: a number, or an iterator with the duration of each call.
        """

        def slow(*args, **kwargs):
            self.now += seconds if isinstance(seconds, (int, float)) else next(seconds)
            return function(*args, **kwargs)

        return slow
