"""Claims
1. Two processes move as one would on the joined batch: centre, Sinkhorn-Knopp (unequal counts,
   padding); ten whole steps of DINO and of DINOv2 (masks, stochastic depth, KoLeo), with DDP and
   with FSDP, in both ways to clip; in bfloat16 near to that.
2. When one of two processes is asked to stop, both save and go; what they saved with FSDP goes on
   with one process and whole tensors.
3. One process goes on as two (DDP), and they as three (FSDP): the same images, crops and colours
   follow, and the same losses.
4. Features and k-NN of two processes are exactly those of one, for odd sizes too.

What two processes can tell is asked in one go: starting them is what costs time.
"""

import contextlib
import functools
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import runtime
import train
from augment import Masking, collate, hidden_places
from conftest import TINY, finish, saved, start
from data import open_images
from features import extract
from losses import (EMACenter, SinkhornKnopp, all_sum, entropies, koleo_loss, make_targets,
                    patch_loss, view_pair_loss)
from recipes import PRESETS, Config
from runtime import Place, UsageError, parse, whole_state
from vit import VisionTransformer


METHODS = {  # what differs, how a process runs it, and what it is compared with
    "dino": ["--centering", "ema", "--clip_mode", "parameter"],
    "dinov2": "--centering sinkhorn --ibot_weight 1 --koleo_weight 0.1 --drop_path_rate 0.3 "
    "--separate_head --ibot_n_prototypes 24 --clip_mode network".split(),
    "dinov2, each tensor clipped": "--centering sinkhorn --ibot_weight 1 --koleo_weight 0.1 "
    "--drop_path_rate 0.3 --clip_mode parameter".split(),
}
STEPS = 10


@functools.cache
def images():
    return open_images("shapes:64")


def share(config, step, rank):
    """The batch of a process, and its schedules: images, masks and dropped samples of its own."""
    views = train.Views(images(), train.MultiCrop(24, 16, 2, 2), seed=0)
    first = 8 * (step % 8) + 4 * rank
    batch = collate([views[0, 0, i] for i in range(first, first + 4)])
    if config.hides_patches:
        masks = Masking((3, 3), (0.2, 0.7))(8, 10 * step + rank)["masks"]
        batch |= hidden_places(masks, 15)
    now = dict(lr=0.5, last_layer_lr=0.5, weight_decay=0.1, momentum=0.9, teacher_temp=0.05,
               generator=torch.Generator().manual_seed(100 * step + rank))
    return batch, now


def begin(config, place):
    student, teacher = train.build(config, place)
    return student, teacher, train.target_makers(config)


def optimizer_of(student):
    optimizer = train.OPTIMIZERS["adamw"](train.parameter_groups(student))
    for group in optimizer.param_groups:
        group["eps"] = 1.0  # a step as long as its gradient: rounding stays rounding
    return optimizer


def ten_steps(config, place, fsdp):
    """(losses, student's and teacher's weights, centres) as the program makes them."""
    student, teacher, makers = begin(config, place)
    if fsdp:
        for each in (student, teacher):
            backbone, *heads = each.children()
            runtime.shard(each, list(backbone.blocks), heads, place, config.precision)
        network = student
    else:
        network = train.DistributedDataParallel(student)
    optimizer, losses = optimizer_of(student), []
    for step in range(STEPS):
        batch, now = share(config, step, place.rank)
        losses.append(train.train_step(network, teacher, makers, optimizer, batch, now, config,
                                       place, train.ema_update)["loss"])
    states = [whole_state(x) if fsdp else x.state_dict() for x in (student, teacher)]
    return torch.stack(losses), *map(dict, states), dict(makers.state_dict())


