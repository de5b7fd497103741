"""Kinds of files: what a path is, where its name or content says so, and the reader and writer of each kind."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sklformat.format.layout import PARTIAL_SUFFIX, SHARD_SUFFIX
from sklformat.interop.named import read_named
from sklformat.interop.notes import Note, read_noted
from sklformat.interop.readings import Asked, Reading, refuse_flags
from sklformat.interop.tables.exports import Export, Exporter
from sklformat.interop.tables.files import SUFFIXES, open_table

NEIGHBOURS = {
    "distillkit": "distillkit",
    "distillkit-raw": "distillkit",
    "distillkit-legacy": "distillkit",
    "open-instruct": "distillkit",
    "megatron": "megatron",
    "axolotl": "axolotl",
    "sampledkd": "sampledkd",
    "miniplm": "miniplm",
    "nemo-aligner": "lines",
    "maxtext": "maxtext",
    "llama-cpp-kld": "llama_cpp",
    "eullm": "eullm",
    "vllm": "responses",
    "sglang": "responses",
    "slime": "lines",
    "easydistill": "lines",
    "whittle": "tensors",
    "automodel": "tensors",
}
"""The module of ``neighbours`` that reads each kind."""
_FILES = ("llama-cpp-kld", "vllm", "sglang")  # kinds that are one file
_DIRECTORIES = ("megatron", "sampledkd", "whittle", "automodel")
_OF_TABLES = ("vocab_size", "rounds", "sampler", "convention", "values", "columns", "tokens", "drop_last_row")
EXPORTS = {"axolotl": "axolotl", "distillkit-raw": "distillkit", "megatron": "megatron"}
"""The module of ``neighbours`` that writes each kind."""
WHOLE = ("llama-cpp-kld", "whittle")
"""Kinds that hold, or may hold, whole distributions, from which records are taken."""
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}


def find_kind(path: Path) -> str:
    """
    The kind of a source: skl, or a neighbour's, by what it holds; else a table by its name's end.

    Raises:
        ValueError: None of them, or several.
    """
    names = [path] if not path.is_dir() else list(path.iterdir())
    if any(SHARD_SUFFIX in name.suffixes[-2:] for name in names if name.suffix in (SHARD_SUFFIX, PARTIAL_SUFFIX)):
        return "skl"
    found = {kind for module in sorted(set(NEIGHBOURS.values())) if (kind := _neighbour(module).recognise(path))}
    if len(found) > 1:
        raise ValueError(f"{path}: may be {' or '.join(sorted(found))}; say which with --from")
    if found:
        return str(found.pop())
    if path.is_dir():
        endings = {_KIND_OF_SUFFIX[file.suffix] for file in names if file.suffix in _KIND_OF_SUFFIX}
        return endings.pop() if len(endings) == 1 else "skl"
    if path.suffix in _KIND_OF_SUFFIX:
        return _KIND_OF_SUFFIX[path.suffix]
    raise ValueError(f"{path}: the name does not say what it is; give --from skl, npz, parquet, jsonl or another kind")


def open_reading(path: Path, kind: str, asked: Asked) -> tuple[Reading, Note | None]:
    """
    What a source of a kind holds; with its note, if a cache was written into it here.

    Raises:
        ValueError: The user must say more, or says what can't be.
        IsADirectoryError, NotADirectoryError: Of a kind that is a file, or a directory.
        FormatError, OSError, ModuleNotFoundError: Of the reader.
    """
    if kind in _FILES and path.is_dir():
        raise IsADirectoryError(f"{path}: is a directory, {kind} is a file; give the file")
    if kind in _DIRECTORIES and not path.is_dir():
        raise NotADirectoryError(f"{path}: is a file, {kind} is a directory; give the directory")
    if kind in NEIGHBOURS:
        return _neighbour(NEIGHBOURS[kind]).read(path, kind, asked), None
    refuse_flags(path, kind, asked, _OF_TABLES)
    table = open_table(path, kind)
    if table.note is not None and not asked.columns:
        return read_noted(path, table, asked)
    return read_named(path, table, asked), None


def open_export(path: Path, kind: str, export: Export) -> Exporter:
    """
    What writes sequences for another system, of a kind of ``EXPORTS``.

    Raises:
        ValueError: The system can't hold them, or has no file of that name.
        FileExistsError, OSError, ModuleNotFoundError: Of the writer.
    """
    exporter: Exporter = _neighbour(EXPORTS[kind]).open_export(path, kind, export)
    return exporter


def _neighbour(module: str) -> Any:
    return importlib.import_module(f"sklformat.interop.neighbours.{module}")
