"""Claims
1. The view-pair loss equals the mean over all ordered pairs of different views, value and gradient.
2. Uniform logits cost exactly ln K.
3. The bias form equals (logits - centre) / temp; the centre follows DINO eq. 4, after the loss.
4. A step that is not finite leaves the centre as it was; without a masked patch all is finite.
5. The figures of the log tell the two collapses apart.
6. Sinkhorn-Knopp equals the published steps on the whole matrix; padding rows take no mass.
7. The patch loss equals a loop over images and patches, KoLeo a loop over images, in float64.
8. DINOv2's figures at the start: zero logits, Sinkhorn targets, the closed form of the EMA centre.
9. DINOv2's local + global loss is DINO's.
10. Chunks of rows change no value and no gradient; for the backward pass the patch loss keeps
    nothing of n x K but what it was given.
11. The gradient of the logits is written into memory of their own type.
12. The rank follows from the singular values, without computing them on the device.
"""

import math

import pytest
import torch

import losses
from losses import (CENTERING, EMACenter, NoCenter, SinkhornKnopp, effective_rank, entropies,
                    koleo_loss, make_targets, patch_loss, view_pair_loss)


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
    student = torch.randn(G + L, 3, 7).double().requires_grad_()
    copied = student.detach().clone().requires_grad_()
    expected = naive_dino(copied, teacher, center, 0.1, 0.07)
    targets = ((teacher - center) / 0.07).softmax(-1)
    # the loss works in float32 whatever it is given: compare at that precision
    loss = view_pair_loss(targets.float(), student)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(student.grad, copied.grad, rtol=1e-4, atol=1e-5)


