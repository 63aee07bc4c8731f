"""Weights: any DINO or DINOv2 backbone, by name or file, as the right network; strictly.

    dinov2_vits14_reg --> URL --> cache --+
    a URL, a file, a run of ours ---------+--> tensors --> official keys --> ViT or ResNet
           (.pth, .pt, .safetensors)                       (LAYOUTS)     (as the shapes say)

Idea     The architecture can be read off the tensors, so nobody has to repeat it in flags, and
         nobody gets random weights because a flag was wrong: every tensor must find its place.
Paper    none; keys are those of the released DINO and DINOv2 backbones
Try      python weights.py                          the released models
         python weights.py RUN_OR_FILE_OR_NAME      what is in it
         python weights.py export RUN --to hf --output backbone.safetensors
Change   another layout is one function on a flat dictionary, and one line in LAYOUTS
Tests    pytest tests/test_weights.py
"""

import argparse
import hashlib
import json
import math
import os
import re
import struct
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import runtime
from augment import pixels_of
from recipes import read_config
from resnet import NAMES, ConvNet
from vit import ARCHS, VisionTransformer

# ------------------------------------------------------------------------------------------------
# What Meta released: name -> file, and the k-NN and linear accuracy on ImageNet of its README

_BASE = "https://dl.fbaipublicfiles.com/"
RELEASED = {
    "dino_vits16": ("dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", 74.5, 77.0),
    "dino_vits8": ("dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", 78.3, 79.7),
    "dino_vitb16": ("dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", 76.1, 78.2),
    "dino_vitb8": ("dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", 77.4, 80.1),
    "dino_resnet50": ("dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth", 67.5, 75.3),
}
for _size, _knn, _linear, _knn_reg, _linear_reg in (
        ("s", 79.0, 81.1, 79.1, 80.9), ("b", 82.1, 84.5, 82.0, 84.6),
        ("l", 83.5, 86.3, 83.8, 86.7), ("g", 83.5, 86.5, 83.7, 87.1)):
    _file = f"dinov2/dinov2_vit{_size}14/dinov2_vit{_size}14_"
    RELEASED[f"dinov2_vit{_size}14"] = (_file + "pretrain.pth", _knn, _linear)
    RELEASED[f"dinov2_vit{_size}14_reg"] = (_file + "reg4_pretrain.pth", _knn_reg, _linear_reg)


def fetch(url: str) -> Path:
    """The file behind a URL, from torch.hub's cache, or downloaded into it with a progress bar.

    It appears in the cache when it is whole, and not before.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(urllib.parse.urlparse(url).path).name
    if not url.startswith(_BASE):  # many files of the world are called model.safetensors
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
            raise ValueError(f"--weights: {url} cannot be fetched ({error}); download it by hand "
                             f"and put it at {path}") from None
        os.replace(aside, path)
    return path


def read_head(what: str | Path, layers: int = 4) -> dict:
    """A linear classifier from a file; or NAME_lc, the one that came with the backbone NAME (of
    DINOv2: on the last `layers` blocks, 1 or 4). probes.released_head tells what it reads.
    """
    name = str(what).removesuffix("_lc")
    if name == str(what) or name not in RELEASED:
        return read_tensors(Path(what).expanduser())
    ending = "_linearweights.pth"
    if name.startswith("dinov2"):
        if layers not in (1, 4):
            raise ValueError(f"layers = {layers}: the classifiers of {name} read 1 or 4 blocks")
        ending = f"_linear{'4' * (layers == 4)}_head.pth"
    return read_tensors(fetch(_BASE + RELEASED[name][0].removesuffix("_pretrain.pth") + ending))


# ------------------------------------------------------------------------------------------------
# Files of tensors

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Length of the header (8 bytes), header (JSON: name -> dtype, shape, place), raw tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if length > size - 8:
            raise ValueError(f"its header claims {length:,d} bytes of a file of {size:,d}")
        header = json.loads(file.read(length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    out = {}
    for name, about in header.items():
        (first, last), shape = about["data_offsets"], about["shape"]
        dtype = _DTYPES[about["dtype"]]
        count = math.prod(shape)
        if not 0 <= first <= last <= len(data) or last - first != count * dtype.itemsize:
            raise ValueError(f"the place of {name} does not fit its shape and the file")
        raw = torch.frombuffer(data, dtype=dtype, count=count, offset=first) if count else \
            torch.empty(0, dtype=dtype)
        out[name] = raw.reshape(shape).clone()
    return out


def write_safetensors(path: Path, state: dict[str, Tensor]):
    """The same, written: what other libraries read without unpickling anything."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.itemsize
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[place, place + size])
        place += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor in state.values():
            flat = tensor.detach().cpu().contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().tobytes())


