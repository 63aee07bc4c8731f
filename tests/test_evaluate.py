"""Claims
1. k-NN and features run on a folder, and write what they say.
2. Features equal what the network gives image by image.
3. Misuse is one line that names the flag, exit code 2.
"""

import json

import numpy as np
import pytest
import torch

import evaluate
from augment import center_crop, normalise
from data import open_images
from vit import VisionTransformer
from weights import load_backbone


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    return str(tmp_path / "backbone.pth")


def test_knn(backbone, photos, tmp_path):
    args = [
        "knn",
        "--weights",
        backbone,
        "--data",
        f"folder:{photos}",
        "--val_data",
        f"folder:{photos}",
        "--output_dir",
        str(tmp_path / "out"),
        "--nb_knn",
        "1",
        "20",
        "--num_workers",
        "0",
    ]
    result = evaluate.main(args)
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["knn"] == result["knn"] and written["knn"]["1"] == 1.0  # each finds itself
    assert 0 <= written["knn"]["20"] <= 1


def test_features(backbone, photos, tmp_path):
    output = tmp_path / "deep/x.npy"
    evaluate.main(
        [
            "features",
            "--weights",
            backbone,
            "--data",
            f"folder:{photos}",
            "--output",
            str(output),
            "--num_workers",
            "0",
        ]
    )
    rows, names = np.load(output), output.with_suffix(".txt").read_text().split()
    images = open_images(f"folder:{photos}")
    assert rows.shape == (24, 64) and names == images.names
    with torch.no_grad():
        alone = load_backbone(backbone)(normalise(center_crop(images.read(5), 16)[None]))
    np.testing.assert_allclose(rows[5], alone[0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "choose from knn, features"),
        ("knn --weights /none", "no such file"),
        ("knn --weights W --data folder:FLAT", "needs labels"),
        ("knn --weights W --nb_knn 0", "--nb_knn"),
        ("knn --weights W --image_size 4", "--image_size"),
        ("linear", "choose from"),
        ("features --weights W --output x.txt", "--output"),
    ],
)
def test_misuse(line, words, backbone, photos, capsys):
    line = line.replace("W", backbone).replace("FLAT", str(photos / "cats"))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*line.split(), "--num_workers", "0"] if line else [])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
