"""Claims
1. Every task runs on the embedded world, and writes what it returns, with the protocol, the
   hash of the weights, the data and the time. What an earlier call wrote is kept: results and
   trained weights.
2. Two processes give the figures of one, for sizes that do not divide.
3. Each task has the flags that its file uses, no other task's, and --help lists these; `all`
   has those that mean the same in every protocol that has them.
4. A new line in TASKS is a new task: it runs under its name, and is part of `all`, which writes
   the results of each task as soon as it has them.
5. Misuse is one line that names the flag, exit code 2. Drawings are never judged beside --data
   that is not drawn, unless --val_data asks for them.
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import finish, run_evaluate, start

import evaluate
from evaluation import knn, logreg, protocol
from evaluation.protocol import Extractor
from images import videos
from machinery.flags import UsageError, parse
from machinery.process import Process

ROOT = Path(__file__).resolve().parents[1]

# -- all tasks, on one process and on two

SMALL = ("--data shapes:37 --val_data shapes:23:val --nb_knn 1 5 --n_per_class 1 2 --n_tries 2 "
         "--epochs 2 --n_originals 5 --steps 2 --most 5")
FEW = logreg.PENALTIES[8:28:4]  # some strengths of the penalty, where all 45 would take a while


def evaluate_all(rank, backbone, folder):
    """The report card of this process, written into the folder."""
    os.chdir(folder)
    with patch.multiple(videos, N_DRAWN=3, N_FRAMES=4), patch.object(logreg, "PENALTIES", FEW):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            results = run_evaluate(f"all --weights {backbone} {SMALL}")
    Path(f"{rank}.txt").write_text(printed.getvalue())
    torch.save(results, f"{rank}.pt")


@pytest.fixture(scope="module")
def report_cards(small_backbone, tmp_path_factory):
    """Folders of one process that ran everything, and of two."""
    folders = {1: tmp_path_factory.mktemp("one"), 2: tmp_path_factory.mktemp("two")}
    pair = start(evaluate_all, small_backbone, str(folders[2]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folders[1])
        evaluate_all(0, small_backbone, str(folders[1]))
    finish(pair)
    return folders


def test_all_tasks(report_cards, small_backbone):
    written = json.loads((report_cards[1] / "evaluations/all/results.json").read_text())
    config = parse(protocol.Config, ["--weights", small_backbone])
    sha256 = Extractor(config, Process(torch.device("cpu"))).sha256
    assert written["weights_sha256"] == sha256 and len(sha256) == 64
    assert written["data"] == "shapes:37" and written["val_data"] == "shapes:23:val"
    assert written["weights"] == small_backbone and written["image_size"] == 16
    assert written["minutes"] >= 0
    for name in evaluate.TASKS:
        if name != "features":
            assert written[name]["protocol"]
            for key, value in written[name]["headline"].items():
                assert 0 <= value <= 1 and written["headline"][key] == value
    assert len(written["linear"]["probes"]) == 52 and len(written["logreg"]["chosen_by"]) == 5
    assert len(written["copies"]["copies"]) == 20
    assert list(written["video"]["video"]) == ["shapes-0", "shapes-1", "shapes-2"]


def test_tables_name_what_is_judged(report_cards):
    printed = (report_cards[1] / "0.txt").read_text()
    lines = [line for line in printed.splitlines() if "of shapes:23:val" in line]
    for words in ("k-NN: ", "linear: ", "copy detection: ", "segment: ", "patches: ", "depth: ",
                  "masks: "):
        assert any(line.startswith(words) for line in lines), words
    assert sum("mean per class" in line for line in lines) == 2  # logreg and fine-tuning


def test_two_processes_give_the_figures_of_one(report_cards):
    alone = torch.load(report_cards[1] / "0.pt")
    for rank in (0, 1):
        together = torch.load(report_cards[2] / f"{rank}.pt")
        assert together.keys() == alone.keys()
        # Equal to the last digit, but for the depths: their float32 is that of other batches.
        for key in set(alone) - {"minutes", "depth", "headline"}:
            assert together[key] == alone[key], key
        for key in ("depth", "headline"):
            figures = {"depth": alone["depth"]["depth"], "headline": alone["headline"]}[key]
            own = {"depth": together["depth"]["depth"], "headline": together["headline"]}[key]
            assert own == pytest.approx(figures, rel=1e-5), key
    for name in ("linear/head.pt", "finetune/model.pt"):
        one, two = (torch.load(report_cards[n] / "evaluations/all" / name) for n in (1, 2))
        for key in one:
            # float32: other batches, and gradients summed in another order
            torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4, msg=key)


def test_a_second_call_keeps_the_results_of_the_first(small_backbone, tmp_path, capsys):
    results = []
    for count in (23, 22, 21):
        line = f"knn --weights {small_backbone} --data shapes:37 --val_data shapes:{count}:val"
        results.append(run_evaluate(line, nb_knn=5, output_dir=tmp_path))
    files = [tmp_path / name for name in ("results-1.json", "results-2.json", "results.json")]
    assert [json.loads(file.read_text())["val_data"]
            for file in files] == ["shapes:23:val", "shapes:22:val", "shapes:21:val"]
    assert "results.json; the one before it is results-2.json now" in capsys.readouterr().out


@pytest.mark.parametrize("task, file", [
    ("linear --lr 0.1 --epochs 1 --num_workers 0", "head.pt"),
    ("finetune --epochs 1 --num_workers 0", "model.pt"),
    ("segment --steps 1 --head_batch 2 --image_size 16 --num_workers 0", "head.pt"),
    ("depth --steps 1 --head_batch 2 --image_size 16 --num_workers 0", "head.pt")])
def test_a_second_call_keeps_the_weights_of_the_first(task, file, small_backbone, tmp_path,
                                                      monkeypatch):
    for module in ("segment", "depth"):
        monkeypatch.setattr(f"evaluation.{module}.draw_page", lambda *page: None)
    line = f"{task} --weights {small_backbone} --data shapes:20 --val_data shapes:9:val"
    kept = tmp_path / f"{Path(file).stem}-1.pt"
    run_evaluate(line, output_dir=tmp_path)
    first = (tmp_path / file).read_bytes()
    run_evaluate(line, output_dir=tmp_path, seed=1)
    assert kept.read_bytes() == first != (tmp_path / file).read_bytes()


# -- the flags of each task


def flags_of(config_class):
    fields = dataclasses.fields(config_class)
    return {f.name for f in fields if f.name != "given" and not f.metadata.get("no_flag")}


def names_in(module):
    """(the NAMEs of config.NAME, all words in quotes) in the source of a module."""
    attributes, words = set(), set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and ast.unparse(
                node.value).split(".")[-1] == "config":
            attributes.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)
    return attributes, words


@pytest.mark.parametrize("name", evaluate.TASKS)
def test_each_task_has_the_flags_that_its_file_uses(name):
    task = evaluate.TASKS[name]
    flags = flags_of(task.Config)
    attributes, words = names_in(task)
    assert attributes - {"given"} <= flags  # what the file asks for is there
    for module in (protocol, evaluate):
        shared_attributes, shared_words = names_in(module)
        attributes, words = attributes | shared_attributes, words | shared_words
    assert flags <= attributes | words  # what is there is asked for, by the file or for all


@pytest.mark.parametrize("flag", ["--mixup", "--ground_truth", "--copydays", "--epochs"])
def test_another_tasks_flag_is_refused(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["knn", flag, "1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"there is no flag {flag}" in error and error.count(
        "\n") == 1


@pytest.mark.parametrize("name", [*evaluate.TASKS, "all"])
def test_help_lists_the_flags_of_a_task(name, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([name, "--help"])
    assert stop.value.code == 0
    listed = re.findall(r"(?m)^  --(\w+)", capsys.readouterr().out)
    config_class = evaluate.config_of_all() if name == "all" else evaluate.TASKS[name].Config
    assert len(listed) == len(set(listed)) and set(listed) == flags_of(config_class)


def test_help_of_the_program(capsys, monkeypatch):
    evaluate.main(["--help"])
    overview = capsys.readouterr().out
    evaluate.main([])  # nothing given: what can be given
    assert capsys.readouterr().out == overview
    assert all(re.search(rf"(?m)^  {name} ", overview) for name in [*evaluate.TASKS, "all"])

    # The file as a program, with the arguments of `python evaluate.py knn --help`.
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "knn", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    usage = capsys.readouterr().out
    assert stop.value.code == 0
    assert usage.startswith("usage: python evaluate.py knn")
    assert set(re.findall(r"(?m)^  --(\w+)", usage)) == flags_of(knn.Config)


def test_all_has_the_flags_that_mean_one_thing():
    of_all = flags_of(evaluate.config_of_all())
    meanings = {}
    for task in evaluate.judging_tasks().values():
        for field in dataclasses.fields(task.Config):
            if field.name != "given":
                meaning = (str(field.type), field.default)
                meanings.setdefault(field.name, set()).add(meaning)
    alike = {name for name, several in meanings.items() if len(several) == 1}
    # A head fits one task alone; lr is a rate of probes, and another of a whole network.
    assert of_all == alike - {"head", "lr"}
    assert {"nb_knn", "mixup", "ground_truth", "epochs", "seed", "weights"} <= of_all
    assert not {"temperature", "protocol"} & of_all
    line = "--nb_knn 3 --mixup 0 --ground_truth g --copydays c --epochs 4 --seed 5"
    config = parse(evaluate.config_of_all(), line.split())
    assert (config.nb_knn, config.mixup, config.seed) == ((3,), 0, 5)


# -- one table of tasks


@dataclasses.dataclass
class NewConfig(protocol.Config):
    # -- new
    answer: float = 0.25  # what it says


def run_new(extractor):
    """A task of this test.

    It says what it was told.
    """
    answer = extractor.config.answer
    extractor.process.print(f"new: {answer:.2%}")
    return {"new": answer, "protocol": "none", "headline": {"new figure": answer}}


def test_a_line_in_tasks_is_a_task(small_backbone, tmp_path, monkeypatch, capsys):
    new = SimpleNamespace(Config=NewConfig, run=run_new)
    monkeypatch.setattr(evaluate, "TASKS", {"knn": knn, "new": new})
    line = f"--weights {small_backbone} --data shapes:20"
    results = run_evaluate(f"new {line}", answer=0.5, output_dir=tmp_path)
    assert results["new"] == 0.5 and "new: 50.00%" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["task"] == "new" and written["new"] == 0.5

    line += " --val_data shapes:10:val --nb_knn 1"
    results = run_evaluate(f"all {line}", answer=0.75, output_dir=tmp_path)
    assert results["new"]["new"] == 0.75 and results["headline"]["new figure"] == 0.75
    assert set(results["headline"]) == {"k-NN(1)", "new figure"}
    assert re.search(r"new figure +75.00%", capsys.readouterr().out)

    # What was done before a task fails is there.
    def fail(extractor):
        raise ValueError("--answer: there is none")

    monkeypatch.setattr(new, "run", fail)
    with pytest.raises(SystemExit):
        run_evaluate(f"all {line}", output_dir=tmp_path / "failed")
    assert "--answer: there is none" in capsys.readouterr().err
    written = json.loads((tmp_path / "failed/knn/results.json").read_text())
    assert written["task"] == "knn" and written["knn"] == results["knn"]["knn"]
    assert written["data"] == "shapes:20" and len(written["weights_sha256"]) == 64
    monkeypatch.setattr(new, "run", run_new)

    evaluate.main(["--help"])
    assert re.search(r"(?m)^  new +A task of this test.$", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        evaluate.main(["linear"])
    assert "choose from knn, new, all" in capsys.readouterr().err


# -- misuse


@pytest.mark.parametrize("line, words", [
    ("classify", "choose from knn, "), ("linera", "did you mean linear?"),
    ("knn --weights /none", "no such file"),
    ("knn --weights dino_vits17", "did you mean dino_vits16?"),
    ("knn --weights runs/shapes_dyno", "did you mean runs/shapes_dino?"),
    ("knn --data folder:FLAT --val_data shapes:10:val", "needs labels"),
    ("linear --val_data folder:FLAT", "--val_data folder"), ("knn --nb_knn 0", "--nb_knn"),
    ("knn --n_per_class 3", "smallest class of --data has 2"),
    ("logreg --data shapes:5 --val_data shapes:20:val", "no image of 5 classes"),
    ("knn --val_data folder:PHOTOS", "has classes that --data has not: cats, dogs"),
    ("knn --image_size 4", "--image_size"), ("knn --weights NAN", "no numbers"),
    ("linear --head WEIGHTS", "weight and the bias"), ("linear --head /none", "--head"),
    ("linear --class_mapping /none", "--class_mapping"),
    ("retrieval --groups /none", "--groups"),
    ("retrieval --ground_truth /none", "--ground_truth"),
    ("copies --n_originals 0", "--n_originals"), ("knn --temperature 0", "--temperature 0"),
    ("linear --epochs -1", "--epochs: -1"), ("finetune --batch_size 0", "--batch_size 0"),
    ("finetune --mixup -1", "--mixup: -1"),
    ("finetune --label_smoothing 2", "--label_smoothing 2"),
    ("features --output x.txt", "--output"), ("all --label_smoothing 2", "--label_smoothing 2"),
    ("all --n_tries 0", "--n_tries 0"),
    ("knn --val_data shapes:20", "20 of its 20 images are in --data shapes:20, too"),
    ("knn --val_data shapes:7", "expected others, such as --val_data shapes:20:val"),
    ("copies --val_data shapes:9", "images are in --data shapes:20, too"),
    ("segment --val_data shapes:9", "images are in --data shapes:20, too"),
    ("depth --val_data shapes:9", "images are in --data shapes:20, too"),
    ("linear --test_data shapes:9", "--test_data shapes:9: 9 of its 9 images are in --data")])
def test_misuse(line, words, small_backbone, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run in ("shapes", "shapes_dino", "shapes_ibot"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    not_numbers = {k: v * torch.nan for k, v in torch.load(small_backbone).items()}
    torch.save(not_numbers, tmp_path / "nan.pth")
    for name, path in (("WEIGHTS", small_backbone), ("NAN", tmp_path / "nan.pth"),
                       ("FLAT", photos / "cats"), ("PHOTOS", photos)):
        line = line.replace(name, str(path))
    task, *flags = line.split()
    usual = ["--weights", small_backbone, "--data", "shapes:20", "--num_workers", "0"]
    if task != "features":
        usual += ["--val_data", "shapes:9:val"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([task, *usual, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("evaluations/*/*"))


@pytest.mark.parametrize("line, refused",
                         [("knn --data folder:P", True), ("linear --data FakeData:train", True),
                          ("depth --data pairs:P", True),
                          ("segment --data pairs:P --head h.pt", True),
                          ("copies --data folder:P", True), ("retrieval --data folder:P", True),
                          ("all --data folder:P --copydays C", True),
                          ("copies --data folder:P --copydays C", False),
                          ("retrieval --data folder:P --ground_truth G", False),
                          ("retrieval --data folder:P --groups G", False),
                          ("knn --data folder:P --val_data shapes:val", False),
                          ("knn --data shapes:9", False), ("features --data folder:P", False),
                          ("video --data frames:P", False), ("masks", False)])
def test_drawings_are_not_judged_beside_photographs(line, refused):
    name, config_class, _ = evaluate.choose_task(line.split())
    if not refused:
        evaluate.read_flags(config_class, name, line.split()[1:])
        return
    data = line.split()[2]
    words = f"--val_data is missing beside --data {data}: .*{data.removesuffix(':train')}:val"
    with pytest.raises(UsageError, match=words):
        evaluate.read_flags(config_class, name, line.split()[1:])
