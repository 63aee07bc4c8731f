"""Claims
1. The input path is timed stage by stage, and the stages add up to the whole; the papers' worker
   stands beside ours. A file that does not decode is named, and ends nothing.
2. Evaluation is timed, and k-NN stands beside the bare matrix product in it.
3. Every kernel of attention that this machine has is timed at the lengths of the preset.
4. The 52 probes of the linear protocol are timed beside one, by turns.
5. A slice of the search for neighbours gives the hours of all of it.

Time is that of a clock which the work under test moves (bench_helpers.FakeClock).
"""

import itertools
import json

import pytest
import torch
from bench_helpers import FakeClock
from conftest import TINY

import augment
import bench.stages
import losses
import train
from augment import MultiCrop
from bench.__main__ import main
from evaluation.linear import Probes

# -- 1


@pytest.fixture
def input_clock(monkeypatch):
    """Reading an image takes 1 second, its crops 2, the papers' crops 16; collating a batch takes
    24 seconds and colouring it 40."""
    clock = FakeClock()
    monkeypatch.setattr(bench.stages, "time", clock)
    monkeypatch.setattr(MultiCrop, "__call__", clock.takes(2, MultiCrop.__call__))
    monkeypatch.setattr(train, "make_views", clock.takes(40, train.make_views))
    open_images = bench.stages.open_images
    stage_loader = train.stage_loader
    crop_by_crop = bench.stages.crop_by_crop

    def open_slowly(*args):
        images = open_images(*args)
        images.read = clock.takes(1, images.read)
        return images

    def collate_slowly(*args):
        loader = stage_loader(*args)
        # A DataLoader refuses some assignments once it is made; its __dict__ does not.
        vars(loader)["collate_fn"] = clock.takes(24, loader.collate_fn)
        return loader

    def crop_slowly(*args):
        return clock.takes(16, crop_by_crop(*args))

    monkeypatch.setattr(bench.stages, "open_images", open_slowly)
    monkeypatch.setattr(train, "stage_loader", collate_slowly)
    monkeypatch.setattr(bench.stages, "crop_by_crop", crop_slowly)
    return clock


def test_data_and_its_stages(input_clock, tmp_path, photos):
    out = tmp_path / "out.json"
    main(["data", *TINY, "--data", f"folder:{photos}", "--steps", "2", "--json", str(out)])
    rates = json.loads(out.read_text())["images_per_second_per_core"]
    seconds = {stage: 1 / rate for stage, rate in rates.items()}  # of one image, 8 are a batch
    assert seconds == pytest.approx({
        "decode": 1, "geometry": 2, "collate": 3, "photometry": 5, "worker": 1 + 2 + 3,
        "whole": 1 + 2 + 3 + 5})


def test_threads_are_as_before(input_clock, photos):
    """The input is timed in one thread; whoever comes afterwards has all of them again."""
    before = torch.get_num_threads()
    main(["data", *TINY, "--data", f"folder:{photos}", "--steps", "1"])
    assert torch.get_num_threads() == before


def test_data_beside_the_plain_way(input_clock, tmp_path, photos):
    out = tmp_path / "out.json"
    flags = ["--data", f"folder:{photos}", "--steps", "2", "--plain", "--json", str(out)]
    main(["data", *TINY, *flags])
    result = json.loads(out.read_text())
    rates = result["images_per_second_per_core"]
    assert 1 / rates["plain"] == pytest.approx(1 + 16)  # it decodes, too
    assert result["ratio"] == pytest.approx(rates["worker"] / rates["plain"])


def test_a_file_that_does_not_decode_is_replaced_and_named(photos, capsys):
    (photos / "cats" / "01.png").write_bytes(b"no picture")
    main(["data", *TINY, "--data", f"folder:{photos}", "--steps", "3"])
    printed = capsys.readouterr().out
    assert "does not decode: cats/01.png: " in printed
    assert "photometry" in printed


# -- 2


