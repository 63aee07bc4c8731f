"""Claims
1. The same figure gives the same file, with its caption in it, as PNG and as PDF.
2. Pictures of any channels are shown as colours from 0 to 1.
"""

import pytest
import torch

from machinery.page import picture, pyplot, save, show


@pytest.mark.parametrize("ending", [".png", ".pdf"])
def test_the_same_file(ending, tmp_path):

    def draw(name, caption):
        figure, axes = pyplot().subplots(1, 2, squeeze=False)
        show(axes[0, 0], torch.linspace(0, 1, 12).view(3, 4), "a map")
        return save(figure, tmp_path / "new" / f"{name}{ending}", caption).read_bytes()

    first = draw("first", "a network at 48 px")
    assert first == draw("second", "a network at 48 px")
    assert first != draw("third", "another network")


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_pictures(channels):
    shown = picture(torch.full((channels, 2, 4), 51, dtype=torch.uint8))
    assert shown.shape == (2, 4, 3)
    torch.testing.assert_close(shown, torch.full((2, 4, 3), 0.2))
