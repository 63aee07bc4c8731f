"""Retrieval: is the same thing found before everything else?

    features of queries (q, D) --+
                                 +--> cosine --> order --> junk out --> average precision
    features of images (n, D) ---+                          ^
                                        which are right, which do not count

Idea     A ranking has no threshold to choose: average precision is 1 when all that is right
         comes before all that is wrong. Images that are too hard to call are junk: they are
         passed over.
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
from machinery.flags import UsageError
from machinery.process import Process

FIRST_RANKS = (1, 5, 10)  # how many of the first images mP@k looks at

# ----------------------------------------------------------------------------------------------
# Judging one ranking, and many


def average_precision(ranks: Tensor) -> float:
    """ranks: places (from 0, ascending, junk not counted) of all that is right.

    The area under precision over recall by trapezoids: mean of the precision just before and
    just after each hit. Radenovic 2018's, older than the step-wise one, and a little lower.
    """
    ranks = ranks.double()
    found = torch.arange(len(ranks), dtype=torch.float64)
    before = torch.where(ranks > 0, found / ranks.clamp(min=1), 1.0)
    after = (found + 1) / (ranks + 1)
    return ((before + after) / 2).mean().item()


def score_ranking(similarities: Tensor, right: Tensor, junk: Tensor) -> list[float]:
    """One query: similarities (n,), right and junk (n,) bool -> [AP, P@1, P@5, P@10].

    Ties keep the order of the images. nan where nothing is right: such a query is left out of
    the means. P@k ends at the last right image, when that comes before k.
    """
    if not right.any():
        return [float("nan")] * (1 + len(FIRST_RANKS))
    order = similarities.argsort(descending=True, stable=True)
    order = order[~junk[order]]
    ranks = right[order].nonzero()[:, 0]
    ends = [min(int(ranks[-1]) + 1, k) for k in FIRST_RANKS]
    return [average_precision(ranks), *(int((ranks < end).sum()) / end for end in ends)]


def mean_scores(queries: Tensor, rows: Tensor, truth, process: Process) -> Tensor:
    """Means (4,) of score_ranking over the queries with an answer, ranking `rows` by cosine.

    queries (q, D), rows (n, D); truth: number of a query -> right and junk, (n,) bool each.
    Each process judges its share of the queries.
    """
    queries = F.normalize(queries, dim=1)
    rows = F.normalize(rows, dim=1)
    own_scores = []
    for i in spread(range(len(queries)), process):
        own_scores.append(score_ranking(rows @ queries[i], *truth(i)))

    # Query i was judged by process i modulo W, as the i // W-th of its share.
    parts = process.all_gather(own_scores)
    world = len(parts)
    scores = [parts[i % world][i // world] for i in range(len(queries))]
    return torch.tensor(scores, dtype=torch.float64).nanmean(0)


# ----------------------------------------------------------------------------------------------
# What is right: files of ground truth

HARMLESS = {  # all that lists, numbers and arrays are made of, by the numpy of any year
    *(f"numpy.{core}.{name}" for core in ("core", "_core")
      for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")),
    "numpy.ndarray", "numpy.dtype", "_codecs.encode", "__builtin__.bytes", "builtins.bytes"}


class ArrayUnpickler(pickle.Unpickler):
    """Lists, dictionaries, numbers and arrays: a pickle can ask for any function to be run."""

    def find_class(self, module, name):
        if f"{module}.{name}" not in HARMLESS:
            raise ValueError(f"it asks for {module}.{name}, which has no place there")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_revisited(path: str | Path) -> dict:
    """gnd_roxford5k.pkl, gnd_rparis6k.pkl: names of images (imlist) and of queries (qimlist),
    and for each query its box (bbx) and lists of easy, hard and junk images (gnd). Runs
    nothing.
    """
    try:
        with open(path, "rb") as file:
            truth = ArrayUnpickler(file, encoding="latin1").load()
        queries, images, about = truth["qimlist"], truth["imlist"], truth["gnd"]
        if len(queries) != len(about):
            raise ValueError(f"{len(queries)} queries, but the truth about {len(about)}")
        for each in about:
            for part in ("easy", "hard", "junk"):
                each[part] = torch.as_tensor(np.asarray(each[part], dtype=np.int64))
                if len(each[part]
                       ) and not 0 <= each[part].min() <= each[part].max() < len(images):
                    raise ValueError(f"a list of {part} images goes beyond the {len(images)}")
    except Exception as error:  # a pickle that is no pickle fails in any way
        raise ValueError(f"--ground_truth {path}: not the ground truth of revisited Oxford or "
                         f"Paris ({error!s:.200})") from None
    return truth


# Which lists are right, and which are junk, at the three levels of difficulty. Radenovic 2018.
LEVELS = {
    "easy": (("easy",), ("hard", "junk")), "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk"))}


def relevance(about: dict, level: str, count: int) -> tuple[Tensor, Tensor]:
    """One entry of gnd -> right and junk, (count,) bool each."""
    out = torch.zeros(2, count, dtype=torch.bool)
    for row, parts in zip(out, LEVELS[level]):
        for part in parts:
            row[about[part]] = True
    return out[0], out[1]


def read_groups(path: str | Path, names: list[str]) -> list[str]:
    """A .csv with columns path and group -> the group of each name. Paths may be longer than
    names.

    Images of one group are right for each other.
    """
    try:
        with open(path, newline="") as file:
            rows = [(Path(row["path"]), row["group"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--groups {path}: expected a .csv file with the columns path and group "
            f"({error!s:.100})") from None
    groups = {}
    for path, group in rows:
        for i in range(len(path.parts)):
            groups.setdefault(str(Path(*path.parts[i:])), group)
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
    crop_queries: bool = False  # --ground_truth: only the box of the query, as others than DINO do


class Scales(nn.Module):
    """Mean of the class tokens at several sizes. DINO's retrieval."""

    def __init__(self, model: nn.Module, scales: tuple[float, ...] = (1, 0.5**0.5, 0.5)):
        super().__init__()
        self.model, self.scales = model, scales

    def forward(self, images: Tensor) -> Tensor:
        sizes = [[max(self.model.patch_size, int(side * s)) for side in images.shape[-2:]]
                 for s in self.scales]
        views = [F.interpolate(images, size, mode="bilinear") for size in sizes]
        return torch.stack([self.model(view) for view in views]).mean(0)


