"""Stages: what lies around the step: reading images, evaluating, and attention by itself.

    files --> decode --> geometry --> collate --> photometry      images a second and core
    features of images, neighbours of features                    beside the bare matrix product
    attention at the lengths of a preset                          SDPA's kernels, one by one
    a step of the linear probes                                   52 of them beside one
    neighbours in a pool that lies on the disk                    beside the bare product

Idea     A step is only as fast as what feeds it, and a run only as fast as its evaluations. So
         each of these stages is timed alone, beside something that says what its seconds are
         worth: the papers' worker, a bare matrix product, another kernel, a single probe.
Paper    none
Try      python -m bench data --data folder:PATH
         python -m bench eval
         python -m bench photometry
         python -m bench attention dino_vits16
         python -m bench probes dino_vits16 --batch_size_per_gpu 32
         python -m bench search --bank 100000
Change   another stage of the input is one entry of `stages` in input_stages
Tests    pytest tests/bench/test_stages.py

Letters  b crops of n tokens, nh heads, hd = 64 numbers of a head; n features of width D, n_bank
         of them in the bank; B images of a batch.
"""

import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms.functional import to_pil_image

import train
import vit
from augment import draw_photometry, photometry
from backbones.classifier import Blocks, kinds_of_input
from bench.plain import colour_one_by_one, crop_by_crop
from bench.step import Config, Memory, noise
from curation.pieces import CHUNK, make_pieces
from curation.search import Exact
from evaluation.extract import extract
from evaluation.knn import SIMILARITIES_AT_ONCE, knn_vote, top_neighbours
from evaluation.linear import LRS, Probes
from images.data import Images, Views, cached, open_images
from machinery.clock import time_when_done
from machinery.flags import UsageError
from machinery.process import LOW, Process, autocast
from training.memory import keep_freed_memory

WARM_UP = 2  # turns that are not timed, before those that are


@dataclass
class InputConfig(Config):
    # -- data
    plain: bool = False  # beside it the papers' worker, one PIL image after another


@dataclass
class EvaluationConfig(Config):
    # -- eval
    bank: int = 20_000  # how many features vote
    queries: int = 5_000  # how many features are judged


@dataclass
class SearchConfig(Config):
    # -- search
    bank: int = 1_000_000  # how many features lie in files
    width: int = 384  # numbers of each
    k: int = 64  # neighbours of each query
    queries: int = 2048  # how many are searched for at once; --steps says how often


@dataclass
class ProbesConfig(Config):
    # -- probes
    classes: int = 1000  # that the probes tell apart


# ----------------------------------------------------------------------------------------------
# The input path: from a file to what the network is fed


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
                         config.channel_stats)
    images = cached(images, config.cache, config.cache_side, config.num_workers)
    size = min(config.batch_size_per_gpu, len(images))

    # One thread, as in a worker of the loader; whoever comes afterwards has all of them again.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = seconds_of_input(images, size, config)
    finally:
        torch.set_num_threads(threads)

    # Two sums: what a worker does, and what has to be done on a machine without a GPU.
    plain = seconds.pop("plain", None)
    worker = sum(spent for stage, spent in seconds.items() if stage != "photometry")
    whole = worker + seconds["photometry"]
    seconds |= {"worker": worker, "whole": whole}
    if plain:
        seconds["plain"] = plain

    count = size * config.steps
    print(f"{'stage':12s}  ms/image   images/s and core")
    for stage, spent in seconds.items():
        print(f"{stage:12s} {1000 * spent / count:9.2f} {count / spent:12.1f}")
    print("worker: what a core of the loader does; on a GPU photometry is not the cores' work")
    rates = {stage: count / spent for stage, spent in seconds.items()}
    result = {"images_per_second_per_core": rates}
    if plain:
        result["ratio"] = plain / worker
        print(f"plain: the same by PIL, all in the worker: {result['ratio']:.1f} times the "
              f"worker's seconds, {plain / whole:.1f} times the whole's")
    return result


def seconds_of_input(images: Images, size: int, config: InputConfig) -> dict[str, float]:
    """Seconds of --steps batches of `size` images, by stage; "plain" is the papers' worker."""
    # The loader of training brings the crops and masks that the flags ask for. Only its parts
    # are used, on the CPU and by one process; none of its workers is started.
    one_batch = replace(config, batch_size_per_gpu=size)
    loader = train.stage_loader(0, 1, images.subset(range(size)), one_batch,
                                Process(torch.device("cpu")))
    multi_crop = loader.dataset.multi_crop
    stages = input_stages(images, multi_crop, loader.collate_fn, config)
    plain_worker = crop_by_crop(multi_crop.views, config.photometry, config.channel_stats)

    seconds = defaultdict(float)
    order = itertools.cycle(range(len(images)))
    for turn in range(WARM_UP + config.steps):
        spent = {}
        outputs = {}
        value = [(turn, next(order)) for _ in range(size)]
        for name, stage in stages.items():
            begun = time.process_time()
            value = stage(value)
            spent[name] = time.process_time() - begun
            outputs[name] = value

        # The papers' worker on the same images, in the same turn. It starts from a PIL image,
        # and is given the time of our decoder, so that the ratio is one of crops and colours.
        if config.plain:
            begun = time.process_time()
            for _, _, image in outputs["decode"]:
                plain_worker(to_pil_image(image))
            spent["plain"] = time.process_time() - begun + spent["decode"]

        if turn >= WARM_UP:
            for name, duration in spent.items():
                seconds[name] += duration
    return dict(seconds)


