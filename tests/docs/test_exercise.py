"""Claims
1. The check of each exercise is red in its working copy, and green with its solution.
2. A blank function keeps its signature and its docstring; nothing else of the file changes.
3. A patch finds its place by its lines, wherever they stand; it is refused where they do not
   stand, or stand twice.
4. Every exercise of the workshop has its five paragraphs and an answer, every one that changes
   code an entry in EXERCISES under the same title and a solution, and there is no other.
5. The hours of both tracks add up; the workshop asks the README's question of each file, and each
   question has an answer.
6. The lines of exercise 1 run, and its star covers as many patches as it says.
7. The program makes a copy, says what to do in it, and does not spoil what is there; it does
   not tell where a mistake was planted. --check ends with 1 if a test fails.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import backbones.weights
from augment import RGB
from docs.exercise import EXERCISES, blanked, main
from docs.patches import apply_patch, read_patch, solution
from machinery.flags import UsageError
from vit import VisionTransformer

ROOT = Path(__file__).resolve().parent.parent.parent

# -- 1


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """(exit codes by number, all that pytest printed), of all exercises."""
    folder = tmp_path_factory.mktemp("exercises")
    program = Path(__file__).with_name("try_exercises.py")
    words = [sys.executable, str(program), str(folder), *map(str, EXERCISES)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", EXERCISES)
def test_red_in_the_copy_green_with_the_solution(number, tried):
    codes, printed = tried
    # 1 says that tests ran and failed; other codes, that they could not be found or imported.
    assert codes[str(number)] == [1, 0], printed


# -- 2

EXAMPLE = '''\
import math


def with_docstring(x: int) -> int:
    """Twice x."""
    # A comment.
    y = 2 * x
    return y


class Thing:
    @staticmethod
    def without(x,
                y):
        # Why it is so,
        # in two lines.
        z = x
        return z + y

    last = 1
'''


@pytest.mark.parametrize("function, expected", [
    ("with_docstring",
     EXAMPLE.replace('    # A comment.\n    y = 2 * x\n    return y\n',
                     '    raise NotImplementedError("words")\n')),
    ("Thing.without",
     EXAMPLE.replace(
         '        # Why it is so,\n        # in two lines.\n        z = x\n'
         '        return z + y\n', '        raise NotImplementedError("words")\n'))])
def test_only_the_body_is_blank(function, expected):
    assert blanked(EXAMPLE, function, "words") == expected
    with pytest.raises(ValueError, match="no Thing.missing"):
        blanked(EXAMPLE, "Thing.missing", "words")


@pytest.mark.parametrize("number", [n for n, e in EXERCISES.items() if e.blank])
def test_blank_functions_of_ours(number):
    exercise = EXERCISES[number]
    source = (ROOT / exercise.file).read_text()
    before, after = ast.parse(source), ast.parse(blanked(source, exercise.function, "words"))

    # Without the bodies of this function both are the same tree.
    for tree in (before, after):
        for node in ast.walk(tree):
            if getattr(node, "name", "") == exercise.function.split(".")[-1]:
                node.body = [ast.Expr(ast.Constant(ast.get_docstring(node, clean=False)))]
    assert ast.dump(before) == ast.dump(after)


# -- 3

PATCH = """\
What it does.
--- a/one.py
+++ b/one.py
@@ -1,3 +1,3 @@
 first

-second
+2nd
@@ -9 +9,2 @@
+eighth
 ninth
