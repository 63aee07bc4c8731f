"""Claims
1. J and F equal naive versions, and are what they should be for squares that are moved, and for
   empty masks.
2. Recall and decay equal the toolkit's definition.
"""

import math

import numpy as np
import pytest
import torch

from evaluation.contours import boundary, boundary_measure, over_time, region_similarity

# -- 1


def naive_boundary(mask):
    """Pixels that differ from a neighbour at the right, below, or diagonally below."""
    H, W = mask.shape
    out = np.zeros((H, W), bool)
    for y in range(H):
        for x in range(W):
            for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1)):
                if v < H and u < W:
                    out[y, x] |= mask[y, x] != mask[v, u]
    return out


def naive_j_and_f(mask, truth):
    H, W = mask.shape
    union = (mask | truth).sum()
    j = (mask & truth).sum() / union if union else 1.0
    radius = math.ceil(0.008 * math.sqrt(H * H + W * W))
    edges = [list(zip(*np.nonzero(naive_boundary(m)))) for m in (mask, truth)]

    def share(own, other):
        hits = [any((y - v)**2 + (x - u)**2 <= radius**2 for v, u in other) for y, x in own]
        return sum(hits) / len(hits) if own else 1.0

    precision, recall = share(*edges), share(*edges[::-1])
    both = precision + recall
    return j, 2 * precision * recall / both if both else 0.0


def test_j_and_f_against_naive_versions():
    rng = np.random.default_rng(0)
    masks = rng.random((6, 12, 130)) < 0.02  # a tolerance of 2 pixels
    truths = rng.random((6, 12, 130)) < 0.02
    truths[0], masks[1] = masks[0], 0
    truths[2], masks[3], truths[3] = 0, 0, 0
    masks[4, :5, :40], truths[4, 2:7, 20:60] = 1, 1
    j = region_similarity(torch.from_numpy(masks), torch.from_numpy(truths))
    f = boundary_measure(torch.from_numpy(masks), torch.from_numpy(truths))
    assert j.dtype == f.dtype == torch.float64
    naive = [naive_j_and_f(*pair) for pair in zip(masks, truths)]
    np.testing.assert_allclose(torch.stack([j, f], 1).numpy(), naive, rtol=1e-12)
    assert j[0] == f[0] == j[3] == f[3] == 1 and j[1] == f[1] == j[2] == f[2] == 0
    for mask in masks:
        assert np.array_equal(boundary(torch.from_numpy(mask)[None])[0], naive_boundary(mask))


@pytest.mark.parametrize("shift", [0, 1, 3, 4, 5, 40])
def test_a_square_that_is_moved(shift):
    truth = torch.zeros(1, 240, 320, dtype=torch.bool)  # a diagonal of 400: 3.2, so 4 pixels
    truth[:, 100:140, 100:140] = True
    mask = truth.roll(shift, 2)
    shared = 40 * (40 - shift)
    assert region_similarity(mask, truth).item() == shared / (2 * 1600 - shared)
    f = boundary_measure(mask, truth).item()
    # Within the tolerance the boundary is right. Beyond it, the two sides are wrong.
    assert f == 1 if shift <= 4 else 0 < f < 1


# -- 2


def test_recall_and_decay():
    values = [.9, .8, .7, .6, .5, .4, .3, .2, .1]
    figures = over_time(values)
    assert figures["mean"] == pytest.approx(
        .5) and figures["recall"] == 4 / 9  # .5 is not above
    assert figures["decay"] == pytest.approx(.8 - .2)  # frames 0, 1, 2 and 6, 7, 8
    assert over_time([.7]) == {"mean": .7, "recall": 1, "decay": 0}
    for n in range(1, 30):  # the toolkit: five ends, of which neighbouring quarters share one
        x = np.random.default_rng(n).random(n)
        ends = (np.round(np.linspace(1, n, 5) + 1e-10) - 1).astype(int)
        quarters = [x[ends[i]:ends[i + 1] + 1].mean() for i in range(4)]
        decay = over_time(x.tolist())["decay"]
        assert decay == pytest.approx(quarters[0] - quarters[3], abs=1e-12)
