"""Claims
1. Registers and the class token are left out of a map.
2. A figure is drawn for any photo, whole patches of it.
3. A run ends with a page at several times its size, and leaves its network as it was.
"""

import torch

import visualize
from augment import normalise
from figures.attention import draw_attention_page, page_side, sharpest_head
from images.data import open_images, read_file
from vit import VisionTransformer


def test_maps_skip_registers():
    model = VisionTransformer(16, 8, embed_dim=128, depth=2, num_heads=2, num_register_tokens=3)
    images = torch.randint(0, 256, (2, 3, 24, 16), dtype=torch.uint8)
    maps = model.get_class_attention(normalise(images))
    assert maps.shape == (2, 2, 3, 2)
    full = model.get_attention(normalise(images))[:, :, 0]
    torch.testing.assert_close(maps.flatten(2), full[..., 4:])


def test_photo(tmp_path, photos):
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    out = tmp_path / "a.png"
    line = f"attention {photos}/cats/01.png --weights {tmp_path}/b.pth --image_size 37"
    visualize.main([*line.split(), "--output", str(out)])
    assert read_file(out).float().std() > 10  # not an empty page


def test_the_page_is_asked_at_several_times_the_training_size():
    assert page_side(40, 5) == 240 and page_side(96, 16) == 480
    assert page_side(128, 14) == 476  # whole patches
    assert page_side(518, 14) == 518  # never smaller than in training


def test_the_sharpest_head_is_the_least_spread_one():
    attention = torch.full((2, 3, 4, 4), 1 / 16)
    attention[:, 1] = 0.0
    attention[:, 1, 2, 3] = 1.0  # all of it on one patch
    assert sharpest_head(attention) == 1


def test_the_page_leaves_the_network_as_it_was(tmp_path):
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1).train()
    images = open_images("shapes:2")
    photos = [images.read_at(i, 110) for i in range(2)]
    draw_attention_page(model, photos, 96, tmp_path / "page.png")
    assert model.training and (tmp_path / "page.png").stat().st_size > 5_000
