"""Fine-tuning: the whole network learns from labels, the lower its layers the more slowly.

    crops, labels --> groups of 16: mixup or cutmix --> backbone --> class token --> linear head
                                                          |                            |
    lr of block i: lr * decay^(depth - i) --> AdamW <-- cross-entropy, smoothed labels-+
                                                |
                              weights --> their moving average, which is judged

Idea     A pre-trained network is nearly right, and most so in its lower layers, which see edges
         and textures: they should move least. Everything else here is there against
         overfitting.
Paper    DINO sec. 4.2.3 and table 6 (fine-tuning as DeiT does); BEiT (Bao 2021) for layer decay
Try      python evaluate.py finetune --weights RUN --epochs 2
Change   the recipe is the fields of Config here
Tests    pytest tests/evaluation/test_finetune.py
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from evaluation import protocol
from evaluation.extract import accuracy, extract, spread
from evaluation.protocol import (Extractor, open_judged, open_labelled, random_crops,
                                 results_folder, training_steps)
from images.data import Images
from machinery.checkpoints import save_tensors
from machinery.clock import Progress
from machinery.flags import require
from machinery.process import Process, autocast
from training.optim import OPTIMIZERS, cosine, ema_update, parameter_groups, set_schedule

GROUP = 16  # crops that are mixed with each other, on one process whatever their number


class FinetunedNetwork(nn.Module):
    """Backbone and a linear layer on its class token, which starts at zero: all classes
    alike.
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

    A crop's labels are the shares of its classes. torchvision draws from torch's own generator,
    which gets a seed for this and its old state back.
    """
    choices = [
        cls(alpha=alpha, num_classes=classes)
        for cls, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    if not choices:
        return crops, F.one_hot(labels, classes).float()
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        return choices[rng.integers(len(choices))](crops, labels)


def train_network(backbone: nn.Module, images: Images, classes: int, process: Process,
                  size: int, *, epochs: int = 10, batch_size: int = 128, lr: float = 5e-4,
                  weight_decay: float = 0.05, layerwise_decay: float = 0.75,
                  label_smoothing: float = 0.1, mixup: float = 0.8, cutmix: float = 1.0,
                  ema: float = 0.0, precision: str = "fp32", num_workers: int = 0,
                  seed: int = 0, report=None) -> FinetunedNetwork:
    """Train a copy of the backbone on labelled images; returns the average of its weights.

    batch_size is that of all processes together, lr is for 256 images and follows it linearly,
    with a tenth of the steps as warm-up. ema 0: 0.9998, or less where a run is too short for
    that.
    """
    torch.manual_seed(seed)
    student = FinetunedNetwork(copy.deepcopy(backbone), classes).to(process.device).train()
    for name, p in student.named_parameters():
        p.requires_grad_("mask_token" not in name)  # no patch is masked here
    average = copy.deepcopy(student)
    network = DistributedDataParallel(student) if process.world_size > 1 else student
    optimizer = OPTIMIZERS["adamw"](parameter_groups(student, layerwise_decay))
    steps = epochs * (len(images) // batch_size)
    ema = ema or min(0.9998, 1 - 10 / max(steps, 20))

    # A batch is mixed in groups of 16 crops, and each process gets whole groups: what is mixed
    # with what does not depend on the number of processes. Where the groups do not divide, some
    # process gets one a second time, to take as many steps as the others; its loss then counts
    # as 0.
    starts = range(0, batch_size, GROUP)
    own_groups = spread(range(len(starts)), process)
    counts = [
        i * process.world_size + process.rank < len(starts) for i in range(len(own_groups))]
    sizes = [min(GROUP, batch_size - starts[g]) for g in own_groups]
    weights = torch.tensor(counts).repeat_interleave(torch.tensor(sizes)).to(process.device)

    batches = random_crops(images, size, batch_size, steps, process, num_workers, seed, GROUP)
    for step, (crops, labels) in enumerate(batches):
        mixed_crops, mixed_targets = [], []
        for group, c, t in zip(own_groups, crops.split(sizes), labels.split(sizes)):
            c, t = mix(c, t, classes, mixup, cutmix, [seed, step, group])
            mixed_crops.append(c)
            mixed_targets.append(t)
        crops = torch.cat(mixed_crops)
        with autocast(precision, process.device):
            logits = network(crops)
        losses = F.cross_entropy(logits.float(), torch.cat(mixed_targets),
                                 label_smoothing=label_smoothing, reduction="none")
        # The mean over the whole batch. DDP averages over the processes, where a sum is meant:
        # so the share of this process is scaled up by their number.
        loss = (losses * weights.to(crops)).sum() * process.world_size / batch_size

        rate = cosine(step, lr * batch_size / 256, 1e-6, steps, steps // 10)
        set_schedule(optimizer, dict(lr=rate, weight_decay=weight_decay))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # The average begins quickly, as it starts at the untrained weights. BatchNorm's
        # statistics are averages already, and are copied.
        ema_update(average, student, min(ema, (1 + step) / (10 + step)))
        for averaged, current in zip(average.buffers(), student.buffers()):
            averaged.copy_(current)
        if report:
            report(step + 1)
    return average.eval()


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.Labelled, protocol.NetworkConfig):
    # -- fine-tuning
    epochs: int = 0  # passes over --data; 0: 10
    lr: float = 5e-4  # the peak of the learning rate, for 256 images
    weight_decay: float = 0.05  # of AdamW
    layerwise_decay: float = 0.75  # factor of the learning rate from each block to the one below
    label_smoothing: float = 0.1  # share of each target that is spread over all classes
    mixup: float = 0.8  # Beta(a, a) draws the shares of two blended images; 0: none is blended
    cutmix: float = 1.0  # the same for a rectangle of one image in another; 0: none is cut
    seed: int = 0  # of all that is drawn

    def check(self):
        require(self, lambda x: x <= 1, "at most 1", "label_smoothing", "layerwise_decay")


def run(extractor: Extractor) -> dict:
    """The whole network trained on labels, judged by the mean of its weights. DINO sec.
    4.2.3.
    """
    config, process = extractor.config, extractor.process
    train = open_labelled(extractor)
    val, labels = open_judged(extractor, train)
    epochs, batch, steps = training_steps(config, train, 10)
    names = ("lr", "weight_decay", "layerwise_decay", "label_smoothing", "mixup", "cutmix")
    names += ("precision", "num_workers", "seed")
    recipe = {name: getattr(config, name) for name in names}
    network = train_network(extractor.model, train, 1 + max(train.labels), process,
                            extractor.size, epochs=epochs, batch_size=batch,
                            report=Progress("fine-tuning", steps, process), **recipe)

    per_process = -(-config.batch_size // process.world_size)  # rounded up
    logits = extract(network, val, extractor.size, process, per_process, config.num_workers,
                     config.precision)
    extractor.check(logits, val.names, f"--lr {config.lr}")
    figures = accuracy(logits.argmax(1), labels)
    if process.main:
        save_tensors(results_folder(config, "finetune") / "model.pt", network.state_dict())
    process.print(f"fine-tuning: {epochs} epochs at {extractor.size} px, batch {batch}\n  "
                  f"{figures['top1']:.2%}, mean per class {figures['mean_per_class']:.2%} of "
                  f"{len(val):,d} images")
    return {
        "finetune": figures, "protocol": f"{epochs} epochs, batch {batch}, {recipe}",
        "headline": {"fine-tuning": figures["top1"]}}


if __name__ == "__main__":
    from images.data import open_images
    from vit import ARCHS, VisionTransformer

    backbone = VisionTransformer(32, 8, **ARCHS["vit_nano"])
    process = Process(torch.device("cpu"))
    for group in parameter_groups(FinetunedNetwork(backbone, 10), 0.75):
        if group["decay"]:
            count = sum(p.numel() for p in group["params"])
            print(f"lr * {group['lr_mult']:.3f}: {count:9,d} weights")
    pictures = open_images("shapes:100")
    for epochs in (0, 5):
        network = train_network(backbone, pictures, 10, process, 32, epochs=epochs,
                                batch_size=20, lr=5e-3, mixup=0, cutmix=0)
        predicted = extract(network, pictures, 32, process).argmax(1)
        right = accuracy(predicted, pictures.labels)["top1"]
        print(f"after {epochs} epochs: {right:.0%} of 100 pictures")
