"""Recipes: every setting of a training run, and the papers as short dictionaries of what differs.

    Config's defaults  <--  PRESETS[name]  <--  flags on the command line
    (DINO, ViT-S/16)        what differs        what you say wins

Idea     A paper's recipe is a difference to another one. Read side by side, the presets show what
         each run changed; the comment above tells hardware, time and result, or whose they are.
Paper    DINO A, iBOT 4.1, DINOv2 table 16; the READMEs and configurations of their code
Try      python recipes.py      the presets, side by side
Change   a new recipe is one entry in PRESETS; a new setting one field of Config
Tests    pytest tests/test_recipes.py
"""

import json
import math
import os
import typing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from augment import Pixels, pixels_of
from runtime import UsageError, require

Arch = Literal["vit_pico", "vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large",
               "vit_giant2", "resnet18", "resnet50", "resnet101", "wide_resnet50_2",
               "mobilenet_v3_small", "convnext_tiny"]


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
    arch: Arch = "vit_small"  # a Vision Transformer of vit.ARCHS, or a convnet of resnet.NAMES
    patch_size: int = 16  # pixels; crops must be multiples of it
    drop_path_rate: float = 0.1  # stochastic depth of the student's last block
    drop_path_uniform: bool = False  # the same rate in all blocks instead of a ramp from 0
    ffn_layer: Literal["mlp", "swiglu"] = "mlp"  # what follows attention in each block
    layerscale: float = 0.0  # start of a learned factor on each branch (DINOv2: 1e-5); 0: none
    num_register_tokens: int = 0  # extra tokens that are nowhere in the image
    pos_embed_resize: Literal["offset", "antialias"] = "offset"  # rule for other image sizes
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
    photometry: Literal["dino", "dinov2", "small", "none"] = "dino"  # colour augmentation
    # -- masks
    mask_probability: float = 0.5  # share of global crops with hidden patches (--ibot_weight > 0)
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # share of patches hidden in those
    mask_shape: Literal["block", "random"] = "block"  # rectangles, or patches one by one
    mask_min_patches: int = 4  # in a rectangle
    # -- loss
    dino_weight: float = 1.0  # of the class tokens' loss
    ibot_weight: float = 0.0  # of the hidden patches' loss (iBOT, DINOv2: 1)
    koleo_weight: float = 0.0  # of the term that spreads images apart (DINOv2: 0.1)
    centering: Literal["ema", "sinkhorn", "none"] = "ema"  # against one answer for all
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
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = 5e-4  # peak, for the reference batch of --lr_scaling
    lr_scaling: Literal["linear_256", "sqrt_1024", "none"] = "linear_256"  # lr * batch / 256, ...
    min_lr: float = 1e-6  # at the end
    warmup_epochs: int = 10  # linear rise of the learning rate
    weight_decay: float = 0.04  # at the start
    weight_decay_end: float = 0.4  # at the end
    layerwise_decay: float = 1.0  # factor on lr from each block to the one below
    patch_embed_lr_mult: float = 1.0  # factor on lr of the patch embedding
    clip_grad: float = 3.0  # largest gradient norm; 0: no clipping
    clip_mode: Literal["parameter", "network"] = "parameter"  # of each tensor, or of each network
    freeze_last_layer_epochs: int = 1  # the prototypes rest this long
    seed: int = 0  # everything random follows from it
    # -- machine
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of products; auto: bf16 if fast
    parallel: Literal["ddp", "fsdp"] = "ddp"  # copies of the network, or one split over processes
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
        """Whether the backbone is one of resnet.NAMES."""
        return not self.arch.startswith("vit_")

    @property
    def learns_patches(self) -> bool:
        """Whether there is an iBOT objective: a weight for it, and places to learn it at."""
        return self.ibot_weight > 0 and self.mask_probability > 0

    @property
    def hides_patches(self) -> bool:
        """Whether the student has to guess what is at those places."""
        return self.learns_patches


# What --init brings along. The network and its heads are those of the weights, whatever a preset
# says; the crops are, unless a preset or a flag says otherwise.
NETWORK = ("arch", "patch_size", "ffn_layer", "num_register_tokens", "layerscale",
           "pos_embed_resize")
