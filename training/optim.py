"""Optimisation: everything that changes weights, or how fast they change, over time.

    step --> schedules: lr, weight decay, teacher momentum, teacher temperature
    gradients --> clip --> AdamW | SGD | LARS --> student
                                                     |
                 teacher <-- m * teacher + (1 - m) * student

Idea     The teacher is no second model to train: it is the average of the student's past
         weights. Such an average is usually better than the networks that it is made of, so
         the student has something to learn from it.
Paper    DINO sec. 3.1 (EMA teacher) and 3.2 (schedules); LARS (You 2017) for convnets
Try      python -m training.optim  the schedules of a run, drawn as text
Change   a new optimizer is one line in OPTIMIZERS; it has to leave out the steps that LARS does
Tests    pytest tests/training/test_optim.py

Letters  EMA exponential moving average, m its momentum; K prototypes.
"""

import math
import re

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# ----------------------------------------------------------------------------------------------
# Schedules: pure functions of the step


def cosine(step: int, base: float, final: float, total: int, warmup: int = 0) -> float:
    """Linear from 0 to `base` over `warmup` steps, then half a cosine down (or up) to `final`.

    As in the papers' code, step 0 of a warm-up has the value 0, `base` comes twice, as its last
    step and as the first step of the cosine, and `final` is approached but never reached.

    Example, cosine(step, 1.0, 0.1, 100, warmup=10):

        step    0     5     9     10    55    99
        value   0   0.556   1     1    0.55  0.1003
    """
    if step < warmup:
        return base * step / max(warmup - 1, 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(progress, 1.0)))


def peak_lr(lr: float, scaling: str, batch: int) -> float:
    """The peak of the learning rate for a batch, of all processes together.

    The papers give it for a reference batch. Example: DINO's 5e-4 is for 256 images; 8 GPUs of
    64 images make it 5e-4 * 512 / 256 = 1e-3 ("linear_256").
    """
    factors = {"linear_256": batch / 256, "sqrt_1024": math.sqrt(batch / 1024), "none": 1.0}
    return lr * factors[scaling]


def linear(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at step steps - 1, then constant: teacher temperature.

    As in the papers' code a single step has the value `start`, and no step means `end` at once.
    """
    if step == 0 and steps > 0:
        return start
    if step >= steps - 1:
        return end
    return start + (end - start) * step / (steps - 1)


# ----------------------------------------------------------------------------------------------
# Which parameters, with which optimizer

# The parameters with which a ViT makes its tokens, before the first block.
BELOW_THE_BLOCKS = ("patch_embed", "pos_embed", "cls_token", "register_tokens", "mask_token")


def block_of(name: str) -> int | None:
    """The number of the block that a parameter is in: 3 for backbone.blocks.3.attn.qkv.weight.

    None where it is in no block of a ViT.
    """
    match = re.search(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else None


def layer_of(name: str, depth: int) -> int:
    """How high a parameter is in a ViT of `depth` blocks, from 0 to depth + 1.

    0 below the blocks, i + 1 in block i, depth + 1 above them (the last norm, the heads; also
    everything in a convnet).
    """
    block = block_of(name)
    if block is not None:
        return block + 1
    if any(part in name for part in BELOW_THE_BLOCKS):
        return 0
    return depth + 1


def rate_of(name: str) -> str:
    """Which learning rate of the schedule a parameter follows.

    The prototypes and the backbone can rest at the start, so they have rates of their own.
    """
    if "last_layer" in name:
        return "last_layer_lr"
    if name.startswith("backbone."):
        return "backbone_lr"
    return "lr"


def parameter_groups(model: nn.Module, layerwise_decay: float = 1.0,
                     patch_embed_lr_mult: float = 1.0) -> list[dict]:
    """Parameters that share a learning rate, a weight decay and a schedule, as in DINO's and
    DINOv2's code.

    Returns groups for a torch optimizer. In each: params; lr_mult, a factor on the learning
    rate; decay, 1 or 0, a factor on the weight decay; rate, the name of its learning rate in
    the schedule. Frozen parameters are in none.

    Example of lr_mult: a ViT-L (24 blocks) with layerwise_decay 0.9, patch_embed_lr_mult 0.2:

        patch embedding            0.9^25 * 0.2 = 0.014
        tokens, positions          0.9^25       = 0.072
        block 0                    0.9^24       = 0.080
        block 23                   0.9^1        = 0.9
        last norm, heads           0.9^0        = 1
    """
    blocks = {block_of(name) for name, _ in model.named_parameters()}
    depth = len(blocks - {None})

    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue

        # Low layers should change less than high ones, above all where the network begins with
        # trained weights: their features are general. So each layer learns layerwise_decay
        # times as fast as the one above it. The patch embedding, where the training of ViTs
        # tends to become unstable (MoCo v3, Chen 2021), is slowed down once more.
        lr_mult = layerwise_decay**(depth + 1 - layer_of(name, depth))
        if "patch_embed" in name:
            lr_mult = lr_mult * patch_embed_lr_mult

        # Weight decay keeps matrices small. Biases and the scales of norms and LayerScale are
        # vectors (a ConvNeXt stores the last as a map of one pixel), and do not decay: nothing is
        # gained by a small shift or scale. Class token and positions have three dimensions, and
        # decay as in the papers' code.
        is_free = p.ndim == 1 or name.endswith((".bias", ".layer_scale"))
        decay = 0.0 if is_free else 1.0

        # Parameters of equal settings share a group, in the order in which they first come.
        rate = rate_of(name)
        settings = (lr_mult, decay, rate)
        if settings not in groups:
            groups[settings] = dict(lr_mult=lr_mult, decay=decay, rate=rate, params=[])
        groups[settings]["params"].append(p)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD whose step per tensor is proportional to the tensor's own norm. You 2017, eq. 6.

    With large learning rates plain SGD moves some layers by a large part of their own size,
    and others hardly at all. LARS multiplies each tensor's gradient by
    trust * |tensor| / |gradient|. Example: a tensor of norm 10 and a gradient of norm 2 give
    0.001 * 10 / 2 = 0.005; the update then has the norm 0.01, a thousandth of the tensor's,
    and so it has with a gradient of norm 200.

    Vectors (biases, norms) get neither the adaptation nor weight decay.
    """

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0,
                 momentum: float = 0.9, trust: float = 0.001):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):  # closure: a part of torch's interface that we do not use
        # The name and the meaning are those of torch's fused optimizers: a tensor on the device
        # that is above 0 if this step must not change anything.
        skip = getattr(self, "found_inf", None)

        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue

                # Where a norm is 0 the ratio means nothing, and 1 is taken instead.
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    size = p.norm()
                    change = update.norm()
                    ratio = group["trust"] * size / change
                    update = update * torch.where((size > 0) & (change > 0), ratio, 1.0)

                old = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                new = group["momentum"] * old + update
                moved = p - group["lr"] * new

                # torch.where decides on the device: `if skip` would make the CPU wait for it.
                if skip is not None:
                    new = torch.where(skip > 0, old, new)
                    moved = torch.where(skip > 0, p, moved)
                old.copy_(new)
                p.copy_(moved)


