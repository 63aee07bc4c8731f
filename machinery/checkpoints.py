"""Checkpoints: files that are whole or not there, and the state of a run in a folder of them.

    state, sharded or not --> checkpoint/tmp-N/  every process writes its part
                                  |              manifest.json last: sizes and checksums
                              checkpoint/step-N/ the same folder, renamed

Idea     A checkpoint counts only with its manifest, a list of its files with their sizes and
         checksums, and the manifest is written last. So a run that is killed at any moment
         leaves the old checkpoint or the new one, never half of one that is taken for whole.
Paper    none; the files are those of torch.distributed.checkpoint
Try      pytest tests/machinery/test_checkpoints.py -k kill
Change   what may be unpickled from the index of a checkpoint is listed in INDEX
Tests    pytest tests/machinery/test_checkpoints.py
"""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state

from machinery.flags import UsageError
from machinery.process import Process

# ----------------------------------------------------------------------------------------------
# Files that are whole or not there
#
# Whoever writes into a file and is killed leaves half a file. So the content goes into a second
# file beside it, which then gets the name of the first: the system renames in one piece.


def write_text(path: Path, text: str):
    """Write a small text file, or leave the old one as it was."""
    temporary = path.with_name(path.name + ".tmp")
    # Names of files may have bytes that are no letters, which Python calls surrogates.
    temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, path)


def write_json(path: Path, content):
    """write_text of `content` as JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def save_tensors(path: Path, state):
    """torch.save of tensors in dictionaries or lists, or leave the old file as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        # The system may keep what was written in memory for a while, and rename first. fsync
        # waits for the disk, so that even a power cut does not leave an empty file.
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal: it changes if a single bit of the file does."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------
# The state of networks and their optimizer


def whole_state(network: nn.Module) -> dict:
    """The state dict with every tensor whole, on every process.

    Under FSDP (machinery/shard.py) each process holds a part of every tensor. They exchange them
    here, so all processes have to call this.
    """
    return dcp_state.get_model_state_dict(
        network, options=dcp_state.StateDictOptions(full_state_dict=True))


def live_state(networks: dict[str, nn.Module], optimizer=None, of: str = "") -> dict:
    """What a checkpoint holds: the tensors of the networks, and the optimizer's moments.

    Not copies, but the very tensors in use: save_checkpoint reads them, load_checkpoint writes
    into them. optimizer: its moments, by the names of the parameters of networks[of].
    """
    state = {name: network.state_dict() for name, network in networks.items()}

    # An optimizer numbers its parameters (0, 1, 2, ...); a number says nothing once the network
    # has changed. DCP turns the numbers into names. Learning rates and weight decay are left
    # out, because the schedules set them anew at every step.
    if optimizer is not None:
        named = dcp_state.get_optimizer_state_dict(networks[of], optimizer)
        state["optimizer"] = named["state"]
    return state


# ----------------------------------------------------------------------------------------------
# Checkpoints
#
# They are written by torch.distributed.checkpoint, DCP for short. Every process writes the
# parts of the tensors that it holds into a file of its own, all at the same time; a file
# .metadata, the index, says where each part of each tensor is. So a checkpoint of eight
# processes can be loaded by two: each reads the parts that it needs. Example, of two processes:
#
#     step-500/__0_0.distcp     what process 0 wrote
#              __1_0.distcp     what process 1 wrote
#              .metadata        the index: "net.weight, rows 0 to 511: in __0_0.distcp, at 4096"
#              manifest.json    the step, figures of the run, sizes and checksums of the files,
#                                and a checksum of all this
#
# The index is a pickle, and a pickle is a small program: it names functions that are called
# when it is read, os.system if its author likes. A checkpoint may come from anywhere. So we
# read the index with an unpickler of our own, which knows the few classes that an index is made
# of and refuses everything else. (A list of what is forbidden would always miss something.)

DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}

# Module -> the names that may be used from it: all that the index of a checkpoint is made of.
INDEX = {
    # Which tensors there are, of which shape and type, and in which parts.
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    # In which file a part is, and where in it.
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *DTYPES},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}}


class IndexUnpickler(pickle._Unpickler):
    """Builds the index of a checkpoint, and refuses every name that is not in INDEX.

    It is pickle's unpickler in Python, because the one in C does not let us check the
    instruction BUILD.
    """

    def find_class(self, module, name):
        # pickle asks here for every class and function before it uses it.
        if name not in INDEX.get(module, ()):
            raise ValueError(f"its index asks for {module}.{name}, which has no place there")
        return super().find_class(module, name)

    def load_build(self):
        # BUILD sets attributes of an object, the second on the stack. An index needs it for the
        # dataclasses that it is made of. The attributes of a class, or of an entry of an
        # enumeration, belong to the whole program: there they would stay, even if the file is
        # refused afterwards.
        target = self.stack[-2]
        if isinstance(target, type) or not dataclasses.is_dataclass(target):
            raise ValueError(f"its index wants to change {target!r:.60}, which is not its own")
        super().load_build()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}


class Reader(dcp.FileSystemReader):
    """DCP's reader, made safe for files that may come from anywhere.

    The index goes through IndexUnpickler. The tensors themselves DCP reads with
    weights_only=True, torch's own list of what is allowed.
    """

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            index = IndexUnpickler(file).load()

        # Otherwise a forged index could point at a file outside the folder.
        manifest = json.loads((Path(self.path) / "manifest.json").read_text())
        named_by_index = {str(info.relative_path) for info in index.storage_data.values()}
        if not named_by_index <= set(manifest["files"]):
            raise ValueError("its index names files that its manifest does not")

        # DCP's own read_metadata does this, too: it marks what belongs to one loading.
        index.storage_meta.load_id = self.load_id
        return index


