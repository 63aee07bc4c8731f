"""Claims
1. A random crop shows image and map at the same place, mirrored together; what is outside of
   the image is the mean colour and has no answer. Crops depend on seed, pass and image alone,
   and two processes share the batches of one.
2. Images are resized in their own shape. Windows cover an image of any size, and what they
   answer is averaged where they overlap.
"""

import itertools

import pytest
import torch

from augment import ChannelStats
from evaluation.dense import (PairCrops, crop_batches, in_windows, over_flips, shape_at,
                              window_starts)
from images.pairs import IGNORE, Pairs
from machinery.process import Process

CPU = torch.device("cpu")


def numbered(i):
    """A pair of 40 x 60 pixels whose map is the red channel: every pixel of a row differs."""
    map = (torch.arange(40)[:, None] + 3 * torch.arange(60) + i) % 251
    image = torch.stack([map, map * 0, map * 0]).byte()
    return image, map


PAIRS = Pairs("numbered", numbered, [f"{i}" for i in range(7)])


def test_crops_of_both():
    crops = PairCrops(PAIRS, 32, (1.25, 1.25), IGNORE)  # 1.25 * 32 pixels: not resized
    mirrored = set()
    for index in range(7):
        image, map = crops[0, 0, index]
        assert image.shape == (3, 32, 32) and map.shape == (32, 32)
        assert torch.equal(image[0].long(), map)
        mirrored.add(bool((map[0, 1] - map[0, 0]) % 251 != 3))
    assert mirrored == {True, False}
    again = PairCrops(PAIRS, 32, (1.25, 1.25), IGNORE)[0, 5, 3]
    assert torch.equal(again[1], crops[0, 0, 3][1])  # whatever the step
    assert not torch.equal(crops[1, 0, 3][1], crops[0, 0, 3][1])


def test_crops_larger_than_the_image():
    pairs = Pairs("numbered", numbered, ["0"], channel_stats=ChannelStats((0.2, 0.4, 0.6),
                                                                          (1.0, 1.0, 1.0)))
    image, map = PairCrops(pairs, 64, (0.5, 0.5), IGNORE)[0, 0, 0]  # 32 x 48 pixels
    inside = map != IGNORE
    assert inside.sum() == 32 * 48
    for channel, mean in zip(image, (51, 102, 153)):
        assert (channel[~inside] == mean).all()


def test_batches_are_shared():
    alone = list(crop_batches(PAIRS, 16, (1, 2), IGNORE, 4, 3, Process(CPU)))
    parts = []
    for rank in (0, 1):
        process = Process(CPU, rank, 2)
        parts.append(list(crop_batches(PAIRS, 16, (1, 2), IGNORE, 4, 3, process)))
    assert len(alone) == 3
    for whole, first, second in zip(alone, *parts):
        for i in (0, 1):  # images, maps
            assert torch.equal(torch.stack([first[i], second[i]], 1).flatten(0, 1), whole[i])


def test_the_shape_is_kept():
    assert shape_at(530, 730, 480) == [480, 661] and shape_at(730, 530, 480) == [661, 480]


@pytest.mark.parametrize("length, window, stride", [(20, 8, 5), (8, 8, 5), (5, 8, 5),
                                                    (9, 8, 8)])
def test_windows_cover(length, window, stride):
    starts = window_starts(length, window, stride)
    covered = {p for s in starts for p in range(s, min(s + window, length))}
    assert covered == set(range(length)) and len(set(starts)) == len(starts)
    assert all(0 <= s <= max(length - window, 0) for s in starts)
    assert all(b - a <= stride for a, b in itertools.pairwise(starts))


def test_answers_of_windows():
    image = torch.randn(1, 2, 21, 34)
    # What depends on the pixel alone is the same in windows.
    torch.testing.assert_close(in_windows(lambda x: x * 2, image, 8, 5), image * 2)
    # What depends on the window is the mean over the windows that hold the pixel.
    means = in_windows(lambda x: x.mean((2, 3), keepdim=True).expand_as(x), image, 16, 10)
    expected = torch.zeros_like(image)
    count = torch.zeros(21, 34)
    for top in (0, 5):
        for left in (0, 10, 18):
            box = (..., slice(top, top + 16), slice(left, left + 16))
            expected[box] += image[box].mean((2, 3), keepdim=True)
            count[box] += 1
    torch.testing.assert_close(means, expected / count)
    # An answer that is the same from both sides is not changed by its mirror image.
    assert torch.equal(over_flips(lambda x: x, image), image)
