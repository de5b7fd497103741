"""
What a training run starts from: its batches, its student and teacher, and the settings that the result depends on.

Trains nothing; refuses what does not belong together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sklformat.cache.reader import Cache
from sklformat.cache.reader import open_cache as open_shards
from sklformat.distill.loader.contents import is_isolated
from sklformat.distill.loader.dataset import SparseLogitDataset
from sklformat.distill.losses.divergences import check_divergence
from sklformat.distill.models import adapters, attention, heads, loading, outputs, tokenization
from sklformat.distill.models.identities import model_fingerprint
from sklformat.distill.student import streams
from sklformat.distill.student.validation import HeldOut, check_unseen
from sklformat.distill.text.fingerprints import MadeBy, tokenizer_fingerprint
from sklformat.errors import SettingsError
from sklformat.settings.train import TrainConfig

_RAGGED_POSITIONS = 4096  # of a new Llama that learns from sequences of any length
_WITHOUT_RECORDS = ("ce", "full")
_TOPK_METHODS = ("topk", "topk_normalised", "label_smoothing", "ghost_token", "naive_fix")
# What the finished model does not depend on; a run may be resumed with other values of these.
_FREE_FIELDS = ("out", "device", "num_workers", "save_every", "log_every", "batch_size", "accumulation",
                "trust_remote_code", "shard", "compile", "gradient_checkpointing", "report_to", "keep_checkpoint",
                "eval_every", "eval_cache", "eval_sequences", "best_by", "decode")  # fmt: skip
# Kept only where they differ from their defaults, so that runs resume that began before these settings.
_LATER_FIELDS = ("packing", "truncate", "schedule", "warmup_steps", "min_learning_rate", "decay", "betas", "adam_eps",
                 "max_grad_norm", "cache_weights", "param_dtype", "lora_rank", "lora_alpha",
                 "lora_targets", "divergence", "temperature", "lr_ratio", "easy_percentile")  # fmt: skip
# Paths and names, which say nothing of what is there; its fingerprints stand for them.
_FINGERPRINTED_FIELDS = ("cache", "tokens", "student", "teacher", "tokenizer", "adapter_base")


def open_stream(config: TrainConfig, rank: int, world_size: int, device: torch.device) -> streams.Stream:
    """
    The batches of a run, from its cache or its token store.

    Raises:
        SettingsError: The records do not fit the method; or as ``streams.open_caches`` and ``streams.open_tokens``.
        ValueError: The divergence does not; or likewise.
    """
    check_divergence(config.divergence, config.method)
    tokenizer = config.tokenizer or config.student or config.teacher
    share = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rank": rank,
        "world_size": world_size,
        "ragged_window": config.batch_size * config.accumulation * world_size,  # of a step: resumed, the same
    }
    if config.tokens is not None:
        return streams.open_tokens(
            config.tokens,
            tokenizer=tokenizer,
            named=loading.named_of(config),
            seq_len=config.seq_len,
            packing_seed=config.packing_seed,
            isolated=config.isolate_documents,
            packing=config.packing,
            truncate=config.truncate,
            **share,
        )
    stream = streams.open_caches(
        config.cache,
        weights=config.cache_weights or None,
        tokenizer=tokenizer,
        named=loading.named_of(config),
        window=config.window or None,
        hold_out=config.hold_out,
        decode="cpu" if config.method in _WITHOUT_RECORDS or config.lr_ratio != 1 else config.decode,
        device=device,
        **share,
    )
    if config.isolate_documents and not stream.isolated:
        raise SettingsError(
            f"--isolate-documents is given, and {stream.source} was made without: its teacher saw one document before "
            "the next; leave the flag out, so that the student sees them too, or capture with --isolate-documents"
        )
    assert isinstance(stream.dataset, SparseLogitDataset)
    for cache in stream.dataset.caches:
        check_method(cache, config.method)
    if config.lr_ratio == 1 or config.teacher is not None:
        return stream
    note = take_confidence(stream.dataset)
    return dataclasses.replace(stream, note="; ".join(filter(None, (stream.note, note))))


def take_confidence(dataset: SparseLogitDataset) -> str:
    """Let batches say how sure the teacher is of each label, where the caches do, and what to say where they do not."""
    if dataset.have_label_logprob:
        dataset.give_label_logprob()
        return ""
    if dataset.cache.header.biased:  # as of all of them
        return ""
    return (
        "hard tokens are told by the records' own draws, so that the gradient is no longer unbiased; capture with "
        "--columns label_logprob to keep it so"
    )


def open_held_out(config: TrainConfig, stream: streams.Stream, rank: int, world_size: int) -> list[HeldOut]:
    """
    The sequences that a run evaluates on: those that it holds out of each of its caches, or another cache's.

    Raises:
        SettingsError: Training sees most of a cache's, or another tokenizer made them.
        ValueError, FormatError, FileNotFoundError: They cannot be read.
    """
    if not config.eval_every:
        return []
    if config.eval_cache is None:
        caches = [open_shards(path) for path in config.cache]
        parts = [range(len(cache) - config.hold_out, len(cache)) for cache in caches]
    else:
        caches = [open_shards(config.eval_cache)]
        parts = [range(len(caches[0]))]
        conflict = streams.made_by(caches[0].header).conflict(stream.tokenizer)
        if conflict:
            raise SettingsError(
                f"{config.eval_cache} was made by a different tokenizer from that of {stream.source}: {conflict}; "
                "evaluate on a cache of the same one"
            )
    each, more = divmod(config.eval_sequences, len(caches))
    if config.eval_sequences:
        parts = [part[: each + (place < more)] for place, part in enumerate(parts)]
    held_out = [(cache, part) for cache, part in zip(caches, parts, strict=True) if part]
    if config.eval_cache is not None or len(caches) > 1:  # of one cache they are others by their numbers
        for cache, part in held_out:
            _check_unseen(config, stream, cache, part)
    return [
        HeldOut(cache, part, batch_size=config.batch_size, rank=rank, world_size=world_size) for cache, part in held_out
    ]


def check_measurable(student: Any, held_out: HeldOut) -> None:
    """
    Make sure that a student can be run on held-out sequences, which may be of a cache that it does not learn from.

    Raises:
        SettingsError: It takes fewer positions.
        ValueError: It cannot keep documents apart that the teacher saw apart.
    """
    plain, cache = adapters.unwrapped(student), held_out.cache
    try:
        loading.check_length(plain, cache.header.seq_len)
    except ValueError:
        raise SettingsError(
            f"the student takes fewer positions than the {cache.header.seq_len} of a sequence of {cache.path}; "
            "evaluate on a cache of shorter ones"
        ) from None
    if held_out.isolated:
        attention.check_isolates(plain)


def _check_unseen(config: TrainConfig, stream: streams.Stream, cache: Cache, part: range) -> None:
    """Refuse to evaluate on what training sees; sequences are known by their tokens."""
    if not config.cache:
        if cache.header.corpus_fingerprint == stream.identity["corpus"]:
            raise SettingsError(
                f"{config.eval_cache} was captured from the text of {config.tokens}, all of which training reads; "
                "evaluate on a cache of another text"
            )
        return
    trained = [(one, range(len(one) - config.hold_out)) for one in map(open_shards, config.cache)]
    check_unseen(cache, part, trained, stream.source)


def check_method(cache: Cache, method: str) -> None:
    """
    Make sure that a method, one of the settings', learns from what a cache holds; sampler "unknown" fits all.

    Raises:
        SettingsError: It does not; names those that do.
    """
    header = cache.header
    if method in _WITHOUT_RECORDS or header.sampler == "unknown":
        return
    fitting = _TOPK_METHODS if header.biased else ("random_sampling",)
    if method not in fitting:
        raise SettingsError(
            f"{cache.path} holds records of sampler {header.sampler}, which method {method} does not fit; "
            f"use method {', '.join((*fitting, 'ce'))} or full, or another cache"
        )


def load_student(config: TrainConfig, stream: streams.Stream) -> Any:
    """
    The student that a run starts from: loaded, or a new Llama.

    Raises:
        SettingsError: Its vocabulary, head or length does not fit the stream.
    """
    if config.student is None:
        new = loading.new_llama(
            vocab_size=stream.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            max_positions=stream.seq_len or _RAGGED_POSITIONS,
            seed=config.seed,
            separator_id=tokenization.separator_id(stream.tokenizer),
        )
        return new.to(getattr(torch, config.param_dtype))
    student = _load_given(config)
    plain = adapters.unwrapped(student)
    width = outputs.head_width(plain)
    if not stream.holds_only(width):
        _check_width(f"the student {config.student}", width, stream.source, stream.vocab_size)
    loading.check_fit(stream.tokenizer, plain, seq_len=stream.seq_len or None)
    heads.output_head(plain)
    if stream.isolated:
        attention.check_isolates(plain)
    return student.train()


def _load_given(config: TrainConfig) -> Any:
    """The student that the config names, with an adapter beside it where one is to learn."""
    assert config.student is not None
    named = loading.named_of(config)
    if config.lora_rank:
        lora = adapters.Lora(
            rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets, seed=config.seed
        )
        return loading.load_adapted(config.student, lora, dtype=config.param_dtype, **named)
    student = loading.load_model(config.student, dtype=config.param_dtype, **named)
    loading.check_trainable(student)
    return student


def _check_width(student: str, width: int, source: object, vocab_size: int) -> None:
    if width < vocab_size:
        raise SettingsError(
            f"{student} has a vocabulary of {width}, {source} one of {vocab_size}; widen the student's embedding, or "
            "take a cache of its own tokenizer"
        )


def check_student(model: Any, cache: Cache) -> None:
    """
    Make sure that a student that is loaded already can learn from a cache.

    One that is sharded is not run; ``run_to_head`` looks at its head.

    Args:
        model: Of transformers or peft, or a wrapper of one.
        cache: Its sequences and records.

    Raises:
        SettingsError: Its vocabulary is too small.
        ValueError: The chunked loss cannot train its head, it takes fewer positions, or it cannot keep documents apart
            that the teacher saw apart.
    """
    plain, header = outputs.unwrapped(model), cache.header
    own = adapters.unwrapped(plain)
    _check_width("the student", outputs.head_width(own), cache.path, header.vocab_size)
    loading.check_length(own, header.seq_len)
    if any(hasattr(parameter, "full_tensor") for parameter in own.parameters()):
        return
    heads.output_head(plain)
    if is_isolated(cache):
        attention.check_isolates(own)


def check_made_by(tokenizer: Any, cache: Cache) -> None:
    """
    Make sure that ids mean to a tokenizer what they mean in a cache.

    Raises:
        SettingsError: They do not; says how.
    """
    conflict = streams.made_by(cache.header).conflict(tokenizer)
    if conflict:
        raise SettingsError(
            f"{cache.path} was made by a different tokenizer: {conflict}; give the student the one that made it, or "
            "take another cache"
        )


def load_teacher(config: TrainConfig, stream: streams.Stream, student: Any) -> Any:
    """
    The teacher of method full.

    Raises:
        SettingsError: Its tokenizer, vocabulary, head or length does not fit the stream and the student.
    """
    assert config.teacher is not None
    _check_tokenizers(config, stream)
    teacher = loading.load_model(config.teacher, **loading.named_of(config))
    widths = [outputs.head_width(model) for model in (teacher, student)]
    if widths[0] < stream.vocab_size or widths[1] != stream.vocab_size:
        raise SettingsError(
            f"method full compares teacher and student entry by entry over the {stream.vocab_size} ids of "
            f"{stream.source}: the teacher {config.teacher} has {widths[0]} (needs at least as many), the student "
            f"{widths[1]} (needs just as many)"
        )
    loading.check_fit(stream.tokenizer, teacher, seq_len=stream.seq_len or None)
    try:
        heads.output_head(teacher)
    except ValueError as error:
        reason = str(error).partition(";")[0]  # what follows is about students
        raise SettingsError(
            f"the teacher {config.teacher} cannot run alongside: {reason}; capture it with sklformat cache, which runs "
            "a head as its model does, and train on that"
        ) from None
    if stream.isolated:
        attention.check_isolates(teacher)
    return teacher


def _check_tokenizers(config: TrainConfig, stream: streams.Stream) -> None:
    """A teacher that has a tokenizer of its own must read the stream's ids as the student does."""
    assert config.teacher is not None
    if config.tokenizer is None and config.student is None:
        return  # the stream's is the teacher's
    teachers = loading.load_own_tokenizer(config.teacher, **loading.named_of(config))
    if teachers is None:  # it is taken to share the student's
        return
    conflict = MadeBy.of(stream.tokenizer, stream.vocab_size).conflict(teachers)
    if conflict:
        raise SettingsError(
            f"the teacher {config.teacher} has a different tokenizer from the student's "
            f"{config.tokenizer or config.student}: {conflict}; records and logits are about ids, so give a teacher of "
            "the student's tokenizer, or start a new student with the teacher's"
        )


