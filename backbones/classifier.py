"""Classifier: a backbone, what is read off it, and a linear layer on that.

    images --> backbone --> class tokens of n blocks, mean patch token --> Linear --> classes
                                        (Blocks)

Idea     Meta released linear classifiers for its backbones, each on another choice of tokens.
         Which one it was follows from the width of its weight, so that any of them can be put
         in place.
Paper    DINO sec. 4.1 and F; DINOv2 sec. 7.1 and appendix B
Try      python evaluate.py linear --weights dinov2_vits14 --head dinov2_vits14_lc
Change   another choice of tokens is one more range of columns in kinds_of_input
Tests    pytest tests/backbones/test_classifier.py
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.layouts import read_tensors
from backbones.weights import BASE_URL, RELEASED, fetch


class Blocks(nn.Module):
    """Class tokens of the last n blocks in order, and the mean patch of the last: (B,
    (n+1)*D).
    """

    def __init__(self, model: nn.Module, n: int):
        super().__init__()
        self.model, self.n = model, n

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self.model, "blocks"):  # a convnet: its class token is the mean
            return self.model(images).repeat(1, 2)
        outs = self.model.get_intermediate_layers(images, self.n, return_class_token=True)
        return torch.cat([cls for _, cls in outs] + [outs[-1][0].mean(1)], 1)


def kinds_of_input(width: int, blocks: tuple[int, ...], avgpool: tuple[bool, ...]) -> dict:
    """(blocks, with the mean patch or not) -> columns of a row that holds all of them.

    The row: class tokens of the last max(blocks) blocks in order, then the mean patch token of
    the last one. So every kind of input is one range of it, and nothing is copied.
    """
    most = max(blocks)
    return {(n, pool): slice((most - n) * width, (most + pool) * width)
            for n in blocks
            for pool in avgpool}


def released_head(state: dict, width: int) -> tuple[int, bool, Tensor, Tensor]:
    """A linear head, ours or released -> (blocks, with the mean patch or not, weight, bias).

    What it was trained on follows from its width, for the network's is known. DINO's heads call
    their tensors linear.*, and with the mean patch they have its columns between those of the
    class token. ValueError for anything else.
    """
    state = state.get("state_dict", state)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    dino = "linear.weight" in state
    state = {key.removeprefix("linear."): value for key, value in state.items()}
    if set(state) != {"weight", "bias"}:
        raise ValueError(f"expected the weight and the bias of a linear layer, found "
                         f"{', '.join(list(state)[:4])}")
    weight, bias = state["weight"].float(), state["bias"].float()
    known = {
        width: (1, False), 2 * width: (1, True), 4 * width: (4, False), 5 * width: (4, True)}
    if weight.shape[1] not in known:
        raise ValueError(
            f"it reads {weight.shape[1]} columns; of a network of width {width} it "
            f"must be one of {', '.join(map(str, known))}")
    blocks, pool = known[weight.shape[1]]
    if dino and pool:
        weight = weight.unflatten(1, (width, 2)).transpose(1, 2).flatten(1)  # (C, 2*D)
    return blocks, pool, weight, bias


def read_head(what: str | Path, layers: int = 4) -> dict:
    """A linear classifier from a file; or NAME_lc, the one that came with the backbone NAME (of
    DINOv2: on the last `layers` blocks, 1 or 4). released_head tells what it reads.
    """
    name = str(what).removesuffix("_lc")
    if name == str(what) or name not in RELEASED:
        return read_tensors(Path(what).expanduser())
    ending = "_linearweights.pth"
    if name.startswith("dinov2"):
        if layers not in (1, 4):
            raise ValueError(f"layers = {layers}: the classifiers of {name} read 1 or 4 blocks")
        ending = f"_linear{'4' * (layers == 4)}_head.pth"
    return read_tensors(
        fetch(BASE_URL + RELEASED[name][0].removesuffix("_pretrain.pth") + ending))


class Classifier(nn.Module):
    """A backbone and a linear head on class tokens and mean patch: (B, 3, H, W) -> (B,
    classes).
    """

    def __init__(self, model: nn.Module, head: dict[str, Tensor]):
        super().__init__()
        n, pool, weight, bias = released_head(head, model.embed_dim)
        self.backbone, self.linear_head = model, nn.Linear(weight.shape[1], len(bias))
        self.linear_head.load_state_dict({"weight": weight, "bias": bias})
        self.blocks, self.columns = n, kinds_of_input(model.embed_dim, (n,), (pool,))[n, pool]

    def forward(self, images: Tensor) -> Tensor:
        return self.linear_head(Blocks(self.backbone, self.blocks)(images)[:, self.columns])
