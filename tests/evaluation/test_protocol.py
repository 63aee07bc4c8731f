"""Claims
1. Random crops of all processes together are those of one process; neighbours that belong
   together stay together. They are torchvision's RandomResizedCrop, bicubic.
2. A broken image among those to learn from is named, not replaced.
3. Kept features are used again; those of another network, of other images (also under the same
   names) or of another size, those that are no numbers, and files of anything else are refused.
4. The protocol says at which size a network is judged, unless it was trained at a smaller one;
   --image_size says otherwise.
5. The student of a training can be judged in the place of its teacher: of a run of ours, and of
   a file with both.
6. A file of --class_mapping renames classes, and a class without an image to learn from is
   named, as is an image that lies in no folder of a class. An image to learn from is not judged.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import copy_of, run_evaluate, same_tensors, saved, tiny_config
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import train
from augment import crop_box, normalise
from backbones.weights import load_backbone
from evaluation.protocol import (Config, Extractor, mapped_classes, open_judged, open_labelled,
                                 random_crops, require_other_images)
from images.data import Images, Sampler, open_images
from machinery.flags import UsageError, parse
from machinery.process import Process
from vit import VisionTransformer


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_random_crops_of_all_processes_are_those_of_one(world):
    processes = [Process(torch.device("cpu"), rank, world) for rank in range(world)]
    images, alone = open_images("shapes:9"), Process(torch.device("cpu"))
    whole = list(random_crops(images, 8, 7, 2, alone))
    later = list(random_crops(images, 8, 7, 2, alone, start=1))
    assert len(later) == 1 and torch.equal(later[0][0], whole[1][0])  # a training that goes on
    parts = [list(random_crops(images, 8, 7, 2, process, together=3)) for process in processes]
    for step, (crops, labels) in enumerate(whole):
        groups = [list(zip(*(v.split(3) for v in part[step]))) for part in parts]
        order = [groups[g % world][g // world] for g in range(3)]  # of 3, 3 and 1
        assert torch.equal(torch.cat([crops for crops, _ in order]), crops)
        assert torch.equal(torch.cat([labels for _, labels in order]), labels)


def test_random_crops_are_torchvisions(photos):
    """RandomResizedCrop's box, resized bicubically: also for --protocol dino."""
    images = open_images(f"folder:{photos}")
    crops, labels = next(random_crops(images, 24, 8, 1, Process(torch.device("cpu"))))
    (_, _, first), *_ = next(iter(Sampler(len(images), 8, 1)))
    image, rng = images.read(first), np.random.default_rng([0, 0, first])
    top, left, h, w = crop_box(*image.shape[-2:], (0.08, 1.0), rng.random((10, 4)))
    expected = TF.resized_crop(image, top, left, h, w, [24, 24], TF.InterpolationMode.BICUBIC,
                               antialias=True)
    expected = expected.flip(-1) if rng.random() < 0.5 else expected
    assert torch.equal(crops[0], normalise(expected[None])[0])
    assert labels[0] == images.labels[first]


def test_a_broken_image_is_named(photos):
    (photos / "cats/05.png").write_bytes(b"not a picture")
    images = open_images(f"folder:{photos}")
    with pytest.raises(ValueError, match="does not decode: cats/05.png"):
        list(random_crops(images, 8, 24, 1, Process(torch.device("cpu"))))


