"""Claims
1. Data sets are found by name, and a miss names the choices.
2. The sampler continues anywhere, and any number of processes sees the same images in order.
3. A batch does not depend on the number of workers.
4. An image that does not decode is replaced by one that follows from the seed, and named.
5. What is held out depends on the name alone.
"""

import numpy as np
import pytest
import torch

from augment import MultiCrop
from data import Images, Sampler, Views, held_out, open_images, training_loader


def test_folder_with_classes(photos):
    images = open_images(f"folder:{photos}")
    assert len(images) == 24 and images.classes == ["cats", "dogs"]
    assert images.read(0).shape[0] == 3 and images.read(0).dtype == torch.uint8
    assert all((images.names[i].startswith("cats")) == (images.labels[i] == 0) for i in range(24))


def test_flat_folder_has_no_labels(photos):
    images = open_images(f"folder:{photos / 'cats'}")
    assert len(images) == 12 and images.labels is None


@pytest.mark.parametrize(
    "spec, words",
    [
        ("folder:/nowhere", "no such folder"),
        ("nothing", "choose from shapes, folder"),
        ("shapes:many", "number of images"),
        ("CIFAR10", "--data_root"),
        ("folder:", "no such folder"),
    ],
)
def test_misses_are_explained(spec, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        open_images(spec, root=str(tmp_path))
    with pytest.raises(ValueError, match="--val_data"):
        open_images(spec, root=str(tmp_path), flag="--val_data")


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="found 0 images"):
        open_images(f"folder:{tmp_path}")


def test_sampler_resumes_and_shards():
    def keys(**how):
        return list(Sampler(50, steps=20, seed=5, **how))

    whole = keys(batch_size=6)
    assert keys(batch_size=6, start=13) == whole[13:]
    halves = [keys(batch_size=3, rank=r, world_size=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == whole
    first_pass = [i for batch in whole[:8] for _, _, i in batch]
    assert len(set(first_pass)) == 48  # nothing twice within a pass
    assert {e for batch in whole for e, _, _ in batch} == {0, 1, 2}
    with pytest.raises(ValueError, match="--batch_size_per_gpu"):
        Sampler(50, 51, 1)


def test_batches_do_not_depend_on_workers(photos):
    images = open_images(f"folder:{photos}")
    views = Views(images, MultiCrop(24, 16, 2, 2), seed=3)
    one, two = (list(training_loader(views, Sampler(24, 8, 4), n)) for n in (0, 2))
    for a, b in zip(one, two, strict=True):
        for key in ("global_crops", "local_crops", "photometry", "index"):
            assert torch.equal(a[key], b[key])


def test_broken_images_are_replaced_and_named(photos):
    (photos / "cats" / "01.png").write_bytes(b"not an image")
    images = open_images(f"folder:{photos}")
    views = Views(images, MultiCrop(24, 16, 2, 0), seed=3)
    bad = images.names.index("cats/01.png")
    sample, again = views[0, 0, bad], views[0, 0, bad]
    assert torch.equal(sample["global_crops"], again["global_crops"])
    assert len(sample["broken"]) == 1 and sample["broken"][0].startswith("cats/01.png")


def test_nothing_but_broken_images_ends():
    def fails(i):
        raise OSError("no")

    views = Views(Images("x", fails, ["a", "b"]), MultiCrop(16, 8, 2, 0))
    with pytest.raises(RuntimeError, match="ten images"):
        views[0, 0, 0]


def test_held_out_share():
    names = [f"{i}.jpg" for i in range(20000)]
    assert abs(np.mean([held_out(n) for n in names]) - 0.05) < 0.005
