"""Report: what a stage did, in words and in pictures: report.md and page.png.

    stage.json of all stages so far --> report.md: counts, thresholds, seeds, hashes
    some groups of copies, queries, clusters --> page.png

Idea     Nobody looks at a million images. But a threshold that is too low, or features that
         compare backgrounds, show in the first ten rows of pictures. And whoever trains on a
         list wants to know a year later where it came from.
Paper    DINOv2 fig. 3, and table 15 for the counts
Try      python curate.py dedup curations/pool      draws page.png beside its list
Change   what stands in the report: write_report; how many pictures: ROWS, COLUMNS
Tests    pytest tests/curation/test_report.py
"""

import os
from pathlib import Path

import numpy as np
import torch

from augment import fit_inside
from curation.pool import Pool, read_stage
from machinery.checkpoints import digest, write_text
from machinery.flags import UsageError
from machinery.page import draw_frame, name_row, picture, rows_of_pictures, save, show

ROWS = 6  # groups, queries or clusters on a page
COLUMNS = 8  # pictures of each, at most
SHOWN = 160  # pixels of a picture on the page

# ----------------------------------------------------------------------------------------------
# Words


def lines_of(facts: dict, indent: str = "") -> list[str]:
    """JSON as a list of Markdown; a dictionary within it becomes a list within the list."""
    # What is empty does not concern this stage, and is left out.
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}- {key}:", *lines_of(value, indent + "  ")]
        elif value not in (None, "", []):
            lines.append(f"{indent}- {key}: {value}")
    return lines


def stage_before(folder: Path, facts: dict) -> tuple[Path, str, str] | None:
    """(folder of the stage before, a file in it, its hash when it was read); None if none was."""
    # A stage that began with another one has noted its folder, relative to its own, so that both
    # can be moved together.
    if "source" in facts:
        earlier = Path(os.path.normpath(folder / facts["source"]["folder"]))
        return earlier, "stage.json", facts["source"]["sha256"]
    # `embed` may have been given list:FOLDER/list.txt, as in `curate.py run`, where copies are
    # found by other features than similar images.
    if facts.get("list_sha256"):
        return Path(facts["root"]), "list.txt", facts["list_sha256"]
    return None


def whole_history(folder: Path) -> list[tuple[Path, dict]]:
    """Folder and stage.json of every stage up to the one in this folder, the first one first.

    A stage that is gone, or was made anew since, is not told: a note stands in its place, and in
    that of all before it. Example: a list that was retrieved from what `dedup` left has the
    history embed, dedup, embed, retrieve, because images are embedded once for each.
    """
    facts = read_stage(folder, "POOL")
    history = [(folder, facts)]
    while before := stage_before(folder, facts):
        folder, file, sha256 = before
        # Thresholds and counts of a folder that was made anew since did not make this list. The
        # list itself is written by now, so nothing here may end the stage with an error.
        try:
            facts = read_stage(folder, "POOL")
            if digest(folder / file) != sha256:
                facts = {"stage": "unknown", "note": "made anew since; what it did is lost"}
        except (OSError, UsageError):
            facts = {"stage": "unknown", "note": "gone since; what it did is lost"}
        history.insert(0, (folder, facts))
    return history


def write_report(folder: Path):
    """report.md: all stages up to the one in this folder, with what each has noted."""
    history = whole_history(folder.absolute())
    text = ["# How list.txt came about", ""]
    for path, facts in history:
        where = os.path.relpath(path, folder.absolute())  # this folder itself is "."
        text += [f"## {facts['stage']} ({where})", "", *lines_of(facts), ""]

    # With the hash whoever has a list can see whether it is this one.
    text += [
        "## list.txt", "", f"- images: {history[-1][1]['images']}",
        f"- sha256: {digest(folder / 'list.txt')}", ""]
    write_text(folder / "report.md", "\n".join(text))


# ----------------------------------------------------------------------------------------------
# Pictures


