"""Claims
1. One step equals the paper's words written out in float64: loss, gradients, average, centre.
2. After many steps the teacher is what it was, to the bit, BatchNorm's statistics too; the centre
   is a running mean of what it says; what is kept is the student's average, ready to teach.
3. Nothing is hidden from the student; all patches count, or those under the masks.
4. Killed and run again: the same weights, bit for bit.
5. A step of two processes is a step of one, with DDP and with FSDP.
6. A backbone without heads gets some first, and itself stays as it is; or its features are matched.
7. Bad input is one line that names the flag, exit code 2, and leaves no run directory behind; a
   teacher that has changed is not taken for the same, and NaN stays out of the average.
8. The presets are valid and carry the paper's numbers.
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (TINY, TINY_NETWORK, TINY_RUN, finish, heads_of, killed_in_step,
                      metrics_of, same_tensors, saved, start, teacher_of, tiny_config, views_of,
                      without_figures)

import distill
import train
import training.warmstart
from augment import MultiCrop, channel_stats_of, collate
from backbones.weights import load_backbone
from images.data import Views
from machinery.checkpoints import whole_state
from machinery.flags import UsageError, parse
from machinery.process import Process, start_process
from training.check import check
from training.optim import OPTIMIZERS, parameter_groups
from training.recipes import DISTILLATION, PRESETS
from training.warmstart import config_from_init
from vit import ARCHS, VisionTransformer

CPU = Process(torch.device("cpu"))
HEADS = "--ibot_weight 1 --separate_head --ibot_n_prototypes 24 --drop_path_rate 0".split()
# Of the network everything but --arch, which --init fixes; the preset has the same one.
STUDENT = [
    "shapes_distill", *TINY_RUN[1:], *TINY_NETWORK[2:], *HEADS[:2], "--drop_path_rate", "0",
    "--clip_grad", "0"]
CLS, PATCHES = "x_norm_clstoken", "x_norm_patchtokens"
SCHEDULE = {
    "lr": 0.01, "last_layer_lr": 0.01, "weight_decay": 0.1, "momentum": 0.9,
    "teacher_temp": 0.05, "generator": None}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run to learn from, with BatchNorm in its heads."""
    folder = tmp_path_factory.mktemp("teacher")
    flags = [
        *TINY, *HEADS, "--arch", "vit_nano", "--epochs", "1", "--use_bn_in_head",
        "--output_dir",
        str(folder)]
    with without_figures():
        train.run(parse(train.Config, flags, PRESETS))
    return folder


def config_of(teacher, *flags):
    return parse(distill.Config, [*STUDENT, "--teacher", str(teacher), *flags], DISTILLATION)


def networks_of(config, process=CPU):
    """What a run begins with: (config, student, teacher)."""
    config, frozen = distill.open_teacher(config)
    return config, *distill.build(config, process, frozen)


def batch_of(config, indices, step=0):
    images, _ = train.open_data(config)
    views = Views(images, MultiCrop(24, 16, 2, 2), seed=0)
    return collate([views[0, step, i] for i in indices], config.masking())


def learner_of(student, teacher, centerings):
    optimizer = OPTIMIZERS["adamw"](parameter_groups(student))
    return train.Learner(student, teacher, centerings, optimizer,
                         move_teacher=distill.move_average)


# -- one step


