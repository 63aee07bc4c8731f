"""Probes: linear classifiers on frozen features, many at the price of one.

    one pass: class tokens of the last blocks, mean patch --> a row (B, (n + 1)*D)
                                                               |
        columns per kind of input x learning rates --> (B, L, C) logits --> one SGD step for all
        columns x strengths of the penalty --> L-BFGS to the optimum (logistic regression)

Idea     Which learning rate and which tokens suit a network is not known beforehand, and the pass
         through the network is what costs. So every combination is trained on the same pass.
Paper    DINO sec. 4.1 and F; DINOv2 sec. 7.1 and appendix B (linear), 7.2 (logistic regression)
Try      python probes.py       52 probes on clouds of points, and the path of the penalty
Change   another grid is another list of learning rates; another input is one more range of columns
Tests    pytest tests/test_probes.py

Letters  B rows of a batch, D width, L learning rates, C classes, w columns of one kind of input.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
CS = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))  # inverse strengths of the penalty


def kinds_of_input(width: int, blocks: tuple[int, ...], avgpool: tuple[bool, ...]) -> dict:
    """(blocks, with the mean patch or not) -> columns of a row that holds all of them.

    The row: class tokens of the last max(blocks) blocks in order, then the mean patch token of the
    last one. So every kind of input is one range of it, and nothing is copied.
    """
    most = max(blocks)
    return {(n, pool): slice((most - n) * width, (most + pool) * width)
            for n in blocks for pool in avgpool}


class Probes:
    """A linear classifier for every kind of input and every learning rate, trained by SGD.

    For each kind: weight (L, C, w) and bias (L, C). All learning rates begin at the same weights,
    drawn from Normal(0, .01) as in the papers, so that a probe is the same alone or among others.
    """

    def __init__(self, kinds: dict, classes: int, lrs: tuple[float, ...], device="cpu",
                 dtype: torch.dtype = torch.float32, seed: int = 0, momentum: float = 0.9):
        self.kinds, self.lrs, self.momentum = kinds, lrs, momentum
        self.rates = torch.tensor(lrs, dtype=dtype, device=device)
        self.values, self.velocities = {}, {}
        for kind, columns in kinds.items():
            w = columns.stop - columns.start
            start = torch.randn(classes, w, dtype=dtype,
                                generator=torch.Generator().manual_seed(seed))
            weight = (0.01 * start).expand(len(lrs), -1, -1).clone().to(device)  # (L, C, w)
            self.values[kind] = weight, weight.new_zeros(weight.shape[:2])
            self.velocities[kind] = tuple(map(torch.zeros_like, self.values[kind]))

    def logits(self, kind, rows: Tensor) -> Tensor:
        weight, bias = self.values[kind]
        part = rows[:, self.kinds[kind]]  # (B, w)
        flat = torch.addmm(bias.flatten(), part, weight.flatten(0, 1).T)  # (B, L*C)
        return flat.view(len(rows), *bias.shape)  # (B, L, C)

    @torch.no_grad()
    def step(self, rows: Tensor, labels: Tensor, factor: float = 1.0):
        """One step of SGD with momentum on the mean cross-entropy, at `factor` times the rates.

        The gradient is written out: d loss / d logits = (softmax - one-hot) / B.
        """
        places = torch.arange(len(rows), device=rows.device)
        for kind, (weight, bias) in self.values.items():
            error = self.logits(kind, rows).softmax(-1)  # (B, L, C)
            error[places, :, labels] -= 1
            error /= len(rows)
            slope = error.flatten(1).T @ rows[:, self.kinds[kind]]
            slopes = slope.view_as(weight), error.sum(0)
            for value, velocity, grad in zip((weight, bias), self.velocities[kind], slopes):
                velocity.mul_(self.momentum).add_(grad)
                rates = self.rates.view(-1, *[1] * (value.ndim - 1))
                value.addcmul_(velocity, rates, value=-factor)

    @torch.no_grad()
    def predict(self, rows: Tensor, chunk: int = 1024) -> dict[tuple, Tensor]:
        """(kind, learning rate) -> classes (n,). Rows may lie elsewhere; they come in chunks."""
        out = {}
        for kind in self.kinds:
            parts = [self.logits(kind, part.to(self.rates.device)).argmax(-1).cpu()
                     for part in rows.split(chunk)]
            out |= {(kind, lr): p for lr, p in zip(self.lrs, torch.cat(parts).unbind(1))}
        return out

    def head(self, kind, lr: float) -> dict[str, Tensor]:
        """One of them as the weight (C, w) and the bias (C) of a linear layer."""
        weight, bias = self.values[kind]
        i = self.lrs.index(lr)
        return {"weight": weight[i].cpu().clone(), "bias": bias[i].cpu().clone()}


def released_head(state: dict, width: int) -> tuple[int, bool, Tensor, Tensor]:
    """A linear head, ours or released -> (blocks, with the mean patch or not, weight, bias).

    What it was trained on follows from its width, for the network's is known. DINO's heads call
    their tensors linear.*, and with the mean patch they have its columns between those of the class
    token. ValueError for anything else.
    """
    state = state.get("state_dict", state)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    dino = "linear.weight" in state
    state = {key.removeprefix("linear."): value for key, value in state.items()}
    if set(state) != {"weight", "bias"}:
        raise ValueError(f"expected the weight and the bias of a linear layer, found "
                         f"{', '.join(list(state)[:4])}")
    weight, bias = state["weight"].float(), state["bias"].float()
    known = {width: (1, False), 2 * width: (1, True), 4 * width: (4, False), 5 * width: (4, True)}
    if weight.shape[1] not in known:
        raise ValueError(f"it reads {weight.shape[1]} columns; of a network of width {width} it "
                         f"must be one of {', '.join(map(str, known))}")
    blocks, pool = known[weight.shape[1]]
    if dino and pool:
        weight = weight.unflatten(1, (width, 2)).transpose(1, 2).flatten(1)  # (C, 2*D)
    return blocks, pool, weight, bias


def real_accuracy(found: Tensor, names: list[str], file: str) -> float:
    """ImageNet-ReaL: right is any of an image's labels; images without one do not count."""
    try:
        truth = json.loads(Path(file).read_text())
        numbers = [int(re.search(r"_val_(\d{8})", name)[1]) - 1 for name in names]
        right = [int(p) in truth[i] for p, i in zip(found, numbers) if truth[i]]
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"--real_labels {file}: expected real.json, and images named "
                         f"ILSVRC2012_val_*: {error}") from None
    return sum(right) / len(right)


