"""
Where the model runners of vLLM have the rows of prompts: their methods by what these take, and what they say of a step.

Looks at what it is given and imports no engine.  Each method is called once per step, after the forward pass, on every
rank of a tensor-parallel group; so all ranks ask for the same logits.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

ROWS_AT_ONCE = {"cpu": 128, "cuda": 1024}
"""Rows whose logits are there at once, by kind of device."""

_SHOWN = "is_shown_to_sklformat"


class Rows(NamedTuple):
    """
    Of one request in one step: some rows of its prompt that follow each other.

    Attributes:
        request: Its id.
        first: Place of the first in the prompt.
        size: How many.
        offset: Place of the first among the hidden states of the step.
        prompt: Tokens of the prompt.
    """

    request: str
    first: int
    size: int
    offset: int
    prompt: int


class Step(NamedTuple):
    """
    What a forward pass computed of prompts.

    Attributes:
        rows: Of all requests that are not beyond their prompts.
        hidden_states: [rows of the step, D], and perhaps more.
        compute_logits: From hidden states to logits, by the model's own head; None on a rank that gets none.
    """

    rows: list[Rows]
    hidden_states: Tensor
    compute_logits: Callable[[Tensor], Tensor | None]


Show: TypeAlias = Callable[[Step], None]


def read_first_runner(runner: Any, hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> Step:
    """A step of the runner in vllm/v1/worker/gpu_model_runner.py."""
    rows = []
    for index, name in enumerate(runner.input_batch.req_ids):
        request = runner.requests[name]
        if request.prompt_token_ids is not None and name in num_scheduled_tokens:
            offset = int(runner.query_start_loc.np[index])
            place = request.num_computed_tokens, num_scheduled_tokens[name], offset
            rows += _rows(name, *place, len(request.prompt_token_ids))
    return Step(rows, hidden_states, runner.model.compute_logits)


def read_second_runner(
    _worker: Any,
    logits_fn: Callable[[Tensor], Tensor | None],
    hidden_states: Tensor,
    input_batch: Any,
    _all_token_ids: Tensor,
    _num_computed_tokens: Tensor,
    prompt_lens: Any,
) -> Step:
    """A step of the runner in vllm/v1/worker/gpu/model_runner.py, by its worker of prompt log-probs."""
    rows = []
    for index, name in enumerate(input_batch.req_ids):
        first = int(input_batch.num_computed_prefill_tokens_np[index])
        count, offset = int(input_batch.num_scheduled_tokens[index]), int(input_batch.query_start_loc_np[index])
        rows += _rows(name, first, count, offset, int(prompt_lens[input_batch.idx_mapping_np[index]]))
    return Step(rows, hidden_states, logits_fn)


class Method(NamedTuple):
    """
    A method that is called with a step.

    Attributes:
        module: Of its class.
        owner: Name of the class.
        name: Its own.
        parameters: Those that are known, self included.
        read: Takes them, and gives the step.
    """

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...]
    read: Callable[..., Step]


FIRST_RUNNER = Method(
    "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunner",
    "_get_prompt_logprobs_dict",
    ("self", "hidden_states", "num_scheduled_tokens"),
    read_first_runner,
)
SECOND_RUNNER = Method(
    "vllm.v1.worker.gpu.sample.prompt_logprob",
    "PromptLogprobsWorker",
    "compute_prompt_logprobs",
    (
        *("self", "logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens"),
        "prompt_lens",
    ),
    read_second_runner,
)


def is_known(method: Method, owner: Any) -> bool:
    """Whether a class has a method in the shape that is known; None has not."""
    found = getattr(owner, method.name, None)
    return callable(found) and tuple(inspect.signature(found).parameters) == method.parameters


def wrap(method: Method, owner: Any, show: Show) -> None:
    """Have each call of a method shown first; the second time nothing is done."""
    original = getattr(owner, method.name)
    if hasattr(original, _SHOWN):
        return

    @functools.wraps(original)
    def shown(*arguments: Any, **named: Any) -> Any:
        bound = inspect.signature(original).bind(*arguments, **named)
        show(method.read(*bound.args))
        return original(*arguments, **named)

    setattr(shown, _SHOWN, True)
    setattr(owner, method.name, shown)


def logits_of(step: Step) -> Iterator[tuple[list[Rows], Tensor | None]]:
    """
    The logits of all rows of a step, block after block.

    Yields:
        Rows, and their logits one below the other, [sum of counts, V]; None on a rank that gets none.
    """
    most = ROWS_AT_ONCE[step.hidden_states.device.type]
    for block in _blocks(step.rows, most):
        states = [step.hidden_states[rows.offset : rows.offset + rows.size] for rows in block]
        yield block, step.compute_logits(torch.cat(states) if len(states) > 1 else states[0])


def _blocks(rows: Sequence[Rows], most: int) -> Iterator[list[Rows]]:
    """Rows in the same order, ``most`` in each block but the last."""
    block: list[Rows] = []
    room = most
    for whole in rows:
        done = 0
        while done < whole.size:
            count = min(room, whole.size - done)
            part = whole._replace(first=whole.first + done, offset=whole.offset + done, size=count)
            block, room, done = [*block, part], room - count, done + count
            if room == 0:
                yield block
                block, room = [], most
    if block:
        yield block


def _rows(name: str, first: int, scheduled: int, offset: int, prompt: int) -> list[Rows]:
    """
    Those of the prompt, if any; what is beyond it was generated.

    None of the requests with which an engine tries itself out before it has started: their names are no numbers.
    """
    count = min(scheduled, prompt - first) if name[:1].isdecimal() else 0
    return [Rows(name, first, count, offset, prompt)] if count > 0 else []
