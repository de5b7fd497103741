"""
The teacher that the claims share: made once, from the demo's text, tokenizer and configuration, and what it says.

On two cores a Llama of 1.7 M parameters over the standard library's source; with ``--device cuda`` 34 M.  Its last
hidden states over all sequences are kept in memory, from which any distribution is one product away: so that no run
calls the teacher's body a second time.

Shape letters: S sequences, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Options
from torch import Tensor

from sklformat.distill import output_head
from sklformat.distill.demo.plan import SIZES, Size, teacher_configs
from sklformat.distill.demo.stages import prepare_text
from sklformat.distill.models import loading, outputs, tokenization
from sklformat.distill.student.training import train
from sklformat.distill.text.packing import PackedSequences
from sklformat.progress import say, show
from sklformat.settings.demo import DemoConfig

_SMALL = dataclasses.replace(
    SIZES["tiny"],
    student={**SIZES["tiny"].student, "steps": 6},
    cached_sequences=48,
    eval_sequences=4,
)
_LARGE = dataclasses.replace(
    SIZES["standard"],
    vocab_size=8192,
    seq_len=256,
    teacher={"hidden_size": 512, "num_layers": 8, "num_heads": 8, "steps": 2000, "batch_size": 32,
             "learning_rate": 1e-3, "weight_decay": 0.1, "dtype": "bfloat16", "device": "cuda"},
    student={"hidden_size": 256, "num_layers": 6, "num_heads": 4, "steps": 800, "batch_size": 8,
             "learning_rate": 2e-3},
    cached_sequences=6400,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Sequences and what the teacher says of them: tokens [S, T + 1] int64, its last hidden states [S, T, D]."""

    tokens: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Teacher:
    """
    A trained teacher and its texts.

    Attributes:
        directory: Where it lies; what is made from it goes there too.
        size: How large everything is, students too.
        head: Its output layer, [V, D].
        train, held_out: What students learn from, and what they are measured on.
        lm_loss: Its own on held-out text, nats per token.
    """

    directory: Path
    size: Size
    head: Tensor
    train: Part
    held_out: Part
    lm_loss: float

    @property
    def vocab_size(self) -> int:
        return self.head.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., D]."""
        return hidden @ self.head.T


def size_of(given: Options) -> Size:
    return _SMALL if given.is_quick else _LARGE if given.device == "cuda" else SIZES["standard"]


def teacher(given: Options) -> Teacher:
    """The teacher of this size; trained if it is not there yet, resumed if a run was stopped."""
    size, directory = size_of(given), given.out / f"teacher-{'quick' if given.is_quick else given.device}"
    model_path = directory / "teacher" / "model"
    if not model_path.exists():
        say(f"teacher: {directory}")
        directory.mkdir(parents=True, exist_ok=True)
        config = DemoConfig(out=directory, size="tiny" if given.is_quick else "standard")
        training, _ = teacher_configs(config, size, prepare_text(config, size))
        train(training)
    model, text, held_out = (
        model_of(given, model_path),
        packed(directory, size, "tokens"),
        packed(directory, size, "held-out"),
    )
    part = _read(model, text, min(size.cached_sequences, len(text)), given.device)
    measured = _read(model, held_out, min(size.eval_sequences, len(held_out)), given.device)
    head = output_head(model).weight.detach()
    return Teacher(directory, size, head, part, measured, _loss(head, measured))


def packed(directory: Path, size: Size, name: str, seed: int = 0) -> PackedSequences:
    """The sequences of one of its texts, "tokens" or "held-out", packed by a seed."""
    separator = tokenization.separator_id(loading.load_tokenizer(directory / "tokenizer"))
    return PackedSequences(directory / name, seq_len=size.seq_len, separator_id=separator, seed=seed)


def read(given: Options, directory: Path, sequences: PackedSequences, count: int) -> Part:
    """What a model that lies in ``directory`` says of other sequences."""
    return _read(model_of(given, directory), sequences, count, given.device)


def model_of(given: Options, directory: Path) -> Any:
    return loading.load_model(directory).to(given.device)


def _read(model: Any, sequences: PackedSequences, count: int, device: str) -> Part:
    tokens = torch.from_numpy(np.stack([sequences[i] for i in range(count)]).astype(np.int64)).to(device)
    return Part(tokens, hidden_states(model, tokens[:, :-1]))


@torch.no_grad()
def hidden_states(model: Any, tokens_ST: Tensor) -> Tensor:
    """What a model's head is given, [S, T, D] float32."""
    hidden: list[Tensor] = []
    with show("teacher", len(tokens_ST), unit="sequence") as reach:
        for tokens_BT in tokens_ST.split(16):
            hidden.append(outputs.hidden_states(model, tokens_BT).float())
            reach(sum(map(len, hidden)))
    return torch.cat(hidden)


@torch.no_grad()
def _loss(head: Tensor, part: Part) -> float:
    total = 0.0
    for tokens, hidden in zip(part.tokens.split(16), part.hidden.split(16), strict=True):
        logits = (hidden @ head.T).flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"))
    return total / part.tokens[:, 1:].numel()