def test_eval(tmp_path, monkeypatch):
    """Whatever is timed takes one second, and these two some more."""
    clock = FakeClock(per_reading=1)
    monkeypatch.setattr(bench.stages, "time_when_done", clock)
    monkeypatch.setattr(bench.stages, "extract", clock.takes(3, bench.stages.extract))
    monkeypatch.setattr(bench.stages, "top_neighbours",
                        clock.takes(2, bench.stages.top_neighbours))
    peaks = iter([1.0, 1.5])
    monkeypatch.setattr(bench.stages.Memory, "peak_gb", lambda memory: next(peaks))
    out = tmp_path / "out.json"
    flags = ["--bank", "3000", "--queries", "2500", "--steps", "1", "--json", str(out)]
    main(["eval", *TINY, *flags])
    result = json.loads(out.read_text())
    assert result["extraction_images_per_second"] == 8 / (1 + 3)
    assert result["knn_seconds"] == 1 + 2
    assert result["matmul_seconds"] == 1
    assert result["knn_ratio"] == 3
    assert result["knn_memory_gb"] == 0.5


def test_photometry_beside_a_loop(capsys, monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(bench.stages, "time_when_done", clock)
    for name, seconds in (("photometry", 1), ("colour_one_by_one", 3)):
        function = clock.takes(seconds, getattr(bench.stages, name))
        monkeypatch.setattr(bench.stages, name, function)
    result = main(["photometry", *TINY, "--steps", "2"])
    # TINY has two global and two local crops, each of which is coloured by one call.
    assert (result["batch_seconds"], result["loop_seconds"], result["ratio"]) == (4, 12, 3)
    assert "3.00 times" in capsys.readouterr().out


def test_photometry_is_compiled_where_training_compiles_it(monkeypatch):
    seen = []

    def note(crops, params):
        seen.append(augment.COMPILE)

    monkeypatch.setattr(augment, "COMPILE", False)
    monkeypatch.setattr(losses, "COMPILE", False)
    monkeypatch.setattr(bench.stages, "photometry", note)
    for flag, expected in (("--compile", True), ("--no_compile", False)):
        seen.clear()
        main(["photometry", *TINY, "--steps", "1", flag])
        assert set(seen) == {expected}


# -- 3


def test_attention_kernels(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.stages, "time_when_done", FakeClock(per_reading=1))
    out = tmp_path / "out.json"
    main(["attention", *TINY, "--steps", "1", "--json", str(out)])
    seconds = json.loads(out.read_text())["seconds"]
    # There are 16 large crops of 3 x 3 patches and 16 small ones of 2 x 2, each with a class token.
    assert {"16 x 10 math", "16 x 5 math", "16 x 10 flash_attention"} <= set(seconds)
    assert set(seconds.values()) == {1}
    assert "cudnn_attention" in capsys.readouterr().out  # named, though it is not on a CPU


# -- 4


def test_search(tmp_path):
    out = tmp_path / "search.json"
    line = "--bank 3000 --width 16 --k 5 --queries 100 --steps 2"
    main(["search", *TINY, *line.split(), "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["search_seconds"] > 0 and result["product_seconds"] > 0
    assert result["hours"] == pytest.approx(result["search_seconds"] * 30 / 3600)
    assert result["peak_gb"] > 0


def test_probes(tmp_path, monkeypatch):
    """A step of one probe takes 1 + 2 seconds, one of all of them 1 + 5."""
    clock = FakeClock(per_reading=1)
    durations = itertools.cycle([2, 5])  # by turns
    monkeypatch.setattr(bench.stages, "time_when_done", clock)
    monkeypatch.setattr(bench.stages.Probes, "step", clock.takes(durations, Probes.step))
    out = tmp_path / "out.json"
    main(["probes", *TINY, "--classes", "7", "--steps", "3", "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["probes"] == 52
    assert result["one_seconds"] == 3
    assert result["all_seconds"] == 6
    assert result["ratio"] == 2
