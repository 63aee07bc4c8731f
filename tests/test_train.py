"""Claims
1. One step equals DINO's Alg. 1 written out plainly: loss, gradients, teacher, centre (float32);
   and DINOv2's three losses written out image by image.
2. Killed anywhere, or asked to stop, and run again: the same weights, bit for bit.
3. A run writes what the README says, and a finished one says so.
4. Bad input is one line that names the flag, exit code 2, and leaves no run directory behind.
5. A step that is not finite stops the run, names step and images, and the checkpoint stays good.
6. With fp16, a step that overflows is left out and the run goes on, bit for bit when resumed.
   Activation checkpointing changes no weight; the memory that is expected grows with the batch.
   Compiled, a run gives the same weights to rounding, without a new graph after the first step.
7. Warnings name the illness and the term; each ingredient can be left out by a flag.
8. The algorithm fits on one screen.
"""

import contextlib
import functools
import inspect
import json
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F

import losses
import train
from augment import Masking, collate, photometry
from conftest import TINY, killed_in_step, saved
from recipes import PRESETS, Config
from runtime import UsageError, parse


def config_of(flags, tmp_path, *more):
    return parse(Config, [*flags, "--output_dir", str(tmp_path / "run"), *more], PRESETS)


def views_of(batch):
    """The two global and then the local crops of all images, one tensor (B, 3, s, s) each."""
    return [photometry(crops, draws) for key, first in (("global_crops", 0), ("local_crops", 2))
            for crops, draws in zip(batch[key], batch["photometry"][first:])]


def weights(folder):
    return torch.load(folder / "teacher.pt", weights_only=True)


