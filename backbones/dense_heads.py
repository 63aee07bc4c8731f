"""Dense heads: from the patch tokens of a backbone to an answer for every pixel.

    images --> backbone --> patch tokens (B, D, h, w) of some blocks --> head --> (B, K, H, W)

Idea     The patch tokens of a good backbone say so much about their place that a linear layer
         on each of them tells what is there. The head is small on purpose: whatever it finds
         has to be in the features already.
Paper    DINOv2 sec. 7.4: "linear" and "+ms" for segmentation
Try      python evaluate.py segment --weights RUN
Change   another head is a class with the same `forward`
Tests    pytest tests/backbones/test_dense_heads.py

Letters  B images, D width, h w the grid of patches, H W pixels, n blocks, K classes.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layouts import read_tensors
from backbones.weights import BASE_URL, RELEASED, fetch

# ----------------------------------------------------------------------------------------------
# Images of any size, as whole patches


def frame(height: int, width: int, patch_size: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom): the pixels that are missing around an image to whole patches.

    Example: patches of 14 pixels and a width of 100. 100 = 7 * 14 + 2, so 12 columns are
    missing to 8 patches: 6 are added at either side. Of an odd number the larger half goes to
    the right and to the bottom.
    """
    across = -width % patch_size
    down = -height % patch_size
    return across // 2, across - across // 2, down // 2, down - down // 2


def patch_maps(model: nn.Module, images: Tensor, blocks: list[int], norm: bool = True) -> tuple:
    """(patch tokens (B, D, h, w), class token (B, D)) of each of these blocks (0-based).

    Images (B, C, H, W) of any size are padded to whole patches with zeros, which is the mean
    colour of normalised images. norm: the network's final norm is applied to the tokens.
    """
    padded = F.pad(images, frame(*images.shape[-2:], model.patch_size))
    return model.get_intermediate_layers(padded, blocks, reshape=True, return_class_token=True,
                                         norm=norm)


def at_pixels(values: Tensor, shape: tuple[int, int], patch_size: int) -> Tensor:
    """Values on the grid of patches, or a multiple of it, -> on the pixels (B, K, H, W).

    shape: (H, W) of the image. The values are enlarged to the padded image, bilinearly, and
    what belongs to its frame is cut off.
    """
    height, width = shape
    left, right, top, bottom = frame(height, width, patch_size)
    whole = (top + height + bottom, left + width + right)
    values = F.interpolate(values, whole, mode="bilinear", align_corners=False)
    return values[..., top:top + height, left:left + width]


# ----------------------------------------------------------------------------------------------
# Segmentation


class SegmentationHead(nn.Module):
    """BatchNorm and a linear layer on each patch: (B, n*D, h, w) -> logits (B, K, h, w).

    Its tensors have the names of the released heads: bn and conv_seg. DINOv2's "linear" reads
    the last block, its "+ms" the last four, one after the other: n*D channels.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        # BatchNorm brings all channels to the same spread, so that one learning rate suits all. Its
        # own scale and shift are learned, too, as in the released heads; the linear layer behind
        # it could do without them.
        self.bn = nn.BatchNorm2d(channels)
        # A convolution of 1 x 1 is the same linear layer at every place of the grid.
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv_seg(self.bn(features))


class Segmenter(nn.Module):
    """A frozen backbone and a head: images (B, C, H, W) -> logits (B, K, H, W).

    n: how many of the last blocks the head reads.
    """

    def __init__(self, backbone: nn.Module, head: SegmentationHead, n: int = 1):
        super().__init__()
        self.backbone = backbone
        self.decode_head = head
        self.blocks = list(range(backbone.depth - n, backbone.depth))

    def features(self, images: Tensor) -> Tensor:
        """What the head reads: (B, n*D, h, w)."""
        maps = patch_maps(self.backbone, images, self.blocks)
        return torch.cat([patches for patches, _ in maps], 1)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.decode_head(self.features(images))  # (B, K, h, w)
        return at_pixels(logits, images.shape[-2:], self.backbone.patch_size)


# ----------------------------------------------------------------------------------------------
# Heads in files


def read_dense_head(what: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(the tensors of a head under the names of the modules here, what else its file knows).

    what: a file, or BACKBONE_DATA_KIND of the released ones, as dinov2_vits14_ade20k_linear,
    dinov2_vits14_voc2012_ms, dinov2_vitb14_nyu_linear4, dinov2_vitl14_kitti_dpt.
    """
    # The file lies beside the backbone's. Example: dinov2_vits14_nyu_dpt is the file
    # dinov2_vits14/dinov2_vits14_nyu_dpt_head.pth. Whoever has downloaded it gives its path.
    backbone = re.sub(r"_(ade20k|voc2012|nyu|kitti)_(linear4?|ms|dpt)$", "", str(what))
    if backbone in RELEASED and str(what) != backbone:
        state = read_tensors(fetch(f"{BASE_URL}dinov2/{backbone}/{what}_head.pth"))
    else:
        state = read_tensors(Path(what).expanduser())

    if not isinstance(state, dict):
        raise ValueError(f"{what}: expected the tensors of a head, found a "
                         f"{type(state).__name__}")

    # The released files are those of mmsegmentation: all tensors under "state_dict", and each
    # name begins with the module that the head is there.
    # Ours are written in the same way, and those of a depth head know its range beside them.
    settings = state.get("settings", {}) if "state_dict" in state else {}
    state = state.get("state_dict", state)
    return {key.removeprefix("decode_head."): value for key, value in state.items()}, settings
