"""Claims
1. Schedules start, peak and end where the papers' code has them.
2. Biases and vectors do not decay, everything else does; lower layers learn more slowly.
3. Both clip modes equal a plain loop; 0 means no clipping.
4. The teacher is an exact moving average; a step that is not finite moves nothing, and if it is
   the first one, the next step is as it would have been without it.
5. LARS equals its formula; with every optimiser prototypes rest while their rate is zero.
6. Scaled for fp16, gradients are as unscaled; the factor halves on overflow, doubles after a
   while.
"""

import math

import pytest
import torch
from torch import nn

from backbones.convnet import ConvNet
from heads import DINOHead
from training.optim import (LARS, OPTIMIZERS, LossScale, clip_gradients, cosine, ema_update,
                            linear, parameter_groups, set_schedule)
from vit import ARCHS, VisionTransformer


def test_cosine():
    values = [cosine(i, 1.0, 0.1, 100, 10) for i in range(100)]
    assert values[0] == 0 and values[9] == values[10] == 1.0  # base appears twice, as published
    assert values[55] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90)))
    assert cosine(0, 0.996, 1, 100) == 0.996


def test_linear():
    assert [linear(i, 0.04, 0.07, 4)
            for i in range(6)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert linear(0, 0.04, 0.07, 0) == 0.07
    # A warm-up of one epoch has the first temperature: it is what numpy's linspace gives.
    assert [linear(i, 0.04, 0.07, 1) for i in range(3)] == [0.04, 0.07, 0.07]


def test_groups():
    model = nn.ModuleDict({
        "backbone": VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1),
        "dino_head": DINOHead(64, 8, 8, 4)})
    groups = parameter_groups(model)
    decayed = {id(p) for g in groups for p in g["params"] if g["decay"]}
    plain = {id(p) for g in groups for p in g["params"] if not g["decay"]}
    for name, p in model.named_parameters():
        if name == "dino_head.last_layer.weight_g":  # frozen
            assert id(p) not in decayed | plain
        else:
            assert id(p) in (plain
                             if name.endswith("bias") or "norm" in name else decayed), name
    # torchvision's ConvNeXt has its LayerScale as maps of one pixel.
    convnext = ConvNet("convnext_tiny")
    free = {id(p) for g in parameter_groups(convnext) for p in g["params"] if not g["decay"]}
    scales = [p for name, p in convnext.named_parameters() if name.endswith("layer_scale")]
    assert scales and all(p.ndim == 3 and id(p) in free for p in scales)

    optimizer = OPTIMIZERS["adamw"](groups)
    set_schedule(optimizer, dict(lr=0.3, weight_decay=0.2))
    assert {(g["lr"], g["weight_decay"])
            for g in optimizer.param_groups} == {(0.3, 0.2), (0.3, 0)}


def test_layerwise_decay():
    """ViT-L and decay .9, as in DINOv2's configuration: 52 groups, these multipliers."""
    with torch.device("meta"):
        model = nn.ModuleDict({
            "backbone": VisionTransformer(**ARCHS["vit_large"], layerscale=1e-5,
                                          mask_token=True, num_register_tokens=4)})
    groups = parameter_groups(model, 0.9, 0.2)
    names = {id(p): n.removeprefix("backbone.") for n, p in model.named_parameters()}
    settings = {names[id(p)]: (g["lr_mult"], g["decay"]) for g in groups for p in g["params"]}
    assert len(groups) == 52
    for name, expected in {
            "cls_token": 0.0718, "register_tokens": 0.0718, "patch_embed.proj.weight": 0.01436,
            "blocks.0.attn.qkv.weight": 0.0798, "blocks.23.mlp.fc2.weight": 0.9,
            "norm.weight": 1.0}.items():
        assert settings[name][0] == pytest.approx(expected, rel=1e-3), name
    assert settings["blocks.3.ls1.gamma"][1] == 0 and settings["mask_token"][1] == 1


def networks_with_gradients():
    torch.manual_seed(0)
    networks = [nn.Linear(5, 4), nn.Linear(4, 3)]
    for network in networks:
        for p in network.parameters():
            p.grad = 3 * torch.randn_like(p)
    return networks


@pytest.mark.parametrize("mode", ["parameter", "network"])
def test_clip(mode):
    networks, reference = networks_with_gradients(), networks_with_gradients()
    norm = clip_gradients(networks, 2.0, mode)
    squares = [p.grad.square().sum().item() for net in reference for p in net.parameters()]
    assert norm.item() == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
    for network in reference:
        if mode == "network":
            nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        else:
            for p in network.parameters():
                nn.utils.clip_grad_norm_([p], 2.0)
    for network, expected in zip(networks, reference):
        for p, q in zip(network.parameters(), expected.parameters()):
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("mode", ["parameter", "network"])
def test_no_clipping(mode):
    networks = networks_with_gradients()
    before = [p.grad.clone() for p in networks[0].parameters()]
    clip_gradients(networks, 0.0, mode)
    assert all(torch.equal(grad, p.grad) for grad, p in zip(before, networks[0].parameters()))


