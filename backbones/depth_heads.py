"""Depth heads: how far away every pixel is, read off the patch tokens of a frozen backbone.

    tokens of 1 or 4 blocks --> linear layer --> how likely is each of 256 depths --> their mean
    tokens of 4 blocks --> four maps, fine to coarse --> fused, coarse to fine --> depth (DPT)

Idea     The linear head asks what one patch and the class token know together. DPT adds
         convolutions, in which neighbouring patches agree on edges and surfaces: the difference
         between the two is what the head has found, and not the backbone.
Paper    DINOv2 sec. 7.4 ("lin. 1", "lin. 4", "DPT"); Ranftl 2021 (DPT); Bhat 2021 (bins)
Try      python -m backbones.depth_heads     the shares of the bins of one pixel
         python evaluate.py depth --weights RUN --depth_head dpt
Change   another head is a class with the same `forward`, and one line in DEPTH_HEADS
Tests    pytest tests/backbones/test_dense_heads.py

Letters  B images, D width, h w the grid of patches, n blocks, H W pixels, K = 256 bins.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.dense_heads import at_pixels, patch_maps
from backbones.weights import RELEASED

BINS = 256  # depths that the linear head chooses from


def blocks_of(depth: int, n: int) -> list[int]:
    """The blocks (0-based) that a head on n of them reads: the last, or four spread evenly.

    Example: of 12 blocks 2, 5, 8 and 11. DINOv2's heads for 24 blocks read 4, 11, 17 and 23,
    which are not quite evenly spread; the released weights want these.
    """
    if n == 1:
        return [depth - 1]
    if depth == 24:
        return [4, 11, 17, 23]

    # The ends of four equal parts. A network of fewer than four blocks has some of them twice.
    return [max(0, depth * part // 4 - 1) for part in (1, 2, 3, 4)]


def shares_of(scores: Tensor) -> Tensor:
    """Scores (B, K, h, w) of K depths -> their shares, which are positive and sum to 1.

    Example with three depths: the scores (-1, .3, .9) become (.1, .4, 1.0) / 1.5.
    """
    # The .1 keeps every depth possible: where all scores are negative, as they may be at first,
    # the shares are equal and not 0 / 0.
    shares = scores.relu() + 0.1
    return shares / shares.sum(1, keepdim=True)


class LinearDepth(nn.Module):
    """Patch and class token of n blocks -> depth in metres (B, 1, 4*h, 4*w).

    A linear layer answers with one number for each of 256 depths from `nearest` to `farthest`;
    what they say together is the mean of these depths, weighted by the numbers. So it can say
    "2 or 4 metres, not 3", which a single output could not. Its tensors are called conv_depth,
    as in the released heads.
    """

    def __init__(self, width: int, n: int, nearest: float = 0.001, farthest: float = 10.0):
        super().__init__()
        self.conv_depth = nn.Conv2d(2 * n * width, BINS, 1)
        self.nearest = nearest
        self.farthest = farthest

    def forward(self, maps: list[tuple[Tensor, Tensor]]) -> Tensor:
        # The class token says what kind of place it is: it is joined to every patch.
        parts = []
        for patches, cls in maps:
            parts += [patches, cls[:, :, None, None].expand_as(patches)]

        # Under autocast the layer answers in bfloat16, whose eight bits tell depths of 32 to 64
        # metres apart in steps of 25 cm only. So from here on all is in the type of the weights.
        weight = self.conv_depth.weight
        scores = self.conv_depth(torch.cat(parts, 1)).to(weight.dtype)  # (B, K, h, w)

        # DINOv2's code enlarges the tokens fourfold before its linear layer. Enlarging takes a mean
        # of neighbours, whose weights sum to 1, so the linear layer may come first: also its bias
        # stays what it is. Then 256 scores are enlarged, fewer numbers than the tokens of four
        # blocks. The shares below are not linear, so they have to come after it.
        scores = F.interpolate(scores, scale_factor=4, mode="bilinear", align_corners=False)

        shares = shares_of(scores)
        depths = torch.linspace(self.nearest, self.farthest, BINS, device=weight.device,
                                dtype=weight.dtype)

        # The sum is a matrix product, which autocast would make in bfloat16 again.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.einsum("bkhw,k->bhw", shares, depths)[:, None]


# ----------------------------------------------------------------------------------------------
# DPT. All names of modules are those of the released heads


def conv(inputs: int, outputs: int, side: int, bias: bool = True) -> nn.Module:
    """A convolution that keeps height and width; its tensors are called conv.weight, ..."""
    layer = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if bias:
        nn.init.zeros_(layer.bias)
    return nn.Sequential(OrderedDict(conv=layer))


class Reassemble(nn.Module):
    """Tokens of four blocks -> four maps, of 4, 2, 1 and 1/2 times the grid of patches.

    Early blocks become fine maps with few channels, late ones coarse maps with many, as the
    stages of a convnet: D/8, D/4, D/2 and D channels.
    """

    def __init__(self, width: int, channels: list[int]):
        super().__init__()

        # The class token is not lost: a layer mixes it into each patch.
        self.readout_projects = nn.ModuleList([
            nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in channels])

        # The patches are a grid of 1/14 or 1/16 of the image, in every block. A transposed
        # convolution of 4 x 4 with stride 4 makes 16 places of each of them; the last map gets
        # half the height and width.
        self.projects = nn.ModuleList([conv(width, c, 1) for c in channels])
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
            nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
            nn.Identity(),
            nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1)])

    def forward(self, maps: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        outputs = []
        for i, (patches, cls) in enumerate(maps):
            # Each patch with the class token beside it, mixed by a linear layer and put back
            # into the grid. Example of ViT-S: 384 + 384 numbers for each patch become 384.
            rows = patches.flatten(2).transpose(1, 2)  # (B, h*w, D)
            joined = torch.cat([rows, cls[:, None].expand_as(rows)], 2)  # (B, h*w, 2*D)
            mixed = self.readout_projects[i](joined)  # (B, h*w, D)
            grid = mixed.transpose(1, 2).reshape(patches.shape)  # (B, D, h, w)
            outputs.append(self.resize_layers[i](self.projects[i](grid)))
        return outputs


class ResidualConv(nn.Module):
    """x + two convolutions of x, each after a ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = conv(channels, channels, 3, bias=False)
        self.conv2 = conv(channels, channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Each ReLU stands before its convolution and not behind it, so that what is added to x
        # may be negative.
        return x + self.conv2(self.conv1(x.relu()).relu())


class Fusion(nn.Module):
    """A coarse map, and the next finer one -> both together, twice as large."""

    def __init__(self, channels: int, first: bool = False):
        super().__init__()
        self.project = conv(channels, channels, 1)

        # The coarsest map has nothing to be joined with.
        self.res_conv_unit1 = None if first else ResidualConv(channels)
        self.res_conv_unit2 = ResidualConv(channels)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:
            # With an odd grid the sizes differ by one: 5 patches halve to 3 and double to 6.
            finer = F.interpolate(finer, x.shape[-2:], mode="bilinear", align_corners=False)
            x = x + self.res_conv_unit1(finer)

        x = self.res_conv_unit2(x)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.project(x)


class Enlarge(nn.Module):
    """Twice the height and width, bilinearly."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class DepthOutput(nn.Module):
    """The fused map -> one number for each place, at twice the size."""

    def __init__(self, channels: int):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1), Enlarge(),
                                  nn.Conv2d(channels // 2, 32, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(32, 1, 1))

        # DPT ends in a ReLU, whose gradient is 0 where its input is negative. A head whose
        # first answers are all negative would never learn, so it begins with 1 metre
        # everywhere.
        nn.init.zeros_(self.head[4].weight)
        nn.init.ones_(self.head[4].bias)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast, too, the metres themselves are not in bfloat16 (see LinearDepth).
        x = self.head[:4](x)
        with torch.autocast(x.device.type, enabled=False):
            return self.head[4](x.to(self.head[4].weight.dtype))


class DPT(nn.Module):
    """Patch and class token of four blocks -> depth in metres (B, 1, 16*h, 16*w). Ranftl 2021.

    Of an odd h it is 16*(h + 1), as the coarsest map has half a row more; so for w.

    channels: of the maps that are fused; the released heads have 256.
    """

    def __init__(self, width: int, channels: int = 256, nearest: float = 0.001,
                 farthest: float = 10.0):
        super().__init__()
        widths = [width // 8, width // 4, width // 2, width]
        self.reassemble_blocks = Reassemble(width, widths)
        self.convs = nn.ModuleList([conv(w, channels, 3, bias=False) for w in widths])
        self.fusion_blocks = nn.ModuleList([
            Fusion(channels, first=i == 0) for i in range(len(widths))])
        self.project = conv(channels, channels, 3)
        self.conv_depth = DepthOutput(channels)
        self.nearest = nearest
        self.farthest = farthest

    def forward(self, maps: list[tuple[Tensor, Tensor]]) -> Tensor:
        maps = self.reassemble_blocks(maps)
        maps = [layer(x) for layer, x in zip(self.convs, maps)]

        # From coarse to fine: each fusion doubles the size and brings in the next finer map.
        # With a grid of 32 x 32 patches the maps have sides of 16, 32, 64 and 128, the fused
        # ones of 32, 64, 128 and 256, and the answer, doubled once more, of 512.
        fused = self.fusion_blocks[0](maps[3])
        for fusion, finer in zip(self.fusion_blocks[1:], maps[2::-1]):
            fused = fusion(fused, finer)
        return self.conv_depth(self.project(fused).relu()).relu() + self.nearest


# Name -> (blocks that it reads, (width, nearest, farthest) -> the head).
DEPTH_HEADS = {
    "linear": (1, lambda width, *ends: LinearDepth(width, 1, *ends)),
    "linear4": (4, lambda width, *ends: LinearDepth(width, 4, *ends)),
    "dpt": (4, lambda width, nearest, farthest: DPT(width, nearest=nearest, farthest=farthest))}

# The depths in metres, from and to, that the released heads of each data set were trained for.
# They leave no trace in the tensors, and with other ends a linear head answers wrongly: with 80
# in place of 10 metres everything is eight times as far away.
RANGES = {"nyu": (0.001, 10.0), "kitti": (0.001, 80.0)}


def settings_of_released(what: str) -> dict:
    """What the name of a released depth head says: depth_head, nearest, farthest.

    Example: dinov2_vits14_kitti_dpt is "dpt", from .001 to 80 metres. {} for any other name.
    """
    # The name of a backbone has underscores of its own, so the two last words are split off.
    backbone, data, head = ["", "", *what.rsplit("_", 2)][-3:]
    if backbone not in RELEASED or data not in RANGES or head not in DEPTH_HEADS:
        return {}
    nearest, farthest = RANGES[data]
    return {"depth_head": head, "nearest": nearest, "farthest": farthest}


class Depther(nn.Module):
    """A frozen backbone and a depth head: images (B, C, H, W) -> metres (B, 1, H, W).

    head: a name of DEPTH_HEADS; nearest and farthest: the range of depths in metres.
    """

    def __init__(self, backbone: nn.Module, head: str, nearest: float = 0.001,
                 farthest: float = 10.0):
        super().__init__()
        n, build = DEPTH_HEADS[head]
        self.backbone = backbone
        self.decode_head = build(backbone.embed_dim, nearest, farthest)
        self.blocks = blocks_of(backbone.depth, n)

    def features(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the head reads: (patch tokens (B, D, h, w), class token (B, D)) of its blocks.

        Without the final norm, with which the released heads were not trained.
        """
        # A network of fewer than four blocks has some of the four twice, but gives each once.
        distinct = sorted(set(self.blocks))
        maps = dict(zip(distinct, patch_maps(self.backbone, images, distinct, norm=False)))
        return [maps[block] for block in self.blocks]

    def forward(self, images: Tensor) -> Tensor:
        # DPT's answer has no upper end, and both are kept within the range that they are judged
        # in.
        head = self.decode_head
        metres = head(self.features(images)).clamp(head.nearest, head.farthest)
        return at_pixels(metres, images.shape[-2:], self.backbone.patch_size)


if __name__ == "__main__":
    # What one pixel answers when it chooses from eight depths of 1 to 8 metres: the shares, and
    # the mean depth. The less sure it is, the nearer the answer comes to the middle, 4.5
    # metres.
    depths = torch.linspace(1, 8, 8)
    for name, scores in (("sure of 2 metres", (0, 9, 0, 0, 0, 0, 0,
                                               0)), ("2 or 4 metres", (0, 9, 0, 9, 0, 0, 0, 0)),
                         ("hardly sure of 2", (0, 0.2, 0, 0, 0, 0, 0, 0)),
                         ("knows nothing", (0, 0, 0, 0, 0, 0, 0, 0))):
        shares = shares_of(torch.tensor(scores).view(1, 8, 1, 1)).flatten()
        listed = " ".join(f"{share:.2f}" for share in shares.tolist())
        print(f"{name:17s} shares {listed}, {(shares * depths).sum():.2f} metres")
