"""Distill: a small student learns what a large teacher says, and the teacher stays as it is.

    crops --+--> teacher (large crops), frozen ----------------------> targets --+
            |                                                                    +--> losses
            +--> student (all crops, nothing hidden, no depth dropped) -> logits -+
                    |
                    +--> average of its past: judged and saved, never asked

Idea     `train.py` with a handful of differences, all of them in this file: the teacher is another
         network, larger and done learning; the student's average is not the teacher any more but
         the result. Losses, targets and schedules are the same.
Paper    DINOv2 (Oquab 2024) sec. 5 "model distillation" and table 16; its code was never released
Try      python distill.py                   a student of `python train.py`, in minutes
         python distill.py dinov2_vits14_distill --teacher RUN --data folder:PATH
Change   which places patches are compared at: Config.patch_tokens; other matches: `more_terms`
Tests    pytest tests/test_distill.py
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recipes
import runtime
import train
from optim import ema_update
from recipes import DISTILLATION
from resnet import ConvNet
from runtime import Place, UsageError
from train import Network
from vit import ARCHS
from weights import load_backbone, load_strictly, read_tensors


@dataclass
class Config(recipes.Config):
    # -- teacher
    teacher: str = ""  # a run with its heads; or any backbone: a run, released name, URL, file
    train_teacher_heads_epochs: int = 0  # first train heads on the frozen backbone, this long
    # -- network
    drop_path_rate: float = 0.0  # stochastic depth of the student's last block: the paper has none
    # -- loss
    patch_tokens: Literal["all", "sampled"] = "all"  # patches that count; sampled: as masks fall
    class_feature_weight: float = 0.0  # of matching the teacher's class token (not the paper's)
    patch_feature_weight: float = 0.0  # of matching its patch tokens (not the paper's)
    feature_distance: Literal["cosine", "mse"] = "cosine"  # what matching means

    hides_patches = False  # masks say where to compare, and nothing is to be guessed

    def __post_init__(self):
        if self.patch_tokens == "all":  # one mask over every crop
            self.mask_probability, self.mask_ratio, self.mask_shape = 1.0, (1.0, 1.0), "random"


# ------------------------------------------------------------------------------------------------
# The two networks

FEATURES = {"class_feature": "features", "patch_feature": "patches"}  # term -> what is matched
DISTANCES = {"mse": F.mse_loss,
             "cosine": lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1).mean()}


class Student(Network):
    """Sees every patch. Linear maps take its features to the teacher's width, where they count."""

    def __init__(self, config: Config, drop_path_rate: float = 0.0, width: int = 0, backbone=None):
        super().__init__(config, drop_path_rate, backbone)
        self.distance = DISTANCES[config.feature_distance]
        self.matched = [n for n in FEATURES if width and getattr(config, f"{n}_weight")]
        for name in self.matched:
            self.add_module(f"{name}_map", nn.Linear(self.backbone.embed_dim, width))

    def forward(self, views: list[Tensor], plan=None, masks=None, mask_indices=None) -> dict:
        out = super().forward(views, plan, None, mask_indices)
        for name in self.matched:  # of the large crops, which are what the teacher sees
            large = out[FEATURES[name]][:len(views[0])]  # (G*B, D) or (G*B, P, D)
            out[name] = getattr(self, f"{name}_map")(large)
        return out

    def more_terms(self, seen: dict, said: dict) -> dict[str, Tensor]:
        """Plain feature distillation: ours, for teachers without heads. Same view, same place."""
        return {name: self.distance(said[name].float(), seen[FEATURES[name]].float())
                for name in self.matched}


class Teacher(nn.Module):
    """Answers what the frozen network says; its own weights are the average of the student."""

    def __init__(self, average: Network, frozen: Network):
        super().__init__()
        for name, part in average.named_children():
            self.add_module(name, part)
        self.frozen = [frozen]  # in a list it is no part of this: not averaged, judged or saved

    def forward(self, views: list[Tensor], mask_indices=None) -> dict:
        return self.frozen[0](views, mask_indices=mask_indices)


def build(config: Config, place: Place, frozen: Network) -> tuple[nn.Module, nn.Module]:
    """The student, and a teacher that knows `frozen` and starts to average the student."""
    width = frozen.backbone.embed_dim
    student, average = train.build(config, place, partial(Student, width=width))
    frozen.to(place.device)
    train.compile_blocks([frozen], config, place)
    count = sum(p.numel() for p in frozen.parameters())
    place.print(f"teacher {config.teacher}: {count:,d} parameters, frozen, {count / 2**18:.0f} MB")
    if config.parallel == "fsdp":
        train.shard(frozen, config, place)
    return student, Teacher(average, frozen)


@torch.no_grad()
def update(teacher: Teacher, student: nn.Module, momentum: float, ok: Tensor | float = 1.0):
    """The average follows; BatchNorm's statistics too, for no image ever passes through it."""
    ema_update(teacher, student, momentum, ok)
    for mine, its in zip(teacher.buffers(), student.buffers()):
        if mine.is_floating_point():
            mine.lerp_(its, torch.as_tensor((1 - momentum) * ok, dtype=mine.dtype))


# ------------------------------------------------------------------------------------------------
# The large network, and whether the two can talk


