"""Duplicates: of images that are copies of each other one stays, and of those in a test none.

    k nearest of each image --> edges above the threshold --> components --> their first image
                                                                 |
    images to be judged with --> near images of the pool --> components that go as a whole

Idea     A picture that is on a thousand pages counts a thousand times in training, and one that
         is in a test, too, makes its figures worthless. Being a copy is taken to be transitive:
         if b is a crop of a and c a crop of b, all three belong together, however little c is
         like a. So what is looked for are the connected components of a graph.
Paper    DINOv2 sec. 3 and appendix A: k = 64; .6 among the pool, .45 beside the evaluation sets
Try      python -m curation.duplicates      components of a small graph
Change   which image of a component stays: `representatives`
Tests    pytest tests/curation/test_duplicates.py

Letters  n images, e edges.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curation.pieces import Table, claim, save_array
from curation.pool import (Pool, can_be_listed, finish, open_pool, reopen, same_embedding,
                           some_are_left)
from curation.report import draw_groups, write_report
from curation.search import SearchConfig, edges, neighbours, search_facts
from evaluation.retrieval import read_groups
from machinery.checkpoints import write_text
from machinery.flags import UsageError, require
from machinery.process import Process

# ----------------------------------------------------------------------------------------------
# Connected components


class DisjointSets:
    """Which of n nodes are connected, by edges that come in any order (union-find).

    Each node points to a node of its set with a smaller number, or to itself if it is the first
    one: the root. Two nodes are connected if their pointers lead to the same root. Example: the
    edges 4-2 and 2-0 make the pointers 0 1 0 3 2, and from 4 the way leads over 2 to 0.
    """

    def __init__(self, n: int):
        self.parent = np.arange(n)

    def roots(self, nodes: np.ndarray) -> np.ndarray:
        """The first node of the set of each of these nodes."""
        # All follow their pointers at the same time, one step in each turn. Then each points to
        # its root directly, so that the next way is short.
        roots = self.parent[nodes]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self.parent[nodes] = roots
        return roots

    def join(self, a: np.ndarray, b: np.ndarray):
        """Connect a[i] with b[i] for all i."""
        # The larger root of each edge points to the smaller one. If several edges change the
        # pointer of the same root, only the last change is kept. The other edges still connect
        # two different sets, so they are treated again in the next turn. A pointer always leads
        # to a smaller number, so none goes in a circle.
        while len(a):
            root_a = self.roots(a)
            root_b = self.roots(b)
            open_edges = root_a != root_b
            a = np.minimum(root_a, root_b)[open_edges]
            b = np.maximum(root_a, root_b)[open_edges]
            self.parent[b] = a


def components(n: int, graph: Table, pool: Pool, threshold: float) -> np.ndarray:
    """The first row of the component of each row (n,), joined by edges above the threshold."""
    # One piece of the graph at a time: memory is n numbers, however many edges there are.
    sets = DisjointSets(n)
    for a, b in edges(graph, pool, threshold):
        sets.join(a, b)
    return sets.roots(np.arange(n))


def representatives(roots: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows that stay: of each component the first."""
    return rows[roots[rows] == rows]


# ----------------------------------------------------------------------------------------------
# How well it goes, where the truth is known


