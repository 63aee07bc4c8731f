"""Beside the official code: a training step of DINO's ViT-S/16, and the loader, by turns.

    python bench/official.py CLONE [--precision bf16|auto] [--pairs 3] [--steps 4]
    python bench/official.py CLONE --data FOLDER

CLONE is a copy of github.com/facebookresearch/dino, which is not part of this project.

What is compared. A step of either code on the same crops: 2 global ones of 224 px and 8 local
ones of 96 px, K = 65,536, 8 images. Both do the same work: teacher, student, loss, backward,
clipping tensor by tensor, AdamW, the teacher's average, one look at the loss. The crops are
there already, and coloured, because the official code colours them in its loader. --precision
bf16: both under autocast; auto: each as it runs unless asked for more, which is float32 for the
official code.

With --data it is the loader: images a second and core, from files to coloured crops there, and
to crops here, where the device colours them (`python -m bench data` tells both).

Each side runs in a process of its own. The system counts peak memory for a whole process, so
two sides in one could not be told apart, and memory that the first has freed would serve the
second. Also, either side changes its process: ours has the C library keep freed memory, the
official one starts a process group. The two sides take turns, and the ratios are medians of
those of pairs (bench/step.py says why).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
B = 8  # images of a step
CROPS = [(2, 224), (8, 96)]  # (how many, pixels) of each size
ENDINGS = (".jpg", ".jpeg", ".png")  # of images, in small letters
PHOTOS = 24  # images that the loader of the official code reads


def crops() -> list[torch.Tensor]:
    """(V, B, 3, s, s) for each crop size, the same numbers on both sides."""
    torch.manual_seed(0)
    return [torch.randn(number, B, 3, side, side) for number, side in CROPS]


# ----------------------------------------------------------------------------------------------
# The two steps. Modules are imported inside, because each process needs those of one side only


def our_step(precision: str):
    """A function that does one step and returns its loss."""
    sys.path.insert(0, str(ROOT))
    import train
    from machinery.process import Process, resolve_precision
    from training.memory import keep_freed_memory
    from training.config import Config
    from training.optim import OPTIMIZERS, parameter_groups
    from training.recipes import PRESETS

    # The preset is the paper's recipe for a ViT-S/16; what is set here is the machine's part.
    process = Process(torch.device("cpu"))
    keep_freed_memory(process)  # as in training
    settings = PRESETS["dino_vits16"] | {"device": "cpu", "batch_size_per_gpu": B}
    config = Config(**settings)
    config.precision = resolve_precision(precision, process.device)
    student, teacher = train.build(config, process)
    optimizer = OPTIMIZERS["adamw"](parameter_groups(student))
    learner = train.Learner(student, teacher, train.build_centerings(config), optimizer)

    # Ours would colour the crops on the device. They count as coloured, as on the other side,
    # so that part of the step is replaced by one that does nothing.
    train.photometry = lambda views, draws, stats: views
    global_crops, local_crops = crops()
    batch = {
        "global_crops": global_crops, "local_crops": local_crops, "index": torch.arange(B),
        "photometry": torch.zeros(10, B, 8)}

    def step() -> float:
        # Step 5 of 100,000, with epochs of 1,000 steps. In this first epoch the prototypes rest
        # at a learning rate of 0, but AdamW does its work on them as on the other side.
        schedule = train.schedules(5, 1000, 100_000, config, process)
        return train.train_step(learner, batch, schedule, config, process)["loss"].item()

    return step


def official_step(precision: str):
    """A function that does one step as main_dino.py's train_one_epoch does, without a GPU."""
    import main_dino
    import torch.distributed as dist
    import utils
    import vision_transformer as vits

    # The official loss adds up the centre over all processes, also where there is one.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    student = utils.MultiCropWrapper(vits.vit_small(patch_size=16, drop_path_rate=0.1),
                                     vits.DINOHead(384, 65536, False, True))
    teacher = utils.MultiCropWrapper(vits.vit_small(patch_size=16), vits.DINOHead(384, 65536))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)  # so that its forward pass keeps nothing for a backward one

    # 10 crops; the teacher's temperature is 0.04 throughout, for 100 epochs.
    criterion = main_dino.DINOLoss(65536, 10, 0.04, 0.04, 0, 100)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    images = [view for group in crops() for view in group]

    def step() -> float:
        # The original sets the rate by a schedule at every step; which rate does not matter.
        for group in optimizer.param_groups:
            group["lr"] = 1e-6

        # The original's autocast is CUDA's; on a CPU this is its counterpart.
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = criterion(student(images), teacher(images[:2]), 1)
        value = loss.item()  # the original looks at the loss before it goes on

        optimizer.zero_grad()
        loss.backward()
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(1, student, 0)  # no epoch of rest: nothing to cancel
        optimizer.step()

        # main_dino.py, lines 347-350
        with torch.no_grad():
            for a, b in zip(student.parameters(), teacher.parameters()):
                b.data.mul_(0.996).add_((1 - 0.996) * a.detach().data)
        return value

    return step


