"""Claims
1. The norms are those of the network's tokens before the final norm, block by block.
2. A few long tokens are found, and the two halves of a photo of a thing on an empty ground are
   not.
3. The page has a row for each photo and network, with the numbers in it.
4. What cannot be drawn is refused in one line.
"""

import pytest
import torch

from augment import RGB, normalise
from backbones.convnet import ConvNet
from figures.norms import Config, draw, draw_norms, longest_normal, token_norms
from machinery.flags import UsageError, parse
from machinery.page import pyplot
from vit import VisionTransformer

IMAGE = torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=3, num_heads=1, num_register_tokens=2)
    model.channel_stats = RGB
    return model.eval()


def test_norms_are_those_of_the_tokens(model):
    norms = token_norms(model, IMAGE)
    x = model.prepare_tokens(normalise(IMAGE[None]))[0]
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            x = block(x, ((1, len(x)),))
            torch.testing.assert_close(norms.patches[i].flatten(), x[3:].norm(dim=-1))
            torch.testing.assert_close(norms.class_token[i], x[0].norm())
    torch.testing.assert_close(norms.registers, x[1:3].norm(dim=-1))
    assert norms.patches.shape == (3, 3, 5)


def test_what_is_too_long():
    assert longest_normal(torch.tensor([40.0, 40, 45, 50, 50])) == 90
    generator = torch.Generator().manual_seed(0)
    norms = 45 + 5 * torch.randn(1000, generator=generator)
    norms[:7] = 300
    assert (norms > longest_normal(norms)).nonzero().flatten().tolist() == list(range(7))
    halves = torch.cat([4 + torch.rand(600), 10 + torch.rand(400)])
    assert not (halves > longest_normal(halves)).any()


def test_the_page_shows_the_numbers(model):
    norms = token_norms(model, IMAGE)
    norms.patches[-1, 1, 3] = 1000.0
    fig = draw_norms([("a", IMAGE, 8, norms), ("b", IMAGE, 8, norms)])
    _, shown, histogram, blocks = fig.axes[:4]
    assert torch.equal(
        torch.tensor(shown.images[0].get_array().data)[::8, ::8], norms.patches[-1])
    assert shown.get_title() == "norms; too long: 1 of 15"
    [rings] = shown.get_lines()
    assert rings.get_xydata().tolist() == [[3.5 * 8 - 0.5, 1.5 * 8 - 0.5]]
    assert sum(bar.get_height() for bar in histogram.patches) == 15
    labels = [label.get_text() for label in histogram.get_yticklabels(which="both")]
    assert any(labels) and not any("$" in label for label in labels)  # few patches: short scale
    longest = blocks.get_lines()[0].get_ydata()
    assert longest.tolist() == norms.patches.flatten(1).amax(1).tolist()
    pyplot().close(fig)


def test_photos_and_networks(photos, small_backbone, tmp_path):
    flags = f"--weights {small_backbone} untrained --image_size 24 --block 1 --most 2"
    config = parse(Config, [*flags.split(), "--output", str(tmp_path / "n.png")])
    assert draw([str(photos)], config).stat().st_size > 5000


def test_misuse(photos, small_backbone, tmp_path):
    with pytest.raises(UsageError, match="not a readable image"):
        draw(["/none.jpg"], parse(Config, ["--weights", small_backbone]))
    torch.save(ConvNet("resnet50").state_dict(), tmp_path / "c.pth")
    with pytest.raises(UsageError, match="a convnet"):
        draw([str(photos)], parse(Config, ["--weights", str(tmp_path / "c.pth")]))