def score(roots: np.ndarray, rows: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Precision and recall of what is removed. groups (n,): images of a group are copies.

    An image is removed rightly if the one that stays for it is of its group. Precision is the
    share of removed images that are removed rightly. Recall is their number divided by that of
    all images that are too many, one of each group being enough. Example: of the groups aaa, b
    and c, the components {a, a, b} and {a} and {c} remove an a and the b: precision 1/2, and
    recall 1/2, because two a are too many.
    """
    removed = rows[roots[rows] != rows]
    right = int((groups[removed] == groups[roots[removed]]).sum())
    too_many = len(rows) - len(np.unique(groups[rows]))
    precision = right / len(removed) if len(removed) else 1.0
    recall = right / too_many if too_many else 1.0
    return {"precision": precision, "recall": recall}


THRESHOLDS = np.arange(0.3, 0.975, 0.025).round(3).tolist()
THRESHOLDS += [0.975, 0.98, 0.985, 0.99, 0.995]  # features that are not whitened lie close


def try_thresholds(pool: Pool, graph: Table, groups: np.ndarray, process: Process) -> dict:
    """The table of all THRESHOLDS, and the best of them: the one of the highest F1."""
    process.print("  threshold  removed  precision  recall")
    best = {"f1": -1.0}
    for threshold in THRESHOLDS:
        roots = components(len(pool.images), graph, pool, threshold)
        figures = score(roots, pool.rows, groups)
        removed = int((roots[pool.rows] != pool.rows).sum())
        process.print(f"  {threshold:9.3f} {removed:8,d} {figures['precision']:10.3f} "
                      f"{figures['recall']:7.3f}")

        # F1 is the harmonic mean of the two: high only where both are. Of thresholds with the
        # same F1 the highest is taken: it removes the fewest images, and a copy that stays does
        # less harm than an image that is lost.
        both = figures["precision"] + figures["recall"]
        f1 = 2 * figures["precision"] * figures["recall"] / both if both else 0.0
        if f1 >= best["f1"]:
            best = {"threshold": threshold, "f1": f1, **figures}
    process.print(f"  the highest F1, {best['f1']:.3f}, is at --threshold {best['threshold']}")
    return best


# ----------------------------------------------------------------------------------------------
# The stage

ARGUMENTS = "FOLDER"


@dataclass
class Config(SearchConfig):
    # -- duplicates
    threshold: float = 0.6  # images whose cosine is above it are copies; the paper's, for SSCD
    against: tuple[str, ...] = ()  # folders of embed: images that no training may have seen
    relative_threshold: float = 0.45  # the same for copies of --against, stricter
    k: int = 64  # how many nearest images of each are looked at
    groups: str = ""  # a .csv with the columns path,group: known copies, to find a threshold by

    def check(self):
        super().check()
        require(self, lambda x: x <= 1, "at most 1, as a cosine is", "threshold",
                "relative_threshold")
        require(self, lambda x: x >= 1, "at least 1", "k")
        if self.against and self.relative_threshold > self.threshold:
            raise UsageError(
                f"--relative_threshold {self.relative_threshold}: expected at most "
                f"--threshold {self.threshold}; to be in a test is the worse case")


def run(words: list[str], config: Config, process: Process) -> dict:
    """One image of each group of copies, and none that is like one of --against."""
    # What cannot be compared is refused before anything is computed.
    pool = open_pool(words[0])
    can_be_listed(pool)
    references = [open_pool(folder, "--against") for folder in config.against]
    for reference in references:
        same_embedding(pool, reference, "--against")
    groups = known_groups(config, pool)
    folder = Path(config.output_dir or "curations/dedup")
    claim(folder, {"pool": pool.sha256, "k": config.k, **search_facts(config)}, process)

    # The graph is by far the longest part of the work. It holds all neighbours, whatever their
    # cosine: with another threshold it is not made again.
    graph = neighbours(folder / "graph", pool, pool, config.k, config, process)
    n = len(pool.images)
    roots = components(n, graph, pool, config.threshold)
    kept = representatives(roots, pool.rows)

    in_a_test, hits = like_references(folder, graph, pool, references, config, process)
    left = kept[~in_a_test[kept]]

    facts = {
        "threshold": config.threshold, "k": config.k,
        **search_facts(config), "against": [reference.sha256 for reference in references],
        "relative_threshold": config.relative_threshold if references else None, "counts": {
            "pool": len(pool.rows), "components": len(kept),
            "copies removed": len(pool.rows) - len(kept),
            "representatives removed as like --against": len(kept) - len(left)}}
    print_counts(len(pool.rows), len(kept), len(left), config, process)

    # Where the copies are known, the whole table is printed: it costs little beside the graph.
    if groups is not None:
        figures = score(roots, pool.rows, groups)
        process.print(f"  by --groups at {config.threshold}: precision "
                      f"{figures['precision']:.3f}, recall {figures['recall']:.3f}")
        best = try_thresholds(pool, graph, groups, process)
        facts["by_groups"] = figures | {"best": best}

    # Asked before any file of the result is written: those of an earlier threshold may be there,
    # and stay.
    some_are_left(left, pool, "dedup")
    reopen(folder, process)

    # The component of each image is kept for whoever wants to look at its groups, and in words.
    if process.main:
        save_array(folder / "components.npy", roots)
        names = pool.images.names
        removed = np.setdiff1d(pool.rows, left)
        # For an image that is like one to be judged with none stays: its copies go as well.
        stays = ["--against" if in_a_test[i] else names[roots[i]] for i in removed]
        lines = [f"{names[i]}\t{reason}\n" for i, reason in zip(removed, stays)]
        write_text(folder / "copies.txt", "".join(lines))
    content = finish(folder, "dedup", pool, left, facts, process)
    if process.main:
        draw_groups(folder, pool, roots, hits)
        write_report(folder)
    return content


def print_counts(images: int, kept: int, left: int, config: Config, process: Process):
    """How many images there were, without their copies, and without what is like --against."""
    text = f"dedup: {images:,d} images, {images - kept:,d} copies above {config.threshold} removed"
    if config.against:
        text += f", {kept - left:,d} more as like --against"
    process.print(f"{text}: {left:,d} are left")

    # No pool has so many copies that nobody would know of them; a threshold that is too low for
    # these features takes different images for copies, and all of them would be gone.
    if kept < 0.8 * images:
        process.print(f"warning: {1 - kept / images:.0%} of the pool counts as copies; look at "
                      "page.png, and find --threshold by --groups (docs/curation.md)")


def like_references(folder: Path, graph: Table, pool: Pool, references: list[Pool],
                    config: Config, process: Process) -> tuple[np.ndarray, list]:
    """Which images of the pool are in a component that an image of --against touches: (n,) bool.

    And some pairs for the page: (reference, its row, row of the pool).
    """
    # The graph is that of the pool, with the lower threshold. Of its components those that a
    # reference touches go as a whole: a crop of a crop of a test image is in the test, too.
    n = len(pool.images)
    roots = components(n, graph, pool,
                       config.relative_threshold) if references else np.arange(n)
    touched = np.zeros(n, bool)  # by the root of a component
    hits = []
    for number, reference in enumerate(references):
        table = neighbours(folder / f"against-{number}", reference, pool, config.k, config,
                           process)
        for query_rows, rows in edges(table, reference, config.relative_threshold):
            touched[roots[rows]] = True
            hits += [(reference, *pair) for pair in zip(query_rows, rows)][:100 - len(hits)]
    return touched[roots], hits


def known_groups(config: Config, pool: Pool) -> np.ndarray | None:
    """A number for the group of each image, by --groups; None without it."""
    if not config.groups:
        return None
    # The names of groups may be any text; numbers are compared faster.
    try:
        names = read_groups(config.groups, list(pool.images.names))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return np.unique(names, return_inverse=True)[1]


if __name__ == "__main__":
    # Edge after edge, two sets become one, and their first node stands for both.
    sets = DisjointSets(8)
    for edge in ((4, 2), (2, 0), (7, 6), (5, 7)):
        sets.join(np.array(edge[:1]), np.array(edge[1:]))
        print(f"edge {edge[0]}-{edge[1]}: roots {sets.roots(np.arange(8)).tolist()}")
    truth = np.array(list("aaaabcdd"))
    figures = score(sets.roots(np.arange(8)), np.arange(8), truth)
    print(f"of the groups {''.join(truth)}: {figures}")
