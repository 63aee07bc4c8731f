"""Distill: a small student learns to answer as a large teacher does, which is trained already.

    crops --+--> teacher (large crops), frozen ------------------------> targets --+
            |                                                                      +--> losses
            +--> student (all crops, no patch masked, no block dropped) --> logits-+
                    |
                    +--> average of its past weights: judged and saved, never asked for targets

Idea     `train.py` with three differences, all of them in this file. The teacher is another
         network, larger, whose weights do not change. The student sees every patch: it has to
         copy the teacher's answers, not to guess what is hidden. The average of the student's
         weights is no longer the teacher, but the result. Losses, targets and schedules are
         the same.
Paper    DINOv2 (Oquab 2024) sec. 5 "model distillation" and table 16; its code was never
         released
Try      python distill.py                   a student of `python train.py`, in minutes
         python distill.py dinov2_vits14_distill --teacher RUN --data folder:PATH
Change   which patches are compared: Config.patch_tokens; another distance between features:
         DISTANCES; another term of the loss: `extra_losses`
Tests    pytest tests/test_distill.py

Letters  G global crops, B images, P patches of a crop, D width of the student's backbone.
"""

import contextlib
import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from backbones.convnet import ConvNet
from backbones.weights import ffn_layer_of, load_backbone, load_strictly, weights_file
from machinery.checkpoints import digest
from machinery.flags import UsageError, command
from machinery.process import Process, start_process
from train import Network
from training.config import Config as TrainingConfig
from training.check import check, check_sources
from training.stored import read_config
from training.optim import ema_update
from training.recipes import DISTILLATION
from training.warmstart import read_heads
from vit import ARCHS

# A term of the loss -> the output of the networks that it compares. These terms are our own
# addition, for teachers without heads: the paper compares answers over prototypes alone.
FEATURES = {"class_feature": "features", "patch_feature": "patches"}

# How far apart two features are: the mean over all of them, 0 where they are equal.
DISTANCES = {
    "mse": F.mse_loss, "cosine": lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1).mean()}


@dataclass
class Config(TrainingConfig):
    # -- teacher
    teacher: str = ""  # a run with its heads.pt; or any backbone: run, released name, URL, file
    teacher_sha256: str | None = field(default=None, metadata={"no_flag": True})  # of its file
    train_teacher_heads_epochs: int = 0  # epochs to train heads on --teacher, if it has none
    # -- network
    drop_path_rate: float = 0.0  # stochastic depth of the student's last block; the paper: none
    # -- loss
    patch_tokens: Literal["all", "sampled"] = "all"  # compare all patches, or those under masks
    class_feature_weight: float = 0.0  # weight of matching the teacher's class token (ours)
    patch_feature_weight: float = 0.0  # weight of matching the teacher's patch tokens (ours)
    # The names of the table become the choices of a flag. training/config.py puts a star before
    # such a table for the same, which is a syntax error in Python 3.10. This file is started by
    # the user, so it has to compile there up to the line that asks for Python 3.11.
    feature_distance: Literal[tuple(DISTANCES)] = "cosine"  # how far apart two features are

    # In train.py masks hide patches from the student. Here they only say which patches are
    # compared, so that the student has no mask token.
    hides_patches = False

    def __post_init__(self):
        # "All patches" needs no code of its own: it is one mask that covers each crop.
        if self.patch_tokens == "all":
            self.mask_probability = 1.0
            self.mask_ratio = (1.0, 1.0)
            self.mask_shape = "random"

            # The flags of the masks would have been overwritten just now.
            for name in ("mask_probability", "mask_ratio", "mask_shape"):
                if name in self.given:
                    raise UsageError(f"--{name}: --patch_tokens all compares every patch; "
                                     "leave it out, or give --patch_tokens sampled")


# ----------------------------------------------------------------------------------------------
# The two networks


class Student(Network):
    """A train.Network that sees every patch.

    Where features are matched, a linear map takes each of them to the teacher's width.
    """

    def __init__(self, config: Config, drop_path_rate: float = 0.0, width: int = 0,
                 backbone=None):
        """width: that of the teacher's backbone; 0: no features are matched."""
        super().__init__(config, drop_path_rate, backbone)
        self.distance = DISTANCES[config.feature_distance]
        self.matched = []  # names of FEATURES
        for name in FEATURES:
            if width and getattr(config, f"{name}_weight"):
                self.matched.append(name)
                self.add_module(f"{name}_map", nn.Linear(self.backbone.embed_dim, width))

    def forward(self, crops: list[Tensor], plan=None, masks=None, mask_indices=None) -> dict:
        # None takes the place of the masks: no patch is hidden. The logits are still asked for
        # at mask_indices only.
        out = super().forward(crops, plan, None, mask_indices)

        # Features are matched on the global crops, which come first: the teacher sees no
        # others.
        global_crops = len(crops[0])  # G*B
        for name in self.matched:
            features = out[FEATURES[name]][:global_crops]  # (G*B, D) or (G*B, P, D)
            out[name] = getattr(self, f"{name}_map")(features)
        return out

    def extra_losses(self, teacher_out: dict, student_out: dict) -> dict[str, Tensor]:
        """Distances between mapped features and the teacher's, by name: same crop, same patch.

        In float32, because nearly equal features have distances that half precision rounds to
        0.
        """
        terms = {}
        for name in self.matched:
            wanted = teacher_out[FEATURES[name]].float()
            terms[name] = self.distance(student_out[name].float(), wanted)
        return terms


