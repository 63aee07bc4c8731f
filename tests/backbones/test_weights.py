"""Claims
1. The architecture is read off the tensors, for every kind of backbone, and loading is strict.
2. What does not fit is refused with the difference; no code in a file is run.
3. Every released architecture has the published number of parameters and tensors; a new line in
   RELEASED is a new name.
4. A download is in the cache when it is whole; what cannot be fetched says where to put it.
5. The table in docs/models.md is the code's; the recipe for ONNX there gives the same features.
6. `python -m backbones` tells what is in a file, and misuse is one line.
"""

import http.server
import json
import re
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import vit
from backbones import weights
from backbones.__main__ import main, released_table
from backbones.weights import (BASE_URL, RELEASED, architecture, load_backbone, load_strictly)
from vit import VisionTransformer

MODELS_MD = Path(__file__).parents[2] / "docs/models.md"

KINDS = [
    dict(embed_dim=128, depth=2, num_heads=2),
    dict(embed_dim=64, depth=3, num_heads=1, layerscale=1e-5, mask_token=True),
    dict(embed_dim=192, depth=1, num_heads=3, layerscale=1.0, mask_token=True,
         ffn_layer="swiglu", num_register_tokens=4, pos_embed_resize="antialias")]


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


# -- what does not fit


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
    torch.save(state, tmp_path / "renamed.pth")
    with pytest.raises(ValueError, match="missing norm.bias; unexpected head.weight"):
        load_backbone(tmp_path / "renamed.pth")
    smaller = VisionTransformer(16, 8, **KINDS[0])
    with pytest.raises(ValueError, match="expected"):
        load_strictly(smaller, VisionTransformer(32, 8, **KINDS[0]).state_dict(), "x")