class SGD(torch.optim.SGD):
    """torch's SGD with momentum, which may leave out its first step, too."""

    def __init__(self, params):
        super().__init__(params, lr=0.0, momentum=0.9, fused=True)

        # torch reserves the momentum at the first step and fills it with that step's gradient.
        # If that step is left out, it stays unfilled, and whatever was in this memory would be
        # added to the weights later. 0 is the same as no momentum: 0.9 * 0 + gradient.
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)


# The learning rate is 0 here, because set_schedule sets it before every step. fused: one kernel
# for all tensors, which also obeys found_inf (see LARS.step). An optimizer that does not obey it
# would write NaN into the weights after one bad step: a test tries all entries.
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.0, fused=True), "sgd": SGD,
    "lars": LARS}


def set_schedule(optimizer: torch.optim.Optimizer, schedule: dict[str, float]):
    """Give each of the parameter_groups this step's learning rate and weight decay.

    schedule: lr and weight_decay, and last_layer_lr and backbone_lr where those differ from lr.
    last_layer_lr 0 keeps the prototypes where they are, backbone_lr 0 the backbone.
    """
    for group in optimizer.param_groups:
        rate = schedule.get(group["rate"], schedule["lr"])
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = schedule["weight_decay"] * group["decay"]


# ----------------------------------------------------------------------------------------------
# Between backward and the next forward
#
# torch._foreach_NAME does the operation NAME to all tensors of a list in one call, on a GPU in
# a few kernels, where a loop over the 150 tensors of a ViT-S would start 150. (The underscore
# says that PyTorch may change it; its own optimizers and clip_grad_norm_ are built on it.)