class Teacher(nn.Module):
    """Gives the answers of the frozen network; its own weights are the student's average.

    train.Run knows one teacher, which it asks for targets, and which it also averages, judges
    and saves. In distillation these are two networks. This class shows each use the right one.
    """

    def __init__(self, average: Network, frozen: Network):
        super().__init__()
        # The parts of the average become parts of this module under their own names. So its
        # parameters are those of a Network, in the order of the student's, by which ema_update
        # pairs them.
        for name, part in average.named_children():
            self.add_module(name, part)

        # nn.Module registers every module that is assigned to it, but not what is in a list.
        # Registered, the frozen network would be among parameters() and state_dict(): the
        # student would be averaged into it, each checkpoint would contain it, and counts of
        # parameters would include it.
        self.frozen = [frozen]

    heads = Network.heads  # train.shard asks for them

    def forward(self, crops: list[Tensor], mask_indices=None) -> dict:
        return self.frozen[0](crops, mask_indices=mask_indices)


def build(config: Config, process: Process, frozen: Network) -> tuple[nn.Module, nn.Module]:
    """(student, teacher); the teacher answers as `frozen` does, and averages the student."""
    width = frozen.backbone.embed_dim
    student, average = train.build(config, process, partial(Student, width=width))

    # The frozen network is no part of a module (see Teacher), so whatever is done to all parts
    # of a network has to be done to it by hand: moving, compiling, splitting over processes.
    frozen.to(process.device)
    train.compile_blocks([frozen], config, process)
    count = sum(p.numel() for p in frozen.parameters())
    megabytes = count / 2**18  # four bytes for each parameter
    process.print(
        f"teacher {config.teacher}: {count:,d} parameters, frozen, {megabytes:.0f} MB")
    if config.parallel != "ddp":
        train.shard(frozen, config, process)
    return student, Teacher(average, frozen)


@torch.no_grad()
def move_average(teacher: Teacher, student: nn.Module, momentum: float,
                 ok: Tensor | float = 1.0):
    """average <- m * average + (1 - m) * student, BatchNorm's statistics included.

    ok: 0 where the loss or a gradient was not finite; then nothing changes.
    """
    ema_update(teacher, student, momentum, ok)

    # In train.py the teacher sees every batch, and BatchNorm gathers statistics of its own. No
    # image ever passes through this average: it has to take the statistics of the student.
    for averaged, current in zip(teacher.buffers(), student.buffers()):
        if averaged.is_floating_point():  # not the number of batches that were seen
            weight = torch.as_tensor((1 - momentum) * ok, dtype=averaged.dtype,
                                     device=averaged.device)

            # Where the step was not finite the student's statistics may be NaN. A weight of 0
            # would not keep them out, because 0 * NaN is NaN; torch.where does.
            moved = averaged.lerp(current, weight)
            averaged.copy_(torch.where(weight > 0, moved, averaged))


# ----------------------------------------------------------------------------------------------
# Opening the large network: --teacher


@contextlib.contextmanager
def teacher_errors():
    """Inside, a ValueError is about --teacher, and becomes one line that says so."""
    # The functions that read weights call them --weights, as the flag of other programs. It is
    # put around the reading alone: the ValueError of a bug while training keeps its traceback.
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error).replace("--weights", "--teacher")) from None


