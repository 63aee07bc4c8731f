"""Claims: what the prose says is so, and the house is built as it says.
1. README and docs name files that exist; docs/map.md names every file of code, and its table
   "I want to add" names what stands in these files.
2. Every command in README, docs and docstrings is one its program understands; every test that the
   docs cite exists.
   The README's lines for programs in other folders run, and give what their comments say.
3. Files import only what the house allows; nothing imports in a circle; what is imported when
   train.py starts is few enough to be read, and so is what four typical tasks of a student need.
4. Every file opens with the same slots, and what its slot "Change" names exists; no line is too
   long; no loose ends.
5. Every demo runs, and says something.
6. Comments that give shapes are right: they are executed.
"""

import ast
import io
import re
import runpy
import shlex
import sys
import textwrap
import tokenize
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import backbones.__main__
import backbones.weights
import bench.__main__
import curate
import distill
import docs.exercise
import evaluate
import train
import visualize
from augment import RGB
from machinery.flags import parse
from machinery.process import Process
from training.recipes import DISTILLATION
from vit import VisionTransformer

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]

CONCEPTS = {"vit", "heads", "losses", "augment"}
PROGRAMS = {"train", "distill", "evaluate", "visualize", "curate", "hubconf"}
ROOMS = [
    "machinery", "images", "backbones", "training", "evaluation", "figures", "curation",
    "bench", "docs"]

# The name of a module, such as training.optim -> its file. All the code of the house but tests.
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
for room in ROOMS:
    for path in (ROOT / room).glob("*.py"):
        MODULES[room if path.stem == "__init__" else f"{room}.{path.stem}"] = path
FILES = {str(path.relative_to(ROOT)): path for path in MODULES.values()}

# Files that open with a docstring in slots: all but the rooms' __init__.py, which have one line,
# and bench/official.py, which stands beside code that is not ours.
SLOTTED = [name for name in FILES if not name.endswith("__init__.py")]
SLOTTED.remove("bench/official.py")

# -- 1


def test_the_files_at_the_top_are_the_readers_card():
    assert {path.stem for path in ROOT.glob("*.py")} == CONCEPTS | PROGRAMS


def test_readme_and_map_name_what_exists():
    readme = (ROOT / "README.md").read_text()
    whole_map = (ROOT / "docs/map.md").read_text()
    top = {f"{name}.py" for name in CONCEPTS | PROGRAMS}
    assert top <= set(re.findall(r"`([\w/]+\.py)`", readme))

    # The map has every file of every room, and the README every room.
    named = set(re.findall(r"`(\w+/\w+\.py)`", whole_map))
    rooms_themselves = {f"{room}/__init__.py" for room in ROOMS}
    assert named == set(FILES) - rooms_themselves - top
    for text in (readme, whole_map):
        assert {f"{room}/" for room in ROOMS} <= set(re.findall(r"`(\w+/)`", text))


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_docs_name_files_that_exist(doc):
    written_by_a_run = {"story.png", "curves.png", "card.md", "copies.txt"}
    written_by_a_run |= {"list.txt", "report.md", "page.png"}  # by a stage of curate.py
    named = set(re.findall(r"`([\w/]+\.(?:py|md|txt|sh|png))`", doc.read_text()))
    missing = {name for name in named - written_by_a_run if not (ROOT / name).exists()}
    assert not missing, f"{doc.name} names what does not exist: {missing}"


