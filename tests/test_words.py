"""
The words that users read are plain English: a short list of phrases that this project once used does not come back.

Looked at are the pages and, in modules, every string, docstring and comment: help, progress and errors are made of
them.
"""

import ast
import io
import re
import tokenize
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "SPEC.md", "CHANGELOG.md", "docs/*.md", "benchmarks/RESULTS.md", "Makefile"]
MODULES = ["sklformat/**/*.py", "docs/recipes/*.py", "benchmarks/*.py"]

_COUNTED = (
    r"bytes|bits|nats|records|pairs|draws|rounds|tokens|ids|positions|sequences|rows|calls|lines|steps|values|times"
    r"|micro-batches|products|documents|seconds|cycles|[kMG]i?B|ns|µs|ms"
)
_UNIT = (
    r"position|token|record|sequence|document|row|line|batch|micro-batch|step|block|chunk|shard|file|second|minute"
    r"|core|GPU|rank|call|method|function|column|value|entry|flag|job|process|question|turn|run"
)
_NOUN = r"(?!(of|in|or|and|with|to|for|as|from|on|at|is|has|that)\b)[\w-]+"
# What not to write, and what to write instead.  A space stands for any white space, also at the end of a line.
PHRASES = {
    r"\b(go|goes|going|gone|went) on\b": "resume, continue",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bleft alone\b": "skip, keep",
    r"\banew\b": "again, from the start",
    rf"\b({_COUNTED})( on disk)? an? ({_UNIT})\b(?! time)": "per",
    rf"\bone( {_NOUN}){{,2}} an? ({_UNIT})\b(?! time)": "per",
    rf"\A\x20an?\x20({_UNIT})\b(?! time)": "per",
    r"\b(give|given) (the same|the capture's|that) command again\b|\bgiven again\b": "run",
    r"\bcan be told\b": "settings",
    r"\bthe whole way\b": "the whole pipeline",
    r"\bstrangers?\b": "outside library",
    r"\bjudge[sd]\b": "check",
    r"\bwithout a word\b": "silently",
    r"\b(lays?|laid|lies?|lying) ((a|the) (teacher|model|part) )?(out )?over\b": "spread over",
    r"\bwithout end\b": "endless",
    r"\banother \w+ than\b": "a different one from",
    r"\b(so|these) many (sequences|bytes|seconds|records|of)\b": "this many",
    r"\bheld against\b|\bhold an? \w+ against\b": "check against",
    r"\bin all(?=[.,;:)]| where\b|$)": "in total",
}
_PATTERNS = {re.compile(phrase.replace(" ", r"\s+"), re.IGNORECASE): good for phrase, good in PHRASES.items()}


def python_texts(source):
    """Every string and every comment of a module, with the line it begins in; comments of neighbouring lines as one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [(token.start[0], token.string.lstrip("# ")) for token in tokens if token.type == tokenize.COMMENT]
    starts = [0, *(i + 1 for i, ((a, _), (b, _)) in enumerate(pairwise(comments)) if b != a + 1), len(comments)]
    for begin, end in pairwise(starts):
        if begin < end:
            yield comments[begin][0], "\n".join(text for _, text in comments[begin:end])


def faults(name, texts):
    """One line for each phrase in (line, text) pairs: where it is, what it says, what to say instead."""
    return [
        f"{name}:{line + text[: match.start()].count(chr(10))}: {' '.join(match[0].split())!r}: write {good}"
        for line, text in texts
        for pattern, good in _PATTERNS.items()
        for match in pattern.finditer(text)
    ]


def files(patterns):
    found = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    assert found
    return found


def test_pages():
    """No page has a phrase of the list."""
    found = [fault for path in files(PAGES) for fault in faults(path.relative_to(ROOT), [(1, path.read_text("utf-8"))])]
    assert [] == found, "\n".join(found)


def test_modules():
    """No string, docstring or comment has a phrase of the list."""
    found = [
        fault
        for path in files(MODULES)
        for fault in faults(path.relative_to(ROOT), python_texts(path.read_text("utf-8")))
    ]
    assert [] == found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "line", "phrase"),
    [
        ('raise ValueError(f"{x}: run the same command again to go on")', 1, "'go on': write resume"),
        ('"""\nA stopped run; it goes\n on.\n"""', 2, "'goes on': write resume"),
        ("x = 1\n# a shard is\n# made anew\ny = 2  # and mended\n", 3, "'anew': write again"),
        ("x = 1  # so that it is mended\n", 1, "'mended': write fix"),
        ('print(f"{size:.1f} bytes a position")', 1, "'bytes a position': write per"),
        ('"""Records a position, mean."""', 1, "'Records a position': write per"),
        ('"""One value a position."""', 1, "'One value a position': write per"),
        ('"""Made by another tokenizer than that."""', 1, "'another tokenizer than': write a different"),
    ],
)
def test_a_planted_phrase_is_found(source, line, phrase):
    """The test sees what it is made for, wherever it stands."""
    found = faults("planted.py", python_texts(source))
    assert any(fault.startswith(f"planted.py:{line}: {phrase}") for fault in found), found


@pytest.mark.parametrize(
    "text",
    ["a second run reads the tokens a second time", "I recommend it", "a record of a row", "a cache lacks a shard"],
)
def test_plain_english_is_not_found(text):
    """What is English stays allowed."""
    assert [] == faults("page.md", [(1, text)])
