"""Claims
1. Sizes and keys of the published head, to the unit.
2. Logits are cosines; the weight is g v / |v|, as torch's own weight norm has it, gradients too.
3. norm_last_layer freezes the gains, and only them.
"""

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from heads import DINOHead, Prototypes


@pytest.mark.parametrize("dim, bottleneck, k, expected", [(384, 256, 65536, 22_352_128),
                                                          (1024, 256, 65536, 23_662_848),
                                                          (1024, 384, 131072, 57_545_088)])
def test_parameters(dim, bottleneck, k, expected):
    with torch.device("meta"):
        head = DINOHead(dim, k, bottleneck_dim=bottleneck)
    assert sum(p.numel() for p in head.parameters()) == expected


def test_keys():
    assert set(DINOHead(8, 16, 8, 4).state_dict()) == {
        "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight",
        "mlp.4.bias", "last_layer.weight_g", "last_layer.weight_v"}
    bn = DINOHead(8, 16, 8, 4, use_bn=True).state_dict()
    assert {"mlp.1.running_mean", "mlp.4.running_mean", "mlp.6.weight"} <= set(bn)
    assert "mlp.weight" in DINOHead(8, 16, 8, 4, nlayers=1).state_dict()


def test_logits_are_cosines():
    torch.manual_seed(0)
    head = DINOHead(8, 500, 32, 16).double()
    x = torch.randn(20, 8).double()
    logits = head(x)
    assert logits.abs().max() <= 1
    weight = head.last_layer.weight()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(500).double())


def test_weight_norm_equals_torch():
    torch.manual_seed(0)
    prototypes = Prototypes(6, 10, learn_gain=True).double()
    prototypes.weight_g.data.uniform_(0.5, 2)
    linear = weight_norm(torch.nn.Linear(6, 10, bias=False)).double()
    linear.parametrizations.weight.original0.data.copy_(prototypes.weight_g.data)
    linear.parametrizations.weight.original1.data.copy_(prototypes.weight_v.data)
    x = torch.randn(3, 6).double()
    torch.testing.assert_close(prototypes(x), linear(x))
    prototypes(x).pow(2).sum().backward()
    linear(x).pow(2).sum().backward()
    torch.testing.assert_close(prototypes.weight_v.grad,
                               linear.parametrizations.weight.original1.grad)
    torch.testing.assert_close(prototypes.weight_g.grad,
                               linear.parametrizations.weight.original0.grad)


def test_frozen_gain():
    frozen = {n for n, p in DINOHead(8, 16, 8, 4).named_parameters() if not p.requires_grad}
    assert frozen == {"last_layer.weight_g"}
    assert all(p.requires_grad
               for p in DINOHead(8, 16, 8, 4, norm_last_layer=False).parameters())
