"""Claims
1. Every setting is explained by its help; what does not change a result is a setting.
2. One table, one truth: a flag with choices takes exactly the names in the tables of the
   concept files, and an entry that is added to a table can be used at once, up to a whole run.
3. A flag that changes nothing beside the others is named, with what it needs.
4. --curriculum divides a run into stages whose crops are whole numbers of patches; the last
   stage has the sizes of the run, and no other is larger.
"""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from conftest import TINY

import train
from augment import MASK_SHAPES, PHOTOMETRY
from backbones.convnet import CONVNETS
from losses import CENTERING
from machinery.flags import UsageError, describe, parse
from machinery.process import Process
from training.check import IDLE_WITHOUT, check_stages, warn_of_idle_flags
from training.config import NEUTRAL, Config
from training.optim import OPTIMIZERS
from vit import ARCHS, FFNS, POS_EMBED_RESIZE

# ----------------------------------------------------------------------------------------------
# Flags


def test_every_field_is_explained():
    about = describe(Config)
    fields = {f.name for f in dataclasses.fields(Config)} - {"preset"}
    silent = {name for name in fields if not about[name][1]}
    assert not silent
    assert NEUTRAL <= fields


TABLES = {  # field -> the names that it takes
    "arch": [*ARCHS, *CONVNETS], "ffn_layer": [*FFNS], "pos_embed_resize": [*POS_EMBED_RESIZE],
    "centering": [*CENTERING], "optimizer": [*OPTIMIZERS], "mask_shape": [*MASK_SHAPES],
    "photometry": [*PHOTOMETRY]}


@pytest.mark.parametrize("field", TABLES)
def test_a_flag_takes_the_names_of_its_table(field):
    for name in TABLES[field]:
        assert getattr(parse(Config, [f"--{field}", name]), field) == name
    with pytest.raises(UsageError, match=f"--{field}: invalid choice: 'new'") as error:
        parse(Config, [f"--{field}", "new"])
    assert all(name in str(error.value) for name in TABLES[field])
    assert [*typing.get_args(typing.get_type_hints(Config)[field])] == TABLES[field]


# What somebody does who follows the line "Change" in the docstrings of the concept files: one
# entry for each table, before training.config has read them.
NEW_ENTRIES = """
import sys

import augment
import losses
import training.optim
import vit


class NewCentering(losses.NoCenter):
    used = False

    def forward(self, logits, temp, real=None):
        NewCentering.used = True
        return super().forward(logits, temp, real)


losses.CENTERING["new"] = NewCentering
vit.ARCHS["new"] = dict(embed_dim=64, depth=1, num_heads=1)
vit.FFNS["new"] = type("NewFfn", (vit.Mlp,), {})
vit.POS_EMBED_RESIZE["new"] = vit.POS_EMBED_RESIZE["antialias"]
training.optim.OPTIMIZERS["new"] = training.optim.LARS
augment.MASK_SHAPES["new"] = augment.random_mask
augment.PHOTOMETRY["new"] = augment.PHOTOMETRY["none"]
assert "training.config" not in sys.modules

import training.recipes
from machinery.flags import parse
from training.config import Config

fields = sys.argv[1].split(",")
for field in fields:
    assert getattr(parse(Config, [f"--{field}", "new"]), field) == "new"

# All of them together in one run, which is itself a new preset.
tiny = parse(Config, sys.argv[2].split(), training.recipes.PRESETS)
training.recipes.PRESETS["new"] = dict(
    {name: getattr(tiny, name) for name in tiny.given},
    epochs=1,
    ibot_weight=1.0,
    **dict.fromkeys(fields, "new"),
)

import train

sys.path.append("tests")
from conftest import without_figures

config = train.read_flags(["new"])
assert config.preset == "new" and config.given == ()
with without_figures():
    train.main(["new", "--output_dir", sys.argv[3]])
assert NewCentering.used
"""


