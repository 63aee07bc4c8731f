"""Config: every setting of a training run, and what cannot be trained.

    Config's defaults  <--  PRESETS[name]  <--  flags on the command line
    (DINO, ViT-S/16)        (recipes.py)        what you say wins

Idea     One flat list, in the order of the method: data, network, head, crops, masks, losses,
         optimisation, machine. Choices are taken from the tables of the concept files, so that
         a new entry there is a new choice here.
Paper    DINO A, iBOT 4.1, DINOv2 table 16: the names are those of the papers' code
Try      python train.py --help
Change   a new setting is one field of Config; a weight of a new loss is called NAME_weight
Tests    pytest tests/training/test_config.py
"""

import json
import os
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from augment import MASK_SHAPES, PHOTOMETRY, Masking, Pixels, pixels_of
from backbones.convnet import CONVNETS
from losses import CENTERING
from machinery.flags import UsageError, require
from training.optim import OPTIMIZERS
from vit import ARCHS, FFNS, POS_EMBED_RESIZE


@dataclass
class Config:
    preset: str = ""
    given: tuple[str, ...] = ()  # the flags named on the command line
    # -- data
    data: str = "shapes"  # shapes | folder:PATH | shards:PATTERN | a torchvision class
    val_data: str = ""  # labelled images to judge with; empty: 5 % of --data held out by name
    auto_scale: bool = False  # set what depends on the number of images and on the batch: SCALED
    data_root: str = "data"  # where torchvision keeps its data sets
    download: bool = False  # let torchvision fetch them
    in_chans: int = 3  # channels of the images; unless 3: no colour operations, .npy or 16 bits fit
    mean: tuple[float, ...] = ()  # of each channel, black 0, white 1; empty: ImageNet's
    std: tuple[float, ...] = ()  # and its spread
    cache: str = ""  # a folder for --data decoded once; changes crops a little
    cache_side: int = 256  # pixels of the short side there, at most; 0: images as they are
    # -- start
    init: str = ""  # weights to begin with: a run, a released name, a URL, or a file; empty: random
    freeze_backbone_epochs: int = 0  # so long only the heads learn (with --init)
    # -- network
    arch: Literal[*ARCHS, *CONVNETS] = "vit_small"  # the backbone: a ViT or a convnet
    patch_size: int = 16  # pixels; crops must be multiples of it
    drop_path_rate: float = 0.1  # stochastic depth of the student's last block
    drop_path_uniform: bool = False  # the same rate in all blocks instead of a ramp from 0
    ffn_layer: Literal[*FFNS] = "mlp"  # what follows attention in each block
    layerscale: float = 0.0  # start of a learned factor on each branch (DINOv2: 1e-5); 0: none
    num_register_tokens: int = 0  # extra tokens that are nowhere in the image
    pos_embed_resize: Literal[*POS_EMBED_RESIZE] = "offset"  # rule for other image sizes
    # -- head
    n_prototypes: int = 65536  # K, the size of the answer
    head_hidden_dim: int = 2048  # width of the head's MLP
    head_bottleneck_dim: int = 256  # width before the prototypes
    head_nlayers: int = 3  # linear layers of the MLP
    use_bn_in_head: bool = False  # BatchNorm in the head (convnets)
    norm_last_layer: bool = True  # keep prototypes at length 1; False is better for small ViTs
    separate_head: bool = False  # patches get a head of their own
    ibot_n_prototypes: int = 65536  # its K
    ibot_head_bottleneck_dim: int = 256  # its width before the prototypes
    # -- crops
    global_crops_number: int = 2  # seen by teacher and student
    global_crops_size: int = 224  # pixels
    global_crops_scale: tuple[float, float] = (0.4, 1.0)  # share of the image's area
    local_crops_number: int = 8  # seen by the student only
    local_crops_size: int = 96  # pixels
    local_crops_scale: tuple[float, float] = (0.05, 0.4)  # share of the image's area
    photometry: Literal[*PHOTOMETRY] = "dino"  # colour augmentation
    # -- masks
    mask_probability: float = 0.5  # share of global crops with hidden patches (--ibot_weight > 0)
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # share of patches hidden in those
    mask_shape: Literal[*MASK_SHAPES] = "block"  # rectangles, or patches one by one
    mask_min_patches: int = 4  # in a rectangle
    # -- loss
    dino_weight: float = 1.0  # of the class tokens' loss
    ibot_weight: float = 0.0  # of the hidden patches' loss (iBOT, DINOv2: 1)
    koleo_weight: float = 0.0  # of the term that spreads images apart (DINOv2: 0.1)
    centering: Literal[*CENTERING] = "ema"  # against one answer for all
    center_momentum: float = 0.9  # of the EMA centre
    student_temp: float = 0.1  # softmax temperature of the student
    teacher_temp: float = 0.04  # and of the teacher: lower is sharper
    warmup_teacher_temp: float = 0.04  # its value at the start
    warmup_teacher_temp_epochs: int = 0  # epochs to rise over
    momentum_teacher: float = 0.996  # of the teacher's average, at the start
    final_momentum_teacher: float = 1.0  # and at the end
    # -- optimisation
    epochs: int = 100  # passes over the data, or stretches of --epoch_length
    epoch_length: int = 0  # steps an epoch; 0: what one pass over the data takes
    batch_size_per_gpu: int = 64  # images per process
    optimizer: Literal[*OPTIMIZERS] = "adamw"
    lr: float = 5e-4  # peak, for the reference batch of --lr_scaling
    lr_scaling: Literal["linear_256", "sqrt_1024", "none"] = "linear_256"  # lr * batch / 256
    min_lr: float = 1e-6  # at the end
    warmup_epochs: int = 10  # linear rise of the learning rate
    weight_decay: float = 0.04  # at the start
    weight_decay_end: float = 0.4  # at the end
    layerwise_decay: float = 1.0  # factor on lr from each block to the one below
    patch_embed_lr_mult: float = 1.0  # factor on lr of the patch embedding
    clip_grad: float = 3.0  # largest gradient norm; 0: no clipping
    clip_mode: Literal["parameter", "network"] = "parameter"  # each tensor, or each network
    freeze_last_layer_epochs: int = 1  # the prototypes rest this long
    seed: int = 0  # everything random follows from it
    # -- machine
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of products; bf16 if fast
    parallel: Literal["ddp", "fsdp"] = "ddp"  # copies of the network, or one that is split
    compile: bool | None = None  # fuse the blocks' kernels by torch.compile [on CUDA]
    activation_checkpointing: bool = False  # less memory, a quarter more time
    num_workers: int = 2  # loader processes
    # -- run
    output_dir: str = ""  # the run; empty: runs/PRESET
    resume: bool = True  # continue the run that is there; --no_resume starts anew
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    log_every: int = 20  # steps between log lines
    knn_every: int = 10  # epochs between k-NN evaluations of the teacher; 0: first and last only

    @property
    def pixels(self) -> Pixels:
        return pixels_of(self.in_chans, self.mean, self.std)

    @property
    def convnet(self) -> bool:
        """Whether the backbone is one of convnet.CONVNETS."""
        return self.arch in CONVNETS

    @property
    def learns_patches(self) -> bool:
        """Whether there is an iBOT objective: a weight for it, and places to learn it at."""
        return self.ibot_weight > 0 and self.mask_probability > 0

    @property
    def hides_patches(self) -> bool:
        """Whether the student has to guess what is at those places."""
        return self.learns_patches

    @property
    def objectives(self) -> dict[str, int]:
        """What is learned: "dino" (class tokens), "ibot" (patches) -> the number of
        prototypes.
        """
        prototypes = {}
        if self.dino_weight:
            prototypes["dino"] = self.n_prototypes
        if self.learns_patches:
            own_head = self.separate_head
            prototypes["ibot"] = self.ibot_n_prototypes if own_head else self.n_prototypes
        return prototypes

    def masking(self, rank: int = 0) -> Masking | None:
        """What draws the masks of process `rank`; None where only whole images are learned."""
        if not self.learns_patches:
            return None
        side = self.global_crops_size // self.patch_size
        return Masking((side, side), self.mask_ratio, self.mask_probability, self.mask_shape,
                       self.mask_min_patches, self.seed, rank)


