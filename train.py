"""Train: self-distillation with no labels. A student learns to say what its own past average says.

    images --> crops --+--> teacher (large crops) -----------------> targets --+
                       |       ^                                               +--> losses
                       |       | average of the student's past                 |      |
                       +--> student (all crops, packed; patches hidden) --> logits <--+

Idea     Both networks see different crops of one image and must agree, on the image (DINO) and on
         patches that only the teacher saw (iBOT). Only the student learns; the teacher follows it
         slowly. Centering and sharpening keep them from agreeing on nothing.
Paper    DINO (Caron 2021) Alg. 1, iBOT (Zhou 2022) Alg. 1, DINOv2 (Oquab 2024) sec. 4: `train_step`
Try      python train.py                                 the embedded world, minutes on a laptop
         python train.py dino_vits16 --data folder:PATH  a paper's recipe on your images
         torchrun --nproc_per_node=8 train.py ...        the same on eight GPUs
Change   a new loss: add it to `terms` in train_step, its weight to recipes.Config
Tests    pytest tests/test_train.py

Letters  G global, L local crops, V = G + L; B images per process, K prototypes, D width, M patches
         hidden from the student. A dictionary with "dino" and "ibot" holds one thing per objective.
"""

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import losses
import runtime
import visualize
from augment import Masking, MultiCrop, Pixels, photometry, send
from data import Images, Sampler, Views, cached, held_out, open_images, training_loader
from features import extract, knn_accuracy, same_labels, top_neighbours
from heads import DINOHead
from losses import (CENTERING, all_sum, effective_rank, entropies, koleo_loss, make_targets,
                    patch_loss, view_pair_loss)
from optim import (OPTIMIZERS, LossScale, clip_gradients, cosine, ema_update, linear,
                   parameter_groups, set_schedule)
from recipes import (CROPS, DISTILLATION, HEADS, NETWORK, NEUTRAL, PRESETS, SCALED, Config,
                     auto_scale, check, read_config)
from resnet import ConvNet
from runtime import Place, UsageError
from vit import ARCHS, VisionTransformer, inflate, resize_pos_embed
from weights import load_strictly, read_backbone, read_tensors, settings

# ------------------------------------------------------------------------------------------------
# The two networks and the algorithm


def new_backbone(config: Config, drop_path_rate: float) -> nn.Module:
    if config.convnet:
        return ConvNet(config.arch)
    return VisionTransformer(
        config.global_crops_size, config.patch_size, config.in_chans, ffn_layer=config.ffn_layer,
        num_register_tokens=config.num_register_tokens, layerscale=config.layerscale or None,
        mask_token=config.hides_patches, drop_path_rate=drop_path_rate,
        drop_path_uniform=config.drop_path_uniform, pos_embed_resize=config.pos_embed_resize,
        **ARCHS[config.arch],
    )


class Network(nn.Module):
    """Backbone and heads; called once a step with all crops, so that DDP sees one forward.

    What a configuration does not use is not built: no head without its loss, no token for hidden
    patches without any. Patches share the head of the class tokens, or have their own.
    """

    def __init__(self, config: Config, drop_path_rate: float = 0.0, backbone=None):
        super().__init__()
        self.backbone = backbone or new_backbone(config, drop_path_rate)
        sizes = dict(hidden_dim=config.head_hidden_dim, nlayers=config.head_nlayers,
                     use_bn=config.use_bn_in_head, norm_last_layer=config.norm_last_layer)
        shared = config.learns_patches and not config.separate_head
        if config.dino_weight or shared:
            self.dino_head = DINOHead(self.backbone.embed_dim, config.n_prototypes,
                                      bottleneck_dim=config.head_bottleneck_dim, **sizes)
        if config.learns_patches and config.separate_head:
            self.ibot_head = DINOHead(self.backbone.embed_dim, config.ibot_n_prototypes,
                                      bottleneck_dim=config.ibot_head_bottleneck_dim, **sizes)
        self.classes = config.dino_weight > 0

    def forward(self, views: list[Tensor], plan=None, masks=None, mask_indices=None) -> dict:
        """A list of crop sizes, globals first -> features (V*B, D), class tokens, views in order;
        patches (G*B, P, D), of the globals; dino (V*B, K), logits of the class tokens; ibot (M, K),
        logits of the patches at mask_indices.

        masks (G*B, P) are the student's: the teacher sees everything.
        """
        masks = [masks] + [None] * (len(views) - 1)
        tokens = self.backbone.forward_features(views, masks, plan)
        out = {"features": torch.cat([t["x_norm_clstoken"] for t in tokens]),
               "patches": tokens[0]["x_norm_patchtokens"]}
        ask = {"dino": out["features"]} if self.classes else {}
        if mask_indices is not None:
            ask["ibot"] = out["patches"].flatten(0, 1).index_select(0, mask_indices)  # (M, D)
        if "ibot" in ask and hasattr(self, "ibot_head"):
            out["ibot"] = self.ibot_head(ask.pop("ibot"))
        if ask:  # all that share a head go through it together
            logits = self.dino_head(torch.cat(list(ask.values())))
            out |= zip(ask, logits.split([len(x) for x in ask.values()]))
        return out

    def more_terms(self, seen: dict, said: dict) -> dict[str, Tensor]:
        """Further losses of what a teacher and this student answered, each with its NAME_weight."""
        return {}


