"""Claims
1. A checkpoint is whole or not there: a damaged or half-written one is named and passed over.
2. A kill while saving loses nothing and leaves nothing lying about; files are replaced whole.
3. A checkpoint that holds code is refused, whatever its manifest says, and nothing in it runs,
   nor does it change a class or a function of the program.
4. One that does not fit is refused by its name.
5. A manifest of another step, or one that was changed, is damage; one of an earlier version,
   without a checksum of its own, is read.
"""

import errno
import importlib
import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

import machinery.checkpoints
from machinery.checkpoints import (checkpoints, digest, find_checkpoint, load_checkpoint, quiet,
                                   save_checkpoint, save_tensors, seal, write_text)
from machinery.flags import UsageError
from machinery.process import Process

ALONE = Process(torch.device("cpu"))


def save(folder, step):
    """A checkpoint of integers and of a single number, with some facts in its manifest."""
    state = {"student": {"a.b": torch.full((100,), step), "c": torch.tensor(1.5)}}
    save_checkpoint(folder, step, state, {"figures": {"knn": None}}, ALONE)


def empty_state():
    """What `save` saves, with other numbers."""
    return {"student": {"a.b": torch.zeros(100, dtype=torch.int64), "c": torch.tensor(0.0)}}


def newest(folder, capsys):
    """(step of the newest good checkpoint or None, what was printed about others)."""
    capsys.readouterr()
    good = find_checkpoint(folder, ALONE)
    return good and good[1]["step"], capsys.readouterr().out


def test_saved_and_loaded(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-3", "step-2"]
    path, manifest = find_checkpoint(tmp_path, ALONE)
    assert manifest["step"] == 3 and manifest["figures"] == {"knn": None}
    state = empty_state()
    load_checkpoint(path, state, ALONE)
    assert (state["student"]["a.b"] == 3).all() and state["student"]["c"] == 1.5


def test_an_old_one_that_cannot_be_removed_now_goes_later(tmp_path, monkeypatch):
    """On a network disk, a file that somebody reads keeps its folder."""
    rmtree = shutil.rmtree

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, 3)
    assert len(checkpoints(tmp_path)) == 3 and shutil.rmtree is rmtree
    save(tmp_path, 4)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-4", "step-3"]


def test_a_damaged_one_of_a_later_step_is_removed_first(tmp_path, capsys):
    for step in (500, 1000):
        save(tmp_path, step)
    (tmp_path / "step-1000/manifest.json").write_text("{")
    assert newest(tmp_path, capsys)[0] == 500
    state = {"student": {"a.b": torch.zeros(100)}}
    save_checkpoint(tmp_path, 750, state, {}, ALONE, keep=1)
    assert newest(tmp_path, capsys) == (750, "")


def test_where_all_are_damaged_none_is_removed(tmp_path):
    for step in (2, 3):
        save(tmp_path, step)
        (tmp_path / f"step-{step}/manifest.json").write_text("{")
    with pytest.raises(UsageError, match="none of its checkpoints can be read"):
        find_checkpoint(tmp_path, ALONE, required=True)
    assert len(checkpoints(tmp_path)) == 2 and find_checkpoint(tmp_path, ALONE) is None


def test_nodes_that_share_no_disk(tmp_path):

    class WithAnotherNode(Process):

        def all_gather(self, value):
            """What the processes have written: the second one into a folder of its own disk."""
            return [value, {"__1_0.distcp": {"bytes": 1, "sha256": "0"}}]

    process = WithAnotherNode(torch.device("cpu"))
    state = {"student": {"a.b": torch.zeros(100)}}
    with pytest.raises(UsageError,
                       match="--output_dir: __1_0.distcp of another process is not"):
        save_checkpoint(tmp_path, 5, state, {}, process)
    assert not checkpoints(tmp_path)


def test_what_does_not_fit(tmp_path):
    save(tmp_path, 3)
    wrong_shape = {"student": {"a.b": torch.zeros(99, dtype=torch.int64)}}
    with pytest.raises(UsageError, match="step-3 does not fit this run"):
        load_checkpoint(tmp_path / "step-3", wrong_shape, ALONE)
    with pytest.raises(UsageError, match="step-3 does not fit this run"):
        load_checkpoint(tmp_path / "step-3", {"teacher": {"c": torch.tensor(0.0)}}, ALONE)


