"""Linear: classifiers on frozen features, 52 of them at the price of one.

    one pass: class tokens of the last blocks, mean patch --> a row (B, (n + 1)*D)
                                                               |
        columns per kind of input x learning rates --> (B, L, C) logits --> one SGD step for all

Idea     Which learning rate and which tokens suit a network is not known beforehand. The pass
         through the network costs far more than a linear layer on its result. So a classifier
         for every combination (a probe) is trained on the same pass, and the best is reported.
Paper    DINO sec. 4.1 and appendix F.2; DINOv2 sec. 7.1 and appendix B.3
Try      python -m evaluation.linear            52 probes on clouds of points
         python evaluate.py linear --weights RUN --epochs 2
Change   another grid of learning rates: LRS
Tests    pytest tests/evaluation/test_linear.py

Letters  B rows of a batch, D width, n blocks, L learning rates, C classes, b best of them
         (five), w columns of one kind of input.
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
from evaluation.extract import accuracy, best_classes, gather
from evaluation.protocol import (Extractor, hash_of_labels, keep_earlier, open_judged,
                                 open_labelled, random_crops, results_folder, training_steps)
from evaluation.unfinished import Unfinished
from images.data import Images, first_line
from machinery.checkpoints import save_tensors
from machinery.clock import Progress
from machinery.flags import UsageError
from machinery.process import autocast
from training.optim import cosine

# The learning rates of DINOv2's code, for a batch of 256 images.
LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


class Probes:
    """A linear classifier for every kind of input and every learning rate, trained by SGD.

    A kind of input is a range of columns of a row of features: `kinds` maps names to slices, as
    backbones.classifier.kinds_of_input makes them. Nothing is copied, because a slice is a
    view. Example with D = 2, blocks (1, 4), each without and with the mean patch token; a row
    has the class tokens of the last four blocks and the mean patch token of the last one:

        column             0  1    2  3    4  5    6  7    8  9
        token              cls 9   cls 10  cls 11  cls 12  mean    (of a network of 12 blocks)
        (1, False)                                 [6 .. 7]                 w = D
        (1, True)                                  [6 .......... 9]         w = 2*D
        (4, False)         [0 ........................... 7]                w = 4*D
        (4, True)          [0 .................................. 9]         w = 5*D

    For each kind there are a weight (L, C, w) and a bias (L, C): one classifier for each of the
    L learning rates. All of them begin at the same weights, drawn from Normal(0, .01) as in the
    papers, so that a probe ends the same whether it is trained alone or among others.
    """

    def __init__(self, kinds: dict, classes: int, lrs: tuple[float, ...], device="cpu",
                 dtype: torch.dtype = torch.float32, seed: int = 0, momentum: float = 0.9):
        self.kinds = kinds
        self.lrs = lrs
        self.momentum = momentum
        self.rates = torch.tensor(lrs, dtype=dtype, device=device)

        # For each kind (weight, bias), and their velocities: what SGD with momentum remembers.
        # A generator of its own for each kind makes the first weights of a probe independent of
        # the kinds that stand before it.
        self.values = {}
        self.velocities = {}
        for kind, columns in kinds.items():
            w = columns.stop - columns.start
            generator = torch.Generator().manual_seed(seed)
            start = 0.01 * torch.randn(classes, w, dtype=dtype, generator=generator)  # (C, w)
            weight = start.expand(len(lrs), -1, -1).clone().to(device)  # (L, C, w)
            bias = weight.new_zeros(weight.shape[:2])  # (L, C)
            self.values[kind] = (weight, bias)
            self.velocities[kind] = (torch.zeros_like(weight), torch.zeros_like(bias))

    def logits(self, kind, rows: Tensor) -> Tensor:
        """Rows of features (B, (n + 1)*D) -> logits of all probes of this kind, (B, L, C)."""
        # The L classifiers of C classes are one layer of L*C outputs: one large product of
        # matrices is faster than L small ones.
        weight, bias = self.values[kind]
        part = rows[:, self.kinds[kind]]  # (B, w)
        flat = torch.addmm(bias.flatten(), part, weight.flatten(0, 1).T)  # (B, L*C)
        return flat.view(len(rows), *bias.shape)  # (B, L, C)

    @torch.no_grad()
    def step(self, rows: Tensor, labels: Tensor, factor: float = 1.0):
        """One step of SGD with momentum on the mean cross-entropy, at `factor` times the rates.

        The gradient needs no autograd, which would keep the graphs of 52 probes. With logits
        z = W x + b, p = softmax(z), label y, and the loss -log p_y averaged over B rows:

            d loss / d z = (p - onehot(y)) / B
            d loss / d W = (d loss / d z)' x
            d loss / d b = d loss / d z, summed over the rows

        Example: z = (0, 0, ln 2) has p = (.25, .25, .5). With y = 0 the gradient by z is
        (-.75, .25, .5): the step against it raises the logit of class 0 and lowers the others.
        """
        row_numbers = torch.arange(len(rows), device=rows.device)
        for kind, (weight, bias) in self.values.items():
            # d loss / d z: the softmax, less 1 at the label of each row, in every probe.
            by_logits = self.logits(kind, rows).softmax(-1)  # (B, L, C)
            by_logits[row_numbers, :, labels] -= 1
            by_logits /= len(rows)

            # d loss / d W and d loss / d b, again of all probes in one product: (L*C, B) times
            # (B, w).
            by_weight = by_logits.flatten(1).T @ rows[:, self.kinds[kind]]
            gradients = (by_weight.view_as(weight), by_logits.sum(0))

            # velocity <- momentum * velocity + gradient; value <- value - rate * velocity. The
            # rates (L,) are given the dimensions of the value, so that each probe has its own.
            for value, velocity, grad in zip((weight, bias), self.velocities[kind], gradients):
                velocity.mul_(self.momentum).add_(grad)
                rates = self.rates.view(-1, *[1] * (value.ndim - 1))
                value.addcmul_(velocity, rates, value=-factor)

    @torch.no_grad()
    def predict(self, rows: Tensor, present: Tensor | None = None,
                chunk: int = 1024) -> dict[tuple, Tensor]:
        """(kind, learning rate) -> the best classes (n, b), best first, on the CPU.

        present (C,) bool: the classes that compete; None: all of them. The rows may be on the
        CPU while the probes are on a GPU: `chunk` of them at a time are moved and worked
        through.
        """
        absent = None if present is None else ~present.to(self.rates.device)
        predictions = {}
        for kind in self.kinds:
            parts = []
            for part in rows.split(chunk):
                logits = self.logits(kind, part.to(self.rates.device))  # (B, L, C)
                if absent is not None:
                    logits = logits.masked_fill(absent, -torch.inf)  # (B, L, C)
                parts.append(best_classes(logits).cpu())  # (B, L, b)
            for lr, predicted in zip(self.lrs, torch.cat(parts).unbind(1)):
                predictions[kind, lr] = predicted
        return predictions

    def state(self) -> dict[str, Tensor]:
        """What the training goes on from, by name: the very tensors in use, and not copies.

        Each probe has entries of its own, so that any number of processes can share them.
        """
        state = {}
        for kind in self.kinds:
            for part, tensors in (("value", self.values), ("velocity", self.velocities)):
                weight, bias = tensors[kind]
                for i, lr in enumerate(self.lrs):
                    name = f"{title(kind)}, lr {lr}, {part} of the"
                    state[f"{name} weight"] = weight[i]
                    state[f"{name} bias"] = bias[i]
        return state

    def head(self, kind, lr: float) -> dict[str, Tensor]:
        """One probe as the weight (C, w) and the bias (C,) of a linear layer, on the CPU."""
        weight, bias = self.values[kind]
        i = self.lrs.index(lr)
        return {"weight": weight[i].cpu().clone(), "bias": bias[i].cpu().clone()}


def real_accuracy(predicted: Tensor, names: list[str], file: str) -> float:
    """ImageNet-ReaL: right is any of an image's labels; images without one do not count.

    predicted (n,) are classes, numbered in the order of the 1,000 WordNet ids; names (n) the
    files. Beyer 2020. ValueError for another file.
    """
    # real.json is a list with the labels of each validation image, in the order of their
    # numbers, which begin at 1: the first belongs to ILSVRC2012_val_00000001.
    try:
        truth = json.loads(Path(file).read_text())
        numbers = [int(re.search(r"_val_(\d{8})", name)[1]) - 1 for name in names]
        if not isinstance(truth, list):
            raise ValueError(f"a list was expected, and not a {type(truth).__name__}")
        right = [int(p) in truth[i] for p, i in zip(predicted, numbers) if truth[i]]
        if not right:
            raise ValueError("none of these images has a label in it")
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"--real_labels {file}: expected real.json, and images named "
                         f"ILSVRC2012_val_*: {error}") from None
    return sum(right) / len(right)


def require_real_numbers(labels: Tensor, names: list[str], file: str):
    """UsageError where `file` counts the classes otherwise than these labels (n,) do."""
    # ImageNet's own labels are among those of ReaL for nine images of ten. With fewer classes, or
    # other names, the same number is another class, and hardly any label is right.
    right = real_accuracy(labels, names, file)
    if right < 0.5:
        raise UsageError(
            f"--real_labels {file}: {right:.1%} of the images have a label of --val_data in it; it "
            "counts the 1,000 classes of ImageNet in the order of their WordNet ids, so --data "
            "has to be all of ImageNet, in folders of these names (n01440764, ...)")


def title(kind: tuple[int, bool]) -> str:
    """A kind of input in words: 1 block, 4 blocks + patches, ..."""
    blocks, pool = kind
    words = "1 block" if blocks == 1 else f"{blocks} blocks"
    return f"{words} + patches" if pool else words


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.Labelled, protocol.Config):
    # -- linear
    protocol: Literal["dinov2",
                      "dino"] = "dinov2"  # whose grid of probes: 52 for DINOv2, one for DINO
    # Each of these three leaves one value of the grid: of the blocks, of the mean patch, of lr.
    n_last_blocks: int = 0  # blocks whose class tokens are read, from the last; 0: the grid's
    avgpool_patchtokens: bool | None = None  # read the mean patch, too; not given: the grid's
    lr: float = 0.0  # learning rate of the probes, for a batch of 256 images; 0: the grid's
    epochs: int = 0  # passes over --data; 0: 10, or 100 with --protocol dino
    head: str = ""  # judge this linear head, a file or a released NAME_lc, and train none
    test_data: str = ""  # further images, judged by the probe that was best on --val_data
    real_labels: str = ""  # ImageNet-ReaL's real.json, for ImageNet's validation images
    resume: bool = True  # continue a training in --output_dir that was stopped before its end
    seed: int = 0  # the seed of first weights, order of the images, and crops


def run(extractor: Extractor) -> dict:
    """Linear classifiers on random crops, judged on centre crops. DINO appendix F.2.

    --protocol dinov2 (DINOv2 sec. 7.1): 13 learning rates x {1, 4} blocks x {without, with} mean
    patch at once, the best of them on --val_data. dino: one rate; 4 blocks for ViT-S and
    smaller, else 1 block with the mean patch. --n_last_blocks, --avgpool_patchtokens and --lr
    narrow the grid.
    """
    config = extractor.config
    process = extractor.process
    model = extractor.model
    train = open_labelled(extractor)
    if config.head:
        state = open_head(config.head)
        out = judge_head(extractor, train, state)
        if config.test_data:
            out["test"] = judge_head(extractor, train, state, "test_data")["linear"]
        return out

    # What is needed only after the training is asked for once now, so that a wrong flag is
    # refused before it.
    val, labels = open_judged(extractor, train)
    if config.real_labels:
        require_real_numbers(labels, val.names, config.real_labels)
    if config.test_data:
        open_judged(extractor, train, "test_data")
    blocks, pools, lrs, epochs = grid(config, model)
    kinds = kinds_of_input(model.embed_dim, blocks, pools)

    # The images that are judged have one fixed crop: their features are extracted once. The
    # training images have another random crop in each pass, so theirs cannot be kept.
    read = Blocks(model, max(blocks))
    rows = extractor(val, f"linear{max(blocks)}-val_data", read)
    probes, unfinished = sweep(extractor, train, read, kinds, lrs, epochs)

    # Each process has trained some of the probes: their results are put together. sorted():
    # of several equally good ones every process has to choose the same.
    own_results = {}
    present = present_classes(train, val, labels, 1 + max(train.labels))
    for name, predicted in probes.predict(rows, present).items():
        own_results[name] = figures_of(predicted, labels, val, config.real_labels)
    results = {}
    for part in process.all_gather(own_results):
        results |= part
    best = max(sorted(results), key=lambda name: results[name]["top1"])
    kind, lr = best
    figures = results[best]

    # Only the process that trained the best probe has its weights; the others send None.
    heads = process.all_gather(probes.head(kind, lr) if best in own_results else None)
    head = next(h for h in heads if h)
    if process.main:
        folder = results_folder(config, "linear")
        keep_earlier(folder / "head.pt")
        save_tensors(folder / "head.pt", head)
    unfinished.remove()

    # The table: a line for each learning rate, a column for each kind of input.
    epochs, batch, _ = training_steps(config, train, epochs)
    process.print(
        f"linear: {len(results)} probes, {epochs} epochs of random crops at "
        f"{extractor.size} px, batch {batch}, {len(val):,d} images of {config.val_data} judged")
    process.print("  lr      " + "".join(f"{title(k):>20s}" for k in kinds))
    for rate in lrs:
        cells = "".join(f"{results[k, rate]['top1']:>20.2%}" for k in kinds)
        process.print(f"  {rate:<8g}{cells}")
    process.print(f"  best: {title(kind)}, lr {lr:g}:{in_words(figures)}")
    all_probes = {f"{title(k)}, lr {r:g}": v for (k, r), v in sorted(results.items())}
    out = {
        "linear": figures | {"blocks": kind[0], "avgpool": kind[1], "lr": lr},
        "probes": all_probes, "protocol": f"{config.protocol}, {epochs} epochs, batch {batch}",
        "headline": {"linear": figures["top1"]}}

    # The best of 52 probes on --val_data is a little too good there, because it was chosen by
    # these very images. Images that had no part in the choice judge it once more.
    if config.test_data:
        out["test"] = judge_head(extractor, train, head, "test_data", kind)["linear"]
    return out


def present_classes(train: Images, images: Images, labels: Tensor, count: int) -> Tensor:
    """Which of the `count` classes may be answered for these images, (count,) bool."""
    # ImageNet-A and similar sets have images of 200 of the 1,000 classes. An answer outside of
    # them is known to be wrong, so absent classes do not compete. Without names of classes it is
    # not known which are absent: then all compete.
    present = torch.zeros(count, dtype=torch.bool)
    present[labels if images.classes and train.classes else slice(None)] = True
    return present


def figures_of(predicted: Tensor, labels: Tensor, images: Images, real_labels: str) -> dict:
    """Accuracies of the answers (n, b), by name; with a file of --real_labels `real`, too."""
    figures = accuracy(predicted, labels)
    if real_labels:
        figures["real"] = real_accuracy(predicted[:, 0], images.names, real_labels)
    return figures


def in_words(figures: dict) -> str:
    """The same for the terminal."""
    return ",".join(f" {name} {value:.2%}" for name, value in figures.items())


def grid(config: Config, model) -> tuple[tuple, tuple, tuple, int]:
    """What is tried: (numbers of blocks, with the mean patch or not, learning rates,
    epochs).
    """
    if config.protocol == "dinov2":
        blocks = (1, 4)
        pools = (False, True)
        lrs = LRS
        epochs = 10
    else:
        # DINO's code: four class tokens for ViT-S, whose width is 384; for wider networks the
        # class token of the last block and the mean patch.
        narrow = model.embed_dim <= 384
        blocks = (4,) if narrow else (1,)
        pools = (False,) if narrow else (True,)
        lrs = (0.001,)
        epochs = 100

    # A network with fewer blocks has fewer inputs. A convnet has one: the mean of its last map
    # takes the place of the class token, and there is no other mean.
    depth = len(getattr(model, "blocks", [0]))
    blocks = tuple(n for n in blocks if n <= depth) or (1,)
    if depth <= 1:
        pools = (False,)

    # A flag leaves one value of what it names, and the rest of the grid stays as it is.
    # Example: --lr 0.01 leaves the four kinds of input of DINOv2's 52 probes, at one rate.
    if config.n_last_blocks > depth:
        raise UsageError(f"--n_last_blocks {config.n_last_blocks}: the network has {depth}")
    if config.n_last_blocks:
        blocks = (config.n_last_blocks,)
    if config.avgpool_patchtokens is not None:
        pools = (config.avgpool_patchtokens,)
    if config.lr:
        lrs = (config.lr,)
    return blocks, pools, lrs, epochs


def sweep(extractor: Extractor, train: Images, read: Blocks, kinds: dict, lrs,
          epochs: int) -> tuple[Probes, Unfinished]:
    """Train this process's share of the probes; all processes make the features together.

    And the checkpoint, which is to be removed once the results are written.
    """
    config = extractor.config
    process = extractor.process
    epochs, batch, steps = training_steps(config, train, epochs)
    classes = 1 + max(train.labels)

    # Of W processes this one takes every W-th learning rate, with all kinds of input.
    own_lrs = lrs[process.rank::process.world_size]
    probes = Probes(kinds, classes, own_lrs, process.device, seed=config.seed)

    # What the probes become depends on all of this. Each process reads those that it trains,
    # whichever process wrote them.
    inputs = [title(kind) for kind in kinds]
    settings = {
        "data": extractor.hash_of(train), "labels": hash_of_labels(train), "inputs": inputs,
        "lr": list(lrs), "epochs": epochs, "batch_size": batch, "image_size": extractor.size}
    unfinished = Unfinished(extractor, "linear", settings, config.resume)
    start = unfinished.restore(probes.state, own=True)

    # Crops are a function of the seed and the step: a training that is continued gets those
    # that it would have got.
    batches = random_crops(train, extractor.size, batch, steps, process, config.num_workers,
                           config.seed, start=start)
    report = Progress(f"linear, {len(kinds) * len(lrs)} probes", steps - start, process)
    for step, (crops, targets) in enumerate(batches, start):
        # Each process runs the network on its share of the batch.
        with torch.no_grad(), autocast(config.precision, process.device):
            rows = read(crops).float()

        # Then each trains its probes on the whole batch. The factor of the learning rates falls
        # along half a cosine from batch / 256, because LRS is for 256 images, to 0.
        factor = cosine(step, batch / 256, 0.0, steps)
        probes.step(gather(rows, batch, process), gather(targets, batch, process), factor)
        report(step + 1 - start)

        # After each pass over the images but the last: the probes, and their velocities.
        done = step + 1
        if done % (steps // epochs) == 0 and done < steps:
            unfinished.save(done, probes.state())
    return probes, unfinished


def open_head(what: str) -> dict:
    """The tensors of --head; UsageError if it is not a file of tensors."""
    try:
        return read_head(what)
    except Exception as error:  # torch.load raises different exceptions for different damage
        raise UsageError(
            f"--head {what}: not a readable file of tensors ({first_line(error)})") from None


def judge_head(extractor: Extractor, train: Images, state: dict, flag: str = "val_data",
               kind: tuple[int, bool] | None = None) -> dict:
    """Judge one linear head on the images of `flag`; train none.

    kind: what the head reads, where that is known: (blocks, with the mean patch or not).
    UsageError if the head does not fit the network or the classes.
    """
    config = extractor.config
    process = extractor.process
    model = extractor.model
    images, labels = open_judged(extractor, train, flag)

    # On which tokens the head was trained follows from its number of columns, unless the flags
    # say it: two blocks have as many columns as one block with the mean patch.
    if config.avgpool_patchtokens is not None and not config.n_last_blocks and not kind:
        raise UsageError("--avgpool_patchtokens says what --head reads only together with "
                         "--n_last_blocks; give both or neither")
    if config.n_last_blocks:
        kind = kind or (config.n_last_blocks, bool(config.avgpool_patchtokens))
    try:
        n, pool, weight, bias = released_head(state, model.embed_dim, kind)
    except ValueError as error:
        raise UsageError(f"--head {config.head}: {error}") from None

    # An output of the head is a number, and --data says which class it stands for. A part of the
    # classes would be numbered anew, and each answer would be for another class.
    known = len(train.classes) if train.classes else 1 + max(train.labels)
    if len(bias) != known:
        raise UsageError(f"--head {config.head} knows {len(bias)} classes, --data has {known}; "
                         "expected the classes that it was trained on")

    # Folders and lists sort the names of classes by their letters: 0, 1, 10, 2. A released head
    # has them in the order of their numbers.
    names = train.classes or []
    is_released = config.head.endswith("_lc")
    if is_released and all(name.isdecimal()
                           for name in names) and names != sorted(names, key=int):
        raise UsageError(
            f"--head {config.head}: the classes of --data are numbers in the order of "
            f"their letters ({', '.join(names[:3])} ...), so that number 2 is another "
            "class for the head; name them with zeros in front, as in 0002")

    rows = extractor(images, f"linear{n}-{flag}", Blocks(model, n))
    columns = kinds_of_input(model.embed_dim, (n,), (pool,))[n, pool]
    logits = rows[:, columns] @ weight.T + bias

    present = present_classes(train, images, labels, len(bias))
    predicted = best_classes(logits.masked_fill(~present, -torch.inf))
    real_labels = config.real_labels if flag == "val_data" else ""
    figures = figures_of(predicted, labels, images, real_labels)
    process.print(f"linear head on --{flag}, {len(images):,d} images of "
                  f"{int(present.sum())} classes:{in_words(figures)}")
    return {
        "linear": figures, "protocol": f"head {config.head}",
        "headline": {"linear": figures["top1"]}}


if __name__ == "__main__":
    # Ten clouds of points in the place of features of width 16: 1,000 to learn from, 200 to
    # judge. Too small a rate does not get far in 400 steps, too large a rate does not settle.
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
        right[name] = accuracy(predicted, labels[1000:])["top1"]
    print("lr        " + "  ".join(f"{title(kind):18s}" for kind in probes.kinds))
    for lr in LRS:
        print(f"{lr:<10g}" + "  ".join(f"{right[kind, lr]:<18.1%}" for kind in probes.kinds))