def build(config: Config, place: Place, network=Network) -> tuple[nn.Module, nn.Module]:
    """The student, and a teacher that starts as its copy and never gets a gradient."""
    torch.manual_seed(config.seed)
    student = network(config, config.drop_path_rate)
    if config.init:
        load_init(student, config)
    student = student.to(place.device)
    if place.world_size > 1 and place.device.type == "cuda":  # on a CPU it does not exist
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.backbone.activation_checkpointing = config.activation_checkpointing
    compile_blocks((student, teacher), config, place)
    return student, teacher


def objectives(config: Config) -> dict[str, int]:
    """What is learned, "dino" (class tokens) and "ibot" (patches): name -> its prototypes K."""
    found = {"dino": config.n_prototypes} if config.dino_weight else {}
    if config.learns_patches:
        own = config.separate_head
        found["ibot"] = config.ibot_n_prototypes if own else config.n_prototypes
    return found


def target_makers(config: Config) -> nn.ModuleDict:
    """One per objective: class tokens and patches are centred apart, by the same classes."""
    options = {"momentum": config.center_momentum} if config.centering == "ema" else {}
    make = CENTERING[config.centering]
    makers = nn.ModuleDict({name: make(k, **options) for name, k in objectives(config).items()})
    own, known = makers.state_dict(), init_heads(config).get("makers", {})
    # Centres that belong to the heads of --init.
    makers.load_state_dict(own | {k: v for k, v in known.items()
                                  if k in own and own[k].shape == v.shape})
    return makers


def to_device(batch: dict, pixels: Pixels, device: torch.device) -> tuple[list[Tensor], dict]:
    """A batch of augment.collate -> the views, coloured here as the workers drew, and the masks."""
    views, first = [], 0
    with runtime.beside(device) as made:  # while the step before is still computed
        for crops in (batch["global_crops"], batch["local_crops"]):
            if len(crops):
                draws = batch["photometry"][first:first + len(crops)].flatten(0, 1)
                there = send(crops.flatten(0, 1), device)  # (V*B, C, s, s)
                views.append(photometry(there, draws, pixels))
                first += len(crops)
        hidden = {name: send(batch[name], device)
                  for name in ("masks", "mask_indices", "mask_weights") if name in batch}
        made += [*views, *hidden.values()]
    return views, hidden


def train_step(student, teacher, makers, optimizer, batch, now, config, place, update,
               scaler=None) -> dict:
    """One step of DINO, iBOT or DINOv2. Returns figures as tensors; nothing waits for the device.

    `now` holds this step's values of the schedules, `makers` make targets (losses.CENTERING),
    `update` moves the teacher, `scaler` keeps fp16 in range. `batch` is augment.collate's.
    """
    B, G = len(batch["index"]), len(batch["global_crops"])
    views, hidden = to_device(batch, config.pixels, place.device)
    weights = hidden.pop("mask_weights", None)  # (M,), 0 where padded
    real = {"dino": None, "ibot": None if weights is None else weights > 0}

    # The teacher sees all of the large crops and says, sharply and in balance, what it sees.
    with torch.no_grad(), runtime.autocast(config.precision, place.device):
        seen = teacher(views[:1], mask_indices=hidden.get("mask_indices"))
    targets = {}
    for name, maker in makers.items():
        bias = maker(seen[name], now["teacher_temp"], real[name])
        targets[name] = make_targets(seen[name], now["teacher_temp"], bias)

    # The student sees all crops, patches of the large ones hidden, and has to say the same.
    plan = unwrap(student).backbone.draw_plan(views, now["generator"])
    with runtime.autocast(config.precision, place.device):
        said = student(views, plan, **hidden)
    terms = {}
    if "dino" in targets:
        terms["dino"] = view_pair_loss(targets["dino"].unflatten(0, (G, B)),
                                       said["dino"].unflatten(0, (-1, B)), config.student_temp)
    if "ibot" in targets:
        terms["ibot"] = patch_loss(targets["ibot"], said["ibot"], weights, G * B,
                                   config.student_temp)
    if config.koleo_weight:
        terms["koleo"] = sum(koleo_loss(view) for view in said["features"][:G * B].chunk(G))
    terms |= unwrap(student).more_terms(seen, said)
    loss = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())

    # Only the student learns.
    optimizer.zero_grad(set_to_none=True)
    scaler.backward(loss, optimizer) if scaler else loss.backward()
    norm = clip_gradients(list(unwrap(student).children()), config.clip_grad, config.clip_mode)
    # Should anything not be finite, on any process, nothing below moves; the log will hear of it.
    figures = torch.stack([loss, *terms.values()]).detach()
    figures = dict(zip(["loss", *terms], all_sum(figures) / place.world_size))
    ok = (figures["loss"] + norm).isfinite()
    set_schedule(optimizer, now)
    optimizer.found_inf = 1 - ok.float()
    optimizer.step()

    # The teacher follows, and the centres learn what the teacher tends to say.
    update(teacher, unwrap(student), now["momentum"], ok.float())
    for name, maker in makers.items():
        maker.update(seen[name], real[name], ok)
    for name in targets:
        rows = entropies(targets[name], weights if name == "ibot" else None)
        figures |= zip((f"{name}_entropy", f"{name}_mean_entropy"), rows)
    if "ibot" in terms:  # for the log: per hidden patch, where the loss counts unmasked crops too
        figures["ibot"] = figures["ibot"] * G * B / weights.sum()
    if scaler:  # an overflow is no illness in fp16: the step is left out
        norm, ok = torch.where(ok, norm, 0), figures["loss"].isfinite() & scaler.update(ok)
    return figures | dict(grad_norm=norm, ok=ok, features=seen["features"])


