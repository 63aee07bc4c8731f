"""Claims
1. The same figure gives the same file, with its caption in it, as PNG and as PDF; a PNG of few
   colours has no more than was said.
   Names of files, with any letters and bytes, can be drawn.
2. Pictures of any channels are shown as colours from 0 to 1.
3. Rows of pictures fill the page, do not overlap, and keep the shapes of the pictures.
"""

import pytest
import torch
from PIL import Image

from machinery.flags import UsageError
from machinery.page import PAGE, picture, pyplot, rows_of_pictures, save, show


@pytest.mark.parametrize("ending", [".png", ".pdf"])
def test_the_same_file(ending, tmp_path):

    def draw(name, caption):
        figure, axes = pyplot().subplots(1, 2, squeeze=False)
        show(axes[0, 0], torch.linspace(0, 1, 12).view(3, 4), "a map")
        return save(figure, tmp_path / "new" / f"{name}{ending}", caption).read_bytes()

    first = draw("first", "a network at 48 px")
    assert first == draw("second", "a network at 48 px")
    assert first != draw("third", "another network")


def test_names_of_any_letters(tmp_path):
    """A $ begins no formula, and a byte that is no letter is drawn as the sign for it."""
    for name in ("a$b_$c", "cost$5$", "caf\udce9"):
        figure, axes = pyplot().subplots(1, 1, squeeze=False)
        show(axes[0, 0], torch.zeros(3, 4), name)
        save(figure, tmp_path / "page.png", name)
        kept = name.replace("\udce9", "\ufffd")
        assert axes[0, 0].get_title() == kept and not axes[0, 0].title.get_parse_math()


def test_a_kind_of_file_that_cannot_be_drawn(tmp_path):
    figure, axes = pyplot().subplots(1, 1, squeeze=False)
    with pytest.raises(UsageError,
                       match="--output .*page.xyz: expected a file of the kind .*png"):
        save(figure, tmp_path / "page.xyz")


def test_few_colours(tmp_path):
    figure, axes = pyplot().subplots(1, 1, squeeze=False)
    show(axes[0, 0], torch.linspace(0, 1, 3 * 40 * 40).view(40, 40, 3))
    with Image.open(save(figure, tmp_path / "few.png", colours=16)) as image:
        assert 8 < len(image.convert("RGB").getcolors()) <= 16


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_pictures(channels):
    shown = picture(torch.full((channels, 2, 4), 51, dtype=torch.uint8))
    assert shown.shape == (2, 4, 3)
    torch.testing.assert_close(shown, torch.full((2, 4, 3), 0.2))


def test_rows_fill_the_page():
    figure, axes = rows_of_pictures([[1.5] * 4, [1.5] * 6, [0.1, 9.0]])
    width, height = figure.get_size_inches()
    pyplot().close(figure)
    assert width == PAGE
    bottom_above = height
    for row, shapes in zip(axes, ([1.5] * 4, [1.5] * 6, [0.7, 3.0])):
        boxes = [axis.get_position() for axis in row]
        for box, shape in zip(boxes, shapes):
            assert box.width * width == pytest.approx(shape * box.height * height)
        for left, right in zip(boxes, boxes[1:]):
            assert left.x1 < right.x0
        assert boxes[0].y1 * height < bottom_above and boxes[-1].x1 < 1 + 1e-9
        bottom_above = boxes[0].y0 * height
    assert axes[0][-1].get_position().x1 == pytest.approx(1)