def test_kept_features(small_backbone, photos, tmp_path, capsys):
    line = f"knn --weights {small_backbone} --data folder:{photos} "
    line += f"--val_data folder:{copy_of(photos)} --nb_knn 1 20 --n_per_class 2"
    kept = dict(output_dir=tmp_path / "out", features_dir=tmp_path / "kept")
    first = run_evaluate(line, **kept)
    with patch("evaluation.protocol.extract", side_effect=AssertionError("not kept")):
        assert run_evaluate(line, **kept)["knn"] == first["knn"]

    def check_refused(words, line=line):
        with pytest.raises(SystemExit):
            run_evaluate(line, **kept)
        assert words in capsys.readouterr().err

    drawn = line.replace(f"folder:{copy_of(photos)}", "shapes:24:val")
    check_refused("other images", drawn.replace(f"folder:{photos}", "shapes:24"))
    check_refused("other network", line + " --num_heads 2")
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    for file in copy.glob("*/*"):
        Image.open(file).rotate(90, expand=True).save(file)
    check_refused("other images", line.replace(f"folder:{photos} ", f"folder:{copy} "))
    check_refused("other protocol", line + " --image_size 8")
    torch.manual_seed(1)
    other = VisionTransformer(16, 8, embed_dim=64, depth=4, num_heads=1)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    check_refused("other weights", line.replace(small_backbone, str(tmp_path / "other.pth")))
    file = tmp_path / "kept/knn-data.pt"
    content = torch.load(file)
    content["rows"][3, 5] = torch.nan
    torch.save(content, file)
    check_refused("1 of 24 images have features that are no numbers")
    file.write_bytes(b"nothing")
    check_refused("holds no features")


# The size of the network's training, its patches, and the sizes that follow.
SIZES = [(518, 14, 224, 308), (224, 16, 224, 320), (224, 8, 224, 320), (256, 16, 224, 320),
         (96, 16, 96, 96), (40, 5, 40, 40)]


