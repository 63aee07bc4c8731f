"""Page: how the figures of this project look, which is decided once and here.

    pyplot() --> figure of panels --> show(axis, picture) ... --> save(figure, path, caption)

Idea     A figure is looked at on a screen, in a paper and from the last row of a lecture hall.
         Sizes, fonts and colours that suit all three stand here, so that no figure chooses its
         own: colour maps whose brightness rises evenly, and which people who are colour-blind
         can read.
Paper    none
Try      python -m machinery.page      the sizes and colours
Change   another look for every figure: STYLE, COLOURS and MAPS; for slides: SLIDE
Tests    pytest tests/machinery/test_page.py

Letters  C channels, H W pixels.
"""

import os
import textwrap
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from machinery.flags import UsageError

# What matplotlib is told before a figure is drawn. Sizes are in points, 1/72 of an inch.
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "figure.dpi": 120, "savefig.dpi": 120,
    "axes.spines.top": False, "axes.spines.right": False,
    "text.parse_math": False}  # $ stands for itself, as names of files may have it

# What is larger on a slide, so that it can be read from the last row of a lecture hall.
SLIDE = {
    "font.size": 17, "axes.titlesize": 18, "axes.labelsize": 17, "legend.fontsize": 16,
    "xtick.labelsize": 15, "ytick.labelsize": 15}
SLIDE_SIZE = (12.0, 6.75)  # inches: the shape of a screen, 16 to 9

# What a colour map is for -> its name. All but one are perceptual: a step of the value is a
# step of brightness that looks equally large everywhere. A direction has no smallest value, so
# its colours have to go round.
MAPS = {
    "attention": "viridis", "overlay": "inferno", "similarity": "viridis", "direction": "hsv",
    "distance": "viridis_r", "error": "magma", "video": "inferno"}

# Colours for things of different kinds, which people who are colour-blind can tell apart
# (Okabe and Ito 2008): blue, vermilion, green, purple, yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442")

PICTURE = 1.9  # inches: the width of one picture among others
PAGE = 13.0  # inches: the width of a whole page, at most
GAP = 0.08  # inches between two pictures
TITLE = 0.24  # inches above a picture, for its title


def pyplot():
    """matplotlib.pyplot with the STYLE, set up to write files: "Agg" draws without a screen."""
    # Imported here, because it takes about a second, and most programs draw nothing.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def slide(title: str):
    """An empty slide for a lecture with a title at its top: the figure of matplotlib."""
    # The next call of pyplot() brings back the sizes of a page; what is made until then, and
    # all text on it, keeps those of a slide.
    plt = pyplot()
    plt.rcParams.update(SLIDE)
    figure = plt.figure(figsize=SLIDE_SIZE)
    figure.text(0.02, 0.97, title, fontsize=24, fontweight="bold", va="top")
    return figure


def picture(image: Tensor) -> Tensor:
    """(C, H, W) -> (H, W, 3), from 0 to 1; of other channels than colours, their mean."""
    if image.dtype == torch.uint8:
        image = image / 255
    if len(image) != 3:
        image = image.mean(0, keepdim=True).expand(3, -1, -1)
    return image.permute(1, 2, 0).clamp(0, 1)


def show(axis, picture: Tensor, title: str = "", **options):
    """Draw a picture (H, W, 3) or a map (H, W) without axes: pixels need no scale."""
    axis.imshow(picture.numpy(), **options)
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def fitting(name: str, axis) -> str:
    """A name as far as there is room above the axis: of a long one the end, which differs."""
    # A letter of 9 points is some 1/13 of an inch wide.
    inches = axis.get_position().width * axis.figure.get_figwidth()
    most = max(4, int(13 * inches))
    return name if len(name) <= most else "…" + name[1 - most:]


