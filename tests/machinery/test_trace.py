"""Claims
1. The batches are the same; the steps that are asked for are recorded, and no others.
2. A run that is shorter writes what it has, or says that it has nothing; only the main process
   writes.
"""

import json

import pytest
import torch

from machinery.clock import FIRST_STEPS
from machinery.process import Process
from machinery.trace import traced

CPU = Process(torch.device("cpu"))


def steps_in(file):
    """The numbers of the steps in a trace; torch calls them ProfilerStep#N."""
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["name"] for event in events}
    return sorted(int(name.split("#")[1]) for name in names if name.startswith("ProfilerStep"))


@pytest.mark.parametrize("batches, steps", [(12, 3), (FIRST_STEPS + 3, 5)])
def test_steps_are_recorded(batches, steps, tmp_path, capsys):
    seen = []
    for batch in traced(range(batches), steps, tmp_path, CPU):
        seen.append(batch)
        torch.ones(3).sum()
    assert seen == list(range(batches))
    first = FIRST_STEPS + 1  # after the one that warms up
    end = min(first + steps,
              batches + 1)  # a short run ends within a step that has nothing in it
    assert steps_in(tmp_path / "trace.json") == list(range(first, end))
    assert "ui.perfetto.dev" in capsys.readouterr().out


def test_other_processes_write_nothing(tmp_path):
    second = Process(torch.device("cpu"), rank=1, world_size=2)
    assert list(traced(range(9), 1, tmp_path, second)) == list(range(9))
    assert not list(tmp_path.iterdir())


def test_too_few_steps(tmp_path, capsys):
    assert list(traced(range(FIRST_STEPS), 2, tmp_path, CPU)) == list(range(FIRST_STEPS))
    assert "--profile wrote nothing" in capsys.readouterr().out
