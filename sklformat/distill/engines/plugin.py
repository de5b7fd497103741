"""
What vLLM calls in each of its processes before a model is loaded: entry point ``sklformat`` of vllm.general_plugins.

Does nothing where no capture of ours runs.
"""

from __future__ import annotations

from sklformat.distill.engines import messages


def register() -> None:
    """Have the rows of prompts shown to a worker of ours, if this process belongs to a capture; may be called twice."""
    address = messages.find_address()
    if address is None:
        return
    from sklformat.distill.engines import vllm  # noqa: PLC0415  whoever calls has loaded it

    vllm.hook_in(address[0])
