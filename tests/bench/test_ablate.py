"""Claims
1. Each ingredient that a preset has is taken out, each other one is added: the settings change
   what the run does, and --auto_scale leaves them alone.
2. The runs are of one epoch, unless --epochs says otherwise, and have one seed: as it is, a run
   gives the figures of train.py.
3. The table has a row for each run with its verdict; the figure a panel for each kind of ending,
   with what the run was judged by, if it was.
4. Bad input is one line that names the flag.
"""

import json
import math

import pytest
from bench_helpers import config_of
from conftest import TINY, metrics_of, tiny_config

import bench.ablate
import train
from bench.__main__ import main
from bench.ablate import INGREDIENTS, AblateConfig, draw, versions_of
from training.recipes import auto_scale

pytestmark = pytest.mark.usefixtures("quick_runs")

EVERYTHING = "--centering sinkhorn --koleo_weight 0.1 --ibot_weight 1 --mask_min_patches 1".split(
)

# An ingredient -> what tells, of a configuration, that it is there.
THERE = {
    "centering": lambda c: c.centering != "none",
    "sharpening": lambda c: c.teacher_temp == c.warmup_teacher_temp == 0.04,
    "ema": lambda c: c.momentum_teacher > 0.9 and c.final_momentum_teacher == 1,
    "multicrop": lambda c: c.local_crops_number > 0, "koleo": lambda c: c.koleo_weight == 0.1,
    "sinkhorn": lambda c: c.centering == "sinkhorn", "mask": lambda c: c.objectives.get("ibot")}


@pytest.mark.parametrize("name", INGREDIENTS)
def test_taken_out_or_added(name):
    config = config_of(["shapes_dino", *EVERYTHING, "--without", name], AblateConfig)
    versions = versions_of(config)
    assert list(versions) == ["as it is", f"without {name}"]
    for version, there in zip(versions.values(), (True, False)):
        scaled = auto_scale(version, 5000, 8)
        assert bool(THERE[name](scaled)) == there
        assert version.epochs == 1 and version.warmup_epochs == 0

    # What has been taken out is added again.
    missing = versions[f"without {name}"]
    added = versions_of(missing)[f"with {name}"]
    assert THERE[name](auto_scale(added, 5000, 8))


def test_names_with_commas_and_the_users_epochs():
    flags = "shapes_dino --without centering,koleo ema --epochs 3".split()
    versions = versions_of(config_of(flags, AblateConfig))
    assert list(versions) == ["as it is", "without centering", "with koleo", "without ema"]
    assert {version.epochs for version in versions.values()} == {3}


@pytest.mark.parametrize("preset", ["dino_vits16_300ep", "dino_resnet50", "dinov2_vitl14"])
def test_presets_with_long_warm_ups_and_convnets(preset):
    """One epoch leaves none to warm up in; a convnet has no patches to mask."""
    config = config_of([preset], AblateConfig)
    versions = versions_of(config)
    assert all(version.warmup_teacher_temp_epochs == 0 for version in versions.values())
    assert any("mask" in name for name in versions) != config.convnet


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    """Tiny runs are too short to collapse: the verdict is given; all else is what they did."""
    verdict = "one prototype"

    def given(row, config):
        return (verdict, "") if config.centering == "none" else None

    monkeypatch.setattr(bench.ablate, "diagnose", given)
    out = tmp_path / "out.json"
    flags = ["--epochs", "1", "--without", "centering,koleo", "--json", str(out)]
    main(["ablate", *TINY, *flags, "--output", str(tmp_path / "ablate.png")])
    result = json.loads(out.read_text())
    rows = {row["run"]: row for row in result["runs"]}
    assert list(rows) == ["as it is", "without centering", "with koleo"]
    assert rows["without centering"]["verdict"] == verdict
    assert (tmp_path / "ablate.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert printed.count("| one prototype |") == 1 and "k-NN(20), " in printed

    # As it is: what train.py logs and judges.
    train.run(tiny_config(tmp_path / "run", "--epochs", "1"))
    logged = metrics_of(tmp_path / "run")
    judged = [row for row in logged if "knn" in row]
    last = [row for row in logged if "loss" in row][-1]
    found = rows["as it is"]
    assert (result["untrained"], found["knn"]) == (judged[0]["knn"], judged[-1]["knn"])
    assert found["rank"] == judged[-1]["feature_rank"]
    assert found["entropy"] == pytest.approx(last["dino_entropy"] / math.log(32))
    assert found["loss"] == last["dino"] and len(result["curves"]["as it is"]) == 4


def test_the_settings_fit_the_length_of_the_runs(monkeypatch):
    """400 images, 2 in a step: the teacher's average has the fewest steps, 10, in one epoch of 200
    steps, and a fortieth of the run, 20, in the preset's four.
    """

    class Begun(Exception):
        pass

    begun = []

    def begin(run, checkpoint):
        begun.append(run.config)
        raise Begun

    monkeypatch.setattr(bench.ablate.ShortRun, "begin", begin)
    flags = "shapes_dino --data shapes:400 --val_data shapes:50:val --batch_size_per_gpu 2".split(
    )
    for more, momentum in [([], 0.9), (["--epochs", "4"], 0.95)]:
        with pytest.raises(Begun):
            main(["ablate", *flags, *more])
        assert begun[-1].momentum_teacher == momentum


def test_panels(tmp_path, monkeypatch):
    """A kind of ending that no run had is said to be missing; the first of a kind is drawn."""
    shown = []
    monkeypatch.setattr(bench.ablate, "save", lambda fig, path, caption: shown.append(fig))
    curve = [
        dict(step=step, dino_entropy=1.0, dino_mean_entropy=2.0, dino_kl=0.5)
        for step in (5, 10)]
    row = dict(term="dino", ln_k=2.0, knn=0.5)
    rows = [
        dict(row, run="as it is", verdict="learns"),
        dict(row, run="without koleo", verdict="learns"),
        dict(row, run="without centering", verdict="one prototype")]
    curves = {r["run"]: curve for r in rows}
    draw(rows, curves, "k-NN(20)", tmp_path / "a.png")
    titles = [axis.get_title() for axis in shown[0].axes]
    assert titles[0] == "healthy\nas it is\nk-NN(20) 50 %"
    assert "none of these runs" in titles[1] and "without centering" in titles[2]
    heights = [line.get_ydata()[0] for line in shown[0].axes[0].lines]
    assert heights == [0.5, 1.0, 0.25]  # shares of ln K

    # Without labels the judge asks another question, and without images none. A run whose
    # features have collapsed is not healthy, whatever its targets look like.
    rows[0]["verdict"], rows[1]["knn"] = "dimensional collapse", None
    draw(rows, curves, "other-view retrieval", tmp_path / "b.png")
    titles = [axis.get_title() for axis in shown[1].axes]
    assert titles[0] == "healthy\nwithout koleo"
    assert titles[2].endswith("without centering\nother-view retrieval 50 %")


@pytest.mark.parametrize("flags, words", [
    ("--without center", "--without center: choose from centering, sharpening"),
    ("--output no/folder/a.png", "--output no/folder/a.png: there is no folder"),
    ("--output a.pgn", "--output a.pgn: expected a file of the kind"),
    ("--without multicrop --global_crops_number 1", "at least two crops")])
def test_misuse(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ablate", *TINY, *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
