"""Train: self-distillation with no labels. A student network learns to predict the output of a
teacher network, whose weights are the running average of the student's own past weights.

    images --> crops --+--> teacher (large crops) ------------------> targets --+
                       |       ^                                                +--> losses
                       |       | average of the student's past weights          |      |
                       +--> student (all crops, some patches masked) -> logits -+      |
                               ^                                                       |
                               +------------------ gradient ---------------------------+

Idea     Both networks see different crops of one image and must give the same answer for the
         image (DINO) and for the patches that only the teacher saw (iBOT). Only the student is
         trained; the teacher follows it slowly. Centering and a low temperature keep the two
         from agreeing on one answer for everything.
Paper    DINO (Caron 2021) Alg. 1, iBOT (Zhou 2022) Alg. 1, DINOv2 (Oquab 2024) sec. 4:
         `train_step`
Try      python train.py                                 on images that it draws itself
         python train.py dino_vits16 --data folder:PATH  a paper's recipe on your images
         torchrun --nproc_per_node=8 train.py ...        the same on eight GPUs
Change   a new loss: add it to `terms` in train_step, and a field NAME_weight to
         training/config.py
Tests    pytest tests/test_train.py

Letters  G global crops, L local crops, V = G + L of an image; B images per process, K
         prototypes, D width of the backbone, P patches of a global crop, M masked patches of
         the batch, padded to a fixed number. An objective is something that has targets: "dino"
         (class tokens), "ibot" (patches).
"""

import copy
import dataclasses
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import augment
import losses
from augment import ChannelStats, MultiCrop, photometry, send
from backbones.convnet import ConvNet
from heads import DINOHead
from images.data import (Images, Sampler, Views, cached, open_images, part_by_name,
                         training_loader)
from losses import CENTERING, all_sum, koleo_loss, make_targets, patch_loss, view_pair_loss
from machinery import process as machine
from machinery.checkpoints import (find_checkpoint, live_state, load_checkpoint,
                                   save_checkpoint, save_tensors, whole_state, write_json)
from machinery.clock import Clock
from machinery.flags import command, parse, user_errors
from machinery.process import Process, StopSignal, autocast, side_stream, start_process
from training.config import Config
from training.log import LogWindow, diagnose, log_line, step_figures
from training.optim import (OPTIMIZERS, LossScale, clip_gradients, cosine, ema_update, linear,
                            parameter_groups, peak_lr, set_schedule)
from training.recipes import PRESETS, SCALED
from training.rundir import (create_run_dir, forget_metrics_after, locked, match_stored_run,
                             record)
from vit import ARCHS, VisionTransformer

# ----------------------------------------------------------------------------------------------
# The two networks
#
# Student and teacher have the same parts: a backbone (vit.py), which turns an image into
# tokens, and a head (heads.py), which turns a token into logits over K prototypes. Training
# needs the head; for most uses the backbone alone is kept. The teacher is not trained: its
# weights are an average of the student's past ones. Such an average usually has better features
# than the student at the same step (DINO sec. 5.2), so there is something to learn from it.


def new_backbone(config: Config, drop_path_rate: float) -> nn.Module:
    """The network that `config` describes, with random weights."""
    if config.convnet:
        return ConvNet(config.arch)

    # The table of positions is built for the global crops; local crops get it resampled. A
    # factor of 0 for LayerScale stands for "none": the network then has no such parameters.
    return VisionTransformer(config.global_crops_size, config.patch_size, config.in_chans,
                             ffn_layer=config.ffn_layer,
                             num_register_tokens=config.num_register_tokens,
                             layerscale=config.layerscale or None,
                             mask_token=config.hides_patches, drop_path_rate=drop_path_rate,
                             drop_path_uniform=config.drop_path_uniform,
                             pos_embed_resize=config.pos_embed_resize, **ARCHS[config.arch])


