"""Prototypes: the images that each prototype of a run likes best.

    images --> teacher --> head --> logits of K prototypes --> the most used prototypes
                                                                  |
                                              a row for each: the images with its highest logits

Idea     Training never says what a prototype stands for. What the network has made of it can be
         seen in the images that it likes best: a kind of thing, a colour, a background, or, in a
         collapse, nothing at all.
Paper    iBOT fig. 4 and appendix G.1 (there for the prototypes of patches)
Try      python visualize.py prototypes RUN --data shapes:1000
Change   which prototypes are drawn: most_used
Tests    pytest tests/figures/test_prototypes.py

Letters  n images, K prototypes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.layouts import read_tensors
from backbones.weights import load_strictly
from evaluation import protocol
from evaluation.protocol import Extractor
from figures.neighbours import class_name, shown
from heads import DINOHead
from images.data import Images
from machinery.flags import UsageError, near_path, require
from machinery.page import name_row, picture, rows_of_pictures, save, show
from machinery.process import start_process
from training.stored import read_config

# ----------------------------------------------------------------------------------------------
# The teacher's answers


def require_head(run: Path):
    """UsageError for what is no directory of a run with its heads."""
    if not (run / "heads.pt").exists() or not (run / "config.json").exists():
        raise UsageError(
            f"{run}: no heads.pt and config.json in it, expected the directory of a "
            f"run{'' if run.exists() else near_path(run)}")


def open_head(run: Path, width: int) -> tuple[DINOHead, Tensor]:
    """(head of the class tokens, its centre (K,)) of a run, for features of this width.

    The centre is zero where the run had none. UsageError if there is no such head.
    """
    require_head(run)
    file = run / "heads.pt"

    # The sizes of the head are in the configuration of the run, its weights beside it.
    config = read_config(run / "config.json")
    try:
        tensors = read_tensors(file)
    except Exception as error:  # of any kind, for damage has many forms
        raise UsageError(f"{file} is not readable ({error!s:.200})") from None
    # Where iBOT learned alone, the head is called so, too, and knows nothing but patches.
    if "dino_head" not in tensors or not config["dino_weight"]:
        raise UsageError(f"{run}: a run without prototypes for class tokens")

    head = DINOHead(width, config["n_prototypes"], config["head_hidden_dim"],
                    config["head_bottleneck_dim"], config["head_nlayers"],
                    config["use_bn_in_head"], config["norm_last_layer"])
    load_strictly(head, tensors["dino_head"], str(file))

    # Sinkhorn-Knopp keeps no centre: it balances the prototypes anew in each batch.
    centre = tensors.get("centerings", {}).get("dino.center")
    if centre is None:
        centre = torch.zeros(config["n_prototypes"])
    return head.eval(), centre


@torch.no_grad()
def logits_of(head: nn.Module, features: Tensor) -> Tensor:
    """Class tokens (n, D) -> logits (n, K), some images at a time."""
    return torch.cat([head(part) for part in features.split(1024)])


def most_used(logits: Tensor, centre: Tensor, count: int) -> tuple[list[int], Tensor]:
    """(the prototypes that most images choose, most first; how many images choose each, (K,)).

    An image chooses the prototype of its largest target. A target is the softmax of the logits
    minus the centre, so the centre has to be subtracted here, too.
    """
    choices = (logits - centre).argmax(1)  # (n,)
    uses = choices.bincount(minlength=logits.shape[1])  # (K,)
    # The sort is stable: of equally popular prototypes the first ones are taken.
    order = uses.argsort(descending=True, stable=True)[:count]
    return [k for k in order.tolist() if uses[k]], uses


# ----------------------------------------------------------------------------------------------
# The page


def draw_prototypes(images: Images, logits: Tensor, prototypes: list[int], uses: Tensor,
                    columns: int):
    """A row for each prototype: the images with its highest logits, highest first.

    Returns the figure of matplotlib.
    """
    # The logit stands above each image, so that a prototype that likes a few images much looks
    # different from one that likes all of them a little.
    columns = min(columns, len(images))
    fig, axes = rows_of_pictures([[1.0] * columns] * len(prototypes))
    for row, k in zip(axes, prototypes):
        best = logits[:, k].topk(columns)
        for axis, logit, i in zip(row, best.values.tolist(), best.indices.tolist()):
            name = f"{class_name(images, i)[:15]} " if images.labels else ""
            show(axis, picture(shown(images, i)), f"{name}{logit:.2f}")

        name_row(row[0], f"prototype {k}\n{int(uses[k]):,d} images")
    return fig


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "RUN --data DATA"


@dataclass
class Config(protocol.Config):
    # -- prototypes
    prototypes: int = 6  # how many prototypes are drawn: those that most images choose
    columns: int = 8  # images of each
    output: str = ""  # the picture to write; empty: prototypes.png in this folder
    # The network is that of the run, and a figure has --output in place of a folder.
    weights: str = dataclasses.field(default="", metadata={"no_flag": True})  # not a flag
    checkpoint_key: str = dataclasses.field(  # not a flag
        default="teacher", metadata={"no_flag": True})
    output_dir: str = dataclasses.field(default="", metadata={"no_flag": True})  # not a flag

    def check(self):
        super().check()
        require(self, lambda x: x >= 1, "at least 1", "prototypes", "columns")


def draw(arguments: list[str], config: Config) -> Path:
    """The images that the prototypes of a run like best, a row for each prototype."""
    if len(arguments) > 1:
        raise UsageError(f"prototypes draws one run, not {len(arguments)}")
    config.check()
    run = Path(arguments[0]).expanduser()
    if not run.is_dir():
        raise UsageError(f"{run}: there is no such directory of a run{near_path(run)}")

    require_head(run)

    # The features come as for every evaluation; only the head makes prototypes of them.
    extractor = Extractor(dataclasses.replace(config, weights=str(run)),
                          start_process(config.device))
    head, centre = open_head(run, extractor.model.embed_dim)
    images = extractor.open("data")
    logits = logits_of(head, extractor(images, "prototypes-data"))

    # Most of a run's prototypes are the first choice of few images, or of none.
    prototypes, uses = most_used(logits, centre, config.prototypes)
    fig = draw_prototypes(images, logits, prototypes, uses, config.columns)
    caption = (f"{run.name}: the {len(prototypes)} most used of {len(centre):,d} prototypes, "
               f"{int((uses > 0).sum()):,d} of which are the first choice of any of "
               f"{len(images):,d} images of {Path(config.data).name} at {extractor.size} px; "
               "above each image its logit")
    return save(fig, Path(config.output or "prototypes.png"), caption)
