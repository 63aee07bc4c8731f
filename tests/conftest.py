"""What several test modules share: small runs, kills, groups of processes, a folder of images.

Nothing is replaced when this module is imported. A module that trains many tiny runs and is not
about their figures asks for `quick_runs`:

    pytestmark = pytest.mark.usefixtures("quick_runs")

and a fixture of a longer scope, or a process of its own, uses `with without_figures():`.
"""

import contextlib
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from _pytest.runner import runtestprotocol
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

import evaluate
import train
from augment import photometry
from images.shapes import video as draw_video
from machinery.checkpoints import Reader, find_checkpoint, load_checkpoint
from machinery.flags import parse
from machinery.process import Process
from training.config import Config
from training.recipes import PRESETS
from vit import VisionTransformer

# ----------------------------------------------------------------------------------------------
# Tiny runs

# A run of seconds: every part of a real one, nothing large. 16 steps of 8 images.
TINY_RUN = (
    "shapes_dino --data shapes:64 --val_data shapes:32:val --epochs 2 --warmup_epochs 0 "
    "--no_auto_scale --lr 1e-3 --lr_scaling none --momentum_teacher 0.98 "
    "--batch_size_per_gpu 8 --local_crops_number 2 --log_every 2 --save_every 8 "
    "--num_workers 0 --device cpu --precision fp32 --drop_path_rate 0.2 "
    "--global_crops_size 24 --local_crops_size 16").split()
TINY_NETWORK = ("--arch vit_pico --patch_size 8 --n_prototypes 32 --head_hidden_dim 32 "
                "--head_bottleneck_dim 16 --no_use_bn_in_head").split()
TINY = TINY_RUN + TINY_NETWORK

# After TINY: every ingredient of DINO, iBOT and DINOv2 at once, in one epoch of 8 steps.
EVERYTHING = (
    "--ibot_weight 1 --koleo_weight 0.1 --centering sinkhorn --separate_head "
    "--ibot_n_prototypes 24 --num_register_tokens 1 --ffn_layer swiglu --layerscale 0.1 "
    "--layerwise_decay 0.9 --clip_mode network --drop_path_uniform --epochs 1 --lr 0.004"
).split()


@pytest.fixture
def tiny():
    return list(TINY)


def tiny_config(output_dir, *flags):
    """The configuration of a tiny run in this folder; later flags win over those of TINY."""
    return parse(Config, [*TINY, "--output_dir", str(output_dir), *flags], PRESETS)


@contextlib.contextmanager
def without_figures():
    """Inside, runs leave out what would take most of a tiny run's time.

    That is the page at their end, and the count of the memory that a step will need.
    """
    slow = ("training.memory.expected_memory", "figures.story.draw_story")
    with contextlib.ExitStack() as stack:
        for name in slow:
            stack.enter_context(patch(name, lambda *args: {}))
        yield


@pytest.fixture
def quick_runs():
    with without_figures():
        yield


class Killed(Exception):
    """Stands for a kill: nothing in a run catches it."""


@contextlib.contextmanager
def killed_in_step(n):
    """Inside, a run dies when its nth step begins; and it has to."""
    train_step = train.train_step
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == n:
            raise Killed
        return train_step(*args)

    with patch.object(train, "train_step", dies), pytest.raises(Killed):
        yield


# ----------------------------------------------------------------------------------------------
# What a run left behind


def saved(folder):
    """The newest checkpoint: (step, tensors by name, such as student.backbone.cls_token)."""
    process = Process(torch.device("cpu"))
    path, manifest = find_checkpoint(folder, process)
    index = Reader(path).read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in index.items()}
    load_checkpoint(path, state, process)
    return manifest["step"], state


def teacher_of(run):
    """The tensors of a run's teacher.pt."""
    return torch.load(run / "teacher.pt", weights_only=True)


def heads_of(run):
    """The parts of a run's heads.pt, each a dictionary of tensors."""
    return torch.load(run / "heads.pt", weights_only=True)


def metrics_of(run):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in open(run / "metrics.jsonl")]


def same_tensors(a, b):
    """Whether two dictionaries hold the same tensors, bit for bit."""
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def views_of(batch):
    """The global, then the local crops of a batch, coloured: one tensor (B, 3, s, s) each."""
    crops = [*batch["global_crops"], *batch["local_crops"]]
    return [photometry(pixels, draws) for pixels, draws in zip(crops, batch["photometry"])]


# ----------------------------------------------------------------------------------------------
# Groups of processes

PROCESSES = multiprocessing.get_context("forkserver")  # imports torch once, for all of them
PROCESSES.set_forkserver_preload(["distill", "evaluate"])


def pytest_sessionstart():
    # One thread each, for this process and for the programs that it starts: a product of tiny
    # matrices ends before several threads have met, and threads that wait for each other on a
    # machine with other work take ten times as long. OMP_NUM_THREADS=2 pytest takes two.
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def as_rank(rank, world, port, function, args):
    """What a started process does: take its place in the group, then call the function.

    What it prints is not shown; an exception is, on stderr.
    """
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        function(rank, *args)


