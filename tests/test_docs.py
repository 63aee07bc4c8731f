"""Claims: what the prose says is so.
1. Every file named in the README exists, and its map names every top-level file.
2. Every command in README and docs is one its program understands; every test they cite exists.
3. Files import only what design allows; matplotlib only where something is drawn.
4. Every file opens with the same slots; no line is too long; no loose ends.
5. Every leaf's demo runs, and says something.
6. Comments that give shapes are right: they are executed.
"""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import distill
import evaluate
import runtime
import train
import visualize
import weights
from recipes import DISTILLATION, PRESETS

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p.name for p in ROOT.glob("*.py"))
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEAVES = ("vit", "resnet", "heads", "losses", "augment", "shapes", "store", "optim", "runtime",
          "probes", "retrieval")
SHARED = ("data", "weights", "features", "recipes", "finetune", "plain")
OURS = {Path(name).stem for name in FILES}


def imports(name, top_only=False):
    tree = ast.parse((ROOT / name).read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`([\w/]+\.(?:py|md|txt))`", text))
    missing = {n for n in named if not (ROOT / n).exists()} - {"metrics.jsonl"}
    assert not missing and set(FILES) <= named


PARSERS = {
    "train.py": lambda argv: runtime.parse(train.Config, argv, PRESETS),
    "distill.py": lambda argv: runtime.parse(distill.Config, argv, DISTILLATION),
    "bench.py": lambda argv: (bench.TASKS[argv[0]], runtime.parse(bench.Config, argv[1:], PRESETS)),
    "evaluate.py": lambda argv: (evaluate.TASKS[argv[0]], runtime.parse(evaluate.Config, argv[1:])),
    "visualize.py": lambda argv: runtime.parse(visualize.Config, argv[2:]),
    "weights.py": lambda argv: runtime.parse(weights.Config, argv[2:]),
}


def commands():
    for doc in DOCS:
        text = doc.read_text().replace("\\\n", " ")
        for line in re.findall(r"^\s*(?:\$ )?((?:python|torchrun) .+)$", text, re.M):
            yield doc.name, line.split("  #")[0].strip()


def test_commands_are_understood():
    seen = 0
    for doc, line in commands():
        words = shlex.split(line, comments=True)
        program = next((w for w in words if w.endswith(".py")), None)
        if program is None:  # python -m ...
            continue
        assert (ROOT / program).exists(), f"{doc}: {line}"
        if program in PARSERS:
            argv = [w for w in words[words.index(program) + 1 :] if w != "..."]
            PARSERS[program](argv)
            seen += 1
    assert seen >= 5


def test_tests_that_docs_cite_exist():
    cited = {c for doc in DOCS for c in re.findall(r"`(test_\w+\.py)::(\w+)`", doc.read_text())}
    assert len(cited) > 20
    for file, test in cited:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    stem, used = Path(name).stem, set(imports(name)) & OURS
    if stem in LEAVES:
        assert not used
    elif stem in SHARED:
        assert used <= set(LEAVES) | set(SHARED)
    else:
        programs = {"train": {"visualize"}, "distill": {"train"},
                    "bench": {"train", "visualize"}}
        assert used <= set(LEAVES) | set(SHARED) | programs.get(stem, set())
    third = set(imports(name, top_only=True)) - OURS - set(sys.stdlib_module_names)
    assert third <= {"torch", "torchvision", "numpy", "PIL"}


def test_no_line_is_too_long():
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py")]
    long = [f"{file.name}:{i}" for file in files
            for i, line in enumerate(file.read_text().splitlines(), 1) if len(line) > 100]
    assert not long, f"lines over 100 columns: {long}"


@pytest.mark.parametrize("name", FILES)
def test_shape_of_a_file(name):
    text = (ROOT / name).read_text()
    for slot in ("\nIdea     ", "\nPaper    ", "\nTry      ", "\nChange   ", "\nTests    "):
        assert slot in text.split('"""')[1], f"{name} lacks {slot.strip()}"
    assert len(text.split('"""')[1].splitlines()) <= 32
    assert not re.search(r"\b(TO[D]O|FIX[M]E|HAC[K]|XX[X])\b", text)
    tests = re.search(r"\nTests    pytest (\S+)", text)[1]
    assert (ROOT / tests).exists()


@pytest.mark.parametrize("name", [f"{name}.py" for name in LEAVES + SHARED])
def test_demos_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / name), run_name="__main__")
    assert capsys.readouterr().out.strip()


# -- shape comments: trace the leaves while they work, and compare

SHAPE = re.compile(r"#\s*\(([^()]*)\)")


