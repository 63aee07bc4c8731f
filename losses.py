"""Losses: what the student must match, and what keeps two networks from agreeing on nothing.

    teacher logits --> softmax(. / teacher_temp + bias) --> targets --+
                                ^                                     +--> cross-entropy: DINO, over
               target maker: one bias per prototype                   |    all pairs of other views;
                                                                      |    iBOT, over hidden patches
    student logits --> softmax(. / student_temp) ---------------------+
    student features --> distance to the nearest other image --> KoLeo

Idea     The teacher's softmax is sharpened (low temperature) so that it says something, and biased
         against prototypes used too often so that it does not always say the same. One alone
         collapses: bias only, to the uniform answer; sharpening only, to a single prototype.
Paper    DINO sec. 3.1, eq. 1-4 and Alg. 1; iBOT eq. 3; DINOv2 sec. 4 (Sinkhorn-Knopp, KoLeo)
Try      python losses.py       the two collapses and the balance between them, in numbers
Change   a new centering is one class that returns a bias, and one line in CENTERING
Tests    pytest tests/test_losses.py

Letters  G global views, V = G + L views, B images, K prototypes, n rows (views times images),
         M hidden patches of all global views, padded to a fixed number; D width.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ------------------------------------------------------------------------------------------------
# (n, K), thousands of rows of 65,536 numbers or more, is the largest matrix of a step. All that
# goes over it takes some rows at a time, so that their float32 copies need not leave the cache

CHUNK = {"cpu": 2**20, "cuda": 2**24}  # numbers at a time; a GPU has more to keep busy
COMPILE = False  # train.py sets it where it compiles the network


def chunks(*tensors: Tensor):
    """Tensors of n rows, the first one (n, K) -> tuples of some rows of each, in order."""
    size = max(1, CHUNK.get(tensors[0].device.type, 2**24) // tensors[0].shape[1])
    return zip(*(x.split(size) for x in tensors))


@functools.cache
def compiled(function):
    return torch.compile(function)


def one_pass(function):
    """Decorator of what is done with a chunk: one kernel where training compiles, else several."""
    @functools.wraps(function)
    def run(*args):
        return (compiled(function) if COMPILE else function)(*args)

    return run


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes; x itself with one. The only place where the losses cross processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def column_mean(rows: Tensor, real: Tensor | None = None, of=Tensor.float) -> Tensor:
    """Mean of of(rows) over the real rows of all processes, in float32: (n, K) -> (K,).

    Sums, then one division: processes may hold different numbers of rows.
    """
    real = torch.ones(len(rows), device=rows.device) if real is None else real.float()  # (n,)
    total = sum(weight @ of(some) for some, weight in chunks(rows, real))  # (K,)
    total = all_sum(torch.cat([total, real.sum()[None]]))
    return total[:-1] / total[-1]


# ------------------------------------------------------------------------------------------------
# Target makers: teacher logits -> one bias per prototype


class NoCenter(nn.Module):
    """No bias at all. With sharpening this collapses to one prototype: run it and see."""

    def __init__(self, n_prototypes: int):
        super().__init__()

    def forward(self, logits: Tensor, temp: float, real: Tensor | None = None) -> Tensor:
        """Teacher logits (..., K) -> bias (K,). `real` (n,) is 0 for rows that are padding."""
        return logits.new_zeros(logits.shape[-1], dtype=torch.float32)  # (K,)

    def update(self, logits: Tensor, real: Tensor | None = None, ok: Tensor | bool = True):
        """After the optimiser has moved; `ok` False (a tensor, read on the device): no change."""


class EMACenter(NoCenter):
    """DINO: subtract a running mean of the teacher's logits. bias = -centre / temp. DINO eq. 4.

    The centre used at one step knows the batches before it only: forward first, update later.
    """

    def __init__(self, n_prototypes: int, momentum: float = 0.9):
        super().__init__(n_prototypes)
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(n_prototypes))

    def forward(self, logits: Tensor, temp: float, real: Tensor | None = None) -> Tensor:
        return -self.center / temp  # (K,)

    @torch.no_grad()
    def update(self, logits: Tensor, real: Tensor | None = None, ok: Tensor | bool = True):
        mean = column_mean(logits.flatten(0, -2), real)  # (K,)
        moved = self.momentum * self.center + (1 - self.momentum) * mean
        ok = torch.as_tensor(ok, device=moved.device)
        self.center.copy_(torch.where(ok, moved, self.center))


class SinkhornKnopp(NoCenter):
    """DINOv2: the bias with which this batch, on all processes, uses all prototypes equally.

    Sinkhorn-Knopp scales exp(logits / temp) by turns, so that every prototype gets the same share
    of the rows and every row adds up to one. The row scale cancels in the softmax of make_targets,
    so that all there is to find is one bias per prototype. Each sweep takes from it the logarithm
    of what the prototype got. DINOv2 sec. 4; SwAV (Caron 2020) eq. 3-5, three sweeps.
    """

    def __init__(self, n_prototypes: int, iterations: int = 3):
        super().__init__(n_prototypes)
        self.iterations = iterations

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float, real: Tensor | None = None) -> Tensor:
        # The first sweep sees the rows as they are: a row of large logits weighs more. One constant
        # for all, near the largest, keeps the exponential in range and drops out of the softmax.
        rows = logits.flatten(0, -2)  # (n, K)
        top = column_mean(rows.amax(1, keepdim=True), real) / temp  # (1,)
        got = column_mean(rows, real, lambda x: exponentials(x, temp, top))  # (K,)
        bias = -got.clamp(min=1e-38).log()  # (K,)
        for _ in range(self.iterations - 1):
            got = column_mean(rows, real, lambda x: probabilities(x, temp, bias))  # (K,)
            bias = bias - got.clamp(min=1e-38).log()  # (K,)
        return bias


CENTERING = {"ema": EMACenter, "sinkhorn": SinkhornKnopp, "none": NoCenter}


@torch.no_grad()
def make_targets(logits: Tensor, temp: float, bias: Tensor) -> Tensor:
    """softmax(logits / temp + bias) over prototypes, in float32, without gradient. DINO eq. 1."""
    targets = torch.empty_like(logits, dtype=torch.float32)
    for out, x in chunks(targets.flatten(0, -2), logits.flatten(0, -2)):
        out.copy_(probabilities(x, temp, bias))
    return targets


@one_pass
def probabilities(logits: Tensor, temp: float, bias: Tensor) -> Tensor:
    return F.softmax(logits.float() / temp + bias, -1)


@one_pass
def exponentials(logits: Tensor, temp: float, top: Tensor) -> Tensor:
    return (logits.float() / temp - top).clamp(max=80).exp()


# ------------------------------------------------------------------------------------------------
# Losses: pure functions of targets and student logits


class CrossEntropies(torch.autograd.Function):
    """-<q, log softmax(s)> of each row, s = logits / temp: q and logits (n, K) -> (n,), in float32.

    The rows of q add up to `mass`. The derivative by s is mass * softmax(s) - q: for the backward
    pass nothing has to be kept but what came in.
    """

    @staticmethod
    def forward(ctx, q: Tensor, logits: Tensor, temp: float, mass: int = 1) -> Tensor:
        ctx.save_for_backward(q, logits)
        ctx.temp, ctx.mass = temp, mass
        return torch.cat([row_losses(*some, temp) for some in chunks(q, logits)])  # (n,)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (q, logits), by_logits = ctx.saved_tensors, torch.empty_like(ctx.saved_tensors[1])
        for out, *some in chunks(by_logits, q, logits, grad / ctx.temp):
            out.copy_(row_gradients(*some, ctx.temp, ctx.mass))
        return None, by_logits, None, None


@one_pass
def row_losses(q: Tensor, logits: Tensor, temp: float) -> Tensor:
    return -(q * F.log_softmax(logits.float() / temp, -1)).sum(-1)


@one_pass
def row_gradients(q: Tensor, logits: Tensor, grad: Tensor, temp: float, mass: int) -> Tensor:
    p = F.softmax(logits.float() / temp, -1)
    return (mass * p - q) * grad[:, None]


def view_pair_loss(targets: Tensor, student_logits: Tensor, student_temp: float = 0.1) -> Tensor:
    """Mean cross-entropy over all pairs (teacher view, other student view). DINO eq. 3, Alg. 1.

    targets (G, B, K), probabilities; student_logits (V, B, K), V >= G, the first G views being the
    teacher's. There are G*V - G ordered pairs: a view is never asked to match itself.

    A student view meets the *sum* of its teachers, of mass 2 for a local crop with 2 globals and 1
    for a global one: a pass per view, not per pair. In nats; ln K when nobody knows anything.
    """
    G, V = len(targets), len(student_logits)
    if V < G or G * (V - 1) == 0:
        raise ValueError(f"{G} teacher and {V} student views leave no pair of different views")
    everyone = targets.sum(0)  # (B, K)
    total = 0.0
    for v, logits in enumerate(student_logits):
        q, mass = (everyone - targets[v], G - 1) if v < G else (everyone, G)  # (B, K)
        total = total + CrossEntropies.apply(q, logits, student_temp, mass).mean()
    return total / (G * V - G)


def patch_loss(targets: Tensor, student_logits: Tensor, weights: Tensor, crops: int,
               student_temp: float = 0.1) -> Tensor:
    """Cross-entropy at hidden patches: the teacher saw what the student has to guess. iBOT eq. 3.

    targets and student_logits (M, K), of the same places; weights (M,) are 1 / (hidden patches of
    that image), so that images count alike whatever their mask, and 0 for padding. The sum is
    divided by the number of global crops, those without a mask included, as in DINOv2's code.
    """
    each = CrossEntropies.apply(targets, student_logits, student_temp)  # (M,)
    return (weights * each).sum() / crops


def koleo_loss(features: Tensor) -> Tensor:
    """-log of the distance to the nearest other image: pushes features apart. DINOv2 sec. 4.

    features (B, D), class tokens of one view of different images, B >= 2. Kozachenko-Leonenko's
    estimate of entropy on the unit sphere, in float32. Two equal features cost some 15 nats, not
    infinity. Neighbours are searched among the images of this process only.
    """
    if len(features) < 2:
        raise ValueError(f"KoLeo of {len(features)} image has no neighbour to keep away from: "
                         "--batch_size_per_gpu at least 2, or --koleo_weight 0")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=1e-8)  # (B, D)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)  # (B,)
        distance = F.pairwise_distance(x, x[nearest], eps=1e-8)  # (B,)
        return -(distance + 1e-8).log().mean()


# ------------------------------------------------------------------------------------------------
# What the log needs to tell a healthy loss from a collapsed one


@torch.no_grad()
def entropies(targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(mean entropy of the targets, entropy of their mean over all processes), in nats.

    The first near ln K: the teacher says nothing (uniform collapse). The second near 0: it says the
    same of every image (one-prototype collapse). A small first and a large second mean health.
    targets (..., K); weights, one per row, 0 for padding.
    """
    rows = targets.flatten(0, -2)  # (n, K)
    each = torch.cat([row_entropies(x) for x, in chunks(rows)])[:, None]  # (n, 1)
    mean = torch.special.entr(column_mean(rows, weights)).sum()
    return column_mean(each, weights)[0], mean


