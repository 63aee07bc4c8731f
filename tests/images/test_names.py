"""Claims
1. Names are the strings that they were made from, in any language and of any bytes, one by one,
   in parts, and after a pickle.
2. The files of a folder come in the order of their whole names, without the hidden ones;
   pictures of kinds that are not read are counted in a warning.
3. A list gives its paths in order, and labels by the sorted names of the classes; a line, a label
   or a file that is not as it should be is named.
4. What a set of files keeps for each image is little more than the letters of its name, and so is
   what it takes while it is listed: a folder, tar files, and parts of them.
"""

import errno
import os
import pickle
import shutil
import tracemalloc
from unittest.mock import patch

import numpy as np
import pytest
from conftest import finish, start

import images.names
from images import store
from images.data import open_images, part_by_name
from images.files import EXTENSIONS
from images.names import Names, list_files, numbered, read_list
from images.store import Shards

STRINGS = ["", "a.png", "b/ä-日本.jpg", "b/\udcff.png",
           "c"]  # the fourth has a byte that is no letter

# -- 1


def test_names_are_strings():
    names = Names(iter(STRINGS))
    assert len(names) == 5 and list(names) == STRINGS and names == STRINGS
    assert [names[i] for i in range(5)] == STRINGS and names[-1] == names[np.int64(4)] == "c"
    assert names[1:3] == STRINGS[1:3] and names[np.array([4, 0, 4])] == ["c", "", "c"]
    assert names[1:][np.array([0])] == ["a.png"] and names[:0] == [] and not Names([])
    assert "c" in names and names.index("a.png") == 1 and names != STRINGS[:4]
    assert pickle.loads(pickle.dumps(names)) == STRINGS
    with pytest.raises(IndexError):
        names[5]


# -- 2


