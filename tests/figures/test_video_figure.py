"""Claims
1. Frames come one at a time: of a long video only a few are in memory, and none is computed
   twice.
2. The maps are the network's numbers, and a colour means the same in all frames.
3. Three modes: a video, a folder of frames, a folder of finished maps.
4. GIF and APNG can be read by Pillow: all frames, their colours, their speed; MP4 and AVI are
   written and read by PyAV.
5. What cannot be drawn is refused in one line.
"""

import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence
from torchvision.transforms.v2.functional import to_pil_image

from augment import normalise
from backbones.convnet import ConvNet
from backbones.weights import load_backbone
from figures.video import (METHODS, WRITERS, AttentionMaps, Config, Frames, PCAMaps,
                           caption_strip, draw, file_to_write, frames_and_maps, open_frames,
                           pages, side_by_side)
from images.files import read_file
from machinery.flags import UsageError, parse


def noise(seed, height=24, width=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    """frame-1.png to frame-11.png: the order of their names is not that of their numbers."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for t in range(11):
        Image.fromarray(noise(t).permute(1, 2, 0).numpy()).save(frames / f"frame-{t + 1}.png")
    return frames


def shown_by_pillow(path):
    """(pictures (H, W, 3) uint8, milliseconds of each) of an animation."""
    pictures = []
    milliseconds = []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            milliseconds.append(frame.info["duration"])
            pictures.append(
                torch.tensor(list(frame.convert("RGB").tobytes())).view(
                    frame.height, frame.width, 3))
    return pictures, milliseconds


# -- 1


def test_only_a_few_frames_are_in_memory(small_backbone):
    alive = []
    most = []

    def read(step):
        for t in range(0, 60, step):
            frame = noise(t)
            alive.append(weakref.ref(frame))
            most.append(sum(ref() is not None for ref in alive))
            yield frame

    computed = []
    method = AttentionMaps(load_backbone(small_backbone), -1)
    shown = pages(Frames(60, 30, read), method, 24, torch.device("cpu"), "",
                  report=computed.append)
    assert sum(1 for _ in shown) == 60
    assert max(most) <= 4
    assert computed == list(range(1, 61))


# -- 2


def test_maps_are_the_networks_numbers(small_backbone, folder):
    model = load_backbone(small_backbone)
    frames = open_frames(folder, 3)
    with torch.no_grad():
        images = [normalise(noise(t)[None]) for t in range(11)]
        attention = [model.get_class_attention(x, 1)[0].mean(0) for x in images]
        features = [model.forward_features(x)["x_norm_patchtokens"][0] for x in images]

    method = AttentionMaps(model, 1)
    for t, (frame, grid,
            _) in enumerate(frames_and_maps(frames, method, 24, torch.device("cpu"))):
        assert torch.equal(frame, noise(t))
        torch.testing.assert_close(grid, attention[t])
    method = PCAMaps(model, -1)
    for t, (_, grid, _) in enumerate(frames_and_maps(frames, method, 24, torch.device("cpu"))):
        torch.testing.assert_close(grid, features[t].view(3, 5, -1))


@pytest.mark.parametrize("name", METHODS)
def test_a_colour_means_the_same_in_all_frames(name, small_backbone):
    still = Frames(20, 30, lambda step: (noise(t % 3) for t in range(0, 20, step)))
    method = METHODS[name](load_backbone(small_backbone), -1)
    colours = [c for _, _, c in frames_and_maps(still, method, 24, torch.device("cpu"))]
    for t in range(3, 20):
        assert torch.equal(colours[t], colours[t % 3])
    assert not torch.equal(colours[0], colours[1])


def test_directions_are_those_of_the_largest_spread():
    # Features with the spreads 5, 3, 2 and 1 along four axes.
    rows = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    rows = rows * torch.tensor([1.0, 5.0, 2.0, 3.0])
    model = type("Model", (), {"depth": 1})()
    method = PCAMaps(model, -1)
    method.choose_colours([rows.view(40, 50, 4)])
    assert method.directions.abs().argmax(0).tolist() == [1, 3, 2]
    assert (method.directions.amax(0) > 0.9).all()  # each with its largest number positive
    painted = method.paint(rows.view(40, 50, 4)).flatten(0, 1)
    share = (painted == 255).float().mean(0)
    assert (share < 0.03).all() and (share > 0).all()


# -- 3 and 4


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_a_folder_becomes_a_video(kind, small_backbone, folder, tmp_path):
    flags = f"--weights {small_backbone} --device cpu --threshold 0.6 --fps 30"
    config = parse(Config, [*flags.split(), "--output", str(tmp_path / f"v.{kind}")])
    pictures, milliseconds = shown_by_pillow(draw([str(folder)], config))
    assert len(pictures) == 11
    assert pictures[0].shape[1] == 3 * 40 + 2 * 8 and pictures[0].shape[0] % 2 == 0
    assert sum(milliseconds) == pytest.approx(11 * 1000 / 30, abs=6)
    if kind == "png":  # without loss: the left picture is the frame
        for t in range(11):
            assert torch.equal(pictures[t][:24, :40], noise(t).permute(1, 2, 0).long())


def test_a_video_becomes_a_video(small_backbone, tmp_path):
    shown = (noise(t).permute(1, 2, 0) for t in range(4))
    WRITERS["png"](tmp_path / "in.png", shown, 10)
    frames = open_frames(tmp_path / "in.png", 3)
    assert frames.count == 4 and frames.fps == pytest.approx(10)
    assert [torch.equal(f, noise(t)) for t, f in zip((0, 2), frames.read(2))] == [True, True]

    # The speed is that of the video, and the maps are kept as files.
    flags = f"--weights {small_backbone} --device cpu --method pca --maps_dir {tmp_path}/maps"
    config = parse(Config, [*flags.split(), "--output", str(tmp_path / "out.png")])
    pictures, milliseconds = shown_by_pillow(draw([str(tmp_path / "in.png")], config))
    assert milliseconds == [100] * 4
    kept = [read_file(p).permute(1, 2, 0) for p in sorted((tmp_path / "maps").iterdir())]
    assert len(kept) == 4
    for picture, colours in zip(pictures, kept):
        assert torch.equal(picture[:24, 48:], colours.long())

    # Maps of another video are not mixed with these.
    with pytest.raises(UsageError, match="--maps_dir .*/maps: it holds maps already"):
        draw([str(tmp_path / "in.png")], config)

    # Only the video, of these files.
    flags = f"--video_only --fps 5 --output {tmp_path}/only.png"
    pictures, milliseconds = shown_by_pillow(
        draw([str(tmp_path / "maps")], parse(Config, flags.split())))
    assert milliseconds == [200] * 4
    for picture, colours in zip(pictures, kept):
        assert torch.equal(picture, colours.long())


def test_frames_that_cannot_be_read(folder):
    names = sorted(folder.iterdir())
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    with Image.open(names[1]) as frame:
        frame.convert("RGB").save(folder / "x.jpg", exif=exif)
    with pytest.raises(UsageError, match="frames of several sizes"):
        open_frames(folder, 3)
    (folder / "x.jpg").unlink()
    names[1].write_bytes(names[1].read_bytes()[:-40])
    with pytest.raises(UsageError, match=f"{names[1].name}: not a readable frame"):
        list(open_frames(folder, 3).read(1))


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_a_damaged_animation(kind, tmp_path):
    """Pillow raises errors of many kinds, as it comes upon the damage here or there."""
    frames = [to_pil_image(noise(i)) for i in range(3)]
    file = tmp_path / f"a.{kind}"
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=100)
    whole = file.read_bytes()
    refused = 0
    for end in range(1, len(whole), 41):
        file.write_bytes(whole[:end])
        try:
            open_frames(file, 3)
        except UsageError:
            refused += 1
    assert refused > 10


def test_the_speed_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100)
    assert open_frames(tmp_path / "a.webp", 3).fps == 10

    # Frames of different lengths: three of them in a second.
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:],
                   duration=[100, 200, 700])
    assert open_frames(tmp_path / "b.gif", 3).fps == 3


@pytest.mark.parametrize("kind", ["mp4", "avi"])
def test_video_files(kind, tmp_path):
    pytest.importorskip("av")
    # Codecs lose detail, so the frames are of one colour each.
    levels = [20, 120, 220, 60, 160]
    shown = (torch.full((32, 48, 3), level, dtype=torch.uint8) for level in levels)
    WRITERS[kind](tmp_path / f"v.{kind}", shown, 12.5)
    frames = open_frames(tmp_path / f"v.{kind}", 3)
    assert frames.count == 5 and frames.fps == pytest.approx(12.5)
    seen = [int(frame.float().mean()) for frame in frames.read(1)]
    assert seen == pytest.approx(levels, abs=4)
    assert len(list(frames.read(2))) == 3


def test_the_caption_and_even_sides():
    page = side_by_side([torch.zeros(31, 33, 3, dtype=torch.uint8)], "block 12 of 12")
    assert page.shape[0] % 2 == page.shape[1] % 2 == 0
    assert page[:31, :33].max() == 0 and page[31:].min() < 200 and page[:, -1].min() == 255


def test_a_long_caption_below_a_small_video():
    strip = caption_strip("attention of the class token, mean of 2 heads, block 3 of 0 to 3",
                          120)
    assert strip.shape[0] > 3 * 15 and strip.shape[1] == 120
    assert strip[:, :2].min() == strip[:, -2:].min() == 255 and strip.min() < 200


def test_the_ending_decides(tmp_path):
    assert file_to_write(f"{tmp_path}/a.gif", "auto")[1] == "gif"
    assert file_to_write("", "png") == (Path("video.png"), "png")


# -- 5


@pytest.mark.parametrize("line, words", [
    ("EMPTY --weights W", "without frames"), ("NONE --weights W", "no such file"),
    ("ONE --weights W", "one picture and no video"), ("SIZES --weights W", "several sizes"),
    ("BROKEN --weights W", "not a readable frame"), ("FRAMES", "--weights"),
    ("FRAMES --weights C", "a convnet"), ("FRAMES --weights W --block 4", "blocks 0 to 3"),
    ("FRAMES --weights W --threshold 1", "below 1"),
    ("FRAMES --weights W --method pca --threshold .6", "--method pca"),
    ("FRAMES --weights W --video_format png", "ends in .png"), ("A B", "one video, not 2"),
    ("FILE --weights W", "PyAV")])
def test_misuse(line, words, small_backbone, folder, tmp_path, monkeypatch):
    for name in ("empty", "sizes", "broken"):
        (tmp_path / name).mkdir()
    for i in (8, 9):
        Image.new("RGB", (8, i)).save(tmp_path / f"sizes/{i}.png")
    (tmp_path / "broken/1.png").write_bytes(b"x")
    (tmp_path / "v.mp4").write_bytes(b"x")
    if "C" in line.split():
        torch.save(ConvNet("resnet50").state_dict(), tmp_path / "c.pth")
    monkeypatch.setattr("importlib.import_module", lambda name:
                        (_ for _ in ()).throw(ImportError))
    places = {
        "EMPTY": tmp_path / "empty", "NONE": tmp_path / "none", "ONE": folder / "frame-1.png",
        "SIZES": tmp_path / "sizes", "BROKEN": tmp_path / "broken", "FRAMES": folder,
        "FILE": tmp_path / "v.mp4", "W": small_backbone, "C": tmp_path / "c.pth"}
    argv = [str(places.get(word, word)) for word in line.split()]
    arguments = [word for word in argv if not word.startswith("-")]
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    flags = [*argv[first_flag:], "--device", "cpu", "--output", str(tmp_path / "o.gif")]
    with pytest.raises(UsageError, match=words) as error:
        draw(arguments[:first_flag], parse(Config, flags))
    assert "\n" not in str(error.value)
