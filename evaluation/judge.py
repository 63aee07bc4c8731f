"""Judge: how good the teacher's features are, measured again and again while it learns.

    held-out images --> teacher's class token --> with labels: k-NN(20)
                                              --> without: is the nearest the other view?
    images and masks --> teacher's patch tokens --> patch k-NN segmentation (--dense_every)

Idea     The loss of self-distillation says little: one that collapses to one prototype has a
         low loss, and losses with other temperatures or prototypes cannot be compared. Whether
         neighbours in feature space belong together can be compared between all runs.
Paper    DINO appendix F.1 (k-NN); the question about the other view is ours
Try      python train.py --knn_every 1 --dense_every 1
Change   which question is asked: Judge.__call__; what is warned of: Judge.diagnose
Tests    pytest tests/evaluation/test_judge.py

Letters  n images, B of them in a batch, C channels, s pixels, D width.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from augment import MultiCrop, photometry
from evaluation.extract import extract, gather, same_labels, spread
from evaluation.knn import knn_accuracy, top_neighbours
from images.data import Images, Views, training_loader
from losses import effective_rank
from machinery.process import Process, autocast
from training.config import Config
from training.rundir import record

FEWEST = 50  # images to judge with, for a warning that the features are poor


def learned_from(val: Images, train: Images) -> int:
    """How many files of `val` are files of `train`, too, by their names below the same folder.

    Example: folder:X/new lies in folder:X, where 1.jpg is called new/1.jpg.
    """
    if not (val.root and train.root):  # drawn images, and those in tar files
        return 0
    names = set(val.names)
    below, above = val.root.resolve(), train.root.resolve()
    if below.is_relative_to(above):
        prefix = "" if below == above else f"{below.relative_to(above)}/"
        return sum(
            name.startswith(prefix) and name[len(prefix):] in names for name in train.names)
    if above.is_relative_to(below):
        return sum(f"{above.relative_to(below)}/{name}" in names for name in train.names)
    return 0


class Judge:
    """k-NN(20) of the teacher's class token: 10,000 images at most vote on 5,000 at most.

    Without labels: how often an image's other random view is its nearest neighbour. `protocol`
    says in words which of the two it is. `rank` tells in how many directions the features of
    the last call vary, `largest_rank` in how many they could.
    """

    def __init__(self, train: Images, val: Images, config: Config, process: Process):
        # So few images suffice for a figure that is good to about a point, in a small part of
        # the time of an epoch.
        self.bank = readable(evenly_spaced(train, 10_000))
        self.queries = readable(evenly_spaced(val, 5_000))
        self.config = config
        self.process = process
        self.rank = 0.0
        self.largest_rank = 0

        # Classes that do not match are refused here, before any training: same_labels raises.
        self.labelled = bool(train.labels and val.labels)
        if self.labelled:
            same_labels(train, val)
            if shared := learned_from(val, train):
                process.print(
                    f"warning: {shared:,d} of the {len(val):,d} images to judge with are in "
                    "--data, too; each finds itself, so k-NN is too high; give others by "
                    "--val_data")
        self.protocol = "k-NN(20)" if self.labelled else "other-view retrieval"
        # The part X:train is what --val_share leaves: of it nothing more is held out.
        way_out = "give --val_data, or hold images out by --val_share"
        if config.data.endswith(":train"):
            way_out = f"give --val_data {config.data.removesuffix('train')}val"
        if len(self.queries) < 2:
            process.print(f"{len(val)} images to judge with: nothing will be judged; {way_out}")
        elif len(self.queries) < 100:
            process.print(
                f"warning: {len(self.queries)} images to judge with are few: each is "
                f"{1 / len(self.queries):.1%} of the figure; give more by --val_data, or hold "
                "more out by --val_share")

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

        # The training images have labels here, but training never used them: the neighbours
        # show whether their features tell classes apart all the same.
        bank = features(self.bank)
        queries = features(self.queries)
        # Of bare pixels nobody asks for the rank, and theirs would take the longest.
        if not isinstance(backbone, RawPixels):
            self.measure_rank(bank)
        labels = same_labels(self.bank, self.queries)
        k = min(20, len(bank))
        return knn_accuracy(bank, self.bank.labels, queries, labels, (k,))[k]

    @torch.no_grad()
    def find_other_view(self, backbone: nn.Module) -> float:
        """How often the nearest of all second views is the one of the same image.

        It needs no labels. It asks for less than the classes do: two crops may be recognised by
        their colours alone.
        """
        config = self.config
        device = self.process.device

        # Two global crops of each image, with colours as in training. Seed, epoch and step are
        # constant, so they are the same crops at every evaluation.
        crops = MultiCrop(config.global_crops_size, config.local_crops_size, 2, 0,
                          config.global_crops_scale, photometry=config.photometry)
        views = Views(self.queries, crops, seed=0)

        # Each process takes a share of the images, as `extract` does, and its workers read and
        # crop them. Both views of 64 images are one batch of the network.
        own_rows = spread(range(len(self.queries)), self.process)
        keys = []
        for i in range(0, len(own_rows), 64):
            keys.append([(0, 0, row) for row in own_rows[i:i + 64]])

        was_training = backbone.training
        backbone.eval()
        features = []
        left = len(self.queries)
        for batch in training_loader(views, keys, min(config.num_workers, len(keys) - 1)):
            pixels = batch["global_crops"].flatten(0, 1).to(device)  # (2*B, C, s, s)
            crops = photometry(pixels, batch["photometry"].flatten(0, 1), config.channel_stats)
            with autocast(config.precision, device):
                rows = backbone(crops).float()  # (2*B, D): all first views, all second views

            # A row for each image, so that every process gets the rows of all in their order.
            pairs = gather(rows.unflatten(0, (2, -1)).transpose(0, 1), left, self.process)
            features.append(pairs.cpu())  # (B, 2, D)
            left -= len(pairs)
        backbone.train(was_training)

        # All first views look for their neighbour among all second views.
        first, second = torch.cat(features).unbind(1)  # (n, D) each
        if not isinstance(backbone, RawPixels):
            self.measure_rank(first)
        nearest = top_neighbours(first, second, 1)[1][:, 0]
        return (nearest == torch.arange(len(nearest))).float().mean().item()

    def measure_rank(self, features: Tensor):
        """Keep the effective rank of the variances of (n, D) features, from 1 to n - 1 or D.

        One batch of training, of which the log tells the rank, has too few images for this. The
        mean of all features is no difference between images, so it is taken away. Example:
        variances of 10, 10 and 0 give 2; those of 19, 1 and 0 give exp(.199) = 1.2.
        """
        # The neighbours are found by the cosine, for which only directions count.
        x = nn.functional.normalize(features, dim=1)
        x = x - x.mean(0)

        # The singular values of x'x are the variances along its principal directions, times n.
        self.rank = effective_rank(x.T @ x).item()
        self.largest_rank = min(len(x) - 1, x.shape[1])

    def diagnose(self, figures: dict) -> tuple[str, str] | None:
        """(name, sentence with a remedy) if the features of the last call are poor, else None.

        figures: their `knn`, and `untrained`, what it was before training.
        """
        # Of n images the share of right answers varies by sqrt(p (1 - p) / n) by chance. Of a few
        # images this is so much that nothing follows. Weights of --init can be spoilt; of random
        # ones nothing can be lost.
        if len(self.queries) < FEWEST:
            return None
        before = figures["untrained"]
        by_chance = 2 * (before * (1 - before) / len(self.queries))**0.5
        worse = figures["knn"] < before - by_chance
        if worse and self.config.init:
            return "worse than --init", ("below the weights that it began with; lower --lr, "
                                         "raise --freeze_backbone_epochs, or stop")

        # The targets can look healthy, and yet images differ in so few directions that their
        # neighbours say less than those of a random network do. A low rank alone is no illness: a
        # run of `shapes` with a k-NN of 57 % has 2.6 of 128. So it counts where little was gained.
        hardly_better = figures["knn"] < figures["untrained"] + 0.05
        if worse or (hardly_better and self.rank < 0.03 * self.largest_rank):
            return "dimensional collapse", (
                f"dimensional collapse: features vary in {self.rank:.1f} directions of "
                f"{self.largest_rank}, {self.protocol} is {figures['knn']:.1%} "
                f"({figures['untrained']:.1%} before training); use --koleo_weight 0.1, "
                "--local_crops_number 4 and --global_crops_scale 0.3 1.0")
        return None


def readable(images: Images) -> Images:
    """The same images; one that does not decode is another one of them (see Views.read).

    A damaged file in a large set is no reason to end a training. Its answer is that of another
    image, and may be wrong; it is one of thousands.
    """
    return replace(images, read=partial(_read_views, Views(images, None)))


def _read_views(views: Views, i: int) -> torch.Tensor:
    return views.read(0, i)[0]


def evenly_spaced(images: Images, most: int) -> Images:
    """At most `most` of the images, spread evenly over the list."""
    # The first ones would not do: images in folders are sorted by class.
    count = min(len(images), most)
    return images.subset(np.linspace(0, len(images) - 1, count).astype(int))


class RawPixels(nn.Sequential):
    """What any network has to beat: the image itself, at 32 x 32, (B, C, s, s) -> (B, C*1024)."""

    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(32), nn.Flatten())


class PatchJudge:
    """Patch k-NN segmentation of the teacher: 100 images with masks vote on 50, in seconds.

    It watches the patch tokens, which may get worse while the class token, of which `Judge`
    knows, gets better. Nothing here is random, so training goes on as without it. ValueError
    for pairs that cannot be opened, UsageError if their classes are not the same.
    """

    def __init__(self, config: Config, process: Process, folder: Path, epoch_steps: int):
        # Imported here, because few runs ask for it. 150 images suffice to see a trend.
        from evaluation.dense import with_common_classes
        from evaluation.protocol import require_other_images
        from images.names import beside_validation
        from images.pairs import MASKS, open_pairs, read_mask

        def opened(flag: str, spec: str):
            return open_pairs(MASKS, spec, read_mask, config.data_root, config.download, flag,
                              config.channel_stats)

        self.config = config
        self.process = process
        self.folder = folder
        self.epoch_steps = epoch_steps
        self.flags = ("--dense_data", "--dense_val_data")
        judged = config.dense_val_data
        bank = opened("--dense_data", beside_validation(config.dense_data, judged))
        queries = opened("--dense_val_data", judged)
        require_other_images(bank, queries, config.dense_data, judged, *reversed(self.flags))
        self.bank, self.queries = with_common_classes(bank.spread_out(100),
                                                      queries.spread_out(50), process,
                                                      self.flags)

    def __call__(self, backbone: nn.Module, step: int, figures: dict):
        """Judge the backbone after this step; log the figure, and keep it in `figures`.

        There patch_miou is the newest mIoU, from 0 to 1, patch_miou_untrained that of step 0.
        """
        from evaluation.dense import side_of_crops
        from evaluation.patches import patch_knn

        # Images are enlarged as for `evaluate.py patches`. Compiling does not pay, see Judge.
        size = side_of_crops(0, backbone)
        bank = self.bank.drawn_at(size)
        queries = self.queries.drawn_at(size)
        with torch.compiler.set_stance("force_eager"):
            miou = patch_knn(backbone, bank, queries, len(bank.classes), size, self.process,
                             precision=self.config.precision, flags=self.flags)["miou"]
        figures["patch_miou"] = miou
        record(self.folder, dict(step=step, patch_miou=miou), self.process)

        # With the figure that it has to beat. A run that was not judged at its start, because
        # --dense_every came later, has none.
        start = "--init" if self.config.init else "untrained"
        if step == 0:
            figures["patch_miou_untrained"] = miou
            self.process.print(f"patch k-NN mIoU: {start} network {miou:.1%}")
            return
        beside = ""
        if "patch_miou_untrained" in figures:
            beside = f" ({start} {figures['patch_miou_untrained']:.1%})"
        self.process.print(
            f"epoch {step // self.epoch_steps}: patch k-NN mIoU {miou:.1%}{beside}")
