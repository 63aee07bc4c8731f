"""Claims
1. Images of 16 bits and of any number of channels are read whole; a miss names both numbers.
2. Numbers that are no image are refused: integers of more than 16 bits, which would be black, and
   floats beyond 1. An array whose end is missing is a broken file.
3. A disk that fails for a moment costs no image; one that goes on failing, and a damaged file, do.
"""

import errno

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import images.files
from augment import MultiCrop, channel_stats_of
from images.data import Views, open_images
from images.files import from_array, patiently, read_file


@pytest.mark.parametrize("kind", ["png", "H,W npy", "1,H,W npy", "tif"])
def test_sixteen_bits(kind, tmp_path):
    """All of them for one channel; the upper eight for three."""
    grey = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
    if "npy" in kind:
        np.save(tmp_path / "a.npy", grey if kind[0] == "H" else grey[None])
    else:
        Image.fromarray(grey).save(tmp_path / f"a.{kind}")
    image = open_images(f"folder:{tmp_path}", channel_stats=channel_stats_of(1)).read(0)
    assert image.dtype == torch.float32 and image.shape == (1, 20, 30)
    torch.testing.assert_close(image[0].double() * 65535, torch.from_numpy(grey.astype(float)))
    three = open_images(f"folder:{tmp_path}").read(0)
    assert three.dtype == torch.uint8 and three.shape == (3, 20, 30)
    torch.testing.assert_close(three[1] / 255, image[0], rtol=0, atol=0.5 / 255 + 1e-6)


def test_channels(tmp_path):
    array = np.random.default_rng(0).random((20, 30, 5), dtype=np.float32)
    for name, content in (("a", array), ("b", array.transpose(2, 0, 1)), ("c", array[..., :4])):
        np.save(tmp_path / f"{name}.npy", content)
    images = open_images(f"folder:{tmp_path}", channel_stats=channel_stats_of(5))
    for i in (0, 1):
        np.testing.assert_array_equal(images.read(i).numpy(), array.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="4 channels, expected --in_chans 5"):
        images.read(2)
    with pytest.raises(ValueError, match="--val_data 3 channels, expected --in_chans 2"):
        open_images("shapes:8", flag="--val_data", channel_stats=channel_stats_of(2))
    np.save(tmp_path / "a.npy", array + 7)
    with pytest.raises(ValueError, match="--data values from 7.* expected 0 to 1"):
        open_images(f"folder:{tmp_path}", channel_stats=channel_stats_of(5))
    for no_image in (np.float32(0.5), np.zeros((0, 8, 5), np.float32)):
        np.save(tmp_path / "a.npy", no_image)
        with pytest.raises(ValueError, match="expected an image"):
            open_images(f"folder:{tmp_path}", channel_stats=channel_stats_of(5))
    Image.fromarray((array[..., :4] * 255).astype(np.uint8), "RGBA").save(tmp_path / "d.png")
    images = open_images(f"folder:{tmp_path}",
                         channel_stats=channel_stats_of(4))  # arrays: where nothing else is
    assert images.names == ["d.png"] and images.read(0).shape == (4, 20, 30)
    grey = open_images("shapes:8", channel_stats=channel_stats_of(1)).read(3)
    expected = TF.rgb_to_grayscale(open_images("shapes:8").read(3) / 255)
    torch.testing.assert_close(grey, expected)


def test_more_than_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.full((20, 30), 70_000, dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="values from 1.06813 to 1.06813, expected 0 to 1"):
        open_images(f"folder:{tmp_path}").read(0)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_integers_of_many_bits_are_refused(dtype):
    with pytest.raises(ValueError, match="expected integers of 8 or 16 bits"):
        from_array(np.full((8, 8, 3), 200, dtype), 3)
    assert from_array(np.full((8, 8, 3), 200, np.uint8), 3).max() == 200


def test_a_picture_that_is_too_large(tmp_path, monkeypatch):
    """For Pillow it is an attack; for us it is one file more that cannot be read."""
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="exceeds limit"):
        read_file(tmp_path / "a.png", 3)


def test_an_array_whose_end_is_missing(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 8, 8), np.float32))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-100])
    with pytest.raises(OSError, match="not a readable array"):
        read_file(tmp_path / "a.npy", 5)


# -- 3


@pytest.fixture
def pauses(monkeypatch):
    """The pauses, in seconds, which are not slept."""
    slept = []
    monkeypatch.setattr(images.files.time, "sleep", slept.append)
    return slept


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_a_disk_that_fails_for_a_moment_costs_no_image(number, photos, pauses, monkeypatch):
    found = open_images(f"folder:{photos}")
    expected = found.read(3)
    tries = []

    def fails_twice(file, channels):
        tries.append(file)
        if len(tries) < 3:
            raise OSError(number, "not now")
        return read_file(file, channels)

    monkeypatch.setattr(images.files, "read_file", fails_twice)
    image, broken = Views(found, MultiCrop()).read(epoch=0, index=3)
    assert torch.equal(image, expected) and broken == [] and pauses == [1, 2]


def test_a_disk_that_goes_on_failing(pauses):

    def fails():
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(OSError, match="Stale"):
        patiently(fails)
    assert sum(pauses) == 31


@pytest.mark.parametrize("error", [
    OSError("broken data stream"),
    FileNotFoundError(errno.ENOENT, "No such file"),
    OSError(errno.EINVAL, "Invalid argument"),
    ValueError("2 channels")])
def test_a_damaged_file_is_not_waited_for(error, pauses):

    def fails():
        raise error

    with pytest.raises(type(error)):
        patiently(fails)
    assert not pauses
