"""Claims
1. Two processes move as one would on the joined batch: centre, Sinkhorn-Knopp (unequal counts,
   padding), one whole step of both objectives, with DDP and with FSDP, in both ways to clip.
2. When one of two processes is asked to stop, both save and go; what they saved with FSDP goes on
   with one process and whole tensors.
3. Features and k-NN of two processes are exactly those of one, for odd sizes too.

Every claim is checked in one spawn: starting processes is what costs time.
"""

import os
import signal
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import runtime
import train
from augment import Masking, collate, hidden_places
from conftest import saved
from data import open_images
from features import extract
from losses import EMACenter, SinkhornKnopp, all_sum, entropies
from recipes import PRESETS, Config
from runtime import Place, UsageError, parse, whole_state
from vit import VisionTransformer


def one_step(config, place, batch, fsdp=False):
    """A whole step on one batch: (loss, student's and teacher's weights, centre)."""
    student, teacher = train.build(config, place)
    makers = train.target_makers(config)
    network = student
    if fsdp:
        for each in (student, teacher):
            runtime.shard(each, list(each.backbone.blocks), [each.dino_head], place, "fp32")
    elif place.world_size > 1:
        network = train.DistributedDataParallel(student)
    optimizer = train.OPTIMIZERS["adamw"](train.parameter_groups(student))
    for group in optimizer.param_groups:
        group["eps"] = 1.0  # a step as long as its gradient: rounding stays rounding
    now = dict(
        lr=0.5, last_layer_lr=0.5, weight_decay=0.1, momentum=0.9, teacher_temp=0.05, generator=None
    )
    out = train.train_step(
        network, teacher, makers, optimizer, batch, now, config, place, train.ema_update
    )
    states = (whole_state(student), whole_state(teacher)) if fsdp else (
        student.state_dict(), teacher.state_dict())
    return out["loss"], *map(dict, states), dict(makers.state_dict())


def batch_of(config, indices):
    """Crops of these images, and their share of the masks of images 0 to 7."""
    images, _ = train.open_data(config)
    views = train.Views(images, train.MultiCrop(24, 16, 2, 2), seed=0)
    batch = collate([views[0, 0, i] for i in indices])
    masks = Masking((3, 3), (0.2, 0.7))(16, 0)["masks"].unflatten(0, (2, 8))
    masks = masks[:, list(indices)].flatten(0, 1)
    return batch | hidden_places(masks, 30)


def process(rank, port, flags, folder):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.manual_seed(100 + rank)  # nothing may depend on it
    torch.set_num_threads(1)
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
    for config.centering in ("ema", "sinkhorn"):
        batch = batch_of(config, range(4 * rank, 4 * rank + 4))
        out[config.centering] = one_step(config, place, batch)
    for config.clip_mode in ("network", "parameter"):  # of Sinkhorn
        out[f"fsdp {config.clip_mode}"] = one_step(config, place, batch, fsdp=True)
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
    os.environ["MASTER_PORT"] = str(port + 1)
    try:
        train.run(config)
    except SystemExit as stop:
        out["exit"] = stop.code
    torch.save(out, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    from conftest import TINY

    folder = tmp_path_factory.mktemp("two")
    flags = [*TINY, "--drop_path_rate", "0", "--ibot_weight", "1", "--centering", "sinkhorn"]
    flags += ["--separate_head", "--ibot_n_prototypes", "24"]
    torch.manual_seed(0)
    backbone = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(backbone.state_dict(), folder / "backbone.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(process, (port, flags, str(folder)), nprocs=2)
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


def test_a_step_of_two_is_a_step_of_one(spawned):
    _, flags, outs, _ = spawned
    config = parse(Config, flags, PRESETS)
    for name in ("sinkhorn", "ema", "fsdp network", "fsdp parameter"):
        config.centering = "ema" if name == "ema" else "sinkhorn"
        config.clip_mode = "network" if name == "fsdp network" else "parameter"
        loss, *states = one_step(config, Place(torch.device("cpu")), batch_of(config, range(8)))
        for out in outs:
            torch.testing.assert_close(out[name][0], loss, rtol=1e-5, atol=1e-6)
            for ours, theirs in zip(states, out[name][1:]):
                for k in ours:
                    # float32 sums in another order; the step is large on purpose
                    torch.testing.assert_close(ours[k], theirs[k], rtol=1e-4, atol=2e-6, msg=k)


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
        [*flags, "--batch_size_per_gpu", "4", "--epochs", "1", "--output_dir", str(folder / "run")],
        PRESETS,
    )
    summary = train.run(config)
    assert "continuing from step 5" in capsys.readouterr().out
    assert summary["steps"] == 8  # 64 images in global batches of 8
    config.batch_size_per_gpu = 5
    with pytest.raises(UsageError, match="--batch_size_per_gpu"):
        train.run(config)
