"""Sequences through an engine that chunks, pre-empts, aborts and dies: each row's draws, exactly once."""

import dataclasses
import threading

import engine_data
import numpy as np
import pytest
import torch
from engine_data import FakeEngine, LayerEngine, connected, logits_of, tokens_of
from system import HANGS

import sklformat as skl
from sklformat.distill.engines import hooks, messages, worker
from sklformat.distill.engines.desk import Desk, Gone
from sklformat.distill.engines.feed import Feed
from sklformat.distill.engines.worker import show_logits
from sklformat.distill.teacher.drawing import Drawer
from sklformat.distill.teacher.gpu_sampler import DeviceSampler
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.errors import CaptureError, EngineError

LENGTHS = [40, 100, 25, 64, 1, 7, 130]
SEQUENCES = range(len(LENGTHS))


def counted_of(sequence):
    """Every other sequence is learnt from whole; of the others some stretches, and of one nothing."""
    if sequence % 2 == 0:
        return None
    counted = np.zeros(LENGTHS[sequence], bool)
    counted[5:20] = counted[60:90] = sequence != 5
    return counted


def tokens(sequence):
    return tokens_of(sequence, LENGTHS[sequence])


def drawn_at_once(sequence, counted=counted_of, **changes):
    """The records of a sequence from all of its logits."""
    how = engine_data.settings(**changes)
    with Drawer(kind=how.kind, rounds=how.rounds, sampling=how.sampling) as drawer:
        return drawer.draw(sequence, [(0, logits_of(tokens(sequence)))], None, counted(sequence))


def captured(engine, sequences=SEQUENCES, counted=counted_of, hook="runner", **changes):
    """Records and columns by sequence, in the order in which they came."""
    with connected(hook, **changes) as desk:
        feed = Feed(engine, desk, tokens, counted)
        return {output.sequence: (output.made, columns) for output, columns in feed.records(sequences)}


def check(engine, hook="runner", **changes):
    found = captured(engine, hook=hook, **changes)
    assert list(range(len(LENGTHS))) == list(found)
    for sequence, (targets, _) in found.items():
        assert drawn_at_once(sequence, **changes) == targets, sequence


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_is_not_understood_is_hung_up_on():
    """Rows without their arrays end the line at once, at both ends: nobody waits for an answer that never comes."""
    with messages.listening() as (listener, path), Desk(listener, engine_data.settings()) as desk:
        line = messages.dial(path)
        assert line.receive() is not None
        line.send({"rows": 0, "first": 0, "columns": []})
        assert desk.next(HANGS) == Gone()
        assert line.receive() is None
        line.close()
    for thread in threading.enumerate():  # its error is this test's, not that of the next
        if thread.name == "desk line":
            thread.join()


@pytest.mark.parametrize("asked", [[0], None])
def test_a_worker_that_does_not_take_its_answer(asked):
    """Who drives knows of other sequences meanwhile, so that it comes to see that nothing arrives."""
    with messages.listening() as (listener, path), Desk(listener, engine_data.settings()) as desk:
        line = messages.dial(path)
        assert line.receive() is not None
        desk.open(0, np.zeros(1 << 20, np.uint32), None)
        line.send({"ask": asked})
        line._socket.recv(1)  # the answer is on its way, and is more than a socket holds
        opened = threading.Thread(target=desk.open, args=(1, np.zeros(2, np.uint32), None), daemon=True)
        opened.start()
        opened.join(HANGS)
        assert not opened.is_alive()
        line.close()


@pytest.mark.parametrize("kind", engine_data.RUNNERS)
def test_an_engine_that_tries_itself_out(kind):
    """Its own requests, which it makes up before it has started, are nobody's sequences; and nobody is asked yet."""
    with messages.listening() as (_, path), messages.announced("runner", path):
        engine = FakeEngine(kind)
        engine.try_out()
    assert [] == engine.calls


