"""Which methods of a runner are known, and what is wrapped."""

import engine_data
import pytest
import torch

from sklformat.distill.engines import hooks


@pytest.mark.parametrize("kind", engine_data.RUNNERS)
def test_a_known_method(kind):
    """By the names of its parameters, in their order."""
    owner, method = engine_data.RUNNERS[kind]
    assert hooks.is_known(method, owner)


@pytest.mark.parametrize("kind", engine_data.RUNNERS)
def test_an_unknown_method(kind):
    """No class, no method, another parameter, or one more: none of them is guessed at."""
    _, method = engine_data.RUNNERS[kind]
    known = ", ".join(method.parameters)
    assert not hooks.is_known(method, None)
    assert not hooks.is_known(method, type("Runner", (), {}))
    for parameters in (known + ", more", known.replace("hidden_states", "states"), known.rpartition(",")[0]):
        scope = {}
        exec(f"def {method.name}({parameters}): pass", scope)
        assert not hooks.is_known(method, type("Runner", (), {method.name: scope[method.name]}))


def test_a_method_is_wrapped_once():
    """A plug-in is called several times; each call of the method is shown once, arguments named or not."""
    shown = []
    runner_class = type("Runner", (engine_data.FirstRunner,), {})
    decorated = torch.inference_mode()(runner_class._get_prompt_logprobs_dict)  # as vLLM may have it
    runner_class._get_prompt_logprobs_dict = decorated
    for _ in range(2):
        hooks.wrap(hooks.FIRST_RUNNER, runner_class, shown.append)
    engine = engine_data.FakeEngine()
    engine._runner = runner_class(engine_data.head)
    engine.submit(3, engine_data.tokens_of(3)[:-1])
    engine.step()
    engine._runner._get_prompt_logprobs_dict(hidden_states=shown[0].hidden_states, num_scheduled_tokens={})
    assert [1, 0] == [len(step.rows) for step in shown]
    assert [hooks.Rows("3-0a1b2c3d", 0, 40, 0, 40)] == shown[0].rows