def defined_names(path):
    """Every name that a file gives to something; members of a class also as Class.member."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    names.add(f"{node.name}.{member.name}")
                elif isinstance(member, ast.AnnAssign):
                    names.add(f"{node.name}.{member.target.id}")
    return names


def stands_in(name, files):
    """Whether one of the files defines the name; NAME and * in it stand for any word."""
    pattern = re.escape(name).replace("NAME", r"\w+").replace(r"\*", r"\w+")
    return any(re.fullmatch(pattern, known) for file in files for known in defined_names(file))


def test_what_to_add_stands_where_the_map_says():
    text = (ROOT / "docs/map.md").read_text()
    table = text[text.index("| I want to add"):].split("\n\n")[0]
    rows = [row.strip("|").split("|") for row in table.splitlines()[2:]]
    assert len(rows) > 15
    for what, where, places in rows:
        files = [ROOT / name for name in re.findall(r"`([\w/]+\.py)`", where)]
        for room in re.findall(r"`(\w+/)`", where):
            files += (ROOT / room).glob("*.py")
        for name in re.findall(r"`(\w+)`", places):
            assert stands_in(name, files), f"{what.strip()}: {name} is not in {where.strip()}"


# -- 2


def understand_bench(argv):
    if argv and argv[0] != "table":  # that takes files and no flags
        bench.__main__.read_flags(argv[0], argv[1:])


def understand_backbones(argv):
    if argv[:1] == ["export"]:
        parse(backbones.__main__.Config, argv[2:])
    else:
        assert not any(word.startswith("-") for word in argv)


def understand_exercise(argv):
    if argv:
        docs.exercise.read_flags(argv)


def understand_evaluate(argv):
    _, flags_of_this_task, _ = evaluate.choose_task(argv)
    parse(flags_of_this_task, argv[1:])


def understand_visualize(argv):
    _, flags = visualize.split(argv[1:])
    parse(visualize.FIGURES[argv[0]].Config, flags)


# A program or module -> what reads its command line, without running it.
PARSERS = {
    "train.py": train.read_flags, "distill.py": lambda argv: train.read_flags(
        argv, distill.Config, DISTILLATION, "distill.py"), "evaluate.py": understand_evaluate,
    "visualize.py": understand_visualize, "curate.py": curate.read_flags,
    "bench": understand_bench, "backbones": understand_backbones,
    "docs.exercise": understand_exercise}
# What prose writes in the place of a word of a certain kind -> such a word.
PLACEHOLDERS = {"PRESET": "shapes", "TASK": "knn", "N": "1", "W": "1"}


def commands():
    """(where, command) of README, docs and of the slot "Try" of each file."""
    texts = {doc.name: doc.read_text() for doc in DOCS}
    for name in SLOTTED:
        texts[name] = slots_of(name)["Try"]
    for where, text in texts.items():
        text = re.sub(r" *\\\n\s*", " ", text)  # a command over several lines
        program = r"(?:[A-Z]+=\S+ )*(?:python|torchrun|pytest|pip) "
        lines = re.findall(rf"^\s*({program}.+)$", text, re.M)
        lines += re.findall(rf"`({program}[^`]+)`", text)  # within a sentence
        for line in lines:
            line = re.split(r" {2,}| #", line.replace("\n", " "))[0]  # what follows explains it
            line = re.sub(r"\[.*?\]", "", line)  # may be left out
            yield from ((where, command.strip()) for command in line.split("&&"))


def test_commands_are_understood():
    understood = set()
    for where, command in commands():
        try:
            words = [w for w in shlex.split(command, comments=True) if w != "..."]
            words = [w for w in words if not re.match(r"[A-Z]+=", w)]  # KILLS=50 pytest ...
            words = [PLACEHOLDERS.get(w, w) for w in words]
            if words[0] == "pip":
                continue
            if words[0] == "pytest":
                for word in words[1:]:
                    assert not word.startswith("tests") or (ROOT / word).exists()
                continue
            if words[1:2] == ["-m"]:
                program, argv = words[2], words[3:]
                assert program in MODULES
            else:
                program = next(word for word in words if word.endswith(".py"))
                argv = words[words.index(program) + 1:]
                assert (ROOT / program).exists()
            if program in PARSERS and "--help" not in argv:
                PARSERS[program](argv)
                understood.add(program)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{where}: `{command}`: {error!r}") from None
    assert understood == set(PARSERS)


def test_tests_that_docs_cite_exist():
    cited = {c for doc in DOCS for c in re.findall(r"`(test_\w+\.py)::(\w+)`", doc.read_text())}
    assert len(cited) > 20
    missing = []
    for file, test in sorted(cited):
        found = list((ROOT / "tests").rglob(file))
        if len(found) != 1 or f"def {test}(" not in found[0].read_text():
            missing.append(f"{file}::{test}")
    assert not missing, f"docs cite tests that are not there: {missing}"


def test_the_lines_for_programs_elsewhere(tmp_path, monkeypatch):
    """Run in another folder, on a random image, with random weights in place of the released."""
    block = re.search(r"(?m)^    import sys\n(?:(?:    .*)?\n)+",
                      (ROOT / "README.md").read_text())
    lines = textwrap.dedent(block[0])
    pixels = np.random.default_rng(0).integers(0, 256, (500, 600, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "PHOTO", format="png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load(name):
        # As wide as the network of this name, but one block deep, which takes no time.
        assert name in backbones.weights.RELEASED
        model = VisionTransformer(518, 14, embed_dim=384, depth=1, num_heads=6,
                                  num_register_tokens=4, pos_embed_resize="antialias")
        model.channel_stats = RGB
        return model.eval()

    monkeypatch.setattr(backbones.weights, "load_backbone", load)
    names = {}
    exec(lines.replace("PATH/OF/THIS/FOLDER", str(ROOT)), names)

    # "photo = ...  # (3, H, W), from 0 to 255": the shape behind a name, where it has no letters.
    checked = 0
    for name, shape in re.findall(r"(?m)^ *(\w+) = .*# \(([\d, ]+)\)", lines):
        value = names[name]
        given = value if isinstance(value, tuple) else tuple(value.shape)
        assert given == tuple(map(int, shape.split(","))), name
        checked += 1
    assert checked == 6 and names["photo"].shape == (3, 500, 600)
    torch.testing.assert_close(names["attention"].sum(-1), torch.ones(1, 6, 1029))


# -- 3

# A room, or a file at the top -> the rooms and files at the top that it may import. A room may
# always import itself. Nothing imports upwards, not even inside a function.
MACHINERY = {"machinery"}
BELOW_EVALUATION = CONCEPTS | {"machinery", "images", "backbones", "training"}
BELOW_FIGURES = BELOW_EVALUATION | {"evaluation"}
BELOW_PROGRAMS = BELOW_FIGURES | {"figures"}
MAY_IMPORT = {
    **dict.fromkeys(CONCEPTS, set()), "machinery": set(), "images": {"augment"} | MACHINERY,
    "backbones": {"vit", "augment"} | MACHINERY,
    "training": CONCEPTS | {"images", "backbones"} | MACHINERY, "evaluation": BELOW_EVALUATION,
    "figures": BELOW_FIGURES, "curation": BELOW_FIGURES, "curate": BELOW_FIGURES | {"curation"},
    "train": BELOW_PROGRAMS, "distill": BELOW_PROGRAMS | {"train"}, "evaluate": BELOW_PROGRAMS,
    "visualize": BELOW_PROGRAMS, "hubconf": {"backbones"},
    "bench": BELOW_PROGRAMS | {"train", "distill", "evaluate", "visualize", "curation"},
    "docs": MACHINERY}


def imports_of(path):
    """(module, place) of every import of a file.

    The place is "top" where it runs when the file is imported, "demo" under
    `if __name__ == "__main__"`, else the name of the function that it stands in.
    """
    found = []

    def visit(node, place):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, place) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name}: relative imports are not used here"
                for alias in child.names:  # from room import file, or from file import name
                    inner = f"{child.module}.{alias.name}"
                    found.append((inner if inner in MODULES else child.module, place))
            elif isinstance(child, ast.FunctionDef):
                visit(child, child.name if place == "top" else place)
            elif isinstance(child, ast.If) and "__name__" in ast.unparse(child.test):
                visit(child, "demo")
            else:
                visit(child, place)

    visit(ast.parse(path.read_text()), "top")
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_of_ours(name):
    unit = name.split("/")[0].removesuffix(".py")  # the room, or the file at the top
    for module, place in imports_of(FILES[name]):
        if module.split(".")[0] not in MAY_IMPORT:
            continue  # not ours
        imported = module.split(".")[0]
        allowed = MAY_IMPORT[unit] | ({unit} if unit in ROOMS else set())
        assert imported in allowed, f"{name} imports {module} (in: {place})"


@pytest.mark.parametrize("name", FILES)
def test_imports_of_others(name):
    for module, place in imports_of(FILES[name]):
        package = module.split(".")[0]
        if package in MAY_IMPORT or package in sys.stdlib_module_names:
            continue
        if package == "matplotlib":
            draws = place == "demo" or place.startswith("draw") or place == "pyplot"
            assert draws, f"{name} imports matplotlib where nothing is drawn (in: {place})"
        elif place == "top":
            assert package in {"torch", "torchvision", "numpy",
                               "PIL"}, f"{name} imports {package}"


def start_up_imports(module):
    """The modules of ours that Python runs when it imports this one."""
    return {name
            for name, place in imports_of(MODULES[module]) if place == "top"} & set(MODULES)


def test_nothing_imports_in_a_circle():
    done = set()

    def visit(module, above):
        assert module not in above, f"a circle: {' -> '.join([*above, module])}"
        if module not in done:
            for imported in start_up_imports(module):
                visit(imported, [*above, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_each_room_says_what_it_is_for():
    for room in ROOMS:
        lines = (ROOT / room / "__init__.py").read_text().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith('"""') and lines[0].endswith('"""')


def test_machinery_knows_nothing_of_the_method():
    for path in (ROOT / "machinery").glob("*.py"):
        # The words of Python's own modules are no words of the method.
        text = path.read_text().lower()
        for word in ("unittest.mock import patch", "dispatch"):
            text = text.replace(word, "")
        words = re.findall(r"\w*(?:crop|patch|teacher|student)\w*", text)
        assert not words, f"{path.name}: {words}"


def code_lines(path):
    """The numbers of the lines that hold code: neither blank, nor a comment, nor a docstring."""
    source = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node,
                      (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    not_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
                tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in not_code:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def test_what_starts_with_train_can_be_read():
    """The files that Python runs when train.py starts; a room's one line does not count."""
    closure, to_visit = set(), ["train"]
    while to_visit:
        module = to_visit.pop()
        if module not in closure:
            closure.add(module)
            to_visit += start_up_imports(module)
    sizes = {
        module: len(code_lines(MODULES[module]))
        for module in closure if len(MODULES[module].read_text().splitlines()) > 3}
    listed = ", ".join(f"{module} {size}" for module, size in sorted(sizes.items()))
    assert len(sizes) <= 22, f"{len(sizes)} files: {listed}"
    assert sum(sizes.values()) <= 3000, f"{sum(sizes.values())} lines of code: {listed}"


