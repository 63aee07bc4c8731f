"""Claims
1. A run keeps three snapshots and the images that they are asked about; a continued run has them
   bit for bit, and --no_resume removes them. A run without held-out images keeps its own.
2. The page has the run's words, its curves, and for each snapshot a row of maps, which differ.
   Of two objectives, too, no legend lies on another.
3. The same run gives the same files; a run without snapshots gets one clear line.
4. The page is drawn at several times the size of training, of a convnet without attention.
"""

import json
import shutil
from itertools import combinations

import pytest
import torch
from conftest import killed_in_step, same_tensors, tiny_config, without_figures

import train
import visualize
from backbones.weights import load_backbone
from figures.curves import read_history
from figures.story import draw_story, in_words, snapshots, what_it_sees
from machinery.page import pyplot
from training.snapshots import IMAGES, page_side


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished tiny run of 16 steps."""
    folder = tmp_path_factory.mktemp("story") / "tiny"
    with without_figures():
        train.run(tiny_config(folder))
    return folder


def tensors(file):
    return torch.load(file, weights_only=True)


# ----------------------------------------------------------------------------------------------
# What a run keeps


def test_three_snapshots_and_the_images(run):
    assert [file.name for file in snapshots(run)] == ["step-0.pt", "step-8.pt", "step-16.pt"]
    last, teacher = tensors(run / "snapshots/step-16.pt"), tensors(run / "teacher.pt")
    assert same_tensors(last, {name: value.half() for name, value in teacher.items()})
    kept = tensors(run / "snapshots/images.pt")
    assert kept["held_out"] and kept["images"].shape == (IMAGES, 3, 144, 144)
    assert kept["images"].dtype == torch.uint8

    # A snapshot is a file of weights as any other, and knows the network by the run's settings.
    model = load_backbone(run / "snapshots/step-8.pt")
    assert model.patch_size == 8 and model.cls_token.dtype == torch.float32


def test_a_continued_run_has_the_same(run, tmp_path, quick_runs):
    with killed_in_step(11):
        train.run(tiny_config(tmp_path / "run"))
    train.run(tiny_config(tmp_path / "run"))
    for file in snapshots(run):
        assert same_tensors(tensors(file), tensors(tmp_path / "run/snapshots" / file.name))


def test_started_anew_forgets_them(run, tmp_path, quick_runs):
    again = shutil.copytree(run, tmp_path / "run")
    flags = "--epochs 1 --no_resume --val_data  --val_share 0".split(" ")
    train.run(tiny_config(again, *flags))
    assert [file.name for file in snapshots(again)] == ["step-0.pt", "step-4.pt", "step-8.pt"]
    assert not tensors(again / "snapshots/images.pt")["held_out"]


def test_the_page_is_asked_at_several_times_the_training_size():
    assert page_side(40, 5) == 240 and page_side(96, 16) == 480
    assert page_side(128, 14) == 476  # whole patches
    assert page_side(518, 14) == 518  # never smaller than in training


# ----------------------------------------------------------------------------------------------
# The page


def kept_open(run, path, monkeypatch):
    """The figure of a story, which matplotlib would forget after it was saved."""
    plt = pyplot()
    with monkeypatch.context() as patched:
        patched.setattr(plt, "close", lambda figure: None)
        draw_story(run, path=path)
    figure = plt.gcf()
    plt.close("all")
    return figure


def test_the_page(run, tmp_path, monkeypatch):
    path = tmp_path / "page.png"
    figure = kept_open(run, path, monkeypatch)
    texts = [text.get_text() for text in figure.texts]
    assert "tiny" in texts and in_words(read_history(run)) in texts

    # Four panels, and two blocks of a row of images and a row for each snapshot.
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [
        "dino: class tokens", "prototypes in use", "rank of the features",
        "the teacher's features"]
    assert len(figure.axes) == 4 + 2 * 4 * IMAGES
    names = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert names == {"image", "start\nstep 0", "middle\nstep 8", "end\nstep 16"}

    # The same input gives the same files.
    before = path.read_bytes(), path.with_suffix(".pdf").read_bytes()
    draw_story(run, path=path)
    assert (path.read_bytes(), path.with_suffix(".pdf").read_bytes()) == before


def test_the_only_loss_of_a_run_is_drawn(run, tmp_path, monkeypatch):
    """One without prototypes has another name, as in a distillation of features."""
    one = shutil.copytree(run, tmp_path / "one")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "dino" in row:
            row["feature"] = row["dino"]
        for name in [name for name in row if name.startswith("dino")]:
            del row[name]
    (one / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("figures.story.draw_pictures", lambda *args: None)
    monkeypatch.setattr("figures.story.what_it_sees", lambda *args: {})
    figure = kept_open(one, tmp_path / "page.png", monkeypatch)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles[0].startswith("feature") and len(titles) == 3


def test_legends_of_two_objectives_stand_apart(run, tmp_path, monkeypatch):
    both = shutil.copytree(run, tmp_path / "both")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {name.replace("dino", "ibot"): value for name, value in row.items()}
    (both / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The pictures below the curves are no matter of this test.
    monkeypatch.setattr("figures.story.draw_pictures", lambda *args: None)
    monkeypatch.setattr("figures.story.what_it_sees", lambda *args: {})
    figure = kept_open(both, tmp_path / "page.png", monkeypatch)
    figure.canvas.draw()
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    boxes = [legend.get_window_extent() for legend in legends]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_in_words(run):
    words = in_words(read_history(run))
    for part in ("vit_pico with patches of 8 pixels", "shapes:64", "16 steps of 8 images",
                 "dino 1;", "32 prototypes", "centering ema", "2 of 24 pixels, 2 of 16"):
        assert part in words

    # The path of a folder may be long; its last parts tell it from others.
    history = read_history(run)
    history.config["data"] = "folder:/home/someone/Pictures/2026/holidays/norway/originals"
    assert "on folder:norway/originals, without labels" in in_words(history)


def test_the_maps_of_the_snapshots_differ(run):
    images = tensors(run / "snapshots/images.pt")["images"][:2]
    start, middle, end = [what_it_sees(file, images, "cpu") for file in snapshots(run)]
    assert start["attention"].shape == (2, 18, 18) and start["PCA"].shape == (2, 18, 18, 3)
    for kind in ("attention", "PCA"):
        assert not torch.equal(start[kind], middle[kind])
        assert not torch.equal(middle[kind], end[kind])


def test_a_convnet_has_no_attention(tmp_path, quick_runs):
    flags = "--arch resnet18 --optimizer sgd --drop_path_rate 0 --global_crops_size 32".split()
    train.run(tiny_config(tmp_path / "run", *flags, "--epochs", "1", "--epoch_length", "1"))
    images = tensors(tmp_path / "run/snapshots/images.pt")["images"][:1]
    seen = what_it_sees(snapshots(tmp_path / "run")[0], images, "cpu")
    assert list(seen) == ["PCA"] and seen["PCA"].shape == (1, 6, 6, 3)


def test_a_run_without_snapshots(run, tmp_path, capsys):
    old = shutil.copytree(run, tmp_path / "old")
    shutil.rmtree(old / "snapshots")
    with pytest.raises(SystemExit) as stop:
        visualize.main(["story", str(old)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "no snapshots in it" in error and f"visualize.py curves {old}" in error
