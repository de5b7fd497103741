"""
``cache``: a capture by the engine that was asked for; what it shares with every capture is teacher.caching's.

Holds no knowledge of an engine's inside.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from sklformat.capture import ShardWork
from sklformat.capture.memory import check_room
from sklformat.capture.outcome import Cached, Contributed, Finished
from sklformat.capture.runs import finish_run
from sklformat.distill import kernels
from sklformat.distill.engines import messages
from sklformat.distill.engines.desk import Desk
from sklformat.distill.engines.feed import Feed
from sklformat.distill.engines.messages import Hook, Settings
from sklformat.distill.engines.rehearsal import rehearse
from sklformat.distill.engines.vllm import Plan
from sklformat.distill.models import adapters, hub, loading, tokenization
from sklformat.distill.models.guards import named
from sklformat.distill.models.identities import checkpoint_fingerprint
from sklformat.distill.teacher.caching import Part, cache_teacher, draws_on_device, name_run, run_of, write
from sklformat.distill.teacher.forward import Output
from sklformat.distill.teacher.provenance import make_header
from sklformat.distill.teacher.ranks import Ranks, joined, stoppable
from sklformat.distill.teacher.token_sources import TokenSource
from sklformat.distill.text.fingerprints import vocabulary_fingerprint
from sklformat.errors import EngineError, SettingsError
from sklformat.progress import say
from sklformat.settings.cache import CacheConfig
from sklformat.settings.rescore import RescoreConfig


def cache(config: CacheConfig) -> Cached | Contributed | Finished:
    """
    Capture a teacher's sparse distributions over packed text into a cache directory.

    Args:
        config: The settings; ``engine`` says what runs the teacher, ``finish`` that nothing does.

    Returns:
        What was done.

    Raises:
        EngineError: The engine is not there, does not serve the teacher, is not understood, or has ended.
        OSError, ValueError, SklError, KeyboardInterrupt: As ``cache_teacher``.
    """
    if config.finish:
        assert config.run is not None
        return Finished.of(config.out, finish_run(config.directory, config.run, config.url))
    if config.engine == "transformers":
        return cache_teacher(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun's
        raise EngineError(
            "engine vllm starts its own processes, one per device of tensor_parallel; start it without torchrun"
        )
    with joined(run_of(config)) as ranks, stoppable():
        return cache_by_vllm(config, ranks)


def cache_by_vllm(
    config: CacheConfig, ranks: Ranks, *, step_tokens: int | None = None, hook: Hook | None = None
) -> Cached | Contributed:
    """
    The same with vLLM.

    Args:
        config: The settings.
        ranks: Of this run.
        step_tokens: Tokens of one forward pass, at most; None: what vLLM takes.
        hook: Where to see rows; None: in the runner, where its method is known.

    Raises:
        EngineError, OSError, ValueError, SklError, KeyboardInterrupt: As ``cache``.
    """
    check_room(config.ring_mib << 20, "ring_mib")
    tokenizer = loading.load_tokenizer(
        config.teacher_name, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    source = TokenSource(config, tokenizer)
    run = ranks.first(lambda: name_run(config))
    # Held from here on, so that a second run is refused before it works.
    with ranks.held(config.directory, run), messages.listening() as (listener, path):
        model = find_model(config)
        plan = Plan(
            model,
            dtype=config.dtype,
            seq_len=config.seq_len,
            tensor_parallel=config.tensor_parallel,
            memory=config.gpu_memory,
            trust_remote_code=config.trust_remote_code,
            step_tokens=step_tokens,
            hook=hook,
        )
        teacher = SimpleNamespace(config=plan.config)
        loading.check_length(teacher, config.seq_len)
        vocab_size = tokenization.common_ids(tokenizer, plan.width)
        say(f"cache {config.directory.name}: starting {plan.described} with {config.teacher}, then reading all tokens")
        on_device = draws_on_device(config, torch.device(plan.device), vocab_size)
        settings = Settings(
            kind=config.kind,
            rounds=config.rounds if config.draws else 0,
            sampling=config.sampling,
            columns=config.columns,
            vocab_size=vocab_size,
            on_device=on_device,
        )
        # Who is asked while an engine starts must answer, since it tries its layers out.
        with Desk(listener, settings) as desk, plan.started(path) as engine:
            rehearse(engine, desk, vocab_size, config.seq_len)
            packed = ranks.in_turn(lambda check: source.pack(vocab_size, check=check))
            header = make_header(
                config,
                packed,
                vocab_size,
                vocabulary_fingerprint(tokenizer, vocab_size),
                teacher,
                plan.dtype,
                plan.device,
                on_device=on_device,
                kernel_versions=kernels.versions(torch.device(plan.device)) if on_device else {},
                fingerprint=checkpoint_fingerprint(model, teacher),
                engine={
                    "name": "vllm",
                    "version": plan.version,
                    "hook": plan.hook,
                    "tensor_parallel": config.tensor_parallel,
                },
            )
            feed = Feed(engine, desk, packed.__getitem__, packed.counted)

            def hand_over(part: Part, works: Sequence[ShardWork]) -> Iterator[tuple[Output, int]]:
                missing = (sequence for work in works for sequence in range(work.next_sequence, work.end))
                for output, columns in feed.records(missing):
                    yield part.push(output, output.made, columns)

            return write(config, ranks, run, packed, header, hand_over)


def find_model(config: CacheConfig | RescoreConfig) -> Path:
    """
    The directory of the teacher, which is no adapter.

    Raises:
        SettingsError: It is one.
        OSError: It is not there.
    """
    with named(config.teacher_name, "model") as local:
        adapter = adapters.find_adapter(config.teacher_name, revision=config.revision, local=local)
        if adapter is None:
            return hub.find_directory(config.teacher_name, revision=config.revision, local=local)
    raise SettingsError(
        f"{config.teacher}: is an adapter, engine vllm runs whole models; merge it into the model that it belongs to "
        "and save that, or take engine transformers"
    )
