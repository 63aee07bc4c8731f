"""Claims
1. The class of a patch is the one that fills most of it, counted pixel by pixel.
2. The vote equals a plain loop over all labelled patches.
3. Of images whose colour tells the class the vote is nearly right, and two processes have the
   figures of one. Masks without a class are refused.
"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import copy_of, finish, run_evaluate, start
from torchvision.transforms.v2.functional import to_pil_image

from backbones.weights import load_backbone
from evaluation.patches import classes_of_patches, patch_knn, vote_for_classes
from images.pairs import IGNORE, MASKS, open_pairs, read_mask
from machinery.flags import UsageError
from machinery.process import Process, start_process


def test_classes_of_patches():
    torch.manual_seed(0)
    mask = torch.randint(-1, 3, (24, 36))
    labels = classes_of_patches(mask, (24, 36), 12, 3)
    assert labels.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            patch = mask[12 * row:12 * row + 12, 12 * column:12 * column + 12].flatten()
            counts = {c: int((patch == c).sum()) for c in (IGNORE, 0, 1, 2)}
            assert counts[int(labels[row, column])] == max(counts.values())


def test_the_vote_against_a_loop():
    torch.manual_seed(0)
    queries, bank = torch.randn(9, 5).double(), torch.randn(40, 5).double()
    labels = torch.randint(0, 4, (40,))
    shares = vote_for_classes(queries, bank, labels, 4, k=6)
    for query, share in zip(queries, shares):
        cosines = [
            (float(query @ b / query.norm() / b.norm()), int(c)) for b, c in zip(bank, labels)]
        votes = [0.0] * 4
        for cosine, c in sorted(cosines, reverse=True)[:6]:
            votes[c] += math.exp(cosine / 0.07)
        assert share.tolist() == pytest.approx([v / sum(votes) for v in votes])


def figures_of(process, weights):
    pairs = [open_pairs(MASKS, f"shapes:{n}", read_mask) for n in (9, 5)]
    return patch_knn(load_backbone(weights), *pairs, 11, 64, process, most=200)


def test_nothing_has_a_class(small_backbone):
    pairs = open_pairs(MASKS, "shapes:3", read_mask)
    none = replace(pairs, draw=None, read=lambda i:
                   (pairs.read(i)[0], pairs.read(i)[1] * 0 - 1))
    for train, val in ((pairs, none), (none, pairs)):
        with pytest.raises(UsageError, match="is --ignore_label right"):
            patch_knn(load_backbone(small_backbone), train, val, 11, 64, start_process("cpu"))


def write_figures(rank, weights, path):
    torch.save(figures_of(start_process("cpu"), weights), f"{path}/{rank}.pt")


def test_the_task(small_backbone, tmp_path, capsys):
    pair = start(write_figures, small_backbone, str(tmp_path))
    drawn = open_pairs(MASKS, "shapes:20", read_mask)
    for name in ("images", "masks"):
        (tmp_path / "drawn" / name).mkdir(parents=True)
    for i in range(20):
        image, mask = drawn[i]
        to_pil_image(image).save(tmp_path / f"drawn/images/{i}.png")
        to_pil_image(mask.byte()).save(tmp_path / f"drawn/masks/{i}.png")
    line = f"patches --weights {small_backbone} --data pairs:{tmp_path / 'drawn'}"
    line += f" --val_data pairs:{copy_of(tmp_path / 'drawn')} --neighbours 1"
    results = run_evaluate(line, output_dir=tmp_path, image_size=64)
    # Judged on copies of the images that vote: each patch finds its own.
    assert results["patches"]["accuracy"] > 0.85
    assert f"mIoU {results['patches']['miou']:.2%}" in capsys.readouterr().out
    line = f"patches --weights {small_backbone} --data shapes:9 --val_data shapes:5"
    with pytest.raises(SystemExit):
        run_evaluate(line, output_dir=tmp_path)
    assert "5 of its 5 images are in --data shapes:9, too" in capsys.readouterr().err
    alone = figures_of(Process(torch.device("cpu")), small_backbone)
    finish(pair)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == alone
