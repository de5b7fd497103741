"""
validate(): how well a student matches sequences of a cache that it did not learn from: their text and their records.

Trains nothing and runs no teacher; the sums themselves are in ``losses.sums``.
Shape letters: B sequences, T positions, P = B·T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from sklformat.cache.reader import Cache
from sklformat.cache.tokens import TokenSource
from sklformat.distill.loader.batches import Batch, Targets
from sklformat.distill.loader.conflicts import check_borders
from sklformat.distill.loader.dataset import SparseLogitDataset
from sklformat.distill.loader.launchers import find_rank
from sklformat.distill.losses.heads import OutputHead
from sklformat.distill.losses.sums import EvaluationSums
from sklformat.distill.models import heads, outputs
from sklformat.errors import SettingsError
from sklformat.format.columns import ENTROPY, LABEL_LOGPROB
from sklformat.format.header import Header, is_unbiased, other_teacher
from sklformat.progress import say

# Logits that exist at once where they are made of hidden states: 256 MiB in float32.
_BLOCK_ELEMENTS = 1 << 26

Forward: TypeAlias = Callable[[Batch], Tensor | tuple[Tensor, OutputHead]]
"""
What a student gives for a batch on its device: its logits, [B, T, V] or [P, V], or its last hidden states, [B, T, D] or
[P, D], with the head that makes logits of them; of these the logits never exist whole.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """
    How well a student matches sequences of a cache; every figure is over the same positions, those that have records.

    With t the stored target of a position, p the student, q the teacher's whole distribution and H its entropy:

    Attributes:
        num_sequences, num_positions: Measured on.
        lm_loss: -log p of the token that followed, nats per token.
        accuracy: Share of positions whose most likely token came next.
        calibration_error: Expected calibration error (ECE) in 15 bins, a fraction.
        cross_entropy: -sum t log p, nats per position.  It is linear in t: where the records were drawn without bias,
            its expectation over the draws is the student's cross-entropy against q itself.
        kl_to_records: sum t log(t / p), nats per position: what training prints.  Not linear in t: a few draws lie
            close to their own entropy, so that it stays above 0 for a student that equals its teacher, and caches
            drawn with other rounds give other values.
        kl: ``cross_entropy`` less the mean H, nats per position: an estimate without bias of KL(q || p), which may
            come out below 0 by chance; weights of kind ratios add their rounding.  H is the column ``entropy``, so
            that the draws are its only noise.  None where the cache lacks the column, and where its records are not
            drawn without bias (samplers topk, topp, unknown; importance weights that were divided by their sum): there
            the difference is no divergence.
        teacher_loss: -log q of the token that followed, nats per token, by the column ``label_logprob``; None where
            the cache lacks it.
    """

    num_sequences: int
    num_positions: int
    lm_loss: float
    accuracy: float
    calibration_error: float
    cross_entropy: float
    kl_to_records: float
    kl: float | None
    teacher_loss: float | None

    @classmethod
    def of(cls, sums: EvaluationSums, *, num_sequences: int, headers: Iterable[Header]) -> Validation:
        """
        The figures of sums over all batches and processes.

        Args:
            sums: Of batches that came with records.
            num_sequences: That they are of.
            headers: Of their caches.

        Raises:
            ValueError: No position has a record.
        """
        unbiased = all(is_unbiased(each.sampler, each.proposal_temperature, each.capture) for each in headers)
        return cls(
            num_sequences=num_sequences,
            num_positions=sums.num_positions,
            lm_loss=sums.lm_loss,
            accuracy=sums.accuracy,
            calibration_error=sums.calibration_error,
            cross_entropy=sums.cross_entropy,
            kl_to_records=sums.kl_to_records,
            kl=sums.cross_entropy - sums.entropy if unbiased and sums.has("entropy") else None,
            teacher_loss=sums.teacher_loss if sums.has("teacher_loss") else None,
        )

    def __str__(self) -> str:
        teacher = "" if self.teacher_loss is None else f", the teacher's {self.teacher_loss:.4f}"
        lines = [
            (
                f"LM loss: {self.lm_loss:.4f} nats per token{teacher}, {self.num_sequences} sequences "
                f"({self.num_positions:,} positions with records)"
            ),
            f"calibration error (ECE): {self.calibration_error:.2%}; accuracy {self.accuracy:.2%}",
            f"KL to the records: {self.kl_to_records:.4f} nats per position (the loss that training prints)",
        ]
        if self.kl is not None:
            lines.append(f"KL to the teacher: {self.kl:.4f} nats per position, estimated from records and entropy")
        return "\n".join(lines)