# Of 20 rows 1, 3 or all at once; the last chunk is shorter than the others.
@pytest.mark.parametrize("chunk", [1, 21, 2**24])
def test_chunks_change_nothing_and_keep_nothing(chunk, monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", chunk)
    torch.manual_seed(0)
    q, weights = torch.randn(20, 7).softmax(-1), torch.rand(20)
    student = torch.randn(20, 7).double().requires_grad_()
    copied = student.detach().clone().requires_grad_()
    expected = -(weights * (q * (copied / 0.1).log_softmax(-1)).sum(-1)).sum() / 4
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = patch_loss(q, student, weights, crops=4)
    given = {x.untyped_storage().data_ptr() for x in (q, student)}
    more = [x.numel() for x in kept if x.untyped_storage().data_ptr() not in given]
    assert len(more) < len(kept) and max(more) <= 20  # a number for each row, but no row of K
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(student.grad, copied.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("K", [16, 65536])
def test_uniform_costs_ln_k(K):
    loss = view_pair_loss(torch.full((2, 2, K), 1 / K), torch.zeros(4, 2, K))
    assert loss.item() == pytest.approx(math.log(K), abs=2e-6)


def test_no_pair_is_refused():
    with pytest.raises(ValueError, match="no pair"):
        view_pair_loss(torch.ones(1, 2, 4) / 4, torch.zeros(1, 2, 4))


def test_bias_form_is_the_papers():
    torch.manual_seed(0)
    logits, centering = torch.randn(2, 5, 9), EMACenter(9)
    centering.center.copy_(torch.randn(9))
    targets = make_targets(logits, 0.04, centering(logits, 0.04))
    torch.testing.assert_close(targets, ((logits - centering.center) / 0.04).softmax(-1))


def test_centre_is_a_running_mean_of_earlier_batches():
    torch.manual_seed(0)
    centering, expected = EMACenter(4, momentum=0.9), torch.zeros(4)
    for _ in range(5):
        logits = torch.randn(2, 3, 4)
        bias = centering(logits, 0.5)
        torch.testing.assert_close(bias, -expected / 0.5)  # knows nothing of this batch yet
        centering.update(logits)
        expected = 0.9 * expected + 0.1 * logits.reshape(6, 4).mean(0)
        torch.testing.assert_close(centering.center, expected)


def test_a_bad_step_leaves_the_centre():
    centering = EMACenter(4)
    centering.update(torch.randn(2, 3, 4))
    before = centering.center.clone()
    centering.update(torch.full((2, 3, 4), float("nan")), ok=torch.tensor(False))
    assert torch.equal(centering.center, before)


@pytest.mark.parametrize("name", CENTERING)
def test_a_batch_without_a_masked_patch(name):
    logits, real = torch.randn(6, 4), torch.zeros(6)
    centering = CENTERING[name](4)
    bias = centering(logits, 0.1, real)
    centering.update(logits, real)
    assert bias.isfinite().all() and centering(logits, 0.1, real).isfinite().all()
    assert entropies(make_targets(logits, 0.1, bias), real)[1].isfinite()


def test_every_centering_is_a_module_that_returns_a_bias():
    for centering in CENTERING.values():
        assert centering(6)(torch.randn(2, 3, 6), 0.1).shape == (6,)


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


@pytest.mark.parametrize("n, D", [(40, 6), (6, 40)])
def test_rank_needs_no_singular_values(n, D, monkeypatch):
    torch.manual_seed(0)
    features = torch.randn(n, D) * torch.logspace(0, -3, D)
    p = torch.linalg.svdvals(features.double())
    p = p / p.sum()
    expected = torch.special.entr(p).sum().exp()
    monkeypatch.setattr(torch.linalg, "svdvals", None)  # what a GPU takes long for
    torch.testing.assert_close(effective_rank(features), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_written_into_the_logits_type(dtype):
    torch.manual_seed(0)
    q, logits = torch.rand(4, 6), torch.randn(4, 6).to(dtype)
    grad = torch.rand(4)
    out = torch.empty_like(logits)
    losses.fill_gradients(out, q, logits, grad, 0.1, 2)
    expected = (2 * (logits.float() / 0.1).softmax(-1) - q) * grad[:, None]
    assert torch.equal(out, expected.to(dtype))


def naive_sinkhorn(logits, temp, sweeps=3):
    """DINOv2's steps as published, on the (K, n) matrix. Rows of the result add up to one."""
    Q = (logits / temp).exp().T
    K, n = Q.shape
    Q = Q / Q.sum()
    for _ in range(sweeps):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0, keepdim=True) / n
    return (Q * n).T


@pytest.mark.parametrize("n, K, temp", [(12, 7, 0.1), (64, 300, 0.04), (3, 50, 0.07)])
def test_sinkhorn(n, K, temp):
    torch.manual_seed(0)
    logits = 0.3 * torch.randn(n, K).double() + 0.2 * torch.randn(n, 1) + 0.2 * torch.randn(K)
    centering = SinkhornKnopp(K)
    targets = make_targets(logits, temp, centering(logits, temp))
    # float32 against float64; the exponents reach 25
    torch.testing.assert_close(targets.double(), naive_sinkhorn(logits, temp), rtol=2e-4,
                               atol=1e-7)
    padded = torch.cat([logits, 5 * torch.randn(4, K)])
    bias = centering(padded, temp, torch.arange(n + 4) < n)
    torch.testing.assert_close(make_targets(logits, temp, bias), targets, rtol=1e-4, atol=1e-7)
    assert centering.state_dict() == {} and not bias.requires_grad


def test_sinkhorn_of_equal_and_of_extreme_logits():
    centering = SinkhornKnopp(16)
    uniform = make_targets(torch.zeros(4, 16), 0.04, centering(torch.zeros(4, 16), 0.04))
    torch.testing.assert_close(uniform, torch.full((4, 16), 1 / 16))
    far = 100 * torch.randn(8, 16)  # exponents far out of range
    assert make_targets(far, 0.04, centering(far, 0.04)).isfinite().all()


def test_patch_loss_against_the_loop():
    torch.manual_seed(0)
    counts = [3, 0, 1, 2]  # hidden patches of four crops; two rows of padding
    M, K = 8, 5
    weights = torch.tensor([1 / c for c in counts for _ in range(c)] + [0, 0]).double()
    targets = torch.randn(M, K).double().softmax(-1)
    student = torch.randn(M, K).double().requires_grad_()
    copied = student.detach().clone().requires_grad_()
    expected, row = 0.0, 0
    for c in counts:
        for _ in range(c):
            log_p = (copied[row] / 0.1).log_softmax(-1)
            expected = expected - (targets[row] * log_p).sum() / c / len(counts)
            row += 1
    loss = patch_loss(targets.float(), student, weights.float(), len(counts))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(student.grad, copied.grad, rtol=1e-4, atol=1e-5)
    assert not student.grad[-2:].any()


def test_koleo_against_the_loop():
    torch.manual_seed(0)
    features = torch.randn(9, 6).double().requires_grad_()
    copied = features.detach().clone().requires_grad_()
    unit = [x / x.norm() for x in copied]
    expected = sum(-min((x - y).norm() for j, y in enumerate(unit) if j != i).log()
                   for i, x in enumerate(unit)) / len(unit)
    loss = koleo_loss(features)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(features.grad, copied.grad, rtol=1e-4, atol=1e-6)
    # isotropic features of 64 images in 384 dimensions, averaged over draws
    far = sum(koleo_loss(torch.randn(64, 384)) for _ in range(8)) / 8
    assert far.item() == pytest.approx(-0.29, abs=0.02)


def test_koleo_of_opposite_features():
    """An image is never its own nearest one, even where rounding makes a cosine of -1."""
    for seed in range(20):
        row = torch.randn(384, generator=torch.Generator().manual_seed(seed))
        loss = koleo_loss(torch.stack([row, -row]))
        torch.testing.assert_close(loss, torch.tensor(-math.log(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_koleo_of_identical_features(dtype):
    x = torch.ones(4, 8, dtype=dtype, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype == torch.float32 and 15 < loss.item() < 20 and x.grad.isfinite().all()
    with pytest.raises(ValueError, match="at least 2"):
        koleo_loss(torch.ones(1, 8))


def dinov2_terms(targets, student, L=8):
    """(local, global) as DINOv2 computes and displays them: its own sums, nothing of ours."""
    logp = (student / 0.1).log_softmax(-1)
    n_terms = 2 + max(2 * L, 1)
    local = sum(-(q * p).sum(-1).mean() for q in targets for p in logp[2:]) / n_terms
    swapped = torch.cat([targets[1], targets[0]])
    both = -(swapped * torch.cat([logp[0], logp[1]])).sum(-1).mean()
    return local, 2 * both / n_terms


def test_dinov2s_figures_at_the_start():
    """K = 65536, 8 local crops. Displayed there: local, global, and half of the patch loss."""
    torch.manual_seed(0)
    K, B, L = 65536, 64, 8
    # Zero logits: 16/18, 2/18 and a quarter (half of the crops masked, displayed by half) of ln K.
    uniform = torch.full((2, 2, K), 1 / K)
    local, both = dinov2_terms(uniform, torch.zeros(2 + L, 2, K))
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])  # two masked crops of four
    patches = patch_loss(uniform.flatten(0, 1), torch.zeros(4, K), weights, crops=4) / 2
    assert [round(x.item(), 3) for x in (local, both, patches)] == [9.858, 1.232, 2.773]

    # A head at its start: cosines of random unit vectors of 256 dimensions, prototypes and rows.
    def cosines(rows):
        x, w = torch.randn(rows, 256), torch.randn(K, 256)
        unit = torch.nn.functional.normalize
        return unit(x, dim=1) @ unit(w, dim=1).T

    teacher = cosines(2 * B)
    targets = make_targets(teacher, 0.04, SinkhornKnopp(K)(teacher, 0.04)).view(2, B, K)
    student = torch.cat([cosines(2 * B) for _ in range(5)]).view(2 + L, B, K)
    loss = view_pair_loss(targets, student).item()
    assert loss == pytest.approx(10.03 + 1.254, rel=0.02)
    # Teacher = student, centre still 0: lnK + s^2 / (2 * .1^2) - s^2 / (.1 * .04), s^2 = 1/256.
    same = teacher.view(2, B, K)[:1].expand(2, -1, -1)
    logits = same[:1].expand(2 + L, -1, -1)
    centred = make_targets(same, 0.04, EMACenter(K)(same, 0.04))
    expected = math.log(K) + (1 / 0.02 - 1 / 0.004) / 256
    assert view_pair_loss(centred, logits).item() == pytest.approx(expected, rel=0.02)
    assert expected == pytest.approx(9.18 + 1.147, rel=0.02)


def test_dinov2s_loss_is_dinos():
    torch.manual_seed(0)
    targets, student = torch.randn(2, 5, 40).softmax(-1), torch.randn(10, 5, 40)
    local, both = dinov2_terms(targets, student)
    torch.testing.assert_close(view_pair_loss(targets, student), local + both)
