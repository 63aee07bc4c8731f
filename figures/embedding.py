"""Embedding: a map of a set of images, similar ones beside each other.

    images --> class tokens (n, D) --> t-SNE or PCA (n, 2) --> a dot each, pictures where there
                                                               is room

Idea     A feature has hundreds of numbers, a page has two directions. PCA keeps the two
         directions of the largest spread, and all else falls together. t-SNE gives up distances
         and keeps neighbours: groups that the network sees become islands, but how large an
         island is, and how far from the next one, means nothing.
Paper    t-SNE (van der Maaten and Hinton 2008); DINO appendix H and fig. 11
Try      python visualize.py embedding shapes:500 --weights RUN
Change   another way to two dimensions is a function and one line in METHODS
Tests    pytest tests/figures/test_embedding.py

Letters  n images, D width.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import protocol
from evaluation.judge import evenly_spaced
from evaluation.protocol import Extractor
from figures.neighbours import shown
from images.data import Images, open_images
from machinery.flags import UsageError, require
from machinery.page import picture, pyplot, save
from machinery.process import start_process

# ----------------------------------------------------------------------------------------------
# From D dimensions to two


def pca(features: Tensor) -> Tensor:
    """The two main directions of rows of unit length: (n, D) -> (n, 2)."""
    rows = F.normalize(features.double(), dim=1)
    centred = rows - rows.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)

    # A direction is as good as its opposite: its largest number is made positive.
    directions = directions[:2]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return centred @ (directions * largest.sign()).T  # (n, 2)


def affinities(features: Tensor, perplexity: float) -> Tensor:
    """How likely image i is to choose image j as its neighbour: (n, n), rows add up to 1.

    The chance falls with the squared distance of i and j, times a factor of i. The factor is
    found by halving an interval: the entropy of each row has to be ln(perplexity), which is that
    of a choice among so many equally good neighbours.
    """
    rows = F.normalize(features.double(), dim=1)
    squared = (2 - 2 * rows @ rows.T).clamp(min=0)  # (n, n)
    squared.fill_diagonal_(torch.inf)  # nobody is its own neighbour
    low = torch.full((len(rows), 1), -20.0, dtype=torch.float64)  # of the factor's logarithm
    high = torch.full_like(low, 20.0)
    for _ in range(50):
        middle = (low + high) / 2
        chances = (-squared * middle.exp()).softmax(1)  # (n, n)
        entropy = torch.special.entr(chances).sum(1, keepdim=True)  # (n, 1)
        too_wide = entropy > torch.tensor(perplexity).log()
        low = torch.where(too_wide, middle, low)
        high = torch.where(too_wide, high, middle)
    return chances


def tsne(features: Tensor, perplexity: float = 30.0, steps: int = 500) -> Tensor:
    """(n, D) -> (n, 2) with the same neighbours, as far as two dimensions allow. t-SNE sec. 3.

    It begins with PCA, so that nothing is random. perplexity: about how many neighbours count.
    """
    # With few images there are not so many neighbours.
    wanted = affinities(features, min(perplexity, (len(features) - 1) / 3))
    wanted = (wanted + wanted.T) / (2 * len(wanted))  # of pairs: all of them add up to 1
    y = pca(features)
    y = y / y.std().clamp(min=1e-12) * 1e-4
    velocity = torch.zeros_like(y)
    gains = torch.ones_like(y)
    rate = max(len(y) / 48, 50.0)
    for step in range(steps):
        # In the plane, chances follow a distribution with heavy tails: 1 / (1 + distance^2). So
        # what is not similar can be far away at little cost.
        near = 1 / (1 + torch.cdist(y, y)**2)  # (n, n)
        near.fill_diagonal_(0)
        actual = near / near.sum()

        # For a quarter of the steps neighbours attract each other twelve times as much, so that
        # groups form before they get in each other's way.
        early = step < steps // 4
        force = (wanted * (12 if early else 1) - actual) * near  # (n, n)
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)  # (n, 2)

        # A number that keeps its direction takes longer and longer steps.
        same_direction = gradient * velocity < 0
        gains = torch.where(same_direction, gains + 0.2, gains * 0.8).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
    return y - y.mean(0)


METHODS = {"tsne": tsne, "pca": pca}

# ----------------------------------------------------------------------------------------------
# The page

SIDE = 11.0  # inches of the map
THUMBNAIL = 0.55  # inches


def to_page(places: Tensor) -> Tensor:
    """(n, 2) -> inches on the page, each direction stretched to its whole length."""
    low = places.amin(0)
    spread = (places.amax(0) - low).clamp(min=1e-12)
    return (places - low) / spread * (SIDE - THUMBNAIL) + THUMBNAIL / 2


def with_room(places: Tensor) -> list[int]:
    """Images whose pictures do not overlap; places are in inches."""
    # In the order of a folder the first classes would take all of the room. The order is random,
    # and the same every time.
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    chosen = []
    for i in order.tolist():
        distance = (places[chosen] - places[i]).abs().amax(1)
        if (distance >= 1.1 * THUMBNAIL).all():
            chosen.append(i)
    return chosen


def draw_embedding(images: Images, places: Tensor):
    """The map of the images at their places (n, 2): the figure of matplotlib."""
    plt = pyplot()
    from matplotlib.patches import Rectangle

    fig, axis = plt.subplots(figsize=(SIDE, SIDE))
    fig.subplots_adjust(0, 0, 1, 1)
    inches = to_page(places)

    # Every image is a dot in the colour of its class. There are twenty colours: if there are more
    # classes, none has one, because those that shared it would be taken for the same.
    coloured = images.labels and max(images.labels) < 20
    labels = torch.tensor(images.labels if coloured else [0] * len(images))
    count = int(labels.max()) + 1
    palette = plt.get_cmap("tab10" if count <= 10 else "tab20")
    for label in labels.unique().tolist():
        x, y = inches[labels == label].T.numpy()
        name = images.classes[label] if coloured and images.classes else None
        axis.plot(x, y, "o", markersize=4, color=palette(label), label=name)

    # Dots that are covered by a picture are in it: the picture stands at its own dot.
    half = THUMBNAIL / 2
    for i in with_room(inches):
        x, y = inches[i].tolist()
        axis.imshow(
            picture(shown(images, i)).numpy(), extent=(x - half, x + half, y - half, y + half),
            zorder=2)
        if coloured:
            colour = palette(int(labels[i]))
            axis.add_patch(
                Rectangle((x - half, y - half), THUMBNAIL, THUMBNAIL, fill=False, ec=colour,
                          lw=2, zorder=3))
    axis.set(xlim=(-0.05, SIDE + 0.05), ylim=(-0.05, SIDE + 0.05), aspect="equal")
    axis.axis("off")
    if coloured and images.classes:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(count, 5),
                    frameon=False, markerscale=2)
    return fig


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "DATA --weights RUN_OR_FILE_OR_NAME"


@dataclass
class Config(protocol.Config):
    # -- embedding
    method: Literal[*METHODS] = "tsne"  # how features become places on the page
    most: int = 1000  # images on the map, at most, spread evenly over the set
    output: str = ""  # the picture to write; empty: embedding.png in this folder
    # The images are the word after `embedding`, and a figure has --output, not a folder.
    data: str = dataclasses.field(default="", metadata={"no_flag": True})  # not a flag
    output_dir: str = dataclasses.field(default="", metadata={"no_flag": True})  # not a flag

    def check(self):
        super().check()
        require(self, lambda x: 4 <= x <= 5000, "from 4 to 5000", "most")


def draw(arguments: list[str], config: Config) -> Path:
    """A map of a set of images in two dimensions, similar ones beside each other."""
    if len(arguments) > 1:
        raise UsageError(f"embedding draws one set of images, not {len(arguments)}")
    config.check()
    extractor = Extractor(config, start_process(config.device))
    data = arguments[0]
    images = open_images(data, config.data_root, config.download, "DATA",
                         extractor.model.channel_stats)
    images = evenly_spaced(images, config.most)
    if len(images) < 4:
        raise UsageError(f"{data}: {len(images)} images, a map needs at least 4")

    places = METHODS[config.method](extractor(images, "embedding"))
    method = {"tsne": "t-SNE, where only neighbours mean something", "pca": "PCA"}
    caption = (f"{Path(config.weights).name}, class tokens of {len(images):,d} images of "
               f"{Path(data).name} at {extractor.size} px; {method[config.method]}")
    return save(draw_embedding(images, places), Path(config.output or "embedding.png"), caption)