@pytest.mark.parametrize("tokens", ["all", "sampled"])
@pytest.mark.parametrize("centering", ["ema", "sinkhorn"])
def test_a_step_is_the_papers(tokens, centering, teacher):
    """Image by image, view by view: the large network whole, the small one whole too."""
    flags = ["--patch_tokens", tokens, "--centering", centering, "--koleo_weight", "0.1"]
    config, student, both = networks_of(config_of(teacher, *flags))
    with torch.no_grad():  # the average apart from the student, as later in a run
        for p in both.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    centerings = train.build_centerings(config)
    if centering == "ema":
        for module in centerings.values():
            module.center.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    small, large = (copy.deepcopy(x).double() for x in (student, both.frozen[0]))
    average = copy.deepcopy(both).double()
    centers = {name: x.double().clone() for name, x in centerings.state_dict().items()}
    batch = batch_of(config, range(6))
    learner = learner_of(student, both, centerings)
    figures = train.train_step(learner, batch, SCHEDULE, config, CPU)

    views = [x.double() for x in views_of(batch)]
    masks = batch["masks"].view(2, 6, 9)
    assert tokens == "sampled" or masks.all()
    with torch.no_grad():
        large_tokens = [large.backbone.forward_features(x) for x in views[:2]]
        at_masks = [tokens[PATCHES][mask] for tokens, mask in zip(large_tokens, masks)]
        answers = {
            "dino": torch.cat([large.dino_head(tokens[CLS]) for tokens in large_tokens]),
            "ibot": large.ibot_head(torch.cat(at_masks))}
    small_tokens = [small.backbone.forward_features(x) for x in views]

    def targets(name):
        if centering == "ema":
            return F.softmax((answers[name] - centers[f"{name}.center"]) / 0.05, -1)
        Q = (answers[name] / 0.05).exp()
        for _ in range(3):
            Q = Q / Q.sum(0, keepdim=True)
            Q = Q / Q.sum(1, keepdim=True)
        return Q

    # The student has BatchNorm in no head, so that crops may go through one after the other.
    q = targets("dino").view(2, 6, -1)
    log_p = [(small.dino_head(tokens[CLS]) / 0.1).log_softmax(-1) for tokens in small_tokens]
    pairs = [-(q[i] * log_p[v]).sum(-1).mean() for i in range(2) for v in range(4) if v != i]
    dino = sum(pairs) / len(pairs)

    at_masks = [tokens[PATCHES][mask] for tokens, mask in zip(small_tokens, masks)]
    log_p = (small.ibot_head(torch.cat(at_masks)) / 0.1).log_softmax(-1)
    of_each_patch = -(targets("ibot") * log_p).sum(-1)
    masked_patches = masks.view(12, 9).sum(1).tolist()
    ibot = sum(x.mean() for x in of_each_patch.split(masked_patches) if len(x)) / 12

    koleo = 0.0
    for tokens in small_tokens[:2]:
        unit = F.normalize(tokens[CLS], dim=-1)
        koleo = koleo - (torch.cdist(unit, unit) + 9 * torch.eye(6)).amin(1).log().mean()

    # Ours is in float32; Sinkhorn's exponents make 1e-7 of a logit 1e-5 of a target.
    loss = dino + ibot + 0.1 * koleo
    torch.testing.assert_close(figures["loss"].double(), loss.detach(), rtol=2e-5, atol=2e-5)
    loss.backward()
    for (name, p), exact in zip(student.named_parameters(), small.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad.double(), exact.grad, rtol=2e-3, atol=2e-5,
                                       msg=name)
    parameters = zip(both.parameters(), average.parameters(), student.parameters())
    for new, old, of_student in parameters:
        expected = 0.9 * old + 0.1 * of_student.double()
        torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-7)
    if centering == "ema":
        for name, module in centerings.items():
            moved = 0.8 * centers[f"{name}.center"] + 0.2 * answers[name].mean(0)
            torch.testing.assert_close(module.center.double(), moved, rtol=1e-4, atol=1e-6)


def test_the_centre_of_init_is_not_taken_for_that_of_the_teacher(teacher):
    assert heads_of(teacher)["centerings"]["dino.center"].any()
    centerings = train.build_centerings(config_of(teacher, "--init", str(teacher)))
    assert not centerings["dino"].center.any()


