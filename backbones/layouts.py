"""Layouts: how others store and name the tensors of a backbone, and what we call them.

    .pth .pt .safetensors --> a flat dictionary of tensors --> LAYOUTS, one after the other
                                                                  |
            Hugging Face  <-- to_hf --  official keys: blocks.0.attn.qkv.weight, ...

Idea     Each function renames what it knows and leaves the rest alone. So a file may be of any
         of these layouts, or of two at once, and nobody has to say of which.
Paper    none; the keys are those of DINO's and DINOv2's released backbones
Try      python -m backbones export RUN --to hf --output FOLDER
Change   another layout is one function on a flat dictionary, and one line in LAYOUTS
Tests    pytest tests/backbones/test_layouts.py
"""

import argparse
import hashlib
import json
import math
import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------
# Files of tensors
#
# A .pth file is a pickle in a zip archive. A .safetensors file has no code in it: a length, a
# header in JSON, and then the bytes of all tensors, end to end. Example: two tensors of 384
# floats, norm.weight and norm.bias:
#
#     8 bytes      192, the length of the header (little-endian)
#     192 bytes    {"__metadata__": {"format": "pt"},
#                   "norm.weight": {"dtype": "F32", "shape": [384], "data_offsets": [0, 1536]},
#                   "norm.bias": {"dtype": "F32", "shape": [384], "data_offsets": [1536, 3072]}}
#     3072 bytes   the numbers; data_offsets count from here
#
# The format has no checksum. So we add one of the numbers to the __metadata__ of what we write,
# under the name that stands in CHECKSUM. Under the name in NETWORK stands, as JSON, what no
# tensor says of the network. Other programs ignore both, and files without them are read as
# well.

CHECKSUM = "sha256_of_the_numbers"
NETWORK = "what_no_tensor_says"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def without_duplicates(pairs: list[tuple]) -> dict:
    """The dictionary of a JSON object; ValueError if a name occurs twice in it."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("its header has a name twice")
    return content


def read_header(file: BinaryIO, size: int) -> dict:
    """The header of a .safetensors file of `size` bytes, which is read up to the numbers."""
    # A header that claims terabytes must not make us ask for as much memory.
    length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
    if length > size - 8:
        raise ValueError(f"its header claims {length:,d} bytes of a file of {size:,d}")
    return json.loads(file.read(length), object_pairs_hook=without_duplicates)


def read_about(path: Path) -> dict:
    """What a .safetensors file says of its network beside the tensors; {} for most files."""
    with open(path, "rb") as file:
        metadata = read_header(file, path.stat().st_size).get("__metadata__", {})
    return json.loads(metadata.get(NETWORK, "{}"))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, by name. ValueError if the header does not fit."""
    with open(path, "rb") as file:
        header = read_header(file, path.stat().st_size)
        data = bytearray(file.read())
    metadata = header.pop("__metadata__", {})

    # In the order of their places, where each tensor has to begin where the one before it ends.
    tensors = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        shape = entry["shape"]
        dtype = _DTYPES[entry["dtype"]]

        # Type and shape give the size of a tensor, and so does its place. Where they disagree,
        # or the place lies beyond the end, the file is damaged.
        count = math.prod(shape)
        if not 0 <= first <= last <= len(data) or last - first != count * dtype.itemsize:
            raise ValueError(f"the place of {name} does not fit its shape and the file")
        if first != end:
            raise ValueError(f"{name} begins at byte {first}, but the tensor before it ends at "
                             f"{end}")
        end = last

        # A copy of its own for each tensor, so that one of them alone does not keep the bytes
        # of all in memory. torch.frombuffer refuses to read nothing.
        raw = torch.empty(0, dtype=dtype)
        if count:
            raw = torch.frombuffer(data, dtype=dtype, count=count, offset=first)
        tensors[name] = raw.reshape(shape).clone()
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes at its end belong to no tensor")
    if CHECKSUM in metadata and metadata[CHECKSUM] != hashlib.sha256(data).hexdigest():
        raise ValueError("its numbers do not match its checksum")
    return tensors


