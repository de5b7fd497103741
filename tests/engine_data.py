"""An engine that works as vLLM does, in its scheduling and in the shapes of its two runners, with a made-up model."""

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import torch
from system import HANGS

from sklformat.distill.engines import hooks, messages
from sklformat.distill.engines.desk import Desk
from sklformat.distill.engines.messages import Settings
from sklformat.distill.engines.worker import show_logits, worker_here
from sklformat.errors import EngineError

VOCAB, WIDTH = 280, 288  # ids that mean something, and logits that there are
SAMPLING = {"sampler": "multinomial", "seed": 5, "proposal_temperature": 1.0, "k": None, "p": None}
SAMPLING["self_normalise"] = True
_TABLE = torch.randn(997, WIDTH, generator=torch.Generator().manual_seed(0)) * 3


def logits_of(tokens):
    """[T, V] of the prompt that begins a sequence of T + 1 tokens: of each row its token and its place say all."""
    states = states_of(np.asarray(tokens[:-1], np.int64), 0)
    return head(states)[:, :VOCAB]


def states_of(tokens, first):
    """[rows, 2] hidden states."""
    places = torch.arange(first, first + len(tokens))
    return torch.stack([torch.from_numpy(tokens), places], 1).float()


def head(states):
    """[rows, V] logits, the same however many rows there are at once."""
    return _TABLE[(states[:, 0] * 31 + states[:, 1]).long() % len(_TABLE)].clone()


def tokens_of(sequence, positions=40):
    return np.random.default_rng(sequence).integers(0, VOCAB, positions + 1).astype(np.uint32)


def settings(**changes):
    given = {"kind": "counts", "rounds": 20, "sampling": SAMPLING, "columns": (), "vocab_size": VOCAB}
    return Settings(**given | {"on_device": False} | changes)


@contextlib.contextmanager
def connected(hook="runner", **changes):
    """A desk, and this process as one of an engine."""
    with (
        messages.listening() as (listener, path),
        messages.announced(hook, path),
        Desk(listener, settings(**changes)) as desk,
    ):
        yield desk


def try_layer_out():
    """What a layer of logits is asked for before the engine has started; whoever listens must answer meanwhile."""
    tried = threading.Thread(target=lambda: worker_here().show_layer(torch.zeros(3, WIDTH)), daemon=True)
    tried.start()
    tried.join(HANGS)
    assert not tried.is_alive(), "nobody answers while the engine starts"


class FirstRunner:
    """As GPUModelRunner of vllm/v1/worker/gpu_model_runner.py keeps a step."""

    def __init__(self, compute_logits):
        self.model = SimpleNamespace(compute_logits=compute_logits)

    def _get_prompt_logprobs_dict(self, hidden_states, num_scheduled_tokens):
        return {"of vLLM": len(num_scheduled_tokens)}

    def finish_step(self, scheduled, states):
        starts = np.cumsum([0, *(count for _, count in scheduled)])
        # One that was pre-empted is still known, and has nothing in the step.
        self.requests = {
            name: SimpleNamespace(prompt_token_ids=request.prompt.tolist(), num_computed_tokens=request.done)
            for name, request in [(request.name, request) for request, _ in scheduled]
        }
        self.input_batch = SimpleNamespace(req_ids=[request.name for request, _ in scheduled] + ["99-preempted"])
        self.requests["99-preempted"] = SimpleNamespace(prompt_token_ids=[1, 2], num_computed_tokens=0)
        self.query_start_loc = SimpleNamespace(np=starts)
        counts = {request.name: count for request, count in scheduled}
        return self._get_prompt_logprobs_dict(states, counts)


class SecondRunner:
    """As PromptLogprobsWorker of vllm/v1/worker/gpu/sample/prompt_logprob.py is called."""

    def __init__(self, compute_logits):
        self._compute_logits = compute_logits

    def compute_prompt_logprobs(
        self, logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
    ):
        return {"of vLLM": len(input_batch.req_ids)}

    def finish_step(self, scheduled, states):
        prompt_lens = np.zeros(64, np.int32)
        slots = np.array([7 + 2 * place for place in range(len(scheduled))])[::-1].copy()
        for slot, (request, _) in zip(slots, scheduled, strict=True):
            prompt_lens[slot] = request.prompt.size
        batch = SimpleNamespace(
            req_ids=[request.name for request, _ in scheduled],
            idx_mapping_np=slots,
            num_computed_prefill_tokens_np=np.array([min(r.done, r.prompt.size) for r, _ in scheduled], np.int32),
            num_scheduled_tokens=np.array([count for _, count in scheduled], np.int32),
            query_start_loc_np=np.cumsum([0, *(count for _, count in scheduled)]),
        )
        nothing = torch.empty(0)
        return self.compute_prompt_logprobs(self._compute_logits, states, batch, nothing, nothing, prompt_lens)


