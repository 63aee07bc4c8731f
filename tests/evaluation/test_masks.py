"""Claims
1. The mask of the top mass is the smallest set of patches that holds it.
2. The Jaccard index equals a plain count, without ignored pixels.
3. A network that looks at the things, and at nothing else, has an index near 1; the table has
   the network, an untrained one of its shape, and others that were asked for.
4. Images without a thing are left out; where none has one it is said.
5. The share of the attention that lies on things is told beside the indices.
"""

import numpy as np
import pytest
import torch
from conftest import run_evaluate
from PIL import Image

from evaluation.masks import jaccard, mass_on, top_mass, untrained_like
from vit import VisionTransformer


def test_top_mass_is_the_smallest_set():
    torch.manual_seed(0)
    for maps in (torch.rand(3, 4, 5), torch.rand(1, 7, 7)**8):
        mask = top_mass(maps, 0.6)
        for a, m in zip(maps, mask):
            held = a[m].sum() / a.sum()
            assert held >= 0.6 - 1e-5 and (a[m].sum() - a[m].min()) / a.sum() < 0.6
            assert a[m].min() >= a[~m].max()


def test_jaccard():
    torch.manual_seed(0)
    several = torch.rand(3, 12, 9) < 0.4
    truth, ignored = torch.rand(12, 9) < 0.5, torch.rand(12, 9) < 0.2
    for mask, index in zip(several, jaccard(several, truth, ignored)):
        both = either = 0
        for m, t, i in zip(mask.flatten(), truth.flatten(), ignored.flatten()):
            both += bool(m and t and not i)
            either += bool((m or t) and not i)
        assert index.item() == pytest.approx(both / either)


def test_mass_on_things():
    """Two by two patches of 4 pixels: one of things, one half of them, one half unknown."""
    truth = torch.zeros(8, 8, dtype=torch.bool)
    truth[:4, :4] = truth[:4, 4:6] = True
    ignored = torch.zeros(8, 8, dtype=torch.bool)
    ignored[4:, :2] = True
    attention = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[1.0, 0.0], [0.0, 0.0]]])
    expected = (0.1 + 0.2 / 2) / (0.1 + 0.2 + 0.3 / 2 + 0.4)
    assert mass_on(attention, truth, ignored).tolist() == pytest.approx([expected, 1.0])


@pytest.fixture
def things(tmp_path):
    """Two pairs of 64 x 64 pixels: a bright thing, as large as some patches of 8, on black."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(2):
        mask = np.zeros((64, 64), np.uint8)
        mask[8:32, 16 + 8 * i:56] = 1
        Image.fromarray(mask * 200).save(tmp_path / f"images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    return tmp_path


def test_a_network_that_looks_at_things(small_backbone, things, monkeypatch, capsys):
    # In place of the attention: one head that looks at what is bright, and one at everything. The
    # network of --others is told by its depth; both of its heads look at everything.
    def looks(model, images, block):
        above_black = images[:, :1] - images.min()
        bright = torch.nn.functional.avg_pool2d(above_black, 8) + 1e-6
        everything = torch.ones_like(bright)
        return torch.cat([everything if len(model.blocks) == 3 else bright, everything], 1)

    other = things / "other.pth"
    network = VisionTransformer(16, 8, embed_dim=64, depth=3, num_heads=1)
    torch.save(network.state_dict(), other)
    line = f"masks --weights {small_backbone} --val_data pairs:{things} --others {other}"
    flags = dict(image_size=64, share=0.99, output_dir=things / "out")
    usual = run_evaluate(line, **flags)["masks"]
    assert list(usual) == [small_backbone, "the same, untrained", str(other)]

    monkeypatch.setattr(VisionTransformer, "get_class_attention", looks)
    table = run_evaluate(line, **flags)["masks"]
    figures = table[small_backbone]
    assert figures["best"] == figures["one_head"] == pytest.approx(1.0)
    share_of_things = (24 * 40
                       + 24 * 32) / 2 / 64**2  # what a mask of everything shares with them
    assert figures["mean_head"] == pytest.approx((1 + share_of_things) / 2, abs=0.02)
    assert table[str(other)]["best"] == pytest.approx(share_of_things, abs=0.02)
    assert table[str(other)]["on_things"] == pytest.approx(share_of_things, abs=0.02)
    assert share_of_things + 0.1 < figures["on_things"] < 1  # a head on things, one everywhere
    assert usual[small_backbone]["best"] < 0.9
    assert "100.00%" in capsys.readouterr().out


def test_untrained():
    model = VisionTransformer(16, 8, embed_dim=64, depth=2, num_heads=1, layerscale=0.1,
                              num_register_tokens=2, pos_embed_resize="antialias")
    fresh = untrained_like(model)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in fresh.state_dict().items()}
    assert torch.equal(fresh.pos_embed, untrained_like(model).pos_embed)
    assert not torch.equal(fresh.pos_embed, model.pos_embed)


def test_other_networks(small_backbone, things, capsys):
    """--num_heads holds for them, too; and they have to take images of as many channels."""
    wide = VisionTransformer(16, 8, embed_dim=96, depth=2, num_heads=3)
    torch.save(wide.state_dict(), things / "wide.pth")
    line = f"masks --val_data pairs:{things} --image_size 64 --num_heads 3"
    table = run_evaluate(f"{line} --weights {things}/wide.pth --others {things}/wide.pth")
    assert len(table["masks"]) == 2  # the same name twice, and the untrained one

    grey = VisionTransformer(16, 8, embed_dim=64, depth=2, num_heads=1, in_chans=1)
    torch.save(grey.state_dict(), things / "grey.pth")
    with pytest.raises(SystemExit):
        run_evaluate(f"masks --val_data pairs:{things} --weights {small_backbone} --others "
                     f"{things}/grey.pth")
    assert "grey.pth: takes 1 channels" in capsys.readouterr().err


def test_no_things(small_backbone, tmp_path, capsys):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.new("L", (16, 16)).save(tmp_path / name / "0.png")  # class 0 everywhere
    with pytest.raises(SystemExit):
        run_evaluate(f"masks --weights {small_backbone} --val_data pairs:{tmp_path}")
    error = capsys.readouterr().err
    assert "no image has a pixel that is not --background 0 or --ignore_label 255" in error


def test_misuse(small_backbone, things, capsys):
    line = f"masks --weights {small_backbone} --val_data pairs:{things} --image_size 64"
    for flag in ("--others nowhere", "--block 9"):
        with pytest.raises(SystemExit) as stop:
            run_evaluate(f"{line} {flag}")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and flag in error and error.count("\n") == 1
