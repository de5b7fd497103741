"""
The command line: one verb per function, flags made by tyro from the dataclass beside that function.

Holds no knowledge of its own.  Data goes to stdout, progress and errors to stderr; a verb's modules are loaded only
when it runs.  Exit status: 0 done, 1 failed (one line says why), 2 wrong usage, 3 ``verify`` found damage, 130 stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklformat import SklError, UnfinishedError, __version__, progress, recover, verify
from sklformat.cache.contents import UNFINISHED_NAME, partial_files
from sklformat.errors import CorruptError, WriteError, is_memory_short
from sklformat.files.disk import refuse_held
from sklformat.flags import UsageError, in_flags, parse
from sklformat.format.layout import PARTIAL_SUFFIX, VERSION_MAJOR, VERSION_MINOR
from sklformat.native import kernels_name
from sklformat.settings.cache import CacheConfig
from sklformat.settings.convert import ConvertConfig
from sklformat.settings.demo import DemoConfig
from sklformat.settings.estimate import EstimateConfig
from sklformat.settings.eval import EvalConfig
from sklformat.settings.inspection import (
    CardConfig,
    CheckConfig,
    InspectConfig,
    PlotConfig,
    RecoverConfig,
    StatsConfig,
    VerifyConfig,
    ViewConfig,
)
from sklformat.settings.operations import MergeConfig, SliceConfig, SubsampleConfig
from sklformat.settings.rescore import RescoreConfig
from sklformat.settings.train import TrainConfig
from sklformat.views.printing import prepare_streams, print_json, print_line, print_result, print_table

UNFINISHED, DAMAGED = 1, 3
STOPPED = 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

# What installs a module that an optional part needs.
_EXTRAS = {
    "tyro": "cli",
    "tqdm": "cli",
    "fsspec": "remote",
    "pyarrow": "interop",
    "h5py": "interop",
    "array_record": "maxtext",
    "yaml": "interop",
    "matplotlib": "plot",
    "torch": "train",
    "transformers": "train",
    "peft": "adapters",
    "tokenizers": "train",
    "safetensors": "train",
    "mmap_ninja": "train",
    "zstandard": "text",
    "datasets": "datasets",
    "accelerate": "large",
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one verb.

    Args:
        argv: Verb and flags; None: those of the process.

    Returns:
        The exit status, as the module's docstring says.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    prepare_streams()
    name, verb = "sklformat", _NO_VERB
    if arguments and arguments[0] in _VERBS:
        name, verb = f"sklformat {arguments[0]}", _VERBS[arguments.pop(0)]
    try:
        status = verb.run(name, arguments)
        sys.stdout.flush()
    except SystemExit as end:  # tyro's, after it printed the help that was asked for
        return int(end.code or 0)
    except UsageError as error:
        return _fail(name, f"{verb.in_flags(error)}; see {name} --help", 2)
    except BrokenPipeError:  # the reader of our output left, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        return _fail(name, f"this needs {package}; install it: pip install 'sklformat[{_EXTRAS[package]}]'", 1)
    except OSError as error:
        return _fail(name, _of_system(error), 1)
    except (SklError, ValueError) as error:
        said = verb.in_flags(error)
        if isinstance(error, CorruptError) and error.section == "block" and "sklformat verify" not in said:
            said += "; sklformat verify lists all that is damaged, and says how to fix it"
        return _fail(name, said, 1)
    except (RuntimeError, MemoryError) as error:
        if not is_memory_short(error):
            raise
        advice = "use a smaller --batch-size, where the verb has one, or a device with more memory"
        return _fail(name, f"out of memory ({str(error).partition(chr(10))[0] or 'of this machine'}); {advice}", 1)
    except KeyboardInterrupt as stop:
        return _fail(name, str(stop) or f"stopped; {verb.after_stop}", STOPPED)
    return status


def _of_system(error: OSError) -> str:
    """What the system could not do, where, and what to do where that is known."""
    if isinstance(error, WriteError):
        return f"{error.reason}: make room or fix the disk, then run the same command again"
    where = f"{error.filename}: " if error.filename is not None else ""
    said = f"{where}{error.strerror}" if error.strerror else str(error)
    return f"{said}: make room, then run the same command again" if error.errno in _NO_ROOM else said


def _fail(name: str, message: str, status: int) -> int:
    progress.say(f"{name}: {' '.join(message.split())}")
    return status


def _usage() -> str:
    lines = [
        "usage: sklformat VERB [FLAGS]",
        "",
        "Sparse teacher distributions on disk, and students that learn from them.",
        "",
    ]
    width = max(map(len, _VERBS)) + 2
    lines += [f"  {name:<{width}}{verb.summary}" for name, verb in _VERBS.items()]
    lines += ["", "sklformat VERB --help explains a verb's flags; sklformat --version says what runs.", ""]
    return "\n".join(lines)


@contextlib.contextmanager
def _progress(unit: progress.Unit) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show how far a verb is, part after part; takes (what is being done, how far, of how much)."""
    with contextlib.ExitStack() as part:
        reaches: dict[str, progress.Reach] = {}

        def tell(doing: str, done: int, total: int | None) -> None:
            if doing not in reaches:
                part.close()
                reaches[doing] = part.enter_context(progress.show(doing, total, unit=unit))
            reaches[doing](done)

        yield tell


