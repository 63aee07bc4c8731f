"""Claims
1. Curves name their run and what was measured; a short run has dots, and a run that judged
   nothing no panel for it; --dense_every has a panel of its own.
"""

import dataclasses
import json

import pytest
from conftest import tiny_config

from figures.curves import draw_curves
from machinery.page import pyplot


def axes_of_curves(run, monkeypatch):
    """The panels of curves.png, before matplotlib forgets them."""
    plt = pyplot()
    with monkeypatch.context() as patched:
        patched.setattr(plt, "close", lambda fig: None)
        draw_curves(run)
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
    if judged == "k-NN(20)":  # and by --dense_every
        lines += [dict(step=0, patch_miou=0.2), dict(step=rows, patch_miou=0.25)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    fig, axes = axes_of_curves(run, monkeypatch)
    assert fig.get_suptitle() == "my run"
    labels = [axis.get_ylabel() for axis in axes]
    watched = judged == "k-NN(20)"
    assert len(axes) == 4 + bool(judged) + watched  # with the second y axis of the ranks
    assert ("patch k-NN, mIoU, %" in labels) == watched
    assert (f"{judged}, %" in labels) == bool(judged) and all(labels)
    curves = [line for line in axes[0].get_lines() if len(line.get_xdata()) == rows]
    assert len(curves) == 6
    assert all((line.get_marker() == ".") == (rows == 1) for line in curves)
