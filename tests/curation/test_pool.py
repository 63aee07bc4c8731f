"""Claims
1. A stage leaves rows, a list that can be trained on, and what it did; the next one takes them up,
   also when all folders have been moved. A file of both sets is listed once.
2. A stage that has not finished, also one that was killed when it was repeated in its folder, one
   that was built on something that has changed since, features of other weights, a missing file
   of features, an empty result, and images that are no files are refused in one line.
"""

import json

import numpy as np
import pytest
from curation_helpers import CPU, make_pool, unit_rows

import curation.pool
from curation.pool import finish, open_pool, same_embedding, write_list
from images.data import open_images
from images.names import read_list
from machinery.flags import UsageError


def staged(tmp_path, rows=(0, 2, 5), **values):
    pool = make_pool(tmp_path / "embed", unit_rows(10, 4), [i % 2 for i in range(10)],
                     ["cat", "dog"], **values)
    (tmp_path / "next").mkdir()
    finish(tmp_path / "next", "dedup", pool, np.array(rows), {"threshold": 0.5}, CPU)
    return pool


def test_what_a_stage_leaves(tmp_path):
    staged(tmp_path)
    (tmp_path / "embed/images").mkdir()
    (tmp_path / "embed/images/0000.png").touch()
    names, labels, classes = read_list(tmp_path / "next/list.txt")
    assert names == [f"{tmp_path}/embed/images/000{i}.png" for i in (0, 2, 5)]
    assert labels == [0, 0, 1] and classes == ["cat", "dog"]
    (tmp_path / "moved").mkdir()
    for name in ("embed", "next"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    pool = open_pool(str(tmp_path / "moved/next"))
    assert pool.rows.tolist() == [0, 2, 5] and len(pool.features) == 10
    assert [facts["stage"] for _, facts in pool.history] == ["embed", "dedup"]
    assert pool.label(5) == "dog" and np.array_equal(pool.features[pool.rows],
                                                     unit_rows(10, 4)[[0, 2, 5]])


def test_labels_of_two_pools_in_one_list(tmp_path):
    pool = staged(tmp_path)
    bare = make_pool(tmp_path / "bare", unit_rows(3, 4), broken=[1])
    assert bare.rows.tolist() == [0, 2]
    write_list(tmp_path / "list.txt", pool, np.array([1]), bare)
    lines = (tmp_path / "list.txt").read_text().splitlines()
    assert [line[-8:] for line in lines] == ["0001.png", "0000.png", "0002.png"]  # no labels
    write_list(tmp_path / "list.txt", pool, np.array([1]), pool)
    assert (tmp_path / "list.txt").read_text().count("\t") == 10


def test_an_image_of_both_sets_is_listed_once(tmp_path):
    """The number that is noted is that of the lines, with the curated images."""
    pool = staged(tmp_path)
    other = make_pool(tmp_path / "other", unit_rows(3, 4))
    other.images.root = pool.images.root  # 0000.png to 0002.png are in the pool, too
    rows = np.array([0, 2, 5])
    content = finish(tmp_path / "next", "retrieve", pool, rows, {}, CPU, other)
    lines = (tmp_path / "next/list.txt").read_text().splitlines()
    assert [line[-8:] for line in lines] == ["0000.png", "0002.png", "0005.png", "0001.png"]
    assert content["images"] == 4
    assert json.loads((tmp_path / "next/stage.json").read_text()) == content


def test_what_is_refused(tmp_path):
    pool = staged(tmp_path)
    with pytest.raises(UsageError, match="none is left"):
        finish(tmp_path / "next", "dedup", pool, np.empty(0, int), {}, CPU)
    with pytest.raises(UsageError,
                       match="--curated .*/nothing: expected the folder of a stage"):
        open_pool(str(tmp_path / "nothing"), "--curated")
    other = make_pool(tmp_path / "other", unit_rows(3, 4), weights="b")
    with pytest.raises(UsageError, match="another weights .b, those of the pool a."):
        same_embedding(pool, other, "--curated")

    content = json.loads((tmp_path / "embed/stage.json").read_text())
    (tmp_path / "embed/stage.json").write_text(json.dumps(content | {"data": "else"}))
    with pytest.raises(UsageError, match="embed has been made anew since next was; run dedup"):
        open_pool(str(tmp_path / "next"))
    (tmp_path / "embed/stage.json").unlink()
    with pytest.raises(UsageError, match="expected the folder of a stage"):  # no stage's folder
        open_pool(str(tmp_path / "embed"))
    (tmp_path / "embed/inputs.json").write_text("{}")
    with pytest.raises(UsageError, match="has not finished: start it again"):
        open_pool(str(tmp_path / "embed"))


@pytest.mark.parametrize("lost", range(3))
def test_a_missing_file_of_features_is_refused(lost, tmp_path):
    """Without it the rows of the files behind it would be taken for those of other images."""
    staged(tmp_path, size=4, broken=[1])
    file = tmp_path / f"embed/features/00000{lost}.npy"
    file.unlink()
    with pytest.raises(UsageError, match=f"--against .*next: expected 3 .*{file} is missing"):
        open_pool(str(tmp_path / "next"), "--against")


def test_images_that_are_no_files(tmp_path):
    pool = staged(tmp_path)
    pool.images = open_images("shapes:10")
    with pytest.raises(UsageError, match="no files that a list could name; .*plant --share 0"):
        pool.path(0)


def test_a_repetition_that_was_killed_is_no_result(tmp_path, monkeypatch):
    """Its first files are new and its last ones old: together they are nobody's result."""
    pool = staged(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(curation.pool, "write_list", killed)
        finish(tmp_path / "next", "dedup", pool, np.array([1]), {"threshold": 0.3}, CPU)
    with pytest.raises(UsageError, match="expected the folder of a stage|has not finished"):
        open_pool(str(tmp_path / "next"))
    finish(tmp_path / "next", "dedup", pool, np.array([1]), {"threshold": 0.3}, CPU)
    assert open_pool(str(tmp_path / "next")).rows.tolist() == [1]
