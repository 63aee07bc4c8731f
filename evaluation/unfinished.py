"""Unfinished: a training of an evaluation that was stopped goes on where it was.

    every thousandth step --> OUTPUT_DIR/TASK-checkpoint-WEIGHTS/step-N
    the same command      --> the newest step-N, if all settings are the same --> step N + 1

Idea     Heads of the papers' protocols learn for 40,000 steps, and whole networks for days. The
         crops of a step follow from the seed and its number. So weights, what the optimizer
         remembers, and the number of the step are all that a training goes on from: it ends as
         one that nobody has stopped, bit for bit on a CPU.
Paper    none
Try      pytest tests/evaluation/test_unfinished.py
Change   how often a head is kept: SAVE_EVERY; what has to be the same for a training to go on:
         the settings that each task gives to Unfinished
Tests    pytest tests/evaluation/test_unfinished.py
"""

import json
import shutil
from collections.abc import Callable

import torch.distributed.checkpoint as dcp

from evaluation.protocol import Extractor, results_folder
from machinery.checkpoints import Reader, find_checkpoint, load_checkpoint, quiet, save_checkpoint
from machinery.flags import UsageError

# Steps of a head between two checkpoints: some minutes of work, and a small file. Probes and whole
# networks are kept after each pass over the images instead.
SAVE_EVERY = 1000


class Unfinished:
    """The checkpoint of a training that has not ended, in the folder of its results.

    task: the name of the task. settings: JSON of all that the result depends on beside the
    weights of the network. resume: go on with what is there. All processes have to call each
    method.
    """

    def __init__(self, extractor: Extractor, task: str, settings: dict, resume: bool):
        config = extractor.config
        # By default all networks have one folder, and two of them may be judged at the same time:
        # so the checkpoint carries the hash of the weights in its name.
        name = f"{task}-checkpoint-{extractor.sha256[:8]}"
        self.folder = results_folder(config, task) / name
        self.process = extractor.process
        self.resume = resume
        self.task = task

        # What every task depends on, and then its own settings. They stand in the manifest of each
        # checkpoint, with which they are compared.
        settings = {
            "network": extractor.network, "precision": config.precision, "seed": config.seed,
            **settings}
        self.settings = json.loads(json.dumps(settings))  # as it comes back from a file

    def restore(self, state: Callable[[], dict], own: bool = False) -> int:
        """The step to go on from: that of the checkpoint, which is loaded, or else 0.

        state() gives the tensors that are filled in place. own: they are of this process alone,
        which reads them for itself; otherwise one process reads for all. Without `resume` the
        checkpoint is removed. UsageError if it has other settings.
        """
        # Otherwise an old checkpoint of a later step would be taken for the newest one.
        if not self.resume:
            self.remove()
        checkpoint = find_checkpoint(self.folder, self.process, required=True)
        if not checkpoint:
            return 0

        # To go on from another training would give figures that belong to neither of the two,
        # and to overwrite it would lose what may have taken hours: the user has to decide.
        path, manifest = checkpoint
        stored = manifest["settings"]
        different = [key for key in self.settings if self.settings[key] != stored.get(key)]
        if different:
            key = different[0]
            raise UsageError(
                f"{self.folder} holds an unfinished training with other {key} "
                f"({stored.get(key)!s:.40}, here {self.settings[key]!s:.40}); give the same "
                "flags, another --output_dir, or --no_resume")

        # Linear probes are shared among the processes, in another way if there are more or fewer of
        # them than before: each reads those that it trains now, whoever wrote them. A head is the
        # same on all processes, so that one of them reads it and sends it to the others.
        if own:
            with quiet():
                dcp.load(state(), storage_reader=Reader(path), no_dist=True)
        else:
            load_checkpoint(path, state(), self.process)
        self.process.print(f"{self.task}: continuing from step {manifest['step']}")
        return manifest["step"]

    def save(self, step: int, state: dict):
        """Keep the tensors of `state` as those after `step` steps, in place of earlier ones."""
        save_checkpoint(self.folder, step, state, {"settings": self.settings}, self.process, 1)

    def remove(self):
        """The training has ended, and its result is written."""
        if self.process.main:
            shutil.rmtree(self.folder, ignore_errors=True)
