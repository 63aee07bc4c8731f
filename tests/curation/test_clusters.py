"""Claims
1. k-means equals a plain one in float64; it ends when nothing changes; an empty cluster starts
   anew.
2. The sums are exact: k-means and the sample on two processes are bit for bit those of one, and so
   are those of a stage that was killed after any iteration.
3. Quotas add up to what is wanted, no cluster gives more than it has, and none gives less than
   another one that gave all.
4. A cluster is taken if it holds more than --min_curated curated images; what is drawn from it does
   not depend on which others are taken; without --curated all clusters are.
5. Too many clusters, and clusters without curated images, are refused.
"""

import os

import numpy as np
import pytest
import torch
from conftest import finish, start
from curation_helpers import CPU, make_pool, unit_rows

import curation.clusters
from curation import clusters
from curation.clusters import (FIXED_POINT, Config, even_quotas, kmeans, nearest_centroids,
                               sample_clusters, sums_of_clusters)
from curation.pool import open_pool
from machinery.flags import UsageError
from machinery.process import start_process


def clouds(sizes, width=12, spread=0.1, seed=0):
    """Points around the first axes, float16 of unit length, and the number of their axis."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(sizes)), sizes)
    rng.shuffle(of)
    points = np.eye(width)[of] + spread * rng.normal(size=(len(of), width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16), of


def plain_kmeans(points, first, iterations):
    centroids = points[first].astype(float)
    for _ in range(iterations):
        nearest = (points.astype(float) @ centroids.T).argmax(1)
        centroids = np.stack([
            points[nearest == c].astype(float).mean(0) for c in range(len(first))])
        centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids


def test_against_a_plain_kmeans(tmp_path, monkeypatch):
    monkeypatch.setattr(curation.pieces, "CHUNK", 11)
    points = unit_rows(200, 6)
    pool = make_pool(tmp_path / "pool", points, size=50)
    first = np.random.default_rng(3).choice(pool.rows, 5, replace=False)
    expected = plain_kmeans(points, first, 6)
    (tmp_path / "k").mkdir()
    found = kmeans(tmp_path / "k", pool, 5, 6, 3, CPU)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)  # float32
    (tmp_path / "long").mkdir()
    kmeans(tmp_path / "long", pool, 5, 500, 3, CPU)
    assert len(os.listdir(tmp_path / "long")) < 60  # it has come to its end


def test_sums_are_exact(tmp_path):
    points = unit_rows(100, 5)
    pool = make_pool(tmp_path / "pool", points, broken=[7])
    centroids = torch.from_numpy(unit_rows(4, 5, seed=8)).float()
    sums, counts = sums_of_clusters(pool, centroids, CPU)
    nearest = nearest_centroids(points[pool.rows], centroids).numpy()
    for c in range(4):
        members = points[pool.rows][nearest == c].astype(np.float64)
        exact = (members * FIXED_POINT).sum(0)
        assert (exact == exact.round()).all()  # every float16 is a multiple of 2^-24
        assert np.array_equal(sums[c].numpy(), exact) and counts[c] == len(members)


def test_an_empty_cluster_starts_anew(tmp_path):
    # All points but one are the same, so that at first two of the three centroids are, too.
    points = np.zeros((20, 3), np.float16)
    points[:, 0] = 1
    points[13] = [0, 1, 0]
    pool = make_pool(tmp_path / "pool", points)
    (tmp_path / "k").mkdir()
    centroids = kmeans(tmp_path / "k", pool, 3, 5, 0, CPU)
    assert centroids.isfinite().all()
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(3))


def stage_of_a_rank(rank, folder, name):
    process = start_process("cpu")
    config = Config(curated=f"{folder}/curated", n_clusters=6, per_cluster=9, most=40,
                    iterations=5, output_dir=f"{folder}/{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curation.pieces, "CHUNK", 16)
        patch.setattr(clusters, "ASSIGNED_AT_ONCE", 30)
        clusters.run([f"{folder}/pool"], config, process)


def same_folders(a, b):
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    return files


def test_two_processes_and_kills(tmp_path, monkeypatch):
    make_pool(tmp_path / "pool", unit_rows(150, 6), size=60, broken=[3])
    make_pool(tmp_path / "curated", unit_rows(40, 6, seed=5))
    pair = start(stage_of_a_rank, str(tmp_path), "two")
    stage_of_a_rank(0, str(tmp_path), "one")
    finish(pair)
    files = same_folders(tmp_path / "one", tmp_path / "two")
    assert sum("centroids" in str(file) for file in files) == 5
    assert sum("clusters/0" in str(file) for file in files) == 5

    # In each life one file is written, and before the second the program is killed.
    saves = []
    save = clusters.save_array

    def killed(path, array):
        if saves:
            raise KeyboardInterrupt
        saves.append(path)
        save(path, array)

    for module in (clusters, curation.pieces):
        monkeypatch.setattr(module, "save_array", killed)
    lives = 0
    while True:
        lives += 1
        try:
            stage_of_a_rank(0, str(tmp_path), "killed")
            break
        except KeyboardInterrupt:
            saves.clear()
    assert lives >= 11
    same_folders(tmp_path / "one", tmp_path / "killed")


@pytest.mark.parametrize("seed", range(30))
def test_quotas(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 30, rng.integers(1, 12))
    most = int(rng.integers(0, 200))
    quotas = even_quotas(sizes, most)
    assert quotas.sum() == min(most, sizes.sum()) and (quotas <= sizes).all()
    unfilled = quotas[quotas < sizes]
    if len(unfilled):  # whoever has more to give is at the level, up to one image
        assert unfilled.max() - unfilled.min() <= 1 and quotas.max() <= unfilled.max() + 1


def test_the_example_of_the_quotas():
    assert even_quotas(np.array([10, 2, 90]), 60).tolist() == [10, 2, 48]


def test_which_clusters_are_taken(tmp_path):
    points, of = clouds([60, 40, 8])
    curated, _ = clouds([0, 4, 3], seed=1)  # four in the second cloud, three in the third
    make_pool(tmp_path / "pool", points, of.tolist(), ["a", "b", "c"])
    make_pool(tmp_path / "curated", curated, [0] * 6 + [1], ["b", "d"])

    def stage(name, **flags):
        config = Config(n_clusters=3, seed=2, output_dir=str(tmp_path / name), **flags)
        config.check()
        content = clusters.run([str(tmp_path / "pool")], config, CPU)
        return content, of[open_pool(str(tmp_path / name)).rows]

    taken, kinds = stage("more-than-3", curated=str(tmp_path / "curated"), per_cluster=25)
    assert kinds.tolist() == [1] * 25 and taken["counts"]["clusters taken"] == 1
    assert taken["counts"]["images in them"] == 40
    assert taken["share of the curated classes"] == 1
    both, kinds = stage("more-than-2", curated=str(tmp_path / "curated"), min_curated=2,
                        per_cluster=25, with_curated=True)
    assert np.bincount(kinds).tolist() == [0, 25, 8]
    one = open_pool(str(tmp_path / "more-than-3")).rows
    assert set(one) <= set(open_pool(str(tmp_path / "more-than-2")).rows)
    assert len((tmp_path / "more-than-2/list.txt").read_text().splitlines()) == 33 + 7
    _, kinds = stage("all", most=24)
    assert np.bincount(kinds).tolist() == [8, 8, 8]

    with pytest.raises(
            UsageError, match="--min_curated 9: no cluster holds more than so many "
            "of the 7 curated images .the most is 4"):
        stage("none", curated=str(tmp_path / "curated"), min_curated=9)
    with pytest.raises(UsageError, match="--n_clusters 500: the pool has 108"):
        clusters.run([str(tmp_path / "pool")],
                     Config(n_clusters=500, output_dir=str(tmp_path / "x")), CPU)


def test_clusters_are_made_in_full_precision(tmp_path):
    torch.set_float32_matmul_precision("high")  # as `embed --precision tf32` leaves it
    make_pool(tmp_path / "pool", unit_rows(30, 8))
    clusters.run([str(tmp_path / "pool")], Config(n_clusters=3,
                                                  output_dir=str(tmp_path / "out")), CPU)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_sample_is_of_its_cluster():
    numbers = np.array([2, 0, 1, 2, 2, 0, 2])
    rows = np.arange(7) * 10
    drawn = sample_clusters(rows, numbers, np.array([0, 2]), 2, 100, 0)
    assert len(drawn) == 4 and set(drawn) <= {0, 10, 30, 40, 50, 60} and {10, 50} <= set(drawn)
    assert (np.diff(drawn) > 0).all()
