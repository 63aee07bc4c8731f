"""Claims
1. Average precision with junk, and P@k, equal a loop written from their definition (float64),
   with ties; a query without an answer is left out.
2. Levels of difficulty take the lists that Radenovic 2018 says.
3. Ground truth is read from pickles of old and new numpy, and a pickle that wants to run
   something is refused before it does.
4. Groups are found whatever folder their paths start at; a missing image is named.
5. By groups and by ground truth the task looks at whole images, which are shrunk bicubically, at
   boxes and at three scales as it was told.
"""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_evaluate
from torchvision.transforms.v2 import functional as TF

from augment import fit_inside, normalise
from backbones.weights import load_backbone
from evaluation.retrieval import (FIRST_RANKS, LEVELS, average_precision, mean_scores,
                                  read_groups, read_revisited, relevance, score_ranking)
from images.data import open_images
from machinery.process import Process

# -- one ranking


def by_definition(similarities, right, junk):
    """AP and P@k from a list that is walked through."""
    order = sorted(range(len(similarities)), key=lambda i: -similarities[i])  # stable
    order = [i for i in order if i not in junk]
    hits, area, last = 0, 0.0, 0
    for place, i in enumerate(order):
        if i in right:
            before = hits / place if place else 1.0
            hits, last = hits + 1, place + 1
            area += (before + hits / (place + 1)) / 2 / len(right)
    cuts = [min(last, k) for k in FIRST_RANKS]
    return [area, *(len(right & set(order[:cut])) / cut for cut in cuts)]


def numbers_of(mask):
    return set(mask.nonzero()[:, 0].tolist())


def test_a_ranking_against_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(4, 30))
        similarities = rng.integers(0, 6, n) / 4  # many ties
        kinds = rng.integers(0, 3, n)
        kinds[0] = 1
        right, junk = (torch.from_numpy(kinds == k) for k in (1, 2))
        scores = score_ranking(torch.from_numpy(similarities), right, junk)
        expected = by_definition(similarities.tolist(), numbers_of(right), numbers_of(junk))
        assert scores == pytest.approx(expected, abs=1e-12)
    none = torch.zeros(3, dtype=torch.bool)
    assert np.isnan(score_ranking(torch.zeros(3), none, none)).all()
    assert average_precision(torch.tensor([0, 1])) == 1
    assert average_precision(torch.tensor([1])) == 0.25  # precision 0 before, 1/2 after


