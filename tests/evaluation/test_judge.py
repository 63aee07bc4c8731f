"""Claims
1. With labels the judge's figure is the k-NN of the images that are held out; without labels it
   is how often an image's other view is the nearest of all: for any number of workers and of
   processes what a loop over single images gives.
2. The same network gets the same figure again, and is left in the mode that it was in.
   It tells in how many directions the features vary. Features that are worse than before
   training, or hardly better and of few directions, are named with a remedy, once in a run.
3. Large sets are thinned out evenly; two images are needed; classes have to match. Images that are
   learned from as well are counted in a warning.
4. A run on photographs without labels is judged.
5. With --dense_every the patch tokens are judged, too: as `patch_knn` does, alike on every process;
   it is logged and kept, the run ends in the same weights, and a run without
   it says nothing of it. Convnets and classes that do not match are refused.
"""

import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import finish, metrics_of, same_tensors, start, teacher_of, tiny_config
from torch import nn

import train
from augment import MultiCrop, center_crop, normalise, photometry
from evaluation.judge import Judge, PatchJudge, RawPixels, evenly_spaced, learned_from
from evaluation.knn import knn_accuracy
from evaluation.patches import patch_knn
from images.data import Images, open_images
from images.pairs import MASKS, open_pairs, read_mask
from machinery.flags import UsageError
from machinery.process import Process, start_process

ALONE = Process(torch.device("cpu"))


def unlabelled(images):
    """The same images, without labels."""
    return Images(images.name, images.read, images.names)


def test_labelled_images(tmp_path):
    bank, queries = open_images("shapes:64"), open_images("shapes:32:val")
    judge = Judge(bank, queries, tiny_config(tmp_path), ALONE)
    assert judge.protocol == "k-NN(20)"
    network = RawPixels()

    def features_of(images):
        crops = [center_crop(images.read(i), 24) for i in range(len(images))]
        return network(normalise(torch.stack(crops)))

    expected = knn_accuracy(features_of(bank), bank.labels, features_of(queries),
                            queries.labels, (20,))[20]
    assert 0 < expected < 1 and judge(network) == pytest.approx(expected)


@pytest.mark.parametrize("data, val_data, shared", [("", "/cats", 12), ("/cats", "", 12),
                                                    ("", "", 24), ("/cats", "/dogs", 0),
                                                    ("", "/../new", 1)])
def test_images_that_are_judged_and_learned_from(data, val_data, shared, photos, tmp_path,
                                                 capsys):
    """A part of a folder, the folder of a part, and a list of some of its files."""
    (photos / "../new").mkdir()
    shutil.copy(photos / "cats/01.png", photos / "../new/01.png")
    if val_data == "/../new":
        (photos / "some.txt").write_text("cats/01.png\n../new/01.png\n")
        val = open_images(f"list:{photos}/some.txt")
    else:
        val = open_images(f"folder:{photos}{val_data}")
    train = open_images(f"folder:{photos}{data}")
    assert learned_from(val, train) == shared
    labels = [i % 2 for i in range(max(len(train), len(val)))]
    with_labels = [
        replace(images, labels=labels[:len(images)], classes=["a", "b"])
        for images in (train, val)]
    Judge(*with_labels, tiny_config(tmp_path), ALONE)
    said = f"warning: {shared} of the {len(val)} images to judge with are in --data"
    assert (said in capsys.readouterr().out) == bool(shared)


