"""Claims
1. ResNet-50 has the released keys and sizes; its features are torchvision's own before `fc`.
2. Every convnet has the face that training knows: dictionaries, lists of sizes, no masks.
3. A convnet trains, is resumed with its running statistics, and is loaded by name of its run.
"""

import pytest
import torch
import torchvision
from conftest import killed_in_step, without_figures

import evaluate
import train
import visualize
from backbones.convnet import CONVNETS, ConvNet
from backbones.weights import load_backbone
from machinery.flags import UsageError, parse
from training.config import Config
from training.recipes import PRESETS


def test_resnet50_is_torchvisions():
    torch.manual_seed(0)
    net, whole = ConvNet("resnet50").eval(), torchvision.models.resnet50(weights=None).eval()
    whole.fc = torch.nn.Identity()
    assert list(net.state_dict()) == list(whole.state_dict())
    assert len(net.state_dict()) == 318
    assert sum(p.numel() for p in net.parameters()) == 23_508_032
    net.load_state_dict(whole.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(net(images), whole(images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_the_face(name):
    net = ConvNet(name).eval()
    images, small = torch.randn(2, 3, 64, 96), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        out = net.forward_features(images)
        assert out["x_norm_clstoken"].shape == (2, net.embed_dim)
        assert out["x_norm_patchtokens"].shape == (2, 2 * 3, net.embed_dim)
        torch.testing.assert_close(out["x_norm_patchtokens"].mean(1), out["x_norm_clstoken"])
        both = net([images, small])
        torch.testing.assert_close(both[1], net(small))
    assert net.draw_plan(images, None) is None
    with pytest.raises(ValueError, match="no patches to hide"):
        net.forward_features(images, torch.zeros(2, 6, dtype=torch.bool))


def test_a_convnext_has_no_stochastic_depth():
    """In training mode, as a teacher is: torchvision's would drop blocks, other ones each time."""
    net = ConvNet("convnext_tiny").train()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(images), net(images), rtol=0, atol=0)
    assert net.embed_dim == 768


def test_unknown_convnet():
    with pytest.raises(ValueError, match="choose from resnet18"):
        ConvNet("vgg")
    assert set(CONVNETS) <= set(Config.__annotations__["arch"].__args__)


def test_a_convnet_trains_and_resumes(tiny, tmp_path, photos, capsys):
    """The whole run draws its figures and tells the memory that it expects."""
    flags = [*tiny, "--arch", "mobilenet_v3_small", "--optimizer", "lars"]
    flags += "--data shapes:32 --save_every 4".split()
    whole = parse(Config, [*flags, "--output_dir", str(tmp_path / "whole")], PRESETS)
    summary = train.run(whole)
    assert 0 <= summary["knn"] <= 1 and "evaluate.py knn" in capsys.readouterr().out
    # stopped in the middle and run again: the same, BatchNorm's running statistics included
    parts = parse(Config, [*flags, "--output_dir", str(tmp_path / "parts")], PRESETS)
    with without_figures():
        with killed_in_step(7):
            train.run(parts)
        train.run(parts)
    a, b = (torch.load(tmp_path / name / "teacher.pt", weights_only=True)
            for name in ("whole", "parts"))
    assert "features.0.1.running_mean" in a and all(torch.equal(a[k], b[k]) for k in a)
    model = load_backbone(tmp_path / "whole")
    assert isinstance(model, ConvNet) and model.img_size == 24
    line = f"knn --weights {tmp_path / 'whole'} --data shapes:64 --val_data shapes:32:val "
    line += f"--nb_knn 10 --num_workers 0 --output_dir {tmp_path / 'knn'}"
    results = evaluate.main(line.split())
    assert 0 <= results["knn"]["10"] <= 1
    image = str(photos / "cats/01.png")
    with pytest.raises(SystemExit):
        visualize.main(["attention", image, "--weights", str(tmp_path / "whole")])
    assert "convnet" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_runs")
def test_a_convnet_has_no_patches_to_hide(tiny, tmp_path):
    flags = [
        *tiny, "--arch", "resnet18", "--ibot_weight", "1", "--output_dir",
        str(tmp_path / "r")]
    with pytest.raises(UsageError, match="--arch resnet18 has no patches"):
        train.run(parse(Config, flags, PRESETS))
