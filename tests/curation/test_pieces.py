"""Claims
1. Pieces put together are the whole, whatever their size and the number of processes; a piece that
   is there is not made again, one that is missing is.
2. A folder of pieces is for one set of inputs; others are refused by the name of what differs.
3. A table gives any rows in any order, and all chosen ones in order, part by part.
4. A file that is being written when the process ends is not taken for a piece; one that was cut
   off since is named.
5. A table of any number of files keeps few of them open.
"""

import os

import numpy as np
import pytest
import torch
from curation_helpers import CPU

import curation.pieces
from curation.pieces import Table, claim, make_pieces, save_array
from machinery.flags import UsageError
from machinery.process import Process


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_pieces_are_the_whole(size, tmp_path):
    whole = np.random.default_rng(0).normal(size=(22, 3)).astype(np.float16)
    made = []

    def make(start, end):
        made.append(start)
        return whole[start:end]

    table = make_pieces(tmp_path, 22, size, make, CPU)
    assert len(table) == 22 and table.width == 3
    assert np.array_equal(table[np.arange(22)], whole)
    assert made == list(range(0, 22, size))
    table.files[-1].unlink()
    made.clear()
    make_pieces(tmp_path, 22, size, make, CPU)
    assert made == [(len(table.files) - 1) * size]


def test_shares_of_the_processes(tmp_path, monkeypatch):
    """Two processes, one after the other here: each makes every other piece."""
    monkeypatch.setattr(curation.pieces, "wait_for_all", lambda process: None)
    monkeypatch.setattr(Process, "broadcast", lambda self, value: list(range(5)))
    made = {}
    for rank in (0, 1):
        process = Process(torch.device("cpu"), rank, 2)
        made[rank] = []

        def make(start, end, rank=rank):
            made[rank].append(start)
            return np.zeros((end - start, 1))

        try:
            make_pieces(tmp_path, 9, 2, make, process)
        except FileNotFoundError:
            assert rank == 0  # it does not wait for the other one, whose last piece is missing
    assert made == {0: [0, 4, 8], 1: [2, 6]}


def test_a_folder_is_for_one_set_of_inputs(tmp_path):
    claim(tmp_path / "a", {"k": 4, "edits": ("x", "y")}, CPU)
    claim(tmp_path / "a", {"k": 4, "edits": ("x", "y")}, CPU)
    with pytest.raises(UsageError, match="other inputs: k 4, here 5; delete it, or .*--output"):
        claim(tmp_path / "a", {"k": 5, "edits": ("x", "y")}, CPU)


def test_rows_of_a_table(tmp_path, monkeypatch):
    whole = np.arange(40, dtype=np.float32).reshape(20, 2)
    table = make_pieces(tmp_path, 20, 6, lambda start, end: whole[start:end], CPU)
    rows = np.array([19, 0, 7, 7, 12])
    assert np.array_equal(table[rows], whole[rows])
    monkeypatch.setattr(curation.pieces, "CHUNK", 4)
    for rows in (np.arange(20), np.array([3, 4, 5, 13]), np.array([19]), np.arange(6, 12)):
        parts = list(table.chunks(rows))
        assert np.array_equal(np.concatenate([numbers for numbers, _ in parts]), rows)
        assert np.array_equal(np.concatenate([part for _, part in parts]), whole[rows])
        assert max(len(part) for _, part in parts) <= 4


def test_half_a_file_is_no_piece(tmp_path, monkeypatch):

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", killed)
        save_array(tmp_path / "000000.npy", np.zeros((3, 1)))
    assert not (tmp_path / "000000.npy").exists()
    table = make_pieces(tmp_path, 3, 3, lambda start, end: np.ones((3, 1)), CPU)
    assert isinstance(table, Table) and table[np.array([0])] == 1


@pytest.mark.parametrize("left", [0, 100, 130])
def test_a_damaged_piece_is_named(tmp_path, left):
    files = make_pieces(tmp_path, 9, 4, lambda a, b: np.ones((b - a, 2)), CPU).files
    files[1].write_bytes(files[1].read_bytes()[:left])
    with pytest.raises(UsageError, match=f"{files[1].name}: it is damaged .*delete it"):
        Table(files, 4)[np.array([5])]


def test_few_files_are_open(tmp_path, monkeypatch):
    """A system allows a program some hundred open files; a large pool has thousands."""
    monkeypatch.setattr(curation.pieces, "OPEN", 5)
    whole = np.arange(60, dtype=np.float32)[:, None]
    table = make_pieces(tmp_path, 60, 2, lambda start, end: whole[start:end], CPU)
    before = len(os.listdir("/dev/fd"))
    rows = np.random.default_rng(0).permutation(60)
    assert np.array_equal(table[rows], whole[rows])
    assert np.array_equal(np.concatenate([part for _, part in table.chunks(np.arange(60))]),
                          whole)
    assert len(table.files) == 30 and len(os.listdir("/dev/fd")) <= before + 5
