"""The only door to PyYAML: settings in a YAML or JSON file, and as YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sklformat.errors import CorruptError, describe_bad_json


def read_settings(path: Path) -> Any:
    """
    What a file of settings holds; JSON, and no PyYAML, where its name ends in ``.json``.

    Raises:
        CorruptError: It is neither.
        ModuleNotFoundError: YAML without PyYAML.
        OSError: The system's own.
    """
    text = path.read_bytes()
    try:
        if path.suffix == ".json":
            return json.loads(text)
        import yaml  # noqa: PLC0415  an extra
    except (ValueError, RecursionError) as error:
        raise CorruptError(describe_bad_json(error), path=path) from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CorruptError(f"yaml: {' '.join(str(error).split())}", path=path) from None


def dump_settings(values: Mapping[str, Any]) -> str:
    """
    Settings as YAML, in their order, one per line, that a parser reads as they are.

    Raises:
        ModuleNotFoundError: PyYAML is not installed.
    """
    import yaml  # noqa: PLC0415  an extra

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10_000))
