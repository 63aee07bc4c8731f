"""Claims
1. Flags follow from the dataclass; default, preset and flag have that order of authority.
2. Every misuse is one line that names the flag, and exit code 2; control-C is one line and 130.
3. The help is in the groups of the dataclass and has the comments beside the fields.
4. A rule that several fields must obey is refused by the name of the field that breaks it.
"""

from dataclasses import dataclass
from typing import Literal

import pytest

from machinery.flags import UsageError, command, parse, require, user_errors


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


PRESETS = {"small": dict(size=1, shiny=False), "large": dict(size=9)}


def parse_line(line):
    return parse(Config, line.split(), PRESETS)


def test_authority():
    assert parse_line("") == Config("small", size=1, shiny=False)
    assert parse_line("large --name b --range 0.2 0.3") == Config("large", "b", 9, (0.2, 0.3))
    assert parse_line("large --no_shiny").shiny is False
    assert parse_line("large --shiny false").shiny is False
    assert parse_line("small --shiny").shiny is True
    assert parse_line("small --shiny true").shiny is True


@pytest.mark.parametrize("line, words", [("smal", "did you mean small"),
                                         ("--siz 4", "did you mean --size"),
                                         ("--size four", "--size"),
                                         ("--size -1", "--size: -1: expected 0 or more"),
                                         ("--range -0.1 nan", "--range: -0.1"),
                                         ("--range 0.1 nan", "--range: nan"),
                                         ("--kind three", "--kind"), ("--range 1", "--range"),
                                         ("--shiny maybe", "maybe")])
def test_misuse(line, words):
    with pytest.raises(UsageError, match=words):
        parse_line(line)


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


def test_a_rule_for_several_fields():

    def at_most_half(values):
        return values[1] <= 0.5

    require(Config(), lambda size: size < 4, "below 4", "size")
    require(Config(), at_most_half, "at most a half", "range")
    with pytest.raises(UsageError, match="--range 0.1 0.9: expected at most a half"):
        require(Config(range=(0.1, 0.9)), at_most_half, "at most a half", "range")