# --- the verbs -------------------------------------------------------------------------------------------------------


def _run_alone(_name: str, arguments: list[str]) -> int:
    """What the program does without a verb."""
    if arguments[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_usage())
    elif arguments[:1] == ["--version"]:
        form = f"{VERSION_MAJOR}.{VERSION_MINOR}"
        sys.stdout.write(f"sklformat {__version__}, format {form}, kernels {kernels_name()}\n")
    else:
        problem = f"no such verb: {arguments[0]}" if arguments else "a verb is missing"
        raise UsageError(f"{problem}; choose one of {', '.join(_VERBS)}")
    return 0


def _run_inspect(name: str, arguments: list[str]) -> int:
    from sklformat.views import overview, passage  # noqa: PLC0415

    config, as_json = parse(InspectConfig, name, arguments, positional=True)
    if config.sequence is None:
        facts = overview.look(config.path)
        print_json(facts) if as_json else print_table(overview.table(facts))
        return 0
    found = passage.read_passage(config)
    texts, who = None, passage.NO_TOKENIZER
    if config.tokenizer is not None or (found.teacher is not None and _is_there("torch", "transformers")):
        texts, who = importlib.import_module("sklformat.distill.student.measures.showing").find_texts(config, found)
    facts = passage.facts_of(found, texts, who)
    if as_json:
        print_json(facts)
    else:
        sys.stdout.write(passage.page(facts, shutil.get_terminal_size().columns, sys.stdout.encoding))
    return 0


