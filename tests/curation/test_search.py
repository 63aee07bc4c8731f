"""Claims
1. The search in parts gives the k nearest of a naive search, over all rows or some of them,
   whatever the size of files and parts; an image is not its own neighbour.
2. The graph in pieces is the same for pieces of any size, and one on two processes is that of one.
3. FAISS's exact index finds the same; an approximate one gives exact cosines of what it finds, and
   searches --faiss_nprobe of its lists, also behind a rotation; without FAISS, or with an index
   that it refuses, there is one line.
4. No more than a part of the pool is in memory at once.
"""

import os
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import finish, start
from curation_helpers import CPU, make_pool, unit_rows

import curation.pieces
from curation.pieces import Table, save_array
from curation.search import (NO_NEIGHBOUR, Exact, Faiss, SearchConfig, build_index, edges,
                             neighbours)
from machinery.flags import UsageError
from machinery.process import start_process


def naive(features, rows, queries, k, own):
    """For each query the k rows of the largest product, by a loop in float64."""
    found = []
    for query, self_row in zip(queries.astype(np.float64), own):
        products = {row: features[row].astype(np.float64) @ query for row in rows}
        products.pop(self_row, None)
        found.append(sorted(products, key=lambda row: -products[row])[:k])
    return np.array(found)


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("some", [False, True])
def test_against_a_naive_search(chunk, some, tmp_path, monkeypatch):
    monkeypatch.setattr(curation.pieces, "CHUNK", chunk)
    pool = make_pool(tmp_path, unit_rows(60, 6))
    rows = np.arange(0, 60, 2) if some else np.arange(60)
    queries = np.arange(0, 60, 5)
    features = unit_rows(60, 6)
    search = Exact(pool.features, rows, CPU.device)
    cosines, found = search(torch.from_numpy(features[queries]).float(), 9, queries)
    expected = naive(features, rows, features[queries], 9, queries)
    assert np.array_equal(found.numpy(), expected)
    products = (features[queries][:, None].astype(np.float64) * features[expected]).sum(2)
    np.testing.assert_allclose(cosines.numpy(), products, atol=1e-6)  # float32
    assert (found.numpy() != queries[:, None]).all()


def test_the_graph_in_pieces(tmp_path):
    pool = make_pool(tmp_path / "pool", unit_rows(40, 5), broken=[4, 17])
    whole = neighbours(tmp_path / "1", pool, pool, 6, SearchConfig(), CPU)
    by_seven = neighbours(tmp_path / "2", pool, pool, 6, SearchConfig(queries_at_once=7), CPU)
    everything = np.arange(len(whole))
    assert len(whole) == 38 and len(by_seven.files) == 6
    assert np.array_equal(whole[everything]["row"], by_seven[everything]["row"])
    assert not np.isin([4, 17], whole[everything]["row"]).any()

    pairs = {pair for a, b in edges(by_seven, pool, 0.5) for pair in zip(a, b)}
    products = unit_rows(40, 5).astype(float) @ unit_rows(40, 5).astype(float).T
    for a, b in pairs:
        assert products[a, b] > 0.499
    assert len(pairs) > 20
    few = make_pool(tmp_path / "few", unit_rows(3, 5))
    assert neighbours(tmp_path / "3", few, few, 64, SearchConfig(), CPU).width == 2
    alone = make_pool(tmp_path / "alone", unit_rows(1, 5))
    with pytest.raises(UsageError, match="a pool of 1 images"):
        neighbours(tmp_path / "4", alone, alone, 64, SearchConfig(), CPU)


def graph_of_a_rank(rank, folder):
    from pathlib import Path

    from curation.pool import open_pool

    process = start_process("cpu")
    pool = open_pool(f"{folder}/pool")
    config = SearchConfig(queries_at_once=5)
    neighbours(Path(folder) / f"of-{process.world_size}", pool, pool, 6, config, process)


def test_two_processes_give_the_graph_of_one(tmp_path):
    make_pool(tmp_path / "pool", unit_rows(43, 5))
    pair = start(graph_of_a_rank, str(tmp_path))
    graph_of_a_rank(0, str(tmp_path))
    finish(pair)
    files = sorted(path.name for path in (tmp_path / "of-1").iterdir())
    assert len(files) == 10 and files == sorted(os.listdir(tmp_path / "of-2"))
    for name in files:
        one, two = ((tmp_path / f"of-{n}" / name).read_bytes() for n in (1, 2))
        assert one == two, name