def test_damage(tmp_path, capsys):
    for step in (2, 3):
        save(tmp_path, step)
    file = next((tmp_path / "step-3").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit
    file.write_bytes(data)
    step, printed = newest(tmp_path, capsys)
    assert step == 2 and "checksum" in printed and "step-3" in printed
    file.write_bytes(data[:100])  # cut short
    assert newest(tmp_path, capsys)[0] == 2
    (tmp_path / "step-3/manifest.json").unlink()  # killed before the manifest
    assert newest(tmp_path, capsys)[0] == 2
    assert newest(tmp_path / "none", capsys)[0] is None


def test_a_manifest_that_was_changed(tmp_path, capsys):
    for step in (2, 3):
        save(tmp_path, step)
    file = tmp_path / "step-3/manifest.json"
    good = json.loads(file.read_text())
    without_figures = {name: value for name, value in good.items() if name != "figures"}
    other_steps = [good | {"step": step} for step in (2, -1, "x", 1e30, 3.0, True, None)]
    for bad in [without_figures, good | {"figures": {"knn": 0.5}}, *other_steps]:
        file.write_text(json.dumps(bad))
        step, printed = newest(tmp_path, capsys)
        assert step == 2 and "does not match its own checksum" in printed

    # A forger, and earlier versions: the step is compared in any case.
    for bad in other_steps:
        for text in (json.dumps(seal(bad)), json.dumps(bad | {"sha256": None}), "[" * 100_000):
            file.write_text(text)
            assert newest(tmp_path, capsys)[0] == 2
    del good["sha256"]
    file.write_text(json.dumps(good))
    assert newest(tmp_path, capsys)[0] == 3


def test_a_kill_while_saving_loses_nothing(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(machinery.checkpoints, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 2)
    assert newest(tmp_path, capsys)[0] == 1
    save(tmp_path, 3)  # and leaves nothing lying about
    assert {p.name for p in tmp_path.iterdir()} == {"step-1", "step-3"}


@pytest.mark.parametrize("write, old, new",
                         [(write_text, "old", "new"),
                          (save_tensors, {"x": torch.zeros(2)}, {"x": torch.ones(2)})])
def test_files_are_replaced_whole(write, old, new, tmp_path, monkeypatch):
    file = tmp_path / "file"
    write(file, old)
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: 1 / 0)  # killed just before the last moment
        with pytest.raises(ZeroDivisionError):
            write(file, new)
    assert file.read_bytes() == before
    write(file, new)
    assert file.read_bytes() != before
    assert list(tmp_path.iterdir()) == [file]


class Evil:
    """Unpickling this prints something: it stands for code that somebody else wants to run."""

    def __reduce__(self):
        return (print, ("code ran",))


def forge_manifest(folder):
    """A manifest that fits whatever is in the folder now: a forger writes one, too."""
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": digest(p)}
        for p in folder.iterdir() if p.name != "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text()) | {"files": files}
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))


@pytest.mark.parametrize("where", ["index", "shard", "bytes"])
def test_code_in_a_checkpoint_does_not_run(where, tmp_path, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2)
    folder = tmp_path / "step-2"
    shard = next(folder.glob("*.distcp"))
    if where == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    elif where == "shard":
        torch.save(Evil(), shard)
    else:  # what DCP writes for anything that is no tensor, and would unpickle
        shutil.rmtree(folder)
        with quiet():
            dcp.save({"x": Evil()}, checkpoint_id=folder, no_dist=True)
        (folder / "manifest.json").write_text(json.dumps({"step": 2, "figures": {}}))
    forge_manifest(folder)
    step, printed = newest(tmp_path, capsys)
    if where == "shard":  # found out when it is read
        assert step == 2
        with pytest.raises(UsageError, match="does not fit"):
            load_checkpoint(folder, {"student": {"c": torch.tensor(0.0)}}, ALONE)
        printed += capsys.readouterr().out
    else:
        assert step == 1 and "has no place there" in printed
    assert "code ran" not in printed


@pytest.mark.parametrize(
    "target",
    ["torch.distributed.checkpoint.metadata Metadata", "torch.serialization _get_layout"])
def test_an_index_changes_nothing_but_its_own_parts(target, tmp_path, capsys):
    """A class gets an attribute by pickle's BUILD, a function by its dictionary."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    module, name = target.split()
    attribute = pickle.dumps((None, {"planted": 1}), protocol=0)[:-1]  # without its STOP
    index = f"c{module}\n{name}\n".encode() + attribute + pickle.BUILD + pickle.STOP
    (tmp_path / "step-2/.metadata").write_bytes(index)
    forge_manifest(tmp_path / "step-2")
    step, printed = newest(tmp_path, capsys)
    assert step == 1 and "which is not its own" in printed
    assert not hasattr(getattr(importlib.import_module(module), name), "planted")
