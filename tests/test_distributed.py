"""Claims
1. Two processes move as one would on the joined batch: centre, Sinkhorn-Knopp (unequal counts,
   padding); five whole steps of DINO and of DINOv2 (masks, stochastic depth, KoLeo), with DDP
   and with FSDP, in both ways to clip; in bfloat16 near to that.
2. When one of two processes is asked to stop, both learn of it in the same step, without a
   group of their own for it; both save and go, and what they saved with FSDP goes on with one
   process and whole tensors.
3. One process goes on as two (DDP), and they as three (FSDP): the same images, crops and
   colours follow, and the same losses.
4. Features of two processes are those of one, for an odd number of images too.
5. Four processes as two machines of two (HSDP) move as one, and as FSDP over all four, in both
   ways to clip; each machine has a copy of its own.

Whatever two processes can tell is asked in one go, by `two_processes`: starting them is what
costs time. The tests then compare what they wrote down with what one process finds.
"""

import contextlib
import functools
import os
import signal
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, finish, metrics_of, saved, start, without_figures

import train
from augment import Masking, MultiCrop, collate, mask_tensors
from evaluation.extract import extract
from images.data import Views, open_images
from losses import (EMACenter, SinkhornKnopp, all_sum, entropies, koleo_loss, make_targets,
                    patch_loss, view_pair_loss)
from machinery.checkpoints import whole_state
from machinery.flags import UsageError, parse
from machinery.process import Process, StopSignal, start_process
from training.config import Config
from training.optim import (OPTIMIZERS, clip_gradients, ema_update, parameter_groups,
                            set_schedule)
from training.recipes import PRESETS
from vit import VisionTransformer

ALONE = Process(torch.device("cpu"))
FLAGS = [*TINY, "--drop_path_rate", "0"]
METHODS = {
    "dino": "--centering ema --clip_mode parameter",
    "dinov2": "--centering sinkhorn --ibot_weight 1 --koleo_weight 0.1 --drop_path_rate 0.3 "
    "--separate_head --ibot_n_prototypes 24 --clip_mode network",
    "dinov2, each tensor clipped": "--centering sinkhorn --ibot_weight 1 --koleo_weight 0.1 "
    "--drop_path_rate 0.3 --clip_mode parameter"}
STEPS = 5
FEW_STEPS = 2  # of four processes
WAYS_TO_CLIP = ("dino", "dinov2")  # each tensor by itself, and each network as a whole


def config_of(method, *more):
    return parse(Config, [*FLAGS, *METHODS[method].split(), *more], PRESETS)


# ----------------------------------------------------------------------------------------------
# The same steps, of two processes and of one


@functools.cache
def images():
    return open_images("shapes:64")


def batch_of(config, step, rank):
    """(batch, schedule) of a process: it has images, masks and dropped samples of its own."""
    views = Views(images(), MultiCrop(24, 16, 2, 2), seed=0)
    first = 8 * (step % 8) + 4 * rank
    batch = collate([views[0, 0, i] for i in range(first, first + 4)])
    if config.hides_patches:
        masks = Masking((3, 3), (0.2, 0.7))(8, 10 * step + rank)["masks"]
        batch |= mask_tensors(masks, 20)
    schedule = dict(lr=0.5, last_layer_lr=0.5, weight_decay=0.1, momentum=0.9,
                    teacher_temp=0.05,
                    generator=torch.Generator().manual_seed(100 * step + rank))
    return batch, schedule


def optimizer_of(student):
    optimizer = OPTIMIZERS["adamw"](parameter_groups(student))
    for group in optimizer.param_groups:
        group["eps"] = 1.0  # a step as long as its gradient: rounding stays rounding
    return optimizer


def whole_steps(config, process, steps=STEPS):
    """(losses, student's and teacher's weights, centres) as the program makes them."""
    split = config.parallel != "ddp"
    student, teacher = train.build(config, process)
    centerings = train.build_centerings(config)
    if split:
        train.shard(student, config, process)
        train.shard(teacher, config, process)
        network = student
    else:
        network = train.DistributedDataParallel(student)
    learner = train.Learner(network, teacher, centerings, optimizer_of(student))
    losses = []
    for step in range(steps):
        batch, schedule = batch_of(config, step, process.rank)
        losses.append(train.train_step(learner, batch, schedule, config, process)["loss"])
    states = [whole_state(x) if split else x.state_dict() for x in (student, teacher)]
    return torch.stack(losses), *map(dict, states), dict(centerings.state_dict())


