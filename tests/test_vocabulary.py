"""One word for one thing: words that were given up occur nowhere, and the architecture's page knows every file."""

import ast
import re
from pathlib import Path

import pytest

import lightning_ief
from tests.test_architecture import FLOORS

PACKAGE = Path(lightning_ief.__file__).parent
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
MOST_TERMS = 15

GIVEN_UP = {
    # what was given up, a regular expression of whole words: what is said instead
    r"RowCombination": "Direction",
    r"(ef|ief|natural_gradient)_rows": "the direction itself, which is not formed",
    r"[Pp]ush-?forwards?": "J_z·d, jvps",
    r"_SHORTCUTS|shortcuts?": "a rule of forward mode",
    r"fused (rules?|forward mode)|by_fused_forward_mode|fused_verified": "rules of forward mode, capture/jvp.py",
    r"named_direction": "directions.registry.find",
    r"_?agreed": "the deviation from J d, and its tolerance",
    r"_nothing|_no_loss": "where(isfinite(losses), s, nan)",
    r"_?within_range": "normalised, linalg/scaling.py",
    r"graph_nodes": "survey",
    r"CallPlan|LoggedCall": "Call",
    r"front door": "linearize, across",
    r"(rows|position|plan|fused)\.py|capture/forward(\.py)?": "the files of today, docs/architecture.md",
    r"lightning_ief\.(cli|comparison|evaluation|rows|position|precision)": "lightning_ief.experiments, .training",
    r"[Pp]er-example|[Mm]ini-?batch(es)?": "per-sample, batch or micro-batch",
    r"[Dd]ampening|[Rr]idge|Tikhonov": "damping",
    r"[Kk]ernel matrix|NTK": "Gram matrix",
    r"angles(?!=)": "cosines",  # the argument of matplotlib stays
}


def given_up(text: str) -> list[str]:
    """The given-up words that a text contains, each with what is said instead."""
    found = []
    for words, instead in GIVEN_UP.items():
        for match in re.finditer(rf"(?<!\w)(?:{words})(?!\w)", text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"line {line}: '{match.group()}' was given up for {instead}")
    return found


def section(title: str) -> str:
    """The text of one section of the architecture's page."""
    (_, text) = ARCHITECTURE.read_text(encoding="utf-8").split(f"\n## {title}\n")
    return text.split("\n## ")[0]


def private_parts(source: str) -> set[str]:
    """Private attributes, and private names and modules of other packages, that a file names."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.Import):
            names += [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(PACKAGE.name):
            names += [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def own_names(source: str) -> set[str]:
    """Names that a file defines or assigns, as variables or as attributes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def unlisted(sources: dict[str, str], table: list[list[str]]) -> list[str]:
    """Private parts of others that no row of the table names beside their file or its folder."""
    found = []
    own = {"_replace"}.union(*map(own_names, sources.values()))  # that of a NamedTuple is documented
    for file, source in sources.items():
        places = f"`{file}`", f"`{file.split('/')[0]}/`"
        for name in sorted(private_parts(source) - own):
            cells = [cell for part, cell in table if re.search(rf"(?<!\w){name}(?!\w)", part)]
            if not any(place in cell for cell in cells for place in places):
                found.append(f"{file}: {name}")
    return found


def rows(table: str) -> list[list[str]]:
    """Cells of the rows of the only table of a text, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


# In the package, comments and names are held to it as well as docstrings and messages: all of a file is text here.
@pytest.mark.parametrize("path", [*sorted(PACKAGE.rglob("*.py")), *PAGES], ids=lambda path: path.name)
def test_no_word_that_was_given_up(path):
    assert given_up(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "A RowCombination of rows.",
        "see `ief_rows`",
        "The front door.",
        "raise ValueError(f'{name} has no pushforward')",
        "stands in capture/fused.py",
        "stands in `lightning_ief/position.py`",
        "from lightning_ief.cli import main",
        "from the mini-batches",
        "each agreed.",
        "angles between directions",
    ],
)
def test_a_planted_word_is_found(text):
    (found,) = given_up(f"first line\n{text}\n")
    assert found.startswith("line 2: ")


@pytest.mark.parametrize(
    "text", ["refused", "push_forward", "a fused kernel", "capture/jvp.py", "experiments.tables", "x, angles=y"]
)
def test_other_words_pass(text):
    assert given_up(text) == []


def test_the_glossary_is_short_and_explains_every_term():
    terms = rows(section("Glossary"))
    assert 10 <= len(terms) <= MOST_TERMS
    assert len({term for term, _, _ in terms}) == len(terms)
    assert all(explanation.endswith(".") for *_, explanation in terms)


def test_the_code_uses_the_terms_of_the_glossary():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")).lower()
    assert [term for term, *_ in rows(section("Glossary")) if term.lower() not in text] == []


def test_the_table_of_files_is_that_of_the_package():
    named = [file.strip("`") for _, file, _ in rows(section("The files"))]
    there = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert len({*named}) == len(named)
    assert {*named} == there, "docs/architecture.md, 'The files': one row for each file of the package"


def test_the_table_of_files_knows_their_floors():
    for floor, file, _ in rows(section("The files")):
        assert int(floor) == FLOORS[file.strip("`").removesuffix(".py").split("/")[0]], file


def test_files_that_pages_name_exist():
    for path in PAGES:
        for name in re.findall(r"`((?:[\w.]+/)+[\w.]+\.py)`", path.read_text(encoding="utf-8")):
            assert any((root / name).is_file() for root in (ROOT, PACKAGE)), f"{path.name}: {name}"


def test_the_table_of_private_parts_is_that_of_the_package():
    table = rows(section("Private parts of others"))
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    del sources["training/lightning_internals.py"]  # a list itself
    assert unlisted(sources, table) == []
    named = {name for part, _ in table for name in re.findall(r"(?<!\w)_[a-z]\w*", part)}
    text = "\n".join(sources.values())
    assert [name for name in sorted(named) if not re.search(rf"(?<!\w){name}(?!\w)", text)] == []


def test_a_planted_private_part_is_found():
    table = [["`Tensor._base`", "`capture/recorder.py`"], ["`torch.utils._pytree`", "`capture/`"]]
    planted = {
        "capture/recorder.py": "from torch.utils import _pytree\nx._base, x._based, self._own",
        "module.py": "import torch._dynamo\nself._own = trainer.loop._base\ndef _f(): pass\n_f(), found._replace(a=1)",
    }
    assert unlisted(planted, table) == ["capture/recorder.py: _based", "module.py: _base", "module.py: _dynamo"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_init_files_hold_no_code(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert all(isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)) for node in body)


@pytest.mark.parametrize("folder", ["capture", "distributed"])
def test_the_reading_order_of_a_folder_names_files_that_are_there(folder):
    docstring = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")))
    named = re.findall(r"`(\w+)`\s\(", docstring)
    assert {*named} == {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
