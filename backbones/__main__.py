"""The program: what is in a file of weights, what was released, a backbone written for others.

    python -m backbones                                      a table of the released models
    python -m backbones RUN_OR_FILE_OR_NAME                  what is in it
    python -m backbones export RUN --output FILE             for Meta's code
    python -m backbones export RUN --to hf --output FOLDER   for Hugging Face's transformers

Idea     Before weights are used one wants to know what they are. A file does not say it, but
         the network that is read off its tensors does.
Paper    none
Try      python -m backbones
Change   the columns of the table are those of RELEASED, in weights.py
Tests    pytest tests/backbones/test_weights.py
"""

import torch

from backbones.export import Config, export
from backbones.weights import RELEASED, architecture, load_backbone, read_backbone, untrained
from machinery.flags import command, parse, user_errors
from vit import VisionTransformer


def released_table() -> str:
    """What `python -m backbones` prints and docs/models.md shows."""
    lines = [
        "| name | width | parameters | positions for | k-NN | linear |",
        "|---|---|---|---|---|---|"]
    # Tensors on the "meta" device have shapes and no memory: the largest of these networks
    # would take 4.5 GB otherwise.
    with torch.device("meta"):
        for name, (_, knn, linear) in RELEASED.items():
            model = untrained(name)
            count = sum(p.numel() for p in model.parameters())
            lines.append(f"| `{name}` | {model.embed_dim} | {count:,d} | {model.img_size} px | "
                         f"{knn:.1f} | {linear:.1f} |")
    return "\n".join(lines)


def tell(what: str):
    """Print what network a name, file or run is, after it has been loaded strictly."""
    # Whatever does not fit is refused by load_backbone: what is printed has been loaded whole.
    model = load_backbone(what)
    count = sum(p.numel() for p in model.parameters())
    print(f"{what}: {type(model).__name__}, width {model.embed_dim}, {model.img_size} px, "
          f"{count:,d} parameters")

    # Of a ViT also the arguments that build it again; a convnet has only its name.
    # What config.json knows of it, such as the number of heads, is among them.
    if isinstance(model, VisionTransformer):
        options = architecture(*read_backbone(what))
        print("   ", ", ".join(f"{name} {value}" for name, value in options.items()))


USAGE = ("python -m backbones [WHAT ...] | "
         "export WHAT [--to official|hf] [--output FILE]")


@command
def main(argv):
    """Export a backbone, or tell what is in each argument, or list what was released."""
    # Help is what was asked for: it is printed, and is no error.
    if {"-h", "--help"} & set(argv):
        print(f"usage: {USAGE}")
        return None
    with user_errors():
        # The first two words are never flags. A flag there gets the usage.
        exporting = argv[:1] == ["export"]
        if any(word.startswith("-") for word in argv[:2]) or argv == ["export"]:
            raise ValueError(f"usage: {USAGE}")

        # The path is for callers in Python; on the command line nothing is done with it.
        if exporting:
            return export(argv[1], parse(Config, argv[2:]))
        for what in argv:
            tell(what)

    if not argv:
        print(released_table())


if __name__ == "__main__":
    main()