@pytest.mark.parametrize("kind", engine_data.RUNNERS)
def test_the_recorded_shapes(kind):
    """Prompts of 40, 100 and 25 tokens in steps of 64: heads of 64, 64 and 37 rows, and vLLM's own call."""
    engine = FakeEngine(kind)
    found = captured(engine, range(3))
    assert [64, 64, 37] == engine.calls
    assert [{"of vLLM": 2}, {"of vLLM": 1}, {"of vLLM": 2}] == engine.own
    for sequence, (targets, _) in found.items():
        assert drawn_at_once(sequence) == targets


@pytest.mark.parametrize("kind", engine_data.RUNNERS)
@pytest.mark.parametrize("budget", [2, 24, 39, 1000])
def test_chunks_of_any_size(kind, budget):
    """Whatever the chunks, rows are drawn from once, also where requests stay for rows that they generate."""
    check(FakeEngine(kind, budget, lingers=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "ratios", "rounds": 200},
        {"kind": "ratios", "sampling": engine_data.SAMPLING | {"proposal_temperature": 0.7}},
        {"kind": "ratios", "rounds": 0, "sampling": engine_data.SAMPLING | {"sampler": "topk", "k": 3}},
        {"sampling": engine_data.SAMPLING | {"sampler": "systematic"}},
    ],
)
def test_every_sampler(changes):
    """Records with weights come back as they were drawn."""
    check(FakeEngine(budget=33), **changes)


@pytest.mark.parametrize("order", [False, True])
def test_the_order_of_arrival_does_not_matter(order):
    """An engine that takes the newest request first fills the cache in the same order."""
    check(FakeEngine(budget=50, backwards=order, window=5))


@pytest.mark.parametrize(
    ("happens", "again"),
    [
        ({1: ("preempt", 1), 4: ("preempt", 3)}, []),
        ({1: ("preempt", 1), 2: ("preempt", 1), 4: ("preempt", 1)}, []),
        ({1: ("abort", 1)}, [1]),
        ({0: ("abort", 0), 2: ("abort", 3), 5: ("abort", 6)}, [0, 3, 6]),
        ({1: ("repeat", None)}, [1]),
        ({1: ("hide", None)}, [1]),
    ],
)
def test_nothing_is_lost_or_doubled(happens, again):
    """What was pre-empted begins again by itself; what lost a row, or has one twice, is run again, and nothing else."""
    engine = FakeEngine(budget=50, happens=happens, window=10)  # all are there before the first step
    check(engine)
    assert sorted([*range(len(LENGTHS)), *again]) == sorted(engine.submitted)


def test_a_request_that_ends_early_three_times_is_given_up():
    """An engine that never shows some rows is named, with the rows."""
    engine = FakeEngine(budget=1000, happens=dict.fromkeys(range(1, 9), ("hide", None)), window=2)
    with pytest.raises(EngineError, match=r"ended 3 requests without rows 0\.\.24 of the 25 of sequence 2"):
        captured(engine)


def test_an_engine_that_dies_ends_the_capture():
    """Its own error is the capture's; what came before was handed over."""
    with connected() as desk, pytest.raises(EngineError, match="the engine has ended"):
        feed = Feed(FakeEngine(happens={2: "die"}), desk, tokens, counted_of)
        for output, _ in feed.records(range(len(LENGTHS))):
            assert output.sequence < 2


def test_a_worker_that_dies_ends_the_capture():
    """Its line is closed by the system, whatever ended it."""

    class Killed(FakeEngine):
        def step(self):
            super().step()
            if self._steps == 2:
                engine_data.worker_here()._line.close()
                self._requests.clear()

    with pytest.raises(CaptureError, match="the process that draws in the engine has ended"):
        captured(Killed(budget=20))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("budget", [1, 40])
def test_a_device_that_fails_behind_the_engine(monkeypatch, budget):
    """What it drew never arrives: the driving process learns it at once, however much waits to be told."""

    def fail(*_):
        raise RuntimeError("an error of the device")

    monkeypatch.setattr(worker, "_part", fail)
    with pytest.raises(CaptureError, match=r"the process that draws in the engine has ended|the engine ends"):
        captured(FakeEngine(budget=budget), range(4))
    for thread in threading.enumerate():  # its error is this test's, not that of the next
        if thread.name in ("sklformat", "desk line"):
            thread.join()