def ten_joined_steps(config):
    """The same, by one process that has both batches: written out here."""
    student, teacher, makers = begin(config, Place(torch.device("cpu")))
    optimizer, losses = optimizer_of(student), []
    for step in range(STEPS):
        halves = [share(config, step, rank) for rank in (0, 1)]
        now, loss = halves[0][1], 0.0
        inputs = [train.to_device(batch, config.pixels, torch.device("cpu")) for batch, _ in halves]
        weights = [hidden.pop("mask_weights", None) for _, hidden in inputs]
        with torch.no_grad():
            seen = [teacher(views[:1], mask_indices=hidden.get("mask_indices"))
                    for views, hidden in inputs]
        rows = {name: torch.cat([s[name] for s in seen]) for name in makers}
        real = {"dino": None, "ibot": None if weights[0] is None else torch.cat(weights) > 0}
        bias = {name: makers[name](rows[name], 0.05, real[name]) for name in makers}
        for (views, hidden), w, s, (_, mine) in zip(inputs, weights, seen, halves):
            plan = student.backbone.draw_plan(views, mine["generator"])
            said = student(views, plan, **hidden)
            targets = {name: make_targets(s[name], 0.05, bias[name]) for name in makers}
            loss = loss + view_pair_loss(targets["dino"].unflatten(0, (2, 4)),
                                         said["dino"].unflatten(0, (4, 4))) / 2
            if "ibot" in targets:
                loss = loss + patch_loss(targets["ibot"], said["ibot"], w, 8) / 2
            if config.koleo_weight:  # neighbours among the images of one process
                first, second = said["features"][:8].chunk(2)
                loss = loss + 0.1 * (koleo_loss(first) + koleo_loss(second)) / 2
        optimizer.zero_grad()
        loss.backward()
        train.clip_gradients(list(student.children()), config.clip_grad, config.clip_mode)
        train.set_schedule(optimizer, dict(lr=0.5, weight_decay=0.1))
        optimizer.step()
        train.ema_update(teacher, student, now["momentum"])
        for name, maker in makers.items():
            maker.update(rows[name], real[name])
        losses.append(loss.detach())
    return (torch.stack(losses), dict(student.state_dict()), dict(teacher.state_dict()),
            dict(makers.state_dict()))


