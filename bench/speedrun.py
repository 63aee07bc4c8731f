"""Speedrun: how much training it takes until the features are good enough.

    train.Run, seed after seed --> k-NN of the teacher every so many steps --> passed? stop
                                        |
                 seconds (less the judging), images, operations --> a row for each seed

Idea     A fast step is worth nothing if it takes more steps, and a good recipe nothing if each
         step costs too much. The time until a given accuracy counts both. The operations do
         not depend on the machine, so that figures of two machines can be compared.
Paper    DAWNBench (Coleman 2017): time to accuracy; FastDINOv2 (Zhang 2025) for --curriculum
Try      python -m bench speedrun shapes --target 50 --seeds 0 --every 125
Change   another figure of a run is one entry of Speedrun.result
Tests    pytest tests/bench/test_speedrun.py
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import train
from bench.count import count_work
from bench.step import Config
from images.data import Sampler
from machinery.clock import time_when_done
from machinery.flags import UsageError, require
from machinery.process import Process
from training.optim import ema_update
from training.rundir import match_stored_run


@dataclass
class SpeedrunConfig(Config):
    # -- speedrun
    target: float = 70.0  # accuracy that the teacher has to reach by the run's judge, in per cent
    seeds: tuple[int, ...] = (0, 1, 2)  # one run for each
    every: int = 0  # steps from one evaluation to the next; 0: epochs, as --knn_every says


# ----------------------------------------------------------------------------------------------
# A run that is only measured


class MeasuredRun(train.Run):
    """A run of train.py that leaves no checkpoint behind, and knows what it has cost so far.

    `seconds` are those of training: the judge's are taken off. `cpu_seconds` are those in which
    this process had a processor, which other programs on the machine do not lengthen; loader
    processes do not count, so they tell the whole only with --num_workers 0.
    """

    left_behind = "and nothing of it is kept"

    def train(self):
        self.rows = []  # rows of the log
        # Operations of a step of each stage. Counting takes a second, which would be charged to
        # the training if it were done later.
        self.work = [
            sum(count_work(stage).values()) for _, stage in self.config.stages(self.planned)]
        self.begun_training = (time_when_done(self.process), time.process_time())
        super().train()

    def take_off(self, function):
        """Call the function; its time does not count."""
        before = (time_when_done(self.process), time.process_time())
        function()
        after = (time_when_done(self.process), time.process_time())

        # As if training had begun that much later.
        self.begun_training = tuple(begun + b - a
                                    for begun, a, b in zip(self.begun_training, before, after))

    def cost(self) -> dict:
        """What training has cost until now."""
        seconds = time_when_done(self.process) - self.begun_training[0]
        cpu_seconds = time.process_time() - self.begun_training[1]
        batch = self.config.batch_size_per_gpu * self.process.world_size
        return {
            "step": self.step, "seconds": seconds, "cpu_seconds": cpu_seconds,
            "images": self.step * batch, "operations": self.operations()}

    def operations(self) -> int:
        """Operations of the matrix products of all steps so far, on all processes."""
        # Stages of --curriculum have other crops, and so another count for each step. Without
        # them there is one stage.
        done = 0
        total = 0
        for (last, _), work in zip(self.config.stages(self.planned), self.work):
            steps = min(last, self.step) - done
            if steps > 0:
                total += steps * work
                done += steps
        return total * self.process.world_size

    def log(self, schedule: dict):
        super().log(schedule)
        self.rows.append(self.last_row)

    def keep_snapshot(self):
        """Nothing: there will be no page that tells this run."""

    def save(self):
        """Nothing: this run will not be continued."""


def open_run(kind, config: Config, folder: Path, process: Process, **more) -> MeasuredRun:
    """A run of this class in an empty folder, made as train.run makes it and ready to train.

    more: further attributes of the run.
    """
    # What follows is the beginning of train.run. There the class is always train.Run, and a
    # finished run is not trained again.
    images, val = train.open_data(config)
    config = match_stored_run(config, folder, process, len(images))  # for --auto_scale
    one_step = Sampler(len(images), config.batch_size_per_gpu, 1, world_size=process.world_size)
    epoch_steps = config.epoch_length or one_step.steps_per_pass

    run = kind(config, process, folder, images, val, epoch_steps, train.build, ema_update)

    # `total` is moved forward when a run ends early; `planned` stays. Nobody asks for the judge of
    # patches here, whose time would count.
    run.planned = run.total
    run.patch_judge = None
    vars(run).update(more)
    return run


# ----------------------------------------------------------------------------------------------
# Until the target


class Speedrun(MeasuredRun):
    """A run that ends as soon as its teacher reaches the target."""

    target: float  # in per cent
    every: int  # steps from one evaluation to the next; 0: as --knn_every says

    def train(self):
        self.passed = None  # what it has cost by then
        self.history = []  # of each evaluation what it had cost until then, and the accuracy
        super().train()

    def due(self, epochs: int) -> bool:
        # Epochs are too coarse where a pass over the images takes long.
        if not self.every:
            return super().due(epochs)
        return self.step == self.total or self.step % self.every == 0

    def evaluate(self):
        # The cost is asked before the judge, whose time does not count.
        cost = self.cost()
        self.take_off(super().evaluate)
        accuracy = 100 * self.figures["knn"]
        self.history.append(cost | {"accuracy": accuracy})

        # The loop of train.Run goes on while there are steps left.
        if accuracy >= self.target:
            self.passed = cost
            self.total = self.step

    def result(self) -> dict:
        """A row of the table: the cost until the target, or of the whole run."""
        return {
            "seed": self.config.seed, "passed": self.passed is not None,
            "accuracy": self.history[-1]["accuracy"], "history": self.history,
            "untrained": 100 * self.figures["untrained"]} | (self.passed or self.cost())


def speedrun(config: SpeedrunConfig, process: Process) -> dict:
    """Seconds, images and operations until the teacher's k-NN reaches --target, for some seeds.

    Each seed is a run of train.py of its own, which ends there. No checkpoint is kept. With
    --compile, the default on a GPU, the seconds of the first seed contain the compiling, which
    the others find done. With --target 100 no run ends early, and --json has what every accuracy
    on the way has cost.
    """
    require(config, lambda x: x <= 100, "per cent, 0 to 100", "target")
    # The folder of a run has to be there while it trains, for its log; nothing of it is kept.
    rows = []
    try:
        for seed in config.seeds:
            with tempfile.TemporaryDirectory() as folder:
                run = open_run(Speedrun, replace(config, seed=seed), Path(folder), process,
                               target=config.target, every=config.every)
                if len(run.judge.queries) < 2:
                    raise UsageError("--val_data: there are no images to judge with, so no "
                                     "target can be reached; give it, or --val_share")
                run.begin(None)
                run.train()
            rows.append(run.result())
            protocol = run.judge.protocol

    # Also of seeds that have ended before Ctrl-C.
    finally:
        if rows and process.main:
            print_rows(rows, config.target, protocol)
    return {"target": config.target, "protocol": protocol, "runs": rows}


def print_rows(rows: list[dict], target: float, protocol: str):
    """The table, and the medians of the runs that have reached the target."""
    print(f"\nuntil {protocol} of the teacher is {target:g} % (seconds without the judge's)")
    print("  seed  reached     step    images   seconds  CPU seconds     TFLOP  accuracy, %")
    for row in rows:
        reached = "yes" if row["passed"] else "no"
        print(f"{row['seed']:6d} {reached:>8s} {figures_text(row)} {row['accuracy']:12.1f}")

    # A run that has not reached it has no time to the target. So the others alone would make the
    # recipe look better than it is: how many they are is said beside.
    passed = [row for row in rows if row["passed"]]
    print(f"{len(passed)} of {len(rows)} seeds reached it")
    if passed:
        names = ("step", "images", "seconds", "cpu_seconds", "operations")
        medians = {name: statistics.median(row[name] for row in passed) for name in names}
        print(f"{'median of these':>15s} {figures_text(medians)}")


def figures_text(row: dict) -> str:
    """The cost of a run as columns."""
    return (f"{row['step']:8.0f} {row['images']:9,.0f} {row['seconds']:9.1f} "
            f"{row['cpu_seconds']:12.1f} {row['operations'] / 1e12:9.1f}")
