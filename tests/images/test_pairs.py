"""Claims
1. A mask's numbers are read as they are, from grey and palette pictures, with one of them
   ignored; depths in metres from pictures and arrays, with 0 where nothing was measured.
2. Folders of pairs are matched by name; the drawn world and torchvision's sets give pairs, too;
   a subset and another drawn size keep image and map together. Pairs that no folder divides are
   divided by their names.
3. What does not fit is refused with one line that names the flag and the file.
"""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from images.data import held_out
from images.pairs import DEPTHS, IGNORE, MASKS, open_pairs, read_depth, read_mask


@pytest.fixture
def folder(tmp_path):
    """Three pairs of 9 x 6 pixels: masks of the classes 0, 1, 2 and 7, depths in millimetres."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks", "depth"):
        (tmp_path / "val" / name).mkdir(parents=True)
    for i in range(3):
        pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"val/images/{i}.jpg")
        mask = rng.choice([0, 1, 2, 7], (6, 9)).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / f"val/masks/{i}.png")
        depth = rng.integers(500, 4000, (6, 9), dtype=np.uint16)
        depth[0, :2] = (0, 65535)
        Image.fromarray(depth).save(tmp_path / f"val/depth/{i}.png")
    (tmp_path / "classes.txt").write_text("road\ncar\nsky\n")
    return tmp_path


def test_files_of_maps(folder, tmp_path):
    numbers = np.array(Image.open(folder / "val/masks/0.png"))
    mask = read_mask(folder / "val/masks/0.png", ignore_label=7)
    assert mask.tolist() == np.where(numbers == 7, IGNORE, numbers.astype(int)).tolist()

    # The colours of a palette are not the classes: the indices are.
    with_palette = Image.fromarray(numbers, mode="P")
    with_palette.putpalette([200, 0, 0, 0, 200, 0] * 128)
    with_palette.save(tmp_path / "palette.png")
    assert torch.equal(read_mask(tmp_path / "palette.png", 7), mask)

    millimetres = np.array(Image.open(folder / "val/depth/0.png")).astype(float)
    depth = read_depth(folder / "val/depth/0.png")
    assert depth.dtype == torch.float32 and depth[0, 0] == 0 and depth[0, 1] == 0
    np.testing.assert_allclose(depth[1:], millimetres[1:] / 1000, rtol=1e-6)
    np.save(tmp_path / "d.npy", np.array([[1.5, np.nan], [np.inf, -1.0]]))
    assert read_depth(tmp_path / "d.npy").tolist() == [[1.5, 0], [0, 0]]
    for number in (65535, 1500):
        np.save(tmp_path / "d.npy", np.array([[number]], np.uint16))
        with pytest.raises(ValueError, match="d.npy: an array of uint16, expected metres in"):
            read_depth(tmp_path / "d.npy")

    # A picture of floats holds metres, too.
    Image.fromarray(np.array([[1.5, np.nan]], np.float32)).save(tmp_path / "d.tif")
    assert read_depth(tmp_path / "d.tif").tolist() == [[1.5, 0]]


def test_lines_of_the_names_of_classes(folder):
    """An empty line would give all later classes the name of the one before."""
    for listed in folder.rglob("classes.txt"):
        listed.unlink()
    listed = folder / "classes.txt"
    listed.write_text("road\n\ncar\n")
    with pytest.raises(ValueError, match="line 2 is empty; expected the name of class 1"):
        open_pairs(MASKS, f"pairs:{folder}:val", read_mask)
    listed.write_text("road\ncar\n\n", encoding="utf-8-sig")
    assert open_pairs(MASKS, f"pairs:{folder}:val", read_mask).classes == ["road", "car"]


def test_depths_have_no_classes(folder):
    """A set may have both kinds of maps, and names of the classes beside them."""
    pairs = open_pairs(DEPTHS, f"pairs:{folder}:val", read_depth)
    assert pairs.classes is None
    assert float(pairs[0][1].max()) > len("abc")  # metres; as a class it would have no name


def test_a_folder(folder):
    pairs = open_pairs(MASKS, f"pairs:{folder}:val", partial(read_mask, ignore_label=7))
    assert len(pairs) == 3 and pairs.classes == ["road", "car", "sky"]
    image, mask = pairs[2]
    assert image.shape == (3, 6, 9) and mask.shape == (6, 9)
    assert torch.equal(pairs.subset([2])[0][1], mask)
    metres = open_pairs(DEPTHS, f"pairs:{folder}/val", read_depth)[1][1]
    assert 0.5 <= metres[metres > 0].min() and metres.max() < 4


def test_pairs_that_no_folder_divides(tmp_path, capsys):
    """Their parts are those that images of the same names have; beside PATH/val all are train."""
    names = [f"{i:03d}" for i in range(60)]
    for name, ending in (("images", "jpg"), ("masks", "png")):
        (tmp_path / name).mkdir()
        for i in names:
            Image.new("L", (4, 4)).save(tmp_path / f"{name}/{i}.{ending}")
    train = open_pairs(MASKS, f"pairs:{tmp_path}:train", read_mask)
    val = open_pairs(MASKS, f"pairs:{tmp_path}:val", read_mask)
    assert val.names == [f"{i}.jpg" for i in names if held_out(f"{i}.jpg")] != []
    assert sorted(train.names + val.names) == [f"{i}.jpg" for i in names]
    assert f"{len(val)} of its 60 pairs, chosen by their names" in capsys.readouterr().out

    (tmp_path / "val").mkdir()
    assert len(open_pairs(MASKS, f"pairs:{tmp_path}:train", read_mask)) == 60


def test_the_drawn_world():
    masks = open_pairs(MASKS, "shapes:12", read_mask)
    depths = open_pairs(DEPTHS, "shapes:12", read_depth)
    for i in (0, 11):
        image, mask = masks[i]
        # Item i is of the kind i % 10, whose class is one more, as 0 is the ground.
        assert set(mask.unique().tolist()) == {0, 1 + i % 10}
        assert torch.equal(image, depths[i][0])
        # The thing is before the ground.
        assert depths[i][1][mask > 0].max() < depths[i][1][mask == 0].min()
    larger = masks.drawn_at(96).subset([3])[0]
    assert larger[0].shape == (3, 96, 96) and larger[1].shape == (96, 96)


def test_sets_of_torchvision(monkeypatch):

    class Set:
        """Stands for a set on disk: one image, whose mask is every number once."""

        def __init__(self, root, download=False, **options):
            self.options = options

        def __len__(self):
            return 1

        def __getitem__(self, i):
            numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
            return Image.new("RGB", (16, 16)), Image.fromarray(numbers)

    expected = {"VOCSegmentation": (20, 0), "OxfordIIITPet": (1, 2), "Cityscapes": (18, 7)}
    for name, (largest, number_of_0) in expected.items():
        cityscapes = torchvision.datasets.Cityscapes.classes
        monkeypatch.setattr(Set, "classes", cityscapes, raising=False)
        monkeypatch.setattr(torchvision.datasets, name, Set)
        _, mask = open_pairs(MASKS, f"{name}:val", read_mask)[0]
        flat = mask.flatten()
        assert flat.max() == largest and flat[number_of_0] == 0 and flat[255] == IGNORE


def test_an_image_that_is_to_be_turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    Image.new("RGB", (9, 6)).save(folder / "val/images/0.jpg", exif=exif)
    pairs = open_pairs(MASKS, f"pairs:{folder}:val", read_mask)
    with pytest.raises(ValueError, match="0.jpg is to be turned by its EXIF .orientation 3."):
        pairs[0]
    exif[0x0112] = 0  # says nothing
    Image.new("RGB", (9, 6)).save(folder / "val/images/0.jpg", exif=exif)
    with pytest.raises(ValueError, match="its mask has the class 7"):  # and not: to be turned
        pairs[0]


def test_misfits(folder):

    def opened(spec, table=MASKS, read=read_mask):
        return open_pairs(table, spec, read, flag="--val_data")

    with pytest.raises(ValueError, match="--val_data 'CIFAR10': this task needs a map"):
        opened("CIFAR10")
    with pytest.raises(ValueError, match=r"--val_data pairs:/nowhere: no .jpg"):
        opened("pairs:/nowhere")
    (folder / "train").mkdir()
    with pytest.raises(ValueError,
                       match="--val_data pairs:.* has train and val in it: give one"):
        opened(f"pairs:{folder}")
    (folder / "train").rmdir()
    with pytest.raises(ValueError, match=r"pairs:.*:train: there is no folder"):
        opened(f"pairs:{folder}:train")  # which has a part called val, and no other images
    with pytest.raises(ValueError,
                       match=r"pairs:.*/val:val: by their names none of its 3 pairs"):
        opened(f"pairs:{folder}/val:val")
    (folder / "val/images/.ipynb_checkpoints").mkdir()
    (folder / "val/images/.ipynb_checkpoints/0.jpg").touch()  # is left out
    with pytest.raises(ValueError, match="0.jpg: its mask has the class 7, and there are 3"):
        opened(f"pairs:{folder}:val")[0]
    shutil.copy(folder / "val/masks/1.png", folder / "val/masks/1.tif")  # two maps of one image
    with pytest.raises(ValueError, match="3 images in .* and 4 maps"):
        opened(f"pairs:{folder}:val")
    (folder / "val/masks/1.tif").unlink()
    (folder / "val/masks/1.png").unlink()
    with pytest.raises(ValueError, match="3 images in .* and 2 maps in .*1.jpg has no map"):
        opened(f"pairs:{folder}:val")

    Image.new("L", (5, 5)).save(folder / "val/masks/1.png")
    with pytest.raises(ValueError, match="1.jpg: an image of 9 x 6 pixels with a map of 5 x 5"):
        opened(f"pairs:{folder}:val")[1]
    (folder / "val/masks/1.png").write_bytes((folder / "val/masks/0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="pairs: 1.jpg does not decode"):
        opened(f"pairs:{folder}:val")[1]
    Image.new("RGB", (9, 6)).save(folder / "val/masks/1.png")
    with pytest.raises(ValueError, match="1.png: a mask in colours"):
        opened(f"pairs:{folder}:val")[1]