class HeldOut:
    """
    Sequences of a cache in batches, each with the cache's columns of its positions.

    Each process takes a share of every step, and all take equally many steps, as a student that is spread over
    processes needs; rows behind the last sequence are empty.  So each sequence is there once.

    Args:
        path: A cache, or where one is.
        sequences: The part, as in ``cache[i]``; None: all.
        batch_size: Sequences per batch, on each process.
        rank, world_size: None: torch.distributed's, where it is initialised, else 0 of 1.
        tokens: As for ``SparseLogitDataset``.

    Raises:
        SettingsError: The cache was made with isolated documents, and does not say where they begin.
        ValueError, TypeError, AlignmentError, FormatError, FileNotFoundError: As ``SparseLogitDataset``; by the
            iteration: damage, and tokens that the records are not about.
    """

    def __init__(
        self,
        path: Path | str | Cache,
        sequences: range | None = None,
        *,
        batch_size: int = 8,
        rank: int | None = None,
        world_size: int | None = None,
        tokens: TokenSource | None = None,
    ) -> None:
        self._dataset = SparseLogitDataset(
            path, batch_size, shuffle=False, rank=rank, world_size=world_size, tokens=tokens, tail="pad",
            sequences=sequences,
        )  # fmt: skip
        self.cache = self._dataset.cache
        self.sequences = range(len(self.cache)) if sequences is None else sequences
        self.isolated, self.schedule = self._dataset.isolated, self._dataset.schedule
        check_borders(self.cache)

    def __len__(self) -> int:
        """Batches of this process; the same on all."""
        return self.schedule.num_batches(0)

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Each batch, and of the teacher's ``entropy`` and ``label_logprob`` those that there are, [P] float32."""
        for batch, (places, _) in zip(self._dataset, self.schedule.batches(0, 0), strict=True):
            yield batch, self._columns(places, batch.input_ids.shape[1])

    def _columns(self, places: NDArray[np.int64], width: int) -> dict[str, Tensor]:
        header = self.cache.header
        own = header.columns if other_teacher(header) is None else ()  # else not of whom the records are of
        names = [name for name in (ENTROPY, LABEL_LOGPROB) if name in own]
        values = {name: np.zeros((places.size, width), np.float32) for name in names}
        for row, place in enumerate(places.tolist() if names else ()):
            if place >= 0:
                sequence = self.cache[self.sequences[place]]
                for name in names:
                    values[name][row, : sequence.targets.num_positions] = sequence.columns[name]
        return {name: torch.from_numpy(column).flatten() for name, column in values.items()}


def check_unseen(cache: Cache, part: range, trained: Iterable[tuple[Cache, range]], source: object) -> None:
    """
    Make sure that what is measured on is not trained on; sequences are known by their tokens.

    Where some are, the first process says so on stderr: short chats may be equal by chance, others are a leak.

    Args:
        cache: What is measured on.
        part: Its sequences that are.
        trained: The caches that are trained on, each with its sequences that are.
        source: What messages call these.

    Raises:
        SettingsError: Most are.
    """
    theirs = np.concatenate([one.alignments()[its.start : its.stop] for one, its in trained])
    both = np.isin(cache.alignments()[part.start : part.stop], theirs)
    advice = f"evaluate on others, or keep some of {source} from training with hold_out"
    seen = f"{cache.path}: training sees {both.sum()} of its {len(part)} sequences"
    if 2 * both.sum() > len(part):
        raise SettingsError(f"{seen}, the first is number {part.start + int(both.argmax())}; {advice}")
    if both.any() and find_rank()[0] == 0:
        say(f"note: {seen}, so that what is measured there is too good; {advice}")