def read_tensors(path: Path) -> dict:
    """Whatever is in the file, read without running any code that may be in it."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    # Full checkpoints of DINO hold the parsed flags: that one type beside tensors is harmless.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------------
# Layouts: how others call the same tensors. Each function changes what it knows and leaves the rest


def from_training(state: dict) -> dict:
    """Checkpoints of training: the teacher's backbone in them, prefixes off, heads left out.

    DINO and iBOT write {"teacher": .., "student": ..}, DINOv2 {"teacher": ..}; DDP adds "module.".
    """
    for key in ("teacher", "model", "state_dict", "student"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    state = {key.replace("module.", ""): value for key, value in state.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): value for key, value in state.items()
                 if key.startswith("backbone.")}
    return state


def from_chunks(state: dict) -> dict:
    """DINOv2 trains in chunks: blocks.CHUNK.BLOCK.*; the second number counts through."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value
            for key, value in state.items()}


def from_ibot(state: dict) -> dict:
    """iBOT calls the mask token masked_embed."""
    return {"mask_token" if key == "masked_embed" else key: value for key, value in state.items()}


HF = [  # Hugging Face's names of DINO, DINOv2 and DINOv2 with registers -> official names
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."), (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]


def from_hf(state: dict) -> dict:
    """Hugging Face: other names; query, key and value apart; a pooler that DINO never trained."""
    if not any(key.endswith("embeddings.position_embeddings") for key in state):
        return state
    out = {}
    for key, value in state.items():
        for pattern, name in HF:
            key = re.sub(pattern, name, key)
        if not key.startswith(("pooler.", "classifier.")):
            out[key] = value
    for key in [key for key in out if ".attn.query." in key]:
        parts = [out.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        out[key.replace("query", "qkv")] = torch.cat(parts)
    return out


def from_timm(state: dict) -> dict:
    """timm: reg_token; SwiGLU's w12 and w3 as fc1 and fc2.

    With registers, the class token has its position added already, and pos_embed lacks it.
    """
    state = {"register_tokens" if key == "reg_token" else key: value
             for key, value in state.items()}
    first, second = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if first is not None and second is not None and len(first) == 2 * second.shape[1]:
        state = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
                 for key, value in state.items()}
    positions = state.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
    return state


LAYOUTS = (from_training, from_chunks, from_ibot, from_hf, from_timm)


def to_hf(state: dict) -> dict:
    """Official names -> Hugging Face's of DINOv2 (with or without registers): the tensors alone."""
    back = [
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
        (r"^blocks\.", "encoder.layer."), (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.w12\.", ".mlp.weights_in."), (r"\.mlp\.w3\.", ".mlp.weights_out."),
        (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"), (r"^norm\.", "layernorm."),
    ]
    out = {}
    for key, value in state.items():
        for pattern, name in back:
            key = re.sub(pattern, name, key)
        if ".attn.qkv." in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                out[key.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            out[key] = value
    width = state["cls_token"].shape[-1]
    if "embeddings.mask_token" not in out:
        out["embeddings.mask_token"] = torch.zeros(1, width)
    for i in range(len({k.split(".")[2] for k in out if k.startswith("encoder.")})):
        for branch in (1, 2):  # that layout always has LayerScale: 1 changes nothing
            out.setdefault(f"encoder.layer.{i}.layer_scale{branch}.lambda1", torch.ones(width))
    return out


# ------------------------------------------------------------------------------------------------
# From any of these to a network


def read_backbone(what: str | Path) -> tuple[dict[str, Tensor], dict]:
    """A released name, URL, file or run -> (flat state dict with official keys, the run's config).

    The config is what config.json of a run of ours says, {} for anything else.
    """
    name = str(what)
    if name in RELEASED:
        path = fetch(_BASE + RELEASED[name][0])
    elif re.match(r"https?://", name):
        path = fetch(name)
    else:
        path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"--weights {name}: there is no such file or run directory, and no "
                         f"released model of that name ({', '.join(RELEASED)})")
    folder = path if path.is_dir() else path.parent
    file = path / "teacher.pt" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"--weights {path}: no teacher.pt in it; is it the directory of a run?")
    try:
        state = read_tensors(file)
    except Exception as error:  # torch names no single kind
        raise ValueError(f"--weights {file}: not a readable weights file "
                         f"({str(error).splitlines()[0]})") from None
    if isinstance(state, dict):
        for layout in LAYOUTS:
            state = layout(state)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"--weights {file}: expected a dictionary of tensors, a backbone or a "
                         "checkpoint with one")
    config = folder / "config.json"
    ours = file.name == "teacher.pt" and config.exists()
    return state, read_config(config) if ours else {}


def architecture(state: dict[str, Tensor]) -> dict:
    """Arguments of VisionTransformer, read off the tensors. Heads are 64 wide in all we know."""
    try:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[1]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        swiglu = "blocks.0.mlp.w12.weight" in state
        hidden = dim * 4 if swiglu else state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"--weights: not a Vision Transformer of DINO's layout (misses {error}); "
                         f"its first keys are {', '.join(list(state)[:3])}") from None
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    return dict(
        img_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        in_chans=in_chans,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // 64,
        mlp_ratio=hidden / dim,  # SwiGLU's is 4 in every known network, its width by the 2/3 rule
        ffn_layer="swiglu" if swiglu else "mlp",
        num_register_tokens=registers,
        layerscale=1.0 if "blocks.0.ls1.gamma" in state else None,
        mask_token="mask_token" in state,
        pos_embed_resize="antialias" if registers else "offset",
    )


