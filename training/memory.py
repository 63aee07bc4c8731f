"""Memory: what a step will need, counted in a step on tensors without data.

    student, batch --> shapes alone (FakeTensorMode) --> forward pass and losses
                                                              |
                          what autograd would keep, weights, gradients, moments --> GB, by part

Idea     A run that does not fit should say so before it starts, and say which part is too
         large.
Paper    none
Try      python -m bench plan dinov2_vitl14 --gpus 32
Change   another part of the sum is one entry of `parts` in expected_memory
Tests    pytest tests/training/test_memory.py

Letters  G global crops of an image, B images of a process, M masked patches, K prototypes.
"""

import contextlib
import ctypes
import math
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import vit
from images.data import PREFETCH
from losses import patch_loss, view_pair_loss
from machinery.process import Process, autocast
from training.config import Config


def fake_step_inputs(student: nn.Module, config: Config, device: torch.device,
                     masked: int | None = None) -> tuple[dict, tuple]:
    """The student's tensors, and the arguments of one forward pass, as shapes without data.

    To be called within FakeTensorMode, where tensors have a shape, a type and a device but no
    memory, and operations on them take no time; or for the device "meta", which is the same
    without a device. masked: how many patches the heads are asked about; None: as many as the
    masks can hide at most.
    """
    # The weights: autograd saves something for a layer only if its weights need a gradient.
    state = {}
    for name, x in (*student.named_parameters(), *student.named_buffers()):
        state[name] = torch.empty_like(x, device=device).requires_grad_(x.requires_grad)

    # The crops of a batch, one tensor for each size. Local crops serve the loss of the class
    # tokens alone: without it there are none.
    sizes = [(config.global_crops_number, config.global_crops_size)]
    if config.local_crops_number and config.dino_weight:
        sizes.append((config.local_crops_number, config.local_crops_size))
    crops = []
    for number, side in sizes:
        count = number * config.batch_size_per_gpu
        crops.append(torch.empty(count, config.in_chans, side, side, device=device))
    plan = student.backbone.draw_plan(crops, torch.Generator())

    # The masks. Distillation asks about patches but hides none of them from the student. The
    # values of the masks do not matter: how many patches there are decides about memory.
    masks = None
    mask_indices = None
    masking = config.masking()
    if masking:
        count = masking.most(len(crops[0])) if masked is None else masked
        mask_indices = torch.empty(count, dtype=torch.int64, device=device)
        if config.hides_patches:
            shape = (len(crops[0]), math.prod(masking.grid))
            masks = torch.empty(shape, dtype=torch.bool, device=device)
    return state, (crops, plan, masks, mask_indices)


def expected_memory(student: nn.Module, config: Config, process: Process,
                    on_gpu: bool | None = None) -> dict[str, float]:
    """The memory of one process in GB, by part, at its peak, the start of the backward pass.

    on_gpu: whether it is that of a GPU, for which this machine plans; None: as `process` says.

    Runs the student and the losses on fake tensors and adds up what autograd saves for the
    backward pass. Temporary buffers of single operations are not counted. Compiled blocks save
    about a third less than this. With --curriculum these are the crops of the last stage, which
    are the largest.
    """
    if on_gpu is None:
        on_gpu = process.device.type == "cuda"

    # A CPU stores the n x n weights of attention in bfloat16 (vit.attention). A GPU never does:
    # of each row its kernels keep one number, in 16 bits (flash) and in float32 (efficient).
    # Example: 16 heads of 257 tokens are 1.06 million weights a crop, and 4,112 such numbers.
    attention = F.scaled_dot_product_attention if on_gpu else vit.attention

    # Every tensor that autograd saves during the forward pass is handed to `note`.
    G = config.global_crops_number
    B = config.batch_size_per_gpu
    saved = {}

    def note(x):
        # Views share a storage, which must be counted once. `_cdata` is its address in memory. The
        # address of an object that is freed may be given to the next one, so all are held while we
        # count.
        storage = x.untyped_storage()
        saved[storage._cdata] = storage
        return x

    # The forward pass. "force_eager": compiling for fake tensors would take minutes. The
    # student's own, real tensors are replaced by the fake ones in functional_call.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.compiler.set_stance("force_eager"), patch("vit.attention", attention):
        state, arguments = fake_step_inputs(student, config, process.device)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            with autocast(config.precision, process.device):
                out = torch.func.functional_call(student, state, arguments)

            # The losses save targets and logits, the largest matrices of a step. The terms are
            # kept in a list, because a term that is dropped would free what it saved.
            terms = []
            targets = {}
            for name in config.objectives:
                target = torch.empty_like(out[name], dtype=torch.float32)
                targets[name] = target
                if name == "ibot":
                    terms.append(patch_loss(target, out[name], target[:, 0], G * B))
                else:
                    teacher_views = target[:G * B].unflatten(0, (G, B))
                    student_views = out[name].unflatten(0, (-1, B))
                    terms.append(view_pair_loss(teacher_views, student_views))

        # Autograd saves the weights, too: a linear layer needs its weight to pass the gradient
        # on. They are counted below, so they are left out here.
        weights = {x.untyped_storage()._cdata for x in state.values()}
        activations = sum(x.nbytes() for key, x in saved.items() if key not in weights)

        # The backward pass begins with the gradient of the student's logits. The teacher's are
        # there as well: of class tokens those of global crops only, of G of all V crops.
        logits = {name: out[name] for name in targets}
        gradient = sum(x.nbytes for x in logits.values())
        of_teacher = sum(x[:G * B].nbytes if name == "dino" else x.nbytes
                         for name, x in logits.items())
        crops = sum(x.nbytes for x in arguments[0])
        largest = max(x.nbytes for x in arguments[0])

    # While a GPU computes a step, the crops of the next one are coloured beside it, all of one
    # size at a time, which takes about three more copies of them. A CPU does both in turn.
    if on_gpu:
        crops = 2 * crops + 3 * largest

    # What is there at every step. FSDP splits it over processes. AdamW keeps two moments of
    # each parameter; SGD and LARS keep one, the momentum. A backbone that does not learn (heads
    # for a released teacher, in distill.py) has neither gradients nor moments.
    one_network = sum(p.nbytes for p in student.parameters()) / config.sharers(process)
    learns = [p for p in student.parameters() if p.requires_grad]
    trained = sum(p.nbytes for p in learns) / config.sharers(process)
    moments = 2 if config.optimizer == "adamw" else 1
    parts = {
        "two networks": 2 * one_network, "gradients": trained, "moments": moments * trained,
        "kept for backward": activations, "teacher's logits": of_teacher,
        "logits' gradient": gradient, "crops": crops}

    # Of a teacher that is split each process also keeps the backbone in one piece, to be judged
    # and kept (train.Run.whole).
    if config.parallel != "ddp":
        parts["backbone in one piece"] = sum(p.nbytes for p in student.backbone.parameters())
    return {name: size / 2**30 for name, size in parts.items()}