def test_faiss(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="FAISS is not installed")
    pool = make_pool(tmp_path / "pool", unit_rows(400, 8), size=90, broken=[7])
    exact = neighbours(tmp_path / "1", pool, pool, 5, SearchConfig(), CPU)
    flat = neighbours(tmp_path / "2", pool, pool, 5, SearchConfig(search="faiss"), CPU)
    everything = np.arange(399)
    assert np.array_equal(exact[everything], flat[everything])

    # Of four lists one is searched: the best that is found may be missed, but not misjudged.
    config = SearchConfig(search="faiss", faiss_index="IVF4,Flat", faiss_nprobe=1)
    rough = neighbours(tmp_path / "3", pool, pool, 5, config, CPU)
    same = exact[everything]["row"][:, 0] == rough[everything]["row"][:, 0]
    assert 0.4 < same.mean() < 1
    assert (rough[everything]["similarity"] <= exact[everything]["similarity"]).all()

    # With all of its lists an index finds all, also one that lies behind a rotation.
    config = SearchConfig(search="faiss", faiss_index="OPQ4_8,IVF4,Flat", faiss_nprobe=4)
    turned = neighbours(tmp_path / "5", pool, pool, 5, config, CPU)
    assert np.array_equal(exact[everything]["row"], turned[everything]["row"])

    # An index of many lists learns from more images than one of few.
    trained_on = []
    table = type(pool.features)
    read = table.__getitem__
    monkeypatch.setattr(table, "__getitem__",
                        lambda self, rows: trained_on.append(len(rows)) or read(self, rows))
    monkeypatch.setattr(curation.search, "TRAINED_ON", 100)
    for lists in (2, 5):
        build_index(tmp_path / f"{lists}.faiss", pool.features, pool.rows, f"IVF{lists},Flat")
    assert trained_on == [100, 200]
    monkeypatch.undo()
    with pytest.raises(UsageError, match="--faiss_index Tree: FAISS refuses it"):
        neighbours(tmp_path / "4", pool, pool, 5,
                   SearchConfig(search="faiss", faiss_index="Tree"), CPU)


def test_without_faiss(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)  # cannot be imported
    pool = make_pool(tmp_path / "pool", unit_rows(9, 4))
    with pytest.raises(UsageError, match="--search faiss: FAISS is not installed"):
        neighbours(tmp_path / "1", pool, pool, 2, SearchConfig(search="faiss"), CPU)


class StandIn:
    """What FAISS's flat index does, in numpy, so that our side of it runs without FAISS."""

    METRIC_INNER_PRODUCT = 0
    is_trained = True

    def index_factory(self, width, factory, metric):
        self.features = np.empty((0, width), np.float32)
        return self

    def add(self, chunk):
        self.features = np.concatenate([self.features, chunk])

    def write_index(self, index, path):
        np.save(open(path, "wb"), index.features)

    def read_index(self, path):
        self.features = np.load(path)
        return self

    def search(self, queries, k):
        products = queries @ self.features.T
        places = np.argsort(-products, axis=1)[:, :k]
        places[:, -1] = -1  # as an index of lists does where they hold too few
        return np.take_along_axis(products, places, 1), places

    def ParameterSpace(self):
        return self

    def set_index_parameter(self, index, name, value):
        raise RuntimeError("Error in set_index_parameter: could not set parameter nprobe")


def test_what_an_index_finds_is_judged_exactly(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", StandIn())
    pool = make_pool(tmp_path / "pool", unit_rows(30, 4), broken=[3])
    build_index(tmp_path / "index", pool.features, pool.rows, "Flat")
    search = Faiss(pool.features, pool.rows, tmp_path / "index", SearchConfig())
    queries = torch.from_numpy(pool.features[pool.rows]).float()
    cosines, rows = search(queries, 5, pool.rows)
    expected = naive(pool.features[np.arange(30)], pool.rows, queries.numpy(), 4, pool.rows)
    assert np.array_equal(rows[:, :4].numpy(), expected)
    assert (cosines[:, 4] == NO_NEIGHBOUR).all()


def test_the_lists_of_an_index_are_set_wherever_they_are(tmp_path, monkeypatch):
    """An index that is wrapped in another one has no attribute nprobe, but FAISS finds it."""
    stand_in = StandIn()
    monkeypatch.setitem(__import__("sys").modules, "faiss", stand_in)
    pool = make_pool(tmp_path / "pool", unit_rows(30, 4))
    build_index(tmp_path / "index", pool.features, pool.rows, "Flat")
    config = SearchConfig(faiss_index="OPQ8,IVF4,Flat", faiss_nprobe=3)
    with pytest.raises(UsageError, match="--faiss_nprobe 3: .* in --faiss_index OPQ8,IVF4"):
        Faiss(pool.features, pool.rows, tmp_path / "index", config)

    calls = []
    stand_in.set_index_parameter = lambda *call: calls.append(call)
    search = Faiss(pool.features, pool.rows, tmp_path / "index", config)
    assert calls == [(search.index, "nprobe", 3)]


def check_memory_stays_flat(rank, folder):
    """numpy tells tracemalloc what it takes: with eight times the pool it takes little more."""
    curation.pieces.CHUNK = 500  # in this process only
    peaks = []
    for count in (2000, 16_000):
        files = []
        for i in range(count // 2000):
            files.append(folder / f"{count}-{i}.npy")
            save_array(files[-1], unit_rows(2000, 32, i))
        search = Exact(Table(files, 2000), np.arange(count), CPU.device)
        queries = torch.from_numpy(unit_rows(10, 32)).float()
        tracemalloc.start()
        search(queries, 4, np.arange(10))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Each further file costs some kilobytes for its memory map. Fourteen thousand rows more, if
    # they were kept, would cost 7/8 of the whole.
    whole = 16_000 * 32 * 2
    assert peaks[1] - peaks[0] < whole / 8 and peaks[1] < whole / 4


def test_memory_stays_flat(tmp_path):
    # In a process of its own, because tracemalloc counts what other threads take, too.
    finish(start(check_memory_stays_flat, tmp_path, world=1))
