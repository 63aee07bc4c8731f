"""Claims
1. The boxes drawn are those that the crops are cut from, mirrored where it is said.
2. Crops, colours and masks are those of a run's first image in its first step.
3. A page is drawn for any preset and any shape of a photo.
"""

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from augment import MultiCrop, collate, photometry
from figures.views import Config, boxes_of, draw, draw_views, views_of, words_of
from images.data import Images
from images.data import Views as TrainingViews
from machinery.flags import UsageError, parse
from machinery.page import pyplot
from training.config import Config as TrainingConfig
from training.recipes import PRESETS

PHOTO = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(0))


def cut(box, side):
    crop = TF.crop(PHOTO, *box[:4])
    crop = TF.resize(crop, [side, side], TF.InterpolationMode.BICUBIC, antialias=True)
    return crop.flip(-1) if box.mirrored else crop


@pytest.mark.parametrize("seed", range(3))
def test_crops_are_cut_from_the_boxes(seed):
    multi_crop = MultiCrop(32, 16, 2, 6)
    boxes = boxes_of(multi_crop, PHOTO, np.random.default_rng(seed))
    sample = multi_crop(PHOTO, np.random.default_rng(seed))
    crops = [*sample["global_crops"], *sample["local_crops"]]
    assert len(boxes) == len(crops) == 8
    for box, crop in zip(boxes, crops):
        assert torch.equal(cut(box, crop.shape[-1]), crop)
    assert {box.mirrored for box in boxes} == {True, False}


def test_views_are_those_of_a_run():
    settings = TrainingConfig(**PRESETS["dinov2_vitl14"] | {"seed": 3})
    views = views_of(PHOTO, settings)
    multi_crop = MultiCrop(settings.global_crops_size, settings.local_crops_size, 2, 8,
                           settings.global_crops_scale, settings.local_crops_scale,
                           settings.photometry)
    dataset = TrainingViews(Images("one", lambda i: PHOTO, ["0"]), multi_crop, seed=3)
    batch = collate([dataset[0, 0, 0]], settings.masking())
    whole = photometry(batch["global_crops"][:, 0], batch["photometry"][:2, 0])
    for crop, expected in zip(views.crops, whole):
        mean, std = (torch.tensor(x) for x in settings.channel_stats)
        shown = expected.permute(1, 2, 0) * std + mean
        torch.testing.assert_close(crop, shown.clamp(0, 1), atol=1e-5, rtol=0)
    masks = batch["masks"].view(2, 16, 16)
    assert torch.equal(views.masks[:, ::14, ::14], masks)
    assert masks.any()


def test_the_page_has_the_boxes():
    settings = TrainingConfig(**PRESETS["dino_vits16"])
    views = views_of(PHOTO, settings)
    fig = draw_views(PHOTO, views, 2)
    drawn = [p for p in fig.axes[0].patches if isinstance(p, Rectangle)]
    corners = {(p.get_y() + 0.5, p.get_x() + 0.5, p.get_height(), p.get_width()) for p in drawn}
    assert corners == {tuple(map(float, box[:4])) for box in views.boxes}
    # The photo, two global crops of the teacher, and all crops of the student.
    assert len(fig.axes) == 1 + 2 + len(views.crops)
    pyplot().close(fig)


def test_words():
    row = torch.tensor([-1, 1, 1, 1, 0, 1, 1.25, 0])
    assert words_of(row) == "grey, blur 1.2 px"
    assert words_of(torch.tensor([-1, 1, 1, 1, 0, 0, 0.0, 0])) == "colours as they are"


@pytest.mark.parametrize("preset, size", [("shapes_dinov2", (300, 40)),
                                          ("dino_vits16", (5, 9))])
def test_any_photo(preset, size, tmp_path):
    Image.new("RGB", size).save(tmp_path / "p.png")
    flags = ["--preset", preset, "--output", str(tmp_path / "v.png")]
    assert draw([str(tmp_path / "p.png")], parse(Config, flags)).stat().st_size > 5000


def test_misuse(tmp_path):
    with pytest.raises(UsageError, match="not a readable image"):
        draw([str(tmp_path / "none.jpg")], Config())
    with pytest.raises(UsageError, match="one photo, not 2"):
        draw(["a", "b"], Config())
