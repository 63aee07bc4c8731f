"""Stages: what lies around the step: reading images, evaluating, and attention by itself.

    files --> decode --> geometry --> collate --> photometry       images a second and core
    features of images, neighbours of features                     beside the bare matrix product
    attention at the lengths of a preset                           SDPA's kernels, one by one
    a step of the linear probes                                    52 of them beside one

Idea     A step is only as fast as what feeds it; each stage is timed alone, in its own seconds.
Paper    none
Try      python -m bench data --data folder:PATH
         python -m bench eval
         python -m bench attention dino_vits16
         python -m bench probes dino_vits16 --batch_size_per_gpu 32
Change   another stage of the input is one mark in time_input
Tests    pytest tests/bench/test_stages.py
"""

import itertools
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

import train
import vit
from backbones.classifier import Blocks, kinds_of_input
from bench.plain import crop_by_crop
from bench.step import Config, Memory, noise
from evaluation.extract import extract
from evaluation.knn import SIMILARITIES_AT_ONCE, knn_vote, top_neighbours
from evaluation.linear import LRS, Probes
from images.data import cached, open_images
from machinery.clock import time_when_done
from machinery.flags import UsageError
from machinery.process import LOW, Process, autocast


@dataclass
class InputConfig(Config):
    # -- data
    plain: bool = False  # beside it the papers' worker, which handles one PIL image after another


@dataclass
class EvaluationConfig(Config):
    # -- eval
    bank: int = 20_000  # how many features vote
    queries: int = 5_000  # how many features are judged


@dataclass
class ProbesConfig(Config):
    # -- probes
    classes: int = 1000  # that the probes tell apart


