"""Claims
1. Photographs are files, or some of a folder, spread evenly over it.
2. Every odd image comes through every figure: grey, tiny, wide, turned, transparent, 16 bits.
3. Every network does: one head and twelve, patches of 8, 14 and 16 pixels, registers.
4. A sheet of many photographs has bands of COLUMNS of them, all of one size, none over another.
5. Bad input is one line: no file, a convnet, a place outside the image, a missing block, weights
   that are no numbers.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from backbones.convnet import ConvNet
from figures.inputs import (COLUMNS, Config, about, fit, networks, patch_at, photographs, read,
                            sheet)
from images.files import read_file
from machinery.flags import UsageError
from machinery.page import pyplot
from vit import VisionTransformer

OF_PHOTOS = ["attention", "pca", "similarity", "match"]


@pytest.fixture
def network(tmp_path):
    """Saves a small ViT and returns its file."""

    def save(name="a.pth", **options):
        options = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1) | options
        torch.manual_seed(1)
        torch.save(VisionTransformer(**options).state_dict(), tmp_path / name)
        return str(tmp_path / name)

    return save


def test_photographs_of_a_folder(photos):
    cats = photographs([str(photos / "cats")], 3)
    assert [file.name for file in cats] == ["01.png", "09.jpg", "17.png"]
    both = photographs([str(photos / "cats/01.png"), str(photos)], 2)
    assert [file.parent.name for file in both] == ["cats", "cats", "dogs"]
    (photos / "empty").mkdir()
    with pytest.raises(UsageError, match="no image in this folder"):
        photographs([str(photos / "empty")], 3)


@pytest.mark.parametrize("height, width, side, patch, expected",
                         [(100, 150, 480, 8, (480, 720)), (100, 150, 480, 14, (476, 714)),
                          (1000, 10000, 480, 16, (192, 1920)), (1, 900, 64, 8, (8, 256)),
                          (3, 3, 480, 16, (480, 480)),])
def test_fit(height, width, side, patch, expected):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    assert fit(image, side, patch).shape[1:] == expected


def test_what_the_caption_says_of_the_size(network):
    """A panorama is not as high as other photographs, or its patches would be too many."""
    config = Config(weights=(network(patch_size=14),), image_size=240)
    models = networks(config)
    assert "a shorter side of 238 pixels, less for panoramas" in about(models, config)
    for shape, shorter, longer in (((300, 400), 238, 322), ((200, 2000), 98, 966)):
        image = fit(torch.zeros(3, *shape, dtype=torch.uint8), 240, 14)
        assert image.shape[1:] == (shorter, longer)


def test_patch_at():
    assert patch_at("0.5,0.1", (30, 40)) == (3, 20)
    assert patch_at("0,0", (30, 40)) == (0, 0)
    assert patch_at("1,1", (30, 40)) == (29, 39)
    for bad in ("1.2,0.5", "0.5", "a,b", "0.1,nan", "-0.1,0", "0.1,0.2,0.3"):
        with pytest.raises(UsageError, match="expected X,Y inside the photograph"):
            patch_at(bad, (30, 40))


def odd_image(kind, folder):
    """A file with an image of this kind."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    file = folder / f"{kind}.png"
    if kind == "grey":
        Image.fromarray(noise[..., 0]).save(file)
    elif kind == "one colour":
        Image.fromarray(np.full_like(noise[..., :3], 7)).save(file)
    elif kind == "tiny":
        Image.fromarray(noise[:1, :1, :3]).save(file)
    elif kind == "wide":
        Image.fromarray(noise[:2, :, :3]).save(file)
    elif kind == "turned":
        exif = Image.Exif()
        exif[274] = 6  # the camera was held sideways
        Image.fromarray(noise[..., :3]).save(file, exif=exif)
        assert read_file(file).shape == (3, 40, 30)
    elif kind == "alpha":
        Image.fromarray(noise).save(file)
    elif kind == "16 bits":
        Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(file)
    return str(file)


@pytest.mark.parametrize("kind",
                         ["grey", "one colour", "tiny", "wide", "turned", "alpha", "16 bits"])
def test_odd_images(kind, network, tmp_path):
    file = odd_image(kind, tmp_path)
    other = odd_image("grey", tmp_path)
    for name in OF_PHOTOS:
        out = tmp_path / "out" / f"{name}.png"
        line = [
            name, file, other, "--weights",
            network(), "--image_size", "32", "--output",
            str(out)]
        assert visualize.main(line) == out
        assert read_file(out).float().std() > 5  # not an empty page


@pytest.mark.parametrize("options", [
    dict(),
    dict(embed_dim=768, num_heads=12, depth=1, patch_size=14),
    dict(embed_dim=192, num_heads=3, patch_size=16, num_register_tokens=4, in_chans=1)])
