"""Claims
1. Training checkpoints of DINO, iBOT and DINOv2, and the layouts of Hugging Face and timm, all
   give the same network.
2. Export, official or Hugging Face's, gives back what was read, from .safetensors and .pth.
3. A file of safetensors gives back its tensors, and one whose header does not fit it is
   refused.
"""

import argparse
import re
import struct

import pytest
import torch
from test_weights import KINDS

from backbones.__main__ import main
from backbones.layouts import read_safetensors, to_hf, write_safetensors
from backbones.weights import load_backbone, read_backbone
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
                                         (as_timm, KINDS[1]), (as_timm, KINDS[2])])
def test_layouts_of_others(write, kind, tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, **kind).eval()
    torch.save(write(model.state_dict()), tmp_path / "other.pth")
    loaded = load_backbone(tmp_path / "other.pth")
    images = torch.randn(2, 3, 40, 24) if write is not as_timm else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), loaded(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["official", "hf"])
def test_export_and_back(kind, to, tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, **kind).eval()
    original = tmp_path / "original.pth"
    torch.save(model.state_dict(), original)
    for name in ("out.safetensors", "out.pth"):
        main(["export", str(original), "--to", to, "--output", str(tmp_path / name)])
        loaded = load_backbone(tmp_path / name)
        images = torch.randn(2, 3, 40, 24)
        with torch.no_grad():
            assert torch.equal(model(images), loaded(images))
    if to == "official":
        assert read_backbone(tmp_path
                             / "out.safetensors")[0].keys() == model.state_dict().keys()


def test_only_a_vision_transformer_has_hugging_faces_names():
    with pytest.raises(ValueError,
                       match="--to hf: expected a Vision Transformer.* conv1.weight"):
        to_hf({"conv1.weight": torch.zeros(2, 3, 7, 7)})


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
