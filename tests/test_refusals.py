"""
Each refusal of the package is said in one place, and named by a test.

A refusal is what an exception, a Problem or a reason of C says.  It is named where a string of a test, such as that of
``pytest.raises(match=...)``, holds some of its words in a row that no other refusal has, or all of its parts in order.
"""

import ast
import collections
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sklformat"
WORDS = 16
"""Characters in a row that make a name."""

# Functions that put what they are told into an exception, and functions that return what one is to say.
SPEAKERS = {"corrupt", "_corrupt", "_damaged", "unsupported"}
TELLERS = {
    "describe_mismatch",
    "describe_stranger",
    "find_fault",
    "_value_fault",
    "_name_fault",
    "describe_bad_json",
    "_too_short",
}

# What is said elsewhere and handed on there, perhaps with the place where it happened.
HANDED_ON = {
    "cache/reader.py": ["fault", "f'{self.path}: sequence {i}: {error}'"],
    "cache/report.py": ["error.message", "f'{error.section}: {error.message}'"],
    "cache/tokens.py": ["f'sequence {number}: {error}'"],
    "cache/writer.py": ["f'{self.path}: sequence {number}: {error}'"],
    "capture/scribe.py": ["f'sequence {frame.tag}: {error}'"],
    "capture/session.py": ["self._error"],
    "distill/demo/processes.py": ["text"],
    "distill/engines/feed.py": ["arrived.reason"],
    "distill/models/loading.py": ["f'{path}: {error}'"],
    "distill/models/outputs.py": ["name"],
    "distill/student/measures/advice.py": ["f'{name}: {error}'"],
    "distill/student/measures/evaluation.py": ["f'{path}: {error}'"],
    "distill/student/measures/showing.py": ["f'{student}: {error}'"],
    "distill/text/chats.py": ["f'{chat.place}: {error}'"],
    "distill/text/ragged.py": ["str(error)"],
    "distill/text/sources/json_rows.py": ["_CUT_SHORT"],
    "distill/text/sources/rows.py": ["f'{file.path}: {error}'"],
    "files/arrow.py": ["f'{kind}: {error}'"],
    "files/disk.py": ["error.strerror"],
    "files/regular.py": ["f'{reason}; {advice}'", "reason"],
    "flags.py": ["_one_line(complaint.getvalue(), config_type.__name__)"],
    "format/block.py": ["f'{error} (vocab_size {header.vocab_size}, rounds {header.rounds})'", "fault"],
    "format/header.py": ["str(error)"],
    "format/index.py": ["message"],
    "interop/columns.py": ["str(error)"],
    "interop/conversion.py": ["f'sequence {self._next}: {error}'"],
    "interop/neighbours/distillkit.py": ["str(error)"],
    "interop/sources.py": ["row.reason"],
    "interop/tables/npz.py": ["f'npz: {error}'"],
    "interop/tables/parquet.py": ["f'{kind} table: {error}'"],
    "interop/checks.py": ["fault"],
    "views/serving.py": ["error.strerror"],
    "native/batches.py": ["int(row[0])"],
}


class Refusal(NamedTuple):
    """Where it is, and the constant parts of what it says, without what is filled in."""

    module: str
    line: int
    parts: tuple[str, ...]

    def __str__(self):
        return f"sklformat/{self.module}:{self.line}: {' … '.join(self.parts)!r}"

    def windows(self):
        """All of its words in a row that are long enough for a name."""
        return {part[i : i + WORDS] for part in self.parts for i in range(len(part) - WORDS + 1)}

    def pattern(self):
        return re.compile(".+?".join(map(re.escape, self.parts)), re.DOTALL)


def alternatives(node):
    """The expressions that a message may be."""
    return [*alternatives(node.body), *alternatives(node.orelse)] if isinstance(node, ast.IfExp) else [node]


def parts_of(node):
    """The constant parts of a string, or None where the expression is no string of its own."""
    match node:
        case ast.Constant(value=str()):
            return (node.value,)
        case ast.JoinedStr():
            parts = "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            return tuple(part for part in parts.split("\0") if part)
        case ast.BinOp(op=ast.Add()):
            return (*(parts_of(node.left) or ()), *(parts_of(node.right) or ()))
    return None


