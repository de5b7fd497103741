"""The house as its pages draw it: every folder says what it is and names its modules, README shows every folder."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sklformat"
ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def modules(room):
    """Names of a room's modules and of the rooms inside it."""
    files = {path.stem for path in room.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in room.glob("*/__init__.py")}


def name_of(room):
    return room.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_a_room_says_what_it_is_and_what_is_in_it(room):
    """Its ``__init__`` opens with one sentence, and has a line for each module and for no other."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    sentence, _, rest = text.partition("\n\n")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    lines = [re.fullmatch(r"(\w+)  +(\S.*[^.])", line) for line in rest.splitlines()]
    assert all(lines), f"{name_of(room)}: lines must be 'module  what it does'"
    assert sorted(modules(room)) == [line[1] for line in lines]


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_a_room_is_seen_at_one_look(room):
    """At most twelve modules, none over 400 lines, none with its folder's name."""
    assert len(modules(room)) <= 12
    assert room.name not in modules(room)
    assert {} == {path.name: n for path in room.glob("*.py") if (n := len(path.read_text().splitlines())) > 400}


def test_the_top_holds_ground_and_doors_only():
    """Beside the rooms stand the ground floor, the sampler and the command line; everything else is in a room."""
    alone = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert {"check", "checksums", "cli", "deprecations", "errors", "flags", "progress", "sampler"} == alone


def test_readme_shows_every_folder():
    """README's tree has a line for each folder of the package, indented by its depth, and for the other top folders."""
    tree = (ROOT / "README.md").read_text().split("## Where things are", 1)[1].split("```")[1]
    path, shown = [], []
    for line in tree.strip("\n").splitlines():
        indent, name = re.match(r"( *)([\w.]+)/  +\S", line).groups()
        path[len(indent) // 2 :] = [name]
        shown.append("/".join(path))
    expected = {"csrc", "sklformat", "tests", "benchmarks"} | {f"sklformat/{name_of(room)}" for room in ROOMS}
    expected |= {"docs"} if (ROOT / "docs").exists() else set()
    assert len(shown) == len(set(shown))
    assert expected == set(shown)
    assert len(shown) <= 32


def test_every_make_target_that_is_named_is_there():
    """What pages, the workflow and the Makefile's own head tell people to make has its rule, and is in the head."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    pages = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    told = {
        target
        for page in pages
        for target in re.findall(r"(?:^|[`#]) ?make ([a-z]+)\b", page.read_text(), re.MULTILINE)
    }
    (listed,) = re.findall(r"target: \[(.*)\]", (ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert {"test", "ports", "wheel"} <= set(listed.split(", ")) <= targets
    assert {"demo", "test", "ports", "wheel"} <= told <= targets
    head = set(re.findall(r"^# make (\w+)  ", makefile, re.MULTILINE))
    assert targets - {"ctest", "lint", "pytest", "sanitized"} == head
