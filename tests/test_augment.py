"""Claims
1. Batched photometry equals torchvision's functionals, image by image, in the order that was drawn.
   Its blur is as wide as PIL's, but for the largest sigmas.
2. Photometry of a batch does not depend on what else is in it.
3. Crop boxes lie in the image and follow RandomResizedCrop's rule for area and ratio.
4. Views are functions of the generator alone; the batch is crop-major.
5. The chances of the operations are the paper's.
6. Masks never hide more than asked, and hardly less; half of the crops get one; shapes are fixed;
   they are functions of seed, step and rank.
"""

import numpy as np
import pytest
import torch
from PIL import ImageFilter
from torchvision.transforms.v2 import functional as TF

from augment import (MASK_SHAPES, ORDERS, PHOTOMETRY, RGB, SOLARIZE_THRESHOLD, Masking,
                     MultiCrop, blur, center_crop, channel_stats_of, collate, crop_box,
                     draw_photometry, normalise, photometry)
from bench.plain import colour_one_by_one


def draw(view, n, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw_photometry("dino", view, rng) for _ in range(n)]))


@pytest.mark.parametrize("view", [0, 1, 2])
def test_photometry_equals_torchvision(view):
    crops = torch.randint(0, 256, (48, 3, 24, 20), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(view))
    params = draw(view, 48)
    params[:24, 0] = torch.arange(24)  # every order of the four jitters
    batched, looped = photometry(crops, params), colour_one_by_one(crops, params)
    # A pixel within rounding of the threshold may be solarized by one and not by the other.
    apart = ((batched - looped).abs() > 1e-4).sum().item()  # in units of the normalised image
    assert apart <= (0.0005 * batched.numel() if view == 1 else 0)


@pytest.mark.parametrize("sigma, ours, pil", [(1.0, 1.0, 1.0), (1.5, 1.48, 1.5),
                                              (2.0, 1.85, 2.0)])
def test_blur_beside_pils(sigma, ours, pil):
    """What a blur makes of one bright line: its spread in pixels. DINO's code blurs with PIL."""
    line = torch.zeros(1, 3, 41, 41, dtype=torch.uint8)
    line[:, :, :, 20] = 255
    params = torch.zeros(1, 8)
    params[:, 6] = sigma
    image = TF.to_pil_image(line[0]).filter(ImageFilter.GaussianBlur(sigma))
    blurred = [(ours, blur(line / 255, params)[0]), (pil, TF.pil_to_tensor(image) / 255)]
    distance = torch.arange(41.0) - 20
    for expected, picture in blurred:
        row = picture[0, 20] / picture[0, 20].sum()
        spread = (row * distance**2).sum().sqrt().item()
        assert abs(spread - expected) < 0.01  # PIL rounds to 255 levels


def test_one_channel_has_no_colours():
    """Brightness, contrast, blur and solarize are torchvision's; the rest is left out."""
    crops, params, channel_stats = torch.rand(24, 1, 24, 20), draw(1, 24), channel_stats_of(1)
    params[:, 0] = torch.arange(24)
    for i, (order, brightness, contrast, _, _, _, sigma,
            solarize) in enumerate(params.tolist()):
        x = crops[i]
        for op in ORDERS[int(order)]:
            x = {
                0: lambda y: TF.adjust_brightness(y, brightness),
                1: lambda y: TF.adjust_contrast(y, contrast)}.get(op, lambda y: y)(x)
        if sigma:
            x = TF.gaussian_blur(x, [9, 9], [sigma, sigma])
        if solarize:
            x = TF.solarize(x, SOLARIZE_THRESHOLD)
        expected = TF.normalize(x, *channel_stats)
        torch.testing.assert_close(
            photometry(crops[i:i + 1], params[i:i + 1], channel_stats)[0], expected, rtol=0,
            atol=1e-4)
    five = photometry(torch.rand(24, 5, 24, 20), params,
                      channel_stats_of(5, (0.5,) * 5, (1.0,) * 5))
    assert five.shape == (24, 5, 24, 20) and five.abs().max() <= 0.5


