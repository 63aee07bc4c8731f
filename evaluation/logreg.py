"""Logistic regression: a convex problem, so it has one answer, and we go there.

    features --> principal axes, each in its own units --> L-BFGS --> weight, bias
                 45 strengths of the penalty; a tenth of the images chooses

Idea     With the optimum itself there is no learning rate or number of epochs to argue about:
         what is left is the strength of the penalty, and held-out images choose that.
Paper    DINOv2 sec. 7.2, and its released code
Try      python -m evaluation.logreg            the path of the penalty on clouds of points
         python evaluate.py logreg --weights RUN
Change   other strengths of the penalty: PENALTIES
Tests    pytest tests/evaluation/test_logreg.py

Letters  n images, D width, C classes.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from augment import center_crop
from evaluation import protocol
from evaluation.extract import accuracy
from evaluation.protocol import Extractor, open_judged, open_labelled
from machinery.clock import Progress

PENALTIES = tuple(10**(-6 + 11 * i / 44)
                  for i in range(45))  # C, inverse strengths, 1e-6 to 1e5


class Logistic:
    """min over W, b of C * sum of cross-entropies + |W|^2 / 2, in the given precision.

    L-BFGS crawls where columns are correlated or differ in size. So it works along the
    principal axes of the features, each in units in which the curvature is about one: W = (u *
    scale) axes'. The penalty stays that of W, and the optimum is the same. Centering is taken
    up by b, which is not penalised.
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


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.Labelled, protocol.Config):
    # -- logistic regression
    seed: int = 0  # of the choice of the images that are held out


def run(extractor: Extractor) -> dict:
    """Logistic regression by L-BFGS in float64, for 45 strengths of the penalty. DINOv2's code.

    A random tenth of --data chooses the strength, then all of it is fitted. Images are resized
    to the crop's size, so that nothing is cut off their short side.
    """
    config, process = extractor.config, extractor.process
    train = open_labelled(extractor)
    val, labels = open_judged(extractor, train)
    classes = 1 + max(train.labels)
    # Apple's GPUs have no float64: there the fit runs on the CPU.
    device = torch.device("cpu") if process.device.type == "mps" else process.device
    whole = partial(center_crop, size=extractor.size, short=extractor.size)
    rows = extractor(train, "logreg-data", prepare=whole).double().to(device)
    val_rows = extractor(val, "logreg-val_data", prepare=whole).double().to(device)
    targets = torch.tensor(train.labels, device=device)

    # Each process fits some of the strengths on nine tenths of the images.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    held_out, rest = order.to(device).tensor_split([max(1, len(rows) // 10)])
    problem = Logistic(rows[rest], targets[rest], classes)
    report = Progress("logistic regression", len(PENALTIES), process)
    own_accuracies = {}
    for done, C in enumerate(PENALTIES[process.rank::process.world_size], 1):
        weight, bias = problem.fit(C)
        predicted = (rows[held_out] @ weight.T + bias).argmax(1)
        own_accuracies[C] = accuracy(predicted, targets[held_out])["top1"]
        report(min(done * process.world_size, len(PENALTIES)))
    accuracies = {}
    for part in process.all_gather(own_accuracies):
        accuracies |= part

    # Of several equally good ones the strongest penalty is taken: it comes first.
    best = max(sorted(accuracies), key=accuracies.get)
    weight, bias = Logistic(rows, targets, classes).fit(best)
    figures = accuracy((val_rows @ weight.T + bias).argmax(1), labels)
    process.print(
        f"logistic regression: {len(train):,d} images, a tenth chose C = {best:.2g} "
        f"({accuracies[best]:.2%} of them right)\n  {figures['top1']:.2%}, mean per class "
        f"{figures['mean_per_class']:.2%} of {len(val):,d} images")
    return {
        "logreg": figures | {"C": best},
        "chosen_by": {f"{C:.3g}": accuracies[C]
                      for C in PENALTIES},
        "protocol": "L-BFGS in float64, 45 values of C, a tenth of --data held out to choose",
        "headline": {"logistic regression": figures["top1"]}}


if __name__ == "__main__":
    torch.manual_seed(0)
    centres = torch.randn(10, 5 * 16)
    labels = torch.arange(1200) % 10
    rows = (centres[labels] + 3 * torch.randn(1200, 5 * 16)).double()
    problem = Logistic(rows[:1000], labels[:1000], 10)
    for C in PENALTIES[4:32:9]:
        weight, bias = problem.fit(C)
        predicted = (rows[1000:] @ weight.T + bias).argmax(1)
        right = (predicted == labels[1000:]).float().mean()
        print(f"C = {C:<8.2g} |W| = {weight.norm():8.4f}   accuracy {right:.1%}")