class Network(nn.Module):
    """A backbone and its projection heads. Student and teacher are two of these.

    It is called once per step with all crops, because DistributedDataParallel expects one
    forward pass for each backward pass. A configuration builds only what it uses: no head
    without a loss that needs it, no mask token where no patch is masked. Patches go through the
    head of the class tokens, or through a head of their own (config.separate_head).
    """

    def __init__(self, config: Config, drop_path_rate: float = 0.0, backbone=None):
        super().__init__()
        self.backbone = backbone or new_backbone(config, drop_path_rate)

        # Heads of class tokens and of patches share these settings.
        new_head = partial(DINOHead, self.backbone.embed_dim, hidden_dim=config.head_hidden_dim,
                           nlayers=config.head_nlayers, use_bn=config.use_bn_in_head,
                           norm_last_layer=config.norm_last_layer)

        # The names of the heads are those of the checkpoints and of heads.pt.
        patches_share_it = config.learns_patches and not config.separate_head
        if config.dino_weight or patches_share_it:
            self.dino_head = new_head(n_prototypes=config.n_prototypes,
                                      bottleneck_dim=config.head_bottleneck_dim)
        if config.learns_patches and config.separate_head:
            self.ibot_head = new_head(n_prototypes=config.ibot_n_prototypes,
                                      bottleneck_dim=config.ibot_head_bottleneck_dim)
        self.learns_class_token = config.dino_weight > 0

    def heads(self) -> dict[str, nn.Module]:
        """What stands beside the backbone, by name: dino_head, ibot_head, ..."""
        children = dict(self.named_children())
        del children["backbone"]
        return children

    def forward(self, crops: list[Tensor], plan=None, masks=None, mask_indices=None) -> dict:
        """Crops of all sizes -> features and logits.

        crops: one tensor for each crop size, global crops (G*B, C, H, W) first. plan: which
        crops skip which block (stochastic depth, vit.drop_path_plan). masks (G*B, P) hide
        patches from the student; the teacher gets None. mask_indices (M,) says at which of the
        G*B*P patches logits are asked.

        Returns features (V*B, D), the class tokens; patches (G*B, P, D) of the global crops;
        and, where the configuration learns them, dino (V*B, K), logits of the class tokens, and
        ibot (M, K), logits of the patches at mask_indices.
        """
        # All crop sizes go through the backbone in one call; a ViT packs them into one
        # sequence. Only global crops have masks: one entry for each crop size, None for the
        # others.
        masks = [masks] + [None] * (len(crops) - 1)
        tokens = self.backbone.forward_features(crops, masks, plan)
        features = torch.cat([t["x_norm_clstoken"] for t in tokens])
        patches = tokens[0]["x_norm_patchtokens"]
        out = {"features": features, "patches": patches}

        # What the heads are asked about: class tokens, and the patches that were masked. Of all
        # G*B*P patches only those M are picked, because logits of K numbers each are costly.
        head_inputs = {}
        if self.learns_class_token:
            head_inputs["dino"] = features
        if mask_indices is not None:
            head_inputs["ibot"] = patches.flatten(0, 1).index_select(0, mask_indices)  # (M, D)
        if "ibot" in head_inputs and hasattr(self, "ibot_head"):
            out["ibot"] = self.ibot_head(head_inputs.pop("ibot"))

        # Inputs that share a head go through it as one matrix, so that its large weights are
        # read once; the logits are split again afterwards.
        if head_inputs:
            logits = self.dino_head(torch.cat(list(head_inputs.values())))
            counts = [len(x) for x in head_inputs.values()]
            out |= zip(head_inputs, logits.split(counts))
        return out

    def extra_losses(self, teacher_out: dict, student_out: dict) -> dict[str, Tensor]:
        """Further terms of the loss by name, each weighted by config.NAME_weight; here none.

        Here a subclass adds losses that need modules of their own, as distill.Student does.
        """
        return {}


# ----------------------------------------------------------------------------------------------
# The algorithm
#
# `train_step` is all of DINO, iBOT and DINOv2: which of their losses are used depends on their
# weights in the configuration. `schedules`, below it, says what changes from step to step.


@dataclasses.dataclass
class Learner:
    """All that a training step changes, and how it moves the teacher."""

    student: nn.Module  # a Network; with several processes wrapped for DDP
    teacher: nn.Module  # another Network, without gradients
    centerings: nn.ModuleDict  # of losses.CENTERING, one for each objective
    optimizer: torch.optim.Optimizer
    scaler: LossScale | None = None  # keeps fp16 gradients in range; None in other precisions
    move_teacher: Callable = ema_update  # (teacher, student, momentum, ok) -> None


# The tensors of a batch that are there only if the configuration masks patches: `masks` (G*B, P)
# says which patches are hidden from the student, `mask_indices` (M,) gives their places among all
# G*B*P patches, and `mask_weights` (M,) their weights in the loss.
MASKS = ("masks", "mask_indices", "mask_weights")


def make_views(batch: dict, stats: ChannelStats, device: torch.device) -> tuple[list, dict]:
    """A batch of augment.collate, copied to the device and coloured -> (crops, masks).

    crops: one tensor of coloured, normalised crops for each size, (G*B, C, H, W) and
    (L*B, C, h, w). masks: the mask tensors of the batch by name, {} where nothing is masked.
    """
    crops = []
    first = 0

    # On a GPU this runs on a second stream, so that copying and colouring this batch overlaps
    # with the step before, which the GPU is still computing.
    with side_stream(device) as new_tensors:
        for cut in (batch["global_crops"], batch["local_crops"]):
            count = len(cut)  # G or L
            if count == 0:
                continue
            # What happens to the colours of each crop was decided in the worker, by random
            # numbers; here it is applied.
            params = batch["photometry"][first:first + count].flatten(0, 1)
            cut = send(cut.flatten(0, 1), device)  # (G*B, C, H, W) or (L*B, C, h, w)
            crops.append(photometry(cut, params, stats))
            first += count

        masks = {name: send(batch[name], device) for name in MASKS if name in batch}
        new_tensors += [*crops, *masks.values()]
    return crops, masks


