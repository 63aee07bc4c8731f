"""Claims
1. Training checkpoints of DINO, iBOT and DINOv2, and the layouts of Hugging Face (on disk, and
   in the memory of transformers 5) and timm, all give the same network.
2. A file of safetensors gives back its tensors, and one whose header does not fit it, or whose
   numbers were changed, is refused.
3. A flipped bit in what torch.save wrote is refused, or changes nothing.
4. Weights in several files are read by their index, which has to fit them.
"""

import argparse
import json
import re
import struct

import pytest
import torch
from test_weights import KINDS

from backbones.layouts import read_safetensors, read_tensors, write_safetensors
from backbones.weights import load_backbone
from vit import VisionTransformer

# -- the layouts, written by the test as their libraries write them


def as_training(state):
    flags = argparse.Namespace(arch="vit_small")
    network = {f"module.backbone.{k}": v for k, v in state.items()}
    network |= {"module.head.mlp.0.weight": torch.zeros(2, 2)}
    return {"teacher": network, "student": {}, "epoch": 3, "args": flags}


def as_chunks(state):

    def with_chunk(match):
        return f"blocks.{int(match[1]) // 2}.{match[1]}"

    network = {
        re.sub(r"^blocks\.(\d+)", with_chunk, key): value
        for key, value in state.items()}
    network = {f"backbone.{key}": value for key, value in network.items()}
    return {"teacher": network | {"dino_head.last_layer.weight_g": torch.ones(2, 1)}}


def as_ibot(state):
    return {
        "state_dict": {"masked_embed" if k == "mask_token" else k: v
                       for k, v in state.items()}}


def as_hf_vit(state):
    """transformers' ViTModel, which holds DINO."""
    names = {
        "pos_embed": "embeddings.position_embeddings", "cls_token": "embeddings.cls_token",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        "attn.proj": "attention.output.dense", "blocks": "encoder.layer"}
    out = {"pooler.dense.weight": torch.zeros(2, 2)}
    for key, value in state.items():
        key = "layernorm" + key[4:] if key.startswith("norm.") else key
        for official, hugging_face in names.items():
            key = key.replace(official, hugging_face)
        if "attn.qkv" in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                out[key.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            out[key] = value
    return out


def as_transformers_5(state):
    """The names that networks have in the memory of transformers 5."""
    out = {}
    for key, value in as_hf_vit(state).items():
        for old, new in (("attention.attention.query",
                          "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
                         ("attention.attention.value",
                          "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
                         ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2")):
            key = key.replace(old, new)
        if "mlp.w12" in key:  # of DINOv2 only, whose layers lie in an encoder
            gate, up = value.chunk(2)
            out[key.replace("w12", "gate_proj")] = gate
            out[key.replace("w12", "up_proj")] = up
        else:
            out[key.replace("mlp.w3", "mlp.down_proj")] = value
    if "layernorm_before" in "".join(out) and not any("mask_token" in key for key in out):
        out = {key.replace("encoder.layer.", "layers."): value for key, value in out.items()}
    return {
        re.sub(r"^(mask_token|register_tokens)$", r"embeddings.\1", key): value
        for key, value in out.items()}


def as_timm(state):
    out = {}
    for key, value in state.items():
        for official, timm in (("register_tokens", "reg_token"), ("w12", "fc1"), ("w3", "fc2")):
            key = key.replace(official, timm)
        out[key] = value
    if "reg_token" in out:
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


@pytest.mark.parametrize("write, kind", [(as_training, KINDS[0]),
                                         (as_chunks, dict(KINDS[1], depth=4)),
                                         (as_ibot, KINDS[1]), (as_hf_vit, KINDS[0]),
                                         (as_transformers_5, KINDS[0]),
                                         (as_transformers_5, KINDS[2]), (as_timm, KINDS[1]),
                                         (as_timm, KINDS[2])])
def test_layouts_of_others(write, kind, tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, **kind).eval()
    torch.save(write(model.state_dict()), tmp_path / "other.pth")
    loaded = load_backbone(tmp_path / "other.pth")
    images = torch.randn(2, 3, 40, 24) if write is not as_timm else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), loaded(images), rtol=0, atol=1e-6)


def test_a_rectangular_table_is_not_taken_for_a_square_one(tmp_path):
    """14 x 16 patches and the class token are 225 = 15 * 15 rows."""
    state = VisionTransformer(64, 16, embed_dim=64, depth=1, num_heads=1).state_dict()
    state["pos_embed"] = torch.randn(1, 1 + 14 * 16, 64)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="pos_embed"):
        load_backbone(tmp_path / "other.pth")


def test_safetensors_are_checked(tmp_path):
    file = tmp_path / "a.safetensors"
    state = {
        "half": torch.randn(3).bfloat16(), "none": torch.zeros(0, 2), "one": torch.tensor(2.0)}
    write_safetensors(file, state)
    assert all(torch.equal(v, state[k]) for k, v in read_safetensors(file).items())
    whole = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**42) + whole[8:])  # a header of terabytes
    with pytest.raises(ValueError, match="claims 4,398,046,511,104 bytes"):
        read_safetensors(file)
    file.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="does not fit its shape"):
        read_safetensors(file)
    changed = bytearray(whole)
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(ValueError, match="does not match|do not match its checksum"):
        read_safetensors(file)


