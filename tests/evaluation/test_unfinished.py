"""Claims
1. A head for segmentation or depth, or a fine-tuned network, whose training was killed ends as one
   that was not, bit for bit. Afterwards nothing is left to be continued.
2. Other settings are refused by the name of what differs; --no_resume starts anew. Of two networks
   that are judged in one folder each keeps its own. (Linear probes: test_linear.py.)
3. A network or a head whose answers are no numbers is refused by every protocol of pixels.
"""

import pytest
import torch
from conftest import Killed, run_evaluate

from evaluation.unfinished import Unfinished

PIXELS = "--data shapes:8 --val_data shapes:3:val --image_size 16"
LINES = {
    "segment": f"segment {PIXELS} --head_batch 4 --steps 5",
    "depth": f"depth {PIXELS} --head_batch 4 --steps 5 --depth_head linear4",
    "finetune": "finetune --data shapes:20 --val_data shapes:8:val --batch_size 10 --epochs 3"}
FILES = {"segment": "head.pt", "depth": "head.pt", "finetune": "model.pt"}


def tensors(path):
    state = torch.load(path)
    return state.get("state_dict", state)


@pytest.mark.parametrize("task", LINES)
def test_killed_and_started_again(task, small_backbone, tmp_path, monkeypatch, capsys):
    for module in ("segment", "depth"):
        monkeypatch.setattr(f"evaluation.{module}.SAVE_EVERY", 2)
    line = f"{LINES[task]} --weights {small_backbone} --num_workers 0"
    reference = run_evaluate(line, output_dir=tmp_path / "whole")
    assert sorted(file.name for file in (tmp_path / "whole").iterdir() if file.is_dir()) == []

    # The second save is the last deed of the first attempt.
    save, steps = Unfinished.save, []

    def dies(self, step, state):
        save(self, step, state)
        steps.append(step)
        if len(steps) == 2:
            raise Killed

    monkeypatch.setattr(Unfinished, "save", dies)
    with pytest.raises(Killed):
        run_evaluate(line, output_dir=tmp_path / "killed")
    assert steps == [2, 4]
    flag = "--seed 7" if task == "finetune" else "--head_lr 0.5"
    with pytest.raises(SystemExit):
        run_evaluate(f"{line} {flag}", output_dir=tmp_path / "killed")
    error = capsys.readouterr().err
    assert f"unfinished training with other {flag.split()[0][2:]}" in error
    assert "--no_resume" in error

    # The network of other weights has a checkpoint of its own.
    other = torch.load(small_backbone)
    other["norm.bias"] = other["norm.bias"] + 1
    torch.save(other, tmp_path / "other.pth")
    run_evaluate(line.replace(small_backbone, str(tmp_path / "other.pth")),
                 output_dir=tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob(f"{task}-checkpoint-*"))) == 1
    assert "continuing" not in capsys.readouterr().out

    resumed = run_evaluate(line, output_dir=tmp_path / "killed")
    assert f"{task}: continuing from step 4" in capsys.readouterr().out
    for name in set(reference) - {"minutes"}:
        assert resumed[name] == reference[name], name
    first, second = (tensors(tmp_path / name / FILES[task]) for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list((tmp_path / "killed").glob("*-checkpoint-*"))


def test_no_resume(small_backbone, tmp_path, monkeypatch, capsys):
    line = f"{LINES['segment']} --weights {small_backbone} --num_workers 0"
    monkeypatch.setattr("evaluation.segment.SAVE_EVERY", 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Unfinished, "remove", lambda self: raises(Killed))  # after the last step
        run_evaluate(line, output_dir=tmp_path)
    assert len(list(tmp_path.glob("segment-checkpoint-*/step-4"))) == 1
    run_evaluate(f"{line} --head_lr 0.5 --no_resume", output_dir=tmp_path)
    assert "continuing" not in capsys.readouterr().out
    assert not list(tmp_path.glob("segment-checkpoint-*"))


def raises(error):
    raise error


@pytest.mark.parametrize("task", ["segment", "depth", "patches", "masks"])
def test_answers_that_are_no_numbers(task, small_backbone, tmp_path, capsys):
    state = torch.load(small_backbone)
    state["blocks.2.mlp.fc2.bias"][0] = float("nan")
    torch.save(state, tmp_path / "broken.pth")
    steps = "--steps 1" if task in ("segment", "depth") else ""
    data = PIXELS if task != "masks" else "--val_data shapes:3:val --image_size 16"
    with pytest.raises(SystemExit):
        run_evaluate(f"{task} --weights {tmp_path}/broken.pth {data} {steps}",
                     output_dir=tmp_path)
    error = capsys.readouterr().err
    assert "--weights" in error and "answers that are no numbers" in error


def test_a_head_that_went_astray(small_backbone, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_evaluate(f"segment --weights {small_backbone} {PIXELS} --steps 4 --head_lr 2e9",
                     output_dir=tmp_path)
    assert "or a head of --head_lr 2e+09: it gives answers" in capsys.readouterr().err