RUNNERS = {
    "first": (FirstRunner, hooks.FIRST_RUNNER),
    "second": (SecondRunner, hooks.SECOND_RUNNER),
}


class Request:
    def __init__(self, sequence, prompt, lingers):
        self.name, self.prompt, self.done, self.left = f"{sequence}-0a1b2c3d", prompt, 0, 1 + lingers


class FakeEngine:
    """
    Args:
        kind: Of runner.
        budget: Tokens of a step.
        happens: By step, what happens before it: ("preempt" | "abort" | "repeat" | "hide", sequence), or "die".
        window: As of an engine.
        lingers: Steps that a request stays after its prompt.
        backwards: Take the newest request first.
    """

    runs_alone = False
    described = "vllm 0.0 (hook: runner)"

    def __init__(self, kind="first", budget=64, happens=None, *, window=4, lingers=0, backwards=False):
        owner, method = RUNNERS[kind]
        self._class = type(owner.__name__, (owner,), {})
        self._runner = self._class(self._compute_logits)
        hooks.wrap(method, self._class, lambda step: step.rows and show_logits(step, worker_here()))
        self._requests, self._budget, self._happens, self._steps = [], budget, happens or {}, 0
        self.window, self._lingers, self._backwards = window, lingers, backwards
        self.calls, self.submitted, self.own = [], [], []

    def _compute_logits(self, states):
        self.calls.append(len(states))
        return head(states)

    def try_out(self):
        """What a runner does before the engine has started: a step of its own requests."""
        request = Request("_warmup_0_", np.arange(3, dtype=np.uint32), 0)
        request.name = "_warmup_0_"
        self._runner.finish_step([(request, 3)], states_of(np.arange(3), 0))

    @property
    def is_busy(self):
        return bool(self._requests)

    def submit(self, sequence, prompt):
        self.submitted.append(sequence)
        self._requests.insert(0 if self._backwards else len(self._requests), Request(sequence, prompt, self._lingers))

    def step(self):
        what = self._happens.get(self._steps, ())
        self._steps += 1
        if what == "die":
            raise EngineError("vllm 0.0 (hook: runner): the engine has ended")
        does, victim = what or (None, None)
        chosen = [request for request in self._requests if request.name.startswith(f"{victim}-")]
        for request in chosen:
            if does == "preempt":
                request.done = 0
            if does == "abort":
                self._requests.remove(request)
        scheduled, budget = [], self._budget
        for request in self._requests:
            # Beyond its prompt a request has one row per step.
            count = min(budget, max(1, request.prompt.size - request.done))
            if count:
                scheduled.append((request, count))
                budget -= count
        if not scheduled:
            return
        rows = [np.append(r.prompt, [1] * 9)[r.done : r.done + count].astype(np.int64) for r, count in scheduled]
        states = [states_of(tokens, r.done) for tokens, (r, _) in zip(rows, scheduled, strict=True)]
        hidden = torch.cat([*states, torch.zeros(3, 2)])  # padded, as a captured graph is
        if does != "hide":
            self.own.append(self._runner.finish_step(scheduled, hidden))
        if does == "repeat":
            self._runner.finish_step(scheduled, hidden)
        for request, count in scheduled:
            request.done += count
            request.left -= request.done >= request.prompt.size
        self._requests = [request for request in self._requests if request.left > 0]

    def log_probs(self, prompts):
        """What vLLM says of prompts, whose rows are shown meanwhile."""
        for number, prompt in prompts.items():
            self.submit(number, prompt)
        while self.is_busy:
            self.step()
        said = {}
        for number, prompt in prompts.items():
            scores = head(states_of(prompt.astype(np.int64), 0)).float().log_softmax(-1)
            labels = scores[torch.arange(len(prompt) - 1), torch.from_numpy(prompt[1:].astype(np.int64))]
            said[number] = np.stack([np.append(labels.float(), np.nan), scores.amax(-1)]).astype(np.float32)
        return said


class LayerEngine(FakeEngine):
    """The same where only the layer of logits is seen: one request at a time, whole; first the row to sample from."""

    runs_alone = True
    described = "vllm 0.0 (hook: layer)"

    def __init__(self, rows_of_prompt=-1, at_once=1024, first=1, happens=None):
        super().__init__(happens=happens, window=1)
        self._rows_of_prompt, self._at_once, self._first = rows_of_prompt, at_once, first

    def step(self):
        what = self._happens.get(self._steps, ())
        self._steps += 1
        request = self._requests.pop()
        if what and what[0] == "abort":
            return
        states = states_of(request.prompt.astype(np.int64), 0)
        worker_here().show_layer(head(states[-self._first :]))
        rows = states if self._rows_of_prompt is None else states[: self._rows_of_prompt]
        for at in range(0, len(rows), self._at_once):
            worker_here().show_layer(head(rows[at : at + self._at_once]))
