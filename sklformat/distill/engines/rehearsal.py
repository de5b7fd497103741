"""
Two short prompts at the start: what the worker sees of them against what the engine itself says.

Without it a capture from an engine whose inside has changed could hold records of other rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sklformat.distill.engines.desk import Desk, Gone, Refused, Synced, Tested
from sklformat.distill.engines.vllm import Served
from sklformat.errors import EngineError

_LENGTHS = 17, 11
_PATIENCE_SECONDS = 120.0
# Greatest difference of two log-probs; half precision rounds a logit of 32 to 1/8, and its products by their shapes.
_TOLERANCE = {"torch.float32": 0.02}
_TOLERANCE_OF_HALVES = 0.3


def rehearse(engine: Served, desk: Desk, vocab_size: int, seq_len: int, patience: float = _PATIENCE_SECONDS) -> None:
    """
    Compare log-probs of every row, as the worker makes them of the logits it sees, with the engine's own.

    Args:
        engine: Which was just started.
        desk: Where its worker sends what it sees.
        vocab_size: Ids that mean something.
        seq_len: Positions of a sequence, at most.
        patience: Seconds in which the worker must answer.

    Raises:
        EngineError: They differ, or there are none; names version and hook.
    """
    rng = np.random.default_rng(0)
    lengths = [min(seq_len, length) for length in _LENGTHS]
    prompts = [rng.integers(0, vocab_size, length + 1).astype(np.uint32) for length in lengths]
    for group in [[0], [1]] if engine.runs_alone else [[0, 1]]:
        for number in group:
            desk.open(number, prompts[number], None, "log-probs")
        said = engine.log_probs({number: prompts[number][:-1] for number in group})
        desk.sync(-1 - group[0])
        seen = _seen(engine, desk, -1 - group[0], patience)
        for number in group:
            parts = [part for part in seen if part.sequence == number]
            _compare(engine, said[number], parts, vocab_size)
            desk.close(number)


def _seen(engine: Served, desk: Desk, sync: int, patience: float) -> list[Tested]:
    """What the worker saw, until it says that this was all."""
    seen: list[Tested] = []
    while True:
        arrived = desk.next(patience)
        if isinstance(arrived, Tested):
            seen.append(arrived)
        elif isinstance(arrived, Refused):
            raise EngineError(f"{engine.described}: {arrived.reason}; {_ADVICE}")
        elif isinstance(arrived, Gone):
            raise EngineError(f"{engine.described}: its worker has ended, its own messages are above; {_ADVICE}")
        elif arrived is None:
            raise EngineError(f"{engine.described}: its worker says nothing for {patience:g} seconds; {_ADVICE}")
        elif isinstance(arrived, Synced) and arrived.number == sync:
            return seen


def _compare(engine: Served, said: NDArray[np.float32], seen: list[Tested], vocab_size: int) -> None:
    """Log-probs of one prompt, [2, T]: of tokens that follow (none for the last) and the greatest; and as they came."""
    reached, positions = 0, said.shape[1]
    for part in seen:
        if part.first != reached:
            raise EngineError(
                f"{engine.described}: row {part.first} of a short prompt came, row {reached} was expected; {_ADVICE}"
            )
        if part.width < vocab_size:
            raise EngineError(
                f"{engine.described}: gives {part.width} logits per row, tokenizer and config say {vocab_size}; "
                f"{_ADVICE}"
            )
        reached += part.labels.size
        differences = np.abs(np.stack([part.labels, part.greatest]) - said[:, part.first : reached])
        if reached == positions:
            differences[0, -1] = 0.0
        difference = differences.max()
        if not difference <= _TOLERANCE.get(part.dtype, _TOLERANCE_OF_HALVES):  # true for NaN
            raise EngineError(
                f"{engine.described}: log-probs of a short prompt differ by {difference:.3g} nats from those that it "
                f"says itself; {_ADVICE}"
            )
    if reached != positions:
        raise EngineError(
            f"{engine.described}: {positions - reached} of the {positions} rows of a short prompt did not come: it "
            f"does not show the logits of prompts as is known; {_ADVICE}"
        )


_ADVICE = "use another version of it (docs/engines.md says which are known), or --engine transformers"
