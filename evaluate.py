"""Evaluate: how good are frozen features? One command per protocol of the papers.

    --weights --> backbone, frozen --> features of --data and --val_data --> results.json

Idea     A network is judged by what can be read off its features without changing them.
Paper    DINO sec. 4.1; protocol in features.py
Try      python evaluate.py knn --weights RUN
         python evaluate.py features --weights RUN --data folder:PATH --output features.npy
Change   a new protocol is one function below and one line in TASKS
Tests    pytest tests/test_evaluate.py
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import runtime
from data import open_images
from features import extract, knn_accuracy, same_labels
from runtime import UsageError
from weights import load_backbone


@dataclass
class Config:
    # -- what to judge
    weights: str = "dino_vits16"  # a run, a released name, a URL, or a file
    data: str = "shapes"  # images with labels that vote; for `features`, the images
    val_data: str = "shapes:val"  # images with labels that are judged
    data_root: str = "data"  # where torchvision keeps its data sets
    download: bool = False  # let torchvision fetch them
    # -- protocol
    image_size: int = 0  # pixels of the centre crop; 0: what the positions were built for
    nb_knn: tuple[int, ...] = (10, 20, 100, 200)  # numbers of neighbours
    temperature: float = 0.07  # of the vote
    # -- machine
    batch_size: int = 128  # images at once
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products
    num_workers: int = 2  # loader processes
    # -- where to
    output_dir: str = ""  # for results.json; empty: evaluations/TASK
    output: str = "features.npy"  # for `features`: the file; names go beside it as .txt


class Features:
    """The network of --weights, ready to be asked for features."""

    def __init__(self, config: Config, place: runtime.Place):
        self.config, self.place = config, place
        self.model = load_backbone(config.weights).to(place.device)
        self.size = config.image_size or self.model.img_size
        if self.size < self.model.patch_size:
            raise UsageError(f"--image_size {self.size} is smaller than one patch of "
                             f"{self.model.patch_size}")

    def __call__(self, images):
        def report(done):
            if self.place.main and sys.stderr.isatty():
                print(f"\r{min(done, len(images)):,d} of {len(images):,d} images", end="",
                      file=sys.stderr, flush=True)

        config = self.config
        return extract(self.model, images, self.size, self.place, config.batch_size,
                       config.num_workers, config.precision, report)


def knn(config: Config, place: runtime.Place) -> dict:
    """Weighted k-NN vote on the class token. DINO F."""
    bank = open_images(config.data, config.data_root, config.download)
    queries = open_images(config.val_data, config.data_root, config.download, "--val_data")
    for flag, images in (("--data", bank), ("--val_data", queries)):
        if not images.labels:
            raise UsageError(f"{flag} {getattr(config, flag[2:])}: k-NN needs labels; "
                             "put the images into one folder per class")
    labels = same_labels(bank, queries)
    ks = tuple(k for k in config.nb_knn if 0 < k <= len(bank))
    if not ks:
        raise UsageError(f"--nb_knn {config.nb_knn}: none fits the {len(bank)} images of --data")
    features = Features(config, place)
    accuracy = knn_accuracy(features(bank), bank.labels, features(queries), labels, ks,
                            config.temperature)
    place.print(f"teacher, class token, {features.size} px centre crop, T = {config.temperature}, "
                f"{len(bank):,d} images vote on {len(queries):,d}")
    for k, value in accuracy.items():
        place.print(f"  k-NN({k:3d})  {value:.2%}")
    return {"knn": {str(k): v for k, v in accuracy.items()}, "image_size": features.size,
            "temperature": config.temperature}


def features(config: Config, place: runtime.Place) -> dict:
    """Class tokens of a folder as a float32 .npy (n, D), and the list of its files beside it."""
    images = open_images(config.data, config.data_root, config.download)
    output = Path(config.output)
    if output.suffix != ".npy":
        raise UsageError(f"--output {output}: expected a name that ends in .npy")
    rows = Features(config, place)(images)
    if place.main:
        output.parent.mkdir(parents=True, exist_ok=True)
        np.save(output, rows.numpy())
        runtime.write_text(output.with_suffix(".txt"), "".join(f"{n}\n" for n in images.names))
    place.print(f"wrote {output} {tuple(rows.shape)}, and {output.with_suffix('.txt')} with a name "
                "per row")
    return {"features": {"file": str(output), "shape": list(rows.shape)}}


TASKS = {"knn": knn, "features": features}


@runtime.command
def main(argv):
    usage = f"python evaluate.py {{{','.join(TASKS)}}} --weights RUN_OR_FILE_OR_NAME [--flag ...]"
    if argv[:1] and argv[0] in ("-h", "--help"):
        return runtime.parse(Config, argv, usage=usage)
    if not argv or argv[0] not in TASKS:
        given = argv[0] if argv else ""
        raise UsageError(f"task {given!r}: choose from {', '.join(TASKS)}; {usage}")
    config = runtime.parse(Config, argv[1:], usage=usage)
    place = runtime.start(config.device)
    with runtime.usage():
        results = TASKS[argv[0]](config, place)
    here = os.path.exists(config.weights)  # a file or a run; else a name or URL
    results |= {"task": argv[0], "data": config.data, "val_data": config.val_data,
                "weights": os.path.abspath(config.weights) if here else config.weights,
                "precision": config.precision}
    if place.main and (argv[0] != "features" or config.output_dir):
        folder = Path(config.output_dir or f"evaluations/{argv[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        runtime.write_json(folder / "results.json", results)
    return results


if __name__ == "__main__":
    main()