# What --init brings along. The network and its heads are those of the weights, whatever a
# preset says; the crops are, unless a preset or a flag says otherwise.
NETWORK = ("arch", "patch_size", "ffn_layer", "num_register_tokens", "layerscale",
           "pos_embed_resize")

HEADS = ("n_prototypes", "head_hidden_dim", "head_bottleneck_dim", "head_nlayers",
         "use_bn_in_head", "norm_last_layer", "separate_head", "ibot_n_prototypes",
         "ibot_head_bottleneck_dim")

CROPS = ("in_chans", "mean", "std", "global_crops_size", "local_crops_size",
         "local_crops_number", "global_crops_scale", "local_crops_scale", "photometry")

# Fields that do not change the result: a run may be continued with others.
NEUTRAL = {
    "output_dir", "given", "resume", "save_every", "log_every", "knn_every", "num_workers",
    "device", "data_root", "download", "compile", "parallel", "keep",
    "activation_checkpointing"}


def fits(value, kind) -> bool:
    """Whether a value of JSON is of a field's type."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in inside
    if origin is tuple:
        long = inside[-1] is Ellipsis or isinstance(value, list) and len(value) == len(inside)
        return isinstance(value, list) and long and all(fits(v, inside[0]) for v in value)
    if inside:  # a union
        return any(fits(value, each) for each in inside)
    return type(value) in (int, float) if kind is float else type(value) is kind


def read_config(file: Path) -> dict:
    """config.json of a run, each field of its type; what the run did not know has its default.

    ValueError for anything else: such a file may come from anywhere.
    """
    try:
        stored = json.loads(file.read_text())
        if type(stored) is not dict or not fits(stored.get("global_batch"), int):
            raise ValueError("expected an object that knows its global_batch")
        for name, kind in typing.get_type_hints(Config).items():
            if name in stored and not fits(stored[name], kind):
                raise ValueError(f"{name} is {stored[name]!r:.40}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not the config.json of a run ({error})") from None
    stored = {name: tuple(v) if type(v) is list else v for name, v in stored.items()}
    return asdict(Config()) | stored


# ----------------------------------------------------------------------------------------------
# What cannot be trained


def check(config: Config):
    """Refuse what cannot work, in one sentence that names the flag."""
    sizes = ["global_crops_size"] + ["local_crops_size"] * (config.local_crops_number > 0)
    for name in sizes:
        size, p = getattr(config, name), 1 if config.convnet else config.patch_size
        if p < 1 or size < p:
            raise UsageError(f"--{name} {size} is smaller than one patch of --patch_size {p}")
        if size % p:
            raise UsageError(
                f"--{name} {size} is not a multiple of --patch_size {p}; try {size // p * p}")
    require(config, lambda x: x >= 1, "at least 1", "epochs", "batch_size_per_gpu",
            "save_every", "log_every", "keep", "global_crops_number", "n_prototypes",
            "ibot_n_prototypes", "head_nlayers", "head_hidden_dim", "head_bottleneck_dim",
            "ibot_head_bottleneck_dim")
    check_pixels(config)
    require(config, lambda x: x > 0, "a positive number", "teacher_temp", "warmup_teacher_temp",
            "student_temp")
    require(config, lambda x: 0 < x[0] <= x[1] <= 1, "0 < low <= high <= 1",
            "global_crops_scale", "local_crops_scale")
    require(config, lambda x: x <= 1, "at most 1", "momentum_teacher", "final_momentum_teacher",
            "center_momentum", "mask_probability")
    require(config, lambda x: x < 1, "below 1", "drop_path_rate")
    require(config, lambda x: 0 < x <= 1, "above 0, at most 1", "layerwise_decay")
    weights = [
        value for name, value in vars(config).items()
        if name.endswith("_weight") and name != "ibot_weight"]
    if not (any(weights) or config.learns_patches):
        raise UsageError(
            "--dino_weight 0 and no other loss: nothing to learn; give --ibot_weight "
            "(with --mask_probability) or --koleo_weight")
    if config.dino_weight and config.global_crops_number + config.local_crops_number < 2:
        raise UsageError(
            "--global_crops_number 1 --local_crops_number 0: one view has no other to "
            "match; give at least two crops")
    if config.koleo_weight and config.batch_size_per_gpu < 2:
        raise UsageError(
            "--batch_size_per_gpu 1 leaves KoLeo no other image to keep away from: "
            "give at least 2, or --koleo_weight 0")
    if config.learns_patches:
        check_masks(config)
    if config.activation_checkpointing and config.convnet:
        raise UsageError(
            "--activation_checkpointing: BatchNorm would count each batch twice; give "
            "a ViT, or a smaller --batch_size_per_gpu")
    if config.freeze_backbone_epochs and not config.init:
        raise UsageError(f"--freeze_backbone_epochs {config.freeze_backbone_epochs}: a random "
                         "backbone has nothing to keep; give --init")
    if config.freeze_backbone_epochs >= config.epochs:
        raise UsageError(
            f"--freeze_backbone_epochs {config.freeze_backbone_epochs} leaves nothing "
            f"of --epochs {config.epochs}")
    if config.parallel == "fsdp" and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "--parallel fsdp splits a network over processes: start it with torchrun "
            "--nproc_per_node=N train.py ...")
    if config.parallel == "fsdp" and (config.convnet or config.use_bn_in_head):
        raise UsageError(
            "--parallel fsdp: BatchNorm (--use_bn_in_head, convnets) has statistics "
            "that no process owns; give --parallel ddp, or do without it")
    if config.parallel == "fsdp" and config.optimizer != "adamw":
        raise UsageError(
            f"--parallel fsdp with --optimizer {config.optimizer}: it has no step on "
            "split tensors; give --optimizer adamw, or --parallel ddp")
    open_to_rules = config.auto_scale and "warmup_epochs" not in config.given
    if config.warmup_epochs >= config.epochs and not open_to_rules:
        raise UsageError(
            f"--warmup_epochs {config.warmup_epochs} leaves nothing of --epochs {config.epochs}"
        )


def check_pixels(config: Config):
    C = config.in_chans
    require(config, lambda x: x >= 1, "at least 1", "in_chans")
    require(config, lambda x: len(x) in (0, C), f"{C} numbers, as --in_chans", "mean", "std")
    require(config, lambda x: all(v > 0 for v in x), "positive numbers", "std")
    if C != 3 and config.convnet:
        raise UsageError(
            f"--in_chans {C}: torchvision's convnets begin with three channels; give a ViT")
    if C != 3 and config.cache:
        raise UsageError(f"--in_chans {C}: --cache keeps photographs, bytes of three channels")


def check_masks(config: Config):
    if config.convnet:
        raise UsageError(
            f"--arch {config.arch} has no patches to hide: give a ViT, or --ibot_weight 0")
    low, high = config.mask_ratio
    patches = (config.global_crops_size // config.patch_size)**2
    if not 0 <= low <= high <= 1 or int(patches * high) < 1:
        raise UsageError(
            f"--mask_ratio {low} {high}: expected 0 <= low <= high <= 1, and at least "
            f"one of the {patches} patches of a global crop")
    crops = config.global_crops_number * config.batch_size_per_gpu
    if int(crops * config.mask_probability) < 1:
        raise UsageError(
            f"--mask_probability {config.mask_probability} of {crops} global crops is "
            "not one crop; raise it or --batch_size_per_gpu, or --ibot_weight 0")
    if not 1 <= config.mask_min_patches <= max(1, patches // 2):
        raise UsageError(f"--mask_min_patches {config.mask_min_patches}: expected 1 to "
                         f"{max(1, patches // 2)}, half of a global crop's {patches} patches")
