"""Layouts: how others store and name the tensors of a backbone, and what we call them.

    .pth .pt .safetensors --> a flat dictionary of tensors --> LAYOUTS, one after the other
                                                                  |
            Hugging Face  <-- to_hf --  official keys: blocks.0.attn.qkv.weight, ...

Idea     Each function renames what it knows and leaves the rest alone, so that a file may be of
         any of these layouts, or of two at once, and nobody has to say of which.
Paper    none; the keys are those of DINO's and DINOv2's released backbones
Try      python -m backbones export RUN --to hf --output backbone.safetensors
Change   another layout is one function on a flat dictionary, and one line in LAYOUTS
Tests    pytest tests/backbones/test_layouts.py
"""

import argparse
import json
import math
import re
import struct
from pathlib import Path

import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------
# Files of tensors

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Length of the header (8 bytes), header (JSON: name -> dtype, shape, place), raw
    tensors.
    """
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
        raw = (torch.frombuffer(data, dtype=dtype, count=count, offset=first)
               if count else torch.empty(0, dtype=dtype))
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


# ----------------------------------------------------------------------------------------------
# Layouts: each function changes what it knows and leaves the rest


def from_training(state: dict) -> dict:
    """Checkpoints of training: the teacher's backbone in them, prefixes off, heads left out.

    DINO and iBOT write {"teacher": .., "student": ..}, DINOv2 {"teacher": ..}; DDP adds
    "module.".
    """
    for key in ("teacher", "model", "state_dict", "student"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    state = {key.replace("module.", ""): value for key, value in state.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value
            for key, value in state.items() if key.startswith("backbone.")}
    return state


def from_chunks(state: dict) -> dict:
    """DINOv2 trains in chunks: blocks.CHUNK.BLOCK.*; the second number counts through."""
    return {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value
        for key, value in state.items()}


def from_ibot(state: dict) -> dict:
    """iBOT calls the mask token masked_embed."""
    return {
        "mask_token" if key == "masked_embed" else key: value
        for key, value in state.items()}


HF = [  # Hugging Face's names of DINO, DINOv2 and DINOv2 with registers -> official names
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""), (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."), (r"\.attention\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."), (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."), (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm.")]


def from_hf(state: dict) -> dict:
    """Hugging Face: other names; query, key and value apart; a pooler that DINO never
    trained.
    """
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
    state = {
        "register_tokens" if key == "reg_token" else key: value
        for key, value in state.items()}
    first, second = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if first is not None and second is not None and len(first) == 2 * second.shape[1]:
        state = {
            key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
            for key, value in state.items()}
    positions = state.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1])**2 == positions.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
    return state


LAYOUTS = (from_training, from_chunks, from_ibot, from_hf, from_timm)

# ----------------------------------------------------------------------------------------------
# The way out


def to_hf(state: dict) -> dict:
    """Official names -> Hugging Face's of DINOv2 (with or without registers): the tensors
    alone.

    ValueError for anything but a Vision Transformer: that layout has no names for other
    networks.
    """
    if "cls_token" not in state:
        raise ValueError(
            "--to hf: expected a Vision Transformer; the first of these tensors are "
            f"{', '.join(list(state)[:3])}")
    back = [(r"^pos_embed$", "embeddings.position_embeddings"),
            (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
            (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
            (r"^blocks\.", "encoder.layer."), (r"\.attn\.proj\.", ".attention.output.dense."),
            (r"\.mlp\.w12\.", ".mlp.weights_in."), (r"\.mlp\.w3\.", ".mlp.weights_out."),
            (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"), (r"^norm\.", "layernorm.")]
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
