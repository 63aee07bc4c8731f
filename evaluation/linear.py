"""Linear: classifiers on frozen features, many at the price of one.

    one pass: class tokens of the last blocks, mean patch --> a row (B, (n + 1)*D)
                                                               |
        columns per kind of input x learning rates --> (B, L, C) logits --> one SGD step for all

Idea     Which learning rate and which tokens suit a network is not known beforehand, and the
         pass through the network is what costs. So every combination is trained on the same
         pass.
Paper    DINO sec. 4.1 and F; DINOv2 sec. 7.1 and appendix B
Try      python -m evaluation.linear            52 probes on clouds of points
         python evaluate.py linear --weights RUN --epochs 2
Change   another grid of learning rates: LRS
Tests    pytest tests/evaluation/test_linear.py

Letters  B rows of a batch, D width, L learning rates, C classes, w columns of one kind of
         input.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from backbones.classifier import Blocks, kinds_of_input, read_head, released_head
from evaluation import protocol
from evaluation.extract import accuracy, gather
from evaluation.protocol import (Extractor, open_judged, open_labelled, random_crops,
                                 results_folder, training_steps)
from images.data import Images
from machinery.checkpoints import save_tensors
from machinery.clock import Progress
from machinery.flags import UsageError
from machinery.process import autocast
from training.optim import cosine

LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


class Probes:
    """A linear classifier for every kind of input and every learning rate, trained by SGD.

    For each kind: weight (L, C, w) and bias (L, C). All learning rates begin at the same
    weights, drawn from Normal(0, .01) as in the papers, so that a probe is the same alone or
    among others.
    """

    def __init__(self, kinds: dict, classes: int, lrs: tuple[float, ...], device="cpu",
                 dtype: torch.dtype = torch.float32, seed: int = 0, momentum: float = 0.9):
        self.kinds, self.lrs, self.momentum = kinds, lrs, momentum
        self.rates = torch.tensor(lrs, dtype=dtype, device=device)
        self.values, self.velocities = {}, {}
        for kind, columns in kinds.items():
            w = columns.stop - columns.start
            start = torch.randn(classes, w, dtype=dtype,
                                generator=torch.Generator().manual_seed(seed))
            weight = (0.01 * start).expand(len(lrs), -1, -1).clone().to(device)  # (L, C, w)
            self.values[kind] = weight, weight.new_zeros(weight.shape[:2])
            self.velocities[kind] = tuple(map(torch.zeros_like, self.values[kind]))

    def logits(self, kind, rows: Tensor) -> Tensor:
        weight, bias = self.values[kind]
        part = rows[:, self.kinds[kind]]  # (B, w)
        flat = torch.addmm(bias.flatten(), part, weight.flatten(0, 1).T)  # (B, L*C)
        return flat.view(len(rows), *bias.shape)  # (B, L, C)

    @torch.no_grad()
    def step(self, rows: Tensor, labels: Tensor, factor: float = 1.0):
        """One step of SGD with momentum on the mean cross-entropy, at `factor` times the rates.

        The gradient is written out: d loss / d logits = (softmax - one-hot) / B.
        """
        places = torch.arange(len(rows), device=rows.device)
        for kind, (weight, bias) in self.values.items():
            error = self.logits(kind, rows).softmax(-1)  # (B, L, C)
            error[places, :, labels] -= 1
            error /= len(rows)
            slope = error.flatten(1).T @ rows[:, self.kinds[kind]]
            slopes = slope.view_as(weight), error.sum(0)
            for value, velocity, grad in zip((weight, bias), self.velocities[kind], slopes):
                velocity.mul_(self.momentum).add_(grad)
                rates = self.rates.view(-1, *[1] * (value.ndim - 1))
                value.addcmul_(velocity, rates, value=-factor)

    @torch.no_grad()
    def predict(self, rows: Tensor, chunk: int = 1024) -> dict[tuple, Tensor]:
        """(kind, learning rate) -> classes (n,). Rows may lie elsewhere; they come in
        chunks.
        """
        out = {}
        for kind in self.kinds:
            parts = [
                self.logits(kind, part.to(self.rates.device)).argmax(-1).cpu()
                for part in rows.split(chunk)]
            out |= {(kind, lr): p for lr, p in zip(self.lrs, torch.cat(parts).unbind(1))}
        return out

    def head(self, kind, lr: float) -> dict[str, Tensor]:
        """One of them as the weight (C, w) and the bias (C) of a linear layer."""
        weight, bias = self.values[kind]
        i = self.lrs.index(lr)
        return {"weight": weight[i].cpu().clone(), "bias": bias[i].cpu().clone()}


def real_accuracy(found: Tensor, names: list[str], file: str) -> float:
    """ImageNet-ReaL: right is any of an image's labels; images without one do not count."""
    try:
        truth = json.loads(Path(file).read_text())
        numbers = [int(re.search(r"_val_(\d{8})", name)[1]) - 1 for name in names]
        right = [int(p) in truth[i] for p, i in zip(found, numbers) if truth[i]]
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"--real_labels {file}: expected real.json, and images named ILSVRC2012_val_*: {error}"
        ) from None
    return sum(right) / len(right)


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.Labelled, protocol.Config):
    # -- linear
    protocol: Literal["dinov2", "dino"] = "dinov2"  # dinov2: 52 probes at once; dino: one
    epochs: int = 0  # passes over --data; 0: 10, of --protocol dino 100
    head: str = ""  # judge this linear head, a file or a released NAME_lc, and train none
    test_data: str = ""  # further images, judged by the probe that was best on --val_data
    real_labels: str = ""  # ImageNet-ReaL's real.json, for ImageNet's validation images
    seed: int = 0  # of all that is drawn


