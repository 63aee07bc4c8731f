"""Pieces: work on millions of rows, cut into pieces, each of which is a file.

    rows 0 ... n  -->  pieces of `size` rows  -->  each made by one of the processes
                                                     |
           FOLDER/inputs.json, 000000.npy, 000001.npy, ...  -->  Table: rows, memory-mapped

Idea     Features and neighbours of a large pool take days, and more memory than there is. So
         they are made piece by piece, and a piece is a file that is whole or not there. Whoever
         starts again makes the pieces that are missing. What is in a piece depends on its rows
         alone, and not on which process made it: any number of processes gives the same files.
Paper    none; DINOv2 appendix A says that the work was shared by 20 machines
Try      python -m curation.pieces      a table in pieces, and one of them made again
Change   what a piece may hold: make_pieces, whose argument `make` returns any array of numpy
Tests    pytest tests/curation/test_pieces.py

Letters  n rows of the table, m of them, D width.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from machinery.checkpoints import write_json
from machinery.clock import Progress
from machinery.flags import UsageError
from machinery.process import Process
from machinery.read_once import wait_for_all

CHUNK = 8192  # rows of a table that are in memory at once
OPEN = 64  # files of a table that are mapped at once


def save_array(path: Path, array: np.ndarray):
    """np.save, or leave the old file as it was."""
    # A kill leaves at most a .tmp behind: a file with the right name is always complete, and so
    # its being there is enough to tell that the work on it is done.
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())  # the disk has it before it gets its name
    os.replace(temporary, path)


def claim(folder: Path, inputs: dict, process: Process):
    """Make the folder for work on these inputs; UsageError if it holds work on others.

    inputs: JSON of all that the pieces depend on. All processes have to call it.
    """
    # The main process looks for all: on a network file system a file may be visible to one
    # machine earlier than to another.
    file = folder / "inputs.json"
    stored = process.broadcast(json.loads(file.read_text()) if file.exists() else None)
    inputs = json.loads(json.dumps(inputs))  # as it comes back from a file: tuples are lists
    if stored is None and process.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, inputs)
    process.barrier()  # nobody writes before the folder is there

    # Pieces of other inputs would be taken for pieces of these. They may have taken days, so
    # they are not thrown away unasked.
    different = [key for key in inputs if stored and stored.get(key) != inputs[key]]
    if different:
        key = different[0]
        raise UsageError(f"{folder} holds work on other inputs: {key} {stored.get(key)!s:.60}, "
                         f"here {inputs[key]!s:.60}; delete it, or give another --output_dir")


def piece_files(folder: Path, count: int, size: int) -> list[Path]:
    """The files of `count` rows in pieces of `size`, whether they are there or not."""
    return [folder / f"{i:06d}.npy" for i in range(len(range(0, count, size)))]


def make_pieces(folder: Path, count: int, size: int, make: Callable[[int, int], np.ndarray],
                process: Process, what: str = "") -> "Table":
    """The pieces of `count` rows that are missing are made, by all processes -> all of them.

    make(start, end) returns the rows from `start` up to `end`, which may have any shape.
    `what` is the name of the work in the line that tells how far it is.
    """
    starts = range(0, count, size)
    files = piece_files(folder, count, size)
    missing = process.broadcast([i for i, file in enumerate(files) if not file.exists()])

    # Process r takes every W-th of the missing pieces. What one has made no other can spoil:
    # they write different files.
    report = Progress(what, len(missing), process)
    for turn, i in enumerate(missing):
        if turn % process.world_size == process.rank:
            save_array(files[i], make(starts[i], min(starts[i] + size, count)))
            report(turn + 1)
    wait_for_all(process)  # a piece may take longer than a barrier waits
    return Table(files, size)


class Table:
    """Rows in several files, read through memory maps: as large as a disk, not as memory."""

    def __init__(self, files: list[Path], size: int):
        self.files = files
        self.size = size  # rows of each file, but for the last one
        self.maps = {}  # number of a file -> its memory map, opened when it is first needed

        last = self.piece(len(files) - 1)
        self.count = (len(files) - 1) * size + len(last)
        self.width = last.shape[1]
        self.dtype = last.dtype

    def __len__(self) -> int:
        return self.count

    def piece(self, i: int) -> np.ndarray:
        """The rows of file i, which the system loads when they are looked at."""
        # Stages come back to the same file again and again, so its map is kept. But a map keeps
        # its file open, of which a system allows a program some hundreds, and a large pool has
        # thousands of files. So the one that was opened first is given up for a new one.
        if i not in self.maps:
            if len(self.maps) >= OPEN:
                del self.maps[next(iter(self.maps))]
            try:
                self.maps[i] = np.load(self.files[i], mmap_mode="r")
            except (ValueError, EOFError) as error:  # a bad copy, a bad disk
                raise UsageError(f"{self.files[i]}: it is damaged ({error}); delete it, and "
                                 "start its stage again") from None
        return self.maps[i]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The rows of these numbers, in any order, copied into memory: (m, D)."""
        # File by file, so that each is opened once. Example with 100 rows in a file: of the
        # rows 250, 7 and 203 the first and the third are in file 2, at its places 50 and 3.
        rows = np.asarray(rows)
        out = np.empty((len(rows), self.width), self.dtype)
        numbers = rows // self.size
        for i in np.unique(numbers):
            inside = numbers == i
            out[inside] = self.piece(int(i))[rows[inside] - i * self.size]
        return out

    def chunks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers, their rows) for one part of a file after the other; rows: ascending."""
        for start in range(0, self.count, self.size):
            whole = self.piece(start // self.size)
            for first in range(0, len(whole), CHUNK):
                part = whole[first:first + CHUNK]

                # Where all rows of a part are wanted, nothing is copied.
                low, high = np.searchsorted(rows, [start + first, start + first + len(part)])
                numbers = rows[low:high]
                if len(numbers) == len(part):
                    yield numbers, part
                elif len(numbers):
                    yield numbers, part[numbers - start - first]


if __name__ == "__main__":
    import tempfile

    import torch

    def make(start, end):
        print(f"    made rows {start} to {end - 1}")
        return np.arange(start, end, dtype=np.float32)[:, None]

    with tempfile.TemporaryDirectory() as name:
        process = Process(torch.device("cpu"))
        print("250 rows in pieces of 100:")
        table = make_pieces(Path(name), 250, 100, make, process)
        print(f"rows 249, 7 and 120: {table[[249, 7, 120]][:, 0]}")
        table.files[1].unlink()
        print("one piece is lost, and the work is started again:")
        make_pieces(Path(name), 250, 100, make, process)