def facts_of(stream: streams.Stream) -> dict[str, Any]:
    """
    What a run keeps beside its settings: the texts that its caches were captured from, by their fingerprints.

    Of a token store the settings have it.
    """
    if not isinstance(stream.dataset, SparseLogitDataset):
        return {}
    return {"corpora": sorted({cache.header.corpus_fingerprint for cache in stream.dataset.caches})}


def settings_of(
    config: TrainConfig, stream: streams.Stream, world_size: int, student: Any, teacher: Any
) -> dict[str, Any]:
    """
    What the finished model depends on.

    Data, models and tokenizer by fingerprint: moved, they are the same; made again at the same place, they are not.
    """
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_FIELDS}
    values = {name: value for name, value in values.items() if name not in _FINGERPRINTED_FIELDS} | stream.identity
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    values = {name: value for name, value in values.items() if name not in _LATER_FIELDS or value != defaults[name]}
    del values["isolate_documents"]  # a cache says it itself
    values |= {"isolate_documents": True} if stream.isolated else {}
    given = {
        "student_fingerprint": None if config.student is None else model_fingerprint(student),
        "teacher_fingerprint": None if teacher is None else model_fingerprint(teacher),
        "tokenizer_fingerprint": tokenizer_fingerprint(stream.tokenizer),
    }
    return values | given | {"sequences_per_step": config.batch_size * config.accumulation * world_size}
