"""The only door to datasets: rows of a Hugging Face dataset, by name, saved to disk, or a directory of data files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sklformat.distill.text.sources.rows import Row
from sklformat.distill.text.sources.selection import is_saved_dataset


def read_dataset_rows(words: Sequence[str], *, split: str = "train") -> Iterator[Row]:
    """
    The rows of a dataset, in its own order, one at a time.

    Args:
        words: A directory that ``save_to_disk`` wrote; or a name, as ``datasets.load_dataset`` knows it, or a directory
            of data files, and, where it has several, its configuration.
        split: Part of it.

    Yields:
        Rows named ``split#0``, ``split#1``, …

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        FileNotFoundError: There is no such dataset, split or configuration.
    """
    import datasets  # noqa: PLC0415  an extra, needed only here

    source = " ".join(words)
    try:
        if is_saved_dataset(Path(words[0])):
            rows = _part(datasets.load_from_disk(words[0]), split)
        else:
            rows = datasets.load_dataset(*words, split=split, streaming=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(f"dataset {source}: cannot load split {split!r} ({reason})") from error
    return _named(rows, source, split)


def _part(saved: Any, split: str) -> Any:
    """A split of several that were saved together; one alone has no name."""
    if isinstance(saved, dict) and split not in saved:
        raise ValueError(f"it has {', '.join(saved)}")
    return saved[split] if isinstance(saved, dict) else saved


def _named(rows: Iterable[Mapping[str, Any]], source: str, split: str) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield Row(f"{split}#{number}", f"dataset {source}: row {number} of split {split!r}", row)
