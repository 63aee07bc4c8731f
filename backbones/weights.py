"""Weights: any DINO or DINOv2 backbone, by name or file, as the right network; strictly.

    dinov2_vits14_reg --> URL --> cache --+
    a URL, a file, a run of ours ---------+--> tensors --> official keys --> ViT or convnet
           (.pth, .pt, .safetensors)                       (layouts.py)    (as the shapes say)

Idea     The architecture can be read off the shapes of the tensors, so nobody has to repeat it
         in flags. Loading is strict: every tensor of the file must have its place in the
         network, and every place its tensor. A wrong prefix or a wrong flag is an error, and
         never a network that is left with random weights.
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
from machinery.flags import did_you_mean, near_path
from vit import ARCHS, VisionTransformer

# ----------------------------------------------------------------------------------------------
# What Meta released: name -> (file, k-NN accuracy, linear accuracy)
#
# Accuracies are top-1 on ImageNet in per cent, as the READMEs of Meta's repositories publish
# them. dinov2_vits14_reg means: DINOv2, a small ViT, patches of 14 pixels, four registers. The
# file names of the first DINO models say "deit", as their ViTs were called at first.

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

    ValueError if it cannot be fetched; it says where a file that was fetched by hand belongs.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(urllib.parse.urlparse(url).path).name

    # Meta's names are unique, and the same as in torch.hub's own downloads. Others call many
    # different files model.safetensors, so these get a hash of the URL in front:
    # https://host/a/model.safetensors is kept as 7043817e-model.safetensors.
    if not url.startswith(BASE_URL):
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = folder / name
    if path.exists():
        return path

    # Downloaded under a name of this process's own, and renamed when it is whole. So two
    # processes do not write into one file, and what is in the cache can be relied on.
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + f".{os.getpid()}")
    try:
        # A connection that breaks off does not always raise: the length tells.
        with urllib.request.urlopen(url) as answer:
            size = int(answer.headers.get("Content-Length", 0))
        torch.hub.download_url_to_file(url, str(unfinished))
        if size and unfinished.stat().st_size != size:
            raise OSError(f"only {unfinished.stat().st_size:,d} of {size:,d} bytes came")
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise ValueError(f"--weights: {url} cannot be fetched ({error}); download it by hand "
                         f"and put it at {path}") from None
    os.replace(unfinished, path)
    return path


# ----------------------------------------------------------------------------------------------
# From a name or a file to tensors with official names


def weights_file(what: str | Path) -> Path:
    """The file behind a released name, a URL, a file, or a run directory (its teacher.pt).

    A released name comes first: a file of the same name has to be written ./dino_vits16.
    """
    name = str(what)
    if name in RELEASED:
        path = fetch(BASE_URL + RELEASED[name][0])
    elif re.match(r"https?://", name):
        path = fetch(name)
    else:
        path = Path(name).expanduser()

    if not path.exists():
        hint = did_you_mean(name, RELEASED) or near_path(path)
        raise ValueError(f"--weights {name}: there is no such file or run directory, and no "
                         f"released model of that name ({', '.join(RELEASED)}){hint}")
    if not path.is_dir():
        return path

    # Of a run, the teacher: an average of the student's past weights, and better than it.
    if not (path / "teacher.pt").exists():
        raise ValueError(
            f"--weights {path}: no teacher.pt in it; is it the directory of a run?")
    return path / "teacher.pt"


def run_config_file(file: Path) -> Path | None:
    """config.json beside a teacher.pt of a run of ours; None beside any other file."""
    config = file.parent / "config.json"
    return config if file.name == "teacher.pt" and config.exists() else None


# What a network needs beside its tensors, out of a run's config.json: name -> default, for runs
# of a time when the field did not exist. (training/config.py has all fields; this room does not
# import it, so that a network can be loaded without the code of training.)
RUN_FIELDS = {
    "arch": "vit_small", "global_crops_size": 224, "pos_embed_resize": "offset",
    "ffn_layer": "", "mean": [], "std": []}


def read_run_fields(file: Path) -> dict:
    """RUN_FIELDS as a run's config.json has them; lists come as tuples.

    ValueError for a file that is no config.json of a run: not JSON, without a global_batch,
    which every run records, or with a field of another type.
    """
    try:
        stored = json.loads(file.read_text())
        if type(stored) is not dict or type(stored.get("global_batch")) is not int:
            raise ValueError("expected an object that knows its global_batch")

        # A field has the type of its default, and a list holds nothing but numbers. The types
        # are compared exactly, because True would pass for an integer otherwise.
        fields = RUN_FIELDS | {name: stored[name] for name in RUN_FIELDS if name in stored}
        for name, default in RUN_FIELDS.items():
            value = fields[name]
            numbers = type(value) is not list or all(type(x) in (int, float) for x in value)
            if type(value) is not type(default) or not numbers:
                raise ValueError(f"{name} is {value!r:.40}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not the config.json of a run ({error})") from None
    return {name: tuple(x) if type(x) is list else x for name, x in fields.items()}


def student_of(file: Path, state: dict) -> dict:
    """The student's tensors of a training; ValueError if they were not kept.

    file: where its teacher is. Of a run of ours the student is in the newest checkpoint beside
    it; of other trainings in the file itself, whose content is `state`.
    """
    if run_config_file(file) is None:
        if not isinstance(state, dict) or not isinstance(state.get("student"), dict):
            raise ValueError(f"--checkpoint_key student: {file} holds one network only")
        return state["student"]

    # Imported here, because hardly anybody asks for a student. The index of the checkpoint says
    # which tensors there are: student.backbone.cls_token, ...
    from machinery.checkpoints import Reader, find_checkpoint, load_checkpoint
    from machinery.process import Process

    alone = Process(torch.device("cpu"))
    checkpoint = find_checkpoint(file.parent / "checkpoint", alone)
    if checkpoint is None:
        raise ValueError(f"--checkpoint_key student: {file.parent} has no checkpoint")
    tensors = {}
    for name, about in Reader(checkpoint[0]).read_metadata().state_dict_metadata.items():
        if name.startswith("student."):
            tensors[name] = torch.empty(about.size, dtype=about.properties.dtype)
    load_checkpoint(checkpoint[0], tensors, alone)
    return {name.removeprefix("student."): value for name, value in tensors.items()}


def read_backbone(what: str | Path,
                  checkpoint_key: str = "teacher") -> tuple[dict[str, Tensor], dict]:
    """A released name, URL, file or run -> (flat state dict with official keys, RUN_FIELDS).

    checkpoint_key: teacher or student, where a training has left both. The second is {} for
    anything but a run of ours.
    """
    file = weights_file(what)
    try:
        state = read_tensors(file)
    except Exception as error:  # torch.load raises different exceptions for different damage
        reason = (str(error) or repr(error)).splitlines()[0]  # an empty file: EOFError()
        raise ValueError(f"--weights {file}: not a readable weights file ({reason})") from None

    if checkpoint_key == "student":
        state = student_of(file, state)

    # Each layout renames what it knows and leaves the rest alone. All are applied, because a
    # file can be of two layouts: DINOv2's training checkpoints (from_training) have their
    # blocks in chunks (from_chunks).
    if isinstance(state, dict):
        for layout in LAYOUTS:
            state = layout(state)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"--weights {file}: expected a dictionary of tensors, a backbone or a "
                         "checkpoint with one")
    config_file = run_config_file(file)
    return state, read_run_fields(config_file) if config_file else {}


# ----------------------------------------------------------------------------------------------
# From tensors to a network


def architecture(state: dict[str, Tensor]) -> dict:
    """Arguments of VisionTransformer, read off the shapes of the tensors.

    ValueError if they are not those of a ViT. Example, dinov2_vits14:

        tensor                     shape               what it tells
        patch_embed.proj.weight    (384, 3, 14, 14)    embed_dim 384, in_chans 3, patch_size 14
        pos_embed                  (1, 1370, 384)      1 + 37 * 37: img_size 37 * 14 = 518
        blocks.11.norm1.weight     (384,)              the highest number is 11: depth 12
        blocks.0.mlp.fc1.weight    (1536, 384)         mlp_ratio 1536 / 384 = 4, ffn_layer "mlp"
        blocks.0.ls1.gamma         (384,)              it has LayerScale
        mask_token                 (1, 384)            it has a mask token
        register_tokens            is missing          no registers, pos_embed_resize "offset"

    Two things leave no trace in the shapes. The number of heads: the queries of all heads are
    one matrix. But heads are 64 wide in all networks that we know, so it is 384 / 64 = 6. And
    the rule for resampling positions: of the released networks, those with registers use
    "antialias", the others "offset".
    """
    try:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[1]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))

        # SwiGLU takes two thirds of 4 * dim and rounds up to a multiple of 8 (vit.SwiGLU). That
        # cannot be turned around, and the factor is 4 in every known network.
        swiglu = "blocks.0.mlp.w12.weight" in state
        first = state.get("blocks.0.mlp.fc1.weight")
        hidden = dim * 4 if first is None else first.shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"--weights: not a Vision Transformer of DINO's layout (misses {error}); "
            f"its first keys are {', '.join(list(state)[:3])}") from None

    # Any number will do for layerscale, because the learned factors are loaded afterwards; None
    # would build a network without them.
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    return dict(
        img_size=math.isqrt(positions - 1) * patch,  # the class token has a position, too
        patch_size=patch,
        in_chans=in_chans,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // 64,
        mlp_ratio=hidden / dim,
        ffn_layer="swiglu" if swiglu else "mlp",
        num_register_tokens=registers,
        layerscale=1.0 if "blocks.0.ls1.gamma" in state else None,
        mask_token="mask_token" in state,
        pos_embed_resize="antialias" if registers else "offset")


def is_resnet50(state: dict) -> bool:
    """The one convnet that was released; others are known by the config.json of their run."""
    # The last block tells: ResNet-18 has no layer4.2, and in the wide ResNet-50 it has 1024
    # channels. ResNet-101 differs by its longer third stage, which goes on to layer3.22.
    last = state.get("layer4.2.conv2.weight")
    return last is not None and last.shape[0] == 512 and "layer3.6.conv1.weight" not in state


def written_down(options: dict, config: dict) -> dict:
    """What a run's config.json knows better than its tensors: it cannot be read off them.

    options: of `architecture`; config: RUN_FIELDS. The rule for positions, a feed-forward layer
    that somebody has added to vit.FFNS, and the number of heads where they are not 64 wide.
    """
    better = {"pos_embed_resize": config["pos_embed_resize"]}
    # The tensors of SwiGLU have names of their own; all others are taken for those of the MLP.
    if options["ffn_layer"] == "mlp" and config["ffn_layer"] not in ("", "swiglu"):
        better["ffn_layer"] = config["ffn_layer"]
    arch = ARCHS.get(config["arch"], {})
    if (arch.get("embed_dim"), arch.get("depth")) == (options["embed_dim"], options["depth"]):
        better["num_heads"] = arch["num_heads"]
    return better


def load_backbone(what: str | Path,
                  checkpoint_key: str = "teacher") -> VisionTransformer | ConvNet:
    """The network with its weights, in eval mode.

    what: a name of RELEASED, a URL, a file of any of LAYOUTS, or a run directory of ours;
    checkpoint_key: teacher or student, where a training has left both. The network's `pixels`
    say what images it wants: channels, mean, spread. ValueError names the first four tensors
    that are missing, left over or of another shape.
    """
    state, config = read_backbone(what, checkpoint_key)
    if config.get("arch") in CONVNETS or is_resnet50(state):
        model = ConvNet(config.get("arch", "resnet50"), config.get("global_crops_size", 224))
    else:
        options = architecture(state)
        if config:
            options |= written_down(options, config)
        model = VisionTransformer(**options)
    load_strictly(model, state, str(what))
    model.pixels = pixels_of(getattr(model, "in_chans", 3), config.get("mean", ()),
                             config.get("std", ()))
    return model.eval()


def untrained(name: str) -> VisionTransformer | ConvNet:
    """The network of a released name, with random weights."""
    if name == "dino_resnet50":
        return ConvNet("resnet50")

    # dinov2_vits14_reg is the family dinov2, the size s and patches of 14 pixels.
    family, size, patch = re.match(r"(dino|dinov2)_vit(.)(\d+)", name).groups()
    arch = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}[size]
    if family == "dino":
        return VisionTransformer(224, int(patch), **ARCHS[arch])

    # DINOv2 has LayerScale and a mask token, and its last stage was trained at 518 pixels. The
    # networks with four registers came later and resample positions by another rule. Only the
    # largest network has SwiGLU.
    registers = name.endswith("_reg")
    return VisionTransformer(518, int(patch), layerscale=1.0, mask_token=True,
                             num_register_tokens=4 * registers,
                             pos_embed_resize="antialias" if registers else "offset",
                             ffn_layer="swiglu" if size == "g" else "mlp", **ARCHS[arch])


def load_strictly(model: torch.nn.Module, state: dict[str, Tensor], source: str):
    """model.load_state_dict(state), with an error message that can be read.

    ValueError names the first four tensors that are missing, unexpected or misshapen. PyTorch's
    own message lists all of them, which may be hundreds of lines. source: what the message
    calls the weights.
    """
    expected = model.state_dict()
    trouble = [f"missing {key}" for key in expected if key not in state]
    trouble += [f"unexpected {key}" for key in state if key not in expected]
    for key, tensor in expected.items():
        if key in state and state[key].shape != tensor.shape:
            shape = tuple(state[key].shape)
            trouble.append(f"{key} is {shape}, expected {tuple(tensor.shape)}")
    if trouble:
        more = f" and {len(trouble) - 4} more" if len(trouble) > 4 else ""
        raise ValueError(f"{source} does not fit the network: {'; '.join(trouble[:4])}{more}")
    model.load_state_dict(state)
