"""Claims
1. Begun from a run, a run has its backbone, heads and centres, and its k-NN before the first
   step.
2. A bare backbone gets new heads, which learn alone as long as the backbone is frozen.
3. At another image size the positions are resampled, and learn.
4. The network is that of the weights, the crops are unless something else is said; what
   contradicts the weights is refused in one line. A preset's crops become whole patches. A k-NN
   below the first one is warned of.
5. A network of colours goes on with grey images of 16 bits, inflated, and is judged by them.
   Inflated, it makes the same tokens of an image that is the same in all channels.
6. Of a directory of Hugging Face, heads and normalisation are those of its files. A damaged
   heads.pt is one line.
7. Killed and resumed, such a run equals one that never stopped.
"""

import json
import re
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import (TINY_RUN, copy_of, heads_of, killed_in_step, metrics_of, same_tensors,
                      teacher_of, tiny_config, without_figures)
from PIL import Image

import evaluate
import train
import training.warmstart
import visualize
from augment import ChannelStats, channel_stats_of
from backbones.layouts import to_hf, write_safetensors
from backbones.weights import load_backbone
from evaluation.judge import Judge
from machinery.flags import UsageError
from training.check import check
from training.config import Config
from training.warmstart import config_from_init, inflate, init_heads, init_settings
from vit import ARCHS, VisionTransformer, resize_pos_embed


