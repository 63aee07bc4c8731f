"""Warm start: --init, a run that begins with weights that have learned already.

    a run, a released name, a file --> settings of its network --> Config
                                   --> tensors, positions resampled, channels inflated --> student

Idea     The weights fix the network, so nobody repeats it in flags; the crops of a run come
         along unless a flag or a preset says otherwise.
Paper    DINOv2 sec. 4, "adapting the resolution", is one use of it (the preset hires)
Try      python train.py --init runs/shapes --output_dir runs/more --epochs 1 --warmup_epochs 0
Change   what --init brings along: NETWORK, HEADS and CROPS in training/config.py
Tests    pytest tests/training/test_warmstart.py
"""

import dataclasses
from pathlib import Path

from torch import Tensor, nn

from backbones.layouts import read_tensors
from backbones.weights import (architecture, is_resnet50, load_strictly, read_backbone,
                               run_config_file, weights_file)
from machinery.flags import UsageError
from training.config import CROPS, HEADS, NETWORK, Config, read_config
from training.recipes import DISTILLATION, PRESETS
from vit import ARCHS, inflate, resize_pos_embed


def init_settings(what: str | Path) -> dict:
    """The fields of Config that build the network of these weights again.

    For a run of ours all that its config.json says; for anything else what can be read off the
    shapes of the tensors. ValueError if they are no network that Config can describe.
    """
    state, _ = read_backbone(what)
    config_file = run_config_file(weights_file(what))
    if config_file:
        return read_config(config_file)
    if is_resnet50(state):
        return dict(arch="resnet50")

    found = architecture(state)
    for name, arch in ARCHS.items():
        if (arch["embed_dim"], arch["depth"]) == (found["embed_dim"], found["depth"]):
            break
    else:
        raise ValueError(f"--init {what}: a ViT {found['embed_dim']} wide and {found['depth']} "
                         "deep is none of vit.ARCHS")
    fields = ("in_chans", "patch_size", "ffn_layer", "num_register_tokens", "pos_embed_resize")
    settings = {field: found[field] for field in fields}
    settings["arch"] = name
    settings["layerscale"] = 1e-5 if found["layerscale"] else 0.0
    return settings


def config_from_init(config: Config) -> Config:
    """`config` for the network of --init; UsageError if a flag asks for another network.

    The network (config.NETWORK) and the heads, where they come along (config.HEADS), are those
    of the weights. The crops (config.CROPS) are, unless a flag or the preset says otherwise.
    """
    try:
        known = init_settings(config.init)
    except ValueError as error:
        raise UsageError(str(error).replace("--weights", "--init")) from None

    # A flag that contradicts the weights is refused: silently ignoring it would be worse.
    fixed = [*NETWORK]
    if init_heads(config):
        fixed += HEADS
    contradictions = []
    for name in fixed:
        wanted = getattr(config, name)
        if name in config.given and known.get(name, wanted) != wanted:
            contradictions.append(name)
    if contradictions:
        flags = [
            f"--{name} {getattr(config, name)} (they have {known[name]})"
            for name in contradictions]
        way_out = ""
        if contradictions[0] in HEADS:
            way_out = f", or begin with {config.init}/teacher.pt, the backbone alone"
        raise UsageError(
            f"--init {config.init} fixes the network: leave out {', '.join(flags)}{way_out}")

    # The rest of what the weights know is taken over, as if it had been given by flags.
    chosen = {*config.given, *(PRESETS | DISTILLATION).get(config.preset, ())}
    taken_over = {}
    for name in (*fixed, *CROPS):
        if name in known and (name in fixed or name not in chosen):
            taken_over[name] = known[name]
    config = dataclasses.replace(config, **taken_over, given=(*config.given, *taken_over))

    # A crop size that nobody chose is the default, rounded to whole patches of this network.
    if not config.convnet:
        p = config.patch_size
        for name in ("global_crops_size", "local_crops_size"):
            if name not in chosen:
                setattr(config, name, round(getattr(config, name) / p) * p)
    return config


def load_init(network: nn.Module, config: Config):
    """Put the weights of --init into a train.Network: the backbone's, and heads that come
    along.
    """
    state, _ = read_backbone(config.init)
    backbone = network.backbone
    if not config.convnet:
        # Images may have other channels or another size than those the weights have learned
        # from.
        embed = "patch_embed.proj.weight"
        state[embed] = inflate(state[embed], config.in_chans)
        side = config.global_crops_size // config.patch_size
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], (side, side),
                                              config.pos_embed_resize)
        # A mask token is needed where patches are masked, whether the weights had one or not.
        if backbone.mask_token is None:
            state.pop("mask_token", None)
        else:
            state.setdefault("mask_token", backbone.mask_token.detach())
    load_strictly(backbone, state, f"--init {config.init}")

    heads = init_heads(config)
    for name, head in network.heads().items():
        if name in heads:
            load_strictly(head, heads[name], f"--init {config.init}/heads.pt")


def init_heads(config: Config) -> dict[str, dict[str, Tensor]]:
    """What heads.pt of the run --init holds: heads by name, and "centerings"; {} without a
    run.
    """
    file = Path(config.init).expanduser() / "heads.pt"
    if not (config.init and file.exists()):
        return {}
    tensors = read_tensors(file)
    if "makers" in tensors:  # the name that runs before November 2026 gave to them
        tensors["centerings"] = tensors.pop("makers")
    return tensors
