"""Claims
1. A stopwatch books each second under the innermost stage; the stages of a step add up to it.
2. The times of a step are medians, its ratios those of pairs in one turn, its shares those of the
   operations counted; what was asked for stands beside it.
3. Fed by the loader, a step tells how much of the time it waited for images.
4. The most memory is that since `begin`.
5. A GPU is waited for after a block of steps, a CPU after each; the seconds are those of one step.
6. A version that is out of memory is told as such, and the others keep their figures.
7. Only what a step has can be taken out of it.

Time is that of a clock which the work under test moves (bench_helpers.FakeClock), so each number
is known exactly, and no test asks how fast or how large anything is on this machine.
"""

import itertools
import json
from statistics import median

import pytest
import torch
from bench_helpers import CPU, FakeClock, config_of, networks_of
from conftest import EVERYTHING, TINY

import bench.step
import machinery.clock
import train
from bench.__main__ import main
from bench.step import Memory, Step, Stopwatch, in_use, made_up_batch, time_in_turns
from machinery.process import Process

# -- 1


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(bench.step, "time_when_done", clock)
    return clock


def test_stopwatch_books_the_innermost(clock):
    watch = Stopwatch(CPU)
    inner = watch.stage("inner", clock.takes(5, lambda: "answer"))
    outer = watch.stage("outer", clock.takes(2, lambda: inner()))
    assert outer() == "answer"
    assert inner() == "answer"
    assert watch.seconds["inner"] == 10
    assert watch.seconds["outer"] == 2


def test_stages_add_up(clock, monkeypatch):
    config = config_of([*TINY, *EVERYTHING])
    version = Step(networks_of(config), made_up_batch(config, CPU), config, CPU)

    # How long each function of a step takes by our clock. Each of the two networks has two heads.
    durations = [
        (train, "make_views", 1),
        (version.teacher, "forward", 2),
        (version.student, "forward", 4),
        (version.teacher.dino_head, "forward", 8),
        (version.teacher.ibot_head, "forward", 8),
        (version.student.dino_head, "forward", 8),
        (version.student.ibot_head, "forward", 8),
        (train, "view_pair_loss", 64),
        (train, "patch_loss", 64),
        (torch.Tensor, "backward", 256),
        (train, "clip_gradients", 512),
        (train, "ema_update", 1024),
        (train, "step_figures", 2048),
        (train, "unwrap", 4096),  # belongs to no stage of its own
    ]
    with monkeypatch.context() as patches:
        for owner, name, seconds in durations:
            patches.setattr(owner, name, clock.takes(seconds, getattr(owner, name)))
        stages = version.breakdown(4)
    assert stages == {
        "views": 1, "teacher": 2, "student forward": 4, "heads": 4 * 8, "loss": 2 * 64,
        "backward": 256, "optimiser": 512, "EMA": 1024, "log": 2048, "other": 4096}
    assert sum(stages.values()) == clock.now / 4


def test_nothing_is_timed_after_a_breakdown():
    config = config_of([*TINY, *EVERYTHING])
    version = Step(networks_of(config), made_up_batch(config, CPU), config, CPU)
    version.breakdown(1)
    assert "forward" not in vars(version.student)
    assert "step" not in vars(version.optimizer)


# -- 2


def test_step_writes_what_it_promises(clock, tmp_path, capsys, monkeypatch):
    # The first step takes 3 seconds, the second one 5, and so on, so that the median of some is
    # neither the first nor the last of them.
    durations = itertools.cycle([3, 5, 2, 7, 11, 13])
    monkeypatch.setattr(train, "train_step", clock.takes(durations, train.train_step))
    monkeypatch.setattr(bench.step, "matrix_ceiling", lambda precision, process: 1e9)
    peaks = iter([0.5, 2.0, 1.0])  # of ours, plain, and without packing, in this order
    monkeypatch.setattr(Memory, "peak_gb", lambda memory: next(peaks))
    returned = {}
    call = Step.__call__

    def noted(version, count=1):
        returned.setdefault(version.out, []).append(call(version, count))
        return returned[version.out][-1]

    monkeypatch.setattr(Step, "__call__", noted)
    out = tmp_path / "out.json"
    main(["step", *TINY, "--plain", "--without", "packing", "--steps", "3", "--json", str(out)])
    result = json.loads(out.read_text())
    table = capsys.readouterr().out

    # Ours has no idea taken out, then comes packing alone, then the plain version without any.
    ours, without_packing, plain = (returned[ideas][-3:] for ideas in sorted(returned, key=len))
    assert result["step_seconds"] == median(ours)
    assert result["images_per_second"] == 8 / median(ours)
    assert result["plain"]["step_seconds"] == median(plain)
    assert result["plain"]["images_per_second"] == 8 / median(plain)
    assert result["ratio"] == median(b / a for a, b in zip(ours, plain))
    assert set(result["without"]) == {"packing"}
    assert result["without"]["packing"]["step_seconds"] == median(without_packing)

    assert result["peak_memory_gb"] == 0.5
    assert result["plain"]["peak_memory_gb"] == 2.0
    assert result["memory_ratio"] == 0.5 / 2.0

    operations = result["gflop_per_image"] * 1e9 * 8
    assert result["share_of_ceiling"] == pytest.approx(operations / median(ours) / 1e9)
    assert result["share_of_ceiling"] < result["share_nominal"]  # depth that is dropped counts
    assert set(result["breakdown"]) == set(result["plain"]["breakdown"])
    assert "student forward" in result["breakdown"]
    assert "plain" in table
    assert "student forward" in table


# -- 3