def input_stages(images: Images, multi_crop: Callable, collate: Callable,
                 config: InputConfig) -> dict[str, Callable]:
    """The stages of the input path by name, in order: each takes what the one before returns.

    The first one takes keys (turn, index), one for each image of the batch. In training the
    first three run in a worker of the loader, for one batch, and the last on the device.
    """

    files = Views(images, multi_crop, config.seed)

    def decode(keys: list[tuple[int, int]]) -> list[tuple]:
        # As in training, a file that does not decode is replaced by another, and named.
        decoded = []
        for turn, index in keys:
            image, broken = files.read(turn, index)
            for reason in broken:
                print(f"does not decode: {reason}")
            decoded.append((turn, index, image))
        return decoded

    def geometry(decoded: list[tuple]) -> list[dict]:
        # As images.data.Views does it, with the turn in the place of the epoch.
        samples = []
        for turn, index, image in decoded:
            crops = multi_crop(image, np.random.default_rng([turn, index]))
            samples.append(dict(crops, index=index, step=turn))
        return samples

    def photometry(batch: dict) -> tuple:
        return train.make_views(batch, config.channel_stats, torch.device("cpu"))

    stages = {}
    stages["decode"] = decode  # file -> pixels
    stages["geometry"] = geometry  # crops and flips; the colours are drawn, as numbers
    stages["collate"] = collate  # samples -> one batch, with its masks
    stages["photometry"] = photometry  # colours are applied; floats, normalised
    return stages


# ----------------------------------------------------------------------------------------------
# Evaluation: features, and their neighbours


def time_photometry(config: Config, process: Process) -> dict:
    """Seconds to colour the crops of a batch, beside a loop over torchvision's functions."""
    # The crops of all views. What is drawn for them does not depend on what they show.
    # As in training, which also compiles the turn of colours where it compiles the networks.
    keep_freed_memory(process)
    train.compile_blocks((), config, process)
    rng = np.random.default_rng(config.seed)
    views = [(config.global_crops_size, min(i, 1)) for i in range(config.global_crops_number)]
    views += [(config.local_crops_size, 2)] * config.local_crops_number
    batches = []
    for size, view in views:
        shape = (config.batch_size_per_gpu, 3, size, size)
        crops = torch.randint(256, shape, dtype=torch.uint8, device=process.device)
        draws = [draw_photometry(config.photometry, view, rng) for _ in crops]
        batches.append((crops, torch.from_numpy(np.stack(draws))))

    # By turns, so that both meet the same conditions; the first turns warm up.
    seconds = {"batch": [], "loop": []}
    for _ in range(WARM_UP + config.steps):
        for name, colour in (("batch", photometry), ("loop", colour_one_by_one)):
            begun = time_when_done(process)
            for crops, params in batches:
                colour(crops, params)
            seconds[name].append(time_when_done(process) - begun)
    seconds = {name: values[WARM_UP:] for name, values in seconds.items()}
    ratios = [loop / batch for loop, batch in zip(seconds["loop"], seconds["batch"])]
    result = {f"{name}_seconds": median(values) for name, values in seconds.items()}
    result["ratio"] = median(ratios)
    print(f"{result['batch_seconds']:.3f} s, the loop {result['loop_seconds']:.3f} s: "
          f"{result['ratio']:.2f} times")
    return result


def time_evaluation(config: EvaluationConfig, process: Process) -> dict:
    """Features of images of noise, and k-NN (k = 200) beside the bare matrix product in it."""
    _, teacher = train.build(config, process)
    rate = extraction_rate(teacher.backbone, config, process)
    print(f"extraction   {rate:10.1f} images/s at {config.global_crops_size} px, with "
          f"{config.num_workers} workers")
    knn = time_knn(teacher.backbone.embed_dim, config, process)
    return {"extraction_images_per_second": rate} | knn