class Evil:

    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_weights_file_does_not_run(tmp_path, capsys):
    torch.save({"pos_embed": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a readable weights file"):
        load_backbone(tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match="no released model of that name .dino_vits16"):
        load_backbone("dino_vits17")


# -- what was released

COUNTS = {  # parameters and tensors of what was released
    "dino_vits16": (21_665_664, 150), "dino_vits8": (21_670_272, 150),
    "dino_vitb16": (85_798_656, 150), "dino_vitb8": (85_807_872, 150),
    "dino_resnet50": (23_508_032, 318), "dinov2_vits14": (22_056_576, 175),
    "dinov2_vitb14": (86_580_480, 175), "dinov2_vitl14": (304_368_640, 343),
    "dinov2_vitg14": (1_136_480_768, 567), "dinov2_vitg14_reg": (1_136_486_912, 568)}


@pytest.mark.parametrize("name", COUNTS)
def test_released_architectures(name):
    """Built without memory; what is read off their tensors builds the same again."""
    with torch.device("meta"):
        model = weights.untrained(name)
        state = model.state_dict()
        parameters = sum(p.numel() for p in model.parameters())
        assert (parameters, len(state)) == COUNTS[name]
        if name != "dino_resnet50":
            again = VisionTransformer(**architecture(state))
            shapes = {key: value.shape for key, value in state.items()}
            assert {k: v.shape for k, v in again.state_dict().items()} == shapes
            assert again.pos_embed_resize == model.pos_embed_resize


def test_a_line_in_released_is_a_name(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, **KINDS[1]).eval()
    torch.save(model.state_dict(), tmp_path / "new_pretrain.pth")
    urls = []

    def fetch(url):
        urls.append(url)
        return tmp_path / "new_pretrain.pth"

    monkeypatch.setattr(weights, "fetch", fetch)
    monkeypatch.setitem(RELEASED, "dino_new", ("dino/new/new_pretrain.pth", 50.0, 60.0))
    loaded = load_backbone("dino_new")
    assert urls == [f"{BASE_URL}dino/new/new_pretrain.pth"]
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="dinov2_vitg14_reg, dino_new"):  # among the choices
        load_backbone("dino_newer")


def test_the_table_in_the_docs_is_that_of_the_code(capsys):
    assert released_table() in MODELS_MD.read_text()
    main([])
    assert capsys.readouterr().out == released_table() + "\n"


# -- downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a backbone whole under one name, and breaks off half-way under another."""

    def do_GET(self):
        if "none" in self.path:
            return self.send_error(404)
        whole = self.server.content
        self.send_response(200)
        self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[:len(whole) // 2] if "half" in self.path else whole)

    def log_message(self, *_):
        pass


def test_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    model = VisionTransformer(32, 8, **KINDS[0])
    torch.save(model.state_dict(), tmp_path / "served.pth")
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    server.content = (tmp_path / "served.pth").read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "hub/checkpoints"
    assert load_backbone(f"{address}/whole.pth").embed_dim == KINDS[0]["embed_dim"]
    for name in ("half.pth", "none.pth"):
        with pytest.raises(ValueError, match=f"by hand and put it at .*{name}"):
            load_backbone(f"{address}/{name}")
    server.shutdown()
    server.server_close()
    assert [p.name[9:] for p in cache.iterdir()] == ["whole.pth"]
    # From the cache: nobody answers any more.
    assert load_backbone(f"{address}/whole.pth").depth == 2
    with pytest.raises(ValueError, match="by hand"):
        load_backbone(f"{address}/other.pth")


# -- the program, and the recipe in the docs


def test_the_program_tells_what_is_in_a_file(tmp_path, capsys):
    file = tmp_path / "backbone.pth"
    torch.save(VisionTransformer(32, 8, **KINDS[2]).state_dict(), file)
    main([str(file)])
    printed = capsys.readouterr().out
    assert f"{file}: VisionTransformer, width 192, 32 px" in printed
    assert "num_register_tokens 4" in printed and "ffn_layer swiglu" in printed


@pytest.mark.parametrize("line", ["--help", "-h", "export --help"])
def test_help_is_no_error(line, capsys):
    assert main(line.split()) is None
    assert capsys.readouterr().out.startswith("usage: python -m backbones")


@pytest.mark.parametrize("line, words", [
    ("/none.pth", "no such file"), ("export", "usage: python -m backbones"),
    ("--none", "usage: python -m backbones"), ("export FILE --to timm", "--to: invalid choice"),
    ("export FILE --output /none/out.pth", "--output /none/out.pth: there is no folder /none"),
    ("export FILE --out x.pth", "there is no flag --out; did you mean --output?")])
def test_misuse_of_the_program(line, words, tmp_path, capsys):
    torch.save(VisionTransformer(32, 8, **KINDS[0]).state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(SystemExit) as stop:
        main(line.replace("FILE", str(tmp_path / "backbone.pth")).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_onnx_recipe(kind, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    session = pytest.importorskip("onnxruntime").InferenceSession
    lines = re.search(r"(?m)^    import torch\n(?:(?:    .*)?\n)+", MODELS_MD.read_text())[0]
    model = VisionTransformer(40, 8, **kind).eval()
    (tmp_path / "runs/shapes").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "runs/shapes/teacher.pt")
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(lines), {})
    for batch in (1, 3):
        images = torch.randn(batch, 3, 80, 120)
        features = session("backbone.onnx").run(None, {"images": images.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(features), model(images), rtol=0, atol=1e-5)


def test_what_a_reader_adds_to_the_tables_comes_back(tmp_path, monkeypatch):
    """A run with a feed-forward layer and an architecture of one's own is read as what it is."""

    class Relu(vit.Mlp):  # tensors of the MLP's names, and another function

        def forward(self, x):
            return self.fc2(self.fc1(x).relu())

    monkeypatch.setitem(vit.FFNS, "relu", Relu)
    monkeypatch.setitem(vit.ARCHS, "vit_mine", dict(embed_dim=96, depth=2, num_heads=3))
    model = vit.VisionTransformer(16, 8, ffn_layer="relu", **vit.ARCHS["vit_mine"]).eval()
    torch.save(model.state_dict(), tmp_path / "teacher.pt")
    stored = {"global_batch": 8, "arch": "vit_mine", "ffn_layer": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_backbone(tmp_path)(images), model(images))
