"""Claims
1. Exported, official or for Hugging Face, and read again, a backbone gives the same features.
   A .safetensors file also says what no tensor does; of a .pth file that is printed.
2. The folder for Hugging Face is read by transformers' AutoModel and pipeline as it is, for DINO,
   DINOv2 and registers; it prepares images as our evaluations do.
3. Its README.md has the card of the run, and says nothing of weights that have none.
4. What cannot be exported so is refused in one line.
"""

import json
import re

import pytest
import torch
from test_weights import KINDS
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from augment import RGB, center_crop, normalise
from backbones.__main__ import main
from backbones.convnet import ConvNet
from backbones.export import hf_config
from backbones.weights import load_backbone, read_backbone
from vit import FFNS, Mlp, VisionTransformer

TYPES = ["vit", "dinov2", "dinov2_with_registers"]  # of KINDS, as Hugging Face calls them


def random_vit(kind, folder):
    """(a network, the file of its weights); its factors and tokens are no ones and zeros."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, **kind).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma") or name in ("cls_token", "register_tokens"):
            torch.nn.init.normal_(parameter)
    torch.save(model.state_dict(), folder / "original.pth")
    return model, str(folder / "original.pth")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to, name, read", [("official", "out.pth", "out.pth"),
                                            ("official", "out.safetensors", "out.safetensors"),
                                            ("hf", "out", "out/model.safetensors")])
def test_export_and_back(kind, to, name, read, tmp_path):
    model, original = random_vit(kind, tmp_path)
    main(["export", original, "--to", to, "--output", str(tmp_path / name)])
    loaded = load_backbone(tmp_path / read)
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        assert torch.equal(model(images), loaded(images))
    if to == "official":
        assert read_backbone(tmp_path / read)[0].keys() == model.state_dict().keys()


def test_what_no_tensor_says_comes_along(tmp_path, capsys):
    """Images that are normalised otherwise, another rule for positions, heads of another width."""
    run = tmp_path / "run"
    run.mkdir()
    model = VisionTransformer(32, 8, embed_dim=384, depth=12, num_heads=6)
    torch.save(model.state_dict(), run / "teacher.pt")
    fields = dict(global_batch=8, arch="vit_small", mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0],
                  pos_embed_resize="antialias")
    (run / "config.json").write_text(json.dumps(fields))
    main(["export", str(run), "--output", str(tmp_path / "out.safetensors")])
    loaded = load_backbone(tmp_path / "out.safetensors")
    assert loaded.channel_stats == load_backbone(run).channel_stats != RGB
    assert loaded.pos_embed_resize == "antialias"
    assert read_backbone(tmp_path / "out.safetensors")[1]["num_heads"] == 6
    capsys.readouterr()
    main(["export", str(run), "--output", str(tmp_path / "out.pth")])
    assert "holds tensors only, and not mean [0.1, 0.2, 0.3]" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_convnet_keeps_its_name_and_its_size(ending, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    torch.save(ConvNet("resnet18").state_dict(), run / "teacher.pt")
    fields = dict(global_batch=8, arch="resnet18", global_crops_size=64)
    (run / "config.json").write_text(json.dumps(fields))
    main(["export", str(run), "--output", str(tmp_path / f"out.{ending}")])
    if ending == "pth":
        assert "arch resnet18, global_crops_size 64;" in capsys.readouterr().out
        return
    loaded = load_backbone(tmp_path / "out.safetensors")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), load_backbone(run)(images))
    assert (loaded.name, loaded.img_size) == ("resnet18", 64)


def test_a_layer_that_somebody_has_added(tmp_path, monkeypatch, capsys):
    """Its tensors may have the names of the MLP, but it computes something else."""

    class Relu(Mlp):

        def forward(self, x, groups=None):
            return self.fc2(self.fc1(x).relu())

    monkeypatch.setitem(FFNS, "relu", Relu)
    torch.manual_seed(0)
    run = tmp_path / "run"
    run.mkdir()
    model = VisionTransformer(32, 8, embed_dim=64, depth=1, num_heads=1,
                              ffn_layer="relu").eval()
    torch.save(model.state_dict(), run / "teacher.pt")
    fields = dict(global_batch=8, ffn_layer="relu")
    (run / "config.json").write_text(json.dumps(fields))
    main(["export", str(run), "--output", str(tmp_path / "out.safetensors")])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "out.safetensors")(images), model(images))
    with pytest.raises(SystemExit):
        main(["export", str(run), "--to", "hf", "--output", str(tmp_path / "hf")])
    assert "transformers has no feed-forward layer relu" in capsys.readouterr().err


@pytest.mark.parametrize("kind, rule", [(KINDS[0], "antialias"), (KINDS[2], "offset")])
def test_our_own_reader_knows_the_rule_for_positions(kind, rule, tmp_path):
    """A folder of Hugging Face has no word for it, but the file of tensors has."""
    run = tmp_path / "run"
    run.mkdir()
    model, _ = random_vit(dict(kind, pos_embed_resize=rule), tmp_path)
    torch.save(model.state_dict(), run / "teacher.pt")
    fields = dict(global_batch=8, pos_embed_resize=rule)
    (run / "config.json").write_text(json.dumps(fields))
    main(["export", str(run), "--to", "hf", "--output", str(tmp_path / "out")])
    loaded = load_backbone(tmp_path / "out")
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        assert loaded.pos_embed_resize == rule and torch.equal(loaded(images), model(images))


def test_heads_that_the_file_does_not_tell(tmp_path):
    model = VisionTransformer(32, 16, embed_dim=128, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    out = str(tmp_path / "out.safetensors")
    main(["export", str(tmp_path / "file.pth"), "--num_heads", "1", "--output", out])
    assert load_backbone(out).num_heads == 1


@pytest.mark.parametrize("there, written", [("", True), ("export", True), ("README.md", False),
                                            ("config.json", False), ("teacher.pt", False)])
def test_a_folder_with_other_files_is_left_alone(there, written, tmp_path, capsys):
    _, original = random_vit(KINDS[0], tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["export", original, "--to", "hf", "--output", str(out)]
    if there == "export":
        main(arguments)
    elif there:
        (out / there).write_text("mine")
    if written:
        main(arguments)
        assert load_backbone(out)
    else:
        with pytest.raises(SystemExit):
            main(arguments)
        assert f"--output {out}: there are other files in this folder" in capsys.readouterr(
        ).err
        assert [path.read_text() for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind, model_type", [*zip(KINDS, TYPES)])
def test_the_folder_says_what_it_is(kind, model_type, tmp_path):
    model, original = random_vit(kind, tmp_path)
    main(["export", original, "--to", "hf", "--output", str(tmp_path / "out")])
    names = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == model_type and config["image_size"] == 32
    assert config["num_attention_heads"] == kind["num_heads"]
    assert config["layer_norm_eps"] == 1e-6
    readme = (tmp_path / "out/README.md").read_text()
    assert readme.startswith("---\nlibrary_name: transformers") and f"# {original}\n" in readme


@pytest.mark.parametrize("kind, model_type", [*zip(KINDS, TYPES)])
def test_transformers_read_the_folder(kind, model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, original = random_vit(kind, tmp_path)
    out = str(tmp_path / "out")
    main(["export", original, "--to", "hf", "--output", out])
    theirs, loading = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert theirs.config.model_type == model_type
    assert not any(loading.values()), loading  # no tensor is missing, and none left over

    # Their pipeline prepares an image and gives all its tokens. At 296 x 222 pixels the centre is
    # the same one in both libraries; where a half pixel is rounded otherwise it lies one beside.
    image = torch.randint(0, 256, (1, 3, 74, 56), dtype=torch.uint8).float()
    image = torch.nn.functional.interpolate(image, size=(296, 222), mode="bilinear")
    image = to_pil_image(image[0].byte())
    pipe = transformers.pipeline("image-feature-extraction", model=out)
    tokens = torch.tensor(pipe(image)[0])
    pixels = normalise(center_crop(pil_to_tensor(image), 32)[None], RGB)
    with torch.no_grad():
        ours = model.forward_features(pixels)
        answer = theirs(pixels)
    torch.testing.assert_close(answer.pooler_output, ours["x_norm_clstoken"], rtol=0, atol=1e-4)
    inside = answer.last_hidden_state
    torch.testing.assert_close(inside[:, 0], ours["x_norm_clstoken"], rtol=0, atol=1e-4)
    patches = inside[:, 1 + model.num_register_tokens:]
    torch.testing.assert_close(patches, ours["x_norm_patchtokens"], rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens, inside[0], rtol=0, atol=1e-4)


def test_heads_of_another_width_are_told():
    """The tensors do not say how many heads there are; the network does."""
    model = VisionTransformer(32, 16, embed_dim=96, depth=2, num_heads=3)
    assert hf_config(model)["num_attention_heads"] == 3


def test_the_card_of_a_run_comes_along(tmp_path):
    model, _ = random_vit(KINDS[0], tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    torch.save(model.state_dict(), run / "teacher.pt")
    (run / "config.json").write_text(json.dumps({"global_batch": 8, "mean": [0.5, 0.5, 0.5]}))
    (run / "card.md").write_text("# run\n\n- Data: `shapes`.\n")
    main(["export", str(run), "--to", "hf", "--output", str(tmp_path / "out")])
    assert "\n# run\n\n- Data: `shapes`.\n" in (tmp_path / "out/README.md").read_text()
    prepare = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert prepare["image_mean"] == [0.5] * 3 and prepare["image_std"] == list(RGB.std)


@pytest.mark.parametrize("line, words", [
    ("FILE --to hf --output out.safetensors", "--to hf writes a folder"),
    ("CONVNET --to hf --output out", "--to hf: expected a Vision Transformer.* conv1.weight"),
    ("NARROW --to hf --output out", "a feed-forward layer of 2.5 times the width; dinov2 has"),
    ("FILE --to timm", "--to: invalid choice"),
    ("FILE --output /none/out.pth", "--output /none/out.pth: there is no folder /none")])
def test_refusals(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, file = random_vit(KINDS[0], tmp_path)
    if "NARROW" in line:
        model = VisionTransformer(32, 8, embed_dim=64, depth=1, num_heads=1, layerscale=1.0,
                                  mlp_ratio=2.5)
        torch.save(model.state_dict(), tmp_path / "narrow.pth")
        line = line.replace("NARROW", "narrow.pth")
    if "CONVNET" in line:
        torch.save(ConvNet("resnet50").state_dict(), tmp_path / "convnet.pth")
    with pytest.raises(SystemExit) as stop:
        main(["export", *line.replace("FILE", file).replace("CONVNET", "convnet.pth").split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(words, error)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pth"}  # nothing was written