def test_whole_images_are_shrunk_bicubically():
    image = torch.randint(0, 256, (3, 40, 60), generator=torch.Generator().manual_seed(0))
    image = image.byte()
    bicubic = TF.resize(image, [20, 30], TF.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(fit_inside(image, 30), bicubic)
    assert torch.equal(fit_inside(image, 90), image)  # a small image is left as it is


def test_queries_without_an_answer_are_left_out():
    rows = torch.eye(3)
    none = torch.zeros(3, dtype=torch.bool)

    def truth(i):  # query 0 is right with row 1, for query 1 nothing is right
        return (torch.arange(3) == 1 if i == 0 else none), none

    scores = mean_scores(torch.eye(3)[[1, 2]], rows, truth, Process(torch.device("cpu")))
    assert scores.tolist() == [1, 1, 1, 1]


# -- files of ground truth


def test_levels():
    about = {"easy": torch.tensor([0]), "hard": torch.tensor([2, 3]), "junk": torch.tensor([5])}
    expected = {"easy": ({0}, {2, 3, 5}), "medium": ({0, 2, 3}, {5}), "hard": ({2, 3}, {0, 5})}
    for level in LEVELS:
        assert tuple(map(numbers_of, relevance(about, level, 6))) == expected[level]


def ground_truth():
    about = {
        "bbx": np.array([1.0, 2.0, 30.0, 40.0]), "easy": np.array([0]), "hard": [2],
        "junk": np.array([], dtype=np.int64)}
    return {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [about]}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_ground_truth(protocol, tmp_path):
    file = tmp_path / "gnd.pkl"
    raw = pickle.dumps(ground_truth(), protocol)
    for content in (raw, raw.replace(b"numpy._core", b"numpy.core") if protocol == 2 else raw):
        file.write_bytes(content)
        truth = read_revisited(file)
        assert truth["qimlist"] == ["q"] and truth["gnd"][0]["hard"].tolist() == [2]
        assert truth["gnd"][0]["easy"].tolist() == [0] and len(truth["gnd"][0]["junk"]) == 0


class Bad:
    """Unpickling it would call a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_ground_truth_runs_nothing(tmp_path):
    file, trace = tmp_path / "gnd.pkl", tmp_path / "trace"
    calls = [
        Bad(os.system, f"touch {trace}"),
        Bad(eval, f"open({str(trace)!r}, 'w')"),
        Bad(np.save, str(trace), 1)]
    for bad in calls:
        file.write_bytes(pickle.dumps(ground_truth() | {"gnd": bad}))
        with pytest.raises(ValueError, match="has no place there"):
            read_revisited(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gnd.pkl"]


def test_damaged_ground_truth(tmp_path):
    file = tmp_path / "gnd.pkl"
    beyond = ground_truth()
    beyond["gnd"][0]["easy"] = [3]
    short = ground_truth()
    short["gnd"][0]["bbx"] = np.array([1.0, 2.0])
    for content, words in ((b"no pickle", "--ground_truth"),
                           (pickle.dumps(beyond), "beyond the 3"), (pickle.dumps(short),
                                                                    "a box of 2 numbers"),
                           (pickle.dumps({"imlist": []}), "--ground_truth")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_revisited(file)


def test_groups(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_text("path,group\nimages/a.jpg,x\nimages/b.jpg,x\nimages/c.jpg,y\n")
    assert read_groups(file, ["b.jpg", "images/c.jpg"]) == ["x", "y"]
    with pytest.raises(ValueError,
                       match="groups.csv: 1 of 2 images are not in it, the first d"):
        read_groups(file, ["a.jpg", "d.jpg"])
    file.write_text("name,kind\n1,2\n")
    with pytest.raises(ValueError, match="columns path and group"):
        read_groups(file, ["a.jpg"])


def test_a_whole_path_goes_before_an_ending(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_text("path,group\nold/photos/1.png,B\nphotos/1.png,A\n", encoding="utf-8-sig")
    assert read_groups(file, ["photos/1.png", "old/photos/1.png", "1.png"]) == ["A", "B", "B"]


@pytest.mark.parametrize("row, what", [("3.png,", "group"), ("3.png", "group"), (",x", "path")])
def test_a_row_without_a_group_is_refused(row, what, tmp_path):
    """Images without a group would all be right for each other."""
    (tmp_path / "groups.csv").write_text(f"path,group\n1.png,x\n{row}\n")
    with pytest.raises(ValueError, match=f"row 2 below the header has no {what}"):
        read_groups(tmp_path / "groups.csv", ["1.png"])


# -- the task


def test_retrieval_by_groups(small_backbone, photos, tmp_path, capsys):
    # One image is so long that its short side would be less than a patch.
    TF.to_pil_image(torch.zeros(3, 4, 200, dtype=torch.uint8)).save(photos / "dogs/long.png")
    names = open_images(f"folder:{photos}").names
    lines = [f"photos/{name},{i // 2}\n" for i, name in enumerate(names)]
    (tmp_path / "groups.csv").write_text("path,group\n" + "".join(lines))
    line = f"retrieval --weights {small_backbone} --data folder:{photos}"
    results = run_evaluate(line, groups=tmp_path / "groups.csv", output_dir=tmp_path)
    assert 0 < results["retrieval"]["groups"]["mAP"] < 1
    assert "mP@10" in capsys.readouterr().out

    # Groups of one image each have no right answer, and the mean of no score is no number.
    lines = [f"photos/{name},{i}\n" for i, name in enumerate(names)]
    (tmp_path / "groups.csv").write_text("path,group\n" + "".join(lines))
    with pytest.raises(SystemExit):
        run_evaluate(line, groups=tmp_path / "groups.csv")
    assert "no two images of --data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_evaluate(f"{line} --crop_queries", groups=tmp_path / "groups.csv")
    assert "--crop_queries cuts queries to the boxes of --ground_truth" in capsys.readouterr(
    ).err
    with pytest.raises(SystemExit):
        run_evaluate(line, groups=tmp_path / "groups.csv", ground_truth=tmp_path / "gnd.pkl")
    assert "--ground_truth and --groups both say what is right" in capsys.readouterr().err

    # A quotation mark that is never closed makes one field of all lines behind it.
    (tmp_path / "groups.csv").write_text("path,group\n" + 'a.jpg,"x\n' + "b.jpg,y\n" * 20_000)
    with pytest.raises(SystemExit):
        run_evaluate(line, groups=tmp_path / "groups.csv")
    assert "expected a .csv file with the columns path and group" in capsys.readouterr().err


def test_retrieval_by_ground_truth(small_backbone, photos, tmp_path, capsys):
    stems = [
        os.path.splitext(os.path.basename(n))[0] for n in open_images(f"folder:{photos}").names]
    about = {
        "bbx": np.array([0, 0, 30, 30.0]), "easy": np.array([0, 1]), "hard": np.array([5]),
        "junk": np.arange(7, 23)}
    truth = {
        "imlist": stems[:23], "qimlist": [stems[0], stems[1]],
        "gnd": [about, dict(about, easy=[1], hard=[])]}
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(truth))
    line = f"retrieval --weights {small_backbone} --data folder:{photos}"
    flags = dict(ground_truth=tmp_path / "gnd.pkl", output_dir=tmp_path)
    whole = run_evaluate(line, **flags)["retrieval"]
    assert list(whole) == ["easy", "medium", "hard"] and whole["easy"]["mP@1"] == 1  # itself
    for more in ("", "--multiscale", "--crop_queries"):
        results = run_evaluate(f"{line} {more}", **flags, features_dir=tmp_path / "kept")
        assert results["retrieval"]["easy"].keys() == whole["easy"].keys()

    # The first query's features are those of its image: whole, at three scales, in its box.
    model, image = load_backbone(small_backbone), open_images(f"folder:{photos}").read(0)
    for name, part, scales in (("", image, [1]), ("-multiscale", image, [1, 0.5**0.5, 0.5]),
                               ("-boxes", image[:, :30, :30], [1])):
        row = torch.load(tmp_path / f"kept/retrieval{name}-queries-whole.pt")["rows"][0]
        h, w = (round(16 * side / max(part.shape)) for side in part.shape[1:])
        x = normalise(
            TF.resize(part, [h, w], TF.InterpolationMode.BICUBIC, antialias=True)[None])
        views = []
        for scale in scales:
            size = [max(8, int(scale * side)) for side in (h, w)]
            views.append(F.interpolate(x, size, mode="bilinear"))
        with torch.no_grad():
            mean = sum(model(view)[0] for view in views) / len(views)
        torch.testing.assert_close(row, mean, rtol=1e-4, atol=1e-5)

    # What was judged by is noted, and not the --val_data that had no part in it.
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["ground_truth"] == str(tmp_path / "gnd.pkl") and written["val_data"] == ""

    # A thumbnail of the same name would be ranked in the place of its photograph.
    (photos / "thumbs").mkdir()
    shutil.copy(photos / open_images(f"folder:{photos}").names[0], photos / "thumbs")
    with pytest.raises(SystemExit):
        run_evaluate(line, **flags)
    assert "have the same name, by which --ground_truth" in capsys.readouterr().err