def names_of(node):
    """What a statement defines: the name of a class or function, or what it assigns to."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def lines_of(path, name):
    """The numbers of the lines of a function, a class, a table, or Class.member, decorators too."""
    body = ast.parse(path.read_text()).body
    for part in name.split("."):
        matches = [node for node in body if part in names_of(node)]
        assert len(matches) == 1, f"{path.name} defines {name} {len(matches)} times"
        node = matches[0]
        body = getattr(node, "body", [])
    decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
    return set(range(min([node.lineno, *decorators]), node.end_lineno + 1))


# A task of docs/results.md, "Four things a student wants to do" -> the most lines of code that it
# may need.
TASK_LIMITS = {
    "change the centering": 100, "add a loss": 100, "add a data set": 54,
    "see where the attention map comes from": 57}


def test_four_student_tasks_stay_small():
    """The table says which functions, classes and tables a task needs; their lines are counted."""
    text = (ROOT / "docs/results.md").read_text()
    table = text[text.index("| task | open | edit |"):].split("\n\n")[0]
    files, counted, task = {}, {}, ""
    for row in table.splitlines()[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if cells[0]:  # a row without a task goes on with another file of the task above it
            task = cells[0]
            files[task], counted[task] = [int(cells[1])], 0
        file, *names = re.findall(r"`([^`]+)`", cells[4])
        files[task].append(file)
        places = [lines_of(ROOT / file, name) for name in names]
        counted[task] += len(code_lines(ROOT / file) & set().union(*places))
    for task, (opened, *listed) in files.items():
        assert opened == len(listed), f"{task}: {opened} files to open, but {listed}"
    too_long = {task: n for task, n in counted.items() if n > TASK_LIMITS[task]}
    assert set(counted) == set(TASK_LIMITS) and not too_long, f"lines of code: {counted}"


def test_files_that_can_be_copied():
    """The list in the map is that of all files that need torch, torchvision and numpy only."""
    alone = set()
    for name, path in FILES.items():
        modules = {
            module.partition(".")[0]
            for module, place in imports_of(path) if place == "top"}
        ours = {module for module in modules if module in MODULES}
        room = name.partition("/")[0]
        if not ours and room not in ("machinery", "bench") and not name.endswith("__.py"):
            alone.add(name)
    text = (ROOT / "docs/map.md").read_text().partition(
        "These files import nothing")[2].partition("## Where to add")[0]
    assert set(re.findall(r"`([\w/]+\.py)`", text)) == alone


# -- 4

SLOTS = ("Idea", "Paper", "Try", "Change", "Tests")


def slots_of(name):
    """The slots of a file's docstring: word -> text. Long texts go on in indented lines."""
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text()))
    slots = re.findall(r"^([A-Z][a-z]+) {3,}(\S.*(?:\n {9}.*)*)", docstring, re.M)
    return {word: re.sub(r"^ {9}", "", text, flags=re.M) for word, text in slots}


