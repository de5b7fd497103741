"""
measure_noise(): what drawn records add to the noise of a student's gradient, beside the noise of the text itself.

Trains nothing.  ``advice`` says what follows for a capture.
Shape letters: T positions, V vocabulary, P parameters, S sequences, R rows of the table.

Under forward KL the gradient is linear in the target: for one sequence it is g = Jᵀ (q - p) with the teacher's
probabilities p and ĝ = Jᵀ (q - p̂) with drawn ones, so that ĝ - g = Jᵀ (p - p̂): one forward pass of the student, and
one backward pass for each row.  The variance of g over the sequences is what every batch has, and the mean of
|ĝ - g|² is what the draws add; their quotient is the share.  At share 1 a batch is worth half as many sequences.
"""

# ruff: noqa: N815 - shape suffixes

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklformat import sampler as samplers_of
from sklformat.distill.models import outputs
from sklformat.distill.student.validation import check_finite

SAMPLERS = ("multinomial", "systematic")
LEAST_SEQUENCES = 3  # of which one can be left out, and a variance is left
_ROW_BITS = 16  # of a seed of draws, below those of the seed given
_Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lesson:
    """
    A sequence to measure on.

    Attributes:
        input_ids_T: int64.
        learnt_T: bool, which positions are learnt from.
    """

    input_ids_T: Tensor
    learnt_T: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentNoise:
    """
    What draws add to one student's gradient; variances are of a mean over the positions of one sequence, in nats.

    Attributes:
        data_variance, data_error: Of the gradient over the sequences, and its standard error.
        variances, variance_errors: [R] What the draws of each row add, and its standard error.
        shares, share_errors: [R] These parts of the data's variance, and their standard errors.
    """

    data_variance: float
    data_error: float
    variances: list[float]
    variance_errors: list[float]
    shares: list[float]
    share_errors: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseTable:
    """
    What ``measure_noise`` found.

    Attributes:
        num_sequences, num_positions: Measured on; the positions are those that are learnt from.
        samplers, rounds: [R] Of each row: first all rounds of the first sampler.
        unique_tokens: [R] Records per position, mean.
        students: By name.
    """

    num_sequences: int
    num_positions: int
    samplers: list[str]
    rounds: list[int]
    unique_tokens: list[float]
    students: dict[str, StudentNoise]


