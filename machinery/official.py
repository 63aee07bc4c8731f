"""Official: which flag is meant by one that a program does not have.

    --data_path   -->  docs/coming_from_dino.md      -->  "here it is --data folder:PATH"
    --batch_size  -->  the flags with that in them   -->  "did you mean --batch_size_per_gpu?"

Idea     Many users know the official programs by heart. The page that compares the two has a row
         for each of their flags already, so the answer to a flag that does not exist is looked
         up there: a second list would soon say something else. Others shorten a flag.
Paper    none
Try      python -m machinery.official      what three flags of theirs are called here
Change   an answer is one row of the page that OFFICIAL names
Tests    pytest tests/machinery/test_flags.py
"""

import re
from pathlib import Path

OFFICIAL = Path(__file__).parents[1] / "docs/coming_from_dino.md"


def official_flag(given: str, flags: list[str]) -> str:
    """What OFFICIAL says of a flag, for a program that has `flags`; empty if it says nothing.

    Example: "--data_path" gives "; here it is --data folder:PATH".
    """
    # A row of the page is a flag of theirs, what is typed here, and a remark.
    answers = {}  # a dictionary and not a list: several programs may have the same answer
    rows = OFFICIAL.read_text().splitlines() if OFFICIAL.exists() else []
    for row in rows:
        cells = row.replace("`", " ").strip("| ").split(" | ")
        if len(cells) < 2 or given not in cells[0].split():
            continue
        # Other programs answer to the same name by flags that this one does not have. Where
        # there is no flag in its place, the remark says why.
        answer = [" ".join(cell.split()).rstrip(".") for cell in cells[1:]]
        wanted = re.findall(r"--\w+", answer[0])
        if set(wanted) <= set(flags):
            answers[answer[0] if wanted else ": ".join(filter(None, answer))] = True
    return f"; here it is {', or '.join(answers)}" if answers else ""


def longer_flag(given: str, flags: list[str]) -> str:
    """The flag that somebody has shortened to `given`; empty if there is none.

    One that begins so comes first, then one that has the word in it. Example: "--batch_size"
    gives "; did you mean --batch_size_per_gpu?".
    """
    # A word of one or two letters is in too many flags.
    word = given.strip("-")
    if len(word) < 3:
        return ""
    longer = [flag for flag in flags if word in flag and not flag.startswith("--no_")]
    longer.sort(key=lambda flag: not flag.startswith(given))  # the others stay in their order
    return f"; did you mean {longer[0]}?" if longer else ""


if __name__ == "__main__":
    for flag in ("--data_path", "--out_dim", "--pretrained_weights"):
        print(flag
              + official_flag(flag, ["--data", "--val_data", "--n_prototypes", "--weights"]))