def start(function, *args, world=2):
    """Processes that each call function(rank, *args), in an environment as torchrun's."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        PROCESSES.Process(target=as_rank, args=(rank, world, port, function, args))
        for rank in range(world)]
    for p in processes:
        p.start()
    return processes


def finish(processes):
    """Wait until they end, and check that they end well."""
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * len(processes)


def program(rank, folder, text):
    """What `python -c TEXT` does in this folder; what it prints goes to printed.txt there."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with open("printed.txt", "w") as file, contextlib.redirect_stdout(file):
        exec(text, {})


# ----------------------------------------------------------------------------------------------
# Two processes at a time
#
# Most tests use one core. So where there are two, the tests run in two processes, each of which
# takes the next file of tests when it has finished one: the suite takes half as long. The second
# process sends what came of its tests to the first, which reports them as if they were its own.


def pytest_runtestloop(session):
    """Run all tests in two processes; pytest's own loop goes on where this returns None."""
    options = session.config.option
    files = {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    one_will_do = len(files) < 8 or (os.cpu_count() or 1) < 2 or not hasattr(os, "fork")
    if one_will_do or options.collectonly or options.maxfail or options.usepdb:
        multiprocessing.forkserver.ensure_running()  # it imports torch while other tests run
        return None

    # The files at the end test whole programs and take longest. They come first here: a long one
    # as the last would leave the other process without work.
    files = list(files.values())[::-1]
    next_file = multiprocessing.Value("i", 0)
    inbox, outbox = multiprocessing.Pipe(duplex=False)
    second = os.fork()
    if second == 0:
        run_second_process(session, files, next_file, outbox)
    outbox.close()
    multiprocessing.forkserver.ensure_running()  # each of the two has one of its own

    # Reports of the second process are passed on between two files, so that the dots of a file
    # stay together.
    for items in taken(files, next_file):
        run_file(session, items, log=True)
        for reports in arrived(inbox, wait=False):
            pass_on(session, reports)
    for reports in arrived(inbox, wait=True):
        pass_on(session, reports)
    _, status = os.waitpid(second, 0)
    if status:
        raise RuntimeError(f"the second process of the tests ended with status {status}")
    return True


def arrived(inbox, wait):
    """What the second process has sent so far; with `wait`, all that it will ever send."""
    with contextlib.suppress(EOFError):  # it has closed its end
        while wait or inbox.poll():
            yield inbox.recv()


def taken(files, next_file):
    """The files that this process gets: each time the first that no process has taken yet."""
    while True:
        with next_file.get_lock():
            number = next_file.value
            next_file.value += 1
        if number >= len(files):
            return
        yield files[number]


def run_file(session, items, log):
    """Run the tests of a file; returns their reports, which are shown at once with `log`."""
    reports = []
    # What a test shares with the next one stays; after the last one of a file nothing does.
    for item, next_item in zip(items, [*items[1:], None]):
        if log:
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports += runtestprotocol(item, log=log, nextitem=next_item)
    return reports


def run_second_process(session, files, next_file, outbox):
    """What the second process does, from its first breath to its last."""
    # pytest writes what tests print into files. This process needs some of its own.
    capture = session.config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    multiprocessing.forkserver.ensure_running()

    status = 1
    with contextlib.suppress(KeyboardInterrupt):
        for items in taken(files, next_file):
            hook = session.config.hook.pytest_report_to_serializable
            reports = run_file(session, items, log=False)
            outbox.send([hook(config=session.config, report=report) for report in reports])
        status = 0
    outbox.close()
    os._exit(status)


def pass_on(session, reports):
    """Report what the second process has found, as if it had been found here."""
    hook = session.config.hook
    for data in reports:
        report = hook.pytest_report_from_serializable(config=session.config, data=data)
        hook.pytest_runtest_logreport(report=report)


# ----------------------------------------------------------------------------------------------
# Images


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


def copy_of(folder):
    """A copy of a folder beside it: the same pictures, which may be judged as other images."""
    copy = folder.with_name(f"{folder.name}-copy")
    if not copy.exists():
        shutil.copytree(folder, copy)
    return copy


# ----------------------------------------------------------------------------------------------
# Evaluations


@pytest.fixture
def terminal():
    """As if the tests had been started in a terminal: under nohup SIGHUP would be ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def small_backbone(tmp_path_factory):
    """The file of a ViT for 16 pixels with random weights: patches of 8, width 64, 4 blocks."""
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=4, num_heads=1)
    file = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(model.state_dict(), file)
    return str(file)


def run_evaluate(line, **flags):
    """evaluate.main on a line of words and some flags more, on the CPU -> the results."""
    argv = line.split()
    for name, value in flags.items():
        argv += [f"--{name}", str(value)]
    task = evaluate.TASKS.get(argv[0])
    if task is None or hasattr(task.Config, "num_workers"):
        argv += ["--num_workers", "0"]
    return evaluate.main([*argv, "--device", "cpu"])


def write_video(frames_folder, masks_folder, seed=0, count=6, size=(60, 45), masks=range(6),
                number=255):
    """A drawn thing, as JPEG files and masks of 0 and `number`."""
    frames_folder.mkdir(parents=True)
    masks_folder.mkdir(parents=True)
    images, truths, _ = draw_video(seed, count, 64)
    for t in range(count):
        image = Image.fromarray(images[t].transpose(1, 2, 0)).resize(size)
        image.save(frames_folder / f"{t:05d}.jpg")
        if t in masks:
            mask = Image.fromarray(truths[t].astype(np.uint8) * number).resize(size, 0)
            mask.save(masks_folder / f"{t:05d}.png")