@pytest.mark.parametrize("trained_at, patch, size, size_of_copies", SIZES)
def test_the_size_at_which_a_network_is_judged(trained_at, patch, size, size_of_copies,
                                               tmp_path):
    model = VisionTransformer(trained_at, patch, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    for given in (0, 112):
        flags = ["--weights", str(tmp_path / "backbone.pth"), "--image_size", str(given)]
        extractor = Extractor(parse(Config, flags), Process(torch.device("cpu")))
        assert extractor.size == given or size
        assert extractor.at(320).size == (given or size_of_copies)
        assert extractor.size == (given or size)  # that of the other protocols is as it was


def test_the_student_is_judged(tmp_path, quick_runs):
    train.run(tiny_config(tmp_path / "run", "--epochs", "1"))
    step, state = saved(tmp_path / "run/checkpoint")
    networks = {}
    for name in ("teacher", "student"):
        networks[name] = {
            key.removeprefix(f"{name}.backbone."): value
            for key, value in state.items() if key.startswith(f"{name}.backbone.")}
    assert not same_tensors(networks["teacher"], networks["student"])

    # A file of both, as DINO's code writes it.
    both = {}
    for name, network in networks.items():
        both[name] = {f"module.backbone.{key}": value for key, value in network.items()}
        both[name]["module.head.mlp.0.weight"] = torch.zeros(2, 2)
    torch.save(both, tmp_path / "checkpoint.pth")
    for what in (tmp_path / "run", tmp_path / "run/teacher.pt", tmp_path / "checkpoint.pth"):
        for name, network in networks.items():
            assert same_tensors(load_backbone(what, name).state_dict(), network), (what, name)
    line = f"knn --weights {tmp_path / 'run'} --data shapes:20 --val_data shapes:9:val"
    of = {
        key: run_evaluate(line, checkpoint_key=key, output_dir=tmp_path / key)
        for key in ("teacher", "student")}
    assert of["student"]["checkpoint_key"] == "student"
    assert of["student"]["weights_sha256"] != of["teacher"]["weights_sha256"]


def test_a_student_that_is_not_there(tmp_path, small_backbone, capsys):
    (tmp_path / "config.json").write_text('{"global_batch": 8}')
    shutil.copy(small_backbone, tmp_path / "teacher.pt")
    for what, words in ((small_backbone, "holds one network only"), (tmp_path,
                                                                     "has no checkpoint")):
        with pytest.raises(SystemExit):
            run_evaluate(f"knn --weights {what} --checkpoint_key student")
        error = capsys.readouterr().err
        assert f"--checkpoint_key student: {what} {words}" in error and error.count("\n") == 1


def test_an_image_that_lies_in_no_folder_is_named(photos):
    (photos / "stray.png").write_bytes((photos / "cats/01.png").read_bytes())
    config = SimpleNamespace(data=f"folder:{photos}")
    extractor = SimpleNamespace(config=config, open=lambda flag: open_images(config.data))
    with pytest.raises(UsageError, match="one folder per class .stray.png lies in none."):
        open_labelled(extractor)


def test_images_that_are_learned_from_are_not_judged():
    train = Images("folder", None, list("abc"), root=Path("x"))
    for other in (replace(train, root=Path("y")), replace(train,
                                                          name="list"), train.subset([])):
        require_other_images(train, other, "folder:x", "folder:y")
    words = "--test_data folder:x: 1 of its 1 images are in --data folder:x, too, such as c"
    with pytest.raises(UsageError, match=words):
        require_other_images(train, train.subset([2]), "folder:x", "folder:x", "--test_data")

    # Shards of the same file names may lie in two folders.
    shards = Images("shards", None, ["0.tar/a.jpg"])
    require_other_images(shards, shards, "shards:x/*.tar", "shards:y/*.tar")
    with pytest.raises(UsageError, match="such as --val_data shards:x/.*.tar:val"):
        require_other_images(shards, shards, "shards:x/*.tar", "shards:x/*.tar")


def test_classes_by_other_names(tmp_path):
    train = Images("a", None, list("abc"), [0, 1, 1], ["cat", "dog", "owl"])
    val = Images("b", None, list("de"), [1, 0], ["eule", "katze"])
    file = tmp_path / "map.csv"
    file.write_text("katze, cat\n\neule,dog\n")
    assert mapped_classes(str(file), "val_data", val) == ["dog", "cat"]
    config = SimpleNamespace(class_mapping=str(file), data="a", val_data="b")
    extractor = SimpleNamespace(config=config, open=lambda flag: val)
    assert open_judged(extractor, train)[1].tolist() == [0, 1]
    file.write_text("katze, cat\neule, dog\n", encoding="utf-8-sig")  # as spreadsheets do
    assert open_judged(extractor, train)[1].tolist() == [0, 1]
    file.write_text("hund, dog\n")
    with pytest.raises(UsageError,
                       match="no line begins with a class of --val_data, such as eule"):
        open_judged(extractor, train)

    # For --test_data alone: the classes of --val_data keep their names.
    test = replace(val, classes=["hund", "katze"])
    val = replace(val, classes=["cat", "dog"])
    file.write_text("hund, dog\nkatze, cat\n")
    config.test_data = "c"
    extractor.open = {"val_data": val, "test_data": test}.get
    assert open_judged(extractor, train)[1].tolist() == [1, 0]
    assert open_judged(extractor, train, "test_data")[1].tolist() == [0, 1]
    file.write_text("fuchs, fox\n")
    for flag in ("val_data", "test_data"):
        with pytest.raises(UsageError, match=f"no line begins with a class of --{flag}"):
            open_judged(extractor, train, flag)
    val = replace(val, classes=["eule", "katze"])
    config.test_data = ""
    extractor.open = lambda flag: val

    file.write_text("katze, cat\neule, owl\n")  # no image of an owl to learn from
    with pytest.raises(UsageError, match="--data a has no image of 1 classes .* first: owl"):
        open_judged(extractor, train)
    file.write_text("katze, cat\nkatze, dog\n")
    with pytest.raises(UsageError, match="--class_mapping .*katze stands in two lines"):
        open_judged(extractor, train)
    file.write_text("katze cat\n")
    with pytest.raises(UsageError,
                       match="--class_mapping .*expected lines 'class in --val_data"):
        open_judged(extractor, train)
