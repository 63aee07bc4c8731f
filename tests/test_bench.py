"""Claims
1. With any idea taken out, or all of them, a step gives the same loss, gradients, centres and
   teacher: float32, each of the methods, with stochastic depth and without. The papers' crops
   are ours, where nothing is left to chance.
2. Operations are counted as the layers' sizes say; memory as autograd itself keeps it.
3. Stages add up to a step, and time within a stage belongs to the innermost.
4. The six tasks write what they promise, and ratios are those of the pairs.
5. Bad input is one line that names the flag, exit code 2, and nothing is written.
6. Between two log lines the host never waits for the device.
"""

import contextlib
import copy
import json
import time
from dataclasses import replace
from statistics import median
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import to_pil_image

import bench
import plain
import runtime
import train
from augment import RGB, MultiCrop, draw_photometry, photometry
from conftest import TINY
from data import open_images
from recipes import PRESETS, check
from test_train import EVERYTHING

PLACE = runtime.Place(torch.device("cpu"))


def config_of(flags):
    config = runtime.parse(bench.Config, [str(flag) for flag in flags], PRESETS)
    check(config)
    return config


def networks_of(config):
    """Student, teacher and target makers, apart from each other as in the middle of training."""
    student, teacher = train.build(config, PLACE)
    makers = train.target_makers(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in [*teacher.parameters(), *makers.buffers()]:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return student, teacher, makers


# -- 1


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("flags", [[], EVERYTHING], ids=["dino", "dinov2"])
@pytest.mark.parametrize("idea", [*plain.IDEAS, "all"])
def test_a_step_without_an_idea_is_the_same_step(idea, flags, drop):
    config = config_of([*TINY, *flags, "--drop_path_rate", drop, "--clip_grad", 0.02])
    networks = networks_of(config)
    batch = bench.made_up_batch(config, PLACE)
    out = tuple(plain.IDEAS) if idea == "all" else (idea,)
    results = []
    for taken in ((), out):
        mine = copy.deepcopy(networks)
        version = bench.Step(mine, batch, config, PLACE, taken)
        with version.taken_out():
            figures = version.run()
        results.append((figures, *mine))
    (ours, student, teacher, makers), (theirs, *others) = results
    # float32: sums in another order; Sinkhorn has exponents of tens
    for name in ("loss", "grad_norm", *train.objectives(config)):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    compared = 0
    for (name, p), q in zip(student.named_parameters(), others[0].parameters()):
        if p.requires_grad:
            scale = p.grad.abs().max()
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=2e-4 * scale, msg=name)
            compared += 1
    assert compared > 30
    for a, b in zip(makers.buffers(), others[2].buffers()):
        torch.testing.assert_close(a, b)
    # A step of Adam is the sign of the gradient where that is rounding alone: few, if any.
    for mine, other in ((student, others[0]), (teacher, others[1])):
        apart = torch.cat([(p - q).abs().flatten() for p, q in zip(mine.parameters(),
                                                                   other.parameters())])
        assert apart.mean() < 1e-6 and (apart > 1e-4).float().mean() < 1e-3


def test_each_idea_is_really_taken_out():
    """Its plain code runs, and afterwards everything is as before."""
    config = config_of([*TINY, *EVERYTHING])
    places = {place: plain_code for idea in plain.IDEAS.values()
              for place, plain_code in idea.items()}
    called = set()

    def spy(place, function):
        def spied(*args, **kwargs):
            called.add(place)
            return function(*args, **kwargs)

        return spied

    spies = {idea: {place: spy(place, f) for place, f in table.items()}
             for idea, table in plain.IDEAS.items()}
    before = train.view_pair_loss, torch.nn.functional.scaled_dot_product_attention
    version = bench.Step(networks_of(config), bench.made_up_batch(config, PLACE), config, PLACE,
                         tuple(plain.IDEAS))
    with patch.dict(plain.IDEAS, spies), version.taken_out():
        version.run()
    assert called == set(places)
    assert before == (train.view_pair_loss, torch.nn.functional.scaled_dot_product_attention)