def run(extractor: Extractor) -> dict:
    """Linear classifiers on random crops, judged on centre crops. DINO F; DINOv2 sec. 7.1.

    --protocol dinov2: 13 learning rates x {1, 4} blocks x {without, with} mean patch at once,
    the best of them on --val_data. dino: one rate; 4 blocks for ViT-S and smaller, else 1 block
    with the mean patch.
    """
    config, process, model = extractor.config, extractor.process, extractor.model
    train = open_labelled(extractor)
    if config.head:
        return judge_head(extractor, train, open_head(config.head))

    # Which inputs and learning rates are tried. A network with fewer blocks has fewer inputs,
    # and a convnet one: the mean of its last map.
    val, labels = open_judged(extractor, train)
    if config.protocol == "dinov2":
        blocks, pools, lrs, epochs = (1, 4), (False, True), LRS, 10
    elif model.embed_dim <= 384:
        blocks, pools, lrs, epochs = (4,), (False,), (0.001,), 100
    else:
        blocks, pools, lrs, epochs = (1,), (True,), (0.001,), 100
    depth = len(getattr(model, "blocks", [0]))
    blocks = tuple(n for n in blocks if n <= depth) or (1,)
    pools = pools if depth > 1 else (False,)
    kinds = kinds_of_input(model.embed_dim, blocks, pools)

    read = Blocks(model, max(blocks))
    rows = extractor(val, f"linear{max(blocks)}-val_data", read)
    probes = sweep(extractor, train, read, kinds, lrs, epochs)

    # Each process has trained some of the probes: their results are put together.
    own_results = {name: accuracy(p, labels) for name, p in probes.predict(rows).items()}
    results = {}
    for part in process.all_gather(own_results):
        results |= part
    best = max(sorted(results), key=lambda name: results[name]["top1"])
    kind, lr = best
    heads = process.all_gather(probes.head(kind, lr) if best in own_results else None)
    head = next(h for h in heads if h)
    figures = results[best]
    if process.main:
        save_tensors(results_folder(config, "linear") / "head.pt", head)

    epochs, batch, _ = training_steps(config, train, epochs)
    process.print(f"linear: {len(results)} probes, {epochs} epochs of random crops at "
                  f"{extractor.size} px, batch {batch}, {len(val):,d} images judged")
    process.print("  lr      " + "".join(f"{title(k):>20s}" for k in kinds))
    for rate in lrs:
        cells = "".join(f"{results[k, rate]['top1']:>20.2%}" for k in kinds)
        process.print(f"  {rate:<8g}{cells}")
    process.print(f"  best: {title(kind)}, lr {lr:g}: {figures['top1']:.2%}, mean per class "
                  f"{figures['mean_per_class']:.2%}")
    out = {
        "linear": figures | {"blocks": kind[0], "avgpool": kind[1], "lr": lr},
        "probes": {f"{title(k)}, lr {r:g}": v
                   for (k, r), v in sorted(results.items())},
        "protocol": f"{config.protocol}, {epochs} epochs, batch {batch}",
        "headline": {"linear": figures["top1"]}}
    # The best probe was chosen on --val_data: images that had no say in it judge it once more.
    if config.test_data:
        out["test"] = judge_head(extractor, train, head, "test_data")["linear"]
    return out


