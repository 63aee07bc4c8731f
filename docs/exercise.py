"""Exercise: a copy of the project in which one function waits to be written, or to be mended.

    python -m docs.exercise 12 --> ../dino_exercise_12, where SinkhornKnopp.forward is blank
                                           |
                                       your lines
                                           |
    python -m docs.exercise 12 --check --> its tests in that copy --> red, or green

Idea     A test that fails, and names what is expected, is a teacher who answers at once. The
         tests are those of the project itself, so a solution that passes is as right as the
         code that it replaces. The copy may be spoiled without harm. What is taken out of it
         is described by names in a table, so that it stays right when the code changes.
Paper    none
Try      python -m docs.exercise        the exercises that change code
Change   an exercise is one entry in EXERCISES, a section of the workshop and one of the answers,
         and a patch beside the others
Tests    pytest tests/docs/test_exercise.py
"""

import ast
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from docs.patches import apply_patch, replace_once, solution
from machinery.flags import UsageError, command, parse, user_errors

ROOT = Path(__file__).resolve().parent.parent

# ----------------------------------------------------------------------------------------------
# The exercises, as data


@dataclass
class Exercise:
    """What an exercise changes, and how its solution is checked."""

    title: str
    file: str  # the file to work in
    function: str  # the place in it: a function, a method or a table
    tests: tuple[str, ...]  # what pytest has to find green, in the copy
    blank: bool = False  # whether the function is emptied in the copy
    verb: str = "change"  # what is done with a function that is not blank
    # A mistake that is planted in the copy, and has to be found: lines of the file as they are,
    # and as they are in the copy.
    mistake: tuple[str, str] | None = None


CHECKS = "tests/docs/checks.py"  # tests of what is in no file of the project yet
LOSSES = "tests/test_losses.py"

EXERCISES = {
    # -- change one line
    7: Exercise("a view that matches itself", "losses.py", "view_pair_loss",
                (f"{CHECKS}::test_own_pairs_count",)),
    8: Exercise("without all_sum", "losses.py", "column_mean",
                (f"{CHECKS}::test_processes_keep_to_themselves",)),
    9: Exercise("which layer segments best", "evaluation/patches.py", "patch_tokens",
                (f"{CHECKS}::test_patches_of_an_earlier_block",)),
    # -- write ten lines: a function of the project
    10: Exercise("attention, written by hand", "vit.py", "Attention.weights",
                 ("tests/test_vit.py::test_attention_reproduces_the_fast_path",
                  "tests/test_vit.py::test_attention_to_be_plotted_is_float32_inside_autocast",
                  "tests/test_vit.py::test_attention_of_some_tokens"), blank=True),
    11: Exercise("all pairs of views", "losses.py", "view_pair_loss",
                 (f"{LOSSES}::test_loss_and_gradient_against_the_double_loop",
                  f"{LOSSES}::test_uniform_costs_ln_k", f"{LOSSES}::test_no_pair_is_refused"),
                 blank=True),
    12: Exercise(
        "Sinkhorn-Knopp from its two marginals", "losses.py", "SinkhornKnopp.forward",
        (f"{LOSSES}::test_sinkhorn", f"{LOSSES}::test_sinkhorn_of_equal_and_of_extreme_logits",
         f"{LOSSES}::test_a_batch_without_a_masked_patch"), blank=True),
    13: Exercise("the teacher's average", "training/optim.py", "ema_update",
                 ("tests/training/test_optim.py::test_ema",), blank=True),
    14: Exercise("the vote of the neighbours", "evaluation/knn.py", "knn_vote",
                 ("tests/evaluation/test_knn.py::test_vote_against_a_loop",
                  "tests/evaluation/test_knn.py::test_chunks_and_ks"), blank=True),
    # -- write ten lines: something new
    15: Exercise("centre by the batch alone", "losses.py", "CENTERING",
                 (f"{CHECKS}::test_the_centre_of_a_batch",)),
    16: Exercise("a mask of your own", "augment.py", "MASK_SHAPES",
                 (f"{CHECKS}::test_another_shape_of_masks",)),
    17: Exercise("a new loss", "losses.py", "koleo_loss",
                 (f"{CHECKS}::test_variance_loss", f"{CHECKS}::test_a_step_has_the_new_loss"),
                 verb="put variance_loss beside"),
    # -- research
    18: Exercise(
        "a resume that is broken", "images/data.py", "Sampler.__iter__",
        ("tests/images/test_data.py::test_sampler_resumes_and_shards",), mistake=(
            "                order = self.order(np.random.default_rng([self.seed, epoch]))\n",
            "                seed = self.seed + self.start\n"
            "                order = self.order(np.random.default_rng([seed, epoch]))\n")),
    19: Exercise("a faster loader", "images/files.py", "read_file",
                 (f"{CHECKS}::test_large_photographs_are_read_small",
                  f"{CHECKS}::test_small_photographs_stay_as_they_are"))}