def _is_there(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def _run_card(name: str, arguments: list[str]) -> int:
    from sklformat.views.card import write_card  # noqa: PLC0415

    config, as_json = parse(CardConfig, name, arguments, positional=True)
    card = write_card(config)
    if as_json:
        print_json(dataclasses.asdict(card))
    elif config.out is None:
        sys.stdout.write(card.text)
    else:
        print_line(f"{config.out}: the card of {config.path}")
    if card.blanks:
        progress.say(f"{name}: {card.blanks}")
    return 0


def _run_verify(name: str, arguments: list[str]) -> int:
    config, as_json = parse(VerifyConfig, name, arguments, positional=True)
    checked = 0
    with _progress("byte") as tell:

        def follow(done: int, total: int) -> None:
            nonlocal checked
            checked = done
            tell("verify", done, total)

        problems = verify(config.path, follow)
    unfinished = bool(problems) and all(problem.error == UnfinishedError.__name__ for problem in problems)
    if as_json:
        print_json(
            {"path": str(config.path), "sound": not problems, "problems": list(map(dataclasses.asdict, problems))}
        )
    else:
        for problem in problems:
            print_line(str(problem))
        verdict = f"{len(problems)} problem{'s' * (len(problems) > 1)} found" if problems else "sound"
        print_line(f"{config.path}: {'unfinished' if unfinished else verdict}, {checked:,} bytes checked")
        for action in dict.fromkeys(p.action for p in problems):
            print_line(f"to fix: {action}")
    return UNFINISHED if unfinished else DAMAGED if problems else 0


def _run_recover(name: str, arguments: list[str]) -> int:
    config, as_json = parse(RecoverConfig, name, arguments, positional=True)
    path = config.path
    partials = partial_files(path) if path.is_dir() else [path]
    partials = [partial for partial in partials if partial.name != UNFINISHED_NAME]  # a mark, and no shard
    if not partials:
        raise FileNotFoundError(f"{path}: no unfinished shard here (.skl{PARTIAL_SUFFIX}); nothing to recover")
    results = [recover(partial) for partial in partials]
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
    else:
        for result in results:
            print_line(f"{result}; rerun the command that started it to resume")
    return 0


def _run_view(name: str, arguments: list[str]) -> int:
    from sklformat.views.page import read_stretch, render  # noqa: PLC0415
    from sklformat.views.serving import opened  # noqa: PLC0415

    config, as_json = parse(ViewConfig, name, arguments, positional=True)
    stretch = read_stretch(config)
    said: dict[str, Any] = {}
    if config.tokenizer is not None or config.students:
        said = importlib.import_module("sklformat.distill.student.measures.showing").say(config, stretch)
    page = render(stretch, **said).encode()
    with opened(config, page) as (result, serve):
        shown = len(stretch.numbers)
        more = "; --positions shows more" if config.first + shown < stretch.available else ""
        in_words = f"{shown:,} of {stretch.available:,}, from number {config.first:,}{more}"
        result |= {"sequences": shown if as_json else in_words, "bytes": len(page) if as_json else f"{len(page):,}"}
        result["tokens"] = "as text" if said.get("texts") else "as ids; --tokenizer shows their text"
        (print_json if as_json else print_table)(result)
        sys.stdout.flush()
        serve()
    return 0


def _run_estimate(name: str, arguments: list[str]) -> int:
    from sklformat.capture.estimates import estimate  # noqa: PLC0415

    config, as_json = parse(EstimateConfig, name, arguments)
    measures = "sklformat.distill.student.measures.advice"
    if config.plot is not None:
        importlib.import_module(measures).drawing(config.plot)
    if config.teacher is not None:
        from sklformat.distill.teacher.calibration import calibrate  # noqa: PLC0415

        config = calibrate(config)
    told = importlib.import_module(measures).advise(config) if config.student else estimate(config)
    print_result(told, as_json=as_json)
    return 0


@dataclass(frozen=True)
class _Verb:
    summary: str
    config: type[Any]
    run: Callable[[str, list[str]], int]
    after_stop: str = "run the same command again to resume"

    def in_flags(self, error: Exception) -> str:
        """What an error says, in the words of this verb's command line."""
        return in_flags(str(error), self.config)


def _learning(
    config_type: type[Any], module: str, function: str, *, holds: str | None = None, positional: bool = False
) -> Callable[[str, list[str]], int]:
    """
    A verb of the learning side: its config, and the function that it calls; ``holds``: what its directory is there.

    Torch is loaded once the flags are right and nobody else holds that directory.
    """

    def run(name: str, arguments: list[str]) -> int:
        config, as_json = parse(config_type, name, arguments, positional=positional)
        is_first = os.environ.get("RANK", "0") == "0" and getattr(config, "run", None) is None
        if holds is not None and is_first:  # no rank holds it before the first has come
            refuse_held(Path(getattr(config, holds)))
        result = getattr(importlib.import_module(f"sklformat.distill.{module}"), function)(config)
        if os.environ.get("RANK", "0") == "0":  # torchrun's; every process has the same result
            print_result(result, as_json=as_json)
        return 0

    return run


def _long(config_type: type[Any], module: str, function: str) -> Callable[[str, list[str]], int]:
    """A verb that reports how many sequences it has done: its config, and the function that it calls."""

    def run(name: str, arguments: list[str]) -> int:
        config, as_json = parse(config_type, name, arguments, positional=True)
        with _progress("sequence") as tell:
            result = getattr(importlib.import_module(f"sklformat.{module}"), function)(config, tell)
        print_result(result, as_json=as_json)
        return 0

    return run


@dataclass(frozen=True)
class _NoConfig:
    """No flags."""


_AGAIN = "nothing was changed"
_NO_VERB = _Verb("", _NoConfig, _run_alone, _AGAIN)
_CACHE = _learning(CacheConfig, "engines.serving", "cache", holds="directory")
_TRAIN = _learning(TrainConfig, "student.training", "train", holds="out")
_RESCORE = _learning(RescoreConfig, "rescoring.passes", "rescore", holds="out", positional=True)
_EVAL = _learning(EvalConfig, "student.measures.evaluation", "evaluate")
_DEMO = _learning(DemoConfig, "demo.stages", "run_demo", holds="out")
_STATS = _long(StatsConfig, "views.stats", "gather")
_PLOT = _long(PlotConfig, "views.sheets", "plot")
_CHECK = _long(CheckConfig, "check", "check")
_CONVERT = _long(ConvertConfig, "interop", "convert")
_MERGE = _long(MergeConfig, "operations", "merge_caches")
_SLICE = _long(SliceConfig, "operations", "slice_cache")
_SUBSAMPLE = _long(SubsampleConfig, "operations", "subsample_cache")
_VERBS = {
    "cache": _Verb("run a teacher over text and keep its distributions", CacheConfig, _CACHE),
    "estimate": _Verb("predict what a capture will cost", EstimateConfig, _run_estimate, _AGAIN),
    "train": _Verb("train a student from a cache, from text or from a teacher", TrainConfig, _TRAIN),
    "eval": _Verb("measure a student on held-out text or records", EvalConfig, _EVAL, _AGAIN),
    "demo": _Verb("run the whole pipeline once, from text to the paper's table", DemoConfig, _DEMO),
    "inspect": _Verb("show what a cache holds", InspectConfig, _run_inspect, _AGAIN),
    "stats": _Verb("show what a cache holds, in numbers", StatsConfig, _STATS, _AGAIN),
    "plot": _Verb("draw caches or training runs on one sheet", PlotConfig, _PLOT, _AGAIN),
    "view": _Verb("show on one page what the teacher said of each token", ViewConfig, _run_view, _AGAIN),
    "card": _Verb("write the dataset card of a cache, for a hub", CardConfig, _run_card, _AGAIN),
    "verify": _Verb("check every byte of a cache", VerifyConfig, _run_verify, _AGAIN),
    "recover": _Verb("keep the whole sequences of an unfinished shard", RecoverConfig, _run_recover),
    "check": _Verb("prove that a cache and tokens belong together", CheckConfig, _CHECK, _AGAIN),
    "convert": _Verb("turn caches into plain columns (npz, Parquet, JSONL), and back", ConvertConfig, _CONVERT),
    "rescore": _Verb("ask another teacher about the records of a cache", RescoreConfig, _RESCORE),
    "merge": _Verb("join caches of one teacher into one", MergeConfig, _MERGE),
    "slice": _Verb("make a cache of some sequences of another", SliceConfig, _SLICE),
    "subsample": _Verb("make a cache with fewer rounds of another", SubsampleConfig, _SUBSAMPLE),
}
