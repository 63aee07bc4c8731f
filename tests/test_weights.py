"""Claims
1. The architecture is read off the tensors, for every kind of backbone, and loading is strict.
2. What does not fit is refused with the difference.
"""

import pytest
import torch

from vit import VisionTransformer
from weights import load_backbone, load_strictly

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
    with pytest.raises(ValueError, match="flat dictionary"):
        load_backbone(tmp_path / "nested.pth")


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
