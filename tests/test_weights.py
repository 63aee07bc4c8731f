"""Claims
1. The architecture is read off the tensors, for every kind of backbone, and loading is strict.
2. What does not fit is refused with the difference; no code in a file is run.
3. Training checkpoints of DINO, iBOT and DINOv2, the layouts of Hugging Face and timm, and
   safetensors all give the same network; export gives back what was read.
4. Every released architecture has the published number of parameters and tensors.
5. A download is in the cache when it is whole; what cannot be fetched says where to put it.
6. The table in docs/models.md is the code's. Classifiers are found by name and read the right
   tokens; the recipe for ONNX there gives the same features.
"""

import argparse
import http.server
import re
import struct
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import hubconf
import weights
from vit import VisionTransformer
from weights import (RELEASED, architecture, load_backbone, load_strictly, main, read_backbone,
                     read_safetensors, released_table, untrained, write_safetensors)

KINDS = [
    dict(embed_dim=128, depth=2, num_heads=2),
    dict(embed_dim=64, depth=3, num_heads=1, layerscale=1e-5, mask_token=True),
    dict(
        embed_dim=192,
        depth=1,
        num_heads=3,
        layerscale=1.0,
        mask_token=True,
        ffn_layer="swiglu",
        num_register_tokens=4,
        pos_embed_resize="antialias",
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, **kind).eval()
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    loaded = load_backbone(tmp_path / "backbone.pth")
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        assert torch.equal(model(images), loaded(images))
    assert not loaded.training and loaded.num_heads == kind["num_heads"]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_backbone(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="directory of a run"):
        load_backbone(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="not a readable"):
        load_backbone(tmp_path / "text.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="not a Vision Transformer"):
        load_backbone(tmp_path / "linear.pth")
    torch.save({"teacher": {}}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="not a Vision Transformer"):
        load_backbone(tmp_path / "nested.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="dictionary of tensors"):
        load_backbone(tmp_path / "list.pth")


def test_the_difference_is_readable(tmp_path):
    state = VisionTransformer(32, 8, **KINDS[0]).state_dict()
    state["head.weight"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="missing norm.bias; unexpected head.weight"):
        load_backbone(tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="expected"):
        load_strictly(
            VisionTransformer(16, 8, **KINDS[0]),
            VisionTransformer(32, 8, **KINDS[0]).state_dict(),
            "x",
        )


# -- the layouts, written by the test as their libraries write them


def as_training(state):
    flags = argparse.Namespace(arch="vit_small")
    both = {f"module.backbone.{k}": v for k, v in state.items()}
    both |= {"module.head.mlp.0.weight": torch.zeros(2, 2)}
    return {"teacher": both, "student": {}, "epoch": 3, "args": flags}


def as_chunks(state):
    state = {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): v
             for k, v in state.items()}
    return {"teacher": {f"backbone.{k}": v for k, v in state.items()}
            | {"dino_head.last_layer.weight_g": torch.ones(2, 1)}}


def as_ibot(state):
    return {"state_dict": {"masked_embed" if k == "mask_token" else k: v for k, v in state.items()}}


def as_hf_vit(state):
    """transformers' ViTModel, which holds DINO."""
    names = {"pos_embed": "embeddings.position_embeddings", "cls_token": "embeddings.cls_token",
             "patch_embed.proj": "embeddings.patch_embeddings.projection",
             "norm1": "layernorm_before", "norm2": "layernorm_after",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
             "attn.proj": "attention.output.dense", "blocks": "encoder.layer"}
    out = {"pooler.dense.weight": torch.zeros(2, 2)}
    for key, value in state.items():
        key = "layernorm" + key[4:] if key.startswith("norm.") else key
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if "attn.qkv" in key:
            out |= {key.replace("attn.qkv", f"attention.attention.{n}"): v
                    for n, v in zip(("query", "key", "value"), value.chunk(3))}
        else:
            out[key] = value
    return out


def as_timm(state):
    out = {k.replace("register_tokens", "reg_token").replace("w12", "fc1").replace("w3", "fc2"): v
           for k, v in state.items()}
    if "reg_token" in out:
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


@pytest.mark.parametrize("write, kind", [
    (as_training, KINDS[0]), (as_chunks, dict(KINDS[1], depth=4)), (as_ibot, KINDS[1]),
    (as_hf_vit, KINDS[0]), (as_timm, KINDS[1]), (as_timm, KINDS[2]),
])
def test_layouts_of_others(write, kind, tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, **kind).eval()
    torch.save(write(model.state_dict()), tmp_path / "theirs.pth")
    loaded = load_backbone(tmp_path / "theirs.pth")
    images = torch.randn(2, 3, 40, 24) if write is not as_timm else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), loaded(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["official", "hf"])
def test_export_and_back(kind, to, tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, **kind).eval()
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    for name in ("out.safetensors", "out.pth"):
        main(["export", str(tmp_path / "ours.pth"), "--to", to, "--output", str(tmp_path / name)])
        loaded = load_backbone(tmp_path / name)
        images = torch.randn(2, 3, 40, 24)
        with torch.no_grad():
            assert torch.equal(model(images), loaded(images))
    if to == "official":
        assert read_backbone(tmp_path / "out.safetensors")[0].keys() == model.state_dict().keys()


def test_safetensors_are_checked(tmp_path):
    file = tmp_path / "a.safetensors"
    state = {"half": torch.randn(3).bfloat16(), "none": torch.zeros(0, 2), "one": torch.tensor(2.0)}
    write_safetensors(file, state)
    assert all(torch.equal(v, state[k]) for k, v in read_safetensors(file).items())
    whole = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**42) + whole[8:])  # terabytes, it says
    with pytest.raises(ValueError, match="claims 4,398,046,511,104 bytes"):
        read_safetensors(file)
    file.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="does not fit its shape"):
        read_safetensors(file)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_weights_file_does_not_run(tmp_path, capsys):
    torch.save({"pos_embed": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a readable weights file"):
        load_backbone(tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out


class Half(http.server.BaseHTTPRequestHandler):
    """Serves a backbone whole under one name, and breaks off half-way under another."""

    def do_GET(self):
        if "none" in self.path:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.end_headers()
        whole = self.server.data
        self.wfile.write(whole[:len(whole) // 2] if "half" in self.path else whole)

    def log_message(self, *_):
        pass


def test_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    model = VisionTransformer(32, 8, **KINDS[0])
    torch.save(model.state_dict(), tmp_path / "served.pth")
    server = http.server.HTTPServer(("127.0.0.1", 0), Half)
    server.data = (tmp_path / "served.pth").read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "hub/checkpoints"
    assert load_backbone(f"{here}/whole.pth").embed_dim == KINDS[0]["embed_dim"]
    for name in ("half.pth", "none.pth"):
        with pytest.raises(ValueError, match=f"by hand and put it at .*{name}"):
            load_backbone(f"{here}/{name}")
    server.shutdown()
    server.server_close()
    assert [p.name[9:] for p in cache.iterdir()] == ["whole.pth"]
    assert load_backbone(f"{here}/whole.pth").depth == 2  # from the cache: nobody answers any more
    with pytest.raises(ValueError, match="by hand"):
        load_backbone(f"{here}/other.pth")


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match="no released model of that name .dino_vits16"):
        load_backbone("dino_vits17")


COUNTS = {  # parameters and tensors of what was released
    "dino_vits16": (21_665_664, 150), "dino_vits8": (21_670_272, 150),
    "dino_vitb16": (85_798_656, 150), "dino_vitb8": (85_807_872, 150),
    "dino_resnet50": (23_508_032, 318), "dinov2_vits14": (22_056_576, 175),
    "dinov2_vitb14": (86_580_480, 175), "dinov2_vitl14": (304_368_640, 343),
    "dinov2_vitg14": (1_136_480_768, 567), "dinov2_vitg14_reg": (1_136_486_912, 568),
}


@pytest.mark.parametrize("name", COUNTS)
def test_released_architectures(name):
    """Built without memory; what is read off their tensors builds the same again."""
    with torch.device("meta"):
        model = untrained(name)
        state = model.state_dict()
        parameters = sum(p.numel() for p in model.parameters())
        assert (parameters, len(state)) == COUNTS[name]
        if name != "dino_resnet50":
            again = VisionTransformer(**architecture(state))
            assert {k: v.shape for k, v in again.state_dict().items()} == {
                k: v.shape for k, v in state.items()}
            assert again.pos_embed_resize == model.pos_embed_resize


def test_hub():
    root = str(Path(__file__).resolve().parent.parent)
    names = [*RELEASED, "dino_deits16", *(f"{name}_lc" for name in RELEASED)]
    assert all(callable(getattr(hubconf, name)) for name in names)
    model = torch.hub.load(root, "dino_deits8", source="local", pretrained=False)
    assert model.patch_size == 8 and model.embed_dim == 384


HEADS = [("dino_vits16", 4, "dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth", 4),
         ("dinov2_vits14", 1, "dinov2_vits14/dinov2_vits14_linear_head.pth", 2),
         ("dinov2_vits14_reg", 4, "dinov2_vits14/dinov2_vits14_reg4_linear4_head.pth", 5)]


@pytest.mark.parametrize("name, layers, file, columns", HEADS)
def test_classifiers(name, layers, file, columns, monkeypatch, tmp_path):
    """Written under the released name, and found there; its logits are those of the tokens."""
    torch.manual_seed(0)
    weight, bias = torch.randn(1000, columns * 384), torch.randn(1000)
    state = {"weight": weight, "bias": bias}
    if columns == 4:  # as DINO's training wrote it
        state = {"state_dict": {f"module.linear.{k}": v for k, v in state.items()}}
    torch.save(state, tmp_path / "head.pth")
    asked = []
    monkeypatch.setattr(weights, "fetch", lambda url: asked.append(url) or tmp_path / "head.pth")
    monkeypatch.setattr(weights, "load_backbone", lambda name: weights.untrained(name).eval())
    model = getattr(hubconf, f"{name}_lc")(layers=layers)
    assert len(asked) == 1 and asked[0].endswith("/" + file)
    images, net = torch.randn(2, 3, 64, 64), model.backbone
    with torch.no_grad():
        outs = net.get_intermediate_layers(images, 4 if columns > 2 else 1, return_class_token=True)
        tokens = [cls for _, cls in outs] + [outs[-1][0].mean(1)] * (columns != 4)
        expected = torch.cat(tokens, 1) @ weight.T + bias
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
        empty = getattr(hubconf, f"{name}_lc")(pretrained=False, layers=layers)
        assert empty(images).shape == (2, 1000) and empty.blocks == model.blocks


def test_the_table_in_the_docs_is_that_of_the_code():
    docs = Path(__file__).parent.parent / "docs/models.md"
    assert released_table() in docs.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_onnx_recipe(kind, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    session = pytest.importorskip("onnxruntime").InferenceSession
    docs = Path(__file__).parent.parent / "docs/models.md"
    lines = re.search(r"(?m)^    import torch\n(?:(?:    .*)?\n)+", docs.read_text())[0]
    model = VisionTransformer(40, 8, **kind).eval()
    (tmp_path / "runs/shapes").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "runs/shapes/teacher.pt")
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(lines), {})
    for batch in (1, 3):
        images = torch.randn(batch, 3, 80, 120)
        found = session("backbone.onnx").run(None, {"images": images.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=0, atol=1e-5)
