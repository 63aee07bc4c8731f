"""Claims
1. PCA is that of the features of unit length.
2. In t-SNE each image has as many neighbours as the perplexity says, and groups stay together.
3. Every image is a dot at its place, pictures do not overlap, and stand at their own dots.
4. A page is drawn with and without labels; what cannot be drawn is refused in one line.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from figures.embedding import (METHODS, THUMBNAIL, Config, affinities, draw, draw_embedding,
                               pca, to_page, tsne, with_room)
from images.data import open_images
from machinery.flags import UsageError, parse
from machinery.page import pyplot


def groups():
    """Three groups of 20 rows of 16 numbers, around three directions."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator).repeat_interleave(20, 0)
    return centres + 0.2 * torch.randn(60, 16, generator=generator)


def test_pca():
    rows = F.normalize(groups().double(), dim=1)
    covariance = rows.T.cov()
    places = pca(groups())
    values = torch.linalg.eigvalsh(covariance)[-2:].flip(0)
    torch.testing.assert_close(places.var(0), values)
    assert places.T.cov()[0, 1].abs() < 1e-12


def test_each_image_has_as_many_neighbours():
    chances = affinities(groups(), 7.0)
    torch.testing.assert_close(chances.sum(1), torch.ones(60, dtype=torch.float64))
    perplexity = torch.special.entr(chances).sum(1).exp()
    torch.testing.assert_close(perplexity, torch.full_like(perplexity, 7.0))
    assert chances.diagonal().max() == 0


def test_groups_stay_together():
    places = tsne(groups(), perplexity=10, steps=200)
    nearest = (torch.cdist(places, places) + 1e9 * torch.eye(60)).argmin(1)
    # The descent is chaotic: rounding of another processor may leave a point or two in between.
    together = nearest // 20 == torch.arange(60) // 20
    assert together.sum() >= 57
    assert torch.equal(places, tsne(groups(), perplexity=10, steps=200))


@pytest.mark.parametrize("method", METHODS)
def test_equal_images_do_no_harm(method):
    assert METHODS[method](torch.ones(6, 8)).isfinite().all()


def test_the_page():
    images = open_images("shapes:40")
    places = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    fig = draw_embedding(images, places)
    [axis] = fig.axes
    inches = to_page(places)
    dots = [torch.tensor(line.get_xydata()) for line in axis.get_lines()]
    labels = torch.tensor(images.labels)
    expected = [inches[labels == label] for label in labels.unique()]
    torch.testing.assert_close(torch.cat(dots).float(), torch.cat(expected))

    chosen = with_room(inches)
    middles = torch.tensor([[(e[0] + e[1]) / 2, (e[2] + e[3]) / 2]
                            for e in (image.get_extent() for image in axis.images)])
    torch.testing.assert_close(middles, inches[chosen])
    distance = (middles[:, None] - middles).abs().amax(2) + 9 * torch.eye(len(chosen))
    assert distance.min() >= THUMBNAIL and len(chosen) > 10
    pyplot().close(fig)


def test_more_classes_than_colours():
    """Two classes in one colour would be taken for one, so none has a colour."""
    images = open_images("shapes:40")
    places = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    for classes, colours in ((20, 20), (21, 1)):
        many = replace(images, labels=[i % classes for i in range(40)],
                       classes=[f"class {c}" for c in range(classes)])
        fig = draw_embedding(many, places)
        [axis] = fig.axes
        assert len({line.get_color() for line in axis.get_lines()}) == colours
        assert bool(axis.get_legend()) == (colours > 1)
        pyplot().close(fig)


def test_a_folder_without_labels(photos, small_backbone, tmp_path):
    flags = f"--weights {small_backbone} --device cpu --num_workers 0 --output {tmp_path}/e.png"
    path = draw([f"folder:{photos}/cats"], parse(Config, flags.split()))
    assert path.stat().st_size > 5000


@pytest.mark.parametrize("data, words", [(["shapes:3"], "at least 4"),
                                         (["folder:/none"], "no such folder"),
                                         (["a", "b"], "one set of images, not 2")])
def test_misuse(data, words, small_backbone):
    flags = f"--weights {small_backbone} --device cpu --num_workers 0"
    with pytest.raises((UsageError, ValueError), match=words):
        draw(data, parse(Config, flags.split()))
