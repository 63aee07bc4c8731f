"""Claims
1. Union-find gives the connected components that a walk over the graph gives, for any order of the
   edges, at once or one by one; the root is the first node.
2. Precision and recall equal a loop; the table of thresholds names the one of the highest F1.
3. One image of each component stays; relative deduplication removes every image of a touched
   component, and images that are no longer in the pool count for nothing.
4. Groups that are not known, a wrong order of the thresholds, and references of another embedding
   are refused.
"""

import csv

import numpy as np
import pytest
from curation_helpers import CPU, make_pool, unit_rows

from curation import duplicates
from curation.duplicates import Config, DisjointSets, representatives, score
from curation.pool import open_pool
from machinery.flags import UsageError


def walk(n, pairs):
    """The first node that can be reached from each node, by a walk from each in turn."""
    beside = {i: set() for i in range(n)}
    for a, b in pairs:
        beside[a].add(b)
        beside[b].add(a)
    first = [None] * n
    for start in range(n):
        to_visit = [start] if first[start] is None else []
        while to_visit:
            node = to_visit.pop()
            if first[node] is None:
                first[node] = start
                to_visit += beside[node]
    return first


@pytest.mark.parametrize("seed", range(20))
def test_components_of_random_graphs(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    pairs = rng.integers(0, n, (int(rng.integers(0, 2 * n)), 2))
    expected = walk(n, pairs.tolist())
    at_once = DisjointSets(n)
    at_once.join(pairs[:, 0], pairs[:, 1])
    assert at_once.roots(np.arange(n)).tolist() == expected
    one_by_one = DisjointSets(n)
    for a, b in pairs[::-1]:
        one_by_one.join(np.array([b]), np.array([a]))
    assert one_by_one.roots(np.arange(n)).tolist() == expected


def test_a_long_chain_is_one_component():
    chain = DisjointSets(5000)
    order = np.random.default_rng(0).permutation(4999)
    chain.join(order, order + 1)
    assert (chain.roots(np.arange(5000)) == 0).all()


def test_score_against_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        groups = rng.integers(0, 8, 30)
        roots = np.minimum(rng.integers(0, 30, 30), np.arange(30))
        roots = roots[roots[roots[roots[
            roots[roots]]]]]  # roots of roots: they end at themselves
        rows = np.arange(30)
        removed = [i for i in rows if roots[i] != i]
        right = sum(groups[i] == groups[roots[i]] for i in removed)
        figures = score(roots, rows, groups)
        assert figures["precision"] == pytest.approx(right / len(removed))
        assert figures["recall"] == pytest.approx(right / (30 - len(set(groups.tolist()))))
    nothing = score(np.arange(3), np.arange(3), np.arange(3))
    assert nothing == {"precision": 1.0, "recall": 1.0}


def copies_of(features, rows, noise=0.03):
    """Features close to some of these (cosines from .975 to .99)."""
    copied = features[rows].astype(float)
    copied += noise * np.random.default_rng(1).normal(size=copied.shape)
    return (copied / np.linalg.norm(copied, axis=1, keepdims=True)).astype(np.float16)


def stage(tmp_path, **flags):
    config = Config(threshold=0.9, output_dir=str(tmp_path / "dedup"), k=8, **flags)
    config.check()
    return duplicates.run([str(tmp_path / "pool")], config, CPU)


def test_the_stage(tmp_path, capsys):
    originals = unit_rows(30, 32)
    pool = np.concatenate([originals, copies_of(originals, [0, 3, 3, 8])])
    make_pool(tmp_path / "pool", pool, broken=[29])
    with open(tmp_path / "groups.csv", "w", newline="") as file:
        rows = [
            (f"images/{i:04d}.png", i if i < 30 else (0, 3, 3, 8)[i - 30]) for i in range(34)]
        csv.writer(file).writerows([("path", "group"), *rows])
    content = stage(tmp_path, groups=str(tmp_path / "groups.csv"))
    assert open_pool(str(tmp_path / "dedup")).rows.tolist() == list(range(29))
    assert content["counts"]["copies removed"] == 4 and content["images"] == 29
    assert content["by_groups"]["precision"] == content["by_groups"]["recall"] == 1
    assert content["by_groups"]["best"]["threshold"] == 0.98  # the last of those with F1 = 1
    printed = capsys.readouterr().out
    assert "the highest F1, 1.000, is at --threshold 0.98" in printed and "warning" not in printed

    # What was removed, and what stays for it.
    lines = (tmp_path / "dedup/copies.txt").read_text().splitlines()
    expected = zip((30, 31, 32, 33), (0, 3, 3, 8))
    assert lines == [f"{copy:04d}.png\t{kept:04d}.png" for copy, kept in expected]

    # Another threshold takes the same graph: no piece of it is made again.
    pieces = [path.stat().st_mtime_ns for path in (tmp_path / "dedup/graph").glob("0*.npy")]
    config = Config(threshold=1.0, output_dir=str(tmp_path / "dedup"), k=8)
    assert duplicates.run([str(tmp_path / "pool")], config, CPU)["images"] == 33
    again = [path.stat().st_mtime_ns for path in (tmp_path / "dedup/graph").glob("0*.npy")]
    assert pieces == again


def test_a_threshold_that_takes_everything_is_warned_of(tmp_path, capsys):
    make_pool(tmp_path / "pool", unit_rows(30, 32))
    config = Config(threshold=-0.9, relative_threshold=-0.9, output_dir=str(tmp_path / "dedup"))
    duplicates.run([str(tmp_path / "pool")], config, CPU)
    assert "warning: 97% of the pool counts as copies" in capsys.readouterr().out


def test_what_touches_a_test_goes_as_a_whole(tmp_path):
    # A chain 0-1-2 of neighbours with cosines of .8, far from a pair of copies 3-4. An image
    # to be judged with is like number 2 alone.
    angles = np.array([0.0, 0.64, 1.28])
    chain = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
    pair = np.array([[0, 0, 1.0], [0, 0.05, 1.0]])
    pool = np.concatenate([chain, pair / np.linalg.norm(pair, axis=1, keepdims=True)])
    make_pool(tmp_path / "pool", pool.astype(np.float16))
    make_pool(tmp_path / "test", chain[2:].astype(np.float16))
    content = stage(tmp_path, against=(str(tmp_path / "test"),), relative_threshold=0.75)
    assert open_pool(str(tmp_path / "dedup")).rows.tolist() == [3]
    assert content["counts"] == {
        "pool": 5, "components": 4, "copies removed": 1,
        "representatives removed as like --against": 3}
    lines = (tmp_path / "dedup/copies.txt").read_text().splitlines()
    assert lines == [f"000{i}.png\t--against" for i in range(3)] + ["0004.png\t0003.png"]


def test_everything_of_random_touched_components_goes(tmp_path):
    features = unit_rows(80, 3)
    make_pool(tmp_path / "pool", features)
    references = unit_rows(3, 3, seed=9)
    make_pool(tmp_path / "test", references)
    stage(tmp_path, against=(str(tmp_path / "test"),), relative_threshold=0.88)
    kept = open_pool(str(tmp_path / "dedup")).rows

    # The components by a walk over the graph of the eight nearest, as in the stage.
    products = features.astype(float) @ features.astype(float).T
    np.fill_diagonal(products, -2)
    pairs = {0.88: [], 0.9: []}
    for a in range(80):
        for b in np.argsort(-products[a])[:8]:
            for threshold, found in pairs.items():
                if np.float16(products[a, b]) > np.float16(threshold):
                    found.append((a, int(b)))
    near = (features.astype(float) @ references.astype(float).T) > 0.88
    first = np.array(walk(80, pairs[0.88]))
    touched = set(first[near.any(1)].tolist())
    stays = np.array(walk(80, pairs[0.9])) == np.arange(80)
    expected = [row for row in range(80) if stays[row] and first[row] not in touched]
    assert touched and kept.tolist() == expected
    assert representatives(first, np.array([5])).tolist() in ([5], [])


def test_what_is_refused(tmp_path):
    make_pool(tmp_path / "pool", unit_rows(9, 4))
    make_pool(tmp_path / "other", unit_rows(9, 4), weights="b")
    with pytest.raises(UsageError, match="--against .*another weights"):
        stage(tmp_path, against=(str(tmp_path / "other"),))
    with pytest.raises(UsageError, match="--relative_threshold 0.95: expected at most"):
        stage(tmp_path, against=(str(tmp_path / "pool"),), relative_threshold=0.95)
    stage(tmp_path)
    before = (tmp_path / "dedup/copies.txt").read_text()
    with pytest.raises(UsageError, match="of the 9 images of the pool none is left"):
        stage(tmp_path, against=(str(tmp_path / "pool"),), relative_threshold=0.9)
    assert (tmp_path / "dedup/copies.txt").read_text() == before  # it belongs to the list there
    (tmp_path / "groups.csv").write_text("path,group\n0001.png,a\n")
    with pytest.raises(UsageError, match="--groups .*: 8 of 9 images are not in it"):
        stage(tmp_path, groups=str(tmp_path / "groups.csv"))
    with pytest.raises(UsageError, match="--threshold 2.0: expected at most 1"):
        Config(threshold=2.0).check()
