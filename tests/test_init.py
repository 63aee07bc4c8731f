"""Claims
1. Begun from a run, a run has its backbone, heads and centres, and its k-NN before the first step.
2. A bare backbone gets new heads, which learn alone as long as the backbone is frozen.
3. At another image size the positions are resampled, and learn.
4. The network is that of the weights, the crops are unless something else is said; what
   contradicts the weights is refused in one line. A k-NN below the first one is warned of.
5. A network of colours goes on with grey images of 16 bits, inflated, and is judged by them.
6. Killed and resumed, such a run equals one that never stopped.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
import visualize
from augment import Pixels
from conftest import TINY, TINY_RUN, killed_in_step
from vit import resize_pos_embed
from weights import load_backbone


def config_of(folder, *flags):
    """A run that leaves its network to the weights."""
    return train.read_flags([*TINY_RUN, "--output_dir", str(folder), *flags])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    train.run(train.read_flags([*TINY, "--output_dir", str(folder)]))
    return folder


def state_of(folder, name="teacher.pt"):
    return torch.load(folder / name, weights_only=True)


def test_from_a_run(first, tmp_path, monkeypatch):
    seen = {}

    def stop(student, teacher, makers, *_):
        seen.update(student=student, teacher=teacher, makers=makers)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(config_of(tmp_path / "run", "--init", str(first)))
    heads = state_of(first, "heads.pt")
    for network in (seen["student"], seen["teacher"]):
        ours = network.state_dict()
        for part, theirs in (("backbone", state_of(first)), ("dino_head", heads["dino_head"])):
            for k, v in theirs.items():
                assert torch.equal(ours[f"{part}.{k}"], v), k
    assert torch.equal(seen["makers"]["dino"].center, heads["makers"]["dino.center"])
    assert heads["makers"]["dino.center"].abs().max() > 0
    rows = [json.loads(x) for x in open(tmp_path / "run/metrics.jsonl")]
    assert rows[0]["knn"] == json.loads((first / "summary.json").read_text())["knn"]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["patch_size"], config["n_prototypes"]) == (8, 32)


def test_a_bare_backbone_rests_while_new_heads_learn(first, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare.pt"
    shutil.copy(first / "teacher.pt", bare)
    step, states = train.train_step, []

    def watched(student, *args):
        out = step(student, *args)
        states.append({k: v.clone() for k, v in student.state_dict().items()})
        return out

    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(train.Judge, "__call__", lambda self, _: 0.9 - 0.1 * len(states))
    train.run(config_of(tmp_path / "run", "--init", str(bare), "--freeze_backbone_epochs", "1",
                        "--n_prototypes", "16", "--head_hidden_dim", "32"))
    begun, after = state_of(first), 8  # steps of an epoch
    for k, v in begun.items():
        assert torch.equal(states[after - 1][f"backbone.{k}"], v), k
    assert not torch.equal(states[after]["backbone.norm.weight"], begun["norm.weight"])
    prototypes = "dino_head.last_layer.weight_v"
    assert states[0][prototypes].shape[0] == 16
    assert not torch.equal(states[after - 1][prototypes], states[0][prototypes])
    assert "below the weights that it began with" in capsys.readouterr().out


def test_another_size(first, tmp_path):
    run = tmp_path / "run"
    train.run(config_of(run, "--init", str(first), "--global_crops_size", "40", "--lr", "1e-6",
                        "--epochs", "1"))
    now, begun = state_of(run)["pos_embed"], state_of(first)["pos_embed"]
    resampled = resize_pos_embed(begun, (5, 5), "offset")
    assert begun.shape[1] == 1 + 9 and now.shape[1] == 1 + 25
    torch.testing.assert_close(now, resampled, rtol=0, atol=1e-4)  # a few steps of 1e-6 ...
    assert not torch.equal(now, resampled)  # ... but steps


@pytest.mark.parametrize("flags, words", [
    ("--init nowhere", "--init nowhere"),
    ("--init RUN --patch_size 4", "--patch_size 4 .they have 8."),
    ("--init RUN --arch vit_small", "--arch vit_small .they have vit_nano."),
    ("--init RUN --n_prototypes 16", "--n_prototypes 16 .they have 32.*/teacher.pt"),
    ("--init RUN --global_crops_size 20", "--global_crops_size 20"),
    ("--init RUN --freeze_backbone_epochs 2", "leaves nothing"),
    ("--init RUN --freeze_backbone_epochs -1", "expected 0 or more"),
    ("--patch_size 8 --in_chans 0", "--in_chans 0: expected at least 1"),
    ("--patch_size 8 --mean 0.5", "--mean 0.5: expected 3 numbers"),
    ("--patch_size 8 --in_chans 1 --mean 0.5 --std 0", "--std 0.0: expected positive"),
    ("--patch_size 8 --in_chans 2", "--data 3 channels, expected --in_chans 2"),
    ("--in_chans 1 --arch resnet18", "begin with three channels"),
    ("--patch_size 8 --in_chans 1 --cache CACHE", "--cache keeps photographs"),
    ("--patch_size 8 --freeze_backbone_epochs 1", "give --init"),
    ("--init RUN/config.json", "--init"),
])
def test_misuse(flags, words, first, tmp_path, capsys):
    line = flags.replace("RUN", str(first)).split()
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY_RUN, *line, "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error:") and said.count("\n") == 1
    assert re.search(words, said), said
    assert not (tmp_path / "run").exists()


def test_crops_of_a_released_network_are_whole_patches(first, monkeypatch):
    config = train.read_flags(["continue", "--init", str(first / "teacher.pt"), "--data", "shapes"])
    stored = (state_of(first), dict(arch="vit_small", patch_size=14))
    monkeypatch.setattr(train, "settings", lambda _: stored)
    found = train.inherit(config)
    assert (found.arch, found.global_crops_size, found.local_crops_size) == ("vit_small", 224, 98)


@pytest.mark.whole_run
def test_other_channels(first, tmp_path, capsys):
    """A network of colours goes on with X-rays of 16 bits, and is judged and drawn by them."""
    folder, rng = tmp_path / "rays", np.random.default_rng(0)
    for i in range(32):
        name = folder / "ab"[i % 2] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 65536, (30, 40)).astype(np.uint16)).save(name)
    flags = ["--data", f"folder:{folder}", "--val_data", f"folder:{folder}", "--in_chans", "1"]
    train.run(config_of(tmp_path / "grey", "--init", str(first), *flags, "--mean", "0.5",
                        "--std", "0.3", "--lr", "0", "--min_lr", "0"))
    assert (tmp_path / "grey/attention.png").exists()
    before, after = state_of(first), state_of(tmp_path / "grey")
    torch.testing.assert_close(after["patch_embed.proj.weight"],
                               before["patch_embed.proj.weight"].sum(1, keepdim=True))
    model = load_backbone(tmp_path / "grey")
    assert model.pixels == Pixels((0.5,), (0.3,))
    (tmp_path / "further").mkdir()
    again = train.inherit(config_of(tmp_path / "further", "--init", str(tmp_path / "grey")))
    assert again.in_chans == 1 and again.pixels == model.pixels
    done = evaluate.main(["knn", "--weights", str(tmp_path / "grey"), *flags[:4], "--nb_knn", "1",
                          "--num_workers", "0", "--output_dir", str(tmp_path)])
    assert done["knn"]["1"] == 1.0  # each image is its own neighbour
    picture = tmp_path / "attention.png"
    visualize.main(["attention", str(folder / "a/0.png"), "--weights", str(tmp_path / "grey"),
                    "--image_size", "48", "--output", str(picture)])
    assert picture.exists()
    with pytest.raises(SystemExit):
        evaluate.main(["copies", "--weights", str(tmp_path / "grey"), "--output_dir",
                       str(tmp_path)])
    assert "a network for 1 channels" in capsys.readouterr().err


def test_resumed(first, tmp_path):
    flags = ("--init", str(first), "--layerwise_decay", "0.7")
    train.run(config_of(tmp_path / "whole", *flags))
    with killed_in_step(11):
        train.run(config_of(tmp_path / "broken", *flags))
    train.run(config_of(tmp_path / "broken", *flags))
    a, b = state_of(tmp_path / "whole"), state_of(tmp_path / "broken")
    assert all(torch.equal(a[k], b[k]) for k in a)
