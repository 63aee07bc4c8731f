"""Claims
1. Every task runs on the embedded world and on a folder, prints a table, and writes what it says,
   with the protocol, the hash of the weights, the data and the time.
2. Two processes give the figures of one, for sizes that do not divide.
3. Features equal what the network gives image by image; kept ones are used again, those of another
   network or other images and those that are no numbers are refused.
4. k-NN with few images per class draws so many; retrieval by groups, by ground truth and by labels
   see whole images, boxes and scales as they say; an unedited copy is found, Copydays is too.
5. A saved head, judged again, gives its figures; of classes that are absent none is answered.
6. Misuse is one line that names the flag, exit code 2.
"""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

import evaluate
import runtime
from augment import center_crop, normalise
from conftest import finish, start
from data import open_images
from vit import VisionTransformer
from weights import load_backbone

SMALL = ("--data shapes:37 --val_data shapes:23:val --num_workers 0 --device cpu --nb_knn 1 5 "
         "--n_per_class 1 2 --n_tries 2 --epochs 2 --n_originals 5").split()

FEW = evaluate.CS[8:28:4]  # some strengths of the penalty, where all 45 would take a while


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=4, num_heads=1)
    file = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(model.state_dict(), file)
    return str(file)


def run(line, capsys=None, **more):
    """evaluate.main on a line of words and some paths: (results, what was printed)."""
    argv = [*line.split(), *(w for k, v in more.items() for w in (f"--{k}", str(v)))]
    results = evaluate.main([*argv, "--num_workers", "0", "--device", "cpu"])
    return results, capsys.readouterr().out if capsys else ""


