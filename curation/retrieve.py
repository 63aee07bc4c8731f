"""Retrieve: for each image of a curated set the images of the pool that are most like it.

    curated images --> N nearest of the pool each --> their union: a set that is like the curated

Idea     A curated set such as ImageNet is good to learn from because of what is in it, and
         small because people chose it. Its nearest images in a large pool show similar things,
         in similar shares, and nobody had to look at them.
Paper    DINOv2 sec. 3 ("sample-based"): N = 4, or 32 for ImageNet-1k; larger N retrieves more
         images for several queries at once
Try      python curate.py retrieve curations/dedup --curated curations/curated
Change   what is retrieved: `chosen_rows`
Tests    pytest tests/curation/test_retrieve.py

Letters  q curated images, N neighbours of each.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curation.pieces import Table, claim
from curation.pool import Pool, can_be_listed, finish, open_pool, same_embedding
from curation.report import draw_queries, write_report
from curation.search import NO_NEIGHBOUR, SearchConfig, neighbours, search_facts
from machinery.flags import UsageError, require
from machinery.process import Process

ARGUMENTS = "FOLDER --curated FOLDER"


@dataclass
class Config(SearchConfig):
    # -- retrieval
    curated: str = ""  # the folder of embed: images that are to be had more of
    n_nearest: int = 4  # images of the pool for each curated one; 32 where these are few
    min_similarity: float = -1.0  # cosine below which an image of the pool is not taken
    with_curated: bool = False  # list the curated images, too, behind those of the pool

    def check(self):
        super().check()
        require(self, lambda x: x >= 1, "at least 1", "n_nearest")
        require(self, lambda x: x <= 1, "at most 1, as a cosine is", "min_similarity")


def open_curated(config, pool: Pool) -> Pool:
    """The images of --curated. UsageError if they are missing, or embedded otherwise."""
    if not config.curated:
        raise UsageError("--curated is missing: the folder of embed of a curated set")
    curated = open_pool(config.curated, "--curated")
    same_embedding(pool, curated, "--curated")
    return curated


def chosen_rows(nearest: Table, n: int, min_similarity: float) -> tuple[np.ndarray, int]:
    """(rows of the pool of n images that were retrieved, ascending; how often one was)."""
    # One piece after the other marks what it retrieves, so that not all neighbours are in memory,
    # and none is sorted. Where fewer neighbours were found than asked for, NO_NEIGHBOUR fills
    # their places, which is never taken, however low --min_similarity is.
    retrieved = np.zeros(n, bool)
    total = 0
    for start in range(0, len(nearest), nearest.size):
        piece = nearest.piece(start // nearest.size)
        near = piece["similarity"].astype(np.float32) > max(min_similarity, NO_NEIGHBOUR)
        retrieved[piece["row"][near]] = True
        total += int(near.sum())
    return np.flatnonzero(retrieved), total


def class_precision(pool: Pool, curated: Pool, rows: np.ndarray) -> float | None:
    """Share of these rows whose class is one of the curated; None where classes are unknown."""
    if not (pool.images.labels and curated.images.labels):
        return None
    # By name, because the same class may have another number in the other set.
    wanted = {curated.label(row) for row in curated.rows.tolist()}
    return float(np.mean([pool.label(row) in wanted for row in rows.tolist()]))


def run(words: list[str], config: Config, process: Process) -> dict:
    """The images of a pool that are nearest to each image of --curated."""
    # The search is the work; what is chosen from its result follows from the flags, and is made
    # anew each time.
    pool = open_pool(words[0])
    curated = open_curated(config, pool)
    can_be_listed(pool, curated if config.with_curated else None)
    folder = Path(config.output_dir or "curations/retrieve")
    claim(folder, {"pool": pool.sha256, "curated": curated.sha256, **search_facts(config)},
          process)
    nearest = neighbours(folder / "nearest", curated, pool, config.n_nearest, config, process)
    rows, total = chosen_rows(nearest, len(pool.images), config.min_similarity)
    if not len(rows):
        raise UsageError(
            f"--min_similarity {config.min_similarity}: no image of the pool is so "
            "like one of --curated; lower it")

    # An image that is near to several queries is taken once: with a larger N this happens more
    # often, and the share of what is popular in the pool grows.
    facts = {
        "curated": curated.sha256, "n_nearest": config.n_nearest,
        "min_similarity": config.min_similarity, **search_facts(config), "counts": {
            "pool": len(pool.rows), "curated": len(curated.rows), "retrieved": total,
            "retrieved for several queries": total - len(rows)}}
    process.print(f"retrieve: {total:,d} images for {len(curated.rows):,d} curated ones, "
                  f"{len(rows):,d} of them different")
    # Labels decide nothing here. Where both sets have them, they say how well it went.
    precision = class_precision(pool, curated, rows)
    if precision is not None:
        facts["share of the curated classes"] = precision
        process.print(f"  {precision:.1%} are of a class of --curated")
    content = finish(folder, "retrieve", pool, rows, facts, process,
                     curated if config.with_curated else None)
    if process.main:
        draw_queries(folder, pool, curated, nearest)
        write_report(folder)
    return content
