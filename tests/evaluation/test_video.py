"""Claims
1. Propagated labels equal a double loop over all pairs of patches: of a single step, and of a
   whole video with an object that appears later.
2. A mask is found by the label that is strongest, and an object that is not there does not win.
3. Masks are written as palette PNGs under the names that DAVIS wants, with the numbers that the
   objects had, beside an animation; a perfect answer has the figures of one, whatever it says
   of void pixels.
4. Frames may have any size. Two processes give the figures of one.
5. Misuse is one line that names the flag or the file.
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
from conftest import write_video
from PIL import Image

import evaluate
from backbones.convnet import ConvNet
from evaluation import video
from evaluation.protocol import Extractor
from evaluation.video import follow, network_size, propagate, to_mask
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


def test_the_strongest_label_wins():
    labels = torch.zeros(2, 4, 3)
    labels[..., 0] = 1
    labels[0, 3] = torch.tensor([.8, .2, 0])  # weak, but the most that there is of object 1
    mask = to_mask(labels, (8, 16))
    assert mask.dtype == torch.uint8 and mask.shape == (8, 16)
    assert (mask[:3, 14:] == 1).all() and not (mask == 2).any()
    labels[..., 0], labels[..., 1] = 0, 1  # the object fills the frame: no background is left
    assert (to_mask(labels, (8, 16)) == 1).all()


# -- 3 and 4


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
    monkeypatch.setattr(video, "wait_for_all", lambda process: None)
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


# -- 5


@pytest.mark.parametrize("flags, words",
                         [("--data davis:/none", "found no videos; expected davis:PATH"),
                          ("--topk 0", "--topk 0"),
                          ("--size_mask_neighborhood 0", "--size_mask_neighborhood 0"),
                          ("--temperature 0", "--temperature 0"),
                          ("--image_size 7", "smaller than one patch of 8")])
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
