"""Claims
1. Schedules start, peak and end where the papers' code has them.
2. Biases and vectors do not decay, everything else does.
3. Both clip modes equal a plain loop.
4. The teacher is an exact moving average; a step that is not finite moves nothing.
5. LARS equals its formula.
"""

import math

import pytest
import torch
from torch import nn

from heads import DINOHead
from optim import (
    LARS,
    OPTIMIZERS,
    clip_gradients,
    cosine,
    ema_update,
    freeze_prototypes,
    linear,
    parameter_groups,
    set_schedule,
)
from vit import VisionTransformer


def test_cosine():
    values = [cosine(i, 1.0, 0.1, 100, 10) for i in range(100)]
    assert values[0] == 0 and values[9] == values[10] == 1.0  # base appears twice, as published
    assert values[55] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90)))
    assert cosine(0, 0.996, 1, 100) == 0.996


def test_linear():
    assert [linear(i, 0.04, 0.07, 4) for i in range(6)] == pytest.approx(
        [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    )
    assert linear(0, 0.04, 0.07, 0) == 0.07


def test_groups():
    model = nn.ModuleDict(
        {
            "backbone": VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1),
            "dino_head": DINOHead(64, 8, 8, 4),
        }
    )
    decayed, plain = parameter_groups(model)
    sizes = {id(p): n for n, p in model.named_parameters()}
    assert {sizes[id(p)] for p in plain["params"]} == {
        n for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n
    }
    names = {sizes[id(p)] for p in decayed["params"]}
    assert {"backbone.cls_token", "backbone.pos_embed", "dino_head.last_layer.weight_v"} <= names
    assert "dino_head.last_layer.weight_g" not in names  # frozen
    optimizer = OPTIMIZERS["adamw"]([decayed, plain])
    set_schedule(optimizer, 0.3, 0.2)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.3]


def networks():
    torch.manual_seed(0)
    nets = [nn.Linear(5, 4), nn.Linear(4, 3)]
    for p in (p for n in nets for p in n.parameters()):
        p.grad = 3 * torch.randn_like(p)
    return nets


@pytest.mark.parametrize("mode", ["parameter", "network"])
def test_clip(mode):
    nets, reference = networks(), networks()
    total = clip_gradients(nets, 2.0, mode)
    grads = [p.grad for n in reference for p in n.parameters()]
    assert total.item() == pytest.approx(
        math.sqrt(sum(g.square().sum().item() for g in grads)), rel=1e-5
    )
    for net in reference:
        for group in (
            [[p] for p in net.parameters()] if mode == "parameter" else [list(net.parameters())]
        ):
            nn.utils.clip_grad_norm_(group, 2.0)
    for a, b in zip(nets, reference):
        for p, q in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(p.grad, q.grad)
    before = [p.grad.clone() for p in nets[0].parameters()]
    clip_gradients(nets, 0.0, mode)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, nets[0].parameters()))


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
    optimizer = OPTIMIZERS[name]([{"params": [p], "decay": 1.0}])
    set_schedule(optimizer, 0.1, 0.1)
    p.grad, optimizer.found_inf = torch.randn(4, 4), torch.tensor(0.0)
    before = p.detach().clone()
    optimizer.step()
    moved = p.detach().clone()
    assert not torch.equal(before, moved)
    p.grad, optimizer.found_inf = torch.full((4, 4), float("nan")), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(moved, p.detach())
    assert all(v.isfinite().all() for v in optimizer.state[p].values() if torch.is_tensor(v))


def test_lars_formula():
    torch.manual_seed(0)
    p, bias = nn.Parameter(torch.randn(3, 4).double()), nn.Parameter(torch.randn(3).double())
    optimizer = LARS([p, bias], lr=0.5, weight_decay=0.1)
    w, b, mu, mub = p.detach().clone(), bias.detach().clone(), 0.0, 0.0
    for _ in range(3):
        p.grad, bias.grad = torch.randn(3, 4).double(), torch.randn(3).double()
        g = p.grad + 0.1 * w
        mu = 0.9 * mu + 0.001 * w.norm() / g.norm() * g
        mub = 0.9 * mub + bias.grad
        w, b = w - 0.5 * mu, b - 0.5 * mub
        optimizer.step()
        torch.testing.assert_close(p.detach(), w)
        torch.testing.assert_close(bias.detach(), b)


def test_freeze():
    head = DINOHead(4, 8, 8, 4)
    head(torch.randn(2, 4)).sum().backward()
    freeze_prototypes(head)
    assert head.last_layer.weight_v.grad is None and head.mlp[0].weight.grad is not None