def open_backbone(config: Config) -> nn.Module:
    """The backbone of --teacher, frozen; refused where the student could not follow it."""
    try:
        backbone = load_backbone(config.teacher).requires_grad_(False)
    except ValueError as error:
        raise UsageError(str(error).replace("--weights", "--teacher")) from None
    size, patch = config.global_crops_size, backbone.patch_size
    theirs = None if isinstance(backbone, ConvNet) else patch
    ours = None if config.convnet else config.patch_size
    if (config.learns_patches or config.patch_feature_weight) and (theirs != ours or not ours):
        raise UsageError(f"--patch_size {ours}: patches are compared one by one, and those of "
                         f"--teacher {config.teacher} are of {theirs} pixels; give the same, or do "
                         "without patches: --ibot_weight 0 --patch_feature_weight 0")
    if size % patch:
        raise UsageError(f"--global_crops_size {size} is not a multiple of the teacher's patches "
                         f"of {patch} pixels; try {max(size // patch, 1) * patch}")
    return backbone


def train_heads(config: Config, backbone: nn.Module) -> Path:
    """Heads for a frozen backbone: a run of its own where nothing else learns, and its directory.

    Its student and teacher are this backbone twice, and see different crops, as ever.
    """
    if isinstance(backbone, ConvNet):
        raise UsageError(f"--train_teacher_heads_epochs: --teacher {config.teacher} is a convnet; "
                         "expected a Vision Transformer, or a run with its heads")
    folder = Path(config.output_dir or f"runs/{config.preset}") / "teacher_heads"
    epochs, sizes = config.train_teacher_heads_epochs, (backbone.embed_dim, backbone.depth)
    known = {(arch["embed_dim"], arch["depth"]): name for name, arch in ARCHS.items()}
    heads = replace(
        config, output_dir=str(folder), epochs=epochs, knn_every=0, patch_size=backbone.patch_size,
        warmup_epochs=min(config.warmup_epochs, epochs - 1), init="", freeze_backbone_epochs=0,
        pos_embed_resize=backbone.pos_embed_resize,
        arch=known.get(sizes, config.arch))  # for the record: it is not built
    with_heads = partial(Student, backbone=copy.deepcopy(backbone))
    train.run(heads, partial(train.build, network=with_heads))
    runtime.start(config.device).barrier()  # the main process has written them
    return folder


def add_heads(config: Config, backbone: nn.Module, run: Path) -> tuple[Config, Network]:
    """The frozen teacher with the heads of its run; config with its prototypes, unless flagged."""
    if not (run / "heads.pt").exists() or not (run / "config.json").exists():
        raise UsageError(f"--teacher {config.teacher} has no heads.pt and config.json beside it: "
                         "give --train_teacher_heads_epochs to train heads, or match features: "
                         "--dino_weight 0 --ibot_weight 0 --class_feature_weight 1")
    stored = recipes.read_config(run / "config.json")
    known_fields = recipes.Config.__dataclass_fields__
    theirs = recipes.Config(**{k: v for k, v in stored.items() if k in known_fields})
    shared = ("n_prototypes", "ibot_n_prototypes", "separate_head")
    open_ones = {name: getattr(theirs, name) for name in shared if name not in config.given}
    config = replace(config, **open_ones, given=(*config.given, *open_ones))  # nor --auto_scale's
    has = train.objectives(theirs)
    for name, count in train.objectives(config).items():
        if count != has.get(name):
            raise UsageError(f"{count} prototypes are asked for {name}, the teacher's run {run} "
                             f"has {has.get(name, 'none')}: leave --{', --'.join(shared)} to it, "
                             f"or give --{name}_weight 0, or --train_teacher_heads_epochs")
    frozen, tensors = Network(theirs, backbone=backbone), read_tensors(run / "heads.pt")
    for name, head in list(frozen.named_children())[1:]:
        load_strictly(head, tensors.get(name, {}), f"{run}/heads.pt")
    return config, frozen


def open_teacher(config: Config) -> tuple[Config, Network]:
    """--teacher, frozen, with heads where the losses ask for them; config with its prototypes."""
    backbone, where = open_backbone(config), Path(config.teacher).expanduser()
    if config.pixels != backbone.pixels:  # both see the same crops
        if {"in_chans", "mean", "std"} & set(config.given):
            raise UsageError(f"--in_chans, --mean, --std: leave them to --teacher {config.teacher}")
        mean, std = backbone.pixels
        config = replace(config, in_chans=len(mean), mean=mean, std=std)
    if not train.objectives(config):
        return config, Network(config, backbone=backbone).eval()
    if config.train_teacher_heads_epochs:
        where = train_heads(config, backbone)
    config, frozen = add_heads(config, backbone, where if where.is_dir() else where.parent)
    return config, frozen.requires_grad_(False).eval()


def run(config: Config) -> dict:
    """train.run, with a teacher from elsewhere."""
    recipes.check(config)
    with runtime.usage():
        config, frozen = open_teacher(config)
    return train.run(config, partial(build, frozen=frozen), update)


@runtime.command
def main(argv):
    return run(train.read_flags(argv, Config, DISTILLATION, "distill.py"))


if __name__ == "__main__":
    main()
