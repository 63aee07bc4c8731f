"""Plain: what makes the training step fast, each idea as the plain code that it replaces.

    train_step ----------------------------------> the same loss, the same gradients
        |                                                        ^
        +-- without(["packing"]): that part, the plain way ------+   slower, or larger

Idea     Fast code is hard to trust and hard to learn from. Here the plain code stays beside it,
         equal to rounding: to read what an idea is, to test it, and to measure what it brings.
Paper    DINOv2 sec. 5 (packing, stochastic depth that skips work), DINO Alg. 1 (loss by pairs)
Try      python plain.py                                     each idea taken out, what changes
         python bench.py step shapes --without each          what each brings, in seconds
Change   an idea is a function and a line in IDEAS
Tests    pytest tests/test_bench.py

Letters  B images, K prototypes, n rows, M hidden patches; b n one crop size: b crops of n tokens;
         T tokens of all crops; nh heads.
"""

import contextlib
import random
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as T

from augment import BLUR_SIGMA, PHOTOMETRY, Pixels
from losses import all_sum, make_targets
from vit import Groups, Keep, VisionTransformer

# ------------------------------------------------------------------------------------------------
# Packing: all crop sizes in one sequence. Without it: one forward per size

packed = VisionTransformer.forward_features


def one_forward_per_size(self, images, masks=None, plan=None):
    """More and smaller kernels; weights are read once per size instead of once."""
    if not isinstance(images, (list, tuple)):
        return packed(self, images, masks, plan)
    outs, start = [], 0
    for i, (x, mask) in enumerate(zip(images, masks or [None] * len(images))):
        own = plan and [keeps and tuple(own_part(keep, i, start) for keep in keeps)
                        for keeps in plan]
        outs.append(packed(self, x, mask, own))
        start += outs[-1]["x_prenorm"].shape[:2].numel()
    return outs


def own_part(keep: Keep, i: int, start: int) -> Keep:
    """What a plan says of the i-th crop size alone, whose tokens begin at `start`."""
    sizes = [b * n for b, n in keep.groups]
    rows, scale = (x.split(sizes)[i] for x in (keep.rows, keep.scale))
    return Keep(rows - start, scale, keep.groups[i:i + 1])


# ------------------------------------------------------------------------------------------------
# SDPA: attention by tiles, which never stores a pair of tokens. Without it: all pairs, stored


def stored_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores and weights of all pairs in memory, the latter until the backward pass."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (b, nh, n, n)
    return scores.softmax(-1) @ v


# ------------------------------------------------------------------------------------------------
# Skipping: dropped samples never enter a branch. Without it: they do, and are then times zero


def compute_then_drop(x: Tensor, branch, groups: Groups, keep: Keep | None) -> Tensor:
    """The whole work at any drop rate."""
    if keep is None:
        return x + branch(x, groups)
    factor = torch.zeros(len(x), 1, device=x.device)  # (T, 1)
    factor.index_copy_(0, keep.rows, keep.scale)
    return x + factor * branch(x, groups)


# ------------------------------------------------------------------------------------------------
# Fused losses: teacher views summed first, one softmax per view by chunks, Sinkhorn as K numbers.
# Without: a log-softmax per pair, and matrices of (n, K) written again and again


def loss_pair_by_pair(targets: Tensor, student_logits: Tensor, student_temp: float = 0.1) -> Tensor:
    """DINO Alg. 1 as printed: 18 pairs of (B, K) for 2 global and 8 local crops."""
    pairs = [-(q * F.log_softmax(s.float() / student_temp, -1)).sum(-1).mean()
             for i, q in enumerate(targets) for v, s in enumerate(student_logits) if i != v]
    return sum(pairs) / len(pairs)


def loss_patch_by_patch(targets: Tensor, student_logits: Tensor, weights: Tensor, crops: int,
                        student_temp: float = 0.1) -> Tensor:
    """iBOT eq. 3 as printed: the logarithm of every probability."""
    log_p = F.log_softmax(student_logits.float() / student_temp, -1)  # (M, K)
    return (weights * -(targets * log_p).sum(-1)).sum() / crops


@torch.no_grad()
def sinkhorn_in_place(self, logits: Tensor, temp: float, real: Tensor | None = None) -> Tensor:
    """SwAV's algorithm on the matrix itself; gives the targets, not a bias. Padding ends as 0."""
    real = torch.ones(len(logits), device=logits.device) if real is None else real.float()
    Q = torch.exp(logits.float() / temp) * real[:, None]  # (n, K)
    rows = all_sum(real.sum())
    Q /= all_sum(Q.sum())
    for _ in range(self.iterations):
        Q /= all_sum(Q.sum(0))  # each prototype gets as much as any other
        Q /= Q.shape[1]
        Q /= Q.sum(1, keepdim=True).clamp(min=1e-38)  # each row gives as much as any other
        Q /= rows
    return Q * rows


