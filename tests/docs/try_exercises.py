"""Tries all exercises: python tests/docs/try_exercises.py FOLDER NUMBER ... (test_exercise.py)

13 exercises, each checked twice, are 26 runs of pytest. Each needs a process of its own, because
the copies have modules of the same names; but to import torch in each would take a minute. So this
one process imports what is not ours, and forks for each run.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch.distributed.checkpoint
import torch.distributed.tensor
import torchvision.transforms.v2.functional

ROOT = Path(__file__).resolve().parent.parent.parent
FAILED = 70  # the exit code of a child whose function raised; no code of pytest
IMPORTED = (torch.distributed.checkpoint, torch.distributed.tensor,
            torchvision.transforms.v2.functional)


def in_a_child(folder, function, *args):
    """What function(*args) returns, as the exit code of a forked process at work in `folder`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    try:
        code = int(function(*args) or 0)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        code = FAILED
    sys.stdout.flush()
    os._exit(code)


# Of these three each imports the modules of the folder in which it is called.


def make_a_copy(number, folder):
    from docs.exercise import prepare

    prepare(number, folder)


def write_the_solution(number, folder):
    from docs.exercise import solve

    solve(number, folder)


def run_its_tests(number):
    from docs.exercise import EXERCISES

    # Without conftest.py, which imports all programs.
    return pytest.main(["-p", "no:cacheprovider", "--noconftest", *EXERCISES[number].tests])


def try_all(folder, numbers):
    """{number: [exit code of pytest in the working copy, and with the solution]}."""
    codes = {}
    for number in numbers:
        copy = folder / str(number)
        codes[number] = [in_a_child(ROOT, make_a_copy, number, copy)]
        if codes[number] == [0]:
            codes[number] = [in_a_child(copy, run_its_tests, number)]
            solved = in_a_child(ROOT, write_the_solution, number, copy)
            codes[number].append(solved or in_a_child(copy, run_its_tests, number))
    return codes


if __name__ == "__main__":
    print(json.dumps(try_all(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]])))
