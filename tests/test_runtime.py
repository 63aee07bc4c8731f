"""Claims
1. Flags follow from the dataclass; defaults, preset and flags have that order of authority.
2. Every misuse is one line that names the flag, and exit code 2.
3. A checkpoint is whole or not there: a damaged or half-written one is passed over.
4. A checkpoint that holds code is refused.
5. The clock does not count pauses.
"""

import pickle
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


def test_checkpoints(tmp_path):
    for step in (1, 2, 3):
        runtime.save_checkpoint(tmp_path, step, {"step": step, "x": torch.full((100,), step)})
    assert [p.name for p in runtime.checkpoints(tmp_path)] == ["step-3", "step-2"]
    assert runtime.load_checkpoint(tmp_path)["step"] == 3

    said = []
    data = bytearray((tmp_path / "step-3/state.pt").read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit
    (tmp_path / "step-3/state.pt").write_bytes(data)
    assert runtime.load_checkpoint(tmp_path, said.append)["step"] == 2
    assert "checksum" in said[0] and "step-3" in said[0]
    (tmp_path / "step-3/state.pt").write_bytes(data[:100])  # cut short
    assert runtime.load_checkpoint(tmp_path, said.append)["step"] == 2
    (tmp_path / "step-3/manifest.json").unlink()  # killed before the manifest
    assert runtime.load_checkpoint(tmp_path, said.append)["step"] == 2
    assert runtime.load_checkpoint(tmp_path / "none") is None


def test_a_kill_while_saving_loses_nothing(tmp_path, monkeypatch):
    runtime.save_checkpoint(tmp_path, 1, {"step": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        runtime.save_checkpoint(tmp_path, 2, {"step": 2})
    assert runtime.load_checkpoint(tmp_path)["step"] == 1


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_checkpoint_does_not_run(tmp_path, capsys):
    runtime.save_checkpoint(tmp_path, 1, {"step": 1, "evil": Evil()})
    with pytest.raises(pickle.UnpicklingError):
        runtime.load_checkpoint(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_device_is_checked():
    with pytest.raises(UsageError, match="--device tpu"):
        runtime.start("tpu")
    assert runtime.resolve_precision("fp32", torch.device("cpu")) == "fp32"


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
