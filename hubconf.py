"""Hub: the released backbones and classifiers under their official names, for torch.hub.load.

    torch.hub.load("OWNER/REPOSITORY", "dinov2_vits14_reg")                     -> the backbone
    torch.hub.load("PATH", "dinov2_vits14_reg_lc", source="local", layers=4)    -> with its head

Idea     What others ask of Meta's repositories by name, they can ask of this one. It works in
         programs, too, whose own modules are called vit, augment or backbones.
Paper    none
Try      python hubconf.py      the names
Change   a name is one line of RELEASED in backbones/weights.py
Tests    pytest tests/test_hubconf.py

A model can be saved whole (torch.save(model)) and read again only where its modules can be
imported. Save its state_dict() instead.
"""

import contextlib
import pathlib
import sys
import types

# ----------------------------------------------------------------------------------------------
# Our modules beside a caller's modules of the same names
#
# Python keeps each module under its name in sys.modules, one for the whole program. A caller
# with a vit.py of its own would get that one from our imports, and later ours from its own
# imports. So the caller's modules are put aside while ours load, and put back afterwards:
#
#     sys.modules["vit"]    before: the caller's     inside: ours     afterwards: the caller's
#
# Where the caller has no module of a name, ours stays: torch.compile and pickle look modules up
# by their name.

HERE = pathlib.Path(__file__).resolve().parent
# The modules at the top of this repository, and its folders: what `import NAME` may mean here.
OUR_NAMES = {path.stem for path in HERE.glob("*.py")}
OUR_NAMES |= {path.parent.name for path in HERE.glob("*/__init__.py")}


def _top(name: str) -> str:
    """backbones.weights -> backbones."""
    return name.split(".")[0]


def _is_ours(module) -> bool:
    """Whether a module was loaded from this folder."""
    file = getattr(module, "__file__", None)
    return file is not None and HERE in pathlib.Path(file).resolve().parents


@contextlib.contextmanager
def _our_modules():
    """Inside, `import vit` means the vit.py of this folder, whatever the caller has got."""
    # Every module of the caller that has one of our names, or is in a package that has one, is
    # put aside. Ours of an earlier call come back, so that they are not loaded twice.
    callers = {}
    for name, module in list(sys.modules.items()):
        if _top(name) in OUR_NAMES and not _is_ours(module):
            callers[name] = sys.modules.pop(name)
    sys.modules.update(_LOADED)
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        # Also after an error. If the caller has a package called backbones, our
        # backbones.weights must not stay, or the caller would find it in its own package.
        sys.path.remove(str(HERE))
        callers_tops = {_top(name) for name in callers}
        for name, module in list(sys.modules.items()):
            if _top(name) in OUR_NAMES and _is_ours(module):
                _LOADED[name] = module
                if _top(name) in callers_tops:
                    del sys.modules[name]
        sys.modules.update(callers)


# Our modules by name, so that they are loaded once. torch.hub runs this file anew for every
# network, and its variables with it. So they are kept by something that stays: a module in
# sys.modules whose name nobody imports.
_KEPT = sys.modules.setdefault(f"modules of {HERE}", types.ModuleType("kept"))
_LOADED = vars(_KEPT).setdefault("loaded", {})

with _our_modules():
    from torch import nn

    # Modules, not what is in them: torch.hub.list takes every function and class here for a
    # network, unless its name begins with an underscore.
    from backbones import classifier, weights

# ----------------------------------------------------------------------------------------------
# The networks, one function for each name

dependencies = ["torch", "torchvision", "numpy"]  # torch.hub looks whether they are installed


def _backbone(name: str):
    """The function that torch.hub.load calls for a backbone of this name."""

    def load(pretrained: bool = True):
        with _our_modules():
            return weights.load_backbone(name) if pretrained else weights.untrained(name)

    # What torch.hub.help shows.
    load.__name__ = name
    load.__doc__ = f"{name}, with its released weights if `pretrained`."
    return load


def _classifier(name: str):
    """The function that torch.hub.load calls for NAME_lc."""

    def load(pretrained: bool = True, layers: int = 4):
        model = _backbone(name)(pretrained)
        if pretrained:
            head = classifier.read_head(f"{name}_lc", layers)
            return classifier.Classifier(model, head).eval()

        # Random weights of the shape that the released head has: DINO's small networks use four
        # blocks, its base ones the class token and the mean patch, its ResNet the one feature;
        # DINOv2's use `layers` blocks and the mean patch.
        tokens = {"dino_vits": 4, "dino_vitb": 2, "dino_resn": 1}.get(name[:9], 1 + layers)
        head = nn.Linear(tokens * model.embed_dim, 1000)
        return classifier.Classifier(model, head.state_dict()).eval()

    load.__name__ = f"{name}_lc"
    load.__doc__ = f"{name} and its classifier of ImageNet; of DINOv2, on 1 or 4 `layers`."
    return load


for _name in weights.RELEASED:
    globals().update({_name: _backbone(_name), f"{_name}_lc": _classifier(_name)})
# DINO's small networks were called so at first, and older programs ask for these names.
dino_deits16 = _backbone("dino_vits16")
dino_deits8 = _backbone("dino_vits8")

if __name__ == "__main__":
    print("\n".join(f"{name:20s} {name}_lc" for name in weights.RELEASED))