def title(kind: tuple[int, bool]) -> str:
    """A kind of input in words: 1 block, 4 blocks + patches, ..."""
    blocks, pool = kind
    words = "1 block" if blocks == 1 else f"{blocks} blocks"
    return f"{words} + patches" if pool else words


def sweep(extractor: Extractor, train: Images, read: Blocks, kinds: dict, lrs,
          epochs: int) -> Probes:
    """Train this process's share of the probes, on features that all processes make
    together.
    """
    config, process = extractor.config, extractor.process
    _, batch, steps = training_steps(config, train, epochs)
    classes = 1 + max(train.labels)
    own_lrs = lrs[process.rank::process.world_size]
    probes = Probes(kinds, classes, own_lrs, process.device, seed=config.seed)

    batches = random_crops(train, extractor.size, batch, steps, process, config.num_workers,
                           config.seed)
    report = Progress(f"linear, {len(kinds) * len(lrs)} probes", steps, process)
    for step, (crops, targets) in enumerate(batches):
        with torch.no_grad(), autocast(config.precision, process.device):
            rows = read(crops).float()
        rate = cosine(step, batch / 256, 0.0, steps)  # learning rates are for 256 images
        probes.step(gather(rows, batch, process), gather(targets, batch, process), rate)
        report(step + 1)
    return probes


def open_head(what: str) -> dict:
    """The tensors of --head; UsageError if it is no such file."""
    try:
        return read_head(what)
    except Exception as error:  # torch.load raises different exceptions for different damage
        raise UsageError(
            f"--head {what}: not a readable file of tensors ({str(error).splitlines()[0]})"
        ) from None


def judge_head(extractor: Extractor, train: Images, state: dict,
               flag: str = "val_data") -> dict:
    """A linear head on other images. Where these have fewer classes, only those compete."""
    config, process, model = extractor.config, extractor.process, extractor.model
    images, labels = open_judged(extractor, train, flag)
    try:
        n, pool, weight, bias = released_head(state, model.embed_dim)
    except ValueError as error:
        raise UsageError(f"--head {config.head}: {error}") from None
    if len(bias) <= max(train.labels):
        raise UsageError(
            f"--head {config.head} knows {len(bias)} classes, --data has {1 + max(train.labels)}"
        )
    rows = extractor(images, f"linear{n}-{flag}", Blocks(model, n))
    columns = kinds_of_input(model.embed_dim, (n,), (pool,))[n, pool]
    logits = rows[:, columns] @ weight.T + bias

    # ImageNet-A and its like show a part of the classes: an answer outside them cannot be
    # meant.
    present = torch.zeros(len(bias), dtype=torch.bool)
    present[labels if images.classes and train.classes else slice(None)] = True
    predicted = logits.masked_fill(~present, -torch.inf).argmax(1)
    figures = accuracy(predicted, labels)
    if config.real_labels:
        figures["real"] = real_accuracy(predicted, images.names, config.real_labels)
    listed = ",".join(f" {key} {value:.2%}" for key, value in figures.items())
    process.print(
        f"linear head on --{flag}, {len(images):,d} images of {int(present.sum())} classes:{listed}"
    )
    return {
        "linear": figures, "protocol": f"head {config.head}",
        "headline": {"linear": figures["top1"]}}


if __name__ == "__main__":
    torch.manual_seed(0)
    centres = torch.randn(10, 5 * 16)
    labels = torch.arange(1200) % 10
    rows = centres[labels] + 3 * torch.randn(1200, 5 * 16)
    probes = Probes(kinds_of_input(16, (1, 4), (False, True)), 10, LRS)
    for step in range(400):
        batch = torch.randint(0, 1000, (64,))
        probes.step(rows[batch], labels[batch], 4 * (1 - step / 400))
    right = {}
    for name, predicted in probes.predict(rows[1000:]).items():
        right[name] = (predicted == labels[1000:]).float().mean()
    print("lr        " + "  ".join(f"{title(kind):18s}" for kind in probes.kinds))
    for lr in LRS:
        print(f"{lr:<10g}" + "  ".join(f"{right[kind, lr]:<18.1%}" for kind in probes.kinds))
