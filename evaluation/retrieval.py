"""Retrieval: is the same thing found before everything else?

    features of queries (q, D) --+
                                 +--> cosine --> order --> junk out --> average precision
    features of images (n, D) ---+                          ^
                                        which are right, which do not count

Idea     A ranking needs no threshold: its average precision is 1 when all right images come
         before all wrong ones. Images of which nobody can say whether they are right are junk:
         they are taken out of the ranking, and neither help nor harm.
Paper    DINO sec. 4.2.1; Radenovic 2018 (revisited Oxford and Paris)
Try      python evaluate.py retrieval --weights RUN
Change   how many of the first images mP@k looks at: FIRST_RANKS
Tests    pytest tests/evaluation/test_retrieval.py

Letters  q queries, n images, D width.
"""

import csv
import pickle
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import fit_inside
from evaluation import protocol
from evaluation.extract import spread
from evaluation.protocol import Extractor, open_judged, open_labelled
from images.data import Images
from machinery.clock import Progress
from machinery.flags import UsageError
from machinery.process import Process

FIRST_RANKS = (1, 5, 10)  # how many of the first images mP@k looks at

# ----------------------------------------------------------------------------------------------
# Judging one ranking, and many


def average_precision(ranks: Tensor) -> float:
    """The area under the curve of precision over recall, in trapezoids. Radenovic 2018's code.

    ranks (r,): the places of all right images in the ranking, from 0, ascending, junk not
    counted. Each hit raises the recall by 1 / r; over this width the area is the mean of the
    precision just before and just after the hit. The usual definition takes the precision after
    it alone, and is a little higher. Example with three right images, at the ranks 0, 1 and 4
    (the ranking begins: right, right, wrong, wrong, right):

        rank of the hit                             0      1      4
        precision before: hits / images so far     (1)    1/1    2/4
        precision after                            1/1    2/2    3/5
        mean of the two                             1      1     .55
        average precision                          (1 + 1 + .55) / 3 = .85
    """
    # Float64, because the figures of two programs are compared to the last digit.
    ranks = ranks.double()
    hits_before = torch.arange(len(ranks), dtype=torch.float64)  # (r,)

    # Before rank 0 there are no images: the precision 0/0 counts as 1.
    before = torch.where(ranks > 0, hits_before / ranks.clamp(min=1), 1.0)  # (r,)
    after = (hits_before + 1) / (ranks + 1)  # (r,)
    return ((before + after) / 2).mean().item()


def score_ranking(similarities: Tensor, right: Tensor, junk: Tensor) -> list[float]:
    """One query: similarities (n,), right and junk (n,) bool -> [AP, P@1, P@5, P@10].

    P@k is the share of right images among the first k. It ends at the last right image, if that
    comes before k. Example: hits at the ranks 0, 1 and 4 give P@1 = 1/1, P@5 = 3/5, and P@10 =
    3/5, too. nan where nothing is right: such a query is left out of the means.
    """
    if not right.any():
        return [float("nan")] * (1 + len(FIRST_RANKS))

    # A stable sort keeps the order of the images where similarities are equal. Junk is taken
    # out before the ranks are counted.
    order = similarities.argsort(descending=True, stable=True)
    order = order[~junk[order]]
    ranks = right[order].nonzero()[:, 0].cpu()

    scores = [average_precision(ranks)]
    for k in FIRST_RANKS:
        end = min(int(ranks[-1]) + 1, k)
        scores.append(int((ranks < end).sum()) / end)
    return scores