def process(rank, flags, folder):
    torch.manual_seed(100 + rank)  # nothing may depend on it
    config = parse(Config, flags, PRESETS)
    place = train.runtime.start("cpu")
    out = {"sum": all_sum(torch.tensor(float(rank + 1)))}
    maker = EMACenter(8)
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    maker.update(rows[:3] if rank == 0 else rows[3:])  # unequal counts
    out["center"] = maker.center
    out["mean_entropy"] = entropies((rows[:3] if rank == 0 else rows[3:]).softmax(-1))[1]
    some = 2 * rows[:5] if rank == 0 else 2 * rows[5:]
    out["bias"] = SinkhornKnopp(8)(some, 0.1)
    padded = torch.cat([some, torch.randn(3, 8)])
    out["bias of padded"] = SinkhornKnopp(8)(padded, 0.1, torch.arange(len(padded)) < len(some))
    for name, more in METHODS.items():
        method = parse(Config, [*flags, *more], PRESETS)
        for fsdp in (False, True):
            out[name, fsdp] = ten_steps(method, place, fsdp)
    config = parse(Config, [*flags, *METHODS["dinov2"]], PRESETS)
    for fsdp in (False, True):
        out["bf16", fsdp] = ten_steps(replace(config, precision="bf16"), place, fsdp)[0]
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    model.load_state_dict(torch.load(f"{folder}/backbone.pt"))
    out["features"] = extract(model, open_images("shapes:11"), 16, place)
    config.batch_size_per_gpu, config.output_dir, config.epochs = 4, f"{folder}/run", 1
    config.parallel, config.clip_mode = "fsdp", "parameter"
    # one of the two is asked to stop in step 5: both save and go
    calls, step = [], train.train_step

    def stops(*args):
        calls.append(1)
        if len(calls) == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    train.train_step = stops
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    try:
        train.run(config)
    except SystemExit as stop:
        out["exit"] = stop.code
    torch.save(out, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    flags = [*TINY, "--drop_path_rate", "0"]
    torch.manual_seed(0)
    backbone = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(backbone.state_dict(), folder / "backbone.pt")
    finish(start(process, flags, str(folder)))
    outs = [torch.load(folder / f"{r}.pt", weights_only=False) for r in (0, 1)]
    return folder, flags, outs, backbone


def test_sums_and_centre(spawned):
    _, _, outs, _ = spawned
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    for out in outs:
        assert out["sum"] == 3
        torch.testing.assert_close(out["center"], 0.1 * rows.mean(0))
        mean = rows.softmax(-1).mean(0)
        torch.testing.assert_close(out["mean_entropy"], torch.special.entr(mean).sum())
        bias = SinkhornKnopp(8)(2 * rows, 0.1)  # of 7 rows: 5 and 2
        for name in ("bias", "bias of padded"):  # one constant for all prototypes has no effect
            torch.testing.assert_close(out[name] - out[name].mean(), bias - bias.mean())


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_of_two_are_those_of_one(name, fsdp, spawned, joined={}):
    _, flags, outs, _ = spawned
    if name not in joined:
        joined[name] = ten_joined_steps(parse(Config, [*flags, *METHODS[name]], PRESETS))
    losses, *states = joined[name]
    assert losses[-1] < losses[0]
    for out in outs:
        torch.testing.assert_close(out[name, fsdp][0], losses, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(states, out[name, fsdp][1:], strict=True):
            for k in ours:
                torch.testing.assert_close(ours[k], theirs[k], rtol=1e-4, atol=1e-5, msg=k)


@pytest.mark.parametrize("fsdp", [False, True])
def test_ten_steps_in_bfloat16_are_near(fsdp, spawned):
    _, _, outs, _ = spawned
    for out in outs:
        near, exact = out["bf16", fsdp], out["dinov2", fsdp][0]
        assert not torch.equal(near, exact)
        torch.testing.assert_close(near, exact, rtol=2e-2, atol=0)  # products of 8 bits, ten steps


def test_features_of_two_are_those_of_one(spawned):
    _, _, outs, backbone = spawned
    alone = extract(backbone, open_images("shapes:11"), 16, Place(torch.device("cpu")))
    for out in outs:
        torch.testing.assert_close(out["features"], alone, rtol=1e-5, atol=1e-6)


def test_saved_by_two_continued_by_one(spawned, capsys):
    folder, flags, outs, _ = spawned
    assert [out["exit"] for out in outs] == [143, 143]
    assert saved(folder / "run/checkpoint")[0] == 5
    config = parse(
        Config,
        [*flags, *METHODS["dinov2"], "--clip_mode", "parameter", "--batch_size_per_gpu", "4",
         "--epochs", "1", "--output_dir", str(folder / "run")],
        PRESETS,
    )
    summary = train.run(config)
    assert "continuing from step 5" in capsys.readouterr().out
    assert summary["steps"] == 8  # 64 images in global batches of 8
    config.batch_size_per_gpu = 5
    with pytest.raises(UsageError, match="--batch_size_per_gpu"):
        train.run(config)


def part(rank, folder, steps, world):
    """So many steps of a run, each written down; then it is asked to stop."""
    seen, step = [], train.train_step

    def watched(*args):
        batch = args[4]
        crops = [batch[f"{kind}_crops"].double() for kind in ("global", "local")]  # (V, B, 3, s, s)
        looks = [batch["index"], batch["photometry"].sum((0, 2)),
                 *(x.var((0, 2, 3, 4)) for x in crops)]
        seen.extend(zip(*(x.tolist() for x in looks)))
        if len(seen) == steps * len(batch["index"]) and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    train.train_step = watched
    flags = f"--drop_path_rate 0 --data shapes:24 --batch_size_per_gpu {6 // world} --log_every 1"
    fsdp = ["--parallel", "fsdp"] if world == 3 else []
    with contextlib.suppress(SystemExit):
        train.run(train.read_flags([*TINY, *flags.split(), *fsdp, "--output_dir", folder]))
    torch.save(seen, f"{folder}/seen-{world}-{rank}.pt")


def test_one_goes_on_as_two_and_they_as_three(tmp_path):
    """DDP, then FSDP: the same images, crops and colours follow, and the same losses."""
    alone = start(part, str(tmp_path / "whole"), 8, 1, world=1)
    for steps, world in ((3, 1), (2, 2), (3, 3)):
        finish(start(part, str(tmp_path / "split"), steps, world, world=world))
    finish(alone)
    runs = [tmp_path / name for name in ("whole", "split")]
    whole, split = (sorted(look for file in run.glob("seen-*") for look in torch.load(file))
                    for run in runs)
    assert len(whole) == 8 * 6 and whole == split
    a, b = ([row["loss"] for row in map(json.loads, open(run / "metrics.jsonl")) if "loss" in row]
            for run in runs)
    assert len(a) == 8 and a == pytest.approx(b, rel=1e-5), (a, b)
