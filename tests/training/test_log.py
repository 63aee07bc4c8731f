"""Claims
1. Warnings name the illness and the term; what is healthy, or lasts for a single line, is not
   warned of.
2. A log line is the mean over its steps, and splits a cross-entropy into H and KL.
3. A step that was not finite is refused with its number, its loss and its images; as many as
   --nonfinite_steps are left out instead.
4. Images that do not decode are named; more than one in a hundred end the run.
"""

import math
import re

import pytest
import torch
from conftest import tiny_config

import train
from images.data import Images
from machinery.clock import Clock
from machinery.flags import UsageError
from training.config import Config
from training.log import LogWindow, diagnose, log_line, step_figures

# ----------------------------------------------------------------------------------------------
# Illnesses


@pytest.mark.parametrize("row, name", [
    (dict(entropy=6.93, kl=0.001, mean_entropy=6.93, loss=6.931), "uniform collapse"),
    (dict(entropy=0.0, kl=0.01, mean_entropy=0.05, loss=0.01), "one prototype"),
    (dict(entropy=0.5, kl=6.43, mean_entropy=5.0, loss=6.93), "ignored teacher"),
    (dict(entropy=0.2, kl=1.0, mean_entropy=6.0, loss=1.2), None),
    (dict(entropy=6.0, kl=0.5, mean_entropy=6.8, loss=6.5), None)])
@pytest.mark.parametrize("term", ["dino", "ibot"])
def test_diagnosis(row, name, term):
    """One of two objectives is ill, the other one healthy. ln 1024 is 6.931."""
    healthy = dict(entropy=1.0, kl=1.0, mean_entropy=6.0, loss=2.0)
    both = {}
    for objective in ("dino", "ibot"):
        for figure, value in (row if objective == term else healthy).items():
            both[objective if figure == "loss" else f"{objective}_{figure}"] = value
    illness = diagnose(both, Config(n_prototypes=1024, ibot_weight=1.0))
    if name is None:
        assert illness is None
    else:
        assert illness[0] == name and term in illness[1]


def test_an_illness_has_to_last(tmp_path, quick_runs, monkeypatch, capsys):
    """It is named at the second line of the log that shows it in a row, and once."""
    names = {2: "a", 6: "b", 8: "a", 10: "a", 12: "a", 16: "a"}  # by the step of the line

    def diagnose(row, config):
        name = names.get(row["step"])
        return name and (name, f"{name} in step {row['step']}")

    monkeypatch.setattr(train, "diagnose", diagnose)
    train.run(tiny_config(tmp_path / "run", "--knn_every", "0"))  # a line every other step
    warnings = re.findall("^warning: (.) in step (.*)$", capsys.readouterr().out, re.M)
    assert warnings == [("a", "10")]


# ----------------------------------------------------------------------------------------------
# Figures of a step and of a line


def test_figures_of_a_step():
    """Two of four crops are masked, with one patch and with two; the last row is padding."""
    even, first, second = (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)
    targets = {
        "dino": torch.tensor([even, first]), "ibot": torch.tensor([first, even, even, second])}
    weights = torch.tensor([1.0, 0.5, 0.5, 0.0])
    means = {"dino": torch.tensor(2.0), "ibot": torch.tensor(3.0), "loss": torch.tensor(5.0)}
    figures = step_figures(means, targets, weights, crops=4)
    ln_2 = math.log(2)
    assert figures["dino_entropy"].item() == pytest.approx(ln_2 / 2)
    of_mean = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert figures["dino_mean_entropy"].item() == pytest.approx(of_mean)

    # The entropy is 0 for one of the masked crops, and ln 2 for the other one.
    assert figures["ibot_entropy"].item() == pytest.approx(ln_2 / 2)
    # The loss of 3 is a mean over four crops, of which two have no mask and count 0.
    assert figures["ibot"].item() == pytest.approx(6.0) and "dino" not in figures


def four_images():
    return Images("four", None, ["a.png", "b.png", "c.png", "d.png"])


def figures_of(loss, ok=True):
    """What train_step returns, for one objective."""
    numbers = dict(loss=loss, dino=loss, dino_entropy=1.0, dino_mean_entropy=2.0, grad_norm=0.5,
                   ok=ok)
    features = torch.tensor([[3.0, 0.0], [0.0, 3.0]])  # of two directions
    return {name: torch.tensor(x) for name, x in numbers.items()} | {"features": features}


def batch_of(*indices, broken=()):
    return {"index": torch.tensor(indices), "broken": list(broken)}


