"""Claims
1. The vote equals a plain loop; ties of distance do not matter, chunks do not either. No
   temperature is too low, and the number of classes does not depend on the neighbours.
2. Impossible k is refused.
3. A few-shot subset has exactly n images of each class, another for another seed.
4. The task finds a copy of each image, prints and writes what it returns, and votes with few
   images of each class as often as it was told. The report card has the figure of k = 20, or of
   the nearest k.
"""

import json
import math

import pytest
import torch
from conftest import copy_of, run_evaluate

from evaluation.knn import few_of_each, knn_accuracy, knn_vote, top_neighbours


def test_vote_against_a_loop():
    torch.manual_seed(0)
    bank, queries = torch.randn(60, 8).double(), torch.randn(25, 8).double()
    labels, truth = torch.randint(0, 5, (60,)), torch.randint(0, 5, (25,))
    right = 0
    for query, label in zip(queries, truth):
        cosines = [
            (float(query @ b / query.norm() / b.norm()), int(c)) for b, c in zip(bank, labels)]
        votes = {}
        for cosine, c in sorted(cosines, reverse=True)[:7]:
            votes[c] = votes.get(c, 0) + math.exp(cosine / 0.07)
        right += max(votes, key=votes.get) == int(label)
    assert knn_accuracy(bank, labels, queries, truth, (7,))[7] == pytest.approx(right / 25)


def test_chunks_and_ks():
    torch.manual_seed(0)
    bank, queries = torch.randn(50, 4), torch.randn(33, 4)
    in_chunks, at_once = top_neighbours(queries, bank, 5,
                                        chunk=4), top_neighbours(queries, bank, 5)
    assert torch.equal(in_chunks[1], at_once[1])
    assert (at_once[0].diff(dim=1) <= 0).all()
    best = knn_vote(torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[2, 0, 0]]))
    assert best.tolist() == [[2, 0, -1]]  # nobody voted for class 1
    for temperature in (0.07, 0.005):  # exp(.99 / .005) is more than float32 can hold
        best = knn_vote(torch.tensor([[0.99, 0.9, 0.9]]), torch.tensor([[2, 0, 0]]),
                        temperature)
        assert best[0, 0] == 2
    same = knn_vote(torch.tensor([[0.9]]), torch.tensor([[0]]), classes=3)
    assert same.tolist() == [[0, -1, -1]]  # as many columns as there are classes
    for k in (0, 51):
        with pytest.raises(ValueError, match="bank of 50"):
            top_neighbours(queries, bank, k)


def test_few_shot_subsets():
    labels = [0] * 5 + [3] * 9 + [1] * 4
    rows = few_of_each(labels, 4, 0)
    assert len(set(rows.tolist())) == 12
    assert torch.tensor(labels)[rows].bincount().tolist() == [4, 4, 0, 4]
    assert torch.equal(rows, few_of_each(labels, 4, 0))

    # By the definition: of each class the first four in a random order of all rows.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    for c, chosen in zip((0, 1, 3), rows.split(4)):
        assert chosen.tolist() == [row for row in order if labels[row] == c][:4]
    assert not torch.equal(rows, few_of_each(labels, 4, 1))


def test_the_task(small_backbone, photos, tmp_path, capsys):
    line = f"knn --weights {small_backbone} --data folder:{photos} "
    line += f"--val_data folder:{copy_of(photos)} --nb_knn 1 20 --n_per_class 2 --n_tries 3"
    results = run_evaluate(line, output_dir=tmp_path)
    assert "k-NN(  1)  100.00%" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["knn"] == results["knn"] and written["knn"]["1"] == 1.0  # each finds its copy
    assert written["top5"]["20"] == 1.0 >= written["knn"]["20"]  # of two classes
    # The card tells the accuracy of k = 20, although that of k = 1 is higher.
    assert written["headline"] == {"k-NN(20)": written["knn"]["20"]}
    assert written["knn"]["20"] < 1
    nearest = run_evaluate(f"{line} --nb_knn 1 15 24", output_dir=tmp_path)
    assert list(nearest["headline"]) == ["k-NN(24)"]
    assert list(written["few_shot"]["2"]) == ["1", "2"]
    assert all(len(tries) == 3 for tries in written["few_shot"]["2"].values())
