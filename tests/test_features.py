"""Claims
1. The vote equals a plain loop; ties of distance do not matter, chunks do not either.
2. Features do not depend on the batch size, and come in order.
3. Impossible k is refused.
4. Labels of two sets are compared by the names of their classes.
5. Accuracy and its mean over classes equal a loop, with classes of one image and of none; a
   few-shot subset has exactly n images of each class, another for another seed.
6. Shares of processes put together are the whole in order, whatever their number; random crops of
   all processes together are those of one, neighbours that belong together stay so.
7. A broken image among those to learn from is named, not replaced.
"""

import math

import pytest
import torch

from data import Images, open_images
from features import (
    accuracy,
    extract,
    few_of,
    gather,
    knn_accuracy,
    knn_vote,
    random_crops,
    same_labels,
    spread,
    top_neighbours,
)
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


def test_accuracies_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 1, 4, 4, 4, 4, 4])  # one image of 0, none of 2 and 3
    for _ in range(20):
        found = torch.randint(0, 5, (8,), generator=generator)
        shares = {}
        for p, t in zip(found.tolist(), labels.tolist()):
            shares.setdefault(t, []).append(p == t)
        per_class = [sum(s) / len(s) for s in shares.values()]
        got = accuracy(found, labels)
        assert got["top1"] == pytest.approx(sum(map(sum, shares.values())) / 8, abs=1e-12)
        assert got["mean_per_class"] == pytest.approx(sum(per_class) / 3, abs=1e-12)


def test_few_shot_subsets():
    labels = [0] * 5 + [3] * 9 + [1] * 4
    rows = few_of(labels, 4, 0)
    assert len(set(rows.tolist())) == 12
    assert torch.tensor(labels)[rows].bincount().tolist() == [4, 4, 0, 4]
    assert torch.equal(rows, few_of(labels, 4, 0)) and not torch.equal(rows, few_of(labels, 4, 1))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_the_whole(world):
    places = [Place(torch.device("cpu"), rank, world) for rank in range(world)]
    for n in (1, 4, 7):
        shares = [spread(range(n), place) for place in places]
        assert len({len(share) for share in shares}) == 1
        assert torch.tensor(shares).T.flatten()[:n].tolist() == list(range(n))
    images, alone = open_images("shapes:9"), Place(torch.device("cpu"))
    whole = list(random_crops(images, 8, 7, 2, alone))
    parts = [list(random_crops(images, 8, 7, 2, place, together=3)) for place in places]
    for step, (crops, labels) in enumerate(whole):
        groups = [list(zip(*(v.split(3) for v in part[step]))) for part in parts]
        order = [groups[g % world][g // world] for g in range(3)]  # of 3, 3 and 1
        assert torch.equal(torch.cat([crops for crops, _ in order]), crops)
        assert torch.equal(torch.cat([labels for _, labels in order]), labels)


def test_a_broken_image_is_named(photos):
    (photos / "cats/05.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="does not decode: cats/05.png"):
        list(random_crops(open_images(f"folder:{photos}"), 8, 24, 1, Place(torch.device("cpu"))))