def mean_scores(queries: Tensor, rows: Tensor, truth, process: Process) -> Tensor:
    """Means (4,) of score_ranking over the queries with an answer, ranking `rows` by cosine.

    queries (q, D), rows (n, D); truth: number of a query -> right and junk, (n,) bool each.
    Each process judges its share of the queries; all get the means.
    """
    # Of unit vectors the product is the cosine. All rows are multiplied and sorted anew for each
    # query, which takes half a second of one core for a million of them: so it is done where the
    # network ran.
    queries = F.normalize(queries.to(process.device), dim=1)
    rows = F.normalize(rows.to(process.device), dim=1)
    share = spread(range(len(queries)), process)
    report = Progress("ranking", len(share), process)
    own_scores = []
    for done, i in enumerate(share, 1):
        right, junk = (of_rows.to(process.device) for of_rows in truth(i))
        own_scores.append(score_ranking(rows @ queries[i], right, junk))
        report(done)

    # Query i was judged by process i modulo W, as the i // W-th of its share.
    parts = process.all_gather(own_scores)
    world = len(parts)
    scores = [parts[i % world][i // world] for i in range(len(queries))]
    return torch.tensor(scores, dtype=torch.float64).nanmean(0)


# ----------------------------------------------------------------------------------------------
# What is right: files of ground truth

# What a pickle of lists, numbers and numpy's arrays asks for. numpy 2 has renamed numpy.core
# to numpy._core: files of both kinds are read.
HARMLESS = {
    "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer", "_codecs.encode", "__builtin__.bytes", "builtins.bytes"}


class ArrayUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, numbers and arrays, and refuses everything else.

    A pickle is a small program: it may name any function, which reading it then calls. A file
    from the internet must not get to do that.
    """

    def find_class(self, module, name):
        if f"{module}.{name}" not in HARMLESS:
            raise ValueError(f"it asks for {module}.{name}, which has no place there")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_revisited(path: str | Path) -> dict:
    """The ground truth of revisited Oxford or Paris: gnd_roxford5k.pkl or gnd_rparis6k.pkl.

    imlist: names of the images; qimlist: names of the queries; gnd: for each query its box
    (bbx) and the numbers of its easy, hard and junk images. ValueError for any other file.
    """
    try:
        with open(path, "rb") as file:
            truth = ArrayUnpickler(file, encoding="latin1").load()
        queries = truth["qimlist"]
        images = truth["imlist"]
        if len(queries) != len(truth["gnd"]):
            raise ValueError(f"{len(queries)} queries, but the truth about {len(truth['gnd'])}")

        # The lists become tensors, and each of their numbers must be that of an image.
        for entry in truth["gnd"]:
            for part in ("easy", "hard", "junk"):
                numbers = torch.as_tensor(np.asarray(entry[part], dtype=np.int64))
                entry[part] = numbers
                if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(images):
                    raise ValueError(f"a list of {part} images goes beyond the {len(images)}")
            if len(entry["bbx"]) != 4:
                raise ValueError(f"a box of {len(entry['bbx'])} numbers")
    except Exception as error:  # a pickle that is no pickle fails in any way
        raise ValueError(f"--ground_truth {path}: not the ground truth of revisited Oxford or "
                         f"Paris ({error!s:.200})") from None
    return truth


# Level of difficulty -> the lists that are right, and the lists that are junk. Radenovic 2018.
# At "hard" the easy images are junk: to find them would be no merit, and no mistake.
LEVELS = {
    "easy": (("easy",), ("hard", "junk")), "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk"))}


def relevance(entry: dict, level: str, count: int) -> tuple[Tensor, Tensor]:
    """One entry of gnd -> right and junk, (count,) bool each."""
    right_and_junk = torch.zeros(2, count, dtype=torch.bool)
    for row, parts in zip(right_and_junk, LEVELS[level]):
        for part in parts:
            row[entry[part]] = True
    return right_and_junk[0], right_and_junk[1]


def read_groups(path: str | Path, names: list[str]) -> list[str]:
    """A .csv with the columns path and group -> the group of each of `names`.

    Images of one group are right for each other. Paths may be longer than names: photos/a/1.jpg
    in the file is the group of a/1.jpg. ValueError if the file cannot be read, if a row has an
    empty path or group, or if a name is not in it.
    """
    try:
        # utf-8-sig: spreadsheets put a mark of three bytes before the first column.
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = [(row["path"], row["group"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"--groups {path}: expected a .csv file with the columns path and group "
            f"({error!s:.100})") from None

    # All images without a group would be taken for one group, and be right for each other.
    for number, row in enumerate(rows, 1):
        if not all(row):
            raise ValueError(f"--groups {path}: row {number} below the header has no "
                             f"{'group' if row[0] else 'path'}; an image that belongs to no "
                             "other needs a group of its own")

    # A name is looked for among the whole paths first, and then among their endings:
    # photos/a/1.jpg has a/1.jpg and 1.jpg. Where two paths end alike, the first one keeps it.
    groups = {str(Path(image)): group for image, group in rows}
    for image, group in rows:
        parts = Path(image).parts
        for i in range(1, len(parts)):
            groups.setdefault(str(Path(*parts[i:])), group)
    missing = [name for name in names if str(Path(name)) not in groups]
    if missing:
        raise ValueError(
            f"--groups {path}: {len(missing)} of {len(names)} images are not in it, "
            f"the first {missing[0]}")
    return [groups[str(Path(name))] for name in names]


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.Labelled, protocol.Config):
    # -- retrieval
    ground_truth: str = ""  # gnd_roxford5k.pkl or gnd_rparis6k.pkl, about the images of --data
    groups: str = ""  # a .csv with the columns path,group: images of one group belong together
    multiscale: bool = False  # mean of the features at the scales 1, 1/sqrt(2), 1/2
    crop_queries: bool = False  # for --ground_truth: cut queries to their boxes, unlike DINO


class Scales(nn.Module):
    """Mean of the class tokens at several sizes: (B, C, H, W) -> (B, D). DINO's retrieval."""

    def __init__(self, model: nn.Module, scales: tuple[float, ...] = (1, 0.5**0.5, 0.5)):
        super().__init__()
        self.model = model
        self.scales = scales

    def forward(self, images: Tensor) -> Tensor:
        # No side is smaller than a patch, which is the least that the network takes: neither that
        # of a smaller view, nor the short one of a very long image.
        height, width = images.shape[-2:]
        least = self.model.patch_size
        features = []
        for scale in self.scales:
            size = [max(least, int(height * scale)), max(least, int(width * scale))]
            views = F.interpolate(images, size, mode="bilinear")
            features.append(self.model(views))
        return torch.stack(features).mean(0)


def run(extractor: Extractor) -> dict:
    """Cosine ranking by class token: mAP and mP@k. DINO sec. 4.2.1; Radenovic 2018.

    DINO's settings: Oxford --image_size 224, Paris --image_size 512 --multiscale. With
    --ground_truth or --groups whole images of --data are looked for among each other; without,
    --val_data are looked for in --data, and images with the same label are right.
    """
    config = extractor.config
    process = extractor.process
    model = extractor.model
    if config.ground_truth and config.groups:
        raise UsageError("--ground_truth and --groups both say what is right: give one of them")
    if config.crop_queries and not config.ground_truth:
        raise UsageError(
            "--crop_queries cuts queries to the boxes of --ground_truth: give it too")
    read = Scales(model) if config.multiscale else Scales(model, (1,))
    name = "retrieval-multiscale" if config.multiscale else "retrieval"

    def whole_features(images, name):
        """Features of whole images. Each has its own shape, so they go one at a time."""
        whole = partial(fit_inside, longest=extractor.size)
        return extractor(images, f"{name}-whole", read, whole, batch_size=1)

    # What is right is told by one of three sources. Each gives the means of the scores by name:
    # three levels of difficulty, or one entry.
    if config.ground_truth:
        images = extractor.open("data")
        figures = revisited(config, images, whole_features, name, process)
        judged = {"val_data": "", "ground_truth": config.ground_truth}
    elif config.groups:
        images = extractor.open("data")
        groups = np.array(read_groups(config.groups, images.names))
        if len(set(groups)) == len(groups):  # an image is not compared with itself
            raise UsageError(f"--groups {config.groups}: no two images of --data {config.data} "
                             "have the same group, so there is nothing to be found")
        rows = whole_features(images, name)
        numbers = torch.arange(len(images))

        def same_group(i):  # the query itself is junk: it would always come first
            return torch.from_numpy(groups == groups[i]) & (numbers != i), numbers == i

        figures = {"groups": mean_scores(rows, rows, same_group, process)}
        judged = {"val_data": "", "groups": config.groups}
    else:
        train = open_labelled(extractor)
        val, labels = open_judged(extractor, train)
        rows = extractor(train, f"{name}-data", read)
        queries = extractor(val, f"{name}-val_data", read)
        targets = torch.tensor(train.labels)
        no_junk = torch.zeros(len(rows), dtype=torch.bool)

        def same_label(i):
            return targets == labels[i], no_junk

        figures = {"labels": mean_scores(queries, rows, same_label, process)}
        judged = {}  # --val_data, which every results.json names

    # The table, a line for each entry, and the same as a dictionary.
    columns = ("mAP", *(f"mP@{k}" for k in FIRST_RANKS))
    scales = ", three scales" if config.multiscale else ""
    process.print(f"retrieval: class token at {extractor.size} px{scales}")
    process.print(f"  {'':8s}" + "".join(f"{column:>8s}" for column in columns))
    for level, values in figures.items():
        process.print(f"  {level:8s}" + "".join(f"{v:8.2%}" for v in values.tolist()))
    scores = {level: dict(zip(columns, values.tolist())) for level, values in figures.items()}
    headline = {f"retrieval mAP, {level}": values["mAP"] for level, values in scores.items()}
    return judged | {
        "retrieval": scores, "protocol": f"cosine of class tokens, {name}", "headline": headline
    }


def revisited(config: Config, images: Images, whole_features, name: str,
              process: Process) -> dict:
    """Level -> mean scores, by the ground truth of revisited Oxford or Paris.

    Images of the folder that are not in the ground truth are left out of the ranking.
    """
    # The ground truth knows images by their names without folder and ending.
    truth = read_revisited(config.ground_truth)
    numbers = {}
    for i, image_name in enumerate(images.names):
        first = numbers.setdefault(Path(image_name).stem, i)
        if first != i:
            raise UsageError(
                f"--data {config.data}: {images.names[first]} and {image_name} have the same "
                f"name, by which --ground_truth {config.ground_truth} asks for one image; give "
                "the folder of the photographs alone")
    missing = [n for n in (*truth["imlist"], *truth["qimlist"]) if n not in numbers]
    if missing:
        raise UsageError(
            f"--ground_truth {config.ground_truth}: {len(missing)} of its images are "
            f"not in --data {config.data}, the first {missing[0]}")

    # A query is an image with a box around the building that is meant. DINO shows the whole
    # image to the network; with --crop_queries only the box is shown.
    queried = images.subset(numbers[n] for n in truth["qimlist"])
    query_name = f"{name}-queries"
    if config.crop_queries:
        boxes = [entry["bbx"] for entry in truth["gnd"]]
        queried = replace(queried, read=partial(read_box, queried.read, boxes))
        query_name = f"{name}-boxes-queries"
    rows = whole_features(images.subset(numbers[n] for n in truth["imlist"]), f"{name}-data")
    queries = whole_features(queried, query_name)

    # One ranking is judged at three levels: they differ in what is right and what is junk.
    figures = {}
    for level in LEVELS:

        def at_this_level(i, level=level):  # as a default, because `level` goes on changing
            return relevance(truth["gnd"][i], level, len(rows))

        figures[level] = mean_scores(queries, rows, at_this_level, process)
    return figures


def read_box(read, boxes, i: int) -> Tensor:
    """Image i cut to its box (left, top, right, bottom), which may reach beyond the image."""
    # Of a box without width or height one row or column of pixels is left.
    left, top, right, bottom = (round(float(x)) for x in boxes[i])
    return read(i)[:, max(top, 0):max(bottom, top + 1), max(left, 0):max(right, left + 1)]