def bytes_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they lie in a file."""
    # Viewed as bytes first, because numpy has no bfloat16.
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def write_safetensors(path: Path, state: dict[str, Tensor], about: dict | None = None):
    """The same, written: what other libraries read without unpickling anything.

    about: what no tensor says of the network, for read_about.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header = {}
    place = 0
    digest = hashlib.sha256()
    for name, tensor in state.items():
        size = tensor.numel() * tensor.itemsize
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[place, place + size])
        place += size
        digest.update(bytes_of(tensor))
    # Other libraries ask by which one a file was written: "pt" stands for PyTorch.
    header["__metadata__"] = {"format": "pt", CHECKSUM: digest.hexdigest()}
    if about:
        header["__metadata__"][NETWORK] = json.dumps(about)

    # Filled up by spaces, which JSON ignores, so that the numbers begin at a multiple of 8.
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in state.values():
            file.write(bytes_of(tensor))


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of Hugging Face's NAME.index.json, which says in which file each of them is.

    Example: {"weight_map": {"layernorm.bias": "model-00002-of-00002.safetensors", ...}}.
    ValueError if one of the files is not beside it, or holds other tensors.
    """
    weight_map = json.loads(index.read_text())["weight_map"]
    tensors = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name.endswith(".json"):
            raise ValueError(f"it names {name}, which is no file of tensors beside it")
        tensors |= read_tensors(index.parent / name)
    if tensors.keys() != weight_map.keys():
        different = sorted(tensors.keys() ^ weight_map.keys())
        raise ValueError(f"its files and its list disagree about {', '.join(different[:4])}")
    return tensors


def read_tensors(path: Path) -> dict:
    """Whatever is in the file, read without running any code that may be in it.

    ValueError, or another exception of torch's, if the file is damaged.
    """
    if path.name.endswith(".index.json"):
        return read_shards(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)

    # torch.save writes a zip archive, and a zip archive has a checksum of everything in it. But
    # torch.load does not compare it, and would take a tensor with a flipped bit for a good one.
    # Nothing in it is compressed, so that the two sizes of an entry have to be the same.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            sizes_agree = all(x.file_size == x.compress_size for x in archive.infolist())
        if damaged or not sizes_agree:
            raise ValueError(f"{path}: {damaged or 'a size'} does not match its checksum")

    # weights_only=True refuses every class but tensors and plain containers. Full checkpoints
    # of DINO also hold the parsed flags, an argparse.Namespace, which is harmless.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


# ----------------------------------------------------------------------------------------------
# Layouts: each function changes what it knows and leaves the rest


def from_training(state: dict) -> dict:
    """Checkpoints of training: the teacher's backbone in them, prefixes off, heads left out.

    DINO and iBOT write {"teacher": .., "student": ..}, DINOv2 {"teacher": ..}; wrappers such as
    DistributedDataParallel put "module." before each key. Example:

        state["teacher"]["module.backbone.norm.weight"]  ->  norm.weight
        state["teacher"]["module.head.mlp.0.weight"]     ->  left out
    """
    # The teacher first: it is the better network of the two, and the one that was released.
    for key in ("teacher", "model", "state_dict", "student"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    state = {key.replace("module.", ""): value for key, value in state.items()}

    # A file without any "backbone." is a backbone alone, and stays as it is.
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value
            for key, value in state.items() if key.startswith("backbone.")}
    return state


def from_chunks(state: dict) -> dict:
    """DINOv2's training groups the blocks in chunks: blocks.CHUNK.BLOCK.* -> blocks.BLOCK.*

    BLOCK counts through all chunks. Example, the seventh of 24 blocks in 4 chunks:

        blocks.1.6.norm1.weight  ->  blocks.6.norm1.weight
    """
    return {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value
        for key, value in state.items()}


def from_ibot(state: dict) -> dict:
    """iBOT calls the mask token masked_embed: masked_embed -> mask_token."""
    return {
        "mask_token" if key == "masked_embed" else key: value
        for key, value in state.items()}


# Hugging Face's names of DINO, DINOv2 and DINOv2 with registers -> official names: regular
# expressions, applied to each key from top to bottom. Files on disk have the names of
# transformers 4; state dicts of networks in the memory of transformers 5 have others. Example:
#
#     dinov2.encoder.layer.3.attention.output.dense.bias
#     encoder.layer.3.attention.output.dense.bias           without the name of the model
#     blocks.3.attention.output.dense.bias
#     blocks.3.attn.proj.bias
#
# The order matters. The name of the model has to go first, because the other patterns look for
# the beginning of a key (^); "embeddings." goes after the two keys that are renamed as a whole.
HF = [
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),  # cls_token, mask_token and register_tokens have the same names
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.query."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.key."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.value."),
    (r"\.layernorm_before\.", ".norm1."),  # so called in the ViT that holds DINO
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm.")]


def from_hf(state: dict) -> dict:
    """Hugging Face: other names; query, key and value apart; a pooler that DINO never trained.

    Example, of a network of width 384:

        encoder.layer.0.attention.attention.query.weight  (384, 384)
        encoder.layer.0.attention.attention.key.weight    (384, 384)
        encoder.layer.0.attention.attention.value.weight  (384, 384)
                                           ->  blocks.0.attn.qkv.weight  (1152, 384)
    """
    if not any(key.endswith("embeddings.position_embeddings") for key in state):
        return state
    renamed = {}
    for key, value in state.items():
        for pattern, name in HF:
            key = re.sub(pattern, name, key)
        if not key.startswith(("pooler.", "classifier.")):
            renamed[key] = value

    # The three matrices are put below one another, in this order, because here one product
    # computes queries, keys and values.
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [renamed.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        renamed[key.replace("query", "qkv")] = torch.cat(parts)

    # So are the two halves of SwiGLU, which transformers 5 has apart.
    for key in [key for key in renamed if ".mlp.gate_proj." in key]:
        gate = renamed.pop(key)
        value = renamed.pop(key.replace("gate_proj", "up_proj"))
        renamed[key.replace("gate_proj", "w12")] = torch.cat([gate, value])
    return renamed


def from_timm(state: dict) -> dict:
    """timm: other names for the registers and for SwiGLU; with registers, other positions.

        reg_token                                      ->  register_tokens
        blocks.0.mlp.fc1.weight, if it is of SwiGLU    ->  blocks.0.mlp.w12.weight
        pos_embed (1, 1369, D), of patches only        ->  pos_embed (1, 1370, D)
    """
    state = {
        "register_tokens" if key == "reg_token" else key: value
        for key, value in state.items()}

    # fc1 and fc2 are either an MLP, where fc1 has as many rows as fc2 has columns, or SwiGLU,
    # where it has twice as many: gate and value.
    first = state.get("blocks.0.mlp.fc1.weight")
    second = state.get("blocks.0.mlp.fc2.weight")
    if first is not None and second is not None and len(first) == 2 * second.shape[1]:
        state = {
            key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
            for key, value in state.items()}

    # With registers, timm has added the position of the class token to the token itself, and
    # keeps the positions of patches alone: a square number, such as 37 * 37 = 1369. (With the
    # class token it is one more, which is never a square.) A row of zeros in front makes the
    # table the official one, and the network computes the same.
    positions = state.get("pos_embed")
    square = positions is not None and math.isqrt(positions.shape[1])**2 == positions.shape[1]
    if square and "register_tokens" in state:
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
    return state


LAYOUTS = (from_training, from_chunks, from_ibot, from_hf, from_timm)

# ----------------------------------------------------------------------------------------------
# The way out


def hf_type(state: dict) -> str:
    """Which of Hugging Face's networks a ViT is: vit, dinov2 or dinov2_with_registers.

    state: official names. ValueError for anything but a Vision Transformer: those three have no
    names for other networks.
    """
    if "cls_token" not in state:
        raise ValueError(
            "--to hf: expected a Vision Transformer; the first of these tensors are "
            f"{', '.join(list(state)[:3])}")
    if "register_tokens" in state:
        return "dinov2_with_registers"

    # The network of DINO is a plain ViT. LayerScale and SwiGLU came with DINOv2.
    plain = "blocks.0.ls1.gamma" not in state and "blocks.0.mlp.w12.weight" not in state
    return "vit" if plain else "dinov2"


# Official names -> Hugging Face's, as in HF. This is not that table read backwards: Hugging Face
# has one set of names for its ViT, which holds DINO, and another for DINOv2, which has norm1,
# norm2, fc1 and fc2 in common with the official ones.
TO_HF = [(r"^pos_embed$", "embeddings.position_embeddings"),
         (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
         (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
         (r"^blocks\.", "encoder.layer."), (r"\.attn\.proj\.", ".attention.output.dense."),
         (r"\.mlp\.w12\.", ".mlp.weights_in."), (r"\.mlp\.w3\.", ".mlp.weights_out."),
         (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"), (r"^norm\.", "layernorm.")]
TO_HF_VIT = [(r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
             (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense.")]


def to_hf(state: dict) -> dict:
    """Official names -> Hugging Face's of the network that hf_type says, tensors only.

    ValueError for anything but a Vision Transformer. Example:

        blocks.0.attn.proj.weight  ->  encoder.layer.0.attention.output.dense.weight
    """
    kind = hf_type(state)
    table = TO_HF + TO_HF_VIT if kind == "vit" else TO_HF
    renamed = {}
    for key, value in state.items():
        for pattern, name in table:
            key = re.sub(pattern, name, key)
        if ".attn.qkv." in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                renamed[key.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            renamed[key] = value

    # Their ViT has no mask token, which only training needs. It has a pooler, which computes a
    # feature of the image from the class token; as the identity it gives the class token itself
    # (with the activation "linear", see export.py).
    width = state["cls_token"].shape[-1]
    if kind == "vit":
        renamed.pop("embeddings.mask_token", None)
        renamed["pooler.dense.weight"] = torch.eye(width)
        renamed["pooler.dense.bias"] = torch.zeros(width)
        return renamed

    # Their DINOv2 always has a mask token and LayerScale. A network without them gets a token
    # that is never used, and factors of 1, which change nothing.
    if "embeddings.mask_token" not in renamed:
        renamed["embeddings.mask_token"] = torch.zeros(1, width)
    depth = len({key.split(".")[2] for key in renamed if key.startswith("encoder.")})
    for i in range(depth):
        for branch in (1, 2):  # attention, feed-forward
            factors = torch.ones(width)
            renamed.setdefault(f"encoder.layer.{i}.layer_scale{branch}.lambda1", factors)
    return renamed