def settings(what: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a backbone, and what of recipes.Config builds it again.

    All that its config.json says for a run of ours; else what can be read off the tensors.
    """
    state, stored = read_backbone(what)
    if stored:
        return state, stored
    if is_resnet50(state):
        return state, dict(arch="resnet50")
    found = architecture(state)
    same = [name for name, arch in ARCHS.items()
            if (arch["embed_dim"], arch["depth"]) == (found["embed_dim"], found["depth"])]
    if not same:
        raise ValueError(f"--init {what}: a ViT {found['embed_dim']} wide and {found['depth']} "
                         "deep is none of vit.ARCHS")
    known = ("in_chans", "patch_size", "ffn_layer", "num_register_tokens", "pos_embed_resize")
    return state, dict({name: found[name] for name in known}, arch=same[0],
                       layerscale=1e-5 if found["layerscale"] else 0.0)


def is_resnet50(state: dict) -> bool:
    """The one convnet that was released; others are known by the config.json of their run."""
    wide = state.get("layer4.2.conv2.weight")
    return wide is not None and wide.shape[0] == 512 and "layer3.6.conv1.weight" not in state


def load_backbone(what: str | Path) -> VisionTransformer | ConvNet:
    """The network with its weights, in eval mode. ValueError with the difference if one is left.

    Its `pixels` say what images it wants: channels, mean, spread.
    what: a name of RELEASED, a URL, a file of any of LAYOUTS, or a run directory of ours.
    """
    state, config = read_backbone(what)
    if config.get("arch") in NAMES or is_resnet50(state):
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
    return VisionTransformer(
        518, int(patch), layerscale=1.0, mask_token=True, num_register_tokens=4 * registers,
        pos_embed_resize="antialias" if registers else "offset",
        ffn_layer="swiglu" if size == "g" else "mlp", **ARCHS[arch])


def released_table() -> str:
    """What `python weights.py` prints and docs/models.md shows."""
    lines = ["| name | width | parameters | positions for | k-NN | linear |",
             "|---|---|---|---|---|---|"]
    with torch.device("meta"):  # shapes without memory
        for name, (_, knn, linear) in RELEASED.items():
            model = untrained(name)
            count = sum(p.numel() for p in model.parameters())
            lines.append(f"| `{name}` | {model.embed_dim} | {count:,d} | {model.img_size} px | "
                         f"{knn:.1f} | {linear:.1f} |")
    return "\n".join(lines)


def load_strictly(model: torch.nn.Module, state: dict[str, Tensor], source: str):
    """load_state_dict whose complaint can be read: missing, unexpected and misshapen tensors."""
    have = model.state_dict()
    trouble = [f"missing {key}" for key in have if key not in state]
    trouble += [f"unexpected {key}" for key in state if key not in have]
    trouble += [f"{key} is {tuple(state[key].shape)}, expected {tuple(have[key].shape)}"
                for key in have if key in state and state[key].shape != have[key].shape]
    if trouble:
        more = f" and {len(trouble) - 4} more" if len(trouble) > 4 else ""
        raise ValueError(f"{source} does not fit the network: {'; '.join(trouble[:4])}{more}")
    model.load_state_dict(state)


# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    # -- export
    to: Literal["official", "hf"] = "official"  # names of tensors: Meta's code, or Hugging Face
    output: str = "backbone.safetensors"  # the file; .pth for torch.load


@runtime.command
def main(argv):
    """export WHAT --to .. --output ..; or tell what is in each argument; or list the released."""
    with runtime.usage():
        exporting = argv[:1] == ["export"]
        if any(word.startswith("-") for word in argv[:2]) or argv == ["export"]:
            raise ValueError("usage: python weights.py [WHAT ...] | "
                             "export WHAT [--to official|hf] [--output FILE]")
        if exporting:
            config = runtime.parse(Config, argv[2:])
            state, _ = read_backbone(argv[1])
            if config.to == "hf":
                architecture(state)  # which refuses what is no ViT
                state = to_hf(state)
            path = Path(config.output)
            if not path.parent.is_dir():
                raise ValueError(f"--output {path}: there is no folder {path.parent}")
            write = write_safetensors if path.suffix == ".safetensors" else runtime.save
            write(path, state)
            print(f"wrote {path}: {len(state)} tensors")
            return path
        for what in argv:
            model = load_backbone(what)
            print(f"{what}: {type(model).__name__}, width {model.embed_dim}, {model.img_size} px, "
                  f"{sum(p.numel() for p in model.parameters()):,d} parameters")
            if isinstance(model, VisionTransformer):
                print("   ", ", ".join(f"{k} {v}" for k, v in
                                       architecture(model.state_dict()).items()))
    if not argv:
        print(released_table())


if __name__ == "__main__":
    main()
