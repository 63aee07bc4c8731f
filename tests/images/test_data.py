"""Claims
1. Data sets are found by name, and a miss names the choices; a new line in DATASETS is a new
   name.
2. The sampler continues anywhere, and any number of processes sees the same images in order.
3. A batch does not depend on the number of workers.
4. An image that does not decode is replaced by one that follows from the seed, and named in one
   line, whatever the error says.
5. What is held out depends on the name alone; --val_share says how much it is.
6. Where a set is not divided, :val are the images that are held out by name and :train all
   others; a folder is divided by its folders train and val. Nothing is held out twice.
7. A folder that is divided has to be told which part is meant.
8. A list of files is a set like any other: its labels, its parts by name, and what cannot be read.
"""

import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import tiny_config

import evaluate
from augment import MultiCrop
from images.data import (DATASETS, Images, Sampler, Views, held_out, open_images, open_shapes,
                         training_loader)
from machinery.flags import UsageError
from train import open_data


def test_folder_with_classes(photos):
    images = open_images(f"folder:{photos}")
    assert len(images) == 24 and images.classes == ["cats", "dogs"]
    assert images.read(0).shape[0] == 3 and images.read(0).dtype == torch.uint8
    for name, label in zip(images.names, images.labels, strict=True):
        assert name.startswith("cats") == (label == 0)


def test_flat_folder_has_no_labels(photos):
    images = open_images(f"folder:{photos / 'cats'}")
    assert len(images) == 12 and images.labels is None


@pytest.mark.parametrize("spec, words", [("folder:/nowhere", "no such folder"),
                                         ("nothing", "choose from shapes, folder"),
                                         ("shapes:many", "number of images"),
                                         ("CIFAR10", "--data_root"),
                                         ("folder:", "no such folder")])
def test_misses_are_explained(spec, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        open_images(spec, root=str(tmp_path))
    with pytest.raises(ValueError, match="--val_data"):
        open_images(spec, root=str(tmp_path), flag="--val_data")


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="found 0 images"):
        open_images(f"folder:{tmp_path}")


def test_a_line_in_datasets_is_a_name_for_data(small_backbone, tmp_path, monkeypatch):
    calls = []

    def open_new(argument, split, root, download, channels):
        calls.append((argument, split, channels))
        return open_shapes(argument, split, root, download, channels)

    with pytest.raises(ValueError, match="choose from shapes, folder, list, shards"):
        open_images("new:12")
    monkeypatch.setitem(DATASETS, "new", open_new)
    assert len(open_images("new:12")) == 12 and calls == [("12", "", 3)]
    flags = f"knn --weights {small_backbone} --data new:20 --val_data new:10:val --nb_knn 5 "
    flags += f"--num_workers 0 --device cpu --output_dir {tmp_path}"
    evaluate.main(flags.split())
    assert calls[1:] == [("20", "", 3), ("10", "val", 3)]
    assert json.loads((tmp_path / "results.json").read_text())["data"] == "new:20"
    with pytest.raises(ValueError, match="choose from shapes, folder, list, shards, new"):
        open_images("nothing")


def test_a_list_of_files(photos, tmp_path):
    whole = open_images(f"folder:{photos}")
    lines = [f"photos/{name}\t{name.split('/')[0]}\n" for name in reversed(list(whole.names))]
    (tmp_path / "list.txt").write_text("".join(lines))
    listed = open_images(f"list:{tmp_path}/list.txt")
    assert len(listed) == 24 and listed.classes == whole.classes
    assert listed.labels == whole.labels[::-1]
    assert torch.equal(listed.read(5), whole.read(18))
    assert listed.root / listed.names[5] == whole.root / whole.names[18]
    part = open_images(f"list:{tmp_path}/list.txt:train")
    assert list(part.names) == [name for name in listed.names if not held_out(name)]
    with pytest.raises(ValueError, match="--val_data list:.*no such file"):
        open_images("list:nothing.txt", flag="--val_data")
    (tmp_path / "list.txt").write_text("photos\n")  # a folder is no image
    with pytest.raises(OSError):
        open_images(f"list:{tmp_path}/list.txt").read(0)


def test_two_classes_of_one_name_are_refused(monkeypatch):

    def open_new(*_):
        return Images("new", None, list("abc"), [0, 1, 2], ["crane", "cat", "crane"])

    monkeypatch.setitem(DATASETS, "new", open_new)
    with pytest.raises(ValueError, match="--val_data new has two classes called crane"):
        open_images("new", flag="--val_data")