def open_backbone(config: Config) -> nn.Module:
    """The backbone of --teacher, frozen; UsageError if the student's crops do not fit it."""
    backbone = load_backbone(config.teacher).requires_grad_(False)

    # Patches are compared one by one, so both networks must cut a crop into the same grid. A
    # convnet has no patches. Class tokens alone can be compared whatever the patches are.
    patch_size = backbone.patch_size
    teacher_patch = None if isinstance(backbone, ConvNet) else patch_size
    student_patch = None if config.convnet else config.patch_size
    compares_patches = config.learns_patches or config.patch_feature_weight
    if compares_patches and not (teacher_patch and student_patch):
        convnet = f"--arch {config.arch}" if config.convnet else f"--teacher {config.teacher}"
        raise UsageError(f"{convnet} is a convnet and has no patches to compare; do without: "
                         "--ibot_weight 0 --patch_feature_weight 0")
    if compares_patches and teacher_patch != student_patch:
        raise UsageError(
            f"--patch_size {student_patch}: patches are compared one by one, and those of "
            f"--teacher {config.teacher} are of {teacher_patch} pixels; give the same, or do "
            "without patches: --ibot_weight 0 --patch_feature_weight 0")

    # The teacher sees the global crops: each must be a whole number of its patches, at the size
    # of the run and at those of --curriculum before it.
    sizes = [stage.global_crops_size for _, stage in config.stages(1)]
    for size in reversed(sizes):
        if size % patch_size:
            flag = "--global_crops_size" if size == sizes[-1] else "--curriculum: crops of"
            raise UsageError(
                f"{flag} {size} is not a multiple of the teacher's patches "
                f"of {patch_size} pixels; try {max(size // patch_size, 1) * patch_size}")
    return backbone


def identify_teacher(config: Config) -> Config:
    """`config` with the SHA-256 of the file of --teacher.

    UsageError if the run that is to be continued began with another file. A teacher that is
    still being trained keeps its path, and changes with each of its checkpoints.
    """
    sha256 = digest(weights_file(config.teacher))
    folder = Path(config.output_dir or f"runs/{config.preset}")
    if config.resume and (folder / "config.json").exists():
        began_with = read_config(folder / "config.json", Config)["teacher_sha256"]
        if not began_with:  # no run of this program, or an old one: match_stored_run tells
            return config
        if began_with != sha256:
            raise UsageError(f"--teacher {config.teacher} has other weights than when {folder} "
                             "began: give those, or --no_resume to start anew")
    return replace(config, teacher_sha256=sha256)


def train_heads(config: Config, backbone: nn.Module) -> Path:
    """Train heads on a frozen backbone, for a teacher that came without; returns their run.

    This is a run of train.py in RUN/teacher_heads, which is continued or found finished like
    any other. Its student and its teacher have this same backbone. For class tokens they see
    different crops, so the head learns to give all crops of an image the same answer over the
    prototypes. Patches are compared with themselves, as nothing is hidden here: their head learns
    from centering and sharpening alone. (DINOv2's own heads were not released.)
    """
    if isinstance(backbone, ConvNet):
        raise UsageError(
            f"--train_teacher_heads_epochs: --teacher {config.teacher} is a convnet; "
            "expected a Vision Transformer, or a run with its heads")

    # 1. The settings: those of the distillation, but for the length and for what belongs to the
    # student alone (--init, a backbone that rests). Both kinds of k-NN judge the backbone, which
    # does not change here, so they would always give the same figures.
    folder = Path(config.output_dir or f"runs/{config.preset}") / "teacher_heads"
    epochs = config.train_teacher_heads_epochs
    warmup_epochs = min(config.warmup_epochs, epochs - 1)
    prototypes_rest = min(config.freeze_last_layer_epochs, epochs - 1)
    heads_config = replace(
        config, output_dir=str(folder), epochs=epochs, knn_every=0, init="", dense_every=0,
        warmup_epochs=warmup_epochs, freeze_backbone_epochs=0,
        freeze_last_layer_epochs=prototypes_rest,
        warmup_teacher_temp_epochs=min(config.warmup_teacher_temp_epochs, epochs))

    # 2. The network in config.json is the teacher's, so that its masks have the teacher's grid.
    # The name of the architecture is for the record: the backbone is not built but given.
    names = {(arch["embed_dim"], arch["depth"]): name for name, arch in ARCHS.items()}
    arch = names.get((backbone.embed_dim, backbone.depth), config.arch)
    p = backbone.patch_size
    local = max(1, round(config.local_crops_size / p)) * p  # whole patches of the teacher
    # Any number above 0 says that there are factors; theirs are in the backbone.
    layerscale = 1.0 if hasattr(backbone.blocks[0].ls1, "gamma") else 0.0
    heads_config = replace(heads_config, arch=arch, patch_size=p, local_crops_size=local,
                           ffn_layer=ffn_layer_of(backbone), layerscale=layerscale,
                           num_register_tokens=backbone.num_register_tokens,
                           pos_embed_resize=backbone.pos_embed_resize)

    # 3. The run. The backbone's parameters need no gradient, so the optimizer leaves them out:
    # only the heads learn. The copy keeps `backbone` itself free of what training does to it.
    network = partial(Student, backbone=copy.deepcopy(backbone))
    train.run(heads_config, partial(train.build, network=network))

    # 4. The main process writes heads.pt: the others wait before they read it.
    start_process(config.device).barrier()
    return folder