class FewPixels(nn.Module):
    """A network whose features are 4 x 4 pixels: two crops of nearly the whole image agree."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def test_images_without_labels(tmp_path):
    images = unlabelled(open_images("shapes:32"))
    whole = tiny_config(tmp_path, *"--global_crops_scale 0.99 1 --photometry none".split())
    judge = Judge(images, images, whole, ALONE)
    assert judge.protocol == "other-view retrieval"
    assert judge(FewPixels()) > 0.4  # though half of the views are mirrored
    constant = nn.Sequential(FewPixels(), nn.Linear(48, 8))
    nn.init.zeros_(constant[1].weight)
    assert judge(constant) <= 1 / 32  # one and the same neighbour for all


def one_by_one(images, backbone, config):
    """Other-view retrieval by its definition: one image after the other, then all pairs."""
    crops = MultiCrop(config.global_crops_size, config.local_crops_size, 2, 0,
                      config.global_crops_scale, photometry=config.photometry)
    features = []
    for i in range(len(images)):
        sample = crops(images.read(i), np.random.default_rng([0, 0, i]))
        with torch.no_grad():
            features.append(backbone(photometry(sample["global_crops"], sample["photometry"])))
    first, second = F.normalize(torch.stack(features), dim=2).unbind(1)
    nearest = (first @ second.T).argmax(1)
    return (nearest == torch.arange(len(images))).float().mean().item()


def other_view_figure(rank, folder):
    process = start_process("cpu")
    config = tiny_config(folder)
    torch.manual_seed(0)
    backbone = train.build(config, ALONE)[0].backbone
    images = unlabelled(open_images("shapes:67"))
    read = []
    counted = replace(images, read=lambda i: read.append(i) or images.read(i))
    figure = Judge(counted, counted, config, process)(backbone)
    assert read == [*range(rank, 67, 2), 0][:34]  # its share, and one more to fill it up
    (folder / f"figure-{process.world_size}-{rank}").write_text(repr(figure))


def test_other_view_retrieval_against_a_loop(tmp_path):
    pair = start(other_view_figure, tmp_path)
    images = unlabelled(open_images("shapes:67"))  # two batches, the second of three images
    torch.manual_seed(0)
    backbone = train.build(tiny_config(tmp_path), ALONE)[0].backbone.eval()
    expected = one_by_one(images, backbone, tiny_config(tmp_path))
    assert 1 / 67 < expected < 1
    for workers in ("0", "2"):
        config = tiny_config(tmp_path, "--num_workers", workers)
        assert Judge(images, images, config, ALONE)(backbone) == expected
    finish(pair)
    for rank in (0, 1):
        assert float((tmp_path / f"figure-2-{rank}").read_text()) == expected


def test_the_same_figure_again(tmp_path):
    images = open_images("shapes:32")
    backbone = train.build(tiny_config(tmp_path), ALONE)[0].backbone
    for labelled in (images, unlabelled(images)):
        judge = Judge(labelled, labelled, tiny_config(tmp_path), ALONE)
        backbone.train()
        assert judge(backbone) == judge(backbone)
        assert backbone.training
        backbone.eval()
        judge(backbone)
        assert not backbone.training


@pytest.mark.parametrize("variances, rank", [((1, 1), 2), ((19, 1), 1.2196), ((1, 0), 1)])
def test_rank_of_features(variances, rank, tmp_path):
    """Against the variances that the features were made with; a shift of all of them is none."""
    images = open_images("shapes:32")
    judge = Judge(images, images, tiny_config(tmp_path), ALONE)
    angles = torch.arange(8) * math.pi / 4
    circle = torch.stack([angles.cos(), angles.sin()], 1)  # each axis has the same variance
    features = torch.zeros(8, 5)
    features[:, :2] = 1e-4 * circle * torch.tensor(variances).sqrt()
    features[:, 2] = 1.0  # so long that normalising changes nothing else
    judge.measure_rank(features.double())
    assert judge.rank == pytest.approx(rank, rel=1e-3) and judge.largest_rank == 5


@pytest.mark.parametrize("knn, rank, init, name",
                         [(0.20, 5.0, "", "dimensional collapse"),
                          (0.34, 3.0, "", "dimensional collapse"), (0.80, 1.5, "", None),
                          (0.30, 5.0, "", None), (0.20, 5.0, "runs/a", "worse than --init"),
                          (0.34, 3.0, "runs/a", "dimensional collapse")])
def test_diagnosis_of_features(knn, rank, init, name, tmp_path):
    """Before training k-NN was 30 %; features of 128 numbers."""
    images = open_images("shapes:1000")
    judge = Judge(images, images, tiny_config(tmp_path, "--init", init), ALONE)
    judge.rank, judge.largest_rank = rank, 128
    illness = judge.diagnose(dict(knn=knn, untrained=0.3))
    assert illness is None if name is None else illness[0] == name
    if name == "dimensional collapse":
        assert f"{rank} directions of 128" in illness[1]
        for flag in re.findall(r"--(\w+)", illness[1]):  # the flags of the remedy are flags
            assert hasattr(judge.config, flag)

    # Of 60 images one right answer less is chance; of 6 any number.
    for size, accuracies in ((60, (0.28,)), (6, (0.28, 0.0))):
        few = Judge(images, images.subset(range(size)), tiny_config(tmp_path), ALONE)
        few.rank, few.largest_rank = 5.0, 128
        for accuracy in accuracies:
            assert few.diagnose(dict(knn=accuracy, untrained=0.3)) is None

    # Of four images the features can vary in three directions only: that is no illness.
    judge.rank, judge.largest_rank = 1.2, 3
    assert judge.diagnose(dict(knn=0.31, untrained=0.3)) is None


def test_a_run_warns_of_dimensional_collapse(tmp_path, capsys, quick_runs, monkeypatch):
    """It gets worse in each of three epochs; only after the one of warm-up is it said, once."""
    figures = iter((0.5, 0.5, 0.4, 0.3, 0.2))  # pixels, before training, three epochs
    monkeypatch.setattr(Judge, "__call__", lambda self, _: next(figures))
    train.run(
        tiny_config(tmp_path / "run", "--epochs", "3", "--warmup_epochs", "1", "--val_data",
                    "shapes:50:val"))
    before, _, after = capsys.readouterr().out.partition("warning: dimensional collapse")
    assert "epoch 2" in before and "epoch 3" not in before and "--koleo_weight 0.1" in after
    assert "dimensional collapse" not in after
    rows = metrics_of(tmp_path / "run")
    assert [row["feature_rank"] for row in rows if "feature_rank" in row] == [0, 0, 0, 0]


def test_what_there_is_to_judge_with(tmp_path, capsys):
    images = open_images("shapes:32")
    judge = Judge(images, images.subset([0]), tiny_config(tmp_path), ALONE)
    printed = capsys.readouterr().out
    assert "1 images to judge with: nothing will be judged; give --val_data, or hold" in printed
    assert judge(RawPixels()) is None
    config = tiny_config(tmp_path, "--data", "folder:x:train")  # X without its part for judging
    Judge(images, images.subset([0]), config, ALONE)
    assert "nothing will be judged; give --val_data folder:x:val" in capsys.readouterr().out

    bank = Images("a", images.read, ["0", "1"], [0, 1], ["cat", "dog"])
    queries = Images("b", images.read, ["0", "1"], [0, 1], ["cat", "horse"])
    with pytest.raises(ValueError, match="--val_data has classes that --data has not: horse"):
        Judge(bank, queries, tiny_config(tmp_path), ALONE)


def test_evenly_spaced():
    images = Images("many", None, [str(i) for i in range(1000)])
    names = [int(name) for name in evenly_spaced(images, 10).names]
    assert names == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert evenly_spaced(images, 5000).names == images.names


def test_unlabelled_photos(tmp_path, photos, quick_runs):
    flags = ["--data", f"folder:{photos / 'cats'}", "--val_data", f"folder:{photos / 'dogs'}"]
    summary = train.run(tiny_config(tmp_path / "run", *flags, "--epochs", "1"))
    assert summary["knn_protocol"] == "other-view retrieval" and 0 <= summary["knn"] <= 1


# -- patches

FEW_PAIRS = "--dense_every 1 --dense_data shapes:6 --dense_val_data shapes:4:val".split()


def patch_figures(rank, folder):
    process = start_process("cpu")
    config = tiny_config(folder, *FEW_PAIRS)
    figures = {}
    torch.manual_seed(0)
    backbone = train.build(config, ALONE)[0].backbone
    PatchJudge(config, process, folder, 8)(backbone, 8 if rank else 0, figures)
    (folder / f"patches-{rank}").write_text(repr(figures["patch_miou"]))


def test_patches_are_judged_as_by_the_task(tmp_path, capsys):
    pair = start(patch_figures, tmp_path)
    config = tiny_config(tmp_path, *FEW_PAIRS)
    torch.manual_seed(0)
    backbone = train.build(config, ALONE)[0].backbone.train()
    pairs = [open_pairs(MASKS, spec, read_mask) for spec in ("shapes:6", "shapes:4:val")]
    expected = patch_knn(backbone, *(p.drawn_at(96) for p in pairs), 11, 96, ALONE)["miou"]
    assert 0 < expected < 1

    # A run that got the flag later has no figure of its start.
    figures = {}
    judge = PatchJudge(config, ALONE, tmp_path, 8)
    judge(backbone, 16, figures)
    assert figures == {"patch_miou": expected} and backbone.training
    judge(backbone, 0, figures)
    assert figures == {"patch_miou": expected, "patch_miou_untrained": expected}
    judge(backbone, 24, figures)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"epoch 2: patch k-NN mIoU {expected:.1%}",
        f"patch k-NN mIoU: untrained network {expected:.1%}",
        f"epoch 3: patch k-NN mIoU {expected:.1%} (untrained {expected:.1%})"]
    finish(pair)
    for rank in (0, 1):
        assert float((tmp_path / f"patches-{rank}").read_text()) == pytest.approx(expected)


def test_a_run_that_watches_its_patches(tmp_path, capsys, quick_runs):
    watched = train.run(tiny_config(tmp_path / "a", *FEW_PAIRS, "--epochs", "1"))
    printed = capsys.readouterr().out
    plain = train.run(tiny_config(tmp_path / "b", "--epochs", "1"))
    assert same_tensors(teacher_of(tmp_path / "a"), teacher_of(tmp_path / "b"))

    rows = [row for row in metrics_of(tmp_path / "a") if "patch_miou" in row]
    assert [row["step"] for row in rows] == [0, 8]
    assert watched["patch_miou"] == rows[-1]["patch_miou"]
    assert watched["patch_miou_untrained"] == rows[0]["patch_miou"]
    assert f"epoch 1: patch k-NN mIoU {rows[-1]['patch_miou']:.1%} (untrained" in printed
    assert not any("patch" in key for row in metrics_of(tmp_path / "b") for key in row)
    assert not any("patch" in key for key in plain)
    assert "patch k-NN" not in capsys.readouterr().out

    # The flag may be left out when the run goes on: it does not change the result.
    train.run(tiny_config(tmp_path / "a", "--epochs", "1"))
    assert "is finished" in capsys.readouterr().out


def test_patches_that_cannot_be_judged(tmp_path):
    with pytest.raises(UsageError, match="--dense_every 2: --arch resnet18 has no patch"):
        train.run(tiny_config(tmp_path, "--arch", "resnet18", "--dense_every", "2"))
    config = tiny_config(tmp_path, *FEW_PAIRS)
    config.dense_val_data = f"pairs:{tmp_path}"
    with pytest.raises(ValueError, match="--dense_val_data pairs:"):
        PatchJudge(config, ALONE, tmp_path, 8)
    config.dense_val_data = config.dense_data
    with pytest.raises(UsageError, match="--dense_val_data .*are in --dense_data .*, too"):
        PatchJudge(config, ALONE, tmp_path, 8)
