"""Claims
1. The card of a run has what its files say: data, recipe, figures, and the version of the code.
2. It claims nothing that they do not say: without images to judge with there are no figures.
"""

import dataclasses
import json

import pytest

import distill
from training.card import card_text, code_digest, write_card
from training.config import Config

SUMMARY = dict(steps=2500, loss=5.186, knn=0.774, knn_untrained=0.281, knn_pixels=0.376,
               knn_protocol="k-NN(20)", minutes=14.4, device="cpu", precision="fp32",
               collapsed=False, broken_images=2)
ROWS = [
    dict(step=0, knn=0.281, pixels=0.376),
    dict(step=20, loss=6.1),
    dict(step=625, knn=0.548),
    dict(step=2500, loss=5.2),
    dict(step=2500, knn=0.774)]


def write_run(folder, summary=SUMMARY, **settings):
    """The files of a finished run that a card is made of."""
    kind = distill.Config if "teacher" in settings else Config
    usual = dict(preset="shapes_dino", given=("lr", "num_workers", "mask_ratio"))
    stored = dataclasses.asdict(kind(**usual | settings)) | {"global_batch": 32}
    if "teacher" in settings:
        stored["teacher_sha256"] = "12ab"
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "code/training").mkdir(parents=True)
    (folder / "code/vit.py").write_text("x = 1\n")


def test_the_card_says_what_the_files_say(tmp_path):
    write_run(tmp_path, lr=0.002, koleo_weight=0.1)
    write_card(tmp_path)
    card = (tmp_path / "card.md").read_text()
    for words in (
            f"# {tmp_path.name}\n", "vit_small, patches of 16 pixels, 0 registers",
            "Data: `shapes`, judged with images of the same, held out by their names.",
            "preset `shapes_dino`, `--lr 0.002`, `--mask_ratio 0.1 0.5`.",
            "dino 1, koleo 0.1; centering ema",
            "2,500 steps of 32 images, seed 0, 14.4 minutes on cpu in fp32",
            "loss 5.186, no collapse of the targets was found; 2 images could not be read",
            "| raw pixels | 37.6% |\n| before training | 28.1% |\n| after step 625 | 54.8% |\n"
            "| after step 2,500 | 77.4% |", "the mean [0.485, 0.456, 0.406] is subtracted",
            code_digest(tmp_path / "code")):
        assert words in card, words
    assert "num_workers" not in card and len(card.splitlines()) < 30


def test_another_version_of_the_code_is_told(tmp_path):
    write_run(tmp_path)
    before = code_digest(tmp_path / "code")
    (tmp_path / "code/vit.py").write_text("x = 2\n")
    assert code_digest(tmp_path / "code") != before


@pytest.mark.parametrize("settings, words", [
    (dict(arch="resnet50"), "The convnet resnet50. It learned"),
    (dict(init="dinov2_vits14"), "| dinov2_vits14, before training | 28.1% |"),
    (dict(data="folder:a", val_data="folder:b"), "Data: `folder:a`, judged with `folder:b`."),
    (dict(init="dinov2_vits14"), "\n- Began with: `dinov2_vits14`.\n"),
    (dict(teacher="runs/large", given=()), "\n- Teacher: `runs/large`, SHA-256 12ab.\n"),
    (dict(data="folder:my photos", given=("data",)), "`--data 'folder:my photos'`."),
    (dict(val_data="", given=("val_data",)), "`--val_data ''`."),
    (dict(in_chans=1), "images of 1 channels"),
    (dict(val_data="", val_share=0.0), "judged with nothing."),
    (dict(curriculum=(0.75, 0.5)),
     "- Crops: 112 and 48 pixels until step 1,875, 224 and 96 pixels "
     "until step 2,500.")])
def test_runs_of_other_kinds(settings, words, tmp_path):
    write_run(tmp_path, **settings)
    assert words in card_text(tmp_path)


def test_no_figures_where_nothing_was_judged(tmp_path):
    unjudged = dict.fromkeys(("knn", "knn_untrained", "knn_pixels"))
    write_run(tmp_path, SUMMARY | unjudged | dict(collapsed=True))
    card = card_text(tmp_path)
    assert "no images to judge" in card and "%" not in card and "collapsed;" in card
