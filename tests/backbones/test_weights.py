"""Claims
1. The architecture is read off the tensors, for every kind of backbone, and loading is strict.
2. What does not fit is refused with the difference; no code in a file is run.
3. Every released architecture has the published number of parameters and tensors; a new line in
   RELEASED is a new name.
4. A download is in the cache when it is whole; what cannot be fetched says where to put it.
5. The table in docs/models.md is the code's; the recipe for ONNX there gives the same features.
6. `python -m backbones` tells what is in a file, and misuse is one line.
7. The number of heads comes from a config.json or from --num_heads, and is 64 wide otherwise; a
   width for which that cannot be is refused.
8. A directory of Hugging Face is read with what its config.json says of heads, epsilon and
   images; one that contradicts the tensors, or a network of another kind, is refused.
9. The names that Hugging Face and older programs use are known, and a near miss is told.
10. Damage to a run's teacher.pt or config.json is one line.
"""

import http.server
import json
import re
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import evaluate
import visualize
from figures import attention
import vit
from backbones import weights
from backbones.__main__ import main, released_table
from backbones.layouts import to_hf, write_safetensors
from backbones.weights import (ALIASES, BASE_URL, RELEASED, architecture, load_backbone,
                               load_strictly)
from evaluation.protocol import Extractor
from machinery.process import Process
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


@pytest.mark.parametrize("name, near", [("dino_vits17", "dino_vits16"),
                                        ("dinov2-small", "facebook/dinov2-small"),
                                        ("facebook/dino-vits15", "facebook/dino-vits16"),
                                        ("dino_deits17", "dino_deits16")])
def test_a_name_that_is_none(name, near):
    with pytest.raises(ValueError, match="no released model of that name .dino_vits16") as stop:
        load_backbone(name)
    assert str(stop.value).endswith(f"; did you mean {near}?")


def test_other_names(monkeypatch):
    assert {"facebook/dinov2-with-registers-base", "dino_vits16_landmarks"} <= set(ALIASES)
    urls = []
    monkeypatch.setattr(weights, "fetch", lambda url: urls.append(url) or MODELS_MD)
    for name in ALIASES:
        weights.weights_file(name)
        assert ALIASES[name] == urls[-1] or BASE_URL + RELEASED[ALIASES[name]][0] == urls[-1]


# -- what the tensors do not tell


def network(dim, num_heads, **options):
    torch.manual_seed(0)
    return VisionTransformer(32, 8, embed_dim=dim, depth=1, num_heads=num_heads,
                             **options).eval()


def test_heads_that_are_not_64_wide(tmp_path):
    images = torch.randn(2, 3, 32, 32)
    file = tmp_path / "backbone.pth"
    for dim, heads in ((320, 4), (32, 1), (96, 3)):
        model = network(dim, heads)
        torch.save(model.state_dict(), file)
        assert torch.equal(load_backbone(file, num_heads=heads)(images), model(images))
        with pytest.raises(ValueError, match=f"--num_heads 7: the width {dim} is no multiple"):
            load_backbone(file, num_heads=7)
    for dim in (32, 96):
        torch.save(network(dim, 1).state_dict(), file)
        with pytest.raises(ValueError, match=f"the width {dim} is no multiple of 64;"):
            load_backbone(file)
    torch.save(network(128, 2).state_dict(), file)
    assert load_backbone(file).num_heads == 2


def test_the_flag_for_heads(tmp_path, capsys, photos, monkeypatch):
    file = tmp_path / "backbone.pth"
    torch.save(network(96, 3).state_dict(), file)
    drawn = []
    monkeypatch.setattr(attention, "draw_attention", lambda view, *_: drawn.append(view))
    line = f"attention {photos / 'cats/01.png'} --weights {file} --image_size 32"
    with pytest.raises(SystemExit):
        visualize.main(line.split())
    assert "take --num_heads" in capsys.readouterr().err
    visualize.main([*line.split(), "--num_heads", "3"])
    assert len(drawn[0].heads) == 3
    config = evaluate.choose_task(["knn"])[1](weights=str(file), num_heads=3)
    assert Extractor(config, Process(torch.device("cpu"))).model.num_heads == 3


def hugging_face(folder, model, kind="dinov2", **changes):
    """A directory as save_pretrained writes it, but for the weights -> the names of these."""
    folder.mkdir(exist_ok=True)
    config = {
        "model_type": kind, "hidden_act": "gelu", "hidden_size": model.embed_dim,
        "num_hidden_layers": model.depth, "num_attention_heads": model.num_heads,
        "patch_size": model.patch_size, "num_channels": 3, "layer_norm_eps": model.norm.eps,
        "image_size": model.img_size, "qkv_bias": True}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return to_hf(model.state_dict())


