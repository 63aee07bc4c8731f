"""Claims: what the code cites, and what the pages of terms name, can be looked up.
1. Every place of a paper that code, tests or docs cite, such as "DINO eq. 3", has a row in
   docs/references.md; so has every "Author year".
2. Citations are written in one way.
3. Every file and name in docs/references.md and in docs/glossary.md exists.
4. The terms of the glossary are sorted, and each is explained in one or two sentences.
"""

import ast
import functools
import io
import re
import tokenize

import pytest
from test_docs import DOCS, FILES, ROOT, stands_in

REFERENCES = (ROOT / "docs/references.md").read_text()
GLOSSARY = (ROOT / "docs/glossary.md").read_text()

# A place is a word and one or several items: "sec. 3.1", "eq. 1-4", "fig. 1, 3 and 4".
ITEM = r"(?:[A-H](?:\.\d+)*|\d+(?:\.\d+)*)\b"
PLACE = re.compile(
    rf"\b(sec\.|eq\.|fig\.|table|Alg\.|appendix) ({ITEM}(?:(?:, | and |-){ITEM})*)")
SURNAME = r"(?:van der )?[A-Z][a-z]+(?:-[A-Z][a-z]+)?"
AUTHOR = re.compile(rf"({SURNAME})(?: and {SURNAME}| et al\.)?,? \(?((?:19|20)\d\d)\b(?!-)")
NOT_AUTHORS = {"November", "October", "Nov"}


def table_rows(text):
    """The cells of every row of the tables of a page, without headers and rulers."""
    rows = re.findall(r"^\|(.+)\|$", text, re.M)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    return [
        row for row in cells
        if row[0] not in ("place", "cited as", "term") and not row[0].startswith("---")]


def items_of(text):
    """"1, 3 and 4" -> 1, 3, 4; "1-4" -> 1, 2, 3, 4; "F.1" -> F.1."""
    for part in re.split(r", | and ", text):
        first, _, last = part.partition("-")
        if last:
            yield from map(str, range(int(first), int(last) + 1))
        else:
            yield first


def places_of(text):
    """Every place in a text, one at a time: ("eq.", "3")."""
    for word, items in PLACE.findall(text):
        yield from ((word, item) for item in items_of(items))


def known_works():
    """Each short name, such as "DINO", and each "Author year" -> the places that have a row."""
    works = {}
    for section in re.split(r"^## ", REFERENCES, flags=re.M)[1:]:
        heading = re.match(r"(\S+) \((.+)\)\n", section)
        if heading:  # a paper with a table of its own
            places = {place for row in table_rows(section) for place in places_of(row[0])}
            works |= {heading[1]: places, heading[2]: places}
        else:  # the works in a single table
            for row in table_rows(section):
                names = row[0].split(", ")
                works |= dict.fromkeys(names, set(places_of(row[2])))
    works["registers"] = works["Registers"]
    return works


WORKS = known_works()


def prose_of_code(path):
    """The docstrings of a file, and its comments; lines of comment below each other are one."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if docstring := ast.get_docstring(node):
                yield from docstring.split("\n\n")
    block, last_line = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last_line + 1:
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last_line = token.start[0]
    yield " ".join(block)


@functools.cache
def paragraphs():
    """(name of the file, a paragraph of prose in one line) of all code, tests and docs."""
    return tuple(found_paragraphs())


def found_paragraphs():
    for path in [*FILES.values(), *(ROOT / "tests").rglob("test_*.py")]:
        if path.name != "test_references.py":  # whose examples are made up
            yield from ((path.name, " ".join(text.split())) for text in prose_of_code(path))
    for doc in DOCS:
        if doc.name != "references.md":
            for text in re.split(r"\n\n|\n(?=\|)|\n(?=- )", doc.read_text()):
                yield doc.name, " ".join(text.split())


def citations(text):
    """(the work that was named last before it, place) for each place in a paragraph."""
    names = "|".join(re.escape(name) for name in sorted(WORKS, key=len, reverse=True))
    token = re.compile(rf"(?<![\w-])({names})(?![\w-])|{PLACE.pattern}")
    work = None
    for match in token.finditer(text):
        if match[1]:
            work = match[1]
        else:
            for item in items_of(match[3]):
                yield work, (match[2], item)


# -- 1


def test_every_citation_has_a_row():
    checked, missing = 0, []
    for where, text in paragraphs():
        for work, place in citations(text):
            checked += 1
            if work is None or place not in WORKS[work]:
                missing.append(f"{where}: {work} {' '.join(place)}: {text[:80]}")
    assert checked > 120
    assert not missing, "\n".join(missing)


def test_every_author_and_year_has_a_row():
    known = {(match[1], match[2]) for name in WORKS for match in [AUTHOR.match(name)] if match}
    missing = {(where, *match)
               for where, text in paragraphs()
               for match in AUTHOR.findall(text)
               if match not in known and match[0] not in NOT_AUTHORS}
    assert not missing, missing


# -- 2

OTHER_SPELLINGS = (
    r"\b(?:DINO|iBOT|DINOv2) \(?(?:[A-H]\b|\d+\.\d)",  # DINO A, iBOT 4.1, DINO (4.2.2)
    r"\b[Ff]igure \d|\b[Ee]quation \d|\b[Ss]ection \d|\bTable \d|\b[Aa]lgorithm \d|\bApp\. ",
    r"\b(?:Sec|Eq|Fig)\. \d|\balg\. \d|§|\bAppendix [A-H]\b")


def test_citations_are_written_in_one_way():
    found = [
        f"{where}: {match[0]}" for where, text in paragraphs() for pattern in OTHER_SPELLINGS
        for match in re.finditer(pattern, text)]
    assert not found, found


# -- 3


def missing_places(cell):
    """What a cell such as "`vit.py`: `Block` `Mlp`; `augment.py`" names and is not there."""
    file = None
    for word in re.findall(r"`([^`]+)`", cell):
        if re.fullmatch(r"[\w/]+\.(py|md)", word):
            file = ROOT / word
            if not file.exists():
                yield word
        elif file is None or not file.exists() or not stands_in(word, [file]):
            yield word


@pytest.mark.parametrize("text", [REFERENCES, GLOSSARY], ids=["references", "glossary"])
def test_what_the_rows_name_exists(text):
    rows = table_rows(text)
    assert len(rows) > 50
    for row in rows:
        assert re.search(r"`[\w/]+\.(py|md)`", row[-1]), f"{row[0]}: names no file"
        assert not list(missing_places(row[-1])), f"{row[0]}: {list(missing_places(row[-1]))}"


# -- 4


def test_the_glossary_is_a_sorted_list_of_short_answers():
    rows = table_rows(GLOSSARY)
    terms = [row[0] for row in rows]
    assert len(terms) >= 60
    assert terms == sorted(terms, key=str.casefold)
    assert len(set(terms)) == len(terms)
    for term, meaning, _ in rows:
        sentences = re.findall(r"[.?!](?= [A-Z]|$)", meaning)
        assert 1 <= len(sentences) <= 2 and len(meaning) > 30, f"{term}: {meaning}"
