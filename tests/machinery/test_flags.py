"""Claims
1. Flags follow from the dataclass; default, preset and flag have that order of authority.
2. Every misuse is one line that names the flag, and exit code 2; control-C is one line and 130.
3. The help is in the groups of the dataclass and has the comments beside the fields.
4. A rule that several fields must obey is refused by the name of the field that breaks it.
5. No number ends in a traceback: in every program each numeric flag takes NaN, infinity, -1, 0,
   1e30 and 10^24, or refuses them in one line that names it; what it takes is finite.
6. A file that the system refuses is one line with its name, and exit code 2.
7. A flag of the official programs is answered by ours; a wrong choice by the nearest one.
8. A Python that is too old is told so by every program.
"""

import contextlib
import errno
import io
import json
import math
import os
import runpy
import sys
import typing
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from conftest import TINY, start

import distill
import evaluate
import train
import visualize
from bench import forecast, stages, step
from figures import attention
from machinery import flags, official
from machinery.flags import LARGEST, UsageError, command, parse, require, user_errors
from training.check import check
from training.recipes import DISTILLATION, PRESETS

ROOT = Path(__file__).parents[2]
PATIENCE = 100  # seconds after which a test gives up


@dataclass
class Config:
    preset: str = ""
    # -- first
    name: str = "a"  # what it is called, 100 % of the time
    size: int = 3  # pixels
    range: tuple[float, float] = (0.1, 0.5)  # from, to
    kind: Literal["one", "two"] = "one"  # which
    # -- second
    shiny: bool = True  # polish it
    weight: float = -1.0  # may be negative
    made: str = field(default="", metadata={"no_flag": True})  # set by the program


SIZES = {"small": dict(size=1, shiny=False), "large": dict(size=9)}


def parse_line(line):
    return parse(Config, line.split(), SIZES)


def test_authority():
    assert parse_line("") == Config("small", size=1, shiny=False)
    assert parse_line("large --name b --range 0.2 0.3") == Config("large", "b", 9, (0.2, 0.3))
    assert parse_line("large --no_shiny").shiny is False
    assert parse_line("large --shiny false").shiny is False
    assert parse_line("small --shiny").shiny is True
    assert parse_line("small --shiny true").shiny is True


@pytest.mark.parametrize("line, words",
                         [("smal", "did you mean small"), ("--siz 4", "did you mean --size"),
                          ("-size 4", "no flag -size; did you mean --size"),
                          ("--shiny small", "a preset or a task comes before all flags"),
                          ("--size four", "--size"),
                          ("--size -1", "--size: -1: expected 0 or more"),
                          (f"--size {10**24}", "at most 2,147,483,647"),
                          ("--size 2147483648", "--size: 2147483648: expected"),
                          ("--range 0.1 inf", "--range: inf: expected"),
                          ("--weight inf", "--weight: inf: expected"),
                          ("--weight nan", "--weight: nan: expected"),
                          ("--made here", "there is no flag --made"),
                          ("--range -0.1 nan", "--range: -0.1"),
                          ("--range 0.1 nan", "--range: nan"), ("--kind three", "--kind"),
                          ("--range 1", "--range"), ("--shiny maybe", "maybe")])
def test_misuse(line, words):
    with pytest.raises(UsageError, match=words):
        parse_line(line)


def test_what_may_be_negative_and_what_is_the_largest():
    assert parse_line("--weight -2.5").weight == -2.5
    assert parse_line(f"--size {LARGEST}").size == LARGEST