def quiet():
    """A context without DCP's warning that there is a single process: we mean it so."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def size_and_digest(file: Path) -> dict:
    """What the manifest says of one file."""
    return {"bytes": file.stat().st_size, "sha256": digest(file)}


def seal(manifest: dict) -> dict:
    """The manifest with a checksum of its own, under "sha256": of all else that is in it."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint; ValueError if it is damaged, or that of another step."""
    manifest = json.loads((path / "manifest.json").read_text())

    # Those of earlier versions have no checksum of their own. The step is compared in any case,
    # and by its type as well: 3.0 == 3 and True == 1, but neither is a step.
    if "sha256" in manifest and manifest != seal(manifest):
        raise ValueError("manifest.json does not match its own checksum")
    step = manifest["step"]
    if type(step) is not int or step != step_of(path):
        raise ValueError(f"manifest.json is that of step {step!r:.40}")
    return manifest


def save_checkpoint(folder: Path, step: int, state: dict, facts: dict, process: Process,
                    keep: int = 2):
    """Write `state` to folder/step-N, and delete all but the newest `keep` checkpoints.

    All processes have to call it, and all have to see the folder. state: nested dictionaries of
    tensors, sharded or not, such as live_state gives. facts: JSON that goes into the manifest
    beside the step.
    """
    # Everything is written under another name, so that nobody takes it for a checkpoint. Other
    # folders tmp-N come from saves that were killed.
    unfinished = folder / f"tmp-{step}"
    final = folder / f"step-{step}"
    if process.main:
        for left_over in folder.glob("tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        unfinished.mkdir(parents=True, exist_ok=True)
    process.barrier()  # nobody writes before the folder is there

    # Each process writes its parts; DCP waits for all of them and writes the index.
    alone = process.world_size == 1
    with quiet():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(unfinished), no_dist=alone)

    # Each process computes the checksums of the files that it wrote, all at the same time: for
    # one process alone that would take long.
    written = {
        file.name: size_and_digest(file)
        for file in unfinished.glob(f"__{process.rank}_*")}
    written_by_each = process.all_gather(written)

    if process.main:
        files = {name: entry for part in written_by_each for name, entry in part.items()}
        missing = [name for name in files if not (unfinished / name).exists()]
        if missing:
            raise UsageError(f"--output_dir: {missing[0]} of another process is not in "
                             f"{unfinished}; give a folder that all nodes share")
        files[".metadata"] = size_and_digest(unfinished / ".metadata")

        # The manifest is the last file, because its presence says that all others are complete.
        # Then the folder gets its name. If there is a folder of that name, it is damaged: the
        # run passed it over, began at an earlier step, and has come to this step again.
        manifest = seal({"step": step, **facts, "files": files})
        write_json(unfinished / "manifest.json", manifest)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)

        # Older ones go last, so that there is always one to continue from. Those of later steps
        # are damaged, too: they would stand first in the list, and a good one would go for them.
        # A network disk keeps a folder as long as somebody reads a file in it. That must not end
        # the run: the next save tries again.
        later = [path for path in checkpoints(folder) if step_of(path) > step]
        older = [path for path in checkpoints(folder) if step_of(path) <= step][keep:]
        for path in later + older:
            shutil.rmtree(path, ignore_errors=True)
    process.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """The folders step-N, newest first, damaged or not."""
    paths = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The number N of a folder step-N."""
    return int(path.name.removeprefix("step-"))


def find_checkpoint(folder: Path, process: Process,
                    required: bool = False) -> tuple[Path, dict] | None:
    """(path, manifest) of the newest checkpoint that agrees with its manifest.

    None where there is none. required: UsageError where some are there, but none is good.
    The main process looks, and all get its answer. It names the damaged or foreign ones that it
    passes over. Reading them runs no code that is in them.
    """
    newest_good = None
    candidates = checkpoints(folder) if process.main else []
    for path in candidates:
        try:
            # Sizes are compared before checksums: they cost nothing, and a file that was cut
            # short is the usual damage.
            manifest = read_manifest(path)
            for name, expected in manifest["files"].items():
                if (path / name).stat().st_size != expected["bytes"]:
                    raise ValueError(f"{name} has not the size that its manifest states")
                if digest(path / name) != expected["sha256"]:
                    raise ValueError(f"{name} does not match the checksum in its manifest")

            # A manifest can be forged, too, so the index is read here already.
            Reader(path).read_metadata()
            newest_good = path, manifest
            break
        # Of any kind: damaged bytes can make a pickle or JSON fail in many ways.
        except Exception as error:
            process.print(f"{path} is damaged ({error!s:.200}); trying the one before it")

    # To begin anew would delete all of them. Perhaps the disk is only away for a while.
    if required and candidates and not newest_good:
        raise UsageError(f"{folder}: none of its checkpoints can be read; try again when the "
                         "disk is well, or remove this folder to begin anew")
    return process.broadcast(newest_good)


def load_checkpoint(path: Path, state: dict, process: Process):
    """Fill the tensors of `state` in place, whatever number of processes wrote the checkpoint.

    All processes have to call it, and with the same tensors. UsageError if the checkpoint lacks
    a tensor, or has it in another shape.
    """
    from machinery.read_once import fill_once  # here, because a new run loads nothing

    # DCP's exception is a BaseException, which `except Exception` would let through. It holds
    # one failure for each process; the first one is told.
    try:
        with quiet():
            fill_once(lambda alone: dcp.load(state, storage_reader=Reader(path), no_dist=alone),
                      state, process)
    except dcp.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise UsageError(f"{path} does not fit this run: {first!s:.300}") from None
