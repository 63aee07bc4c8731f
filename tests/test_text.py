"""Claims: the text is dense enough to be read in a course, and stays so.
1. In the five files of the book at least 20 lines of comment stand beside 100 lines of code in
   functions, and comments are at least 0.3 of the lines of code of the file.
2. Every flag of every program has a help of several words.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

import backbones.__main__
import bench.__main__
import curate
import distill
import docs.exercise
import evaluate
import visualize
from machinery.flags import describe
from training.config import Config

ROOT = Path(__file__).resolve().parent.parent
BOOK = ("vit.py", "heads.py", "losses.py", "augment.py", "train.py")


def measure(path):
    """(lines of code, lines with a comment, code in functions, comments in functions).

    Rulers and comments that only give a shape, such as # (B, N, D), explain nothing: in functions
    they do not count. Docstrings are neither code nor comment here.
    """
    source = path.read_text()
    docstrings, functions = set(), set()
    for node in ast.walk(ast.parse(source)):
        is_function = isinstance(node, ast.FunctionDef)
        if isinstance(node, (ast.Module, ast.ClassDef)) or is_function:
            if ast.get_docstring(node):
                first = node.body[0]
                docstrings |= set(range(first.lineno, first.end_lineno + 1))
        if is_function:
            functions |= set(range(node.lineno, node.end_lineno + 1))

    code, comments, explaining = set(), set(), set()
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            if "-----" in token.string:
                continue
            comments.add(line)
            if not token.string.startswith("# ("):
                explaining.add(line)
        elif token.type not in layout:
            code |= set(range(line, token.end[0] + 1)) - docstrings
    return len(code), len(comments), len(code & functions), len(explaining & functions)


@pytest.mark.parametrize("name", BOOK)
def test_the_book_is_explained(name):
    code, comments, code_in_functions, explaining = measure(ROOT / name)
    assert explaining >= 0.20 * code_in_functions, f"{explaining} for {code_in_functions} lines"
    assert comments >= 0.30 * code, f"{comments} comments for {code} lines of code"


CONFIGS = {
    "train": Config, "distill": distill.Config, "backbones": backbones.__main__.Config,
    "docs.exercise": docs.exercise.Config,
    **{f"evaluate {name}": task.Config
       for name, task in evaluate.TASKS.items()},
    **{f"visualize {name}": figure.Config
       for name, figure in visualize.FIGURES.items()}, "curate run": curate.RunConfig,
    **{f"curate {name}": stage.Config
       for name, stage in curate.STAGES.items()},
    **{f"bench {name}": task[1]
       for name, task in bench.__main__.TASKS.items()}}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_every_flag_has_a_help(config):
    for field, (_, text) in describe(config).items():
        if field not in ("preset", "given"):
            assert len(text.split()) >= 2, f"--{field}: {text!r}"