@pytest.mark.parametrize("name", SLOTTED)
def test_shape_of_a_file(name):
    text = FILES[name].read_text()
    docstring = ast.get_docstring(ast.parse(text))
    slots = [word for word in slots_of(name) if word in SLOTS]
    assert slots == list(SLOTS), f"{name} has the slots {slots}"
    assert len(docstring.splitlines()) <= 32
    assert not re.search(r"\b(TO[D]O|FIX[M]E|HAC[K]|XX[X])\b", text)
    tests = re.match(r"pytest (\S+)", slots_of(name)["Tests"])[1]
    assert (ROOT / tests).exists(), f"{name}: there is no {tests}"


def identifiers_in(prose):
    """The words of a sentence that are names in code.

    In backquotes, or with an underscore or a dot inside, all in capitals, or capitalised inside a
    sentence: `terms`, train_step, Step.breakdown, TASKS, Config. Also Clock(skip=): both of them.
    """
    ordinary = {"GPU", "MLP"}
    prose = re.sub(r"--\w+", "", prose)  # flags
    for word in re.findall(r"`[^`]+`|[A-Za-z_][\w*]*(?:\.\w+)*(?:\(\w+=\))?", prose):
        quoted = word.startswith("`")
        word = word.strip("`")
        if call := re.fullmatch(r"(\w+)\((\w+)=\)", word):
            yield from call.groups()
        elif quoted or re.search(r"_|\*|\w\.\w", word) or re.match(r"[A-Z]\w", word):
            if word not in ordinary:
                yield word