def measure_noise(
    teacher: Any,
    students: Mapping[str, Any],
    lessons: Sequence[Lesson],
    *,
    vocab_size: int,
    rounds: Sequence[int],
    samplers: Sequence[str] = SAMPLERS,
    seed: int = 0,
    reach: Callable[[int], None] = lambda _done: None,
) -> NoiseTable:
    """
    Variance of the gradient of distillation by draws, against its variance by the text.

    The gradient is that of the mean forward KL of the learnt positions, over all parameters that have
    ``requires_grad``.  Each sequence is run twice: first for the mean gradient, then for each one's part in the
    variance; so that no more than three gradients of a student are held at once.

    Independent draws of N rounds have exactly 1/N of the variance of one: all rows of "multinomial" are the mean of
    what each row's own draws say of it, which costs nothing and is surer than any of them.  Standard errors are those
    of the jackknife over the sequences.

    Args:
        teacher: Causal language model, on any device.
        students: Name to causal language model, on any devices, in float32 and eval mode.
        lessons: At least 3, independent of each other as far as the text allows.
        vocab_size: V, the ids that mean something to all of the models.
        rounds: Draws per position to try, each in 1..65535.
        samplers: Of "multinomial" and "systematic".
        seed: Of the draws, 0..2**48 - 1.
        reach: Told how many sequences are done, of twice the number.

    Raises:
        ValueError: Too few sequences, nothing to try, a sampler that is not unbiased or rounds that cannot be drawn; a
            model whose logits are not finite; or a student whose gradient does not vary.
    """
    check_grid(rounds, samplers)
    if len(lessons) < LEAST_SEQUENCES:
        raise ValueError(
            f"the variance over sequences and its error need at least {LEAST_SEQUENCES} sequences, got {len(lessons)}"
        )
    grid = [(sampler, each) for sampler in samplers for each in rounds]
    notes = {name: _Notes(student, len(lessons), len(grid)) for name, student in students.items()}
    for number, lesson in enumerate(lessons):
        p_TV = _teach(teacher, lesson, vocab_size)[1]
        for name, note in notes.items():
            note.add_mean(_Pass(note, name, lesson, p_TV))
        reach(number + 1)
    unique = np.zeros(len(grid))
    positions = sum(int(lesson.learnt_T.sum()) for lesson in lessons)
    for number, lesson in enumerate(lessons):
        logits_TV, p_TV = _teach(teacher, lesson, vocab_size)
        passes = {name: _Pass(note, name, lesson, p_TV) for name, note in notes.items()}
        for name, note in notes.items():
            note.add_deviation(number, passes[name])
        for row, (sampler, each) in enumerate(grid):
            # Rows must not share random numbers: their mean is taken.
            drawn = samplers_of.draw(logits_TV, each, sampler, seed=(seed << _ROW_BITS) + row, sequence=number)
            records_T = torch.from_numpy(np.diff(drawn.offsets))
            unique[row] += float(records_T[lesson.learnt_T].sum()) / positions
            noise_TV = p_TV - _dense(drawn, each, vocab_size)
            for name, note in notes.items():
                added = passes[name].pull(noise_TV)
                note.squares[number, row] = _dot(added, added)
        reach(len(lessons) + number + 1)
    return NoiseTable(
        num_sequences=len(lessons),
        num_positions=positions,
        samplers=[sampler for sampler, _ in grid],
        rounds=[each for _, each in grid],
        unique_tokens=unique.tolist(),
        students={name: note.result(name, grid, scale=(len(lessons) / positions) ** 2) for name, note in notes.items()},
    )


def check_grid(rounds: Sequence[int], samplers: Sequence[str]) -> None:
    """
    There is something to try, and it can be drawn without bias.

    Raises:
        ValueError: It is not so.
    """
    if not rounds or not samplers:
        raise ValueError("nothing to try: give rounds, such as 2 12 50, and samplers")
    for each in rounds:
        samplers_of.check_rounds(each)
    if len(set(rounds)) < len(rounds):
        raise ValueError(f"rounds to try stand twice in {', '.join(map(str, rounds))}; give each once")
    strange = [sampler for sampler in samplers if sampler not in SAMPLERS]
    if strange:
        raise ValueError(f"the noise of sampler {strange[0]!r} is not all of its error; try {' or '.join(SAMPLERS)}")


class _Pass:
    """A student's logits of one sequence, whose graph is kept for several backward passes."""

    def __init__(self, note: _Notes, name: str, lesson: Lesson, p_TV: Tensor) -> None:
        self._note, self._learnt_T = note, lesson.learnt_T
        device = outputs.input_device(note.student)
        with torch.enable_grad():
            self._logits_TV = outputs.logits(note.student, lesson.input_ids_T[None].to(device))[0, :, : p_TV.shape[1]]
        check_finite(self._logits_TV.detach(), name)
        self._p_TV = p_TV

    def gradient(self) -> list[Tensor | None]:
        """That of full distillation, summed over the learnt positions."""
        q_TV = self._logits_TV.detach().float().softmax(-1)
        return self.pull(q_TV - self._p_TV.to(q_TV))

    def pull(self, towards_TV: Tensor) -> list[Tensor | None]:
        """The gradient whose part at the logits is given; of each parameter, None where it has none."""
        given_TV = (towards_TV * self._learnt_T[:, None].to(towards_TV.device)).to(self._logits_TV)
        return list(
            torch.autograd.grad(self._logits_TV, self._note.parameters, given_TV, retain_graph=True, allow_unused=True)
        )


