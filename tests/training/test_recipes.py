"""Claims
1. Every preset is a valid configuration: fields exist, values are of their type, crops fit
   patches.
2. The papers' presets carry the papers' numbers, to the digit.
3. The papers' presets learn from all images; the others hold out one in twenty.
4. --auto_scale gives DINO's own numbers for ImageNet and 1,024 images, and never overrules a
   flag.
"""

import dataclasses
from dataclasses import replace
from functools import partial

import pytest
import torch

from augment import PHOTOMETRY
from machinery.process import Process
from train import schedules
from training.check import check
from training.config import Config
from training.recipes import DISTILLATION, PRESETS, SCALED, auto_scale


def of_preset(name):
    return Config(preset=name, **PRESETS[name])


def values_of(config, names):
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    check(of_preset(name))
    defaults = Config()
    for field, value in PRESETS[name].items():
        assert isinstance(value, type(getattr(defaults, field))), field


def test_the_papers_numbers():
    expected = dict(epochs=100, lr=5e-4, n_prototypes=65536, local_crops_number=8,
                    momentum_teacher=0.996, weight_decay=0.04, weight_decay_end=0.4,
                    teacher_temp=0.04, student_temp=0.1, clip_grad=3.0)
    assert values_of(of_preset("dino_vits16"), expected) == expected
    released = dict(local_crops_number=10, teacher_temp=0.07, warmup_teacher_temp_epochs=30,
                    norm_last_layer=False)
    assert values_of(of_preset("dino_vits16_800ep"), released) == released


def test_the_papers_numbers_of_ibot_and_dinov2():
    ibot = dict(n_prototypes=8192, separate_head=False, mask_min_patches=16, epochs=800,
                local_crops_number=10, ibot_weight=1.0)
    assert values_of(of_preset("ibot_vits16"), ibot) == ibot

    short = dict(lr=4e-3, lr_scaling="sqrt_1024", epochs=100, epoch_length=1250,
                 warmup_epochs=10, weight_decay=0.04, weight_decay_end=0.4,
                 momentum_teacher=0.992, teacher_temp=0.07, warmup_teacher_temp=0.04,
                 warmup_teacher_temp_epochs=30, clip_grad=3.0, min_lr=1e-6, clip_mode="network",
                 freeze_last_layer_epochs=1, drop_path_rate=0.3, layerscale=1e-5,
                 drop_path_uniform=True, layerwise_decay=0.9, patch_embed_lr_mult=0.2,
                 n_prototypes=65536, separate_head=False, head_bottleneck_dim=256,
                 centering="ema", koleo_weight=0.1, ibot_weight=1.0, dino_weight=1.0,
                 mask_ratio=(0.1, 0.5), mask_probability=0.5, global_crops_size=224,
                 local_crops_size=96, local_crops_number=8, ffn_layer="mlp",
                 global_crops_scale=(0.32,
                                     1.0), local_crops_scale=(0.05,
                                                              0.32), batch_size_per_gpu=64,
                 patch_size=16, num_register_tokens=0, arch="vit_large", norm_last_layer=False)
    assert values_of(of_preset("dinov2_vitl16_in1k"), short) == short

    long = short | dict(lr=2e-4, epochs=500, warmup_epochs=80, weight_decay_end=0.2,
                        momentum_teacher=0.994, drop_path_rate=0.4, layerwise_decay=1.0,
                        n_prototypes=131072, separate_head=True, head_bottleneck_dim=384,
                        centering="sinkhorn", local_crops_size=98, ffn_layer="swiglu",
                        batch_size_per_gpu=32, patch_size=14, ibot_n_prototypes=131072,
                        ibot_head_bottleneck_dim=256)
    assert values_of(of_preset("dinov2_vitl14"), long) == long

    giant = long | dict(arch="vit_giant2", batch_size_per_gpu=12)
    assert values_of(of_preset("dinov2_vitg14"), giant) == giant
    assert PHOTOMETRY["dinov2"]["blur"] == (0.0, 0.9, 0.5)


def test_the_last_stage_is_the_whole_schedule_in_ten_thousand_steps():
    """Each phase of the preset hires has the share of its run that it has of the long one."""
    long, last = of_preset("dinov2_vitl14"), of_preset("hires")
    total = last.epochs * last.epoch_length
    assert total == 10_000
    phases = dict(warmup_epochs=1_600, warmup_teacher_temp_epochs=600,
                  freeze_last_layer_epochs=20)
    for name, steps in phases.items():
        assert getattr(last, name) * last.epoch_length == steps
        assert getattr(last, name) / last.epochs == getattr(long, name) / long.epochs
    schedule = partial(schedules, epoch_steps=last.epoch_length, total=total, config=last,
                       process=Process(torch.device("cpu")))
    assert schedule(0)["teacher_temp"] == 0.04 < schedule(300)["teacher_temp"] < 0.07
    assert schedule(600)["teacher_temp"] == 0.07
    assert schedule(19)["last_layer_lr"] == 0 < schedule(20)["last_layer_lr"]
    changed = {
        "arch", "init", "global_crops_size", "epoch_length", "knn_every", "lr",
        "batch_size_per_gpu", "preset"}
    names = {field.name for field in dataclasses.fields(Config)}
    assert {n for n in names if getattr(long, n) != getattr(last, n)} <= changed


def test_the_released_models_of_dino():
    """Those whose settings are known by more than memory; recipes.py says which are not."""
    eights = dict(patch_size=8, arch="vit_base", local_crops_number=10, precision="fp32")
    assert values_of(of_preset("dino_vitb8"), eights) == eights
    convnet = dict(optimizer="lars", epochs=800, batch_size_per_gpu=51, arch="resnet50")
    assert values_of(of_preset("dino_resnet50_800ep"), convnet) == convnet


def test_the_papers_hold_nothing_out():
    papers = ("dino_", "ibot_", "dinov2_", "hires")
    for name, preset in (PRESETS | DISTILLATION).items():
        share = preset.get("val_share", Config().val_share)
        assert share == (0 if name.startswith(papers) else 0.05), name


def test_auto_scale_leaves_the_papers_where_they_are_and_obeys_flags():
    paper = Config()
    scaled = auto_scale(paper, 1_281_167, 1024)
    assert abs(scaled.momentum_teacher - 0.996) < 1e-6
    assert (scaled.n_prototypes, scaled.warmup_epochs, scaled.lr) == (65536, 10, 2e-3)
    assert scaled.lr_scaling == "none" and scaled.local_crops_scale == (0.05, 0.4)
    names = [field.name for field in dataclasses.fields(Config)]
    changed = {name for name in names if getattr(scaled, name) != getattr(paper, name)}
    assert changed <= set(SCALED)
    flags = replace(paper, given=("lr", "n_prototypes"), lr=1e-4, n_prototypes=77)
    scaled = auto_scale(flags, 5_000, 32)
    assert (scaled.lr, scaled.n_prototypes, scaled.local_crops_scale) == (1e-4, 77, (0.25, 0.6))
    scaled = auto_scale(replace(paper, **PRESETS["shapes"]), 5_000, 8)  # it chooses its own
    assert scaled.local_crops_scale == (0.1, 0.4) and scaled.n_prototypes == 256


@pytest.mark.parametrize("images", [10, 1_000, 10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("batch", [1, 32, 256, 3072])
def test_auto_scale_gives_a_valid_configuration(images, batch):
    config = auto_scale(Config(epochs=1 + images % 7), images, batch)
    check(config)
    assert 0.9 <= config.momentum_teacher < 1 and 256 <= config.n_prototypes <= 65536