def unwrap(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, DistributedDataParallel) else network


def schedules(step: int, epoch_steps: int, total: int, config: Config, place: Place) -> dict:
    """Everything that depends on the step. Teacher temperature changes by the epoch, as in DINO."""
    batch = config.batch_size_per_gpu * place.world_size
    scale = {"linear_256": batch / 256, "sqrt_1024": math.sqrt(batch / 1024), "none": 1.0}
    peak, warmup = config.lr * scale[config.lr_scaling], config.warmup_epochs * epoch_steps
    lr = cosine(step, peak, config.min_lr, total, warmup)
    seed = np.random.SeedSequence([config.seed, step, place.rank]).generate_state(1)[0]
    return dict(
        lr=lr,
        last_layer_lr=0.0 if step < config.freeze_last_layer_epochs * epoch_steps else lr,
        backbone_lr=0.0 if step < config.freeze_backbone_epochs * epoch_steps else lr,
        weight_decay=cosine(step, config.weight_decay, config.weight_decay_end, total),
        momentum=cosine(step, config.momentum_teacher, config.final_momentum_teacher, total),
        teacher_temp=linear(step // epoch_steps, config.warmup_teacher_temp, config.teacher_temp,
                            config.warmup_teacher_temp_epochs),
        generator=torch.Generator().manual_seed(int(seed)),  # of stochastic depth
    )


# ------------------------------------------------------------------------------------------------
# Other beginnings: the weights of --init


def load_init(network: Network, config: Config):
    """--init: the backbone's weights, and those of the heads where they come along."""
    backbone, heads = network.backbone, init_heads(config)
    state, _ = read_backbone(config.init)
    if not config.convnet:
        embed, side = "patch_embed.proj.weight", config.global_crops_size // config.patch_size
        state[embed] = inflate(state[embed], config.in_chans)
        token = backbone.mask_token
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], (side, side),
                                              config.pos_embed_resize)
        if token is None:
            state.pop("mask_token", None)
        else:
            state.setdefault("mask_token", token.detach())
    load_strictly(backbone, state, f"--init {config.init}")
    for name, head in list(network.named_children())[1:]:
        if name in heads:
            load_strictly(head, heads[name], f"--init {config.init}/heads.pt")


def init_heads(config: Config) -> dict[str, dict[str, Tensor]]:
    """What heads.pt of the run --init holds: heads by name, "makers"; {} for bare backbones."""
    file = Path(config.init).expanduser() / "heads.pt"
    return read_tensors(file) if config.init and file.exists() else {}


def inherit(config: Config) -> Config:
    """--init: a configuration for the network of those weights. See recipes.NETWORK."""
    if not config.init:
        return config
    try:
        _, known = settings(config.init)
    except ValueError as error:
        raise UsageError(str(error).replace("--weights", "--init")) from None
    names = [*NETWORK, *(HEADS if init_heads(config) else ())]
    wrong = [name for name in names if name in config.given
             and known.get(name, getattr(config, name)) != getattr(config, name)]
    if wrong:
        raise UsageError(f"--init {config.init} fixes the network: leave out " + ", ".join(
            f"--{name} {getattr(config, name)} (they have {known[name]})" for name in wrong)
            + (f", or begin with {config.init}/teacher.pt, the backbone alone"
               if wrong[0] in HEADS else ""))
    said = {*config.given, *(PRESETS | DISTILLATION).get(config.preset, ())}
    names += [name for name in CROPS if name not in said]
    found = {name: known[name] for name in names if name in known}
    config = dataclasses.replace(config, **found, given=(*config.given, *found))
    if not config.convnet:
        for name in ("global_crops_size", "local_crops_size"):
            if name not in said:  # the default, in whole patches
                p = config.patch_size
                setattr(config, name, round(getattr(config, name) / p) * p)
    return config


# ------------------------------------------------------------------------------------------------
# The machine: kernels, processes, memory


def compile_blocks(networks, config: Config, place: Place):
    """Block by block and in place: all blocks share one graph, and keys stay as they are."""
    wanted = place.device.type == "cuda" if config.compile is None else config.compile
    losses.COMPILE = wanted
    for network in networks if wanted else ():
        for block in getattr(network.backbone, "blocks", network.backbone.children()):
            block.compile()


def shard(network: nn.Module, config: Config, place: Place):
    """Split over all processes: blocks in the low precision, heads, norm and tokens in float32."""
    backbone, *heads = network.children()
    runtime.shard(network, list(backbone.blocks), heads, place, config.precision)