@pytest.mark.parametrize("program, line, answer", [
    (train.read_flags, "--data_path x",
     "there is no flag --data_path; here it is --data folder:"),
    (train.read_flags, "--out_dim=5",
     "here it is --n_prototypes 65536, or --n_prototypes 8192"),
    (train.read_flags, "--arch deit_small", "did you mean vit_small?"),
    (train.read_flags, "--pretrained_weights x", "there is no flag --pretrained_weights; "),
    (evaluate.main, "knn --pretrained_weights x", "here it is --weights FILE"),
    (evaluate.main, "linear --pretrained_linear x", "here it is --head dino_vits16_lc"),
    (evaluate.main, "knn --arch vit_small", "here it is not needed: They are read off the"),
    (evaluate.main, "copies --imsize 320", "here it is --image_size"),
    (visualize.main, "attention p --threshold 1", "here it is --share 0.6")])
def test_flags_of_the_official_programs(program, line, answer, capsys):
    with pytest.raises((UsageError, SystemExit)) as stop:
        program(line.split())
    message = capsys.readouterr().err or str(stop.value)
    assert answer in message and message.count("\n") <= 1


@pytest.mark.parametrize("given, meant", [("--batch_size", "--batch_size_per_gpu"),
                                          ("--save", "--save_every"),
                                          ("--mask", "--mask_probability"),
                                          ("--crops", "--global_crops_number"),
                                          ("--temp", "--student_temp"),
                                          ("--epoch", "--epochs")])
def test_a_flag_that_was_shortened(given, meant):
    """What begins so comes first, then what has the word in it, then what looks like it."""
    with pytest.raises(UsageError, match=f"no flag {given}; did you mean {meant}"):
        train.read_flags([given, "4"])


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    config = train.read_flags(["--output_dir=~/runs/x", "--cache=~", "--data=folder:~/photos"])
    assert (config.output_dir, config.cache) == ("/home/of/runs/x", "/home/of")
    assert config.data == "folder:~/photos"  # open_images knows where the path begins


