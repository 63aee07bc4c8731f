"""Claims
1. One table, one truth: one more line in TASKS, GPUS or IDEAS is all that a new benchmark, GPU or
   idea needs to be understood on the command line.
2. Without a task, or with --help, the program says which there are.
3. With --init the network is that of the weights; images may have any number of channels.
4. Bad input is one line that names the flag, exit code 2, and nothing is written.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, finish, program, start

import bench.__main__
from bench.__main__ import TASKS, main, read_flags
from vit import ARCHS, VisionTransformer

ROOT = Path(bench.__main__.__file__).resolve().parents[1]

# -- 1


def add_line(file: Path, table: str, entry: str):
    """Put one more entry at the head of a dictionary in a file of code."""
    text = file.read_text()
    changed, count = re.subn(rf"^{table} = \{{", rf"\g<0>{entry}, ", text, flags=re.M)
    assert count == 1, f"{file.name} has no table {table}"
    file.write_text(changed)


NEW_ENTRIES = {
    ("__main__.py", "TASKS"): '"hello": (lambda config, process: {"hello": config.steps}, Config)',
    ("forecast.py", "GPUS"): '"b300": (2500e12, 8e12, 288)',
    ("plain.py", "IDEAS"): '"slow_ema": {"train.ema_update": ema_one_by_one}'}
USE_THEM = f"""
import sys
assert "bench" not in sys.modules  # so that it is the copy that is imported
from bench.__main__ import main
assert main(["hello", "shapes", "--device", "cpu", "--steps", "5"])["hello"] == 5
assert main(["plan", "shapes", "--kind", "b300", "--gpus", "2"])["days"] > 0
step = main(["step", *{TINY!r}, "--steps", "1", "--without", "slow_ema"])
assert set(step["without"]) == {{"slow_ema"}}
"""


@pytest.mark.slow
def test_one_line_is_a_new_entry(tmp_path):
    """In a copy of bench/ with these lines, in a process of its own.

    The choices of a flag are read from the table when a module is imported; so the line has to be
    there before, as it is when somebody adds it.
    """
    shutil.copytree(ROOT / "bench", tmp_path / "bench")
    for (file, table), entry in NEW_ENTRIES.items():
        add_line(tmp_path / "bench" / file, table, entry)
    finish(start(program, tmp_path, USE_THEM, world=1))
    printed = (tmp_path / "printed.txt").read_text()
    assert "without slow_ema" in printed
    assert "2 b300" in printed


# -- 2


def test_help_lists_the_tasks(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    for name, (function, _) in TASKS.items():
        assert f"  {name} " in text
        assert function.__doc__.splitlines()[0] in text


# -- 3


def test_the_network_of_first_weights(tmp_path, capsys):
    file = tmp_path / "weights.pth"
    torch.save(VisionTransformer(24, 8, **ARCHS["vit_pico"]).state_dict(), file)
    config = read_flags("step", ["shapes", "--init", str(file)])
    assert config.arch == "vit_pico" and config.patch_size == 8
    read_flags("plan", ["continue"])  # downloads nothing
    assert "--init dinov2_vits14 is not on this machine" in capsys.readouterr().out


def test_images_of_other_channels():
    line = "eval shapes --in_chans 1 --steps 1 --batch_size_per_gpu 2 --num_workers 0 --bank 9 "
    assert main([*line.split(), "--queries", "3", "--device", "cpu"])


# -- 4


@pytest.mark.parametrize("line, words", [
    ("", f"choose from {', '.join(TASKS)}"), ("stp", "choose from step"),
    ("step nothing", "there is no preset"), ("step shapes --steps 0", "--steps 0"),
    ("step shapes --without skipping --precision fp32", "--without skipping: this step does"),
    ("step shapes --without bf16 --precision fp32", "--without bf16"),
    ("step shapes --without everything", "--without"),
    ("step shapes --gpus 8", "there is no flag --gpus"), ("data shapes", "--data is missing"),
    ("data --data shapes:64 --in_chans 5 --plain", "--plain with --in_chans 5"),
    ("data shapes --data folder:/none", "no such folder"),
    ("eval shapes --queries 0", "--queries 0"), ("probes shapes --classes 0", "--classes 0"),
    ("probes shapes --arch resnet18", "--arch resnet18 has no blocks"),
    ("attention shapes --arch resnet18", "--arch resnet18 has no attention"),
    ("growth shapes --arch resnet18", "--arch resnet18"), ("plan shapes --kind v10", "--kind"),
    ("plan shapes --json /none/out.json", "--json /none/out.json"),
    ("plan shapes --utilisation 40", "--utilisation 40"), ("plan shapes --gpus 0", "--gpus 0")])
def test_misuse(line, words, tmp_path, capsys):
    out = tmp_path / "out.json"
    task = line.split()[:1]
    json_flag = ["--json", str(out)] if task else []
    with pytest.raises(SystemExit) as stop:
        main([*task, *json_flag, *line.split()[1:]])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_other_data_have_no_validation_set_of_the_preset(photos):
    """As in train.py: a part of --data is held out, and no judge asks about other images."""
    line = f"shapes_dino --data folder:{photos}"
    assert read_flags("ablate", line.split()).val_data == ""
    assert read_flags("ablate", ["shapes_dino"]).val_data == "shapes:val"
