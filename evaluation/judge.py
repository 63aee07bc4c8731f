"""Judge: how good the teacher's features are, asked again and again while it learns.

    held-out images --> teacher's class token --> with labels: k-NN(20)
                                              --> without: is the other view the nearest neighbour?

Idea     The loss of self-distillation cannot be compared between runs; what neighbours share
         can.
Paper    DINO F (k-NN); the question about the other view is ours
Try      python train.py --knn_every 1
Change   which question is asked: Judge.__call__
Tests    pytest tests/evaluation/test_judge.py
"""

import numpy as np
import torch
from torch import nn

from augment import MultiCrop, photometry
from evaluation.extract import extract, same_labels
from evaluation.knn import knn_accuracy, top_neighbours
from images.data import Images, Views
from machinery.process import Process, autocast
from training.config import Config


class Judge:
    """k-NN(20) of the teacher's class token: at most 10,000 images vote on at most 5,000
    others.

    Without labels: how often an image's other random view is its nearest neighbour.
    """

    def __init__(self, train: Images, val: Images, config: Config, process: Process):
        self.bank = evenly_spaced(train, 10_000)
        self.queries = evenly_spaced(val, 5_000)
        self.config = config
        self.process = process
        self.labelled = bool(train.labels and val.labels)
        if self.labelled:
            same_labels(train, val)  # refuses classes that do not match, before any training
        self.protocol = "k-NN(20)" if self.labelled else "other-view retrieval"
        if len(self.queries) < 2:
            process.print(
                f"{len(val)} images to judge with: nothing will be judged; give --val_data")

    def __call__(self, backbone: nn.Module) -> float | None:
        """A share of right answers, 0 to 1; None where there is nothing to judge with."""
        if len(self.queries) < 2:
            return None
        # These batches have another size than those of training: compiling a second graph of
        # the network for them would cost more time than it saves.
        with torch.compiler.set_stance("force_eager"):
            return self.vote(backbone) if self.labelled else self.find_other_view(backbone)

    def vote(self, backbone: nn.Module) -> float:
        """How often the 20 nearest training images vote for the right label."""
        config = self.config

        def features(images):
            return extract(backbone, images, config.global_crops_size, self.process,
                           num_workers=config.num_workers, precision=config.precision)

        bank = features(self.bank)
        queries = features(self.queries)
        labels = same_labels(self.bank, self.queries)
        k = min(20, len(bank))
        return knn_accuracy(bank, self.bank.labels, queries, labels, (k,))[k]

    @torch.no_grad()
    def find_other_view(self, backbone: nn.Module) -> float:
        """How often the nearest of all second views is the one of the same image."""
        config = self.config
        device = self.process.device
        crops = MultiCrop(config.global_crops_size, config.local_crops_size, 2, 0,
                          config.global_crops_scale, photometry=config.photometry)
        views = Views(self.queries, crops, seed=0)  # the same views at every evaluation

        was_training = backbone.training
        backbone.eval()
        features = []
        for i in range(len(self.queries)):
            sample = views[0, 0, i]
            pair = photometry(sample["global_crops"].to(device), sample["photometry"],
                              config.pixels)
            with autocast(config.precision, device):
                features.append(backbone(pair).float().cpu())  # (2, D)
        backbone.train(was_training)

        first, second = torch.stack(features).unbind(1)
        nearest = top_neighbours(first, second, 1)[1][:, 0]
        return (nearest == torch.arange(len(nearest))).float().mean().item()


def evenly_spaced(images: Images, most: int) -> Images:
    """At most `most` of the images, spread over the whole list, which may be sorted by
    class.
    """
    count = min(len(images), most)
    return images.subset(np.linspace(0, len(images) - 1, count).astype(int))


def pixels_as_features() -> nn.Module:
    """What any network has to beat: the image itself, at 32 x 32."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten())