def shared_memory_warning(config: Config, process: Process) -> str:
    """A sentence if the batches of the loader's workers will not fit into shared memory, or "".

    Example: 64 images with 2 crops of 224 and 8 of 96 pixels are 33 MB. Eight processes with 10
    workers each, of which each prepares 2 batches ahead, need 8 * 10 * 2 * 33 MB = 5.3 GB.
    """
    # On Linux it looks like a folder. A container often has a small one of its own.
    folder = Path("/dev/shm")
    if not folder.exists():
        return ""

    # Crops of colour images are bytes, others are floats of four bytes.
    pixels = config.global_crops_number * config.global_crops_size**2
    if config.dino_weight:
        pixels += config.local_crops_number * config.local_crops_size**2
    bytes_each = 1 if config.in_chans == 3 else 4
    batch = config.batch_size_per_gpu * pixels * config.in_chans * bytes_each
    needed = batch * PREFETCH * config.num_workers * process.node_size
    free = shutil.disk_usage(folder).free
    if needed < free:
        return ""
    return (
        f"warning: {config.num_workers} workers hold {needed / 2**30:.2f} GB of batches in "
        f"/dev/shm, which has {free / 2**30:.2f} GB free: start the container with a larger "
        "--shm-size, or give a smaller --num_workers")


def memory_gb(device: torch.device) -> float:
    """Memory of the GPU, or of this machine, in units of 2**30 bytes; NaN: not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    if not hasattr(os, "sysconf"):  # Windows
        return math.nan
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held at once so far, in units of 2**30 bytes.

    On a GPU that of all tensors together; else that of this process, and of its largest worker
    process among those that have ended. NaN: not known.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if not hasattr(os, "sysconf"):  # Windows
        return math.nan
    import resource  # which Windows does not have

    # The system counts in bytes on a Mac and in kilobytes elsewhere.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + largest_child) / unit


def memory_report(student: nn.Module, config: Config, process: Process,
                  frozen: list[nn.Module]) -> list[str]:
    """The lines about memory at the start of a run: what it needs, and whether that fits.

    frozen: networks that compute the targets in place of the average of the student, as in
    distill.py.
    """
    expected = expected_memory(student, config, process)
    weights = sum(p.nbytes for network in frozen for p in network.parameters())
    if weights:  # nbytes is that of the whole tensor, even where FSDP has split it
        expected["frozen teacher"] = weights / config.sharers(process) / 2**30
    available = memory_gb(process.device)
    needed = sum(expected.values())
    parts = ", ".join(f"{name} {size:.2f}" for name, size in expected.items())
    lines = [f"expects {needed:.2f} of {available:.0f} GB: {parts}"]
    if needed > available:
        lines.append("warning: that is too much; give --activation_checkpointing, --precision "
                     "bf16, --parallel fsdp or a smaller --batch_size_per_gpu")

    # The memory that the loader's workers share is another one than that of the networks.
    warning = shared_memory_warning(config, process)
    return lines + [warning] if warning else lines


def keep_freed_memory(process: Process):
    """On a CPU: keep the memory that one training step frees for the next one.

    By default the C library (glibc) gives a freed block of many megabytes back to the system.
    The next step needs a block of the same size, and the system has to find it and fill it with
    zeros again. That takes about a tenth of a step. With another C library nothing is done.
    """
    if process.device.type != "cpu":
        return

    # See the manual page mallopt(3). M_MMAP_MAX (-4) is how many blocks may come directly from
    # the system: none. M_TRIM_THRESHOLD (-1) is how much may be kept unused: -1 is no limit.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)
        mallopt(-1, -1)
