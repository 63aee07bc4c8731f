"""Claims
1. Mixing blends neighbours by the share that their labels get, as a function of its seed.
2. Without mixing, smoothing and decay, two steps equal a plain loop of AdamW with layer decay
   and an average of the weights.
3. Two processes end with the BatchNorm statistics of one, or are told which batch they need.
4. It learns; the backbone it was given stays as it was, and the mask token is left alone.
"""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import finish, same_tensors, start

from backbones.convnet import ConvNet
from evaluation.extract import accuracy, extract
from evaluation.finetune import FinetunedNetwork, mix, train_network
from evaluation.protocol import random_crops
from images.data import open_images
from machinery.flags import UsageError
from machinery.process import Process, start_process
from training.optim import OPTIMIZERS
from vit import VisionTransformer

CPU = Process(torch.device("cpu"))


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(16, 8, embed_dim=64, depth=2, num_heads=1, mask_token=True).eval()


def test_mixing():
    crops = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    labels = torch.tensor([0, 1, 2, 2])
    state = torch.get_rng_state()
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixed, shares = mix(crops, labels, 3, mixup, cutmix, [0, 1, 2])
        again = mix(crops, labels, 3, mixup, cutmix, [0, 1, 2])
        assert torch.equal(mixed, again[0]) and torch.equal(shares, again[1])
        assert not torch.equal(mixed, mix(crops, labels, 3, mixup, cutmix, [0, 1, 3])[0])
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        kept = shares[0, 0]  # of image 0; the rest is its neighbour's, image 3
        torch.testing.assert_close(mixed[0].mean(), 3 * (1 - kept))
        torch.testing.assert_close(shares[0, 2], 1 - kept)
    assert torch.equal(torch.get_rng_state(), state)
    mixed, shares = mix(crops, labels, 3, 0.0, 0.0, [0])
    assert torch.equal(mixed, crops) and torch.equal(shares, F.one_hot(labels, 3).float())


def layers_above(name):
    """How many factors of layer decay a parameter of a network with two blocks gets."""
    if "norm." in name and "blocks." not in name or name.startswith("head"):
        return 0
    return {"blocks.0": 2, "blocks.1": 1}.get(name.removeprefix("backbone.")[:8], 3)


def test_against_a_plain_loop(backbone, monkeypatch):
    # A step as long as its gradient: rounding stays rounding, where Adam would blow it up.
    monkeypatch.setitem(OPTIMIZERS, "adamw", lambda groups: torch.optim.AdamW(groups, eps=1.0))
    images = open_images("shapes:20")
    recipe = dict(epochs=1, batch_size=10, lr=25.6, layerwise_decay=0.5, weight_decay=0.1)
    recipe |= dict(label_smoothing=0.1, mixup=0, cutmix=0, ema=0.05)
    network = train_network(backbone, images, 10, CPU, 16, **recipe)

    torch.manual_seed(0)
    plain = FinetunedNetwork(backbone, 10)
    average = {k: v.clone() for k, v in plain.state_dict().items()}
    groups = []
    for name, p in plain.named_parameters():
        if "mask_token" not in name:
            factor = 0.5**layers_above(name)
            groups.append(dict(params=[p], factor=factor, weight_decay=0.1 * (p.ndim > 1)))
    optimizer = torch.optim.AdamW(groups, eps=1.0)
    for step, (crops, labels) in enumerate(random_crops(images, 16, 10, 2, CPU)):
        lr = 1.0 if step == 0 else 1e-6 + (1.0 - 1e-6) / 2  # half a cosine, at its half
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        optimizer.zero_grad()
        F.cross_entropy(plain(crops), labels, label_smoothing=0.1).backward()
        optimizer.step()
        m = min(0.05, (1 + step) / (10 + step))
        average = {k: m * a + (1 - m) * plain.state_dict()[k] for k, a in average.items()}
    for key, value in network.state_dict().items():
        # float32, summed in the same order but for the average
        torch.testing.assert_close(value, average[key], rtol=1e-5, atol=1e-6, msg=key)


def test_it_learns(backbone):
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    images = open_images("shapes:60")
    recipe = dict(epochs=25, batch_size=20, lr=2e-2, mixup=0, cutmix=0)
    network = train_network(backbone, images, 10, CPU, 16, **recipe)
    predicted = extract(network, images, 16, CPU).argmax(1)
    assert accuracy(predicted, images.labels)["top1"] > 0.3  # chance is 0.1
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(network.backbone.mask_token, before["mask_token"])


def train_convnet(process):
    """Two steps of a ResNet-18; the state of what comes of it."""
    torch.manual_seed(0)
    # A step as long as its gradient: rounding stays rounding, where Adam would blow it up.
    with patch.dict(OPTIMIZERS, adamw=lambda groups: torch.optim.AdamW(groups, eps=1.0)):
        network = train_network(ConvNet("resnet18"), open_images("shapes:64"), 10, process, 32,
                                epochs=1, batch_size=32)
    return network.state_dict()


def train_on_two(rank, folder):
    process = start_process("cpu")
    torch.save(train_convnet(process), f"{folder}/{rank}.pt")
    with pytest.raises(UsageError,
                       match="--batch_size 16: .* BatchNorm .* multiple of 32 on 2"):
        train_network(ConvNet("resnet18"), open_images("shapes:64"), 10, process, 32,
                      batch_size=16)


def test_batch_norm_on_two_processes(tmp_path):
    pair = start(train_on_two, str(tmp_path))
    alone = train_convnet(CPU)
    finish(pair)
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert same_tensors(*two)
    for name, value in alone.items():
        torch.testing.assert_close(two[0][name], value, rtol=1e-3, atol=1e-4)
