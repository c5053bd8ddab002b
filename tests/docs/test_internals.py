"""What docs/internals and docs/decisions say of the package is true: what they name exists, and the map is complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flask_executor

ROOT = Path(__file__).parents[2]
PACKAGE = Path(flask_executor.__file__).parent
INTERNALS = ROOT / "docs" / "internals"
PAGES = sorted([*INTERNALS.glob("*.rst"), *(ROOT / "docs" / "decisions").glob("*.rst")])
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
WORDS = set(re.findall(r"\w+", "\n".join(SOURCES.values())))

FILE = re.compile(r"[\w/]+\.(py|rst|html|css|js|cfg|toml)")
NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")
#: A file whose folder the sentence names before it.
FILES_WITHOUT_FOLDER = {"macros.html"}
#: Names that are the tests', parts of a name, or made from an executor's name.
OTHER_NAMES = {"REPORTS_EXECUTOR_...", "SHARED_STORES", "TYPES", "error_"}


def literals(text: str) -> Iterator[str]:
    """What stands in double backquotes."""
    for literal in re.findall(r"``(.+?)``", text, re.DOTALL):
        yield " ".join(literal.split())


def literals_of(page: Path) -> set[str]:
    """Those of a page, without the names of before in the glossary."""
    return set(literals(page.read_text().split("Old word, new word\n")[0]))


@pytest.fixture(params=PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_every_module_is_in_the_map_once() -> None:
    text = (INTERNALS / "index.rst").read_text().split("\nThe map\n")[1].split("\nDiagrams ")[0]
    rows = re.findall(r"^    \* - ``(\S+\.py)``$", text, re.MULTILINE)
    with_code = [
        module
        for module, source in SOURCES.items()
        if not module.endswith("__init__.py") or re.search(r"^(class|def) ", source, re.MULTILINE)
    ]
    assert sorted(rows) == sorted(with_code)


def test_every_thread_and_process_with_a_name_is_in_the_tables() -> None:
    in_tables = {
        name for name in literals_of(INTERNALS / "threads-and-wires.rst") if name.startswith("flask-executor-")
    }
    given = re.compile(r'(?:\bname ?= ?|SerialThread\(\s*)"(flask-executor-[\w-]+)"')
    assert in_tables == {name for source in SOURCES.values() for name in given.findall(source)}


def test_files_that_are_named_exist(page: Path) -> None:
    files = {literal for literal in literals_of(page) if FILE.fullmatch(literal)}
    missing = {file for file in files if not ((ROOT / file).exists() or (PACKAGE / file).exists())}
    assert missing <= FILES_WITHOUT_FOLDER


def test_names_that_are_used_exist(page: Path) -> None:
    names = {literal for literal in literals_of(page) if NAME.fullmatch(literal) and not FILE.fullmatch(literal)}
    unknown = {name for name in names if not set(re.findall(r"\w+", name)) <= WORDS}
    assert unknown <= OTHER_NAMES


def test_modules_that_have_moved_are_where_the_glossary_says() -> None:
    table = (INTERNALS / "glossary.rst").read_text().split("Old module, new module\n")[1]
    now = {name for row in re.findall(r"^      - (.+)$", table, re.MULTILINE) for name in literals(row)}
    assert now <= set(SOURCES)