def joined_steps(config, world=2, steps=STEPS):
    """The same steps, written out, by one process that has the batches of all.

    Where several processes have to exchange something, this one has all of it.
    """
    student, teacher = train.build(config, ALONE)
    centerings = train.build_centerings(config)
    optimizer, losses = optimizer_of(student), []
    for step in range(steps):
        # What each of the processes has: its views, its masks, and what the teacher says.
        shares = []
        for rank in range(world):
            batch, schedule = batch_of(config, step, rank)
            crops, masks = train.make_views(batch, config.channel_stats, ALONE.device)
            weights = masks.pop("mask_weights", None)
            with torch.no_grad():
                teacher_out = teacher(crops[:1], mask_indices=masks.get("mask_indices"))
            shares.append((crops, masks, weights, teacher_out, schedule["generator"]))

        # The biases are those of the joined rows; rows of padding do not count.
        rows, real, bias = {}, {}, {}
        for name, centering in centerings.items():
            rows[name] = torch.cat([teacher_out[name] for *_, teacher_out, _ in shares])
            real[name] = None
            if name == "ibot":
                real[name] = torch.cat([weights for _, _, weights, _, _ in shares]) > 0
            bias[name] = centering(rows[name], 0.05, real[name])

        # The loss is the mean of the losses of all processes.
        loss = 0.0
        for crops, masks, weights, teacher_out, generator in shares:
            student_out = student(crops, student.backbone.draw_plan(crops, generator), **masks)
            targets = {}
            for name in centerings:
                targets[name] = make_targets(teacher_out[name], 0.05, bias[name])
            dino = view_pair_loss(targets["dino"].unflatten(0, (2, 4)),
                                  student_out["dino"].unflatten(0, (4, 4)))
            loss = loss + dino / world
            if "ibot" in targets:
                loss = loss + patch_loss(targets["ibot"], student_out["ibot"], weights,
                                         8) / world
            if config.koleo_weight:  # neighbours among the images of one process
                first, second = student_out["features"][:8].chunk(2)
                loss = loss + 0.1 * (koleo_loss(first) + koleo_loss(second)) / world

        # One step of everything that a step moves.
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(list(student.children()), config.clip_grad, config.clip_mode)
        set_schedule(optimizer, dict(lr=0.5, weight_decay=0.1))
        optimizer.step()
        ema_update(teacher, student, 0.9)
        for name, centering in centerings.items():
            centering.update(rows[name], real[name])
        losses.append(loss.detach())
    states = [dict(x.state_dict()) for x in (student, teacher, centerings)]
    return torch.stack(losses), *states


# ----------------------------------------------------------------------------------------------
# What two processes do


def rows_to_share():
    """Seven rows of eight logits: a process has three or four of them, or five and two."""
    return torch.randn(7, 8, generator=torch.Generator().manual_seed(0))


def two_processes(rank, folder):
    """Everything that the tests below want to know of two processes, to FOLDER/RANK.pt."""
    torch.manual_seed(100 + rank)  # nothing may depend on it
    process = start_process("cpu")
    out = {"sum": all_sum(torch.tensor(float(rank + 1)))}

    # Centerings and figures, of unequal numbers of rows and of padded ones.
    rows = rows_to_share()
    share = rows[:3] if rank == 0 else rows[3:]
    centering = EMACenter(8)
    centering.update(share)
    out["center"] = centering.center
    out["mean_entropy"] = entropies(share.softmax(-1))[1]
    share = 2 * rows[:5] if rank == 0 else 2 * rows[5:]
    out["bias"] = SinkhornKnopp(8)(share, 0.1)
    padded = torch.cat([share, torch.randn(3, 8)])
    real = torch.arange(len(padded)) < len(share)
    out["bias of padded"] = SinkhornKnopp(8)(padded, 0.1, real)

    # Whole steps of each method.
    for fsdp in (False, True):
        for name in METHODS:
            config = replace(config_of(name), parallel="fsdp" if fsdp else "ddp")
            out[name, fsdp] = whole_steps(config, process)
        low = replace(config_of("dinov2"), precision="bf16", parallel=config.parallel)
        out["bf16", fsdp] = whole_steps(low, process)[0]

    # Features of an odd number of images.
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    model.load_state_dict(torch.load(f"{folder}/backbone.pt"))
    out["features"] = extract(model, open_images("shapes:11"), 16, process)

    # Three questions; the signal comes before the second one, to one of them.
    with patch.object(dist, "new_group", None):
        stop_signal = StopSignal(process)
        out["agreed"] = [stop_signal.agreed()]
        if rank == 1:
            stop_signal.note(signal.SIGTERM, None)
        out["agreed"] += [stop_signal.agreed(), stop_signal.agreed()]

    # A run, of which one of the two is asked to stop in step 5: both save and go.
    train_step, calls = train.train_step, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    train.train_step = stops
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    with without_figures():
        try:
            train.run(replace(run_of_two(folder), parallel="fsdp"))
        except SystemExit as stop:
            out["exit"] = stop.code
    torch.save(out, f"{folder}/{rank}.pt")


