"""Claims
1. An image of any size is padded to whole patches around it, and an answer on the patches is
   taken back to exactly its pixels.
2. The segmentation head is BatchNorm and a linear layer on each patch, under the names of the
   released heads.
3. LinearDepth is the paper's: tokens enlarged fourfold, then 256 shares and the mean of their
   depths. DPT has the sizes and the number of parameters of the released head. Both tell
   centimetres under autocast.
4. A head's file loads strictly; another is refused with the difference.
"""

import pytest
import torch
import torch.nn.functional as F

from backbones.dense_heads import SegmentationHead, Segmenter, at_pixels, frame, read_dense_head
from backbones.depth_heads import DPT, Depther, LinearDepth, blocks_of
from backbones.weights import load_strictly
from vit import VisionTransformer


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(16, 8, embed_dim=64, depth=4, num_heads=1,
                             num_register_tokens=2).eval()


# -- 1


def test_whole_patches():
    assert frame(100, 28, 14) == (0, 0, 6, 6)
    assert frame(27, 13, 14) == (0, 1, 0, 1)
    # One answer for each patch, its own column number: at the middle of each patch it is back.
    columns = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 3, 4)
    pixels = at_pixels(columns, (20, 27), 8)  # 24 x 32 pixels after padding, 2 and 2 + 3 cut
    assert pixels.shape == (1, 1, 20, 27)
    whole = F.interpolate(columns, (24, 32), mode="bilinear", align_corners=False)
    assert torch.equal(pixels, whole[..., 2:22, 2:29])


# -- 2


def test_segmentation_head(backbone):
    torch.manual_seed(0)
    head = SegmentationHead(2 * 64, 5).eval()
    assert set(head.state_dict()) == {
        "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
        "conv_seg.weight", "conv_seg.bias"}
    head.bn.running_mean.normal_()
    head.bn.running_var.uniform_(0.5, 2)
    segmenter = Segmenter(backbone, head, 2)
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        logits = segmenter(images)
        tokens = backbone.get_intermediate_layers(images, 2)  # of two blocks: (2, 12, 64)
    assert logits.shape == (2, 5, 24, 32)

    # The same by the definition, for one patch of one image.
    x = torch.cat([t[1, 7] for t in tokens])  # the patch in row 1, column 3
    bn = head.bn
    x = (x - bn.running_mean) / (bn.running_var + bn.eps).sqrt()
    answer = head.conv_seg.weight[:, :, 0, 0] @ x + head.conv_seg.bias
    with torch.no_grad():
        grid = head(segmenter.features(images))  # (2, 5, 3, 4)
    torch.testing.assert_close(grid[1, :, 1, 3], answer, rtol=1e-5, atol=1e-6)


# -- 3


@pytest.mark.parametrize("n", [1, 4])
def test_linear_depth(n):
    torch.manual_seed(n)
    head = LinearDepth(6, n, 0.5, 8.0).double()
    maps = [(torch.randn(2, 6, 3, 5).double(), torch.randn(2, 6).double()) for _ in range(n)]

    # In the order of the paper: first enlarged, then the linear layer.
    joined = []
    for patches, cls in maps:
        joined.append(torch.cat([patches, cls[:, :, None, None].expand_as(patches)], 1))
    enlarged = F.interpolate(torch.cat(joined, 1), scale_factor=4, mode="bilinear")
    scores = F.conv2d(enlarged, head.conv_depth.weight, head.conv_depth.bias)
    shares = scores.clamp(min=0) + 0.1
    shares = shares / shares.sum(1, keepdim=True)
    bins = torch.linspace(0.5, 8.0, 256).double()
    expected = (shares * bins[:, None, None]).sum(1, keepdim=True)
    assert head(maps).shape == (2, 1, 12, 20)
    torch.testing.assert_close(head(maps), expected, rtol=1e-6, atol=1e-6)


