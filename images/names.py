"""Names: what millions of images are called, without a Python object for each of them.

    folder --list_files, sorted--> cats/1.png, dogs/22.png, ... --> Names: letters, starts, ends

Idea     A string of Python takes about 50 bytes beside its letters, and a list 8 more to point
         to it. A worker process that is forked shares the memory of the training process, page by
         page, until one of them writes to a page, which is then copied ("copy on write"). And
         Python writes into each string that is merely looked at: every object has a count of
         those who use it ("reference count") beside its content. So every worker would have a
         copy of all names in the end. Here the names are three long arrays, into which nobody
         writes.
Paper    none
Try      python -m images.names      how many bytes a name takes
Change   which files are listed: list_files, UNREAD; a line of a list: read_list; how names are
         kept: Names
Tests    pytest tests/images/test_names.py
"""

import copy
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

# Pictures of phones, cameras and the web that this program does not read, in small letters.
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".gif", ".jfif", ".pgm", ".dng", ".cr2",
          ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")

# Folders that divide a set, in small letters.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@cache  # a text that comes again is not printed again: a folder may be listed several times
def warn(text: str):
    """Say it once: torchrun numbers its processes by RANK."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


class Names(Sequence):
    """A list of strings that cannot be changed; a slice or an array of numbers gives a part.

    Example: cats/1.png and dogs/22.png are the letters cats/1.pngdogs/22.png. The first name
    starts at 0 and ends at 10, the second one starts at 10 and ends at 21.
    """

    def __init__(self, names: Iterable[str]):
        # The names may come one by one, so that they are never all there as strings.
        self.letters = bytearray()
        bounds = array("q", [0])  # whole numbers of 64 bits
        for name in names:
            self.letters += os.fsencode(name)
            bounds.append(len(self.letters))

        # Each name ends where the next one starts: both are views of one array.
        self.starts = np.frombuffer(bounds, np.int64)[:-1]
        self.ends = np.frombuffer(bounds, np.int64)[1:]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i):
        # A single number may come from an array, too.
        if isinstance(i, (int, np.integer)):
            return self.string(self.starts[i], self.ends[i])

        # A part has the letters of the whole: only its bounds are chosen.
        part = copy.copy(self)
        part.starts = self.starts[i]
        part.ends = self.ends[i]
        return part

    def __iter__(self) -> Iterator[str]:
        return map(self.string, self.starts, self.ends)

    def __eq__(self, other) -> bool:
        return list(self) == list(other)

    def string(self, start: int, end: int) -> str:
        """The name whose letters lie between these two places."""
        return os.fsdecode(bytes(self.letters[start:end]))


def _is_folder(entry: os.DirEntry) -> bool:
    # A link to itself, or to a place that may not be entered, leads nowhere. That is no reason to
    # lose the files beside it.
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_files(folder: Path, prefix: str = "", above: tuple = ()) -> Iterator[str]:
    """The names of all files below a folder, relative to it and sorted.

    Hidden files and folders, such as the ._x.jpg of macOS and the .ipynb_checkpoints of
    Jupyter, are left out; links are followed. above: the folders that this one lies in.
    """
    # A folder that lies in itself, by a link to a folder above, counts as empty: its images would
    # be listed again and again. So does one that may not be read, of which the user is told. Any
    # other error is one of the disk and stops the program: the folder would be missing by chance.
    entries = []
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        for entry in os.scandir(folder):
            if not entry.name.startswith("."):
                entries.append(f"{entry.name}/" if _is_folder(entry) else entry.name)
    except FileNotFoundError:
        return
    except PermissionError:
        warn(f"{folder} may not be read: what is in it is left out")
        return

    # A file system lists files in an order of its own, so they are sorted. One folder at a time
    # is enough for that, if a folder counts as its name with a slash behind it. Example: a.jpg
    # comes before a/1.jpg and a/2.jpg, and these before a0.jpg, because "." is below "/", and
    # "/" below "0".
    for name in sorted(entries):
        if name.endswith("/"):
            yield from list_files(folder / name, prefix + name, (*above, identity))
        else:
            yield prefix + name


def list_images(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """The files that list_files gives and that end so, in small or capital letters.

    At the end a warning counts the pictures that were left out because their kind is not read.
    """
    left_out = Counter()
    for name in list_files(folder):
        ending = os.path.splitext(name)[1].lower()
        if ending in endings:
            yield name
        elif ending in UNREAD:
            left_out[ending] += 1
    if left_out:
        kinds = ", ".join(f"{count:,d} {ending}" for ending, count in left_out.most_common())
        warn(f"{folder}: left out {kinds}, which this program does not read; save them as .jpg "
             "or .png if they are wanted")


def numbered(labels: Iterable[str]) -> tuple[list[int], list[str]] | tuple[None, None]:
    """The label of each image -> (its number, the names of the classes, sorted).

    A single label for all images tells nothing apart: then both are None.
    """
    # The labels may come one by one. So each gets the next free number when it is met first,
    # and another one when all are known. Example: dog cat dog is 0 1 0, and then 1 0 1, because
    # cat comes before dog.
    as_met = {}
    numbers = [as_met.setdefault(label, len(as_met)) for label in labels]
    if len(as_met) < 2:
        return None, None
    classes = sorted(as_met)
    place = {as_met[name]: i for i, name in enumerate(classes)}
    return [place[number] for number in numbers], classes


def labels_of_folders(path: Path,
                      names: Names) -> tuple[list[int], list[str]] | tuple[None, None]:
    """The labels and classes of images that lie in folders below `path`, as `numbered` gives them.

    The first part of cats/07.jpg is the class cats; the first part of 07.jpg is the file, which
    has no class, and then the others have none either.
    """
    if not all("/" in name for name in names):
        return None, None
    labels, classes = numbered(name.split("/")[0] for name in names)

    # A set that is divided into folders of other names than train and val looks like one of two
    # classes, and k-NN would tell which part an image is from.
    if classes and {name.lower() for name in classes} <= PARTS:
        warn(
            f"the classes of folder:{path} are {', '.join(classes)}, which sound like parts of a "
            f"set; if they are, give one of them, as in folder:{path / classes[0]}")
    return labels, classes


def beside_validation(data: str, val_data: str) -> str:
    """--data as it is meant beside this --val_data.

    Beside X:val the name X stands for X:train. So no image is in both, also where X alone would
    be all images of a set that is not divided.
    """

    # The same folder can be written in many ways: with a slash at its end, with ~, or from here.
    def place(spec: str) -> tuple[str, str]:
        kind, _, path = spec.partition(":")
        return kind, os.path.realpath(os.path.expanduser(path))

    name, _, split = val_data.rpartition(":")
    return f"{data}:train" if split == "val" and place(name) == place(data) else data


def in_natural_order(name: str) -> list:
    """A key to sort by: frame-2.jpg comes before frame-10.jpg."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def read_list(path: Path) -> tuple[Names, list[int] | None, list[str] | None]:
    """A file of one path in each line, behind a tab its label -> (paths, labels, classes).

    Either all lines have a label or none. Empty lines are skipped. ValueError for a file that
    is no such list, and where the first image is not there.
    """
    labels = []

    def paths():
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                name, *label = line.rstrip("\n").split("\t")
                if not name and not label:
                    continue
                if len(label) > 1 or not name:
                    raise ValueError(f"list:{path}: line {number} is not a path, or a path, "
                                     f"a tab and a label: {line.strip()!r:.80}")
                # Blanks around a label are not seen in an editor; a tab at the end is no label.
                label = label[0].strip() if label else ""
                labels.append(sys.intern(label) if label else None)
                yield name

    if not path.is_file():
        raise ValueError(f"list:{path}: there is no such file")
    names = Names(paths())
    if not len(names):
        raise ValueError(f"list:{path}: found 0 images in it; expected one path in each line")

    # Where the first path leads nowhere, the list has most likely been moved away from its
    # images, and no path of it is right. To look for each of millions would take long.
    if not (path.parent / names[0]).exists():
        raise ValueError(f"list:{path}: there is no {path.parent / names[0]}; paths are "
                         "absolute, or relative to the folder of the list")
    unlabelled = labels.count(None)
    if 0 < unlabelled < len(labels):
        raise ValueError(
            f"list:{path}: {unlabelled} of {len(labels)} lines have no label; give "
            "one to all of them, or to none")
    return names, *((None, None) if unlabelled else numbered(labels))


if __name__ == "__main__":

    # Names as in ImageNet, in folders of 1,300 images each.
    strings = [f"n{i // 1300:08d}/n{i // 1300:08d}_{i % 1300}.JPEG" for i in range(100_000)]
    names = Names(strings)
    as_list = sys.getsizeof(strings) + sum(map(sys.getsizeof, strings))
    as_names = len(names.letters) + names.starts.nbytes + 8
    print(f"{len(names):,d} names such as {names[0]}, bytes for each")
    print(f"    a list of strings  {as_list / len(names):5.0f}")
    print(f"    Names              {as_names / len(names):5.0f}")
