"""Config: every setting of a training run.

    Config's defaults  <--  PRESETS[name]  <--  flags on the command line
    (DINO, ViT-S/16)        (recipes.py)        what you say wins

Idea     One flat list, in the order of the method: data, network, head, crops, masks, losses,
         optimisation, machine. Choices are taken from the tables of the concept files, so that
         a new entry there is a new choice here.
Paper    DINO sec. 3.2, iBOT sec. 3.2, DINOv2 table 16: the names are those of the papers' code
Try      python train.py --help
Change   a new setting is one field of Config; a weight of a new loss is called NAME_weight
Tests    pytest tests/training/test_config.py
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from augment import MASK_SHAPES, PHOTOMETRY, ChannelStats, Masking, channel_stats_of
from backbones.convnet import CONVNETS
from losses import CENTERING
from machinery.process import Process, spare_cores
from training.optim import OPTIMIZERS
from vit import ARCHS, FFNS, POS_EMBED_RESIZE

# Types of fields that would not fit on one line with their help. A Literal is a choice of
# words.
Range = tuple[float, float]  # the smallest and the largest value
LrScaling = Literal["linear_256", "sqrt_1024", "none"]
ClipMode = Literal["parameter", "network"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp", "hsdp"]


@dataclass
class Config:
    """All settings of a run. The comment beside a field is its help in `train.py --help`."""

    preset: str = ""
    given: tuple[str, ...] = ()  # names of the flags on the command line, set by flags.parse
    taken_over: tuple[str, ...] = ()  # settings that other weights have decided
    # -- data
    data: str = "shapes"  # shapes | folder:PATH | list:FILE | shards:PATTERN | CIFAR10
    val_data: str = ""  # labelled images to judge with; empty: --val_share of --data
    val_share: float = 0.05  # share of --data held out by name without --val_data; 0: none
    auto_scale: bool = False  # set recipes.SCALED by the number of images and the batch
    data_root: str = "data"  # folder in which torchvision keeps its data sets
    download: bool = False  # let torchvision download a data set that is not there
    # Images of another number than 3 come as pictures of as many bands, or as .npy files. Their
    # channels are no colours, so the colour changes leave hue and saturation alone.
    in_chans: int = 3  # number of channels of the images
    # The values of a pixel go from 0 (black) to 1 (white).
    mean: tuple[float, ...] = ()  # mean of each channel; empty: ImageNet's
    std: tuple[float, ...] = ()  # standard deviation of each channel; empty: ImageNet's
    # Decoding large photographs can take longer than training on them. The cache keeps them
    # shrunk, so crops are cut from fewer pixels and differ a little.
    cache: str = ""  # folder that keeps the images of --data decoded; empty: no cache
    cache_side: int = 256  # largest short side of a cached image in pixels; 0: any
    # -- start
    init: str = ""  # weights to begin with: run, released name, URL or file; empty: random
    freeze_backbone_epochs: int = 0  # epochs in which only the heads learn (with --init)
    # -- network
    arch: Literal[*ARCHS, *CONVNETS] = "vit_small"  # backbone: Vision Transformer or convnet
    patch_size: int = 16  # side of a patch in pixels; crop sizes must be multiples of it
    # Stochastic depth leaves a block out for some of the samples; the teacher never does.
    drop_path_rate: float = 0.1  # rate of stochastic depth in the student's last block
    drop_path_uniform: bool = False  # stochastic depth: one rate for all blocks, no ramp from 0
    ffn_layer: Literal[*FFNS] = "mlp"  # feed-forward layer after the attention of each block
    layerscale: float = 0.0  # first value of LayerScale's factors (DINOv2: 1e-5); 0: none
    num_register_tokens: int = 0  # number of register tokens, which belong to no patch
    # "offset" is the rule of DINO and DINOv2, "antialias" that of DINOv2 with registers.
    pos_embed_resize: Literal[*POS_EMBED_RESIZE] = "offset"  # rule to resample positions
    # -- head
    n_prototypes: int = 65536  # K of the class-token head, which patches share by default
    head_hidden_dim: int = 2048  # width of the hidden layers of the heads
    head_bottleneck_dim: int = 256  # width before the prototypes in the class-token head
    head_nlayers: int = 3  # number of linear layers before the prototypes in the heads
    use_bn_in_head: bool = False  # BatchNorm in the heads: for convnets, and for few images
    norm_last_layer: bool = True  # keep the gain of each prototype at 1; False: it is learned
    separate_head: bool = False  # give the patches a head of their own
    ibot_n_prototypes: int = 65536  # K of the patch head (with --separate_head)
    ibot_head_bottleneck_dim: int = 256  # width before the prototypes in the patch head
    # -- crops
    global_crops_number: int = 2  # number of global crops, which teacher and student see
    global_crops_size: int = 224  # side of a global crop in pixels
    global_crops_scale: Range = (0.4, 1.0)  # a global crop's share of the image: from, to
    local_crops_number: int = 8  # number of local crops, which only the student sees
    local_crops_size: int = 96  # side of a local crop in pixels
    local_crops_scale: Range = (0.05, 0.4)  # a local crop's share of the image: from, to
    photometry: Literal[*PHOTOMETRY] = "dino"  # table of colour changes for the crops
    # Small crops first: pairs of a share of the steps and a factor on both crop sizes. With 0.75
    # 0.5 the first three quarters of the steps have crops of half the size; the rest, as always,
    # of the whole size. Smaller crops show as much of an image as the whole ones: see `stages`.
    curriculum: tuple[float, ...] = ()  # share and crop factor of each early stage; empty: none
    # -- masks
    mask_probability: float = 0.5  # share of the global crops with a mask (if --ibot_weight)
    mask_ratio: Range = (0.1, 0.5)  # a mask's share of the patches: from, to
    mask_shape: Literal[*MASK_SHAPES] = "block"  # masks of rectangles, or of single patches
    mask_min_patches: int = 4  # smallest number of patches in a rectangle of a mask
    # -- loss
    dino_weight: float = 1.0  # weight of the DINO loss, on class tokens
    ibot_weight: float = 0.0  # weight of the iBOT loss, on masked patches (iBOT, DINOv2: 1)
    koleo_weight: float = 0.0  # weight of KoLeo, which spreads features apart (DINOv2: 0.1)
    centering: Literal[*CENTERING] = "ema"  # what keeps the targets from being all the same
    center_momentum: float = 0.9  # momentum of the EMA centre
    student_temp: float = 0.1  # softmax temperature of the student
    teacher_temp: float = 0.04  # softmax temperature of the teacher; lower is sharper
    warmup_teacher_temp: float = 0.04  # softmax temperature of the teacher at the start
    warmup_teacher_temp_epochs: int = 0  # epochs from --warmup_teacher_temp to --teacher_temp
    momentum_teacher: float = 0.996  # momentum of the teacher's average at the start
    final_momentum_teacher: float = 1.0  # momentum of the teacher's average at the end
    # -- optimisation
    epochs: int = 100  # length of the run in epochs
    epoch_length: int = 0  # steps of an epoch; 0: as many as one pass over the data takes
    batch_size_per_gpu: int = 64  # images of a step on each process
    optimizer: Literal[*OPTIMIZERS] = "adamw"  # what turns gradients into steps (convnets: sgd)
    # The peak is computed from the batch of all processes together. Example: 5e-4 with 1,024
    # images is a peak of 2e-3 by linear_256, and of 5e-4 by sqrt_1024 and by none.
    lr: float = 5e-4  # peak learning rate for the reference batch of --lr_scaling
    lr_scaling: LrScaling = "linear_256"  # lr * batch / 256 | lr * sqrt(batch / 1024) | lr
    min_lr: float = 1e-6  # learning rate at the end
    warmup_epochs: int = 10  # epochs in which the learning rate rises from 0 to its peak
    weight_decay: float = 0.04  # weight decay at the start
    weight_decay_end: float = 0.4  # weight decay at the end
    layerwise_decay: float = 1.0  # factor on the learning rate from each block to the one below
    patch_embed_lr_mult: float = 1.0  # further factor on the patch embedding's learning rate
    nonfinite_steps: int = 0  # steps of NaN or infinity to leave out, before one ends the run
    clip_grad: float = 3.0  # largest norm of a gradient; 0: no clipping
    clip_mode: ClipMode = "parameter"  # whose norm is clipped: each tensor's, or each network's
    freeze_last_layer_epochs: int = 1  # epochs in which the prototypes stay as they are
    seed: int = 0  # seed of everything that is random
    # -- machine
    device: str = "auto"  # auto (a GPU, if there is one) | cpu | cuda | mps
    precision: Precision = "auto"  # of matrix products; auto: bf16 or fp16 where it is fast
    # Only where several processes work together; machinery/shard.py explains fsdp and hsdp.
    parallel: Parallel = "ddp"  # copies of the network: one a process (ddp), a node, or one (fsdp)
    compile: bool | None = None  # fuse the operations of a block by torch.compile [on CUDA]
    activation_checkpointing: bool = False  # recompute activations: less memory, slower
    # They read and crop images. Default: as many as there are cores to spare, from 2 to 16.
    num_workers: int = spare_cores()  # loader processes, beside each training process
    # -- run
    output_dir: str = ""  # directory of the run; empty: runs/PRESET
    resume: bool = True  # continue the run that is in the directory; --no_resume starts anew
    save_every: int = 500  # steps from one checkpoint to the next
    keep: int = 2  # number of checkpoints to keep
    log_every: int = 20  # steps from one log line to the next
    profile: int = 0  # steps to record into trace.json, for https://ui.perfetto.dev; 0: none
    knn_every: int = 10  # epochs from one k-NN evaluation to the next; 0: only first and last
    # Patch tokens may get worse while the class token gets better, which k-NN does not show.
    dense_every: int = 0  # epochs from one segmentation by patch k-NN to the next; 0: none
    dense_data: str = "shapes"  # images with masks, of which 100 vote there
    dense_val_data: str = "shapes:val"  # images with masks, of which 50 are judged there

    @property
    def channel_stats(self) -> ChannelStats:
        """What the network takes for a pixel: channels, their means and standard deviations."""
        return channel_stats_of(self.in_chans, self.mean, self.std)

    @property
    def convnet(self) -> bool:
        """Whether the backbone is one of convnet.CONVNETS."""
        return self.arch in CONVNETS

    def sharers(self, process: Process) -> int:
        """How many processes hold one copy of the network together."""
        return {"ddp": 1, "fsdp": process.world_size, "hsdp": process.node_size}[self.parallel]

    @property
    def learns_patches(self) -> bool:
        """Whether there is an iBOT loss: a weight for it, and crops with a mask."""
        return self.ibot_weight > 0 and self.mask_probability > 0

    @property
    def hides_patches(self) -> bool:
        """Whether the masked patches are hidden from the student. distill.py does not hide
        them.
        """
        return self.learns_patches

    @property
    def objectives(self) -> dict[str, int]:
        """What has targets: "dino" (class tokens), "ibot" (patches) -> number of prototypes."""
        counts = {}
        if self.dino_weight:
            counts["dino"] = self.n_prototypes

        # Without a head of their own the patches go through the head of the class tokens.
        if self.learns_patches:
            counts["ibot"] = self.ibot_n_prototypes if self.separate_head else self.n_prototypes
        return counts

    def stages(self, total: int) -> list[tuple[int, "Config"]]:
        """(step at which it ends, its Config) of each stage of a run of `total` steps, in order.

        Stages differ in the sizes of their crops alone, which are whole numbers of patches;
        without --curriculum there is one stage. FastDINOv2 (Zhang 2025) fig. 1.

        Example: with 0.75 0.65, patches of 5 pixels and 2,500 steps, crops of 40 and 25 pixels
        are of 25 and 20 pixels until step 1,875: 40 * 0.65 = 26 pixels are 5.2 patches, made 5,
        and 25 * 0.65 = 16.25 pixels are 3.25 patches, made 4.
        """
        # A convnet has no patches: its crops are whole numbers of pixels.
        p = 1 if self.convnet else self.patch_size
        stages = []
        done = 0.0  # share of the steps that earlier stages take

        # The last stage has the sizes of this Config, and whatever is left of the steps.
        for share, factor in zip(self.curriculum[::2], self.curriculum[1::2]):
            done += share
            size = max(int(self.global_crops_size * factor / p + 0.5), 1) * p

            # A local crop is rounded up, because it has few patches to begin with.
            local = math.ceil(round(self.local_crops_size * factor / p, 6)) * p
            stages.append((round(done * total),
                           replace(self, global_crops_size=size, local_crops_size=local)))
        return [*stages, (total, self)]

    def masking(self, rank: int = 0) -> Masking | None:
        """What draws the masks of process `rank`; None where there is no iBOT loss."""
        if not self.learns_patches:
            return None
        side = self.global_crops_size // self.patch_size
        return Masking((side, side), self.mask_ratio, self.mask_probability, self.mask_shape,
                       self.mask_min_patches, self.seed, rank)


# Which settings --init brings along (training/warmstart.py). The network and its heads are
# those of the weights, whatever a preset says. The crops are, unless a preset or a flag says
# otherwise.
NETWORK = ("arch", "patch_size", "ffn_layer", "num_register_tokens", "layerscale",
           "pos_embed_resize")

HEADS = ("n_prototypes", "head_hidden_dim", "head_bottleneck_dim", "head_nlayers",
         "use_bn_in_head", "norm_last_layer", "separate_head", "ibot_n_prototypes",
         "ibot_head_bottleneck_dim")

CROPS = ("in_chans", "mean", "std", "global_crops_size", "local_crops_size",
         "local_crops_number", "global_crops_scale", "local_crops_scale", "photometry")

# Settings that do not change the result: a run may be continued with other values of them.
NEUTRAL = {
    "output_dir", "given", "taken_over", "resume", "save_every", "log_every", "knn_every",
    "num_workers", "device", "data_root", "download", "compile", "parallel", "keep",
    "activation_checkpointing", "profile", "dense_every", "dense_data", "dense_val_data",
    "nonfinite_steps"}
