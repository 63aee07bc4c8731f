"""Claims
1. The components are those of numpy's SVD, up to their sign, which is fixed by a rule.
2. The cut parts two groups; the background is the part that the border has more of.
3. All photographs share one basis: equal patches have equal colours; outside it is black.
"""

import numpy as np
import pytest
import torch

import visualize
from figures.pca import border, colours, components, find_foreground, pictures, threshold
from machinery.page import pyplot
from vit import VisionTransformer


def test_components_are_those_of_the_svd():
    rows = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(
        1, 13)
    ours = components(rows)
    centred = rows.double().numpy() - rows.double().numpy().mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    theirs = torch.from_numpy(u[:, :3] * s[:3]).float()
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-4, atol=1e-4)

    # The sign: the entry of the largest size is positive, also for the mirrored rows.
    assert (ours.max(0).values == ours.abs().max(0).values).all()
    assert (components(-rows).max(0).values > 0).all()


@pytest.mark.parametrize("mirror", [1, -1])
def test_the_cut(mirror):
    values = mirror * torch.tensor([0.0, 0, 1, 8, 9, 9])
    cut = threshold(values)
    assert (values > cut).sum() == 3


@pytest.mark.parametrize("mirror", [1, -1])
def test_background_is_what_the_border_has(mirror):
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(9, 11, dtype=torch.bool)
    truth[3:7, 2:6] = True
    direction = torch.randn(16, generator=generator)
    noise = 0.1 * torch.randn(9, 11, 16, generator=generator)
    grid = noise + mirror * truth[..., None] * direction
    assert torch.equal(find_foreground([grid])[0], truth)
    for mask in find_foreground([grid, grid.flip(1)]):  # one component for both
        assert mask.sum() == truth.sum()
    assert border(3, 4).sum() == 10 and border(1, 1).sum() == 1


def test_one_basis_for_all_photographs():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 5, 8, generator=generator)
    second = torch.randn(6, 3, 8, generator=generator)
    second[2, 1] = first[3, 4]
    masks = [torch.ones(4, 5, dtype=torch.bool), torch.ones(6, 3, dtype=torch.bool)]
    masks[0][0, 0] = False
    a, b = pictures([first, second], masks)
    assert a.shape == (4, 5, 3) and b.shape == (6, 3, 3)
    assert torch.equal(a[3, 4], b[2, 1]) and not a[0, 0].any()
    nothing = [torch.zeros_like(mask) for mask in masks]
    assert not any(image.any() for image in pictures([first, second], nothing))


def test_colours_fill_the_range():
    values = torch.linspace(-3, 5, 101)[:, None] * torch.tensor([1.0, 10.0, 0.1])
    shown = colours(values)
    assert shown.min() == 0 and shown.max() == 1 and shown[50].allclose(torch.tensor(0.5))


@pytest.mark.parametrize("kind", ["each", "joint"])
def test_a_row_for_each_network(kind, photos, tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    line = f"pca {photos}/cats/01.png {photos}/dogs/00.jpg --weights {tmp_path}/b.pth "
    line += f"untrained --image_size 32 --foreground {kind} --output {tmp_path}/p.png"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pyplot(), "close", lambda figure: None)
        visualize.main(line.split())
    axes = pyplot().gcf().axes
    pyplot().close("all")
    names = [text.get_text() for axis in axes for text in axis.texts]
    assert len(axes) == 2 * 5
    assert names == [
        "b.pth: all patches", "b.pth: foreground", "untrained: all patches",
        "untrained: foreground"]