def config_of(output_dir, *flags):
    """A tiny run that leaves its network to the weights."""
    return train.read_flags([*TINY_RUN, "--output_dir", str(output_dir), *flags])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run, to begin with."""
    run = tmp_path_factory.mktemp("first") / "run"
    with without_figures():
        train.run(tiny_config(run))
    return run


def test_damaged_heads(tmp_path):
    file = tmp_path / "heads.pt"
    (tmp_path / "teacher.pt").touch()
    torch.save({"dino_head": {"last_layer.weight_v": torch.ones(50, 50)}}, file)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UsageError, match="--init: .*heads.pt is not readable .*checksum"):
        init_heads(Config(init=str(tmp_path)))


class Stop(Exception):
    """Stands for the end of what a test wants to see of a run."""


def stopped_learner(config, monkeypatch):
    """What the first step of this run is given to learn with."""
    learners = []

    def stop(learner, *_):
        learners.append(learner)
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train, "train_step", stop)
        train.run(config)
    return learners[0]


# ----------------------------------------------------------------------------------------------
# What comes along


def test_from_a_directory_of_hugging_face(tmp_path):
    model = VisionTransformer(32, 8, layerscale=1.0, mask_token=True, **ARCHS["vit_nano"])
    write_safetensors(tmp_path / "model.safetensors", to_hf(model.state_dict()))
    pixels = {"image_mean": [0.5, 0.5, 0.4], "image_std": [0.5, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    config = {"model_type": "dinov2", "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = init_settings(tmp_path)
    assert settings["arch"] == "vit_nano" and settings["mean"] == (0.5, 0.5, 0.4)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    with pytest.raises(ValueError, match="128 wide and 4 deep with 4 heads is none of"):
        init_settings(tmp_path)


def test_from_a_run(first, tmp_path, monkeypatch, quick_runs):
    run = tmp_path / "run"
    learner = stopped_learner(config_of(run, "--init", str(first)), monkeypatch)
    heads = heads_of(first)
    parts = {"backbone": teacher_of(first), "dino_head": heads["dino_head"]}
    expected = {f"{part}.{key}": x for part, state in parts.items() for key, x in state.items()}
    assert same_tensors(learner.student.state_dict(), expected)
    assert same_tensors(learner.teacher.state_dict(), expected)
    assert same_tensors(learner.centerings.state_dict(), heads["centerings"])
    assert heads["centerings"]["dino.center"].abs().max() > 0
    summary = json.loads((first / "summary.json").read_text())
    assert metrics_of(run)[0]["knn"] == summary["knn"]
    config = json.loads((run / "config.json").read_text())
    assert (config["patch_size"], config["n_prototypes"]) == (8, 32)


def test_a_head_of_patches_that_did_not_come_along_is_free(first, tmp_path, monkeypatch,
                                                           quick_runs):
    flags = "--ibot_weight 0.2 --separate_head --ibot_n_prototypes 16 --mask_min_patches 1".split(
    )
    run = tmp_path / "run"
    learner = stopped_learner(config_of(run, "--init", str(first), *flags), monkeypatch)
    heads = learner.student.heads()
    assert same_tensors(heads["dino_head"].state_dict(), heads_of(first)["dino_head"])
    assert heads["ibot_head"].state_dict()["last_layer.weight_v"].shape[0] == 16


def test_a_bare_backbone_rests_while_new_heads_learn(first, tmp_path, monkeypatch, capsys,
                                                     quick_runs):
    bare = tmp_path / "bare.pt"
    shutil.copy(first / "teacher.pt", bare)
    train_step, states = train.train_step, []

    def watched(learner, *args):
        figures = train_step(learner, *args)
        states.append({k: v.clone() for k, v in learner.student.state_dict().items()})
        return figures

    monkeypatch.setattr(train, "train_step", watched)
    # A judge that thinks less of the network at every step.
    monkeypatch.setattr(Judge, "__call__", lambda self, _: 0.9 - 0.1 * len(states))
    flags = "--freeze_backbone_epochs 1 --n_prototypes 16 --head_hidden_dim 32".split()
    flags += ["--val_data", "shapes:50:val"]  # fewer would be too few for a verdict
    train.run(config_of(tmp_path / "run", "--init", str(bare), *flags))

    begun = teacher_of(first)
    last_frozen, first_free = states[7], states[8]  # an epoch has 8 steps
    for key, value in begun.items():
        assert torch.equal(last_frozen[f"backbone.{key}"], value), key
    assert not torch.equal(first_free["backbone.norm.weight"], begun["norm.weight"])
    prototypes = "dino_head.last_layer.weight_v"
    assert states[0][prototypes].shape[0] == 16
    assert not torch.equal(last_frozen[prototypes], states[0][prototypes])
    assert "below the weights that it began with" in capsys.readouterr().out


def test_other_channels_have_other_means(tmp_path):
    network = VisionTransformer(24, 8, **ARCHS["vit_pico"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    settings = init_settings(tmp_path / "weights.pth") | dict(mean=(0.1,) * 3, std=(0.9,) * 3)
    with patch.object(training.warmstart, "init_settings", lambda _: settings):
        line = ["shapes", "--init", str(tmp_path / "weights.pth")]
        assert config_from_init(train.read_flags(line)).channel_stats.mean == (0.1,) * 3
        same = config_from_init(train.read_flags([*line, "--in_chans", "3"]))
        assert same.channel_stats.mean == (0.1,) * 3  # as many channels as the weights have
        config = config_from_init(train.read_flags([*line, "--in_chans", "1"]))
    assert config.in_chans == 1 and config.channel_stats == channel_stats_of(1)


def test_another_size(first, tmp_path, quick_runs):
    run = tmp_path / "run"
    flags = "--global_crops_size 40 --lr 1e-6 --epochs 1".split()
    train.run(config_of(run, "--init", str(first), *flags))
    before, after = teacher_of(first)["pos_embed"], teacher_of(run)["pos_embed"]
    resampled = resize_pos_embed(before, (5, 5), "offset")
    assert before.shape[1] == 1 + 9 and after.shape[1] == 1 + 25
    torch.testing.assert_close(after, resampled, rtol=0, atol=1e-4)  # a few steps of 1e-6 ...
    assert not torch.equal(after, resampled)  # ... but steps


@pytest.mark.parametrize("patch_size, sizes", [(14, (518, 98)), (16, (512, 96)),
                                               (8, (520, 96))])
def test_the_last_stage_takes_any_patch(patch_size, sizes, tmp_path):
    """The sizes of a preset follow the patches of the weights; those of flags do not."""
    network = VisionTransformer(2 * patch_size, patch_size, **ARCHS["vit_pico"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    line = ["hires", "--init", str(tmp_path / "weights.pth")]
    config = config_from_init(train.read_flags(line))
    check(config)
    assert (config.global_crops_size, config.local_crops_size) == sizes
    config = config_from_init(train.read_flags([*line, "--global_crops_size", "519"]))
    with pytest.raises(UsageError, match="--global_crops_size 519 is not a multiple"):
        check(config)


@pytest.mark.parametrize("flags, words", [
    ("--init nowhere", "--init nowhere"),
    ("--init RUN --patch_size 4", "--patch_size 4 .they have 8."),
    ("--init RUN --arch vit_small", "--arch vit_small .they have vit_pico."),
    ("--init RUN --n_prototypes 16", "--n_prototypes 16 .they have 32.*/teacher.pt"),
    ("--init RUN --global_crops_size 20", "--global_crops_size 20"),
    ("--init RUN --freeze_backbone_epochs 2", "leaves nothing"),
    ("--init RUN --no_resume --output_dir RUN", "RUN lies in --output_dir .*give another"),
    ("--init RUN/teacher.pt --no_resume --output_dir RUN/..", "lies in --output_dir"),
    ("--patch_size 8 --val_share 0.2", "--val_share 0.2: nothing is held out"),
    ("--arch resnet18 --local_crops_number 1 --batch_size_per_gpu 1",
     "--batch_size_per_gpu 1: one local crop a step"),
    ("--init RUN --freeze_backbone_epochs -1", "expected 0 or more"),
    ("--patch_size 8 --in_chans 0", "--in_chans 0: expected 1 to 1,000"),
    ("--patch_size 8 --mean 0.5", "--mean 0.5: expected 3 numbers"),
    ("--patch_size 8 --in_chans 1 --mean 0.5 --std 0", "--std 0.0: expected positive"),
    ("--patch_size 8 --in_chans 2", "--data 3 channels, expected --in_chans 2"),
    ("--in_chans 1 --arch resnet18", "begin with three channels"),
    ("--patch_size 8 --in_chans 1 --cache CACHE", "--cache keeps photographs"),
    ("--patch_size 8 --freeze_backbone_epochs 1", "give --init"),
    ("--init RUN/config.json", "--init")])
def test_misuse(flags, words, first, tmp_path, capsys):
    line = flags.replace("RUN", str(first)).split()
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY_RUN, "--output_dir", str(tmp_path / "run"), *line])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error:") and error.count("\n") == 1
    assert re.search(words.replace("RUN", str(first)), error), error
    assert (first / "teacher.pt").exists()
    assert not (tmp_path / "run").exists()


def test_crops_of_a_released_network_are_whole_patches(first, monkeypatch):
    weights = first / "teacher.pt"
    config = train.read_flags(["continue", "--init", str(weights), "--data", "shapes"])
    settings = dict(arch="vit_small", patch_size=14)
    monkeypatch.setattr(training.warmstart, "init_settings", lambda _: settings)
    config = config_from_init(config)
    assert config.arch == "vit_small"
    assert (config.global_crops_size, config.local_crops_size) == (224, 98)  # 96 became 7 * 14


# ----------------------------------------------------------------------------------------------
# Whole runs


def test_other_channels(first, tmp_path, capsys):
    """A network of colours goes on with X-rays of 16 bits, and is judged and drawn by them."""
    folder, rng = tmp_path / "rays", np.random.default_rng(0)
    for i in range(32):
        file = folder / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 65536, (30, 40)).astype(np.uint16)).save(file)
    grey = tmp_path / "grey"
    data = ["--data", f"folder:{folder}", "--val_data", f"folder:{copy_of(folder)}"]
    flags = "--in_chans 1 --mean 0.5 --std 0.3 --lr 0 --min_lr 0".split()
    train.run(config_of(grey, "--init", str(first), *data, *flags))
    assert (grey / "story.png").exists()
    embedding = "patch_embed.proj.weight"
    before, after = teacher_of(first)[embedding], teacher_of(grey)[embedding]
    torch.testing.assert_close(after, before.sum(1, keepdim=True))
    model = load_backbone(grey)
    assert model.channel_stats == ChannelStats((0.5,), (0.3,))

    # A further run begins with them as well, and looks at its images as this one did.
    further = config_from_init(config_of(tmp_path / "further", "--init", str(grey)))
    assert further.in_chans == 1 and further.channel_stats == model.channel_stats

    # The programs that read a run do so, too; a protocol for photographs refuses it.
    flags = f"--nb_knn 1 --num_workers 0 --output_dir {tmp_path}".split()
    done = evaluate.main(["knn", "--weights", str(grey), *data, *flags])
    assert done["knn"]["1"] == 1.0  # the copy of each image is its neighbour
    picture = tmp_path / "attention.png"
    flags = f"--weights {grey} --image_size 48 --output {picture}".split()
    visualize.main(["attention", str(folder / "a/0.png"), *flags])
    assert picture.exists()
    with pytest.raises(SystemExit):
        evaluate.main(["copies", "--weights", str(grey), "--output_dir", str(tmp_path)])
    assert "a network for 1 channels" in capsys.readouterr().err


def test_resumed(first, tmp_path, quick_runs):
    flags = f"--init {first} --layerwise_decay 0.7 --epochs 1 --save_every 4".split()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.run(config_of(whole, *flags))
    with killed_in_step(7):  # the last save was after step 4
        train.run(config_of(broken, *flags))
    train.run(config_of(broken, *flags))
    assert same_tensors(teacher_of(whole), teacher_of(broken))


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_inflated(channels):
    three, other = (VisionTransformer(32, 8, c, embed_dim=64, depth=3, num_heads=1)
                    for c in (3, channels))
    state, key = three.state_dict(), "patch_embed.proj.weight"
    new = inflate(state[key], channels)
    other.load_state_dict(state | {key: new})
    if channels == 4:  # which has one of the three twice: colours stay, grey does not quite
        torch.testing.assert_close(new[:, [0, 1, 2]] * 4 / 3, state[key])
        torch.testing.assert_close(new[:, 3], new[:, 0])
        return
    grey = torch.randn(2, 1, 32, 32)
    a, b = other(grey.repeat(1, channels, 1, 1)), three(grey.repeat(1, 3, 1, 1))
    torch.testing.assert_close(a, b)
