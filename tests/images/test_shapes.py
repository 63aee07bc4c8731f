"""Claims
1. An image is a function of its seed; train and val share none.
2. Mask, depth and image belong together; every kind occurs equally often.
3. Raw pixels, mean colours and colour histograms stay under 50 % k-NN.
4. A video moves smoothly.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation.knn import knn_accuracy
from images.shapes import KINDS, NAMES, Shapes, video


def test_a_function_of_the_seed():
    first, again = Shapes("train", 20), Shapes("train", 20)
    assert all(np.array_equal(x, y) for x, y in zip(first[7], again[7]))
    assert not np.array_equal(first[7][0], Shapes("val", 20)[7][0])
    assert not np.array_equal(first[7][0], Shapes("train", 20, seed=1)[7][0])
    assert len(set(NAMES)) == len(KINDS) == 10
    assert np.bincount(first.labels).tolist() == [2] * 10


def test_image_mask_and_depth_belong_together():
    world = Shapes("train", 30, size=64)
    for i in range(30):
        image, mask, depth = world[i]
        assert image.shape == (3, 64, 64) and image.dtype == np.uint8
        assert mask.shape == depth.shape == (64, 64)
        assert 0.04 < mask.mean() < 0.6
        assert depth[mask].max() < depth[~mask].min()  # things stand before the ground


@pytest.mark.slow
def test_simple_statistics_fail():
    sets = [Shapes("train", 1000), Shapes("val", 200)]
    pixels = [torch.stack([torch.from_numpy(s[i][0]) for i in range(len(s))]) for s in sets]

    def histogram(images):
        bins = (images // 32).long()
        bins = bins[:, 0] * 64 + bins[:, 1] * 8 + bins[:, 2]
        counts = [torch.bincount(b.flatten(), minlength=512).float() for b in bins]
        return torch.stack(counts).sqrt()

    def centred(images):
        return (images.float() / 255 - 0.45) / 0.23

    statistics = {
        "pixels": [F.avg_pool2d(centred(x), 2).flatten(1) for x in pixels],
        "mean colours": [centred(x).mean((2, 3)) for x in pixels],
        "histograms": [histogram(x) for x in pixels]}
    for name, (bank, queries) in statistics.items():
        accuracy = knn_accuracy(bank, sets[0].labels, queries, sets[1].labels, (20,))[20]
        assert 0.1 < accuracy < 0.5, (name, accuracy)


def test_video_moves_smoothly():
    images, masks, _ = video(3, frames=12)
    overlaps = [(a & b).sum() / (a | b).sum() for a, b in zip(masks, masks[1:])]
    assert min(overlaps) > 0.5 and len(images) == 12
    assert (masks[0] & masks[-1]).sum() / (masks[0] | masks[-1]).sum() < 0.8
