"""What is in a file of weights, what was released, and a backbone written for others.

    python -m backbones                                    a table of the released models
    python -m backbones RUN_OR_FILE_OR_NAME                what is in it
    python -m backbones export RUN --to hf --output FILE   for Hugging Face, or --to official

Idea     A backbone is a file that other code can read: official names, or Hugging Face's.
Paper    none
Try      python -m backbones
Change   another name for the tensors is one function in layouts.py and one line in EXPORTS
Tests    pytest tests/backbones/test_weights.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from backbones.layouts import to_hf, write_safetensors
from backbones.weights import RELEASED, architecture, load_backbone, read_backbone, untrained
from machinery.checkpoints import save_tensors
from machinery.flags import command, parse, user_errors
from vit import VisionTransformer


def released_table() -> str:
    """What `python -m backbones` prints and docs/models.md shows."""
    lines = [
        "| name | width | parameters | positions for | k-NN | linear |",
        "|---|---|---|---|---|---|"]
    with torch.device("meta"):  # shapes without memory
        for name, (_, knn, linear) in RELEASED.items():
            model = untrained(name)
            count = sum(p.numel() for p in model.parameters())
            lines.append(f"| `{name}` | {model.embed_dim} | {count:,d} | {model.img_size} px | "
                         f"{knn:.1f} | {linear:.1f} |")
    return "\n".join(lines)


EXPORTS = {"official": lambda state: state, "hf": to_hf}  # names of tensors, for --to


@dataclass
class Config:
    # -- export
    to: Literal[*EXPORTS] = "official"  # names of tensors: Meta's code, or Hugging Face
    output: str = "backbone.safetensors"  # the file; .pth for torch.load


@command
def main(argv):
    """export WHAT --to .. --output ..; or tell what is in each argument; or list the
    released.
    """
    with user_errors():
        exporting = argv[:1] == ["export"]
        if any(word.startswith("-") for word in argv[:2]) or argv == ["export"]:
            raise ValueError("usage: python -m backbones [WHAT ...] | "
                             "export WHAT [--to official|hf] [--output FILE]")
        if exporting:
            config = parse(Config, argv[2:])
            state, _ = read_backbone(argv[1])
            state = EXPORTS[config.to](state)
            path = Path(config.output)
            if not path.parent.is_dir():
                raise ValueError(f"--output {path}: there is no folder {path.parent}")
            write = write_safetensors if path.suffix == ".safetensors" else save_tensors
            write(path, state)
            print(f"wrote {path}: {len(state)} tensors")
            return path
        for what in argv:
            model = load_backbone(what)
            print(
                f"{what}: {type(model).__name__}, width {model.embed_dim}, {model.img_size} px, "
                f"{sum(p.numel() for p in model.parameters()):,d} parameters")
            if isinstance(model, VisionTransformer):
                print(
                    "   ",
                    ", ".join(f"{k} {v}" for k, v in architecture(model.state_dict()).items()))
    if not argv:
        print(released_table())


if __name__ == "__main__":
    main()
