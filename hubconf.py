"""Hub: the released backbones and their heads under their official names, for torch.hub.load.

    torch.hub.load("OWNER/REPOSITORY", "dinov2_vits14_reg")                     -> the backbone
    torch.hub.load("PATH", "dinov2_vits14_reg_lc", source="local", layers=4)    -> with its head
    torch.hub.load("PATH", "dinov2_vits14_dd", source="local", weights="KITTI") -> depth, metres

Idea     What others ask of Meta's repositories by name, they can ask of this one, and the networks
         have the methods of Meta's (backbones/hub.py). It works in programs, too, whose own
         modules are called vit, augment or backbones.
Paper    none
Try      python hubconf.py      the names
Change   a name is one line of RELEASED in backbones/weights.py
Tests    pytest tests/test_hubconf.py

A model that was saved whole (torch.save(model)) can be read only in a program that has loaded
one of these networks from the same folder before. Save its state_dict() instead.
"""

import contextlib
import pathlib
import re
import sys
import types

# ----------------------------------------------------------------------------------------------
# Our modules beside a caller's modules of the same names
#
# Python keeps each module under its name in sys.modules, one for the whole program. A caller
# with a vit.py of its own would get that one from our imports, and later ours from its own
# imports. So the caller's modules are put aside while ours load, and afterwards ours go:
#
#     sys.modules["vit"]    before: the caller's or none    inside: ours    afterwards: as before
#
# torch.compile and pickle look modules up by their name, also later. So ours get a name each
# that no caller has, of the folder they come from: hub__home_me_dino.vit.

HERE = pathlib.Path(__file__).resolve().parent
# The modules at the top of this repository, and its folders: what `import NAME` may mean here.
OUR_NAMES = {path.stem for path in HERE.glob("*.py")}
OUR_NAMES |= {path.parent.name for path in HERE.glob("*/__init__.py")}

# torch.hub runs this file anew for every network, and its variables with it. So our modules are
# kept by something that stays, the package of their new names: each is loaded once.
_PACKAGE = "hub_" + re.sub(r"\W", "_", str(HERE))
_KEPT = sys.modules.setdefault(_PACKAGE, types.ModuleType(_PACKAGE))
_LOADED = vars(_KEPT).setdefault("loaded", {})  # our modules by the names they have here


def _take_modules() -> dict:
    """All modules with one of our names, or in a package with one, out of sys.modules."""
    names = [name for name in sys.modules if name.split(".")[0] in OUR_NAMES]
    return {name: sys.modules.pop(name) for name in names}


def _rename(name: str, module: types.ModuleType):
    """Give a module of ours, its classes and its functions the name that no caller has."""
    module.__name__ = f"{_PACKAGE}.{name}"
    sys.modules[module.__name__] = module
    for value in vars(module).values():
        if isinstance(value, (type, types.FunctionType)) and value.__module__ == name:
            value.__module__ = module.__name__


@contextlib.contextmanager
def _our_modules():
    """Inside, `import vit` means the vit.py of this folder, whatever the caller has got."""
    callers = _take_modules()
    sys.modules.update(_LOADED)
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        # Also after an error, the caller's program is as it was.
        sys.path.remove(str(HERE))
        _LOADED.update(_take_modules())
        sys.modules.update(callers)
        for name, module in _LOADED.items():
            _rename(name, module)


with _our_modules():
    from torch import nn

    # Modules, not what is in them: torch.hub.list takes every function and class here for a
    # network, unless its name begins with an underscore.
    from backbones import classifier, hub
    from backbones.weights import RELEASED  # no function: torch.hub.list passes over it

# ----------------------------------------------------------------------------------------------
# The networks, one function for each name

dependencies = ["torch", "torchvision", "numpy"]  # torch.hub looks whether they are installed


def _backbone(name: str):
    """The function that torch.hub.load calls for a backbone of this name."""

    def load(pretrained: bool = True, weights: str = "", img_size: int = 0):
        with _our_modules():
            model = hub.backbone(name, pretrained, weights, img_size)
            return hub.as_official(model, name)

    # What torch.hub.help shows.
    load.__name__ = name
    load.__doc__ = (
        f"{name}, with its released weights or a file of `weights` if `pretrained`; "
        "its positions for images of `img_size` pixels.")
    return load