def test_sampler_resumes_and_shards():

    def keys(**how):
        return list(Sampler(50, steps=20, seed=5, **how))

    whole = keys(batch_size=6)
    assert keys(batch_size=6, start=13) == whole[13:]
    halves = [keys(batch_size=3, rank=r, world_size=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == whole
    first_pass = [i for batch in whole[:8] for _, _, i in batch]
    assert len(set(first_pass)) == 48  # nothing twice within a pass
    assert {epoch for batch in whole for epoch, _, _ in batch} == {0, 1, 2}
    with pytest.raises(ValueError, match="--batch_size_per_gpu"):
        Sampler(50, 51, 1)


def test_batches_do_not_depend_on_workers(photos):
    images = open_images(f"folder:{photos}")
    views = Views(images, MultiCrop(24, 16, 2, 2), seed=3)
    alone, by_workers = (list(training_loader(views, Sampler(24, 8, 4), n)) for n in (0, 2))
    for a, b in zip(alone, by_workers, strict=True):
        for key in ("global_crops", "local_crops", "photometry", "index"):
            assert torch.equal(a[key], b[key])


def test_broken_images_are_replaced_and_named(photos):
    (photos / "cats" / "01.png").write_bytes(b"not an image")
    images = open_images(f"folder:{photos}")
    views = Views(images, MultiCrop(24, 16, 2, 0), seed=3)
    broken = images.names.index("cats/01.png")
    sample, again = views[0, 0, broken], views[0, 0, broken]
    assert torch.equal(sample["global_crops"], again["global_crops"])
    assert sample["broken"] == [
        f"cats/01.png: {photos}/cats/01.png is no image that Pillow can read"]


@pytest.mark.parametrize("error, words", [(OSError(), "OSError"),
                                          (ValueError("\n"), "ValueError"),
                                          (OSError("cut off\nat byte 7"), "cut off")])
def test_an_error_of_any_message_is_one_line(error, words):

    def read(i):
        if i == 0:
            raise error
        return torch.zeros(3, 20, 20, dtype=torch.uint8)

    views = Views(Images("x", read, [f"{i}.png" for i in range(9)]), MultiCrop(16, 8, 2, 0))
    assert views[0, 0, 0]["broken"] == [f"0.png: {words}"]


def test_nothing_but_broken_images_ends():

    def fails(i):
        raise OSError("no")

    views = Views(Images("x", fails, ["a", "b"]), MultiCrop(16, 8, 2, 0))
    with pytest.raises(UsageError, match="--data: ten images"):
        views[0, 0, 0]


def test_held_out_share():
    names = [f"{i}.jpg" for i in range(20000)]
    assert abs(np.mean([held_out(n) for n in names]) - 0.05) < 0.005


@pytest.fixture
def many(tmp_path):
    """100 images in two folders, most of which are no images."""
    for i in range(100):
        file = tmp_path / "many" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "many"


def names_of(name):
    return set(open_images(name).names)


def test_a_folder_without_parts_is_divided_by_names(many, capsys):
    everything = names_of(f"folder:{many}")
    assert len(everything) == 100 and not capsys.readouterr().out
    val = names_of(f"folder:{many}:val")
    assert val == {name for name in everything if held_out(name)} and 0 < len(val) < 20
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"these are {len(val)} of its 100 images" in said
    assert names_of(f"folder:{many}:train") == everything - val
    with tarfile.open(many / "x.tar", "w") as tar:
        tar.add(many / "a", "a")
        tar.add(many / "b", "b")
    shards = f"shards:{many}/x.tar"
    train, val = names_of(f"{shards}:train"), names_of(f"{shards}:val")
    assert val and not train & val and train | val == names_of(shards)
    with pytest.raises(ValueError,
                       match="--data folder:.*:val: by their names none of its 1 im"):
        (many / "one").mkdir()
        (many / "one/1.png").touch()
        open_images(f"folder:{many}/one:val")


def test_the_main_process_says_how_a_set_is_divided(many, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    open_images(f"folder:{many}:val")
    assert not capsys.readouterr().out


def test_folders_train_and_val(many, capsys):
    (many / "a").rename(many / "train")
    with pytest.raises(ValueError,
                       match="--data .* has train, and no val: give one, as in folder"):
        open_images(f"folder:{many}:val")
    (many / "b").rename(many / "val")
    assert names_of(f"folder:{many}:val") == {f"{i}.png" for i in range(1, 100, 2)}
    assert names_of(f"folder:{many}:train") == {f"{i}.png" for i in range(0, 100, 2)}
    with pytest.raises(ValueError, match="has train and val: give one, as in folder:.*:train"):
        open_images(f"folder:{many}")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("data, val_data", [("", ""), ("", ":val"), ("/", ":val"),
                                            (":train", ":val"), ("", "/:val"),
                                            ("/../many", ":val")])
def test_no_run_learns_from_what_it_is_judged_with(data, val_data, many, tmp_path):
    """Whether a run holds images out itself or is given a part of the same folder."""
    folder = f"folder:{many}"
    flags = ["--data", folder + data, "--val_data", val_data and folder + val_data]
    learned, judged = open_data(tiny_config(tmp_path, *flags))
    assert set(judged.names) == names_of(f"{folder}:val")
    assert set(learned.names) == names_of(f"{folder}:train")


@pytest.mark.parametrize("share", [0, 0.05, 0.15, 0.4, 0.5, 0.95])
def test_the_share_that_is_held_out(share, many, tmp_path):
    flags = ["--data", f"folder:{many}", "--val_data", "", "--val_share", str(share)]
    learned, judged = open_data(tiny_config(tmp_path, *flags))
    assert set(learned.names) ^ set(judged.names) == names_of(f"folder:{many}")
    names = [f"{i}.jpg" for i in range(20_000)]
    assert abs(np.mean([held_out(name, share) for name in names]) - share) < 0.01


def test_nothing_is_held_out_twice(many, tmp_path):
    flags = ["--data", f"folder:{many}:train", "--val_data", ""]
    learned, judged = open_data(tiny_config(tmp_path, *flags))
    assert set(learned.names) == names_of(f"folder:{many}:train") and not len(judged)


def test_a_drawn_image_can_be_drawn_larger(photos):
    world = open_images("shapes:10:val")
    part = world.subset([3, 7])
    large = part.read_at(1, 96)
    assert large.shape == (3, 96, 96) and torch.equal(large, world.read_at(7, 96))
    assert torch.equal(part.read_at(1, 64),
                       part.read(1))  # at its own size it is the same picture
    files = open_images(f"folder:{photos}")
    assert torch.equal(files.read_at(0, 96), files.read(0))  # a file is what it is
