"""Claims
1. All images are written as they are, in a folder for each class, and the wanted share of them
   gets one copy that an edit has made; groups.csv says which belong together.
2. Images and edits follow from the seed; unknown edits are refused.
3. An image that does not decode is named and left out; names may have any bytes.
"""

import csv

import pytest
import torch
from curation_helpers import CPU

from curation import plant
from curation.plant import Config
from evaluation.copies import EDITS
from evaluation.retrieval import read_groups
from images.data import open_images
from machinery.flags import UsageError


def stage(folder, **flags):
    config = Config(output_dir=str(folder), **flags)
    config.check()
    return plant.run(["shapes:20"], config, CPU)


def rows_of(folder):
    return list(csv.DictReader(open(folder / "groups.csv", newline="")))


def test_planted_copies(tmp_path):
    assert stage(tmp_path / "a", share=0.3) == {"images": 20, "copies": 6}
    world = open_images("shapes:20")
    planted = open_images(f"folder:{tmp_path}/a/images")
    rows = rows_of(tmp_path / "a")
    assert len(planted) == len(rows) == 26 and planted.classes == sorted(world.classes)
    edits = set()
    for row in rows:
        i = int(row["group"])
        image = planted.read(list(planted.names).index(row["path"].removeprefix("images/")))
        expected = EDITS[row["edit"]](world.read(i), i) if row["edit"] else world.read(i)
        assert torch.equal(image, expected)
        edits |= {row["edit"]} - {""}
    assert len(edits) > 3


def test_a_broken_image_and_a_class_of_any_bytes(photos, tmp_path, capsys):
    (photos / "cats/05.png").write_bytes(b"no image")
    (photos / "dogs").rename(photos / "d\udce9gs")
    every = Config(output_dir=str(tmp_path / "every"), share=1)
    assert plant.run([f"folder:{photos}"], every, CPU) == {"images": 23, "copies": 23}
    plant.run([f"folder:{photos}"], Config(output_dir=str(tmp_path / "a"), share=0), CPU)
    printed = capsys.readouterr().out
    assert "left out: cats/05.png" in printed and "plant: 23 images" in printed
    names = [
        str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").glob("images/*/*.png")]
    assert len(set(read_groups(tmp_path / "a/groups.csv", names))) == len(names) == 23


def test_seeds_and_edits(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        stage(tmp_path / name, seed=seed, share=0.5, edits=("blur", "crop 10 %"))
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b") != rows_of(tmp_path / "c")
    assert {row["edit"] for row in rows_of(tmp_path / "a")} == {"", "blur", "crop 10 %"}
    with pytest.raises(UsageError,
                       match="--edits 'crop 15 %': choose from .*did you mean crop"):
        stage(tmp_path / "d", edits=("crop 15 %",))
    with pytest.raises(UsageError, match="--share 1.5: expected from 0 to 1"):
        stage(tmp_path / "d", share=1.5)
    with pytest.raises(UsageError, match="other inputs: seed 0, here 2"):
        stage(tmp_path / "a", seed=2, share=0.5, edits=("blur", "crop 10 %"))
