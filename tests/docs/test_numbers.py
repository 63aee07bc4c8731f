"""Claims: the README quotes what was measured.
1. Every figure with a decimal point in the README and in docs/troubleshooting.md stands in
   docs/results.md, or in the estimates of docs/cluster.md; or it is ln K, an author's figure or
   part of a name, which is listed here.
2. The figures in the README's log lines are those of one run in docs/results.md.
"""

import math
import re

from test_docs import ROOT

README = (ROOT / "README.md").read_text()
NUMBER = r"(?<![\w.])\d[\d,]*\.\d+(?!\w|\.\d)"

# Figures of the README that are no measurements of ours: what they are -> the figures.
NOT_MEASURED = {
    "the version of Python": {"3.11"}, "flags": {"0.5", "0.4", "0.3", "0.75"},
    "the number of a paper": {"2507.03779"}, "DINO's and DINOv2's authors": {"1.75", "60.2"},
    "ln K": {f"{math.log(K):.2f}"
             for K in (65536, 8192, 256)}}


def prose():
    """Both pages without blocks of code and without the table of the authors' figures."""
    text = re.sub(r"(?m)^    .*$", "", README)
    authors = text.index("These figures are **not ours**")
    return (text[:authors] + text[text.index("## How to read the log"):] +
            (ROOT / "docs/troubleshooting.md").read_text())


def measured(*pages):
    """Every number on some pages of docs/."""
    text = "".join((ROOT / f"docs/{page}.md").read_text() for page in pages)
    return set(re.findall(r"\d[\d,]*(?:\.\d+)?", text))


# -- 1


def test_quoted_figures_were_measured():
    quoted = re.findall(NUMBER, prose())
    assert len(quoted) > 40
    known = measured("results", "cluster").union(*NOT_MEASURED.values())
    unknown = [number for number in quoted if number not in known]
    assert not unknown, f"not in docs/results.md: {unknown}"


def test_nothing_is_excused_in_vain():
    quoted = set(re.findall(NUMBER, prose()))
    for what, numbers in NOT_MEASURED.items():
        assert numbers & quoted, f"the README quotes none of {what} any more"


# -- 2


def test_the_log_lines_are_of_one_run():
    after_epoch = re.search(r"epoch 1: k-NN\(20\) ([\d.]+)% \(untrained ([\d.]+)%", README)
    later = re.search(r"after the others: ([\d.]+), ([\d.]+) and ([\d.]+) %",
                      " ".join(README.split()))
    results = (ROOT / "docs/results.md").read_text()
    row = re.search(r"\| the run of the README's log.*? \| ([\d., ]+); ([\d.]+) minutes",
                    results)
    assert row[1].split(", ") == [after_epoch[1], *later.groups()]
    assert f"took {row[2]} minutes" in README.replace("\n", " ")
    untrained = re.search(r"\| the same, untrained; the loss .*? \| ([\d.]+);", results)
    assert untrained[1] == after_epoch[2]
