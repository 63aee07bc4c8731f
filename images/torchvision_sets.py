"""Torchvision's sets: its classes of labelled images, by their names.

    "CIFAR10:val" --> SETS: what to ask this class for --> its object --> Images

Idea     Each class of torchvision.datasets has words of its own for the images to train on and
         for those to validate with: train=True, split="trainval", version="2021_train". A table
         knows them. Some classes have no such parts: then an image's name decides (part_by_name
         in images/data.py).
Paper    none
Try      python -m images.data FakeData:val      noise, of which one image in twenty is taken
Change   another class of torchvision is one entry in SETS
Tests    pytest tests/images/test_torchvision_sets.py
"""

from functools import partial

import torchvision
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from images.data import Images, first_line
from images.files import in_channels

# The name of a class -> (keyword, value for training, value for validation), or None where the
# class does not divide its images. Where there is no "val", the "test" images take its place.
TRAIN_OR_NOT = "CIFAR10 CIFAR100 EMNIST FashionMNIST KMNIST MNIST QMNIST USPS"
TRAIN_AND_VAL = ("CLEVRClassification DTD FGVCAircraft Flowers102 ImageNet Imagenette PCAM "
                 "RenderedSST2")
TRAIN_AND_TEST = "FER2013 Food101 GTSRB LFWPeople StanfordCars STL10 SVHN"
NOT_DIVIDED = "Caltech101 Caltech256 EuroSAT FakeData ImageFolder Omniglot SEMEION SUN397"
SETS = {
    "Country211": ("split", "train", "valid"),
    "INaturalist": ("version", "2021_train", "2021_valid"),
    "OxfordIIITPet": ("split", "trainval", "test"),
    "Places365": ("split", "train-standard", "val")}
SETS |= dict.fromkeys(TRAIN_OR_NOT.split(), ("train", True, False))
SETS |= dict.fromkeys(TRAIN_AND_VAL.split(), ("split", "train", "val"))
SETS |= dict.fromkeys(TRAIN_AND_TEST.split(), ("split", "train", "test"))
SETS |= dict.fromkeys(NOT_DIVIDED.split())

# These have to be brought there by hand.
NO_DOWNLOAD = {"FakeData", "FER2013", "ImageFolder", "ImageNet"}

# Where the objects keep the labels of all images: in a list, or in rows that have a label in
# one of their columns. Where none of these is there, each image has to be decoded once.
LABELS = ("targets", "labels", "_labels", "y")
ROWS = {"_samples": 1, "_flat_character_images": 1, "index": 0}

# Where they keep the names of the classes. ImageNet has two classes called "crane", so that the
# keys of WordNet come first: they are the names of its folders, too.
CLASSES = ("wnids", "classes", "categories", "all_categories", "_characters")


def open_torchvision(name: str, argument: str, split: str, root: str, download: bool,
                     channels: int) -> Images:
    """NAME, NAME:train, NAME:val: a class of SETS; NAME:WORD asks for a part in its own word.

    Examples: STL10:unlabeled, FGVCAircraft:trainval, INaturalist:2021_train_mini. EMNIST has
    parts of another kind, each for training and for validation: EMNIST:letters:val.
    """
    if name not in SETS:
        raise ValueError(f"{name}: this class of torchvision gives no (image, label); give its "
                         "images as folder:PATH")

    # What to ask the class for. A word of its own names one part: images to validate with are
    # chosen from that by their names.
    options = {} if name == "FakeData" else {"root": root}
    keyword, *values = SETS[name] or ("",)
    divided = bool(keyword)
    if name == "EMNIST":
        options["split"] = argument or "balanced"
    elif argument and keyword in ("", "train"):
        raise ValueError(f"{name}:{argument}: expected {name}, {name}:train or {name}:val")
    elif argument:
        values = [argument, argument]
        divided = False
    if keyword:
        options[keyword] = values[split == "val"]
    if name not in NO_DOWNLOAD:
        options["download"] = download

    # Each class raises exceptions of its own kind, some of them of many lines. Some say
    # themselves which package they miss; then --download would not help.
    try:
        dataset = getattr(torchvision.datasets, name)(**options)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs a package that is not there: pip install {error.name}; "
                         "or give its images as folder:PATH") from None
    except Exception as error:
        message = first_line(error)
        if not options.get("download", True) and "pip install" not in message:
            # torchvision advises an argument of its own, which is no flag of ours.
            message = message.split(
                " You can use download=True")[0] + " (--download fetches it)"
        raise ValueError(f"{name} in --data_root {root}: {message}") from None

    # Where the class does not divide its images, an image has to have the same name whichever
    # part is asked for: the name decides in which part it is.
    part = split if divided and split else "train"
    prefix = f"{name}-{argument}-{part}" if argument else f"{name}-{part}"
    names = [f"{prefix}-{i:07d}" for i in range(len(dataset))]
    read = partial(_read_torchvision, dataset, channels)
    classes = [getattr(dataset, place) for place in CLASSES if hasattr(dataset, place)]
    return Images(name, read, names, labels_of(dataset), classes[0] if classes else None,
                  split=part if divided else "")


def labels_of(dataset) -> list[int] | None:
    """The label of each image; None if there are images without one."""
    # QMNIST's list has eight numbers for each image, of which the first is the label. Such a
    # list of rows is left alone, and the labels are those that come with the images.
    lists = [getattr(dataset, place) for place in LABELS if hasattr(dataset, place)]
    rows = [place for place in ROWS if hasattr(dataset, place)]
    if lists and getattr(lists[0], "ndim", 1) == 1:
        labels = lists[0]
    elif rows:
        labels = [row[ROWS[rows[0]]] for row in getattr(dataset, rows[0])]
    else:
        labels = [dataset[i][1] for i in range(len(dataset))]

    # STL10 writes -1 for an image without a label, others write None.
    labels = [-1 if label is None else int(label) for label in labels]
    return None if min(labels, default=0) < 0 else labels


def _read_torchvision(dataset, channels: int, i: int) -> Tensor:
    return in_channels(pil_to_tensor(dataset[i][0].convert("RGB")), channels)