def test_a_teacher_stays_as_it_is(teacher):
    config, student, both = networks_of(config_of(teacher, "--use_bn_in_head"))
    frozen = both.frozen[0]
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    parts = {**heads_of(teacher), "backbone": teacher_of(teacher)}
    del parts["centerings"]  # which belong to the run, not to the network
    for part, tensors in parts.items():  # it is the network of that run
        for name, value in tensors.items():
            assert torch.equal(before[f"{part}.{name}"], value)

    first = {k: v.clone() for k, v in student.state_dict().items()}
    centerings = train.build_centerings(config)
    learner = learner_of(student, both, centerings)
    batches = [batch_of(config, range(4 * i, 4 * i + 4), i) for i in range(5)]
    with torch.no_grad():  # what it says of each batch, once and for all
        means = [
            frozen([torch.cat(views_of(batch)[:2])])["dino"].double().mean(0)
            for batch in batches]
    center = torch.zeros(32).double()
    average = {k: v.double().clone() for k, v in student.state_dict().items()}
    for step in range(30):
        train.train_step(learner, batches[step % 5], SCHEDULE, config, CPU)
        center = 0.8 * center + 0.2 * means[step % 5]
        for name, value in student.state_dict().items():
            average[name] = 0.9 * average[name] + 0.1 * value.double()

    assert any("running_var" in k for k in before)
    assert not frozen.training
    assert same_tensors(before, frozen.state_dict())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not same_tensors(first, student.state_dict())
    torch.testing.assert_close(centerings["dino"].center.double(), center, rtol=1e-4, atol=1e-6)
    for name, value in both.state_dict().items():
        if "num_batches" not in name:  # of 30 steps, each rounded
            torch.testing.assert_close(value.double(), average[name], rtol=1e-4, atol=1e-5,
                                       msg=name)
    assert not any("frozen" in name for name in both.state_dict())


def test_nothing_is_hidden(teacher):
    all_patches, sampled = (config_of(teacher, "--patch_tokens", t) for t in ("all", "sampled"))
    batch = batch_of(all_patches, range(4))
    assert batch["mask_indices"].tolist() == list(range(8 * 9))
    torch.testing.assert_close(batch["mask_weights"], torch.full((72,), 1 / 9))
    assert 0 < (batch_of(sampled, range(4))["mask_weights"] > 0).sum() < 72
    flags = "--patch_tokens sampled --mask_ratio 0.5 0.5 --mask_shape random".split()
    assert (batch_of(config_of(teacher, *flags), range(4))["mask_weights"] > 0).sum() == 4 * 4
    _, student, _ = networks_of(sampled)
    assert not any("mask_token" in name for name in student.state_dict())
    images = torch.randn(2, 3, 24, 24)
    masks = torch.ones(2, 9, dtype=torch.bool)
    everywhere = torch.arange(18)
    with torch.no_grad():
        without_masks = student([images], None, None, everywhere)["ibot"]
        with_masks = student([images], None, masks, everywhere)["ibot"]
    assert torch.equal(without_masks, with_masks)


def test_killed_and_resumed_equals_uninterrupted(teacher, tmp_path, quick_runs):
    whole, broken = (config_of(teacher, "--output_dir", str(tmp_path / name), "--auto_scale")
                     for name in ("whole", "broken"))
    summary = distill.run(whole)
    with killed_in_step(11):  # the last save was after step 8
        distill.run(broken)
    assert distill.run(broken)["loss"] == summary["loss"]
    last, state = saved(tmp_path / "whole/checkpoint")
    assert last == 16
    assert same_tensors(state, saved(tmp_path / "broken/checkpoint")[1])

    # What is kept is the average, small; it can be looked at, and teach in its turn.
    kept = teacher_of(tmp_path / "whole")
    assert all(torch.equal(v, state[f"teacher.backbone.{k}"]) for k, v in kept.items())
    assert any(not torch.equal(v, state[f"student.backbone.{k}"]) for k, v in kept.items())
    assert load_backbone(tmp_path / "whole").embed_dim == 64
    stored = json.loads((tmp_path / "whole/config.json").read_text())
    assert stored["teacher"] == str(teacher)
    assert stored["ibot_n_prototypes"] == 24
    again = config_of(tmp_path / "whole", "--output_dir", str(tmp_path / "again"), "--epochs",
                      "1")
    assert distill.run(again)["steps"] == 8


def test_a_teacher_that_has_changed_is_noticed(teacher, tmp_path, quick_runs):
    """Its path is the same, its weights are others: a run that began with them is not continued."""
    changing = tmp_path / "teacher"
    shutil.copytree(teacher, changing)
    config = config_of(changing, "--output_dir", str(tmp_path / "run"))
    with killed_in_step(11):
        distill.run(config)
    weights = teacher_of(changing)
    torch.save({k: v + 1e-3 for k, v in weights.items()}, changing / "teacher.pt")
    with pytest.raises(UsageError, match=f"--teacher {changing} has other weights"):
        distill.run(config)

    # A run that knows no teacher has its real differences named.
    path = tmp_path / "run/config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"teacher_sha256": None, "lr": 0.5}))
    with pytest.raises(UsageError, match="lr"):
        distill.run(config)