def train_step(learner: Learner, batch: dict, schedule: dict, config: Config,
               process: Process) -> dict:
    """One step of DINO, iBOT or DINOv2, whichever losses have a weight.

    batch is augment.collate's, schedule the values of `schedules` at this step. Returns figures
    as tensors on the device: reading one here would make the CPU wait for the GPU at every
    step. DINO Alg. 1, iBOT Alg. 1, DINOv2 sec. 4.

    Example: B = 8 images, G = 2 global crops of 40 pixels and 2 local crops of 25 of each, and
    K = 256 prototypes, as in `shapes_dino`.

        crops            (16, 3, 40, 40) and (16, 3, 25, 25); rows 0 to 7 are the first crop of
                         each image, rows 8 to 15 the second one
        teacher's logits (16, 256), one row for each global crop; so are the targets
        student's logits (32, 256), one row for each crop: 16 global ones, then 16 local ones
        teacher_views    (2, 8, 256) and student_views (4, 8, 256): view, image, prototype;
                         2 * 4 - 2 = 6 pairs of different views make the loss
    """
    student = unwrap(learner.student)
    teacher = learner.teacher
    G = len(batch["global_crops"])
    B = len(batch["index"])
    crops, masks = make_views(batch, config.channel_stats, process.device)
    mask, mask_indices, mask_weights = (masks.get(name) for name in MASKS)  # None without masks

    # 1. The teacher sees only the large crops, which are the first tensor of `crops`, and it
    # sees them whole: no masks. A small crop should be recognised as a part of what the teacher
    # saw. The teacher is never trained: no gradient.
    with torch.no_grad(), autocast(config.precision, process.device):
        teacher_out = teacher(crops[:1], mask_indices=mask_indices)

    # 2. Its logits become targets: softmax(logits / teacher_temp + bias). The low temperature
    # makes them sharp; the bias keeps all prototypes in use. It is -centre / teacher_temp with
    # the running mean of DINO, or what Sinkhorn-Knopp finds for this batch (losses.py). Without
    # the bias one prototype takes everything; without the low temperature all answers become
    # uniform. `python losses.py` shows both collapses in numbers. DINO eq. 1 and 4.
    #
    # The number of masked patches varies from batch to batch, but the shape (M,) must not: for
    # shapes that change, torch.compile makes slower kernels. So the list of masked patches is
    # padded. A weight is 1 / (masked patches of that crop), and 0 for padding, which
    # the centerings leave out. Class tokens have no padding: None.
    real_rows = {"dino": None, "ibot": None if mask_weights is None else mask_weights > 0}
    targets = {}
    for name, centering in learner.centerings.items():
        logits = teacher_out[name]
        bias = centering(logits, schedule["teacher_temp"], real_rows[name])  # (K,)
        targets[name] = make_targets(logits, schedule["teacher_temp"], bias)

    # 3. The student sees all crops. Patches of the large ones are masked, and in each block
    # stochastic depth leaves out some of the crops. Which ones is drawn here, from a generator
    # of this step, so that the blocks contain no randomness. Then they can be compiled, and a
    # resumed run draws the same.
    plan = student.backbone.draw_plan(crops, schedule["generator"])
    with autocast(config.precision, process.device):
        student_out = learner.student(crops, plan, mask, mask_indices)

    # 4. The losses.
    # TO ADD A LOSS: put it into `terms` here, and a field NAME_weight into training/config.py.
    terms = {}
    if "dino" in targets:  # every pair (teacher's view, another view of the student)
        teacher_views = targets["dino"].unflatten(0, (G, B))  # (G, B, K)
        student_views = student_out["dino"].unflatten(0, (-1, B))  # (V, B, K)
        terms["dino"] = view_pair_loss(teacher_views, student_views, config.student_temp)
    if "ibot" in targets:  # the same place: the teacher saw it, the student has to guess it
        terms["ibot"] = patch_loss(targets["ibot"], student_out["ibot"], mask_weights, G * B,
                                   config.student_temp)
    if config.koleo_weight:  # features of different images are pushed apart
        global_views = student_out["features"][:G * B].chunk(G)
        terms["koleo"] = sum(koleo_loss(features) for features in global_views)  # of G views
    terms |= student.extra_losses(teacher_out, student_out)
    loss = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())

    # 5. Only the student learns from the gradient. None flows through the teacher
    # (stop-gradient): if it did, both networks would move to the easiest answer that they can
    # agree on. In fp16 the scaler multiplies the loss before the backward pass and divides the
    # gradients after it.
    set_schedule(learner.optimizer, schedule)
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.scaler:
        learner.scaler.backward(loss, learner.optimizer)
    else:
        loss.backward()
    norm = clip_gradients(list(student.children()), config.clip_grad, config.clip_mode)

    # If a loss or a gradient is not finite on any process, this step has to change nothing: not
    # the student, the moments of the optimizer, the teacher, or the centres. We do not test
    # this with `if`, because the CPU would then wait for the GPU. Instead `ok` stays a tensor,
    # which the optimizer and stage 6 use on the device. The CPU reads it at the next log line
    # (training/log.py), where an error ends the run and names the images.
    #
    # The mean over processes is for the log and for this decision; the gradients were averaged
    # by DDP or FSDP during the backward pass.
    means = all_sum(torch.stack([loss, *terms.values()]).detach()) / process.world_size
    figures = dict(zip(["loss", *terms], means))
    ok = (figures["loss"] + norm).isfinite()

    # `step` is always called. PyTorch's fused optimizers change nothing where the attribute
    # found_inf is 1, and neither do ours (training/optim.py).
    learner.optimizer.found_inf = 1 - ok.float()
    learner.optimizer.step()

    # 6. teacher <- m * teacher + (1 - m) * student, with m from .996 to 1 in DINO (sec. 3.1),
    # and the running centres move towards the mean of the teacher's logits (Sinkhorn-Knopp has
    # nothing to move). Both happen after the student's step, as in Alg. 1, so that the next step
    # is the first one that uses the new values.
    learner.move_teacher(teacher, student, schedule["momentum"], ok.float())
    for name, centering in learner.centerings.items():
        centering.update(teacher_out[name], real_rows[name], ok)

    # What the log will tell of this step. In fp16 gradients may overflow now and then: the
    # scaler lowers its factor, the step is left out, and the run goes on. The norm of a step
    # that was left out counts as 0.
    figures |= step_figures(figures, targets, mask_weights, G * B)
    can_go_on = ok
    if learner.scaler:
        norm = torch.where(ok, norm, 0)
        can_go_on = figures["loss"].isfinite() & learner.scaler.update(ok)
    return figures | dict(grad_norm=norm, ok=can_go_on, features=teacher_out["features"])


