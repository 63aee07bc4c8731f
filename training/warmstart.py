"""Warm start: --init, a run that begins with trained weights instead of random ones.

    a run, a released name, a file --> settings of its network --> Config
                                   --> tensors; positions resampled, channels spread --> student

Idea     Weights fit one network only, so its settings are read from them and need not be given
         again as flags. The crops of a run are taken over, too, unless a flag or a preset says
         otherwise.
Paper    DINOv2 sec. 4, "adapting the resolution", is one use of it (the preset hires)
Try      python train.py --init runs/shapes --output_dir runs/more --epochs 1 --warmup_epochs 0
Change   what --init brings along: NETWORK, HEADS and CROPS in training/config.py
Tests    pytest tests/training/test_warmstart.py
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.layouts import read_tensors
from backbones.weights import (architecture, is_resnet50, load_strictly, read_backbone,
                               run_config_file, weights_file)
from images.data import first_line
from machinery.flags import UsageError
from training.config import CROPS, HEADS, NETWORK, Config
from training.stored import read_config
from training.recipes import DISTILLATION, PRESETS
from vit import ARCHS, resize_pos_embed


def init_settings(what: str | Path) -> dict:
    """The fields of Config that build the network of these weights again.

    For a run of ours all that its config.json says; for anything else what can be read off the
    shapes of the tensors. ValueError if they are no network that Config can describe.
    """
    # A run has written down everything; released weights have only their shapes.
    state, known = read_backbone(what)
    config_file = run_config_file(weights_file(what))
    if config_file:
        return read_config(config_file)
    if is_resnet50(state):
        return dict(arch="resnet50")

    # --arch has names, but the tensors tell width, depth and heads only: the name is looked up.
    shape = architecture(state, known)
    for name, arch in ARCHS.items():
        if all(shape[field] == value for field, value in arch.items()):
            break
    else:
        raise ValueError(f"--init {what}: a ViT {shape['embed_dim']} wide and {shape['depth']} "
                         f"deep with {shape['num_heads']} heads is none of vit.ARCHS")

    # LayerScale: whether its factors exist is what counts. Their start of 1e-5 is not used,
    # because they are loaded.
    fields = ("in_chans", "patch_size", "ffn_layer", "num_register_tokens", "pos_embed_resize")
    settings = {field: shape[field] for field in fields}
    settings["arch"] = name
    settings |= {field: tuple(known[field]) for field in ("mean", "std") if known.get(field)}
    settings["layerscale"] = 1e-5 if shape["layerscale"] else 0.0
    return settings


def config_from_init(config: Config) -> Config:
    """`config` for the network of --init; UsageError if a flag asks for another network.

    The network (config.NETWORK) and the heads, where they come along (config.HEADS), are those
    of the weights. The crops (config.CROPS) are, unless a flag or the preset says otherwise.
    """
    try:
        settings = init_settings(config.init)
    except ValueError as error:
        raise UsageError(str(error).replace("--weights", "--init")) from None

    # A flag that contradicts the weights is refused: to ignore it silently would be worse, for
    # the run would not be what its command says. Values of presets are replaced silently.
    fixed = [*NETWORK]
    if init_heads(config):
        fixed += HEADS
        # A run that did not learn patches has no head for them: a new one may be of any kind.
        if not settings.get("ibot_weight"):
            of_patches = ("separate_head", "ibot_n_prototypes", "ibot_head_bottleneck_dim")
            fixed = [name for name in fixed if name not in of_patches]
    contradictions = []
    for name in fixed:
        wanted = getattr(config, name)
        if name in config.given and settings.get(name, wanted) != wanted:
            contradictions.append(name)
    if contradictions:
        flags = [
            f"--{name} {getattr(config, name)} (they have {settings[name]})"
            for name in contradictions]
        way_out = ""
        if contradictions[0] in HEADS:
            way_out = f", or begin with {config.init}/teacher.pt, the backbone alone"
        raise UsageError(
            f"--init {config.init} fixes the network: leave out {', '.join(flags)}{way_out}")

    # The other settings of the weights are taken over; --auto_scale does not change them, nor is
    # anything changed that was taken over before: from the teacher of a distillation.
    chosen = {*config.given, *(PRESETS | DISTILLATION).get(config.preset, ())}
    # Other channels have other means and deviations than those of the weights.
    if "in_chans" in chosen and config.in_chans != settings.get("in_chans", config.in_chans):
        chosen |= {"mean", "std"}
    taken_over = {}
    for name in (*fixed, *CROPS):
        free = name in fixed or name not in chosen
        if name in settings and free and name not in config.taken_over:
            taken_over[name] = settings[name]
    config = dataclasses.replace(config, **taken_over,
                                 taken_over=(*config.taken_over, *taken_over))

    # A crop size that no flag chose, and that does not come from the weights, is rounded to
    # whole patches of this network. Examples: the default of 96 pixels becomes 98 for patches
    # of 14, and the 518 pixels of the preset hires become 512 for patches of 16.
    if not config.convnet:
        p = config.patch_size
        for name in ("global_crops_size", "local_crops_size"):
            if name not in (*config.given, *config.taken_over):
                setattr(config, name, max(1, round(getattr(config, name) / p)) * p)
    return config


def inflate(weight: Tensor, channels: int) -> Tensor:
    """A patch embedding (D, C, p, p) for images of other channels: (D, channels, p, p).

    More channels repeat the old ones in turn, fewer get their mean; both are scaled by
    C / channels. So an image that is equal in all channels has about the tokens that it had.
    """
    C = weight.shape[1]
    # From red, green, blue to five channels: red, green, blue, red, green, each times 3/5.
    if channels > C:
        weight = weight[:, torch.arange(channels) % C]  # (D, channels, p, p)
    elif channels < C:
        weight = weight.mean(1, keepdim=True).repeat(1, channels, 1, 1)  # (D, channels, p, p)
    return weight * (C / channels)


def load_init(network: nn.Module, config: Config):
    """Put the weights of --init into a train.Network: those of its backbone, and its heads.

    Heads stay random where there are none to load. ValueError if a tensor does not fit.
    """
    state, _ = read_backbone(config.init)
    backbone = network.backbone
    if not config.convnet:
        # Images may have other channels or another size than those of the weights' own
        # training: the patch embedding is spread over the channels, the table of positions is
        # resampled.
        embed = "patch_embed.proj.weight"
        state[embed] = inflate(state[embed], config.in_chans)
        side = config.global_crops_size // config.patch_size
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], (side, side),
                                              config.pos_embed_resize)

        # A mask token is needed where patches are masked, whether the weights have one or not:
        # one too many is dropped, a missing one starts as in a new network.
        if backbone.mask_token is None:
            state.pop("mask_token", None)
        else:
            state.setdefault("mask_token", backbone.mask_token.detach())
    load_strictly(backbone, state, f"--init {config.init}")

    # Of the heads those are loaded that this run has and that the other run had.
    heads = init_heads(config)
    for name, head in network.heads().items():
        if name in heads:
            try:
                load_strictly(head, heads[name], f"--init {config.init}/heads.pt")
            except ValueError as error:
                raise ValueError(f"{error}; or begin with {config.init}/teacher.pt, the "
                                 "backbone alone") from None


def init_heads(config: Config) -> dict[str, dict[str, Tensor]]:
    """Heads by name, and "centerings", from heads.pt of the run --init; {} if it is no run.

    UsageError if the file is damaged.
    """
    # A released name wins over a folder of the same name, whose heads are those of another network.
    folder = Path(config.init).expanduser()
    if not (config.init and (folder / "heads.pt").exists()):
        return {}
    if weights_file(config.init).parent.resolve() != folder.resolve():
        return {}
    return read_heads(folder / "heads.pt", "--init")


def read_heads(file: Path, flag: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each head of a heads.pt, by its name; UsageError if the file is damaged."""
    try:
        heads = read_tensors(file)
        if not all(isinstance(tensors, dict) for tensors in heads.values()):
            raise ValueError("expected a dictionary for each head")
    except Exception as error:  # of any kind, for damage has many forms
        raise UsageError(f"{flag}: {file} is not readable ({first_line(error):.200})") from None
    return heads