def validate(
    model: nn.Module,
    held_out: HeldOut | Iterable[HeldOut],
    *,
    forward: Forward | None = None,
    device: torch.device | None = None,
    reach: Callable[[int], None] | None = None,
) -> Validation:
    """
    Measure a student on sequences of caches; on several processes each measures its share, and all get the figures.

    Without gradient, and without dropout for the time of the call.  Whoever trains under autocast calls it there.

    Args:
        model: A causal language model of transformers or peft, sharded or not, or a wrapper of one.
        held_out: The sequences, of one cache or of several; logits beyond a cache's ids, of a padded head, are left
            out.
        forward: How the model is run; None: as ``forward_of`` says.
        device: Where batches go; None: where the model's first parameter is.
        reach: Told of the sequences done on all processes, after each batch.

    Raises:
        SettingsError: The student has fewer logits than a cache has ids.
        ValueError: No sequence has a record, or logits are no finite numbers or of another shape.
        FormatError, AlignmentError: A cache is damaged, or about other tokens.
    """
    parts = [held_out] if isinstance(held_out, HeldOut) else list(held_out)
    device = device or next(model.parameters()).device
    sums, num_sequences = EvaluationSums(), 0
    with torch.no_grad(), outputs.evaluated(model):
        for part in parts:
            run = forward or forward_of(model, isolated=part.isolated)
            for step, (batch, columns) in enumerate(part, 1):
                _add(sums, run, batch.to(device), columns, part.cache.header.vocab_size)
                if reach is not None:
                    reach(num_sequences + min(step * part.schedule.global_batch, len(part.sequences)))
            num_sequences += len(part.sequences)
    if parts[0].schedule.world_size > 1:
        shared = sums.tensor.to(device)  # which is where a backend for accelerators wants it
        dist.all_reduce(shared)
        sums.tensor.copy_(shared)
    if sums.num_positions == 0:
        where = "; ".join(
            f"{each.cache.path}: sequences {each.sequences.start}:{each.sequences.stop}" for each in parts
        )
        raise ValueError(f"{where} have no record, so that there is nothing to measure; take others")
    return Validation.of(sums, num_sequences=num_sequences, headers=[each.cache.header for each in parts])


def forward_of(model: Any, *, isolated: bool) -> Forward:
    """
    How a student is run: up to its head where that is one matrix with bias, scale and cap, else whole.

    Args:
        model: A model of transformers or peft, or a wrapper of one as ``heads.run_to_head`` takes it.
        isolated: Whether documents must not see each other.
    """

    def places(batch: Batch) -> Tensor | None:
        return batch.position_ids if isolated else None

    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    if sharded or not hasattr(model, "get_output_embeddings"):
        return lambda batch: heads.run_to_head(model, batch.input_ids, places(batch))[:2]
    prompts = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    body = model.get_base_model() if hasattr(model, "get_base_model") and not prompts else model
    try:
        head = None if prompts else heads.output_head(body)
    except ValueError:  # the model itself knows what its logits are
        head = None
    if head is None:
        return lambda batch: outputs.logits(model, batch.input_ids, places(batch))
    return lambda batch: (outputs.hidden_states(body, batch.input_ids, places(batch)), head)


def check_width(width: int, vocab_size: int, name: str) -> int:
    """
    Make sure that a model has a logit for every id of a cache; the number of these.

    Raises:
        SettingsError: It has not.
    """
    if width < vocab_size:
        raise SettingsError(
            f"{name} has {width} logits, the cache {vocab_size} ids; widen its embedding, or take a cache of its own "
            "tokenizer"
        )
    return vocab_size


def check_finite(logits_PV: Tensor, name: str) -> None:
    """
    Refuse the logits of a broken model.

    Raises:
        ValueError: A position has NaN, or infinity other than that of masked ids; names the model.
    """
    if not torch.isfinite(logits_PV.amax(-1)).all():  # the greatest of a row is NaN if any is
        raise ValueError(f"{name}: gives logits that are no finite numbers; its weights are broken, use another model")


def _add(sums: EvaluationSums, forward: Forward, batch: Batch, columns: Mapping[str, Tensor], vocab_size: int) -> None:
    given = forward(batch)
    rows_PX, head = (given, None) if isinstance(given, Tensor) else given
    rows_PX = rows_PX.flatten(0, -2)
    labels_P = batch.labels.flatten()
    if len(rows_PX) != len(labels_P):
        raise ValueError(f"the student gives {len(rows_PX)} rows of logits or hidden states for {len(labels_P)} inputs")
    width = rows_PX.shape[1] if head is None else len(head.weight)
    check_width(width, vocab_size, "the student")
    step = len(labels_P) if head is None else max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, len(labels_P), step):
        span = slice(start, start + step)
        logits_PV = (rows_PX[span] if head is None else head.logits(rows_PX[span]))[:, :vocab_size]
        check_finite(logits_PV, "the student")
        sums.update(
            logits_PV,
            labels_P[span].to(logits_PV.device),  # a model may be spread over several
            targets=_cut(batch.targets, start, start + len(logits_PV)),
            **{f"{name}_P": values[span].to(logits_PV.device) for name, values in columns.items()},
        )


def _cut(targets: Targets, start: int, stop: int) -> Targets:
    """Those of some positions."""
    offsets = targets.offsets[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return Targets(targets.token_ids[first:last], targets.probs[first:last], offsets - first)