def test_without_the_page_of_official_flags(monkeypatch, tmp_path):
    """A copy of the code without its docs still says what it can."""
    monkeypatch.setattr(official, "OFFICIAL", tmp_path / "none.md")
    with pytest.raises(UsageError, match="no flag --data_path; did you mean"):
        train.read_flags(["--data_path", "x"])


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_line("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    text = text[text.index("first:"):]
    assert text.index("--size") < text.index("second:") < text.index("--shiny")
    assert "100 % of the time" in text


def test_exit_code(capsys):

    @command
    def main(argv):
        with user_errors():
            raise ValueError("--size 3: too small")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --size 3: too small\n"

    @command
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        interrupted([])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


PROGRAMS = ["train.py", "evaluate.py", "distill.py", "visualize.py"]


def begun_by_python_3_10(rank, folder):
    """Run each program as an older Python would; FOLDER/all: what it printed, what it read."""
    sys.version_info = (3, 10, 12)
    outcome = {}
    for program in PROGRAMS:
        ours = [
            name for name, module in sys.modules.items()
            if str(getattr(module, "__file__", None)).startswith(str(ROOT))]
        for name in ours:
            del sys.modules[name]

        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        read = [
            module.__file__ for module in list(sys.modules.values())
            if str(getattr(module, "__file__", None)).startswith(str(ROOT))]
        outcome[program] = (printed.getvalue(), read)
    (folder / "all").write_text(json.dumps(outcome))


def test_an_older_python(tmp_path):
    [process] = start(begun_by_python_3_10, tmp_path, world=1)
    process.join(PATIENCE)
    outcome = json.loads((tmp_path / "all").read_text())
    for program, (printed, read) in outcome.items():
        assert printed.startswith("error: Python 3.11 or newer is needed"), program
        assert printed.count("\n") == 1
        for file in [ROOT / program, *map(Path, read)]:
            assert "Literal[*" not in file.read_text(), file  # it could not be read at all


def test_a_rule_for_several_fields():

    def at_most_half(values):
        return values[1] <= 0.5

    require(Config(), lambda size: size < 4, "below 4", "size")
    require(Config(), at_most_half, "at most a half", "range")
    with pytest.raises(UsageError, match="--range 0.1 0.9: expected at most a half"):
        require(Config(range=(0.1, 0.9)), at_most_half, "at most a half", "range")


# ----------------------------------------------------------------------------------------------
# All numbers of all programs


def checked(config_class, presets, argv):
    """A configuration of a run, as its program takes it before it opens anything."""
    config = parse(config_class, argv, presets)
    check(config)
    return config


READERS = {  # program -> (dataclass of its flags, argv -> a checked configuration)
    "train": (train.Config, partial(checked, train.Config, PRESETS)),
    "distill": (distill.Config, partial(checked, distill.Config, DISTILLATION)),
    "visualize": (attention.Config, partial(parse, attention.Config))}
for config_class in (step.StepConfig, stages.InputConfig, stages.EvaluationConfig,
                     stages.ProbesConfig, forecast.PlanConfig):
    READERS[config_class.__name__] = config_class, partial(checked, config_class, PRESETS)
for task in (*evaluate.TASKS, "all"):
    _, config_class, _ = evaluate.choose_task([task])
    READERS[task] = config_class, partial(evaluate.read_flags, config_class, task)


def numeric_flags(config_class):
    """Flag -> how many numbers it is given here."""
    counts = {}
    for name, kind in typing.get_type_hints(config_class).items():
        inner = typing.get_args(kind)
        if kind in (int, float):
            counts[name] = 1
        elif typing.get_origin(kind) is tuple and inner[0] in (int, float):
            counts[name] = 1 if inner[-1] is Ellipsis else len(inner)
    return counts


@pytest.mark.parametrize("program", READERS)
def test_every_number_is_taken_or_refused_by_its_name(program, monkeypatch):
    config_class, read = READERS[program]
    # One parser for all of these command lines: making it takes longer than using it.
    parsers = []
    make_parser = flags.make_parser

    def made_once(*args):
        if not parsers:
            parsers.append(make_parser(*args))
        return parsers[0]

    monkeypatch.setattr(flags, "make_parser", made_once)
    counts = numeric_flags(config_class)
    assert len(counts) >= 2
    for name, count in counts.items():
        for value in ("nan", "inf", "-inf", "-1", "0", "1e30", "1e-30", str(10**24)):
            try:
                config = read([f"--{name}", *[value] * count])
            except UsageError as error:
                assert f"--{name}" in str(error) and "\n" not in str(error), (name, value)
                continue
            assert value in ("0", "-1", "1e-30"), (name, value)
            numbers = [getattr(config, f.name) for f in fields(config) if f.name in counts]
            assert all(math.isfinite(x) for x in numbers if not isinstance(x, tuple))


# -- files that the system refuses


def test_a_file_that_the_system_refuses(capsys):

    @command
    def main(argv):
        open("/dev/null/x")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: /dev/null/x: {os.strerror(errno.ENOTDIR)}; look at")
    assert message.count("\n") == 1

    @command
    def without_a_file(argv):
        raise OSError("no matter of the command line")

    with pytest.raises(OSError, match="no matter"):
        without_a_file([])


LONG = "x" * 5000


@pytest.mark.parametrize("flag", [
    "--init /dev/null", f"--init {LONG}", "--output_dir /dev/null", f"--output_dir {LONG}",
    "--output_dir /dev/null/run", "--data folder:/dev/null", f"--data folder:{LONG}",
    f"--val_data folder:{LONG}", f"--data shards:{LONG}", f"--data list:{LONG}",
    f"--data {LONG}", "--cache /dev/null", f"--cache {LONG}"])
def test_no_path_ends_in_a_traceback(flag, tmp_path, quick_runs, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--output_dir", str(tmp_path / "run"), *flag.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_preset_is_a_flag_where_there_are_no_presets():

    @dataclass
    class Small:
        preset: str = "a"  # a recipe

    assert parse(Small, ["--preset", "b"]).preset == "b"
    with pytest.raises(UsageError, match="there is no flag --preset"):
        parse(Small, ["--preset", "b"], {"a": {}})
