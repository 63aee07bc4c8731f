"""Claims
1. Propagated labels equal a double loop over all pairs of patches: of a single step, and of a
   whole video with an object that appears later.
2. J and F equal naive versions, and are what they should be for squares that are moved, for
   empty masks, and for void pixels; recall and decay equal the toolkit's definition.
3. A mask is found by the label that is strongest, and an object that is not there does not win.
4. Masks are written as palette PNGs under the names that DAVIS wants, with the numbers that the
   objects had, beside an animation; a perfect answer has the figures of one.
5. Videos are read in the layouts of DAVIS and of plain folders, with masks of 0 and 255 or of
   numbers; frames may have any size. Two processes give the figures of one.
6. Misuse is one line that names the flag or the file.
"""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from backbones.convnet import ConvNet
from evaluation import video
from evaluation.protocol import Extractor
from evaluation.video import (boundary, boundary_measure, first_masks, follow, network_size,
                              number_objects, over_time, propagate, region_similarity, to_mask)
from images.shapes import video as draw_video
from machinery.flags import UsageError
from machinery.process import Process

# -- 1


def loop(queries, contexts, radius, topk, temperature):
    """propagate, patch by patch: every pair of patches, in Python."""
    h, w, _ = queries.shape
    out = torch.zeros_like(contexts[0][1])
    for y in range(h):
        for x in range(w):
            pairs = []
            for features, labels in contexts:
                for v in range(h):
                    for u in range(w):
                        if max(abs(v - y), abs(u - x)) <= radius:
                            affinity = math.exp(queries[y, x] @ features[v, u] / temperature)
                            pairs.append((affinity, labels[v, u]))
            best = sorted(pairs, key=lambda pair: -pair[0])[:topk]
            total = sum(affinity for affinity, _ in best)
            out[y, x] = sum(affinity / total * label for affinity, label in best)
    return out


def some_features(frames, h, w, D=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(frames, h, w, D, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize("h, w, radius, topk", [(4, 6, 2, 5), (5, 3, 1, 3), (3, 4, 12, 5),
                                                (1, 2, 12, 5)])
def test_propagation_against_a_double_loop(h, w, radius, topk):
    queries, *contexts = some_features(4, h, w)
    labels = torch.rand(3, h, w, 3, generator=torch.Generator().manual_seed(1)).double()
    labels /= labels.sum(-1, keepdim=True)
    contexts = list(zip(contexts, labels))
    ours = propagate(queries, contexts, radius, topk, 0.1)
    torch.testing.assert_close(ours, loop(queries, contexts, radius, topk, 0.1), rtol=1e-9,
                               atol=1e-12)
    assert torch.allclose(ours.sum(-1), torch.ones(h, w).double())  # a mean of distributions


def test_a_video_against_a_double_loop():
    """First frame and last two as contexts; object 2 appears in frame 3, which is kept as well."""
    frames, size = some_features(8, 4, 5), (8, 10)
    given = {t: torch.zeros(size, dtype=torch.uint8) for t in (0, 3)}
    given[0][:4, :6], given[3][4:, 4:8] = 1, 2
    masks = list(follow(frames, given, 3, 2, radius=1, topk=3, temperature=0.2))

    labels = []
    for t, queries in enumerate(frames):
        kept = [i for i in (0, 3) if i < t]
        used = kept + [i for i in range(t) if i not in (0, 3)][-2:]
        new = torch.zeros(4, 5, 3)
        new[..., 0] = 1
        if t > 0:
            new = loop(queries, [(frames[i], labels[i]) for i in used], 1, 3, 0.2)
        if t == 0:  # a patch is 2 x 2 pixels, so that the object covers 2 x 3 patches
            new[:2, :3] = torch.tensor([0., 1, 0])
        if t == 3:
            new[2:, 2:4] = torch.tensor([0., 0, 1])
        labels.append(new.float())
        expected = to_mask(labels[-1], size)
        if t == 0:
            expected = given[0]
        if t == 3:
            expected = torch.where(given[3] > 0, given[3], expected)
        assert torch.equal(masks[t], expected), t
    assert not any((mask == 2).any() for mask in masks[:3])
    assert (masks[4] == 2).any()


# -- 2


def naive_boundary(mask):
    """Pixels that differ from a neighbour at the right, below, or diagonally below."""
    H, W = mask.shape
    out = np.zeros((H, W), bool)
    for y in range(H):
        for x in range(W):
            for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1)):
                if v < H and u < W:
                    out[y, x] |= mask[y, x] != mask[v, u]
    return out


