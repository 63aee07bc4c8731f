"""Claims
1. Each kind of input is the columns that the papers' code would concatenate.
2. Released heads of both families are understood; DINO's interleaved columns are sorted.
3. A released classifier is fetched by its name; a backbone with its head is that linear layer
   on its tokens.
"""

import pytest
import torch

from backbones import classifier
from backbones.classifier import Blocks, Classifier, kinds_of_input, read_head, released_head
from backbones.weights import BASE_URL
from vit import VisionTransformer


def test_kinds_are_the_papers():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=5, num_heads=1).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        row = Blocks(model, 4)(images)
        outs = model.get_intermediate_layers(images, 5, return_class_token=True)
    mean = outs[-1][0].mean(1)
    for (n, pool), columns in kinds_of_input(64, (1, 4), (False, True)).items():
        expected = torch.cat([cls for _, cls in outs[-n:]] + [mean] * pool, 1)
        assert torch.equal(row[:, columns], expected)


def test_released_heads():
    torch.manual_seed(0)
    cls, mean, bias = torch.randn(2, 8), torch.randn(2, 8), torch.randn(3)
    weight = torch.randn(3, 16)
    # DINO stacks class token and mean on a new last axis and flattens: c0 a0 c1 a1 ...
    expected = torch.stack([cls, mean], -1).flatten(1) @ weight.T
    state = {"state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}
    n, pool, sorted_weight, _ = released_head(state, 8)
    assert (n, pool) == (1, True)
    torch.testing.assert_close(torch.cat([cls, mean], 1) @ sorted_weight.T, expected)
    for columns, kind in ((8, (1, False)), (16, (1, True)), (32, (4, False)), (40, (4, True))):
        weight = torch.randn(3, columns)
        n, pool, same_weight, _ = released_head({"weight": weight, "bias": bias}, 8)
        assert (n, pool) == kind and torch.equal(same_weight, weight)
    with pytest.raises(ValueError, match="reads 24 columns.*8, 16, 32, 40"):
        released_head({"weight": torch.randn(3, 24), "bias": bias}, 8)
    with pytest.raises(ValueError, match="found cls_token"):
        released_head({"cls_token": bias}, 8)
    with pytest.raises(ValueError, match="40 columns under DINO's names"):
        released_head({"linear.weight": torch.randn(3, 40), "linear.bias": bias}, 8)


FILES = [
    ("dino_vits16", 4, "dino/dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth"),
    ("dino_deits16", 4, "dino/dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth"),
    ("dinov2_vits14", 1, "dinov2/dinov2_vits14/dinov2_vits14_linear_head.pth"),
    ("dinov2_vits14_reg", 4, "dinov2/dinov2_vits14/dinov2_vits14_reg4_linear4_head.pth")]


@pytest.mark.parametrize("name, layers, file", FILES)
def test_heads_are_found_by_name(name, layers, file, tmp_path, monkeypatch):
    head = {"weight": torch.randn(2, 8), "bias": torch.randn(2)}
    torch.save(head, tmp_path / "head.pth")
    urls = []

    def fetch(url):
        urls.append(url)
        return tmp_path / "head.pth"

    monkeypatch.setattr(classifier, "fetch", fetch)
    for state in (read_head(f"{name}_lc", layers), read_head(tmp_path / "head.pth")):
        assert all(torch.equal(state[key], head[key]) for key in head)
    assert urls == [BASE_URL + file]
    if name.startswith("dinov2"):
        with pytest.raises(ValueError, match="layers = 2: the classifiers of .* read 1 or 4"):
            read_head(f"{name}_lc", 2)


@pytest.mark.parametrize("state, words", [
    ([], "found a list"), (torch.zeros(3), "found a Tensor"),
    (dict(weight=torch.zeros(3), bias=torch.zeros(3)), r"a weight \(3,\) with a bias \(3,\)"),
    (dict(weight=torch.zeros(3, 8), bias=torch.zeros(2)), r"with a bias \(2,\); expected")])
def test_what_is_no_linear_layer(state, words):
    with pytest.raises(ValueError, match=words):
        released_head(state, 8)


@pytest.mark.parametrize("columns, blocks, pool, told",
                         [(1, 1, 0, 0), (2, 1, 1, 0), (4, 4, 0, 0), (5, 4, 1, 0), (2, 2, 0, 1),
                          (4, 3, 1, 1)])
def test_a_backbone_with_its_head(columns, blocks, pool, told):
    """Of other choices than those of the papers the kind is told."""
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=5, num_heads=1).eval()
    weight, bias = torch.randn(3, columns * 64), torch.randn(3)
    kind = (blocks, bool(pool)) if told else None
    whole = Classifier(model, {"weight": weight, "bias": bias}, kind).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        outs = model.get_intermediate_layers(images, blocks, return_class_token=True)
        tokens = [cls for _, cls in outs] + [outs[-1][0].mean(1)] * pool
        expected = torch.cat(tokens, 1) @ weight.T + bias
        torch.testing.assert_close(whole(images), expected, rtol=1e-5, atol=1e-5)
