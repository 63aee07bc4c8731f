"""Weights: any DINO or DINOv2 backbone, by name or file, as the right network; strictly.

    dinov2_vits14_reg --> URL --> cache --+
    a URL, a file, a run of ours, --------+--> tensors --> official keys --> ViT or convnet
    a directory of Hugging Face                            (layouts.py)    (as the shapes say)

Idea     The architecture can be read off the shapes of the tensors, so nobody has to repeat it
         in flags; the little that leaves no trace there is read from a config.json, where there
         is one. Loading is strict: every tensor of the file must have its place in the
         network, and every place its tensor. A wrong prefix or a wrong flag is an error, and
         never a network that is left with random weights.
Paper    none; the released backbones of DINO and DINOv2
Try      python -m backbones                          the released models
         python -m backbones RUN_OR_FILE_OR_NAME      what is in it
Change   another released backbone is one line in RELEASED
Tests    pytest tests/backbones/test_weights.py
"""

import hashlib
import http.client
import json
import math
import os
import pickle
import re
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

from augment import channel_stats_of
from backbones.convnet import CONVNETS, ConvNet
from backbones.layouts import LAYOUTS, read_about, read_tensors
from machinery.flags import UsageError, did_you_mean, near_path
from vit import ARCHS, FFNS, VisionTransformer

# ----------------------------------------------------------------------------------------------
# What Meta released: name -> (file, k-NN accuracy, linear accuracy)
#
# Accuracies are top-1 on ImageNet in per cent, as the READMEs of Meta's repositories publish
# them. dinov2_vits14_reg means: DINOv2, a small ViT, patches of 14 pixels, four registers. The
# file names of the first DINO models say "deit", as their ViTs were called at first. A name
# begins as these do: `untrained` reads the architecture off it.

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

# Further names: what Hugging Face and older programs call the same weights, and two files that
# Meta's programs for retrieval and for pictures use and whose accuracies were not published.
ALIASES = {
    "dino_deits16": "dino_vits16", "dino_deits8": "dino_vits8",
    "facebook/dino-vits16": "dino_vits16", "facebook/dino-vits8": "dino_vits8",
    "facebook/dino-vitb16": "dino_vitb16", "facebook/dino-vitb8": "dino_vitb8",
    "facebook/dinov2-small": "dinov2_vits14", "facebook/dinov2-base": "dinov2_vitb14",
    "facebook/dinov2-large": "dinov2_vitl14", "facebook/dinov2-giant": "dinov2_vitg14",
    "facebook/dinov2-with-registers-small": "dinov2_vits14_reg",
    "facebook/dinov2-with-registers-base": "dinov2_vitb14_reg",
    "facebook/dinov2-with-registers-large": "dinov2_vitl14_reg",
    "facebook/dinov2-with-registers-giant": "dinov2_vitg14_reg",
    "dino_vits16_landmarks": BASE_URL + "dino/dino_vitsmall16_googlelandmark_pretrain/"
    "dino_vitsmall16_googlelandmark_pretrain.pth",
    "dino_vits8_300ep": BASE_URL + "dino/dino_deitsmall8_300ep_pretrain/"
    "dino_deitsmall8_300ep_pretrain.pth"}


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
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        unfinished.unlink(missing_ok=True)
        raise ValueError(f"--weights: {url} cannot be fetched ({error}); download it by hand "
                         f"and put it at {path}") from None
    os.replace(unfinished, path)
    return path


# ----------------------------------------------------------------------------------------------
# From a name or a file to tensors with official names

# What a directory of Hugging Face calls the file with the weights.
HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
            "pytorch_model.bin.index.json")


