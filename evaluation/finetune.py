"""Fine-tuning: the whole network learns from labels, its lower layers more slowly.

    crops, labels --> groups of 16: mixup or cutmix --> backbone --> class token --> linear head
                                                          |                            |
    lr of block i: lr * decay^(depth - i) --> AdamW <-- cross-entropy, smoothed labels-+
                                                |
                              weights --> their moving average, which is judged

Idea     A pre-trained network needs only small changes, least of all in its lower layers, which
         see edges and textures: they get the smallest learning rates. Mixed images, smoothed
         labels and the average of the weights are there against overfitting.
Paper    DINO sec. 4.2.3 and table 6 (fine-tuning as DeiT does); BEiT (Bao 2021) for layer decay
Try      python evaluate.py finetune --weights RUN --epochs 2
Change   the recipe is the fields of Config here
Tests    pytest tests/evaluation/test_finetune.py

Letters  B images of a batch on all processes, b crops of a group, C classes.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from evaluation import protocol
from evaluation.extract import accuracy, best_classes, extract, spread
from evaluation.protocol import (Extractor, hash_of_labels, keep_earlier, open_judged,
                                 open_labelled, random_crops, results_folder, training_steps)
from evaluation.unfinished import Unfinished
from images.data import Images
from machinery.batch_norm import synchronise
from machinery.checkpoints import live_state, save_tensors
from machinery.clock import Progress
from machinery.flags import UsageError, require
from machinery.process import Process, autocast
from training.optim import OPTIMIZERS, cosine, ema_update, parameter_groups, set_schedule

# Crops that are mixed with each other. A group stays on one process, so that the mixtures are
# the same for any number of processes.
GROUP = 16


class FinetunedNetwork(nn.Module):
    """A backbone, and a linear layer on its class token: (B, C, H, W) -> logits (B, classes).

    The layer starts at zero, so that the first answer is the uniform one, and the first
    gradients do not tear at the backbone.
    """

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def mix(crops: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float,
        seed: list[int]):
    """One group: each crop blended with, or patched by, its neighbour -> crops, labels (b, C).

    MixUp (Zhang 2018) takes a weighted mean of two images, CutMix (Yun 2019) puts a rectangle
    of one into the other; which of the two is drawn for each group. A crop's labels are the
    shares of its classes. Example: .7 of a cat (class 0) and .3 of a dog (class 2) of three
    classes have the label (.7, 0, .3).
    """
    choices = []
    for transform, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)):
        if alpha > 0:
            choices.append(transform(alpha=alpha, num_classes=classes))
    if not choices:
        return crops, F.one_hot(labels, classes).float()

    # torchvision draws from torch's global generator. It gets a seed for this group, and its
    # old state back afterwards: so the mixture depends on the group alone.
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        return choices[rng.integers(len(choices))](crops, labels)


def share_batch_norm(student: nn.Module, batch_size: int, process: Process):
    """Let BatchNorm see the whole batch; UsageError where the processes get unequal shares."""
    whole_groups = GROUP * process.world_size
    if batch_size % whole_groups:
        raise UsageError(
            f"--batch_size {batch_size}: a network with BatchNorm needs a multiple of "
            f"{whole_groups} on {process.world_size} processes ({GROUP} crops are mixed together)"
        )
    synchronise(student)


def train_network(backbone: nn.Module, images: Images, classes: int, process: Process,
                  size: int, *, epochs: int = 10, batch_size: int = 128, lr: float = 5e-4,
                  weight_decay: float = 0.05, layerwise_decay: float = 0.75,
                  label_smoothing: float = 0.1, mixup: float = 0.8, cutmix: float = 1.0,
                  ema: float = 0.0, precision: str = "fp32", num_workers: int = 0,
                  seed: int = 0, unfinished: Unfinished | None = None) -> FinetunedNetwork:
    """Train a copy of the backbone on labelled images; returns the average of its weights.

    batch_size is that of all processes together, lr is for 256 images and proportional to the
    batch, with a tenth of the steps as warm-up. ema is the momentum of the average; 0: 0.9998,
    or less where a run is too short for that. unfinished: where the training is kept after each
    pass over the images, to be continued from there.
    """
    # The student is trained; the average follows it and is what is returned.
    torch.manual_seed(seed)
    student = FinetunedNetwork(copy.deepcopy(backbone), classes).to(process.device).train()
    if process.world_size > 1 and any(isinstance(m, _BatchNorm) for m in student.modules()):
        share_batch_norm(student, batch_size, process)
    for name, p in student.named_parameters():
        p.requires_grad_("mask_token" not in name)  # no patch is masked here
    average = copy.deepcopy(student)
    network = DistributedDataParallel(student) if process.world_size > 1 else student

    # Layer-wise decay: with .75 the head learns at the rate lr, the last block at .75 lr, the
    # block below it at .75^2 lr = .56 lr, ...; of 12 blocks the first at .03 lr.
    optimizer = OPTIMIZERS["adamw"](parameter_groups(student, layerwise_decay))

    # An average with momentum m reaches over the last 1 / (1 - m) steps. .9998 are 5,000 steps;
    # a run of 1,000 steps gets a tenth of its length, 100.
    steps = epochs * (len(images) // batch_size)
    ema = ema or min(0.9998, 1 - 10 / max(steps, 20))

    # A batch is mixed in groups of 16 crops, and each process gets whole groups: what is mixed
    # with what does not depend on the number of processes. Where the groups do not divide, some
    # process gets one a second time, so that all have equally many; its loss counts as 0.
    # Example: a batch of 40 has the groups 0, 1, 2 of 16, 16 and 8 crops. Two processes:
    #
    #     process 0: own_groups [0, 2], sizes [16, 8],  counts [True, True]
    #     process 1: own_groups [1, 0], sizes [16, 16], counts [True, False]
    starts = range(0, batch_size, GROUP)
    own_groups = spread(range(len(starts)), process)
    sizes = []
    counts = []
    for i, group in enumerate(own_groups):
        sizes.append(min(GROUP, batch_size - starts[group]))
        counts.append(i * process.world_size + process.rank < len(starts))
    weights = torch.tensor(counts).repeat_interleave(torch.tensor(sizes)).to(process.device)

    def state():
        return live_state({"student": student, "average": average}, optimizer, of="student")

    start = unfinished.restore(state) if unfinished else 0
    report = Progress("fine-tuning", steps - start, process)
    batches = random_crops(images, size, batch_size, steps, process, num_workers, seed, GROUP,
                           start)
    for step, (crops, labels) in enumerate(batches, start):
        # Mixing: after it a label is a distribution over the classes.
        mixed_crops = []
        mixed_targets = []
        for group, c, t in zip(own_groups, crops.split(sizes), labels.split(sizes)):
            c, t = mix(c, t, classes, mixup, cutmix, [seed, step, group])
            mixed_crops.append(c)
            mixed_targets.append(t)
        crops = torch.cat(mixed_crops)

        # One loss for each crop; label_smoothing spreads a tenth of each label over all
        # classes.
        with autocast(precision, process.device):
            logits = network(crops)
        losses = F.cross_entropy(logits.float(), torch.cat(mixed_targets),
                                 label_smoothing=label_smoothing, reduction="none")

        # The mean over the whole batch is a sum over the processes. DDP averages the gradients
        # over them: so the share of each process is multiplied by their number.
        loss = (losses * weights.to(crops)).sum() * process.world_size / batch_size

        rate = cosine(step, lr * batch_size / 256, 1e-6, steps, steps // 10)
        set_schedule(optimizer, dict(lr=rate, weight_decay=weight_decay))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # The average starts at the untrained weights, which it has to forget quickly: momentum
        # .1 at step 0, .18 at step 1, .55 at step 10, until it reaches `ema`. BatchNorm's
        # statistics are averages already, and are copied.
        ema_update(average, student, min(ema, (1 + step) / (10 + step)))
        for averaged, current in zip(average.buffers(), student.buffers()):
            averaged.copy_(current)
        report(step + 1 - start)

        # After each pass over the images but the last.
        done = step + 1
        if unfinished and done % (steps // epochs) == 0 and done < steps:
            unfinished.save(done, state())
    return average.eval()


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.Labelled, protocol.NetworkConfig):
    # -- fine-tuning
    epochs: int = 0  # passes over --data; 0: 10
    lr: float = 0.0  # the peak of the learning rate, for a batch of 256 images; 0: 5e-4
    weight_decay: float = 0.05  # of AdamW
    layerwise_decay: float = 0.75  # factor of the learning rate from a block to the one below
    label_smoothing: float = 0.1  # share of each target that is spread over all classes
    mixup: float = 0.8  # a of Beta(a, a), which draws the shares of two blended images; 0: off
    cutmix: float = 1.0  # the same for a rectangle of one image in another; 0: off
    resume: bool = True  # continue a training in --output_dir that was stopped before its end
    seed: int = 0  # the seed of the head, the order of the images, crops and mixtures

    def check(self):
        require(self, lambda x: x <= 1, "at most 1", "label_smoothing", "layerwise_decay")


def run(extractor: Extractor) -> dict:
    """The whole network learns from labels; its average is judged. DINO sec. 4.2.3."""
    config = extractor.config
    process = extractor.process
    train = open_labelled(extractor)
    val, labels = open_judged(extractor, train)

    # The recipe goes into results.json: without it the figure says little.
    epochs, batch, _ = training_steps(config, train, 10)
    names = ("lr", "weight_decay", "layerwise_decay", "label_smoothing", "mixup", "cutmix",
             "precision", "num_workers", "seed")
    recipe = {name: getattr(config, name) for name in names}
    recipe["lr"] = config.lr or 5e-4
    settings = {
        "data": extractor.hash_of(train), "labels": hash_of_labels(train), "epochs": epochs,
        "batch_size": batch, "image_size": extractor.size, **recipe}
    del settings["num_workers"]  # any number gives the same crops
    unfinished = Unfinished(extractor, "finetune", settings, config.resume)
    network = train_network(extractor.model, train, 1 + max(train.labels), process,
                            extractor.size, epochs=epochs, batch_size=batch,
                            unfinished=unfinished, **recipe)

    # Judged on centre crops, like frozen features: the network's rows are logits here. A
    # learning rate that is too high shows in logits that are no numbers.
    per_process = -(-config.batch_size // process.world_size)  # rounded up
    logits = extract(network, val, extractor.size, process, per_process, config.num_workers,
                     config.precision)
    extractor.check(logits, val.names, f"--lr {recipe['lr']}")
    figures = accuracy(best_classes(logits), labels)
    if process.main:
        file = results_folder(config, "finetune") / "model.pt"
        keep_earlier(file)
        save_tensors(file, network.state_dict())
    unfinished.remove()
    process.print(
        f"fine-tuning: {epochs} epochs at {extractor.size} px, batch {batch}\n  "
        f"{figures['top1']:.2%}, top-5 {figures['top5']:.2%}, mean per class "
        f"{figures['mean_per_class']:.2%} of {len(val):,d} images of {config.val_data}")
    return {
        "finetune": figures, "protocol": f"{epochs} epochs, batch {batch}, {recipe}",
        "headline": {"fine-tuning": figures["top1"]}}


if __name__ == "__main__":
    from images.data import open_images
    from vit import ARCHS, VisionTransformer

    # The learning rates, from the lowest layers to the head.
    backbone = VisionTransformer(32, 8, **ARCHS["vit_nano"])
    process = Process(torch.device("cpu"))
    for group in parameter_groups(FinetunedNetwork(backbone, 10), 0.75):
        if group["decay"]:
            count = sum(p.numel() for p in group["params"])
            print(f"lr * {group['lr_mult']:.3f}: {count:9,d} weights")

    # How many of 100 pictures are right, of which a tenth would be right by chance.
    pictures = open_images("shapes:100")
    for epochs in (0, 5):
        network = train_network(backbone, pictures, 10, process, 32, epochs=epochs,
                                batch_size=20, lr=5e-3, mixup=0, cutmix=0)
        predicted = best_classes(extract(network, pictures, 32, process))
        right = accuracy(predicted, pictures.labels)["top1"]
        print(f"after {epochs} epochs: {right:.0%} of 100 pictures")
