"""Search: the k nearest images of a pool, which is larger than memory, for each of many.

    queries, 2,048 at a time --> x file after file of the pool --> cosines --> the best k so far
                                                                                  |
               FOLDER/*.npy: (row, similarity) of the k nearest of each query, in pieces

Idea     The exact answer compares every query with every image. Only a part of the pool and the
         best k so far are in memory, so that a pool may be as large as the disk. The queries
         are shared by all processes. Where FAISS is installed it can search instead: its
         indices look at a part of the pool only.
Paper    DINOv2 appendix A: FAISS on 20 machines of 8 GPUs, inverted lists with product quantisation
Try      python -m curation.search      the search in pieces beside a table of all cosines
Change   another way to search is a class with the same __call__, and one line in SEARCHES
Tests    pytest tests/curation/test_search.py

Letters  q queries, n images of the pool, c of them in a chunk, D width, k neighbours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from curation.pieces import Table, claim, make_pieces
from curation.pool import Pool
from machinery.flags import UsageError, require
from machinery.process import Process
from machinery.read_once import wait_for_all

NO_NEIGHBOUR = -2.0  # stands where fewer than k were found; no cosine is so low
TRAINED_ON = 256 * 1024  # images on which an index of FAISS is trained, if it has few lists
PER_LIST = 40  # images for each list otherwise: FAISS warns of fewer than 39

# A neighbour takes 6 bytes on the disk: 4 for a row, which counts to 4.3 billion, and a cosine
# to three digits.
NEIGHBOUR = np.dtype([("row", np.uint32), ("similarity", np.float16)])


@dataclass
class SearchConfig:
    """The flags of every stage that searches."""

    # -- search
    search: Literal["exact",
                    "faiss"] = "exact"  # compare all, or ask FAISS (pip install faiss-cpu)
    faiss_index: str = "Flat"  # what FAISS builds: Flat is exact; IVF4096,Flat or IVF65536,PQ64
    faiss_nprobe: int = 32  # of the lists of an IVF index, how many are searched
    queries_at_once: int = 2048  # images that are searched for at once; more need more memory
    # -- machine
    device: str = "auto"  # auto | cpu | cuda | mps
    # -- where to
    output_dir: str = ""  # the folder for what the stage leaves; empty: curations/STAGE

    def check(self):
        require(self, lambda x: x >= 1, "at least 1", "queries_at_once", "faiss_nprobe")
        if self.search == "faiss":
            import_faiss()  # refused now, before a folder is made for the work


class Exact:
    """Compares with all `rows` of a table of features."""

    def __init__(self, features: Table, rows: np.ndarray, device: torch.device):
        self.features = features
        self.rows = rows
        self.device = device

    def __call__(self, queries: Tensor, k: int, own: np.ndarray) -> tuple[Tensor, Tensor]:
        """Cosines and rows of the k nearest of each query: (q, k) each, nearest first.

        queries (q, D) of unit length. own (q,): the row of each query in the pool, which is not
        its own neighbour; -1 where it is not in the pool. k <= n - 1.
        """
        # At first nothing was found: everything that comes is better than NO_NEIGHBOUR.
        queries = queries.to(self.device)
        best = queries.new_full((len(queries), k), NO_NEIGHBOUR)  # (q, k)
        best_rows = torch.zeros_like(best, dtype=torch.int64)  # (q, k)
        for numbers, chunk in self.features.chunks(self.rows):
            chunk = torch.from_numpy(np.array(chunk))  # a map cannot be written to, a copy can
            cosines = queries @ chunk.to(self.device, torch.float32).T  # (q, c)

            # `numbers` ascend, so the place of a row among them is found by halving.
            places = np.searchsorted(numbers, own)
            inside = np.flatnonzero(numbers[places.clip(max=len(numbers) - 1)] == own)
            cosines[inside, places[inside]] = NO_NEIGHBOUR

            # The best of this chunk join the best so far, and the best k of both stay.
            values, where = cosines.topk(min(k, len(numbers)))
            new_rows = torch.from_numpy(numbers).to(self.device)[where]
            best, order = torch.cat([best, values], 1).topk(k)
            best_rows = torch.cat([best_rows, new_rows], 1).gather(1, order)
        return best.cpu(), best_rows.cpu()


def import_faiss():
    """The module, which is not among what this project needs; UsageError without it."""
    try:
        import faiss
    except ImportError:
        raise UsageError("--search faiss: FAISS is not installed (pip install faiss-cpu, or "
                         "faiss-gpu); --search exact needs nothing") from None
    return faiss


class Faiss:
    """Asks an index of FAISS, and computes the cosines of what it finds again, exactly.

    An index that packs features into fewer bytes (PQ) knows cosines only roughly; thresholds
    are for exact ones.
    """

    def __init__(self, features: Table, rows: np.ndarray, index_file: Path,
                 config: SearchConfig):
        faiss = import_faiss()
        self.features = features
        self.rows = rows
        self.index = faiss.read_index(str(index_file))

        # An index of lists (IVF) searches those whose centroids are nearest. It may stand behind
        # a rotation or before a refinement, where only FAISS's own function finds it. That
        # function raises an error for an index without lists, such as the exact one.
        try:
            space = faiss.ParameterSpace()
            space.set_index_parameter(self.index, "nprobe", config.faiss_nprobe)
        except RuntimeError:
            if "IVF" in config.faiss_index:
                raise UsageError(
                    f"--faiss_nprobe {config.faiss_nprobe}: FAISS finds no lists to set it for "
                    f"in --faiss_index {config.faiss_index}; give another index") from None

    def __call__(self, queries: Tensor, k: int, own: np.ndarray) -> tuple[Tensor, Tensor]:
        """As Exact.__call__."""
        # One neighbour more than is wanted takes the place of the query itself. FAISS says -1
        # where the lists that it has searched hold too few.
        _, places = self.index.search(queries.numpy(), k + 1)  # in the order of self.rows
        # Their features are read again from the files: k + 1 rows of each query.
        found = self.rows[places.clip(min=0)]  # (q, k + 1)
        features = self.features[found.ravel()].reshape(*found.shape, -1)
        cosines = torch.einsum("qd,qkd->qk", queries, torch.from_numpy(features).float())
        cosines[torch.from_numpy((places < 0) | (found == own[:, None]))] = NO_NEIGHBOUR
        best, order = cosines.topk(k)
        return best, torch.from_numpy(found).gather(1, order)


def build_index(file: Path, features: Table, rows: np.ndarray, factory: str):
    """The index of FAISS over these rows, written into a file, or left as it is there."""
    # FAISS names an index by a short text, see its index_factory. Features have unit length, so
    # that the largest product is the largest cosine.
    faiss = import_faiss()
    if file.exists():
        return
    try:
        index = faiss.index_factory(features.width, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            ivf = faiss.try_extract_index_ivf(index)  # None for an index without lists
            count = max(TRAINED_ON, PER_LIST * ivf.nlist if ivf else 0)
            sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(int)]
            index.train(features[sample].astype(np.float32))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UsageError(f"--faiss_index {factory}: FAISS refuses it for {len(rows):,d} images "
                         f"of {features.width} numbers ({reason:.120})") from None
    # FAISS numbers what is added 0, 1, 2, ...: these are places in `rows`.
    for _, chunk in features.chunks(rows):
        index.add(np.ascontiguousarray(chunk, dtype=np.float32))
    temporary = file.with_name(file.name + ".tmp")
    faiss.write_index(index, str(temporary))
    temporary.replace(file)


def exact_search(pool: Pool, folder: Path, config: SearchConfig, process: Process) -> Exact:
    """--search exact."""
    return Exact(pool.features, pool.rows, process.device)


def faiss_search(pool: Pool, folder: Path, config: SearchConfig, process: Process) -> Faiss:
    """--search faiss: one process builds the index, all read it."""
    file = folder / "index.faiss"
    if process.main:
        build_index(file, pool.features, pool.rows, config.faiss_index)
    wait_for_all(process)
    return Faiss(pool.features, pool.rows, file, config)


SEARCHES = {"exact": exact_search, "faiss": faiss_search}


def search_facts(config: SearchConfig) -> dict:
    """What the neighbours depend on beside the images."""
    facts = {"search": config.search, "queries_at_once": config.queries_at_once}
    if config.search == "faiss":
        facts |= {"faiss_index": config.faiss_index, "faiss_nprobe": config.faiss_nprobe}
    return facts


def neighbours(folder: Path, queries: Pool, pool: Pool, k: int, config: SearchConfig,
               process: Process) -> Table:
    """The k nearest images of the pool for each query, NEIGHBOUR (q, k), made by all processes.

    Where queries and pool are one and the same, no image is its own neighbour. A pool of fewer
    images than that gives as many as it has.
    """
    # In its own pool an image would always be its nearest neighbour, so one less can be found.
    itself = queries is pool
    k = min(k, len(pool.rows) - itself)
    if k < 1:
        raise UsageError(f"a pool of {len(pool.rows)} images: there is nothing to search in")
    inputs = {"k": k, "pool": pool.sha256, "queries": queries.sha256, **search_facts(config)}
    claim(folder, inputs, process)

    # Features may have been computed with TF32 in this process, which is a switch that stays. A
    # threshold means the same in every stage only if cosines are always exact.
    torch.set_float32_matmul_precision("highest")
    search = SEARCHES[config.search](pool, folder, config, process)

    def nearest(start: int, end: int) -> np.ndarray:
        # The features of the queries are read from their files, piece by piece, too.
        numbers = queries.rows[start:end]
        features = torch.from_numpy(queries.features[numbers]).float()  # (q, D)
        own = numbers if itself else np.full(len(numbers), -1)
        similarities, rows = search(features, k, own)
        piece = np.empty(rows.shape, NEIGHBOUR)
        piece["row"] = rows.numpy()
        piece["similarity"] = similarities.numpy()
        return piece

    return make_pieces(folder, len(queries.rows), config.queries_at_once, nearest, process,
                       "searched")


def edges(table: Table, queries: Pool, threshold: float):
    """(query rows, pool rows) of all neighbours above the threshold, from one piece at a time."""
    for start in range(0, len(table), table.size):
        piece = table.piece(start // table.size)
        # In float32: numpy would round the threshold to float16, and above .9998 that is 1.
        near, rank = np.nonzero(piece["similarity"].astype(np.float32) > threshold)
        yield queries.rows[start + near], piece["row"][near, rank].astype(np.int64)


if __name__ == "__main__":
    import tempfile

    from curation.pieces import save_array

    # 3,000 random features in three files, and a query that is close to number 2,500.
    generator = np.random.default_rng(0)
    features = generator.normal(size=(3000, 16)).astype(np.float16)
    features /= np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{i}.npy" for i in range(3)]
        for file, part in zip(files, np.split(features, 3)):
            save_array(file, part)
        search = Exact(Table(files, 1000), np.arange(3000), torch.device("cpu"))
        query = torch.from_numpy(features[2500:2501]).float()
        cosines, rows = search(query, 3, np.array([-1]))
        print("three nearest of row 2500:", rows[0].tolist(), cosines[0].numpy().round(3))
        cosines, rows = search(query, 3, np.array([2500]))
        print("without the row itself:   ", rows[0].tolist(), cosines[0].numpy().round(3))
        whole = query @ torch.from_numpy(features).float().T
        print("by a table of all cosines:", whole.topk(4).indices[0, 1:].tolist())