# ----------------------------------------------------------------------------------------------
# The working copy

COPY_OF = ".exercise"  # the file of a working copy that says of which exercise it is


def copy_project(folder: Path):
    """Copy the code, the tests and the docs; UsageError if there is something already."""
    if folder.resolve().is_relative_to(ROOT):
        raise UsageError(
            f"--folder {folder}: lies in the folder that is copied; give one outside "
            f"of {ROOT}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--folder {folder}: there is something already; give another folder, "
                         "or delete it to begin anew")
    folder.mkdir(parents=True, exist_ok=True)

    # The files at the top, and the folders that are rooms or hold tests. So neither runs and
    # data, which may be large, nor an environment or a history are copied. (.git is a folder,
    # or, in a second working tree, a file that points to one.)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
        elif (path / "__init__.py").exists() or path.name in ("tests", ".ci"):
            shutil.copytree(path, folder / path.name,
                            ignore=shutil.ignore_patterns("__pycache__"))


def find_function(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The node of a function, or of Class.method; ValueError where there is none."""
    # Class.method: first the class in the file, then the method in the body of the class.
    body = tree.body
    for part in name.split("."):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part:
                body = node.body
                break
        else:
            raise ValueError(f"there is no {name}")
    return node


def blanked(source: str, function: str, message: str) -> str:
    """The text of a file in which the function only raises NotImplementedError(message).

    Its signature and its docstring stay, because they say what has to be written.
    """
    node = find_function(ast.parse(source), function)
    lines = source.splitlines(keepends=True)

    # Where the body begins: behind the docstring, or behind the signature. A comment is no part
    # of the syntax tree, so without a docstring the lines of comments above the first statement
    # are gone through backwards.
    first = node.body[0]
    if ast.get_docstring(node):
        begin = first.end_lineno
    else:
        begin = first.lineno - 1
        while lines[begin - 1].lstrip().startswith("#"):
            begin -= 1
    indent = " " * first.col_offset
    body = f'{indent}raise NotImplementedError("{message}")\n'
    return "".join([*lines[:begin], body, *lines[node.end_lineno:]])


def prepare(number: int, folder: Path):
    """Make the working copy of an exercise, with its function blank or its mistake planted."""
    exercise = EXERCISES[number]
    copy_project(folder)
    (folder / COPY_OF).write_text(f"{number}\n")
    path = folder / exercise.file

    # The error names the exercise: whoever runs the copy sees at once what is missing.
    if exercise.blank:
        message = f"exercise {number}: write {exercise.function}"
        path.write_text(blanked(path.read_text(), exercise.function, message))

    # Where neither is asked for, the copy is the project as it is: something new is to be added.
    if exercise.mistake:
        replace_once(folder, exercise.file, *exercise.mistake)


def solve(number: int, folder: Path):
    """Write the solution of an exercise into its working copy."""
    apply_patch(folder, solution(number).read_text())


# ----------------------------------------------------------------------------------------------
# The program


def instructions(number: int, folder: Path) -> str:
    """What to do in a copy that was just made."""
    exercise = EXERCISES[number]
    # A copy elsewhere has to be named again when it is checked.
    quoted = shlex.quote(str(folder))  # for a shell, to which a blank is the end of a word
    again = f"python -m docs.exercise {number} --check"
    if folder != default_folder(number):
        again += f" --folder {quoted}"

    # Where a mistake has to be found, its place is the answer, and so are its tests.
    read = f"read   docs/workshop.md, exercise {number}\n"
    if exercise.mistake:
        return (f"exercise {number}, {exercise.title}: find the mistake that was planted in "
                f"{folder}\n{read}check  {again}")
    verb = "write" if exercise.blank else exercise.verb
    return (f"exercise {number}, {exercise.title}: {verb} {exercise.function} in "
            f"{folder / exercise.file}\n{read}"
            f"tests  cd {quoted} && pytest {' '.join(exercise.tests)}\n"
            f"check  {again}")


def check(number: int, folder: Path) -> bool:
    """Run the tests of an exercise in its copy, and say whether all of them pass."""
    # In a process of its own, because the copy has modules of the same names as this project.
    arguments = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    if EXERCISES[number].mistake:  # what the tests say of it would be the answer
        arguments += ["--tb=no", "--no-summary"]
    done = subprocess.run([*arguments, *EXERCISES[number].tests], cwd=folder)

    # 0: all tests passed. 1: some failed. Other codes: the edited file could not be imported.
    green = done.returncode == 0
    if green:
        print(f"green: exercise {number} is solved; docs/answers.md says what it shows")
    else:
        print(f"red: exercise {number} is not solved yet; the last lines above say why")
    return green


def default_folder(number: int) -> Path:
    """Beside the project, so that neither git nor the tests take it for a part of it."""
    return ROOT.parent / f"dino_exercise_{number:02d}"


@dataclass
class Config:
    # -- exercise
    folder: str = ""  # where the working copy is; empty: dino_exercise_NN beside this project
    check: bool = False  # run the tests of the exercise in the working copy: red or green?
    solve: bool = False  # write the solution into the working copy


USAGE = "python -m docs.exercise NUMBER [--check] [--solve] [--folder PATH]"


def overview() -> str:
    """What `python -m docs.exercise` prints."""
    # The others need no copy, because they are done with flags.
    lines = [f"usage: {USAGE}", "", "Exercises that change code; docs/workshop.md has all:"]
    for number, exercise in EXERCISES.items():
        lines.append(f"  {number:2d}  {exercise.title}")
    return "\n".join(lines)


def read_flags(argv: list[str]) -> tuple[int, Config]:
    """(number of the exercise, flags); UsageError for a number without an exercise."""
    if not argv[0].isdigit() or int(argv[0]) not in EXERCISES:
        raise UsageError(f"exercise {argv[0]!r} has no working copy: choose from "
                         f"{', '.join(map(str, EXERCISES))}; docs/workshop.md has the others")
    return int(argv[0]), parse(Config, argv[1:], usage=USAGE)


@command
def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(overview())
        return
    number, config = read_flags(argv)
    folder = Path(config.folder) if config.folder else default_folder(number)

    # Without a flag a copy is made. The flags are for a copy that is there.
    if not (config.check or config.solve):
        with user_errors():
            prepare(number, folder)
        print(instructions(number, folder))
        return
    if not (folder / "docs").is_dir():
        raise UsageError(f"{folder}: there is no working copy; make one by python -m "
                         f"docs.exercise {number}, or give its --folder")
    made_for = int((folder / COPY_OF).read_text()) if (folder / COPY_OF).exists() else number
    if made_for != number:
        raise UsageError(
            f"{folder} is the working copy of exercise {made_for}, not of {number}")
    if config.solve:
        solve(number, folder)
        print(f"exercise {number}: the solution is in {folder / EXERCISES[number].file}")
    if config.check and not check(number, folder):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
