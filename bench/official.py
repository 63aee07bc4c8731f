"""Beside the official code: a training step of DINO's ViT-S/16, and the loader, by turns.

    python bench/official.py CLONE [--precision bf16|auto] [--pairs 3] [--steps 4]
    python bench/official.py CLONE --data FOLDER

CLONE is a copy of github.com/facebookresearch/dino, which is not part of this project. The step
is of 2 global crops of 224 px and 8 local ones of 96 px, K = 65,536, 8 images: teacher,
student, loss, backward, clipping, AdamW, teacher's average, one look at the loss. Crops are
there already, in colour: the official code colours them in its loader. Each side runs in a
process of its own. --precision bf16: both under autocast; auto: each as it runs unasked.
--data: images a second and core, from files to coloured crops there, to crops here, where the
device colours them.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
B = 8
CROPS = [(2, 224), (8, 96)]


def crops() -> list[torch.Tensor]:
    """(V, B, 3, s, s) for each crop size, the same on both sides."""
    torch.manual_seed(0)
    return [torch.randn(number, B, 3, side, side) for number, side in CROPS]


def our_step(precision: str):
    """A function that does one step and returns its loss."""
    sys.path.insert(0, str(ROOT))
    import train
    from machinery.process import Process, keep_freed_memory, resolve_precision
    from training.config import Config
    from training.optim import OPTIMIZERS, parameter_groups
    from training.recipes import PRESETS

    process = Process(torch.device("cpu"))
    keep_freed_memory(process)
    settings = PRESETS["dino_vits16"] | {
        "device": "cpu", "batch_size_per_gpu": B, "precision": resolve_precision(
            precision, process.device)}
    config = Config(**settings)
    student, teacher = train.build(config, process)
    optimizer = OPTIMIZERS["adamw"](parameter_groups(student))
    learner = train.Learner(student, teacher, train.build_centerings(config), optimizer)

    # The crops are coloured already, on either side.
    train.photometry = lambda views, draws, pixels: views
    batch = dict(zip(("global_crops", "local_crops"), crops()))
    batch |= {"index": torch.arange(B), "photometry": torch.zeros(10, B, 8)}

    def step():
        schedule = train.schedules(5, 1000, 100_000, config, process)
        return train.train_step(learner, batch, schedule, config, process)["loss"].item()

    return step


def official_step(precision: str):
    import main_dino
    import torch.distributed as dist
    import utils
    import vision_transformer as vits

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    student = utils.MultiCropWrapper(vits.vit_small(patch_size=16, drop_path_rate=0.1),
                                     vits.DINOHead(384, 65536, False, True))
    teacher = utils.MultiCropWrapper(vits.vit_small(patch_size=16), vits.DINOHead(384, 65536))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    criterion = main_dino.DINOLoss(65536, 10, 0.04, 0.04, 0, 100)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    images = [view for group in crops() for view in group]

    def step():
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = criterion(student(images), teacher(images[:2]), 1)
        value = loss.item()
        optimizer.zero_grad()
        loss.backward()
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(1, student, 0)
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(student.parameters(), teacher.parameters()):
                b.data.mul_(0.996).add_((1 - 0.996) * a.detach().data)
        return value

    return step


def official_loader(folder: Path) -> float:
    """Images a second of one thread's own time."""
    import main_dino
    from PIL import Image

    augment = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)
    files = sorted(f for f in folder.rglob("*")
                   if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    files, spent = (files * 24)[:24], 0.0
    torch.set_num_threads(1)
    for turn in range(3):  # the first one warms up
        begun = time.process_time()
        for file in files:
            augment(Image.open(file).convert("RGB"))
        spent += (time.process_time() - begun) * (turn > 0)
    return 2 * len(files) / spent


def side(name: str, args) -> str:
    """Runs in a process of its own; says what it found."""
    if args.data:
        return f"{official_loader(args.data)}"
    step = our_step(args.precision) if name == "ours" else official_step(args.precision)
    times = []
    for _ in range(args.steps + 1):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"{median(times[1:])} {peak}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.clone / "main_dino.py").exists():
        parser.error(
            f"{args.clone} holds no main_dino.py: expected a clone of the official code")
    if args.data and not any(args.data.rglob("*.jp*g")) and not any(args.data.rglob("*.png")):
        parser.error(f"--data {args.data}: expected a folder with JPEG or PNG files in it")
    if args.side:
        sys.path.insert(0, str(args.clone.resolve()))
        print(f"found {side(args.side, args)}")
        return

    def ask(name):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [float(number) for number in out.split("found")[-1].split()]

    if args.data:
        command = [
            sys.executable, "-m", "bench", "data", "dino_vits16", "--batch_size_per_gpu", "24",
            "--steps", "2", "--device", "cpu", "--data", f"folder:{args.data.resolve()}"]
        print(f"official {ask('official')[0]:.1f} images/s and core; ours:")
        subprocess.run(command, check=True, cwd=ROOT)
        return
    pairs = []
    for _ in range(args.pairs):
        (ours, our_peak), (theirs, their_peak) = ask("ours"), ask("official")
        pairs.append((theirs / ours, our_peak / their_peak))
        print(
            f"ours {ours:.2f} s, {our_peak:.2f} GB; official {theirs:.2f} s, "
            f"{their_peak:.2f} GB: {pairs[-1][0]:.2f} times as fast, {pairs[-1][1]:.2f} of the "
            "memory", flush=True)
    speed, memory = (median(column) for column in zip(*pairs))
    print(
        f"median: {speed:.2f} times as fast, {memory:.2f} of the memory; {os.cpu_count()} cores, "
        f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
