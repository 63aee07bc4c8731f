"""Flags: a program's settings are a dataclass, and its command line is made from it.

    @dataclass class Config:           python train.py --lr 1e-3 --no_resume
        # -- optimisation                      |
        lr: float = 5e-4  # the peak  --> parse(Config, argv) --> Config(lr=1e-3, resume=False)

Idea     There is no second list of flags that could disagree with the code. A flag has the
         name, the type and the default of its field; its help is the comment beside the field,
         and its group in --help is the comment "# -- GROUP" above it. An error that the user
         can mend is one line that names the flag, and exit code 2.
Paper    none
Try      python train.py --help
Change   a flag is a field of a program's dataclass; a new kind of field is one branch in
         `options_of`
Tests    pytest tests/machinery/test_flags.py
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import textwrap
import typing
from pathlib import Path

import torch.distributed as dist

# Every program imports this file before those in which an older Python finds a syntax error.
if sys.version_info < (3, 11):
    print("error: Python 3.11 or newer is needed, this is",
          sys.version.split()[0], file=sys.stderr)
    raise SystemExit(2)

# ----------------------------------------------------------------------------------------------
# Errors that the user can mend: one line, exit code 2


class UsageError(Exception):
    """A message for the user: what was given, what was expected, which flag to change."""


@contextlib.contextmanager
def user_errors():
    """Turns a ValueError inside the `with` block into a UsageError with the same message.

    To be put around code that reads what the user gave (files, names, sizes). Everywhere else a
    ValueError is a bug of ours, and its traceback is wanted.
    """
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def did_you_mean(given: str, choices, folder: Path = Path()) -> str:
    """The end of a message: "; did you mean NAME?", or "" where no choice is like `given`.

    Where the choices are the names of files, they lie in `folder`.
    """
    near = difflib.get_close_matches(given, choices, 1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def near_path(path: Path) -> str:
    """did_you_mean for a file or folder that does not exist, among those beside it."""
    beside = [other.name for other in path.parent.glob("*")]
    return did_you_mean(path.name, beside, path.parent)


def command(main):
    """Decorator for a program's main(argv): ends it with one line where the user can mend it.

    Exit code 2, the convention for a wrong command line: a UsageError, and what the system
    refuses, such as to write on a full disk. Ctrl-C gives 130, the shell's code for signal 2.
    (Training handles Ctrl-C itself, so that it can save first: see process.StopSignal.) Without
    arguments main gets those of the command line.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            # The name of a file may have bytes that are no UTF-8, which cannot be printed as
            # they are: they are written as \xe9 and the like.
            if hasattr(sys.stdout, "reconfigure"):  # a notebook has another kind of output
                sys.stdout.reconfigure(errors="backslashreplace")
            result = main(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()  # here, where it may fail in good order
            return result
        except BaseException as error:
            from machinery.failures import end  # here, because most programs end well

            end(error)
            raise
        finally:
            # A process that leaves without this makes PyTorch warn of leaked resources.
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


# ----------------------------------------------------------------------------------------------
# From a dataclass to flags


@functools.cache
def describe(config_class) -> dict[str, tuple[str, str]]:
    """Field -> (group, help), read from the source text of the dataclass.

    Example: the class at the top of this file gives {"lr": ("optimisation", "the peak")}.
    """
    group = "options"
    about = {}

    # A dataclass that inherits from another one begins with its fields, so parents come first.
    # A field that a subclass declares again gets the help and the group that it has there.
    for cls in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except OSError:  # made by dataclasses.make_dataclass, without any source
            continue

        # Python drops comments when it compiles a class, so they are taken from the text. The
        # formatter may spread a field over several lines: its comment can be on any of them.
        field_on_line = {}
        for statement in ast.parse(source).body[0].body:
            if isinstance(statement, ast.AnnAssign):
                about[statement.target.id] = ("", "")
                for number in range(statement.lineno, statement.end_lineno + 1):
                    field_on_line[number] = statement.target.id

        # From top to bottom: a line "# -- GROUP" begins a group, a field takes its comment.
        for number, line in enumerate(source.splitlines(), 1):
            name = field_on_line.get(number)
            if name is None:
                if match := re.match(r"\s*# -- (.+)", line):
                    group = match[1].strip()
                continue
            comment = re.search(r"#\s*(.*)$", line)
            about[name] = (group, comment[1] if comment else about[name][1])
    return about


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a mistake raises UsageError, and one in a name gets a hint."""

    def error(self, message):
        # argparse says "unrecognized arguments: --siz 4". The user wants to know which flag was
        # meant: "there is no flag --siz; did you mean --size?"
        if match := re.search(r"unrecognized arguments: (--?[A-Za-z]\S*)", message):
            given = match[1].split("=")[0]
            all_flags = [flag for action in self._actions for flag in action.option_strings]
            # Imported here: it is needed when a flag is wrong, and no run starts after that.
            from machinery.official import longer_flag, official_flag

            hint = official_flag(given, all_flags) or longer_flag(given, all_flags)
            hint = hint or did_you_mean(given, all_flags) or "; --help lists them"
            message = f"there is no flag {given}{hint}"

        # "invalid choice: 'deit_small' (choose from ...)" goes on "did you mean vit_small?"
        if match := re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message):
            message += did_you_mean(match[1], re.findall(r"[\w.-]+", match[2]))
        raise UsageError(message.replace("argument --", "--"))


def to_bool(text: str) -> bool:
    """The value of a flag such as --shiny false; argparse's bool("false") would be True."""
    if text.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        return text.lower() in ("true", "1", "yes", "on")
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false (a preset or a task comes "
                                     "before all flags)")


# No setting of any program is larger. It is the largest whole number of 32 bits, which numpy,
# torch and the operating system can take everywhere; most settings end far below.
LARGEST = 2**31 - 1


def number_from(lowest: int, kind):
    """int or float as the type of a flag that takes numbers from `lowest` to LARGEST."""

    def number(text):
        value = kind(text)
        # Infinity is above LARGEST. Every comparison with NaN is False, so it is refused, too.
        if not lowest <= value <= LARGEST:
            raise argparse.ArgumentTypeError(
                f"{text:.40}: expected {lowest:,} or more, at most {LARGEST:,}")
        return value

    # argparse names the type in its messages: "invalid int value", not "invalid number value".
    number.__name__ = kind.__name__
    return number


def require(config, rule, words: str, *names: str):
    """UsageError for the first of the named fields whose value breaks the rule.

    Example: require(config, lambda x: x < 1, "below 1", "drop_path_rate") refuses the value 1
    with "--drop_path_rate 1: expected below 1".
    """
    for name in names:
        value = getattr(config, name)
        if not rule(value):
            given = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UsageError(f"--{name} {given}: expected {words}")


def options_of(field: dataclasses.Field, kind) -> dict:
    """How argparse has to read the flag of a field: keyword arguments of add_argument.

    kind: the type of the field, as typing.get_type_hints gives it.
    """
    # A switch can be given alone (--shiny) or with a word (--shiny false). The default None
    # means that the program decides.
    if kind in (bool, bool | None):
        return dict(nargs="?", const=True, type=to_bool, metavar="true|false")

    # argparse converts the word before it compares it, so a Literal of numbers works as well.
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return dict(choices=choices, type=type(choices[0]))

    # tuple[float, float] takes exactly two numbers, tuple[str, ...] takes one word or more.
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        number = "+" if inner[-1] is Ellipsis else len(inner)
        one = str if inner[0] is str else number_from(0, inner[0])
        return dict(nargs=number, type=one, metavar=field.name.upper()[0])

    # A shell puts the home folder in the place of ~, but leaves --flag=~/x as it is.
    if kind is str:
        return dict(type=os.path.expanduser, metavar="str")

    # Of the numbers, those whose default is below 0 may be negative.
    lowest = -LARGEST if field.default < 0 else 0
    return dict(type=number_from(lowest, kind), metavar=kind.__name__)


def make_parser(config_class, presets: dict | None, usage: str) -> Parser:
    """An argparse parser with one flag for each field, in the groups of the dataclass."""
    # Abbreviations are refused: what --mask stands for would change with the next new flag.
    parser = Parser(allow_abbrev=False, usage=usage or None,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100))
    if presets:
        parser.add_argument("preset", nargs="?", help=", ".join(presets))

    about = describe(config_class)
    types = typing.get_type_hints(config_class)
    groups = {}
    for field in dataclasses.fields(config_class):
        # Some fields are set by `parse` or by the program, and not by a flag. Where the first word
        # cannot be a preset, a field of this name is a flag like any other.
        if field.name in ("given", "taken_over", presets
                          and "preset") or field.metadata.get("no_flag"):
            continue
        group_name, text = about[field.name]
        if group_name not in groups:
            groups[group_name] = parser.add_argument_group(group_name)

        # Every switch NAME has a flag --no_NAME beside it, which --help does not list.
        kind = types[field.name]
        if kind in (bool, bool | None):
            groups[group_name].add_argument(f"--no_{field.name}", dest=field.name,
                                            action="store_false", default=argparse.SUPPRESS,
                                            help=argparse.SUPPRESS)

        # SUPPRESS leaves flags that were not given out of argparse's answer, so that the values
        # of the preset stay. Percent signs are doubled, because argparse formats with %.
        if field.default is not None:
            text = f"{text} [{field.default}]"
        groups[group_name].add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                                        help=text.replace("%", "%%").strip(),
                                        **options_of(field, kind))
    return parser