def same(states):
    """Bit for bit."""
    a, b = states
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_step_is_algorithm_1(tiny, tmp_path):
    """Against the algorithm as printed: one forward per view, one loss per pair."""
    config = config_of(tiny, tmp_path, "--drop_path_rate", "0", "--clip_grad", "0",
                       "--center_momentum", "0.9")
    place = train.runtime.start("cpu")
    student, teacher = train.build(config, place)
    with torch.no_grad():  # apart from each other, as in the middle of training
        for p in teacher.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    makers = train.target_makers(config)
    maker = makers["dino"]
    maker.center.copy_(0.1 * torch.randn(config.n_prototypes))
    plain_student, plain_teacher = (train.copy.deepcopy(x) for x in (student, teacher))
    center = maker.center.clone()
    images, _ = train.open_data(config)
    views = train.Views(images, train.MultiCrop(24, 16, 2, 2), seed=0)
    batch = collate([views[0, 0, i] for i in range(6)])
    now = dict(
        lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05,
        generator=None,
    )
    optimizer = train.OPTIMIZERS["adamw"](train.parameter_groups(student))
    out = train.train_step(
        student, teacher, makers, optimizer, batch, now, config, place, train.ema_update
    )

    crops = views_of(batch)
    with torch.no_grad():
        t = [plain_teacher.dino_head(plain_teacher.backbone(x)) for x in crops[:2]]
    s = [plain_student.dino_head(plain_student.backbone(x)) for x in crops]
    pairs = [
        -(F.softmax((t[i] - center) / 0.05, -1) * F.log_softmax(s[v] / 0.1, -1)).sum(-1).mean()
        for i in range(2)
        for v in range(4)
        if v != i
    ]
    loss = sum(pairs) / len(pairs)
    torch.testing.assert_close(out["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
    loss.backward()
    # AdamW's first step is the sign of the gradient: compare gradients, then the teacher's move
    for (name, p), q in zip(student.named_parameters(), plain_student.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)
    for p, q, s_ in zip(teacher.parameters(), plain_teacher.parameters(), student.parameters()):
        torch.testing.assert_close(p, 0.9 * q + 0.1 * s_, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maker.center, 0.9 * center + 0.1 * torch.cat(t).mean(0))


@pytest.mark.parametrize("separate", [False, True])
def test_a_step_of_dinov2(separate, tiny, tmp_path):
    """All three losses written out, image by image: the student sees masked crops, the teacher
    whole ones, patches are compared where they are hidden, KoLeo is taken view by view."""
    config = config_of(
        tiny + EVERYTHING, tmp_path, f"--{'' if separate else 'no_'}separate_head",
        "--drop_path_rate", "0", "--clip_grad", "0", "--mask_ratio", "0.2", "0.7",
    )
    student, teacher = train.build(config, train.runtime.start("cpu"))
    with torch.no_grad():  # apart from each other, as in the middle of training
        for p in teacher.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    images, _ = train.open_data(config)
    views = train.Views(images, train.MultiCrop(24, 16, 2, 2), seed=0)
    batch = collate([views[0, 0, i] for i in range(6)], Masking((3, 3), (0.2, 0.7)))
    now = dict(
        lr=0.0, last_layer_lr=0.0, weight_decay=0.0, momentum=1.0, teacher_temp=0.05,
        generator=None,
    )
    makers, place = train.target_makers(config), train.runtime.start("cpu")
    optimizer = train.OPTIMIZERS["adamw"](train.parameter_groups(student))
    out = train.train_step(
        student, teacher, makers, optimizer, batch, now, config, place, train.ema_update
    )

    crops = views_of(batch)
    masks = batch["masks"].view(2, 6, 9)
    seen = [teacher.backbone.forward_features(x) for x in crops[:2]]
    said = [student.backbone.forward_features(x, masks[v] if v < 2 else None)
            for v, x in enumerate(crops)]

    def sinkhorn(logits):
        Q = (logits / 0.05).exp()
        for _ in range(3):
            Q = Q / Q.sum(0, keepdim=True)
            Q = Q / Q.sum(1, keepdim=True)
        return Q

    cls = "x_norm_clstoken"
    q = sinkhorn(torch.cat([teacher.dino_head(f[cls]) for f in seen])).view(2, 6, -1)
    p = [(student.dino_head(f[cls]) / 0.1).log_softmax(-1) for f in said]
    pairs = [-(q[i] * p[v]).sum(-1).mean() for i in range(2) for v in range(4) if v != i]
    dino = sum(pairs) / len(pairs)
    patches = [torch.cat([f["x_norm_patchtokens"][m] for f, m in zip(nets, masks)])
               for nets in (seen, said)]
    heads = [net.ibot_head if separate else net.dino_head for net in (teacher, student)]
    q, p = sinkhorn(heads[0](patches[0])), (heads[1](patches[1]) / 0.1).log_softmax(-1)
    counts = masks.view(12, 9).sum(1)
    each = (-(q * p).sum(-1)).split(counts.tolist())
    ibot = sum(x.mean() for x in each if len(x)) / 12
    koleo = 0.0
    for f in said[:2]:
        unit = F.normalize(f[cls], dim=-1)
        apart = torch.cdist(unit, unit) + 9 * torch.eye(6)
        koleo = koleo - apart.amin(1).log().mean()
    loss = dino + ibot + 0.1 * koleo
    # float32, and Sinkhorn's exponents
    torch.testing.assert_close(out["loss"], loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out["koleo"], koleo, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out["ibot"], ibot * 12 / (counts > 0).sum(), rtol=1e-4, atol=1e-4)
    gradients = [p.grad.clone() for p in student.parameters() if p.requires_grad]
    optimizer.zero_grad()
    loss.backward()
    for ours, (name, p) in zip(gradients, (x for x in student.named_parameters()
                                           if x[1].requires_grad)):
        torch.testing.assert_close(ours, p.grad, rtol=1e-2, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train.run(config_of(TINY, folder))
    return folder / "run"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_and_resumed_equals_uninterrupted(workers, whole, tiny, tmp_path):
    broken = config_of(tiny, tmp_path / "broken", "--num_workers", workers)
    with killed_in_step(11):  # the last save was after step 8
        train.run(broken)
    train.run(broken)
    runs = whole, tmp_path / "broken/run"
    assert same([weights(run) for run in runs])
    states = [saved(run / "checkpoint")[1] for run in runs]
    assert any(k.startswith("optimizer.") for k in states[0]) and same(states)
    logged = [[json.loads(x) for x in open(run / "metrics.jsonl")] for run in runs]
    a, b = ([(row["step"], row.get("loss")) for row in rows] for rows in logged)
    assert a == b


def test_resumed_in_bfloat16(tiny, tmp_path):
    names = ("whole", "broken")
    whole, broken = (config_of(tiny, tmp_path / n, "--precision", "bf16") for n in names)
    train.run(whole)
    with killed_in_step(11):
        train.run(broken)
    train.run(broken)
    assert same([weights(tmp_path / n / "run") for n in names])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes(number, whole, tiny, tmp_path, monkeypatch, capsys):
    asked = config_of(tiny, tmp_path / "asked", "--num_workers", "1")
    step, calls = train.train_step, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 11:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(train, "train_step", signalled)
    with pytest.raises(SystemExit) as stop:
        train.run(asked)
    assert stop.value.code == 128 + number
    assert f"{number.name}: stopped after step 11" in capsys.readouterr().out
    assert saved(tmp_path / "asked/run/checkpoint")[0] == 11
    assert signal.getsignal(number) is not None and "Farewell" not in str(signal.getsignal(number))
    train.run(asked)
    assert same([weights(whole), weights(tmp_path / "asked/run")])


@pytest.mark.whole_run
def test_a_run_and_its_directory(tiny, tmp_path, capsys):
    config = config_of(tiny, tmp_path)
    summary = train.run(config)
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoint",
        "teacher.pt",
        "heads.pt",
        "summary.json",
        "curves.png",
        "attention.png",
        "code",
    }
    assert {
        "knn",
        "knn_untrained",
        "knn_pixels",
        "minutes",
        "peak_memory_gb",
        "collapsed",
        "steps",
        "images_per_second",
        "loss",
        "preset",
        "seed",
    } <= set(summary)
    assert summary["steps"] == 16 and 0 < summary["loss"] < 2 * math.log(32)
    assert json.loads((run / "summary.json").read_text()) == summary
    assert "next:  python visualize.py attention" in capsys.readouterr().out
    before = weights(run)
    assert train.run(config)["knn"] == summary["knn"]
    assert "is finished" in capsys.readouterr().out
    # another configuration in the same place is refused, whatever does not change the result is not
    with pytest.raises(UsageError, match="--lr 0.5 .*--no_resume"):
        train.run(config_of(tiny, tmp_path, "--lr", "0.5"))
    train.run(config_of(tiny, tmp_path, "--num_workers", "1", "--log_every", "3"))
    train.run(config_of(tiny, tmp_path, "--lr", "0.5", "--no_resume", "--epochs", "1"))
    assert any(not torch.equal(v, before[k]) for k, v in weights(run).items())


def test_auto_scale_is_settled_when_a_run_begins(tiny, tmp_path, capsys):
    scaled = config_of(tiny, tmp_path, "--auto_scale", "--epochs", "1")
    with pytest.raises(UsageError, match="--warmup_epochs"):  # a flag, which the rules obey
        train.run(config_of(tiny, tmp_path, *"--auto_scale --epochs 1 --warmup_epochs 2".split()))
    train.run(scaled)
    assert "--auto_scale: momentum_teacher 0.98 " in capsys.readouterr().out
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["momentum_teacher"] == 0.98  # a flag
    assert stored["ibot_n_prototypes"] == 256 and stored["local_crops_scale"] == [0.25, 0.6]
    train.run(scaled)  # the same command finds its run
    assert "is finished" in capsys.readouterr().out


def test_auto_scale_does_not_keep_a_flag_that_was_dropped(tiny, tmp_path):
    flags = [*tiny, "--auto_scale", "--epochs", "1"]
    train.run(config_of(flags, tmp_path))
    without = flags[:flags.index("--lr")] + flags[flags.index("--lr") + 2:]
    other = config_of(without, tmp_path)
    other.lr = 0.5
    with pytest.raises(UsageError, match="--lr 0.5"):
        train.run(other)


@pytest.mark.whole_run
def test_killed_between_the_last_save_and_the_end(tiny, tmp_path, monkeypatch):
    config = config_of(tiny, tmp_path, "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(train.visualize, "draw_curves", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(config)
    (tmp_path / "run/teacher.pt").unlink()
    summary = train.run(config)
    assert summary["steps"] == 8 and math.isfinite(summary["loss"])
    assert (tmp_path / "run/teacher.pt").exists() and (tmp_path / "run/curves.png").exists()


def test_images_given_are_not_judged_by_the_presets():
    assert train.read_flags(["shapes"]).val_data == "shapes:val"
    assert train.read_flags(["shapes", "--data", "folder:x"]).val_data == ""
    assert train.read_flags(["--data", "folder:x", "--val_data", "folder:y"]).val_data == "folder:y"


def test_unlabelled_photos(tiny, tmp_path, photos):
    flags = tiny[:1] + ["--data", f"folder:{photos / 'cats'}"] + tiny[3:]
    flags = [f for i, f in enumerate(flags) if f != "--val_data" and flags[i - 1] != "--val_data"]
    config = config_of(
        flags + ["--val_data", f"folder:{photos / 'dogs'}"], tmp_path, "--epochs", "1"
    )
    summary = train.run(config)
    assert summary["knn_protocol"] == "other-view retrieval" and 0 <= summary["knn"] <= 1


@pytest.mark.parametrize(
    "line, words",
    [
        ("dino_vit16", "did you mean"),
        ("--dta shapes", "did you mean --data"),
        ("--epochs many", "--epochs"),
        ("--data nothing", "--data"),
        ("--data folder:EMPTY", "found 0 images"),
        ("--data folder:ONE", "--batch_size_per_gpu"),
        ("--data shapes:64 --batch_size_per_gpu 1000000", "--batch_size_per_gpu"),
        ("--local_crops_size 4", "--local_crops_size"),
        ("--global_crops_size 33", "try 30"),
        ("--data shapes:64 --val_data folder:/none", "--val_data"),
        ("--device tpu", "--device"),
        ("--teacher_temp 0", "--teacher_temp"),
        ("--local_crops_scale 0.5 0.1", "--local_crops_scale"),
        ("--centering both", "--centering"),
        ("--warmup_epochs 99", "--warmup_epochs"),
        ("--local_crops_number 0 --global_crops_number 1", "at least two"),
        ("--keep 0", "--keep 0"),
        ("--num_register_tokens -1", "--num_register_tokens"),
        ("--layerwise_decay 1.5", "--layerwise_decay"),
        ("--parallel fsdp", "torchrun"),
        ("--arch resnet18 --ibot_weight 1", "--arch resnet18"),
        ("--arch resnet18 --activation_checkpointing", "--activation_checkpointing"),
    ],
)
def test_misuse(line, words, tmp_path, photos, capsys):
    (tmp_path / "empty").mkdir()
    one = tmp_path / "one"
    one.mkdir()
    (photos / "cats/01.png").rename(one / "1.png")
    line = line.replace("EMPTY", str(tmp_path / "empty")).replace("ONE", str(one))
    with pytest.raises(SystemExit) as stop:
        train.main([*line.split(), "--output_dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_step_that_is_not_finite(tiny, tmp_path, monkeypatch):
    config = config_of(tiny, tmp_path)
    loss, calls = train.view_pair_loss, []

    def breaks(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == 11 else 1.0)

    monkeypatch.setattr(train, "view_pair_loss", breaks)
    with pytest.raises(UsageError, match="step 10: the loss .dino. is not finite.*train-0"):
        train.run(config)
    step, state = saved(tmp_path / "run/checkpoint")
    assert step == 8 and all(v.isfinite().all() for v in state.values())


def test_fp16_leaves_out_what_overflows(tiny, tmp_path, monkeypatch):
    flags = [*tiny, *"--precision fp16 --epochs 1 --save_every 4".split(),
             *"--data shapes:32 --batch_size_per_gpu 4".split()]  # slow on a CPU
    for name in ("whole", "broken"):
        config = config_of(flags, tmp_path / name)
        step, calls = train.train_step, []

        def watched(*args):
            calls.append(1)
            scaler = args[-1]
            if len(calls) in (1, 3):  # gradients are large at the start; none bears 2**60
                scaler.scale.fill_(16 if len(calls) == 1 else 2.0**60)
            out = step(*args)
            assert out["ok"]
            if len(calls) == 3:
                assert not out["grad_norm"] and scaler.scale == 2.0**59
                scaler.scale.fill_(16)
            return out

        monkeypatch.setattr(train, "train_step", watched)
        with killed_in_step(7) if name == "broken" else contextlib.nullcontext():
            train.run(config)
        monkeypatch.setattr(train, "train_step", step)
    train.run(config)
    states = [saved(tmp_path / name / "run/checkpoint")[1] for name in ("whole", "broken")]
    assert states[0]["scaler.scale"] == 16 and states[0]["scaler.good"] == 5 and same(states)


def test_activation_checkpointing_changes_no_weight(tiny, tmp_path):
    for name in ("kept", "again"):
        more = ["--activation_checkpointing", str(name == "again"), "--epochs", "1"]
        train.run(config_of(tiny, tmp_path / name, *more))
    assert same([weights(tmp_path / name / "run") for name in ("kept", "again")])


@pytest.mark.whole_run
def test_expected_memory(tiny, tmp_path):
    place, found = train.runtime.start("cpu"), {}
    for name, more in {"1": (), "2": ("--batch_size_per_gpu", "16"),
                       "again": ("--activation_checkpointing",)}.items():
        config = config_of([*tiny, "--precision", "fp32"], tmp_path, *more)
        student, _ = train.build(config, place)
        before = {k: v.clone() for k, v in student.state_dict().items()}
        found[name] = train.expected_memory(student, config, place)
        assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    size = sum(p.numel() * 4 for p in student.parameters())
    for name in ("two networks", "gradients", "moments"):
        assert found["1"][name] == found["2"][name] == size / 2**30 * (1 + (name != "gradients"))
    kept = {name: parts["kept for backward"] for name, parts in found.items()}
    assert kept["2"] == pytest.approx(2 * kept["1"], rel=0.05) and kept["1"] > kept["again"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", *os.environ.get("BACKENDS", "").split()])
def test_compiled_is_the_same(tiny, tmp_path, monkeypatch, backend):
    """Stochastic depth as a ramp, masks, registers: the plan changes, the graphs do not; nor do
    those of the losses.

    The same graphs as kernels, where there is a C++ compiler and half a minute for it:
    BACKENDS=inductor pytest tests/test_train.py -k compiled
    """
    flags = [*tiny, "--ibot_weight", "1", "--num_register_tokens", "1"]
    plain = train.run(config_of(flags, tmp_path, "--output_dir", str(tmp_path / "plain")))
    step, graphs = train.train_step, []

    def counted(*args):
        out = step(*args)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return out

    compile = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr(losses, "compiled", functools.cache(
        functools.partial(torch.compile, backend=backend)))
    monkeypatch.setattr(losses, "COMPILE", False)  # as it is to be left, too
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(train, "train_step", counted)
    compiled = train.run(config_of(flags, tmp_path, "--compile"))
    # Of a block at most 4 graphs, of each of the losses' 4 passes at most 3; none after one step.
    assert len(set(graphs[1:])) == 1 and 4 < graphs[-1] <= 4 + 4 * 3, graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    assert abs(compiled["loss"] - plain["loss"]) < 1e-3
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "run")
    assert list(a) == list(b)  # clean keys
    # Adam makes a whole step of a gradient that is rounding alone: few weights differ, not many.
    apart = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert apart.mean() < 1e-5, apart.mean()


def test_too_many_broken_images(tiny, tmp_path, photos):
    for name in ("01", "03", "05", "07", "09"):
        (photos / "cats" / f"{name}.png").write_bytes(b"no")
    flags = [f"folder:{photos}" if f == "shapes:64" else f for f in tiny]
    flags[flags.index("--val_data") + 1] = f"folder:{photos / 'dogs'}"
    with pytest.raises(UsageError, match="did not decode"):
        train.run(config_of(flags, tmp_path))


@pytest.mark.parametrize(
    "row, name",
    [
        (dict(entropy=6.93, kl=0.001, mean_entropy=6.93, loss=6.931), "uniform collapse"),
        (dict(entropy=0.0, kl=0.01, mean_entropy=0.05, loss=0.01), "one prototype"),
        (dict(entropy=0.5, kl=6.43, mean_entropy=5.0, loss=6.93), "ignored teacher"),
        (dict(entropy=0.2, kl=1.0, mean_entropy=6.0, loss=1.2), None),
        (dict(entropy=6.0, kl=0.5, mean_entropy=6.8, loss=6.5), None),
    ],
)
@pytest.mark.parametrize("term", ["dino", "ibot"])
def test_diagnosis(row, name, term):
    healthy = dict(entropy=1.0, kl=1.0, mean_entropy=6.0, loss=2.0)
    both = {}
    for other in ("dino", "ibot"):
        figures = row if other == term else healthy
        both |= {other if k == "loss" else f"{other}_{k}": v for k, v in figures.items()}
    found = train.diagnose(both, Config(n_prototypes=1024, ibot_weight=1.0))
    assert (found and found[0]) == name and (not found or term in found[1])


OFF = {  # flags -> (what the log then lacks, what the network then lacks)
    "--centering none": ((), ()),
    "--koleo_weight 0": (("koleo",), ()),
    "--momentum_teacher 0": ((), ()),
    "--local_crops_number 0": ((), ()),
    "--mask_probability 0": (("ibot",), ("mask_token", "ibot_head")),
    "--ibot_weight 0": (("ibot",), ("mask_token", "ibot_head")),
    "--dino_weight 0": (("dino",), ("dino_head",)),
    "--no_separate_head": ((), ("ibot_head",)),
}
EVERYTHING = (
    "--ibot_weight 1 --koleo_weight 0.1 --centering sinkhorn --separate_head "
    "--ibot_n_prototypes 24 --num_register_tokens 1 --ffn_layer swiglu --layerscale 0.1 "
    "--layerwise_decay 0.9 --clip_mode network --drop_path_uniform --epochs 1 --lr 0.004"
).split()


@pytest.mark.parametrize("flags", OFF)
def test_each_ingredient_can_be_left_out(flags, tiny, tmp_path):
    """The term is absent, what it needs is not built, the rest is finite and falls."""
    train.run(config_of(tiny + EVERYTHING, tmp_path, *flags.split()))
    rows = [json.loads(x) for x in open(tmp_path / "run/metrics.jsonl")]
    rows = [r for r in rows if "loss" in r]
    terms, parts = OFF[flags]
    assert not any(key.split("_")[0] in terms for key in rows[0])
    state = saved(tmp_path / "run/checkpoint")[1]
    assert not any(part in key for part in parts for key in state)
    assert all(math.isfinite(v) for r in rows for v in r.values())
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_algorithm_fits_on_one_screen():
    assert len(inspect.getsource(train.train_step).splitlines()) <= 60
