"""Claims
1. One of several processes reads, and all have what it found; where it fails, all fail with the
   same words. With one process nothing is sent. Nobody goes on before the last one has come.
2. Whole tensors are read by one process and sent to the others, whatever their type; split ones
   are read by each.
3. Of the processes of a run one lists the folder, opens all data sets and reads the checkpoint;
   a folder that is not there is refused by all of them.
"""

import contextlib
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, finish, killed_in_step, start, without_figures
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import train
from images import names
from machinery import checkpoints
from machinery.flags import UsageError
from machinery.process import Process, start_process
from machinery.read_once import fill_once, leaves, read_once, wait_for_all

SEED = {
    "a": {"x": torch.arange(3.0)}, "b": {"y": torch.tensor(7), "z": torch.ones(2).bfloat16()}}


def words_of(function):
    """The kind and the words of the error that this raises."""
    with pytest.raises((UsageError, ValueError, OSError)) as caught:
        function()
    return type(caught.value).__name__, str(caught.value)


def fails(error):
    raise error


def fill(state, process, calls):
    """Fill `state` with the numbers of SEED, and note who was asked to read."""

    def read(alone):
        calls.append(alone)
        for x, value in zip(leaves(state), leaves(SEED)):
            x.copy_(value)

    fill_once(read, state, process)


def two_processes(rank, folder, photos):
    """Everything that two processes can tell, in one go."""
    process = start_process("cpu")
    out = {"found": read_once(lambda: {"rank": dist.get_rank()}, process)}
    out["errors"] = [
        words_of(lambda: read_once(lambda: fails(error), process))
        for error in (UsageError("--data: no"), ValueError("no"), OSError(28, "full", "x"))]

    # The other process goes on only when this one has done its work. No exchange may be waiting
    # meanwhile, because exchanges have a time limit.
    with patch("torch.distributed.barrier", lambda: fails(AssertionError())):
        for turn in range(3):
            done = Path(folder) / f"done in turn {turn}"
            if rank == turn % 2:
                done.touch()
            wait_for_all(process)
            out[f"turn {turn}"] = done.exists()

    # Tensors that are whole, then one that is split over the two.
    whole = {
        "a": {"x": torch.zeros(3)}, "b": {"y": torch.tensor(0), "z": torch.zeros(2).bfloat16()}}
    out["whole calls"] = []
    fill(whole, process, out["whole calls"])
    out["whole"] = leaves(whole)
    mesh = init_device_mesh("cpu", (2,))
    split = {"a": distribute_tensor(torch.zeros(3), mesh, [Replicate()])}
    calls = []
    fill_once(calls.append, split, process)
    out["split calls"] = calls

    # A run of files, killed in its last step and continued: who lists, and who reads tensors?
    listed, loaded, list_files, load = [], [], names.list_files, checkpoints.dcp.load
    noted = {
        "images.names.list_files": lambda *args: listed.append(1) or list_files(*args),
        "machinery.checkpoints.dcp.load": lambda *args, **kwargs: loaded.append(1) or load(
            *args, **kwargs)}
    flags = [*TINY, "--batch_size_per_gpu", "4", "--epoch_length", "2", "--save_every", "1"]
    flags += ["--data", f"folder:{photos}", "--val_data=", "--output_dir", f"{folder}/run"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_figures())
        for name, function in noted.items():
            stack.enter_context(patch(name, function))
        with killed_in_step(4):
            train.run(train.read_flags(flags))
        train.run(train.read_flags(flags))
        out["no folder"] = words_of(
            lambda: train.run(train.read_flags([*flags, "--data", "folder:/no/folder"])))
    out["listed"], out["loaded"] = len(listed), len(loaded)
    torch.save(out, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for i in range(24):
        image = torch.randint(0, 256, (3, 30, 30), dtype=torch.uint8)
        (folder / "photos").mkdir(exist_ok=True)
        train.np.save(folder / f"photos/{i}.npy", image.numpy())
    finish(start(two_processes, str(folder), str(folder / "photos")))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


# -- 1


def test_what_one_found_all_have(of_two):
    assert [out["found"] for out in of_two] == [{"rank": 0}] * 2


def test_an_error_reaches_all(of_two):
    expected = [("UsageError", "--data: no"), ("ValueError", "no"),
                ("OSError", "[Errno 28] full: 'x'")]
    assert [out["errors"] for out in of_two] == [expected] * 2


def test_all_wait_for_the_last(of_two):
    assert [out[f"turn {turn}"] for out in of_two for turn in range(3)] == [True] * 6


def test_one_process_sends_nothing():
    alone = Process(torch.device("cpu"))
    value = object()
    assert read_once(lambda: value, alone) is value
    state, calls = {"a": {"x": torch.zeros(3)}}, []
    fill(state, alone, calls)
    assert calls == [True] and torch.equal(state["a"]["x"], torch.arange(3.0))


# -- 2


def test_whole_tensors_are_read_once(of_two):
    assert [out["whole calls"] for out in of_two] == [[True], []]
    for out in of_two:
        assert all(torch.equal(x, value) for x, value in zip(out["whole"], leaves(SEED)))


def test_split_tensors_are_read_by_each(of_two):
    assert [out["split calls"] for out in of_two] == [[False], [False]]


# -- 3


def test_a_run_lists_and_loads_in_one_process(of_two):
    assert of_two[0]["listed"] and of_two[0]["loaded"] == 1
    assert of_two[1]["listed"] == of_two[1]["loaded"] == 0
    kind, words = of_two[0]["no folder"]
    assert kind == "UsageError" and "/no/folder" in words and of_two[1]["no folder"] == (kind,
                                                                                         words)
