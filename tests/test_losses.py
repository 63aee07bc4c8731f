"""Claims
1. The view-pair loss equals the mean over all ordered pairs of different views, value and gradient.
2. Uniform logits cost exactly ln K.
3. The bias form equals (logits - centre) / temp; the centre follows DINO eq. 4, after the loss.
4. A step that is not finite leaves the centre as it was.
5. The figures of the log tell the two collapses apart.
"""

import math

import pytest
import torch

from losses import (
    CENTERING,
    EMACenter,
    NoCenter,
    effective_rank,
    entropies,
    make_targets,
    view_pair_loss,
)


def naive_dino(student, teacher, center, student_temp, teacher_temp):
    """DINO Alg. 1 as printed, one pair at a time."""
    total, pairs = 0.0, 0
    for i in range(len(teacher)):
        q = ((teacher[i] - center) / teacher_temp).softmax(-1)
        for v in range(len(student)):
            if v == i:
                continue
            for b in range(student.shape[1]):
                p = (student[v, b] / student_temp).softmax(-1)
                total = total - (q[b] * p.log()).sum() / student.shape[1]
            pairs += 1
    return total / pairs


@pytest.mark.parametrize("G, L", [(2, 8), (2, 0), (3, 2), (1, 2)])
def test_loss_and_gradient_against_the_double_loop(G, L):
    torch.manual_seed(0)
    teacher, center = torch.randn(G, 3, 7).double(), 0.3 * torch.randn(7).double()
    ours = torch.randn(G + L, 3, 7).double().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    expected = naive_dino(theirs, teacher, center, 0.1, 0.07)
    targets = ((teacher - center) / 0.07).softmax(-1)
    # the loss works in float32 whatever it is given: compare at that precision
    got = view_pair_loss(targets.float(), ours)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    got.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("K", [16, 65536])
def test_uniform_costs_ln_k(K):
    loss = view_pair_loss(torch.full((2, 2, K), 1 / K), torch.zeros(4, 2, K))
    assert loss.item() == pytest.approx(math.log(K), abs=2e-6)


def test_no_pair_is_refused():
    with pytest.raises(ValueError, match="no pair"):
        view_pair_loss(torch.ones(1, 2, 4) / 4, torch.zeros(1, 2, 4))


def test_bias_form_is_the_papers():
    torch.manual_seed(0)
    logits, maker = torch.randn(2, 5, 9), EMACenter(9)
    maker.center.copy_(torch.randn(9))
    targets = make_targets(logits, 0.04, maker(logits, 0.04))
    torch.testing.assert_close(targets, ((logits - maker.center) / 0.04).softmax(-1))


def test_centre_is_a_running_mean_of_earlier_batches():
    torch.manual_seed(0)
    maker, expected = EMACenter(4, momentum=0.9), torch.zeros(4)
    for _ in range(5):
        logits = torch.randn(2, 3, 4)
        bias = maker(logits, 0.5)
        torch.testing.assert_close(bias, -expected / 0.5)  # knows nothing of this batch yet
        maker.update(logits)
        expected = 0.9 * expected + 0.1 * logits.reshape(6, 4).mean(0)
        torch.testing.assert_close(maker.center, expected)


def test_a_bad_step_leaves_the_centre():
    maker = EMACenter(4)
    maker.update(torch.randn(2, 3, 4))
    before = maker.center.clone()
    maker.update(torch.full((2, 3, 4), float("nan")), torch.tensor(False))
    assert torch.equal(maker.center, before)


def test_every_centering_is_a_module_that_returns_a_bias():
    for maker in CENTERING.values():
        assert maker(6)(torch.randn(2, 3, 6), 0.1).shape == (6,)


def test_log_figures():
    uniform, one = torch.full((2, 8, 64), 1 / 64), torch.zeros(2, 8, 64)
    one[..., 3] = 1
    own = torch.eye(16).view(2, 8, 16)
    assert [round(x.item(), 3) for x in entropies(uniform)] == [4.159, 4.159]
    assert [round(x.item(), 3) for x in entropies(one)] == [0, 0]
    assert [round(x.item(), 3) for x in entropies(own)] == [0, 2.773]
    assert effective_rank(torch.eye(8)).item() == pytest.approx(8, rel=1e-4)
    assert effective_rank(torch.ones(8, 5)).item() == pytest.approx(1, rel=1e-2)
    assert NoCenter(3).state_dict() == {}
