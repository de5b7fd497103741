"""
A teacher that vLLM runs, asked about given ids: our plug-in takes their log-probs inside the worker, as it draws there.

What vLLM itself scores (``prompt_logprob_token_ids``) needs its newer runner, takes a limited number of ids, and is
normalised over the padding of the head as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from sklformat.capture import ShardWork
from sklformat.distill.engines import messages
from sklformat.distill.engines.desk import Desk, Given
from sklformat.distill.engines.feed import Engine, Feed
from sklformat.distill.engines.messages import Hook, Settings
from sklformat.distill.engines.rehearsal import rehearse
from sklformat.distill.engines.serving import find_model
from sklformat.distill.engines.vllm import Plan
from sklformat.distill.models import loading, tokenization
from sklformat.distill.models.identities import checkpoint_fingerprint
from sklformat.distill.rescoring.headers import describe_teacher, versions
from sklformat.distill.rescoring.questions import Question, Questions
from sklformat.distill.rescoring.scores import Scorer, Scores
from sklformat.errors import SettingsError
from sklformat.progress import say
from sklformat.settings.rescore import RescoreConfig


class ServedScorer:
    """
    A teacher behind an engine.

    Args:
        engine: That runs it.
        desk: Where its worker sends columns; its settings name those that are wanted.
    """

    def __init__(self, engine: Engine, desk: Desk) -> None:
        self._engine, self._desk = engine, desk

    def answers(
        self, works: Sequence[ShardWork], read: Callable[[int], Question], names: tuple[str, ...]
    ) -> Iterator[tuple[Question, Scores]]:
        """As ``Scorer``; the engine has as many sequences at once as keep it busy."""
        asked: dict[int, Question] = {}

        def begin(number: int) -> Any:
            asked[number] = read(number)
            return asked[number].tokens

        feed = Feed(
            self._engine,
            self._desk,
            begin,
            lambda number: asked[number].counted,
            lambda number: Given(asked[number].offsets, asked[number].token_ids),
        )
        missing = (number for work in works for number in range(work.next_sequence, work.end))
        for output, columns in feed.records(missing):
            yield asked.pop(output.sequence), {name: columns[name] for name in names}


@contextlib.contextmanager
def served_scorer(
    config: RescoreConfig, questions: Questions, columns: tuple[str, ...], *, hook: Hook | None = None
) -> Iterator[tuple[Scorer, dict[str, Any]]]:
    """
    The scorer, for the time of the block, sure to know the cache's ids, and what a header says of it.

    Args:
        config: The settings.
        questions: The cache.
        columns: Those that it is asked for.
        hook: Where to see rows; None: in the runner, where its method is known.

    Raises:
        EngineError: vLLM is not there, does not serve the teacher, or is not understood.
        SettingsError: The cache holds isolated documents; or the teacher is an adapter or knows other ids.
        OSError, ValueError: As ``rescore``.
    """
    if questions.isolated:
        raise SettingsError(
            f"{questions.cache.path}: its documents do not see each other, and engine vllm has no mask within a "
            "sequence; take engine transformers"
        )
    header = questions.cache.header
    tokenizer = loading.load_tokenizer(
        config.teacher_name, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    with messages.listening() as (listener, path):
        directory = find_model(config)
        plan = Plan(
            directory,
            dtype=config.dtype,
            seq_len=header.seq_len or questions.longest,
            tensor_parallel=config.tensor_parallel,
            memory=config.gpu_memory,
            trust_remote_code=config.trust_remote_code,
            hook=hook,
        )
        teacher = SimpleNamespace(config=plan.config)
        loading.check_length(teacher, header.seq_len or questions.longest)
        width = tokenization.common_ids(tokenizer, plan.width)
        questions.check_ids(tokenizer, width, config.teacher)
        say(f"rescore {config.out.name}: starting {plan.described} with {config.teacher}")
        settings = Settings(kind="counts", rounds=1, sampling={}, columns=columns, vocab_size=width, on_device=False)
        fingerprint = checkpoint_fingerprint(directory, teacher)
        how = {
            "teacher": describe_teacher(config, teacher, fingerprint, plan.dtype, plan.device),
            "engine": {"name": "vllm", "hook": plan.hook, "tensor_parallel": config.tensor_parallel},
            "versions": {**versions(), "vllm": plan.version},
            "repeatable": False,
        }
        with Desk(listener, settings) as desk, plan.started(path) as engine:
            rehearse(engine, desk, width, header.seq_len or questions.longest)
            yield ServedScorer(engine, desk), how
