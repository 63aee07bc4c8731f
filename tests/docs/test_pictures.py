"""Claims: the pictures of the docs belong to commands, and are small.
1. The gallery has a command for every figure of visualize.py, and the slides are those of the code.
2. Every picture that a page shows exists, and every picture in docs/ is shown on a page.
3. All of them together are below 1.5 MB.
"""

import re

from test_docs import DOCS, ROOT

import visualize
from figures.lecture import SLIDES

PICTURES = [
    path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".jpg", ".gif")]


def shown_by(doc):
    """The files of the pictures on a page."""
    text = doc.read_text()
    return {(doc.parent / name).resolve()
            for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}


def test_the_gallery_has_every_figure():
    text = (ROOT / "docs/gallery.md").read_text()
    drawn = re.findall(r"(?m)^    python visualize\.py (\w+) ", text)
    assert set(drawn) == set(visualize.FIGURES)


def test_the_slides_are_those_of_the_code():
    page = ROOT / "docs/slides.md"
    assert {path.stem for path in shown_by(page)} == set(SLIDES)


def test_pictures_exist_and_are_shown():
    shown = set().union(*(shown_by(doc) for doc in DOCS))
    assert not {path for path in shown if not path.exists()}
    assert not {path for path in PICTURES if path.resolve() not in shown}


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in PICTURES}
    assert sum(sizes.values()) < 1_500_000, sizes
