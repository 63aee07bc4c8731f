"""Weights: any DINO or DINOv2 backbone, by name or file, as the right network; strictly.

    dinov2_vits14_reg --> URL --> cache --+
    a URL, a file, a run of ours ---------+--> tensors --> official keys --> ViT or convnet
           (.pth, .pt, .safetensors)                       (layouts.py)    (as the shapes say)

Idea     The architecture can be read off the tensors, so nobody has to repeat it in flags, and
         nobody gets random weights because a flag was wrong: every tensor must find its place.
Paper    none; the released backbones of DINO and DINOv2
Try      python -m backbones                          the released models
         python -m backbones RUN_OR_FILE_OR_NAME      what is in it
Change   another released backbone is one line in RELEASED
Tests    pytest tests/backbones/test_weights.py
"""

import hashlib
import json
import math
import os
import re
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

from augment import pixels_of
from backbones.convnet import CONVNETS, ConvNet
from backbones.layouts import LAYOUTS, read_tensors
from vit import ARCHS, VisionTransformer

# ----------------------------------------------------------------------------------------------
# What Meta released: name -> file, and the k-NN and linear accuracy on ImageNet of its README

BASE_URL = "https://dl.fbaipublicfiles.com/"
RELEASED = {
    "dino_vits16": ("dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", 74.5, 77.0),
    "dino_vits8": ("dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", 78.3, 79.7),
    "dino_vitb16": ("dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", 76.1, 78.2),
    "dino_vitb8": ("dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", 77.4, 80.1),
    "dino_resnet50": ("dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth", 67.5, 75.3),
    "dinov2_vits14": ("dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth", 79.0, 81.1),
    "dinov2_vits14_reg": ("dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth", 79.1, 80.9),
    "dinov2_vitb14": ("dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", 82.1, 84.5),
    "dinov2_vitb14_reg": ("dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", 82.0, 84.6),
    "dinov2_vitl14": ("dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth", 83.5, 86.3),
    "dinov2_vitl14_reg": ("dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth", 83.8, 86.7),
    "dinov2_vitg14": ("dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth", 83.5, 86.5),
    "dinov2_vitg14_reg": ("dinov2/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth", 83.7, 87.1)}


