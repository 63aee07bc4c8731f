"""Claims
1. HSDP on nodes of unequal sizes is refused in one line, on all processes.

That a split network trains as a whole one is checked in tests/test_distributed.py.
"""

import pytest
import torch
from torch import nn

from machinery.flags import UsageError
from machinery.process import Process
from machinery.shard import split


def test_unequal_nodes_are_named(monkeypatch):
    """Nodes of 8 and of 4 processes: 16 is a multiple of both."""
    monkeypatch.setattr(Process, "all_gather", lambda process, value: [8] * 8 + [4] * 8)
    process = Process(torch.device("cpu"), 0, 16, node_size=8)
    network = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"nodes of \[4, 8\] processes.*--parallel fsdp"):
        split(network, [], [], process, "fp32", together=8)
