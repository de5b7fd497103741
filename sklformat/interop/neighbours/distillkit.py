"""DistillKit: sequences with raw records, which its trainer takes as they are, written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sklformat.interop.tables.cells import Cell, Columns, array_cell
from sklformat.interop.tables.exports import Evened, EvenTable, Export, Exporter


def open_export(path: Path, kind: str, export: Export) -> Exporter:  # noqa: ARG001  of all kinds
    """Raw rows: as ``kinds.open_export``."""
    return _RawTable(path, export)


class _RawTable(EvenTable):
    """
    ``token_ids`` and ``top_values`` [L][k] beside ``input_ids``, which ``prepacked: true`` takes as they are.

    DistillKit leaves row t out where ``labels[t]`` is negative, not labels[t + 1]: so it is where row t has no record.
    """

    COLUMNS: ClassVar[Columns] = {
        "input_ids": (np.int64, 1),
        "labels": (np.int64, 1),
        "token_ids": (np.int64, 2),
        "top_values": (np.float32, 2),
    }

    def cells(self, tokens: NDArray[Any], evened: Evened) -> dict[str, Cell]:
        return {
            "input_ids": Cell(tokens),
            "labels": Cell(np.where(evened.real.any(1), tokens.astype(np.int64), -100)),
            "token_ids": array_cell(evened.token_ids),
            "top_values": array_cell(evened.logprobs),
        }

    @property
    def says(self) -> list[str]:
        row = "row t describes token t + 1; the last row and those without a record have label -100"
        return [row, *super().says]
