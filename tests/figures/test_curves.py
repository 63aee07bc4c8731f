"""Claims
1. The curves are the numbers of metrics.jsonl: of each loss its two parts, and a term that nobody
   knows yet as well. A short run has dots, and a run that judged nothing no panel for it;
   --dense_every has a panel of its own.
2. Where H is near ln K, or the entropy of the mean target near 0, the panels are shaded.
3. Several runs are drawn over each other, each in one colour; equal names are told apart.
4. No legend lies on a panel, and every axis has its name.
"""

import dataclasses
import json
import math

import pytest
from conftest import tiny_config

from figures.curves import collapsed_spans, draw_curves, read_history
from machinery.page import pyplot

LN_K = math.log(32)  # TINY has 32 prototypes


def write_run(run, rows=3, judged="k-NN(20)", changes=None, terms=("dino", "ibot"), **more):
    """A run directory of made-up numbers; `changes`: step -> what is different in its row."""
    run.mkdir(parents=True)
    stored = dataclasses.asdict(tiny_config(run, "--ibot_weight", "1")) | {"global_batch": 8}
    (run / "config.json").write_text(json.dumps(stored))
    lines = [dict(step=0, knn=0.2, pixels=0.3, protocol=judged)] if judged else []
    for step in range(1, rows + 1):
        row = dict(step=step, loss=5.0 - step / 100, rank=4.0, lr=0.1, weight_decay=0.2,
                   teacher_temp=0.3, momentum=0.9, grad_norm=1.0, waiting=0.0, **more)
        for i, term in enumerate(terms):
            row |= {
                term: 2.0 + i, f"{term}_entropy": 1.5 - step / 100,
                f"{term}_kl": 0.5 + i + step / 100, f"{term}_mean_entropy": 3.0,
                f"{term}_in_use": 9.0}
        lines.append(row | (changes or {}).get(step, {}))
    if judged:
        lines.append(dict(step=rows, knn=0.4))
    if judged == "k-NN(20)":  # and by --dense_every
        lines += [dict(step=0, patch_miou=0.2), dict(step=rows, patch_miou=0.25)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def panels_of(tmp_path, monkeypatch):
    """A function: runs -> (figure, its panels by their titles), kept open after it was saved."""
    plt = pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(*runs):
        draw_curves(list(runs), tmp_path / "curves.png")
        figure = plt.gcf()
        return figure, {axis.get_title(): axis for axis in figure.axes}

    yield draw
    monkeypatch.undo()
    plt.close("all")


def curve(axis, label):
    """The heights of the first curve of this name."""
    [line] = [line for line in axis.get_lines() if line.get_label() == label][:1]
    return list(line.get_ydata())


@pytest.mark.parametrize("rows, judged", [(1, "k-NN(20)"), (12, "other-view retrieval"),
                                          (12, None)])
def test_the_curves_are_the_numbers(rows, judged, tmp_path, panels_of):
    figure, panels = panels_of(write_run(tmp_path / "my run", rows, judged, gram=0.7))
    assert figure.get_suptitle() == "my run"
    steps = range(1, rows + 1)
    axis = panels["ibot: masked patches"]
    assert curve(axis, "loss = H + KL") == [3.0] * rows
    assert curve(axis, "H") == [1.5 - step / 100 for step in steps]
    assert curve(axis, "KL") == [1.5 + step / 100 for step in steps]
    assert curve(axis, f"ln K = {LN_K:.2f}") == [LN_K, LN_K]
    assert curve(panels["gram"], "gram") == [0.7] * rows  # a loss of the future
    assert curve(panels["rank of the features"], "effective rank") == [4.0] * rows
    assert curve(panels["schedules"], "lr (0.1)") == pytest.approx([1.0] * rows)
    assert {line.get_marker() == "." for line in axis.get_lines()[:3]} == {rows == 1}
    assert ("the teacher's features" in panels) == bool(judged)
    if judged:
        assert curve(panels["the teacher's features"], "teacher") == pytest.approx([20, 40])
        assert panels["the teacher's features"].get_ylabel() == f"{judged}, %"
    assert ("the teacher's patch tokens" in panels) == (judged == "k-NN(20)")
    if judged == "k-NN(20)":
        axis = panels["the teacher's patch tokens"]
        assert curve(axis, "teacher") == pytest.approx([20, 25])
        assert axis.get_ylabel() == "patch k-NN, mIoU, %"
    assert not {"grad_norm", "waiting", "step", "patch_miou"} & set(panels)


def test_a_run_with_one_loss_has_it_once(tmp_path, panels_of):
    _, panels = panels_of(write_run(tmp_path / "run", terms=("dino",)))
    assert "dino: class tokens" in panels and "loss: all terms, weighted" not in panels
    _, panels = panels_of(write_run(tmp_path / "distilled", terms=()))  # features alone
    assert "loss: all terms, weighted" in panels and "prototypes in use" not in panels


def test_a_collapse_is_shaded(tmp_path, panels_of):
    uniform = dict(dino_entropy=LN_K, dino_kl=0.0)
    one = dict(dino_mean_entropy=0.01)
    run = write_run(tmp_path / "run", 6, changes={2: uniform, 3: uniform, 5: one})
    spans = [(1, 3, "uniform collapse"), (4, 5, "one prototype")]
    assert collapsed_spans(read_history(run), "dino") == spans
    assert collapsed_spans(read_history(run), "ibot") == []
    _, panels = panels_of(run)
    for title in ("dino: class tokens", "prototypes in use"):
        patches = {patch.get_label(): patch.get_extents() for patch in panels[title].patches}
        assert list(patches) == ["uniform collapse", "one prototype"]
    assert not panels["ibot: masked patches"].patches


def test_several_runs(tmp_path, panels_of):
    a, b = write_run(tmp_path / "a/run"), write_run(tmp_path / "b/run", gram=0.7)
    figure, panels = panels_of(a, b)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [str(a), str(b)]
    lines = panels["dino: class tokens"].get_lines()
    assert [line.get_color() for line in lines[:6]] == ["C0"] * 3 + ["C1"] * 3
    assert [line.get_color() for line in panels["gram"].get_lines()] == ["C1"]


def test_many_runs(tmp_path, panels_of):
    """The legend has rows enough, above the panels, and no two runs share a colour."""
    runs = [write_run(tmp_path / f"run-{i}") for i in range(14)]
    figure, panels = panels_of(*runs)
    figure.canvas.draw()
    [legend] = figure.legends
    assert len({line.get_color() for line in legend.get_lines()}) == 14
    box = legend.get_window_extent()
    for axis in panels.values():
        assert not box.overlaps(axis.get_tightbbox())


def test_nothing_is_covered_and_all_is_named(tmp_path, panels_of):
    ill = dict(dino_mean_entropy=0.01)
    figure, panels = panels_of(write_run(tmp_path / "run", changes={2: ill}, koleo=1.0))
    figure.canvas.draw()
    boxes = [axis.get_window_extent() for axis in figure.axes]
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    assert len(legends) == 5
    for legend in legends:
        assert not any(legend.get_window_extent().overlaps(box) for box in boxes)
        label = legend.axes.xaxis.label.get_window_extent()
        assert not legend.get_window_extent().overlaps(label)
    assert all(axis.get_xlabel() == "step" and axis.get_ylabel() for axis in figure.axes)


def test_a_half_written_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "killed")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    assert [row["step"] for row in read_history(run).steps] == [1, 2, 3]
