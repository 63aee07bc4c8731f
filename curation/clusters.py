"""Clusters: k-means over the pool, and as many images of each cluster as of the others.

    pool --> k-means --> clusters in which curated images lie --> a capped sample of each
                   \\--> without --curated: all clusters      -->

Idea     The web shows some things a thousand times as often as others, and a random sample of
         it does, too. Clusters stand for concepts that nobody had to name: an equal number of
         images from each is a balanced set. Where a curated set is too small for its nearest
         images to be enough, the clusters in which it lies are taken instead.
Paper    DINOv2 sec. 3 and appendix A ("cluster-based"): 100,000 clusters, those with more than 3
         curated images, 10,000 images of each, at most 1 million for a curated set
Try      python -m curation.clusters      three clouds of very different size, and a fair sample
Change   how many images each cluster gives: even_quotas
Tests    pytest tests/curation/test_clusters.py

Letters  m rows at once, D width, K clusters.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from curation.pieces import Table, claim, make_pieces, save_array
from curation.pool import Pool, can_be_listed, finish, open_pool
from curation.report import draw_clusters, write_report
from curation.retrieve import class_precision, open_curated
from machinery.clock import Progress
from machinery.flags import UsageError, require
from machinery.process import Process

COSINES_AT_ONCE = 2**25  # numbers in memory: 128 MB
ASSIGNED_AT_ONCE = 65_536  # images whose clusters are one piece of the work
FIXED_POINT = 2**24  # a float16 is a whole number divided by this

# ----------------------------------------------------------------------------------------------
# k-means, on all processes


def nearest_centroids(features: np.ndarray, centroids: Tensor) -> Tensor:
    """The number of the most similar centroid of each row: (m, D), (K, D) -> (m,)."""
    # With 100,000 clusters a table of all cosines would be large: fewer rows at once then.
    found = []
    for part in torch.from_numpy(features).split(max(1, COSINES_AT_ONCE // len(centroids))):
        cosines = part.to(centroids.device, torch.float32) @ centroids.T  # (m, K)
        found.append(cosines.argmax(1))
    return torch.cat(found)


def sums_of_clusters(pool: Pool, centroids: Tensor, process: Process) -> tuple[Tensor, Tensor]:
    """The sum of the features of each cluster, and how many there are: (K, D), (K,) int64.

    The sums are whole numbers, in units of 1 / FIXED_POINT.
    """
    # A sum of floats depends on the order in which it is taken, and with it the result on the
    # number of processes. A sum of whole numbers does not. Features are stored as float16, all
    # of which are multiples of 2^-24: times 2^24 they are whole numbers, and int64 has room for
    # the sum of 500 billion of them.
    sums = torch.zeros(centroids.shape, dtype=torch.int64, device=process.device)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=process.device)
    for turn, (_, chunk) in enumerate(pool.features.chunks(pool.rows)):
        if turn % process.world_size != process.rank:
            continue
        clusters = nearest_centroids(np.array(chunk), centroids)
        whole = torch.from_numpy(chunk.astype(np.float64) * FIXED_POINT).long()
        sums.index_add_(0, clusters, whole.to(process.device))
        counts += clusters.bincount(minlength=len(centroids))
    if process.world_size > 1:
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    return sums, counts


def kmeans(folder: Path, pool: Pool, n_clusters: int, iterations: int, seed: int,
           process: Process) -> Tensor:
    """Centroids (K, D) of unit length; after each iteration they are kept in the folder.

    It ends after `iterations`, or when nothing changes any more.
    """
    # Spherical k-means: the centroid is the mean of its images, made unit length, so that the
    # nearest one is that of the largest cosine. It starts from images drawn by the seed.
    rng = np.random.default_rng(seed)
    first = rng.choice(pool.rows, n_clusters, replace=False)
    centroids = torch.from_numpy(pool.features[first]).float().to(process.device)  # (K, D)
    centroids = F.normalize(centroids, dim=1)
    report = Progress("k-means, iteration", iterations, process)
    for iteration in range(iterations):
        # What was computed before a kill is read, and not computed again.
        file = folder / f"centroids-{iteration:04d}.npy"
        before = centroids
        if process.broadcast(file.exists()):
            centroids = torch.from_numpy(np.load(file)).to(process.device)
        else:
            sums, counts = sums_of_clusters(pool, centroids, process)
            # On the CPU, because a Mac's GPU has no float64.
            centroids = F.normalize(sums.cpu().double(), dim=1).float().to(process.device)

            # A cluster without images starts anew at one that the seed draws.
            empty = (counts == 0).nonzero()[:, 0].cpu()
            restart = np.random.default_rng([seed, iteration + 1])
            fresh = pool.features[restart.choice(pool.rows, len(empty))]
            centroids[empty] = torch.from_numpy(fresh).float().to(process.device)
            if process.main:
                save_array(file, centroids.cpu().numpy())
            process.barrier()
        report(iteration + 1)
        if torch.equal(centroids, before):
            break
    return centroids


def assign(folder: Path, pool: Pool, centroids: Tensor, inputs: dict,
           process: Process) -> np.ndarray:
    """The cluster of each image that is in the pool, in the order of its rows."""
    # This pass costs as much as an iteration of k-means, and is made in pieces like the search.
    claim(folder, inputs, process)

    def clusters(start: int, end: int) -> np.ndarray:
        features = pool.features[pool.rows[start:end]]
        return nearest_centroids(features, centroids).cpu().numpy().astype(np.uint32)[:, None]

    table = make_pieces(folder, len(pool.rows), ASSIGNED_AT_ONCE, clusters, process, "assigned")
    return table[np.arange(len(table))][:, 0].astype(np.int64)


# ----------------------------------------------------------------------------------------------
# Which images are taken


def even_quotas(sizes: np.ndarray, most: int) -> np.ndarray:
    """How many images each cluster gives: together `most`, and as even as its size allows.

    The smallest cluster comes first: it gives its share of what is wanted, or all that it has,
    and what it lacks is shared by the others. Example: sizes 10, 2 and 90 and most = 60. The
    smallest gives 2 of its share of 20. 58 are left for two, 29 each: the second one gives 10,
    and the last one 48.
    """
    quotas = np.zeros(len(sizes), np.int64)
    for place, i in enumerate(np.argsort(sizes, kind="stable")):
        share = (most - quotas.sum()) // (len(sizes) - place)
        quotas[i] = min(sizes[i], share)
    return quotas


def sample_clusters(rows: np.ndarray, clusters: np.ndarray, wanted: np.ndarray,
                    per_cluster: int, most: int, seed: int) -> np.ndarray:
    """Rows drawn from the wanted clusters, ascending: at most per_cluster of each."""
    # The images of a cluster stand together when they are sorted by cluster.
    order = np.argsort(clusters, kind="stable")
    ends = np.searchsorted(clusters[order], wanted, side="right")
    starts = np.searchsorted(clusters[order], wanted, side="left")
    quotas = even_quotas(np.minimum(ends - starts, per_cluster), most)

    # Each cluster has a generator of its own: whether another one is wanted, too, does not
    # change what is drawn from it.
    drawn = []
    for cluster, start, end, quota in zip(wanted, starts, ends, quotas):
        rng = np.random.default_rng([seed, int(cluster)])
        drawn.append(rows[rng.choice(order[start:end], quota, replace=False)])
    return np.sort(np.concatenate(drawn))


# ----------------------------------------------------------------------------------------------
# The stage

ARGUMENTS = "FOLDER [--curated FOLDER]"


@dataclass
class Config:
    # -- clusters
    curated: str = ""  # the folder of embed: take clusters in which it lies; empty: all clusters
    n_clusters: int = 100  # the paper has 100,000, for 744 million images
    iterations: int = 20  # of k-means, at most
    min_curated: int = 3  # take clusters that hold more curated images than this
    per_cluster: int = 10_000  # images of each cluster, at most
    most: int = 1_000_000  # images altogether, at most: fewer from large clusters
    with_curated: bool = False  # list the curated images, too, behind those of the pool
    seed: int = 0  # of the first centroids, and of what is drawn from each cluster
    # -- machine
    device: str = "auto"  # auto | cpu | cuda | mps
    # -- where to
    output_dir: str = ""  # the folder for what the stage leaves; empty: curations/cluster

    def check(self):
        require(self, lambda x: x >= 1, "at least 1", "n_clusters", "iterations", "per_cluster",
                "most")


def wanted_clusters(config: Config, curated_clusters: np.ndarray | None,
                    clusters: np.ndarray) -> np.ndarray:
    """The numbers of the clusters that are taken. UsageError if none is."""
    if curated_clusters is None:
        return np.unique(clusters)
    # One curated image in a cluster may be there by chance; the paper asks for more than three.
    counts = np.bincount(curated_clusters, minlength=config.n_clusters)
    wanted = np.flatnonzero(counts > config.min_curated)
    if not len(wanted):
        raise UsageError(f"--min_curated {config.min_curated}: no cluster holds more than so "
                         f"many of the {len(curated_clusters):,d} curated images (the most is "
                         f"{counts.max()}); lower it, or give fewer --n_clusters")
    return wanted


def run(words: list[str], config: Config, process: Process) -> dict:
    """As many images from every cluster of a pool, or from those in which --curated lies."""
    # TF32 reads 11 of the 24 bits of each factor, and is a switch that stays: `embed` may have set
    # it. A run that goes on after a kill would not have it, and might find other clusters.
    torch.set_float32_matmul_precision("highest")

    # The features that k-means was made of are noted with its centroids: for others in the same
    # folder they would be wrong.
    pool = open_pool(words[0])
    curated = open_curated(config, pool) if config.curated else None
    can_be_listed(pool, curated if config.with_curated else None)
    if config.n_clusters > len(pool.rows):
        raise UsageError(f"--n_clusters {config.n_clusters}: the pool has {len(pool.rows)} "
                         "images; give fewer")
    folder = Path(config.output_dir or "curations/cluster")
    inputs = {
        "pool": pool.sha256, "n_clusters": config.n_clusters, "iterations": config.iterations,
        "seed": config.seed}
    claim(folder, inputs, process)
    claim(folder / "kmeans", inputs, process)
    centroids = kmeans(folder / "kmeans", pool, config.n_clusters, config.iterations,
                       config.seed, process)
    clusters = assign(folder / "clusters", pool, centroids, inputs, process)

    # The curated images are assigned to the clusters of the pool, and change none of them.
    curated_clusters = None
    if curated:
        inputs["curated"] = curated.sha256
        curated_clusters = assign(folder / "curated", curated, centroids, inputs, process)
    wanted = wanted_clusters(config, curated_clusters, clusters)
    rows = sample_clusters(pool.rows, clusters, wanted, config.per_cluster, config.most,
                           config.seed)

    facts = {
        "curated": curated.sha256 if curated else None, "n_clusters": config.n_clusters,
        "iterations": config.iterations, "min_curated": config.min_curated,
        "per_cluster": config.per_cluster, "most": config.most, "seed": config.seed, "counts": {
            "pool": len(pool.rows), "curated": len(curated.rows) if curated else 0,
            "clusters taken": len(wanted),
            "images in them": int(np.isin(clusters, wanted).sum())}}
    process.print(f"cluster: {len(rows):,d} of the {facts['counts']['images in them']:,d} "
                  f"images in {len(wanted):,d} of {config.n_clusters:,d} clusters")
    if curated and (precision := class_precision(pool, curated, rows)) is not None:
        facts["share of the curated classes"] = precision
        process.print(f"  {precision:.1%} are of a class of --curated")
    content = finish(folder, "cluster", pool, rows, facts, process,
                     curated if config.with_curated else None)
    if process.main:
        draw_clusters(folder, pool, rows, clusters, curated, curated_clusters)
        write_report(folder)
    return content


if __name__ == "__main__":
    import tempfile

    from images.data import Images

    # Three clouds of 900, 90 and 10 points. A random sample has hardly any of the last one.
    # k-means needs their features alone, so that the set of images may be empty.
    generator = np.random.default_rng(0)
    sizes = [900, 90, 10]
    cloud_of = np.repeat(range(3), sizes)
    points = 0.3 * generator.normal(size=(1000, 8)) + 4 * np.eye(8)[cloud_of]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as name:
        save_array(Path(name) / "0.npy", points.astype(np.float16))
        table = Table([Path(name) / "0.npy"], 1000)
        pool = Pool(Images("", None, []), table, np.arange(1000), {}, [])
        process = Process(torch.device("cpu"))
        centroids = kmeans(Path(name), pool, 6, 20, 0, process)
        clusters = nearest_centroids(points.astype(np.float16), centroids).numpy()
    chosen = sample_clusters(pool.rows, clusters, np.unique(clusters), 1000, 60, 0)
    for label, rows in (("random", generator.choice(1000, 60)), ("even", chosen)):
        print(f"60 points, {label:6s}: {np.bincount(cloud_of[rows], minlength=3).tolist()} of "
              f"the clouds of {sizes}")
