"""Classifier: a backbone, what is read off it, and a linear layer on that.

    images --> backbone --> class tokens of n blocks, mean patch token --> Linear --> classes
                                        (Blocks)

Idea     Meta released linear classifiers for its backbones, each on another choice of tokens.
         Which choice it was follows from the width of its weight. So any of them can be put in
         place, and nobody has to say what it reads.
Paper    DINO sec. 4.1 and appendix F.2; DINOv2 sec. 7.1 and appendix B.3
Try      python evaluate.py linear --weights dinov2_vits14 --head dinov2_vits14_lc
Change   another choice of tokens is one more range of columns in kinds_of_input
Tests    pytest tests/backbones/test_classifier.py

Letters  B images, D width of the backbone, C classes, n blocks.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.layouts import read_tensors
from backbones.weights import ALIASES, BASE_URL, RELEASED, fetch


class Blocks(nn.Module):
    """Class tokens of the last n blocks in order, then the mean patch token of the last block.

    (B, 3, H, W) -> (B, (n + 1) * D). Of a convnet twice its feature, whatever n: (B, 2 * D).
    """

    def __init__(self, model: nn.Module, n: int):
        super().__init__()
        self.model = model
        self.n = n

    def forward(self, images: Tensor) -> Tensor:
        # A convnet has no blocks, and its class token is the mean of its patch tokens already:
        # the two stand for the last class token and the mean patch.
        if not hasattr(self.model, "blocks"):
            return self.model(images).repeat(1, 2)

        # One pair (patch tokens, class token) for each block, after the final norm.
        outs = self.model.get_intermediate_layers(images, self.n, return_class_token=True)
        class_tokens = [cls for _, cls in outs]
        patches, _ = outs[-1]
        return torch.cat([*class_tokens, patches.mean(1)], 1)


def kinds_of_input(width: int, blocks: tuple[int, ...], avgpool: tuple[bool, ...]) -> dict:
    """(blocks, with the mean patch or not) -> columns of a row that holds all of them.

    The row: class tokens of the last max(blocks) blocks in order, then the mean patch token of
    the last one. So every kind of input is one range of it, and nothing is copied. Example with
    width 10 and at most 4 blocks:

        0-9       10-19     20-29     30-39     40-49         columns of the row
        class 1   class 2   class 3   class 4   mean patch    class 4: of the last block

        {(1, False): 30-39, (1, True): 30-49, (4, False): 0-39, (4, True): 0-49}
    """
    most = max(blocks)
    kinds = {}
    for n in blocks:
        for with_mean in avgpool:
            kinds[n, with_mean] = slice((most - n) * width, (most + with_mean) * width)
    return kinds


def released_head(state: dict, width: int,
                  kind: tuple[int, bool] | None = None) -> tuple[int, bool, Tensor, Tensor]:
    """A linear head, ours or released -> (blocks, with the mean patch or not, weight, bias).

    width: D of the backbone; kind: the first two of the answer, if they are known. Else what
    the head was trained on follows from its own number of columns. Example with D = 384: a
    weight (1000, 1920) reads 1920 / 384 = 5 tokens, which are four class tokens and the mean
    patch. ValueError for anything else than a linear head.
    """
    if not isinstance(state, dict):
        raise ValueError(
            f"expected the tensors of a linear layer, found a {type(state).__name__}")

    # Ours and DINOv2's are {"weight": .., "bias": ..}; DINO's lie in "state_dict" and are
    # called module.linear.weight and module.linear.bias.
    state = state.get("state_dict", state)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    from_dino = "linear.weight" in state
    state = {key.removeprefix("linear."): value for key, value in state.items()}
    if set(state) != {"weight", "bias"}:
        raise ValueError(f"expected the weight and the bias of a linear layer, found "
                         f"{', '.join(list(state)[:4])}")
    weight = state["weight"].float()  # (C, columns)
    bias = state["bias"].float()  # (C,)
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"a weight {tuple(weight.shape)} with a bias {tuple(bias.shape)}; expected "
            "(classes, columns) and (classes,)")

    # Columns -> what they are: the four choices that the papers train.
    choices = {
        width: (1, False), 2 * width: (1, True), 4 * width: (4, False), 5 * width: (4, True)}
    if kind:
        choices = {sum(kind) * width: kind}  # of (2, True) the columns of 2 + 1 tokens
    if weight.shape[1] not in choices:
        raise ValueError(
            f"it reads {weight.shape[1]} columns; of a network of width {width} it "
            f"must be one of {', '.join(map(str, choices))}")
    blocks, with_mean = choices[weight.shape[1]]
    if from_dino and with_mean and blocks > 1:
        raise ValueError(f"it reads {weight.shape[1]} columns under DINO's names, whose heads "
                         "never read the mean patch beside the tokens of several blocks")

    # DINO's heads take the numbers of the class token c and of the mean patch a by turns:
    # c0 a0 c1 a1 ... Here the columns are put in the order of `Blocks`: c0 c1 ... a0 a1 ...
    if from_dino and with_mean:
        weight = weight.unflatten(1, (width, 2)).transpose(1, 2).flatten(1)  # (C, 2*D)
    return blocks, with_mean, weight, bias


def read_head(what: str | Path, layers: int = 4) -> dict:
    """The tensors of a linear classifier, for released_head: a file, or a released one.

    A released one is called NAME_lc and belongs to the backbone NAME. DINOv2 has two for each
    backbone, on the last 1 or 4 blocks: layers. ValueError for any other number.
    """
    name = str(what).removesuffix("_lc")
    is_name = name != str(what)
    name = ALIASES.get(name, name)
    if not is_name or name not in RELEASED:
        return read_tensors(Path(what).expanduser())

    # The file lies beside the backbone's: dinov2_vits14_pretrain.pth becomes
    # dinov2_vits14_linear4_head.pth, or dinov2_vits14_linear_head.pth on one block.
    ending = "_linearweights.pth"
    if name.startswith("dinov2"):
        if layers not in (1, 4):
            raise ValueError(f"layers = {layers}: the classifiers of {name} read 1 or 4 blocks")
        ending = "_linear4_head.pth" if layers == 4 else "_linear_head.pth"
    return read_tensors(
        fetch(BASE_URL + RELEASED[name][0].removesuffix("_pretrain.pth") + ending))


class Classifier(nn.Module):
    """A backbone and a linear head on what is read off it: (B, 3, H, W) -> logits (B, C).

    head: the tensors of a linear layer, as read_head gives them. kind: (blocks, with the mean patch
    or not) of a head that is none of the four which the papers train. One on two class tokens has
    as many columns as one on a class token and the mean patch, for which it would be taken.
    """

    def __init__(self, model: nn.Module, head: dict[str, Tensor],
                 kind: tuple[int, bool] | None = None):
        super().__init__()
        # The names backbone and linear_head are those of Meta's repository, so that the keys of
        # the state dict are the same.
        n, with_mean, weight, bias = released_head(head, model.embed_dim, kind)
        self.backbone = model
        self.linear_head = nn.Linear(weight.shape[1], len(bias))
        self.linear_head.load_state_dict({"weight": weight, "bias": bias})

        # Of the row that `Blocks` gives, the columns that this head reads.
        self.blocks = n
        self.columns = kinds_of_input(model.embed_dim, (n,), (with_mean,))[n, with_mean]

    def forward(self, images: Tensor) -> Tensor:
        row = Blocks(self.backbone, self.blocks)(images)
        return self.linear_head(row[:, self.columns])
