"""Losses: what the student must match, and what keeps two networks from agreeing on nothing.

    teacher logits (G, B, K) --> softmax(. / teacher_temp + bias) --> targets (G, B, K) --+
                                          ^                                              |
                       target maker: one bias per prototype          cross-entropy of all view pairs
                                                                         but those of the same view
                                                                                         |
    student logits (V, B, K) ---------> softmax(. / student_temp) -----------------------+

Idea     The teacher's softmax is sharpened (low temperature) so that it says something, and biased
         against prototypes used too often so that it does not always say the same. One alone
         collapses: bias only, to the uniform answer; sharpening only, to a single prototype.
Paper    DINO sec. 3.1, eq. 1-4 and Alg. 1
Try      python losses.py       the two collapses and the balance between them, in numbers
Change   a new centering is one class that returns a bias, and one line in CENTERING
Tests    pytest tests/test_losses.py

Letters  G global views, V = G + L views, B images, K prototypes, n rows (views times images).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes; x itself with one. The only place where the losses cross processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


# ------------------------------------------------------------------------------------------------
# Target makers: teacher logits -> one bias per prototype


class NoCenter(nn.Module):
    """No bias at all. With sharpening this collapses to one prototype: run it and see."""

    def __init__(self, n_prototypes: int):
        super().__init__()

    def forward(self, logits: Tensor, temp: float) -> Tensor:
        return logits.new_zeros(logits.shape[-1], dtype=torch.float32)  # (K,)

    def update(self, logits: Tensor, ok: Tensor | bool = True):
        pass


class EMACenter(NoCenter):
    """DINO: subtract a running mean of the teacher's logits. bias = -centre / temp. DINO eq. 4.

    The centre used at one step knows the batches before it only: forward first, update after the
    optimiser has moved. `ok` = False (a tensor, read on the device) leaves the centre as it was.
    """

    def __init__(self, n_prototypes: int, momentum: float = 0.9):
        super().__init__(n_prototypes)
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(n_prototypes))

    def forward(self, logits: Tensor, temp: float) -> Tensor:
        return -self.center / temp  # (K,)

    @torch.no_grad()
    def update(self, logits: Tensor, ok: Tensor | bool = True):
        rows = logits.float().flatten(0, -2)  # (n, K)
        # Sums, then one division: processes may hold different numbers of rows.
        total = all_sum(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
        mean = total[:-1] / total[-1]
        moved = self.momentum * self.center + (1 - self.momentum) * mean
        ok = torch.as_tensor(ok, device=moved.device)
        self.center.copy_(torch.where(ok, moved, self.center))


CENTERING = {"ema": EMACenter, "none": NoCenter}


def make_targets(logits: Tensor, temp: float, bias: Tensor) -> Tensor:
    """softmax(logits / temp + bias) over prototypes, in float32, without gradient. DINO eq. 1."""
    return F.softmax(logits.detach().float() / temp + bias, -1)


# ------------------------------------------------------------------------------------------------
# Losses: pure functions of targets and student logits


def view_pair_loss(targets: Tensor, student_logits: Tensor, student_temp: float = 0.1) -> Tensor:
    """Mean cross-entropy over all pairs (teacher view, other student view). DINO eq. 3, Alg. 1.

    targets (G, B, K), probabilities; student_logits (V, B, K), V >= G, the first G views being the
    teacher's. There are G*V - G ordered pairs: a view is never asked to match itself.

    A student view meets its teachers' *sum* q of mass m (2 for a local crop with 2 globals, 1 for
    a global one); -<q, log softmax(s)> = m logsumexp(s) - <q, s>: a pass per view, not per pair.
    Value in nats; ln K when nobody knows anything.
    """
    G, V = len(targets), len(student_logits)
    if V < G or G * (V - 1) == 0:
        raise ValueError(f"{G} teacher and {V} student views leave no pair of different views")
    everyone = targets.sum(0)  # (B, K)
    total = 0.0
    for v, logits in enumerate(student_logits):
        s = logits.float() / student_temp  # (B, K)
        q, mass = (everyone - targets[v], G - 1) if v < G else (everyone, G)
        total = total + mass * s.logsumexp(-1).mean() - torch.einsum("bk,bk->", q, s) / len(s)
    return total / (G * V - G)


# ------------------------------------------------------------------------------------------------
# What the log needs to tell a healthy loss from a collapsed one


@torch.no_grad()
def entropies(targets: Tensor) -> tuple[Tensor, Tensor]:
    """(mean entropy of the targets, entropy of their mean over all processes), in nats.

    The first near ln K: the teacher says nothing (uniform collapse). The second near 0: it says the
    same of every image (one-prototype collapse). A small first and a large second mean health.
    """
    rows = targets.flatten(0, -2)  # (n, K)
    each = torch.special.entr(rows).sum(-1).mean()
    total = all_sum(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
    return each, torch.special.entr(total[:-1] / total[-1]).sum()


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
    print("\nBoth: each image is told apart (low), and all prototypes are in use (high).")
    uniform = view_pair_loss(torch.full((2, 64, K), 1 / K), torch.zeros(10, 64, K))
    print(f"Uniform answers on both sides cost {uniform:.4f} nats, which is ln K.")
