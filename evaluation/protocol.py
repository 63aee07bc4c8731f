"""Protocol: what every evaluation starts from, which is a network, images, and their labels.

    --weights --> Extractor(images) -> features (n, D), kept in --features_dir
    --data, --val_data --> images, labels in one numbering --> a task -> its figures

Idea     The file of a protocol says what is done with features. How features are made, kept and
         matched with labels is the same for all protocols and stands here, together with the
         flags that all of them share.
Paper    none
Try      python evaluate.py knn --help
Change   a flag for all protocols is one field of Config here, for one of them a field of its
         own
Tests    pytest tests/evaluation/test_protocol.py

Letters  n images, D width, b images of a batch on one process, C channels, H W pixels.
"""

import contextlib
import copy
import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from augment import MultiCrop, normalise
from evaluation.extract import extract, same_labels, spread
from images.data import Images, Sampler, Views, open_images, training_loader
from images.names import beside_validation
from machinery.checkpoints import save_tensors
from machinery.clock import Progress
from machinery.flags import UsageError, require
from machinery.process import Process
from machinery.read_once import read_once

# ----------------------------------------------------------------------------------------------
# Flags. A protocol's own dataclass is made of these and of what it alone uses

Precision = Literal["auto", "fp32", "tf32", "bf16"]
PHOTOGRAPHS = 224  # pixels: the size of the crops in most of the papers' evaluations


@dataclass
class WeightsConfig:
    """What every protocol needs."""

    # -- what to judge
    weights: str = "dino_vits16"  # the network: a run, a released name, a URL, or a file
    checkpoint_key: Literal["teacher",
                            "student"] = "teacher"  # which network of a training's two
    num_heads: int = 0  # attention heads, for a file that does not tell them; 0: of width 64
    data: str = "shapes"  # images to learn from or to search in: shapes, folder:PATH, CIFAR10
    image_size: int = 0  # side of the images in pixels; 0: the paper's, or a run's crops if smaller
    # -- machine
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: Precision = "auto"  # of matrix products; auto: tf32 on GPUs that have it
    # -- where to
    output_dir: str = ""  # the folder for results.json; empty: evaluations/TASK
    given: tuple[str, ...] = ()  # names of the flags on the command line, set by flags.parse


@dataclass
class NetworkConfig(WeightsConfig):
    """For protocols that go through a set of images."""

    # -- what to judge
    data_root: str = "data"  # the folder where torchvision keeps its data sets
    download: bool = False  # let torchvision fetch the data set
    # -- machine
    batch_size: int = 128  # images at once, on all processes together
    num_workers: int = 2  # loader processes for each process

    def check(self):
        require(self, lambda x: x >= 1, "at least 1", "batch_size")


@dataclass
class Config(NetworkConfig):
    """For protocols that work on features of a frozen network."""

    # -- features
    features_dir: str = ""  # a folder to keep features in, and to take them from next time


@dataclass
class Labelled:
    """For protocols that judge labelled images."""

    # -- labels
    val_data: str = "shapes:val"  # images with labels that are judged
    class_mapping: str = ""  # a file of lines "class in --val_data, class in --data"

    def check(self):
        require_val_data(self, "ground_truth", "groups")


def require_val_data(config, *instead: str):
    """UsageError where --data is not drawn and --val_data was left out.

    instead: the names of flags that say in the place of --val_data what is judged.
    """
    # The default of --val_data fits that of --data. Beside photographs it would judge drawings,
    # which nobody has asked for.
    drawn = config.data.partition(":")[0] == "shapes"
    named = "val_data" in config.given or any(getattr(config, name, "") for name in instead)
    if not drawn and not named:
        # X:val is what is judged; then X:train is to learn from.
        whole = config.data.removesuffix(":val")
        learned = f" beside --data {whole}:train" if whole != config.data else ""
        raise UsageError(
            f"--val_data is missing beside --data {config.data}: expected the images "
            f"to be judged, such as {part_to_judge(config.data)}{learned}; by default they "
            f"are drawn ({config.val_data})")


def part_to_judge(data: str) -> str:
    """X:val, which is the part of X or of X:train that training does not see."""
    return f"{data.removesuffix(':train').removesuffix(':val')}:val"