class LossScale(nn.Module):
    """A factor that keeps fp16 gradients in range. Micikevicius 2018, sec. 3.2.

    The smallest number of fp16 is 6e-8, the largest 65,504. A gradient of 1e-8 becomes 0. With
    the loss multiplied by 65,536 it is 6.6e-4 on its way back through the network; divided by
    65,536 at the end, in float32, it is 1e-8 again. Too large a factor makes gradients
    infinite, so the factor is found by trying: it is halved after a step whose gradients
    overflowed (and which was skipped), and doubled after `patience` steps that did not.

    Example with patience 3, from a factor of 1,024:

        gradients finite      yes   yes   yes   yes   no    yes   yes   yes
        factor after it      1024  1024  2048  2048  1024  1024  1024  2048

    torch's GradScaler does the same. This one never makes the CPU wait for the device, whatever
    the optimizer, and the processes of FSDP need not agree on a factor: `ok` comes from the
    norm of all their parts, so it is the same on all of them.
    """

    def __init__(self, start: float = 2.0**16, patience: int = 2000):
        super().__init__()
        self.patience = patience
        self.register_buffer("scale", torch.tensor(start))
        self.register_buffer("good", torch.tensor(0.0))  # good steps since the last change

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer):
        """loss.backward(), in range; the gradients end up as if nothing had been scaled."""
        (loss * self.scale).backward()

        # The gradients of parameters are float32, like the parameters, so dividing loses
        # nothing. Parameters that no loss reaches have none.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(local(grads), 1 / self.scale)

    def update(self, ok: Tensor) -> Tensor:
        """Change the factor after a step. ok: boolean tensor, were all gradients finite?

        Returns whether the run can go on: they were finite, or there is a smaller factor to
        try. At a factor of 1 the gradients are infinite by themselves.
        """
        can_go_on = ok | (self.scale > 1)
        self.good.copy_(torch.where(ok, self.good + 1, 0))
        grow = self.good >= self.patience
        self.scale.mul_(torch.where(ok, torch.where(grow, 2.0, 1.0), 0.5))
        self.good.mul_(~grow)
        return can_go_on


def local(tensors: list[Tensor]) -> list[Tensor]:
    """Of each tensor what this process holds: all of it, unless FSDP has split it."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def clip_gradients(networks: list[nn.Module], max_norm: float, mode: str) -> Tensor:
    """Scale gradients in place; returns the norm of all of them before that, on the device.

    mode "parameter": each tensor by itself to at most max_norm (DINO). "network": each network
    as a whole (DINOv2). max_norm 0: measure only. Nothing here waits for the device.

    Example with max_norm 3 and a network of two tensors, whose gradients have the norms 4 and
    3: "parameter" multiplies them by 3/4 and 1; "network" both by 3/5, because together they
    have the norm 5.
    """
    norms = []
    for network in networks:
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        if not grads:  # a network that is frozen
            continue
        parts = local(grads)
        each = torch.stack(torch._foreach_norm(parts))  # one norm for each tensor

        # Under FSDP these are the norms of the parts that this process holds. The square of the
        # whole tensor's norm is the sum of their squares, over the processes that hold one copy
        # together: the last dimension of the mesh. Another copy would count a second time.
        if isinstance(grads[0], DTensor):
            mesh = grads[0].device_mesh
            each = each.square()
            dist.all_reduce(each, group=mesh.get_group(mesh.ndim - 1))
            each = each.sqrt()
        norms.append(each)
        if not max_norm:
            continue

        # A factor above 1 would make small gradients larger: it is cut off there. The small
        # constant is that of torch and of the papers' code, against a division by 0.
        limits = each if mode == "parameter" else each.norm()
        factors = (max_norm / (limits + 1e-6)).clamp(max=1)

        # One factor for all tensors takes few kernels, a list of factors one for each tensor.
        torch._foreach_mul_(parts, factors if factors.ndim == 0 else list(factors.unbind()))
    return torch.cat(norms).norm()


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float,
               ok: Tensor | float = 1.0):
    """teacher <- m * teacher + (1 - m) * student, for each parameter, in order. DINO sec. 3.1.

    ok 0 leaves the teacher as it is. Buffers (statistics of BatchNorm) are not averaged.
    """
    # m * t + (1 - m) * s is t + (1 - m) * (s - t), which is what lerp computes with the weight
    # 1 - m. With ok = 0 the weight is 0. It stays a tensor, so that `ok` need not be known on
    # the CPU.
    teacher_parts = local(list(teacher.parameters()))
    student_parts = local(list(student.parameters()))
    weight = torch.as_tensor((1 - momentum) * ok, dtype=torch.float32,
                             device=teacher_parts[0].device)
    if not weight.is_cuda:
        torch._foreach_lerp_(teacher_parts, student_parts, [weight] * len(teacher_parts))
        return

    # On a GPU lerp with a weight that is a tensor starts one kernel for each of the network's
    # tensors. Written out, these three start a few for all of them.
    change = torch._foreach_sub(student_parts, teacher_parts)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(teacher_parts, change)


if __name__ == "__main__":
    total = 1000
    print("  step       lr   weight decay   momentum   teacher temp   (lr as a bar)")
    for step in range(0, total + 1, 50):
        lr = cosine(step, 1e-3, 1e-6, total, warmup=100)
        weight_decay = cosine(step, 0.04, 0.4, total)
        momentum = cosine(step, 0.996, 1.0, total)
        temperature = linear(step, 0.04, 0.07, 300)
        bar = "#" * round(40 * lr / 1e-3)
        print(f"{step:6d}  {lr:.5f}   {weight_decay:12.3f} {momentum:10.5f} "
              f"{temperature:14.4f}   {bar}")