def official_loader(folder: Path) -> float:
    """Images a second of one thread's own time, from files to ten coloured crops each."""
    import main_dino
    from PIL import Image

    augment = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in ENDINGS)
    files = (files * PHOTOS)[:PHOTOS]  # a small folder is read again and again

    # process_time is the time of this process alone, so other programs do not count.
    torch.set_num_threads(1)
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        for file in files:
            augment(Image.open(file).convert("RGB"))
        seconds.append(time.process_time() - begun)
    timed = seconds[1:]  # the first round warms up
    return len(timed) * len(files) / sum(timed)


# ----------------------------------------------------------------------------------------------
# One side, in a process of its own


def side(name: str, args) -> dict:
    """What "ours" or "official" takes: seconds and GB of a step, or the rate of a loader."""
    if args.data:
        return {"images_per_second": official_loader(args.data)}
    step = our_step(args.precision) if name == "ours" else official_step(args.precision)
    times = []
    for _ in range(args.steps + 1):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from kilobytes
    return {"seconds": median(times[1:]), "gb": peak}  # the first step warms up


def ask(name: str) -> dict:
    """Run `side` in a new process with the flags of this one, and return what it measured."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # its errors are seen
    if done.returncode:
        sys.exit(f"the side {name} has failed, as it says above")
    out = done.stdout
    return json.loads(out.splitlines()[-1])  # the official code prints lines of its own before


# ----------------------------------------------------------------------------------------------
# The command


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # set by `ask`, not by people
    args = parser.parse_args()
    if not (args.clone / "main_dino.py").exists():
        parser.error(
            f"{args.clone} holds no main_dino.py: expected a clone of the official code")
    if args.data and not any(f.suffix.lower() in ENDINGS for f in args.data.rglob("*")):
        parser.error(f"--data {args.data}: expected a folder with JPEG or PNG files in it")
    return args


def compare_loaders(args):
    """The official worker's rate, and below it the table of `python -m bench data`."""
    # The same number of images, and as many rounds that are timed, as in official_loader.
    command = [
        sys.executable, "-m", "bench", "data", "dino_vits16", "--batch_size_per_gpu",
        str(PHOTOS), "--steps", "2", "--device", "cpu", "--data",
        f"folder:{args.data.resolve()}"]
    rate = ask("official")["images_per_second"]
    print(f"official {rate:.1f} images/s and core; ours:", flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def compare_steps(args):
    """A line for each pair of processes, one after the other, and the medians of the ratios."""
    speeds = []
    memories = []
    for _ in range(args.pairs):
        ours = ask("ours")
        official = ask("official")
        speeds.append(official["seconds"] / ours["seconds"])
        memories.append(ours["gb"] / official["gb"])
        print(
            f"ours {ours['seconds']:.2f} s, {ours['gb']:.2f} GB; "
            f"official {official['seconds']:.2f} s, {official['gb']:.2f} GB: "
            f"{speeds[-1]:.2f} times as fast, {memories[-1]:.2f} of the memory", flush=True)
    print(f"median: {median(speeds):.2f} times as fast, {median(memories):.2f} of the memory; "
          f"{os.cpu_count()} cores, torch {torch.__version__}")


def main():
    args = read_flags()
    if args.side:
        sys.path.insert(0, str(args.clone.resolve()))
        print(json.dumps(side(args.side, args)))
    elif args.data:
        compare_loaders(args)
    else:
        compare_steps(args)


if __name__ == "__main__":
    main()
