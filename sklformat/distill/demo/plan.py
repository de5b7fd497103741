"""
The plan of the demo: its sizes, and the config of each verb that it calls.

Runs nothing. Source: Anshumann et al. 2025 (arXiv 2503.16870), Table 5 and section 4, at a size for two cores.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklformat.settings.cache import CacheConfig
from sklformat.settings.demo import DemoConfig
from sklformat.settings.eval import EvalConfig
from sklformat.settings.inspection import ViewConfig
from sklformat.settings.train import TrainConfig

TOPK = 12
_PAGE_POSITIONS = 5120


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """
    How large everything is.

    A weaker teacher (500 steps) leaves random sampling's distance to FullKD a larger share of the gap; students of
    larger and fewer steps stay on cross-entropy's first plateau, which makes the gap a matter of luck.
    """

    vocab_size: int = 4096
    seq_len: int = 128
    teacher: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "hidden_size": 128,
            "num_layers": 3,
            "num_heads": 4,
            "steps": 900,
            "batch_size": 16,
            "learning_rate": 4e-3,
            "weight_decay": 0.1,
        }
    )
    student: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 2,
            "steps": 480,
            "batch_size": 8,
            "learning_rate": 3e-3,
        }
    )
    cached_sequences: int = 3840
    eval_sequences: int = 256
    max_documents: int | None = None
    """Of the standard library, from its beginning; None: all."""
    shows: bool = True
    """Whether a run of this size is held to what the paper shows."""


SIZES = {
    "standard": Size(),
    "tiny": Size(
        vocab_size=400,
        seq_len=32,
        teacher={"hidden_size": 32, "num_layers": 1, "num_heads": 2, "steps": 30, "batch_size": 8,
                 "learning_rate": 4e-3},
        student={"hidden_size": 16, "num_layers": 1, "num_heads": 2, "steps": 20, "batch_size": 8,
                 "learning_rate": 3e-3},
        cached_sequences=64,
        eval_sequences=16,
        max_documents=60,
        shows=False,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """One row of the table: how its student is trained and measured."""

    name: str
    train: TrainConfig
    eval: EvalConfig


def teacher_configs(config: DemoConfig, size: Size, eval_count: int) -> tuple[TrainConfig, EvalConfig]:
    """Train the teacher on the text, and measure it on ``eval_count`` held-out sequences."""
    out = config.out / "teacher"
    training = TrainConfig(
        out=out,
        tokens=config.out / "tokens",
        seq_len=size.seq_len,
        packing_seed=config.seed,
        method="ce",
        tokenizer=str(config.out / "tokenizer"),
        seed=config.seed,
        save_every=100,
        keep_checkpoint=False,
        **size.teacher,
    )
    return training, _eval_config(config, size, eval_count, out, teacher=None)


def _eval_config(config: DemoConfig, size: Size, eval_count: int, run: Path, teacher: str | None) -> EvalConfig:
    return EvalConfig(
        student=str(run / "model"),
        tokens=config.out / "held-out",
        seq_len=size.seq_len,
        packing_seed=config.seed,
        num_sequences=eval_count,
        teacher=teacher,
        out=run / "evaluation.json",
    )


def cache_configs(config: DemoConfig, size: Size, rounds: int, available: int) -> list[CacheConfig]:
    """Random sampling in ``rounds`` rounds and Top-K, over the ``available`` sequences or as many as the size says."""
    shared: dict[str, Any] = {
        "teacher": str(config.out / "teacher" / "model"),
        "tokens": config.out / "tokens",
        "seq_len": size.seq_len,
        "num_sequences": min(size.cached_sequences, available),
        "seed": config.seed,
        "packing_seed": config.seed,
        "batch_size": 16,
    }
    return [
        CacheConfig(out=config.out / "cache-random", sampler="multinomial", rounds=rounds, **shared),
        CacheConfig(out=config.out / "cache-topk", sampler="topk", k=TOPK, **shared),
    ]


def student_configs(config: DemoConfig, size: Size, eval_count: int, caches: list[CacheConfig]) -> list[Student]:
    """CE, Top-K, random sampling and FullKD from the same start; ``caches`` are those of ``cache_configs``."""
    random_cache, topk_cache = (cache.out for cache in caches)
    teacher = str(config.out / "teacher" / "model")
    tokenizer = str(config.out / "tokenizer")
    students = []
    methods: list[tuple[str, str, dict[str, Any]]] = [
        ("CE", "ce", {"method": "ce", "cache": random_cache, "tokenizer": tokenizer}),
        (f"Top-K {TOPK}", "topk", {"method": "topk", "cache": topk_cache, "tokenizer": tokenizer}),
        ("Random sampling", "random", {"method": "random_sampling", "cache": random_cache, "tokenizer": tokenizer}),
        ("FullKD", "full", {"method": "full", "cache": random_cache, "teacher": teacher}),
    ]
    for name, directory, changes in methods:
        out = config.out / "students" / directory
        shared: dict[str, Any] = {"out": out, "seed": config.seed, "save_every": 60, "keep_checkpoint": False}
        students.append(
            Student(
                name=name,
                train=TrainConfig(**shared, **size.student, **changes),
                eval=_eval_config(config, size, eval_count, out, teacher),
            )
        )
    return students


def view_config(config: DemoConfig, caches: list[CacheConfig], students: list[Student]) -> ViewConfig:
    """The page: what the caches hold of the teacher, as far as it fits, and every student beside it."""
    return ViewConfig(
        caches=tuple(str(cache.out) for cache in caches),
        out=config.out / "page.html",
        positions=_PAGE_POSITIONS,
        tokenizer=str(config.out / "tokenizer"),
        students=tuple(str(student.train.out / "model") for student in students),
    )
