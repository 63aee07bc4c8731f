"""Claims
1. A sweep of 52 probes equals 52 separate runs of torch's SGD (float64), and so do its shares.
2. All probes of a task are trained on the same passes through the network: one for each batch.
   `python -m bench probes` times what they cost beside one.
3. ImageNet-ReaL counts any of an image's labels, and no image without one; a task that trains
   its probes reports it, and refuses a wrong file before it trains.
4. A saved head, judged again, gives its figures; of classes that are absent none is answered,
   by a saved head as little as by the probes of a sweep.
5. --lr, --n_last_blocks and --avgpool_patchtokens narrow the grid; what remains of it ends as
   it does among all probes, and is told with its accuracy among the five best classes.
6. A task that is killed and started again ends as if it had never stopped, and each of two
   processes goes on with its own probes; the training of other probes is not continued.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import Killed, copy_of, finish, run_evaluate, start

from backbones.classifier import Blocks, kinds_of_input
from evaluation import linear
from evaluation.linear import LRS, Probes, real_accuracy, require_real_numbers
from evaluation.unfinished import Unfinished
from machinery.flags import UsageError
from machinery.process import start_process
from machinery.read_once import leaves


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(6, 20, dtype=torch.float64, generator=generator) for _ in range(5)]
    labels = [torch.randint(0, 3, (6,), generator=generator) for _ in range(5)]
    return list(zip(rows, labels))


def test_sweep_equals_separate_runs(batches):
    kinds = kinds_of_input(4, (1, 4), (False, True))
    sweep = Probes(kinds, 3, LRS, dtype=torch.float64)
    shares = [Probes(kinds, 3, LRS[r::5], dtype=torch.float64) for r in range(5)]
    start = {kind: sweep.head(kind, LRS[0]) for kind in kinds}
    for i, (rows, labels) in enumerate(batches):
        for probes in (sweep, *shares):
            probes.step(rows, labels, 40 /
                        (1 + i))  # a factor that makes the largest rate matter
    largest_change = 0.0
    for kind, columns in kinds.items():
        for j, lr in enumerate(LRS):
            alone = torch.nn.Linear(columns.stop - columns.start, 3).double()
            alone.load_state_dict(start[kind])
            optimizer = torch.optim.SGD(alone.parameters(), lr=0.0, momentum=0.9)
            for i, (rows, labels) in enumerate(batches):
                optimizer.param_groups[0]["lr"] = lr * 40 / (1 + i)
                optimizer.zero_grad()
                F.cross_entropy(alone(rows[:, columns]), labels).backward()
                optimizer.step()
            for probes in (sweep, shares[j % 5]):
                head = probes.head(kind, lr)
                # sums in another order
                for key, value in alone.state_dict().items():
                    torch.testing.assert_close(head[key], value, rtol=1e-10, atol=1e-12)
                predicted = probes.predict(batches[0][0], chunk=4)[kind, lr]
                assert torch.equal(predicted[:, 0], alone(batches[0][0][:, columns]).argmax(1))
            change = (alone.weight.data - start[kind]["weight"]).abs().max().item()
            largest_change = max(largest_change, change)
    assert largest_change > 0.1


def test_one_pass_serves_all_probes(small_backbone, tmp_path, monkeypatch):
    sizes = []
    forward = Blocks.forward

    def counted(self, images):
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Blocks, "forward", counted)
    line = f"linear --weights {small_backbone} --data shapes:20 --val_data shapes:8:val "
    results = run_evaluate(line + "--epochs 2 --batch_size 10", output_dir=tmp_path)
    assert len(results["probes"]) == 52
    assert sizes == [8, 10, 10, 10, 10]  # --val_data once, and two steps in each of two epochs


def test_real_labels(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[1, 2], [], [0]]))
    names = [f"a/ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 1, 2)]
    assert real_accuracy(torch.tensor([1, 2, 0]), names, str(tmp_path / "real.json")) == 0.5
    with pytest.raises(ValueError, match="--real_labels"):
        real_accuracy(torch.tensor([1]), ["cat.jpg"], str(tmp_path / "real.json"))
    for text, words in (('{"3": [1, 2]}', "and not a dict"), ("5", "and not a int"),
                        ("[1, 2, 3]", "int"), ("labels", "Expecting value")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=f"--real_labels .*expected real.json.*{words}"):
            real_accuracy(torch.tensor([1, 2, 0]), names, str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="--real_labels .*none of these images has a label"):
        real_accuracy(torch.tensor([1]), names[2:], str(tmp_path / "real.json"))


def test_real_labels_count_otherwise(tmp_path):
    """Of 4 of the 1,000 classes a folder counts 0 to 3, where real.json has their old numbers."""
    (tmp_path / "real.json").write_text(json.dumps([[31], [7, 8], [500], [2]]))
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3, 4)]
    require_real_numbers(torch.tensor([31, 8, 1, 2]), names, str(tmp_path / "real.json"))
    with pytest.raises(UsageError, match="--real_labels .*25.0% of the images.*WordNet ids"):
        require_real_numbers(torch.tensor([0, 1, 3, 2]), names, str(tmp_path / "real.json"))


def test_real_labels_of_trained_probes(small_backbone, photos, tmp_path, capsys):
    truth = []
    for i, file in enumerate(sorted(photos.glob("*/*"))):
        folder = tmp_path / "val" / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"ILSVRC2012_val_{i + 1:08d}{file.suffix}")
        truth.append([0, 1])  # either answer is right
    (tmp_path / "real.json").write_text(json.dumps(truth))
    line = f"linear --weights {small_backbone} --data folder:{photos} --epochs 1 --lr 0.1"
    flags = dict(real_labels=tmp_path / "real.json", output_dir=tmp_path)
    results = run_evaluate(line, **flags, val_data=f"folder:{tmp_path / 'val'}")
    assert results["linear"]["real"] == 1.0 and "real 100.00%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        # These are not ImageNet's names.
        run_evaluate(line, **flags, val_data=f"folder:{copy_of(photos)}")
    error = capsys.readouterr().err
    assert "--real_labels" in error and "probes" not in error


def test_saved_head(small_backbone, photos, tmp_path, capsys):
    line = f"linear --weights {small_backbone} --data folder:{photos} --epochs 2"
    flags = dict(val_data=f"folder:{copy_of(photos)}", output_dir=tmp_path)
    trained = run_evaluate(line, **flags)
    with_head = flags | {"head": tmp_path / "head.pt"}
    judged_again = run_evaluate(line, **with_head)
    for key in ("top1", "mean_per_class"):
        assert judged_again["linear"][key] == trained["linear"][key]
    tested = run_evaluate(line, **flags, test_data=f"folder:{copy_of(photos)}")
    assert tested["test"]["top1"] == tested["linear"]["top1"]
    assert run_evaluate(line, **with_head, test_data=f"folder:{photos}")["test"] == {
        key: value
        for key, value in judged_again["linear"].items()}
    state = torch.load(tmp_path / "head.pt")
    state["bias"] += torch.tensor([0.0, 100.0])  # it now answers dog, whatever it is shown
    torch.save(state, tmp_path / "head.pt")
    assert run_evaluate(line, **with_head)["linear"]["top1"] == 0.5
    for name in ("katzen", "kater"):  # other names, and no dog among them
        shutil.copytree(photos / "cats", tmp_path / "german" / name)
    (tmp_path / "map.csv").write_text("katzen, cats\nkater, cats\n")
    with_head["val_data"] = f"folder:{tmp_path / 'german'}"
    mapped = run_evaluate(line, **with_head, class_mapping=tmp_path / "map.csv")
    assert mapped["linear"]["top1"] == 1

    # A head of other classes would answer in numbers that mean something else here.
    state = {name: torch.cat([values, values]) for name, values in state.items()}
    torch.save(state, tmp_path / "head.pt")
    with pytest.raises(SystemExit):
        run_evaluate(line, **flags, head=tmp_path / "head.pt")
    assert "knows 4 classes, --data has 2" in capsys.readouterr().err


def test_absent_classes_do_not_compete(small_backbone, photos, tmp_path):
    """The judged images have no dog, and their cats and birds are the same pictures."""
    shutil.copytree(photos / "cats", photos / "birds")
    for name in ("cats", "birds"):
        shutil.copytree(photos / "dogs", tmp_path / "val" / name)
    line = f"linear --weights {small_backbone} --data folder:{photos} --epochs 1 --lr 0.1"
    flags = dict(val_data=f"folder:{tmp_path / 'val'}", output_dir=tmp_path)
    trained = run_evaluate(line, **flags)
    for figures in trained["probes"].values():
        assert figures["top1"] == 0.5  # the dogs' pictures are named cats or birds, not dogs
    again = run_evaluate(line, **flags, head=tmp_path / "head.pt")
    assert again["linear"]["top1"] == 0.5


# -- a part of the grid, and a training that goes on

SWEEP = "linear --data shapes:40 --val_data shapes:20:val --batch_size 10 --epochs 3"


@pytest.mark.parametrize("flags, count, chosen", [
    ("--lr 0.01", 4, {"lr": 0.01}), ("--n_last_blocks 2", 26, {"blocks": 2}),
    ("--avgpool_patchtokens", 26, {"avgpool": True}),
    ("--n_last_blocks 4 --no_avgpool_patchtokens --lr 0.001", 1, {
        "blocks": 4, "avgpool": False, "lr": 0.001}),
    ("--protocol dino --lr 0.3", 1, {"blocks": 4, "avgpool": False, "lr": 0.3})])
def test_flags_narrow_the_grid(flags, count, chosen, small_backbone, tmp_path):
    line = f"{SWEEP} --epochs 1 --weights {small_backbone} {flags}"
    results = run_evaluate(line, output_dir=tmp_path, test_data="shapes:20:val")
    assert len(results["probes"]) == count
    for name, value in chosen.items():
        assert results["linear"][name] == value
    assert results["linear"]["top1"] <= results["linear"]["top5"] <= 1
    assert results["test"]["top1"] == results["linear"]["top1"]  # read from the same tokens
    if chosen.get("blocks") == 2:  # of its columns alone nobody could tell
        pool = "--avgpool_patchtokens true" if results["linear"]["avgpool"] else ""
        again = run_evaluate(f"{line} {pool}", head=tmp_path / "head.pt", output_dir=tmp_path)
        assert again["linear"]["top1"] == results["linear"]["top1"]


def test_a_part_of_the_grid_ends_as_in_the_whole(small_backbone, tmp_path):
    line = f"{SWEEP} --epochs 1 --weights {small_backbone}"
    whole = run_evaluate(line, output_dir=tmp_path)["probes"]
    part = run_evaluate(f"{line} --n_last_blocks 4 --lr 0.1", output_dir=tmp_path)["probes"]
    assert part == {name: whole[name] for name in part} and len(part) == 2


def test_images_of_test_data_are_opened_before_the_training(small_backbone, photos, tmp_path,
                                                            monkeypatch, capsys):
    monkeypatch.setattr(linear, "sweep", lambda *_: pytest.fail("the probes were trained"))
    line = f"linear --weights {small_backbone} --data folder:{photos}"
    flags = dict(val_data=f"folder:{copy_of(photos)}", output_dir=tmp_path / "out")
    for name in ("cats", "zebras"):
        shutil.copytree(photos / "cats", tmp_path / "other" / name)
    for test_data, words in ((f"folder:{tmp_path}/typo", "--test_data"),
                             (f"folder:{tmp_path}/other", "--test_data has classes that --data "
                              "has not: zebras")):
        with pytest.raises(SystemExit):
            run_evaluate(line, **flags, test_data=test_data)
        assert words in capsys.readouterr().err


def test_numbers_that_a_released_head_counts_otherwise(small_backbone, photos, tmp_path,
                                                       monkeypatch, capsys):
    """Folders 0 to 10 are sorted as 0, 1, 10, 2; with zeros in front they are in order."""
    photo = sorted(photos.rglob("*.*"))[0]
    head = {"weight": torch.zeros(11, 64), "bias": torch.zeros(11)}
    monkeypatch.setattr("evaluation.linear.open_head", lambda what: head)
    for width in (1, 2):
        for name in ("train", "val"):
            for c in range(11):
                folder = tmp_path / str(width) / name / f"{c:0{width}d}"
                folder.mkdir(parents=True)
                shutil.copy(photo, folder)
        line = (f"linear --weights {small_backbone} --data folder:{tmp_path}/{width}:train "
                f"--val_data folder:{tmp_path}/{width}:val")
        if width == 2:
            run_evaluate(line, head="some_lc", output_dir=tmp_path)
        else:
            with pytest.raises(SystemExit):
                run_evaluate(line, head="some_lc", output_dir=tmp_path)
            assert "letters (0, 1, 10 ...)" in capsys.readouterr().err


def test_what_a_head_reads_is_told_by_both_flags_or_by_none(small_backbone, tmp_path, capsys):
    line = f"{SWEEP} --epochs 1 --lr 0.1 --weights {small_backbone} --n_last_blocks 1"
    run_evaluate(line, output_dir=tmp_path)
    line = f"{SWEEP} --weights {small_backbone} --head {tmp_path}/head.pt"
    with pytest.raises(SystemExit):
        run_evaluate(f"{line} --no_avgpool_patchtokens", output_dir=tmp_path)
    assert "only together with --n_last_blocks" in capsys.readouterr().err


def test_more_blocks_than_there_are(small_backbone, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_evaluate(f"{SWEEP} --weights {small_backbone} --n_last_blocks 5",
                     output_dir=tmp_path)
    assert "--n_last_blocks 5: the network has 4" in capsys.readouterr().err


def two_ranks(rank, folder):
    """Three learning rates on two processes: each goes on with the probes that it had."""
    process = start_process("cpu")
    kinds = kinds_of_input(4, (1,), (False,))
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    lrs = (0.1, 0.01, 0.001)[rank::2]
    trained, again = Probes(kinds, 3, lrs), Probes(kinds, 3, lrs)
    trained.step(rows, torch.arange(6) % 3)
    config = SimpleNamespace(output_dir=folder, precision="fp32", seed=0)
    extractor = SimpleNamespace(config=config, process=process, sha256="0" * 64, network="")
    unfinished = Unfinished(extractor, "linear", {}, True)
    unfinished.save(7, trained.state())
    assert unfinished.restore(again.state, own=True) == 7
    old, new = leaves(trained.state()), leaves(again.state())
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert old[0].abs().sum() > 0


def test_two_processes_go_on(tmp_path):
    finish(start(two_ranks, str(tmp_path)))


def test_killed_and_started_again(small_backbone, tmp_path, monkeypatch, capsys):
    line = f"{SWEEP} --weights {small_backbone} --n_last_blocks 1"
    reference = run_evaluate(line, output_dir=tmp_path / "whole")
    steps = []
    step = Probes.step

    def dies(self, *args):
        steps.append(1)
        if len(steps) == 11:  # the third step of the third pass of four
            raise Killed
        step(self, *args)

    monkeypatch.setattr(Probes, "step", dies)
    with pytest.raises(Killed):
        run_evaluate(line, output_dir=tmp_path / "killed")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_evaluate(f"{line} --lr 0.1", output_dir=tmp_path / "killed")
    error = capsys.readouterr().err
    assert "unfinished training with other lr" in error and "--no_resume" in error

    # The same images with other labels are another training.
    opened = linear.open_labelled
    with monkeypatch.context() as patched:
        patched.setattr(
            linear, "open_labelled",
            lambda extractor: replace(opened(extractor), labels=opened(extractor).labels[::-1]))
        with pytest.raises(SystemExit):
            run_evaluate(line, output_dir=tmp_path / "killed")
    assert "unfinished training with other labels" in capsys.readouterr().err
    shutil.copytree(tmp_path / "killed", tmp_path / "anew")
    resumed = run_evaluate(line, output_dir=tmp_path / "killed")
    assert len(steps) == 11 + 4 and "continuing from step 8" in capsys.readouterr().out
    for name in set(reference) - {"minutes"}:
        assert resumed[name] == reference[name], name
    heads = [torch.load(tmp_path / name / "head.pt") for name in ("whole", "killed")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])

    # Once it has ended, nothing is left to be continued: the same command starts anew.
    assert not list(tmp_path.glob("killed/linear-checkpoint-*"))
    assert len(list(tmp_path.glob("anew/linear-checkpoint-*"))) == 1
    run_evaluate(f"{line} --lr 0.1 --no_resume", output_dir=tmp_path / "anew")
    assert len(steps) == 11 + 4 + 12
