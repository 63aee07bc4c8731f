"""Stored: what a run wrote down: its settings and code, compared with today's, and its end.

    config.json --> the type of each field, compared --> settings by name
                                     |
                          ValueError: not the config.json of a run

    code/ --> the same files today, compared --> a warning that names those that have changed

    summary.json --> what a run that has ended came to

Idea     A run's directory may come from anywhere, and may be older than a field. So each value
         is compared with the type of its field before anybody uses it, and a field that is not
         there has its default. A run that is new has nothing to read: whoever imports this file
         does so where it is used, or is no part of `python train.py`.
Paper    none
Try      python train.py && python train.py --lr 1      it names the setting that differs
Change   a kind of type that a field may have is one branch of `fits`
Tests    pytest tests/training/test_stored.py
"""

import json
import typing
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from machinery.process import Process
from training.config import Config


def fits(value, kind) -> bool:
    """Whether a value that was read from JSON is of the type of a field.

    Examples: [0.1, 0.5] fits tuple[float, float], [0.1] does not; 1 fits float, "1" and true do
    not.
    """
    # tuple[float, float] has the origin tuple and (float, float) inside. A Literal has its words
    # inside, one of which the value has to be.
    origin = typing.get_origin(kind)
    inside = typing.get_args(kind)
    if origin is Literal:
        return value in inside

    # JSON has lists where Python has tuples. tuple[float, ...] may have any length.
    if origin is tuple:
        if not isinstance(value, list):
            return False
        any_length = inside[-1] is Ellipsis
        return (any_length or len(value) == len(inside)) and all(
            fits(part, inside[0]) for part in value)

    if inside:  # a union, such as bool | None
        return any(fits(value, member) for member in inside)

    # JSON may write the float 1.0 as 1. The types are compared, because isinstance takes True
    # for an int.
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def read_config(file: Path, kind: type | None = None) -> dict:
    """The fields of a run's config.json by name, and its global_batch.

    kind: that of the program which continues the run: Config, or the dataclass of distill.py, which
    has more fields; None if nobody continues it. A field that the run did not know, because it is
    older than the field, has its default.
    ValueError if the file is anything else, or a value is not of the type of its field: the
    file may come from anywhere.
    """
    try:
        stored = json.loads(file.read_text())
        if type(stored) is not dict or not fits(stored.get("global_batch"), int):
            raise ValueError("expected an object that knows its global_batch")
        for name, type_of_field in typing.get_type_hints(kind or Config).items():
            if name in stored and not fits(stored[name], type_of_field):
                raise ValueError(f"{name} is {stored[name]!r:.40}")
    except (OSError, ValueError, RecursionError) as error:  # brackets nested without end
        raise ValueError(f"{file}: not the config.json of a run ({error})") from None

    stored = {name: tuple(v) if type(v) is list else v for name, v in stored.items()}

    # Without its teacher a distillation would go on as self-distillation.
    settings = asdict((kind or Config)())
    if kind and stored.get("teacher") and "teacher" not in settings:
        raise ValueError(f"{file}: a run of distill.py, with the teacher {stored['teacher']}; "
                         "continue it by distill.py, or give another --output_dir")
    return settings | stored


def finished(folder: Path, process: Process) -> dict:
    """The summary of a run that has ended; prints that there is nothing left to do."""
    # A run writes summary.json at its end, so that its presence says that the run has ended.
    # Without images to judge with there is no k-NN in it.
    summary = json.loads((folder / "summary.json").read_text())
    result = ""
    if summary["knn"] is not None:
        result = f", {summary['knn_protocol']} {summary['knn']:.1%}"
    process.print(f"{folder} is finished{result}; --no_resume would start it anew")
    return summary


def warn_of_changed_code(folder: Path, process: Process):
    """Say which files of our code are not what they were when the run in `folder` began.

    Who edits a file and types the same command again gets the old run, continued: its first
    steps, or all of them, were made by the code before the change.
    """
    if not process.main:
        return
    top = Path(__file__).resolve().parent.parent
    kept = folder / "code"
    changed = []
    # A file that is new since then is not named: it matters only if one of the old ones uses it.
    for old in sorted(kept.rglob("*.py")):
        new = top / old.relative_to(kept)
        if not new.exists() or new.read_bytes() != old.read_bytes():
            changed.append(str(old.relative_to(kept)))
    if not changed:
        return

    # Five names tell where to look. A new version of the project changes dozens of files.
    names = ", ".join(changed[:5])
    if len(changed) > 5:
        names += f" and {len(changed) - 5} more"
    process.print(f"warning: {names} changed after this run began (its code is in {kept}), so "
                  "what is there was made by other code; --no_resume starts anew")
