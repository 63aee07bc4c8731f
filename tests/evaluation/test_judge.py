"""Claims
1. With labels the judge's figure is the k-NN of the images that are held out; without labels it
   is how often an image's other view is the nearest of all.
2. The same network gets the same figure again, and is left in the mode that it was in.
3. Large sets are thinned out evenly; two images are needed; classes have to match.
4. A run on photographs without labels is judged.
"""

import pytest
import torch
from conftest import tiny_config
from torch import nn

import train
from augment import center_crop, normalise
from evaluation.judge import Judge, evenly_spaced, pixels_as_features
from evaluation.knn import knn_accuracy
from images.data import Images, open_images
from machinery.process import Process

ALONE = Process(torch.device("cpu"))


def unlabelled(images):
    """The same images, without labels."""
    return Images(images.name, images.read, images.names)


def test_labelled_images(tmp_path):
    bank, queries = open_images("shapes:64"), open_images("shapes:32:val")
    judge = Judge(bank, queries, tiny_config(tmp_path), ALONE)
    assert judge.protocol == "k-NN(20)"
    network = pixels_as_features()

    def features_of(images):
        crops = [center_crop(images.read(i), 24) for i in range(len(images))]
        return network(normalise(torch.stack(crops)))

    expected = knn_accuracy(features_of(bank), bank.labels, features_of(queries),
                            queries.labels, (20,))[20]
    assert 0 < expected < 1 and judge(network) == pytest.approx(expected)


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


def test_what_there_is_to_judge_with(tmp_path, capsys):
    images = open_images("shapes:32")
    judge = Judge(images, images.subset([0]), tiny_config(tmp_path), ALONE)
    assert "1 images to judge with: nothing will be judged" in capsys.readouterr().out
    assert judge(pixels_as_features()) is None

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
