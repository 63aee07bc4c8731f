"""Claims
1. Every pair of different views weighs 1 / (number of pairs), a view with itself nothing.
2. In a packed sequence a token is noticed by all tokens of its crop, and by no other.
3. The small trainings end as their titles say.
4. The teacher's path is the average that the formula gives.
5. Every slide is drawn; a wrong name is an error that lists them.
"""

import math

import pytest
import torch

from figures import lecture
from figures.lecture import COLLAPSES, SLIDES, Config, averaged, draw, pair_weights, reach, toy_run
from machinery.flags import UsageError
from machinery.page import pyplot


@pytest.mark.parametrize("G, V", [(2, 4), (1, 3)])
def test_weights_of_pairs(G, V):
    weights = pair_weights(G, V)
    expected = torch.full((G, V), 1 / (G * V - G))
    for i in range(G):
        expected[i, i] = 0
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


def test_tokens_of_a_crop_notice_each_other():
    blocks = [torch.ones(n, n, dtype=torch.bool) for n in (3, 3, 2, 2, 2)]
    assert torch.equal(reach(((2, 3), (3, 2))), torch.block_diag(*blocks))


@pytest.fixture(scope="module")
def curves():
    """The small trainings, which the slide needs, too: title -> entropies."""
    return {title: toy_run(*settings, steps=150) for title, settings in COLLAPSES.items()}


def test_the_trainings_collapse_as_they_say(curves):
    one_prototype, uniform, healthy = (run[-1] for run in curves.values())
    ln_k = math.log(64)
    # How soon it is there depends on rounding, so on the version of torch.
    assert one_prototype[0] < 0.1 * ln_k and one_prototype[1] < 0.1 * ln_k
    assert uniform[0] > 0.99 * ln_k and uniform[1] > 0.99 * ln_k
    assert healthy[0] < 0.5 * ln_k and healthy[1] > 0.75 * ln_k


def test_the_average():
    path = torch.tensor([1.0, 3.0, 2.0])
    torch.testing.assert_close(averaged(path, 0.5), torch.tensor([1.0, 2.0, 2.0]))


def test_slides_are_drawn(curves, tmp_path, monkeypatch):
    runs = iter(curves.values())
    monkeypatch.setattr(lecture, "toy_run", lambda *settings: next(runs))
    config = Config(output_dir=str(tmp_path / "new"))
    assert draw(["pairs"], config) == tmp_path / "new"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["pairs.png"]

    # Of the others only the figures are made: to write them takes longer than all else. The page
    # does not read mathematics, so a label of a logarithmic scale must not be written in it.
    saved = []

    def look(figure, path, **_):
        saved.append(path.stem)
        labels = [text for axis in figure.axes for text in axis.get_yticklabels(which="both")]
        labels += [text for axis in figure.axes for text in axis.get_xticklabels(which="both")]
        assert not any("mathdefault" in label.get_text() for label in labels), path

    monkeypatch.setattr(lecture, "save", look)
    draw(["all"], config)
    pyplot().close("all")
    assert saved == list(SLIDES)
    with pytest.raises(UsageError, match="packing.*did you mean masks"):
        draw(["mask"], Config(output_dir=str(tmp_path)))