def weights_file(what: str | Path) -> Path:
    """The file behind a name, a URL, a file, or the directory of a run or of Hugging Face.

    A released name comes first: a file of the same name has to be written ./dino_vits16.
    """
    name = ALIASES.get(str(what), str(what))
    if name in RELEASED:
        path = fetch(BASE_URL + RELEASED[name][0])
    elif re.match(r"https?://", name):
        path = fetch(name)
    else:
        path = Path(name).expanduser()

    if not path.exists():
        hint = did_you_mean(name, [*RELEASED, *ALIASES]) or near_path(path)
        raise ValueError(f"--weights {name}: there is no such file or run directory, and no "
                         f"released model of that name ({', '.join(RELEASED)}){hint}")
    if not path.is_dir():
        return path

    # Of a run, the teacher: an average of the student's past weights, and better than it.
    for file in ("teacher.pt", *HF_FILES):
        if (path / file).exists():
            return path / file
    raise ValueError(
        f"--weights {path}: no teacher.pt in it, as in the directory of a run, and none of "
        f"Hugging Face's files ({', '.join(HF_FILES)})")


def run_config_file(file: Path) -> Path | None:
    """config.json of the run to which a teacher.pt or a snapshot belongs; None for other files.

    A snapshot of a run is RUN/snapshots/step-N.pt (training/snapshots.py).
    """
    if file.parent.name == "snapshots":
        config = file.parent.parent / "config.json"
    elif file.name == "teacher.pt":
        config = file.parent / "config.json"
    else:
        return None
    return config if config.exists() else None


# What a network needs beside its tensors, out of a run's config.json: name -> default, for runs
# of a time when the field did not exist. (training/config.py has all fields; this room does not
# import it, so that a network can be loaded without the code of training.)
RUN_FIELDS = {
    "arch": "vit_small", "global_crops_size": 224, "pos_embed_resize": "offset",
    "ffn_layer": "", "mean": [], "std": []}
# Beside these, what the tensors say as well, in order to see whether the two belong together.
ALSO_IN_TENSORS = ("patch_size", "in_chans", "num_register_tokens", "embed_dim", "depth")


def read_json(file: Path) -> dict:
    """The object in a JSON file; ValueError for anything else."""
    try:
        content = json.loads(file.read_text())
        if type(content) is not dict:
            raise ValueError("expected an object")
    # A RecursionError comes from brackets that are nested too deep.
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    return content


def check_types(file: Path, fields: dict, defaults: dict):
    """ValueError unless each field has the type of its default; lists hold numbers only."""
    # The types are compared exactly, because True would pass for an integer otherwise.
    for name, value in fields.items():
        numbers = type(value) is not list or all(type(x) in (int, float) for x in value)
        if type(value) is not type(defaults[name]) or not numbers:
            raise ValueError(f"{file}: {name} is {value!r:.40}")


def read_run_fields(file: Path) -> dict:
    """RUN_FIELDS and ALSO_IN_TENSORS as a run's config.json has them.

    ValueError for a file that is no config.json of a run: not JSON, without a global_batch,
    which every run records, or with a field of another type.
    """
    stored = read_json(file)
    if type(stored.get("global_batch")) is not int:
        raise ValueError(f"{file}: not the config.json of a run, which knows its global_batch")
    defaults = RUN_FIELDS | dict.fromkeys(ALSO_IN_TENSORS, 1)
    fields = {name: stored[name] for name in defaults if name in stored}
    check_types(file, fields, defaults)
    return RUN_FIELDS | fields


# Kinds of networks in a config.json of Hugging Face that are ours, too, and the names there of
# arguments of VisionTransformer, each with an example of its type.
HF_KINDS = ("vit", "dinov2", "dinov2_with_registers")
HF_FIELDS = {
    "num_attention_heads": ("num_heads", 6), "layer_norm_eps": ("norm_eps", 1e-6),
    "patch_size": ("patch_size", 14), "num_channels": ("in_chans", 3),
    "num_register_tokens": ("num_register_tokens", 4), "hidden_size": ("embed_dim", 384),
    "num_hidden_layers": ("depth", 12)}


