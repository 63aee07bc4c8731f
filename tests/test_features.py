"""Claims
1. The vote equals a plain loop; ties of distance do not matter, chunks do not either.
2. Features do not depend on the batch size, and come in order.
3. Impossible k is refused.
4. Labels of two sets are compared by the names of their classes.
"""

import math

import pytest
import torch

from data import Images, open_images
from features import extract, gather, knn_accuracy, knn_vote, same_labels, top_neighbours
from runtime import Place
from vit import VisionTransformer


def test_vote_against_a_loop():
    torch.manual_seed(0)
    bank, queries = torch.randn(60, 8).double(), torch.randn(25, 8).double()
    labels, truth = torch.randint(0, 5, (60,)), torch.randint(0, 5, (25,))
    right = 0
    for q, t in zip(queries, truth):
        sims = [(float(q @ b / q.norm() / b.norm()), int(c)) for b, c in zip(bank, labels)]
        votes = {}
        for sim, c in sorted(sims, reverse=True)[:7]:
            votes[c] = votes.get(c, 0) + math.exp(sim / 0.07)
        right += max(votes, key=votes.get) == int(t)
    assert knn_accuracy(bank, labels, queries, truth, (7,))[7] == pytest.approx(right / 25)


def test_chunks_and_ks():
    torch.manual_seed(0)
    bank, queries = torch.randn(50, 4), torch.randn(33, 4)
    small, large = top_neighbours(queries, bank, 5, chunk=4), top_neighbours(queries, bank, 5)
    assert torch.equal(small[1], large[1])
    assert (large[0].diff(dim=1) <= 0).all()
    assert knn_vote(torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[2, 0, 0]])).item() == 2
    for k in (0, 51):
        with pytest.raises(ValueError, match="bank of 50"):
            top_neighbours(queries, bank, k)


def test_extraction():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1).train()
    images, place = open_images("shapes:10"), Place(torch.device("cpu"))
    one, two = (extract(model, images, 16, place, batch_size=b) for b in (3, 10))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert one.shape == (10, 64) and model.training
    assert torch.equal(gather(one, 10, place), one)


def test_labels_go_by_names():
    bank = Images("a", None, list("abc"), [0, 1, 2], ["cat", "dog", "owl"])
    some = Images("b", None, list("de"), [0, 1], ["dog", "owl"])  # no cat among them
    assert same_labels(bank, some).tolist() == [1, 2]
    with pytest.raises(ValueError, match="--val_data has classes that --data has not: cat"):
        same_labels(some, bank)