def fetch(url: str) -> Path:
    """The file behind a URL, from torch.hub's cache, or downloaded into it with a progress bar.

    It appears in the cache when it is whole, and not before.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(urllib.parse.urlparse(url).path).name
    if not url.startswith(BASE_URL):  # many files of the world are called model.safetensors
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + f".{os.getpid()}")
        try:
            with urllib.request.urlopen(url) as answer:
                size = int(answer.headers.get("Content-Length", 0))
            torch.hub.download_url_to_file(url, str(aside))
            if size and aside.stat().st_size != size:
                raise OSError(f"only {aside.stat().st_size:,d} of {size:,d} bytes came")
        except (OSError, RuntimeError) as error:
            aside.unlink(missing_ok=True)
            raise ValueError(
                f"--weights: {url} cannot be fetched ({error}); download it by hand "
                f"and put it at {path}") from None
        os.replace(aside, path)
    return path


# ----------------------------------------------------------------------------------------------
# From a name or a file to a network


def weights_file(what: str | Path) -> Path:
    """The file behind a released name, a URL, a file, or a run directory (its teacher.pt)."""
    name = str(what)
    if name in RELEASED:
        path = fetch(BASE_URL + RELEASED[name][0])
    elif re.match(r"https?://", name):
        path = fetch(name)
    else:
        path = Path(name).expanduser()

    if not path.exists():
        raise ValueError(f"--weights {name}: there is no such file or run directory, and no "
                         f"released model of that name ({', '.join(RELEASED)})")
    if not path.is_dir():
        return path
    if not (path / "teacher.pt").exists():
        raise ValueError(
            f"--weights {path}: no teacher.pt in it; is it the directory of a run?")
    return path / "teacher.pt"


def run_config_file(file: Path) -> Path | None:
    """config.json beside a teacher.pt of a run of ours; None beside any other file."""
    config = file.parent / "config.json"
    return config if file.name == "teacher.pt" and config.exists() else None


# What of a run's config.json a network needs, beside its tensors; an older run may lack some.
RUN_FIELDS = {
    "arch": "vit_small", "global_crops_size": 224, "pos_embed_resize": "offset", "mean": [],
    "std": []}


def read_run_fields(file: Path) -> dict:
    """RUN_FIELDS as a run's config.json has them. ValueError for a file that is nothing like
    it.
    """
    try:
        stored = json.loads(file.read_text())
        if type(stored) is not dict or type(stored.get("global_batch")) is not int:
            raise ValueError("expected an object that knows its global_batch")
        fields = RUN_FIELDS | {name: stored[name] for name in RUN_FIELDS if name in stored}
        for name, default in RUN_FIELDS.items():
            value = fields[name]
            numbers = type(value) is not list or all(type(x) in (int, float) for x in value)
            if type(value) is not type(default) or not numbers:
                raise ValueError(f"{name} is {value!r:.40}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not the config.json of a run ({error})") from None
    return {name: tuple(x) if type(x) is list else x for name, x in fields.items()}


def read_backbone(what: str | Path) -> tuple[dict[str, Tensor], dict]:
    """A released name, URL, file or run -> (flat state dict with official keys, RUN_FIELDS).

    The second is {} for anything but a run of ours.
    """
    file = weights_file(what)
    try:
        state = read_tensors(file)
    except Exception as error:  # torch.load raises different exceptions for different damage
        raise ValueError(
            f"--weights {file}: not a readable weights file ({str(error).splitlines()[0]})"
        ) from None
    if isinstance(state, dict):
        for layout in LAYOUTS:
            state = layout(state)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"--weights {file}: expected a dictionary of tensors, a backbone or a "
                         "checkpoint with one")
    config_file = run_config_file(file)
    return state, read_run_fields(config_file) if config_file else {}


def architecture(state: dict[str, Tensor]) -> dict:
    """Arguments of VisionTransformer, read off the tensors. Heads are 64 wide in all we
    know.
    """
    try:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[1]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        swiglu = "blocks.0.mlp.w12.weight" in state
        hidden = dim * 4 if swiglu else state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"--weights: not a Vision Transformer of DINO's layout (misses {error}); "
            f"its first keys are {', '.join(list(state)[:3])}") from None
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    return dict(
        img_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        in_chans=in_chans,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // 64,
        mlp_ratio=hidden
        / dim,  # SwiGLU's is 4 in every known network, its width by the 2/3 rule
        ffn_layer="swiglu" if swiglu else "mlp",
        num_register_tokens=registers,
        layerscale=1.0 if "blocks.0.ls1.gamma" in state else None,
        mask_token="mask_token" in state,
        pos_embed_resize="antialias" if registers else "offset")


def is_resnet50(state: dict) -> bool:
    """The one convnet that was released; others are known by the config.json of their run."""
    wide = state.get("layer4.2.conv2.weight")
    return wide is not None and wide.shape[0] == 512 and "layer3.6.conv1.weight" not in state


def load_backbone(what: str | Path) -> VisionTransformer | ConvNet:
    """The network with its weights, in eval mode. ValueError with the difference if one is
    left.

    Its `pixels` say what images it wants: channels, mean, spread.
    what: a name of RELEASED, a URL, a file of any of LAYOUTS, or a run directory of ours.
    """
    state, config = read_backbone(what)
    if config.get("arch") in CONVNETS or is_resnet50(state):
        model = ConvNet(config.get("arch", "resnet50"), config.get("global_crops_size", 224))
    else:
        options = architecture(state)
        if config:
            options["pos_embed_resize"] = config["pos_embed_resize"]
        model = VisionTransformer(**options)
    load_strictly(model, state, str(what))
    model.pixels = pixels_of(getattr(model, "in_chans", 3), config.get("mean", ()),
                             config.get("std", ()))
    return model.eval()


def untrained(name: str) -> VisionTransformer | ConvNet:
    """The network of a released name, with random weights."""
    if name == "dino_resnet50":
        return ConvNet("resnet50")
    family, size, patch = re.match(r"(dino|dinov2)_vit(.)(\d+)", name).groups()
    arch = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}[size]
    if family == "dino":
        return VisionTransformer(224, int(patch), **ARCHS[arch])
    registers = name.endswith("_reg")
    return VisionTransformer(518, int(patch), layerscale=1.0, mask_token=True,
                             num_register_tokens=4 * registers,
                             pos_embed_resize="antialias" if registers else "offset",
                             ffn_layer="swiglu" if size == "g" else "mlp", **ARCHS[arch])


def load_strictly(model: torch.nn.Module, state: dict[str, Tensor], source: str):
    """load_state_dict whose complaint can be read: missing, unexpected and misshapen
    tensors.
    """
    have = model.state_dict()
    trouble = [f"missing {key}" for key in have if key not in state]
    trouble += [f"unexpected {key}" for key in state if key not in have]
    trouble += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(have[key].shape)}" for key in have
        if key in state and state[key].shape != have[key].shape]
    if trouble:
        more = f" and {len(trouble) - 4} more" if len(trouble) > 4 else ""
        raise ValueError(f"{source} does not fit the network: {'; '.join(trouble[:4])}{more}")
    model.load_state_dict(state)
