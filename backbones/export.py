"""Export: a backbone written for others, as a file or as a folder that says what it is.

    --to official    FILE, tensors under the official names: for Meta's code and torch.load
    --to hf          FOLDER for Hugging Face's transformers, read by AutoModel and pipeline:
                     config.json, preprocessor_config.json, model.safetensors, README.md

Idea     A trained backbone is of use to other code, too. Meta's code reads tensors and knows the
         network by flags. Hugging Face's transformers builds the network from a folder, which
         also says how images are prepared, so that nobody has to repeat it.
Paper    none
Try      python -m backbones export RUN --to hf --output FOLDER
Change   another kind of export is one function like write_official, and one line in EXPORTS
Tests    pytest tests/backbones/test_backbone_export.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from backbones.layouts import hf_type, to_hf, write_safetensors
from backbones.weights import architecture, ffn_layer_of, load_backbone
from machinery.checkpoints import save_tensors, write_json, write_text
from vit import VisionTransformer


def what_no_tensor_says(model: nn.Module) -> dict:
    """How images are normalised, and arguments of the network that leave no trace in its tensors.

    The names are those of weights.KEPT_FIELDS.
    """
    about = dict(mean=list(model.channel_stats.mean), std=list(model.channel_stats.std))
    if not isinstance(model, VisionTransformer):
        return about | dict(arch=model.name, global_crops_size=model.img_size)

    return about | dict(pos_embed_resize=model.pos_embed_resize, norm_eps=model.norm.eps,
                        num_heads=model.num_heads, ffn_layer=ffn_layer_of(model))


def write_official(model: nn.Module, what: str, path: Path):
    """The tensors in one file; a run's other files stay where they are."""
    about = what_no_tensor_says(model)

    # The format follows from the ending. A .safetensors file has no code in it, and room for
    # more than tensors; a .pth file is what torch.load and Meta's code read.
    if path.suffix == ".safetensors":
        write_safetensors(path, model.state_dict(), about)
    else:
        save_tensors(path, model.state_dict())
        missing = ", ".join(f"{name} {value}" for name, value in about.items())
        print(f"{path} holds tensors only, and not {missing}; a .safetensors file would")


# ----------------------------------------------------------------------------------------------
# Hugging Face


def hf_config(model: nn.Module) -> dict:
    """config.json of a Vision Transformer, by which AutoModel builds it again."""
    # What the three kinds have in common. Their names for it are those of BERT.
    kind = hf_type(model.state_dict())
    options = architecture(model.state_dict(), None, model.num_heads)
    config = dict(hidden_size=model.embed_dim, num_hidden_layers=model.depth,
                  num_attention_heads=model.num_heads, hidden_act="gelu",
                  layer_norm_eps=model.norm.eps, image_size=model.img_size,
                  patch_size=model.patch_size, num_channels=model.in_chans, qkv_bias=True)

    # The pooler of their ViT is the identity (layouts.to_hf), so it must not bend its values.
    if kind == "vit":
        hidden = round(model.embed_dim * options["mlp_ratio"])
        return dict(architectures=["ViTModel"], model_type=kind, intermediate_size=hidden,
                    pooler_act="linear", **config)

    # Their DINOv2 takes a whole number for the width of the feed-forward layer, in multiples of
    # the network's.
    if kind == "dinov2_with_registers":
        config["num_register_tokens"] = model.num_register_tokens
    ratio = round(options["mlp_ratio"])
    if ratio != options["mlp_ratio"]:
        raise ValueError(f"--to hf: a feed-forward layer of {options['mlp_ratio']:g} times the "
                         f"width; {kind} has one of a whole number of times")
    names = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
    return dict(architectures=[names[kind]], model_type=kind, mlp_ratio=ratio,
                use_swiglu_ffn=options["ffn_layer"] == "swiglu", **config)


def hf_preprocessor(model: nn.Module) -> dict:
    """preprocessor_config.json: an image becomes what our own evaluations make of it.

    The short side is resized to 8/7 of the network's own size, and the centre is cut out.
    """
    # The names are those of their BitImageProcessor, whose steps are done in this order.
    size = model.img_size
    return dict(
        image_processor_type="BitImageProcessor",
        do_resize=True,
        size=dict(shortest_edge=round(size * 8 / 7)),
        resample=3,  # bicubic
        do_center_crop=True,
        crop_size=dict(height=size, width=size),
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(model.channel_stats.mean),
        image_std=list(model.channel_stats.std),
        do_convert_rgb=model.in_chans == 3)


def hf_readme(model: nn.Module, what: str) -> str:
    """README.md: how the folder is used, and the card of the run that the network comes from."""
    # Of other weights than those of a run, and of a run that has not ended, nothing is known
    # but what they are called.
    card = Path(what).expanduser() / "card.md"
    text = card.read_text() if card.exists() else f"# {what}\n"
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
---

{text}
## Use

    from transformers import pipeline

    extract = pipeline("image-feature-extraction", model="PATH/OF/THIS/FOLDER")
    tokens = extract("photo.jpg")[0]  # lists of {model.embed_dim} numbers

The first token is the class token, then come {model.num_register_tokens} registers and the
patches, row by row. Images are resized and cut to {model.img_size} pixels, for which the table of
positions is made. Exported from `{what}` as `{hf_type(model.state_dict())}`.
"""


def write_hf(model: nn.Module, what: str, path: Path):
    """The folder for Hugging Face's transformers."""
    if path.suffix in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"--output {path}: --to hf writes a folder; give it a name without "
                         f"{path.suffix}")

    # Before the folder is made, because a network that has no names there is refused here. One
    # with another feed-forward layer would be computed as an MLP.
    state = to_hf(model.state_dict())
    about = what_no_tensor_says(model)
    if about["ffn_layer"] not in ("mlp", "swiglu"):
        raise ValueError(
            f"--to hf: transformers has no feed-forward layer {about['ffn_layer']}, "
            "only mlp and swiglu")
    config = hf_config(model)

    # A folder that is there may hold a run, or a README.md of somebody. An earlier export may be
    # written anew.
    readme = path / "README.md"
    is_ours = readme.exists() and readme.read_text(
        errors="replace").startswith("---\nlibrary_name: transformers")
    if path.exists() and any(path.iterdir()) and not is_ours:
        raise ValueError(
            f"--output {path}: there are other files in this folder; give a new one")
    path.mkdir(exist_ok=True)

    # By these names AutoModel and AutoImageProcessor find what they need in the folder.
    write_json(path / "config.json", config)
    write_json(path / "preprocessor_config.json", hf_preprocessor(model))
    write_text(path / "README.md", hf_readme(model, what))
    write_safetensors(path / "model.safetensors", state, about)


# ----------------------------------------------------------------------------------------------
# The command

EXPORTS = {"official": write_official, "hf": write_hf}  # who will read it, for --to


@dataclass
class Config:
    # -- export
    to: Literal[*EXPORTS] = "official"  # who will read it: Meta's code, or Hugging Face's
    output: str = "backbone.safetensors"  # a file (.pth for torch.load); for hf a folder
    num_heads: int = 0  # attention heads, where the file does not say; 0: each is 64 wide


def export(what: str, config: Config) -> Path:
    """Write the backbone of a name, file or run as --to says, at --output."""
    # Whatever it was stored as, in memory a network has the official names; EXPORTS goes on
    # from these.
    model = load_backbone(what, num_heads=config.num_heads)
    path = Path(config.output)
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}")
    EXPORTS[config.to](model, what, path)
    print(f"wrote {path}: {len(model.state_dict())} tensors")
    return path
