"""Claims
1. What is retrieved is the union of the N nearest of each curated image, by a naive search; each
   image once, those above --min_similarity, among the rows that are in.
2. The share of the curated classes is counted by their names.
3. The curated images stand in the list, too, if this is asked for.
4. No --curated, features of another kind, and nothing similar are refused.
"""

import numpy as np
import pytest
from curation_helpers import CPU, make_pool, unit_rows

from curation import clusters, retrieve
from curation.pool import Pool, open_pool
from curation.retrieve import Config
from machinery.flags import UsageError

CLASSES = ["cat", "dog", "owl"]


def pools(tmp_path):
    features = unit_rows(50, 5)
    queries = unit_rows(9, 5, seed=4)
    make_pool(tmp_path / "pool", features, [i % 3 for i in range(50)], CLASSES, broken=[8])
    make_pool(tmp_path / "curated", queries, [i % 2 for i in range(9)], ["owl", "cat"])
    return features.astype(float), queries.astype(float)


def stage(tmp_path, curated="curated", **flags):
    curated = curated and str(tmp_path / curated)
    config = Config(curated=curated, output_dir=str(tmp_path / "out"), queries_at_once=4,
                    **flags)
    config.check()
    return retrieve.run([str(tmp_path / "pool")], config, CPU)


def test_against_a_naive_search(tmp_path):
    features, queries = pools(tmp_path)
    content = stage(tmp_path, n_nearest=3)
    products = queries @ features.T
    products[:, 8] = -2  # it did not decode
    nearest = np.argsort(-products, axis=1)[:, :3]
    expected = sorted(set(nearest.ravel().tolist()))
    assert open_pool(str(tmp_path / "out")).rows.tolist() == expected
    assert content["counts"]["retrieved"] == 27
    assert content["counts"]["retrieved for several queries"] == 27 - len(expected)
    right = np.mean([CLASSES[row % 3] in ("cat", "owl") for row in expected])
    assert content["share of the curated classes"] == pytest.approx(right)


def test_only_what_is_similar(tmp_path):
    features, queries = pools(tmp_path)
    products = queries @ features.T
    products[:, 8] = -2
    limit = float(np.sort(products.ravel())[-6])
    content = stage(tmp_path, n_nearest=40, min_similarity=limit)
    expected = set(np.nonzero(products > limit + 1e-3)[1].tolist())
    rows = set(open_pool(str(tmp_path / "out")).rows.tolist())
    assert expected <= rows and len(rows) <= 6 and content["images"] == len(rows)


def test_the_curated_images_are_listed(tmp_path):
    pools(tmp_path)
    content = stage(tmp_path, with_curated=True)
    lines = (tmp_path / "out/list.txt").read_text().splitlines()
    assert len(lines) == content["images"] == len(open_pool(str(tmp_path / "out")).rows) + 9
    assert lines[-1] == f"{tmp_path}/curated/images/0008.png\towl"


def test_what_cannot_be_listed_is_not_searched(tmp_path, monkeypatch):
    """Drawn images, and those in tar files, are no files that list.txt could name."""
    pools(tmp_path)

    def no_file(pool, row):
        raise UsageError("no files that a list could name")

    monkeypatch.setattr(Pool, "path", no_file)
    monkeypatch.setattr(retrieve, "neighbours", lambda *_: pytest.fail("was searched"))
    monkeypatch.setattr(clusters, "kmeans", lambda *_: pytest.fail("was clustered"))
    with pytest.raises(UsageError, match="no files that a list could name"):
        stage(tmp_path)
    with pytest.raises(UsageError, match="no files that a list could name"):
        config = clusters.Config(n_clusters=2, output_dir=str(tmp_path / "out"))
        clusters.run([str(tmp_path / "pool")], config, CPU)


def test_what_is_refused(tmp_path):
    pools(tmp_path)
    with pytest.raises(UsageError, match="--curated is missing"):
        stage(tmp_path, curated="")
    make_pool(tmp_path / "other", unit_rows(4, 5), weights="b")
    with pytest.raises(UsageError, match="--curated .*another weights"):
        stage(tmp_path, curated="other")
    with pytest.raises(UsageError, match="--min_similarity 1.0: no image of the pool"):
        stage(tmp_path, min_similarity=1.0)