def safetensors_of(header, data):
    """The bytes of a file whose header is this text."""
    return struct.pack("<Q", len(header)) + header.encode() + data


def place(name, first, last):
    entry = {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last]}
    return f'"{name}": {json.dumps(entry)}'


@pytest.mark.parametrize("places, words",
                         [([place("a", 0, 8), place("b", 4, 12)], "b begins at byte 4"),
                          ([place("a", 0, 4), place("b", 8, 12)], "b begins at byte 8"),
                          ([place("a", 4, 12)], "a begins at byte 4"),
                          ([place("a", 0, 8)], "4 bytes at its end belong to no tensor"),
                          ([place("a", 0, 4), place("a", 4, 12)], "a name twice")])
def test_what_the_format_forbids(places, words, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(safetensors_of("{" + ", ".join(places) + "}", bytes(12)))
    with pytest.raises(ValueError, match=words):
        read_safetensors(file)
    file.write_bytes(
        safetensors_of("{" + place("a", 0, 4) + ", " + place("b", 4, 12) + "}", bytes(12)))
    assert list(read_safetensors(file)) == ["a", "b"]


def test_flipped_bits(tmp_path):
    """Bits of the numbers, and of all other parts of a small file."""
    torch.manual_seed(0)
    state = {"a": torch.randn(40), "b": torch.randn(2, 10)}
    file = tmp_path / "teacher.pt"
    torch.save(state, file)
    whole = file.read_bytes()
    numbers = whole.index(state["a"].numpy().tobytes())
    for position in [*range(numbers, numbers + 160, 8), *range(0, len(whole), 32)]:
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        file.write_bytes(changed)
        try:
            read = read_tensors(file)
        except Exception:
            continue
        assert not numbers <= position < numbers + 160
        assert all(torch.equal(read[name], state[name]) for name in state)


def test_weights_in_several_files(tmp_path):
    state = {"a": torch.randn(3), "b": torch.randn(2), "c": torch.randn(1)}
    write_safetensors(tmp_path / "1.safetensors", {"a": state["a"]})
    torch.save({"b": state["b"], "c": state["c"]}, tmp_path / "2.bin")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {"a": "1.safetensors", "b": "2.bin", "c": "2.bin"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    read = read_tensors(index)
    assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)
    for bad, words in ((weight_map | {"d": "2.bin"}, "disagree about d"),
                       (weight_map | {"a": "../1.safetensors"}, "no file of tensors beside it"),
                       (weight_map | {"a": index.name}, "no file of tensors beside it")):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(ValueError, match=words):
            read_tensors(index)
