"""
The dataset card of a cache: the README.md with a YAML header that a hub shows, from headers and indexes alone.

Names no path of this machine.  Fields of the header are those of Hugging Face's specification of dataset cards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sklformat
from sklformat.files.disk import make_place_of, write_atomically
from sklformat.files.yaml import dump_settings
from sklformat.format import layout
from sklformat.settings.inspection import CardConfig
from sklformat.views.characters import visible
from sklformat.views.overview import counted, describe_sampler, in_bytes, look, mean_of, size_of_text

BLANK = "FILL-IN"
"""In place of the licence where nobody gave one; no hub takes it."""

_PAPER = "https://arxiv.org/abs/2503.16870"
_CITATION = """\
@inproceedings{anshumann2025sparse,
  title     = {Sparse Logit Sampling: Accelerating Knowledge Distillation in {LLMs}},
  author    = {Anshumann and Zaidi, Mohd Abbas and Kedia, Akhil and Ahn, Jinwoo and Kwon, Taehwak and Lee, Kangwook
               and Lee, Haejun and Lee, Joohyung},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
  year      = {2025},
  url       = {https://arxiv.org/abs/2503.16870}
}
"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """
    A dataset card.

    Attributes:
        text: All of it.
        blanks: What is left to fill in, as a sentence without its full stop; "": nothing.
    """

    text: str
    blanks: str


def write_card(config: CardConfig) -> Card:
    """
    Make the card of a cache, and write it where that is asked for.

    Raises:
        FileExistsError: The file exists; a card may hold what somebody wrote into it.
        ValueError: The cache is not finished, or names another teacher.
        FormatError, FileNotFoundError: As ``skl.open``.
        ModuleNotFoundError: PyYAML is not installed.
    """
    facts = look(config.path)
    if facts.get("unfinished"):
        raise ValueError(f"{config.path}: the cache is unfinished, and a card says how large it is; finish it first")
    if config.out is not None and config.out.exists():
        raise FileExistsError(f"{config.out}: is there, and may hold what somebody wrote; remove it, or choose another")
    facts = _with_teacher(config, facts)
    text = f"---\n{dump_settings(_fields(config, facts))}---\n\n{_body(config, facts)}"
    if config.out is not None:
        make_place_of(config.out)
        write_atomically(config.out, text.encode())
    return Card(text=text, blanks="; ".join(_blanks(config, facts)))


def _blanks(config: CardConfig, facts: Mapping[str, Any]) -> list[str]:
    blanks = []
    if not config.license:
        blanks.append(f"the licence is left as {BLANK}, which a hub refuses; fill it in, or give --license")
    if not facts["teacher"]["name"]:
        blanks.append("the cache does not name its teacher; give --teacher")
    if not config.text:
        blanks.append("no cache names its text; give --text")
    return blanks


def _with_teacher(config: CardConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the name that was given to the teacher; a name that the cache itself has stays."""
    own = facts["teacher"]["name"]
    if config.teacher is None:
        return dict(facts)
    if own is not None and own != config.teacher:
        raise ValueError(
            f"{config.path}: the cache names its teacher, {own}, not {config.teacher}; leave out --teacher"
        )
    named = {part: facts[part] | {"name": config.teacher} for part in ("teacher", "tokenizer")}
    return {**facts, **named, "given": own is None}


def _fields(config: CardConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    header = facts["header"]
    return {
        "license": config.license or BLANK,
        "pretty_name": visible(_title(config, facts)),
        "tags": ["knowledge-distillation", "sparse-logits", "sklformat", str(header["kind"]), str(header["sampler"])],
        "task_categories": ["text-generation"],
        "size_categories": [_size_category(facts["sequences"])],
        "viewer": False,  # the hub's viewer reads no binary shards
    }


def _title(config: CardConfig, facts: Mapping[str, Any]) -> str:
    return config.name or f"Sparse logits of {facts['teacher']['name'] or 'a teacher'}"


def _size_category(count: int) -> str:
    """Of sequences, as hubs name the number of a dataset's examples."""
    if count < 1000:
        return "n<1K"
    units = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = len(str(count)) - 4
    return f"{units[place]}<n<{units[place + 1]}" if place + 1 < len(units) else "n>1T"


def _body(config: CardConfig, facts: Mapping[str, Any]) -> str:
    header, teacher = facts["header"], facts["teacher"]
    who = f"`{_code(teacher['name'])}`" if teacher["name"] else "a teacher that the cache does not name"
    licence = (
        f"`{config.license}`, as whoever published this says. The licences of the teacher and of the text hold too."
        if config.license
        else f"**Not stated yet.** Fill in `license: {BLANK}` above before you publish this, and look first at the "
        "licences of the teacher and of the text."
    )
    rows = "\n".join(f"| {name} | {_plain(value)} |" for name, value in _rows(config, facts).items())
    columns = f"  Columns: {', '.join(f'`{name}`' for name in header['columns'])}." if header["columns"] else ""
    tokens = (
        "The tokens of each sequence are stored with its records."
        if header["store_tokens"]
        else "Tokens are not stored: whoever trains brings them, and a checksum of each sequence proves them."
    )
    name = _file_name(facts["path"])
    return f"""\
# {_plain(_title(config, facts))}

What {who} predicts at each position of a text, as {_records_in_words(header)}: students learn from it
without the teacher.  The format is that of `sklformat`, version {layout.VERSION_MAJOR}.{layout.VERSION_MINOR}.
{tokens}{columns}

| | |
|---|---|
{rows}

## Load

```console
pip install sklformat
hf download NAMESPACE/{name} --repo-type dataset --local-dir {name}
```

```python
import sklformat as skl

cache = skl.open("{name}")
sequence = cache[0]
print(sequence.tokens, sequence.targets.token_ids, sequence.targets.offsets)
```

Train a student:

```console
sklformat train --cache {name} --tokenizer {_shell(teacher["name"])} --out my-student
```

## Verify

```console
sklformat verify {name}
```

`skl.open("{name}").fingerprint` is `{facts["fingerprint"]}`.

## Licence

{licence}

## Cite

The method is that of [Sparse Logit Sampling]({_PAPER}):

```bibtex
{_CITATION}```
"""


def _records_in_words(header: Mapping[str, Any]) -> str:
    if header["kind"] == "counts":
        return f"a few (token id, count) records of {counted(header['rounds'], 'draw')} per position"
    return "a few (token id, weight) records"


def _rows(config: CardConfig, facts: Mapping[str, Any]) -> dict[str, str]:
    header, teacher, text = facts["header"], facts["teacher"], facts["text"]
    author = header["capture"].get("author")
    revision = f", revision {teacher['revision']}" if teacher["revision"] else ""
    who = f"{teacher['name'] or 'not named'}{revision}" + ", as whoever published this says" * facts.get("given", False)
    of_text = [f"{config.text}, as whoever published this says"] if config.text else []
    of_text += [", ".join(sizes)] if (sizes := size_of_text(text)) else []
    length = f"each of {counted(header['seq_len'], 'position')}" if header["seq_len"] else "of any number of positions"
    return {
        "Teacher": f"{who}; fingerprint {teacher['fingerprint'] or 'unknown'}",
        "Tokenizer": f"{facts['tokenizer']['name'] or 'not named'}, {header['vocab_size']:,} ids; fingerprint "
        f"{facts['tokenizer']['fingerprint'] or 'unknown'}",
        "Text": f"{'; '.join(of_text) or 'not described'}; fingerprint {text['fingerprint'] or 'unknown'}",
        **({"Author of the text": json.dumps(author)} if author else {}),
        "Biased": describe_sampler(facts),
        "Sequences": f"{facts['sequences']:,}, {length}",
        "Files": f"{facts['shards']:,}",
        "Positions": f"{facts['positions']:,}",
        "Records": f"{facts['records']:,}, {mean_of(facts['unique_tokens_per_position'])} per position",
        "Bytes": f"{in_bytes(facts['bytes'])}, {mean_of(facts['bytes_per_position'])} per position",
        "Made with": f"sklformat {_made_with(header)}",
        "Card by": f"sklformat {sklformat.__version__}",
    }


def _made_with(header: Mapping[str, Any]) -> str:
    versions = header["capture"].get("versions")
    return (
        str(versions.get("sklformat", "of an unknown version"))
        if isinstance(versions, dict)
        else "of an unknown version"
    )


def _file_name(path: str) -> str:
    """Last part of the cache's path or URL, of characters that a shell and a hub take."""
    name = path.rstrip("/").rpartition("/")[2].removesuffix(layout.SHARD_SUFFIX)
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).lstrip("-.") or "my-cache"


def _shell(name: str | None) -> str:
    """The teacher's name, where a shell takes it as one word."""
    is_plain = name is not None and all(c.isascii() and (c.isalnum() or c in "._-/") for c in name)
    return str(name) if is_plain and not str(name).startswith("-") else "THE-TOKENIZER"


def _code(text: str) -> str:
    return visible(text).replace("`", "'")


def _plain(text: str) -> str:
    """A text that is no markup, neither in a heading nor in a cell of a table, where it stays."""
    return "".join(f"\\{c}" if c in "\\|*_`<>[]&~$" else c for c in visible(text))