def test_a_directory_of_hugging_face(tmp_path):
    images = torch.randn(2, 3, 32, 32)
    model = network(160, 2, layerscale=1.0, mask_token=True, norm_eps=1e-2, ffn_layer="swiglu",
                    mlp_ratio=6.0)
    state = hugging_face(tmp_path, model)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert torch.equal(load_backbone(tmp_path)(images), model(images))

    # In two files and an index: given as the directory, and as the index itself.
    (tmp_path / "pytorch_model.bin").unlink()
    weight_map = {}
    for i, keys in enumerate((list(state)[:5], list(state)[5:])):
        write_safetensors(tmp_path / f"{i}.safetensors", {key: state[key] for key in keys})
        weight_map |= {key: f"{i}.safetensors" for key in keys}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for what in (tmp_path, index):
        assert torch.equal(load_backbone(what)(images), model(images))

    # A single file comes first; that of its images says how they are normalised.
    write_safetensors(tmp_path / "model.safetensors", state)
    index.write_text("{}")
    pixels = {"image_mean": [0.5, 0.5, 0.4], "image_std": [0.5, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    loaded = load_backbone(tmp_path)
    assert torch.equal(loaded(images), model(images)) and loaded.norm.eps == 1e-2
    assert loaded.channel_stats == ((0.5, 0.5, 0.4), (0.5, 0.5, 0.6))
    with pytest.raises(ValueError,
                       match="--num_heads 5: the file or its config.json has 2 heads"):
        load_backbone(tmp_path, num_heads=5)


def test_a_folder_of_timm_says_how_images_are_normalised(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", network(128, 2).state_dict())
    config = {"architecture": "vit", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_backbone(tmp_path).channel_stats == ((0.5,) * 3, (0.25,) * 3)
    for value in ("half", {"mean": "half"}, {"std": [0.5, 0.5]}):
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": value}))
        with pytest.raises(ValueError, match="config.json.*(pretrained_cfg|mean|std)"):
            load_backbone(tmp_path)


@pytest.mark.parametrize("changes, words", [
    ({"kind": "vit_mae"}, "model_type 'vit_mae'"), ({"hidden_act": "gelu_new"}, "gelu_new"),
    ({"patch_size": 16}, "has patch_size 16, but the tensors have 8"),
    ({"patch_size": [8, 8]}, "patch_size is"), ({"hidden_size": 384}, "embed_dim 384"),
    ({"num_attention_heads": 3}, "--num_heads 3: the width 128 is no multiple of it"),
    ({"num_attention_heads": True}, "num_attention_heads is True"),
    ({"num_register_tokens": 4}, "has num_register_tokens 4, but the tensors have 0"),
    ({"layer_norm_eps": -1.0}, "layer_norm_eps -1.0")])
def test_a_config_that_does_not_fit(changes, words, tmp_path):
    state = hugging_face(tmp_path, network(128, 2), **changes)
    write_safetensors(tmp_path / "model.safetensors", state)
    with pytest.raises(ValueError, match=words):
        load_backbone(tmp_path)


def test_a_masked_autoencoder_is_refused(tmp_path):
    state = network(64, 1).state_dict()
    state["pos_embed"][0, 0] = 0
    state["pos_embed"][0, 1] = torch.tensor([0.0, 1.0]).repeat(32)
    torch.save(state, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match="fixed and not learned, as in a masked autoencoder"):
        load_backbone(tmp_path / "mae.pth")


# -- damage


def a_run(folder, **changes):
    """What load_backbone reads of a run, with a config.json that was changed."""
    torch.save(network(128, 2).state_dict(), folder / "teacher.pt")
    stored = {"global_batch": 8, "arch": "vit_nano", "patch_size": 8, "in_chans": 3}
    (folder / "config.json").write_text(json.dumps(stored | changes))


@pytest.mark.parametrize("changes, words",
                         [({"patch_size": 0}, "has patch_size 0, but the tensors have 8"),
                          ({"patch_size": 10**18}, "has patch_size 1000000000000000000"),
                          ({"patch_size": 1e18}, "patch_size is 1e.18"),
                          ({"in_chans": 1}, "has in_chans 1"),
                          ({"std": [0.0, 1.0, 1.0]}, "std above 0"),
                          ({"mean": [float("nan"), 0.5, 0.5]}, "mean .nan"),
                          ({"mean": [0.5]}, "one number for each of 3 channels"),
                          ({"std": ["x"]}, "std is"), ({"global_batch": None}, "global_batch")])
def test_damage_to_the_config_of_a_run(changes, words, tmp_path):
    a_run(tmp_path)
    assert load_backbone(tmp_path).num_heads == 2
    a_run(tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as stop:
        load_backbone(tmp_path)
    assert "\n" not in str(stop.value)


def test_damage_to_the_files_of_a_run(tmp_path):
    a_run(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json: not readable as JSON"):
        load_backbone(tmp_path)
    a_run(tmp_path)
    file = tmp_path / "teacher.pt"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    for content, words in ((b"", "not a readable weights file"),
                           (damaged, "does not match its checksum")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_backbone(tmp_path)


def test_tensors_that_make_no_network(tmp_path):
    state = network(64, 1).state_dict()
    far = {"blocks.1000000000.norm1.weight": torch.ones(64)}
    empty = {"patch_embed.proj.weight": torch.zeros(64, 3, 0, 0)}
    without_blocks = {key: x for key, x in state.items() if not key.startswith("blocks.")}
    for bad in (state | far, state | empty, without_blocks):
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="not a Vision Transformer of DINO's layout"):
            load_backbone(tmp_path / "bad.pth")


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


@pytest.mark.parametrize("name", ["dino_vits16", "facebook/dinov2-small", "dino_resnet50"])
def test_without_weights_it_is_like_one_with_weights(name, tmp_path):
    torch.save(VisionTransformer(32, 8, **KINDS[0]).state_dict(), tmp_path / "backbone.pth")
    loaded = load_backbone(tmp_path / "backbone.pth")
    with torch.device("meta"):
        model = weights.untrained(name)
    assert model.channel_stats == loaded.channel_stats and model.training == loaded.training


def test_only_two_networks_of_a_training_are_kept():
    with pytest.raises(ValueError,
                       match="--checkpoint_key studnet: choose from teacher, student"):
        load_backbone("runs/none", "studnet")


@pytest.mark.parametrize("name", ["dino_new", "dino_vitx16", "dino_vits160", "vit_small"])
def test_a_name_that_tells_no_architecture(name):
    with pytest.raises(ValueError, match="expected a name that begins as dino_vits16"):
        weights.untrained(name)


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
    stored = {"global_batch": 8, "arch": "vit_mine", "ffn_layer": "relu", "patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_backbone(tmp_path)(images), model(images))
