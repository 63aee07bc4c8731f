"""Claims
1. Objects get the numbers 1, 2, 3, ..., and are written under their own; each is given in the
   first frame that has it.
2. Videos are read in the layouts of DAVIS and of plain folders; a list chooses those of DAVIS.
3. Files that do not fit together, and names without videos, are one line that says which.
"""

import numpy as np
import pytest
import torch
from conftest import write_video
from PIL import Image

from images.videos import first_masks, number_objects, open_videos
from machinery.flags import UsageError

# -- 1


def test_numbers_of_objects():
    of_2016 = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)
    numbers, masks = number_objects({0: of_2016})
    assert numbers.tolist() == [0, 1] and masks[0].tolist() == [[0, 1], [1, 0]]
    of_2017 = torch.tensor([[0, 255], [8, 3]], dtype=torch.uint8)
    numbers, masks = number_objects({0: of_2017 * 0, 4: of_2017, 5: of_2017 // 8 * 8})
    assert numbers.tolist() == [0, 3, 8, 248]
    assert masks[4].tolist() == [[0, 255], [2, 1]]  # 255 is void
    given = first_masks(masks)  # 3 and 8 are new in frame 4, 248 in frame 5
    assert {t: mask.tolist()
            for t, mask in given.items()} == {4: [[0, 0], [2, 1]], 5: [[0, 3], [0, 0]]}


# -- 2


def test_layouts(tmp_path):
    for seed, name in enumerate(("bus", "ant", "car")):
        write_video(tmp_path / "davis/JPEGImages/480p" / name,
                    tmp_path / "davis/Annotations/480p" / name, seed, count=2)
        write_video(tmp_path / name / "images", tmp_path / name / "masks", seed, count=2,
                    masks=[1])
    davis = open_videos(f"davis:{tmp_path}/davis", 96, 3)
    assert [video.name for video in davis] == ["ant", "bus", "car"]
    assert davis[0].annotated == [0, 1] and davis[0].frame_names == ["00000", "00001"]
    (tmp_path / "davis/ImageSets/2017").mkdir(parents=True)
    (tmp_path / "davis/ImageSets/2017/val.txt").write_text("car\nbus\n")
    assert [video.name
            for video in open_videos(f"davis:{tmp_path}/davis", 96, 3)] == ["car", "bus"]

    frames = open_videos(f"frames:{tmp_path}", 96, 1)
    assert [video.name for video in frames] == ["ant", "bus", "car"]
    assert frames[2].annotated == [1] and frames[2].read_frame(1).shape == (1, 45, 60)
    with Image.open(tmp_path / "car/masks/00001.png") as mask:
        assert np.array_equal(frames[2].read_mask(1), mask)


def test_drawn_videos():
    videos = open_videos("shapes:2", 40, 3)
    assert [video.name for video in videos] == ["shapes-0", "shapes-1"]
    assert videos[1].read_frame(3).shape == (3, 40, 40)
    assert videos[1].read_mask(3).unique().tolist() == [0, 1]


# -- 3


def break_data(how, folder):
    first = folder / "masks/00000.png"
    if how == "one frame":
        for path in (folder / "images").glob("0000[1-9].jpg"):
            path.unlink()
    elif how == "other size":
        Image.new("L", (20, 20), 255).save(folder / "masks/00003.png")
    elif how == "other frame":
        Image.new("RGB", (20, 20)).save(folder / "images/00003.jpg")
    elif how == "no object":
        for path in (folder / "masks").iterdir():
            Image.new("L", (60, 45)).save(path)
    elif how == "colours":
        Image.new("RGB", (60, 45)).save(first)
    elif how == "broken":
        first.write_bytes(b"nothing")


@pytest.mark.parametrize("how, words", [
    ("one frame", "images has 1 image, expected at least 2"),
    ("other size", "00003.png has 20 x 20 pixels, but 00000.jpg has 60 x 45"),
    ("other frame", "00003.jpg has 20 x 20 pixels, but 00000.jpg has 60 x 45"),
    ("no object", "no object is marked in 6 masks in"),
    ("colours", "00000.png: a mask is a palette or a grey image"),
    ("broken", "00000.png is no image")])
def test_broken_data(how, words, tmp_path):
    folder = tmp_path / "data/one"
    write_video(folder / "images", folder / "masks")
    break_data(how, folder)
    with pytest.raises((UsageError, ValueError)) as error:
        open_videos(f"frames:{tmp_path}/data", 96, 3)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_frame_that_is_cut_off_is_named(tmp_path):
    folder = tmp_path / "data/one"
    write_video(folder / "images", folder / "masks")
    frame = folder / "images/00002.jpg"
    frame.write_bytes(frame.read_bytes()[:-200])
    video = open_videos(f"frames:{tmp_path}/data", 96, 3)[0]
    assert video.read_frame(1).shape[0] == 3
    with pytest.raises(UsageError, match="00002.jpg does not decode"):
        video.read_frame(2)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    """Names of several lengths: by letters 10 comes before 8, and would be shown first."""
    write_video(tmp_path / "bus/images", tmp_path / "bus/masks", count=3)
    for number, path in zip((8, 9, 10), sorted((tmp_path / "bus/images").iterdir())):
        mask = tmp_path / "bus/masks" / f"{path.stem}.png"
        mask.rename(mask.with_stem(f"f{number}"))
        path.rename(path.with_stem(f"f{number}"))
    (video,) = open_videos(f"frames:{tmp_path}", 96, 3)
    assert video.frame_names == ["f8", "f9", "f10"]


def test_frames_that_are_to_be_turned(tmp_path):
    write_video(tmp_path / "bus/images", tmp_path / "bus/masks")
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    file = tmp_path / "bus/images/00002.jpg"
    with Image.open(file) as image:
        image.save(file, exif=exif)
    with pytest.raises(UsageError, match="00002.jpg is to be turned by its EXIF"):
        open_videos(f"frames:{tmp_path}", 96, 3)


@pytest.mark.parametrize("spec, words", [
    ("frames:EMPTY", "found no videos; expected frames:PATH: PATH/NAME/images/*.jpg"),
    ("davis:/none", "found no videos; expected davis:PATH: PATH/JPEGImages/480p/NAME"),
    ("folder:x", "--data folder:x: choose from shapes, davis, frames"),
    ("shapes:x", "expected a number of videos")])
def test_names_without_videos(spec, words, tmp_path):
    with pytest.raises(UsageError) as error:
        open_videos(spec.replace("EMPTY", str(tmp_path)), 96, 3)
    assert words in str(error.value)
