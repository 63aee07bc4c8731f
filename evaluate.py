"""Evaluate: how good are frozen features? One command per protocol of the papers.

    --weights --> backbone, frozen --> features of --data and --val_data --> table, results.json
                                          |
         knn, linear, logreg (probes.py), retrieval, copies (retrieval.py); finetune (finetune.py)

Idea     A network is judged by what can be read off its features without changing them.
Paper    DINO sec. 4 and F; DINOv2 sec. 7; each task below names its place
Try      python evaluate.py knn --weights RUN
         python evaluate.py all --weights RUN        one report card
         python evaluate.py features --weights RUN --data folder:PATH --output features.npy
Change   a new protocol is one function below and one line in TASKS
Tests    pytest tests/test_evaluate.py
"""

import hashlib
import os
import re
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runtime
from augment import center_crop, fit_inside, squash
from data import Images, open_images
from features import (Blocks, Descriptor, Scales, accuracy, extract, few_of, gather, knn_predict,
                      random_crops, same_labels, spread)
from finetune import finetune as train_all
from optim import cosine
from probes import CS, LRS, Logistic, Probes, kinds_of_input, real_accuracy, released_head
from retrieval import (EDITS, KAPPAS, LEVELS, Whitening, judge, read_groups, read_revisited,
                       relevance)
from runtime import UsageError, require
from weights import load_backbone, read_head, read_tensors


@dataclass
class Config:
    # -- what to judge
    weights: str = "dino_vits16"  # a run, a released name, a URL, or a file
    data: str = "shapes"  # images with labels to learn from, or to search in
    val_data: str = "shapes:val"  # images with labels that are judged
    test_data: str = ""  # linear: images judged by the probe that was best on --val_data
    data_root: str = "data"  # where torchvision keeps its data sets
    download: bool = False  # let torchvision fetch them
    # -- features
    image_size: int = 0  # pixels of the crop; 0: what the positions were built for
    features_dir: str = ""  # keep features there, and take them from there the next time
    # -- knn
    nb_knn: tuple[int, ...] = (10, 20, 100, 200)  # numbers of neighbours
    temperature: float = 0.07  # of the vote
    n_per_class: tuple[int, ...] = ()  # few-shot: also with so many images of each class
    n_tries: int = 1  # few-shot: random choices to average over
    # -- linear
    protocol: Literal["dinov2", "dino"] = "dinov2"  # 52 probes, or one
    head: str = ""  # judge this linear head, a file or a released NAME_lc, and train none
    class_mapping: str = ""  # lines "class in --val_data, class in --data", if they differ
    real_labels: str = ""  # ImageNet-ReaL's real.json, for ImageNet's validation images
    # -- retrieval
    ground_truth: str = ""  # gnd_roxford5k.pkl or gnd_rparis6k.pkl, about the images of --data
    groups: str = ""  # .csv with path,group: images of --data in one group belong together
    multiscale: bool = False  # mean of the features at scales 1, 1/sqrt(2), 1/2
    crop_queries: bool = False  # --ground_truth: only the box of the query, as others than DINO do
    # -- copies
    n_originals: int = 157  # images of --val_data that get copied; --data are the distractors
    copydays: str = ""  # the folder of Copydays, with original, strong, ...; else copies are made
    # -- learning, for linear and finetune
    epochs: int = 0  # passes over --data; 0: 10, of linear --protocol dino 100
    lr: float = 5e-4  # finetune: for 256 images
    weight_decay: float = 0.05  # finetune
    layerwise_decay: float = 0.75  # finetune: factor of the learning rate from block to block
    label_smoothing: float = 0.1  # finetune
    mixup: float = 0.8  # finetune: Beta(a, a) draws the shares of two blended images; 0: off
    cutmix: float = 1.0  # finetune: the same for a patch of one image in another; 0: off
    seed: int = 0  # of all that is drawn
    # -- machine
    batch_size: int = 128  # images at once, on all processes together
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products
    num_workers: int = 2  # loader processes
    # -- where to
    output_dir: str = ""  # for results.json; empty: evaluations/TASK
    output: str = "features.npy"  # for `features`: the file; names go beside it as .txt


# ------------------------------------------------------------------------------------------------
# The network and its features


