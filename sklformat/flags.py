"""
The only door to tyro: from a dataclass to flags, and from flags to that dataclass.

Knows no verb.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import textwrap
import typing
from typing import Annotated, Any, TypeVar

from sklformat.deprecations import warn_of

Config = TypeVar("Config")
_BAD_VALUE = re.compile(r"^Error parsing (\S+): no type matching (.+) could be instantiated from \[(.*)\]$")


class UsageError(Exception):
    """The command line itself is wrong."""


def parse(
    config_type: type[Config], name: str, arguments: list[str], *, positional: bool = False
) -> tuple[Config, bool]:
    """
    The config that the flags say, and whether JSON is wanted.

    A field is a flag, its docstring the help; ``positional``: required fields are arguments instead.  A field whose
    name cannot be its flag's, or that is a flag all the same, says the flag in its metadata.  The values of a flag that
    takes several add up where it is repeated; metadata ``once`` refuses that, as for any flag of one value.  Metadata
    ``was`` is a flag's name of before, for who still uses that; it is taken, with a warning, where ``until`` names the
    version that will not.  ``short`` is a flag's one letter, beside ``flag``.

    Raises:
        UsageError: A flag is unknown, missing, has no such value, or is repeated.
        SystemExit: Help was asked for and printed.
    """
    import tyro  # noqa: PLC0415  an extra, needed only here

    hints = typing.get_type_hints(config_type)
    own = dataclasses.fields(config_type)  # type: ignore[arg-type]
    arguments = _renamed(arguments, own, name)
    _check_names(arguments, own, hints, positional=positional)
    arguments = _joined(arguments, own, hints)
    flags: list[Any] = []
    as_argument: Any = tyro.conf.Positional
    for f in own:
        if "flag" in f.metadata:
            flag = tyro.conf.arg(
                name=f.metadata["flag"], aliases=[f.metadata["short"]] if "short" in f.metadata else None
            )
            flags.append((f.name, Annotated[hints[f.name], flag], dataclasses.field(default=f.default)))
        elif positional and f.default is dataclasses.MISSING:
            flags.append((f.name, as_argument[hints[f.name]], dataclasses.field()))
    json_flag = Annotated[bool, tyro.conf.arg(help="Print the result as JSON."), tyro.conf.FlagCreatePairsOff]
    flags.append(("json", json_flag, dataclasses.field(default=False)))
    extended: Any = dataclasses.make_dataclass(
        config_type.__name__, flags, bases=(config_type,), frozen=True, kw_only=True
    )
    # A verb's own flags come first in its help, then those that it shares with others; in a dataclass they come last.
    order = (*inspect.get_annotations(config_type), *extended.__dataclass_fields__)
    extended.__dataclass_fields__ = {name: extended.__dataclass_fields__[name] for name in order}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Any = tyro.cli(
                extended,
                prog=name,
                args=arguments,
                description=_wrapped(config_type.__doc__ or ""),
                config=(tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName),
            )
    except SystemExit as end:
        if end.code:
            raise UsageError(_one_line(complaint.getvalue(), config_type.__name__)) from None
        raise
    return config_type(**{f.name: getattr(parsed, f.name) for f in own}), parsed.json


def in_flags(message: str, config_type: type[Any]) -> str:
    """
    A message in the words of the command line: where it names a setting as Python does, it names the flag.

    Settings of one word, such as ``rounds``, are left: they are words of the sentence as well.
    """
    for f in dataclasses.fields(config_type):
        if "_" in f.name and "flag" not in f.metadata:
            # Not within a path, a dotted name or a longer word.
            message = re.sub(rf"(?<![\w./-]){f.name}(?![\w/-]|\.\w)", f"--{f.name.replace('_', '-')}", message)
    return message


def _renamed(arguments: list[str], own: tuple[dataclasses.Field[Any], ...], command: str) -> list[str]:
    """The arguments with the flags of today in the place of those of before that are still taken."""
    now: dict[str, tuple[str, str]] = {}  # of a flag of before, that of today, and the version that drops the first
    for f in own:
        if "until" in f.metadata:
            flag = f.metadata.get("flag", f.name.replace("_", "-"))
            now |= {f"--{no}{f.metadata['was']}": (f"--{no}{flag}", f.metadata["until"]) for no in ("", "no-")}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    renamed: list[str] = []
    for argument in arguments[:end]:
        flag, equals, value = argument.partition("=")
        new, until = now.get(flag.replace("_", "-"), (flag, None))
        if until is not None:
            warn_of(flag, new, until=until, command=command)
        renamed.append(f"{new}{equals}{value}")
    return renamed + arguments[end:]


def _check_names(
    arguments: list[str], own: tuple[dataclasses.Field[Any], ...], hints: dict[str, Any], *, positional: bool
) -> None:
    """Name a flag that is not known before anything else that may be wrong, with the flag that was likely meant."""
    known = {"help", "json"}
    for f in own:
        if positional and f.default is dataclasses.MISSING and "flag" not in f.metadata:
            continue
        name = f.metadata.get("flag", f.name.replace("_", "-"))
        known |= {name, f"no-{name}"} if hints[f.name] is bool else {name}
    for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
        name = argument[2:].partition("=")[0].replace("_", "-")
        if argument.startswith("--") and name not in known:
            now = [f.name for f in own if f.metadata.get("was") == name]
            meant = now or difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"there is no flag --{name}" + (f" (did you mean --{meant[0]}?)" if meant else ""))


def _joined(arguments: list[str], own: tuple[dataclasses.Field[Any], ...], hints: dict[str, Any]) -> list[str]:
    """The arguments with each flag once: the values of a repeated one behind its first, where it takes several."""
    several = {f.name for f in own if typing.get_origin(hints[f.name]) is tuple and "once" not in f.metadata}
    boolean = {f.name for f in own if hints[f.name] is bool}
    groups: dict[str, list[str]] = {"": []}  # of each flag, itself and what follows it
    latest = groups[""]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for argument in arguments[:end]:
        if not argument.startswith("--"):
            latest.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        name = name[3:] if name[3:] in boolean and name.startswith("no_") else name
        if name not in groups:
            latest = groups[name] = [argument]
        elif name in several:
            latest = groups[name]
            head, joint, first = latest[0].partition("=")
            latest[:1] = [head, first] if joint else [head]
            latest += [value] if equals else []
        else:
            raise UsageError(f"{flag} is given more than once; it takes effect once, so say it once")
    return [*itertools.chain.from_iterable(groups.values()), *arguments[end:]]


def _wrapped(text: str) -> str:
    """A docstring's paragraphs for 80 columns; tyro joins lines again unless they are indented."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(textwrap.fill(p, 80, initial_indent="  ", subsequent_indent="  ") for p in paragraphs)


def _one_line(box: str, config_name: str) -> str:
    """What tyro says in a box, without the box, its title and any help; what is missing by its name alone."""
    said: list[str] = []
    indents: list[int] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│┃|+╭╮╰╯ ")
        if set(text) <= set("─-"):
            if not said:  # below the title, where the terminal has no boxes
                continue
            break
        said.append(text)
        indents.append(line.index(text))
    if said and said[0].startswith("Missing from "):  # the help of each stands below its name, further in
        names = [text.split()[0] for text, indent in zip(said[1:], indents[1:], strict=True) if indent == indents[1]]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    complaint = " ".join(said).replace(f"Error parsing {config_name}: ", "").rstrip(".")
    return _BAD_VALUE.sub(r"\1 takes \2, got \3", complaint) or "wrong usage"