def evenly(items: list, count: int) -> list:
    """`count` of the items, from the first to the last, or all if there are fewer."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[round(place)] for place in places]


def cosine(pool: Pool, a: int, other: Pool, b: int) -> float:
    """The similarity of two images."""
    # Of unit vectors the product is the cosine.
    first = pool.features[np.array([a])].astype(np.float32)
    second = other.features[np.array([b])].astype(np.float32)
    return float((first * second).sum())


def shown(pool: Pool, row: int) -> torch.Tensor:
    """An image, small enough for the page; grey if it cannot be read any more."""
    # The stage has done its work by now, and a page must not undo it.
    try:
        return fit_inside(pool.images.read(row), SHOWN)
    except Exception:  # decoders raise exceptions of many kinds
        return torch.full((3, SHOWN, SHOWN), 200, dtype=torch.uint8)


def draw_page(folder: Path, rows: list[tuple[str, list]], caption: str):
    """page.png: a row of pictures for each (name, [(pool, row, title, framed), ...])."""
    # Where nothing was found there is no page.
    if not rows:
        return
    pictures = [[shown(pool, row) for pool, row, _, _ in entries] for _, entries in rows]

    # All rows are as wide as the fullest one, so that their pictures have one size.
    columns = max(len(images) for images in pictures)
    shapes = []
    for images in pictures:
        widths = [image.shape[2] / image.shape[1] for image in images]
        shapes.append(widths + [1.0] * (columns - len(widths)))
    figure, axes = rows_of_pictures(shapes, tallest=1.6)
    for (name, entries), images, row in zip(rows, pictures, axes):
        name_row(row[0], name)
        for axis, image, (_, _, title, framed) in zip(row, images, entries):
            show(axis, picture(image), title)
            if framed:
                draw_frame(axis, "black")
    save(figure, folder / "page.png", caption)


def draw_groups(folder: Path, pool: Pool, roots: np.ndarray, hits: list):
    """Groups of copies, the image that stays first; and images that are like one of a test.

    hits: (reference pool, its row, row of the pool).
    """
    # The images of a group stand together when they are sorted by their roots.
    members = pool.rows[np.argsort(roots[pool.rows], kind="stable")]
    _, starts, sizes = np.unique(roots[members], return_index=True, return_counts=True)
    groups = [members[start:start + size] for start, size in zip(starts, sizes) if size > 1]
    groups.sort(key=len, reverse=True)

    # Most groups are pairs: as many groups as fit stand in a row.
    rows = []
    for group in evenly(groups, ROWS * COLUMNS // 2):
        first = int(group[0])
        entries = [(pool, first, f"stays, of {len(group)}", True)]
        for row in group[1:COLUMNS].tolist():
            entries.append((pool, row, f"{cosine(pool, first, pool, row):.3f}", False))
        if rows and len(rows[-1][1]) + len(entries) <= COLUMNS:
            rows[-1][1].extend(entries)
        elif len(rows) < ROWS:
            rows.append(("", entries))

    # One pair in a row: the image of the evaluation set, and the one of the pool.
    for reference, query, row in evenly(hits, 2):
        similarity = cosine(reference, int(query), pool, int(row))
        rows.append(("to be judged", [(reference, int(query), "--against", True),
                                      (pool, int(row), f"goes: {similarity:.3f}", False)]))
    draw_page(
        folder, rows, f"{len(groups):,d} groups of copies among {len(pool.rows):,d} images"
        ", from the largest to the smallest, with the cosine to the image that stays; an "
        "image may be in a group by way of others")


def draw_queries(folder: Path, pool: Pool, curated: Pool, nearest):
    """Curated images, and what was retrieved for each, nearest first."""
    # In a set that is sorted by classes, evenly spaced queries are of different classes.
    rows = []
    for place in evenly(range(len(curated.rows)), ROWS):
        query = int(curated.rows[place])
        entries = [(curated, query, "curated", True)]
        for row, similarity in nearest[np.array([place])][0][:COLUMNS - 1].tolist():
            entries.append((pool, row, f"{similarity:.3f}", False))
        rows.append((curated.label(query) or "", entries))
    draw_page(
        folder, rows, f"{len(curated.rows):,d} curated images, some of them with their "
        f"nearest of {len(pool.rows):,d} images of the pool, and the cosines")


def draw_clusters(folder: Path, pool: Pool, rows: np.ndarray, clusters: np.ndarray,
                  curated: Pool | None, curated_clusters: np.ndarray | None):
    """Some clusters: a curated image of each, if there are such, and images that were taken."""
    # From the number of an image to its cluster.
    cluster_of = np.zeros(len(pool.images), np.int64)
    cluster_of[pool.rows] = clusters
    taken, sizes = np.unique(cluster_of[rows], return_counts=True)
    pages = []
    for cluster in evenly(taken[np.argsort(-sizes, kind="stable")].tolist(), ROWS):
        # Pictures of a pool often stand in an order, so those that are shown are spread evenly.
        members = rows[cluster_of[rows] == cluster]
        entries = []
        if curated is not None:
            first = int(curated.rows[np.flatnonzero(curated_clusters == cluster)[0]])
            entries.append((curated, first, "curated", True))
        for row in evenly(members.tolist(), COLUMNS - len(entries)):
            entries.append((pool, row, "", False))
        whole = int((clusters == cluster).sum())
        pages.append((f"{len(members):,d} of {whole:,d}", entries))
    draw_page(
        folder, pages, f"clusters of {len(pool.rows):,d} images, and how many images of "
        "each were taken")