class Features:
    """The network of --weights, ready to be asked for features, and what it was asked on."""

    def __init__(self, config: Config, place: runtime.Place):
        self.config, self.place = config, place
        self.model = load_backbone(config.weights).to(place.device)
        self.size = config.image_size or self.model.img_size
        if self.size < self.model.patch_size:
            raise UsageError(f"--image_size {self.size} is smaller than one patch of "
                             f"{self.model.patch_size}")
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        self.sha256 = digest.hexdigest()

    def open(self, flag: str) -> Images:
        """The images of --data or its like, in the channels that the network wants."""
        config = self.config
        return open_images(getattr(config, flag), config.data_root, config.download, f"--{flag}",
                           self.model.pixels)

    def __call__(self, images: Images, name: str, read: nn.Module | None = None,
                 prepare=None, batch_size: int = 0) -> Tensor:
        """(n, D) on the CPU. `read` stands in for the network (class tokens), `prepare` for the
        centre crop. With --features_dir they are kept there as `name`.
        """
        config, place = self.config, self.place
        known = {"weights": self.sha256, "images": hashlib.sha256(
            "\n".join(images.names).encode()).hexdigest(), "precision": config.precision,
            "protocol": f"{name}, {self.size} px"}
        file = Path(config.features_dir) / f"{name}.pt"
        if config.features_dir and place.agree(file.exists()):
            return self.reuse(file, known)
        batch = batch_size or -(-config.batch_size // place.world_size)
        rows = extract(read or self.model, images, self.size, place, batch, config.num_workers,
                       config.precision, runtime.Progress(name, len(images), place), prepare)
        self.check(rows, images.names, f"--weights {config.weights}")
        if config.features_dir and place.main:
            file.parent.mkdir(parents=True, exist_ok=True)
            runtime.save(file, {"rows": rows, **known})
        return rows

    def reuse(self, file: Path, known: dict) -> Tensor:
        try:
            kept = read_tensors(file)
            theirs = {key: kept[key] for key in known}
        except Exception:  # torch names no single kind
            raise UsageError(f"--features_dir: {file} holds no features that were kept there; "
                             "delete it") from None
        odd = [key for key in known if theirs[key] != known[key]]
        if odd:
            raise UsageError(f"--features_dir: {file} holds features of other {odd[0]} "
                             f"({theirs[odd[0]]:.16s}, here {known[odd[0]]:.16s}); delete it or "
                             "name another folder")
        self.check(kept["rows"], None, f"--features_dir: {file}")
        return kept["rows"]

    def check(self, rows: Tensor, names: list[str] | None, source: str):
        bad = (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise UsageError(f"{source}: {len(bad)} of {len(rows)} images have features that are "
                             f"no numbers, the first {names[bad[0]] if names else bad[0]}")

    def steps(self, images: Images, epochs: int) -> tuple[int, int, int]:
        """Passes, batch size and steps of learning from these images."""
        epochs, batch = self.config.epochs or epochs, min(self.config.batch_size, len(images))
        return epochs, batch, epochs * (len(images) // batch)


def labelled(features: Features, flag: str = "data") -> Images:
    spec, images = getattr(features.config, flag), features.open(flag)
    if not images.labels:
        raise UsageError(f"--{flag} {spec}: this task needs labels; "
                         "put the images into one folder per class")
    return images


def judged(features: Features, train: Images, flag: str = "val_data") -> tuple[Images, Tensor]:
    """The images of the flag, and their labels in the numbers of the images learned from."""
    config, images = features.config, labelled(features, flag)
    if config.class_mapping:
        try:
            lines = Path(config.class_mapping).read_text().splitlines()
            pairs = [line.split(",") for line in lines if line]
            names = {theirs.strip(): ours.strip() for theirs, ours in pairs}
        except (OSError, ValueError) as error:
            raise UsageError(f"--class_mapping {config.class_mapping}: expected lines 'class in "
                             f"--{flag}, class in --data' ({error})") from None
        images = replace(images, classes=[names.get(c, c) for c in images.classes or ()])
    labels = same_labels(train, images)
    missing = sorted(set(labels.tolist()) - set(train.labels))
    if missing:
        first = train.classes[missing[0]] if train.classes else missing[0]
        raise UsageError(f"--data {config.data} has no image of {len(missing)} classes of "
                         f"--{flag}, the first: {first}")
    return images, labels


# ------------------------------------------------------------------------------------------------
# Tasks: each prints its table and returns its figures; "headline" goes on the report card


def knn(features: Features) -> dict:
    """Weighted k-NN vote on the class token. DINO F; few-shot as in DINOv2's code."""
    config, place = features.config, features.place
    train = labelled(features)
    val, labels = judged(features, train)
    ks = tuple(k for k in config.nb_knn if 0 < k <= len(train))
    if not ks:
        raise UsageError(f"--nb_knn {config.nb_knn}: none fits the {len(train)} images of --data")
    least = min(train.labels.count(c) for c in set(train.labels)) if config.n_per_class else 0
    for n in config.n_per_class:
        if not 0 < n <= least:
            raise UsageError(f"--n_per_class {n}: the smallest class of --data has {least} images")
    bank = features(train, "knn-data").to(place.device)
    mine = torch.tensor(spread(range(len(val)), place))
    queries = features(val, "knn-val_data")[mine].to(place.device)

    known = torch.tensor(train.labels, device=place.device)

    def vote(bank, known, ks):
        """k -> the two accuracies; each process asks for its share of the queries."""
        found = knn_predict(bank, known, queries, ks, config.temperature)
        return {k: accuracy(gather(p, len(val), place), labels) for k, p in found.items()}

    full = vote(bank, known, ks)
    place.print(f"k-NN: class token, {features.size} px centre crop, T = {config.temperature}, "
                f"{len(train):,d} images vote on {len(val):,d}")
    for k, value in full.items():
        place.print(f"  k-NN({k:3d})  {value['top1']:.2%}   mean per class "
                    f"{value['mean_per_class']:.2%}")
    few = {}
    for n in config.n_per_class:
        some = [few_of(train.labels, n, seed).to(place.device) for seed in range(config.n_tries)]
        tries = [vote(bank[rows], known[rows], sorted({k for k in ks if k < n} | {n}))
                 for rows in some]
        few[str(n)] = {str(k): [t[k]["top1"] for t in tries] for k in tries[0]}
        for k, values in few[str(n)].items():
            place.print(f"  {n} of each class, k-NN({k:>3s})  {np.mean(values):.2%} +- "
                        f"{np.std(values):.2%} over {len(values)} choices")
    best = max(v["top1"] for v in full.values())
    return {"knn": {str(k): v["top1"] for k, v in full.items()},
            "mean_per_class": {str(k): v["mean_per_class"] for k, v in full.items()},
            "few_shot": few, "protocol": f"class token, weighted vote, T = {config.temperature}",
            "headline": {"k-NN": best}}


def sweep(features: Features, train: Images, read: Blocks, kinds: dict, lrs, epochs: int) -> Probes:
    """Train this process's share of the probes: on the features that all processes make."""
    config, place = features.config, features.place
    _, batch, steps = features.steps(train, epochs)
    probes = Probes(kinds, 1 + max(train.labels), lrs[place.rank::place.world_size],
                    place.device, seed=config.seed)
    batches = random_crops(train, features.size, batch, steps, place, config.num_workers,
                           config.seed)
    report = runtime.Progress(f"linear, {len(kinds) * len(lrs)} probes", steps, place)
    for step, (crops, targets) in enumerate(batches):
        with torch.no_grad(), runtime.autocast(config.precision, place.device):
            rows = read(crops).float()
        probes.step(gather(rows, batch, place), gather(targets, batch, place),
                    cosine(step, batch / 256, 0.0, steps))
        report(step + 1)
    return probes


def linear(features: Features) -> dict:
    """Linear classifiers on random crops, judged on centre crops. DINO F; DINOv2 sec. 7.1.

    dinov2: 13 learning rates x {1, 4} blocks x {without, with} mean patch at once, the best of them
    on --val_data. dino: one rate; 4 blocks for ViT-S and smaller, else 1 with the mean patch.
    """
    config, place, model = features.config, features.place, features.model
    train = labelled(features)
    if config.head:
        try:
            head = read_head(config.head)
        except Exception as error:  # torch names no single kind
            raise UsageError(f"--head {config.head}: not a readable file of tensors "
                             f"({str(error).splitlines()[0]})") from None
        return judge_head(features, train, head)
    val, labels = judged(features, train)
    blocks, pools, lrs, epochs = (1, 4), (False, True), LRS, 10
    if config.protocol == "dino":
        small = model.embed_dim <= 384
        blocks, pools, lrs, epochs = (4 if small else 1,), (not small,), (0.001,), 100
    depth = len(getattr(model, "blocks", [0]))  # a convnet has its last map alone
    blocks = tuple(n for n in blocks if n <= depth) or (1,)
    kinds = kinds_of_input(model.embed_dim, blocks, pools if depth > 1 else (False,))
    epochs, batch, _ = features.steps(train, epochs)
    read = Blocks(model, max(blocks))
    rows = features(val, f"linear{max(blocks)}-val_data", read)
    probes = sweep(features, train, read, kinds, lrs, epochs)

    mine = {name: accuracy(p, labels) for name, p in probes.predict(rows).items()}
    results = {name: value for part in place.everyone(mine) for name, value in part.items()}
    kind, lr = best = max(sorted(results), key=lambda name: results[name]["top1"])
    heads = place.everyone(probes.head(kind, lr) if best in mine else None)
    head, figures = next(h for h in heads if h), results[best]
    if place.main:
        runtime.save(folder_of(config, "linear") / "head.pt", head)

    def title(kind):
        return f"{kind[0]} block{'s' * (kind[0] > 1)}{' + patches' * kind[1]}"

    place.print(f"linear: {len(results)} probes, {epochs} epochs of random crops at "
                f"{features.size} px, batch {batch}, {len(val):,d} images judged\n  lr      "
                + "".join(f"{title(k):>20s}" for k in kinds))
    for rate in lrs:
        place.print(f"  {rate:<8g}" + "".join(f"{results[k, rate]['top1']:>20.2%}" for k in kinds))
    place.print(f"  best: {title(kind)}, lr {lr:g}: {figures['top1']:.2%}, mean per class "
                f"{figures['mean_per_class']:.2%}")
    out = {"linear": figures | {"blocks": kind[0], "avgpool": kind[1], "lr": lr},
           "probes": {f"{title(k)}, lr {r:g}": v for (k, r), v in sorted(results.items())},
           "protocol": f"{config.protocol}, {epochs} epochs, batch {batch}",
           "headline": {"linear": figures["top1"]}}
    if config.test_data:
        out["test"] = judge_head(features, train, head, "test_data")["linear"]
    return out


def judge_head(features: Features, train: Images, state: dict, flag: str = "val_data") -> dict:
    """A linear head on other images. Where these have fewer classes, only those compete."""
    config, place = features.config, features.place
    images, labels = judged(features, train, flag)
    try:
        n, pool, weight, bias = released_head(state, features.model.embed_dim)
    except ValueError as error:
        raise UsageError(f"--head {config.head}: {error}") from None
    if len(bias) <= max(train.labels):
        raise UsageError(f"--head {config.head} knows {len(bias)} classes, --data has "
                         f"{1 + max(train.labels)}")
    rows = features(images, f"linear{n}-{flag}", Blocks(features.model, n))
    logits = rows[:, kinds_of_input(features.model.embed_dim, (n,), (pool,))[n, pool]] @ weight.T
    present = torch.zeros(len(bias), dtype=torch.bool)
    present[labels if images.classes and train.classes else slice(None)] = True
    found = (logits + bias).masked_fill(~present, -torch.inf).argmax(1)
    figures = accuracy(found, labels)
    if config.real_labels:
        figures["real"] = real_accuracy(found, images.names, config.real_labels)
    place.print(f"linear head on --{flag}, {len(images):,d} images of {int(present.sum())} classes:"
                + ",".join(f" {key} {value:.2%}" for key, value in figures.items()))
    return {"linear": figures, "protocol": f"head {config.head}", "headline":
            {"linear": figures["top1"]}}


def logreg(features: Features) -> dict:
    """Logistic regression by L-BFGS in float64, for 45 strengths of the penalty. DINOv2's code.

    A random tenth of --data chooses the strength, then all of it is fitted. Images are resized to
    the crop's size, so that nothing is cut off their short side.
    """
    config, place = features.config, features.place
    train = labelled(features)
    val, labels = judged(features, train)
    whole = partial(center_crop, size=features.size, short=features.size)
    device = torch.device("cpu") if place.device.type == "mps" else place.device  # no float64 there
    rows = features(train, "logreg-data", prepare=whole).double().to(device)
    tests = features(val, "logreg-val_data", prepare=whole).double().to(device)
    targets, classes = torch.tensor(train.labels, device=device), 1 + max(train.labels)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    held, rest = order.to(device).tensor_split([max(1, len(rows) // 10)])
    problem, mine = Logistic(rows[rest], targets[rest], classes), {}
    report = runtime.Progress("logistic regression", len(CS), place)
    for done, C in enumerate(CS[place.rank::place.world_size], 1):
        weight, bias = problem.fit(C)
        mine[C] = accuracy((rows[held] @ weight.T + bias).argmax(1), targets[held])["top1"]
        report(min(done * place.world_size, len(CS)))
    chosen = {C: value for part in place.everyone(mine) for C, value in part.items()}
    best = max(sorted(chosen), key=chosen.get)  # of equals the one with the strongest penalty
    weight, bias = Logistic(rows, targets, classes).fit(best)
    figures = accuracy((tests @ weight.T + bias).argmax(1), labels)
    place.print(f"logistic regression: {len(train):,d} images, a tenth chose C = {best:.2g} "
                f"({chosen[best]:.2%} of them right)\n  {figures['top1']:.2%}, mean per class "
                f"{figures['mean_per_class']:.2%} of {len(val):,d} images")
    return {"logreg": figures | {"C": best}, "chosen_by": {f"{C:.3g}": chosen[C] for C in CS},
            "protocol": "L-BFGS in float64, 45 values of C, a tenth of --data held out to choose",
            "headline": {"logistic regression": figures["top1"]}}


def finetune(features: Features) -> dict:
    """The whole network trained on labels, judged by the mean of its weights. DINO sec. 4.2.3."""
    config, place = features.config, features.place
    train = labelled(features)
    val, labels = judged(features, train)
    epochs, batch, steps = features.steps(train, 10)
    recipe = {key: getattr(config, key) for key in (
        "lr", "weight_decay", "layerwise_decay", "label_smoothing", "mixup", "cutmix",
        "precision", "num_workers", "seed")}
    model = train_all(features.model, train, 1 + max(train.labels), place, features.size,
                      epochs=epochs, batch_size=batch, **recipe,
                      report=runtime.Progress("fine-tuning", steps, place))
    logits = extract(model, val, features.size, place, -(-config.batch_size // place.world_size),
                     config.num_workers, config.precision)
    features.check(logits, val.names, f"--lr {config.lr}")
    figures = accuracy(logits.argmax(1), labels)
    if place.main:
        runtime.save(folder_of(config, "finetune") / "model.pt", model.state_dict())
    place.print(f"fine-tuning: {epochs} epochs at {features.size} px, batch {batch}\n  "
                f"{figures['top1']:.2%}, mean per class {figures['mean_per_class']:.2%} of "
                f"{len(val):,d} images")
    return {"finetune": figures, "protocol": f"{epochs} epochs, batch {batch}, {recipe}",
            "headline": {"fine-tuning": figures["top1"]}}


def rank(queries: Tensor, rows: Tensor, truth, place: runtime.Place) -> Tensor:
    """Means (4,) of judge over queries with an answer; each process judges its share of them.

    truth: number of a query -> right and junk, (n,) bool each.
    """
    queries, rows = F.normalize(queries, dim=1), F.normalize(rows, dim=1)
    mine = [judge(rows @ queries[i], *truth(i)) for i in spread(range(len(queries)), place)]
    parts = place.everyone(mine)
    each = [parts[i % len(parts)][i // len(parts)] for i in range(len(queries))]
    return torch.tensor(each, dtype=torch.float64).nanmean(0)


def retrieval(features: Features) -> dict:
    """Cosine ranking by class token: mAP and mP@k. DINO sec. 4.2.1; Radenovic 2018.

    DINO's settings: Oxford --image_size 224, Paris --image_size 512 --multiscale.
    With --ground_truth or --groups whole images of --data are looked for among each other; without,
    --val_data are looked for in --data, and images with the same label are right.
    """
    config, place, model = features.config, features.place, features.model
    read = Scales(model) if config.multiscale else model
    name = f"retrieval{'-multiscale' * config.multiscale}"
    if not (config.ground_truth or config.groups):
        train = labelled(features)
        val, labels = judged(features, train)
        rows, targets = features(train, f"{name}-data", read), torch.tensor(train.labels)
        none = torch.zeros(len(rows), dtype=torch.bool)
        figures = {"labels": rank(features(val, f"{name}-val_data", read), rows,
                                  lambda i: (targets == labels[i], none), place)}
    else:
        images = features.open("data")
        whole = partial(fit_inside, longest=features.size)

        def see(images, name):  # every image has its own shape: one at a time
            return features(images, f"{name}-whole", read, whole, batch_size=1)

        if config.ground_truth:
            figures = revisited(config, images, see, name, place)
        else:
            groups = np.array(read_groups(config.groups, images.names))
            rows, numbers = see(images, name), torch.arange(len(images))
            figures = {"groups": rank(rows, rows, lambda i: (torch.from_numpy(
                groups == groups[i]) & (numbers != i), numbers == i), place)}
    columns = ("mAP", *(f"mP@{k}" for k in KAPPAS))
    place.print(f"retrieval: class token at {features.size} px"
                f"{', three scales' * config.multiscale}\n  {'':8s}"
                + "".join(f"{c:>8s}" for c in columns))
    for level, values in figures.items():
        place.print(f"  {level:8s}" + "".join(f"{v:8.2%}" for v in values.tolist()))
    out = {level: dict(zip(columns, values.tolist())) for level, values in figures.items()}
    return {"retrieval": out, "protocol": f"cosine of class tokens, {name}",
            "headline": {f"retrieval mAP, {level}": v["mAP"] for level, v in out.items()}}


def revisited(config: Config, images: Images, see, name: str, place: runtime.Place) -> dict:
    """Level -> means, by the ground truth of revisited Oxford or Paris."""
    truth = read_revisited(config.ground_truth)
    places = {Path(n).stem: i for i, n in enumerate(images.names)}
    missing = [n for n in (*truth["imlist"], *truth["qimlist"]) if n not in places]
    if missing:
        raise UsageError(f"--ground_truth {config.ground_truth}: {len(missing)} of its images are "
                         f"not in --data {config.data}, the first {missing[0]}")
    asked = images.subset(places[n] for n in truth["qimlist"])
    if config.crop_queries:
        asked = replace(asked, read=partial(read_box, asked.read,
                                            [each["bbx"] for each in truth["gnd"]]))
        name += "-boxes"
    rows = see(images.subset(places[n] for n in truth["imlist"]), f"{name}-data")
    queries = see(asked, f"{name}-queries")
    return {level: rank(queries, rows, lambda i: relevance(truth["gnd"][i], level, len(rows)),
                        place) for level in LEVELS}


def read_box(read, boxes, i: int) -> Tensor:
    left, top, right, bottom = (round(float(x)) for x in boxes[i])
    return read(i)[:, max(top, 0):max(bottom, top + 1), max(left, 0):max(right, left + 1)]


def read_edited(read, edit: str, i: int) -> Tensor:
    return EDITS[edit](read(i), i)


def made_copies(features: Features) -> tuple[Images, dict[str, Images]]:
    """Some of --val_data, evenly spaced, and their copies by each of EDITS, named as they are."""
    val = features.open("val_data")
    some = {round(i) for i in np.linspace(0, len(val) - 1, features.config.n_originals)}
    originals = val.subset(sorted(some))
    return originals, {edit: replace(originals, read=partial(read_edited, originals.read, edit))
                       for edit in EDITS}


def copydays(config: Config) -> tuple[Images, dict[str, Images]]:
    """The originals and the copies by folder. A name's first four digits say what it shows."""
    images = open_images(f"folder:{config.copydays}", flag="--copydays")
    folders = {}
    for i, name in enumerate(images.names):
        folders.setdefault(os.path.dirname(name), []).append(i)
    images.names = [Path(name).stem[:4] for name in images.names]
    parts = {name: images.subset(rows) for name, rows in folders.items()}
    if "original" not in parts or len(parts) < 2:
        raise UsageError(f"--copydays {config.copydays}: expected the folders original, strong, "
                         "crops/10, jpegqual/3, ...")
    return parts.pop("original"), parts


def copies(features: Features) -> dict:
    """Copies are looked for among their originals and --data. DINO sec. 4.2.1: --image_size 320.

    Class token and GeM of patches, whitened on --data; images squashed to a square. The copies are
    those of --copydays, or made on the spot of --n_originals of --val_data.
    """
    config, place, model = features.config, features.place, features.model
    if model.pixels.channels != 3:
        raise UsageError(f"--weights {config.weights}: a network for {model.pixels.channels} "
                         "channels; copies are made of photographs, which have three")
    others = features.open("data")
    originals, blocks = copydays(config) if config.copydays else made_copies(features)
    read, square = Descriptor(model), partial(squash, size=features.size)
    distractors = features(others, "copies-data", read, square)
    white = Whitening(distractors)
    rows = white(torch.cat([features(originals, "copies-originals", read, square), distractors]))
    names = np.array(originals.names + [""] * len(others))
    none, figures = torch.zeros(len(rows), dtype=torch.bool), {}
    for block, images in blocks.items():
        seen = features(images, f"copies-{re.sub('[^a-z0-9]+', '-', block)}", read, square)
        figures[block] = rank(white(seen), rows, lambda i: (
            torch.from_numpy(names == images.names[i]), none), place)[0].item()
    mean = sum(figures.values()) / len(figures)
    place.print(f"copy detection: class token + GeM, whitened, {features.size} px; copies of "
                f"{len(originals)} images among {len(rows):,d}\n  mAP")
    for block, value in (*figures.items(), ("mean", mean)):
        place.print(f"  {block:12s} {value:7.2%}")
    card = {"copies mAP, mean": mean}
    if "strong" in figures:
        card["copies mAP, strong"] = figures["strong"]
    return {"copies": figures, "mean": mean, "n_originals": len(originals), "headline": card,
            "protocol": "class token + GeM of patches, PCA whitening on --data, "
                        + (f"Copydays in {config.copydays}" if config.copydays else "made copies")}


def features(features: Features) -> dict:
    """Class tokens of a folder as a float32 .npy (n, D), and the list of its files beside it."""
    config, place = features.config, features.place
    images = features.open("data")
    output = Path(config.output)
    if output.suffix != ".npy":
        raise UsageError(f"--output {output}: expected a name that ends in .npy")
    rows = features(images, "features")
    if place.main:
        output.parent.mkdir(parents=True, exist_ok=True)
        np.save(output, rows.numpy())
        runtime.write_text(output.with_suffix(".txt"), "".join(f"{n}\n" for n in images.names))
    place.print(f"wrote {output} {tuple(rows.shape)}, and {output.with_suffix('.txt')} with a name "
                "per row")
    return {"features": {"file": str(output), "shape": list(rows.shape)}}


def everything(features: Features) -> dict:
    """All other tasks, one after the other, and one report card."""
    colours = features.model.pixels.channels == 3
    tasks = [name for name in TASKS
             if name not in ("features", "all") and (colours or name != "copies")]
    results = {name: TASKS[name](features) for name in tasks}
    card = {key: value for each in results.values() for key, value in each["headline"].items()}
    features.place.print(f"\nreport card of {features.config.weights}")
    for key, value in card.items():
        features.place.print(f"  {key:24s} {value:7.2%}")
    return results | {"headline": card}


TASKS = {"knn": knn, "linear": linear, "logreg": logreg, "finetune": finetune,
         "retrieval": retrieval, "copies": copies, "features": features, "all": everything}


def folder_of(config: Config, task: str) -> Path:
    folder = Path(config.output_dir or f"evaluations/{task}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@runtime.command
def main(argv):
    usage = f"python evaluate.py {{{','.join(TASKS)}}} --weights RUN_OR_FILE_OR_NAME [--flag ...]"
    if argv[:1] and argv[0] in ("-h", "--help"):
        return runtime.parse(Config, argv, usage=usage)
    if not argv or argv[0] not in TASKS:
        given = argv[0] if argv else ""
        raise UsageError(f"task {given!r}: choose from {', '.join(TASKS)}; {usage}")
    task, config = argv[0], runtime.parse(Config, argv[1:], usage=usage)
    require(config, lambda x: x >= 1, "at least 1", "batch_size", "n_tries", "n_originals")
    require(config, lambda x: x > 0, "a positive number", "temperature")
    require(config, lambda x: x <= 1, "at most 1", "label_smoothing", "layerwise_decay")
    place, begun = runtime.start(config.device), time.time()
    with runtime.usage():
        judged = Features(config, place)
        results = TASKS[task](judged)
    here = os.path.exists(config.weights)  # a file or a run; else a name or URL
    results |= {"task": task, "data": config.data, "val_data": config.val_data,
                "weights": os.path.abspath(config.weights) if here else config.weights,
                "weights_sha256": judged.sha256, "image_size": judged.size,
                "precision": config.precision, "minutes": round((time.time() - begun) / 60, 2)}
    if place.main and (task != "features" or config.output_dir):
        runtime.write_json(folder_of(config, task) / "results.json", results)
    return results


if __name__ == "__main__":
    main()
