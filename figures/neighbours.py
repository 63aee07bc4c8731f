"""Neighbours: the images that a network takes for most similar to an image.

    queries, images of --data --> class tokens --> cosines --> the k nearest of each query
                                                                  |
                                     a row of pictures, the class right or wrong where it is known

Idea     k-NN says how often the neighbours have the right class. The neighbours themselves say
         why: whether the network compares things, or colours, or backgrounds, and which of its
         mistakes a person would make, too.
Paper    DINO sec. 4.1 (k-NN) and 4.2.1 (retrieval); DINOv2 sec. 7.3
Try      python visualize.py neighbours shapes:val --data shapes:1000 --weights RUN
Change   which images are shown for a query: `nearest`
Tests    pytest tests/figures/test_neighbours.py

Letters  n queries, k neighbours, D width.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from augment import center_crop

from evaluation import protocol
from evaluation.extract import same_labels
from evaluation.judge import evenly_spaced
from evaluation.knn import top_neighbours
from evaluation.protocol import Extractor
from images.data import Images, open_images
from images.files import read_file
from images.names import beside_validation
from machinery.flags import UsageError, near_path, require
from figures.inputs import short
from machinery.page import draw_frame, picture, pyplot, rows_of_pictures, save, show
from machinery.process import start_process

RIGHT = "#0072B2"  # blue and vermilion: people who are colour-blind can tell them apart
WRONG = "#D55E00"
SHOWN = 160  # pixels of a picture on the page

# ----------------------------------------------------------------------------------------------
# Queries


def read_nth(files: list[Path], channels: int, i: int) -> Tensor:
    return read_file(files[i], channels)


def photos_as_images(words: list[str], bank: Images) -> Images:
    """Files of photos as a set. Their folders are their labels, where the bank has such classes.

    UsageError for a file that does not exist.
    """
    # A wrong name is found before any feature is computed.
    files = [Path(word).expanduser() for word in words]
    for file in files:
        if file.is_dir():
            raise UsageError(f"{file} is a folder: expected photos, or folder:{file}")
        if not file.is_file():
            raise UsageError(
                f"{file}: there is no such file{near_path(file)}; expected photos, "
                "or one name of a set of images, such as folder:PATH")

    # The folder of a photo is often its class, as in data/val/cats/07.jpg.
    classes = bank.classes or []
    folders = [file.resolve().parent.name for file in files]
    labels = None
    if all(folder in classes for folder in folders):
        labels = [classes.index(folder) for folder in folders]
    read = partial(read_nth, files, bank.channel_stats.channels)
    return Images("photos", read, [str(file) for file in files], labels, bank.classes,
                  channel_stats=bank.channel_stats)


def open_queries(words: list[str], bank: Images, config) -> Images:
    """What was typed after the name of the figure: photos, or the name of a set of images."""
    # Names of sets have a colon, as in shapes:100 or folder:PATH; hardly any file has one.
    if len(words) == 1 and ":" in words[0] and not Path(words[0]).exists():
        images = open_images(words[0], config.data_root, config.download, "QUERIES",
                             bank.channel_stats)
        return evenly_spaced(images, config.queries)
    return photos_as_images(words, bank)


# ----------------------------------------------------------------------------------------------
# Neighbours


@dataclass
class Neighbour:
    """One image of the bank beside a query."""

    row: int  # its number in the bank
    cosine: float
    right: bool | None  # whether it has the class of the query; None where that is not known


def shown(images: Images, i: int) -> Tensor:
    """The part of image i that the network sees, large enough for a page: (C, s, s)."""
    # The crop of an evaluation shows the same part of an image at any size.
    return center_crop(images.read_at(i, SHOWN), SHOWN)


def nearest(features: Tensor, bank_features: Tensor, queries: Images, bank: Images,
            k: int) -> list[list[Neighbour]]:
    """The k nearest images of the bank for each query, nearest first.

    features (n, D) are those of the queries. One image that equals the query pixel by pixel is
    left out: where the query is in the bank itself, it would always be the nearest one. Further
    copies of it in the bank are neighbours.
    """
    # One neighbour more than is wanted takes the place of the one that is left out.
    cosines, rows = top_neighbours(features, bank_features, min(k + 1, len(bank)))
    labels = None
    if queries.labels and bank.labels:
        labels = same_labels(bank, queries)  # in the numbers of the bank

    found = []
    for i in range(len(queries)):
        query = shown(queries, i)
        neighbours = []
        itself = None  # the row that is left out
        for cosine, row in zip(cosines[i].tolist(), rows[i].tolist()):
            # Only a cosine of about 1 can be that of the same pixels.
            if itself is None and cosine > 0.999 and torch.equal(shown(bank, row), query):
                itself = row
                continue
            right = None if labels is None else bank.labels[row] == int(labels[i])
            neighbours.append(Neighbour(row, cosine, right))
        found.append(neighbours[:k])
    return found


# ----------------------------------------------------------------------------------------------
# The page


def class_name(images: Images, i: int) -> str:
    """What a picture is called on the page, in 16 letters: its class, or else its file."""
    if images.labels and images.classes:
        return images.classes[images.labels[i]][:16]
    return short(Path(images.names[i]), 15)


def draw_neighbours(queries: Images, bank: Images, found: list[list[Neighbour]]):
    """A row for each query: the query, and its neighbours with their cosines. -> the figure."""
    columns = 1 + max(len(neighbours) for neighbours in found)
    fig, axes = rows_of_pictures([[1.0] * columns] * len(found))
    for i, (row, neighbours) in enumerate(zip(axes, found)):
        for axis in row:
            axis.axis("off")  # a place that stays empty
        show(row[0], picture(shown(queries, i)), class_name(queries, i))
        draw_frame(row[0], "black")
        for axis, neighbour in zip(row[1:], neighbours):
            show(axis, picture(shown(bank, neighbour.row)))

            # Right and wrong differ in colour and in sign, for prints without colours.
            sign = {True: "✓ ", False: "✗ ", None: ""}[neighbour.right]
            colour = {True: RIGHT, False: WRONG, None: "black"}[neighbour.right]
            axis.set_title(f"{sign}{neighbour.cosine:.2f}", fontsize=9, color=colour)
            if neighbour.right is not None:
                draw_frame(axis, colour)
    return fig


def caption_of(config, extractor: Extractor, bank: Images, found) -> str:
    """The network, the images, and how many of the neighbours have the right class."""
    text = (f"{Path(config.weights).name}, class token at {extractor.size} px: the nearest of "
            f"{len(bank):,d} images of {Path(config.data).name}, with their cosines")
    judged = [n.right for neighbours in found for n in neighbours if n.right is not None]
    if judged:
        text += f"; ✓ the class of the query, {sum(judged)} of {len(judged)}"
    return text


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "PHOTO_OR_DATA ... --data DATA --weights RUN_OR_FILE_OR_NAME"


@dataclass
class Config(protocol.Config):
    # -- neighbours
    queries: int = 6  # how many images of a set are queries; photos are all drawn
    k: int = 8  # neighbours of each query
    output: str = ""  # the picture to write; empty: neighbours.png in this folder
    # The protocols have a folder for their results, a figure has --output
    output_dir: str = dataclasses.field(default="", metadata={"no_flag": True})  # not a flag

    def check(self):
        super().check()
        require(self, lambda x: x >= 1, "at least 1", "queries", "k")


def draw(arguments: list[str], config: Config) -> Path:
    """Images and their nearest neighbours among others: right and wrong where labels exist."""
    # The features of queries and bank come as for every evaluation.
    config.check()
    pyplot()
    extractor = Extractor(config, start_process(config.device))

    # Beside X:val the name X stands for the other part of X, as in the evaluations.
    name = beside_validation(config.data, arguments[0])
    bank = open_images(name, config.data_root, config.download, "--data",
                       extractor.model.channel_stats)
    queries = open_queries(arguments, bank, config)

    features = extractor(queries, "queries")
    bank_features = extractor(bank, "neighbours-data")
    found = nearest(features, bank_features, queries, bank, config.k)
    fig = draw_neighbours(queries, bank, found)
    caption = caption_of(config, extractor, bank, found)
    return save(fig, Path(config.output or "neighbours.png"), caption)
