"""Official: which flag of this project a flag of Meta's programs is, for those who type theirs.

    --data_path  -->  docs/coming_from_dino.md  -->  "here it is --data folder:PATH"

Idea     Many users know the official programs by heart. The page that compares the two has a row
         for each of their flags already, so the answer to a flag that does not exist is looked
         up there: a second list would soon say something else.
Paper    none
Try      python -m machinery.official      what three flags of theirs are called here
Change   an answer is one row of the page that OFFICIAL names
Tests    pytest tests/machinery/test_flags.py
"""

import re
from pathlib import Path

OFFICIAL = Path(__file__).parents[1] / "docs/coming_from_dino.md"


def official_flag(given: str, flags: list[str]) -> str:
    """What OFFICIAL says of a flag, for a program that has `flags`, or which of them is longer.

    Empty if there is neither. Example: "--data_path" gives "; here it is --data folder:PATH", and
    "--batch_size" gives "; did you mean --batch_size_per_gpu?".
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
    if answers:
        return f"; here it is {', or '.join(answers)}"

    # Who shortens a flag means one that begins so, or has the word in it: --batch_size here is
    # --batch_size_per_gpu. A flag with as many letters may be like it, and mean something else.
    word = given.strip("-")
    longer = [flag for flag in flags if flag.startswith(given)]
    longer += [flag for flag in flags if word in flag and flag not in longer]
    longer = [flag for flag in longer if not flag.startswith("--no_")]
    return f"; did you mean {longer[0]}?" if len(word) > 2 and longer else ""


if __name__ == "__main__":
    for flag in ("--data_path", "--out_dim", "--pretrained_weights"):
        print(flag
              + official_flag(flag, ["--data", "--val_data", "--n_prototypes", "--weights"]))
