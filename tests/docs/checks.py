"""Claims, of exercises that add something to the project (docs/workshop.md):
1. Exercise 7: every view also matches itself; value against the double loop.
2. Exercise 8: without all_sum a process takes the mean of its own rows.
3. Exercise 9: the patches that vote are tokens of an earlier block.
4. Exercise 15: the bias of a batch is its own mean; padding does not count, and nothing is kept.
5. Exercise 16: another shape hides as many patches as it is asked to, others each time.
6. Exercise 17: the variance loss equals its formula, value and gradient; a step has it.
7. Exercise 19: of a large JPEG as many pixels are read as crops need; small images stay.

The suite does not collect this file: what it asks for is not there until somebody has written it.
`python -m docs.exercise N --check` runs it in a working copy.
"""

import numpy as np
import torch
from PIL import Image

import losses
from augment import MASK_SHAPES
from images.data import open_images


def test_own_pairs_count():
    torch.manual_seed(0)
    targets = torch.randn(2, 3, 7).softmax(-1)
    student = torch.randn(4, 3, 7)
    logs = (student / 0.1).log_softmax(-1)
    pairs = [-(q * p).sum(-1).mean() for q in targets for p in logs]
    expected = sum(pairs) / 8  # 2 teacher views, each with all 4 student views
    torch.testing.assert_close(losses.view_pair_loss(targets, student), expected, rtol=1e-5,
                               atol=1e-5)


def test_processes_keep_to_themselves(monkeypatch):
    # What all_sum would bring from another process: as many rows, all of them of ones.
    rows = torch.randn(5, 3)
    monkeypatch.setattr(losses, "all_sum", lambda x: x + torch.tensor([5.0, 5.0, 5.0, 5.0]))
    torch.testing.assert_close(losses.column_mean(rows), rows.mean(0))


def test_patches_of_an_earlier_block():
    from evaluation.patches import patch_tokens
    from images.pairs import MASKS, open_pairs, read_mask
    from machinery.process import Process
    from vit import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=4, num_heads=1).eval()
    pairs = open_pairs(MASKS, "shapes:1", read_mask)
    asked = []
    layers = model.get_intermediate_layers
    model.get_intermediate_layers = lambda x, n, **how: asked.extend(n) or layers(x, n, **how)
    with torch.no_grad():
        patch_tokens(model, pairs, 0, 32, Process(torch.device("cpu")), "fp32")
    assert len(asked) == 1 and 0 <= asked[0] < 3


def test_the_centre_of_a_batch():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6)
    centering = losses.CENTERING["batch"](6)
    mean = logits.flatten(0, 1).mean(0)
    torch.testing.assert_close(centering(logits, 0.1), -mean / 0.1)
    padded = torch.cat([logits.flatten(0, 1), torch.randn(3, 6)])
    torch.testing.assert_close(centering(padded, 0.1, torch.arange(11) < 8), -mean / 0.1)
    centering.update(logits)
    assert centering.state_dict() == {}


def test_another_shape_of_masks():
    others = set(MASK_SHAPES) - {"block", "random"}
    assert others, "MASK_SHAPES has no new entry"
    for name in others:
        rng = np.random.default_rng(0)
        masks = [MASK_SHAPES[name]((8, 8), target, 4, rng) for target in (6, 20, 20, 20)]
        assert [mask.sum() for mask in masks] == [6, 20, 20, 20]
        assert not (masks[1] == masks[2]).all() or not (masks[2] == masks[3]).all()


def variance_by_hand(features):
    """VICReg eq. 1 with a target of 1: how far each spread over the images stays below it."""
    spread = (features.var(0) + 1e-4).sqrt()
    return (1 - spread).clamp(min=0).mean()


def test_variance_loss():
    torch.manual_seed(0)
    # Half of the dimensions spread by more than 1, so that the hinge matters.
    features = torch.randn(9, 6) * torch.tensor([0.1, 0.3, 0.5, 2.0, 3.0, 4.0])
    ours = features.clone().requires_grad_()
    expected = features.clone().requires_grad_()
    losses.variance_loss(ours).backward()
    variance_by_hand(expected).backward()
    torch.testing.assert_close(losses.variance_loss(features), variance_by_hand(features))
    torch.testing.assert_close(ours.grad, expected.grad)
    assert not ours.grad[:, 3:].any()


def test_a_step_has_the_new_loss():
    import train
    from machinery.process import Process

    flags = ("shapes_dino --data shapes:8 --batch_size_per_gpu 4 --arch vit_pico "
             "--n_prototypes 16 --head_hidden_dim 32 --local_crops_number 0 --num_workers 0 "
             "--no_auto_scale --global_crops_size 20 --variance_weight 2 --precision fp32")
    config = train.read_flags(flags.split())
    process = Process(torch.device("cpu"))
    networks = train.build(config, process)
    optimizer = train.OPTIMIZERS["adamw"](train.parameter_groups(networks[0]))
    learner = train.Learner(*networks, train.build_centerings(config), optimizer)
    batch = next(iter(train.batches_from(0, 1, open_images("shapes:8"), config, process)))
    schedule = train.schedules(0, 1, 2, config, process)
    figures = train.train_step(learner, batch, schedule, config, process)
    both = figures["dino"] + 2 * figures["variance"]
    torch.testing.assert_close(figures["loss"], both)


def smooth_photograph(folder, side):
    """A JPEG of colours that change slowly, and its pixels."""
    y, x = np.mgrid[:side, :side] / side
    pixels = np.stack([x, y, 0.5 + 0.5 * np.sin(6 * x * y)], -1)
    image = Image.fromarray((255 * pixels).astype(np.uint8))
    image.save(folder / "photo.jpg", quality=95)
    return image


def test_large_photographs_are_read_small(tmp_path):
    image = smooth_photograph(tmp_path, 2400)
    small = open_images(f"folder:{tmp_path}").read(0)
    side = small.shape[-1]
    assert small.shape == (3, side, side) and 400 <= side <= 1200
    expected = np.asarray(image.resize((side, side), Image.Resampling.BOX)).transpose(2, 0, 1)
    assert np.abs(small.numpy().astype(float) - expected).mean() < 2


def test_small_photographs_stay_as_they_are(tmp_path):
    image = smooth_photograph(tmp_path, 300)
    small = open_images(f"folder:{tmp_path}").read(0)
    assert small.shape == (3, 300, 300)
    difference = np.abs(small.numpy().astype(float) - np.asarray(image).transpose(2, 0, 1))
    assert difference.mean() < 3
