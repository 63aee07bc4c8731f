"""Evaluate: how good are frozen features? One command for each protocol of the papers.

    --weights --> backbone, frozen --> features of --data and --val_data --> table, results.json
                                          |
         of images      evaluation/ knn  linear  logreg  finetune  retrieval  copies  export
         of all pixels  evaluation/ segment  patches  depth  masks  video

Idea     A network is judged by what can be read off its features without changing them. So the
         figures say what was learned without labels, and not what labels taught it afterwards.
Paper    DINO sec. 4 and appendix F; DINOv2 sec. 7; each file of evaluation/ names its place
Try      python evaluate.py knn --weights RUN
         python evaluate.py all --weights RUN        one report card
         python evaluate.py features --weights RUN --data folder:PATH --output features.npy
Change   a new protocol is one file in evaluation/ with a Config and a `run`, and one line in
         TASKS
Tests    pytest tests/test_evaluate.py
"""

import copy
import dataclasses
import os
import time
from pathlib import Path

from evaluation import (copies, depth, export, finetune, knn, linear, logreg, masks, patches,
                        retrieval, segment, video)
from evaluation.protocol import Extractor, keep_earlier, results_folder
from machinery.checkpoints import write_json
from machinery.flags import UsageError, command, did_you_mean, parse, user_errors
from machinery.process import resolve_precision, start_process

# Each of these modules has a dataclass Config, its flags, and a function run(extractor), which
# prints its table and returns its figures; "protocol" in them says in words how it was judged.
# "headline", names and shares from 0 to 1, goes on the report card in per cent. A module may have
# a function on_report_card(config, model) as well: the config with which `all` judges by it, or
# None where the data or the network have not what it needs.
TASKS = {
    "knn": knn, "linear": linear, "logreg": logreg, "finetune": finetune,
    "retrieval": retrieval, "copies": copies, "segment": segment, "patches": patches,
    "depth": depth, "masks": masks, "video": video, "features": export}


def judging_tasks() -> dict:
    """The tasks on the report card. `features` writes a table and judges nothing."""
    return {name: task for name, task in TASKS.items() if task is not export}


def run_all(extractor: Extractor) -> dict:
    """All protocols on labelled images, those on pixels where --data has maps; a report card."""
    results = {}
    card = {}
    for name, task in judging_tasks().items():
        # Each task gets its own dataclass: the flags that `all` has, and else its defaults.
        values = {}
        for field in dataclasses.fields(task.Config):
            if field.name in flags_of_all():
                values[field.name] = getattr(extractor.config, field.name)
        config = task.Config(**values)
        # Several tasks write a head.pt: each has a folder of its own. It is not that of the task
        # when it runs alone, whose results and unfinished training are left as they are.
        config.output_dir = str(Path(config.output_dir or "evaluations/all") / name)
        if hasattr(task, "on_report_card"):
            config = task.on_report_card(config, extractor.model)
        if config is None:
            continue

        own_extractor = copy.copy(extractor)  # the network is shared
        own_extractor.config = config
        begun = time.time()
        results[name] = task.run(own_extractor)
        # Written at once, so that the figures are kept if a later task fails.
        write_results(own_extractor, name, results[name], begun)
        card |= results[name].get("headline", {})

    # Every figure on the card is a share, so that all have the same unit; RMSE in metres, say,
    # is in the table of its task.
    extractor.process.print(f"\nreport card of {extractor.config.weights}")
    for key, value in card.items():
        extractor.process.print(f"  {key:24s} {value:7.2%}")
    return results | {"headline": card}


def flags_of_all() -> set[str]:
    """The names of the flags that mean the same in every protocol that has them.

    Example: --epochs and --seed of several protocols are one flag of `all`. But --temperature
    is .07 in knn and .1 in video: `all` does not have it, and each keeps its own. Nor does it
    have --head, because a head fits the task that it was trained for, and no other; or --lr,
    which is the rate of SGD for linear probes, and of AdamW for a whole network.
    """
    # Two protocols mean the same by a flag if its type and its default are the same: a flag of
    # `all` has one default, and no protocol is to change because it runs beside others.
    meanings = {}
    for task in judging_tasks().values():
        for field in dataclasses.fields(task.Config):
            meanings.setdefault(field.name, set()).add((str(field.type), str(field.default)))
    return {name for name, several in meanings.items() if len(several) == 1} - {"head", "lr"}