@pytest.mark.parametrize("ok", [0.0, 1.0])
def test_nan_stays_out_of_the_average(ok, teacher):
    """Statistics of BatchNorm that a step has spoiled: the step is left out of the average."""
    _, student, both = networks_of(config_of(teacher, "--use_bn_in_head"))
    before = {k: v.clone() for k, v in both.state_dict().items()}
    value = torch.nan if ok == 0 else 2.0
    for name, buffer in student.named_buffers():
        if "running" in name:
            buffer.fill_(value)
    distill.move_average(both, student, 0.9, torch.tensor(ok))
    for name, after in both.state_dict().items():
        if "running" in name:
            expected = before[name] if ok == 0 else 0.9 * before[name] + 0.1 * 2.0
            torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-7)


# -- two processes


def one_step(config, process):
    """The step's loss, and afterwards the states of student, average and centerings."""
    config, student, both = networks_of(config, process)
    centerings = train.build_centerings(config)
    learner_student = student
    if config.parallel == "fsdp":
        for network in (student, both):
            train.shard(network, config, process)
    elif process.world_size > 1:
        learner_student = train.DistributedDataParallel(student)
    learner = learner_of(student, both, centerings)
    learner.student = learner_student
    for group in learner.optimizer.param_groups:
        group["eps"] = 1.0  # a step as long as its gradient: rounding stays rounding
    share = 8 // process.world_size
    batch = batch_of(config, range(share * process.rank, share * (process.rank + 1)))
    figures = train.train_step(learner, batch, {**SCHEDULE, "lr": 0.5}, config, process)
    states = dict(whole_state(student)), dict(whole_state(both)), centerings.state_dict()
    return figures["loss"], *states


def run_as_rank(rank, teacher, folder):
    """One of two processes: a step with each way of splitting, and a run of both stages."""
    process = start_process("cpu")
    results = {}
    for parallel in ("ddp", "fsdp"):
        results[parallel] = one_step(config_of(teacher, "--parallel", parallel), process)
    dist.barrier()
    flags = (f"--parallel fsdp --data shapes:32 --val_data shapes:32:val --epochs 1 "
             f"--train_teacher_heads_epochs 1 --output_dir {folder}/run").split()
    with without_figures():
        results["run"] = distill.run(config_of(teacher / "teacher.pt", *flags))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(teacher, tmp_path):
    processes = start(run_as_rank, teacher, str(tmp_path))
    loss, *states = one_step(config_of(teacher), CPU)
    finish(processes)
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for parallel in ("ddp", "fsdp"):
            loss_of_two, *states_of_two = results[parallel]
            torch.testing.assert_close(loss_of_two, loss, rtol=1e-5, atol=1e-6)
            for state, state_of_two in zip(states, states_of_two, strict=True):
                assert set(state) == set(state_of_two)
                for k in state:
                    # Sums are in another order, and the step is large on purpose.
                    torch.testing.assert_close(state[k], state_of_two[k], rtol=1e-4, atol=2e-6,
                                               msg=k)
        assert results["run"]["steps"] == 2
        assert not results["run"]["collapsed"]


# -- backbones alone


@pytest.fixture
def backbone_file(teacher, tmp_path):
    """The backbone of that run alone, where no heads lie beside it."""
    (tmp_path / "backbone").mkdir()
    file = tmp_path / "backbone/backbone.pth"
    torch.save(teacher_of(teacher), file)
    return file