# -- 2


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_operations_are_those_of_the_layers(ffn):
    config = config_of([*TINY, *EVERYTHING, "--ffn_layer", ffn, "--drop_path_rate", 0.5])
    B, M, D, depth, R = 8, 13, 128, 4, 1
    hidden = {"mlp": 2 * 4 * D * D, "swiglu": 3 * ((4 * D * 2 // 3 + 7) // 8 * 8) * D}[ffn]

    def trunk(b, n, kept):  # multiply-adds of b crops of n tokens; patches enter apart
        return depth * kept * n * (4 * D * D + 2 * n * D + hidden)

    def patches(b, n):
        return b * (n - 1 - R) * 3 * 8 * 8 * D

    def head(rows, bottleneck, k):
        return rows * (D * 32 + 32 * 32 + 32 * bottleneck + bottleneck * k)

    large, small = (2 * B, 9 + 1 + R), (2 * B, 4 + 1 + R)
    patch_head = head(M, 256, 24)
    teacher = trunk(*large, kept=2 * B) + patches(*large) + head(2 * B, 16, 32) + patch_head
    embed = patches(*large) + patches(*small)
    blocks = trunk(*large, kept=B) + trunk(*small, kept=B) + head(4 * B, 16, 32) + patch_head
    work = bench.count_work(config, M)
    assert work["teacher"] == 2 * teacher
    assert work["student"] == 2 * (blocks + embed)
    assert work["backward"] == 2 * (2 * blocks + embed)  # pixels need no gradient
    dropped = trunk(*large, kept=B) + trunk(*small, kept=B)  # half of the samples
    assert bench.count_work(config, M, drop=False)["student"] == 2 * (blocks + dropped + embed)


@pytest.mark.whole_run
def test_memory_is_what_autograd_keeps():
    config = config_of([*TINY, *EVERYTHING])
    networks = networks_of(config)
    batch = bench.made_up_batch(config, PLACE)
    own = {p.untyped_storage().data_ptr() for p in networks[0].parameters()}
    kept = {}

    def note(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        bench.Step(networks, batch, config, PLACE).run()
    hidden = len(batch["mask_indices"])
    assert hidden == train.masking_of(config).most(len(batch["masks"]))
    counted = train.expected_memory(networks[0], config, PLACE)["kept for backward"] * 2**30
    assert counted == pytest.approx(sum(kept.values()), rel=0.02)  # KoLeo is left out


# -- 3


def test_stopwatch_books_the_innermost():
    watch = bench.Stopwatch(PLACE)
    inner = watch.stage("inner", lambda: time.sleep(0.05))
    outer = watch.stage("outer", lambda: (time.sleep(0.02), inner()))
    outer()
    assert 0.05 <= watch.seconds["inner"] < 0.06 + 0.05  # sleeps last longer, never shorter
    assert 0.02 <= watch.seconds["outer"] < 0.05


def test_stages_add_up():
    config = config_of([*TINY, *EVERYTHING])
    version = bench.Step(networks_of(config), bench.made_up_batch(config, PLACE), config, PLACE)
    version(), version()
    begun = time.perf_counter()
    stages = version.breakdown(4)
    whole = (time.perf_counter() - begun) / 4
    assert all(stages[name] > 0 for name in stages)
    assert {"teacher", "student forward", "heads", "loss", "backward", "optimiser",
            "EMA"} <= set(stages)
    assert 0.5 * whole < sum(stages.values()) <= whole
    assert "forward" not in vars(version.student) and "step" not in vars(version.optimizer)


# -- 4


def read(path):
    return json.loads(path.read_text())


def test_step_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    real, said, out = bench.Step.__call__, {}, tmp_path / "out.json"

    def noted(version):
        said.setdefault(version.out, []).append(real(version))
        return said[version.out][-1]

    monkeypatch.setattr(bench.Step, "__call__", noted)
    bench.main(["step", *TINY, "--plain", "--without", "packing", "--steps", "3",
                "--json", str(out)])
    found, table = read(out), capsys.readouterr().out
    assert found["images_per_second"] == pytest.approx(8 / found["step_seconds"])
    assert found["plain"]["images_per_second"] == pytest.approx(
        8 / found["plain"]["step_seconds"])
    ours, _, theirs = (said[out][-3:] for out in sorted(said, key=len))
    assert found["step_seconds"] == median(ours)
    assert found["ratio"] == median(b / a for a, b in zip(ours, theirs))
    assert set(found["without"]) == {"packing"} and found["peak_memory_gb"] > 0.05
    assert sum(found["breakdown"].values()) > 0.2 * found["step_seconds"]
    assert 0 < found["share_of_ceiling"] <= found["share_nominal"] < 1
    assert "plain" in table and "student forward" in table


def test_step_from_files(tmp_path, photos):
    out = tmp_path / "out.json"
    flags = ["step", *TINY, "--data", f"folder:{photos}", "--steps", "2", "--json", str(out)]
    bench.main(flags)
    assert 0 < read(out)["from_files"]["waiting"] < 1  # without workers there is a wait


def test_data_and_its_stages(tmp_path, photos):
    out = tmp_path / "out.json"
    bench.main(["data", *TINY, "--data", f"folder:{photos}", "--steps", "2", "--json", str(out)])
    rates = read(out)["images_per_second_per_core"]
    assert set(rates) == {"decode", "geometry", "collate", "photometry", "worker", "whole"}
    stages = ("decode", "geometry", "collate", "photometry")
    assert 1 / rates["whole"] == pytest.approx(sum(1 / rates[s] for s in stages))
    assert torch.get_num_threads() >= 1


def test_data_beside_the_plain_way(tmp_path, photos):
    out = tmp_path / "out.json"
    bench.main(["data", *TINY, "--data", f"folder:{photos}", "--steps", "2", "--plain",
                "--json", str(out)])
    found, rates = read(out), read(out)["images_per_second_per_core"]
    assert found["ratio"] == pytest.approx(rates["worker"] / rates["plain"])


def test_plain_crops_are_ours_without_colours():
    """Where nothing is left to chance: the whole image, maybe flipped, resized and normalised."""
    image = torch.randint(0, 256, (3, 50, 70), generator=torch.Generator().manual_seed(0),
                          dtype=torch.uint8)
    whole = dict(global_crops_size=24, local_crops_size=16, local_crops_number=1,
                 global_crops_scale=(1, 1), local_crops_scale=(1, 1), photometry="none")
    ours = MultiCrop(**whole)
    torch.manual_seed(0)
    theirs = plain.crop_by_crop(ours.views, "none", RGB)(to_pil_image(image))
    sample = ours(image, np.random.default_rng(0))
    crops = [*sample["global_crops"], *sample["local_crops"]]
    colours = torch.from_numpy(draw_photometry("none", 0, np.random.default_rng(0)))[None]
    assert [x.shape for x in theirs] == [x.shape for x in crops]
    for mine, other in zip(crops, theirs):
        mine = photometry(mine[None], colours, RGB)[0]
        apart = min((mine - other).abs().max(), (mine.flip(-1) - other).abs().max())
        assert apart < 2 / 255 / min(RGB.std)  # PIL rounds where torch does not


def test_eval(tmp_path):
    out = tmp_path / "out.json"
    bench.main(["eval", *TINY, "--bank", "3000", "--queries", "2500", "--steps", "1",
                "--json", str(out)])
    found = read(out)
    assert found["knn_seconds"] > found["matmul_seconds"] > 0
    assert found["extraction_images_per_second"] > 0 and found["knn_memory_gb"] >= 0


def test_attention_kernels(tmp_path, capsys):
    out = tmp_path / "out.json"
    bench.main(["attention", *TINY, "--steps", "1", "--json", str(out)])
    found = read(out)["seconds"]
    # 16 large crops of 3 x 3 patches and 16 small ones of 2 x 2, each with a class token
    assert {"16 x 10 math", "16 x 5 math", "16 x 10 flash_attention"} <= set(found)
    assert min(found.values()) > 0 and "cudnn_attention" in capsys.readouterr().out


@pytest.mark.whole_run
def test_plan_adds_up_and_meets_a_published_run(tmp_path, capsys):
    out = tmp_path / "out.json"
    bench.main(["plan", "dinov2_vitl16_in1k", "--gpus", "32", "--kind", "a100",
                "--utilisation", "0.34", "--json", str(out)])
    found = read(out)
    assert found["memory_gb"] == pytest.approx(sum(found["memory_parts"].values()))
    rate = 32 * 0.34 * 312e12 / (found["gflop_per_image"] * 1e9)
    assert found["images_per_second"] == pytest.approx(rate)
    assert found["days"] == pytest.approx(100 * 1250 * 32 * 64 / rate / 86400)
    # DINOv2's README: 32 A100s, about a day, 93 images a second and GPU, at a third of the peak.
    assert 0.8 < found["days"] < 1.2
    assert "an estimate" in capsys.readouterr().out


@pytest.mark.whole_run
def test_plan_splits_states_with_fsdp():
    config = config_of([*TINY, "--precision", "bf16"])
    student, eight = bench.meta_student(config), replace(PLACE, world_size=8)
    ddp = train.expected_memory(student, config, eight)
    config.parallel = "fsdp"
    fsdp = train.expected_memory(student, config, eight)
    assert ddp["moments"] == pytest.approx(8 * fsdp["moments"])
    assert ddp["kept for backward"] == fsdp["kept for backward"]
    parameters = sum(p.numel() for p in student.parameters())
    assert ddp["two networks"] == pytest.approx(8 * parameters / 2**30)


@pytest.mark.slow
def test_growth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "GROWTH", {"depth": (0.25, 1), "local_crops_number": (0, 0.4)})
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 1)
    found = bench.main(["growth", "shapes", "--batch_size_per_gpu", "2", "--steps", "1",
                        "--device", "cpu", "--precision", "fp32"])["growth"]
    values = {name: [row["value"] for row in rows] for name, rows in found.items()}
    assert values == {"depth": [1, 4], "local_crops_number": [0], "processes": [1]}
    one, four = found["depth"]
    assert 0 < one["seconds_per_image"] < four["seconds_per_image"]
    assert one["peak_memory_gb"] > 0.1 and found["processes"][0]["images_per_second"] > 0
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_growth_of_processes_trains_what_was_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: asked.append(command) or
                        bench.subprocess.CompletedProcess(command, 1))
    with pytest.raises(bench.UsageError, match="with 1 processes failed"):
        bench.processes(config_of(["--arch", "vit_pico", "--mask_ratio", 0.2, 0.4]), PLACE)
    line = " ".join(asked[0])
    assert "--arch vit_pico" in line and "--mask_ratio 0.2 0.4" in line and "--steps" not in line


# -- 5


@pytest.mark.parametrize("line, words", [
    ("", "choose from step, data, eval, attention, growth, plan"),
    ("stp", "choose from step"),
    ("step nothing", "there is no preset"),
    ("step shapes --steps 0", "--steps 0"),
    ("step shapes --without skipping --precision fp32", "--without skipping: this step does"),
    ("step shapes --without bf16 --precision fp32", "--without bf16"),
    ("step shapes --without everything", "--without"),
    ("data shapes", "--data is missing"),
    ("data --data shapes:64 --in_chans 5 --plain", "--plain with --in_chans 5"),
    ("data shapes --data folder:/none", "no such folder"),
    ("growth shapes --arch resnet18", "--arch resnet18"),
    ("plan shapes --kind v100", "--kind"),
    ("plan shapes --json /none/out.json", "--json /none/out.json"),
    ("plan shapes --utilisation 40", "--utilisation 40"),
    ("plan shapes --gpus 0", "--gpus 0"),
])
def test_misuse(line, words, tmp_path, capsys):
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as stop:
        bench.main([*line.split()[:1], *(["--json", str(out)] if line else []), *line.split()[1:]])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not out.exists()


# -- 6


class NoCopyThatWaits(TorchDispatchMode):
    """From the CPU to a device: a copy that does not say non_blocking waits for all before it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        waits = False
        if func == aten._to_copy.default:
            there = kwargs.get("device") or args[0].device
            waits = there != args[0].device and not kwargs.get("non_blocking")
        elif func == aten.copy_.default:
            waits = args[0].device != args[1].device and not any(args[2:])
        elif func == aten.lift_fresh.default:  # torch.tensor(numbers, device=...), in newer torch
            waits = args[0].device.type != "cpu"
        if waits:
            raise RuntimeError(f"{func} to meta waits for the device")
        return func(*args, **kwargs)


def steps_on_meta(steps=3):
    """The loop between two log lines on a device that has shapes and no values. Whoever asks it
    for one, as .item(), an `if` on a tensor or a boolean index do, gets an error, and whoever has
    it wait for numbers of the CPU."""
    meta = runtime.Place(torch.device("meta"))
    config = config_of([*TINY, *EVERYTHING])
    student, teacher, makers = (network.to("meta") for network in networks_of(config))
    optimizer = plain.DefaultAdamW(train.parameter_groups(student))  # fused has no meta kernel
    images = open_images("shapes:16")
    recent = train.Recent(images)
    batches = iter(train.batches_from(0, steps, images, config, PLACE))
    clock = runtime.Clock(0, steps)
    quiet = contextlib.nullcontext()
    no_autocast = {"runtime.autocast": lambda *_: quiet, "torch.autocast": lambda *_, **__: quiet}
    with contextlib.ExitStack() as stack:
        for name, stand_in in no_autocast.items():  # it knows no such device
            stack.enter_context(patch(name, stand_in))
        for step in range(steps):
            batch = clock.wait(batches)
            now = train.schedules(step, 2, steps, config, meta)
            with NoCopyThatWaits():
                out = train.train_step(student, teacher, makers, optimizer, batch, now, config,
                                       meta, train.ema_update)
            recent.add(step, batch, out)
            clock.tick()
    return recent, out


def test_the_host_never_waits_between_log_lines():
    recent, out = steps_on_meta()
    assert len(recent.rows) == 3 and all(value.is_meta for value in out.values())
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        recent.read({"broken": 0}, 24)  # the one place that may ask


ASK = {"item": lambda x: x.item(), "float": lambda x: float(x.detach()), "if": bool,
       "boolean index": lambda x: x[x > 0], "tolist": lambda x: x.cpu().tolist(),
       "copy": lambda x: torch.ones(3).to(x.device), "copy_": lambda x: x.copy_(torch.ones(()))}


@pytest.mark.parametrize("ask", ASK.values(), ids=list(ASK))
def test_a_hidden_wait_would_be_caught(ask, monkeypatch):
    loss = train.koleo_loss

    def hides(features):
        value = loss(features)
        ask(value)
        return value

    monkeypatch.setattr(train, "koleo_loss", hides)
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        steps_on_meta(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has a second stream")
def test_batches_are_whole_that_come_beside_other_work():
    config, device = config_of([*TINY, *EVERYTHING]), torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    pairs = []
    for batch in train.batches_from(0, 5, open_images("shapes:64"), config, PLACE):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        there = train.to_device(batch, config.pixels, device)
        pairs.append((train.to_device(batch, config.pixels, PLACE.device), there))
    for (views, hidden), (their_views, their_hidden) in pairs:
        for ours, theirs in zip(views, their_views, strict=True):
            torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-3, atol=1e-3)
        assert all(torch.equal(their_hidden[name].cpu(), hidden[name]) for name in hidden)