@pytest.mark.parametrize("name", SLOTTED)
def test_the_change_slot_is_true(name):
    """What it names stands in this file, or in a file or a room that it names."""
    text = slots_of(name)["Change"]
    file_names = re.findall(r"[\w/]+\.py", text)
    files = [FILES[name]]
    for file in file_names:
        beside = FILES[name].parent / file
        files.append(beside if beside.exists() else ROOT / file)
        assert files[-1].exists(), f"{name}: there is no {file}"
    for room in re.findall(r"\b(\w+)/(?!\w)", text):
        files += (ROOT / room).glob("*.py")
    identifiers = list(identifiers_in(re.sub(r"[\w/]+\.py|\b\w+/", "", text)))
    assert file_names or identifiers, f"{name}: Change names nothing: {text}"
    for identifier in identifiers:
        assert stands_in(identifier, files), f"{name}: there is no {identifier}"


def test_no_line_is_too_long():
    files = [*FILES.values(), *(ROOT / "tests").rglob("*.py"), ROOT / "bench/gpu.sh"]
    files.append(ROOT / ".ci/run")
    too_long = [
        f"{file.relative_to(ROOT)}:{number}" for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1) if len(line) > 100]
    assert not too_long, f"lines over 100 columns: {too_long}"


# -- 5

