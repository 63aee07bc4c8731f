"""Hub: the released backbones and classifiers under their official names, for torch.hub.load.

    torch.hub.load("OWNER/REPOSITORY", "dinov2_vits14_reg")                     --> the backbone
    torch.hub.load("PATH", "dinov2_vits14_reg_lc", source="local", layers=4)    --> with its head

Idea     What others ask of Meta's repositories by name, they can ask of this one, from a
         program whose own modules may be called vit, augment or backbones as well.
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

HERE = pathlib.Path(__file__).resolve().parent
# The modules at the top of this repository, and its folders: what `import NAME` may mean here.
OUR_NAMES = {path.stem
             for path in HERE.glob("*.py")} | {
                 p.parent.name
                 for p in HERE.glob("*/__init__.py")}


def _is_ours(module) -> bool:
    """Whether a module was loaded from this folder."""
    file = getattr(module, "__file__", None)
    return file is not None and HERE in pathlib.Path(file).resolve().parents


@contextlib.contextmanager
def _our_modules():
    """Inside, `import vit` means the vit.py of this folder, whatever the caller's program
    imported.

    Python keeps each module under its name in sys.modules, one for the whole program. A caller
    with a vit.py of its own would get that one from our imports, and later ours from its own
    imports. So the caller's modules are put aside while ours load, and put back afterwards.
    Where the caller has no module of a name, ours stays: torch.compile and pickle look modules
    up by their name.
    """
    theirs = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in OUR_NAMES and not _is_ours(module):
            theirs[name] = sys.modules.pop(name)
    sys.modules.update(_LOADED)
    sys.path.insert(0, str(HERE))
    try:
        yield
    finally:
        sys.path.remove(str(HERE))
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in OUR_NAMES and _is_ours(module):
                _LOADED[name] = module
                # Of a package that the caller has, none of our modules may stay in it.
                if name.split(".")[0] in {their.split(".")[0] for their in theirs}:
                    del sys.modules[name]
        sys.modules.update(theirs)


# Our modules by name, so that they are loaded once. torch.hub runs this file anew for every
# network: so they are kept by something that stays, a module of a name that nobody imports.
_KEPT = sys.modules.setdefault(f"modules of {HERE}", types.ModuleType("kept"))
_LOADED = vars(_KEPT).setdefault("loaded", {})
with _our_modules():
    from torch import nn

    # Modules, not what is in them: torch.hub.list takes every function and class here for a
    # network.
    from backbones import classifier, weights

dependencies = ["torch", "torchvision", "numpy"]  # torch.hub reads this name


def _backbone(name: str):

    def load(pretrained: bool = True):
        with _our_modules():
            return weights.load_backbone(name) if pretrained else weights.untrained(name)

    load.__name__ = name
    load.__doc__ = f"{name}, with its released weights if `pretrained`."
    return load


def _classifier(name: str):

    def load(pretrained: bool = True, layers: int = 4):
        model = _backbone(name)(pretrained)
        if pretrained:
            head = classifier.read_head(f"{name}_lc", layers)
            return classifier.Classifier(model, head).eval()
        # Random weights of the shape that the released head has: DINO's small networks use four
        # blocks, its base ones the class token and the mean patch, DINOv2's `layers` blocks and
        # the mean patch.
        columns = {"dino_vits": 4, "dino_vitb": 2, "dino_resn": 1}.get(name[:9], 1 + layers)
        head = nn.Linear(columns * model.embed_dim, 1000)
        return classifier.Classifier(model, head.state_dict()).eval()

    load.__name__ = f"{name}_lc"
    load.__doc__ = f"{name} and its classifier of ImageNet; of DINOv2, on 1 or 4 `layers`."
    return load


for _name in weights.RELEASED:
    globals().update({_name: _backbone(_name), f"{_name}_lc": _classifier(_name)})
dino_deits16 = _backbone("dino_vits16")  # their first names
dino_deits8 = _backbone("dino_vits8")

if __name__ == "__main__":
    print("\n".join(f"{name:20s} {name}_lc" for name in weights.RELEASED))