"""


def test_a_patch_finds_its_place(tmp_path):
    file = tmp_path / "one.py"
    file.write_text("moved\nfirst\n\nsecond\nseconds\nmore\nninth\n")
    apply_patch(tmp_path, PATCH)
    assert file.read_text() == "moved\nfirst\n\n2nd\nseconds\nmore\neighth\nninth\n"


@pytest.mark.parametrize("text", ["first\n\nother\n", "first\n\nsecond\n" * 2])
def test_a_patch_without_a_place_is_refused(text, tmp_path):
    (tmp_path / "one.py").write_text(text)
    with pytest.raises(UsageError, match="found [02] times"):
        apply_patch(tmp_path, PATCH)
    assert (tmp_path / "one.py").read_text() == text


@pytest.mark.parametrize("text", ["nothing\n", "+++ b/one.py\n@@\n+only new\n"])
def test_no_patch(text):
    with pytest.raises(ValueError, match="needs hunks"):
        read_patch(text)


# -- 4

SECTION = re.compile(r"^### (\d+)\. (.+)\n((?:(?!#).*\n)*)", re.M)


def sections(page):
    """Number -> (title, text) of the exercises on a page."""
    text = (ROOT / "docs" / page).read_text() + "\n"
    return {int(number): (title, body) for number, title, body in SECTION.findall(text)}


def test_the_workshop_is_whole():
    workshop, answers = sections("workshop.md"), sections("answers.md")
    assert list(workshop) == list(range(1, len(workshop) + 1)) and len(workshop) >= 14
    assert {n: title for n, (title, _) in workshop.items()} == \
        {n: title for n, (title, _) in answers.items()}
    for number, (title, body) in workshop.items():
        paragraphs = re.findall(r"^\*\*(\w+)\.\*\* ", body, re.M)
        assert paragraphs == ["Open", "Do", "Check", "Expect", "Teaches"], number

    # Those that change code, the same in every place.
    for number, exercise in EXERCISES.items():
        assert workshop[number][0].lower() == exercise.title.lower()
        assert f"python -m docs.exercise {number}`" in workshop[number][1]
        assert solution(number).name in answers[number][1]
        assert (ROOT / exercise.file).exists()
    patches = (ROOT / "docs/solutions").glob("*")
    assert sorted(patches) == [solution(number) for number in sorted(EXERCISES)]


# -- 5


def rows_below(text, heading):
    """The rows of the first table that follows a heading: lists of cells."""
    start = text.index("\n|", text.index(heading)) + 1
    table = text[start:].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")]
            for row in table.splitlines()[2:]]


@pytest.mark.parametrize("track, hours", [("**Half a day**", 4), ("**A day**", 8)])
def test_the_hours_add_up(track, hours):
    clock = 0
    for begin, minutes, what in rows_below((ROOT / "docs/workshop.md").read_text(), track):
        assert begin == f"{clock // 60}:{clock % 60:02d}", what
        clock += int(minutes)
    assert clock == 60 * hours


def test_every_question_has_an_answer():
    text = (ROOT / "docs/workshop.md").read_text()
    of_workshop = rows_below(text, "## What to read")
    page, of_slides = (ROOT / "docs/answers.md").read_text().split("## Questions of the slides")
    answers = re.findall(r"^\*\*(.+?\?)\*\*", page, re.M)
    asked = []
    for file, _, _, questions in of_workshop:
        first, *others = re.findall(r"[^?]+\?", questions)
        asked += [f"{file}: {first.strip()}", *map(str.strip, others)]
    assert answers == asked

    # Those of the slides, in their order. An answer repeats the end of its question.
    slides = " ".join((ROOT / "docs/slides.md").read_text().split())
    on_slides = re.findall(r"\*To ask:\* ([^?]+\?)", slides)
    answers = re.findall(r"^\*\*(.+?\?)\*\*", of_slides, re.M | re.S)
    assert len(answers) == len(on_slides) == 9
    for answer, question in zip(answers, on_slides):
        assert " ".join(answer.split())[-15:] in question

    # The README's map of the files at the top has one question for each.
    of_readme = rows_below((ROOT / "README.md").read_text(), "## The map of the code\n")
    for (file, _, question), row in zip(of_readme, of_workshop, strict=True):
        assert row[0] == file and row[3].startswith(question), file


# -- 6


def test_the_lines_of_the_first_exercise(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = VisionTransformer(40, 5, embed_dim=64, depth=1, num_heads=1).eval()
    model.channel_stats = RGB
    monkeypatch.setattr(backbones.weights, "load_backbone", lambda name: model)
    monkeypatch.chdir(tmp_path)
    _, text = sections("workshop.md")[1]
    blocks = re.findall(r"^    (?:from|import) .*\n(?:(?:    .*)?\n)+", text, re.M)
    exec("\n".join(map(textwrap.dedent, blocks)), {})

    # The share of an untrained network is about that of the patches, as the text says.
    patches, attention = map(float, re.findall(r"tensor\(([\d.]+)\)", capsys.readouterr().out))
    assert (tmp_path / "PHOTO.png").exists() and len(blocks) == 2
    share, = re.findall(r"The star covers (\d+) % of the patches", text)
    assert round(100 * patches) == int(share) == round(100 * attention)


# -- 7


def test_the_copy_and_what_is_said_of_it(tmp_path, capsys):
    main(["12", "--folder", str(tmp_path / "a copy")])
    said = capsys.readouterr().out
    quoted = f"'{tmp_path}/a copy'"  # as a shell needs a name with a blank
    assert f"cd {quoted} && pytest" in said and f"--folder {quoted}" in said
    shutil.rmtree(tmp_path / "a copy")

    main(["12", "--folder", str(tmp_path / "copy")])
    said = capsys.readouterr().out
    assert "SinkhornKnopp.forward" in said and "tests/test_losses.py::test_sinkhorn" in said
    assert 'NotImplementedError("exercise 12' in (tmp_path / "copy/losses.py").read_text()
    assert {"tests", "docs",
            "README.md"} < {path.name
                            for path in (tmp_path / "copy").iterdir()}
    assert not (tmp_path / "copy/.git").exists()

    # A copy that somebody may have worked in is not written again.
    with pytest.raises(SystemExit) as end:
        main(["12", "--folder", str(tmp_path / "copy")])
    assert end.value.code == 2 and "something already" in capsys.readouterr().err

    # Nor is it taken for that of another exercise, and none can be made within the project.
    for argv, words in ((["13", "--check", "--folder",
                          str(tmp_path / "copy")],
                         "the working copy of exercise 12, not of 13"),
                        (["13", "--folder", str(ROOT / "docs/mine")], "lies in the folder")):
        with pytest.raises(SystemExit):
            main(argv)
        assert words in capsys.readouterr().err

    main(["12", "--solve", "--folder", str(tmp_path / "copy")])
    assert "logsumexp" in (tmp_path / "copy/losses.py").read_text()


def test_a_planted_mistake_is_not_told(tmp_path, capsys):
    main(["18", "--folder", str(tmp_path / "copy")])
    said = capsys.readouterr().out
    assert "find the mistake" in said and EXERCISES[18].function not in said
    file = EXERCISES[18].file
    assert (tmp_path / "copy" / file).read_text() != (ROOT / file).read_text()


@pytest.mark.parametrize("argv, words",
                         [(["2"], "choose from 7"), (["x"], "choose from 7"),
                          (["12", "--check", "--folder", "nowhere"], "no working copy")])
def test_misuse(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("code, word", [(0, "green"), (1, "red"), (4, "red")])
def test_red_or_green(code, word, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    calls = []
    monkeypatch.setattr(
        subprocess, "run", lambda words, cwd: calls.append(
            (words, cwd)) or SimpleNamespace(returncode=code))
    ended = 0
    try:
        main(["12", "--check", "--folder", str(tmp_path)])
    except SystemExit as end:
        ended = end.code
    assert ended == (code != 0) and capsys.readouterr().out.startswith(f"{word}: exercise 12")
    (words, cwd), = calls
    tests = list(EXERCISES[12].tests)
    assert words[-len(tests):] == tests and cwd == tmp_path