def read_hf_fields(file: Path) -> dict:
    """What a config.json of Hugging Face says of a network, as arguments of VisionTransformer.

    ValueError for a network of another kind. Where there is a preprocessor_config.json, also
    `mean` and `std`. That of timm, which names no model_type, says `mean` and `std` alone.
    """
    stored = read_json(file)
    if "model_type" not in stored:
        normalised_by = stored.get("pretrained_cfg", {})
        check_types(file, {"pretrained_cfg": normalised_by}, {"pretrained_cfg": {}})
        options = {
            name: normalised_by[name]
            for name in ("mean", "std") if name in normalised_by}
        check_types(file, options, {"mean": [], "std": []})
        return options
    if stored["model_type"] not in HF_KINDS or stored.get("hidden_act", "gelu") != "gelu":
        raise ValueError(
            f"{file}: model_type {stored['model_type']!r:.40} with hidden_act "
            f"{stored.get('hidden_act')!r:.40}; expected {', '.join(HF_KINDS)} with 'gelu'")
    fields = {name: stored[name] for name in HF_FIELDS if name in stored}
    check_types(file, fields, {name: example for name, (_, example) in HF_FIELDS.items()})
    options = {HF_FIELDS[name][0]: value for name, value in fields.items()}

    # How images are normalised stands in a file of its own.
    images_file = file.with_name("preprocessor_config.json")
    if images_file.exists():
        stored = read_json(images_file)
        pixels = {name: stored.get(f"image_{name}", []) for name in ("mean", "std")}
        check_types(images_file, pixels, {"mean": [], "std": []})
        options |= pixels
    return options


# What export.py writes beside the tensors into a .safetensors file, each with an example of its
# type; the names are those of read_hf_fields.
KEPT_FIELDS = {
    "pos_embed_resize": "offset", "norm_eps": 1e-6, "num_heads": 6, "ffn_layer": "mlp",
    "arch": "resnet18", "global_crops_size": 224, "mean": [], "std": []}


def read_kept_fields(file: Path) -> dict:
    """KEPT_FIELDS as a .safetensors file has them; {} for one that was not exported by us."""
    stored = read_about(file)
    fields = {name: stored[name] for name in KEPT_FIELDS if name in stored}
    check_types(file, fields, KEPT_FIELDS)
    return fields


def student_of(file: Path, state: dict) -> dict:
    """The student's tensors of a training; UsageError if they were not kept.

    file: where its teacher is. Of a run of ours the student is in the newest checkpoint beside
    it; of other trainings in the file itself, whose content is `state`.
    """
    if run_config_file(file) is None:
        if not isinstance(state, dict) or not isinstance(state.get("student"), dict):
            raise UsageError(f"--checkpoint_key student: {file} holds one network only")
        return state["student"]

    # Imported here, because hardly anybody asks for a student. The index of the checkpoint says
    # which tensors there are: student.backbone.cls_token, ...
    from machinery.checkpoints import Reader, find_checkpoint, load_checkpoint
    from machinery.process import Process

    alone = Process(torch.device("cpu"))
    checkpoint = find_checkpoint(file.parent / "checkpoint", alone)
    if checkpoint is None:
        raise UsageError(f"--checkpoint_key student: {file.parent} has no checkpoint")
    tensors = {}
    for name, about in Reader(checkpoint[0]).read_metadata().state_dict_metadata.items():
        if name.startswith("student."):
            tensors[name] = torch.empty(about.size, dtype=about.properties.dtype)
    load_checkpoint(checkpoint[0], tensors, alone)
    return {name.removeprefix("student."): value for name, value in tensors.items()}


