"""Hub: the released backbones under their official names, for torch.hub.load.

    torch.hub.load("OWNER/REPOSITORY", "dinov2_vits14_reg") --> weights.load_backbone --> network
    torch.hub.load("PATH", "dinov2_vits14_reg", source="local")

Idea     What others ask of Meta's repositories by name, they can ask of this one.
Paper    none
Try      python hubconf.py      the names
Change   a name is one line of weights.RELEASED
Tests    pytest tests/test_weights.py
"""

import weights

dependencies = ["torch", "torchvision", "numpy"]  # torch.hub reads this name


def _entry(name: str):
    def load(pretrained: bool = True):
        return weights.load_backbone(name) if pretrained else weights.untrained(name)

    load.__name__, load.__doc__ = name, f"{name}, with its released weights if `pretrained`."
    return load


globals().update({name: _entry(name) for name in weights.RELEASED})
dino_deits16, dino_deits8 = _entry("dino_vits16"), _entry("dino_vits8")  # their first names


if __name__ == "__main__":
    print("\n".join(weights.RELEASED))