DEMOS = [
    module for module, path in MODULES.items() if '__name__ == "__main__"' in path.read_text()
    and module not in PROGRAMS and module != "bench.official"  # which needs the official code
]
ARGUMENTS = {"bench.__main__": ["--help"]}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # by the tests
@pytest.mark.parametrize("module", DEMOS)
def test_demos_run(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # some draw a picture into the folder where they run
    monkeypatch.setattr(sys, "argv", [module, *ARGUMENTS.get(module, [])])
    runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().out.strip()


# -- 6
#
# A line such as
#
#     x = torch.cat([cls, patches], 1)  # (B, N, D)
#
# promises that x has three dimensions, and that letters mean the same size wherever they occur in
# one call of the function. To check that, small networks and losses are run under sys.settrace:
# Python then calls a function of ours at every line that is about to run, and hands it the local
# variables. When the line after a commented assignment comes, its value is there and is compared.

SHAPE = re.compile(r"#\s*\(([^()]*)\)")

TRACED = [
    "vit.py", "heads.py", "losses.py", "augment.py", "backbones/classifier.py",
    "evaluation/extract.py", "evaluation/knn.py", "evaluation/linear.py",
    "evaluation/logreg.py", "evaluation/protocol.py", "evaluation/retrieval.py",
    "evaluation/copies.py", "evaluation/video.py", "evaluation/contours.py",
    "evaluation/masks.py", "evaluation/patches.py", "evaluation/segment.py",
    "evaluation/depth.py", "backbones/dense_heads.py", "backbones/depth_heads.py"]


def commented_assignments(name):
    """Every line of a commented assignment -> (its first line, what it binds, the shape)."""
    source = FILES[name].read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        match = SHAPE.search(lines[node.end_lineno - 1])
        if match:
            letters = [letter.strip() for letter in match[1].split(",") if letter.strip()]
            statement = (node.lineno, node.targets[0].id, letters)
            for line in range(node.lineno, node.end_lineno + 1):
                found[line] = statement
    return found


def agrees(shape, letters, known, local):
    """Whether a shape fits its comment.

    A letter that is also a local integer of the function means that integer. Another letter is
    bound to the size that it has where it is first seen, which `known` keeps for the rest of the
    call. Products and sums are evaluated where all of their letters are known.
    """
    integers = {name: value for name, value in local.items() if type(value) is int}
    if len(shape) != len(letters):
        return False
    for size, letter in zip(shape, letters):
        if letter.isidentifier():
            if integers.get(letter, known.setdefault(letter, size)) != size:
                return False
        else:
            try:  # arithmetic over letters, in comments of our own
                if eval(letter, {}, {**known, **integers}) != size:
                    return False
            except (NameError, SyntaxError):
                pass  # a letter that nothing in this function says the size of
    return True


class Tracer:
    """For sys.settrace: compares each commented assignment with its comment when it has run."""

    def __init__(self, names):
        self.comments = {str(FILES[name]): commented_assignments(name) for name in names}
        self.checked = set()
        self.wrong = []

    def __call__(self, frame, event, arg):
        """Called when a function is entered; returns what is called at each of its lines."""
        comments = self.comments.get(frame.f_code.co_filename)
        if not comments:
            return None  # not one of the files, so its lines are not watched
        running = None  # the commented assignment that is running
        known = {}  # the letters of this call

        def at_line(frame, event, arg):
            nonlocal running
            # An assignment over several lines has run when another statement begins, or the
            # function returns.
            statement = comments.get(frame.f_lineno) if event == "line" else None
            if running and statement != running:
                self.compare(frame, running, known)
            running = statement
            return at_line

        return at_line

    def compare(self, frame, statement, known):
        line, name, letters = statement
        value = frame.f_locals.get(name)
        if torch.is_tensor(value):
            self.checked.add((frame.f_code.co_filename, line))
            if not agrees(value.shape, letters, known, frame.f_locals):
                where = f"{Path(frame.f_code.co_filename).name}:{line}"
                self.wrong.append((where, name, letters, tuple(value.shape)))


def run_the_network():
    from training.warmstart import inflate
    from vit import resize_pos_embed

    model = VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=1, num_register_tokens=2,
                              mask_token=True, drop_path_rate=0.5)
    images = torch.randn(3, 3, 24, 32)
    views = [images, torch.randn(5, 3, 16, 16)]
    model(views, plan=model.draw_plan(views, torch.Generator()))
    model(images, torch.zeros(3, 12, dtype=torch.bool))
    model.get_attention(images)
    model.get_intermediate_layers(images, 1, reshape=True)
    for channels in (1, 6):
        inflate(model.patch_embed.proj.weight, channels)
    resize_pos_embed(model.pos_embed, (3, 5), "antialias")
    return model


def run_head_and_losses():
    import losses
    from heads import DINOHead

    head = DINOHead(64, 10, 8, 6)
    logits = head(torch.randn(6, 64)).view(3, 2, 10)
    centering = losses.EMACenter(10)
    centering.update(logits)
    targets = losses.make_targets(logits[:2], 0.1, centering(logits, 0.1))
    losses.view_pair_loss(targets, logits)
    losses.entropies(targets)
    losses.SinkhornKnopp(10)(logits, 0.1)
    losses.NoCenter(10)(logits, 0.1)
    losses.patch_loss(targets[0], logits[0], torch.ones(2), 2)
    losses.koleo_loss(torch.randn(4, 6))