def rows_of_pictures(rows: list[list[float]], tallest: float = 3.2, titled: range = range(99)):
    """A page on which each row of pictures fills the width: (figure, axes of each row).

    rows: for each picture of a row its width divided by its height; all pictures of a row get
    one height, of `tallest` inches at most. titled: the numbers of the rows that have room for
    titles.
    Example: [[1, 1], [1, 1, 1, 1]] has two large squares above four small ones.
    """
    # A very narrow picture gets a wider place, in whose middle it stands, so that there is room
    # for a title (fitting); a very wide one a higher place, for the name of the row.
    rows = [[min(max(shape, 0.7), 3.0) for shape in shapes] for shapes in rows]

    # The page is as wide as its fullest row needs, and PAGE at most. Sizes are in inches.
    gaps = [GAP * (len(shapes) - 1) for shapes in rows]
    width = min(PAGE, max(tallest * sum(shapes) + gap for shapes, gap in zip(rows, gaps)))
    heights = [min(tallest, (width - gap) / sum(shapes)) for shapes, gap in zip(rows, gaps)]
    height = sum(heights) + GAP * len(rows)
    height += TITLE * sum(i in titled for i in range(len(rows)))
    figure = pyplot().figure(figsize=(width, height))

    # From the top down. matplotlib wants left, bottom, width and height as shares of the page.
    axes = []
    top = height
    for i, (shapes, tall) in enumerate(zip(rows, heights)):
        bottom = top - tall - (TITLE if i in titled else 0)
        left = 0.0
        axes.append([])
        for shape in shapes:
            wide = shape * tall
            box = (left / width, bottom / height, wide / width, tall / height)
            axes[-1].append(figure.add_axes(box, xticks=[], yticks=[], frame_on=False))
            left += wide + GAP
        top = bottom - GAP
    return figure, axes


def name_row(axis, name: str):
    """Write a name at the left of the first picture of a row, along its side."""
    axis.annotate(name, (0, 0.5), xytext=(-4, 0), xycoords="axes fraction",
                  textcoords="offset points", rotation=90, ha="right", va="center", fontsize=9)


def draw_frame(axis, colour: str):
    """A thick line around a picture."""
    # In units of the panel: from corner to corner, without moving the limits of its axes.
    corners = [0, 1, 1, 0, 0], [0, 0, 1, 1, 0]
    axis.plot(*corners, color=colour, lw=4, transform=axis.transAxes, scalex=False,
              scaley=False)


def require_kind(path: Path):
    """UsageError for the ending of a file that matplotlib does not write."""
    known = pyplot().matplotlib.backend_bases.FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise UsageError(f"--output {path}: expected a file of the kind {', '.join(known)}")


def save(figure, path: Path, caption: str = "", colours: int = 0) -> Path:
    """Write the figure, with a caption below it, and close it; returns its path.

    A path without an ending gets .png.

    The same input gives the same file: neither the date nor the version of matplotlib is in it.
    colours: of a PNG, at most 256; with 128 of them it is a third as large. 0: all.
    """
    # The caption hangs below the page, in lines of the page's width: in this size an inch holds
    # about 15 letters.
    if caption:
        lines = textwrap.fill(caption, max(40, int(15 * figure.get_figwidth())))
        figure.text(0.5, -0.1 / figure.get_figheight(), lines, fontsize=8, color="0.35",
                    ha="center", va="top")
    path = Path(path)
    if not path.suffix:
        path = path.with_suffix(".png")
    require_kind(path)

    # The name of a file may have bytes that are no letters, which no font can draw.
    for text in figure.findobj(lambda part: hasattr(part, "set_text")):
        text.set_text(os.fsencode(text.get_text()).decode("utf-8", "replace"))
    path.parent.mkdir(parents=True, exist_ok=True)
    nothing = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Creator": None}}
    figure.savefig(path, bbox_inches="tight", metadata=nothing.get(path.suffix.lower()))
    pyplot().close(figure)
    if colours:
        with Image.open(path) as image:
            few = image.convert("RGB").quantize(colours, kmeans=2, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
    return path


if __name__ == "__main__":
    for name, value in STYLE.items():
        print(f"{name:20s} {value}")
    for use, name in MAPS.items():
        print(f"colours of {use}: {name}")