def read_backbone(what: str | Path,
                  checkpoint_key: str = "teacher") -> tuple[dict[str, Tensor], dict]:
    """A name, URL, file or directory -> (flat state dict with official keys, what is known).

    What is known beside the tensors: read_run_fields for a run of ours, read_hf_fields for a
    directory of Hugging Face, read_kept_fields for a file that we have exported, {} for anything
    else. All are for `architecture`.
    checkpoint_key: teacher or student, where a training has left both.
    """
    # Of another kind of network the config.json says so more clearly than the tensors.
    file = weights_file(what)
    config = {}
    if config_file := run_config_file(file):
        config = read_run_fields(config_file)
    elif file.name in HF_FILES and (file.parent / "config.json").exists():
        config = read_hf_fields(file.parent / "config.json")

    # Each layout renames what it knows and leaves the rest alone. All are applied, because a
    # file can be of two layouts: DINOv2's training checkpoints (from_training) have their
    # blocks in chunks (from_chunks).
    try:
        state = read_tensors(file)
        if file.suffix == ".safetensors":
            config = read_kept_fields(file) | config
        if checkpoint_key == "student":
            state = student_of(file, state)
        if isinstance(state, dict):
            for layout in LAYOUTS:
                state = layout(state)
    except UsageError:  # of student_of, which says all
        raise
    # torch.load raises different exceptions for different damage, some without any words, and a
    # layout that misses one of its tensors raises KeyError.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        # torch then advises to run the code that may be in such a file; we do not.
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds no tensors, or other Python objects beside them"
        raise ValueError(f"--weights {file}: not a readable weights file ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"--weights {file}: expected a dictionary of tensors, a backbone or a "
                         "checkpoint with one")
    if has_fixed_positions(state):
        raise ValueError(f"--weights {file}: its positions are fixed and not learned, as in a "
                         "masked autoencoder (ViT-MAE), whose class token was never trained; "
                         "expected a network of DINO, iBOT or DINOv2")
    return state, config


def has_fixed_positions(state: dict[str, Tensor]) -> bool:
    """Whether the table of positions is that of ViT-MAE, which is computed and not learned."""
    # The class token has zeros there. The first patch lies in row 0 and column 0, where sines
    # are 0 and cosines are 1: each of its numbers is exactly 0 or 1. Learned ones never are.
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or table.shape[1] < 2:
        return False
    cls, first = table[0, :2]
    return bool(((first == 0) | (first == 1)).all() and not cls.any())


# ----------------------------------------------------------------------------------------------
# From tensors to a network


def architecture(state: dict[str, Tensor], config: dict | None = None,
                 num_heads: int = 0) -> dict:
    """Arguments of VisionTransformer, read off the shapes of the tensors.

    config: what is known beside them (read_backbone). num_heads: 0 if nobody has said it.
    ValueError if they are not those of a ViT. Example, dinov2_vits14:

        tensor                     shape               what it tells
        patch_embed.proj.weight    (384, 3, 14, 14)    embed_dim 384, in_chans 3, patch_size 14
        pos_embed                  (1, 1370, 384)      1 + 37 * 37: img_size 37 * 14 = 518
        blocks.11.norm1.weight     (384,)              the highest number is 11: depth 12
        blocks.0.mlp.fc1.weight    (1536, 384)         mlp_ratio 1536 / 384 = 4, ffn_layer "mlp"
        blocks.0.ls1.gamma         (384,)              it has LayerScale
        mask_token                 (1, 384)            it has a mask token
        register_tokens            is missing          no registers, pos_embed_resize "offset"

    What leaves no trace in the shapes is added by `untraceable`.
    """
    try:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[1]
        blocks = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
        if not blocks or blocks != set(range(len(blocks))):
            raise ValueError("blocks that are numbered from 0")
        if not all(tensor.numel() for tensor in state.values()):
            raise ValueError("a number in one of its tensors")

        # SwiGLU takes two thirds of mlp_ratio * dim and rounds up to a multiple of 8
        # (vit.SwiGLU). So several ratios give the same width: if 4 is one of them, it is 4.
        swiglu = "blocks.0.mlp.w12.weight" in state
        if swiglu:
            hidden = state["blocks.0.mlp.w3.weight"].shape[1]
            usual = (int(dim * 4 * 2 / 3) + 7) // 8 * 8
            mlp_ratio = 4.0 if hidden == usual else 1.5 * hidden / dim
        else:
            mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / dim
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"--weights: not a Vision Transformer of DINO's layout (misses {error}); "
            f"its first keys are {', '.join(list(state)[:3])}") from None

    # Any number will do for layerscale, because the learned factors are loaded afterwards; None
    # would build a network without them.
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    options = dict(
        img_size=math.isqrt(positions - 1) * patch,  # the class token has a position, too
        patch_size=patch,
        in_chans=in_chans,
        embed_dim=dim,
        depth=len(blocks),
        mlp_ratio=mlp_ratio,
        ffn_layer="swiglu" if swiglu else "mlp",
        num_register_tokens=registers,
        layerscale=1.0 if "blocks.0.ls1.gamma" in state else None,
        mask_token="mask_token" in state)
    return options | untraceable(options, config or {}, num_heads)


