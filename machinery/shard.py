"""Shard: networks larger than one device, split over the processes that train them.

    4 processes, together = 4 (FSDP)      together = 2, on two machines (HSDP)
    [1/4] [2/4] [3/4] [4/4]               [1/2] [2/2]  <-- gradients -->  [1/2] [2/2]
      <-- parts, all to all -->              <-- parts -->                   <-- parts -->

Idea     Each process keeps a part of every tensor. A module is put together when it is about to
         run, and taken apart again: memory is paid for with messages. These are cheap within a
         machine and dear between machines, which decides how many processes should share.
Paper    FSDP: PyTorch's fully_shard (Zhao 2023); ZeRO (Rajbhandari 2020)
Try      pytest tests/test_distributed.py -k machine
Change   what is sent in the low precision is the list `cheap` of `split`
Tests    pytest tests/test_distributed.py
"""

import warnings

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from machinery.flags import UsageError
from machinery.process import LOW, Process


def split(network: nn.Module, cheap: list[nn.Module], exact: list[nn.Module], process: Process,
          precision: str, together: int):
    """Split parameters, gradients and moments of a network over processes, in place: FSDP2.

    Without it every process holds all of them. With it each of N processes holds an N-th part
    of every tensor. When a module is about to run, the processes send each other their parts,
    so that each has the whole module for a moment, and drop them afterwards.

    Example: a ViT-L has 304 million parameters. In float32 these, their gradients and the two
    moments of AdamW take 16 bytes each, 4.5 GB in all; over eight processes 0.6 GB each.

    together: how many processes hold one copy. With all of them every part goes over the wires
    between machines, three times a step. With those of one machine, whose GPUs are wired to
    each other, each machine has a copy, and only gradients go between machines: HSDP. Example,
    of two machines with two processes each:

        together = 4     processes 0 1 2 3 hold a quarter each
        together = 2     processes 0 1 hold a half each, 2 3 the same two halves

    network: its modules in the two lists are gathered one at a time, and the rest of it as one
    more. cheap: sent, and their gradients added up, in the low precision, on GPUs. exact: in
    float32, as the rest is.
    """
    # FSDP warns that outputs of a module are views, for those who write into them. We do not.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")

    # The processes as a table of one row for each copy: those of a row hold a part each, and
    # those of a column hold the same part, whose gradients they average.
    copies = process.world_size // together

    # Each knows its own machine only. If these differ, the table has no rectangle.
    sizes = set(process.all_gather(together))
    if len(sizes) > 1:
        raise UsageError(f"--parallel hsdp: nodes of {sorted(sizes)} processes; start as many "
                         "on each (--nproc_per_node), or use --parallel fsdp")
    if copies == 1:
        mesh = init_device_mesh(process.device.type, (together,))
    else:
        mesh = init_device_mesh(process.device.type, (copies, together),
                                mesh_dim_names=("replicate", "shard"))

    # Half as many bytes are sent in half the time. On CPUs nothing is lowered: there
    # LayerNorm refuses parameters of a lower precision than its input. Inputs are not converted
    # here, because autocast does that for each operation.
    low = LOW.get(precision) if process.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low, cast_forward_inputs=False)
    for module in cheap:
        fully_shard(module, mesh=mesh, mp_policy=policy)

    # The network itself comes last: it takes what no list has taken. By default PyTorch would
    # keep this rest gathered after the forward pass, for the backward pass; but a network that
    # is not trained has none.
    for module in [*exact, network]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
