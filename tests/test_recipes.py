"""Claims
1. Every preset is a valid configuration: fields exist, values are of their type, crops fit patches.
2. The papers' presets carry the papers' numbers, to the digit.
3. --auto_scale gives DINO's own numbers for ImageNet and 1,024 images, and never overrules a flag.
4. config.json of a run comes back as it was; of a wrong type it is refused by file and field.
"""

import dataclasses
import json
from dataclasses import asdict, replace

import pytest

from augment import PHOTOMETRY
from recipes import NEUTRAL, PRESETS, SCALED, Config, auto_scale, check, read_config
from runtime import describe


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = Config(preset=name, **PRESETS[name])
    check(config)
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


def test_the_papers_numbers_of_ibot_and_dinov2():
    ibot = Config(**PRESETS["ibot_vits16"])
    assert (ibot.n_prototypes, ibot.separate_head, ibot.mask_min_patches) == (8192, False, 16)
    assert (ibot.epochs, ibot.local_crops_number, ibot.ibot_weight) == (800, 10, 1.0)
    short, large, giant = (Config(**PRESETS[f"dinov2_{n}"]) for n in ("vitl16_in1k", "vitl14",
                                                                    "vitg14"))
    expected = dict(
        lr=4e-3, lr_scaling="sqrt_1024", epochs=100, epoch_length=1250, warmup_epochs=10,
        weight_decay=0.04, weight_decay_end=0.4, momentum_teacher=0.992, teacher_temp=0.07,
        warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=30, clip_grad=3.0, min_lr=1e-6,
        clip_mode="network", freeze_last_layer_epochs=1, drop_path_rate=0.3, layerscale=1e-5,
        drop_path_uniform=True, layerwise_decay=0.9, patch_embed_lr_mult=0.2, n_prototypes=65536,
        separate_head=False, head_bottleneck_dim=256, centering="ema", koleo_weight=0.1,
        ibot_weight=1.0, dino_weight=1.0, mask_ratio=(0.1, 0.5), mask_probability=0.5,
        global_crops_size=224, local_crops_size=96, local_crops_number=8, ffn_layer="mlp",
        global_crops_scale=(0.32, 1.0), local_crops_scale=(0.05, 0.32), batch_size_per_gpu=64,
        patch_size=16, num_register_tokens=0, arch="vit_large", norm_last_layer=False,
    )
    assert {k: getattr(short, k) for k in expected} == expected
    long = expected | dict(
        lr=2e-4, epochs=500, warmup_epochs=80, weight_decay_end=0.2, momentum_teacher=0.994,
        drop_path_rate=0.4, layerwise_decay=1.0, n_prototypes=131072, separate_head=True,
        head_bottleneck_dim=384, centering="sinkhorn", local_crops_size=98, ffn_layer="swiglu",
        batch_size_per_gpu=32, patch_size=14,
    )
    assert {k: getattr(large, k) for k in long} == long
    assert (large.ibot_n_prototypes, large.ibot_head_bottleneck_dim) == (131072, 256)
    long |= dict(arch="vit_giant2", batch_size_per_gpu=12)
    assert {k: getattr(giant, k) for k in long} == long
    assert PHOTOMETRY["dinov2"]["blur"] == (0.0, 0.9, 0.5)


def test_auto_scale_leaves_the_papers_where_they_are_and_obeys_flags():
    paper = Config()
    scaled = auto_scale(paper, 1_281_167, 1024)
    assert abs(scaled.momentum_teacher - 0.996) < 1e-6
    assert (scaled.n_prototypes, scaled.warmup_epochs, scaled.lr) == (65536, 10, 2e-3)
    assert scaled.lr_scaling == "none" and scaled.local_crops_scale == (0.05, 0.4)
    changed = {f.name for f in dataclasses.fields(Config)
               if getattr(scaled, f.name) != getattr(paper, f.name)}
    assert changed <= set(SCALED)
    flags = dataclasses.replace(paper, given=("lr", "n_prototypes"), lr=1e-4, n_prototypes=77)
    scaled = auto_scale(flags, 5_000, 32)
    assert (scaled.lr, scaled.n_prototypes, scaled.local_crops_scale) == (1e-4, 77, (0.25, 0.6))


@pytest.mark.parametrize("images", [10, 1_000, 10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("batch", [1, 32, 256, 3072])
def test_auto_scale_gives_a_valid_configuration(images, batch):
    config = auto_scale(Config(epochs=1 + images % 7), images, batch)
    check(config)
    assert 0.9 <= config.momentum_teacher < 1 and 256 <= config.n_prototypes <= 65536


@pytest.mark.parametrize("text, words", [
    ("{", "Expecting"),
    ("[]", "expected an object"),
    ("{}", "global_batch"),
    ('{"global_batch": true}', "global_batch"),
    ('{"global_batch": 8, "arch": "vgg"}', "arch is 'vgg'"),
    ('{"global_batch": 8, "patch_size": "__import__(1)"}', "patch_size"),
    ('{"global_batch": 8, "epochs": 1.5}', "epochs is 1.5"),
    ('{"global_batch": 8, "compile": 1}', "compile is 1"),
    ('{"global_batch": 8, "mask_ratio": [0.1]}', "mask_ratio"),
    ('{"global_batch": 8, "mask_ratio": [0.1, "x"]}', "mask_ratio"),
    ('{"global_batch": 8, "given": [5]}', "given"),
])
def test_a_config_from_anywhere(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json: not the config.*{words}"):
        read_config(tmp_path / "config.json")


def test_a_config_comes_back(tmp_path):
    file = tmp_path / "config.json"
    config = replace(Config(), compile=None, lr=1, mask_ratio=(0.2, 0.4), given=("lr",))
    file.write_text(json.dumps(asdict(config) | {"global_batch": 64, "teacher": "a"}))
    assert read_config(file) == asdict(config) | {"global_batch": 64, "teacher": "a"}
    file.write_text(json.dumps({"global_batch": 8, "epochs": 3}))  # older: it knew less
    assert read_config(file) == asdict(replace(Config(), epochs=3)) | {"global_batch": 8}