def test_a_line_is_a_mean_over_its_steps():
    config = Config(n_prototypes=32)
    window = LogWindow(four_images(), config)
    window.add(7, batch_of(0, 1), figures_of(3.0))
    window.add(8, batch_of(2, 3), figures_of(2.0))
    row = window.read({"broken": 0}, images_seen=16)
    assert (row["loss"], row["dino"], row["dino_entropy"]) == (2.5, 2.5, 1.0)
    assert row["dino_kl"] == 1.5  # a cross-entropy is H + KL
    assert row["dino_in_use"] == pytest.approx(math.exp(2.0))
    assert row["rank"] == pytest.approx(2.0) and "ok" not in row
    assert window.steps == []

    row |= dict(step=8, lr=1e-3, momentum=0.99, images_per_second=100.0, memory_gb=1.0)
    line = log_line(row, 16, config, Clock(8, 16))
    words = "dino 2.500 = H 1.000 + KL 1.500 (ln K 3.47, mean H 2.00)"
    assert line.startswith("step      8/16  50%") and words in line and "rank 2" in line


@pytest.mark.parametrize("loss, words",
                         [(float("nan"), "step 8: the loss .dino. is not finite"),
                          (2.0, "step 8: a gradient is not finite")])
def test_a_step_that_is_not_finite_is_refused(loss, words):
    window = LogWindow(four_images(), Config())
    window.add(7, batch_of(0, 1), figures_of(3.0))
    window.add(8, batch_of(2, 3), figures_of(loss, ok=False))
    window.add(9, batch_of(0, 2), figures_of(float("nan"), ok=False))
    with pytest.raises(UsageError, match=f"{words}.*Images of this process: c.png, d.png"):
        window.read({"broken": 0}, images_seen=24)


def test_some_steps_may_be_left_out(capsys):
    """--nonfinite_steps of the whole run; the means are those of the other steps."""
    window = LogWindow(four_images(), Config(nonfinite_steps=2))
    totals = {"broken": 0}
    window.add(7, batch_of(0, 1), figures_of(3.0))
    window.add(8, batch_of(2, 3), figures_of(float("nan"), ok=False))
    row = window.read(totals, images_seen=16)
    assert row["loss"] == 3.0 and totals["nonfinite"] == 1
    assert "step 8: the loss (dino) is not finite. Images" in capsys.readouterr().out

    # A window of one such step has nothing else to tell.
    window.add(9, batch_of(2, 3), figures_of(float("nan"), ok=False))
    assert math.isnan(window.read(totals, images_seen=24)["loss"])
    window.add(10, batch_of(2, 3), figures_of(float("inf"), ok=False))
    with pytest.raises(UsageError, match="step 10.*--nonfinite_steps 3"):
        window.read(totals, images_seen=32)


# ----------------------------------------------------------------------------------------------
# Images that do not decode


def test_broken_images_are_counted(capsys):
    """Up to one in a hundred, and up to three whatever their number, are replaced and named."""
    window = LogWindow(four_images(), Config())
    totals = {"broken": 2}
    window.add(7, batch_of(0, 1, broken=["x.png"]), figures_of(3.0))
    window.read(totals, images_seen=16)
    assert totals == {"broken": 3}
    assert "replaced an image that does not decode: x.png" in capsys.readouterr().out
    window.add(8, batch_of(0, 1, broken=["y.png"]), figures_of(3.0))
    window.read(totals, images_seen=400)
    window.add(9, batch_of(0, 1, broken=["z.png"]), figures_of(3.0))
    with pytest.raises(UsageError, match="--data: 5 of 408 images did not decode"):
        window.read(totals, images_seen=408)


def test_too_many_broken_images(tmp_path, photos, quick_runs):
    for name in ("01", "03", "05", "07", "09"):
        (photos / "cats" / f"{name}.png").write_bytes(b"no")
    flags = ["--data", f"folder:{photos}", "--val_data", f"folder:{photos / 'dogs'}"]
    with pytest.raises(UsageError, match="did not decode"):
        train.run(tiny_config(tmp_path / "run", *flags))


def test_little_is_kept_of_the_steps_of_a_line():
    """A tensor of a worker holds a file open; the features are large, and the newest suffice."""
    window = LogWindow(four_images(), Config(n_prototypes=32))
    batch = batch_of(0, 1)
    figures = [figures_of(3.0), figures_of(2.0)]
    for step in range(2):
        window.add(step, batch, figures[step])
    assert all("features" not in kept for *_, kept in window.steps)
    assert all(index.data_ptr() != batch["index"].data_ptr() for _, index, *_ in window.steps)