def untraceable(options: dict, config: dict, num_heads: int) -> dict:
    """The arguments of VisionTransformer that no shape tells: written down, or else the usual.

    options: of `architecture`; the others as there. The number of heads, because the queries of
    all heads are one matrix; the rule for positions; the epsilon of LayerNorm; a feed-forward
    layer that somebody has added to vit.FFNS. ValueError if config contradicts the tensors, or
    if the number of heads cannot be known.
    """
    # A config.json that was written for other tensors would be wrong about the rest, too.
    for name in ALSO_IN_TENSORS:
        if config.get(name, options[name]) != options[name]:
            raise ValueError(f"--weights: config.json has {name} {config[name]!r:.40}, but the "
                             f"tensors have {options[name]}")

    # Of the released networks, those with registers resample positions by "antialias", the
    # others by "offset". All have an epsilon of 1e-6.
    usual_rule = "antialias" if options["num_register_tokens"] else "offset"
    better = {
        "pos_embed_resize": config.get("pos_embed_resize", usual_rule),
        "norm_eps": config.get("norm_eps", 1e-6)}
    if not 0 < better["norm_eps"] < 1:
        raise ValueError(f"--weights: config.json has layer_norm_eps {better['norm_eps']}")
    # The tensors of SwiGLU have names of their own; all others are taken for those of the MLP.
    if options["ffn_layer"] == "mlp" and config.get("ffn_layer", "") not in ("", "swiglu"):
        better["ffn_layer"] = config["ffn_layer"]

    # A run writes down the name of its architecture, Hugging Face the number itself.
    dim = options["embed_dim"]
    known = config.get("num_heads", 0)
    arch = ARCHS.get(config.get("arch"), {})
    if (arch.get("embed_dim"), arch.get("depth")) == (dim, options["depth"]):
        known = arch["num_heads"]
    if known and num_heads and known != num_heads:
        raise ValueError(f"--num_heads {num_heads}: the file or its config.json has {known} "
                         "heads")

    # Without a word of it, heads are 64 wide, as in all networks of DINO and DINOv2.
    heads = known or num_heads or dim // 64
    if not (known or num_heads) and dim % 64:
        raise ValueError(
            f"--weights: heads are 64 wide unless something else is known, but the "
            f"width {dim} is no multiple of 64; evaluate.py, visualize.py and "
            "load_backbone take --num_heads")
    if not 0 < heads <= dim or dim % heads:
        raise ValueError(f"--num_heads {heads}: the width {dim} is no multiple of it")
    return better | {"num_heads": heads}


def ffn_layer_of(model: VisionTransformer) -> str:
    """The name of its feed-forward layer in vit.FFNS; ValueError if it is none of them."""
    # The type tells, and not the tensors: one that somebody has added may have those of the MLP.
    kind = type(model.blocks[0].mlp)
    for name, known in FFNS.items():
        if known is kind:
            return name
    raise ValueError(f"a feed-forward layer {kind.__name__}, expected one of vit.FFNS: "
                     f"{', '.join(FFNS)}")


