"""Weights: any backbone of ours, or a flat official one, as the right network; strictly.

    run directory --> teacher.pt --+
    teacher.pt, official .pth -----+--> tensors --> shapes: width, depth, patch --> ViT, loaded
                                                  or ResNet-50 (a run's config.json names others)

Idea     The architecture can be read off the tensors, so nobody has to repeat it in flags, and
         nobody gets random weights because a flag was wrong: every tensor must find its place.
Paper    none; keys are those of the released DINO and DINOv2 backbones
Try      python weights.py RUN_OR_FILE      what is in it
Change   another layout is another way to a flat dictionary, in read_backbone
Tests    pytest tests/test_weights.py
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from resnet import NAMES, ConvNet
from vit import VisionTransformer


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """A run directory or file -> (flat state dict, what its config.json says, {} without one)."""
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"--weights {path}: there is no such file or run directory")
    folder = path if path.is_dir() else path.parent
    file = path / "teacher.pt" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"--weights {path}: no teacher.pt in it; is it the directory of a run?")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no single kind
        raise ValueError(f"--weights {file}: not a readable weights file "
                         f"({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"--weights {file}: expected a flat dictionary of tensors, a backbone")
    config = folder / "config.json"
    ours = file.name == "teacher.pt" and config.exists()
    return state, json.loads(config.read_text()) if ours else {}


def architecture(state: dict[str, Tensor]) -> dict:
    """Arguments of VisionTransformer, read off the tensors. Heads are 64 wide in all we know."""
    try:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[1]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    except (KeyError, ValueError) as error:
        raise ValueError(f"--weights: not a Vision Transformer of DINO's layout (misses {error}); "
                         f"its first keys are {', '.join(list(state)[:3])}") from None
    swiglu = "blocks.0.mlp.w12.weight" in state
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    return dict(
        img_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        in_chans=in_chans,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // 64,
        # SwiGLU's ratio is 4 in every known network; its hidden width follows from the 2/3 rule
        mlp_ratio=4.0 if swiglu else state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        ffn_layer="swiglu" if swiglu else "mlp",
        num_register_tokens=registers,
        layerscale=1.0 if "blocks.0.ls1.gamma" in state else None,
        mask_token="mask_token" in state,
        pos_embed_resize="antialias" if registers else "offset",
    )


def load_backbone(path: str | Path) -> VisionTransformer | ConvNet:
    """The network with its weights, in eval mode. ValueError with the difference if one is left."""
    state, config = read_backbone(path)
    if config.get("arch") in NAMES or "layer4.2.bn3.weight" in state:
        model = ConvNet(config.get("arch", "resnet50"), config.get("global_crops_size", 224))
    else:
        options = architecture(state)
        if config:
            options["pos_embed_resize"] = config["pos_embed_resize"]
        model = VisionTransformer(**options)
    load_strictly(model, state, str(path))
    return model.eval()


def load_strictly(model: torch.nn.Module, state: dict[str, Tensor], source: str):
    """load_state_dict whose complaint can be read: missing, unexpected and misshapen tensors."""
    have = model.state_dict()
    trouble = [f"missing {key}" for key in have if key not in state]
    trouble += [f"unexpected {key}" for key in state if key not in have]
    trouble += [f"{key} is {tuple(state[key].shape)}, expected {tuple(have[key].shape)}"
                for key in have if key in state and state[key].shape != have[key].shape]
    if trouble:
        more = f" and {len(trouble) - 4} more" if len(trouble) > 4 else ""
        raise ValueError(f"{source} does not fit the network: {'; '.join(trouble[:4])}{more}")
    model.load_state_dict(state)


if __name__ == "__main__":
    import sys

    for path in sys.argv[1:]:
        print(path, architecture(read_backbone(path)[0]))
    if not sys.argv[1:]:
        state = VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=1).state_dict()
        print("read off the tensors:", architecture(state))
