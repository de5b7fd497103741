"""The two short prompts at the start: an engine whose inside is another one is refused before it captures anything."""

import threading

import engine_data
import pytest
import torch
from engine_data import FakeEngine, LayerEngine, connected

from sklformat.distill.engines import rehearsal
from sklformat.errors import EngineError

BEGIN = r"vllm 0\.0 \(hook: runner\): "


def rehearse(engine, vocab_size=engine_data.VOCAB, hook="runner", seq_len=100):
    with connected(hook) as desk:
        rehearsal.rehearse(engine, desk, vocab_size, seq_len, patience=5)


@pytest.mark.parametrize("kind", engine_data.RUNNERS)
@pytest.mark.parametrize("seq_len", [100, 12, 1])
def test_an_engine_that_shows_what_it_says(kind, seq_len):
    """Both prompts, in chunks, agree with vLLM's own log-probs."""
    rehearse(FakeEngine(kind, budget=9), seq_len=seq_len)


def test_a_layer_that_shows_what_it_says():
    """One prompt after the other."""
    rehearse(LayerEngine(), hook="layer")


def test_logits_that_are_not_those_that_it_samples_from():
    """A head that lacks its cap, or rows of another request."""

    class Other(FakeEngine):
        def log_probs(self, prompts):
            return {number: said * 0.9 for number, said in super().log_probs(prompts).items()}

    with pytest.raises(EngineError, match=BEGIN + r"log-probs of a short prompt differ by \d.* nats from those"):
        rehearse(Other())


def test_half_precision_may_differ_by_its_rounding(monkeypatch):
    """What float32 may not."""

    class Rounded(FakeEngine):
        def log_probs(self, prompts):
            return {number: said + 0.1 for number, said in super().log_probs(prompts).items()}

    with pytest.raises(EngineError, match=r"differ by 0\.1"):
        rehearse(Rounded())
    head = engine_data.head
    monkeypatch.setattr(engine_data, "head", lambda states: head(states).bfloat16())
    rehearse(Rounded())


def test_logits_that_are_not_numbers():
    """A difference that is none is not small."""

    class Nothing(FakeEngine):
        def log_probs(self, prompts):
            return {number: said * float("nan") for number, said in super().log_probs(prompts).items()}

    with pytest.raises(EngineError, match="differ by nan"):
        rehearse(Nothing())


def test_rows_that_do_not_come():
    """A method that is not called any more, or not with all rows."""
    with pytest.raises(EngineError, match=BEGIN + "17 of the 17 rows of a short prompt did not come: it does not"):
        rehearse(FakeEngine(happens={0: ("hide", None)}))
    with pytest.raises(EngineError, match="8 of the 17 rows of a short prompt did not come"):
        rehearse(FakeEngine(budget=9, happens={1: ("abort", 0)}, window=10))


def test_a_worker_that_hangs():
    """It is not waited for without limit."""

    class Hanging(FakeEngine):
        def log_probs(self, prompts):
            said = super().log_probs(prompts)
            engine_data.worker_here()._queue.put(threading.Event().wait)
            return said

    with connected() as desk, pytest.raises(EngineError, match=r"its worker says nothing for 0\.2 seconds"):
        rehearsal.rehearse(Hanging(), desk, engine_data.VOCAB, 100, patience=0.2)


def test_a_worker_that_ends():
    """The same words, with the reason."""

    class Dying(FakeEngine):
        def log_probs(self, prompts):
            said = super().log_probs({})
            engine_data.worker_here()._line.close()
            return said

    with pytest.raises(EngineError, match=BEGIN + "its worker has ended"):
        rehearse(Dying())


def test_rows_that_come_in_another_order():
    """Of one prompt, each row follows the one before."""
    with pytest.raises(EngineError, match=BEGIN + "row 9 of a short prompt came, row 17 was expected"):
        rehearse(FakeEngine(budget=9, happens={1: ("repeat", None)}))


def test_fewer_logits_than_ids():
    """A head that was cut is found before any draw."""
    with pytest.raises(EngineError, match=BEGIN + "gives 288 logits per row, tokenizer and config say 289"):
        rehearse(FakeEngine(), vocab_size=289)


def test_a_prompt_that_is_not_the_one_given(monkeypatch):
    """What the worker refuses is the engine's fault here."""

    class Longer(FakeEngine):
        def submit(self, sequence, prompt):
            super().submit(sequence, torch.cat([torch.from_numpy(prompt)] * 2).numpy())

    with pytest.raises(EngineError, match=BEGIN + "sequence 0: the engine's prompt has 34 tokens"):
        rehearse(Longer())
