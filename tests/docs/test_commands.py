"""Claims: commands of the docs do what is said of them; they are run here, in small.
1. The README's and the gallery's commands for figures, k-NN, features, export and data sets run to
   their end and leave a file, or say something. Each keeps its words. Only files, data sets and
   released weights are replaced by small ones, and flags that make it quick stand behind it.
"""

import contextlib
import re
import runpy
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, without_figures
from PIL import Image
from test_docs import commands

import evaluate
import train
import visualize
from machinery.page import STYLE
from vit import VisionTransformer

# What stands in a command -> what stands there in the test.
STAND_INS = {
    r"runs/mine": "runs/shapes", r"folder:/data/val\b": "folder:photos_to_judge",
    r"folder:/data/\w+": "folder:photos", r"--weights dino\w+": "--weights released.pth",
    r"\bPHOTO\b": "drawings/star.png", r"\bFOLDER\b": "drawings",
    r"shapes:(?:1000|500)": "shapes:24", r"shapes:60:val": "shapes:12:val"}

# A program and its figure or task -> what stands behind the command, so that it takes no time. The
# training and the slides have tests of their own.
SMALL_PHOTOS = "--image_size 48 --most 2"
ON_THE_CPU = "--device cpu --num_workers 0"
BEHIND = {
    "visualize.py attention": SMALL_PHOTOS, "visualize.py pca": SMALL_PHOTOS,
    "visualize.py similarity": SMALL_PHOTOS, "visualize.py match": SMALL_PHOTOS,
    "visualize.py norms": SMALL_PHOTOS, "visualize.py video": "--image_size 40 --device cpu",
    "visualize.py curves": "", "visualize.py story": "", "visualize.py views": "",
    "visualize.py neighbours": ON_THE_CPU, "visualize.py prototypes": ON_THE_CPU,
    "visualize.py embedding": ON_THE_CPU, "evaluate.py knn": ON_THE_CPU,
    "evaluate.py features": ON_THE_CPU, "-m backbones": "", "-m images.data": ""}
PROGRAMS = {"visualize.py": visualize.main, "evaluate.py": evaluate.main}


def quick_commands():
    """The commands to run, each once: (what of BEHIND it is, its words)."""
    chosen = {}
    for page in ("README.md", "gallery.md"):
        # Of the gallery, only what the README has no command of.
        already = {start for start, _ in chosen}
        for start in set(BEHIND) - already:
            for where, command in commands():
                match = re.fullmatch(rf"python {re.escape(start)}( .*)?", command)
                if where == page and match and "FILE" not in command:
                    words = f"{match[1] or ''} {BEHIND[start]}"
                    for pattern, stand_in in STAND_INS.items():
                        words = re.sub(pattern, stand_in, words)
                    chosen[start, words.strip()] = None
    return sorted(chosen)


COMMANDS = quick_commands()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with drawings, the frames of a video, two tiny runs and a file of weights."""
    folder = tmp_path_factory.mktemp("desk")
    rng = np.random.default_rng(0)
    names = [f"photos/kind{i % 2}/{i}.png" for i in range(12)]
    names += [f"photos_to_judge/kind{i % 2}/{i}.png" for i in range(4)]
    names += [f"drawn_video/{i}.png" for i in range(3)]
    names += [
        f"drawings/{kind}.png" for kind in ("star", "crescent", "heart", "ring", "flower")]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 56, 3), dtype=np.uint8)).save(folder / name)

    with without_figures(), contextlib.chdir(folder):
        train.main([*TINY, "--epochs", "1", "--output_dir", "runs/shapes"])
        for name in ("shapes_dino", "collapse"):
            shutil.copytree("runs/shapes", f"runs/{name}")
        model = VisionTransformer(28, 14, embed_dim=64, depth=2, num_heads=1,
                                  num_register_tokens=4, pos_embed_resize="antialias")
        torch.save(model.state_dict(), "released.pth")
    return folder


def test_there_is_a_command_of_every_kind():
    assert {start for start, _ in COMMANDS} == set(BEHIND)
    assert len(COMMANDS) >= 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # by the tests
@pytest.mark.parametrize("start, words", COMMANDS, ids=[" ".join(c) for c in COMMANDS])
def test_commands_run(start, words, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    monkeypatch.setitem(STYLE, "savefig.dpi", 20)  # to write large pictures takes longest
    before = files_in(desk)
    program, task = start.split()
    argv = shlex.split(words)
    if program == "-m":  # a module by its name
        monkeypatch.setattr(sys, "argv", [task, *argv])
        runpy.run_module(task, run_name="__main__")
    else:
        PROGRAMS[program]([task, *argv])
    assert capsys.readouterr().out.strip()
    assert files_in(desk) != before or program == "-m"


def files_in(folder):
    """Each file -> when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