def time_input(config: InputConfig, process: Process) -> dict:
    """Images per second and core, from file to what the network is fed, stage by stage.

    In the seconds of one thread of this process, so that others on the machine do not count.
    --plain: beside it the papers' worker, one PIL image after another, by turns. Both decode
    alike.
    """
    if "data" not in config.given:
        raise UsageError("--data is missing: the images to read, as in --data folder:PATH")
    if config.plain and config.in_chans != 3:
        raise UsageError(
            f"--plain with --in_chans {config.in_chans}: the papers' worker knows PIL "
            "images of three channels; leave it out")
    images = open_images(config.data, config.data_root, config.download, "--data",
                         config.pixels)
    images = cached(images, config.cache, config.cache_side, config.num_workers)
    size = min(config.batch_size_per_gpu, len(images))
    loader = train.batches_from(0, 1, images.subset(range(size)),
                                replace(config, batch_size_per_gpu=size),
                                Process(torch.device("cpu")))
    views, collate = loader.dataset, loader.collate_fn
    plainly = crop_by_crop(views.multi_crop.views, config.photometry, config.pixels)
    spent, order = defaultdict(float), itertools.cycle(range(len(images)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(config.steps + 2):
            marks, batch = [time.process_time()], [next(order) for _ in range(size)]
            pixels = [images.read(index) for index in batch]
            marks.append(time.process_time())
            samples = [
                dict(views.multi_crop(image, np.random.default_rng([i, index])), index=index,
                     step=i) for image, index in zip(pixels, batch)]
            marks.append(time.process_time())
            crops = collate(samples)
            marks.append(time.process_time())
            train.to_device(crops, config.pixels, torch.device("cpu"))
            marks.append(time.process_time())
            for stage, a, b in zip(("decode", "geometry", "collate", "photometry"), marks,
                                   marks[1:]):
                spent[stage] += (b - a) * (i >= 2)  # the first two warm up
            if config.plain:
                begun = time.process_time()
                for image in pixels:
                    plainly(to_pil_image(image))
                spent["plain"] += (time.process_time() - begun + marks[1] - marks[0]) * (i >= 2)
    finally:
        torch.set_num_threads(threads)
    count, plain = size * config.steps, spent.pop("plain", None)
    spent["worker"] = spent["decode"] + spent["geometry"] + spent["collate"]
    spent["whole"] = spent["worker"] + spent["photometry"]
    if plain:
        spent["plain"] = plain
    print(f"{'stage':12s}  ms/image   images/s and core")
    for stage, time_spent in spent.items():
        print(f"{stage:12s} {1000 * time_spent / count:9.2f} {count / time_spent:12.1f}")
    print("worker: what a core of the loader does; on a GPU photometry is not the cores' work")
    result = {"images_per_second_per_core": {s: count / t for s, t in spent.items()}}
    if plain:
        result["ratio"] = plain / spent["worker"]
        print(f"plain: the same by PIL, all in the worker: {result['ratio']:.1f} times the "
              f"worker's seconds, {plain / spent['whole']:.1f} times the whole's")
    return result


def time_evaluation(config: EvaluationConfig, process: Process) -> dict:
    """Features of images of noise, and k-NN (k = 200) beside the bare matrix product in it."""
    _, teacher = train.build(config, process)
    size, steps = config.batch_size_per_gpu, config.steps
    how = dict(batch_size=size, precision=config.precision, num_workers=config.num_workers)
    extract(teacher.backbone, noise(size), config.global_crops_size, process, **how)
    begun = time_when_done(process)
    extract(teacher.backbone, noise(size * steps), config.global_crops_size, process, **how)
    rate = size * steps / (time_when_done(process) - begun)

    bank, queries = (torch.randn(n, teacher.backbone.embed_dim, device=process.device)
                     for n in (config.bank, config.queries))
    labels, memory = (torch.randint(1000, (len(bank),),
                                    device=process.device), Memory(process.device))
    k = min(200, len(bank))

    def bare():
        for part in queries.split(max(1, SIMILARITIES_AT_ONCE // len(bank))):
            part @ bank.T

    def vote():
        similarities, rows = top_neighbours(queries, bank, k)
        knn_vote(similarities, labels[rows])

    def timed(function):
        begun = time_when_done(process)
        function()
        return time_when_done(process) - begun

    bare(), memory.begin()
    before = memory.peak_gb()
    pairs = [(timed(vote), timed(bare)) for _ in range(3)]
    knn, product = (median(column) for column in zip(*pairs))
    ratio, grown = median(a / b for a, b in pairs), memory.peak_gb() - before
    print(f"extraction   {rate:10.1f} images/s at {config.global_crops_size} px, with "
          f"{config.num_workers} workers")
    print(f"k-NN({k})    {len(queries) / knn:10.1f} queries/s against {len(bank):,d}: "
          f"{knn:.2f} s, {ratio:.2f} times its matrix product, {grown:.2f} GB")
    return {
        "extraction_images_per_second": rate, "knn_seconds": knn, "matmul_seconds": product,
        "knn_ratio": ratio, "knn_memory_gb": grown}


def time_attention(config: Config, process: Process) -> dict:
    """SDPA's kernels at the lengths of this preset, forward and backward: seconds of one
    block.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if config.convnet:
        raise UsageError(f"--arch {config.arch} has no attention")
    shape, results = vit.ARCHS[config.arch], {}
    kind = LOW.get(config.precision, torch.float32)
    groups = [(config.global_crops_number, config.global_crops_size)]
    groups += [
        (config.local_crops_number, config.local_crops_size)] * bool(config.local_crops_number)
    for number, side in groups:
        b, n = (number * config.batch_size_per_gpu, 1 + config.num_register_tokens +
                (side // config.patch_size)**2)
        q, k, v = (torch.randn(b, shape["num_heads"], n, 64, device=process.device, dtype=kind,
                               requires_grad=True) for _ in range(3))

        def once():
            begun = time_when_done(process)
            F.scaled_dot_product_attention(q, k, v).sum().backward()
            return time_when_done(process) - begun

        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            try:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    once(), once()
                    typical = median(once() for _ in range(config.steps))
            except RuntimeError:  # not on this device, or not for this type
                print(f"{b:6d} x {n:4d} tokens  {name.lower():20s} not here")
                continue
            # Two products forward, four backward, besides one that flash does again.
            rate = 6 * 2 * b * shape["num_heads"] * n * n * 64 / typical
            results[f"{b} x {n} {name.lower()}"] = typical
            print(f"{b:6d} x {n:4d} tokens  {name.lower():20s} {1e6 * typical:10.0f} us "
                  f"{rate / 1e12:8.3g} TFLOP/s")
    return {"seconds": results}


def time_probes(config: ProbesConfig, process: Process) -> dict:
    """A step of 52 linear probes beside a step of one: both with their pass through the
    network.
    """
    if config.convnet:
        raise UsageError(f"--arch {config.arch} has no blocks for the probes to choose from")
    _, teacher = train.build(config, process)
    backbone = teacher.backbone.eval()
    read = Blocks(backbone, 4)  # the same for all: one probe reads four blocks, too
    batch, size = config.batch_size_per_gpu, config.global_crops_size
    images = torch.randn(batch, config.in_chans, size, size, device=process.device)
    labels = torch.randint(config.classes, (batch,), device=process.device)
    one_kind = kinds_of_input(backbone.embed_dim, (4,), (False,))
    all_kinds = kinds_of_input(backbone.embed_dim, (1, 4), (False, True))
    one_probe = Probes(one_kind, config.classes, (0.1,), process.device)
    all_probes = Probes(all_kinds, config.classes, LRS, process.device)

    def seconds_of_step(probes):
        begun = time_when_done(process)
        with torch.no_grad(), autocast(config.precision, process.device):
            rows = read(images).float()
        probes.step(rows, labels)
        return time_when_done(process) - begun

    pairs = []
    for _ in range(config.steps + 2):  # by turns; the first two warm up
        pairs.append((seconds_of_step(one_probe), seconds_of_step(all_probes)))
    pairs = pairs[2:]
    one, many = (median(column) for column in zip(*pairs))
    ratio = median(b / a for a, b in pairs)
    count = len(all_kinds) * len(LRS)
    print(f"1 probe      {1000 * one:10.1f} ms a step of {batch} images at {size} px")
    print(f"{count} probes    {1000 * many:10.1f} ms, {ratio:.2f} times as much")
    return {"one_seconds": one, "all_seconds": many, "probes": count, "ratio": ratio}
