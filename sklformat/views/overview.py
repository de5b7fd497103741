"""
A cache at a glance: what it holds and where that comes from, in words; of a capture that has not ended, how far it is.

Reads headers, indexes and the times of files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sklformat.cache.contents import shard_files
from sklformat.cache.report import inspect, settings_of
from sklformat.capture.advance import Advance, find_advance, is_unfinished
from sklformat.errors import UnfinishedError
from sklformat.files.places import Place, is_url
from sklformat.format.header import is_unbiased
from sklformat.format.layout import UNBIASED_SAMPLERS
from sklformat.progress import describe_duration
from sklformat.views.characters import visible

# Of a capture, what the table says in words: all, or these parts.
_SAID_ABOVE: dict[str, frozenset[str] | None] = {
    "teacher": None,
    "tokenizer": None,
    "sampler": frozenset({"k", "p", "unbiased"}),
}


def look(path: str) -> dict[str, Any]:
    """
    What ``sklformat inspect`` says of a cache, for JSON: ``cache.report.inspect``, names beside fingerprints, dates.

    Of a capture that has not ended, its directory, the URL of it or one unsealed shard: how far it is, and the settings
    of what is there.

    Raises:
        FormatError, FileNotFoundError: As ``skl.open``, which takes no unfinished cache.
    """
    place: Place = path.rstrip("/") if is_url(path) else Path(path)
    if isinstance(place, Path) and is_unfinished(place):
        return _unfinished(find_advance(place))
    try:
        facts = inspect(path)
    except UnfinishedError:
        if isinstance(place, Path):  # sealed or begun meanwhile
            raise
        return _unfinished(find_advance(place))
    return facts | _sources(facts["header"]) | {"sealed": _dates(place) if isinstance(place, Path) else None}


def _sources(header: Mapping[str, Any]) -> dict[str, Any]:
    """Teacher, tokenizer and text by their names, where the header has them, and their fingerprints."""
    capture = header["capture"]
    teacher, packing = (_object(capture, name) for name in ("teacher", "packing"))
    prints = {name: _known(header[f"{name}_fingerprint"]) for name in ("teacher", "tokenizer", "corpus")}
    return {
        "teacher": {"name": _text(teacher, "name"), "revision": _text(teacher, "revision")}
        | {"fingerprint": prints["teacher"]},
        # The teacher's own is taken always; its name is the teacher's.
        "tokenizer": {"name": _text(teacher, "name"), "fingerprint": prints["tokenizer"]},
        "text": {"documents": packing.get("num_documents"), "tokens": packing.get("num_tokens")}
        | {"fingerprint": prints["corpus"]},
    }


def _object(capture: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = capture.get(name)
    return value if isinstance(value, dict) else {}


def _text(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    return value if isinstance(value, str) else None


def _known(fingerprint: str) -> str | None:
    return fingerprint if fingerprint.strip("0") else None


def _dates(place: Path) -> dict[str, str]:
    """When the first and the last shard were written, by the times of their files; a copy may have changed these."""
    times = sorted(file.stat().st_mtime for file in (shard_files(place) if place.is_dir() else [place]))
    return {"first": _date(times[0]), "last": _date(times[-1])}


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _unfinished(advance: Advance) -> dict[str, Any]:
    header = advance.header
    facts: dict[str, Any] = {
        "path": str(advance.place),
        "unfinished": True,
        "sequences": advance.sequences,
        "num_sequences": advance.goal,
        "shards": advance.shards,
        "sequences_sealed": advance.sealed,
        "unsealed": dict(advance.partials),
        "bytes": advance.size_bytes,
        "begun": None if advance.begun is None else _date(advance.begun),
        "written": None if advance.written is None else _date(advance.written),
        "seconds_since_written": None if advance.written is None else round(max(time.time() - advance.written, 0)),
        "sequences_per_second": advance.per_second,
        "seconds_left": advance.seconds_left,
    }
    if header is None:
        return facts
    settings = settings_of(header)
    return facts | _sources(settings) | {"biased": header.biased, "header": settings}


def table(facts: Mapping[str, Any]) -> dict[str, str]:
    """The same in words for people: name and value of each line, with printable characters only."""
    lines = _advance_lines(facts) if facts.get("unfinished") else _size_lines(facts)
    if "header" in facts:
        lines |= _setting_lines(facts)
    return {visible(name): visible(value) for name, value in lines.items()}


def _size_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    length = f"{facts['header']['seq_len']:,}" if facts["header"]["seq_len"] else "any number of them"
    return {
        "path": facts["path"],
        "fingerprint": facts["fingerprint"],
        "shards": f"{facts['shards']:,}",
        "sequences": f"{facts['sequences']:,}, from number {facts['first_sequence']:,}",
        "positions": f"{facts['positions']:,}, {length} per sequence",
        "records": f"{facts['records']:,}",
        "bytes": in_bytes(facts["bytes"]),
        "bytes per position": mean_of(facts["bytes_per_position"]),
        "unique tokens": f"{mean_of(facts['unique_tokens_per_position'])} per position",
    }


def _advance_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    goal, there, unsealed = facts["num_sequences"], facts["sequences"], facts["unsealed"]
    of = f" of {goal:,} ({there / goal:.1%})" if goal else "; how many it will be, no file here says"
    lines = {
        "path": facts["path"],
        "state": "unfinished: no reader takes it before the command that writes it has ended",
        "sequences": f"{there:,}{of}",
        "shards": f"{facts['shards']:,} sealed, of {counted(facts['sequences_sealed'], 'sequence')}",
    }
    lines |= {name: f"{counted(count, 'whole sequence')}, not sealed" for name, count in unsealed.items()}
    lines["bytes"] = in_bytes(facts["bytes"])
    if facts["written"] is not None:
        ago = describe_duration(facts["seconds_since_written"])
        lines["last written"] = f"{_said(facts['written'])}, {ago} ago"
    if facts["sequences_per_second"] is not None:
        lines["rate"] = f"{facts['sequences_per_second']:,.3g} sequences/s since the run began, {_said(facts['begun'])}"
    if facts["seconds_left"] is not None:
        left = describe_duration(facts["seconds_left"])
        lines["time left"] = f"about {left} at that rate, if it is still running" if facts["seconds_left"] else "none"
    return lines


def _setting_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    header = facts["header"]
    capture = header["capture"]
    return {
        "kind": f"{header['kind']}, profile {header['profile']}, vocab_size {header['vocab_size']:,}",
        "biased": describe_sampler(facts),
        "tokens": f"stored, {header['token_size']} bytes each" if header["store_tokens"] else "not stored",
        "columns": ", ".join(header["columns"]) or "none",
        "seeds": f"draws {header['sampling_seed']}, packing {header['packing_seed']}",
        **_source_lines(facts),
        **{f"capture.{key}": json.dumps(value) for key, value in _rest_of(capture).items()},
    }


def _rest_of(capture: Mapping[str, Any]) -> dict[str, Any]:
    """What the lines above leave of a capture, and of that what is set."""
    rest = {}
    for key, value in capture.items():
        said = _SAID_ABOVE.get(key, frozenset())
        if said is None:
            continue
        is_set = {name: each for name, each in _object(capture, key).items() if each is not None and name not in said}
        left = is_set if isinstance(value, dict) else value
        if left not in (None, {}):
            rest[key] = left
    return rest


def describe_sampler(facts: Mapping[str, Any]) -> str:
    """Whether records are biased, and by which sampler, of what ``look`` gives."""
    header = facts["header"]
    drawn = f", {counted(header['rounds'], 'round')}" if header["rounds"] else ""
    drawn += f", proposal p**{header['proposal_temperature']:g}" if header["proposal_temperature"] != 1 else ""
    how = _object(header["capture"], "sampler")
    drawn += "".join(f", {name} {json.dumps(how[name])}" for name in ("k", "p") if how.get(name) is not None)
    drawn += ", weights not normalised" if how.get("unbiased") is True else ""
    verdict = "yes" if facts["biased"] else "unknown"
    if header["sampler"] in UNBIASED_SAMPLERS:
        unbiased = is_unbiased(header["sampler"], header["proposal_temperature"], header["capture"])
        verdict = "no" if unbiased else f"slightly (importance weights are {_changed(header['capture'])})"
    return f"{verdict}: sampler {header['sampler']}{drawn}"


def _changed(capture: Mapping[str, Any]) -> str:
    return "normalised" if _object(capture, "weighted").get("largest_weight") is None else "cut"


def _source_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """Who and what, beside the fingerprint that proves it; a cache keeps names of the hub, and no path: it may move."""
    capture = facts["header"]["capture"]
    said, teacher, text = _object(capture, "teacher"), facts["teacher"], facts["text"]
    unnamed = "not named" if said else "unknown"
    name = teacher["name"] or (f"{unnamed} (was a local path, which may move)" if said else unnamed)
    at = f", revision {teacher['revision']}" if teacher["revision"] else ""
    how = "".join(f", {key} {json.dumps(value)}" for key, value in said.items() if key not in ("name", "revision"))
    sizes = size_of_text(text)
    of_text = f"{', '.join(sizes)} (names of files are not kept)" if sizes else "unknown"
    of_tokenizer = f"the teacher's, {teacher['name']}" if teacher["name"] else f"the teacher's, {unnamed}"
    lines = {
        "teacher": f"{name}{at}{how}",
        "teacher fingerprint": teacher["fingerprint"] or "unknown",
        "tokenizer": of_tokenizer if said else unnamed,
        "tokenizer fingerprint": facts["tokenizer"]["fingerprint"] or "unknown",
        "text": of_text,
        "text fingerprint": text["fingerprint"] or "unknown",
    }
    if _object(capture, "tokenizer"):
        lines["vocabulary"] = str(_object(capture, "tokenizer").get("vocabulary"))
    if facts.get("sealed"):
        first, last = (_said(facts["sealed"][end]) for end in ("first", "last"))
        between = first if first == last else f"{first} to {last}"
        lines["date"] = f"{between}, by the times of the shards' files"
    elif not facts.get("unfinished"):
        lines["date"] = "unknown: a store behind a URL is not asked"
    return lines


def size_of_text(text: Mapping[str, Any]) -> list[str]:
    """Documents and tokens of a text, where they are known."""
    return [counted(text[key], key[:-1]) for key in ("documents", "tokens") if type(text[key]) is int]


def _said(date: str) -> str:
    return date.replace("T", " ").replace("+00:00", " UTC")


def counted(count: int, what: str) -> str:
    """A number of something that is given in the singular."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def in_bytes(size: int) -> str:
    """Every digit, and of a million bytes or more what people say."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            said = size / factor
            return f"{size:,} ({said:{'.4g' if said < 1000 else ',.0f'}} {unit})"
    return f"{size:,}"


def mean_of(value: float | None) -> str:
    """A mean with two digits; an empty cache has none."""
    return "-" if value is None else f"{value:.2f}"