def test_ema():
    teacher, student = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    expected = 0.99 * teacher.weight + 0.01 * student.weight
    ema_update(teacher, student, 0.99)
    torch.testing.assert_close(teacher.weight, expected, rtol=1e-6, atol=1e-8)
    before = teacher.weight.clone()
    ema_update(teacher, student, 0.99, torch.tensor(0.0))
    assert torch.equal(teacher.weight, before)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_bad_step_moves_nothing(name):
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = OPTIMIZERS[name](parameter_groups(nn.ParameterDict({"p": p})))
    set_schedule(optimizer, dict(lr=0.1, weight_decay=0.1))
    p.grad, optimizer.found_inf = torch.randn(4, 4), torch.tensor(0.0)
    before = p.detach().clone()
    optimizer.step()
    after_good_step = p.detach().clone()
    assert not torch.equal(before, after_good_step)
    p.grad, optimizer.found_inf = torch.full((4, 4), float("nan")), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(after_good_step, p.detach())
    assert all(v.isfinite().all() for v in optimizer.state[p].values() if torch.is_tensor(v))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_bad_first_step_leaves_nothing_behind(name):
    weights, gradient = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    after = []
    for first_is_bad in (False, True):
        p = nn.Parameter(weights.clone())
        optimizer = OPTIMIZERS[name](parameter_groups(nn.ParameterDict({"p": p})))
        set_schedule(optimizer, dict(lr=0.1, weight_decay=0.1))
        if first_is_bad:
            p.grad, optimizer.found_inf = torch.full_like(p, float("nan")), torch.tensor(1.0)
            optimizer.step()
        for _ in range(2):
            p.grad, optimizer.found_inf = gradient.clone(), torch.tensor(0.0)
            optimizer.step()
        after.append(p.detach())
    assert torch.equal(*after)


def test_lars_formula():
    torch.manual_seed(0)
    p, bias = nn.Parameter(torch.randn(3, 4).double()), nn.Parameter(torch.randn(3).double())
    optimizer = LARS([p, bias], lr=0.5, weight_decay=0.1)
    w, b = p.detach().clone(), bias.detach().clone()
    momentum, bias_momentum = 0.0, 0.0
    for _ in range(3):
        p.grad, bias.grad = torch.randn(3, 4).double(), torch.randn(3).double()
        g = p.grad + 0.1 * w
        momentum = 0.9 * momentum + 0.001 * w.norm() / g.norm() * g
        bias_momentum = 0.9 * bias_momentum + bias.grad  # neither adapted nor decayed
        w, b = w - 0.5 * momentum, b - 0.5 * bias_momentum
        optimizer.step()
        torch.testing.assert_close(p.detach(), w)
        torch.testing.assert_close(bias.detach(), b)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_prototypes_rest_while_their_lr_is_zero(name):
    head = DINOHead(4, 8, 8, 4)
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    optimizer = OPTIMIZERS[name](parameter_groups(head))
    head(torch.randn(2, 4)).sum().backward()
    set_schedule(optimizer, dict(lr=0.1, weight_decay=0.1, last_layer_lr=0.0))
    optimizer.step()
    moved = {n for n, p in head.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "last_layer" not in n}


def test_loss_scale():
    torch.manual_seed(0)
    w, scaler = nn.Parameter(torch.randn(5)), LossScale(start=2.0**10, patience=3)
    optimizer = OPTIMIZERS["sgd"](parameter_groups(nn.ParameterDict({"w": w})))
    loss = (w**2).sum()
    scaler.backward(loss, optimizer)
    torch.testing.assert_close(w.grad, 2 * w.detach())  # exact: a power of two
    scales = []
    for ok in (True, True, True, True, False, True, True, True):
        assert scaler.update(torch.tensor(ok))
        scales.append(scaler.scale.item() / 2**10)
    assert scales == [1, 1, 2, 2, 1, 1, 1, 2]
    for _ in range(11):
        assert scaler.update(torch.tensor(False))
    assert scaler.scale == 1 and not scaler.update(torch.tensor(False))  # no room: an illness


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_moves_nothing(name):
    """found_inf = 1 is how train_step leaves a step out without asking the device."""
    layer = nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name]([dict(params=list(layer.parameters()))])
    before = [p.detach().clone() for p in layer.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in layer.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before))