# ------------------------------------------------------------------------------------------------
# Logistic regression: a convex problem, so it has one answer, and we go there


class Logistic:
    """min over W, b of C * sum of cross-entropies + |W|^2 / 2, in the given precision.

    L-BFGS crawls where columns are correlated or differ in size. So it works along the principal
    axes of the features, each in units in which the curvature is about one: W = (u * scale) axes'.
    The penalty stays that of W, and the optimum is the same. Centering is taken up by b, which is
    not penalised.
    """

    def __init__(self, rows: Tensor, labels: Tensor, classes: int):
        self.labels, self.classes = labels, classes
        self.mean = rows.mean(0)
        centered = rows - self.mean
        variance, self.axes = torch.linalg.eigh(centered.T @ centered / len(rows))
        self.variance, self.turned = variance.clamp(min=0), centered @ self.axes  # (n, D)

    def fit(self, C: float, max_iter: int = 1000, tolerance: float = 1e-10):
        """-> (weight (C, D), bias (C)) for raw rows."""
        n, width = self.turned.shape
        penalty = 1 / (C * n)  # per image: mean cross-entropy + penalty * |W|^2 / 2
        scale = (self.variance / self.classes + penalty).rsqrt()
        u = self.turned.new_zeros(self.classes, width, requires_grad=True)
        bias = self.turned.new_zeros(self.classes, requires_grad=True)
        chunk = max(1, 2**26 // self.classes)  # of rows: logits of half a GB in float64
        optimizer = torch.optim.LBFGS([u, bias], max_iter=max_iter, max_eval=2 * max_iter,
                                      tolerance_grad=tolerance, tolerance_change=1e-14,
                                      history_size=10, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            total = penalty / 2 * (u * scale).square().sum()
            total.backward()
            for part, label in zip(self.turned.split(chunk), self.labels.split(chunk)):
                some = F.cross_entropy(part @ (u * scale).T + bias, label, reduction="sum") / n
                some.backward()
                total = total + some.detach()
            return total.detach()

        optimizer.step(loss)
        weight = (u * scale).detach() @ self.axes.T
        return weight, bias.detach() - weight @ self.mean


if __name__ == "__main__":
    torch.manual_seed(0)
    centres, labels = torch.randn(10, 5 * 16), torch.arange(1200) % 10
    rows = centres[labels] + 3 * torch.randn(1200, 5 * 16)
    probes = Probes(kinds_of_input(16, (1, 4), (False, True)), 10, LRS)
    for step in range(400):
        some = torch.randint(0, 1000, (64,))
        probes.step(rows[some], labels[some], 4 * (1 - step / 400))
    right = {name: (p == labels[1000:]).float().mean() for name, p in
             probes.predict(rows[1000:]).items()}
    print("lr        " + "  ".join(f"{n} blocks{' + patches' if pool else '':10s}"
                                   for n, pool in probes.kinds))
    for lr in LRS:
        print(f"{lr:<10g}" + "  ".join(f"{right[kind, lr]:<18.1%}" for kind in probes.kinds))
    problem = Logistic(rows[:1000].double(), labels[:1000], 10)
    for C in CS[4:32:9]:
        weight, bias = problem.fit(C)
        found = (rows[1000:].double() @ weight.T + bias).argmax(1)
        print(f"C = {C:<8.2g} |W| = {weight.norm():8.4f}   "
              f"accuracy {(found == labels[1000:]).float().mean():.1%}")