def results_folder(config: WeightsConfig, task: str) -> Path:
    """--output_dir, or evaluations/TASK; the folder is created if it does not exist."""
    folder = Path(config.output_dir or f"evaluations/{task}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep_earlier(path: Path) -> Path | None:
    """Rename the file that is there to a free name, and return that; None if there is no file.

    Example: results.json becomes results-1.json, or results-2.json if there is a first one.
    """
    if not path.exists():
        return None
    number = 1
    while (kept := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    return path.rename(kept)


# ----------------------------------------------------------------------------------------------
# The network and its features


def judged_size(model: nn.Module, size: int = PHOTOGRAPHS) -> int:
    """The side in pixels at which a network is judged by a protocol with images of `size`.

    A published figure belongs to the size of its protocol, whatever the size that the network
    saw last: DINOv2's networks ended their training at 518 pixels, and their figures are those
    of crops of 224. A network of smaller crops than photographs have would lose by it, and is
    judged at the size of its crops. Examples, by the size that the table of positions is for:

        trained at    judged by k-NN, where `size` is 224    by copy detection, 320
        518, 224      224                                    320 (patches of 14: 308)
        96, 40        96, 40                                 96, 40
    """
    if model.img_size < PHOTOGRAPHS:
        return model.img_size
    return size // model.patch_size * model.patch_size  # whole patches


class Extractor:
    """The network of --weights: call it with images to get their features.

    size is the side of the crops in pixels; sha256 identifies the weights, and `network` is
    what they do not tell of it, such as the number of heads.
    """

    def __init__(self, config: WeightsConfig, process: Process):
        # Imported here, because a training run imports this file for the k-NN of its teacher, a
        # network that it has already: it need not know how weights are read.
        from backbones.weights import load_backbone

        self.config = config
        self.process = process
        self.model = load_backbone(config.weights, config.checkpoint_key, config.num_heads)
        self.model = self.model.to(process.device)
        self.size = config.image_size or judged_size(self.model)
        if self.size < self.model.patch_size:
            raise UsageError(
                f"--image_size {self.size} is smaller than one patch of {self.model.patch_size}"
            )

        # A hash over the names and the bytes of all tensors. Features that were kept on disk
        # carry it, so that features of other weights are recognised, even of a run that has
        # gone on training under the same name.
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        self.sha256 = digest.hexdigest()

        # What the features depend on beside the tensors: a flag or a config.json may change it.
        # A convnet has only the last of these.
        heads = getattr(self.model, "num_heads", None)
        rule = getattr(self.model, "pos_embed_resize", None)
        eps = getattr(getattr(self.model, "norm", None), "eps", None)
        stats = self.model.channel_stats
        self.network = f"{heads} heads, {rule} positions, {eps} in norms, {stats}"

    def at(self, size: int) -> "Extractor":
        """The same for a protocol whose images have another size than 224 pixels."""
        other = copy.copy(self)
        other.size = self.config.image_size or judged_size(self.model, size)
        return other

    def open(self, flag: str) -> Images:
        """The images of a flag such as "data", in the channels that the network expects."""
        config = self.config
        name = getattr(config, flag)
        if flag == "data":
            name = beside_validation(name, getattr(config, "val_data", ""))
        # One process lists the files for all, also where there are millions of them.
        listed = partial(open_images, name, config.data_root, config.download, f"--{flag}",
                         self.model.channel_stats)
        return read_once(listed, self.process)

    def hash_of(self, images: Images) -> str:
        """A hash of the names of all images and of the pixels of 16, to recognise a set again.

        Names alone would not do: an image and its blurred copy in another folder have the same.
        """
        names = "\n".join(images.names).encode(errors="surrogateescape")
        digest = hashlib.sha256(names)
        for i in np.linspace(0, len(images) - 1, 16).astype(int).tolist():
            # An image that does not decode is named when the features are computed.
            with contextlib.suppress(Exception):  # decoders raise exceptions of many kinds
                digest.update(images.read(i).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, images: Images, name: str, read: nn.Module | None = None, prepare=None,
                 batch_size: int = 0) -> Tensor:
        """Features (n, D) float32 on the CPU, the same on all processes.

        `read` is called in place of the network, whose answer is the class token; `prepare` in
        place of the centre crop. With --features_dir the features are kept there as NAME.pt.
        UsageError if a feature is not a number.
        """
        config = self.config
        process = self.process

        if config.features_dir:
            # What the features depend on. It is written beside them: features that are found on
            # disk are taken only if all of it is the same as now.
            source = {
                "weights": self.sha256, "network": self.network, "images": self.hash_of(images),
                "precision": config.precision, "protocol": f"{name}, {self.size} px"}

            # The main process decides for all whether the file is there: on a network file
            # system it may not be visible everywhere yet, and half of the processes would wait
            # for the others for ever.
            file = Path(config.features_dir) / f"{name}.pt"
            if process.broadcast(file.exists()):
                return self.reuse(file, source)

        # --batch_size is for all processes together: each has its share, rounded up.
        per_process = -(-config.batch_size // process.world_size)
        report = Progress(name, len(images), process)
        rows = extract(read or self.model, images, self.size, process, batch_size
                       or per_process, config.num_workers, config.precision, report, prepare)
        self.check(rows, images.names, f"--weights {config.weights}")
        if config.features_dir and process.main:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, {"rows": rows, **source})
        return rows

    def reuse(self, file: Path, source: dict) -> Tensor:
        """The rows of a file of kept features; UsageError if they are of another `source`."""
        from backbones.layouts import read_tensors

        # The file may be damaged, or no file of ours: torch.load raises different exceptions
        # for different damage.
        try:
            kept = read_tensors(file)
            kept_source = {key: kept[key] for key in source}
        except Exception:
            raise UsageError(
                f"--features_dir: {file} holds no features that were kept there; delete it"
            ) from None

        # Taking features of other weights or images in silence would give wrong figures, and
        # overwriting them would lose what may have taken hours: the user has to decide.
        different = [key for key in source if kept_source[key] != source[key]]
        if different:
            key = different[0]
            raise UsageError(
                f"--features_dir: {file} holds features of other {key} "
                f"({kept_source[key]:.60s}, here {source[key]:.60s}); delete it or "
                "name another folder")
        self.check(kept["rows"], None, f"--features_dir: {file}")
        return kept["rows"]

    def check(self, rows: Tensor, names: list[str] | None, source: str):
        """UsageError if a feature is NaN or infinite, with the name of the first such image."""
        # One NaN would spread: the mean of all features, a whitening or a gradient contain it,
        # and every figure after it would be wrong.
        bad = (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise UsageError(
                f"{source}: {len(bad)} of {len(rows)} images have features that are "
                f"no numbers, the first {names[bad[0]] if names else bad[0]}")


# ----------------------------------------------------------------------------------------------
# Images and their labels


def open_labelled(extractor: Extractor, flag: str = "data") -> Images:
    """The images of --data, or of another flag; UsageError if they have no labels."""
    images = extractor.open(flag)
    if not images.labels:
        # A single image beside the folders of the classes takes the labels from all (open_folder).
        beside = next((name for name in images.names if "/" not in name), None)
        first = f" ({beside} lies in none)" if images.name == "folder" and beside else ""
        raise UsageError(
            f"--{flag} {getattr(extractor.config, flag)}: this task needs labels of "
            f"two classes or more; put the images into one folder per class{first}")
    return images


def open_judged(extractor: Extractor, train: Images,
                flag: str = "val_data") -> tuple[Images, Tensor]:
    """(images of `flag`, their labels in the numbers of the classes of `train`).

    UsageError if a class to be judged has no image to learn from, or if an image is in both.
    """
    # --class_mapping renames the classes of --val_data to those of --data: after that they are
    # matched by name.
    config = extractor.config
    images = open_labelled(extractor, flag)
    # With --head nothing is learned from --data, which then only tells the classes.
    if not getattr(config, "head", ""):
        require_other_images(train, images, config.data, getattr(config, flag), f"--{flag}")
    if config.class_mapping:
        # A file that is meant for --test_data alone renames nothing in --val_data.
        other = "test_data" if flag == "val_data" else "val_data"
        elsewhere = extractor.open(other).classes if getattr(config, other, "") else None
        classes = mapped_classes(config.class_mapping, flag, images, elsewhere)
        images = replace(images, classes=classes)
    labels = same_labels(train, images, f"--{flag}")

    # A class without an image to learn from could never be answered: every image of it would
    # count as an error, and nobody would see why.
    missing = sorted(set(labels.tolist()) - set(train.labels))
    if missing:
        first = train.classes[missing[0]] if train.classes else missing[0]
        raise UsageError(f"--data {config.data} has no image of {len(missing)} classes of "
                         f"--{flag}, the first: {first}")
    return images, labels


def require_other_images(train, judged, data: str, judged_data: str, flag: str = "--val_data",
                         data_flag: str = "--data"):
    """UsageError if an image of `train` is in `judged`, too; both are Images, or both Pairs.

    data and judged_data: what was given for data_flag and for `flag`.
    """
    # An image that is judged beside itself is its own nearest neighbour, and k-NN has 100 %.
    # Images are told apart by their names and the folder that these are relative to. The name of
    # an image in shards begins with that of its tar file, which is 000000.tar in many folders:
    # there the two patterns have to be the same.
    if train.name == "shards" and data != judged_data:
        return
    places = [
        (images.name, images.root and images.root.resolve()) for images in (train, judged)]
    shared = set(judged.names).intersection(train.names) if places[0] == places[1] else set()
    if shared:
        raise UsageError(
            f"{flag} {judged_data}: {len(shared)} of its {len(judged)} images are in "
            f"{data_flag} {data}, too, such as {min(shared)}; expected others, "
            f"such as {flag} {part_to_judge(data)}")


def mapped_classes(file: str, flag: str, images: Images,
                   elsewhere: list[str] | None = None) -> list[str]:
    """The class names of `images`, each replaced where a line of --class_mapping has it.

    UsageError if the file cannot be read, if a line is not "judged name, learned name", if a
    judged name stands in two lines, or if no line has a class of `images` or of `elsewhere`,
    which are the classes of other images that are judged.
    """
    # A line with another number of commas makes the unpacking below fail with ValueError.
    try:
        # Spreadsheets write an invisible mark before the first letter, which utf-8-sig skips.
        lines = [line for line in Path(file).read_text("utf-8-sig").splitlines() if line]
        names = {}
        for line in lines:
            judged_name, learned_name = line.split(",")
            if judged_name.strip() in names:
                raise ValueError(f"{judged_name.strip()} stands in two lines")
            names[judged_name.strip()] = learned_name.strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"--class_mapping {file}: expected lines 'class in --{flag}, "
                         f"class in --data' ({error})") from None

    # A file may serve for several sets, so a line may name a class of another one; but where
    # none fits, nothing would be renamed anywhere.
    classes = images.classes or []
    if names and not set(names) & {*classes, *(elsewhere or [])}:
        raise UsageError(f"--class_mapping {file}: no line begins with a class of --{flag}, "
                         f"such as {', '.join(classes[:3])}; the first is {next(iter(names))}")
    return [names.get(name, name) for name in classes]


# ----------------------------------------------------------------------------------------------
# For protocols that learn from the images


def hash_of_labels(images: Images) -> str:
    """A hash of all labels and of the names of the classes: what a classifier would learn."""
    return hashlib.sha256(repr((images.labels, images.classes)).encode()).hexdigest()


def training_steps(config, images: Images, default_epochs: int) -> tuple[int, int, int]:
    """(passes over the images, images in a batch, steps): --epochs 0 stands for the default."""
    # An incomplete batch at the end of a pass is left out: its images come in the next pass,
    # whose order is another one.
    epochs = config.epochs or default_epochs
    batch = min(config.batch_size, len(images))
    return epochs, batch, epochs * (len(images) // batch)


def random_crops(images: Images, size: int, batch_size: int, steps: int, process: Process,
                 num_workers: int = 0, seed: int = 0, together: int = 1, start: int = 0):
    """What classifiers are trained on: this process's share of each batch of random crops.

    From step `start` to step `steps`. Yields crops (b, C, size, size), normalised, and their
    labels (b,). A crop covers 8 to 100 % of its image. The batches, batch_size images on all
    processes together, are the same for any number of processes; `together` neighbours stay on
    one of them. An image that does not decode raises ValueError.
    """

    def shares():
        # Every process draws the same whole batches, and takes its groups of neighbours from
        # each. Example: a batch of 6, together 2 and 2 processes make the groups 01, 23, 45:
        # process 0 gets 01 and 45, process 1 gets 23 and, to be as long, 01 once more.
        for keys in Sampler(len(images), batch_size, steps, start, seed):
            groups = [keys[i:i + together] for i in range(0, len(keys), together)]
            yield [key for group in spread(groups, process) for key in group]

    # Of MultiCrop's crops only one global crop is asked for, in its own colours: the classic
    # RandomResizedCrop and horizontal flip.
    crop = MultiCrop(size, size, 1, 0, (0.08, 1.0), photometry="none")
    labels = torch.as_tensor(images.labels)
    for batch in training_loader(Views(images, crop, seed), shares(), num_workers):
        # Self-supervised training replaces an image that does not decode by another one. Here
        # the other image would be learned with the label of the broken one.
        if batch["broken"]:
            raise ValueError(f"--data: an image does not decode: {batch['broken'][0]}")
        pixels = batch["global_crops"][0].to(process.device)
        crops = normalise(pixels, images.channel_stats)  # (b, C, H, W)
        yield crops, labels[batch["index"]].to(process.device)