def naive_j_and_f(mask, truth):
    H, W = mask.shape
    union = (mask | truth).sum()
    j = (mask & truth).sum() / union if union else 1.0
    radius = math.ceil(0.008 * math.sqrt(H * H + W * W))
    edges = [list(zip(*np.nonzero(naive_boundary(m)))) for m in (mask, truth)]

    def share(own, other):
        hits = [any((y - v)**2 + (x - u)**2 <= radius**2 for v, u in other) for y, x in own]
        return sum(hits) / len(hits) if own else 1.0

    precision, recall = share(*edges), share(*edges[::-1])
    both = precision + recall
    return j, 2 * precision * recall / both if both else 0.0


def test_j_and_f_against_naive_versions():
    rng = np.random.default_rng(0)
    masks = rng.random((6, 12, 130)) < 0.02  # a tolerance of 2 pixels
    truths = rng.random((6, 12, 130)) < 0.02
    truths[0], masks[1] = masks[0], 0
    truths[2], masks[3], truths[3] = 0, 0, 0
    masks[4, :5, :40], truths[4, 2:7, 20:60] = 1, 1
    j = region_similarity(torch.from_numpy(masks), torch.from_numpy(truths))
    f = boundary_measure(torch.from_numpy(masks), torch.from_numpy(truths))
    assert j.dtype == f.dtype == torch.float64
    naive = [naive_j_and_f(*pair) for pair in zip(masks, truths)]
    np.testing.assert_allclose(torch.stack([j, f], 1).numpy(), naive, rtol=1e-12)
    assert j[0] == f[0] == j[3] == f[3] == 1 and j[1] == f[1] == j[2] == f[2] == 0
    for mask in masks:
        assert np.array_equal(boundary(torch.from_numpy(mask)[None])[0], naive_boundary(mask))


@pytest.mark.parametrize("shift", [0, 1, 3, 4, 5, 40])
def test_a_square_that_is_moved(shift):
    truth = torch.zeros(1, 240, 320, dtype=torch.bool)  # a diagonal of 400: 3.2, so 4 pixels
    truth[:, 100:140, 100:140] = True
    mask = truth.roll(shift, 2)
    shared = 40 * (40 - shift)
    assert region_similarity(mask, truth).item() == shared / (2 * 1600 - shared)
    f = boundary_measure(mask, truth).item()
    # Within the tolerance the boundary is right. Beyond it, the two sides are wrong.
    assert f == 1 if shift <= 4 else 0 < f < 1


def test_recall_and_decay():
    values = [.9, .8, .7, .6, .5, .4, .3, .2, .1]
    figures = over_time(values)
    assert figures["mean"] == pytest.approx(
        .5) and figures["recall"] == 4 / 9  # .5 is not above
    assert figures["decay"] == pytest.approx(.8 - .2)  # frames 0, 1, 2 and 6, 7, 8
    assert over_time([.7]) == {"mean": .7, "recall": 1, "decay": 0}
    for n in range(1, 30):  # the toolkit: five ends, of which neighbouring quarters share one
        x = np.random.default_rng(n).random(n)
        ends = (np.round(np.linspace(1, n, 5) + 1e-10) - 1).astype(int)
        quarters = [x[ends[i]:ends[i + 1] + 1].mean() for i in range(4)]
        decay = over_time(x.tolist())["decay"]
        assert decay == pytest.approx(quarters[0] - quarters[3], abs=1e-12)


# -- 3


def test_the_strongest_label_wins():
    labels = torch.zeros(2, 4, 3)
    labels[..., 0] = 1
    labels[0, 3] = torch.tensor([.8, .2, 0])  # weak, but the most that there is of object 1
    mask = to_mask(labels, (8, 16))
    assert mask.dtype == torch.uint8 and mask.shape == (8, 16)
    assert (mask[:3, 14:] == 1).all() and not (mask == 2).any()
    labels[..., 0], labels[..., 1] = 0, 1  # the object fills the frame: no background is left
    assert (to_mask(labels, (8, 16)) == 1).all()