def targets_or_bias(logits: Tensor, temp: float, bias: Tensor) -> Tensor:
    return bias if bias.shape == logits.shape else make_targets(logits, temp, bias)


# ------------------------------------------------------------------------------------------------
# Foreach: one kernel for many tensors. Without it: a few for each, and the host waits at every `if`


def clip_one_by_one(networks: list, max_norm: float, mode: str) -> Tensor:
    norms = []
    for network in networks:
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        each = [grad.norm() for grad in grads]
        norms.append(torch.stack(each).norm())
        for grad, norm in zip(grads, each):
            factor = max_norm / ((norm if mode == "parameter" else norms[-1]) + 1e-6)
            if max_norm and factor < 1:
                grad.mul_(factor)
    return torch.stack(norms).norm()


@torch.no_grad()
def ema_one_by_one(teacher, student, momentum: float, ok: Tensor | float = 1.0):
    """Without a gate for steps that are not finite: the plain way is to stop at the loss."""
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.mul_(momentum).add_((1 - momentum) * s)


class DefaultAdamW(torch.optim.AdamW):
    """As torch runs it unasked: tensor by tensor on a CPU. It knows no such gate either."""

    found_inf = property(lambda self: None, lambda self, value: None)


# ------------------------------------------------------------------------------------------------
# The input path. Uint8 crops in the worker, colours in batches on the device; without that:
# everything in the worker, one crop of one PIL image after another, as DINO's appendix A reads


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_SIGMA)))


def crop_by_crop(views: list[tuple[int, tuple[float, float], int]], kind: str, pixels: Pixels):
    """`views` of a MultiCrop and the name of a PHOTOMETRY -> a function: PIL image -> crops."""
    p, makers = PHOTOMETRY[kind], []
    for size, scale, view in views:
        makers.append(T.Compose([
            T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(*p["strength"])], p["jitter"][view]),
            T.RandomGrayscale(p["gray"][view]),
            T.RandomApply([T.Lambda(blurred)], p["blur"][view]),
            T.RandomSolarize(128, p["solarize"][view]),
            T.ToTensor(), T.Normalize(*pixels),
        ]))
    return lambda image: [make(image) for make in makers]  # of (3, s, s) each


# ------------------------------------------------------------------------------------------------

IDEAS = {  # name -> what is replaced, by what
    "packing": {"vit.VisionTransformer.forward_features": one_forward_per_size},
    "sdpa": {"torch.nn.functional.scaled_dot_product_attention": stored_attention},
    "skipping": {"vit.residual": compute_then_drop},
    "fused_loss": {"train.view_pair_loss": loss_pair_by_pair,
                   "train.patch_loss": loss_patch_by_patch,
                   "losses.SinkhornKnopp.forward": sinkhorn_in_place,
                   "train.make_targets": targets_or_bias},
    "foreach": {"train.clip_gradients": clip_one_by_one, "train.ema_update": ema_one_by_one},
}


@contextlib.contextmanager
def without(ideas):
    """Inside, train.train_step does the work of these ideas the plain way."""
    with contextlib.ExitStack() as stack:
        for idea in ideas:
            for place, plain in IDEAS[idea].items():
                stack.enter_context(patch(place, plain))
        yield


if __name__ == "__main__":
    import time

    torch.manual_seed(0)
    model = VisionTransformer(64, 8, embed_dim=128, depth=4, num_heads=2, drop_path_rate=0.4)
    crops = [torch.randn(16, 3, 64, 64), torch.randn(64, 3, 32, 32)]
    plan = model.draw_plan(crops, torch.Generator().manual_seed(0))
    direction = torch.randn(128)

    def run():
        begun = time.perf_counter()
        model.zero_grad()
        sum((x @ direction).sum() for x in model(crops, plan=plan)).backward()
        return time.perf_counter() - begun, model.patch_embed.proj.weight.grad.clone()

    run()
    gradient = run()[1]
    for idea in ("packing", "sdpa", "skipping"):
        pairs = []
        for _ in range(5):
            fast = run()[0]
            with without([idea]):
                slow, other = run()
            pairs.append(slow / fast)
        apart = (other - gradient).norm() / gradient.norm()
        print(f"without {idea:10s} {sorted(pairs)[2]:5.2f} times the seconds, "
              f"gradient apart by {apart:.0e} of itself")