def test_heads_first(backbone_file, tmp_path, capsys):
    """With figures and expected memory, of the run that trains heads and of the one that follows.

    The student's first weights (--init) are no matter of these heads, and neither are its patches,
    which are watched (--dense_every).
    """
    config = config_of(backbone_file, "--train_teacher_heads_epochs", "1", "--epochs", "1",
                       "--output_dir", str(tmp_path / "run"), "--n_prototypes", "40", "--init",
                       str(backbone_file), "--dense_every", "1", "--dense_data", "shapes:4",
                       "--dense_val_data", "shapes:3:val")
    distill.run(config)
    heads_run = tmp_path / "run/teacher_heads"
    assert same_tensors(torch.load(backbone_file, weights_only=True), teacher_of(heads_run))
    state = saved(heads_run / "checkpoint")[1]
    head = heads_of(heads_run)["dino_head"]
    assert head["last_layer.weight_v"].shape[0] == 40
    assert any(not torch.equal(head[k], state[f"student.dino_head.{k}"]) for k in head)
    assert not any(k.startswith("optimizer.backbone") for k in state)
    assert not json.loads((heads_run / "config.json").read_text())["init"]
    watched = [
        sum("patch_miou" in row for row in metrics_of(run))
        for run in (tmp_path / "run", heads_run)]
    assert watched == [2, 0]  # before the first step and after the epoch
    capsys.readouterr()
    distill.run(config)  # both are there
    assert capsys.readouterr().out.count("is finished") == 2


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_features_alone(distance, backbone_file, tmp_path):
    flags = (
        "--dino_weight 0 --ibot_weight 0 --class_feature_weight 1 --patch_feature_weight 0.5 "
        f"--feature_distance {distance} --epochs 4 --output_dir {tmp_path / 'run'}").split()
    config, student, both = networks_of(config_of(backbone_file, *flags))
    small, large = (copy.deepcopy(x).double() for x in (student, both.frozen[0]))
    batch = batch_of(config, range(6))
    batch["local_crops"] = batch["local_crops"][:0]
    figures = train.train_step(learner_of(student, both, {}), batch, SCHEDULE, config, CPU)

    views = torch.cat(views_of(batch)).double()
    small_tokens, large_tokens = (net.backbone.forward_features(views)
                                  for net in (small, large))
    loss = 0.0
    for key, name, weight in ((CLS, "class", 1), (PATCHES, "patch", 0.5)):
        a = getattr(small, f"{name}_feature_map")(small_tokens[key])
        b = large_tokens[key].detach()
        if distance == "mse":
            distances = ((a - b)**2).mean(-1)
        else:
            distances = 1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        loss = loss + weight * distances.mean()
    torch.testing.assert_close(figures["loss"].double(), loss.detach(), rtol=1e-5, atol=1e-6)
    loss.backward()
    for (name, p), exact in zip(student.named_parameters(), small.parameters()):
        torch.testing.assert_close(p.grad.double(), exact.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_run_that_matches_features_learns(backbone_file, tmp_path):
    """A whole run without heads, its figures and expected memory included."""
    flags = (
        "--dino_weight 0 --ibot_weight 0 --class_feature_weight 1 --patch_feature_weight 0.5 "
        f"--epochs 2 --output_dir {tmp_path / 'run'}").split()
    distill.run(config_of(backbone_file, *flags))
    rows = [row for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert rows[-1]["class_feature"] < rows[0]["class_feature"] < 1.1
    assert "ibot" not in rows[0]
    assert "dino" not in rows[0]


# -- what is refused, and the presets


def test_a_students_first_weights_leave_the_presets_crops(teacher):
    line = ["shapes_distill", "--init", str(teacher), "--teacher", str(teacher)]
    config = config_from_init(parse(distill.Config, line, DISTILLATION))
    assert (config.arch, config.patch_size) == ("vit_nano", 8)  # as the weights say
    preset_size = DISTILLATION["shapes_distill"]["global_crops_size"]
    assert config.global_crops_size == preset_size != 24


def test_first_weights_give_way_to_the_teacher(teacher, tmp_path, quick_runs):
    """What both would decide, the pixels and the prototypes, is the teacher's to say."""
    pixels = "--mean 0.1 0.1 0.1 --std 0.9 0.9 0.9 --n_prototypes 16 --epochs 1".split()
    train.run(tiny_config(tmp_path / "first", *pixels))
    line = ["shapes_distill", "--teacher", str(teacher), "--output_dir", str(tmp_path / "run")]

    def begun_with(weights, *more):
        """The settings with which train.run begins."""
        flags = [*line, "--init", str(weights), *more]
        with patch.object(train, "run", lambda config, *_: config_from_init(config)):
            return distill.run(parse(distill.Config, flags, DISTILLATION))

    config = begun_with(tmp_path / "first")
    assert config.channel_stats == channel_stats_of(3) and config.n_prototypes == 32
    assert config.arch == "vit_pico"  # the student's own, as the weights say
    torch.save(
        VisionTransformer(24, 4, **ARCHS["vit_pico"]).state_dict(), tmp_path / "fine.pth")
    with pytest.raises(UsageError, match="--patch_size 4: patches are compared one by one"):
        begun_with(tmp_path / "fine.pth", "--ibot_weight", "1")


def test_heads_for_a_teacher_with_registers(tmp_path):
    """Their run is judged and drawn as any other; --no_resume of the distillation keeps it."""
    model = VisionTransformer(24, 8, num_register_tokens=2, mask_token=True, ffn_layer="swiglu",
                              layerscale=0.1, **ARCHS["vit_nano"])
    torch.save(model.state_dict(), tmp_path / "registers.pth")
    distill.run(
        config_of(tmp_path / "registers.pth", "--train_teacher_heads_epochs", "1", "--epochs",
                  "1", "--output_dir", str(tmp_path / "run"), "--no_resume"))
    heads_run = tmp_path / "run/teacher_heads"
    stored = json.loads((heads_run / "config.json").read_text())
    assert stored["num_register_tokens"] == 2
    # The network is the teacher's, and not the student's: an MLP without factors.
    assert (stored["ffn_layer"], stored["layerscale"]) == ("swiglu", 1.0)
    assert (heads_run / "heads.pt").exists() and (tmp_path / "run/summary.json").exists()


def test_heads_for_a_teacher_of_other_patches(tmp_path, monkeypatch):
    """Its own crops are whole patches of its own, beside those of the student."""
    model = VisionTransformer(24, 12, **ARCHS["vit_pico"])
    torch.save(model.state_dict(), tmp_path / "coarse.pth")
    shown = []
    monkeypatch.setattr(train, "run",
                        lambda config, build: shown.append(config) or check(config))
    config = config_of(tmp_path / "coarse.pth", "--patch_size", "8", "--ibot_weight", "0",
                       "--local_crops_size", "16", "--train_teacher_heads_epochs", "1",
                       "--ffn_layer", "swiglu", "--layerscale", "0.1")
    distill.train_heads(config, load_backbone(tmp_path / "coarse.pth"))
    assert (shown[0].ffn_layer, shown[0].layerscale) == ("mlp", 0.0)  # those of the teacher
    assert (shown[0].patch_size, shown[0].global_crops_size,
            shown[0].local_crops_size) == (12, 24, 12)


def test_a_teacher_is_not_emptied(teacher, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distill.main([
            *STUDENT, "--teacher",
            str(teacher), "--output_dir",
            str(teacher), "--no_resume"])
    assert "lies in --output_dir" in capsys.readouterr().err
    assert (teacher / "teacher.pt").exists() and (teacher / "heads.pt").exists()


def test_the_student_is_shown_what_its_teacher_wants(tmp_path):
    model = VisionTransformer(24, 8, 1, **ARCHS["vit_pico"])
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    line = f"--teacher {tmp_path}/grey.pth --dino_weight 0 --ibot_weight 0 --class_feature_weight 1"
    config, _ = distill.open_teacher(
        parse(distill.Config, [*STUDENT, *line.split()], DISTILLATION))
    assert (config.in_chans, config.channel_stats) == (1, channel_stats_of(1))


@pytest.mark.parametrize("line, words", [
    ("--teacher=", "--teacher .: no teacher.pt in it"),
    ("--teacher nowhere", "--teacher nowhere"),
    ("--teacher FILE", "--train_teacher_heads_epochs"),
    ("--n_prototypes 16", "16 prototypes are asked for dino"),
    ("--ibot_n_prototypes 16", "has 24"),
    ("--no_separate_head", "32 prototypes are asked for ibot"),
    ("--patch_size 4 --mask_min_patches 1", "--patch_size 4"),
    ("--patch_size 4 --ibot_weight 0 --global_crops_size 20", "--global_crops_size 20"),
    ("--global_crops_size 25", "--global_crops_size 25"),
    ("--patch_size 4 --ibot_weight 0 --curriculum 0.5 0.5",
     "--curriculum: crops of 12 is not a"),
    ("--arch resnet18 --ibot_weight 0 --patch_feature_weight 1", "--patch_feature_weight 0"),
    ("--dino_weight 0 --ibot_weight 0", "nothing to learn"),
    ("--dino_weight 0 --ibot_weight 0 --koleo_weight 0.1", "no loss asks the teacher: give"),
    ("--dino_weight 0 --ibot_weight 0 --class_feature_weight 1 --train_teacher_heads_epochs 1",
     "--train_teacher_heads_epochs 1: no loss needs heads"),
    ("--patch_tokens some", "--patch_tokens"), ("--in_chans 1", "leave them to --teacher"),
    ("--class_feature_weight -1", "--class_feature_weight"),
    ("--mask_ratio 0.1 0.5", "--mask_ratio: --patch_tokens all compares every patch"),
    ("--mask_probability 0.5", "--mask_probability: --patch_tokens all"),
    ("--mask_shape block", "--mask_shape: --patch_tokens all"),
    ("--warmup_teacher_temp 0.01", "--warmup_teacher_temp 0.01 would never be used")])
def test_misuse(line, words, teacher, backbone_file, tmp_path, capsys):
    line = line.replace("FILE", str(backbone_file))
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        flags = ["--teacher", str(teacher), *line.split(), "--output_dir", str(run)]
        distill.main([*STUDENT, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error
    assert error.count("\n") == 1, error
    assert not run.exists()


@pytest.mark.parametrize("size", [0, 100, 0.5, "list"])
def test_damaged_heads_of_a_teacher(size, teacher, tmp_path, capsys):
    damaged = tmp_path / "teacher"
    shutil.copytree(teacher, damaged)
    heads = damaged / "heads.pt"
    content = heads.read_bytes()
    if size == "list":
        torch.save({"dino": [torch.zeros(2)]}, heads)
    else:
        heads.write_bytes(content[:int(size * len(content)) if size == 0.5 else size])
    with pytest.raises(SystemExit):
        distill.main([
            *STUDENT, "--teacher",
            str(damaged), "--output_dir",
            str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert f"--teacher: {heads} is not readable" in error and error.count("\n") == 1


def test_heads_are_those_of_the_file_that_was_read(teacher, tmp_path, monkeypatch):
    """A released name wins over a folder of the same name, whose heads are another network's."""
    (tmp_path / "cache").mkdir()
    shutil.copy(teacher / "teacher.pt", tmp_path / "cache/released.pth")
    shutil.copytree(teacher, tmp_path / "dino_vits16")
    monkeypatch.chdir(tmp_path)
    for module in (distill, training.warmstart):
        monkeypatch.setattr(module, "weights_file",
                            lambda what: tmp_path / "cache/released.pth")
    with pytest.raises(UsageError,
                       match="dino_vits16 has no heads.pt and config.json beside it"):
        distill.add_heads(
            parse(distill.Config, [*STUDENT, "--teacher", "dino_vits16"], DISTILLATION), None,
            distill.weights_file("dino_vits16").parent)
    config = replace(tiny_config(tmp_path / "run"), init="dino_vits16")
    assert training.warmstart.init_heads(config) == {}
    monkeypatch.setattr(training.warmstart, "weights_file",
                        lambda what: Path(what) / "teacher.pt")
    assert "dino_head" in training.warmstart.init_heads(config)


def test_presets():
    for name, preset in DISTILLATION.items():
        config = distill.Config(preset=name, **preset)
        check(config)
        assert config.teacher
        assert not config.hides_patches
        assert config.drop_path_rate == 0
    # DINOv2 table 16
    expected = {
        "ffn_layer": "mlp", "layerscale": 1e-5, "drop_path_rate": 0.0, "lr": 1e-3,
        "lr_scaling": "none", "weight_decay": 0.04, "weight_decay_end": 0.2, "epochs": 500,
        "epoch_length": 1250, "warmup_epochs": 80, "momentum_teacher": 0.994, "patch_size": 14,
        "precision": "fp16", "centering": "sinkhorn", "patch_tokens": "all",
        "koleo_weight": 0.1, "ibot_weight": 1.0, "n_prototypes": 131072}
    for size, arch in (("s", "vit_small"), ("b", "vit_base"), ("l", "vit_large")):
        config = distill.Config(**DISTILLATION[f"dinov2_vit{size}14_distill"])
        assert {k: getattr(config, k) for k in expected} == expected
        assert config.arch == arch