def unwrap(network: nn.Module) -> nn.Module:
    """The Network inside DDP's wrapper, or the network itself."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def schedules(step: int, epoch_steps: int, total: int, config: Config,
              process: Process) -> dict:
    """Everything that depends on the step, as plain numbers, and the step's random generator.

    Most of it changes at every step. The teacher's temperature changes with the epoch, and the
    last layer and the backbone of --init may be frozen for some epochs at the start. TO ADD A
    SCHEDULE: one more entry below; train_step finds it in its argument `schedule`.
    """
    batch = config.batch_size_per_gpu * process.world_size  # of all processes together
    peak = peak_lr(config.lr, config.lr_scaling, batch)
    lr = cosine(step, peak, config.min_lr, total, config.warmup_epochs * epoch_steps)

    # A generator of its own for each (seed, step, rank): a run that is resumed draws the same.
    seed = np.random.SeedSequence([config.seed, step, process.rank]).generate_state(1)[0]

    # The prototypes are frozen for a while, as in DINO's code, which says that it helps. (A
    # likely reason: the first targets are noisy, and would move them all to one side.) With
    # --init the backbone may be frozen while new heads learn.
    last_layer_frozen = step < config.freeze_last_layer_epochs * epoch_steps
    backbone_frozen = step < config.freeze_backbone_epochs * epoch_steps

    # Weight decay and the momentum of the teacher's average follow half a cosine over the whole
    # run, and the learning rate does so after its warm-up. The temperature rises linearly, epoch
    # by epoch, over a warm-up of its own: early in a run a high one would lead to the uniform
    # answer. Late in a run little should change, so the learning rate falls and the momentum goes
    # to 1. The papers let the weight decay rise at the same time. Example: the default run, of
    # 2,500 steps, of which 625 are the warm-up. Its temperature stays at .02.
    #
    #     step            0       312     625     1250    2499
    #     lr              0       5.0e-4  1.0e-3  7.5e-4  1.0e-6
    #     weight decay    .040    .042    .049    .070    .100
    #     momentum        .9840   .9846   .9863   .9920   1.0     (.984: the last 62 steps or so)
    return dict(
        lr=lr,
        last_layer_lr=0.0 if last_layer_frozen else lr,
        backbone_lr=0.0 if backbone_frozen else lr,
        weight_decay=cosine(step, config.weight_decay, config.weight_decay_end, total),
        momentum=cosine(step, config.momentum_teacher, config.final_momentum_teacher, total),
        teacher_temp=linear(step // epoch_steps, config.warmup_teacher_temp,
                            config.teacher_temp, config.warmup_teacher_temp_epochs),
        generator=torch.Generator().manual_seed(int(seed)),  # of stochastic depth
    )


# ----------------------------------------------------------------------------------------------
# Building the networks
#
# Their first weights, and what makes them fast or lets them be larger than one GPU: compiled
# blocks, and parameters that are split over processes.


def build(config: Config, process: Process, network=Network) -> tuple[nn.Module, nn.Module]:
    """(student, teacher): the teacher begins as a copy of the student, without gradients."""
    # The same first weights on every process. DDP would copy them from the first one, but only
    # later, and the teacher's copy is made here.
    torch.manual_seed(config.seed)
    student = network(config, config.drop_path_rate)
    if config.init:
        # Imported here, because reading weights takes three files that a new run does not need.
        from training.warmstart import load_init

        load_init(student, config)
    student = student.to(process.device)

    # BatchNorm (convnets, heads of small networks) has to see the images of all processes.
    if process.world_size > 1:
        from machinery.batch_norm import synchronise  # here, because one process needs none

        synchronise(student)

    # The copy is made before activation checkpointing is switched on: the teacher has no
    # backward pass, so it has no activations to save.
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.backbone.activation_checkpointing = config.activation_checkpointing
    compile_blocks((student, teacher), config, process)
    return student, teacher


def build_centerings(config: Config) -> nn.ModuleDict:
    """One module for each objective: class tokens and patches are centred apart."""
    make = CENTERING[config.centering]
    centerings = nn.ModuleDict({
        name: make(n_prototypes, momentum=config.center_momentum)
        for name, n_prototypes in config.objectives.items()})

    # A centre is the mean of the logits of one head. Where --init brings heads, their centres
    # come from the same file. In distill.py the logits are those of another head.
    if config.init and not getattr(config, "teacher", ""):
        from training.warmstart import init_heads

        state = centerings.state_dict()
        for key, value in init_heads(config).get("centerings", {}).items():
            if key in state and state[key].shape == value.shape:
                state[key] = value
        centerings.load_state_dict(state)
    return centerings


def compile_blocks(networks, config: Config, process: Process):
    """torch.compile, block by block and in place.

    All blocks of a network share one compiled graph, so the first step waits for one
    compilation and not for twelve. Compiling in place leaves the names of the parameters as
    they are.
    """
    wanted = config.compile
    if wanted is None:  # by default where it pays: on GPUs
        wanted = process.device.type == "cuda"
    if wanted and not machine.has_compiler():
        process.print("no C compiler (gcc or clang): training runs without --compile, slower")
        wanted = False
    # The passes over (n, K) matrices in losses.py are compiled, too, and the turn of all colours
    # in augment.py.
    losses.COMPILE = augment.COMPILE = wanted
    if not wanted:
        return

    # By default PyTorch cuts a compiled block into two or three where DDP begins to send
    # gradients. A whole block is small enough to send its gradients when it is done, and is
    # fused better.
    torch._dynamo.config.optimize_ddp = False
    # This warning is meant for PyTorch's developers, and would stand in the middle of the log.
    warnings.filterwarnings("ignore", r"\s*Online softmax is disabled", UserWarning)
    for network in networks:
        # A convnet is left as it is: PyTorch keeps at most eight graphs of one function, and all
        # parts of both networks would share these eight.
        for block in getattr(network.backbone, "blocks", ()):
            block.compile()


def shard(network: nn.Module, config: Config, process: Process):
    """Split over processes (FSDP, HSDP): blocks in the low precision, the rest in float32."""
    # Blocks are most of the network, and their products lose nothing in bfloat16. What a block
    # has beside them, its norms and LayerScale, is rounded as well. The heads end in a softmax
    # over many prototypes, and tokens and the last norm are small: those stay in float32.
    from machinery.shard import split  # here, because few runs need it

    blocks = list(getattr(network.backbone, "blocks", ()))  # a convnet, as a teacher, has none
    heads = list(network.heads().values())
    split(network, blocks, heads, process, config.precision, config.sharers(process))


# ----------------------------------------------------------------------------------------------
# The images
#
# file --> images/data.py reads it --> augment.MultiCrop cuts crops, in a worker process
#      --> augment.collate stacks a batch and draws the masks --> make_views, above,
#          copies them to the device and applies the colours


def open_data(config: Config) -> tuple[Images, Images]:
    """(images to learn from, images to judge with).

    Without --val_data a --val_share of the images is held out, one in twenty by default, chosen
    by a hash of the name: the same ones in every run, whatever other files lie beside them.
    """
    from images.names import beside_validation  # here: the step above needs no names

    # No image of --val_data is trained on, if it lies in the folder of --data, too.
    data = beside_validation(config.data, config.val_data)
    images = open_images(data, config.data_root, config.download, "--data",
                         config.channel_stats)
    images = cached(images, config.cache, config.cache_side, config.num_workers)
    if config.val_data:  # read as they are: the cache is for images that are read every epoch
        return images, open_images(config.val_data, config.data_root, config.download,
                                   "--val_data", config.channel_stats)
    return tuple(part_by_name(images, part, config.val_share) for part in ("train", "val"))


def batches_from(step: int, total: int, images: Images, config: Config, process: Process):
    """This process's batches from step `step` to step `total`, whatever their crop sizes.

    Without --curriculum the run is one stage. With it, each stage has a loader of its own.
    """
    for last, stage in config.stages(total):
        if step >= last:  # a run that is continued may be beyond this stage
            continue
        if config.curriculum:
            process.print(f"steps {step} to {last}: crops of {stage.global_crops_size} and "
                          f"{stage.local_crops_size} pixels")
        yield from stage_loader(step, last, images, stage, process)
        step = last


def stage_loader(step: int, last: int, images: Images, config: Config, process: Process):
    """The loader of this process's batches with the crop sizes of `config`.

    Order and crops are functions of the seed, the epoch and the image; masks of the seed, the
    step and the rank. So a resumed run only has to start counting at a later step.
    """
    sampler = Sampler(len(images), config.batch_size_per_gpu, last, step, config.seed,
                      process.rank, process.world_size, images.order)
    # Local crops serve the loss of the class tokens alone: without it none are cut.
    crops = MultiCrop(config.global_crops_size, config.local_crops_size,
                      config.global_crops_number,
                      config.local_crops_number if config.dino_weight else 0,
                      config.global_crops_scale, config.local_crops_scale, config.photometry)
    return training_loader(Views(images, crops, config.seed), sampler, config.num_workers,
                           pin_memory=process.device.type == "cuda",
                           masking=config.masking(process.rank))


# ----------------------------------------------------------------------------------------------
# The run
#
# Everything around the steps: where to begin, when to log, judge and save, how to end. A run is
# its directory (training/rundir.py): the same command continues it at the last checkpoint, and
# because nothing random depends on the past, it ends as if it had never stopped.


def run(config: Config, build=build, move_teacher=ema_update) -> dict:
    """Train as `config` says and return the summary; continue what is in the run's directory.

    TO LEARN FROM ANOTHER TEACHER: give a `build` that returns student and teacher, and a function
    move_teacher(teacher, student, momentum, ok) that changes the teacher after each step; ok is
    a tensor, and 0 must change nothing. distill.py brings both.
    """
    # Imported here, because a reader of the algorithm needs none of them: read_once is for runs on
    # several processes, and check refuses settings that do not fit together.
    from machinery.read_once import read_once
    from training.check import check, check_stages, warn_of_idle_flags
    from training.memory import keep_freed_memory

    # With --init the weights decide what the network is; `config` has to follow them first.
    if config.init:
        from training.warmstart import config_from_init

        config = config_from_init(config)
    check(config)
    process = start_process(config.device)
    keep_freed_memory(process)
    folder = Path(config.output_dir or f"runs/{config.preset}")

    # Whatever can be refused is refused here, before the run directory is written. user_errors:
    # inside, a ValueError is about the user's input and becomes one line without a traceback.
    with user_errors():
        images, val = read_once(partial(open_data, config), process)
        config = match_stored_run(config, folder, process, len(images))
        if config.auto_scale:
            chosen = "  ".join(f"{name} {getattr(config, name)}" for name in SCALED)
            process.print(f"--auto_scale: {chosen}")
        check(config)  # once more: a stored run or --auto_scale may have changed some settings
        warn_of_idle_flags(config, process)

        # An epoch is one pass over the images, or a number of steps (DINOv2 counts 1,250 as
        # one).
        one_step = Sampler(len(images), config.batch_size_per_gpu, 1,
                           world_size=process.world_size)
        epoch_steps = config.epoch_length or one_step.steps_per_pass
        check_stages(config, config.epochs * epoch_steps)

    # From here on the folder belongs to this program: two that write the same run would spoil
    # it.
    with locked(folder, process):
        checkpoint = None
        if config.resume:
            # A finished run stays as it is, also where its checkpoints were removed to save room.
            ended = process.broadcast((folder / "summary.json").exists())
            checkpoint = find_checkpoint(folder / "checkpoint", process, required=not ended)
            unfinished = checkpoint and checkpoint[1]["step"] < config.epochs * epoch_steps
            if ended and not unfinished:
                from training.stored import finished  # a run that trains does not need it

                return finished(folder, process)
        with user_errors():
            training = Run(config, process, folder, images, val, epoch_steps, build,
                           move_teacher)

        training.begin(checkpoint)
        training.train()
        return training.end()


class Run:
    """Networks, data, and how far they are: `begin`, then `train`, then `end`.

    A checkpoint keeps the tensors of `parts` and of the optimizer, and beside them `step`,
    `figures` (what the summary will say) and `last_row` (the newest row of the log). `whole` is
    the teacher's backbone in one piece, to be judged and kept; under FSDP it is a copy.
    """

    # What is said when a signal stops it.
    left_behind = "saved; the same command continues (without --no_resume)"

    def __init__(self, config: Config, process: Process, folder: Path, images: Images,
                 val: Images, epoch_steps: int, build, move_teacher):
        # Imported here and not above: they are needed once in a run, and the imports at the top
        # of this file stay those of a training step.
        from evaluation.judge import Judge, PatchJudge
        from training.memory import memory_report

        self.config = config
        self.process = process
        self.folder = folder
        self.images = images
        self.val = val
        self.epoch_steps = epoch_steps
        self.total = config.epochs * epoch_steps

        # The networks. Their memory is estimated before they are split and before the first
        # step, so that a run that will not fit says so at once.
        student, teacher = build(config, process)
        centerings = build_centerings(config).to(process.device)
        # A teacher of distill.py has a large network beside its own.
        self.memory_report = memory_report(student, config, process,
                                           getattr(teacher, "frozen", []))
        self.whole = teacher.backbone
        if config.parallel != "ddp":
            # Sharding replaces the parameters in place, so a whole copy is made before. It is
            # filled from the shards when the teacher is judged or kept.
            self.whole = copy.deepcopy(self.whole)
            shard(student, config, process)
            shard(teacher, config, process)

        # The optimizer comes after sharding: its moments have the shapes of the local shards.
        groups = parameter_groups(student, config.layerwise_decay, config.patch_embed_lr_mult)
        optimizer = OPTIMIZERS[config.optimizer](groups)
        scaler = LossScale().to(process.device) if config.precision == "fp16" else None
        self.learner = Learner(student, teacher, centerings, optimizer, scaler, move_teacher)

        # What a checkpoint holds, by name, beside the moments of the optimizer; and the figures
        # that it keeps: seconds of training so far, images that did not decode, and results of
        # the judge.
        self.parts = {"student": student, "teacher": teacher, "centerings": centerings}
        if scaler:
            self.parts["scaler"] = scaler
        self.judge = Judge(images, val, config, process)
        self.patch_judge = (PatchJudge(config, process, folder, epoch_steps)
                            if config.dense_every else None)
        self.step = 0
        self.last_row = {}
        self.started_from = "--init" if config.init else "untrained"
        self.figures = {
            "seconds": 0.0, "broken": 0, "untrained": None, "pixels": None, "knn": None}

    # -- the beginning, or where a checkpoint left off

    def begin(self, checkpoint: tuple[Path, dict] | None):
        """Write the run directory, or load the checkpoint and its manifest."""
        process = self.process
        if process.main:
            create_run_dir(self.folder, self.config, process, len(self.images))
        self.introduce()

        if checkpoint:
            path, manifest = checkpoint
            state = live_state(self.parts, self.learner.optimizer, of="student")
            load_checkpoint(path, state, process)
            self.step = manifest["step"]
            self.figures = manifest["figures"]
            self.last_row = manifest["last"]
            process.print(f"continuing from step {self.step}")

        # A run that was killed may have logged steps after its last checkpoint. Those lines are
        # deleted, because the steps are trained once more.
        last_known = self.step if checkpoint else -1
        forget_metrics_after(self.folder / "metrics.jsonl", last_known, process,
                             judged=not self.figures.get("postponed"))
        self.begun = time.time() - self.figures["seconds"]

        if self.step == 0:
            self.keep_snapshot()
            self.judge_the_start()
        elif self.step == self.total:  # stopped after its last checkpoint: the end is missing
            self.write_teacher()
            self.whole_backbone()  # fills self.whole from the shards

    def judge_the_start(self):
        """What the training has to beat: bare pixels, and the network before its first step."""
        from evaluation.judge import RawPixels

        # The features of a random network are better than chance, because similar images
        # get similar features. A result that beats neither them nor the pixels shows no learning.
        figures = self.figures
        figures["pixels"] = self.judge(RawPixels())
        figures["untrained"] = self.judge(self.whole_backbone())
        if self.patch_judge:
            self.patch_judge(self.whole_backbone(), self.step, figures)
        if figures["pixels"] is None:
            return
        self.process.print(f"{self.judge.protocol}: raw pixels {figures['pixels']:.1%}, "
                           f"{self.started_from} network {figures['untrained']:.1%}")
        row = dict(step=0, knn=figures["untrained"], feature_rank=self.judge.rank,
                   pixels=figures["pixels"], protocol=self.judge.protocol)
        record(self.folder, row, self.process)

    def introduce(self):
        """Say what will be trained, and whether it is expected to fit into memory."""
        config = self.config
        process = self.process
        parameters = sum(p.numel() for p in self.learner.student.parameters())
        process.print(
            f"{config.preset or 'run'} -> {self.folder}: {len(self.images):,d} images of "
            f"{config.data}, {self.total:,d} steps of {config.batch_size_per_gpu} x "
            f"{process.world_size}, {process.device}, {config.precision}, "
            f"{parameters:,d} parameters")
        process.print("\n".join(self.memory_report))

    def whole_backbone(self) -> nn.Module:
        """The teacher's backbone in one piece, with the weights that it has now."""
        if self.config.parallel != "ddp":
            # The shards of all processes are exchanged here, so every process has to call this.
            state = whole_state(self.learner.teacher)
            backbone = {
                name.removeprefix("backbone."): value
                for name, value in state.items() if name.startswith("backbone.")}
            self.whole.load_state_dict(backbone)
        return self.whole

    # -- the loop

    def train(self):
        """From the present step to the last one; SystemExit if a signal asks to stop."""
        config = self.config
        process = self.process
        batches = batches_from(self.step, self.total, self.images, config, process)
        if config.profile:
            from machinery.trace import traced  # here, because few runs need it

            batches = traced(batches, config.profile, self.folder, process)
        learner = self.learner
        # DDP averages the gradients of all processes while the backward pass still computes.
        # The wrapper is for this loop only: checkpoints know the network by its own names.
        if process.world_size > 1 and config.parallel == "ddp":
            wrapped = DistributedDataParallel(learner.student, gradient_as_bucket_view=True)
            learner = dataclasses.replace(learner, student=wrapped)
        self.clock = Clock(self.step, self.total)
        switches = [last for last, _ in config.stages(self.total)]
        self.window = LogWindow(self.images, config)
        self.warned = set()
        self.suspected = ""  # the illness that the last line of the log showed

        if self.figures.get("postponed"):
            self.ask_judges()
        with StopSignal(process) as stop_signal:
            while self.step < self.total:
                # Crops of another size (--curriculum) take another time, so the clock starts
                # anew. Each stage is compiled for its own sizes: without the reset, PyTorch
                # would make one slower graph that takes any size.
                if self.step in switches:
                    self.clock = Clock(self.step, self.total)
                    torch.compiler.reset()

                # One training step. On a GPU the calls return before the work is done.
                batch = self.clock.wait(batches)
                schedule = schedules(self.step, self.epoch_steps, self.total, config, process)
                figures = train_step(learner, batch, schedule, config, process)
                self.window.add(self.step, batch, figures)
                self.step += 1
                self.clock.tick()

                # Has any process got a signal? `agreed` gives all of them the same answer, so
                # that they save at the same step.
                stopped_by = stop_signal.agreed()
                done = self.step == self.total
                saving = self.step % config.save_every == 0 or done or stopped_by
                if self.step % config.log_every == 0 or saving:
                    # Before a save, because it stops the run if a loss was not finite.
                    self.log(schedule)
                with self.clock.pause():
                    if done or self.step == self.total // 2:
                        self.keep_snapshot()
                    # Where a signal waits for the run to stop, the evaluation is postponed
                    # until the run is continued.
                    self.figures["postponed"] = bool(stopped_by and not done)
                    if not self.figures["postponed"]:
                        self.ask_judges()
                    if saving:
                        self.save()

                # SIGTERM (a cluster that wants its machine back) or Ctrl-C. Deleting the
                # iterator ends the loader's processes at once. 128 + n is the shell's code for
                # signal n.
                if stopped_by and not done:
                    name = signal.Signals(stopped_by).name
                    process.print(f"{name}: stopped after step {self.step}, {self.left_behind}")
                    del batches
                    raise SystemExit(128 + stopped_by)

    def due(self, epochs: int) -> bool:
        """Whether a judge that is asked every so many epochs (0: only at the end) is asked now."""
        at_its_epoch = epochs and self.step % (epochs * self.epoch_steps) == 0
        return self.step == self.total or at_its_epoch

    def log(self, schedule: dict):
        """Read the figures of the last steps: between saves, only here does the CPU wait."""
        from training.memory import peak_memory_gb  # no part of the algorithm

        config = self.config
        process = self.process
        batch = config.batch_size_per_gpu * process.world_size
        self.last_row = self.window.read(self.figures, self.step * batch)
        self.last_row |= dict(step=self.step, lr=schedule["lr"], momentum=schedule["momentum"],
                              weight_decay=schedule["weight_decay"],
                              teacher_temp=schedule["teacher_temp"],
                              images_per_second=batch / max(self.clock.step_seconds, 1e-9),
                              waiting=self.clock.waiting,
                              memory_gb=peak_memory_gb(process.device))

        # The same figures go to the terminal and to metrics.jsonl, which visualize.py draws.
        process.print(log_line(self.last_row, self.total, config, self.clock))
        record(self.folder, self.last_row, process)

        # A healthy loss, too, can pass ln K on its way down. So an illness is reported only when
        # two log lines in a row show it.
        illness = diagnose(self.last_row, config)
        if illness and illness[0] == self.suspected:
            self.warn(illness)
        self.suspected = illness[0] if illness else ""

    def warn(self, illness: tuple[str, str] | None):
        """Print what `diagnose` or the judge's `diagnose` found; each illness is named once."""
        # While the learning rate still rises, the figures look ill in healthy runs, too.
        warm = self.step > self.config.warmup_epochs * self.epoch_steps
        if illness and warm and illness[0] not in self.warned:
            self.warned.add(illness[0])
            self.process.print(f"warning: {illness[1]}")

    def keep_snapshot(self):
        """Keep the teacher's backbone as it is now, for the page that tells the run."""
        from training.snapshots import keep_snapshot  # no part of a step: needed three times

        # On all processes, because under FSDP they exchange their shards for it.
        backbone = self.whole_backbone()
        if self.process.main:
            keep_snapshot(self.folder, self.step, backbone, self.val, self.images, self.config)

    def ask_judges(self):
        """Those that are due now: each is asked every so many epochs, and at the end."""
        if self.due(self.config.knn_every):
            self.evaluate()
        if self.patch_judge and self.due(self.config.dense_every):
            self.patch_judge(self.whole_backbone(), self.step, self.figures)

    def evaluate(self):
        """Ask the judge how good the teacher's features are by now."""
        figures = self.figures
        process = self.process
        figures["knn"] = self.judge(self.whole_backbone())
        if figures["knn"] is None:
            return

        # With the figures that it has to beat: one number alone would say little.
        process.print(f"epoch {self.step // self.epoch_steps}: {self.judge.protocol} "
                      f"{figures['knn']:.1%} ({self.started_from} {figures['untrained']:.1%}, "
                      f"pixels {figures['pixels']:.1%})")
        row = dict(step=self.step, knn=figures["knn"], feature_rank=self.judge.rank)
        record(self.folder, row, process)
        self.warn(self.judge.diagnose(figures))

    def save(self):
        """A checkpoint to continue from, and beside it the weights for evaluation."""
        # `seconds` counts the time of this run over all its parts; a continued run adds to it.
        self.figures["seconds"] = time.time() - self.begun
        state = live_state(self.parts, self.learner.optimizer, of="student")
        facts = {"figures": self.figures, "last": self.last_row}
        save_checkpoint(self.folder / "checkpoint", self.step, state, facts, self.process,
                        self.config.keep)
        self.write_teacher()

    def write_teacher(self):
        """teacher.pt, the backbone alone under its official keys; heads.pt, all the rest."""
        # On all processes, because under FSDP they exchange their shards for it.
        state = whole_state(self.learner.teacher)
        if not self.process.main:
            return
        backbone = {}
        heads = {"centerings": self.learner.centerings.state_dict()}
        for key, value in state.items():
            part, name = key.split(".", 1)  # such as backbone, blocks.0.norm1.weight
            target = backbone if part == "backbone" else heads.setdefault(part, {})
            target[name] = value.cpu()
        save_tensors(self.folder / "teacher.pt", backbone)
        save_tensors(self.folder / "heads.pt", heads)

    # -- what came of it

    def end(self) -> dict:
        """Draw the story, write summary.json and card.md, and say which command comes next."""
        config = self.config
        figures = self.figures
        illness = diagnose(self.last_row, config)

        # One flat dictionary, so that the summaries of many runs make a table. knn_untrained is
        # the figure before the first step: with --init that of the weights it began with.
        summary = dict(
            preset=config.preset, seed=config.seed, steps=self.total,
            loss=self.last_row["loss"], knn=figures["knn"], knn_untrained=figures["untrained"],
            knn_pixels=figures["pixels"], knn_protocol=self.judge.protocol,
            minutes=(time.time() - self.begun) / 60,
            images_per_second=self.last_row["images_per_second"],
            peak_memory_gb=self.last_row["memory_gb"],
            collapsed=bool(illness and illness[0] in ("uniform collapse", "one prototype")),
            device=str(self.process.device), precision=config.precision,
            broken_images=figures["broken"])
        summary |= {name: value for name, value in figures.items() if name.startswith("patch")}
        if self.process.main:
            # Imported here, because only the end of a run needs them.
            from figures.story import draw_story
            from training.card import write_card

            draw_story(self.folder, self.process.device)
            write_json(self.folder / "summary.json", summary)
            write_card(self.folder)

            # A convnet has no attention to draw.
            following = "evaluate.py knn" if config.convnet else "visualize.py attention PHOTO"
            print(
                f"\nfinished in {summary['minutes']:.1f} minutes; wrote {self.folder}/story.png "
                f"and teacher.pt\nnext:  python {following} --weights {self.folder}")
        return summary


def read_flags(argv: list[str], kind=Config, presets=PRESETS, program="train.py") -> Config:
    """The command line as a configuration."""
    config = parse(kind, argv, presets, f"python {program} [PRESET] [--flag value ...]")
    # A preset's validation set belongs to its data. Of other data a part is held out, unless
    # --val_share is 0.
    if "data" in config.given and "val_data" not in config.given:
        config.val_data = ""
    return config


@command
def main(argv):
    return run(read_flags(argv))


if __name__ == "__main__":
    main()
