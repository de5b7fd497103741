"""
Draw sparse records from teacher logits on the CPU, through C.

Knows nothing of files or of teachers. SPEC.md section 2 defines the terms; csrc/sampler.c writes the arithmetic out.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat import native
from sklformat.format.records import SparseTargets

SAMPLERS = ("multinomial", "systematic", "topk", "topp")
MAX_ROUNDS = 65535
MAX_COUNT_ROUNDS = 127  # beyond, a count does not fit its 7 bits and counts / rounds are given as weights
MAX_K = 65535  # records that a position can have


def draw(
    logits: Any,
    rounds: int = 50,
    sampler: str = "multinomial",
    proposal_temperature: float = 1.0,
    k: int | None = None,
    p: float | None = None,
    seed: int = 0,
    *,
    sequence: int,
    first_position: int = 0,
    dtype: str | None = None,
    self_normalise: bool = True,
) -> SparseTargets:
    """
    Draw sparse records from the teacher's logits.

    ``multinomial`` makes ``rounds`` independent draws from the proposal q. ``systematic`` takes ``rounds`` evenly
    spaced points of its distribution function with one common random shift: the same mean with less variance.
    ``topk`` and ``topp`` draw nothing: they keep the most probable ids, and so give biased targets.

    What the targets estimate: counts / rounds, without bias, the teacher's probabilities p. With
    ``proposal_temperature`` t other than 1, q is proportional to p**t and each draw weighs p / q. The paper divides
    these weights by their sum; this is the default, and slightly biased. ``self_normalise=False`` gives p / q / rounds
    instead: unbiased, but the weights of a position sum to 1 only on average, and one may pass 1.

    Records depend on the row, seed, sequence and position alone: any split into calls, and any kernel, gives the same.
    Ids whose logit is -inf, or so low that their probability is below 2**-125 of the largest, are never drawn.

    Args:
        logits: [T, V] teacher logits, V in 1..2**24: numpy float32 or float16, a torch CPU tensor of float32, float16
            or bfloat16, or uint16 bits with ``dtype="bfloat16"``. Read in place, whatever the distance between rows,
            where values along V are contiguous; copied otherwise.
        rounds: Draws per position (multinomial, systematic), 1..65535.
        sampler: "multinomial", "systematic", "topk" or "topp".
        proposal_temperature: t of the proposal, 0.001..100; an exponent, not a divisor. 1 for topk and topp.
        k: topk: ids to keep, 1..65535, required; equal logits go by lower id. topp: the most to keep, 65535 by default.
        p: topp: the fewest most probable ids whose mass reaches p are kept, in (0, 1], required.
        seed: 0..2**64 - 1.
        sequence: Global number of the sequence, 0..2**64 - 1; without a default, since sequences of one number and
            seed would be drawn from by the same random numbers.
        first_position: Position of the first row; first_position + T <= 2**32.
        dtype: "bfloat16" where logits are its uint16 bits; else left out.
        self_normalise: See above; matters only where t is not 1.

    Returns:
        T positions, ids ascending. Counts where q = p and rounds <= 127; else weights: counts / rounds, importance
        weights, or probabilities that are not normalised (topk, topp); weights below 2**-126 are left out.

    Raises:
        ValueError: An argument out of range, missing, or without meaning for the sampler; logits that are not 2-D, not
            of a type above, masked or not on the CPU; or a row that holds NaN, +inf or a value above 2**20, or none
            above -2**20. The last names sequence, position and id.
        TypeError: logits are neither an array nor a tensor, or an integer argument is not an integer.

    Source: Anshumann et al. 2025 (arXiv 2503.16870), section 3.4; systematic sampling: Madow 1949.
    """
    rows, dtype = _rows(logits, dtype)
    rounds, seed, sequence, first_position = map(operator.index, (rounds, seed, sequence, first_position))
    k_checked, p_checked = _top_arguments(sampler, k, p)
    is_top = sampler in ("topk", "topp")
    if not is_top:
        check_rounds(rounds)
    check_temperature(proposal_temperature)
    if is_top and proposal_temperature != 1:
        raise ValueError(f"sampler {sampler!r} has no proposal: proposal_temperature must be 1")
    if self_normalise not in (False, True):
        raise ValueError(f"self_normalise must be True or False, got {self_normalise!r}")
    if not (0 <= seed < 1 << 64 and 0 <= sequence < 1 << 64):
        raise ValueError(f"seed and sequence must be in 0..2**64 - 1, got {seed} and {sequence}")
    if not 0 <= first_position <= (1 << 32) - rows.shape[0]:
        raise ValueError(f"first_position must be >= 0 and first_position + T <= 2**32, got {first_position}")
    weighted = is_top or proposal_temperature != 1 or rounds > MAX_COUNT_ROUNDS
    offsets, token_ids, pairs = native.draw(
        rows,
        dtype=dtype,
        sampler=sampler,
        rounds=rounds if not is_top else 0,
        k=k_checked,
        p=p_checked,
        proposal_temperature=float(proposal_temperature),
        self_normalise=bool(self_normalise),
        weighted=weighted,
        seed=seed,
        sequence=sequence,
        first_position=first_position,
    )
    if weighted:
        return SparseTargets(token_ids=token_ids, weights=pairs, offsets=offsets)
    return SparseTargets(token_ids=token_ids, counts=pairs, offsets=offsets)


def check_rounds(rounds: int) -> None:
    """
    So many draws per position can be made.

    Raises:
        ValueError: They cannot.
    """
    if not 1 <= rounds <= MAX_ROUNDS:
        raise ValueError(f"rounds must be in 1..{MAX_ROUNDS}, got {rounds}")


def check_temperature(proposal_temperature: float) -> None:
    """
    Draws can come from p to this power.

    Raises:
        ValueError: They cannot; shows it.
    """
    if not 0.001 <= proposal_temperature <= 100:  # false for NaN
        raise ValueError(f"proposal_temperature must be in 0.001..100, got {proposal_temperature}")


def _top_arguments(sampler: str, k: int | None, p: float | None) -> tuple[int, float]:
    """What the sampler needs of k and p; 0 and 0.0 where it has none."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler != "topp" and p is not None:
        raise ValueError(f"sampler {sampler!r} takes no p, got {p}")
    if sampler in ("multinomial", "systematic"):
        if k is not None:
            raise ValueError(f"sampler {sampler!r} takes no k, got {k}; rounds says how often to draw")
        return 0, 0.0
    if sampler == "topk" and k is None:
        raise ValueError("sampler 'topk' needs k")
    if sampler == "topp" and (p is None or not 0 < p <= 1):
        raise ValueError(f"sampler 'topp' needs p in (0, 1], got {p}")
    k = MAX_K if k is None else operator.index(k)
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k must be in 1..{MAX_K}, got {k}")
    return k, 0.0 if p is None else float(p)