def test_numbers_of_objects():
    of_2016 = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)
    numbers, masks = number_objects({0: of_2016})
    assert numbers.tolist() == [0, 1] and masks[0].tolist() == [[0, 1], [1, 0]]
    of_2017 = torch.tensor([[0, 255], [8, 3]], dtype=torch.uint8)
    numbers, masks = number_objects({0: of_2017 * 0, 4: of_2017, 5: of_2017 // 8 * 8})
    assert numbers.tolist() == [0, 3, 8, 248]
    assert masks[4].tolist() == [[0, 255], [2, 1]]  # 255 is void
    given = first_masks(masks)  # 3 and 8 are new in frame 4, 248 in frame 5
    assert {t: mask.tolist()
            for t, mask in given.items()} == {4: [[0, 0], [2, 1]], 5: [[0, 3], [0, 0]]}


# -- 4 and 5


def run_video(weights, data, output_dir, *flags):
    """`evaluate.py video` on the CPU -> its results."""
    return evaluate.main([
        "video", "--weights", weights, "--data", data, "--output_dir",
        str(output_dir), "--device", "cpu", *flags])


@pytest.mark.parametrize("frame, side, patch, expected", [((480, 854), 480, 8, (480, 832)),
                                                          ((480, 854), 480, 16, (480, 832)),
                                                          ((854, 480), 480, 8, (832, 480)),
                                                          ((480, 854), 480, 14, (476, 840)),
                                                          ((270, 480), 480, 16, (480, 832)),
                                                          ((100, 100), 480, 16, (480, 480)),
                                                          ((480, 854), 240, 5, (240, 425)),
                                                          ((96, 96), 96, 8, (96, 96)),])
def test_sizes_of_frames(frame, side, patch, expected):
    assert network_size(*frame, side, patch) == expected


def write_video(frames_folder, masks_folder, seed=0, count=6, size=(60, 45), masks=range(6),
                number=255):
    """A drawn thing, as JPEG files and masks of 0 and `number`."""
    frames_folder.mkdir(parents=True)
    masks_folder.mkdir(parents=True)
    images, truths, _ = draw_video(seed, count, 64)
    for t in range(count):
        image = Image.fromarray(images[t].transpose(1, 2, 0)).resize(size)
        image.save(frames_folder / f"{t:05d}.jpg")
        if t in masks:
            mask = Image.fromarray(truths[t].astype(np.uint8) * number).resize(size, 0)
            mask.save(masks_folder / f"{t:05d}.png")


@pytest.fixture
def davis(tmp_path):
    for seed, name in enumerate(("bus", "ant", "car")):
        write_video(tmp_path / "davis/JPEGImages/480p" / name,
                    tmp_path / "davis/Annotations/480p" / name, seed)
    return tmp_path / "davis"


def test_davis_on_one_process_and_on_two(small_backbone, davis, tmp_path, monkeypatch):
    one = run_video(small_backbone, f"davis:{davis}", tmp_path / "one", "--image_size", "32")

    # Two threads in the place of two processes; tests/test_evaluate.py has processes.
    shares, barrier = {}, threading.Barrier(2, timeout=60)

    def all_gather(process, value):
        shares[process.rank] = value
        barrier.wait()
        return [shares[0], shares[1]]

    def on_rank(rank):
        process = Process(torch.device("cpu"), rank, 2)
        config = video.Config(weights=small_backbone, data=f"davis:{davis}", image_size=32,
                              output_dir=tmp_path / "two")
        return video.run(Extractor(config, process))

    monkeypatch.setattr(Process, "all_gather", all_gather)
    with ThreadPoolExecutor(2) as pool:
        for two in pool.map(on_rank, (0, 1)):
            assert two == {key: one[key] for key in two}
    assert list(shares[0]) == ["ant", "car"] and list(shares[1]) == ["bus"]

    assert json.loads((tmp_path / "one/results.json").read_text())["video"] == one["video"]
    assert list(one["video"]) == ["ant", "bus", "car"] and one["image_size"] == 32
    means = one["means"]
    assert one["J&F"] == (means["J mean"] + means["F mean"]) / 2
    assert means["J mean"] == pytest.approx(
        np.mean([of["1"]["J mean"] for of in one["video"].values()]))

    # The same files from either, as many as frames, in the size of the frames.
    for name in one["video"]:
        written = sorted((tmp_path / "one" / name).iterdir())
        assert [path.name for path in written] == [f"{t:05d}.png" for t in range(6)]
        for path in written:
            with Image.open(path) as image, Image.open(tmp_path / "two" / name
                                                       / path.name) as again:
                assert image.mode == "P" and image.size == (60, 45)
                assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
                assert np.array_equal(image, again) and set(np.unique(image)) <= {0, 1}
        with Image.open(tmp_path / f"one/{name}.gif") as animation:
            assert animation.n_frames == 6

    # val.txt chooses the videos, and their order.
    (davis / "ImageSets/2017").mkdir(parents=True)
    (davis / "ImageSets/2017/val.txt").write_text("car\nbus\n")
    assert [v.name for v in video.open_davis(str(davis), 96, 3)] == ["car", "bus"]


def test_a_perfect_answer(small_backbone, tmp_path, monkeypatch):
    """Two objects of odd numbers, the second from frame 2 on, and a stripe of void pixels."""
    folder = tmp_path / "data/two"
    write_video(folder / "images", folder / "masks", number=7)
    truths = {}
    for t in range(6):
        path = folder / f"masks/{t:05d}.png"
        mask = np.array(Image.open(path))
        if t >= 2:
            mask[:9, :9] = 30
        mask[-3:] = 255
        truths[t] = torch.from_numpy(mask)
        Image.fromarray(mask).save(path)

    def perfect(features, given, C, *args, **options):
        assert set(given) == {0, 2} and C == 3 and given[2].unique().tolist() == [0, 2]
        for t, _ in enumerate(features):
            answer = (truths[t] == 7).byte() + 2 * (truths[t] == 30).byte()
            answer[-3:] = 1  # does not count
            yield answer

    monkeypatch.setattr(video, "follow", perfect)
    results = run_video(small_backbone, f"frames:{tmp_path}/data", tmp_path / "out")
    row = results["video"]["two"]["7"]
    assert set(results["video"]["two"]) == {"7", "30"}
    assert row["J mean"] == row["F mean"] == row["J recall"] == row["F recall"] == 1
    assert row["J decay"] == row["F decay"] == 0 and results["J&F"] == 1
    assert 0 < row["J still"] < 1 and results["video"]["two"]["30"]["J still"] == 1
    with Image.open(tmp_path / "out/two/00004.png") as image:
        assert set(np.unique(image)) == {0, 7, 30}  # the numbers that were read


def test_only_the_first_mask(small_backbone, tmp_path, capsys):
    folder = tmp_path / "data/one"
    write_video(folder / "images", folder / "masks", masks=[0], size=(45, 60))
    results = run_video(small_backbone, f"frames:{tmp_path}/data", tmp_path / "out")
    assert results["video"] == {"one": {}} and "headline" not in results
    assert results["image_size"] == 96  # six times the 16 pixels of the network
    assert "has a mask to judge with" in capsys.readouterr().out
    assert len(list((tmp_path / "out/one").glob("*.png"))) == 6


# -- 6


def break_data(how, folder):
    first = folder / "masks/00000.png"
    if how == "one frame":
        for path in (folder / "images").glob("0000[1-9].jpg"):
            path.unlink()
    elif how == "other size":
        Image.new("L", (20, 20), 255).save(folder / "masks/00003.png")
    elif how == "other frame":
        Image.new("RGB", (20, 20)).save(folder / "images/00003.jpg")
    elif how == "no object":
        for path in (folder / "masks").iterdir():
            Image.new("L", (60, 45)).save(path)
    elif how == "colours":
        Image.new("RGB", (60, 45)).save(first)
    elif how == "broken":
        first.write_bytes(b"nothing")


@pytest.mark.parametrize("how, words", [
    ("one frame", "images has 1 image, expected at least 2"),
    ("other size", "00003.png has 20 x 20 pixels, but 00000.jpg has 60 x 45"),
    ("other frame", "00003.jpg has 20 x 20 pixels, but 00000.jpg has 60 x 45"),
    ("no object", "no object is marked in 6 masks in"),
    ("colours", "00000.png: a mask is a palette or a grey image"),
    ("broken", "00000.png is no image")])
def test_broken_data(how, words, small_backbone, tmp_path, capsys):
    folder = tmp_path / "data/one"
    write_video(folder / "images", folder / "masks")
    break_data(how, folder)
    with pytest.raises(SystemExit) as stop:
        run_video(small_backbone, f"frames:{tmp_path}/data", tmp_path / "out")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    ("--data frames:EMPTY", "found no videos; expected frames:PATH: PATH/NAME/images/*.jpg"),
    ("--data davis:/none", "found no videos; expected davis:PATH: PATH/JPEGImages/480p/NAME"),
    ("--data folder:x", "--data folder:x: choose from shapes, davis, frames"),
    ("--data shapes:x", "expected a number of videos"), ("--topk 0", "--topk 0"),
    ("--size_mask_neighborhood 0", "--size_mask_neighborhood 0"),
    ("--temperature 0", "--temperature 0"), ("--image_size 7", "smaller than one patch of 8")])
def test_misuse(flags, words, small_backbone, tmp_path, capsys):
    flags = flags.replace("EMPTY", str(tmp_path)).split()
    with pytest.raises(SystemExit) as stop:
        run_video(small_backbone, "shapes", tmp_path / "out", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_a_convnet_is_refused():
    extractor = SimpleNamespace(config=video.Config("mine"), process=None,
                                model=ConvNet("resnet18"))
    with pytest.raises(UsageError, match="--weights mine: a convnet, which has no patches"):
        video.run(extractor)