def test_dpt():
    torch.manual_seed(0)
    head = DPT(64)
    maps = [(torch.randn(1, 64, 4, 6), torch.randn(1, 64)) for _ in range(4)]
    fine = head.reassemble_blocks(maps)
    assert [tuple(x.shape[1:]) for x in fine] == [(8, 16, 24), (16, 8, 12), (32, 4, 6),
                                                  (64, 2, 3)]
    metres = head(maps)
    assert metres.shape == (1, 1, 64, 96) and metres.min() >= head.nearest
    state = head.state_dict()
    shapes = {
        "reassemble_blocks.readout_projects.3.0.weight": (64, 128),
        "reassemble_blocks.projects.0.conv.weight": (8, 64, 1, 1),
        "reassemble_blocks.resize_layers.0.weight": (8, 8, 4, 4),
        "reassemble_blocks.resize_layers.3.bias": (64,), "convs.1.conv.weight": (256, 16, 3, 3),
        "fusion_blocks.0.res_conv_unit2.conv1.conv.weight": (256, 256, 3, 3),
        "fusion_blocks.3.project.conv.bias": (256,), "project.conv.weight": (256, 256, 3, 3),
        "conv_depth.head.4.weight": (1, 32, 1, 1)}
    assert shapes == {name: tuple(state[name].shape) for name in shapes}
    assert "fusion_blocks.0.res_conv_unit1.conv1.conv.weight" not in state
    assert len(state) == 8 + 8 + 6 + 4 + (8 + 14) + 2 + 6


def test_dpt_starts_at_one_metre():
    torch.manual_seed(0)
    head = DPT(32, channels=16)
    metres = head([(torch.randn(2, 32, 2, 3), torch.randn(2, 32)) for _ in range(4)])
    torch.testing.assert_close(metres, torch.full_like(metres, 1 + head.nearest))
    metres.sum().backward()
    assert head.conv_depth.head[4].weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", [LinearDepth, DPT])
def test_centimetres_under_autocast(kind):
    """bfloat16 itself knows 0.25 metres at 40: its 33 numbers from 36 to 44 would be all."""
    torch.manual_seed(0)
    head = LinearDepth(32, 4, 35.0, 45.0) if kind is LinearDepth else DPT(32, channels=16)
    if kind is DPT:
        torch.nn.init.normal_(head.conv_depth.head[4].weight)
        torch.nn.init.constant_(head.conv_depth.head[4].bias, 40.0)
    maps = [(torch.randn(1, 32, 8, 8), torch.randn(1, 32)) for _ in range(4)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        metres = head(maps)
    assert metres.dtype == torch.float32 and len(metres.unique()) > 200


def test_the_blocks_that_are_read(backbone):
    assert blocks_of(12, 1) == [11] and blocks_of(12, 4) == [2, 5, 8, 11]
    assert blocks_of(24, 4) == [4, 11, 17, 23] and blocks_of(40, 4) == [9, 19, 29, 39]
    assert blocks_of(2, 4) == [0, 0, 0, 1]
    for name, count in (("linear", 1), ("linear4", 4), ("dpt", 4)):
        depther = Depther(backbone, name, 0.5, 8.0).eval()
        images = torch.randn(1, 3, 30, 21)  # no multiple of the patch
        with torch.no_grad():
            assert len(depther.features(images)) == count
            metres = depther(images)
        assert metres.shape == (1, 1, 30, 21) and metres.min() >= 0.5 and metres.max() <= 8


# -- 4


def test_heads_in_files(tmp_path):
    head = SegmentationHead(64, 5)
    # As mmsegmentation writes them.
    state = {f"decode_head.{key}": value for key, value in head.state_dict().items()}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "head.pth")
    load_strictly(SegmentationHead(64, 5),
                  read_dense_head(tmp_path / "head.pth")[0], "head.pth")
    with pytest.raises(ValueError, match="conv_seg.weight"):
        load_strictly(SegmentationHead(64, 6), read_dense_head(tmp_path / "head.pth")[0], "it")
