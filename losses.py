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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24  # numbers, 64 MB, of an (n, K) matrix that are copied to float32 at a time


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes; x itself with one. The only place where the losses cross processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def column_mean(rows: Tensor, real: Tensor | None = None, of=lambda x: x) -> Tensor:
    """Mean of of(rows) over the real rows of all processes, in float32: (n, K) -> (K,).

    Sums, then one division: processes may hold different numbers of rows. By chunks, because a
    float32 copy of all of a matrix as large as (n, K) would cost more memory than the networks.
    """
    real = torch.ones(len(rows), device=rows.device) if real is None else real.float()  # (n,)
    step = max(1, CHUNK // rows.shape[1])
    total = sum(weight @ of(some.float())
                for some, weight in zip(rows.split(step), real.split(step)))  # (K,)
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
        got = column_mean(rows, real, lambda x: (x / temp - top).clamp(max=80).exp())  # (K,)
        bias = -got.clamp(min=1e-38).log()  # (K,)
        for _ in range(self.iterations - 1):
            got = column_mean(rows, real, lambda x: make_targets(x, temp, bias))  # (K,)
            bias = bias - got.clamp(min=1e-38).log()  # (K,)
        return bias


CENTERING = {"ema": EMACenter, "sinkhorn": SinkhornKnopp, "none": NoCenter}


def make_targets(logits: Tensor, temp: float, bias: Tensor) -> Tensor:
    """softmax(logits / temp + bias) over prototypes, in float32, without gradient. DINO eq. 1."""
    return F.softmax(logits.detach().float() / temp + bias, -1)


# ------------------------------------------------------------------------------------------------
# Losses: pure functions of targets and student logits


def cross_entropies(q: Tensor, logits: Tensor, temp: float, mass: int = 1) -> Tensor:
    """-<q, log softmax(s)> of each row, s = logits / temp: twice (n, K) -> (n,), in float32.

    The rows of q add up to `mass`, so that it is mass * logsumexp(s) - <q, s>. By chunks that are
    computed again in the backward pass: what is kept for it are the logits as they came.
    """
    def rows(q, logits):
        s = logits.float() / temp  # (n, K)
        return mass * s.logsumexp(-1) - torch.einsum("nk,nk->n", q, s)

    step = max(1, CHUNK // logits.shape[-1])
    some = [checkpoint(rows, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(q.split(step), logits.split(step))]
    return torch.cat(some)  # (n,)


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
        total = total + cross_entropies(q, logits, student_temp, mass).mean()
    return total / (G * V - G)


def patch_loss(targets: Tensor, student_logits: Tensor, weights: Tensor, crops: int,
               student_temp: float = 0.1) -> Tensor:
    """Cross-entropy at hidden patches: the teacher saw what the student has to guess. iBOT eq. 3.

    targets and student_logits (M, K), of the same places; weights (M,) are 1 / (hidden patches of
    that image), so that images count alike whatever their mask, and 0 for padding. The sum is
    divided by the number of global crops, those without a mask included, as in DINOv2's code.
    """
    return (weights * cross_entropies(targets, student_logits, student_temp)).sum() / crops


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
    some = rows.split(max(1, CHUNK // rows.shape[1]))
    each = torch.cat([torch.special.entr(x).sum(-1, keepdim=True) for x in some])  # (n, 1)
    mean = torch.special.entr(column_mean(rows, weights)).sum()
    return column_mean(each, weights)[0], mean


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
