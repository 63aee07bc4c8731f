"""Claims
1. In a program that has modules of the names of ours, networks load and run, and afterwards all
   of its modules are its own again, as objects and as imports; sys.path is as it was.
2. In a program that imports such modules after the load, they are its own, too. All names are
   listed and load, a second load has the same classes; networks can be pickled and compiled.
3. Loading imports nothing of ours but the backbones and what they stand on.
4. A released classifier is fetched by the name of its file and reads the right tokens.
5. Networks have the methods of Meta's networks of the same names, which give tensors of the
   shapes in a table that was written by hand; DINO's give the class token first.
6. Weights of another place and another image size are taken, and refused if they do not fit.
7. Depth and segmentation heads stand beside their backbone under the names of Meta's tensors, as
   a table that was written by hand has them; each is fetched by the name of its file, has the
   range of depths or the classes of its data set, and is refused with the difference.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import hubconf
from backbones.weights import RELEASED
from vit import VisionTransformer

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
assert type(whole.backbone).__mro__[1] is type(backbone).__mro__[1]  # one VisionTransformer
importlib.reload(vit)  # importable again, from the caller's own file
assert vit.MARK == "the caller's vit" and "caller" in vit.__file__
for name in ("training.loop", "data"):
    del sys.modules[name]
    assert importlib.import_module(name).MARK == "the caller's " + name
"""

MODULES_IMPORTED_LATER = """
import copy, pickle

backbone = load("dino_vits16")
for module in list(sys.modules.values()):
    if (getattr(module, "__file__", None) or "").startswith(ROOT):
        print(module.__name__)
whole = load("dinov2_vits14_lc", layers=1)
again = load("dinov2_vits14")
assert type(again) is type(whole.backbone)
assert sys.path == path

# The caller's own modules, imported for the first time.
import backbones, vit
assert vit.MARK == "the caller's vit" and backbones.MARK == "the caller's backbones"
try:
    import backbones.weights
except ImportError as error:
    assert "not a package" in str(error), error
else:
    raise AssertionError("the caller's backbones has got our weights")

# Whole networks are copied, pickled and compiled by the names of their modules.
images = images[..., :48, :48]
compiled = torch.compile(backbone, backend="eager")
with torch.no_grad():
    expected = backbone(images)
    assert whole(images[..., :42, :42]).shape == (1, 1000)
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)), compiled):
        assert torch.equal(other(images), expected)
"""


