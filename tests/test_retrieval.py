"""Claims
1. Average precision with junk, and P@k, equal a loop written from their definition (float64),
   with ties; a query without an answer is left out.
2. Levels of difficulty take the lists that Radenovic 2018 says.
3. GeM and whitening equal naive versions in float64.
4. Ground truth is read from pickles of old and new numpy, and a pickle that wants to run something
   is refused before it does.
5. Groups are found whatever folder their paths start at; a missing image is named.
6. Every edit gives a picture back; crops remove the area they say; seeds repeat.
"""

import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from features import gem
from retrieval import (
    EDITS,
    KAPPAS,
    LEVELS,
    Whitening,
    average_precision,
    judge,
    read_groups,
    read_revisited,
    relevance,
)


def by_definition(similarities, right, junk):
    """AP and P@k from a list that is walked through."""
    order = sorted(range(len(similarities)), key=lambda i: -similarities[i])  # stable
    order = [i for i in order if i not in junk]
    hits, area, last = 0, 0.0, 0
    for place, i in enumerate(order):
        if i in right:
            before = hits / place if place else 1.0
            hits, last = hits + 1, place + 1
            area += (before + hits / (place + 1)) / 2 / len(right)
    cuts = [min(last, k) for k in KAPPAS]
    return [area, *(len(right & set(order[:cut])) / cut for cut in cuts)]


def test_judge_against_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(4, 30))
        sims = rng.integers(0, 6, n) / 4  # many ties
        kinds = rng.integers(0, 3, n)
        kinds[0] = 1
        right, junk = (torch.from_numpy(kinds == k) for k in (1, 2))
        found = judge(torch.from_numpy(sims), right, junk)
        expected = by_definition(sims.tolist(), set(right.nonzero()[:, 0].tolist()),
                                 set(junk.nonzero()[:, 0].tolist()))
        assert found == pytest.approx(expected, abs=1e-12)
    none = torch.zeros(3, dtype=torch.bool)
    assert np.isnan(judge(torch.zeros(3), none, none)).all()
    assert average_precision(torch.tensor([0, 1])) == 1
    assert average_precision(torch.tensor([1])) == 0.25  # precision 0 before, 1/2 after


def test_levels():
    about = {"easy": torch.tensor([0]), "hard": torch.tensor([2, 3]), "junk": torch.tensor([5])}
    expected = {"easy": ({0}, {2, 3, 5}), "medium": ({0, 2, 3}, {5}), "hard": ({2, 3}, {0, 5})}
    for level in LEVELS:
        found = tuple(set(part.nonzero()[:, 0].tolist()) for part in relevance(about, level, 6))
        assert found == expected[level]


def test_gem_and_whitening():
    torch.manual_seed(0)
    patches = torch.randn(2, 5, 3, dtype=torch.float64)
    for b in range(2):
        for d in range(3):
            values = [max(float(v), 1e-6) ** 4 for v in patches[b, :, d]]
            assert gem(patches)[b, d].item() == pytest.approx((sum(values) / 5) ** 0.25, rel=1e-12)
    features = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6).double() + 1
    features[:, 5] = features[:, 4]  # a direction without strength is floored, not blown up
    white, others = Whitening(features), torch.randn(4, 6, dtype=torch.float64)
    moment = np.einsum("ni,nj->ij", features.numpy(), features.numpy()) / 50
    values, axes = np.linalg.eigh(moment)
    values = np.maximum(values, 1e-5 * values.max())
    naive = np.stack([(axes.T @ (x - features.numpy().mean(0))) / np.sqrt(values)
                      for x in others.numpy()])
    naive /= np.linalg.norm(naive, axis=1, keepdims=True)
    # eigenvectors are defined up to their sign: cosines are not touched by it
    np.testing.assert_allclose((white(others) @ white(others).T).numpy(), naive @ naive.T,
                               atol=1e-9)
    assert torch.allclose(white(others).norm(dim=1), torch.ones(4).double())


def truth():
    return {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [
        {"bbx": np.array([1.0, 2.0, 30.0, 40.0]), "easy": np.array([0]), "hard": [2],
         "junk": np.array([], dtype=np.int64)}]}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_ground_truth(protocol, tmp_path):
    file = tmp_path / "gnd.pkl"
    raw = pickle.dumps(truth(), protocol)
    for content in (raw, raw.replace(b"numpy._core", b"numpy.core") if protocol == 2 else raw):
        file.write_bytes(content)
        found = read_revisited(file)
        assert found["qimlist"] == ["q"] and found["gnd"][0]["hard"].tolist() == [2]
        assert found["gnd"][0]["easy"].tolist() == [0] and len(found["gnd"][0]["junk"]) == 0


class Bad:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_ground_truth_runs_nothing(tmp_path):
    file, trace = tmp_path / "gnd.pkl", tmp_path / "trace"
    for bad in (Bad(os.system, f"touch {trace}"), Bad(eval, f"open({str(trace)!r}, 'w')"),
                Bad(np.save, str(trace), 1)):
        file.write_bytes(pickle.dumps(truth() | {"gnd": bad}))
        with pytest.raises(ValueError, match="has no place there"):
            read_revisited(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gnd.pkl"]
    beyond = truth()
    beyond["gnd"][0]["easy"] = [3]
    for content, words in ((b"no pickle", "--ground_truth"), (pickle.dumps(beyond), "beyond the 3"),
                           (pickle.dumps({"imlist": []}), "--ground_truth")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_revisited(file)


def test_groups(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_text("path,group\nimages/a.jpg,x\nimages/b.jpg,x\nimages/c.jpg,y\n")
    assert read_groups(file, ["b.jpg", "images/c.jpg"]) == ["x", "y"]
    with pytest.raises(ValueError, match="1 of 2 images are not in it, the first d.jpg"):
        read_groups(file, ["a.jpg", "d.jpg"])
    file.write_text("name,kind\n1,2\n")
    with pytest.raises(ValueError, match="columns path and group"):
        read_groups(file, ["a.jpg"])


@pytest.mark.parametrize("size", [(37, 50), (64, 64), (9, 7)])
def test_edits(size):
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    image = (255 * F.interpolate(coarse, size, mode="bilinear"))[0].byte()
    before = image.clone()
    for name, edit in EDITS.items():
        one, two = edit(image, 3), edit(image, 3)
        assert one.dtype == torch.uint8 and one.ndim == 3 and one.shape[0] == 3, name
        assert torch.equal(one, two) and torch.equal(image, before), name
        if size != (9, 7):
            assert one.shape != image.shape or not torch.equal(one, image), name
        if name.startswith("crop"):
            kept = one[0].numel() / image[0].numel()
            # whole pixels: each side is off by half a pixel at most
            assert abs(kept - (1 - int(name.split()[1]) / 100)) < 0.6 * sum(1 / s for s in size)