def test_a_pixel_does_not_depend_on_the_batch():
    crops = torch.randint(0, 256, (40, 3, 96, 96), dtype=torch.uint8)
    params = draw(1, 40)
    together = photometry(crops, params)
    alone = torch.cat([photometry(crops[i:i + 1], params[i:i + 1]) for i in range(40)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_normalise():
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    expected = TF.normalize(TF.to_dtype(image, torch.float32, scale=True), *RGB)
    torch.testing.assert_close(normalise(image), expected)


def test_crop_boxes():
    rng, areas = np.random.default_rng(0), []
    for _ in range(2000):
        top, left, h, w = crop_box(60, 80, (0.2, 0.5), rng.random((10, 4)))
        assert 0 <= top <= 60 - h and 0 <= left <= 80 - w
        assert 0.7 < w / h < 1.4
        areas.append(h * w / 4800)
    assert 0.18 < min(areas) and max(areas) < 0.52
    assert abs(np.mean(areas) - 0.35) < 0.01  # uniform in area
    top, left, h, w = crop_box(10, 400, (0.9, 1.0), rng.random(
        (10, 4)))  # nothing fits: centred
    assert (h, w) == (10, 13) and left == (400 - 13) // 2


def test_views_follow_from_the_generator():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    crops = MultiCrop(32, 16, 2, 3)
    one, same, other = (crops(image, np.random.default_rng([0, 0, s])) for s in (1, 1, 2))
    assert one["global_crops"].shape == (2, 3, 32, 32) and one["local_crops"].shape == (3, 3,
                                                                                        16, 16)
    assert one["photometry"].shape == (5, 8)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["global_crops"], other["global_crops"])
    batch = collate([dict(one, index=4), dict(other, index=7)])
    assert torch.equal(batch["global_crops"][:, 1],
                       other["global_crops"])  # (G, B, ...): crop-major
    assert batch["index"].tolist() == [4, 7]
    assert MultiCrop(32, 16, 2, 0)(image, np.random.default_rng(0))["local_crops"].shape[0] == 0


@pytest.mark.parametrize("view", [0, 1, 2])
def test_chances(view):
    params = draw(view, 4000)
    chance = {k: v[view] for k, v in PHOTOMETRY["dino"].items() if k != "strength"}
    happened = dict(jitter=params[:, 0] >= 0, gray=params[:, 5] > 0, blur=params[:, 6] > 0,
                    solarize=params[:, 7] > 0)
    for name, p in chance.items():
        assert abs(happened[name].float().mean().item() - p) < 0.03, name
    assert params[:, 1].min() >= 0.6 and params[:, 1].max() <= 1.4
    assert params[:, 4].abs().max() <= 0.1


def test_center_crop_keeps_the_middle():
    assert center_crop(torch.zeros(3, 300, 500, dtype=torch.uint8), 224).shape == (3, 224, 224)
    assert center_crop(torch.zeros(3, 30, 20, dtype=torch.uint8), 48).shape == (3, 48, 48)


@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masks_hide_what_was_asked(shape):
    """10,000 draws on 14 x 14, over all targets that DINOv2's ratios give."""
    rng = np.random.default_rng(0)
    targets = rng.integers(19, 99, size=10_000)
    counts = np.array([MASK_SHAPES[shape]((14, 14), int(t), 4, rng).sum() for t in targets])
    assert (counts <= targets).all() and (counts / targets).mean() >= 0.998
    assert (counts == targets).mean() > 0.9
    assert not MASK_SHAPES[shape]((14, 14), 0, 4, rng).any()


def test_block_masks_are_blocks():
    """Hidden patches lie together: most have a hidden neighbour, unlike random ones."""

    def together(shape):
        rng, share = np.random.default_rng(0), []
        for _ in range(50):
            mask = MASK_SHAPES[shape]((14, 14), 40, 4, rng)
            pairs = (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()
            share.append(pairs / mask.sum())
        return np.mean(share)

    assert together("block") > 1.3 > 0.7 > together("random")


def test_masking_of_a_batch():
    masking = Masking((14, 14), probability=0.5, seed=3)
    assert len(masking(128, 0)["mask_indices"]) == 3771  # as in DINOv2's code
    shapes, per_crop = set(), np.zeros(24)
    for step in range(200):
        out = masking(24, step)
        masks, indices, weights = out["masks"], out["mask_indices"], out["mask_weights"]
        shapes.add((tuple(masks.shape), len(indices), len(weights)))
        hidden = masks.any(1)
        assert hidden.sum() == 12
        per_crop += hidden.numpy()
        real = weights > 0
        assert torch.equal(indices[real], masks.flatten().nonzero()[:, 0])
        each = torch.zeros(24).index_add_(0, indices[real] // 196, weights[real])
        torch.testing.assert_close(each, hidden.float())  # every masked crop weighs one
        shares = np.sort(masks[hidden].float().mean(1).numpy())
        slices = np.linspace(0.1, 0.5, 13)  # stratified: small and large masks in every batch
        assert (shares <= slices[1:]).all() and (shares >= 0.9 * slices[:-1] - 1 / 196).all()
    assert len(shapes) == 1
    assert per_crop.min() > 60 and per_crop.max() < 140  # 100 expected, 7 the deviation
    again, other = Masking((14, 14), seed=3)(24, 7), Masking((14, 14), seed=3, rank=1)(24, 7)
    assert torch.equal(again["masks"], masking(24, 7)["masks"])
    assert not torch.equal(again["masks"], other["masks"])