def commented_lines(name):
    """Line number of a statement's last line -> (what it binds, the shape its comment gives)."""
    source = (ROOT / name).read_text()
    lines, out = source.splitlines(), {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        match = SHAPE.search(lines[node.end_lineno - 1])
        if match:
            out[node.lineno] = (
                node.targets[0].id,
                [d.strip() for d in match[1].split(",") if d.strip()],
            )
    return out


def agrees(shape, letters, known, local):
    """Whether a shape fits its comment.

    A letter that is also a local integer of the function means that; others are bound when first
    seen. Products and sums are evaluated once their letters are known.
    """
    local = {k: v for k, v in local.items() if type(v) is int}
    if len(shape) != len(letters):
        return False
    for size, letter in zip(shape, letters):
        if letter.isidentifier():
            if local.get(letter, known.setdefault(letter, size)) != size:
                return False
        else:
            try:
                if (
                    eval(letter, {}, {**known, **local}) != size
                ):  # arithmetic over letters in our own comments
                    return False
            except (NameError, SyntaxError):
                pass  # a letter not bound in this function
    return True


class Tracer:
    """Checks each commented assignment right after it ran."""

    def __init__(self, names):
        self.comments = {str(ROOT / n): commented_lines(n) for n in names}
        self.checked, self.wrong = set(), []

    def __call__(self, frame, event, arg):
        comments = self.comments.get(frame.f_code.co_filename)
        if not comments:
            return None
        pending, known = [], {}

        def check():
            while pending:
                line = pending.pop()
                name, letters = comments[line]
                value = frame.f_locals.get(name)
                if torch.is_tensor(value):
                    self.checked.add((frame.f_code.co_filename, line))
                    if not agrees(value.shape, letters, known, frame.f_locals):
                        self.wrong.append((frame.f_code.co_name, line, letters, tuple(value.shape)))

        def local(frame, event, arg):
            check()
            if event == "line" and frame.f_lineno in comments:
                pending.append(frame.f_lineno)
            return local

        return local


def test_shape_comments_are_true():
    import augment
    import data
    import features
    import heads
    import losses
    import probes
    import retrieval
    import vit

    names = ["vit.py", "heads.py", "losses.py", "augment.py", "features.py", "probes.py",
             "retrieval.py"]
    tracer = Tracer(names)
    sys.settrace(tracer)
    try:
        model = vit.VisionTransformer(
            32,
            8,
            embed_dim=64,
            depth=2,
            num_heads=1,
            num_register_tokens=2,
            mask_token=True,
            drop_path_rate=0.5,
        )
        images = torch.randn(3, 3, 24, 32)
        views = [images, torch.randn(5, 3, 16, 16)]
        model(views, plan=model.draw_plan(views, torch.Generator()))
        model(images, torch.zeros(3, 12, dtype=torch.bool))
        model.get_attention(images)
        model.get_intermediate_layers(images, 1, reshape=True)
        head = heads.DINOHead(64, 10, 8, 6)
        logits = head(torch.randn(6, 64)).view(3, 2, 10)
        maker = losses.EMACenter(10)
        maker.update(logits)
        targets = losses.make_targets(logits[:2], 0.1, maker(logits, 0.1))
        losses.view_pair_loss(targets, logits)
        losses.entropies(targets)
        losses.SinkhornKnopp(10)(logits, 0.1)
        losses.patch_loss(targets[0], logits[0], torch.ones(2), 2)
        losses.koleo_loss(torch.randn(4, 6))
        augment.Masking((4, 3))(4, 0)
        sample = augment.MultiCrop(32, 16, 2, 2)(
            torch.zeros(3, 40, 50, dtype=torch.uint8), np.random.default_rng(0)
        )
        params = sample["photometry"].clone()
        params[:, 0], params[:, 5:] = 3, 1
        augment.photometry(sample["global_crops"], params[:2])
        features.knn_accuracy(
            torch.randn(9, 4), [0, 1, 2] * 3, torch.randn(4, 4), [0, 1, 2, 0], (3,)
        )
        rows, labels = torch.randn(8, 20), torch.arange(8) % 3
        kinds = probes.kinds_of_input(4, (1, 4), (False, True))
        probes.Probes(kinds, 3, (0.1, 0.2)).step(rows, labels)
        probes.released_head({"linear.weight": rows[:, :8], "linear.bias": rows[:, 0]}, 4)
        probes.Logistic(rows, labels, 3).fit(1.0)
        retrieval.Whitening(rows)(rows)
        place = runtime.Place(torch.device("cpu"))
        few = data.open_images("shapes:4")
        features.extract(features.Blocks(model, 2), few, 32, place)
        next(features.random_crops(few, 32, 2, 2, place))
    finally:
        sys.settrace(None)
    assert not tracer.wrong, tracer.wrong
    total = sum(len(commented_lines(n)) for n in names)
    assert len(tracer.checked) >= 0.8 * total, f"{len(tracer.checked)} of {total} comments were run"
