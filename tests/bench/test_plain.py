"""Claims
1. With any idea taken out, or all of them, a step gives the same loss, gradients, centres and
   teacher: in float32, for each of the methods, with stochastic depth and without.
2. While an idea is taken out its plain code really runs; afterwards everything is as before.
3. The crops of the papers' worker are ours, where nothing is left to chance.
"""

import copy
from unittest.mock import patch

import numpy as np
import pytest
import torch
from bench_helpers import CPU, config_of, networks_of
from conftest import EVERYTHING, TINY
from torchvision.transforms.functional import to_pil_image

import train
from augment import RGB, MultiCrop, draw_photometry, photometry
from bench import plain
from bench.step import Step, made_up_batch

# -- 1


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("flags", [[], EVERYTHING], ids=["dino", "dinov2"])
@pytest.mark.parametrize("idea", [*plain.IDEAS, "all"])
def test_a_step_without_an_idea_is_the_same_step(idea, flags, drop):
    config = config_of([*TINY, *flags, "--drop_path_rate", drop, "--clip_grad", 0.02])
    networks = networks_of(config)
    batch = made_up_batch(config, CPU)
    taken_out = tuple(plain.IDEAS) if idea == "all" else (idea,)
    results = []
    for ideas in ((), taken_out):
        copies = copy.deepcopy(networks)
        version = Step(copies, batch, config, CPU, ideas)
        with version.taken_out():
            figures = version.run()
        results.append((figures, *copies))
    figures, student, teacher, centerings = results[0]
    plain_figures, plain_student, plain_teacher, plain_centerings = results[1]

    # Both are in float32 but add up in another order, and Sinkhorn has exponents of some tens.
    for name in ("loss", "grad_norm", *config.objectives):
        torch.testing.assert_close(figures[name], plain_figures[name], rtol=1e-4, atol=1e-5,
                                   msg=name)
    compared = 0
    for (name, p), q in zip(student.named_parameters(), plain_student.parameters()):
        if p.requires_grad:
            scale = p.grad.abs().max()
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=2e-4 * scale, msg=name)
            compared += 1
    assert compared > 30
    for a, b in zip(centerings.buffers(), plain_centerings.buffers()):
        torch.testing.assert_close(a, b)

    # Where a gradient is nothing but rounding, a step of Adam follows the sign of the rounding. So
    # single weights may be apart by a whole step, but only very few of them.
    for network, plain_network in ((student, plain_student), (teacher, plain_teacher)):
        differences = torch.cat([
            (p - q).abs().flatten()
            for p, q in zip(network.parameters(), plain_network.parameters())])
        assert differences.mean() < 1e-6
        assert (differences > 1e-4).float().mean() < 1e-3


# -- 2


def test_each_idea_is_really_taken_out():
    config = config_of([*TINY, *EVERYTHING])
    replaced = {name for table in plain.IDEAS.values() for name in table}
    called = set()

    def spy(name, function):

        def spied(*args, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        return spied

    spies = {
        idea: {name: spy(name, function)
               for name, function in table.items()}
        for idea, table in plain.IDEAS.items()}
    before = train.view_pair_loss, torch.nn.functional.scaled_dot_product_attention
    batch = made_up_batch(config, CPU)
    version = Step(networks_of(config), batch, config, CPU, tuple(plain.IDEAS))
    with patch.dict(plain.IDEAS, spies), version.taken_out():
        version.run()
    assert called == replaced
    assert before == (train.view_pair_loss, torch.nn.functional.scaled_dot_product_attention)


# -- 3


def test_plain_crops_are_ours_without_colours():
    """The whole image, maybe flipped, resized and normalised: nothing else is left to do."""
    image = torch.randint(0, 256, (3, 50, 70), generator=torch.Generator().manual_seed(0),
                          dtype=torch.uint8)
    ours = MultiCrop(global_crops_size=24, local_crops_size=16, local_crops_number=1,
                     global_crops_scale=(1, 1), local_crops_scale=(1, 1), photometry="none")
    torch.manual_seed(0)
    plain_crops = plain.crop_by_crop(ours.views, "none", RGB)(to_pil_image(image))
    sample = ours(image, np.random.default_rng(0))
    crops = [*sample["global_crops"], *sample["local_crops"]]
    colours = torch.from_numpy(draw_photometry("none", 0, np.random.default_rng(0)))[None]
    assert [x.shape for x in plain_crops] == [x.shape for x in crops]
    for crop, plain_crop in zip(crops, plain_crops):
        crop = photometry(crop[None], colours, RGB)[0]
        as_it_is = (crop - plain_crop).abs().max()
        flipped = (crop.flip(-1) - plain_crop).abs().max()
        # PIL rounds to whole numbers between its two passes where torch does not.
        assert min(as_it_is, flipped) < 2 / 255 / min(RGB.std)
