"""Claims
1. Features are those of the network, of unit length, for both descriptors, in pieces of any size.
2. An image that does not decode is named and left out, and the others are not changed by it; where
   none decodes this is said.
3. A whitening is learned once and taken over by --axes_of, and then features can be compared.
4. The PCA hash has signs along the axes of the largest spread; a copy that is smaller, brighter or
   compressed has nearly the same hash, other pictures have another one.
5. The work goes on after a kill with the same bits; other flags in the same folder are refused.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curation_helpers import CPU

import curation.pieces
from augment import center_crop, normalise
from backbones.weights import load_backbone
from curation import embed
from curation.embed import HASH, HASH_BITS, Config, Thumbnail, learned_axes, on_axes
from curation.pool import open_pool, same_embedding
from evaluation.copies import EDITS
from images.data import open_images
from machinery.flags import UsageError


def stage(data, folder, weights, **flags):
    config = Config(weights=weights, output_dir=str(folder), num_workers=0, device="cpu",
                    precision="fp32", **flags)
    config.check()
    return embed.run([data], config, CPU)


def test_features_of_a_network(small_backbone, photos, tmp_path):
    facts = stage(f"folder:{photos}", tmp_path / "a", small_backbone, shard_size=10)
    pool = open_pool(str(tmp_path / "a"))
    assert facts["images"] == 24 and len(pool.features.files) == 3 and pool.features.width == 64
    images = open_images(f"folder:{photos}")
    crops = torch.stack([center_crop(images.read(i), 16) for i in range(24)])
    with torch.no_grad():
        expected = F.normalize(load_backbone(small_backbone)(normalise(crops)), dim=1)
    found = torch.from_numpy(pool.features[np.arange(24)]).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # kept as float16
    assert pool.images.classes == ["cats", "dogs"] and pool.images.labels == images.labels
    assert torch.equal(pool.images.read(5), images.read(5))
    copy = stage(f"folder:{photos}", tmp_path / "b", small_backbone, descriptor="copy")
    assert copy["width"] == 128


def test_broken_images(small_backbone, photos, tmp_path, capsys):
    stage(f"folder:{photos}", tmp_path / "fine", small_backbone)
    (photos / "cats/05.png").write_bytes(b"no image")
    facts = stage(f"folder:{photos}", tmp_path / "a", small_backbone, batch_size=6)
    printed = capsys.readouterr().out
    assert printed.count("left out, because it does not decode: cats/05.png: ") == 1
    assert facts["broken"] == 1 and facts["images"] == 23
    pool, fine = open_pool(str(tmp_path / "a")), open_pool(str(tmp_path / "fine"))
    row = list(pool.images.names).index("cats/05.png")
    assert pool.rows.tolist() == [i for i in range(24) if i != row]
    np.testing.assert_allclose(pool.features[pool.rows].astype(float),
                               fine.features[pool.rows].astype(float), atol=1e-3)
    for file in photos.rglob("*.*g"):
        file.write_bytes(b"no image")
    for weights, flags in ((small_backbone, {}), (HASH, {}), (small_backbone, {"whiten": True
                                                                               })):
        with pytest.raises(UsageError, match="none of its .*images decodes"):
            stage(f"folder:{photos}", tmp_path / f"{weights[-4:]}{len(flags)}", weights,
                  **flags)


def test_a_whitening_is_taken_over(small_backbone, photos, tmp_path):
    data = f"folder:{photos}"
    stage(data, tmp_path / "a", small_backbone, whiten=True)
    stage(data, tmp_path / "b", small_backbone, axes_of=str(tmp_path / "a"))
    stage(data, tmp_path / "plain", small_backbone)
    a, b, plain = (open_pool(str(tmp_path / name)) for name in ("a", "b", "plain"))
    same_embedding(a, b, "--curated")
    assert np.array_equal(a.features[a.rows], b.features[b.rows])
    with pytest.raises(UsageError, match="--curated .*another axes.*--axes_of"):
        same_embedding(a, plain, "--curated")
    with pytest.raises(UsageError, match="--axes_of .*plain: there is no"):
        stage(data, tmp_path / "c", small_backbone, axes_of=str(tmp_path / "plain"))
    with pytest.raises(UsageError,
                       match="--axes_of .*/a: .* another descriptor .class, here copy"):
        stage(data, tmp_path / "c", small_backbone, axes_of=str(tmp_path / "a"),
              descriptor="copy")
    (tmp_path / "a/stage.json").unlink()
    with pytest.raises(UsageError,
                       match="--axes_of .*/a: that pool is not embedded to its end"):
        stage(data, tmp_path / "c", small_backbone, axes_of=str(tmp_path / "a"))


def test_another_network_of_the_same_weights(small_backbone, photos, tmp_path):
    stage(f"folder:{photos}", tmp_path / "a", small_backbone)
    with pytest.raises(UsageError, match="other inputs: network"):
        stage(f"folder:{photos}", tmp_path / "a", small_backbone, num_heads=2)


def test_axes_are_those_of_the_largest_spread():
    rng = np.random.default_rng(0)
    sample = torch.from_numpy(rng.normal(size=(500, 80)) * np.linspace(0.1, 5, 80) + 3)
    axes = learned_axes(sample, binary=True)
    assert axes.shape == (80, 1 + HASH_BITS)
    torch.testing.assert_close(axes[:, 0], sample.mean(0))
    _, _, expected = torch.linalg.svd(sample - sample.mean(0), full_matrices=False)
    agreement = (axes[:, 1:] * expected[:HASH_BITS].T).sum(0).abs()
    torch.testing.assert_close(agreement, torch.ones_like(agreement))
    bits = on_axes(sample.float(), axes, True)
    signs = torch.where((sample - axes[:, 0]) @ axes[:, 1:] > 0, 1.0, -1.0)
    assert torch.equal(bits * 8, signs.float())
    assert not on_axes(torch.zeros(1, 80), axes, True).any()  # a broken image


def test_the_hash_of_copies_and_of_others():
    images = open_images("shapes:300")
    thumbnail = Thumbnail()

    def numbers(pictures):
        small = torch.stack([embed.squash(p, embed.HASH_PIXELS) for p in pictures])
        return thumbnail(normalise(small))

    originals = [images.read(i) for i in range(300)]
    axes = learned_axes(numbers(originals), binary=True)
    hashes = on_axes(numbers(originals), axes, True)
    others = hashes @ hashes.T - 3 * torch.eye(300)
    assert others.max() < 0.75
    for edit in ("jpeg 30", "jpeg 75"):
        copies = on_axes(numbers([EDITS[edit](p, 0) for p in originals]), axes, True)
        assert (hashes * copies).sum(1).mean() > 0.9
    brighter = [(p * 0.7 + 60).byte() for p in originals]
    assert (hashes * on_axes(numbers(brighter), axes, True)).sum(1).mean() > 0.9

    # A pool of a few images has few directions that can be told from chance.
    few = originals[:30]
    axes = learned_axes(numbers(few), binary=True)
    hashes = on_axes(numbers(few), axes, True)
    copies = on_axes(numbers([EDITS["jpeg 75"](p, 0) for p in few]), axes, True)
    assert (hashes * copies).sum(1).mean() > 0.95
    assert (hashes @ hashes.T - 3 * torch.eye(30)).max() < 0.95


def test_killed_and_started_again(small_backbone, photos, tmp_path, monkeypatch):
    flags = dict(weights=small_backbone, shard_size=5, whiten=True)
    data = f"folder:{photos}"
    stage(data, tmp_path / "whole", **flags)
    written = []
    save = curation.pieces.save_array

    def killed_at_the_second(path, array):
        if len(written) == 2:
            written.clear()
            raise KeyboardInterrupt
        written.append(path)
        save(path, array)

    monkeypatch.setattr(curation.pieces, "save_array", killed_at_the_second)
    for attempt in range(9):
        try:
            stage(data, tmp_path / "killed", **flags)
            break
        except KeyboardInterrupt:
            written.clear()
    assert attempt == 2  # five pieces, two for each life
    for file in sorted((tmp_path / "whole").rglob("*")):
        if file.is_file():
            other = tmp_path / "killed" / file.relative_to(tmp_path / "whole")
            assert file.read_bytes() == other.read_bytes(), file
    with pytest.raises(UsageError, match="other inputs: whiten True, here False"):
        stage(data, tmp_path / "killed", small_backbone, shard_size=5)


def test_what_a_set_without_files_leaves(small_backbone, tmp_path):
    stage("shapes:6", tmp_path / "a", small_backbone)
    pool = open_pool(str(tmp_path / "a"))
    assert pool.images.root is None and len(pool.images) == 6
    assert json.loads((tmp_path / "a/stage.json").read_text())["root"] == ""
    with pytest.raises(ValueError, match="DATA folder:.*found 0 images"):
        (tmp_path / "empty").mkdir()
        stage(f"folder:{tmp_path}/empty", tmp_path / "b", small_backbone)


def test_an_image_that_is_the_mean_is_no_broken_one(small_backbone, photos, tmp_path):
    """Whitening leaves nothing of it; a row of zeros would say that it does not decode."""
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(sorted(photos.rglob("*.jpg"))[0], one)
    content = stage(f"folder:{one}", tmp_path / "pool", small_backbone, whiten=True)
    assert content["images"] == 1 and content["broken"] == 0


def test_an_image_of_one_colour_is_no_broken_one():
    grey = torch.full((1, 3, 16, 16), 0.4)
    numbers = Thumbnail()(torch.cat([grey, grey + 0.3, torch.rand(1, 3, 16, 16)]))
    assert (numbers != 0).any(1).all() and torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers[0], numbers[2])