HEADS = ("n_prototypes", "head_hidden_dim", "head_bottleneck_dim", "head_nlayers",
         "use_bn_in_head", "norm_last_layer", "separate_head", "ibot_n_prototypes",
         "ibot_head_bottleneck_dim")
CROPS = ("in_chans", "mean", "std", "global_crops_size", "local_crops_size", "local_crops_number",
         "global_crops_scale", "local_crops_scale", "photometry")

# Fields that do not change the result: a run may be continued with others.
NEUTRAL = {"output_dir", "given", "resume", "save_every", "log_every", "knn_every", "num_workers",
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


# ------------------------------------------------------------------------------------------------
# Other data, other batches: the papers had a million images or more, a thousand of them a step

SCALED = ("momentum_teacher", "n_prototypes", "ibot_n_prototypes", "warmup_epochs", "lr",
          "lr_scaling", "local_crops_scale")


def auto_scale(config: Config, images: int, batch: int) -> Config:
    """--auto_scale: `config` for a set of `images`, `batch` of them a step over all processes.

    Sets the fields of SCALED that no flag named. docs/scaling.md has the table and what of it was
    measured.
    """
    steps = config.epochs * (config.epoch_length or max(images // batch, 1))
    # The teacher averages the student's last 1 / (1 - m) steps: DINO's 250 steps of 1,024 images,
    # so as many images at any batch. A short run has no time for that: a fortieth of it at most.
    memory = max(min(250 * 1024 / batch, steps / 40, 10_000), 10)
    # A prototype needs images of its own: some twenty. Powers of two suit the hardware.
    prototypes = min(max(2 ** round(math.log2(max(images, 1) / 20)), 256), 65536)
    # Adam's step has the same length whatever the batch; a larger batch makes it surer, by the
    # root of its size. Below 256 images it is time that is short: as sure as need be.
    lr = 2e-3 * math.sqrt(max(batch, 256) / 1024)
    # To know a thing from a twentieth of its image takes millions of looks; fewer images mean
    # fewer looks, and mostly smaller images: begin with a quarter.
    low = min(max(0.05 * (1e6 / images) ** 0.35, 0.05), 0.25)
    rules = dict(
        momentum_teacher=round(1 - 1 / memory, 4), n_prototypes=prototypes,
        ibot_n_prototypes=prototypes, lr=float(f"{lr:.2g}"), lr_scaling="none",
        warmup_epochs=min(max(config.epochs // 10, 1), config.epochs - 1),
        local_crops_scale=(round(low, 2), round(low + 0.35, 2)),
    )
    return replace(config, **{k: v for k, v in rules.items() if k not in config.given})


# ------------------------------------------------------------------------------------------------
# What cannot be trained


def check(config: Config):
    """Refuse what cannot work, in one sentence that names the flag."""
    sizes = ["global_crops_size"] + ["local_crops_size"] * (config.local_crops_number > 0)
    for name in sizes:
        size, p = getattr(config, name), 1 if config.convnet else config.patch_size
        if p < 1 or size < p:
            raise UsageError(f"--{name} {size} is smaller than one patch of --patch_size {p}")
        if size % p:
            raise UsageError(f"--{name} {size} is not a multiple of --patch_size {p}; "
                             f"try {size // p * p}")
    require(config, lambda x: x >= 1, "at least 1", "epochs", "batch_size_per_gpu", "save_every",
            "log_every", "keep", "global_crops_number", "n_prototypes", "ibot_n_prototypes",
            "head_nlayers", "head_hidden_dim", "head_bottleneck_dim", "ibot_head_bottleneck_dim")
    check_pixels(config)
    require(config, lambda x: x > 0, "a positive number", "teacher_temp", "warmup_teacher_temp",
            "student_temp")
    require(config, lambda x: 0 < x[0] <= x[1] <= 1, "0 < low <= high <= 1", "global_crops_scale",
            "local_crops_scale")
    require(config, lambda x: x <= 1, "at most 1", "momentum_teacher", "final_momentum_teacher",
            "center_momentum", "mask_probability")
    require(config, lambda x: x < 1, "below 1", "drop_path_rate")
    require(config, lambda x: 0 < x <= 1, "above 0, at most 1", "layerwise_decay")
    weights = [value for name, value in vars(config).items()
               if name.endswith("_weight") and name != "ibot_weight"]
    if not (any(weights) or config.learns_patches):
        raise UsageError("--dino_weight 0 and no other loss: nothing to learn; give --ibot_weight "
                         "(with --mask_probability) or --koleo_weight")
    if config.dino_weight and config.global_crops_number + config.local_crops_number < 2:
        raise UsageError("--global_crops_number 1 --local_crops_number 0: one view has no other to "
                         "match; give at least two crops")
    if config.koleo_weight and config.batch_size_per_gpu < 2:
        raise UsageError("--batch_size_per_gpu 1 leaves KoLeo no other image to keep away from: "
                         "give at least 2, or --koleo_weight 0")
    if config.learns_patches:
        check_masks(config)
    if config.activation_checkpointing and config.convnet:
        raise UsageError("--activation_checkpointing: BatchNorm would count each batch twice; give "
                         "a ViT, or a smaller --batch_size_per_gpu")
    if config.freeze_backbone_epochs and not config.init:
        raise UsageError(f"--freeze_backbone_epochs {config.freeze_backbone_epochs}: a random "
                         "backbone has nothing to keep; give --init")
    if config.freeze_backbone_epochs >= config.epochs:
        raise UsageError(f"--freeze_backbone_epochs {config.freeze_backbone_epochs} leaves nothing "
                         f"of --epochs {config.epochs}")
    if config.parallel == "fsdp" and "WORLD_SIZE" not in os.environ:
        raise UsageError("--parallel fsdp splits a network over processes: start it with torchrun "
                         "--nproc_per_node=N train.py ...")
    if config.parallel == "fsdp" and (config.convnet or config.use_bn_in_head):
        raise UsageError("--parallel fsdp: BatchNorm (--use_bn_in_head, convnets) has statistics "
                         "that no process owns; give --parallel ddp, or do without it")
    if config.parallel == "fsdp" and config.optimizer != "adamw":
        raise UsageError(f"--parallel fsdp with --optimizer {config.optimizer}: it has no step on "
                         "split tensors; give --optimizer adamw, or --parallel ddp")
    open_to_rules = config.auto_scale and "warmup_epochs" not in config.given
    if config.warmup_epochs >= config.epochs and not open_to_rules:
        raise UsageError(f"--warmup_epochs {config.warmup_epochs} leaves nothing of "
                         f"--epochs {config.epochs}")


def check_pixels(config: Config):
    C = config.in_chans
    require(config, lambda x: x >= 1, "at least 1", "in_chans")
    require(config, lambda x: len(x) in (0, C), f"{C} numbers, as --in_chans", "mean", "std")
    require(config, lambda x: all(v > 0 for v in x), "positive numbers", "std")
    if C != 3 and config.convnet:
        raise UsageError(f"--in_chans {C}: torchvision's convnets begin with three channels; give "
                         "a ViT")
    if C != 3 and config.cache:
        raise UsageError(f"--in_chans {C}: --cache keeps photographs, bytes of three channels")


def check_masks(config: Config):
    if config.convnet:
        raise UsageError(f"--arch {config.arch} has no patches to hide: give a ViT, or "
                         "--ibot_weight 0")
    low, high = config.mask_ratio
    patches = (config.global_crops_size // config.patch_size) ** 2
    if not 0 <= low <= high <= 1 or int(patches * high) < 1:
        raise UsageError(f"--mask_ratio {low} {high}: expected 0 <= low <= high <= 1, and at least "
                         f"one of the {patches} patches of a global crop")
    crops = config.global_crops_number * config.batch_size_per_gpu
    if int(crops * config.mask_probability) < 1:
        raise UsageError(f"--mask_probability {config.mask_probability} of {crops} global crops is "
                         "not one crop; raise it or --batch_size_per_gpu, or --ibot_weight 0")
    if not 1 <= config.mask_min_patches <= max(1, patches // 2):
        raise UsageError(f"--mask_min_patches {config.mask_min_patches}: expected 1 to "
                         f"{max(1, patches // 2)}, half of a global crop's {patches} patches")


# ------------------------------------------------------------------------------------------------
# The papers, and the same at small scale

# Small images and minutes instead of days: what follows from their number is --auto_scale's.
# BatchNorm in the head keeps the first features apart until the teacher has learned to, and a
# narrow bottleneck makes its first answers sharp: cosines spread as 1/sqrt(width).
SMALL = dict(
    auto_scale=True, use_bn_in_head=True, head_bottleneck_dim=32, center_momentum=0.8,
    freeze_last_layer_epochs=0, weight_decay_end=0.1, drop_path_rate=0.0,
)
# What the two later papers add, in the measure that a short run can bear: at a weight of 1 the
# patches take over the features before there is anything in them to share.
SMALL_IBOT = dict(ibot_weight=0.2, separate_head=True, ibot_head_bottleneck_dim=32)
SMALL_DINOV2 = SMALL_IBOT | dict(
    koleo_weight=0.1, layerscale=1.0, num_register_tokens=2, pos_embed_resize="antialias",
)

SHAPES = SMALL | dict(
    data="shapes", val_data="shapes:val", arch="vit_nano", patch_size=5, head_hidden_dim=256,
    global_crops_size=40, global_crops_scale=(0.5, 1.0), local_crops_size=25,
    local_crops_number=2, photometry="small",
    # Many small steps: at 16 images a step the same images end 9 points lower (one seed).
    batch_size_per_gpu=8, epochs=4, knn_every=1,
)
CIFAR10 = SMALL | dict(
    data="CIFAR10", val_data="CIFAR10:val", arch="vit_tiny", patch_size=4, head_hidden_dim=1024,
    global_crops_size=32, global_crops_scale=(0.4, 1.0), local_crops_size=16,
    local_crops_number=6, photometry="small", batch_size_per_gpu=128, epochs=100,
)
IMAGENETTE = SMALL | dict(
    data="Imagenette", val_data="Imagenette:val", arch="vit_small", patch_size=16,
    global_crops_size=128, local_crops_size=64, local_crops_number=6, batch_size_per_gpu=64,
    epochs=200,
)

# DINOv2 on ImageNet-1k: iBOT and KoLeo on top of DINO, a deeper and steadier ViT. An epoch is 1,250
# steps whatever the data.
DINOV2 = dict(
    data="ImageNet", val_data="ImageNet:val", arch="vit_large", layerscale=1e-5,
    drop_path_rate=0.3, drop_path_uniform=True, norm_last_layer=False, ibot_weight=1.0,
    koleo_weight=0.1, global_crops_scale=(0.32, 1.0), local_crops_scale=(0.05, 0.32),
    photometry="dinov2", teacher_temp=0.07, warmup_teacher_temp_epochs=30, momentum_teacher=0.992,
    epoch_length=1250, lr=4e-3, lr_scaling="sqrt_1024", layerwise_decay=0.9,
    patch_embed_lr_mult=0.2, clip_mode="network",
)
# What the released models have on top: Sinkhorn-Knopp, heads of their own, SwiGLU, a long schedule.
DINOV2_LONG = dict(
    patch_size=14, local_crops_size=98, ffn_layer="swiglu", drop_path_rate=0.4,
    centering="sinkhorn", separate_head=True, n_prototypes=131072, ibot_n_prototypes=131072,
    head_bottleneck_dim=384, ibot_head_bottleneck_dim=256, momentum_teacher=0.994, epochs=500,
    warmup_epochs=80, lr=2e-4, weight_decay_end=0.2, layerwise_decay=1.0, batch_size_per_gpu=32,
)

PRESETS = {
    # The default. Two cores of a laptop's kind, 4 minutes (fp32: 5): k-NN 56.0 to 81.5, mean 69.9.
    "shapes": SHAPES,
    "shapes_dino": SHAPES,
    "shapes_ibot": SHAPES | SMALL_IBOT,
    # Steadier over seeds than DINO alone, which KoLeo keeps from features of few dimensions.
    "shapes_dinov2": SHAPES | SMALL_DINOV2 | dict(ibot_weight=0.1),
    # For one GPU; not yet measured.
    "cifar10": CIFAR10,
    "cifar10_dino": CIFAR10,
    "cifar10_ibot": CIFAR10 | SMALL_IBOT,
    "cifar10_dinov2": CIFAR10 | SMALL_DINOV2,
    "imagenette": IMAGENETTE,
    "imagenette_dino": IMAGENETTE,
    "imagenette_ibot": IMAGENETTE | SMALL_IBOT,
    "imagenette_dinov2": IMAGENETTE | SMALL_DINOV2,
    # 8 GPUs of 64 images, 1.75 days on V100s: k-NN 69.3, linear 74.0 (the paper's code's README).
    "dino_vits16": dict(data="ImageNet", val_data="ImageNet:val"),
    # 16 GPUs of 64, 2.6 days: k-NN 73.3, linear 76.0 (the README's).
    "dino_vits16_300ep": dict(
        data="ImageNet", val_data="ImageNet:val", epochs=300, norm_last_layer=False,
        teacher_temp=0.07, warmup_teacher_temp_epochs=30,
    ),
    # The released weights. 16 GPUs of 64: k-NN 74.5, linear 77.0 (the README's).
    "dino_vits16_800ep": dict(
        data="ImageNet", val_data="ImageNet:val", epochs=800, norm_last_layer=False,
        teacher_temp=0.07, warmup_teacher_temp_epochs=30, min_lr=1e-5, clip_grad=0.0,
        local_crops_number=10, global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25),
        precision="fp32",
    ),
    # 64 GPUs of 16: k-NN 78.3, linear 79.7 (the README's). Unstable in half precision.
    "dino_vits8": dict(
        data="ImageNet", val_data="ImageNet:val", patch_size=8, epochs=800, norm_last_layer=False,
        batch_size_per_gpu=16, teacher_temp=0.07, warmup_teacher_temp_epochs=30, min_lr=1e-5,
        local_crops_number=10, global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25),
        precision="fp32",
    ),
    # 32 GPUs of 32: k-NN 76.1, linear 78.2 (the README's).
    "dino_vitb16": dict(
        data="ImageNet", val_data="ImageNet:val", arch="vit_base", epochs=400, lr=7.5e-4,
        batch_size_per_gpu=32, min_lr=2e-6, teacher_temp=0.07, warmup_teacher_temp_epochs=50,
        clip_grad=0.3, freeze_last_layer_epochs=3, local_crops_number=10,
        global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25), precision="fp32",
    ),
    # 8 GPUs of 64 (the README's recipe; its released weights, 800 epochs with LARS, have k-NN 67.5
    # and linear 75.3). A convnet likes SGD.
    "dino_resnet50": dict(
        data="ImageNet", val_data="ImageNet:val", arch="resnet50", optimizer="sgd", lr=0.03,
        weight_decay=1e-4, weight_decay_end=1e-4, global_crops_scale=(0.14, 1.0),
        local_crops_scale=(0.05, 0.14), drop_path_rate=0.0,
    ),
    # 16 GPUs of 64: k-NN 75.2, linear 77.9 (the README of iBOT's code).
    "ibot_vits16": dict(
        data="ImageNet", val_data="ImageNet:val", epochs=800, norm_last_layer=False,
        teacher_temp=0.07, warmup_teacher_temp_epochs=30, n_prototypes=8192, ibot_weight=1.0,
        mask_min_patches=16, local_crops_number=10, global_crops_scale=(0.25, 1.0),
        local_crops_scale=(0.05, 0.25),
    ),
    # 32 A100s of 64, about a day: k-NN 81.6, linear 82.9 (DINOv2's README).
    "dinov2_vitl16_in1k": DINOV2,
    # 96 A100s of 32, 3.3 days on ImageNet-22k: k-NN 82.0, linear 84.5 (DINOv2's README).
    "dinov2_vitl14": DINOV2 | DINOV2_LONG,
    # 256 A100s of 12, 22,000 GPU hours on LVD-142M, 142 million curated images (DINOv2 sec. 5).
    "dinov2_vitg14": dict(DINOV2 | DINOV2_LONG, arch="vit_giant2", batch_size_per_gpu=12),
    # DINOv2 sec. 4, "adapting the resolution": the last 10,000 of 625,000 steps, every schedule
    # pressed into them. The paper's lower learning rate is not known; this one is ours.
    "hires": DINOV2 | DINOV2_LONG | dict(
        init="runs/dinov2_vitl14", global_crops_size=518, epoch_length=1000, epochs=10,
        warmup_epochs=2, warmup_teacher_temp_epochs=1, freeze_last_layer_epochs=0, lr=5e-5,
        batch_size_per_gpu=8,
    ),
    # Ours: released weights, or a run, on other images. Small steps, smaller below; new heads learn
    # first, for random ones would tear down what the backbone knows.
    "continue": dict(
        init="dinov2_vits14", epochs=10, warmup_epochs=1, freeze_backbone_epochs=1, lr=2e-4,
        lr_scaling="none", layerwise_decay=0.8, momentum_teacher=0.998, n_prototypes=4096,
        koleo_weight=0.1, drop_path_rate=0.0, weight_decay_end=0.04,
    ),
}

# The presets of distill.py: a small student, and a large teacher that has its own already.

# Table 16 of DINOv2: what differs from the teacher's recipe. 64 GPUs of 32 would be its batch.
DISTILLED = DINOV2 | DINOV2_LONG | dict(
    teacher="runs/dinov2_vitg14", ffn_layer="mlp", drop_path_rate=0.0, lr=1e-3, lr_scaling="none",
    freeze_last_layer_epochs=0, precision="fp16",
)
# In a short run: a teacher that is done learning can be sharper than it was, for nothing will
# collapse, and the average need not become slower, for nobody learns from it.
SHARP = dict(teacher_temp=0.02, warmup_teacher_temp=0.02, final_momentum_teacher=0.98)

DISTILLATION = {
    # The default: a student of `python train.py`, half as wide.
    "shapes_distill": SHAPES | SHARP | dict(teacher="runs/shapes", arch="vit_pico"),
    # At 40 pixels, for two cores; the command for its teacher is in docs/distillation.md.
    "imagenette_distill": IMAGENETTE | SHARP | dict(
        teacher="runs/imagenette_small", arch="vit_pico", patch_size=5, global_crops_size=40,
        local_crops_size=20, local_crops_number=2, head_hidden_dim=512, batch_size_per_gpu=16,
        photometry="small", koleo_weight=0.1, epochs=6, knn_every=1,
    ),
    # From ViT-g/14 on LVD-142M: 4,500, 5,300 and 8,000 A100 hours (DINOv2's model card), k-NN
    # 79.0, 82.1 and 83.5, linear 81.1, 84.5 and 86.3 (its README).
    "dinov2_vits14_distill": DISTILLED | dict(arch="vit_small"),
    "dinov2_vitb14_distill": DISTILLED | dict(arch="vit_base"),
    "dinov2_vitl14_distill": DISTILLED | dict(arch="vit_large"),
}


if __name__ == "__main__":
    for name, preset in PRESETS.items():
        print(f"{name}\n    " + ", ".join(f"{k}={v}" for k, v in preset.items()))
    print("\n--auto_scale, for 100 epochs\n   images  batch  momentum      K       lr  local crops")
    for images in (1_000, 10_000, 100_000, 1_000_000):
        for batch in (32, 256, 1024, 3072):
            if batch <= images:
                c = auto_scale(Config(), images, batch)
                low, high = c.local_crops_scale
                print(f"{images:9,d} {batch:6,d}  {c.momentum_teacher:8.4f} {c.n_prototypes:6,d}  "
                      f"{c.lr:.1e}  {low:.2f}-{high:.2f}")
