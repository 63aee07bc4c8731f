"""Claims
1. One step equals DINO's Alg. 1 written out line by line: loss, gradients, teacher, centre; and
   one step equals DINOv2's three losses written out image by image (float32).
2. Killed anywhere, or asked to stop, and run again: the same weights, bit for bit; also
   before, at and after a switch of --curriculum, which gives each step the crops and masks of
   its stage. Whoever is asked to stop when a judge is due asks the judge when it goes on.
3. A step that is not finite stops the run, names step and images, and the checkpoint stays
   good. With fp16, a step that overflows is left out and the run goes on, bit for bit when
   resumed.
4. Activation checkpointing changes no weight. Compiled, a run gives the same weights to
   rounding, without a new graph after the first step. With --curriculum each stage has the
   graphs of a run at its sizes.
5. Each ingredient can be left out by a flag: its term, and whatever only that term needs.
6. Bad input is one line that names the flag, exit code 2, and leaves no run directory behind.
   A loader process that is killed ends a run with one such line.
7. The algorithm fits on one screen.
"""

import ast
import contextlib
import copy
import functools
import inspect
import io
import math
import multiprocessing
import os
import shutil
import signal
import tokenize
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import (EVERYTHING, TINY, killed_in_step, metrics_of, same_tensors, saved, start,
                      teacher_of, tiny_config, views_of, without_figures)

import augment
import losses
import train
from augment import Masking, MultiCrop, collate
from images.data import Views
from machinery.flags import UsageError
from machinery.process import Process
from training.check import check
from training.optim import OPTIMIZERS, parameter_groups

pytestmark = pytest.mark.usefixtures("quick_runs")

PROCESS = Process(torch.device("cpu"))

# ----------------------------------------------------------------------------------------------
# One step, against the papers


