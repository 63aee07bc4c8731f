"""Claims
1. A sweep of 52 probes equals 52 separate runs of torch's SGD (float64), and so do its shares.
2. It costs less than 1.5 times what one probe costs, the pass through the network included.
3. Each kind of input is the columns that the papers' code would concatenate.
4. Logistic regression ends where the gradient of its objective is zero, for every strength of the
   penalty, for columns that are correlated and for more columns than images.
5. Released heads of both families are understood; DINO's interleaved columns are sorted.
6. ImageNet-ReaL counts any of an image's labels, and no image without one.
"""

import json
import time

import pytest
import torch
import torch.nn.functional as F

from features import Blocks
from probes import CS, LRS, Logistic, Probes, kinds_of_input, real_accuracy, released_head
from vit import ARCHS, VisionTransformer


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 20, dtype=torch.float64, generator=generator),
             torch.randint(0, 3, (6,), generator=generator)) for _ in range(5)]


def test_sweep_equals_separate_runs(batches):
    kinds = kinds_of_input(4, (1, 4), (False, True))
    sweep = Probes(kinds, 3, LRS, dtype=torch.float64)
    shares = [Probes(kinds, 3, LRS[r::5], dtype=torch.float64) for r in range(5)]
    start = {kind: sweep.head(kind, LRS[0]) for kind in kinds}
    for i, (rows, labels) in enumerate(batches):
        for probes in (sweep, *shares):
            probes.step(rows, labels, 40 / (1 + i))  # a factor that makes the largest rate matter
    moved = 0.0
    for kind, columns in kinds.items():
        for j, lr in enumerate(LRS):
            alone = torch.nn.Linear(columns.stop - columns.start, 3).double()
            alone.load_state_dict(start[kind])
            optimizer = torch.optim.SGD(alone.parameters(), lr=0.0, momentum=0.9)
            for i, (rows, labels) in enumerate(batches):
                optimizer.param_groups[0]["lr"] = lr * 40 / (1 + i)
                optimizer.zero_grad()
                F.cross_entropy(alone(rows[:, columns]), labels).backward()
                optimizer.step()
            for probes in (sweep, shares[j % 5]):
                head = probes.head(kind, lr)
                # sums in another order
                for key, value in alone.state_dict().items():
                    torch.testing.assert_close(head[key], value, rtol=1e-10, atol=1e-12)
                found = probes.predict(batches[0][0], chunk=4)[kind, lr]
                assert torch.equal(found, alone(batches[0][0][:, columns]).argmax(1))
            moved = max(moved, (alone.weight.data - start[kind]["weight"]).abs().max().item())
    assert moved > 0.1


def test_sweep_is_cheap():
    model = VisionTransformer(32, 8, **ARCHS["vit_nano"]).eval()
    read, images, labels = Blocks(model, 4), torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    one = Probes(kinds_of_input(128, (4,), (False,)), 10, (0.1,))
    all_of_them = Probes(kinds_of_input(128, (1, 4), (False, True)), 10, LRS)
    seconds = {one: [], all_of_them: []}
    for _ in range(6):
        for probes, times in seconds.items():
            begun = time.process_time()
            with torch.no_grad():
                probes.step(read(images), labels)
            times.append(time.process_time() - begun)
    assert min(seconds[all_of_them]) < 1.5 * min(seconds[one]), seconds


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


@pytest.mark.parametrize("n, width", [(60, 5), (12, 30)])
def test_logistic_regression_is_optimal(n, width):
    torch.manual_seed(0)
    rows = torch.randn(n, width, dtype=torch.float64) * torch.logspace(-2, 1, width).double() + 3
    rows[:, 1] = rows[:, 0] + 0.01 * rows[:, 1]
    labels = torch.randint(0, 3, (n,))
    problem = Logistic(rows, labels, 3)
    for C in (CS[0], 1e-2, 1.0, 1e2):
        weight, bias = (v.requires_grad_() for v in problem.fit(C))
        value = C * F.cross_entropy(rows @ weight.T + bias, labels, reduction="sum")
        value = value + weight.square().sum() / 2
        slopes = torch.autograd.grad(value, (weight, bias))
        scale = C * n * rows.abs().max()  # what a single image can pull with
        assert all(s.abs().max() < 1e-7 * scale for s in slopes), (C, slopes)


def test_released_heads():
    torch.manual_seed(0)
    cls, mean, bias = torch.randn(2, 8), torch.randn(2, 8), torch.randn(3)
    weight = torch.randn(3, 16)
    # DINO stacks class token and mean on a new last axis and flattens: c0 a0 c1 a1 ...
    dino = torch.stack([cls, mean], -1).flatten(1) @ weight.T
    state = {"state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}
    n, pool, ours, _ = released_head(state, 8)
    assert (n, pool) == (1, True)
    torch.testing.assert_close(torch.cat([cls, mean], 1) @ ours.T, dino)
    for columns, kind in ((8, (1, False)), (16, (1, True)), (32, (4, False)), (40, (4, True))):
        weight = torch.randn(3, columns)
        *found, same, _ = released_head({"weight": weight, "bias": bias}, 8)
        assert tuple(found) == kind and torch.equal(same, weight)
    with pytest.raises(ValueError, match="reads 24 columns.*8, 16, 32, 40"):
        released_head({"weight": torch.randn(3, 24), "bias": bias}, 8)
    with pytest.raises(ValueError, match="found cls_token"):
        released_head({"cls_token": bias}, 8)


def test_real_labels(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[1, 2], [], [0]]))
    names = [f"a/ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 1, 2)]
    assert real_accuracy(torch.tensor([1, 2, 0]), names, str(tmp_path / "real.json")) == 0.5
    with pytest.raises(ValueError, match="--real_labels"):
        real_accuracy(torch.tensor([1]), ["cat.jpg"], str(tmp_path / "real.json"))