def process(rank, backbone, folder):
    os.chdir(folder)
    place = runtime.start("cpu")
    config, evaluate.CS = runtime.parse(evaluate.Config, ["--weights", backbone, *SMALL]), FEW
    results = evaluate.everything(evaluate.Features(config, place))
    torch.save(results, f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(backbone, tmp_path_factory):
    """Folders of one process that ran everything, and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(one)
        patch.setattr(evaluate, "CS", FEW)
        torch.save(evaluate.main(["all", "--weights", backbone, *SMALL]), one / "0.pt")
    finish(start(process, backbone, str(two)))
    return one, two


def test_everything(both, backbone):
    written = json.loads((both[0] / "evaluations/all/results.json").read_text())
    digest = evaluate.Features(runtime.parse(evaluate.Config, ["--weights", backbone]),
                               runtime.Place(torch.device("cpu"))).sha256
    assert written["weights_sha256"] == digest and len(digest) == 64
    assert written["data"] == "shapes:37" and 0 < written["minutes"] < 5
    tasks = [name for name in evaluate.TASKS if name not in ("features", "all")]
    for task in tasks:
        assert written[task]["protocol"]
        for name, value in written[task]["headline"].items():
            assert 0 <= value <= 1 and written["headline"][name] == value
    assert len(written["linear"]["probes"]) == 52 and len(written["logreg"]["chosen_by"]) == 5
    assert len(written["copies"]["copies"]) == 20


def test_two_processes_give_the_figures_of_one(both):
    one = torch.load(both[0] / "0.pt")
    for rank in (0, 1):
        two = torch.load(both[1] / f"{rank}.pt")
        for task in two:
            assert two[task] == one[task], task  # to the last digit
    for name in ("linear/head.pt", "finetune/model.pt"):
        ours, theirs = (torch.load(folder / "evaluations" / name) for folder in both)
        for key in ours:
            # float32: other batches, and gradients summed in another order
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=key)


def test_knn_and_kept_features(backbone, photos, tmp_path, capsys):
    line = f"knn --weights {backbone} --data folder:{photos} --val_data folder:{photos} --nb_knn 1"
    kept = dict(output_dir=tmp_path / "out", features_dir=tmp_path / "kept")
    first, said = run(line + " 20 --n_per_class 2", capsys, **kept)
    assert "k-NN(  1)  100.00%" in said
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["knn"] == first["knn"] and written["knn"]["1"] == 1.0  # each finds itself
    assert list(written["few_shot"]["2"]) == ["1", "2"]
    (photos / "cats/01.png").write_bytes(b"not read again")
    assert run(line + " 20 --n_per_class 2", **kept)[0]["knn"] == first["knn"]

    def refused(words, line=line):
        with pytest.raises(SystemExit):
            run(line, **kept)
        assert words in capsys.readouterr().err

    file = tmp_path / "kept/knn-data.pt"
    rows = torch.load(file)
    refused("other images", line.replace(f"folder:{photos}", "shapes:24"))
    refused("other protocol", line + " --image_size 8")
    torch.manual_seed(1)
    other = VisionTransformer(16, 8, embed_dim=64, depth=4, num_heads=1)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    refused("other weights", line.replace(backbone, str(tmp_path / "other.pth")))
    rows["rows"][3, 5] = torch.nan
    torch.save(rows, file)
    refused("1 of 24 images have features that are no numbers")
    file.write_bytes(b"nothing")
    refused("holds no features")


def test_features(backbone, photos, tmp_path):
    output = tmp_path / "deep/x.npy"
    run(f"features --weights {backbone} --data folder:{photos}", output=output)
    rows, names = np.load(output), output.with_suffix(".txt").read_text().split()
    images = open_images(f"folder:{photos}")
    assert rows.shape == (24, 64) and names == images.names
    with torch.no_grad():
        alone = load_backbone(backbone)(normalise(center_crop(images.read(5), 16)[None]))
    np.testing.assert_allclose(rows[5], alone[0].numpy(), rtol=1e-4, atol=1e-5)


def test_retrieval_by_files(backbone, photos, tmp_path, capsys):
    names = open_images(f"folder:{photos}").names
    line = f"retrieval --weights {backbone} --data folder:{photos}"
    (tmp_path / "groups.csv").write_text("path,group\n" + "".join(
        f"photos/{name},{i // 2}\n" for i, name in enumerate(names)))
    out, said = run(line, capsys, groups=tmp_path / "groups.csv", output_dir=tmp_path)
    assert 0 < out["retrieval"]["groups"]["mAP"] < 1 and "mP@10" in said
    stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
    about = {"bbx": np.array([0, 0, 30, 30.0]), "easy": np.array([0, 1]), "hard": np.array([5]),
             "junk": np.arange(7, 23)}
    with open(tmp_path / "gnd.pkl", "wb") as file:
        pickle.dump({"imlist": stems[:23], "qimlist": [stems[0], stems[1]],
                     "gnd": [about, dict(about, easy=[1], hard=[])]}, file)
    truth = dict(ground_truth=tmp_path / "gnd.pkl", output_dir=tmp_path)
    out, _ = run(line, **truth)
    whole = out["retrieval"]
    assert list(whole) == ["easy", "medium", "hard"] and whole["easy"]["mP@1"] == 1  # itself
    for more in ("", "--multiscale", "--crop_queries"):
        other = run(f"{line} {more}", **truth, features_dir=tmp_path / "kept")[0]["retrieval"]
        assert other["easy"].keys() == whole["easy"].keys()
    rows = {name: torch.load(tmp_path / f"kept/retrieval{name}-queries-whole.pt")["rows"][0]
            for name in ("", "-multiscale", "-boxes")}
    model, image = load_backbone(backbone), open_images(f"folder:{photos}").read(0)
    for name, image, scales in (("", image, [1]), ("-multiscale", image, [1, 0.5**0.5, 0.5]),
                                ("-boxes", image[:, :30, :30], [1])):
        h, w = (round(16 * side / max(image.shape)) for side in image.shape[1:])
        x = normalise(TF.resize(image, [h, w], TF.InterpolationMode.BICUBIC, antialias=True)[None])
        views = [F.interpolate(x, [max(8, int(s * n)) for n in (h, w)], mode="bilinear")
                 for s in scales]
        with torch.no_grad():
            mean = sum(model(view)[0] for view in views) / len(views)
        torch.testing.assert_close(rows[name], mean, rtol=1e-4, atol=1e-5)


def test_an_unedited_copy_is_found(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "EDITS", {"strong": lambda image, i: image})
    line = f"copies --weights {backbone} --data shapes:300 --val_data shapes:20:val"
    assert run(line + " --n_originals 6", output_dir=tmp_path)[0]["copies"] == {"strong": 1.0}


def test_copydays(backbone, photos, tmp_path):
    root = tmp_path / "copydays"
    for name in ("original", "strong", "jpegqual/3"):
        (root / name).mkdir(parents=True)
    for i, file in enumerate(sorted(photos.glob("dogs/*"))[:6]):
        for name in ("original", "strong", "jpegqual/3"):  # 200000.jpg and its copy 200001.jpg
            shutil.copy(file, root / name / f"2{i:03d}0{int(name != 'original')}{file.suffix}")
    line = f"copies --weights {backbone} --data shapes:300 --copydays "
    out, _ = run(line + str(root), output_dir=tmp_path)
    assert out["copies"] == {"strong": 1.0, "jpegqual/3": 1.0} and out["n_originals"] == 6
    with pytest.raises(SystemExit):
        run(line + str(photos), output_dir=tmp_path)


def test_saved_head(backbone, photos, tmp_path):
    line = f"linear --weights {backbone} --data folder:{photos} --epochs 2"
    val = dict(val_data=f"folder:{photos}", output_dir=tmp_path)
    trained, _ = run(line, **val)
    head = dict(val, head=tmp_path / "head.pt")
    again, _ = run(line, **head)
    for key in ("top1", "mean_per_class"):
        assert again["linear"][key] == trained["linear"][key]
    tested, _ = run(line, **val, test_data=f"folder:{photos}")
    assert tested["test"]["top1"] == tested["linear"]["top1"]
    state = torch.load(tmp_path / "head.pt")
    state["bias"] += torch.tensor([0.0, 100.0])  # all dogs
    torch.save(state, tmp_path / "head.pt")
    assert run(line, **head)[0]["linear"]["top1"] == 0.5
    for name in ("katzen", "kater"):  # other names, and no dog among them
        shutil.copytree(photos / "cats", tmp_path / "german" / name)
    (tmp_path / "map.csv").write_text("katzen, cats\nkater, cats\n")
    head["val_data"] = f"folder:{tmp_path / 'german'}"
    assert run(line, **head, class_mapping=tmp_path / "map.csv")[0]["linear"]["top1"] == 1


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "choose from knn, linear"),
        ("classify", "choose from"),
        ("knn --weights /none", "no such file"),
        ("knn --data folder:FLAT --val_data shapes:10:val", "needs labels"),
        ("linear --val_data folder:FLAT", "--val_data folder"),
        ("knn --nb_knn 0", "--nb_knn"),
        ("knn --n_per_class 3", "smallest class of --data has 2"),
        ("logreg --data shapes:5 --val_data shapes:20:val", "no image of 5 classes"),
        ("knn --val_data folder:PHOTOS", "has classes that --data has not: cats, dogs"),
        ("knn --image_size 4", "--image_size"),
        ("knn --weights NAN", "no numbers"),
        ("linear --head WEIGHTS", "weight and the bias"),
        ("linear --head /none", "--head"),
        ("linear --class_mapping /none", "--class_mapping"),
        ("retrieval --groups /none", "--groups"),
        ("retrieval --ground_truth /none", "--ground_truth"),
        ("copies --n_originals 0", "--n_originals"),
        ("knn --temperature 0", "--temperature 0"),
        ("linear --epochs -1", "--epochs: -1"),
        ("finetune --batch_size 0", "--batch_size 0"),
        ("finetune --mixup -1", "--mixup: -1"),
        ("finetune --label_smoothing 2", "--label_smoothing 2"),
        ("features --output x.txt", "--output"),
    ],
)
def test_misuse(line, words, backbone, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = torch.load(backbone)
    torch.save({k: v * torch.nan for k, v in state.items()}, tmp_path / "nan.pth")
    for name, path in (("WEIGHTS", backbone), ("NAN", tmp_path / "nan.pth"),
                       ("FLAT", photos / "cats"), ("PHOTOS", photos)):
        line = line.replace(name, str(path))
    task, *flags = line.split() or [""]
    usual = ["--weights", backbone, "--data", "shapes:20", "--val_data", "shapes:9:val"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([task, *usual, "--num_workers", "0", *flags] if task else [])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("evaluations/*/*"))
