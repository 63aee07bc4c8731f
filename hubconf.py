"""Hub: the released backbones and classifiers under their official names, for torch.hub.load.

    torch.hub.load("OWNER/REPOSITORY", "dinov2_vits14_reg") --> weights.load_backbone --> network
    torch.hub.load("PATH", "dinov2_vits14_reg_lc", source="local", layers=4)    --> with its head

Idea     What others ask of Meta's repositories by name, they can ask of this one.
Paper    none
Try      python hubconf.py      the names
Change   a name is one line of weights.RELEASED
Tests    pytest tests/test_weights.py
"""

from torch import Tensor, nn

import weights
from features import Blocks
from probes import kinds_of_input, released_head

dependencies = ["torch", "torchvision", "numpy"]  # torch.hub reads this name


class Classifier(nn.Module):
    """A backbone and a linear head on class tokens and mean patch: (B, 3, H, W) -> (B, classes)."""

    def __init__(self, model: nn.Module, head: dict[str, Tensor]):
        super().__init__()
        n, pool, weight, bias = released_head(head, model.embed_dim)
        self.backbone, self.linear_head = model, nn.Linear(weight.shape[1], len(bias))
        self.linear_head.load_state_dict({"weight": weight, "bias": bias})
        self.blocks, self.columns = n, kinds_of_input(model.embed_dim, (n,), (pool,))[n, pool]

    def forward(self, images: Tensor) -> Tensor:
        return self.linear_head(Blocks(self.backbone, self.blocks)(images)[:, self.columns])


def _backbone(name: str):
    def load(pretrained: bool = True):
        return weights.load_backbone(name) if pretrained else weights.untrained(name)

    load.__name__, load.__doc__ = name, f"{name}, with its released weights if `pretrained`."
    return load


def _classifier(name: str):
    def load(pretrained: bool = True, layers: int = 4):
        model = _backbone(name)(pretrained)
        if pretrained:
            return Classifier(model, weights.read_head(f"{name}_lc", layers)).eval()
        columns = {"dino_vits": 4, "dino_vitb": 2, "dino_resn": 1}.get(name[:9], 1 + layers)
        head = nn.Linear(columns * model.embed_dim, 1000)
        return Classifier(model, head.state_dict()).eval()

    load.__name__ = f"{name}_lc"
    load.__doc__ = f"{name} and its classifier of ImageNet; of DINOv2, on 1 or 4 `layers`."
    return load


for _name in weights.RELEASED:
    globals().update({_name: _backbone(_name), f"{_name}_lc": _classifier(_name)})
dino_deits16, dino_deits8 = _backbone("dino_vits16"), _backbone("dino_vits8")  # their first names


if __name__ == "__main__":
    print("\n".join(f"{name:20s} {name}_lc" for name in weights.RELEASED))
