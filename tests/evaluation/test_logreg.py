"""Claims
1. Logistic regression ends where the gradient of its objective is zero, for every strength of
   the penalty, for columns that are correlated and for more columns than images.
2. The task takes the strongest penalty of those that the held-out images like best.
3. A problem too small for a GPU, or for a device without float64, is fitted on the CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import run_evaluate

from evaluation import logreg
from evaluation.logreg import PENALTIES, Logistic
from machinery.process import Process


@pytest.mark.parametrize("n, width", [(60, 5), (12, 30)])
def test_logistic_regression_is_optimal(n, width):
    torch.manual_seed(0)
    rows = torch.randn(n, width, dtype=torch.float64) * torch.logspace(-2, 1,
                                                                       width).double() + 3
    rows[:, 1] = rows[:, 0] + 0.01 * rows[:, 1]
    labels = torch.randint(0, 3, (n,))
    problem = Logistic(rows, labels, 3)
    for C in (PENALTIES[0], 1e-2, 1.0, 1e2):
        weight, bias = (v.requires_grad_() for v in problem.fit(C))
        value = C * F.cross_entropy(rows @ weight.T + bias, labels, reduction="sum")
        value = value + weight.square().sum() / 2
        slopes = torch.autograd.grad(value, (weight, bias))
        scale = C * n * rows.abs().max()  # what a single image can pull with
        assert all(s.abs().max() < 1e-7 * scale for s in slopes), (C, slopes)


def test_the_strongest_of_the_best_penalties(small_backbone, tmp_path, monkeypatch):
    few = PENALTIES[8:28:4]
    monkeypatch.setattr(logreg, "PENALTIES", few)
    line = f"logreg --weights {small_backbone} --data shapes:100 --val_data shapes:20:val"
    results = run_evaluate(line, output_dir=tmp_path)
    shares = list(results["chosen_by"].values())
    assert len(shares) == len(few)
    assert results["logreg"]["C"] == few[shares.index(max(shares))]


def test_small_problems_are_fitted_on_the_cpu():
    """And all of them where the accelerator has no float64. On "meta" rows take no memory."""
    few = torch.empty(1000, 384, device="meta")
    many = torch.empty(50_000, 384, device="meta")
    for kind, of_many in (("cuda", "cuda"), ("mps", "cpu"), ("cpu", "cpu")):
        process = Process(torch.device(kind))
        assert logreg.device_of_fit(few, 10, process).type == "cpu"
        assert logreg.device_of_fit(many, 10, process).type == of_many
