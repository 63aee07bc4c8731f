"""What several test modules share: small runs, kills, groups of processes, a folder of images."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import socket
from unittest.mock import patch

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import runtime
import train
import visualize

# A run of seconds: every part of a real one, nothing large.
TINY_RUN = (
    "shapes_dino --data shapes:64 --val_data shapes:32:val --epochs 2 --warmup_epochs 0 "
    "--no_auto_scale --lr 1e-3 --lr_scaling none --momentum_teacher 0.98 "
    "--batch_size_per_gpu 8 --local_crops_number 2 --log_every 2 --save_every 8 --num_workers 0 "
    "--device cpu --precision fp32 --drop_path_rate 0.2 --global_crops_size 24 "
    "--local_crops_size 16"
).split()
TINY_NETWORK = (
    "--patch_size 8 --n_prototypes 32 --head_hidden_dim 32 --head_bottleneck_dim 16 "
    "--no_use_bn_in_head"
).split()
TINY = TINY_RUN + TINY_NETWORK


def saved(folder):
    """The newest checkpoint there: (step, tensors by name such as student.backbone.cls_token)."""
    place = runtime.Place(torch.device("cpu"))
    path, manifest = runtime.find_checkpoint(folder, place)
    index = runtime.Reader(path).read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in index.items()}
    runtime.load_checkpoint(path, state, place)
    return manifest["step"], state


class Killed(Exception):
    pass


@contextlib.contextmanager
def killed_in_step(n):
    """Inside, a run dies when its nth step begins; and it has to."""
    step, calls = train.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == n:
            raise Killed
        return step(*args)

    with patch.object(train, "train_step", dies), pytest.raises(Killed):
        yield


# What most of a tiny run's time would go into, and few tests are about: the figures at its end and
# the memory that it expects.
WHOLE = [(visualize, "draw_curves"), (visualize, "draw_attention_page"), (train, "expected_memory")]
WHOLE = [(module, name, getattr(module, name)) for module, name in WHOLE]
for module, name, _ in WHOLE:
    setattr(module, name, lambda *args: {})


@pytest.fixture(autouse=True)
def whole_runs(request, monkeypatch):
    if request.node.get_closest_marker("whole_run"):
        for module, name, function in WHOLE:
            monkeypatch.setattr(module, name, function)


PROCESSES = multiprocessing.get_context("forkserver")  # imports torch once, for all of them
PROCESSES.set_forkserver_preload(["distill", "evaluate"])


def pytest_sessionstart():
    multiprocessing.forkserver.ensure_running()  # and does so while other tests run


def as_rank(rank, world, port, function, args):
    if world > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(rank, *args)


def start(function, *args, world=2):
    """Processes that each call function(rank, *args), in an environment as torchrun's."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [PROCESSES.Process(target=as_rank, args=(rank, world, port, function, args))
                 for rank in range(world)]
    for p in processes:
        p.start()
    return processes


def finish(processes):
    """They end, and well."""
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * len(processes)


@pytest.fixture
def tiny():
    return list(TINY)


@pytest.fixture
def photos(tmp_path):
    """Two classes of noisy images, JPEG and PNG, of odd sizes: 24 files."""
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        folder = tmp_path / "photos" / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        image = torch.randint(0, 256, (3, 40 + i, 50), generator=generator, dtype=torch.uint8)
        to_pil_image(image).save(folder / f"{i:02d}.{'png' if i % 3 else 'jpg'}")
    return tmp_path / "photos"