def run_of_two(folder):
    flags = f"--clip_mode parameter --batch_size_per_gpu 4 --epochs 1 --output_dir {folder}/run"
    return config_of("dinov2", *flags.split())


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """(folder, what each of the two processes wrote down, the backbone that they had)."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    backbone = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(backbone.state_dict(), folder / "backbone.pt")
    finish(start(two_processes, str(folder)))
    outs = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return folder, outs, backbone


# ----------------------------------------------------------------------------------------------
# What they have to agree with


def test_sums_and_centre(spawned):
    _, outs, _ = spawned
    rows = rows_to_share()
    for out in outs:
        assert out["sum"] == 3
        torch.testing.assert_close(out["center"], 0.1 * rows.mean(0))
        mean = rows.softmax(-1).mean(0)
        torch.testing.assert_close(out["mean_entropy"], torch.special.entr(mean).sum())
        bias = SinkhornKnopp(8)(2 * rows, 0.1)
        for name in ("bias", "bias of padded"):  # one constant for all prototypes has no effect
            torch.testing.assert_close(out[name] - out[name].mean(), bias - bias.mean())


@pytest.fixture(scope="module")
def joined():
    """Name of a method -> joined_steps of it, made when it is asked for."""
    return functools.cache(lambda name: joined_steps(config_of(name)))


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_steps_of_two_are_those_of_one(name, fsdp, spawned, joined):
    _, outs, _ = spawned
    losses, *states = joined(name)
    assert losses[-1] < losses[0]
    for out in outs:
        torch.testing.assert_close(out[name, fsdp][0], losses, rtol=1e-5, atol=1e-5)
        for of_one, of_two in zip(states, out[name, fsdp][1:], strict=True):
            for key in of_one:
                torch.testing.assert_close(of_one[key], of_two[key], rtol=1e-4, atol=1e-5,
                                           msg=key)


@pytest.mark.parametrize("fsdp", [False, True])
def test_steps_in_bfloat16_are_near(fsdp, spawned):
    _, outs, _ = spawned
    for out in outs:
        near, exact = out["bf16", fsdp], out["dinov2", fsdp][0]
        assert not torch.equal(near, exact)
        # Steps whose products have 8 bits of precision.
        torch.testing.assert_close(near, exact, rtol=2e-2, atol=0)


def test_features_of_two_are_those_of_one(spawned):
    _, outs, backbone = spawned
    expected = extract(backbone, open_images("shapes:11"), 16, ALONE)
    for out in outs:
        torch.testing.assert_close(out["features"], expected, rtol=1e-5, atol=1e-6)


def test_both_learn_of_a_signal_at_once(spawned):
    _, outs, _ = spawned
    assert [out["agreed"] for out in outs] == [[0, signal.SIGTERM, signal.SIGTERM]] * 2


def test_saved_by_two_continued_by_one(spawned, capsys, quick_runs):
    folder, outs, _ = spawned
    assert [out["exit"] for out in outs] == [143, 143]
    assert saved(folder / "run/checkpoint")[0] == 5
    config = run_of_two(folder)
    summary = train.run(config)
    assert "continuing from step 5" in capsys.readouterr().out
    assert summary["steps"] == 8  # 64 images in global batches of 8
    with pytest.raises(UsageError, match="--batch_size_per_gpu"):
        train.run(replace(config, batch_size_per_gpu=5))


# ----------------------------------------------------------------------------------------------
# A run whose number of processes changes


def part_of_a_run(rank, folder, steps, world):
    """So many steps of a run, each image of them written down; then it is asked to stop."""
    looks, train_step = [], train.train_step

    def watched(learner, batch, *args):
        # Of each image: its number, its colours, and the variance of its crops, which tells
        # crops of one image from others.
        columns = [batch["index"], batch["photometry"].sum((0, 2))]
        for crops in (batch["global_crops"], batch["local_crops"]):  # (V, B, 3, s, s)
            columns.append(crops.double().var((0, 2, 3, 4)))
        looks.extend(zip(*(x.tolist() for x in columns)))
        if len(looks) == steps * len(batch["index"]) and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(learner, batch, *args)

    train.train_step = watched
    flags = f"--data shapes:24 --batch_size_per_gpu {6 // world} --log_every 1".split()
    flags += ["--parallel", "fsdp"] if world == 3 else []
    flags += ["--val_data=", "--val_share", "0"]  # nothing is to be judged
    with contextlib.suppress(SystemExit), without_figures():
        train.run(train.read_flags([*FLAGS, *flags, "--output_dir", folder]))
    torch.save(looks, f"{folder}/looks-{world}-{rank}.pt")


def test_one_goes_on_as_two_and_they_as_three(tmp_path):
    """DDP, then FSDP: the same images, crops and colours follow, and the same losses."""
    alone = start(part_of_a_run, str(tmp_path / "whole"), 8, 1, world=1)
    for steps, world in ((3, 1), (2, 2), (3, 3)):
        finish(start(part_of_a_run, str(tmp_path / "split"), steps, world, world=world))
    finish(alone)
    runs = [tmp_path / name for name in ("whole", "split")]
    whole, split = (sorted(look for file in run.glob("looks-*") for look in torch.load(file))
                    for run in runs)
    assert len(whole) == 8 * 6 and whole == split
    a, b = ([row["loss"] for row in metrics_of(run) if "loss" in row] for run in runs)
    assert len(a) == 8 and a == pytest.approx(b, rel=1e-5), (a, b)


# ----------------------------------------------------------------------------------------------
# Two machines of two processes


def four_processes(rank, folder):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    process = start_process("cpu")
    out = {"node_size": process.node_size}
    for name in WAYS_TO_CLIP:
        for parallel in ("fsdp", "hsdp"):
            config = replace(config_of(name, *CLIPPED), parallel=parallel)
            out[name, parallel] = whole_steps(config, process, FEW_STEPS)

    # What this process holds of a matrix: a quarter with FSDP, half with HSDP.
    for parallel in ("fsdp", "hsdp"):
        config = replace(config_of("dino"), parallel=parallel)
        student, _ = train.build(config, process)
        train.shard(student, config, process)
        weight = student.backbone.blocks[0].mlp.fc1.weight
        out[parallel] = weight.to_local().numel() / weight.numel()
    torch.save(out, f"{folder}/{rank}.pt")


# So small that every step is clipped: what is clipped wrongly moves too far or not enough.
CLIPPED = ("--clip_grad", "0.01")


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    finish(start(four_processes, str(folder), world=4))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.mark.parametrize("name", WAYS_TO_CLIP)
def test_two_machines_are_one_process(name, of_four):
    losses, *states = joined_steps(config_of(name, *CLIPPED), 4, FEW_STEPS)
    for out in of_four:
        for parallel in ("fsdp", "hsdp"):
            torch.testing.assert_close(out[name, parallel][0], losses, rtol=1e-5, atol=1e-5)
            for of_one, found in zip(states, out[name, parallel][1:], strict=True):
                for key in of_one:
                    torch.testing.assert_close(found[key], of_one[key], rtol=1e-4, atol=1e-6,
                                               msg=f"{parallel}: {key}")


def test_each_machine_has_a_copy(of_four):
    for out in of_four:
        assert out["node_size"] == 2
        assert out["fsdp"] == 1 / 4 and out["hsdp"] == 1 / 2
