"""Claims
1. Every class of torchvision.datasets is asked with what it takes, or is refused in one line.
2. What a class is asked for to validate with is not what it is asked for to train on; where it
   does not divide its images, their names do.
3. A part is asked for in the class's own word; a word that it does not know is refused.
4. Labels and names of classes are read where the object keeps them; an image without a label
   means that there are none. The classes of ImageNet are its keys, no two of which are the same.
5. What is missing is said in one line: a package, the files, and --download where it helps.
"""

import inspect

import numpy as np
import pytest
import torch
from conftest import run_evaluate
from PIL import Image
from torchvision import datasets

from evaluation.extract import same_labels
from images.data import Images, open_images
from images.torchvision_sets import SETS, labels_of


def check_arguments(cls, arguments):
    """TypeError unless the class takes them; what **kwargs take goes on to the class it extends."""
    for base in cls.__mro__:
        signature = inspect.signature(base.__init__)
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            signature.bind_partial(None, **arguments)
            return
        arguments = {k: v for k, v in arguments.items() if k not in signature.parameters}


@pytest.fixture
def asked(request, monkeypatch):
    """Objects of the class request.param are made of nothing; what they were asked for, in turn."""
    cls = getattr(datasets, request.param)
    calls = []
    real = cls.__init__

    def init(self, *positional, **arguments):
        assert not positional
        monkeypatch.setattr(cls, "__init__", real)
        check_arguments(cls, arguments)
        monkeypatch.setattr(cls, "__init__", init)
        calls.append(arguments)

    picture = Image.new("RGB", (8, 8))
    monkeypatch.setattr(cls, "__init__", init)
    monkeypatch.setattr(cls, "__len__", lambda self: 200)
    monkeypatch.setattr(cls, "__getitem__", lambda self, i: (picture, i % 3))
    return calls


# -- 1, 2


@pytest.mark.parametrize("asked", SETS, indirect=True)
def test_a_set_opens_in_two_parts(asked, request, tmp_path):
    name = request.node.callspec.params["asked"]
    whole, train, val = (open_images(name + part, str(tmp_path))
                         for part in ("", ":train", ":val"))
    assert train.read(0).shape == (3, 8, 8) and set(train.labels) == {0, 1, 2}
    assert not set(train.names) & set(val.names)
    if SETS[name]:
        keyword, for_training, for_validation = SETS[name]
        words = [arguments.pop(keyword) for arguments in asked]
        assert words == [for_training, for_training, for_validation]
        assert (train.split, val.split) == ("train", "val") and whole.names == train.names
    else:
        assert len(train) + len(val) == len(whole) == 200 and 0 < len(val) < 30
    assert all(arguments == asked[0] for arguments in asked)
    assert asked[0].get("root", str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", SETS)
def test_the_words_are_those_of_the_class(name, tmp_path):
    """The class itself, in an empty folder: it misses its files, not the sense of a word."""
    if name == "FakeData":
        return
    for part in ("", ":val"):
        with pytest.raises(ValueError) as refused:
            open_images(name + part, str(tmp_path))
        message = str(refused.value)
        assert message.startswith(f"--data {name} ") and "\n" not in message
        assert "nknown value" not in message and "argument" not in message, message


@pytest.mark.parametrize("name", sorted(set(datasets.__all__) - set(SETS)))
def test_all_others_are_refused(name, tmp_path):
    with pytest.raises(ValueError) as refused:
        open_images(name, str(tmp_path))
    message = str(refused.value)
    assert "\n" not in message and "folder:PATH" in message
    if inspect.isclass(getattr(datasets, name)):
        assert message.startswith(f"--data {name}: this class of torchvision gives no (image")


@pytest.fixture
def eurosat(tmp_path):
    """The folder of EuroSAT, with 200 images of noise in two classes."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), np.uint8)
    for i, pixels in enumerate(noise):
        folder = tmp_path / "eurosat/2750" / ("Forest" if i % 2 else "River")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(tmp_path)


def test_noise_is_not_recognised(eurosat, small_backbone, tmp_path, capsys):
    """It was: the images to validate with were among those to learn from."""
    line = f"knn --weights {small_backbone} --data EuroSAT --val_data EuroSAT:val --nb_knn 1 "
    results = run_evaluate(line + f"--data_root {eurosat}", output_dir=tmp_path / "out")
    assert results["knn"]["1"] < 0.9
    output = capsys.readouterr().out
    part = len(open_images("EuroSAT:val", eurosat))
    assert f"--val_data EuroSAT:val: the set itself has no such part; these are {part} of" in output
    assert 0 < part < 30


def test_fake_data(monkeypatch):
    """The only set that is there without any file."""

    class Small(datasets.FakeData):

        def __init__(self):
            super().__init__(size=90, image_size=(3, 8, 8), num_classes=4)

    monkeypatch.setattr(datasets, "FakeData", Small)
    whole, train, val = (open_images(f"FakeData{part}") for part in ("", ":train", ":val"))
    assert len(whole) == 90 and set(whole.labels) == {0, 1, 2, 3} and whole.classes is None
    assert set(train.names) ^ set(val.names) == set(whole.names) and len(val)
    assert torch.equal(val.read(0), whole.read(whole.names.index(val.names[0])))


# -- 3


@pytest.mark.parametrize("asked", ["STL10"], indirect=True)
def test_a_word_of_the_class(asked):
    images = open_images("STL10:unlabeled")
    val = open_images("STL10:unlabeled:val")
    assert [arguments["split"] for arguments in asked] == ["unlabeled"] * 2
    assert len(images) == 200 and set(val.names) < set(images.names)


@pytest.mark.parametrize("asked", ["EMNIST"], indirect=True)
def test_parts_of_emnist(asked):
    for name in ("EMNIST", "EMNIST:letters", "EMNIST:letters:val"):
        open_images(name)
    words = [(arguments["split"], arguments["train"]) for arguments in asked]
    assert words == [("balanced", True), ("letters", True), ("letters", False)]


def test_words_that_are_not_known(tmp_path):
    with pytest.raises(ValueError, match="--data CIFAR10:all: expected CIFAR10, CIFAR10:train"):
        open_images("CIFAR10:all", str(tmp_path))
    with pytest.raises(ValueError, match="--data STL10 in .*nknown value 'all'"):
        open_images("STL10:all", str(tmp_path))


# -- 4


class Kept:
    """An object that keeps its labels in one attribute; without any, beside each image."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return None, [2, 0, 1][i]


def test_where_labels_are_kept():
    rows = torch.tensor([[2, 9], [0, 9], [1, 9]])
    for kept in (Kept(targets=rows[:, 0]), Kept(labels=rows[:, 0].numpy()), Kept(y=[2, 0, 1]),
                 Kept(_samples=[("a", 2), ("b", 0), ("c", 1)]), Kept(targets=rows), Kept(),
                 Kept(index=[(2, "a"), (0, "b"), (1, "c")])):
        assert labels_of(kept) == [2, 0, 1]
    for unlabelled in (Kept(labels=[2, -1, 0]), Kept(_samples=[("a", 1), ("b", None)])):
        assert labels_of(unlabelled) is None


@pytest.fixture
def imagenet(tmp_path):
    """The layout of ImageNet with three classes, two of them called crane."""
    keys = {"n02012849": ("crane",), "n03126707": ("crane",), "n02123045": ("tabby", "cat")}
    torch.save((keys, []), tmp_path / "meta.bin")
    for part in ("train", "val"):
        for i, key in enumerate(sorted(keys)):
            (tmp_path / part / key).mkdir(parents=True)
            Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / part / key / f"{key}.png")
    return tmp_path