class _Notes:
    """What is kept of one student: the sum of its gradients, and a few numbers of each sequence."""

    def __init__(self, student: Any, num_sequences: int, num_rows: int) -> None:
        self.student = student
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._sum_P = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._own, self._along = np.zeros(num_sequences), np.zeros(num_sequences)  # |g|², and g · Σ g
        self.squares: _Floats = np.zeros((num_sequences, num_rows))

    def add_mean(self, passed: _Pass) -> None:
        for total_P, part in zip(self._sum_P, passed.gradient(), strict=True):
            if part is not None:
                total_P.add_(part)

    def add_deviation(self, number: int, passed: _Pass) -> None:
        gradient = passed.gradient()
        self._own[number], self._along[number] = _dot(gradient, gradient), _dot(gradient, self._sum_P)

    def result(self, name: str, grid: Sequence[tuple[str, int]], *, scale: float) -> StudentNoise:
        """
        The variances, times ``scale``.

        Raises:
            ValueError: The gradient does not vary.
        """
        added_SR = _pooled(self.squares, grid)
        count, total = len(self._own), _dot(self._sum_P, self._sum_P)
        data = (self._own.sum() - total / count) / (count - 1)
        if not data > 0:
            raise ValueError(
                f"{name}: its gradient is the same on every sequence, so that nothing can be said of a share; give a "
                "student that is not its teacher, and text that does not repeat"
            )
        # The same without each sequence.
        totals_S = total - 2 * self._along + self._own
        data_S = (self._own.sum() - self._own - totals_S / (count - 1)) / (count - 2)
        rest_SR = (added_SR.sum(0) - added_SR) / (count - 1)
        added = added_SR.mean(0)
        return StudentNoise(
            data_variance=float(data * scale),
            data_error=float(_jackknife(data_S) * scale),
            variances=(added * scale).tolist(),
            variance_errors=(_jackknife(rest_SR) * scale).tolist(),
            shares=(added / data).tolist(),
            share_errors=_jackknife(rest_SR / data_S[:, None]).tolist(),
        )


def _teach(teacher: Any, lesson: Lesson, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The teacher's logits on the CPU, where C draws from them, and its probabilities there."""
    with torch.inference_mode():
        ids = lesson.input_ids_T[None].to(outputs.input_device(teacher))
        logits_TV = outputs.logits(teacher, ids)[0, :, :vocab_size].float().cpu()
        check_finite(logits_TV, "the teacher")
    logits_TV = logits_TV.clone()  # no tensor of inference mode
    return logits_TV, logits_TV.softmax(-1)


def _dense(drawn: Any, rounds: int, vocab_size: int) -> Tensor:
    """[T, V] the drawn probabilities."""
    sizes = np.diff(drawn.offsets)
    dense_TV = torch.zeros(sizes.size, vocab_size)
    positions = np.repeat(np.arange(sizes.size), sizes)
    values = drawn.weights if drawn.counts is None else drawn.counts / np.float32(rounds)
    dense_TV[torch.from_numpy(positions), torch.from_numpy(drawn.token_ids.astype(np.int64))] = torch.from_numpy(values)
    return dense_TV


def _dot(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> float:
    """Of gradients, summed in float64."""
    pairs = zip(left, right, strict=True)
    return sum(float((a * b).sum(dtype=torch.float64)) for a, b in pairs if a is not None and b is not None)


def _pooled(squares_SR: _Floats, grid: Sequence[tuple[str, int]]) -> _Floats:
    """Of independent draws the rows' common variance of one, over each row's rounds; the other rows as they are."""
    pooled_SR = squares_SR.copy()
    own = [row for row, (sampler, _) in enumerate(grid) if sampler == "multinomial"]
    rounds = np.array([grid[row][1] for row in own], float)
    if own:
        pooled_SR[:, own] = (squares_SR[:, own] * rounds).mean(1, keepdims=True) / rounds
    return pooled_SR


def _jackknife(without: _Floats) -> Any:
    """Standard error of a figure, from that figure without each sequence."""
    count = len(without)
    return np.sqrt((count - 1) / count * ((without - without.mean(0)) ** 2).sum(0))