@one_pass
def row_entropies(q: Tensor) -> Tensor:
    return -(q * q.clamp(min=1e-38).log()).sum(-1)


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of (n, D): from 1 to min(n, D). RankMe."""
    singular = torch.linalg.svdvals(features.float())
    p = singular / singular.sum().clamp(min=1e-12)
    return torch.special.entr(p).sum().exp()


if __name__ == "__main__":
    import math

    torch.manual_seed(0)
    K = 1024
    # A teacher with opinions (the noise) and a habit (the offset, the same for every image).
    logits = 0.1 * torch.randn(2, 64, K) + 0.4 * torch.randn(K)
    centre = EMACenter(K, momentum=0.0)
    centre.update(logits)
    cases = {
        "neither": (NoCenter(K), 1.0),
        "sharpening only": (NoCenter(K), 0.02),
        "centering only": (centre, 1.0),
        "both": (centre, 0.02),
    }
    print(f"ln K = {math.log(K):.2f}        entropy of each target   entropy of their mean")
    for name, (maker, temp) in cases.items():
        each, mean = entropies(make_targets(logits, temp, maker(logits, temp)))
        print(f"{name:16s} {each:16.2f} {mean:24.2f}")
    print("\nFirst column near ln K: nothing is said of an image. Second near 0: the same of all."
          "\nBoth: each image is told apart, and all prototypes are in use.")
    uniform = view_pair_loss(torch.full((2, 64, K), 1 / K), torch.zeros(10, 64, K))
    print(f"Uniform answers on both sides cost {uniform:.4f} nats, which is ln K.")
