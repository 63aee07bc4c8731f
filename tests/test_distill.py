"""Claims
1. One step equals the paper's words written out in float64: loss, gradients, average, centre.
2. After many steps the teacher is what it was, to the bit, BatchNorm's statistics too; the centre
   is a running mean of what it says; what is kept is the student's average, ready to teach.
3. Nothing is hidden from the student; all patches count, or those under the masks.
4. Killed and run again: the same weights, bit for bit.
5. A step of two processes is a step of one, with DDP and with FSDP.
6. A backbone without heads gets some first, and itself stays as it is; or its features are matched.
7. Bad input is one line that names the flag, exit code 2, and leaves no run directory behind.
8. The presets are valid and carry the paper's numbers.
"""

import copy
import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import distill
import runtime
import train
from augment import collate, photometry, pixels_of
from conftest import TINY, finish, killed_in_step, saved, start
from recipes import DISTILLATION, PRESETS, check
from runtime import Place, parse, whole_state
from vit import ARCHS, VisionTransformer
from weights import load_backbone

HEADS = "--ibot_weight 1 --separate_head --ibot_n_prototypes 24 --drop_path_rate 0".split()
STUDENT = ["shapes_distill", *TINY[1:], *HEADS[:2], "--drop_path_rate", "0", "--clip_grad", "0"]
CLS, PATCHES = "x_norm_clstoken", "x_norm_patchtokens"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run to learn from, with BatchNorm in its heads."""
    folder = tmp_path_factory.mktemp("teacher")
    flags = [*TINY, *HEADS, "--epochs", "1", "--use_bn_in_head", "--output_dir", str(folder)]
    train.run(parse(train.Config, flags, PRESETS))
    return folder


def config_of(teacher, *more):
    return parse(distill.Config, [*STUDENT, "--teacher", str(teacher), *more], DISTILLATION)


def networks(config, place):
    """What a run begins with: (config, student, teacher)."""
    config, frozen = distill.open_teacher(config)
    return config, *distill.build(config, place, frozen)


def batch_of(config, indices, step=0):
    images, _ = train.open_data(config)
    views = train.Views(images, train.MultiCrop(24, 16, 2, 2), seed=0)
    return collate([views[0, step, i] for i in indices], train.masking_of(config))


NOW = dict(lr=0.01, last_layer_lr=0.01, weight_decay=0.1, momentum=0.9, teacher_temp=0.05,
           generator=None)


@pytest.mark.parametrize("tokens", ["all", "sampled"])
@pytest.mark.parametrize("centering", ["ema", "sinkhorn"])
def test_a_step_is_the_papers(tokens, centering, teacher):
    """Image by image, view by view: the large network whole, the small one whole too."""
    config = config_of(teacher, "--patch_tokens", tokens, "--centering", centering,
                       "--koleo_weight", "0.1")
    place = Place(torch.device("cpu"))
    config, student, asked = networks(config, place)
    with torch.no_grad():  # the average apart from the student, as later in a run
        for p in asked.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    makers = train.target_makers(config)
    for maker in makers.values():
        if centering == "ema":
            maker.center.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    small, large = (copy.deepcopy(x).double() for x in (student, asked.frozen[0]))
    average = copy.deepcopy(asked).double()
    centers = {name: x.double().clone() for name, x in makers.state_dict().items()}
    optimizer = train.OPTIMIZERS["adamw"](train.parameter_groups(student))
    batch = batch_of(config, range(6))
    out = train.train_step(student, asked, makers, optimizer, batch, NOW, config, place,
                           distill.update)

    pixels = [*batch["global_crops"], *batch["local_crops"]]
    crops = [photometry(c, draws).double() for c, draws in zip(pixels, batch["photometry"])]
    count = batch["masks"].view(2, 6, 9)
    assert tokens == "sampled" or count.all()
    with torch.no_grad():
        seen = [large.backbone.forward_features(x) for x in crops[:2]]
        answers = {"dino": torch.cat([large.dino_head(f[CLS]) for f in seen]),
                   "ibot": large.ibot_head(torch.cat([f[PATCHES][m] for f, m in zip(seen, count)]))}
    said = [small.backbone.forward_features(x) for x in crops]

    def targets(name):
        if centering == "ema":
            return F.softmax((answers[name] - centers[f"{name}.center"]) / 0.05, -1)
        Q = (answers[name] / 0.05).exp()
        for _ in range(3):
            Q = Q / Q.sum(0, keepdim=True)
            Q = Q / Q.sum(1, keepdim=True)
        return Q

    # The student has BatchNorm in no head, so that crops may go through one after the other.
    q = targets("dino").view(2, 6, -1)
    p = [(small.dino_head(f[CLS]) / 0.1).log_softmax(-1) for f in said]
    pairs = [-(q[i] * p[v]).sum(-1).mean() for i in range(2) for v in range(4) if v != i]
    dino = sum(pairs) / len(pairs)
    p = (small.ibot_head(torch.cat([f[PATCHES][m] for f, m in zip(said, count)])) / 0.1)
    each = -(targets("ibot") * p.log_softmax(-1)).sum(-1)
    ibot = sum(x.mean() for x in each.split(count.view(12, 9).sum(1).tolist()) if len(x)) / 12
    koleo = 0.0
    for f in said[:2]:
        unit = F.normalize(f[CLS], dim=-1)
        koleo = koleo - (torch.cdist(unit, unit) + 9 * torch.eye(6)).amin(1).log().mean()
    loss = dino + ibot + 0.1 * koleo
    # ours in float32; Sinkhorn's exponents make 1e-7 of a logit 1e-5 of a target
    torch.testing.assert_close(out["loss"].double(), loss.detach(), rtol=2e-5, atol=2e-5)
    loss.backward()
    for (name, ours), theirs in zip(student.named_parameters(), small.parameters()):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-3, atol=2e-5,
                                       msg=name)
    for mine, old, its in zip(asked.parameters(), average.parameters(), student.parameters()):
        torch.testing.assert_close(mine.double(), 0.9 * old + 0.1 * its.double(), rtol=1e-5,
                                   atol=1e-7)
    for name, maker in makers.items():
        if centering == "ema":
            moved = 0.8 * centers[f"{name}.center"] + 0.2 * answers[name].mean(0)
            torch.testing.assert_close(maker.center.double(), moved, rtol=1e-4, atol=1e-6)


def test_a_teacher_stays_as_it_is(teacher):
    config = config_of(teacher, "--use_bn_in_head")
    place = Place(torch.device("cpu"))
    config, student, asked = networks(config, place)
    frozen = asked.frozen[0]
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    parts = torch.load(teacher / "heads.pt", weights_only=True)
    parts["backbone"] = torch.load(teacher / "teacher.pt", weights_only=True)
    for part, theirs in parts.items():
        for name, value in theirs.items() if part != "makers" else ():
            assert torch.equal(before[f"{part}.{name}"], value)
    first = {k: v.clone() for k, v in student.state_dict().items()}
    makers = train.target_makers(config)
    optimizer = train.OPTIMIZERS["adamw"](train.parameter_groups(student))
    batches = [batch_of(config, range(4 * i, 4 * i + 4), i) for i in range(5)]
    with torch.no_grad():  # what it says of each batch, once and for all
        means = [frozen([photometry(b["global_crops"].flatten(0, 1),
                                    b["photometry"][:2].flatten(0, 1))])["dino"].double().mean(0)
                 for b in batches]
    center, average = torch.zeros(32).double(), dict(student.double().state_dict())
    average = {k: v.clone() for k, v in average.items()}
    student.float()
    for step in range(100):
        train.train_step(student, asked, makers, optimizer, batches[step % 5], NOW, config, place,
                         distill.update)
        center = 0.8 * center + 0.2 * means[step % 5]
        for name, value in student.state_dict().items():
            average[name] = 0.9 * average[name] + 0.1 * value.double()
    after = frozen.state_dict()
    assert any("running_var" in k for k in before) and not frozen.training
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not all(torch.equal(first[k], v) for k, v in student.state_dict().items())
    torch.testing.assert_close(makers["dino"].center.double(), center, rtol=1e-4, atol=1e-6)
    for name, value in asked.state_dict().items():
        if "num_batches" not in name:  # 100 roundings
            torch.testing.assert_close(value.double(), average[name], rtol=1e-4, atol=1e-5,
                                       msg=name)
    assert not any("frozen" in name for name in asked.state_dict())


def test_nothing_is_hidden(teacher):
    everything, some = (config_of(teacher, "--patch_tokens", t) for t in ("all", "sampled"))
    batch = batch_of(everything, range(4))
    assert batch["mask_indices"].tolist() == list(range(8 * 9))
    torch.testing.assert_close(batch["mask_weights"], torch.full((72,), 1 / 9))
    assert 0 < (batch_of(some, range(4))["mask_weights"] > 0).sum() < 72
    config, student, _ = networks(some, Place(torch.device("cpu")))
    assert not any("mask_token" in name for name in student.state_dict())
    images, masks = torch.randn(2, 3, 24, 24), torch.ones(2, 9, dtype=torch.bool)
    where = torch.arange(18)
    with torch.no_grad():
        open_, masked = (student([images], None, m, where)["ibot"] for m in (None, masks))
    assert torch.equal(open_, masked)


def test_killed_and_resumed_equals_uninterrupted(teacher, tmp_path):
    whole, broken = (config_of(teacher, "--output_dir", str(tmp_path / name), "--auto_scale")
                     for name in ("whole", "broken"))
    summary = distill.run(whole)
    with killed_in_step(11):  # the last save was after step 8
        distill.run(broken)
    assert distill.run(broken)["loss"] == summary["loss"]
    (last, a), (_, b) = (saved(tmp_path / name / "checkpoint") for name in ("whole", "broken"))
    assert last == 16 and set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    # What is kept is the average, small; it can be looked at, and teach in its turn.
    kept = torch.load(tmp_path / "whole/teacher.pt", weights_only=True)
    assert all(torch.equal(v, a[f"teacher.backbone.{k}"]) for k, v in kept.items())
    assert any(not torch.equal(v, a[f"student.backbone.{k}"]) for k, v in kept.items())
    assert load_backbone(tmp_path / "whole").embed_dim == 64
    stored = json.loads((tmp_path / "whole/config.json").read_text())
    assert stored["teacher"] == str(teacher) and stored["ibot_n_prototypes"] == 24
    again = config_of(tmp_path / "whole", "--output_dir", str(tmp_path / "again"), "--epochs", "1")
    assert distill.run(again)["steps"] == 8


# -- two processes


def one_step(config, place):
    config, student, asked = networks(config, place)
    makers, network = train.target_makers(config), student
    if config.parallel == "fsdp":
        for each in (student, asked):
            train.shard(each, config, place)
    elif place.world_size > 1:
        network = train.DistributedDataParallel(student)
    optimizer = train.OPTIMIZERS["adamw"](train.parameter_groups(student))
    for group in optimizer.param_groups:
        group["eps"] = 1.0  # a step as long as its gradient: rounding stays rounding
    share = 8 // place.world_size
    batch = batch_of(config, range(share * place.rank, share * (place.rank + 1)))
    out = train.train_step(network, asked, makers, optimizer, batch, dict(NOW, lr=0.5), config,
                           place, distill.update)
    return out["loss"], dict(whole_state(student)), dict(whole_state(asked)), makers.state_dict()


def process(rank, teacher, folder):
    place, out = runtime.start("cpu"), {}
    for parallel in ("ddp", "fsdp"):
        out[parallel] = one_step(config_of(teacher, "--parallel", parallel), place)
    dist.barrier()
    # and a whole run of both stages, split over the two
    flags = (f"--parallel fsdp --data shapes:32 --val_data shapes:32:val --epochs 1 "
             f"--train_teacher_heads_epochs 1 --output_dir {folder}/run").split()
    out["run"] = distill.run(config_of(teacher / "teacher.pt", *flags))
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(teacher, tmp_path):
    processes = start(process, teacher, str(tmp_path))
    loss, *states = one_step(config_of(teacher), Place(torch.device("cpu")))
    finish(processes)
    for out in (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in (0, 1)):
        for parallel in ("ddp", "fsdp"):
            torch.testing.assert_close(out[parallel][0], loss, rtol=1e-5, atol=1e-6)
            for ours, theirs in zip(states, out[parallel][1:]):
                assert set(ours) == set(theirs)
                for k in ours:
                    # float32 sums in another order; the step is large on purpose
                    torch.testing.assert_close(ours[k], theirs[k], rtol=1e-4, atol=2e-6, msg=k)
        assert out["run"]["steps"] == 2 and not out["run"]["collapsed"]


# -- backbones alone


@pytest.mark.whole_run
def test_heads_first(teacher, tmp_path, capsys):
    backbone = tmp_path / "backbone.pth"
    torch.save(torch.load(teacher / "teacher.pt", weights_only=True), backbone)
    config = config_of(backbone, "--train_teacher_heads_epochs", "1", "--epochs", "1",
                       "--output_dir", str(tmp_path / "run"), "--n_prototypes", "40",
                       "--init", str(backbone))  # the student's, and no matter of these heads
    distill.run(config)
    heads = tmp_path / "run/teacher_heads"
    before, after = (torch.load(p, weights_only=True) for p in (backbone, heads / "teacher.pt"))
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)
    state = saved(heads / "checkpoint")[1]
    moved = torch.load(heads / "heads.pt", weights_only=True)["dino_head"]
    assert moved["last_layer.weight_v"].shape[0] == 40
    assert any(not torch.equal(moved[k], state[f"student.dino_head.{k}"]) for k in moved)
    assert not any(k.startswith("optimizer.backbone") for k in state)
    assert not json.loads((heads / "config.json").read_text())["init"]
    capsys.readouterr()
    distill.run(config)  # both are there
    assert capsys.readouterr().out.count("is finished") == 2


@pytest.mark.whole_run
@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_features_alone(distance, teacher, tmp_path):
    backbone = tmp_path / "backbone.pth"
    torch.save(torch.load(teacher / "teacher.pt", weights_only=True), backbone)
    more = ("--dino_weight 0 --ibot_weight 0 --class_feature_weight 1 --patch_feature_weight 0.5 "
            f"--feature_distance {distance} --epochs 4 --output_dir {tmp_path / 'run'}").split()
    config, place = config_of(backbone, *more), Place(torch.device("cpu"))
    config, student, asked = networks(config, place)
    small, large = (copy.deepcopy(x).double() for x in (student, asked.frozen[0]))
    batch = batch_of(config, range(6))
    batch["local_crops"] = batch["local_crops"][:0]
    optimizer = train.OPTIMIZERS["adamw"](train.parameter_groups(student))
    out = train.train_step(student, asked, {}, optimizer, batch, NOW, config, place, distill.update)

    x = photometry(batch["global_crops"].flatten(0, 1), batch["photometry"][:2].flatten(0, 1))
    ours, theirs = (net.backbone.forward_features(x.double()) for net in (small, large))
    loss = 0.0
    for key, name, weight in ((CLS, "class", 1), (PATCHES, "patch", 0.5)):
        a, b = getattr(small, f"{name}_feature_map")(ours[key]), theirs[key].detach()
        apart = ((a - b) ** 2).mean(-1) if distance == "mse" else \
            1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        loss = loss + weight * apart.mean()
    torch.testing.assert_close(out["loss"].double(), loss.detach(), rtol=1e-5, atol=1e-6)
    loss.backward()
    for (name, p), q in zip(student.named_parameters(), small.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-6, msg=name)
    if distance == "cosine":
        distill.run(config)
        rows = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
        rows = [r for r in rows if "loss" in r]
        assert rows[-1]["class_feature"] < rows[0]["class_feature"] < 1.1
        assert "ibot" not in rows[0] and "dino" not in rows[0]


# -- what is refused, and the presets


def test_a_students_first_weights_leave_the_presets_crops(teacher):
    line = ["shapes_distill", "--init", str(teacher), "--teacher", str(teacher)]
    found = train.inherit(parse(distill.Config, line, DISTILLATION))
    assert (found.arch, found.patch_size) == ("vit_nano", 8)  # as the weights say
    assert found.global_crops_size == DISTILLATION["shapes_distill"]["global_crops_size"] != 24


def test_the_student_is_shown_what_its_teacher_wants(tmp_path):
    model = VisionTransformer(24, 8, 1, **ARCHS["vit_pico"])
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    line = f"--teacher {tmp_path}/grey.pth --dino_weight 0 --ibot_weight 0 --class_feature_weight 1"
    config, _ = distill.open_teacher(parse(distill.Config, [*STUDENT, *line.split()], DISTILLATION))
    assert (config.in_chans, config.pixels) == (1, pixels_of(1))


@pytest.mark.parametrize("line, words", [
    ("--teacher=", "--teacher .: no teacher.pt in it"),
    ("--teacher nowhere", "--teacher nowhere"),
    ("--teacher FILE", "--train_teacher_heads_epochs"),
    ("--n_prototypes 16", "16 prototypes are asked for dino"),
    ("--ibot_n_prototypes 16", "has 24"),
    ("--no_separate_head", "32 prototypes are asked for ibot"),
    ("--patch_size 4 --mask_min_patches 1", "--patch_size 4"),
    ("--patch_size 4 --ibot_weight 0 --global_crops_size 20", "--global_crops_size 20"),
    ("--global_crops_size 25", "--global_crops_size 25"),
    ("--arch resnet18 --ibot_weight 0 --patch_feature_weight 1", "--patch_feature_weight 0"),
    ("--dino_weight 0 --ibot_weight 0", "nothing to learn"),
    ("--patch_tokens some", "--patch_tokens"),
    ("--in_chans 1", "leave them to --teacher"),
    ("--class_feature_weight -1", "--class_feature_weight"),
])
def test_misuse(line, words, teacher, tmp_path, capsys):
    (tmp_path / "plain").mkdir()
    file = tmp_path / "plain/backbone.pth"
    torch.save(torch.load(teacher / "teacher.pt", weights_only=True), file)
    line = line.replace("FILE", str(file))
    with pytest.raises(SystemExit) as stop:
        distill.main([*STUDENT, "--teacher", str(teacher), *line.split(),
                      "--output_dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_presets():
    for name, preset in DISTILLATION.items():
        config = distill.Config(preset=name, **preset)
        check(config)
        assert config.teacher and not config.hides_patches and config.drop_path_rate == 0
    expected = dict(  # DINOv2 table 16
        ffn_layer="mlp", layerscale=1e-5, drop_path_rate=0.0, lr=1e-3, lr_scaling="none",
        weight_decay=0.04, weight_decay_end=0.2, epochs=500, epoch_length=1250, warmup_epochs=80,
        momentum_teacher=0.994, patch_size=14, precision="fp16", centering="sinkhorn",
        patch_tokens="all", koleo_weight=0.1, ibot_weight=1.0, n_prototypes=131072)
    for size, arch in (("s", "vit_small"), ("b", "vit_base"), ("l", "vit_large")):
        config = distill.Config(**DISTILLATION[f"dinov2_vit{size}14_distill"])
        assert {k: getattr(config, k) for k in expected} == expected and config.arch == arch