def test_a_worker_that_hangs():
    """One that does not answer is not waited for without limit."""

    class Hanging(FakeEngine):
        def step(self):
            super().step()
            engine_data.worker_here()._queue.put(threading.Event().wait)
            self._requests.clear()

    with connected() as desk, pytest.raises(CaptureError, match=r"has said nothing for 0\.01 seconds"):
        list(Feed(Hanging(budget=20), desk, tokens, counted_of, patience=0.01).records(range(3)))


def test_a_worker_whose_driver_is_gone_ends():
    """Nobody waits for its records any more; the engine would keep its GPU for ever."""
    engine = FakeEngine(budget=20)
    with connected() as desk:
        desk.open(0, tokens(0), None)
        engine.submit(0, tokens(0)[:-1])
        engine.step()
        own = engine_data.worker_here()
    engine.submit(1, tokens(1)[:-1])
    step = hooks.Step([hooks.Rows("1-x", 0, 5, 0, 100)], torch.zeros(5, 2), engine_data.head)
    with pytest.raises(CaptureError, match="capture does not answer; the engine ends"):
        own.show(step)
    own._lost = True
    step = hooks.Step([hooks.Rows("0-x", 20, 5, 0, 40)], torch.zeros(5, 2), engine_data.head)
    with pytest.raises(CaptureError, match="capture is gone; the engine ends"):
        own.show(step)


def test_an_idle_worker_whose_driver_is_gone_ends(monkeypatch):
    """It is shown no row that it could refuse; so it ends its process, unless that is the driver's own."""
    ended = threading.Event()
    monkeypatch.setattr(worker.os, "kill", lambda process, number: ended.set())
    before = set(threading.enumerate())
    with connected():
        engine_data.worker_here()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert not ended.is_set()
    with messages.listening() as (listener, path):
        own = messages.dial(path)
        line = messages.Line(listener.accept()[0])
        line.send({**dataclasses.asdict(engine_data.settings()), "driver": 0})
        worker.Worker(own)
        line.close()
    assert ended.wait(5)


@pytest.mark.parametrize("on_device", [False, True])
def test_logits_that_may_not_be_drawn_from(monkeypatch, on_device):
    """Sequence and position are named, and the engine lives to tell."""
    row = int(tokens(1)[50]) * 31 + 50
    monkeypatch.setitem(engine_data.__dict__, "_TABLE", engine_data._TABLE.clone())
    engine_data._TABLE[row % len(engine_data._TABLE), 4] = float("nan")
    with pytest.raises(ValueError, match="sequence 1, position 50"):
        captured(FakeEngine(), counted=lambda _: None, on_device=on_device)


def test_another_prompt_than_was_given():
    """An engine that puts tokens of its own before a prompt is refused."""

    class Longer(FakeEngine):
        def submit(self, sequence, prompt):
            super().submit(sequence, np.append(prompt, prompt[:1]))

    with pytest.raises(ValueError, match="sequence 0: the engine's prompt has 41 tokens, it was given 40"):
        captured(Longer())