def parse(config_class, argv: list[str], presets: dict[str, dict] | None = None,
          usage: str = ""):
    """argv -> an instance of config_class.

    A flag wins over the preset (the first word), and the preset over the default of the field.
    Without a first word the first preset is taken. Numbers go from 0, or from -LARGEST if the
    default is below 0, to LARGEST. If the class has a field `given`, it gets the names of the
    flags that were given. UsageError, with the choices, for whatever is unknown.

    Example with presets {"small": {"size": 1}} and a default size of 3: [] and ["small"] give
    1, ["small", "--size", "2"] gives 2.
    """
    # argparse returns lists where the fields are tuples.
    flags = vars(make_parser(config_class, presets, usage).parse_args(argv))
    flags = {name: tuple(x) if isinstance(x, list) else x for name, x in flags.items()}

    values = {}
    if presets:
        preset = flags.pop("preset") or next(iter(presets))
        if preset not in presets:
            raise UsageError(f"there is no preset {preset!r}: choose from {', '.join(presets)}"
                             f"{did_you_mean(preset, presets)}")
        values = dict(presets[preset], preset=preset)

    # Some settings follow others unless the user named them: such a program asks `given`.
    if any(field.name == "given" for field in dataclasses.fields(config_class)):
        values["given"] = tuple(flags)
    return config_class(**{**values, **flags})
