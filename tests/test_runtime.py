"""Claims
1. Flags follow from the dataclass; defaults, preset and flags have that order of authority.
2. Every misuse is one line that names the flag, and exit code 2.
3. A checkpoint is whole or not there: a damaged or half-written one is passed over.
4. A checkpoint that holds code is refused.
5. The clock does not count pauses; freed memory is kept.
"""

import ctypes
import json
import pickle
import shutil
import time
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

import runtime
from runtime import UsageError


@dataclass
class Config:
    preset: str = ""
    # -- first
    name: str = "a"  # what it is called, 100 % of the time
    size: int = 3  # pixels
    range: tuple[float, float] = (0.1, 0.5)  # from, to
    kind: Literal["one", "two"] = "one"  # which
    # -- second
    shiny: bool = True  # polish it


PRESETS = {"small": dict(size=1, shiny=False), "large": dict(size=9)}


def parse(line):
    return runtime.parse(Config, line.split(), PRESETS)


def test_authority():
    assert parse("") == Config("small", size=1, shiny=False)
    assert parse("large --name b --range 0.2 0.3") == Config("large", "b", 9, (0.2, 0.3))
    assert parse("large --no_shiny").shiny is False
    assert parse("small --shiny").shiny is True
    assert parse("small --shiny true").shiny is True and parse("large --shiny false").shiny is False


@pytest.mark.parametrize(
    "line, words",
    [
        ("smal", "did you mean small"),
        ("--siz 4", "did you mean --size"),
        ("--size four", "--size"),
        ("--size -1", "--size: -1: expected 0 or more"),
        ("--range -0.1 nan", "--range: -0.1"),
        ("--range 0.1 nan", "--range: nan"),
        ("--kind three", "--kind"),
        ("--range 1", "--range"),
        ("--shiny maybe", "maybe"),
    ],
)
def test_misuse(line, words):
    with pytest.raises(UsageError, match=words):
        parse(line)


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    text = text[text.index("first:") :]
    assert text.index("--size") < text.index("second:") < text.index("--shiny")
    assert "100 % of the time" in text


def test_exit_code(capsys):
    @runtime.command
    def main(argv):
        with runtime.usage():
            raise ValueError("--size 3: too small")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --size 3: too small\n"

    @runtime.command
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        interrupted([])
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


HERE = runtime.Place(torch.device("cpu"))


def save(folder, step):
    state = {"student": {"a.b": torch.full((100,), step), "c": torch.tensor(1.5)}}
    runtime.save_checkpoint(folder, step, state, {"figures": {"knn": None}}, HERE)


def newest(folder, capsys):
    """Its step, and what was said about others."""
    found = runtime.find_checkpoint(folder, HERE)
    return found and found[1]["step"], capsys.readouterr().out


def test_checkpoints(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [p.name for p in runtime.checkpoints(tmp_path)] == ["step-3", "step-2"]
    path, manifest = runtime.find_checkpoint(tmp_path, HERE)
    assert manifest["step"] == 3 and manifest["figures"] == {"knn": None}
    state = {"student": {"a.b": torch.zeros(100, dtype=torch.int64), "c": torch.tensor(0.0)}}
    runtime.load_checkpoint(path, state, HERE)
    assert (state["student"]["a.b"] == 3).all() and state["student"]["c"] == 1.5
    wrong = {"student": {"a.b": torch.zeros(99, dtype=torch.int64)}}
    with pytest.raises(UsageError, match="step-3 does not fit this run"):
        runtime.load_checkpoint(path, wrong, HERE)

    file = next((tmp_path / "step-3").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit
    file.write_bytes(data)
    step, said = newest(tmp_path, capsys)
    assert step == 2 and "checksum" in said and "step-3" in said
    file.write_bytes(data[:100])  # cut short
    assert newest(tmp_path, capsys)[0] == 2
    (tmp_path / "step-3/manifest.json").unlink()  # killed before the manifest
    assert newest(tmp_path, capsys)[0] == 2
    assert newest(tmp_path / "none", capsys)[0] is None


def test_a_kill_while_saving_loses_nothing(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 2)
    assert newest(tmp_path, capsys)[0] == 1
    save(tmp_path, 3)  # and leaves nothing lying about
    assert {p.name for p in tmp_path.iterdir()} == {"step-1", "step-3"}


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def vouch(folder):
    """A manifest that fits whatever is in the folder now: a forger writes one, too."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": runtime.digest(p)}
             for p in folder.iterdir() if p.name != "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text()) | {"files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))


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
        with runtime.quiet():
            runtime.dcp.save({"x": Evil()}, checkpoint_id=folder, no_dist=True)
        (folder / "manifest.json").write_text(json.dumps({"step": 2, "figures": {}}))
    vouch(folder)
    step, said = newest(tmp_path, capsys)
    if where == "shard":  # found out when it is read
        assert step == 2
        with pytest.raises(UsageError, match="does not fit"):
            runtime.load_checkpoint(folder, {"student": {"c": torch.tensor(0.0)}}, HERE)
        said = capsys.readouterr().out
    else:
        assert step == 1 and "has no place there" in said
    assert "code ran" not in said


def test_device_is_checked():
    with pytest.raises(UsageError, match="--device tpu"):
        runtime.start("tpu")


@pytest.mark.parametrize("can, expected", [({"amx_bf16": True}, "bf16"), ({}, "fp32"),
                                           ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
                                           ({"avx512_bf16": False}, "fp32")])
def test_auto_is_bf16_where_a_cpu_multiplies_in_it(can, expected, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert runtime.resolve_precision("auto", cpu) == expected
    assert runtime.resolve_precision("fp32", cpu) == "fp32"


def test_clock_does_not_count_pauses():
    clock = runtime.Clock(0, 10, skip=1)
    time.sleep(0.01)
    clock.tick()
    assert 0.01 <= clock.step_seconds < 0.1  # a first guess
    for _ in range(3):
        time.sleep(0.01)
        with clock.pause():
            time.sleep(0.2)
        clock.tick()
    assert clock.counted == 3 and clock.step_seconds < 0.1


def test_freed_memory_is_kept():
    resource = pytest.importorskip("resource")
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("another C library than glibc")
    runtime.keep_freed_memory(runtime.start("cpu"))
    faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(6):
        torch.ones(10_000_000)  # 40 MB, some 10,000 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[3] < 1000, faults
