"""Hub: networks with the methods of Meta's own, for programs that were written for those.

    VisionTransformer --> DINO      get_last_selfattention; all tokens of a block in one tensor
                      --> DINOv2    model(images, is_training=True)
                          + head    DINOv2Depther: metres, or Segmenter: classes of all pixels
    ConvNet           --> torchvision's ResNet-50, with nn.Identity in the place of fc

Idea     A program that calls torch.hub.load expects the methods that Meta's networks have. They
         differ between DINO and DINOv2, and ours have one set of methods for both. So only what
         torch.hub gives out has theirs; they are made of ours here, a few lines for each.
Paper    none; the methods are those of Meta's repositories dino and dinov2
Try      python hubconf.py      the names
Change   another method of theirs is one method of DINO or DINOv2 below
Tests    pytest tests/test_hubconf.py

Letters  B images, P patches, D width, nh heads.
"""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from backbones.convnet import ConvNet
from backbones.dense_heads import SegmentationHead, Segmenter, read_dense_head
from backbones.depth_heads import RANGES, Depther
from backbones.weights import architecture, load_backbone, load_strictly, untrained
from vit import Block, Groups, VisionTransformer, resize_pos_embed

# What Meta calls the weights that it released: LVD142M are those of DINOv2's backbones. Here
# they are what a name stands for, with or without that word.
RELEASED_WEIGHTS = ("", "LVD142M")

# How many classes the data sets have for which it released segmentation heads.
SEGMENTATION_CLASSES = {"ade20k": 150, "voc2012": 21}


class OfficialBlock(Block):
    """A block that takes tokens as Meta's does, for programs that go through model.blocks."""

    def forward(self, x: Tensor, groups: Groups | None = None, keep=None) -> Tensor:
        """Tokens of b images of n tokens each: (b, n, D) -> (b, n, D).

        With `groups` they are packed, (T, D): so the network itself calls its blocks.
        """
        # The network knows how many images and tokens lie end to end in a packed sequence, and says
        # so. Of a tensor with a dimension for the images it can be read off.
        if groups is not None:
            return super().forward(x, groups, keep)
        b, n = x.shape[:2]
        return super().forward(x.flatten(0, 1), ((b, n),)).unflatten(0, (b, n))


class DINO(VisionTransformer):
    """A ViT with the methods of Meta's repository dino."""

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block, (B, nh, 1 + P, 1 + P); row 0 is the class token's."""
        return self.get_attention(x)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """All tokens of the last n blocks after the final norm, each (B, 1 + P, D)."""
        # Programs take the class token as out[:, 0]. Without it in front they would read the
        # first patch there, and nothing would tell.
        outs = super().get_intermediate_layers(x, n, return_class_token=True)
        return [torch.cat([cls[:, None], patches], 1) for patches, cls in outs]


class DINOv2(VisionTransformer):
    """A ViT with the methods of Meta's repository dinov2."""

    def forward(self, x, masks=None, is_training: bool = False):
        """head(class tokens), or the dictionary of forward_features with is_training=True.

        `head` is the identity, so this is (B, D). Programs put a classifier in its place.
        """
        if is_training:
            return self.forward_features(x, masks)
        tokens = super().forward(x, masks)
        return [self.head(t) for t in tokens] if isinstance(tokens, list) else self.head(tokens)

    # What follows has Meta's names for the same methods, and for the first of their arguments.

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """What goes into the first block: (B, 1 + R + P, D)."""
        return self.prepare_tokens(x, masks)

    def get_intermediate_layers(self, x: Tensor, *args, **kwargs) -> tuple:
        """That of VisionTransformer, whose images are called x by Meta."""
        return super().get_intermediate_layers(x, *args, **kwargs)


def backbone(name: str, pretrained: bool = True, weights: str = "",
             img_size: int = 0) -> VisionTransformer | ConvNet:
    """The network of a released name, with our own methods.

    weights: what to load in place of the released weights, if `pretrained`: a file, a URL or a
    run of the same architecture. img_size: the side in pixels for which the table of positions
    is made; 0: that of the weights. ValueError if one of them does not fit the name.
    """
    if not pretrained:
        model = untrained(name)
    elif weights in RELEASED_WEIGHTS:
        model = load_backbone(name)
    else:
        model = load_backbone(weights)

        # The network is read off the tensors, so it has to be compared with the name. The size
        # of the table of positions is the weights' own. On the "meta" device the network that
        # the name stands for takes no memory.
        if name != "dino_resnet50":
            with torch.device("meta"):
                wanted = architecture(untrained(name).state_dict())
            given = architecture(model.state_dict())
            differences = [
                f"{key} {given[key]} instead of {value}" for key, value in wanted.items()
                if key != "img_size" and given[key] != value]
            if differences:
                raise ValueError(f"weights={weights} is no {name}: {', '.join(differences)}")

    if img_size:
        if name == "dino_resnet50":
            raise ValueError(f"img_size={img_size}: a convnet has no table of positions")
        side = img_size // model.patch_size
        if not side:
            raise ValueError(
                f"img_size={img_size}: smaller than one patch of {model.patch_size}")
        table = resize_pos_embed(model.pos_embed.detach(), (side, side), model.pos_embed_resize)
        model.pos_embed = nn.Parameter(table)
        model.img_size = side * model.patch_size
    return model


