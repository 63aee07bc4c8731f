"""Claims
1. The neighbours are those of a table of all cosines; the query itself is none of them. There are
   k of them also where the bank holds copies of the query.
2. Right and wrong follow from the labels, which photos have where their folder is a class.
3. The page has a row for each query, for photos and for sets by name.
4. What cannot be drawn is refused in one line.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F

from augment import center_crop, normalise
from backbones.weights import load_backbone
from figures.neighbours import (RIGHT, WRONG, Config, draw, draw_neighbours, nearest,
                                open_queries)
from images.data import open_images
from images.files import read_file
from machinery.flags import UsageError, parse
from machinery.page import pyplot


def test_neighbours_equal_a_table_of_cosines(photos, small_backbone):
    model = load_backbone(small_backbone)
    bank = open_images(f"folder:{photos}")
    crops = torch.stack([center_crop(bank.read(i), 16) for i in range(24)])
    with torch.no_grad():
        features = model(normalise(crops))
    queries = bank.subset([3, 20])
    found = nearest(features[[3, 20]], features, queries, bank, 4)

    cosines = F.cosine_similarity(features[:, None], features[None], dim=-1)
    for query, neighbours in zip((3, 20), found):
        others = [i for i in cosines[query].argsort(descending=True).tolist() if i != query]
        assert [n.row for n in neighbours] == others[:4]
        for n in neighbours:
            assert n.cosine == pytest.approx(float(cosines[query, n.row]), abs=1e-5)
            assert n.right == (bank.labels[n.row] == bank.labels[query])


def test_copies_of_the_query_are_neighbours(photos):
    """The query is one of three equal images: the two others are shown, and then what is next."""
    folder = open_images(f"folder:{photos}")
    bank = folder.subset([3, 3, 3, 7, 11, 15])
    features = torch.eye(8)[[0, 0, 0, 1, 2, 3]] + 0.1
    features[3, 0] += 0.5
    [found] = nearest(features[:1], features, bank.subset([0]), bank, 3)
    assert [n.cosine > 0.999 for n in found] == [True, True, False]
    assert len({n.row for n in found}) == 3 and found[2].row == 3


def test_photos_have_the_label_of_their_folder(photos, tmp_path):
    bank = open_images(f"folder:{photos}")
    files = sorted(str(p) for p in photos.rglob("*0*"))
    queries = open_queries(files[:2], bank, Config())
    assert [bank.classes[label] for label in queries.labels] == ["cats", "cats"]
    assert torch.equal(queries.read(0), read_file(photos / files[0]))
    shutil.copy(files[0], tmp_path / "x.jpg")
    assert open_queries([str(tmp_path / "x.jpg")], bank, Config()).labels is None


def test_the_page(photos, small_backbone):
    bank = open_images(f"folder:{photos}")
    features = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    queries = bank.subset([0, 5, 9])
    found = nearest(features[[0, 5, 9]], features, queries, bank, 6)
    fig = draw_neighbours(queries, bank, found)
    assert len(fig.axes) == 3 * 7
    for i, neighbours in enumerate(found):
        for axis, n in zip(fig.axes[7 * i + 1:], neighbours):
            assert axis.get_title()[0] == ("✓" if n.right else "✗")
            assert axis.title.get_color() == (RIGHT if n.right else WRONG)
    pyplot().close(fig)


@pytest.mark.parametrize("words", ["shapes:30:val --data shapes:20", "PHOTO --data FOLDER"])
def test_a_page_of_photos_or_of_a_set(words, photos, small_backbone, tmp_path):
    words = words.replace("PHOTO",
                          str(photos / "cats/01.png")).replace("FOLDER", f"folder:{photos}")
    queries, *flags = words.split()
    flags += f"--weights {small_backbone} --device cpu --num_workers 0 --k 3".split()
    config = parse(Config, [*flags, "--queries", "2", "--output", str(tmp_path / "n.png")])
    assert draw([queries], config).stat().st_size > 5000


@pytest.mark.parametrize("queries, flags, words", [
    (["/none.jpg"], "", "no such file"), (["shapes:9:val"], "--k 0", "--k"),
    (["folder:/none"], "", "QUERIES folder:/none: there is no such")])
def test_misuse(queries, flags, words, small_backbone):
    flags = f"--data shapes:20 --weights {small_backbone} --device cpu {flags}"
    with pytest.raises((ValueError, UsageError), match=words) as error:
        draw(queries, parse(Config, flags.split()))
    assert "\n" not in str(error.value)


def test_a_broken_photo_is_one_line(small_backbone, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"x")
    flags = f"--data shapes:20 --weights {small_backbone} --device cpu --num_workers 0"
    with pytest.raises(ValueError, match="x.jpg is no image that Pillow can read; mend this"):
        draw([str(tmp_path / "x.jpg")], parse(Config, flags.split()))
