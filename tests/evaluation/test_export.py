"""Claims
1. The table has a row for each image and the text file its name, of any bytes; a row equals what
   the network gives for that image alone.
"""

import numpy as np
import pytest
import torch
from conftest import run_evaluate

from augment import center_crop, normalise
from backbones.weights import load_backbone
from images.data import open_images


def test_a_text_file_of_somebody_is_not_overwritten(small_backbone, photos, tmp_path, capsys):
    """--output photos.npy has its names in photos.txt, which may be the list of --data itself."""
    listed = photos / "photos.txt"
    listed.write_text("cats/01.png\ncats/02.png\n")
    with pytest.raises(SystemExit):
        run_evaluate(f"features --weights {small_backbone} --data list:{listed}",
                     output=photos / "photos.npy", features_dir=tmp_path / "kept")
    assert "would overwrite" in capsys.readouterr().err
    assert listed.read_text() == "cats/01.png\ncats/02.png\n"


def test_features(small_backbone, photos, tmp_path):
    (photos / "cats/01.png").rename(photos / "cats/\udce9.png")  # a byte that is no letter
    output = tmp_path / "deep/x.npy"
    run_evaluate(f"features --weights {small_backbone} --data folder:{photos}", output=output,
                 features_dir=tmp_path / "kept")
    text = output.with_suffix(".txt").read_text(encoding="utf-8", errors="surrogateescape")
    rows, names = np.load(output), text.split()
    images = open_images(f"folder:{photos}")
    assert rows.shape == (24, 64) and names == images.names and rows.dtype == np.float32
    image = normalise(center_crop(images.read(5), 16)[None])
    with torch.no_grad():
        row = load_backbone(small_backbone)(image)[0]
    np.testing.assert_allclose(rows[5], row.numpy(), rtol=1e-4, atol=1e-5)