def test_classes_of_imagenet(imagenet, small_backbone, capsys):
    train, val = (open_images(f"ImageNet:{part}", str(imagenet)) for part in ("train", "val"))
    assert train.classes == val.classes == ["n02012849", "n02123045", "n03126707"]
    assert same_labels(train, val).tolist() == [0, 1, 2]
    folders = open_images(f"folder:{imagenet}:val")
    assert same_labels(train, folders).tolist() == [0, 1, 2]
    part = Images("part", None, list("ab"), [1, 0], ["n03126707", "n02123045"])
    assert same_labels(train, part).tolist() == [1, 2]
    with pytest.raises(SystemExit):
        run_evaluate(f"knn --weights {small_backbone} --data ImageNet --data_root {imagenet} "
                     "--val_data shapes:10:val")
    assert "--val_data has classes that --data has not: " in capsys.readouterr().err


# -- 5


@pytest.mark.parametrize("name, error", [
    ("ImageNet", ModuleNotFoundError("No module named 'scipy'", name="scipy")),
    ("Flowers102", ModuleNotFoundError("No module named 'scipy'", name="scipy")),
    ("StanfordCars", RuntimeError("Scipy is not found: pip install scipy"))])
def test_a_missing_package_is_named(name, error, monkeypatch):

    def needs_scipy(self, **arguments):
        raise error

    monkeypatch.setattr(getattr(datasets, name), "__init__", needs_scipy)
    with pytest.raises(ValueError) as refused:
        open_images(name)
    assert "pip install scipy" in str(refused.value)
    assert "--download" not in str(refused.value)


def test_download_is_advised_where_it_helps(tmp_path):
    for name, helps in (("EuroSAT", True), ("ImageFolder", False), ("FER2013", False)):
        with pytest.raises(ValueError) as refused:
            open_images(name, str(tmp_path))
        assert ("(--download fetches it)" in str(refused.value)) == helps