def imagined(student: nn.Module, config: Config, device: torch.device, hidden=None):
    """The student's tensors and a batch for it, in shape alone: (state, arguments).

    To be used within FakeTensorMode, where whatever they go through takes no time and no memory.
    hidden: how many patches it is asked about; None: as many as there can be.
    """
    state = {name: torch.empty_like(x, device=device).requires_grad_(x.requires_grad)
             for name, x in (*student.named_parameters(), *student.named_buffers())}
    sizes = [(config.global_crops_number, config.global_crops_size)]
    if config.local_crops_number and config.dino_weight:
        sizes.append((config.local_crops_number, config.local_crops_size))
    views = [torch.empty(n * config.batch_size_per_gpu, config.in_chans, side, side, device=device)
             for n, side in sizes]
    plan = student.backbone.draw_plan(views, torch.Generator())
    masking, masks, places = masking_of(config), None, None
    if masking:
        count = masking.most(len(views[0])) if hidden is None else hidden
        places = torch.empty(count, dtype=torch.int64, device=device)
        if config.hides_patches:
            shape = len(views[0]), math.prod(masking.grid)
            masks = torch.empty(shape, dtype=torch.bool, device=device)
    return state, (views, plan, masks, places)


def expected_memory(student: nn.Module, config: Config, place: Place) -> dict[str, float]:
    """GB of one process, by part, at its fullest: when the backward pass begins.

    What autograd keeps of the student's forward pass and of the losses is counted in a step that is
    imagined. What lives for a moment is not in it; compiled blocks keep some third less.
    """
    kept, G, B = {}, config.global_crops_number, config.batch_size_per_gpu

    def keep(x):  # storages are held here, so that no number is given twice
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with FakeTensorMode(allow_non_fake_inputs=True), torch.compiler.set_stance("force_eager"):
        state, arguments = imagined(student, config, place.device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with runtime.autocast(config.precision, place.device):
                out = torch.func.functional_call(student, state, arguments)
            targets = {name: torch.empty_like(out[name], dtype=torch.float32)
                       for name in objectives(config)}
            terms = []  # held too, as long as the count
            for name, t in targets.items():
                terms.append(patch_loss(t, out[name], t[:, 0], G * B) if name == "ibot" else
                             view_pair_loss(t[:G * B].unflatten(0, (G, B)),
                                            out[name].unflatten(0, (-1, B))))
        own = {x.untyped_storage()._cdata for x in state.values()}
        forward = sum(storage.nbytes() for at, storage in kept.items() if at not in own)
        logits = sum(x.nbytes for name, x in out.items() if name in targets)
    held = sum(p.nbytes for p in student.parameters())
    held /= place.world_size if config.parallel == "fsdp" else 1
    parts = {"two networks": 2 * held, "gradients": held,
             "moments": held * (2 if config.optimizer == "adamw" else 1),
             "kept for backward": forward, "teacher's logits": logits}
    return {name: size / 2**30 for name, size in parts.items()}


# ------------------------------------------------------------------------------------------------
# Judging the teacher while it learns


class Judge:
    """k-NN(20) of the teacher's class token: at most 10,000 images vote on at most 5,000 others.

    Without labels: how often an image's other random view is its nearest neighbour.
    """

    def __init__(self, train: Images, val: Images, config: Config, place: Place):
        def evenly(images, most):
            count = min(len(images), most)
            return images.subset(np.linspace(0, len(images) - 1, count).astype(int))

        self.bank, self.queries = evenly(train, 10_000), evenly(val, 5_000)
        self.config, self.place = config, place
        self.labelled = bool(train.labels and val.labels)
        if self.labelled:
            same_labels(train, val)
        self.protocol = "k-NN(20)" if self.labelled else "other-view retrieval"
        if len(self.queries) < 2:
            place.print(f"{len(val)} images to judge with: nothing will be judged; give --val_data")

    def __call__(self, backbone: nn.Module) -> float | None:
        if len(self.queries) < 2:
            return None
        # Images come in other numbers here: not worth a graph of their own.
        with torch.compiler.set_stance("force_eager"):
            return self.vote(backbone) if self.labelled else self.retrieve_other_view(backbone)

    def vote(self, backbone: nn.Module) -> float:
        config = self.config
        bank, queries = (
            extract(backbone, images, config.global_crops_size, self.place,
                    num_workers=config.num_workers, precision=config.precision)
            for images in (self.bank, self.queries))
        k, labels = min(20, len(bank)), same_labels(self.bank, self.queries)
        return knn_accuracy(bank, self.bank.labels, queries, labels, (k,))[k]

    @torch.no_grad()
    def retrieve_other_view(self, backbone: nn.Module) -> float:
        config, device = self.config, self.place.device
        crops = MultiCrop(config.global_crops_size, config.local_crops_size, 2, 0,
                          config.global_crops_scale, photometry=config.photometry)
        views, out, training = Views(self.queries, crops, seed=0), [], backbone.training
        backbone.eval()
        for i in range(len(self.queries)):
            sample = views[0, 0, i]
            pair = photometry(sample["global_crops"].to(device), sample["photometry"],
                              config.pixels)
            with runtime.autocast(config.precision, device):
                out.append(backbone(pair).float().cpu())  # (2, D)
        backbone.train(training)
        first, second = torch.stack(out).unbind(1)
        nearest = top_neighbours(first, second, 1)[1][:, 0]
        return (nearest == torch.arange(len(nearest))).float().mean().item()


def pixels_as_features() -> nn.Module:
    """What any network has to beat: the image itself, at 32 x 32."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten())


# ------------------------------------------------------------------------------------------------
# The log: what the numbers mean


def diagnose(row: dict, config: Config) -> tuple[str, str] | None:
    """(name, sentence with a remedy) if the targets show one of the three known illnesses."""
    for term, prototypes in objectives(config).items():
        ln_k, entropy = math.log(prototypes), row[f"{term}_entropy"]
        if entropy > 0.99 * ln_k and row[f"{term}_kl"] < 0.01 * ln_k:
            return "uniform collapse", (
                f"uniform collapse of {term}: every answer is 1/K (H is ln K); lower "
                "--teacher_temp or raise --lr")
        if row[f"{term}_mean_entropy"] < 0.05 * ln_k:
            return "one prototype", (
                f"one prototype of {term} answers for all images (entropy of the mean target near "
                "0); use --centering ema or sinkhorn, or raise --teacher_temp")
        if abs(row[term] - ln_k) < 0.01 * ln_k and entropy < 0.5 * ln_k:
            return "ignored teacher", (
                f"the student ignores a teacher of {term} that has something to say (loss is ln K, "
                "H is not); raise --lr, or lower --freeze_last_layer_epochs")
    return None


def log_line(row: dict, total: int, config: Config, clock: runtime.Clock) -> str:
    parts = [f"step {row['step']:6d}/{total} {row['step'] / total:4.0%}"]
    for term, prototypes in objectives(config).items():
        parts.append(f"{term} {row[term]:.3f} = H {row[term + '_entropy']:.3f} + "
                     f"KL {row[term + '_kl']:.3f} (ln K {math.log(prototypes):.2f}, mean H "
                     f"{row[term + '_mean_entropy']:.2f})")
    parts += [f"{name} {row[name]:.2f}" for name in row  # terms without targets, such as KoLeo
              if name not in objectives(config) and hasattr(config, f"{name}_weight")]
    return "  ".join([
        *parts, f"rank {row['rank']:.0f}", f"lr {row['lr']:.1e}", f"m {row['momentum']:.4f}",
        f"{row['images_per_second']:.0f} img/s", f"wait {clock.waiting:.0%}",
        f"{row['memory_gb']:.1f} GB", f"eta {clock.eta}"])


class Recent:
    """Figures of the steps since the last look, kept on the device until read."""

    def __init__(self, images: Images):
        self.images, self.rows = images, []

    def add(self, step: int, batch: dict, out: dict):
        self.rows.append((step, batch["index"], batch["broken"], out))

    def read(self, figures: dict, seen: int) -> dict:
        """Means over the interval. Stops the run over a step that was not finite or bad images."""
        names = [name for name in self.rows[0][-1] if name != "features"]
        table = torch.stack([torch.stack([out[n].float() for n in names])
                             for *_, out in self.rows]).tolist()
        for (step, index, _, _), row in zip(self.rows, table):
            row = dict(zip(names, row))
            if not row["ok"]:
                ill = [n for n in ("dino", "ibot", "koleo", "loss")
                       if not math.isfinite(row.get(n, 0.0))]
                term = f"the loss ({ill[0]})" if ill else "a gradient"
                names = ", ".join(self.images.names[i] for i in index[:8].tolist())
                raise UsageError(
                    f"step {step}: {term} is not finite; weights are as before it, the last "
                    f"checkpoint is good. Images of this process: {names}, ... Lower --lr, or use "
                    "--precision fp32")
        means = dict(zip(names, (sum(column) / len(table) for column in zip(*table))))
        for term in ("dino", "ibot"):
            if term in means:
                means[f"{term}_kl"] = means[term] - means[f"{term}_entropy"]
                means[f"{term}_in_use"] = math.exp(means[f"{term}_mean_entropy"])
        means["rank"] = effective_rank(self.rows[-1][-1]["features"]).item()
        del means["ok"]
        self.count_broken(figures, seen)
        self.rows.clear()
        return means

    def count_broken(self, figures: dict, seen: int):
        broken = [name for _, _, names, _ in self.rows for name in names]
        for name in broken:
            print(f"replaced an image that does not decode: {name}", flush=True)
        device = self.rows[-1][-1]["loss"].device
        figures["broken"] += int(all_sum(torch.tensor(float(len(broken)), device=device)))
        if figures["broken"] > max(3, 0.01 * seen):
            raise UsageError(f"--data: {figures['broken']} of {seen} images did not decode, more "
                             "than one in a hundred; the last are named above")


def record(folder: Path, row: dict, place: Place):
    if place.main:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def forget_metrics_after(file: Path, step: int, place: Place):
    """A run that was killed had logged steps which the checkpoint does not have."""
    if place.main and file.exists():
        lines = file.read_text().splitlines()
        kept = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the last line may be half written
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        runtime.write_text(file, "".join(kept))


# ------------------------------------------------------------------------------------------------
# A run is its directory


def adopt(config: Config, folder: Path, place: Place, images: int) -> Config:
    """Make `config` continue the run in `folder`, or say which flags stand in the way.

    Where nothing is to be continued, what was left open (precision, --auto_scale) is settled here.
    """
    stored_file = folder / "config.json"
    global_batch = config.batch_size_per_gpu * place.world_size
    config = dataclasses.replace(config)
    if not (config.resume and stored_file.exists()):
        if config.auto_scale:
            config = auto_scale(config, images, global_batch)
        config.precision = runtime.resolve_precision(config.precision, place.device)
        return config
    stored = read_config(stored_file)
    for name in SCALED if config.auto_scale else ():  # as they were found when the run began
        if name not in config.given and name not in stored["given"]:
            setattr(config, name, stored[name])
    if config.precision == "auto":
        config.precision = stored["precision"]
    if config.batch_size_per_gpu == stored["batch_size_per_gpu"]:
        global_batch = stored["global_batch"]
    if global_batch % place.world_size:
        raise UsageError(f"the run's global batch of {global_batch} does not divide over "
                         f"{place.world_size} processes")
    config.batch_size_per_gpu = global_batch // place.world_size
    now = dataclasses.asdict(config)
    free = NEUTRAL | {"batch_size_per_gpu", "preset"}
    differ = [f"--{k} {now[k]} (the run has {stored.get(k)})" for k in now
              if k not in free and now[k] != stored.get(k)]
    if global_batch != stored["global_batch"]:
        differ.append(f"--batch_size_per_gpu {config.batch_size_per_gpu} on {place.world_size} "
                      f"processes (the run has a global batch of {stored['global_batch']})")
    if differ:
        raise UsageError(f"{folder} holds a run of another configuration: {', '.join(differ)}; "
                         "give the same flags, another --output_dir, or --no_resume to start anew")
    return config


def open_data(config: Config) -> tuple[Images, Images]:
    """(images to learn from, images to judge with). Without --val_data 5 % are held out by name."""
    images = open_images(config.data, config.data_root, config.download, "--data", config.pixels)
    images = cached(images, config.cache, config.cache_side, config.num_workers)
    if config.val_data:
        return images, open_images(config.val_data, config.data_root, config.download, "--val_data",
                                   config.pixels)
    out = [held_out(name) for name in images.names]
    parts = [images.subset([i for i, o in enumerate(out) if o == want]) for want in (False, True)]
    return parts[0], parts[1]


def masking_of(config: Config, rank: int = 0) -> Masking | None:
    """What picks the patches to learn from; None where only whole images are."""
    if not config.learns_patches:
        return None
    side = config.global_crops_size // config.patch_size
    return Masking((side, side), config.mask_ratio, config.mask_probability, config.mask_shape,
                   config.mask_min_patches, config.seed, rank)


def batches_from(step: int, total: int, images: Images, config: Config, place: Place):
    """The loader of this process's batches, of steps `step` to `total`."""
    sampler = Sampler(len(images), config.batch_size_per_gpu, total, step, config.seed, place.rank,
                      place.world_size, images.order)
    crops = MultiCrop(config.global_crops_size, config.local_crops_size,
                      config.global_crops_number,
                      config.local_crops_number if config.dino_weight else 0,
                      config.global_crops_scale, config.local_crops_scale, config.photometry)
    return training_loader(Views(images, crops, config.seed), sampler, config.num_workers,
                           place.device.type == "cuda", masking_of(config, place.rank))


def prepare(folder: Path, config: Config, place: Place):
    """Write what a run directory holds from the start. A new run clears an old one of its name."""
    if not config.resume:
        for old in ("checkpoint", "code"):
            shutil.rmtree(folder / old, ignore_errors=True)
        for old in ("metrics.jsonl", "summary.json", "config.json", "teacher.pt", "heads.pt"):
            (folder / old).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        stored = dict(dataclasses.asdict(config),
                      global_batch=config.batch_size_per_gpu * place.world_size)
        runtime.write_json(folder / "config.json", stored)
        (folder / "code").mkdir(exist_ok=True)
        for file in Path(__file__).resolve().parent.glob("*.py"):
            shutil.copy(file, folder / "code")


# ------------------------------------------------------------------------------------------------
# The run


def run(config: Config, build=build, update=ema_update) -> dict:
    """Train as `config` says; returns the summary. Continues what is in its directory.

    The seam for other ways to learn from a teacher: `build` brings the two networks, `update` moves
    the second after each step. Distillation brings its own.
    """
    config = inherit(config)
    check(config)
    place = runtime.start(config.device)
    runtime.keep_freed_memory(place)
    folder = Path(config.output_dir or f"runs/{config.preset}")
    with runtime.usage():  # whatever can be refused is, before anything is written
        images, val = open_data(config)
        config = adopt(config, folder, place, len(images))
        if config.auto_scale:
            place.print("--auto_scale: " + "  ".join(f"{k} {getattr(config, k)}" for k in SCALED))
        check(config)  # once more: the batch of each process may have become another
        probe = Sampler(len(images), config.batch_size_per_gpu, 1, world_size=place.world_size)
        epoch_steps = config.epoch_length or probe.steps_per_pass
        found = runtime.find_checkpoint(folder / "checkpoint", place) if config.resume else None
        if found and found[1]["step"] >= config.epochs * epoch_steps:
            if (folder / "summary.json").exists():
                return finished(folder, place)
        this = Run(config, place, folder, images, val, epoch_steps, build)
    this.begin(found)
    this.train(update)
    return this.end()


def finished(folder: Path, place: Place) -> dict:
    summary = json.loads((folder / "summary.json").read_text())
    knn = summary["knn"]
    known = "" if knn is None else f", {summary['knn_protocol']} {knn:.1%}"
    place.print(f"{folder} is finished{known}; --no_resume would start it anew")
    return summary


class Run:
    """Networks, data, and how far they are: `begin`, `train`, `end`.

    A checkpoint keeps the tensors of `parts` and the optimiser, `step`, `figures` (what the summary
    will say) and `last` (the newest row of the log). `whole` is the teacher's backbone in one
    piece, to be judged and saved.
    """

    def __init__(self, config: Config, place: Place, folder: Path, images: Images, val: Images,
                 epoch_steps: int, build):
        self.config, self.place, self.folder = config, place, folder
        self.images, self.val = images, val
        self.epoch_steps, self.total = epoch_steps, config.epochs * epoch_steps
        self.student, self.teacher = build(config, place)
        self.makers = target_makers(config).to(place.device)
        self.expected = expected_memory(self.student, config, place)
        self.whole = self.teacher.backbone
        if config.parallel == "fsdp":
            self.whole = copy.deepcopy(self.whole)  # filled when needed
            for network in (self.student, self.teacher):
                shard(network, config, place)
        self.optimizer = OPTIMIZERS[config.optimizer](
            parameter_groups(self.student, config.layerwise_decay, config.patch_embed_lr_mult))
        self.scaler = LossScale().to(place.device) if config.precision == "fp16" else None
        self.parts = {"student": self.student, "teacher": self.teacher, "makers": self.makers}
        if self.scaler:
            self.parts["scaler"] = self.scaler
        self.judge = Judge(images, val, config, place)
        self.step, self.last = 0, {}
        self.figures = {"seconds": 0.0, "broken": 0, "untrained": None, "pixels": None, "knn": None}

    # -- where we are: the beginning, or a checkpoint

    def begin(self, found: tuple[Path, dict] | None):
        config, place = self.config, self.place
        if place.main:
            prepare(self.folder, config, place)
        self.introduce()
        if found:
            state = runtime.live_state(self.parts, self.optimizer, of="student")
            runtime.load_checkpoint(found[0], state, place)
            self.step, self.figures, self.last = (found[1][k] for k in ("step", "figures", "last"))
            place.print(f"continuing from step {self.step}")
        forget_metrics_after(self.folder / "metrics.jsonl", self.step if found else -1, place)
        figures, self.begun = self.figures, time.time() - self.figures["seconds"]
        if self.step == 0:
            figures["pixels"], figures["untrained"] = (
                self.judge(network) for network in (pixels_as_features(), self.whole_teacher()))
            if figures["pixels"] is not None:
                place.print(f"{self.judge.protocol}: raw pixels {figures['pixels']:.1%}, "
                            f"{self.started} network {figures['untrained']:.1%}")
                record(self.folder, dict(step=0, knn=figures["untrained"],
                                         pixels=figures["pixels"]), place)
        elif self.step == self.total:  # stopped between its last save and its end
            self.write_teacher()
            self.whole_teacher()

    @property
    def started(self) -> str:
        return "--init" if self.config.init else "untrained"

    def introduce(self):
        config, place = self.config, self.place
        place.print(
            f"{config.preset or 'run'} -> {self.folder}: {len(self.images):,d} images, "
            f"{self.total:,d} steps of {config.batch_size_per_gpu} x {place.world_size}, "
            f"{place.device}, {config.precision}, "
            f"{sum(p.numel() for p in self.student.parameters()):,d} parameters")
        there_is, in_all = runtime.memory_gb(place.device), sum(self.expected.values())
        place.print(f"expects {in_all:.2f} of {there_is:.0f} GB: "
                    + ", ".join(f"{name} {size:.2f}" for name, size in self.expected.items()))
        if in_all > there_is:
            place.print("warning: that is too much; give --activation_checkpointing, --precision "
                        "bf16, --parallel fsdp or a smaller --batch_size_per_gpu")

    def whole_teacher(self) -> nn.Module:
        """The teacher's backbone in one piece, as it is now."""
        if self.config.parallel == "fsdp":
            state = runtime.whole_state(self.teacher)
            self.whole.load_state_dict({name.removeprefix("backbone."): value
                                        for name, value in state.items() if "backbone." in name})
        return self.whole

    # -- the loop

    def train(self, update):
        config, place = self.config, self.place
        batches = iter(batches_from(self.step, self.total, self.images, config, place))
        network = self.student
        if place.world_size > 1 and config.parallel == "ddp":
            network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        self.clock, self.recent = runtime.Clock(self.step, self.total), Recent(self.images)
        self.warned = set()
        with runtime.Farewell(place) as farewell:
            while self.step < self.total:
                batch = self.clock.wait(batches)
                now = schedules(self.step, self.epoch_steps, self.total, config, place)
                out = train_step(network, self.teacher, self.makers, self.optimizer, batch, now,
                                 config, place, update, self.scaler)
                self.recent.add(self.step, batch, out)
                self.step += 1
                self.clock.tick()

                asked_to_stop, done = farewell.agreed(), self.step == self.total
                saving = self.step % config.save_every == 0 or done or asked_to_stop
                if self.step % config.log_every == 0 or saving:
                    self.log(now)
                with self.clock.pause():
                    due = config.knn_every * self.epoch_steps
                    if done or (due and self.step % due == 0 and not asked_to_stop):
                        self.evaluate()
                    if saving:
                        self.save()
                if asked_to_stop and not done:
                    name = signal.Signals(asked_to_stop).name
                    place.print(f"{name}: stopped after step {self.step}, saved; the same command "
                                "continues")
                    del batches  # and with it the loader's processes, at once
                    raise SystemExit(128 + asked_to_stop)

    def log(self, now: dict):
        """The one place where the host waits for the device."""
        config, place, clock = self.config, self.place, self.clock
        batch = config.batch_size_per_gpu * place.world_size
        self.last = self.recent.read(self.figures, self.step * batch) | dict(
            step=self.step, lr=now["lr"], momentum=now["momentum"],
            weight_decay=now["weight_decay"], teacher_temp=now["teacher_temp"],
            images_per_second=batch / max(clock.step_seconds, 1e-9), waiting=clock.waiting,
            memory_gb=runtime.peak_memory_gb(place.device))
        place.print(log_line(self.last, self.total, config, clock))
        record(self.folder, self.last, place)
        illness = diagnose(self.last, config)
        warm = self.step > config.warmup_epochs * self.epoch_steps
        if illness and illness[0] not in self.warned and warm:
            self.warned.add(illness[0])
            place.print(f"warning: {illness[1]}")

    def evaluate(self):
        figures, place = self.figures, self.place
        figures["knn"] = self.judge(self.whole_teacher())
        if figures["knn"] is None:
            return
        place.print(f"epoch {self.step // self.epoch_steps}: {self.judge.protocol} "
                    f"{figures['knn']:.1%} ({self.started} {figures['untrained']:.1%}, "
                    f"pixels {figures['pixels']:.1%})")
        record(self.folder, dict(step=self.step, knn=figures["knn"]), place)
        if self.config.init and figures["knn"] < figures["untrained"]:
            place.print("warning: below the weights that it began with; lower --lr, raise "
                        "--freeze_backbone_epochs, or stop")

    def save(self):
        self.figures["seconds"] = time.time() - self.begun
        runtime.save_checkpoint(self.folder / "checkpoint", self.step,
                                runtime.live_state(self.parts, self.optimizer, of="student"),
                                {"figures": self.figures, "last": self.last}, self.place,
                                self.config.keep)
        self.write_teacher()

    def write_teacher(self):
        """The backbone with official keys; heads and centres beside it."""
        state = runtime.whole_state(self.teacher)
        if self.place.main:
            backbone, heads = {}, {"makers": self.makers.state_dict()}
            for key, value in state.items():
                part, name = key.split(".", 1)
                out = backbone if part == "backbone" else heads.setdefault(part, {})
                out[name] = value.cpu()
            runtime.save(self.folder / "teacher.pt", backbone)
            runtime.save(self.folder / "heads.pt", heads)

    # -- what came of it

    def end(self) -> dict:
        config, figures, illness = self.config, self.figures, diagnose(self.last, self.config)
        summary = dict(
            preset=config.preset, seed=config.seed, steps=self.total, loss=self.last["loss"],
            knn=figures["knn"], knn_untrained=figures["untrained"], knn_pixels=figures["pixels"],
            knn_protocol=self.judge.protocol, minutes=(time.time() - self.begun) / 60,
            images_per_second=self.last["images_per_second"],
            peak_memory_gb=runtime.peak_memory_gb(self.place.device),
            collapsed=bool(illness and illness[0] in ("uniform collapse", "one prototype")),
            device=str(self.place.device), precision=config.precision,
            broken_images=figures["broken"],
        )
        if self.place.main:
            self.draw()
            runtime.write_json(self.folder / "summary.json", summary)
            what = "curves.png, attention.png"
            then = f"visualize.py attention PHOTO --weights {self.folder}"
            if config.convnet:  # which has no attention to draw
                what, then = "curves.png", f"evaluate.py knn --weights {self.folder}"
            print(f"\nfinished in {summary['minutes']:.1f} minutes; wrote {self.folder}/{what} and "
                  f"teacher.pt\nnext:  python {then}")
        return summary

    def draw(self):
        """The curves, and where the class token looks in eight images that are held out."""
        config, val = self.config, self.val
        visualize.draw_curves(self.folder)
        some = np.random.default_rng(config.seed).permutation(len(val))[:8]
        if len(some) and not config.convnet:
            with torch.compiler.set_stance("force_eager"):
                visualize.draw_attention_page(self.whole, [val.read(int(i)) for i in some],
                                              config.global_crops_size,
                                              self.folder / "attention.png", config.pixels)


def read_flags(argv: list[str], kind=Config, presets=PRESETS, program="train.py") -> Config:
    config = runtime.parse(kind, argv, presets, f"python {program} [PRESET] [--flag value ...]")
    if "data" in config.given and "val_data" not in config.given:
        config.val_data = ""  # the preset's would judge by other images than the ones given
    return config


@runtime.command
def main(argv):
    return run(read_flags(argv))


if __name__ == "__main__":
    main()