def is_resnet50(state: dict) -> bool:
    """The one convnet that was released; others are known by the config.json of their run."""
    # The last block tells: ResNet-18 has no layer4.2, and in the wide ResNet-50 it has 1024
    # channels. ResNet-101 differs by its longer third stage, which goes on to layer3.22.
    last = state.get("layer4.2.conv2.weight")
    return last is not None and last.shape[0] == 512 and "layer3.6.conv1.weight" not in state


def load_backbone(what: str | Path, checkpoint_key: str = "teacher",
                  num_heads: int = 0) -> VisionTransformer | ConvNet:
    """The network with its weights, in eval mode.

    what: a name of RELEASED or ALIASES, a URL, a file of any of LAYOUTS, a run directory of
    ours, or a directory of Hugging Face; checkpoint_key: teacher or student, where a training
    has left both. num_heads: for a file that does not say it and whose heads are not 64 wide.
    The network's `channel_stats` say what images it wants: channels, mean, spread. ValueError names
    the first four tensors that are missing, left over or of another shape.
    """
    if checkpoint_key not in ("teacher", "student"):
        raise ValueError(f"--checkpoint_key {checkpoint_key}: choose from teacher, student")
    state, config = read_backbone(what, checkpoint_key)
    if config.get("arch") in CONVNETS or is_resnet50(state):
        model = ConvNet(config.get("arch", "resnet50"), config.get("global_crops_size", 224))
    else:
        model = VisionTransformer(**architecture(state, config, num_heads))
    load_strictly(model, state, str(what))
    return ready(model, config)


def ready(model: VisionTransformer | ConvNet, config: dict) -> VisionTransformer | ConvNet:
    """The network in eval mode, with its `channel_stats`; ValueError if config has others."""
    # Comparisons with NaN are False, so that it is refused like an infinite number.
    channels = getattr(model, "in_chans", 3)
    mean = tuple(config.get("mean", ()))
    std = tuple(config.get("std", ()))
    finite = all(-math.inf < x < math.inf for x in mean) and all(0 < x < math.inf for x in std)
    if not finite or {len(mean), len(std)} - {0, channels}:
        raise ValueError(f"--weights: config.json has mean {mean} and std {std}; expected one "
                         f"number for each of {channels} channels, std above 0")
    model.channel_stats = channel_stats_of(channels, mean, std)
    return model.eval()


def untrained(name: str) -> VisionTransformer | ConvNet:
    """The network of a released name with random weights, otherwise as load_backbone gives it.

    ValueError for a name from which no architecture can be read.
    """
    if ALIASES.get(name) in RELEASED:
        name = ALIASES[name]
    if name == "dino_resnet50":
        return ready(ConvNet("resnet50"), {})

    # dinov2_vits14_reg is the family dinov2, the size s and patches of 14 pixels.
    match = re.match(r"(dino|dinov2)_vit([sblg])([1-9]\d?)(?!\d)", name)
    if not match:
        raise ValueError(f"{name}: expected a name that begins as dino_vits16, dinov2_vitb14")
    family, size, patch = match.groups()
    arch = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}[size]
    if family == "dino":
        return ready(VisionTransformer(224, int(patch), **ARCHS[arch]), {})

    # DINOv2 has LayerScale and a mask token, and its last stage was trained at 518 pixels. The
    # networks with four registers came later and resample positions by another rule. Only the
    # largest network has SwiGLU.
    registers = name.endswith("_reg")
    model = VisionTransformer(518, int(patch), layerscale=1.0, mask_token=True,
                              num_register_tokens=4 * registers,
                              pos_embed_resize="antialias" if registers else "offset",
                              ffn_layer="swiglu" if size == "g" else "mlp", **ARCHS[arch])
    return ready(model, {})


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