def messages(tree):
    """The expression of everything that a module says to refuse something."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *more]):
                if name == "Problem":
                    yield more[1]
                elif name.endswith("Error") and name != "AssertionError":  # which is a fault of our own
                    yield more[0] if more and "errno" in ast.unparse(first) else first
                elif name in SPEAKERS:
                    yield from (arg for arg in (first, *more) if isinstance(arg, ast.Constant | ast.JoinedStr))
            case ast.FunctionDef(name=name) if name in TELLERS:
                returned = [told.value for told in ast.walk(node) if isinstance(told, ast.Return)]
                yield from (value for value in returned if isinstance(value, ast.JoinedStr | ast.IfExp))
            case ast.AnnAssign(target=ast.Name(id="_REASONS"), value=ast.Dict(values=reasons)):
                for reason in reasons:
                    yield ast.copy_location(ast.parse(f"f{reason.value!r}", mode="eval").body, reason)


def find_refusals():
    """All refusals, and by module the expressions that are handed on."""
    found, handed_on = [], collections.defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        for message in messages(ast.parse(path.read_text("utf-8"))):
            for node in alternatives(message):
                text, parts = ast.unparse(node), parts_of(node)
                if text.partition("(")[0].rpartition(".")[2] in TELLERS:
                    continue
                if parts is None or text in HANDED_ON.get(module, ()):
                    handed_on[module].add(text)
                else:
                    found.append(Refusal(module, node.lineno, parts))
    return found, {module: sorted(texts) for module, texts in handed_on.items()}


def find_names():
    """The strings of all tests, docstrings aside, as a pattern of theirs would meet them."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        spoken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
                yield re.sub(r"\\(.)", r"\1", node.value)


def find_faults(refusals, names):
    """One line for each refusal that is said twice, and for each that nothing names."""
    same = collections.defaultdict(list)
    for refusal in refusals:
        same[refusal.parts].append(refusal)
    for places in same.values():
        if len(places) > 1:
            yield f"said {len(places)} times: {'; '.join(map(str, places))}"
    first = [places[0] for places in same.values()]
    spoken = collections.Counter(window for refusal in first for window in refusal.windows())
    met = {name[i : i + WORDS] for name in names for i in range(len(name) - WORDS + 1)}
    for refusal in first:
        if not any(spoken[window] == 1 and window in met for window in refusal.windows()):
            others = [other.pattern() for other in first if len("".join(other.parts)) > len("".join(refusal.parts))]
            whole = filter(refusal.pattern().search, names)
            if not any(not any(other.search(name) for other in others) for name in whole):
                yield f"no test names {refusal}"


def test_each_refusal_is_said_once_and_named():
    """A new refusal that no test names fails here, with its place, and so does one that stands in two places."""
    refusals, _ = find_refusals()
    assert 400 < len(refusals)
    faults = list(find_faults(refusals, list(find_names())))
    assert [] == faults, "\n".join(faults)


def test_what_is_handed_on_is_listed():
    """What has no words of its own is listed above, and everything that is listed there is there."""
    source = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    assert [] == [name for name in SPEAKERS | TELLERS if f"def {name}(" not in source]
    assert {module: sorted(texts) for module, texts in HANDED_ON.items()} == find_refusals()[1]


@pytest.mark.parametrize(
    ("module", "names", "faults"),
    [
        ("raise ValueError('the disk is full of eels')", ["the disk is full of eels"], []),
        ("raise ValueError(f'{path}: the disk is full of {what}')", ["the disk is full of 3 eels"], []),
        ("raise ValueError('the disk is full of eels')", ["the disk"], ["no test names sklformat/planted.py:1: "]),
        ("raise ValueError(f'{name} is {value}')", ["eels is 7"], []),
        (
            "e = KeyError(f'{name} is {value}')\nraise ValueError('eels is 7 of 7 things')",
            ["is 7 of 7 things"],
            ["no test"],
        ),
        (
            "raise OSError(e.errno, 'no eels' if eels else 'a disk full of eels')",
            ["a disk full of ee"],
            ["no test names"],
        ),
        (
            "def f():\n  raise ValueError('a disk full of eels')\nTypeError('a disk full of eels')",
            ["a disk full of eels"],
            ["said"],
        ),
        ("_REASONS: dict = {1: 'position {position}: an eel'}", ["position 7: an eel"], []),
    ],
)
def test_a_planted_refusal_is_found(module, names, faults):
    """The test sees what it is made for, also where only a longer refusal is named."""
    planted = [
        Refusal("planted.py", node.lineno, parts_of(node))
        for message in messages(ast.parse(module))
        for node in alternatives(message)
    ]
    found = list(find_faults(planted, names))
    assert len(faults) == len(found), found
    assert all(line.startswith(fault) for line, fault in zip(found, faults, strict=True)), found
