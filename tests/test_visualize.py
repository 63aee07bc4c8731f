"""Claims
1. The figures are drawn for any photo; misuse is one line, exit code 2.
2. A run ends with a page at several times its size, and leaves its network as it was.
3. Curves name their run and what was measured; a short run has dots, and a run that judged
   nothing no panel for it.
"""

import dataclasses
import json

import pytest
import torch
from conftest import tiny_config

import visualize
from evaluation.dense import pyplot
from images.data import open_images, read_file
from visualize import draw_attention_page, page_side, sharpest_head
from vit import VisionTransformer


def test_photo(tmp_path, photos):
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    out = tmp_path / "a.png"
    line = f"attention {photos}/cats/01.png --weights {tmp_path}/b.pth --image_size 37"
    visualize.main([*line.split(), "--output", str(out)])
    assert read_file(out).float().std() > 10  # not an empty page


@pytest.mark.parametrize("line, words",
                         [("atention", "did you mean attention?"), ("attention", "usage"),
                          ("attention x.jpg", "--weights"), ("curves RUNS", "metrics"),
                          ("curves /none", "no such"),
                          ("curves RUNS/shapes_dyno", "RUNS/shapes_dino?"),
                          ("attention /none.jpg --weights W", "not a readable image"),
                          ("attention x --weights W --share 2", "--share")])
def test_misuse(line, words, tmp_path, capsys):
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    (tmp_path / "shapes_dino").mkdir()
    line = line.replace("RUNS", str(tmp_path))
    words = words.replace("RUNS", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        visualize.main(line.replace("W", str(tmp_path / "b.pth")).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error
    assert error.count("\n") == 1


def test_the_page_is_asked_at_several_times_the_training_size():
    assert page_side(40, 5) == 240 and page_side(96, 16) == 480
    assert page_side(128, 14) == 476  # whole patches
    assert page_side(518, 14) == 518  # never smaller than in training


def test_the_sharpest_head_is_the_least_spread_one():
    attention = torch.full((2, 3, 4, 4), 1 / 16)
    attention[:, 1] = 0.0
    attention[:, 1, 2, 3] = 1.0  # all of it on one patch
    assert sharpest_head(attention) == 1


def test_the_page_leaves_the_network_as_it_was(tmp_path):
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1).train()
    images = open_images("shapes:2")
    photos = [images.read_at(i, 110) for i in range(2)]
    draw_attention_page(model, photos, 96, tmp_path / "page.png")
    assert model.training and (tmp_path / "page.png").stat().st_size > 5_000


def test_without_arguments_it_says_what_it_can_draw(capsys):
    visualize.main(["--help"])
    overview = capsys.readouterr().out
    visualize.main([])
    assert capsys.readouterr().out == overview and "attention" in overview


# -- curves


def axes_of_curves(run, monkeypatch):
    """The panels of curves.png, before matplotlib forgets them."""
    plt = pyplot()
    with monkeypatch.context() as patched:
        patched.setattr(plt, "close", lambda fig: None)
        visualize.draw_curves(run)
    fig = plt.gcf()
    plt.close(fig)
    return fig, fig.axes


@pytest.mark.parametrize("rows, judged", [(1, "k-NN(20)"), (30, "other-view retrieval"),
                                          (30, None)])
def test_curves(rows, judged, tmp_path, monkeypatch):
    run = tmp_path / "my run"
    run.mkdir()
    stored = dataclasses.asdict(tiny_config(run, "--ibot_weight", "1")) | {"global_batch": 8}
    (run / "config.json").write_text(json.dumps(stored))
    of_step = dict.fromkeys(("loss", "rank", "lr", "weight_decay", "teacher_temp"), 1.0)
    for term in ("dino", "ibot"):
        for ending in ("", "_entropy", "_kl", "_mean_entropy"):
            of_step[term + ending] = 1.0
    lines = [dict(of_step, step=step) for step in range(1, rows + 1)]
    if judged:
        lines.insert(0, dict(step=0, knn=0.2, pixels=0.3, protocol=judged))
        lines.append(dict(step=rows, knn=0.4))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    fig, axes = axes_of_curves(run, monkeypatch)
    assert fig.get_suptitle() == "my run"
    labels = [axis.get_ylabel() for axis in axes]
    assert len(axes) == (5 if judged else 4)  # with the second y axis of the ranks
    assert (f"{judged}, %" in labels) == bool(judged) and all(labels)
    curves = [line for line in axes[0].get_lines() if len(line.get_xdata()) == rows]
    assert len(curves) == 6
    assert all((line.get_marker() == ".") == (rows == 1) for line in curves)