NAMES = ("label_logprob", "entropy", "record_logprob")


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"kind": "ratios", "sampling": engine_data.SAMPLING | {"proposal_temperature": 0.7}}]
)
def test_columns_and_draws_by_the_device(on_device, changes):
    """In chunks as at once: the optional columns, with draws by C and where logits lie on a device that draws."""
    found = captured(FakeEngine(budget=37), columns=NAMES, on_device=on_device, **changes)
    for sequence, (targets, columns) in found.items():
        how = engine_data.settings(**changes)
        taken, counted = LogitColumns(NAMES, tokens(sequence)), counted_of(sequence)
        slices = [(0, logits_of(tokens(sequence)))]
        with Drawer(kind=how.kind, rounds=how.rounds, sampling=how.sampling) as drawer:
            expected = drawer.draw(sequence, slices, taken, counted)
        if on_device:
            sampler = DeviceSampler(rounds=how.rounds, **how.sampling)
            arrival = sampler.draw(sequence, len(slices[0][1]), slices, None, counted)
            drawn = arrival.result()
            if isinstance(drawn, np.ndarray):
                lengths = np.zeros(LENGTHS[sequence], int)
                merged = skl.capture.merge_draws(drawn)
                lengths[slice(None) if counted is None else counted] = np.diff(merged.offsets)
                drawn = skl.SparseTargets(
                    token_ids=merged.token_ids, counts=merged.counts, offsets=np.append(0, lengths.cumsum())
                )
            expected = drawn
        assert expected == targets
        for name in ("label_logprob", "entropy"):
            np.testing.assert_array_equal(taken.values()[name], columns[name])
        scores = logits_of(tokens(sequence)).log_softmax(-1)
        rows = np.repeat(np.arange(LENGTHS[sequence]), np.diff(targets.offsets))
        of_records = scores[torch.from_numpy(rows), torch.from_numpy(targets.token_ids.astype(np.int64))]
        np.testing.assert_allclose(of_records.numpy(), columns["record_logprob"], atol=0.01)


@pytest.mark.gpu
def test_draws_on_a_gpu(monkeypatch):
    """Logits on a GPU are drawn from there, behind the engine's back; most draws are those of C."""
    head = engine_data.head
    monkeypatch.setattr(engine_data, "head", lambda states: head(states).cuda())
    found = captured(FakeEngine(budget=300), columns=NAMES, on_device=True)
    monkeypatch.setattr(engine_data, "head", head)
    for sequence, (targets, _) in found.items():
        expected = drawn_at_once(sequence)
        np.testing.assert_array_equal(expected.offsets > 0, targets.offsets > 0)
        assert targets.num_records == pytest.approx(expected.num_records, rel=0.02, abs=3)


@pytest.mark.parametrize(("rows_of_prompt", "at_once"), [(-1, 1024), (None, 16), (-1, 7)])
def test_the_layer_alone(rows_of_prompt, at_once):
    """One request at a time: a row to sample from, then the prompt's, perhaps in pieces."""
    check(LayerEngine(rows_of_prompt, at_once), hook="layer")


def test_the_layer_loses_nothing():
    """A request that ends without rows is run again, as another run."""
    check(LayerEngine(happens={0: ("abort", 0), 3: ("abort", 2), 4: ("abort", 2)}), hook="layer")


def test_the_layer_shows_what_was_not_expected():
    """An engine that asks for the logits of a prompt first is refused."""
    with pytest.raises(ValueError, match="the layer showed 3 rows first, 1 was expected"):
        captured(LayerEngine(first=3), hook="layer")


def test_the_layer_while_nothing_runs():
    """An engine that tries itself out shows logits of no request."""
    with connected("layer"):
        engine_data.worker_here().show_layer(torch.zeros(5, engine_data.WIDTH))


def test_a_rank_that_gets_no_logits():
    """It asks for the same rows as the one that draws, and draws nothing."""
    sizes = []
    rows = [hooks.Rows("0-x", 0, 100, 0, 100), hooks.Rows("1-x", 3, 60, 100, 63)]
    step = hooks.Step(rows, torch.zeros(160, 2), lambda states: sizes.append(len(states)))
    show_logits(step, None)
    assert [128, 32] == sizes


def test_rows_beyond_a_sequence():
    """A worker that counts otherwise is not believed."""
    from sklformat.distill.engines.assembly import Assembly, Part

    assembly = Assembly()
    assembly.expect(4, 10)
    ids = np.arange(3, dtype=np.uint32)
    part = Part(8, np.ones(3, np.int64), ids, np.ones(3, np.uint8), {})
    with pytest.raises(EngineError, match=r"a worker sent rows 8\.\.10 of sequence 4, which has 10"):
        assembly.add(4, part)