def test_step_from_files(clock, tmp_path, photos, monkeypatch):
    """Waiting for a batch takes one second, the step itself three."""
    monkeypatch.setattr(bench.step, "matrix_ceiling", lambda precision, process: 1e9)
    monkeypatch.setattr(machinery.clock, "time", clock)
    monkeypatch.setattr(machinery.clock.Clock, "wait", waits_a_second(clock))
    monkeypatch.setattr(train, "train_step", clock.takes(3, train.train_step))
    out = tmp_path / "out.json"
    main(["step", *TINY, "--data", f"folder:{photos}", "--steps", "2", "--json", str(out)])
    from_files = json.loads(out.read_text())["from_files"]
    assert from_files["waiting"] == pytest.approx(1 / 4)
    assert from_files["images_per_second"] == pytest.approx(8 / 4)


def test_wrong_data_is_said_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.step, "build_versions", lambda *_: pytest.fail("was built"))
    with pytest.raises(SystemExit):
        main(["step", *TINY, "--data", f"folder:{tmp_path / 'missing'}"])
    error = capsys.readouterr().err
    assert "--data" in error and "missing" in error


def test_too_few_images_are_said_before_anything_is_timed(photos, monkeypatch, capsys):
    monkeypatch.setattr(bench.step, "build_versions", lambda *_: pytest.fail("was built"))
    with pytest.raises(SystemExit):
        main(["step", *TINY, "--data", f"folder:{photos}", "--batch_size_per_gpu", "1000"])
    assert "fewer than --batch_size_per_gpu 1000" in capsys.readouterr().err


def test_one_process_is_timed(monkeypatch, capsys):
    """Under torchrun each process would time itself, and no gradient would be exchanged."""
    monkeypatch.setattr("bench.__main__.start_process",
                        lambda device: Process(torch.device("cpu"), 0, 2))
    with pytest.raises(SystemExit):
        main(["step", *TINY])
    assert "step times one process, and torchrun has started 2" in capsys.readouterr().err


def waits_a_second(clock):
    """machinery.clock.Clock.wait for batches that come after one second each."""
    wait = machinery.clock.Clock.wait

    def slow(self, batches):
        return wait(self, map(clock.takes(1, lambda batch: batch), batches))

    return slow


# -- 4


def test_memory_is_reset_and_read(tmp_path, monkeypatch):
    """On Linux, where the kernel keeps the peak in a file and another file resets it."""
    monkeypatch.setattr(Memory, "forget", tmp_path / "clear_refs")
    monkeypatch.setattr(bench.step, "Path", lambda name: tmp_path / "status")
    (tmp_path / "clear_refs").write_text("")
    (tmp_path / "status").write_text("VmPeak:\t 9999 kB\nVmHWM:\t 3145728 kB\nVmRSS:\t 1 kB\n")
    memory = Memory(CPU.device)
    memory.begin()
    assert (tmp_path / "clear_refs").read_text() == "5"
    assert memory.peak_gb() == 3.0


# -- 5


def test_a_block_of_steps_is_timed_as_one(clock, monkeypatch):
    """Steps of 3, 5, 2 and 6 seconds; whoever reads the clock waits a second for the device."""
    config = config_of(TINY)
    version = Step(networks_of(config), made_up_batch(config, CPU), config, CPU)
    durations = iter([3, 5, 2, 6])
    monkeypatch.setattr(train, "train_step", clock.takes(durations, train.train_step))
    clock.per_reading = 1
    assert version(4) == (3 + 5 + 2 + 6 + 1) / 4


@pytest.mark.parametrize("device, steps, blocks", [("cpu", 7, [1] * 7), ("cuda", 1, [1]),
                                                   ("cuda", 2, [1, 1]), ("cuda", 7, [3, 3, 3]),
                                                   ("cuda", 8, [4, 4]), ("cuda", 10, [5, 5]),
                                                   ("cuda", 21, [5] * 5)])
def test_steps_between_two_waits(device, steps, blocks, monkeypatch):
    """A GPU is waited for after blocks; there are two turns also with the default of 8 steps."""
    monkeypatch.setattr(bench.step, "matrix_ceiling", lambda precision, process: 1e9)
    asked = []
    versions = {"ours": lambda count: asked.append(count) or 0.5}
    config = config_of([*TINY, "--steps", str(steps)])
    times, _ = time_in_turns(versions, config, Process(torch.device(device)))
    assert asked == blocks
    assert times == {"ours": [0.5] * len(blocks)}


# -- 6


def test_a_version_out_of_memory_is_a_row(clock, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_step", clock.takes(2, train.train_step))
    monkeypatch.setattr(bench.step, "matrix_ceiling", lambda precision, process: 1e9)
    peak_gb = Step.peak_gb

    def limited(version):
        if len(version.out) > 1:  # the plain version
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return peak_gb(version)

    monkeypatch.setattr(Step, "peak_gb", limited)
    result = main(["step", *TINY, "--plain", "--without", "packing", "--steps", "1"])
    assert result["plain"] == {"out_of_memory": True}
    assert "ratio" not in result
    assert result["step_seconds"] == result["without"]["packing"]["step_seconds"] == 2
    table = capsys.readouterr().out
    assert "plain                out of memory" in table
    assert table.count("out of memory") == 1


def test_our_version_out_of_memory_is_an_error(monkeypatch, capsys):
    """There is nothing to compare the others with."""

    def too_large(version):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(Step, "peak_gb", too_large)
    with pytest.raises(SystemExit) as stop:
        main(["step", *TINY, "--plain", "--steps", "1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "tried to allocate" in error


def test_what_a_cpu_writes_out_by_itself_cannot_be_taken_out():
    config = config_of(["shapes_dino", "--precision", "bf16"])
    assert "sdpa" not in in_use(config, CPU)
    config.precision = "fp32"
    assert "sdpa" in in_use(config, CPU)
