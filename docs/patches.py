"""Patches: small changes to files, which find their place by the lines around them.

    docs/solutions/15_batch_center.patch --> read_patch --> [(file, lines before, lines after)]
                                                                             |
                                    the file, where these lines stand once --> the new lines

Idea     A solution has to fit the code of today and that of next year. So its place is not a
         line number: it is the text that it replaces, which must occur once in the file. Then
         everything else in the file may change. The form is that of `diff -u`, which is easy
         to read; the numbers of lines in it mean nothing. Neither git nor `patch` is needed.
Paper    none
Try      python -m docs.patches         the solutions, and what each of them changes
Change   what a line of a patch means: read_patch
Tests    pytest tests/docs/test_exercise.py
"""

import re
from pathlib import Path
from typing import NamedTuple

from machinery.flags import UsageError

SOLUTIONS = Path(__file__).resolve().parent / "solutions"


class Hunk(NamedTuple):
    """One replacement in one file."""

    file: str  # below the folder of the project, such as training/config.py
    before: str  # whole lines, which occur once in the file
    after: str  # the lines in their place


def read_patch(text: str) -> list[Hunk]:
    """The hunks of a patch in the form of `diff -u`, in their order.

    Whatever stands above the first "--- " explains the patch. The numbers behind "@@" are for
    other programs; here they are not read. ValueError for a hunk without a line to find it by.
    """
    # Example: of the lines " a", "-b", "+c" the text before is "a b", and after is "a c".
    file = ""
    parts = []  # (file, lines before, lines after) of each hunk
    for line in text.splitlines(keepends=True):
        if line.startswith("+++ "):
            file = line.split()[1].removeprefix("b/")
        elif line.startswith("@@"):
            parts.append((file, [], []))
        elif line.startswith("--- ") or not file:
            continue
        elif parts:
            # Editors take the space of an empty line away, so an empty line is context, too.
            mark, rest = (line[0], line[1:]) if line.strip() else (" ", "\n")
            if mark in " -":
                parts[-1][1].append(rest)
            if mark in " +":
                parts[-1][2].append(rest)

    # A hunk that only adds lines could stand anywhere in its file.
    hunks = [Hunk(file, "".join(before), "".join(after)) for file, before, after in parts]
    if not hunks or not all(hunk.before for hunk in hunks):
        raise ValueError("a patch needs hunks, and each of them a line of the file as it is")
    return hunks


def replace_once(folder: Path, file: str, before: str, after: str):
    """Write `after` in the place of `before` in a file below `folder`.

    ValueError where the file does not have `before`, or has it more than once.
    """
    # A file that is not there is treated as one without these lines: the message is the same.
    path = folder / file
    text = path.read_text() if path.exists() else ""

    # ^ makes sure that `before` begins where a line begins.
    place = re.compile("^" + re.escape(before), re.M)
    count = len(place.findall(text))
    if count != 1:
        raise ValueError(f"{path}: expected once, but found {count} times:\n{before}")
    path.write_text(place.sub(lambda _: after, text))


def apply_patch(folder: Path, text: str):
    """Make the changes of a patch in the files below `folder`.

    UsageError where a change does not find its place; the changes before it are made.
    """
    for hunk in read_patch(text):
        try:
            replace_once(folder, *hunk)
        except ValueError as error:
            # The program prints one line for a mistake, so the text that was sought, which may
            # have several, is left out.
            raise UsageError(f"{str(error).splitlines()[0]} the lines that the solution "
                             "replaces; it fits a fresh copy, see --folder") from None


def solution(number: int) -> Path:
    """The file docs/solutions/NN_NAME.patch of an exercise; UsageError where there is none."""
    files = list(SOLUTIONS.glob(f"{number:02d}_*.patch"))
    if len(files) != 1:
        raise UsageError(f"exercise {number}: no patch in {SOLUTIONS}; docs/answers.md has its "
                         "answer")
    return files[0]


if __name__ == "__main__":
    for path in sorted(SOLUTIONS.glob("*.patch")):
        hunks = read_patch(path.read_text())
        added = sum(hunk.after.count("\n") - hunk.before.count("\n") for hunk in hunks)
        files = ", ".join(sorted({hunk.file for hunk in hunks}))
        print(f"{path.name:28s} {files}: {len(hunks)} places, {added:+d} lines")