def _rows(logits: Any, dtype: str | None) -> tuple[NDArray[Any], str]:
    """[T, V] items contiguous along V (bfloat16 as uint16 bits), and the name of their type."""
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported torch; this module never does
    if torch is not None and isinstance(logits, torch.Tensor):
        if logits.device.type != "cpu":
            raise ValueError(f"logits are on {logits.device}; draw works on the CPU, call .cpu() first")
        tensor = logits.detach()
        if tensor.dtype == torch.bfloat16:  # numpy has no such type; its bits do
            array, name = tensor.view(torch.int16).numpy().view(np.uint16), "bfloat16"
        else:
            array = tensor.numpy()
            name = array.dtype.name
    elif isinstance(logits, np.ma.MaskedArray):
        raise ValueError("logits are a masked array; draw knows no masks: give logits.filled(-numpy.inf)")
    elif isinstance(logits, np.ndarray):
        array, name = logits, logits.dtype.name
    else:
        raise TypeError(f"logits must be a numpy array or a torch tensor, got {type(logits).__name__}")
    if name == "bfloat16" or (name == "uint16" and dtype == "bfloat16"):
        array, name = array.view(np.uint16), "bfloat16"
    if name not in ("float32", "float16", "bfloat16") or not array.dtype.isnative:
        raise ValueError(
            f"logits must be float32, float16 or bfloat16 in native byte order, or uint16 bits with dtype='bfloat16'; "
            f"got {array.dtype.str if name != 'bfloat16' else name}; convert them, as by logits.astype(numpy.float32)"
        )
    if dtype is not None and dtype != name:
        raise ValueError(f"dtype is {dtype!r}, but the logits are {name}")
    if array.ndim != 2 or not 1 <= array.shape[1] <= 1 << 24:
        advice = "; draw takes one sequence at a time, as logits[0]" if array.ndim == 3 else ""
        raise ValueError(f"logits must be [T, V] with V in 1..2**24, got shape {array.shape}{advice}")
    in_place = array.strides[1] == array.itemsize and array.strides[0] >= 0 and array.strides[0] % array.itemsize == 0
    return array if in_place else np.ascontiguousarray(array), name
