"""Claims
1. Each file of a step becomes rows in the form of the table in docs/performance.md.
2. What is no such file is told in one line.
3. Each call of bench/gpu.sh fits a GPU of 80 GB, the plain version included.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from bench_helpers import CPU, config_of

import bench.__main__
import vit
from bench import plain
from bench.__main__ import main
from bench.count import meta_student
from training.memory import expected_memory

ROOT = Path(bench.__main__.__file__).resolve().parents[1]

# -- 1

STEP = {
    "task": "step", "day": "Dec 3", "preset": "dino_vits16", "device": "NVIDIA H100 80GB HBM3",
    "precision": "bf16", "batch_size_per_gpu": 256, "images_per_second": 1654.3,
    "share_of_ceiling": 0.273, "ceiling_tflops": 688.4, "peak_memory_gb": 27.25,
    "plain": {"out_of_memory": True
              }, "without": {"sdpa": {"ratio": 1.284, "peak_memory_gb": 41}},
    "from_files": {"images_per_second": 1500, "waiting": 0.08}}


def test_rows_are_those_of_the_page(tmp_path, capsys):
    for name, content in (("gpu-3", STEP), ("gpu-5d", {"task": "data"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [str(tmp_path / name) for name in ("gpu-3.json", "gpu-5d.json")]
    main(["table", *files])
    *rows, other = capsys.readouterr().out.splitlines()
    end = "NVIDIA H100 80GB HBM3 | Dec 3 | gpu 3 |"
    assert rows == [
        "| `dino_vits16`, batch 256, bf16 | 1,654 images/s, 27% of 688 TFLOP/s, 27.2 GB | "
        + end, "| the same from files | 1,500 images/s, wait 8% | " + end,
        "| without sdpa | 1.28 times our seconds, 41.0 GB | " + end,
        "| the plain version | out of memory | " + end]
    assert "task data" in other
    page = (ROOT / "docs/performance.md").read_text()
    columns = page.split("| figure |")[1].splitlines()[0].count("|")
    assert {row.count("|") for row in rows} == {columns + 2}


# -- 2


@pytest.mark.parametrize("content",
                         [b"no json", b"[1]", b"{}", b'{"task": "step"}', b"\xff" * 9999, None])
def test_other_files_are_refused(content, tmp_path, capsys):
    file = tmp_path / "gpu-1.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["table", str(file)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 300


# -- 3


def step_calls():
    """(preset, batch, whether some versions are plain) of each step of gpu.sh, each once."""
    calls = set()
    for line in (ROOT / "bench/gpu.sh").read_text().splitlines():
        called = re.match(r"\d\)\s+step (.*)", line)
        if called:
            preset, batch, *flags = shlex.split(called[1].replace(";;", ""))
            calls.add((preset, int(batch), "--plain" in flags))
    return sorted(calls)


def memory_of(preset, batch, depth, ideas, monkeypatch):
    """The memory that is expected in GB, without compiling, with that many blocks."""
    config = config_of([preset, "--batch_size_per_gpu", batch, "--precision", "bf16"])
    monkeypatch.setitem(vit.ARCHS, config.arch, vit.ARCHS[config.arch] | {"depth": depth})
    with plain.without(ideas), monkeypatch.context() as patches:
        if "fused_loss" in ideas:
            patches.setattr("training.memory.view_pair_loss", plain.loss_pair_by_pair)
            patches.setattr("training.memory.patch_loss", plain.loss_patch_by_patch)
        return sum(expected_memory(meta_student(config), config, CPU, on_gpu=True).values())


@pytest.mark.slow
@pytest.mark.parametrize("preset, batch, has_plain", step_calls())
def test_calls_fit_80_gb(preset, batch, has_plain, monkeypatch):
    """Blocks are alike, so what three take more than two tells what all of them take. (Of the
    drop rates of a whole network, which grow from block to block, two have the mean, and so have
    three; a single block drops nothing.)

    Of a call with plain versions the plain one is counted: it has none of our ideas, where the
    others lack one. Ours fits with more images in a call of its own.
    """
    depth = vit.ARCHS[config_of([preset]).arch]["depth"]
    ideas = tuple(plain.IDEAS) if has_plain else ()
    two, three = (memory_of(preset, batch, blocks, ideas, monkeypatch) for blocks in (2, 3))
    expected = two + (depth - 2) * (three - two)
    assert expected < 80e9 / 2**30


def test_calls_are_found():
    assert len(step_calls()) == 5  # call 5 is call 2, from files