def extraction_rate(backbone: nn.Module, config: EvaluationConfig, process: Process) -> float:
    """Images a second from a data set to features, with the loader's workers."""
    batch = config.batch_size_per_gpu
    size = config.global_crops_size
    options = dict(batch_size=batch, precision=config.precision, num_workers=config.num_workers)

    images = replace(noise(batch * config.steps, config.in_chans),
                     channel_stats=config.channel_stats)
    extract(backbone, images.subset(range(batch)), size, process, **options)  # warms up
    begun = time_when_done(process)
    extract(backbone, images, size, process, **options)
    return len(images) / (time_when_done(process) - begun)


def time_knn(width: int, config: EvaluationConfig, process: Process) -> dict:
    """Seconds and memory of the vote on random features (n, width), and of its product alone.

    The product queries @ bank.T compares each query with each image of the bank, which has to
    be done. A ratio near 1 says that choosing neighbours and voting cost next to nothing
    beside it.
    """
    # The time depends on how many features there are, and not on what they are. The labels
    # are those of 1,000 classes, as in ImageNet.
    bank = torch.randn(config.bank, width, device=process.device)  # (n_bank, D)
    queries = torch.randn(config.queries, width, device=process.device)  # (n, D)
    labels = torch.randint(1000, (len(bank),), device=process.device)  # (n_bank,)
    k = min(200, len(bank))

    def bare_product():
        # In the same chunks of queries as top_neighbours, so that both use the cache alike.
        for part in queries.split(max(1, SIMILARITIES_AT_ONCE // len(bank))):
            part @ bank.T

    def vote():
        similarities, rows = top_neighbours(queries, bank, k)
        knn_vote(similarities, labels[rows])

    def seconds_of(function) -> float:
        begun = time_when_done(process)
        function()
        return time_when_done(process) - begun

    # By turns, as versions of a step (step.py): the ratio is the median of those of pairs. The
    # memory is what the vote takes beyond the bank and the queries, which are there before.
    bare_product()  # warms up
    memory = Memory(process.device)
    memory.begin()
    before = memory.peak_gb()
    knn_seconds = []
    product_seconds = []
    for _ in range(3):
        knn_seconds.append(seconds_of(vote))
        product_seconds.append(seconds_of(bare_product))
    knn = median(knn_seconds)
    product = median(product_seconds)
    ratio = median(a / b for a, b in zip(knn_seconds, product_seconds))
    grown = memory.peak_gb() - before

    print(f"k-NN({k})    {len(queries) / knn:10.1f} queries/s against {len(bank):,d}: "
          f"{knn:.2f} s, {ratio:.2f} times its matrix product, {grown:.2f} GB")
    return {
        "knn_seconds": knn, "matmul_seconds": product, "knn_ratio": ratio,
        "knn_memory_gb": grown}


def time_search(config: SearchConfig, process: Process) -> dict:
    """A slice of the search for neighbours that curation makes, and the hours of all of it."""

    # Random features of unit length, in files as `curate.py embed` writes them.
    def features(start: int, end: int) -> np.ndarray:
        rows = np.random.default_rng(start).standard_normal((end - start, config.width),
                                                            np.float32)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)

    def seconds() -> float:
        # On a CPU those of this process, so that other work on the machine does not count.
        return time.process_time() if process.device.type == "cpu" else time_when_done(process)

    with tempfile.TemporaryDirectory() as folder:
        table = make_pieces(Path(folder), config.bank, 2**16, features, process, "features")
        search = Exact(table, np.arange(len(table)), process.device)
        memory = Memory(process.device)
        memory.begin()
        spent = []
        for step in range(config.steps):
            rows = (np.arange(config.queries) + step * config.queries) % len(table)
            queries = torch.from_numpy(table[rows]).float()  # (n, D)
            begun = seconds()
            search(queries, config.k, rows)
            spent.append(seconds() - begun)
        peak = memory.peak_gb()

        # The product of the queries with as many features as a chunk has, for the rate that
        # the hardware reaches in it.
        queries = queries.to(process.device)
        chunk = torch.from_numpy(table[np.arange(min(CHUNK, len(table)))]).float()
        chunk = chunk.to(process.device)
        products = []
        for _ in range(1 + WARM_UP):
            begun = seconds()
            queries @ chunk.T
            products.append(seconds() - begun)

    step_seconds = median(spent)
    product = min(products) * len(table) / len(chunk)
    hours = step_seconds * len(table) / config.queries / 3600
    core = " of one core" if process.device.type == "cpu" else ""
    print(
        f"search       {config.queries / step_seconds:10.1f} queries/s against "
        f"{len(table):,d} x {config.width}: {step_seconds:.2f} s for {config.queries:,d}, "
        f"{step_seconds / product:.2f} times the product; all of them {hours:.2f} h{core}; the "
        f"process held {peak:.2f} GB at most, with the pages of the files in it")
    return {
        "search_seconds": step_seconds, "product_seconds": product, "hours": hours,
        "peak_gb": peak}


# ----------------------------------------------------------------------------------------------
# Attention by itself

# PyTorch's implementations of attention, by their names in SDPBackend. Usually PyTorch chooses
# one of them by itself; here each is tried.
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def time_attention(config: Config, process: Process) -> dict:
    """SDPA's kernels at a preset's lengths: seconds of one block, forward and backward."""
    if config.convnet:
        raise UsageError(f"--arch {config.arch} has no attention")
    heads = vit.ARCHS[config.arch]["num_heads"]
    kind = LOW.get(config.precision, torch.float32)

    # A step calls attention once per block and crop size, with all crops of that size.
    crop_sizes = [(config.global_crops_number, config.global_crops_size)]
    if config.local_crops_number and config.dino_weight:  # as train.stage_loader cuts them
        crop_sizes.append((config.local_crops_number, config.local_crops_size))

    results = {}
    for number, side in crop_sizes:
        b = number * config.batch_size_per_gpu
        n = 1 + config.num_register_tokens + (side // config.patch_size)**2
        # Queries, keys and values. Every architecture in vit.ARCHS has heads of 64 numbers.
        inputs = []
        for _ in range(3):
            x = torch.randn(b, heads, n, 64, device=process.device, dtype=kind)
            inputs.append(x.requires_grad_())

        for name in KERNELS:
            try:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    seconds = seconds_of_attention(inputs, config.steps, process)
            except RuntimeError:  # not on this device, or not for this type
                print(f"{b:6d} x {n:4d} tokens  {name.lower():20s} not here")
                continue

            # Counted are six products of (n, 64) and (64, n), or of that size: two forward
            # (scores; weights times values), and backward two for each of them. Flash attention
            # computes the scores once more in its backward pass; that is not counted.
            rate = 6 * 2 * b * heads * n * n * 64 / seconds
            results[f"{b} x {n} {name.lower()}"] = seconds
            print(f"{b:6d} x {n:4d} tokens  {name.lower():20s} {1e6 * seconds:10.0f} us "
                  f"{rate / 1e12:8.3g} TFLOP/s")
    return {"seconds": results}


def seconds_of_attention(inputs: list[Tensor], steps: int, process: Process) -> float:
    """The median over `steps` calls, forward and backward; inputs: q, k, v, (b, nh, n, hd)."""
    times = []
    for _ in range(WARM_UP + steps):
        begun = time_when_done(process)
        F.scaled_dot_product_attention(*inputs).sum().backward()
        times.append(time_when_done(process) - begun)
    return median(times[WARM_UP:])


# ----------------------------------------------------------------------------------------------
# The linear probes


def time_probes(config: ProbesConfig, process: Process) -> dict:
    """A step of 52 linear probes beside a step of one, with the pass through the network."""
    if config.convnet:
        raise UsageError(f"--arch {config.arch} has no blocks for the probes to choose from")
    _, teacher = train.build(config, process)
    backbone = teacher.backbone.eval()

    # One pass through the network serves all probes of a step. The single probe reads the class
    # tokens of four blocks, so that its pass through the network is the same.
    read = Blocks(backbone, 4)
    one_kind = kinds_of_input(backbone.embed_dim, (4,), (False,))
    all_kinds = kinds_of_input(backbone.embed_dim, (1, 4), (False, True))
    count = len(all_kinds) * len(LRS)

    batch = config.batch_size_per_gpu
    size = config.global_crops_size
    images = torch.randn(batch, config.in_chans, size, size, device=process.device)
    labels = torch.randint(config.classes, (batch,), device=process.device)
    one_probe = Probes(one_kind, config.classes, (0.1,), process.device)
    all_probes = Probes(all_kinds, config.classes, LRS, process.device)

    def seconds_of_step(probes: Probes) -> float:
        begun = time_when_done(process)
        with torch.no_grad(), autocast(config.precision, process.device):
            rows = read(images).float()  # (B, 5*D)
        probes.step(rows, labels)
        return time_when_done(process) - begun

    # By turns: the ratio is the median of those of pairs, as for the versions of a step.
    one_seconds = []
    all_seconds = []
    for turn in range(WARM_UP + config.steps):
        one = seconds_of_step(one_probe)
        many = seconds_of_step(all_probes)
        if turn >= WARM_UP:
            one_seconds.append(one)
            all_seconds.append(many)
    one = median(one_seconds)
    many = median(all_seconds)
    ratio = median(b / a for a, b in zip(one_seconds, all_seconds))

    print(f"1 probe      {1000 * one:10.1f} ms a step of {batch} images at {size} px")
    print(f"{count} probes    {1000 * many:10.1f} ms, {ratio:.2f} times as much")
    return {"one_seconds": one, "all_seconds": many, "probes": count, "ratio": ratio}
