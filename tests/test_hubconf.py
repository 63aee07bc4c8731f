"""Claims
1. In a program that has modules of the names of ours, networks load and run, and afterwards all
   of its modules are its own again, as objects and as imports; sys.path is as it was.
2. In any other program all names are listed and load, a second load has the same classes, and a
   state_dict can be pickled.
3. Loading imports nothing of ours but the backbones and what they stand on.
4. A released classifier is fetched by the name of its file and reads the right tokens.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from backbones import classifier, weights
from backbones.weights import RELEASED

ROOT = Path(__file__).resolve().parents[1]

# What the modules of a caller are called: ours of today, and some of those that we had before.
CALLERS_NAMES = ["data", "vit", "losses", "augment", "weights", "runtime", "utils"]
CALLERS_NAMES += ["backbones", "machinery", "training", "training.loop"]

# Begins every program below. Nothing is fetched: `pretrained=False`.
BEGIN = f"""
import sys
import torch

ROOT = {str(ROOT)!r}
def load(name, **how):
    return torch.hub.load(ROOT, name, source="local", pretrained=False, **how)

path = list(sys.path)
torch.manual_seed(0)
images = torch.randn(1, 3, 56, 56)
"""

WITH_OTHER_MODULES = """
import importlib
from callers_names import NAMES
modules = {name: importlib.import_module(name) for name in NAMES}
import training.loop, vit

def check():
    for name, module in modules.items():
        assert sys.modules[name] is module, name
        assert module.MARK == "the caller's " + name, module.MARK
    assert sys.path == path, sys.path
    import vit as vit_now, backbones as backbones_now
    assert vit_now is vit and vit.MARK == "the caller's vit" and backbones_now.MARK
    assert training.loop.MARK == "the caller's training.loop"
    try:
        import backbones.weights
    except ImportError as error:
        assert "not a package" in str(error), error  # ours does not hide below the caller's name
    else:
        raise AssertionError("the caller's backbones has got our weights")

backbone = load("dino_vits16")
check()
whole = load("dinov2_vits14_lc")
check()
with torch.no_grad():
    assert backbone(images[..., :48, :48]).shape == (1, 384)
    assert whole(images).shape == (1, 1000)
    assert load("dino_vits8")(images).shape == (1, 384)  # and a network of a third load
check()
assert type(whole.backbone) is type(backbone)
importlib.reload(vit)  # importable again, from the caller's own file
assert vit.MARK == "the caller's vit" and "caller" in vit.__file__
for name in ("training.loop", "data"):
    del sys.modules[name]
    assert importlib.import_module(name).MARK == "the caller's " + name
"""

WITHOUT_OTHER_MODULES = """
import pickle

backbone = load("dino_vits16")
for name, module in sys.modules.items():
    if (getattr(module, "__file__", None) or "").startswith(ROOT):
        print(name)
whole = load("dinov2_vits14_lc", layers=1)
again = load("dinov2_vits14")
assert type(again) is type(backbone) is type(whole.backbone)
assert type(load("dino_vits16_lc")) is type(whole)
assert sys.path == path
with torch.no_grad():
    expected = backbone(images[..., :48, :48])
    assert whole(images).shape == (1, 1000)
state = pickle.loads(pickle.dumps(backbone.state_dict()))
other = load("dino_vits16")
other.load_state_dict(state)
with torch.no_grad():
    assert torch.equal(other(images[..., :48, :48]), expected)

import backbones.weights, vit  # ours stay where the caller has none
assert isinstance(backbone, vit.VisionTransformer)
"""


def run_program(text, folder):
    """Run the text as a program in its own folder and process; returns what it printed."""
    (folder / "program.py").write_text(BEGIN + text)
    without_path = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    argv = [sys.executable, "program.py"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=without_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_caller_with_modules_of_the_same_names(tmp_path):
    caller = tmp_path / "caller"
    (caller / "training").mkdir(parents=True)
    for name in CALLERS_NAMES:
        file = caller / f"{name.replace('.', '/')}.py"
        if name == "training":
            file = caller / "training/__init__.py"
        file.write_text(f'MARK = "the caller\'s {name}"\n')
    (caller / "callers_names.py").write_text(f"NAMES = {CALLERS_NAMES}\n")
    run_program(WITH_OTHER_MODULES, caller)


def test_a_caller_without_such_modules(tmp_path):
    loaded = run_program(WITHOUT_OTHER_MODULES, tmp_path).split()
    assert "backbones.weights" in loaded and "vit" in loaded
    rooms = {name.split(".")[0] for name in loaded}
    assert rooms <= {"backbones", "vit", "augment", "machinery", "hubconf"}
    assert not {"backbones.__main__"} & set(loaded)


def test_all_names_are_listed(tmp_path, monkeypatch):
    """As from a clone in torch.hub's folder, where it looks before it asks GitHub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "owner_name_main").symlink_to(ROOT)
    names = torch.hub.list("owner/name:main", skip_validation=True, trust_repo=True)
    expected = {*RELEASED, *(f"{name}_lc" for name in RELEASED), "dino_deits16", "dino_deits8"}
    assert set(names) == expected
    assert all(callable(getattr(hubconf, name)) for name in expected)
    help_text = torch.hub.help("owner/name:main", "dinov2_vits14_lc", skip_validation=True)
    assert help_text.startswith("dinov2_vits14 and its classifier")


def test_the_first_names():
    model = torch.hub.load(str(ROOT), "dino_deits8", source="local", pretrained=False)
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
    urls = []

    def fetch(url):
        urls.append(url)
        return tmp_path / "head.pth"

    monkeypatch.setattr(classifier, "fetch", fetch)
    monkeypatch.setattr(weights, "load_backbone", lambda name: weights.untrained(name).eval())
    model = getattr(hubconf, f"{name}_lc")(layers=layers)
    assert len(urls) == 1 and urls[0].endswith("/" + file)
    images, backbone = torch.randn(2, 3, 64, 64), model.backbone
    blocks = 4 if columns > 2 else 1
    with torch.no_grad():
        outs = backbone.get_intermediate_layers(images, blocks, return_class_token=True)
        tokens = [cls for _, cls in outs] + [outs[-1][0].mean(1)] * (columns != 4)
        expected = torch.cat(tokens, 1) @ weight.T + bias
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
        untrained = getattr(hubconf, f"{name}_lc")(pretrained=False, layers=layers)
        assert untrained(images).shape == (2, 1000) and untrained.blocks == model.blocks
