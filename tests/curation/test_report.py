"""Claims
1. The report names every stage with its counts, thresholds, seeds and hashes, and the hash of the
   list. Of a stage that was made anew since, or is gone, it says so and nothing else.
2. The page shows groups of all sizes, and in each what stays first; an image that cannot be
   read any more leaves a grey place.
"""

import re
import shutil

import numpy as np
import pytest
from curation_helpers import CPU, make_pool, unit_rows
from PIL import Image

from curation import embed, report
from curation.pool import finish, open_pool
from curation.report import draw_groups, evenly, write_report
from machinery.checkpoints import digest


@pytest.fixture
def pool(tmp_path):
    pool = make_pool(tmp_path / "pool", unit_rows(12, 4))
    (tmp_path / "pool/images").mkdir()
    for i in range(11):  # the last one is missing
        Image.new("RGB", (20 + i, 30)).save(tmp_path / f"pool/images/{i:04d}.png")
    return pool


def test_the_report(pool, tmp_path):
    (tmp_path / "next").mkdir()
    facts = {"threshold": 0.5, "seed": 3, "nothing": None, "counts": {"pool": 12}}
    finish(tmp_path / "next", "dedup", pool, np.array([1, 4]), facts, CPU)
    write_report(tmp_path / "next")
    text = (tmp_path / "next/report.md").read_text()
    assert "## embed (../pool)" in text and "## dedup (.)" in text
    for line in ("- threshold: 0.5", "- seed: 3", "- counts:\n  - pool: 12", "  - weights: a",
                 f"  - sha256: {pool.sha256}",
                 f"- sha256: {digest(tmp_path / 'next/list.txt')}"):
        assert f"\n{line}\n" in text
    assert "nothing" not in text


def test_a_stage_made_anew_is_not_told(pool, tmp_path):
    """The report is of the stages that led to the list, and not of what is in their folders now."""

    def stage(name, of, rows, threshold):
        (tmp_path / name).mkdir(exist_ok=True)
        finish(tmp_path / name, "dedup", of, np.array(rows), {"threshold": threshold}, CPU)

    def report_of_last():
        write_report(tmp_path / "last")
        return (tmp_path / "last/report.md").read_text()

    # pool --> first --> its list, embedded again --> last
    stage("first", pool, [1, 4], 0.25)
    config = embed.Config(weights=embed.HASH, output_dir=str(tmp_path / "again"), num_workers=0)
    embed.run([f"list:{tmp_path}/first/list.txt"], config, CPU)
    stage("last", open_pool(str(tmp_path / "again")), [0, 1], 0.5)
    stages = re.findall(r"^## (\w+) \((.*)\)", report_of_last(), re.M)
    assert stages == [("embed", "../pool"), ("dedup", "../first"), ("embed", "../again"),
                      ("dedup", ".")]
    shutil.rmtree(tmp_path / "pool/features")  # they are not needed any more
    assert "- threshold: 0.25" in report_of_last()

    stage("first", pool, [1, 5], 0.75)
    text = report_of_last()
    assert "## unknown (../first)\n\n- stage: unknown\n- note: made anew since" in text
    assert "0.75" not in text and "../pool" not in text and "- threshold: 0.5" in text
    shutil.rmtree(tmp_path / "first")
    assert "## unknown (../first)\n\n- stage: unknown\n- note: gone since" in report_of_last()


def test_the_page_of_groups(pool, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(report, "draw_page", lambda folder, found, caption: rows.extend(found))
    roots = np.array([0, 1, 0, 3, 0, 3, 6, 7, 8, 9, 10, 10])
    draw_groups(tmp_path, pool, roots, [(pool, 2, 7)])
    names = [name for name, _ in rows]
    assert names == ["", "to be judged"]
    shown = [[row for _, row, _, _ in entries] for _, entries in rows]
    assert shown == [[0, 2, 4, 3, 5, 10, 11], [2, 7]]
    assert [framed for _, _, _, framed in rows[0][1]] == [i in (0, 3, 5) for i in range(7)]
    titles = [title for _, _, title, _ in rows[0][1]]
    a, b = unit_rows(12, 4)[[0, 2]].astype(np.float32)
    assert titles[0] == "stays, of 3" and titles[1] == f"{a @ b:.3f}"


def test_the_page_is_drawn(pool, tmp_path):
    roots = np.array([0, 1, 0, 3, 0, 3, 6, 7, 8, 9, 10, 10])
    draw_groups(tmp_path, pool, roots, [])
    with Image.open(tmp_path / "page.png") as page:
        assert page.width > 600 and page.height > 150
    assert evenly([1, 2, 3, 4, 5], 3) == [1, 3, 5] and evenly([1], 6) == [1]
    assert evenly([], 3) == []
