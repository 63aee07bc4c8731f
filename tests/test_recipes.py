"""Claims
1. Every preset is a valid configuration: fields exist, values are of their type, crops fit patches.
2. The papers' presets carry the papers' numbers.
"""

import dataclasses

import pytest

import train
from recipes import NEUTRAL, PRESETS, Config
from runtime import describe


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = Config(preset=name, **PRESETS[name])
    train.check(config)
    defaults = Config()
    for key, value in PRESETS[name].items():
        assert isinstance(value, type(getattr(defaults, key))), key


def test_every_field_is_explained():
    about = describe(Config)
    fields = {f.name for f in dataclasses.fields(Config)} - {"preset"}
    silent = {f for f in fields if not about[f][1]} - {"optimizer"}  # its choices say it all
    assert not silent and NEUTRAL <= fields


def test_the_papers_numbers():
    vanilla = Config(**PRESETS["dino_vits16"])
    assert (vanilla.epochs, vanilla.lr, vanilla.n_prototypes, vanilla.local_crops_number) == (
        100,
        5e-4,
        65536,
        8,
    )
    assert (vanilla.momentum_teacher, vanilla.weight_decay, vanilla.weight_decay_end) == (
        0.996,
        0.04,
        0.4,
    )
    assert (vanilla.teacher_temp, vanilla.student_temp, vanilla.clip_grad) == (0.04, 0.1, 3.0)
    released = Config(**PRESETS["dino_vits16_800ep"])
    assert (released.local_crops_number, released.teacher_temp) == (10, 0.07)
    assert (released.warmup_teacher_temp_epochs, released.norm_last_layer) == (30, False)
