"""Claims
1. GeM and whitening equal naive versions in float64.
2. Every edit gives a picture back; crops remove the area they say; seeds repeat. A new line in
   EDITS is one more kind of copy.
3. An unedited copy is found; so are those of a folder laid out as Copydays, and a folder that
   is not is refused. The images of Copydays are normalised as the network's training did it. An
   original counts wherever it stands in the ranking.
4. They are looked for at 320 pixels, or at the size of a smaller training.
5. The whitening is learned on --whitening_data, where that is given; nothing is searched in it.
"""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_evaluate
from PIL import Image

from augment import ChannelStats
from evaluation import copies
from evaluation.copies import EDITS, Whitening, copydays, gem
from evaluation.retrieval import mean_scores
from machinery.process import start_process
from vit import VisionTransformer


def test_gem_and_whitening(monkeypatch):
    monkeypatch.setattr(copies, "AT_ONCE", 7)  # rows at a time, which do not divide 50 or 4
    torch.manual_seed(0)
    patches = torch.randn(2, 5, 3, dtype=torch.float64)
    for b in range(2):
        for d in range(3):
            values = [max(float(v), 1e-6)**4 for v in patches[b, :, d]]
            assert gem(patches)[b, d].item() == pytest.approx((sum(values) / 5)**0.25,
                                                              rel=1e-12)
    features = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6).double() + 1
    features[:, 5] = features[:, 4]  # a direction without strength is floored, not blown up
    whiten, others = Whitening(features), torch.randn(4, 6, dtype=torch.float64)
    moment = np.einsum("ni,nj->ij", features.numpy(), features.numpy()) / 50
    values, axes = np.linalg.eigh(moment)
    values = np.maximum(values, 1e-5 * values.max())
    naive = np.stack([
        (axes.T @ (x - features.numpy().mean(0))) / np.sqrt(values) for x in others.numpy()])
    naive /= np.linalg.norm(naive, axis=1, keepdims=True)
    # Eigenvectors are defined up to their sign: cosines are not touched by it.
    cosines = (whiten(others) @ whiten(others).T).numpy()
    np.testing.assert_allclose(cosines, naive @ naive.T, atol=1e-9)
    assert torch.allclose(whiten(others).norm(dim=1), torch.ones(4).double())


@pytest.mark.parametrize("size", [(37, 50), (64, 64), (9, 7)])
def test_edits(size):
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    image = (255 * F.interpolate(coarse, size, mode="bilinear"))[0].byte()
    before = image.clone()
    for name, edit in EDITS.items():
        edited, again = edit(image, 3), edit(image, 3)
        assert edited.dtype == torch.uint8 and edited.ndim == 3 and edited.shape[0] == 3, name
        assert torch.equal(edited, again) and torch.equal(image, before), name
        if size != (9, 7):
            assert edited.shape != image.shape or not torch.equal(edited, image), name
        if name.startswith("crop"):
            kept = edited[0].numel() / image[0].numel()
            # whole pixels: each side is off by half a pixel at most
            assert abs(kept - (1 - int(name.split()[1]) / 100)) < 0.6 * sum(1 / s for s in size)


def test_an_unedited_copy_is_found(small_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "EDITS", {"strong": lambda image, i: image})
    line = f"copies --weights {small_backbone} --data shapes:300 --val_data shapes:20:val"
    results = run_evaluate(line, n_originals=6, output_dir=tmp_path)
    assert results["copies"] == {"strong": 1.0}


def test_an_original_far_behind_counts():
    """All images are ranked, and not the 20 nearest alone, as in DINO's code."""
    angles = torch.linspace(0, 1, 50)  # row i is the i-th nearest of the query
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    none = torch.zeros(50, dtype=torch.bool)
    original = torch.arange(50) == 30  # behind 30 others
    scores = mean_scores(rows[:1], rows, lambda i: (original, none), start_process("cpu"))
    assert scores[0].item() == pytest.approx((0 + 1 / 31) / 2, abs=1e-12)


def test_a_line_in_edits_is_one_more_copy(small_backbone, tmp_path, monkeypatch):
    edited = []

    def mirror(image, i):
        edited.append(i)
        return image.flip(2)

    monkeypatch.setitem(EDITS, "mirror", mirror)
    line = f"copies --weights {small_backbone} --data shapes:20 --val_data shapes:9:val"
    results = run_evaluate(line, n_originals=3, output_dir=tmp_path)
    assert list(results["copies"]) == list(EDITS) and "mirror" in results["copies"]
    assert edited == [0, 1, 2]  # each of the originals, by its number among them


def test_copydays(small_backbone, photos, tmp_path):
    root = tmp_path / "copydays"
    for name in ("original", "strong", "jpegqual/3"):
        (root / name).mkdir(parents=True)
    for i, file in enumerate(sorted(photos.glob("dogs/*"))[:6]):
        for name in ("original", "strong", "jpegqual/3"):  # 200000.jpg and its copy 200001.jpg
            shutil.copy(file, root / name / f"2{i:03d}0{int(name != 'original')}{file.suffix}")
    line = f"copies --weights {small_backbone} --data shapes:300"
    results = run_evaluate(line, copydays=root, output_dir=tmp_path)
    assert results["copies"] == {"strong": 1.0, "jpegqual/3": 1.0
                                 } and results["n_originals"] == 6
    with pytest.raises(SystemExit):
        run_evaluate(line, copydays=photos, output_dir=tmp_path)


def test_copydays_as_the_network_saw_its_images(tmp_path):
    """Its images have the mean and the spread of the network, and not those of ImageNet."""
    channel_stats = ChannelStats((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    for folder in ("original", "strong"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / folder / "200000.png")
    originals, parts = copydays(copies.Config(copydays=str(tmp_path)), channel_stats)
    assert originals.channel_stats == channel_stats
    assert parts["strong"].channel_stats == channel_stats


def test_whitening_on_images_of_their_own(small_backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(copies, "EDITS", {"blur": EDITS["blur"]})
    learned_on = []

    class Noted(Whitening):

        def __init__(self, features):
            learned_on.append(len(features))
            super().__init__(features)

    monkeypatch.setattr(copies, "Whitening", Noted)
    line = f"copies --weights {small_backbone} --data shapes:20 --val_data shapes:9:val"
    results = run_evaluate(line, n_originals=3, output_dir=tmp_path)
    assert "whitening on --data," in results["protocol"]
    results = run_evaluate(line, n_originals=3, output_dir=tmp_path, whitening_data="shapes:31")
    assert "whitening on --whitening_data," in results["protocol"]
    assert learned_on == [20, 31]
    assert capsys.readouterr().out.count("copies of 3 images of shapes:9:val among 23\n") == 2


def test_the_size_of_copy_detection(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "EDITS", {"blur": EDITS["blur"]})
    torch.manual_seed(0)
    for trained_at, size in ((224, 320), (64, 64)):
        model = VisionTransformer(trained_at, 32, embed_dim=64, depth=1, num_heads=1)
        torch.save(model.state_dict(), tmp_path / "backbone.pth")
        line = f"copies --weights {tmp_path / 'backbone.pth'} --data shapes:9"
        results = run_evaluate(f"{line} --val_data shapes:3:val", output_dir=tmp_path,
                               features_dir=tmp_path / str(trained_at))
        assert results["image_size"] == size  # what the features are of is what is told
        kept = torch.load(tmp_path / str(trained_at) / "copies-data.pt")
        assert kept["protocol"] == f"copies-data, {size} px"
