"""Optimisation: everything that changes weights, or how fast they change, over time.

    step --> schedules: lr, weight decay, teacher momentum, teacher temperature
    gradients --> clip --> AdamW | SGD | LARS --> student
                                                     |
                 teacher <-- m * teacher + (1 - m) * student

Idea     The teacher is no second model to train: it is the student's own recent past, averaged.
         Averages are better than their parts, so there is always something to learn from it.
Paper    DINO sec. 3.1 (EMA teacher) and A (schedules); LARS (You 2017) for convnets
Try      python -m training.optim  the schedules of a run, drawn as text
Change   a new optimiser is one line in OPTIMIZERS
Tests    pytest tests/training/test_optim.py
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# ----------------------------------------------------------------------------------------------
# Schedules: pure functions of the step


def cosine(step: int, base: float, final: float, total: int, warmup: int = 0) -> float:
    """Linear from 0 to `base` over `warmup` steps, then half a cosine down (or up) to `final`.

    The first step has the value 0 and `final` is approached, not reached: as in the papers'
    code.
    """
    if step < warmup:
        return base * step / max(warmup - 1, 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(progress, 1.0)))


def linear(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at step steps - 1, then constant: teacher temperature."""
    return end if step >= steps - 1 else start + (end - start) * step / (steps - 1)


# ----------------------------------------------------------------------------------------------
# Which parameters, with which optimiser


def parameter_groups(model: nn.Module, layerwise_decay: float = 1.0,
                     patch_embed_lr_mult: float = 1.0) -> list[dict]:
    """Parameters that share a learning rate, a weight decay and a schedule. DINO A; DINOv2's
    code.

    Weights decay, biases and other vectors (norms, LayerScale) do not; class token and
    positions have three dimensions and do. With layerwise_decay d, block i of a ViT of depth n
    learns at d^(n - i), what is below the blocks at d^(n + 1), all above at 1; the patch
    embedding is slower by one more factor. The prototypes (last_layer) are apart: they rest for
    a while at the start.
    """
    depth = len({
        name.split("blocks.")[1].split(".")[0]
        for name, _ in model.named_parameters() if "blocks." in name})
    below = ("patch_embed", "pos_embed", "cls_token", "register_tokens", "mask_token")
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        layer = depth + 1
        if "blocks." in name:
            layer = int(name.split("blocks.")[1].split(".")[0]) + 1
        elif any(part in name for part in below):
            layer = 0
        key = dict(
            lr_mult=layerwise_decay**(depth + 1 - layer) *
            (patch_embed_lr_mult if "patch_embed" in name else 1.0),
            decay=0.0 if p.ndim == 1 or name.endswith(".bias") else 1.0, rate="last_layer_lr" if
            "last_layer" in name else "backbone_lr" if name.startswith("backbone.") else "lr")
        groups.setdefault(tuple(key.values()), dict(key, params=[]))["params"].append(p)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD whose step per tensor is proportional to the tensor's own norm. You 2017, eq. 6.

    Vectors (biases, norms) get neither the adaptation nor weight decay.
    """

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0,
                 momentum: float = 0.9, trust: float = 0.001):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):  # of torch's interface; not asked here
        # The name and meaning that torch's fused optimisers use: above 0 nothing moves.
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    size, change = p.norm(), update.norm()
                    ratio = group["trust"] * size / change
                    update = update * torch.where((size > 0) & (change > 0), ratio, 1.0)
                old = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                new = group["momentum"] * old + update
                moved = p - group["lr"] * new
                if skip is not None:
                    new, moved = torch.where(skip > 0, old,
                                             new), torch.where(skip > 0, p, moved)
                old.copy_(new)
                p.copy_(moved)


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.0, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True),
    "lars": LARS}


def set_schedule(optimizer: torch.optim.Optimizer, schedule: dict[str, float]):
    """This step's lr and weight_decay. Parts that rest have a rate of their own where `now`
    holds one: last_layer_lr 0 keeps the prototypes where they are (DINO A), backbone_lr 0 the
    backbone.
    """
    for group in optimizer.param_groups:
        rate = schedule.get(group["rate"], schedule["lr"])
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = schedule["weight_decay"] * group["decay"]


# ----------------------------------------------------------------------------------------------
# Between backward and the next forward


class LossScale(nn.Module):
    """A factor that keeps fp16 gradients in range. Micikevicius 2018, sec. 3.2.

    Halved after a step whose gradients overflowed (and which was skipped), doubled after
    `patience` steps that did not. As torch's GradScaler, but never asks the device, whatever
    the optimiser, and FSDP's parts of a tensor agree on it, since the norm they are judged by
    is of the whole.
    """

    def __init__(self, start: float = 2.0**16, patience: int = 2000):
        super().__init__()
        self.patience = patience
        self.register_buffer("scale", torch.tensor(start))
        self.register_buffer("good", torch.tensor(0.0))  # steps since the last change

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer):
        """loss.backward(), in range; the gradients end up as if nothing had been scaled."""
        (loss * self.scale).backward()
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        torch._foreach_mul_(local([g for g in grads if g is not None]), 1 / self.scale)

    def update(self, ok: Tensor) -> Tensor:
        """`ok`: were the gradients finite? Returns whether the run can go on: all of them were,
        or there is room for a smaller factor.
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
    """
    norms = []
    for network in networks:
        whole = [p.grad for p in network.parameters() if p.grad is not None]
        if not whole:  # frozen
            continue
        grads = local(whole)
        each = torch.stack(torch._foreach_norm(grads))
        if isinstance(whole[0], DTensor):  # the norm of all of a tensor, not of our part of it
            each = each.square()
            dist.all_reduce(each)
            each = each.sqrt()
        norms.append(each)
        if not max_norm:
            continue
        limits = each if mode == "parameter" else each.norm().expand(len(grads))
        factors = (max_norm / (limits + 1e-6)).clamp(max=1)
        torch._foreach_mul_(grads, list(factors.unbind()))
    return torch.cat(norms).norm()


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float,
               ok: Tensor | float = 1.0):
    """teacher <- m * teacher + (1 - m) * student, over parameters in order. ok = 0: no
    change.
    """
    pairs = local(list(teacher.parameters())), local(list(student.parameters()))
    weight = torch.as_tensor((1 - momentum) * ok, dtype=torch.float32,
                             device=pairs[0][0].device)
    torch._foreach_lerp_(*pairs, [weight] * len(pairs[0]))


if __name__ == "__main__":
    total, warmup = 1000, 100
    print("  step       lr   weight decay   momentum   teacher temp   (lr as a bar)")
    for step in range(0, total + 1, 50):
        lr = cosine(step, 1e-3, 1e-6, total, warmup)
        print(
            f"{step:6d}  {lr:.5f}   {cosine(step, 0.04, 0.4, total):12.3f} "
            f"{cosine(step, 0.996, 1.0, total):10.5f} {linear(step, 0.04, 0.07, 300):14.4f}   "
            + "#" * round(40 * lr / 1e-3))
