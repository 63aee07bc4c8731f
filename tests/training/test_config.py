"""Claims
1. Every setting is explained by its help; what does not change a result is a setting.
2. One table, one truth: a flag with choices takes exactly the names in the tables of the
   concept files, and an entry that is added to a table can be used at once, up to a whole run.
"""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from conftest import TINY

from augment import MASK_SHAPES, PHOTOMETRY
from backbones.convnet import CONVNETS
from losses import CENTERING
from machinery.flags import UsageError, describe, parse
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