def run_program(text, folder):
    """Run the text as a program in its own folder and process; returns what it printed."""
    (folder / "program.py").write_text(BEGIN + text)
    without_path = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    argv = [sys.executable, "program.py"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, env=without_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def caller(tmp_path):
    """The folder of a program that has modules of our names."""
    folder = tmp_path / "caller"
    (folder / "training").mkdir(parents=True)
    for name in CALLERS_NAMES:
        file = folder / f"{name.replace('.', '/')}.py"
        if name == "training":
            file = folder / "training/__init__.py"
        file.write_text(f'MARK = "the caller\'s {name}"\n')
    (folder / "callers_names.py").write_text(f"NAMES = {CALLERS_NAMES}\n")
    return folder


def test_a_caller_with_modules_of_the_same_names(caller):
    run_program(WITH_OTHER_MODULES, caller)


def test_a_caller_that_imports_such_modules_later(caller):
    loaded = run_program(MODULES_IMPORTED_LATER, caller).split()
    package, *names = zip(*(name.split(".", 1) for name in loaded if name.startswith("hub_")))
    assert len(set(package)) == 1 and len(loaded) == len(package), loaded  # no other names
    names = set(names[0])
    assert {"backbones.weights", "vit"} <= names and "backbones.__main__" not in names
    assert {name.split(".")[0]
            for name in names} <= {"backbones", "vit", "augment", "machinery"}


def test_all_names_are_listed(tmp_path, monkeypatch):
    """As from a clone in torch.hub's folder, where it looks before it asks GitHub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "owner_name_main").symlink_to(ROOT)
    names = torch.hub.list("owner/name:main", skip_validation=True, trust_repo=True)
    expected = {*RELEASED, *(f"{name}_lc" for name in RELEASED), "dino_deits16", "dino_deits8"}
    for size in "sblg":  # without registers: for those with registers Meta has no such heads
        expected |= {f"dinov2_vit{size}14_{ending}" for ending in ("ld", "dd", "ls", "ms")}
    assert set(names) == expected
    assert all(callable(getattr(hubconf, name)) for name in expected)
    help_text = torch.hub.help("owner/name:main", "dinov2_vits14_lc", skip_validation=True)
    assert help_text.startswith("dinov2_vits14 and its classifier")


def untrained(name):
    return hubconf.hub.untrained(name)


# -- the methods of Meta's networks
#
# What they give for 2 images of 2 x 3 patches, written down from the definitions of Meta's
# repositories: B = 2, P = 6, D = 384 in 6 heads of 64.

DINO_SHAPES = {  # name -> feature, attention, all tokens of a block, num_patches at 224 px
    "dino_vits16": ((2, 384), (2, 6, 7, 7), (2, 7, 384), 196),
    "dino_vits8": ((2, 384), (2, 6, 7, 7), (2, 7, 384), 784)}
DINOV2_SHAPES = {  # name -> feature, registers, patches, as a map, all tokens, num_patches at 518
    "dinov2_vits14": ((2, 384), (2, 0, 384), (2, 6, 384), (2, 384, 2, 3), (2, 7, 384), 1369),
    "dinov2_vits14_reg": ((2, 384), (2, 4, 384), (2, 6, 384), (2, 384, 2, 3), (2, 11, 384),
                          1369)}


def block_by_block(model, tokens):
    """As programs for Meta's networks go through them, tokens of several images in one tensor."""
    for block in model.blocks:
        tokens = block(tokens)
    return model.norm(tokens)


def shapes_of(tensors):
    return [tuple(tensor.shape) for tensor in tensors]


@pytest.mark.parametrize("name", DINO_SHAPES)
def test_methods_of_dino(name):
    torch.manual_seed(0)
    model = getattr(hubconf, name)(pretrained=False).eval()
    feature, attention, tokens, num_patches = DINO_SHAPES[name]
    images = torch.randn(2, 3, 2 * model.patch_size, 3 * model.patch_size)
    with torch.no_grad():
        assert model(images).shape == feature
        weights = model.get_last_selfattention(images)
        last = model.get_intermediate_layers(images)
        outs = model.get_intermediate_layers(images, 4)
        assert weights.shape == attention
        torch.testing.assert_close(weights.sum(-1), torch.ones(attention[:-1]))
        assert type(outs) is list and shapes_of(outs) == [tokens] * 4 and len(last) == 1

        # The class token stands in front, the patches behind it, after the final norm.
        inside = model.forward_features(images)
        torch.testing.assert_close(outs[-1][:, 0], model(images))
        torch.testing.assert_close(outs[-1][:, 1:], inside["x_norm_patchtokens"])
        assert torch.equal(last[0], outs[-1])
        torch.testing.assert_close(block_by_block(model, model.prepare_tokens(images)),
                                   outs[-1])
    assert model.num_features == model.embed_dim == feature[1]
    assert model.patch_embed.num_patches == num_patches


@pytest.mark.parametrize("name", DINOV2_SHAPES)
def test_methods_of_dinov2(name):
    torch.manual_seed(0)
    model = getattr(hubconf, name)(pretrained=False).eval()
    feature, registers, patches, as_map, tokens, num_patches = DINOV2_SHAPES[name]
    images, mask = torch.randn(2, 3, 28, 42), torch.zeros(2, 6, dtype=torch.bool)
    with torch.no_grad():
        out = model(images, is_training=True)
        keys = ["x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"]
        assert list(out) == [*keys, "masks"] and out["masks"] is None
        assert shapes_of(out[key] for key in keys) == [feature, registers, patches, tokens]
        torch.testing.assert_close(model(images), out["x_norm_clstoken"])
        assert model(images, masks=mask, is_training=True)["masks"] is mask
        both = model([images, images[..., :28]], masks=[None, None], is_training=True)
        assert shapes_of(o["x_norm_clstoken"] for o in both) == [feature] * 2

        layers = model.get_intermediate_layers
        assert type(layers(images, 2)) is tuple and shapes_of(layers(images,
                                                                     2)) == [patches] * 2
        assert shapes_of(layers(images, [2, 5, 8, 11], reshape=True)) == [as_map] * 4
        for pair in layers(images, n=2, return_class_token=True, norm=False):
            assert shapes_of(pair) == [patches, feature]

        # The first arguments by Meta's names, and the blocks by themselves.
        assert torch.equal(layers(x=images)[0], layers(images)[0])
        all_tokens = block_by_block(model, model.prepare_tokens_with_masks(images, mask))
        torch.testing.assert_close(all_tokens[:, 0], out["x_norm_clstoken"])

        # `head` has no tensors; what is put in its place is used.
        feature_of_images = model(images)
        model.head = torch.nn.Linear(feature[1], 10)
        assert torch.equal(model(images), model.head(feature_of_images))
        assert shapes_of(model([images, images[..., :28]])) == [(2, 10)] * 2
    assert model.num_features == model.embed_dim == feature[1]
    assert model.patch_embed.num_patches == num_patches


def test_methods_of_dinos_convnet():
    """It is torchvision's network, part by part, with nothing in the place of the classifier."""
    model = hubconf.dino_resnet50(pretrained=False).eval()
    expected = torchvision.models.resnet50()
    parts = [name for name, _ in expected.named_children()]
    assert [name for name, _ in model.named_children()] == parts
    assert len(model.state_dict()) == 318 and model.num_features == 2048
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert model(images).shape == (2, 2048)
        last_map = torch.nn.Sequential(*list(model.children())[:-2])(images)
        assert last_map.shape == (2, 2048, 2, 3)
        torch.testing.assert_close(model(images), last_map.mean((2, 3)))


def test_other_weights_and_sizes(tmp_path):
    torch.manual_seed(0)
    file, other = str(tmp_path / "mine.pth"), str(tmp_path / "other.pth")
    mine = VisionTransformer(224, 16, embed_dim=384, depth=12, num_heads=6).eval()
    torch.save(mine.state_dict(), file)
    torch.save(
        VisionTransformer(32, 16, embed_dim=64, depth=2, num_heads=1).state_dict(), other)
    small = hubconf.dino_vits16(weights=file, img_size=64)
    assert small.patch_embed.num_patches == 16 and small.pos_embed.shape == (1, 17, 384)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # resampled once or with every batch: the same positions
        torch.testing.assert_close(small(images), mine(images), rtol=0, atol=1e-5)
    assert hubconf.dinov2_vits14(pretrained=False, img_size=224).pos_embed.shape[1] == 257

    with pytest.raises(ValueError,
                       match="is no dino_vits16: embed_dim 64 instead of 384, depth 2"):
        hubconf.dino_vits16(weights=other)
    with pytest.raises(ValueError, match="does not fit the network"):
        hubconf.dino_resnet50(weights=file)
    with pytest.raises(ValueError, match="a convnet has no table of positions"):
        hubconf.dino_resnet50(pretrained=False, img_size=64)


@pytest.mark.parametrize("word", ["", "LVD142M"])
def test_metas_word_for_the_released_weights(word, monkeypatch):
    names = []

    def load(name):
        names.append(name)
        return untrained(name)

    monkeypatch.setattr(hubconf.hub, "load_backbone", load)
    hubconf.dinov2_vits14(weights=word)
    assert names == ["dinov2_vits14"]


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

    # torch.hub's modules of ours are a copy of its own, so they are replaced there.
    monkeypatch.setattr(hubconf.classifier, "fetch", fetch)
    monkeypatch.setattr(hubconf.hub, "load_backbone", lambda name: untrained(name).eval())
    model = getattr(hubconf, f"{name}_lc")(layers=layers)
    assert len(urls) == 1 and urls[0].endswith("/" + file)
    images, backbone = torch.randn(2, 3, 64, 64), model.backbone
    blocks = 4 if columns > 2 else 1
    with torch.no_grad():
        outs = backbone.get_intermediate_layers(images, blocks, return_class_token=True)
        tokens = [cls for _, cls in outs] + [outs[-1][0].mean(1)] * (columns != 4)
        expected = torch.cat(tokens, 1) @ weight.T + bias
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
        other = getattr(hubconf, f"{name}_lc")(pretrained=False, layers=layers)
        assert other(images).shape == (2, 1000) and other.blocks == model.blocks


@pytest.mark.parametrize("pretrained", [True, False])
def test_classifiers_of_other_blocks(pretrained):
    with pytest.raises(ValueError, match="layers = 3: the classifiers of dinov2_vits14 read 1"):
        hubconf.dinov2_vits14_lc(pretrained=pretrained, layers=3)


# -- heads for every pixel
#
# Names and shapes of Meta's depthers, which its code gives for DepthEncoderDecoder: a backbone of
# width 384 with positions for 37 x 37 patches, and a head beside it.


def backbone_table():
    shapes = {
        "cls_token": (1, 1, 384), "pos_embed": (1, 1370, 384), "mask_token": (1, 384),
        "patch_embed.proj.weight": (384, 3, 14, 14), "patch_embed.proj.bias": (384,),
        "norm.weight": (384,), "norm.bias": (384,)}
    block = {
        "norm1.weight": (384,), "norm1.bias": (384,), "attn.qkv.weight": (1152, 384),
        "attn.qkv.bias": (1152,), "attn.proj.weight": (384, 384), "attn.proj.bias": (384,),
        "ls1.gamma": (384,), "norm2.weight": (384,), "norm2.bias": (384,),
        "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,), "mlp.fc2.weight": (384, 1536),
        "mlp.fc2.bias": (384,), "ls2.gamma": (384,)}
    for i in range(12):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def dpt_table():
    shapes = {
        "reassemble_blocks.resize_layers.0.weight": (48, 48, 4, 4),
        "reassemble_blocks.resize_layers.0.bias": (48,),
        "reassemble_blocks.resize_layers.1.weight": (96, 96, 2, 2),
        "reassemble_blocks.resize_layers.1.bias": (96,),
        "reassemble_blocks.resize_layers.3.weight": (384, 384, 3, 3),
        "reassemble_blocks.resize_layers.3.bias": (384,),
        "project.conv.weight": (256, 256, 3, 3), "project.conv.bias": (256,),
        "conv_depth.head.0.weight": (128, 256, 3, 3), "conv_depth.head.0.bias": (128,),
        "conv_depth.head.2.weight": (32, 128, 3, 3), "conv_depth.head.2.bias": (32,),
        "conv_depth.head.4.weight": (1, 32, 1, 1), "conv_depth.head.4.bias": (1,)}
    for i, channels in enumerate((48, 96, 192, 384)):
        shapes |= {
            f"reassemble_blocks.projects.{i}.conv.weight": (channels, 384, 1, 1),
            f"reassemble_blocks.projects.{i}.conv.bias": (channels,),
            f"reassemble_blocks.readout_projects.{i}.0.weight": (384, 768),
            f"reassemble_blocks.readout_projects.{i}.0.bias": (384,),
            f"convs.{i}.conv.weight": (256, channels, 3, 3),
            f"fusion_blocks.{i}.project.conv.weight": (256, 256, 1, 1),
            f"fusion_blocks.{i}.project.conv.bias": (256,)}
        for unit in (1, 2) if i else (2,):  # the coarsest map is joined with nothing
            for conv in (1, 2):
                key = f"fusion_blocks.{i}.res_conv_unit{unit}.conv{conv}.conv.weight"
                shapes[key] = (256, 256, 3, 3)
    return shapes


def linear_table(n):
    return {"conv_depth.weight": (256, n * 768, 1, 1), "conv_depth.bias": (256,)}


def segmentation_table(n, classes):
    bn = {f"bn.{name}": (n * 384,) for name in "weight bias running_mean running_var".split()}
    conv = {"conv_seg.weight": (classes, n * 384, 1, 1), "conv_seg.bias": (classes,)}
    return bn | {"bn.num_batches_tracked": ()} | conv


# name, arguments -> file of the head, its tensors, and farthest depth or number of classes.
DENSE = [("ld", {}, "nyu_linear4", linear_table(4), 10),
         ("ld", {"layers": 1, "weights": "KITTI"}, "kitti_linear", linear_table(1), 80),
         ("dd", {"weights": "KITTI"}, "kitti_dpt", dpt_table(), 80),
         ("ls", {}, "ade20k_linear", segmentation_table(1, 150), 150),
         ("ms", {"weights": "VOC2012"}, "voc2012_ms", segmentation_table(4, 21), 21)]


@pytest.fixture(scope="module")
def small_vit():
    """The backbone of all networks below, which takes longer to build than what is tested."""
    torch.manual_seed(0)
    return untrained("dinov2_vits14").eval()


@pytest.mark.parametrize("ending, arguments, file, table, number", DENSE,
                         ids=[row[2] for row in DENSE])
def test_heads_for_every_pixel(ending, arguments, file, table, number, small_vit, monkeypatch,
                               tmp_path):
    """A file of random tensors under Meta's names, in the place of the released one."""
    torch.manual_seed(0)
    state = {}
    for key, shape in table.items():
        # The one number without axes is an integer: how many batches BatchNorm has seen.
        state[f"decode_head.{key}"] = torch.rand(shape) / 50 if shape else torch.tensor(5)
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "head.pth")
    urls = []

    def fetch(url):
        urls.append(url)
        return tmp_path / "head.pth"

    # As above, in the copies of our modules that torch.hub has.
    monkeypatch.setitem(hubconf.hub.read_dense_head.__globals__, "fetch", fetch)
    for opened_by in ("load_backbone", "untrained"):
        monkeypatch.setattr(hubconf.hub, opened_by, lambda name: small_vit)
    load = getattr(hubconf, f"dinov2_vits14_{ending}")
    model = load(**arguments)
    assert urls == [
        f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_{file}_head.pth"]

    # Strictly the names and shapes of Meta's networks, and the tensors of the file.
    expected = {f"backbone.{key}": shape for key, shape in backbone_table().items()}
    expected |= {f"decode_head.{key}": shape for key, shape in table.items()}
    tensors = model.state_dict()
    assert {key: tuple(value.shape) for key, value in tensors.items()} == expected
    assert all(torch.equal(tensors[key], value) for key, value in state.items())
    assert not model.training

    images = torch.randn(2, 3, 16, 28)  # no whole number of patches
    with torch.no_grad():
        answer = model(images)
        if ending in ("ld", "dd"):
            assert answer.shape == (2, 1, 16, 28)
            assert (model.decode_head.nearest, model.decode_head.farthest) == (0.001, number)
            assert torch.equal(model.whole_inference(images, None, rescale=True), answer)
            assert load(**arguments, depth_range=(1.0, 2.0))(images).min() >= 1
        else:
            assert answer.shape == (2, number, 16, 28)
        untrained_one = load(pretrained=False, **arguments)
        assert untrained_one(images[:1, :, :14, :14]).shape[-2:] == (14, 14)

    # One tensor more, one less, and one of another shape.
    key = next(iter(state))
    state["decode_head.other"] = state.pop(key)
    torch.save({"state_dict": state}, tmp_path / "head.pth")
    name = key.removeprefix("decode_head.")
    with pytest.raises(ValueError, match=f"missing {name}.*unexpected other"):
        load(**arguments)


def test_the_range_decides_what_a_linear_head_says(small_vit, monkeypatch, tmp_path):
    """Meta's hub has 80 metres in every linear head: 8 times what a head of NYU has learned."""
    torch.manual_seed(0)
    monkeypatch.setattr(hubconf.hub, "untrained", lambda name: small_vit)
    model = hubconf.dinov2_vits14_ld(pretrained=False)
    torch.save(model.decode_head.state_dict(), tmp_path / "head.pt")
    monkeypatch.setattr(hubconf.hub, "load_backbone", lambda name: model.backbone)
    images = torch.randn(1, 3, 28, 28)
    ours = hubconf.dinov2_vits14_ld(weights=str(tmp_path / "head.pt"))  # a file: as NYU's
    metas = hubconf.dinov2_vits14_ld(weights=tmp_path / "head.pt", depth_range=(0.001, 80))
    with torch.no_grad():
        assert torch.equal(ours(images), model(images))
        ratio = metas(images) / ours(images)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 8), rtol=1e-3, atol=0)

    # A file of evaluate.py depth knows its range.
    torch.save(
        {
            "state_dict": model.decode_head.state_dict(), "settings": {
                "depth_head": "linear4", "nearest": 0.001, "farthest": 80.0}},
        tmp_path / "own.pt")
    own = hubconf.dinov2_vits14_ld(weights=str(tmp_path / "own.pt"))
    with torch.no_grad():
        assert torch.equal(own(images), metas(images))