def test_files_of_a_folder(tmp_path):
    for name in ("a.jpg", "a/2.jpg", "a/1.jpg", "a/.hidden.jpg", "a/b/c.txt", "a0.jpg", "B/x",
                 "a.b/y", ".c/z", ".d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "B")
    expected = []
    for folder, _, files in os.walk(tmp_path, followlinks=True):
        expected += [
            os.path.relpath(f"{folder}/{file}", tmp_path) for file in files if file[0] != "."]
    expected = [name for name in expected if not name.startswith(".c/")]
    assert list(list_files(tmp_path)) == sorted(expected) and len(expected) == 8
    (tmp_path / "a/b").chmod(0)  # what may not be read is left out, unless by the superuser
    assert len(list(list_files(tmp_path))) in (7, 8)
    (tmp_path / "a/b").chmod(0o700)

    # A link to a folder above would list everything again and again.
    (tmp_path / "a/up").symlink_to(tmp_path)
    assert list(list_files(tmp_path)) == sorted(expected)


def test_a_link_that_leads_nowhere_costs_no_other_file(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/me").symlink_to("me")
    assert list(list_files(tmp_path)) == ["a/1.jpg", "a/2.jpg", "a/me", "b/3.jpg"]


@pytest.mark.parametrize("error, told",
                         [(PermissionError(errno.EACCES, "Permission denied"), True),
                          (OSError(errno.ESTALE, "Stale file handle"), False)])
def test_a_folder_that_cannot_be_read_is_named(error, told, tmp_path, monkeypatch, capsys):
    """One that may not be read is left out; a disk that fails for a while stops the program."""
    for name in ("a/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    scandir = os.scandir

    def fails(folder):
        if folder.name == "a":
            raise error
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", fails)
    if told:
        assert list(list_files(tmp_path)) == ["b/2.jpg"]
        assert f"warning: {tmp_path}/a may not be read" in capsys.readouterr().err
    else:
        with pytest.raises(OSError, match="Stale"):
            list(list_files(tmp_path))


@pytest.mark.parametrize("folders, told", [("train test", True), ("Train Val", True),
                                           ("train cats", False), ("train", False)])
def test_folders_that_sound_like_parts_are_named(folders, told, photos, tmp_path, capsys):
    for folder in folders.split():
        (tmp_path / "set" / folder).mkdir(parents=True)
        shutil.copy(sorted(photos.rglob("*.*"))[0], tmp_path / "set" / folder)
    open_images(f"folder:{tmp_path}/set")
    assert (f"folder:{tmp_path}/set/" in capsys.readouterr().err) == told


def test_pictures_that_are_not_read_are_counted(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "set")
    for name in ("a.HEIC", "b.heic", "c.gif", "notes.txt", ".d.gif"):
        (tmp_path / "set" / name).touch()
    for _ in range(2):  # a folder may be opened several times; it is said once
        assert len(open_images(f"folder:{tmp_path}/set")) == 24
    told = capsys.readouterr().err
    assert f"warning: {tmp_path}/set: left out 2 .heic, 1 .gif, which" in told
    assert told.count("warning") == 1
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/a.heic").touch()
    with pytest.raises(ValueError, match="found 0 images"):
        open_images(f"folder:{tmp_path}/phone")
    assert "left out 1 .heic" in capsys.readouterr().err


# -- 3


def test_a_list_of_paths_and_labels(tmp_path):
    for name in ("a b.jpg", "\udcff.jpg"):
        (tmp_path / name).touch()
    file = tmp_path / "list.txt"
    lines = "a b.jpg\tdog\n\n\udcff.jpg\tcat\na b.jpg\tdog\n"
    file.write_text(lines, errors="surrogateescape")
    names, labels, classes = read_list(file)
    assert names == ["a b.jpg", "\udcff.jpg", "a b.jpg"]
    assert labels == [1, 0, 1] and classes == ["cat", "dog"]
    file.write_text("a b.jpg\n/else/where.png\n")
    assert read_list(file) == (["a b.jpg", "/else/where.png"], None, None)
    file.write_text("a b.jpg\tdog \n\udcff.jpg\tdog\na b.jpg\t cat\n", errors="surrogateescape")
    assert read_list(file)[1:] == ([1, 1, 0], ["cat", "dog"])  # blanks that nobody sees
    file.write_text("a b.jpg\t\n")
    assert read_list(file) == (["a b.jpg"], None, None)  # a tab at the end is no label
    file.write_text("a b.jpg\n", encoding="utf-8-sig")  # as some editors write it
    assert read_list(file)[0] == ["a b.jpg"]
    assert numbered(iter(["x", "x"])) == (None, None)  # tells nothing apart


@pytest.mark.parametrize("text, words", [
    ("a.jpg\ta\nb.jpg\n", "1 of 2 lines have no label"),
    ("a.jpg\n\tb\n", "line 2 is not a path"),
    ("a.jpg\tb\tc\n", "line 1 is not a path"),
    ("\n\n", "found 0 images"),
    ("b.jpg\n", "there is no .*b.jpg; paths are absolute, or relative"),
    (None, "no such file")])  # yapf: disable
def test_a_list_that_is_none(text, words, tmp_path):
    (tmp_path / "a.jpg").touch()
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_list(tmp_path / "list.txt")


# -- 4

COUNT = 2_000


def file_names(folder=None):
    return (f"n{i // 100:08d}/n{i // 100:08d}_{i:06d}.jpg" for i in range(COUNT))


def bytes_for_each_image(function):
    """(what the function returns, bytes for each image that are kept, at the peak).

    tracemalloc counts what all threads of a process allocate. So this is called in a process that
    has just begun: here another thread, or the garbage of an earlier test, could add to it.
    """
    tracemalloc.start()
    result = function()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, kept / COUNT, peak / COUNT


def check_memory_of_a_folder(rank, folder):
    letters = len(next(file_names()))
    with patch.object(images.names, "list_files", file_names):
        opened, kept, peak = bytes_for_each_image(lambda: open_images(f"folder:{folder}"))
    assert opened.names == list(file_names()) and len(opened.classes) == COUNT // 100
    # 8 bytes for the name, 8 for the label, and what arrays have in reserve while they grow.
    assert kept < 1.2 * letters + 24 and peak < 2 * letters + 48
    # Of a part: 16 for the name, 8 for its number in the whole, 8 for the label.
    part, kept, peak = bytes_for_each_image(lambda: part_by_name(opened, "train"))
    assert part.names == list(part.names) and kept < 36 and peak < 64
    assert len(pickle.dumps(part.read)) / COUNT < letters + 32


def check_memory_of_tar_files(rank, folder):
    names = list(file_names())
    size = COUNT // 10

    def list_members(file):
        first = size * int(file[-5])
        return [[name, 0, 0, None] for name in names[first:first + size]]

    with patch.object(Shards, "list_members", staticmethod(list_members)):
        opened, kept, peak = bytes_for_each_image(lambda: open_images(f"shards:{folder}/*.tar"))
        assert store.Shards(f"{folder}/*.tar", EXTENSIONS).names == list(opened.names)
    letters = len(opened.names[0])
    assert len(opened) == COUNT and len(opened.classes) == COUNT // 100
    # 24 bytes for its place, 8 for the name, 8 for the label, and a reserve.
    assert kept < 1.2 * letters + 48 and peak < 2 * letters + 100


@pytest.mark.parametrize("check", [check_memory_of_a_folder, check_memory_of_tar_files])
def test_the_memory_of_a_set_of_files(check, tmp_path):
    for shard in range(10):
        (tmp_path / f"{shard}.tar").touch()
    finish(start(check, str(tmp_path), world=1))
