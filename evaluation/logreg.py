"""Logistic regression: a linear classifier at the optimum of its objective, which is convex.

    features --> principal axes, each in its own units --> L-BFGS --> weight, bias
                 45 strengths of the penalty; a tenth of the images chooses

Idea     A convex objective has one optimum, and no learning rate or number of epochs has a part
         in it: what is left to choose is the strength of the penalty, and held-out images
         choose that.
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
from evaluation.extract import accuracy, best_classes
from evaluation.protocol import Extractor, open_judged, open_labelled
from machinery.clock import Progress
from machinery.process import Process
from machinery.read_once import wait_for_all

# Values of C, from 1e-6 to 1e5 in equal ratios. C is the inverse of the penalty's strength, as
# in scikit-learn: a small C is a strong penalty. These are DINOv2's.
PENALTIES = tuple(10**(-6 + 11 * i / 44) for i in range(45))


class Logistic:
    """min over W, b of C * sum of cross-entropies + |W|^2 / 2, in the precision of `rows`.

    rows (n, D), labels (n,) from 0 to classes - 1. What does not depend on C is done once, in
    the constructor; `fit` then solves the problem for one C.

    L-BFGS supposes at its start that the objective is curved alike in all directions. Features
    are not so: some columns vary much more than others, and many rise and fall together. The
    objective then is a long and narrow valley, and thousands of steps are needed. So W is not
    searched itself, but other variables u (classes, D), in which the valley is nearly round. W
    is computed from them in three steps.

    1. The rows are turned. With their mean m and their principal axes A (D, D), whose columns
       have length 1 and right angles to each other, a row x becomes t = (x - m) A. The columns
       of t are uncorrelated, so a weight on one of them can be chosen nearly without regard to
       the others.
    2. Each weight gets a unit of its own: the weights on t_d are u_d * scale_d. So the logits
       are (u * scale) t = W (x - m) with W = (u * scale) A'. To turn changes no length, so the
       penalty |W|^2 is |u * scale|^2.
    3. The unit is chosen so that the curvature is 1. By a weight on t_d the second derivative of
       the cross-entropy is the mean of p (1 - p) t_d^2. Near uniform answers, p = 1 / classes,
       this is about variance_d / classes. The second derivative of the penalty is `penalty`. By
       u_d the sum of both is multiplied by scale_d^2, and is 1 if scale_d is the inverse of its
       root.

    Example of ten classes, penalty .01 and two axes with the variances 100 and 1:

        curvature by a weight    100 / 10 + .01 = 10.01      1 / 10 + .01 = .11
        scale                    10.01^(-1/2) = .32          .11^(-1/2) = 3.0
        curvature by u           .32^2 * 10.01 = 1           3.0^2 * .11 = 1

    Counted for 1,000 rows of 80 correlated columns: at C = 1e-5 it took 31 evaluations, where W
    itself took 2,313; at C = .03 154, where W took more than 5,000. A weak penalty (C > 1) ends
    far from uniform answers, and takes about 1,000.

    Any W can be written in this way, so the optimum is the same. The mean that is taken off
    changes the bias only, W (x - m) + b' = W x + (b' - W m), and the bias has no penalty.
    """

    def __init__(self, rows: Tensor, labels: Tensor, classes: int):
        self.labels = labels
        self.classes = classes
        self.mean = rows.mean(0)
        centered = rows - self.mean

        # eigh: the axes are the eigenvectors of the covariance, the variances along them its
        # eigenvalues. Rounding may give an eigenvalue of 0 as -1e-17: it is cut off at 0.
        variance, self.axes = torch.linalg.eigh(centered.T @ centered / len(rows))
        self.variance = variance.clamp(min=0)
        self.turned = centered @ self.axes  # t of each row, (n, D)

    def fit(self, C: float, max_iter: int = 1000, tolerance: float = 1e-10):
        """The optimum for this C, for rows as they came: weight (classes, D), bias
        (classes,).
        """
        n, width = self.turned.shape

        # Divided by C * n the objective is the mean cross-entropy + penalty * |W|^2 / 2, which
        # has the same optimum, and numbers near 1 whatever C and n are.
        penalty = 1 / (C * n)
        scale = (self.variance / self.classes + penalty).rsqrt()  # (D,)
        u = self.turned.new_zeros(self.classes, width, requires_grad=True)
        bias = self.turned.new_zeros(self.classes, requires_grad=True)

        # A million rows of 1,000 classes would be 8 GB of logits in float64. They are computed
        # for some rows at a time: half a GB.
        chunk = max(1, 2**26 // self.classes)
        optimizer = torch.optim.LBFGS([u, bias], max_iter=max_iter, max_eval=2 * max_iter,
                                      tolerance_grad=tolerance, tolerance_change=1e-14,
                                      history_size=10, line_search_fn="strong_wolfe")

        def loss():
            """The objective at the present u and bias; leaves its gradient in them."""
            optimizer.zero_grad()
            total = penalty / 2 * (u * scale).square().sum()
            total.backward()
            for part, label in zip(self.turned.split(chunk), self.labels.split(chunk)):
                logits = part @ (u * scale).T + bias
                share = F.cross_entropy(logits, label, reduction="sum") / n
                share.backward()  # gradients of all shares add up; its logits are freed here
                total = total + share.detach()
            return total.detach()

        # One call is the whole search: L-BFGS evaluates `loss` as often as it needs to.
        optimizer.step(loss)

        # Back from the turned, centred rows to those that came.
        weight = (u * scale).detach() @ self.axes.T
        return weight, bias.detach() - weight @ self.mean


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.Labelled, protocol.Config):
    # -- logistic regression
    seed: int = 0  # the seed that chooses the images that are held out


def run(extractor: Extractor) -> dict:
    """Logistic regression by L-BFGS in float64, for 45 strengths of the penalty. DINOv2's code.

    A random tenth of --data chooses the strength, then all of it is fitted. Images are resized
    to the crop's size, so that nothing is cut off their short side.
    """
    config = extractor.config
    process = extractor.process
    train = open_labelled(extractor)
    val, labels = open_judged(extractor, train)
    classes = 1 + max(train.labels)

    # The crop is as long as the short side of the resized image.
    whole = partial(center_crop, size=extractor.size, short=extractor.size)
    rows = extractor(train, "logreg-data", prepare=whole)
    val_rows = extractor(val, "logreg-val_data", prepare=whole)
    device = device_of_fit(rows, classes, process)
    rows = rows.to(device).double()
    val_rows = val_rows.to(device).double()
    targets = torch.tensor(train.labels, device=device)

    # Each process fits some of the strengths on nine tenths of the images, and judges them on
    # the last tenth. Weak penalties take longer than strong ones, so the strengths are dealt
    # out in turn.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    held_out, rest = order.to(device).tensor_split([max(1, len(rows) // 10)])
    problem = Logistic(rows[rest], targets[rest], classes)
    report = Progress("logistic regression", len(PENALTIES), process)
    own_accuracies = {}
    for done, C in enumerate(PENALTIES[process.rank::process.world_size], 1):
        weight, bias = problem.fit(C)
        predicted = best_classes(rows[held_out] @ weight.T + bias)
        own_accuracies[C] = accuracy(predicted, targets[held_out])["top1"]
        report(min(done * process.world_size, len(PENALTIES)))

    # Some strengths take much longer than others, and so do the shares of the processes.
    wait_for_all(process)
    accuracies = {}
    for part in process.all_gather(own_accuracies):
        accuracies |= part

    # `max` takes the first of several equally good ones: the smallest C, the strongest penalty.
    # With it all images are fitted once more, the held-out tenth included. The problem of nine
    # tenths is as large as all features, so its memory is given back first.
    del problem
    best = max(sorted(accuracies), key=accuracies.get)
    weight, bias = Logistic(rows, targets, classes).fit(best)
    figures = accuracy(best_classes(val_rows @ weight.T + bias), labels)
    process.print(f"logistic regression: {len(train):,d} images, a tenth chose C = {best:.2g} "
                  f"({accuracies[best]:.2%} of them right)\n  {figures['top1']:.2%}, top-5 "
                  f"{figures['top5']:.2%}, mean per class {figures['mean_per_class']:.2%} of "
                  f"{len(val):,d} images of {config.val_data}")
    chosen_by = {f"{C:.3g}": accuracies[C] for C in PENALTIES}
    return {
        "logreg": figures | {"C": best}, "chosen_by": chosen_by,
        "protocol": f"L-BFGS in float64, {len(PENALTIES)} values of C, chosen on a tenth of --data",
        "headline": {"logistic regression": figures["top1"]}}


def device_of_fit(rows: Tensor, classes: int, process: Process) -> torch.device:
    """Where to fit: on the CPU if that is faster, or if the accelerator has no float64."""
    # L-BFGS evaluates the objective thousands of times, one after the other. An evaluation is
    # some fifty kernels, which take a GPU some four milliseconds to start, however small they
    # are. An H100 and 16 cores beside it took equally long for 97 million products of two
    # numbers; with 36 million the CPU was faster. Between them lies 2**26, 67 million: 17,000
    # rows of width 384 and ten classes.
    small = rows.numel() * classes < 2**26
    if small or process.device.type == "mps":
        return torch.device("cpu")
    return process.device


if __name__ == "__main__":
    # Ten overlapping clouds of points: the weaker the penalty, the longer the weights, and
    # beyond some length they fit the noise of the 1,000 points and not the 200 others.
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