def add_heads(config: Config, backbone: nn.Module, run: Path) -> tuple[Config, Network]:
    """(config, teacher): the backbone with the heads of its run, and settings that fit them.

    UsageError if the run has no heads, or has other prototypes than the flags ask for.
    """
    if not (run / "heads.pt").exists() or not (run / "config.json").exists():
        raise UsageError(
            f"--teacher {config.teacher} has no heads.pt and config.json beside it: "
            "give --train_teacher_heads_epochs to train heads, or match features: "
            "--dino_weight 0 --ibot_weight 0 --class_feature_weight 1")

    # 1. The teacher's settings. Where it was distilled itself, its config.json has fields of
    # this file's Config, too: they say nothing about the heads and are left out.
    stored = read_config(run / "config.json")
    fields = TrainingConfig.__dataclass_fields__
    teacher_config = TrainingConfig(
        **{name: value
           for name, value in stored.items() if name in fields})

    # 2. Teacher and student answer over the same prototypes. What no flag says about their
    # number is taken from the teacher; --auto_scale does not change it.
    shared = ("n_prototypes", "ibot_n_prototypes", "separate_head")
    taken_over = {
        name: getattr(teacher_config, name)
        for name in shared if name not in config.given}
    config = replace(config, **taken_over, taken_over=(*config.taken_over, *taken_over))

    # 3. Flags may still ask for another number, or the teacher may never have learned patches.
    teacher_prototypes = teacher_config.objectives
    for name, count in config.objectives.items():
        if count != teacher_prototypes.get(name):
            raise UsageError(
                f"{count} prototypes are asked for {name}, the teacher's run {run} "
                f"has {teacher_prototypes.get(name, 'none')}: leave --{', --'.join(shared)} "
                f"to it, or give --{name}_weight 0, or --train_teacher_heads_epochs")

    # 4. The network, with heads as they were trained: each tensor has to find its place.
    frozen = Network(teacher_config, backbone=backbone)
    tensors = read_heads(run / "heads.pt", "--teacher")
    for name, head in frozen.heads().items():
        load_strictly(head, tensors.get(name, {}), f"{run}/heads.pt")
    return config, frozen


def open_teacher(config: Config) -> tuple[Config, Network]:
    """(config, --teacher): frozen, with heads where the losses need them.

    The returned config has the channels and the prototypes of the teacher.
    """
    with teacher_errors():
        backbone = open_backbone(config)

    # Both networks see the same crops, in the channels and with the normalisation that the
    # teacher has learned with.
    if config.channel_stats != backbone.channel_stats:
        if {"in_chans", "mean", "std"} & set(config.given):
            raise UsageError(
                f"--in_chans, --mean, --std: leave them to --teacher {config.teacher}")
        mean, std = backbone.channel_stats
        channel_stats = dict(in_chans=len(mean), mean=mean, std=std)
        config = replace(config, **channel_stats,
                         taken_over=(*config.taken_over, *channel_stats))

    # Without a loss over prototypes features are matched, and no heads are needed. eval():
    # BatchNorm uses the statistics it has, and does not change them.
    if not config.objectives:
        if "train_teacher_heads_epochs" in config.given and config.train_teacher_heads_epochs:
            raise UsageError(
                f"--train_teacher_heads_epochs {config.train_teacher_heads_epochs}: no loss needs "
                "heads, as --dino_weight and --ibot_weight are 0; leave it out")
        return config, Network(config, backbone=backbone).eval()

    # Heads that are there already lie beside the file of the backbone, such as RUN/teacher.pt.
    if config.train_teacher_heads_epochs:
        run = train_heads(config, backbone)
    else:
        run = weights_file(config.teacher).parent
    with teacher_errors():
        config, frozen = add_heads(config, backbone, run)
    return config, frozen.requires_grad_(False).eval()


def run(config: Config) -> dict:
    """train.run with a teacher that is opened first; returns the summary of the run."""
    # With --init the weights decide what the student is, which the teacher has to fit.
    if config.init:
        from training.warmstart import config_from_init  # here, because few runs need it

        config = config_from_init(config)
    check(config)
    check_sources(config, config.teacher)
    if not (config.objectives or config.class_feature_weight or config.patch_feature_weight):
        raise UsageError("no loss asks the teacher: give --dino_weight, --ibot_weight, "
                         "--class_feature_weight or --patch_feature_weight")
    with teacher_errors():
        config = identify_teacher(config)
    config, frozen = open_teacher(config)
    return train.run(config, partial(build, frozen=frozen), move_average)


@command
def main(argv):
    return run(train.read_flags(argv, Config, DISTILLATION, "distill.py"))


if __name__ == "__main__":
    main()
