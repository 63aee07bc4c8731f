"""Extract: features of all images from a frozen network, the same on every process.

    images --> centre crop --> backbone --> class tokens (n, D), all of them on every process

Idea     Each process takes every W-th image, and the rows are put together again in order: a
         table of features does not depend on how many processes made it.
Paper    DINO sec. 4.1 and appendix F: the features that every protocol starts from
Try      python evaluate.py features --weights dino_vits16 --data folder:PHOTOS
Change   another reading of the network: any module that maps images to (B, D), as Blocks does
         in backbones/classifier.py
Tests    pytest tests/evaluation/test_extract.py

Letters  n images, B images of a batch, D width, C classes, b best of them: five, or all where
         there are fewer.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from augment import center_crop, normalise
from images.data import Images, begin_worker, first_line, repeated_class
from machinery.process import Process, autocast

# ----------------------------------------------------------------------------------------------
# Features


class Prepared(torch.utils.data.Dataset):
    """Image i as an evaluation sees it: prepare(image), uint8; a text if it does not decode."""

    def __init__(self, images: Images, prepare: Callable[[Tensor], Tensor]):
        self.images = images
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor | str:
        # What is wrong is said in one line. As an exception of a worker it would come with the
        # traceback of that process, so it is handed on as a text.
        try:
            return self.prepare(self.images.read(i))
        except Exception as error:  # decoders raise exceptions of many kinds
            return f"{self.images.names[i]}: {first_line(error)}"


def collate_or_text(samples: list) -> Tensor | list[Tensor] | str:
    """The samples as a batch, as the loader makes it; or the first text among them."""
    for sample in samples:
        if isinstance(sample, str):
            return sample
    return torch.utils.data.default_collate(samples)


@torch.no_grad()
def extract(model: nn.Module, images: Images, size: int, process: Process,
            batch_size: int = 128, num_workers: int = 0, precision: str = "fp32", report=None,
            prepare=None) -> Tensor:
    """Features (n, D) float32 of all images, on the CPU, the same on every process.

    model maps normalised images to (B, D). `report` is called with the number of images done.
    `prepare` takes the place of the centre crop to `size` pixels; where it keeps the shapes of
    the images, batch_size has to be 1. ValueError with the name of an image that does not
    decode: judging needs them all.
    """
    # Each process takes a share. More workers than batches would only cost time to start.
    own_rows = spread(range(len(images)), process)
    prepared = Prepared(images, prepare or partial(center_crop, size=size))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(prepared, own_rows), batch_size,
        num_workers=min(num_workers, (len(own_rows) - 1) // batch_size),
        worker_init_fn=begin_worker, collate_fn=collate_or_text)

    # Evaluation mode: no stochastic depth, and BatchNorm with the statistics that it has. A
    # network that is in training goes on in its own mode afterwards.
    was_training = model.training
    model.eval()
    done = 0
    for batch in loader:
        if isinstance(batch, str):
            raise ValueError(f"{batch}; mend this image, or take it out")
        with autocast(precision, process.device):
            rows = model(normalise(batch.to(process.device),
                                   images.channel_stats)).float()  # (B, D)

        # Each process has the rows of its share of this batch; now all have those of all.
        rows = gather(rows, len(images) - done, process)

        # The table can be gigabytes: it is allocated once, when the width is known, and filled
        # in place. Collecting batches in a list and joining them would need twice the memory.
        if done == 0:
            out = torch.empty(len(images), rows.shape[1])
        out[done:done + len(rows)] = rows
        done += len(rows)
        if report:
            report(done)
    model.train(was_training)
    return out


def spread(rows, process: Process) -> list:
    """This process's share of rows: r, r + W, r + 2W, ... for rank r of W processes.

    All shares are equally long, so that every process takes as many steps and none waits for
    another that has finished. Example: 5 rows on 2 processes are [0, 2, 4] and [1, 3, 0]: the
    first rows fill up the last share, and `gather` drops them again.
    """
    world = process.world_size
    padded = -(-len(rows) // world) * world  # rounded up to a multiple of W
    return [rows[i % len(rows)] for i in range(process.rank, padded, world)]


def gather(rows: Tensor, total: int, process: Process) -> Tensor:
    """What all processes made of their shares -> the first `total` rows in order, on every
    one.
    """
    if process.world_size == 1:
        return rows[:total]
    parts = [torch.empty_like(rows) for _ in range(process.world_size)]
    dist.all_gather(parts, rows.contiguous())
    # Row i of process r is row i*W + r of the whole: stacked beside each other, the rows of all
    # processes interleave. Example: [0, 2, 4] and [1, 3, 0] become 0, 1, 2, 3, 4 (and 0).
    return torch.stack(parts, 1).flatten(0, 1)[:total]


# ----------------------------------------------------------------------------------------------
# Labels


def same_labels(bank: Images, queries: Images, flag: str = "--val_data") -> Tensor:
    """Labels of the queries, which `flag` names, in the numbers of the bank, (n,).

    Numbers follow the sorted names of the classes, and a split may lack a class: so classes are
    matched by name. Where one set has numbers alone, the names of the other have to be numbers.
    ValueError if the queries have a class that the bank has not, or has twice.
    """
    labels = torch.as_tensor(queries.labels)
    if bank.classes == queries.classes or not (bank.classes or queries.classes):
        return labels
    if not (bank.classes and queries.classes):
        return numbered_labels(bank, queries, flag)

    # Of two classes of the same name the wrong one would be taken for half of the images.
    repeated = repeated_class(bank.classes)
    if repeated:
        raise ValueError(
            f"--data has two classes called {repeated}, which cannot be told apart")

    # A class that the bank lacks could never be answered: it may be a typing error in a name.
    unknown = sorted(set(queries.classes) - set(bank.classes))
    if unknown:
        raise ValueError(f"{flag} has classes that --data has not: {', '.join(unknown[:5])}")
    return torch.tensor([bank.classes.index(name) for name in queries.classes])[labels]


def numbered_labels(bank: Images, queries: Images, flag: str) -> Tensor:
    """same_labels where one set has no names of classes, but numbers alone.

    Example: GTSRB has the classes 0 to 42, without names. Folders of its images are sorted as
    0, 1, 10, 11, 2, ..., so that label 2 is the folder 10, and number 10 of GTSRB. The classes of
    MNIST are called "0 - zero" and so on, beside those of SVHN, which are 0 to 9.
    """
    names = bank.classes or queries.classes
    found = [re.fullmatch(r"(\d+)( - .*)?", name) for name in names]
    if not all(found):
        with_names, without = ("--data", flag) if bank.classes else (flag, "--data")
        raise ValueError(
            f"{without} has numbers for its classes, and {with_names} names such as "
            f"{names[0]}: expected names in both, or numbers as names")

    # Names become numbers, or numbers become places in the list of names.
    numbers = [int(match[1]) for match in found]
    if queries.classes:
        return torch.tensor(numbers)[torch.as_tensor(queries.labels)]
    unknown = sorted(set(queries.labels) - set(numbers))
    if unknown:
        raise ValueError(f"{flag} has classes that --data has not: "
                         f"{', '.join(map(str, unknown[:5]))}")
    return torch.tensor([numbers.index(label) for label in queries.labels])


def best_classes(scores: Tensor) -> Tensor:
    """The five classes with the highest scores, best first: (..., C) -> (..., b)."""
    return scores.topk(min(5, scores.shape[-1])).indices


def accuracy(predicted: Tensor, labels) -> dict[str, float]:
    """top1, the share of images that are right; top5; mean_per_class, the mean of the shares.

    predicted: the classes of best_classes, (n, b), or one answer for each image, (n,). An image
    counts for top5 if any of its classes is right. mean_per_class is the mean of top1 over the
    classes: it counts a rare class as much as a frequent one. Classes without an image do not
    count.
    """
    labels = torch.as_tensor(labels).cpu()
    answers = predicted.cpu().view(len(labels), -1)  # (n, b)
    right = (answers == labels[:, None]).double()  # (n, b)
    first = right[:, 0]  # (n,)
    count = labels.bincount()  # (C,)
    hits = labels.bincount(first)  # (C,)
    return {
        "top1": first.mean().item(), "top5": right.sum(1).mean().item(),
        "mean_per_class": (hits / count)[count > 0].mean().item()}