def config_of_all() -> type:
    """The dataclass of `all`, with the flags of flags_of_all."""
    # The new class inherits from the Config of each task, so it has their fields with their
    # help. A name that means several things is one field of it, too, but must not be a flag. So
    # that field is declared once more, with the mark "no_flag", by which machinery/flags.py
    # leaves it out. Example: knn has a temperature of .07 and video one of .1. The new class has
    # the field with .07, and no --temperature. run_all does not hand the field on, so knn votes
    # at .07 and video at .1.
    bases = tuple(task.Config for task in judging_tasks().values())
    shared = flags_of_all()
    hidden = []
    for base in bases:
        for field in dataclasses.fields(base):
            if field.name not in shared:
                value = dataclasses.field(default=field.default, metadata={"no_flag": True})
                hidden.append((field.name, field.type, value))

    # Where several tasks have the field, the first one in TASKS gives its value, as Python does
    # where a class inherits a name twice. The dictionary is filled from the last task to the
    # first, so that the value of the first task overwrites the others.
    unique = {name: (name, kind, value) for name, kind, value in reversed(hidden)}
    return dataclasses.make_dataclass("Config", unique.values(), bases=bases)


def write_results(extractor: Extractor, name: str, results: dict, begun: float) -> dict:
    """The figures with what they belong to, so that results.json can be read a year later.

    begun: when the task began, by time.time(). The main process writes them into the results.json
    of the task's folder; all processes have the same figures.
    """
    # The weights are a file or a run, whose path is kept, or else a name or a URL.
    config = extractor.config
    is_file = os.path.exists(config.weights)
    flags = [
        field.name for field in dataclasses.fields(config) if "no_flag" not in field.metadata]
    images = {flag: getattr(config, flag) for flag in ("data", "val_data") if flag in flags}
    about = {
        "task": name,
        **images, "weights": os.path.abspath(config.weights) if is_file else config.weights,
        "checkpoint_key": config.checkpoint_key, "weights_sha256": extractor.sha256,
        "image_size": extractor.size, "precision": config.precision, "minutes": round(
            (time.time() - begun) / 60, 2)}
    results = about | results  # a task has told what it did not take from these flags

    # `features` has written its own file by now, and wants a results.json only where --output_dir
    # asks for it.
    if extractor.process.main and (name != "features" or config.output_dir):
        path = results_folder(config, name) / "results.json"
        earlier = keep_earlier(path)
        write_json(path, results)
        note = f"; the one before it is {earlier.name} now" if earlier else ""
        print(f"wrote {path}{note}")
    return results


USAGE = "python evaluate.py TASK --weights RUN_OR_FILE_OR_NAME [--flag ...]"


def choose_task(argv: list[str]):
    """The first word -> (name, dataclass of its flags, function that runs it).

    UsageError with the names of the tasks if it is none of them.
    """
    # A word that is spelled wrongly is answered by the nearest name.
    choices = ", ".join([*TASKS, "all"])
    if not argv or argv[0] not in (*TASKS, "all"):
        given = argv[0] if argv else ""
        hint = did_you_mean(given, [*TASKS, "all"])
        raise UsageError(f"task {given!r}: choose from {choices}; {USAGE}{hint}")
    name = argv[0]
    if name == "all":
        return name, config_of_all(), run_all
    return name, TASKS[name].Config, TASKS[name].run


def overview() -> str:
    """What `python evaluate.py` prints: the tasks, and how to see the flags of one."""
    # What a task does is the first line of the docstring of its function, so that a new line in
    # TASKS needs no second place to be explained in.
    lines = [f"usage: {USAGE}", "", "TASK is one of"]
    for name, task in TASKS.items():
        lines.append(f"  {name:10s} {task.run.__doc__.splitlines()[0]}")
    lines.append(f"  {'all':10s} {run_all.__doc__}")
    lines += ["", "python evaluate.py TASK --help lists the flags of that task"]
    return "\n".join(lines)


def read_flags(config_class: type, name: str, argv: list[str]):
    """The words behind the name of a task -> its configuration, checked."""
    config = parse(config_class, argv,
                   usage=f"python evaluate.py {name} --weights WHAT [--flag ...]")

    # A protocol may refuse values in a method `check` of its Config. For `all`, which inherits
    # from every Config, each of these methods has to be called; `config.check()` would call the
    # first one only.
    for base in config_class.__mro__:
        if "check" in vars(base):
            base.check(config)
    return config


@command
def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(overview())
        return None
    name, config_class, run = choose_task(argv)
    config = read_flags(config_class, name, argv[1:])

    begun = time.time()
    process = start_process(config.device)
    config.precision = resolve_precision(config.precision, process.device, ("tf32",))
    with user_errors():
        extractor = Extractor(config, process)
        results = run(extractor)
    return write_results(extractor, name, results, begun)


if __name__ == "__main__":
    main()