def _classifier(name: str):
    """The function that torch.hub.load calls for NAME_lc."""

    def load(pretrained: bool = True, layers: int = 4, weights: str = "", img_size: int = 0):
        if name.startswith("dinov2") and layers not in (1, 4):
            raise ValueError(f"layers = {layers}: the classifiers of {name} read 1 or 4 blocks")
        with _our_modules():
            model = hub.backbone(name, pretrained, img_size=img_size)
            # Meta has classifiers for DINOv2 only. Those of DINO are ours alone, and read the
            # tokens of their backbone by our own methods.
            if name.startswith("dinov2"):
                model = hub.as_official(model, name)
        if pretrained:
            released = weights in ("", "IMAGENET1K")  # what Meta calls the released ones
            head = classifier.read_head(f"{name}_lc" if released else weights, layers)
            return classifier.Classifier(model, head).eval()

        # Random weights of the shape that the released head has: DINO's small networks use four
        # blocks, its base ones the class token and the mean patch, its ResNet the one feature;
        # DINOv2's use `layers` blocks and the mean patch.
        tokens = {"dino_vits": 4, "dino_vitb": 2, "dino_resn": 1}.get(name[:9], 1 + layers)
        head = nn.Linear(tokens * model.embed_dim, 1000)
        return classifier.Classifier(model, head.state_dict()).eval()

    load.__name__ = f"{name}_lc"
    load.__doc__ = (
        f"{name} and its classifier of ImageNet, or that of a file of `weights`; of "
        "DINOv2, on 1 or 4 `layers`.")
    return load


def _linear_depth(name: str):
    """The function that torch.hub.load calls for NAME_ld."""

    def load(pretrained: bool = True, layers: int = 4, weights: str = "NYU", depth_range=None,
             img_size: int = 0):
        if layers not in (1, 4):
            raise ValueError(f"layers = {layers}: the depth heads of {name} read 1 or 4 blocks")
        kind = "linear4" if layers == 4 else "linear"  # as the released files are called

        # The range of depths is that of the data set: hub.depther knows it.
        with _our_modules():
            return hub.depther(name, kind, pretrained, weights, depth_range, img_size)

    load.__name__ = f"{name}_ld"
    load.__doc__ = (
        f"{name} and a linear depth head on 1 or 4 `layers`: metres of every pixel, trained on "
        "NYU or KITTI, or in a file of `weights`.")
    return load


def _dpt_depth(name: str):
    """The function that torch.hub.load calls for NAME_dd."""

    # DPT fuses the maps of four blocks, so there are no `layers` to choose.
    def load(pretrained: bool = True, weights: str = "NYU", depth_range=None,
             img_size: int = 0):
        with _our_modules():
            return hub.depther(name, "dpt", pretrained, weights, depth_range, img_size)

    load.__name__ = f"{name}_dd"
    load.__doc__ = (
        f"{name} and DPT, a depth head with convolutions: metres of every pixel, trained on "
        "NYU or KITTI, or in a file of `weights`.")
    return load


def _segmentation(name: str, kind: str):
    """The function that torch.hub.load calls for NAME_ls or NAME_ms."""

    # Which blocks a head reads belongs to its name, as in Meta's files: the last one, or four.
    def load(pretrained: bool = True, weights: str = "ADE20K", img_size: int = 0):
        with _our_modules():
            return hub.segmenter(name, kind, pretrained, weights, img_size)

    load.__name__ = f"{name}_ms" if kind == "ms" else f"{name}_ls"
    load.__doc__ = (
        f"{name} and the segmentation head {kind}: logits of every pixel, trained on "
        "ADE20K or VOC2012, or in a file of `weights`.")
    return load


for _name in RELEASED:
    globals().update({_name: _backbone(_name), f"{_name}_lc": _classifier(_name)})
# Meta trained heads for every pixel on the DINOv2 networks without registers. Its own hub has
# those for depth; the names _ls (linear segmentation) and _ms (its "+ms") are ours.
DENSE = [_name for _name in RELEASED if _name.startswith("dinov2") and "_reg" not in _name]
for _name in DENSE:
    globals()[f"{_name}_ld"] = _linear_depth(_name)
    globals()[f"{_name}_dd"] = _dpt_depth(_name)
    globals()[f"{_name}_ls"] = _segmentation(_name, "linear")
    globals()[f"{_name}_ms"] = _segmentation(_name, "ms")
# DINO's small networks were called so at first, and older programs ask for these names.
dino_deits16 = _backbone("dino_vits16")
dino_deits8 = _backbone("dino_vits8")

if __name__ == "__main__":
    for name in RELEASED:
        endings = "lc ld dd ls ms" if name in DENSE else "lc"
        print(f"{name:20s}", *(f"{name}_{ending}" for ending in endings.split()))