def test_networks(options, network, photos, tmp_path):
    weights = network(**options)
    two = [str(photos / "cats/01.png"), str(photos / "dogs/00.jpg")]
    for name in OF_PHOTOS:
        out = tmp_path / f"{name}.png"
        photographs_of_it = two if name == "match" else two[:1]
        visualize.main([
            name, *photographs_of_it, "--weights", weights, "--image_size", "32", "--output",
            str(out)])
        assert out.stat().st_size > 5_000


def test_an_untrained_network_beside_a_trained_one(network):
    weights = network(num_register_tokens=2)
    models = networks(Config(weights=(weights, "untrained")))
    trained, untrained = models.values()
    assert list(models) == ["a.pth", "untrained"]
    assert untrained.num_register_tokens == 2 and untrained.channel_stats == trained.channel_stats
    assert not torch.equal(untrained.pos_embed, trained.pos_embed)
    with pytest.raises(UsageError, match="name the network first"):
        networks(Config(weights=("untrained",)))


def test_bad_input(network, photos, tmp_path, capsys):
    photo = str(photos / "cats/01.png")
    weights = network()
    convnet = tmp_path / "convnet.pth"
    torch.save(ConvNet("resnet50").state_dict(), convnet)
    lines = {
        "not a readable image": [str(photos / "cats/02.png"), "--weights", weights],
        "give a run": [photo], "a convnet": [photo, "--weights",
                                             str(convnet)],
        "has blocks 0 to 1": [photo, "--weights", weights, "--block", "2"],
        "smaller than one patch": [photo, "--weights", weights, "--image_size", "7"]}
    for words, line in lines.items():
        for name in OF_PHOTOS:
            first = [name, line[0], line[0]] if name == "match" else [name, line[0]]
            with pytest.raises(SystemExit) as stop:
                visualize.main(first + line[1:])
            error = capsys.readouterr().err
            assert stop.value.code == 2 and words in error and error.count("\n") == 1
    for name in ("attention", "similarity"):
        with pytest.raises(SystemExit):
            visualize.main([name, photo, "--weights", weights, "--query", "300,20"])
        assert "--query 300,20: expected X,Y" in capsys.readouterr().err


def test_weights_that_are_no_numbers(network, photos, tmp_path, capsys):
    """Of a run that went wrong: without a word every figure of it would be empty."""
    weights = network()
    state = torch.load(weights)
    state["blocks.1.mlp.fc1.bias"][3] = float("nan")
    torch.save(state, weights)
    photo = str(photos / "cats/01.png")
    words = "1 of 30 tensors have weights that are no numbers, the first blocks.1.mlp.fc1.bias"
    for name in (*OF_PHOTOS, "norms", "video"):
        argument = {"match": [photo, photo], "video": [str(photos / "dogs")]}.get(name, [photo])
        with pytest.raises(SystemExit) as stop:
            visualize.main([
                name, *argument, "--weights", weights, "--output",
                str(tmp_path / f"{name}.gif")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert f"--weights {weights}: {words}" in error
        assert not (tmp_path / f"{name}.gif").exists()


def test_read_names_what_is_near(photos, network):
    model = networks(Config(weights=(network(),)))["a.pth"]
    with pytest.raises(UsageError, match="did you mean .*01.png"):
        read(photos / "cats/001.png", model)


def test_many_photographs_stand_in_bands():
    count = 2 * COLUMNS + 3
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * count
    figure, maps = sheet(images, [Path(f"photo{i}.png") for i in range(count)], 2)
    assert [len(row) for row in maps] == [count, count]
    assert len(figure.axes) == 3 * count
    titles = [axis.get_title() for axis in figure.axes]
    assert [title for title in titles if title] == [f"photo{i}" for i in range(count)]

    boxes = [axis.get_position() for axis in figure.axes]
    assert len({round(box.width, 6) for box in boxes}) == 1
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not overlaps
    # The first map of a band is below the first photograph of it.
    assert maps[0][COLUMNS].get_position().y1 < figure.axes[3 * COLUMNS].get_position().y0
    pyplot().close(figure)


def test_names_of_photographs_do_not_overlap():
    """Upright photographs among others have the narrowest places."""
    images = [torch.zeros(3, 60, 100), torch.zeros(3, 100, 60)] * 3
    files = [Path(f"n0251{i}455_giant_panda_of_{i}.jpg") for i in range(6)]
    figure, _ = sheet(images, files, 1)
    figure.canvas.draw()
    titles = [axis.title for axis in figure.axes if axis.get_title()]
    boxes = sorted((title.get_window_extent() for title in titles), key=lambda box: box.x0)
    assert len(boxes) == 6 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
    assert all(title.get_text().endswith(f"of_{i}") for i, title in enumerate(titles))
    pyplot().close(figure)