def test_misfits_of_heads(small_vit, monkeypatch, tmp_path):
    for opened_by in ("load_backbone", "untrained"):
        monkeypatch.setattr(hubconf.hub, opened_by, lambda name: small_vit)
    with pytest.raises(ValueError, match="layers = 2: .* read 1 or 4 blocks"):
        hubconf.dinov2_vits14_ld(layers=2)
    with pytest.raises(ValueError, match="rescale=False"):
        hubconf.dinov2_vits14_dd(pretrained=False).whole_inference(None, rescale=False)
    with pytest.raises(ValueError, match="weights='nyuu': expected NYU, KITTI, or the file"):
        hubconf.dinov2_vits14_ld(weights="nyuu")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError,
                       match="list.pt: expected the tensors of a head, found a list"):
        hubconf.dinov2_vits14_ld(weights=tmp_path / "list.pt")
    with pytest.raises(ValueError, match="weights='ade': expected ADE20K, VOC2012, or the"):
        hubconf.dinov2_vits14_ls(weights="ade")
    with pytest.raises(ValueError, match="img_size=5: smaller than one patch of 14"):
        hubconf.dinov2_vits14(pretrained=False, img_size=5)

    # A head of one's own has the number of classes that it has.
    head = hubconf.hub.SegmentationHead(384, 7)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    own = hubconf.dinov2_vits14_ls(weights=str(tmp_path / "head.pt"))
    with torch.no_grad():
        assert own(torch.randn(1, 3, 28, 28)).shape == (1, 7, 28, 28)
    with pytest.raises(ValueError, match="bn.weight is .384,., expected .1536,."):
        hubconf.dinov2_vits14_ms(weights=str(tmp_path / "head.pt"))