def run(extractor: Extractor) -> dict:
    """Cosine ranking by class token: mAP and mP@k. DINO sec. 4.2.1; Radenovic 2018.

    DINO's settings: Oxford --image_size 224, Paris --image_size 512 --multiscale. With
    --ground_truth or --groups whole images of --data are looked for among each other; without,
    --val_data are looked for in --data, and images with the same label are right.
    """
    config, process, model = extractor.config, extractor.process, extractor.model
    read = Scales(model) if config.multiscale else model
    name = "retrieval-multiscale" if config.multiscale else "retrieval"

    def whole_features(images, name):
        """Features of whole images; each has its own shape, so they go one at a time."""
        whole = partial(fit_inside, longest=extractor.size)
        return extractor(images, f"{name}-whole", read, whole, batch_size=1)

    if config.ground_truth:
        images = extractor.open("data")
        figures = revisited(config, images, whole_features, name, process)
    elif config.groups:
        images = extractor.open("data")
        groups = np.array(read_groups(config.groups, images.names))
        rows = whole_features(images, name)
        numbers = torch.arange(len(images))

        def same_group(i):  # the query itself is junk: it would always come first
            return torch.from_numpy(groups == groups[i]) & (numbers != i), numbers == i

        figures = {"groups": mean_scores(rows, rows, same_group, process)}
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

    columns = ("mAP", *(f"mP@{k}" for k in FIRST_RANKS))
    scales = ", three scales" if config.multiscale else ""
    process.print(f"retrieval: class token at {extractor.size} px{scales}")
    process.print(f"  {'':8s}" + "".join(f"{column:>8s}" for column in columns))
    for level, values in figures.items():
        process.print(f"  {level:8s}" + "".join(f"{v:8.2%}" for v in values.tolist()))
    out = {level: dict(zip(columns, values.tolist())) for level, values in figures.items()}
    return {
        "retrieval": out, "protocol": f"cosine of class tokens, {name}",
        "headline": {f"retrieval mAP, {level}": v["mAP"]
                     for level, v in out.items()}}


def revisited(config: Config, images: Images, whole_features, name: str,
              process: Process) -> dict:
    """Level -> mean scores, by the ground truth of revisited Oxford or Paris."""
    truth = read_revisited(config.ground_truth)
    numbers = {Path(n).stem: i for i, n in enumerate(images.names)}
    missing = [n for n in (*truth["imlist"], *truth["qimlist"]) if n not in numbers]
    if missing:
        raise UsageError(
            f"--ground_truth {config.ground_truth}: {len(missing)} of its images are "
            f"not in --data {config.data}, the first {missing[0]}")
    queried = images.subset(numbers[n] for n in truth["qimlist"])
    query_name = f"{name}-queries"
    if config.crop_queries:
        boxes = [each["bbx"] for each in truth["gnd"]]
        queried = replace(queried, read=partial(read_box, queried.read, boxes))
        query_name = f"{name}-boxes-queries"
    rows = whole_features(images.subset(numbers[n] for n in truth["imlist"]), f"{name}-data")
    queries = whole_features(queried, query_name)

    figures = {}
    for level in LEVELS:

        def at_this_level(i, level=level):
            return relevance(truth["gnd"][i], level, len(rows))

        figures[level] = mean_scores(queries, rows, at_this_level, process)
    return figures


def read_box(read, boxes, i: int) -> Tensor:
    """Image i cut to its box (left, top, right, bottom), which may reach beyond the image."""
    left, top, right, bottom = (round(float(x)) for x in boxes[i])
    return read(i)[:, max(top, 0):max(bottom, top + 1), max(left, 0):max(right, left + 1)]