def test_a_new_entry_can_be_used_at_once(tmp_path):
    """In a process of its own: a flag's choices are read when training.config is imported."""
    arguments = [",".join(TABLES), " ".join(TINY), str(tmp_path / "run")]
    program = [sys.executable, "-c", NEW_ENTRIES, *arguments]
    top = Path(__file__).parents[2]
    completed = subprocess.run(program, cwd=top, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert {stored[field] for field in TABLES} == {"new"}
    assert json.loads((tmp_path / "run/summary.json").read_text())["preset"] == "new"


@pytest.mark.parametrize("flags, idle", [
    ("--mask_ratio 0.6 0.8 --mask_probability 0.3", ["mask_probability", "mask_ratio"]),
    ("--ibot_weight 1 --mask_ratio 0.6 0.8", []),
    ("--ibot_weight 1 --mask_shape random --mask_min_patches 2", ["mask_min_patches"]),
    ("--ibot_weight 1 --ibot_n_prototypes 64", ["ibot_n_prototypes"]),
    ("--ibot_weight 1 --ibot_n_prototypes 64 --separate_head", []),
    ("--centering sinkhorn --center_momentum 0.5", ["center_momentum"]),
    ("--local_crops_number 0 --local_crops_size 32", ["local_crops_size"]),
    ("--drop_path_rate 0 --drop_path_uniform --clip_grad 0 --clip_mode network", [
        "drop_path_uniform", "clip_mode"]),
    ("--cache_side 0 --dense_data shapes", ["cache_side", "dense_data"]),
    ("--arch resnet18 --patch_size 8 --layerscale 0", ["patch_size", "layerscale"]), ("", [])])
def test_flags_that_change_nothing_are_named(flags, idle, capsys):
    warn_of_idle_flags(parse(Config, flags.split()), Process(torch.device("cpu")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"--{name}" for name in idle]
    assert all("changes nothing in this run: it needs " in line for line in lines)
    assert {name
            for _, names in IDLE_WITHOUT.values()
            for name in names.split()} <= set(vars(Config()))


def test_a_run_says_which_flags_change_nothing(tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path), "--epochs", "1", "--mask_ratio", "0.6", "0.8"]
    train.main([*TINY, *flags])
    needed = "--ibot_weight and --mask_probability above 0"
    assert capsys.readouterr().out.count("warning: --") == 1
    train.main([*TINY, *flags])
    assert f"--mask_ratio changes nothing in this run: it needs {needed}" in capsys.readouterr(
    ).out


# ----------------------------------------------------------------------------------------------
# Stages

CROPS = ("--patch_size 5 --global_crops_size 40 --local_crops_size 25 "
         "--local_crops_scale 0.1 0.4").split()


@pytest.mark.parametrize(
    "flags, total, stages",
    [
        ("", 2500, [(2500, 40, 25)]),
        # The example of Config.stages: 26 pixels are rounded down, 16.25 are rounded up.
        ("--curriculum 0.75 0.65", 2500, [(1875, 25, 20), (2500, 40, 25)]),
        ("--curriculum 0.5 0.5 0.25 0.8", 10, [(5, 20, 15), (8, 30, 20), (10, 40, 25)]),
        # Three whole patches stay three.
        ("--curriculum 0.5 0.6", 2, [(1, 25, 15), (2, 40, 25)]),
        ("--curriculum 0.5 0.01", 3, [(2, 5, 5), (3, 40, 25)]),  # one patch at least
        ("--curriculum 0.5 0.5 --arch resnet18", 4, [(2, 20, 13), (4, 40, 25)])])
def test_stages(flags, total, stages):
    config = parse(Config, [*CROPS, *flags.split()])
    found = config.stages(total)
    assert [(last, c.global_crops_size, c.local_crops_size) for last, c in found] == stages
    assert found[-1][1] is config
    for _, stage in found:  # nothing else differs: crops show as much of an image as at the end
        assert dataclasses.replace(stage, global_crops_size=40, local_crops_size=25) == config


def test_every_stage_has_steps():
    config = parse(Config, [*CROPS, "--curriculum", "0.95", "0.65"])
    check_stages(config, 100)
    with pytest.raises(
            UsageError, match="--curriculum 0.95 0.65: of 8 steps none is left for "
            "crops of 40 pixels"):
        check_stages(config, 8)
    config = parse(Config, [*CROPS, "--curriculum", "0.02", "0.65"])
    with pytest.raises(UsageError, match="for crops of 25 pixels"):
        check_stages(config, 8)


def test_stages_without_local_crops():
    flags = "--local_crops_number 0 --local_crops_size 0 --curriculum 0.5 0.5"
    stage = parse(Config, [*CROPS, *flags.split()]).stages(100)[0][1]
    assert (stage.global_crops_size, stage.local_crops_size) == (20, 0)


def test_half_of_the_papers_crops():
    for patch_size, local, half in ((16, 96, (112, 48)), (14, 98, (112, 56))):
        config = Config(patch_size=patch_size, local_crops_size=local, curriculum=(0.75, 0.5))
        stage = config.stages(100)[0][1]
        assert (stage.global_crops_size, stage.local_crops_size) == half