def run_augmentation():
    from augment import Masking, MultiCrop, photometry

    Masking((4, 3))(4, 0)
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    sample = MultiCrop(32, 16, 2, 2)(image, np.random.default_rng(0))
    params = sample["photometry"].clone()
    params[:, 0], params[:, 5:] = 3, 1  # every operation is drawn
    photometry(sample["global_crops"], params[:2])


def run_evaluations(model):
    from backbones.classifier import Blocks, kinds_of_input, released_head
    from evaluation.copies import Descriptor, Whitening
    from evaluation.extract import extract
    from evaluation.knn import knn_accuracy
    from evaluation.linear import Probes
    from evaluation.logreg import Logistic
    from evaluation.protocol import random_crops
    from evaluation.retrieval import Scales
    from evaluation.video import follow, judge, patch_features
    from images.data import open_images

    process = Process(torch.device("cpu"))
    images = open_images("shapes:4")
    knn_accuracy(torch.randn(9, 4), [0, 1, 2] * 3, torch.randn(4, 4), [0, 1, 2, 0], (3,))
    rows, labels = torch.randn(8, 20), torch.arange(8) % 3
    kinds = kinds_of_input(4, (1, 4), (False, True))
    Probes(kinds, 3, (0.1, 0.2)).step(rows, labels)
    released_head({"linear.weight": rows[:, :8], "linear.bias": rows[:, 0]}, 4)
    Logistic(rows, labels, 3).fit(1.0)
    Whitening(rows)(rows)
    for reading in (Blocks(model, 2), Descriptor(model), Scales(model)):
        extract(reading, images, 32, process)
    next(random_crops(images, 32, 2, 2, process))

    model.channel_stats = images.channel_stats
    extractor = SimpleNamespace(model=model, size=32, process=process,
                                config=SimpleNamespace(precision="fp32"))
    features = [patch_features(extractor, images.read(i)) for i in range(2)]
    mask = torch.ones(64, 64, dtype=torch.uint8)
    masks = list(follow(features, {0: mask}, 2))
    judge(masks[1], mask, mask, [1])


def run_dense_evaluations(model):
    from evaluation import depth, masks, segment
    from evaluation.patches import patch_knn
    from images.pairs import DEPTHS, MASKS, open_pairs, read_depth, read_mask

    process = Process(torch.device("cpu"))
    pairs = open_pairs(MASKS, "shapes:3", read_mask)
    config = segment.Config(steps=1, head_batch=2)
    segmenter = segment.train_segmenter(model, pairs, 11, 32, config, process)
    predicted = segment.segment(segmenter, pairs[0][0], pairs.channel_stats, 32, config,
                                process)
    segment.scores(segment.confusion(pairs[0][1], predicted, 11))
    patch_knn(model, pairs, pairs, 11, 32, process)
    masks.judge(model, pairs, 32, masks.Config(), process)

    pairs = open_pairs(DEPTHS, "shapes:3", read_depth)
    for head in ("linear4", "dpt"):
        config = depth.Config(steps=1, head_batch=2, depth_head=head)
        depther = depth.Depther(model, head)
        depth.train_head(depther, pairs, 32, config, process)
        depth.metres_of(depther.eval(), pairs[0][0], pairs.channel_stats, 32, config, process)


def test_shape_comments_are_true():
    tracer = Tracer(TRACED)
    sys.settrace(tracer)
    try:
        model = run_the_network()
        run_head_and_losses()
        run_augmentation()
        run_evaluations(model)
        run_dense_evaluations(model)
    finally:
        sys.settrace(None)
    assert not tracer.wrong, tracer.wrong
    promised = {(str(FILES[name]), statement[0])
                for name in TRACED
                for statement in commented_assignments(name).values()}
    not_run = sorted(f"{Path(file).name}:{line}" for file, line in promised - tracer.checked)
    assert len(not_run) <= 0.2 * len(promised), f"of {len(promised)} not run: {not_run}"
