"""Fine-tuning: the whole network learns from labels, the lower its layers the more slowly.

    crops, labels --> groups of 16: mixup or cutmix --> backbone --> class token --> linear head
                                                          |                            |
    lr of block i: lr * decay^(depth - i) --> AdamW <-- cross-entropy, smoothed labels-+
                                                |
                              weights --> their moving average, which is judged

Idea     A pre-trained network is nearly right, and most so in its lower layers, which see edges and
         textures: they should move least. Everything else here is there against overfitting.
Paper    DINO sec. 4.2.3 and table 6 (fine-tuning as DeiT does); BEiT (Bao 2021) for layer decay
Try      python evaluate.py finetune --weights RUN --epochs 2
Change   the recipe is the keyword arguments of finetune
Tests    pytest tests/test_finetune.py
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from data import Images
from features import random_crops, spread
from optim import OPTIMIZERS, cosine, ema_update, parameter_groups, set_schedule
from runtime import Place, autocast

GROUP = 16  # crops that are mixed with each other, on one process whatever their number


class Classifier(nn.Module):
    """Backbone and a linear layer on its class token, which starts at zero: all classes alike."""

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.embed_dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def mix(crops: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, seed: list[int]):
    """One group: each crop blended with, or patched by, its neighbour -> crops, labels (b, C).

    A crop's labels are the shares of its classes. torchvision draws from torch's own generator,
    which gets a seed for this and its old state back.
    """
    choices = [cls(alpha=alpha, num_classes=classes)
               for cls, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    if not choices:
        return crops, F.one_hot(labels, classes).float()
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        return choices[rng.integers(len(choices))](crops, labels)


def finetune(backbone: nn.Module, images: Images, classes: int, place: Place, size: int, *,
             epochs: int = 10, batch_size: int = 128, lr: float = 5e-4, weight_decay: float = 0.05,
             layerwise_decay: float = 0.75, label_smoothing: float = 0.1, mixup: float = 0.8,
             cutmix: float = 1.0, ema: float = 0.0, precision: str = "fp32", num_workers: int = 0,
             seed: int = 0, report=None) -> Classifier:
    """Train a copy of the backbone on labelled images; returns the average of its weights.

    batch_size is that of all processes together, lr is for 256 images and follows it linearly, with
    a tenth of the steps as warm-up. ema 0: 0.9998, or less where a run is too short for that.
    """
    torch.manual_seed(seed)
    student = Classifier(copy.deepcopy(backbone), classes).to(place.device).train()
    for name, p in student.named_parameters():
        p.requires_grad_("mask_token" not in name)  # nothing is hidden here
    average = copy.deepcopy(student)
    network = DistributedDataParallel(student) if place.world_size > 1 else student
    optimizer = OPTIMIZERS["adamw"](parameter_groups(student, layerwise_decay))
    steps = epochs * (len(images) // batch_size)
    ema = ema or min(0.9998, 1 - 10 / max(steps, 20))

    starts = range(0, batch_size, GROUP)
    mine = spread(range(len(starts)), place)
    counts = torch.tensor([i * place.world_size + place.rank < len(starts)
                           for i in range(len(mine))])  # the others only fill up a share
    batches = random_crops(images, size, batch_size, steps, place, num_workers, seed, GROUP)
    for step, (crops, labels) in enumerate(batches):
        sizes = [min(GROUP, batch_size - starts[g]) for g in mine]
        mixed = [mix(c, t, classes, mixup, cutmix, [seed, step, g]) for c, t, g in
                 zip(crops.split(sizes), labels.split(sizes), mine)]
        crops, targets = (torch.cat(part) for part in zip(*mixed))
        weights = counts.repeat_interleave(torch.tensor(sizes)).to(crops)
        with autocast(precision, place.device):
            logits = network(crops)
        losses = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing,
                                 reduction="none")
        # A share of the batch's mean; DDP averages over processes, so it is scaled up for that.
        loss = (losses * weights).sum() * place.world_size / batch_size
        rate = cosine(step, lr * batch_size / 256, 1e-6, steps, steps // 10)
        set_schedule(optimizer, dict(lr=rate, weight_decay=weight_decay))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(average, student, min(ema, (1 + step) / (10 + step)))
        for ours, theirs in zip(average.buffers(), student.buffers()):
            ours.copy_(theirs)  # BatchNorm's statistics are averages already
        if report:
            report(step + 1)
    return average.eval()


if __name__ == "__main__":
    from data import open_images
    from features import accuracy, extract
    from vit import ARCHS, VisionTransformer

    backbone, place = VisionTransformer(32, 8, **ARCHS["vit_nano"]), Place(torch.device("cpu"))
    for group in parameter_groups(Classifier(backbone, 10), 0.75):
        if group["decay"]:
            print(f"lr * {group['lr_mult']:.3f}: {sum(p.numel() for p in group['params']):9,d} "
                  "weights")
    few = open_images("shapes:100")
    for epochs in (0, 5):
        model = finetune(backbone, few, 10, place, 32, epochs=epochs, batch_size=20, lr=5e-3,
                         mixup=0, cutmix=0)
        found = extract(model, few, 32, place).argmax(1)
        print(f"after {epochs} epochs: {accuracy(found, few.labels)['top1']:.0%} of 100 pictures")
