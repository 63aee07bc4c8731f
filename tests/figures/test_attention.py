"""Claims
1. Registers and the class token are left out of a map.
2. A figure is drawn for any photo, whole patches of it.
3. The spread of a map is its entropy: the sharpest head has the least.
4. The maps that are drawn are softmax(q k' / sqrt(hd)), of the class token or of the patch that
   was asked for; what is bright in a mask holds the share that its title names.
5. Several photographs, networks and patches share a sheet; --separate writes DINO's file names.
"""

import math

import pytest
import torch

import visualize
from augment import RGB, normalise
from backbones.weights import load_backbone
from figures.attention import attention_maps, outlined, spread_of
from figures.inputs import fit
from images.files import read_file
from machinery.page import pyplot
from vit import VisionTransformer


@pytest.fixture
def panels(monkeypatch):
    """Draws the figure of a command line -> its axes, before matplotlib forgets them."""
    plt = pyplot()

    def draw(line):
        with monkeypatch.context() as patched:
            patched.setattr(plt, "close", lambda figure: None)
            visualize.main(line)
        axes = plt.gcf().axes
        plt.close("all")
        return axes

    return draw


def array_of(axis):
    return torch.from_numpy(axis.get_images()[0].get_array().data)


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


def test_the_sharpest_head_is_the_least_spread_one():
    attention = torch.full((3, 4, 4), 1 / 16)
    attention[1] = 0.0
    attention[1, 2, 3] = 1.0  # all of it on one patch
    even = math.log(16)
    torch.testing.assert_close(spread_of(attention), torch.tensor([even, 0.0, even]))


def attention_by_hand(model, image, block):
    """softmax(q k' / sqrt(hd)) of one block, (nh, N, N), from the tokens that enter it."""
    entering = []
    handle = model.blocks[block].norm1.register_forward_hook(
        lambda _, inputs, output: entering.append(output))
    model(normalise(image[None], model.channel_stats))
    handle.remove()
    q, k, _ = model.blocks[block].attn.qkv(entering[0]).chunk(3, -1)  # (N, D) each
    maps = []
    for q_head, k_head in zip(q.split(64, -1), k.split(64, -1)):
        maps.append((q_head @ k_head.T / math.sqrt(64)).softmax(-1))
    return torch.stack(maps)


@torch.no_grad()
@pytest.mark.parametrize("query", ["", "0.7,0.2"])
@pytest.mark.parametrize("block", [-1, 0])
def test_drawn_maps_are_the_attention(query, block, photos, tmp_path, panels):
    torch.manual_seed(1)
    model = VisionTransformer(32, 8, embed_dim=128, depth=2, num_heads=2, num_register_tokens=3)
    for weight in model.parameters():
        weight.mul_(3)  # so that attention is far from equal
    torch.save(model.state_dict(), tmp_path / "b.pth")
    model = load_backbone(tmp_path / "b.pth")
    photo = photos / "cats/01.png"
    line = f"attention {photo} --weights {tmp_path}/b.pth --image_size 40 --block {block} "
    line += f"--output {tmp_path}/a.png --share 0.7"
    axes = panels(line.split() + (["--query", query] if query else []))

    # The token that looks: the first one, or the patch at this place of the grid.
    image = fit(read_file(photo), 40, 8)
    h, w = model.grid(image)
    row = 4 + int(0.2 * h) * w + int(0.7 * w) if query else 0
    expected = attention_by_hand(model, image, block)[:, row, 4:].view(2, h, w)

    # Photograph, mean, overlay and mask; then map and mask of each of the two heads.
    maps = [axes[1], axes[4], axes[6]]
    for axis, grid in zip(maps, [expected.mean(0), *expected]):
        torch.testing.assert_close(array_of(axis)[::8, ::8], grid, rtol=0, atol=1e-5)
    assert bool(axes[0].get_lines()) == bool(query)

    # What keeps its brightness is the smallest set that holds the share. A patch's edge can
    # belong to the line, its middle never does.
    bright = image.permute(1, 2, 0)[4::8, 4::8] / 255
    for axis, grid in zip([axes[3], axes[5], axes[7]], [expected.mean(0), *expected]):
        kept = (array_of(axis)[4::8, 4::8] - bright).abs().amax(-1) < 1e-6
        share = grid[kept].sum() / grid.sum()
        assert 0.7 <= share and share - grid[kept].min() / grid.sum() < 0.7
        assert axis.get_title() == "top 70%"


def test_the_line_surrounds_what_is_mostly_in_the_mask():
    image = torch.full((3, 80, 80), 200, dtype=torch.uint8)
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[2:6, 3:8] = True
    mask[8, 1] = True  # a single patch gets no line
    shown = outlined(image, mask, 8)
    on_line = shown[..., 2] < 0.25  # yellow has the least blue
    rows, columns = on_line.nonzero().unbind(1)
    assert rows.min() == 16 and rows.max() == 47 and columns.min() == 24 and columns.max() == 63
    assert not on_line[64:72, 8:16].any() and shown[68, 12].allclose(torch.tensor(200 / 255))


def test_several_on_one_sheet(photos, tmp_path, panels):
    model = VisionTransformer(16, 8, embed_dim=128, depth=1, num_heads=2)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    line = f"attention {photos}/cats/01.png {photos}/dogs/00.jpg --weights {tmp_path}/b.pth "
    line += f"untrained --query 0.2,0.2 0.8,0.8 --image_size 32 --output {tmp_path}/a.png"
    axes = panels(line.split())
    assert len(axes) == 2 * 2 * 2 * 6  # a row has photograph, mean, overlay, mask and two heads
    names = [text.get_text() for axis in axes for text in axis.texts]
    assert names == 2 * ["b.pth", "b.pth", "untrained", "untrained"]


def test_separate_files(photos, tmp_path, capsys):
    model = VisionTransformer(16, 8, embed_dim=128, depth=1, num_heads=2)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    line = f"attention {photos}/cats/01.png --weights {tmp_path}/b.pth --separate "
    line += f"--image_size 32 --output {tmp_path}/out/page.png"
    visualize.main(line.split())
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {
        "page.png", "img.png", "attn-head0.png", "attn-head1.png", "mask_th0.6_head0.png",
        "mask_th0.6_head1.png"}
    image = fit(read_file(photos / "cats/01.png"), 32, 8)
    assert torch.equal(read_file(tmp_path / "out/img.png"), image)
    with pytest.raises(SystemExit):
        visualize.main([*line.split(), "--query", "0,0", "1,1"])
    assert "--separate: give one photograph" in capsys.readouterr().err


def test_rows_are_those_of_the_whole_matrix():
    model = VisionTransformer(16, 8, embed_dim=64, depth=2, num_heads=1).eval()
    images = torch.randn(2, 3, 24, 24)
    whole = model.get_attention(images)
    torch.testing.assert_close(model.get_attention(images, rows=[3, 0]), whole[:, :, [3, 0]])
    model.channel_stats = RGB
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    assert [grid.shape for grid in attention_maps(model, image, 0, ("0,0", "1,1"))] == 2 * [
        (1, 3, 3)]
