"""Claims
1. HSDP on nodes of unequal sizes is refused in one line, on all processes.
2. A convnet, as the teacher of a distillation, is split without its parts: it has no blocks.

That a split network trains as a whole one is checked in tests/test_distributed.py.
"""

import pytest
import torch
from conftest import tiny_config
from torch import nn

import train
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


def test_a_convnet_has_no_blocks(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("machinery.shard.split", lambda *args: given.extend(args))
    config = tiny_config(tmp_path, "--arch", "resnet18")
    network = train.Network(config)
    train.shard(network, config, Process(torch.device("cpu")))
    assert given[:3] == [network, [], [network.dino_head]]