def as_official(model: VisionTransformer | ConvNet, name: str) -> nn.Module:
    """The same network with the methods and attributes that Meta's network of this name has."""
    # Meta's convnet is torchvision's, of which our ConvNet leaves out the last two parts.
    # Programs count on them: children()[:-2] are the layers up to the last map.
    if name == "dino_resnet50":
        network = torchvision.models.resnet50()
        network.fc = nn.Identity()
        load_strictly(network, model.state_dict(), name)
        network.num_features = network.embed_dim = model.embed_dim
        return network.train(model.training)

    # The classes above only add methods, so the network and its blocks can become one of them as
    # they are. DINOv2's `forward` ends with a head, which has no tensors; that of DINO does not.
    for block in model.blocks:
        block.__class__ = OfficialBlock
    model.__class__ = DINOv2 if name.startswith("dinov2") else DINO
    if isinstance(model, DINOv2):
        model.head = nn.Identity()
    model.num_features = model.embed_dim
    model.patch_embed.num_patches = model.pos_embed.shape[1] - 1
    return model


# ----------------------------------------------------------------------------------------------
# Heads for every pixel, together with their backbone


class DINOv2Depther(Depther):
    """A Depther with the method by which programs for Meta's depthers call it."""

    def whole_inference(self, img: Tensor, img_meta=None, rescale: bool = True) -> Tensor:
        """The same as model(img): metres (B, 1, H, W). Only rescale=True is supported."""
        if not rescale:
            raise ValueError("rescale=False: depths are given for every pixel of the image")
        return self(img)


def head_file(weights: str | Path, released: str, data_sets: dict) -> str | Path:
    """`released`, the name of Meta's head, where `weights` is one of the data sets; else a file.

    ValueError for what is neither.
    """
    if str(weights).lower() in data_sets:
        return released
    if not Path(weights).expanduser().is_file():
        choices = ", ".join(name.upper() for name in data_sets)
        raise ValueError(f"weights={str(weights)!r}: expected {choices}, or the file of a head")
    return weights


def depther(name: str, kind: str, pretrained: bool = True, weights: str | Path = "NYU",
            depth_range: tuple[float, float] | None = None, img_size: int = 0) -> DINOv2Depther:
    """The backbone of a released name with a depth head, of `kind` in depth_heads.DEPTH_HEADS.

    weights: NYU or KITTI for Meta's head of that data set, or the file of a head. depth_range:
    the nearest and the farthest depth in metres; None: those of the head, which a file of
    evaluate.py tells; else those of NYU. ValueError names the first tensors that do not fit.
    """
    # Meta's words are those of its file names: NYU with four blocks is NAME_nyu_linear4. The
    # range is no tensor. Our own files have it beside the tensors, Meta's do not.
    state, settings = None, {}
    data = str(weights).lower() if pretrained else "nyu"
    if pretrained:
        what = head_file(weights, f"{name}_{data}_{kind}", RANGES)
        state, settings = read_dense_head(what)
    known = (settings["nearest"], settings["farthest"]) if "farthest" in settings else None
    nearest, farthest = depth_range or known or RANGES.get(data, RANGES["nyu"])

    # The head stands beside the network that torch.hub gives out under the backbone's own name,
    # and so its tensors are called backbone.* and decode_head.*, as Meta's.
    model = as_official(backbone(name, pretrained, img_size=img_size), name)
    network = DINOv2Depther(model, kind, nearest, farthest)
    if pretrained:
        load_strictly(network.decode_head, state, what)
    return network.eval()


def segmenter(name: str, kind: str, pretrained: bool = True, weights: str | Path = "ADE20K",
              img_size: int = 0) -> Segmenter:
    """The backbone of a released name with a segmentation head of one block, or of four.

    kind: "linear" or "ms". weights: ADE20K (150 classes) or VOC2012 (21) for Meta's head of
    that data set, or the file of a head, whose classes are its own. ValueError names the first
    tensors that do not fit.
    """
    data = str(weights).lower()
    classes = SEGMENTATION_CLASSES.get(data, 150)
    model = as_official(backbone(name, pretrained, img_size=img_size), name)
    if pretrained:
        what = head_file(weights, f"{name}_{data}_{kind}", SEGMENTATION_CLASSES)
        state, _ = read_dense_head(what)
        # Of a released head the number of classes is known, and another one is refused below.
        if data not in SEGMENTATION_CLASSES and "conv_seg.bias" in state:
            classes = len(state["conv_seg.bias"])

    # "+ms" of the paper reads the last four blocks, one after the other.
    n = 4 if kind == "ms" else 1
    head = SegmentationHead(n * model.embed_dim, classes)
    if pretrained:
        load_strictly(head, state, what)
    return Segmenter(model, head, n).eval()