def learner_of(config, distance):
    """A Learner whose teacher is apart from the student, as in the middle of training."""
    student, teacher = train.build(config, PROCESS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(distance * torch.randn(p.shape, generator=generator))
    optimizer = OPTIMIZERS["adamw"](parameter_groups(student))
    return train.Learner(student, teacher, train.build_centerings(config), optimizer)


def batch_of_six(config, masking=None):
    """Six images, each with two large views of 24 pixels and two small ones of 16."""
    images, _ = train.open_data(config)
    views = Views(images, MultiCrop(24, 16, 2, 2), seed=0)
    return collate([views[0, 0, i] for i in range(6)], masking)


def test_a_step_is_algorithm_1(tmp_path):
    """DINO Alg. 1 as it is printed: one forward pass a view, one loss a pair of views.

    Each numbered paragraph begins with the line of the algorithm that it does; gs, gt, C, tps
    and tpt are the letters of the paper: networks, centre and temperatures. Two small views
    come on top, as in DINO's eq. 3: the student alone sees them.
    """
    config = tiny_config(tmp_path, "--drop_path_rate", "0", "--clip_grad", "0",
                         "--center_momentum", "0.9")
    learner = learner_of(config, distance=0.01)
    centering = learner.centerings["dino"]
    centering.center.copy_(0.1 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
    gs, gt = copy.deepcopy((learner.student, learner.teacher))  # as they are before the step
    C = centering.center.clone()
    tps, tpt = 0.1, 0.05
    momentum = 0.9  # of the teacher and, by the flag above, of the centre
    schedule = dict(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1, momentum=momentum,
                    teacher_temp=tpt, generator=None)
    batch = batch_of_six(config)

    # What the program does with this batch.
    figures = train.train_step(learner, batch, schedule, config, PROCESS)

    # 1. "x1, x2 = augment(x), augment(x)  # random views": both large, and two small ones.
    views = views_of(batch)

    # 2. "s1, s2 = gs(x1), gs(x2)  # student output n-by-K"
    student_out = [gs.dino_head(gs.backbone(view)) for view in views]

    # 3. "t1, t2 = gt(x1), gt(x2)  # teacher output n-by-K", and later "t = t.detach()"
    with torch.no_grad():
        teacher_out = [gt.dino_head(gt.backbone(view)) for view in views[:2]]

    # 4. "def H(t, s):"
    def H(t, s):
        t = F.softmax((t - C) / tpt, dim=1)  # center + sharpen
        return -(t * F.log_softmax(s / tps, dim=1)).sum(dim=1).mean()

    # 5. "loss = H(t1, s2)/2 + H(t2, s1)/2", in DINO eq. 3 the mean over all pairs of
    # different views: each of the two teacher views meets the three student views that are
    # not itself.
    pairs = [H(teacher_out[i], student_out[v]) for i in range(2) for v in range(4) if v != i]
    assert len(pairs) == 6
    loss = sum(pairs) / len(pairs)
    torch.testing.assert_close(figures["loss"], loss.detach(), rtol=1e-5, atol=1e-5)

    # 6. "loss.backward()  # back-propagate"
    loss.backward()
    for (name, p), q in zip(learner.student.named_parameters(), gs.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)

    # 7. "update(gs)": of the optimiser, which tests/training/test_optim.py is about. AdamW's
    # first step is the sign of the gradient, so it would make a difference of rounding a whole
    # step: from here on the program's own student is taken.
    updated = learner.student

    # 8. "gt.params = l*gt.params + (1-l)*gs.params"
    for p_t, p_s, p in zip(gt.parameters(), updated.parameters(), learner.teacher.parameters()):
        expected = momentum * p_t + (1 - momentum) * p_s
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)

    # 9. "C = m*C + (1-m)*cat([t1, t2]).mean(dim=0)": the loss of this step knew the old centre.
    C = momentum * C + (1 - momentum) * torch.cat(teacher_out).mean(dim=0)
    torch.testing.assert_close(centering.center, C)


CLS, PATCHES = "x_norm_clstoken", "x_norm_patchtokens"


@pytest.mark.parametrize("separate", [False, True])
def test_a_step_of_dinov2(separate, tmp_path):
    """The three losses of DINOv2 sec. 4, image by image and view by view.

    iBOT Alg. 1 is the frame: the student sees masked crops and the teacher whole ones. Each
    numbered paragraph begins with the line of that algorithm, or the heading in DINOv2
    sec. 4, that it does. Learning rate and momentum are such that neither network moves in this
    step, so that both can be asked again afterwards.
    """
    flags = f"--separate_head {separate} --drop_path_rate 0 --clip_grad 0 --mask_ratio 0.2 0.7"
    config = tiny_config(tmp_path, *EVERYTHING, *flags.split())
    learner = learner_of(config, distance=0.02)
    student, teacher = learner.student, learner.teacher
    teacher_temp, student_temp = 0.05, 0.1
    schedule = dict(lr=0.0, last_layer_lr=0.0, weight_decay=0.0, momentum=1.0,
                    teacher_temp=teacher_temp, generator=None)
    batch = batch_of_six(config, Masking((3, 3), (0.2, 0.7)))

    # What the program does with this batch.
    figures = train.train_step(learner, batch, schedule, config, PROCESS)
    gradients = [p.grad.clone() for p in student.parameters() if p.requires_grad]
    learner.optimizer.zero_grad()

    # 1. iBOT, views and their block-wise masks: two large views of each image, of 9 patches
    # each; either of them may have no mask.
    views = views_of(batch)
    masks = batch["masks"].view(2, 6, 9)
    hidden_in_crop = masks.sum(-1).flatten()  # (2 * 6,), view by view
    assert 0 < (hidden_in_crop > 0).sum() < 12

    # 2. iBOT, all tokens of student and teacher: the student sees the masked crops, the teacher
    # the whole ones. Small views (multi-crop) are the student's alone and not masked.
    teacher_out = [teacher.backbone.forward_features(view) for view in views[:2]]
    student_out = [
        student.backbone.forward_features(view, masks[v] if v < 2 else None)
        for v, view in enumerate(views)]

    # 3. DINOv2, "Sinkhorn-Knopp centering": three iterations on all rows of one objective.
    def targets_of(logits):
        Q = (logits / teacher_temp).exp()
        for _ in range(3):
            Q = Q / Q.sum(0, keepdim=True)  # every prototype gets the same share
            Q = Q / Q.sum(1, keepdim=True)  # every row is a distribution
        return Q

    def log_probabilities(logits):
        return F.log_softmax(logits / student_temp, dim=-1)

    # 4. DINOv2, "Image-level objective": DINO's loss of the class tokens, over all pairs of a
    # teacher view and another student view.
    teacher_logits = torch.cat([teacher.dino_head(out[CLS]) for out in teacher_out])
    q = targets_of(teacher_logits).view(2, 6, -1)
    log_p = [log_probabilities(student.dino_head(out[CLS])) for out in student_out]
    pairs = [-(q[i] * log_p[v]).sum(-1).mean() for i in range(2) for v in range(4) if v != i]
    dino = sum(pairs) / len(pairs)

    # 5. DINOv2, "Untying head weights between both objectives": patches have a head of their
    # own, or share that of the class tokens, as in iBOT.
    teacher_head, student_head = (network.ibot_head if separate else network.dino_head
                                  for network in (teacher, student))

    # 6. DINOv2, "Patch-level objective"; iBOT, the loss of the patches: those at the same place
    # of the same view, only where the student's is masked. A crop's loss is the mean over its
    # masked patches, 0 without any; the loss is the mean over all 12 crops.
    def masked_patches(outs):
        return torch.cat([out[PATCHES][mask] for out, mask in zip(outs, masks)])

    q = targets_of(teacher_head(masked_patches(teacher_out)))
    log_p = log_probabilities(student_head(masked_patches(student_out)))
    loss_of_patch = -(q * log_p).sum(-1)
    loss_of_crop = [x.mean() for x in loss_of_patch.split(hidden_in_crop.tolist()) if len(x)]
    ibot = sum(loss_of_crop) / 12

    # 7. DINOv2, "KoLeo regularizer": -1/n * sum of log(distance to the nearest other image), of
    # l2-normalised class tokens; for each large view by itself, summed.
    koleo = 0.0
    for out in student_out[:2]:
        unit = F.normalize(out[CLS], dim=-1)
        not_itself = 9 * torch.eye(6)  # puts an image far away from itself
        distances = torch.cdist(unit, unit) + not_itself
        koleo = koleo - distances.amin(1).log().mean()

    # 8. iBOT, the sum of both losses and its gradient; KoLeo has the weight 0.1. The tolerance
    # is that of float32 and of Sinkhorn-Knopp's exponents.
    loss = dino + ibot + 0.1 * koleo
    torch.testing.assert_close(figures["loss"], loss.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(figures["dino"], dino.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(figures["koleo"], koleo.detach(), rtol=1e-3, atol=1e-3)
    shown = sum(loss_of_crop) / len(loss_of_crop)  # the log tells the mean over masked crops
    torch.testing.assert_close(figures["ibot"], shown.detach(), rtol=1e-4, atol=1e-4)
    loss.backward()
    learned = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    for gradient, (name, p) in zip(gradients, learned, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-2, atol=1e-4, msg=name)


# ----------------------------------------------------------------------------------------------
# A run goes on where it was


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with without_figures():
        train.run(tiny_config(run))
    return run


@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_and_resumed_equals_uninterrupted(workers, whole, tmp_path):
    broken = tmp_path / "broken"
    config = tiny_config(broken, "--num_workers", workers)
    with killed_in_step(11):  # the last save was after step 8
        train.run(config)
    train.run(config)
    assert same_tensors(teacher_of(whole), teacher_of(broken))
    states = [saved(run / "checkpoint")[1] for run in (whole, broken)]
    assert any(key.startswith("optimizer.") for key in states[0]) and same_tensors(*states)
    logged = [[(row["step"], row.get("loss")) for row in metrics_of(run)]
              for run in (whole, broken)]
    assert logged[0] == logged[1]


# Random masks are single patches, and no rectangles; without the DINO loss no local crops are cut.
@pytest.mark.parametrize("flags", [
    "--global_crops_size 16 --ibot_weight 1 --mask_shape random",
    "--dino_weight 0 --ibot_weight 1 --local_crops_size 4"])
def test_settings_that_are_not_used_are_not_refused(flags, tmp_path):
    check(tiny_config(tmp_path, *flags.split()))


def test_a_finished_run_without_its_checkpoints_stays_as_it_is(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint")
    train.run(tiny_config(tmp_path / "run"))
    for name in ("metrics.jsonl", "teacher.pt", "summary.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_resumed_in_bfloat16(tmp_path):
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    flags = "--precision bf16 --epochs 1 --save_every 4".split()
    train.run(tiny_config(whole, *flags))
    with killed_in_step(7):  # the last save was after step 4
        train.run(tiny_config(broken, *flags))
    train.run(tiny_config(broken, *flags))
    assert same_tensors(teacher_of(whole), teacher_of(broken))


CURRICULUM = "--curriculum 0.6 0.5 --ibot_weight 1 --mask_min_patches 1 --save_every 2 --epochs 1"


def test_resumed_across_a_switch(tmp_path, monkeypatch):
    """Crops grow from 16 to 24 pixels after round(0.6 * 8) = 5 of 8 steps."""
    sizes = []
    train_step = train.train_step

    def watched(learner, batch, *args):
        sizes.append((batch["global_crops"].shape[-1], batch["masks"].shape[-1]))
        return train_step(learner, batch, *args)

    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", watched)
        train.run(tiny_config(whole, *CURRICULUM.split()))

    # Masks are for the patches of the stage: 2 x 2 or 3 x 3 of 8 pixels each.
    assert sizes == 5 * [(16, 4)] + 3 * [(24, 9)]

    # Each time it does three steps, of which the last is lost. So it goes on with step 2 (before
    # the switch), 4 (just before it) and 6 (after it).
    broken = tmp_path / "broken"
    for step in (2, 4, 6):
        with killed_in_step(4):
            train.run(tiny_config(broken, *CURRICULUM.split()))
        assert saved(broken / "checkpoint")[0] == step
    train.run(tiny_config(broken, *CURRICULUM.split()))
    assert same_tensors(*(saved(run / "checkpoint")[1] for run in (whole, broken)))


# After step 8, the last one of the first epoch, the judge would be asked.
@pytest.mark.parametrize("number, step", [(signal.SIGTERM, 11), (signal.SIGINT, 8),
                                          (signal.SIGHUP, 3)])
def test_asked_to_stop_it_saves_and_goes(number, step, whole, terminal, tmp_path, monkeypatch,
                                         capsys):
    run = tmp_path / "run"
    config = tiny_config(run, "--num_workers", "1")
    train_step, calls = train.train_step, []
    handler = signal.getsignal(number)

    def signalled(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", signalled)
    with pytest.raises(SystemExit) as stop:
        train.run(config)
    assert stop.value.code == 128 + number
    assert f"{number.name}: stopped after step {step}" in capsys.readouterr().out
    assert saved(run / "checkpoint")[0] == step
    assert signal.getsignal(number) is handler
    train.run(config)
    assert same_tensors(teacher_of(whole), teacher_of(run))
    judged = [[row for row in metrics_of(folder) if "knn" in row] for folder in (whole, run)]
    assert judged[0] == judged[1] and [row["step"] for row in judged[1]] == [0, 8, 16]


def lose_a_worker(rank, folder):
    """A run whose loader process is killed in its first step; what it says is in a file."""
    train_step = train.train_step

    def kills(*args):
        multiprocessing.active_children()[0].kill()
        return train_step(*args)

    with open(f"{folder}/stderr", "w") as file, contextlib.redirect_stderr(file):
        with patch.object(train, "train_step", kills):
            train.main([*TINY, "--num_workers", "1", "--output_dir", f"{folder}/run"])


def test_a_worker_that_is_killed(tmp_path):
    # In a process of its own: PyTorch raises its error wherever the program is when the system
    # tells of the killed process, which may be after the end of the run.
    (process,) = start(lose_a_worker, str(tmp_path), world=1)
    process.join()
    assert process.exitcode == 2
    error = (tmp_path / "stderr").read_text()
    assert error.startswith("error: DataLoader worker") and error.count("\n") == 1
    assert "--num_workers" in error


# ----------------------------------------------------------------------------------------------
# Precision, memory, compilation


def test_a_step_that_is_not_finite(tmp_path, monkeypatch):
    view_pair_loss, calls = train.view_pair_loss, []

    def breaks(*args):
        calls.append(1)
        return view_pair_loss(*args) * (float("nan") if len(calls) == 11 else 1.0)

    monkeypatch.setattr(train, "view_pair_loss", breaks)
    with pytest.raises(UsageError, match="step 10: the loss .dino. is not finite.*train-0"):
        train.run(tiny_config(tmp_path / "run"))
    step, state = saved(tmp_path / "run/checkpoint")
    assert step == 8 and all(value.isfinite().all() for value in state.values())

    # The same run goes on without that step: the third call of it is step 10 again.
    del calls[:8]
    train.run(tiny_config(tmp_path / "run", "--nonfinite_steps", "1"))
    step, state = saved(tmp_path / "run/checkpoint")
    assert step == 16 and all(value.isfinite().all() for value in state.values())


def test_fp16_leaves_out_what_overflows(tmp_path, monkeypatch):
    """Gradients are large at the start, so the scale is set to 16 in the first step; in the
    third one to 2**60, which no gradient bears.
    """
    flags = "--precision fp16 --epochs 1 --save_every 4 --data shapes:32 --batch_size_per_gpu 4"
    train_step = train.train_step

    def watched(calls, learner, *args):
        calls.append(1)
        scale = learner.scaler.scale
        if len(calls) == 1:
            scale.fill_(16)
        if len(calls) == 3:
            scale.fill_(2.0**60)
        figures = train_step(learner, *args)
        assert figures["ok"]
        if len(calls) == 3:
            assert not figures["grad_norm"] and scale == 2.0**59
            scale.fill_(16)
        return figures

    for name in ("whole", "broken"):
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", functools.partial(watched, []))
            with killed_in_step(7) if name == "broken" else contextlib.nullcontext():
                train.run(tiny_config(tmp_path / name, *flags.split()))
    train.run(tiny_config(tmp_path / "broken", *flags.split()))
    states = [saved(tmp_path / name / "checkpoint")[1] for name in ("whole", "broken")]
    assert states[0]["scaler.scale"] == 16 and states[0]["scaler.good"] == 5
    assert same_tensors(*states)


def test_activation_checkpointing_changes_no_weight(tmp_path):
    for wanted in ("false", "true"):
        flags = ["--activation_checkpointing", wanted, "--epochs", "1"]
        train.run(tiny_config(tmp_path / wanted, *flags))
    assert same_tensors(teacher_of(tmp_path / "false"), teacher_of(tmp_path / "true"))


def counted_graphs(patch, backend="aot_eager") -> list[int]:
    """Compile by this backend from now on; the list grows by the number of graphs at each step."""
    graphs = []
    train_step = train.train_step

    def counted(*args):
        figures = train_step(*args)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return figures

    compile = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    patch.setattr(torch.nn.Module, "compile", compile)
    compiled_pass = functools.cache(functools.partial(torch.compile, backend=backend))
    patch.setattr(losses, "compiled", compiled_pass)
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for concept in (losses, augment):
        patch.setattr(concept, "COMPILE", False)  # so that it is False again after this test
    patch.setattr(train, "train_step", counted)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", *os.environ.get("BACKENDS", "").split()])
def test_compiled_is_the_same(tmp_path, monkeypatch, backend):
    """Stochastic depth as a ramp, masks, registers: the plan changes, the graphs do not.

    Neither do those of the losses.
    The same graphs as kernels, where there is a C++ compiler and half a minute for it:
    BACKENDS=inductor pytest tests/test_train.py -k compiled
    """
    flags = "--ibot_weight 1 --num_register_tokens 1 --epochs 1".split()
    plain = train.run(tiny_config(tmp_path / "plain", *flags))
    graphs = counted_graphs(monkeypatch, backend)
    compiled = train.run(tiny_config(tmp_path / "compiled", *flags, "--compile"))

    # There are at most 4 graphs of a block, at most 3 of each of the losses' 4 passes, and 2 of
    # the turn of colours. After the first step no new one is made.
    assert len(set(graphs[1:])) == 1 and 4 < graphs[-1] <= 4 + 4 * 3 + 2, graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    assert abs(compiled["loss"] - plain["loss"]) < 1e-3
    a, b = teacher_of(tmp_path / "plain"), teacher_of(tmp_path / "compiled")
    assert list(a) == list(b)  # compiling leaves the names as they are

    # Adam makes a whole step of a gradient that is nothing but rounding, so that a few weights
    # differ by a step. Their mean shows that they are few.
    differences = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    assert differences.mean() < 1e-5, differences.mean()


@pytest.mark.slow
def test_each_stage_is_compiled_for_its_sizes(tmp_path, monkeypatch):
    """A stage makes its graphs in its first step: no more than a run of its size alone."""
    flags = "--epochs 1 --compile --local_crops_number 0 --global_crops_size 24".split()
    with monkeypatch.context() as patch:
        alone = counted_graphs(patch)
        train.run(tiny_config(tmp_path / "alone", *flags))

    # Of 8 steps the first 4 have crops of 16 pixels.
    graphs = counted_graphs(monkeypatch)
    train.run(tiny_config(tmp_path / "both", *flags, "--curriculum", "0.5", "0.67"))
    assert graphs == 4 * [alone[-1]] + 4 * [2 * alone[-1]] and alone[-1] > 0


# ----------------------------------------------------------------------------------------------
# What can be left out, and what is refused

# After EVERYTHING: flags -> (terms that the log then lacks, parts that the network then lacks)
LEFT_OUT = {
    "--centering none": ((), ()), "--koleo_weight 0": (("koleo",), ()),
    "--momentum_teacher 0": ((), ()), "--local_crops_number 0": ((), ()),
    "--mask_probability 0": (("ibot",), ("mask_token", "ibot_head")),
    "--ibot_weight 0": (("ibot",), ("mask_token", "ibot_head")),
    "--dino_weight 0": (("dino",), ("dino_head",)), "--no_separate_head": ((), ("ibot_head",))}


@pytest.mark.parametrize("flags", LEFT_OUT)
def test_each_ingredient_can_be_left_out(flags, tmp_path):
    """The term is absent, what it needs is not built, the rest is finite and falls."""
    run = tmp_path / "run"
    train.run(tiny_config(run, *EVERYTHING, *flags.split()))
    rows = [row for row in metrics_of(run) if "loss" in row]
    terms, parts = LEFT_OUT[flags]
    assert not any(key.split("_")[0] in terms for key in rows[0])
    state = saved(run / "checkpoint")[1]
    assert not any(part in key for part in parts for key in state)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_images_given_are_not_judged_by_the_presets():
    assert train.read_flags(["shapes"]).val_data == "shapes:val"
    assert train.read_flags(["shapes", "--data", "folder:x"]).val_data == ""
    both = train.read_flags(["--data", "folder:x", "--val_data", "folder:y"])
    assert both.val_data == "folder:y"


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_start_after_a_failure_removes_nothing(count, monkeypatch):
    monkeypatch.setenv(count, "0")  # the first start
    check(train.read_flags(["--no_resume"]))
    monkeypatch.setenv(count, "1")
    check(train.read_flags([]))
    with pytest.raises(UsageError, match=f"--no_resume in a start after a failure .{count}"):
        check(train.read_flags(["--no_resume"]))


@pytest.mark.parametrize("line, words", [
    ("dino_vit16", "did you mean"), ("--dta shapes", "did you mean --data"),
    ("--epochs many", "--epochs"), ("--data nothing", "--data"),
    ("--data folder:EMPTY", "found 0 images"), ("--data folder:ONE", "--batch_size_per_gpu"),
    ("--data shapes:64 --batch_size_per_gpu 1000000", "--batch_size_per_gpu"),
    ("--local_crops_size 4", "--local_crops_size"),
    ("--patch_size 4 --local_crops_size 4 --photometry dino",
     "--local_crops_size 4 pixels cannot"),
    ("--patch_size 4 --local_crops_size 20 --curriculum 0.5 0.2 --photometry dino",
     "--curriculum: crops of 4 pixels"), ("--global_crops_size 33", "try 30"),
    ("--data shapes:64 --val_data folder:/none", "--val_data"), ("--device tpu", "--device"),
    ("--teacher_temp 0", "--teacher_temp"),
    ("--local_crops_scale 0.5 0.1", "--local_crops_scale"), ("--centering both", "--centering"),
    ("--warmup_epochs 99", "--warmup_epochs"),
    ("--local_crops_number 0 --global_crops_number 1", "at least two"),
    ("--keep 0", "--keep 0"),
    ("--data shapes:64 --val_data shapes:64", "--val_data shapes:64 is --data itself"),
    ("--val_share 0.7", "--val_share 0.7: expected at most 0.5"),
    ("--val_share -0.1", "--val_share"), ("--num_register_tokens -1", "--num_register_tokens"),
    ("--curriculum 0.75", "expected pairs"), ("--curriculum 0.5 0.5 0.5 0.8", "less than 1"),
    ("--curriculum 0 0.5", "above 0"),
    ("--curriculum 0.5 0.01 --arch resnet18 --ibot_weight 0", "pixels, expected at least 8"),
    ("--arch convnext_tiny --global_crops_size 24", "24: expected at least 32 pixels for"),
    ("--arch convnext_tiny --global_crops_size 64 --local_crops_size 48 --curriculum 0.5 0.5",
     "local crops of 24 pixels, expected at least 32"),
    ("--use_bn_in_head --koleo_weight 0 --batch_size_per_gpu 1 --global_crops_number 1",
     "has one row a step"),
    ("--use_bn_in_head --koleo_weight 0 --batch_size_per_gpu 1 --ibot_weight 1 "
     "--global_crops_size 15 --mask_ratio 0.1 0.12 --mask_min_patches 1",
     "the ibot loss has one row a step"),
    ("--curriculum 0.75 2", "--curriculum 0.75 2: expected f"),
    ("--curriculum 0.5 0.3 --ibot_weight 1", "crops of 10 pixels: --mask_min_patches 4"),
    ("--layerwise_decay 1.5", "--layerwise_decay"), ("--parallel fsdp", "torchrun"),
    ("--arch resnet18 --ibot_weight 1", "--arch resnet18"),
    ("--arch resnet18 --activation_checkpointing", "--activation_checkpointing")])
def test_misuse(line, words, tmp_path, photos, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (photos / "cats/01.png").rename(tmp_path / "one/1.png")
    line = line.replace("EMPTY", str(tmp_path / "empty")).replace("ONE", str(tmp_path / "one"))
    with pytest.raises(SystemExit) as stop:
        train.main([*line.split(), "--output_dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------
# How long it is to read


def code_lines(function):
    """How many lines of a function hold code: no comments, no blank lines, no docstring."""
    source = inspect.getsource(function)
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*silent, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    first = ast.parse(source).body[0].body[0]
    docstring = range(first.lineno, first.end_lineno + 1)
    return len(lines - set(docstring))


def test_the_algorithm_fits_on_one_screen():
    assert code_lines(train.train_step) <= 60
