import functools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference_sampler import dense, probabilities

import sklformat as skl

draw = functools.partial(skl.draw, sequence=0)  # of one sequence, where a test names no other

# Values that float16 and bfloat16 both hold exactly.
representable = st.one_of(st.integers(-255, 255).map(lambda i: i / 8.0), st.just(-np.inf))


@st.composite
def rows(draw_from):
    """[T, V] float32 logits, each row with a finite one, many masked, few or many equal."""
    shape = draw_from(st.tuples(st.integers(1, 5), st.integers(1, 700)))
    logits = draw_from(hnp.arrays(np.float32, shape, elements=representable, fill=st.sampled_from([-np.inf, 0.0, 3.5])))
    logits[:, draw_from(st.integers(0, shape[1] - 1))] = 1.0
    return logits


calls = st.one_of(
    st.fixed_dictionaries({"sampler": st.sampled_from(["multinomial", "systematic"]), "rounds": st.integers(1, 200)}),
    st.fixed_dictionaries(
        {
            "sampler": st.sampled_from(["multinomial", "systematic"]),
            "rounds": st.integers(1, 60),
            "proposal_temperature": st.floats(0.25, 4),
            "self_normalise": st.booleans(),
        }
    ),
    st.fixed_dictionaries({"sampler": st.just("topk"), "k": st.integers(1, 800)}),
    st.fixed_dictionaries({"sampler": st.just("topp"), "p": st.floats(0.01, 1.0), "k": st.integers(1, 800)}),
)
keys = st.fixed_dictionaries({"seed": st.integers(0, 2**64 - 1), "sequence": st.integers(0, 2**64 - 1)})


@given(rows(), calls, keys, st.integers(0, 2**32 - 6))
@settings(max_examples=150, deadline=None)
def test_records_are_valid(logits, call, key, first_position):
    """Ids rise strictly, lie below V and are possible; counts sum to rounds; weights are positive."""
    positions, vocab_size = logits.shape
    targets = draw(logits, first_position=first_position, **call, **key)
    assert positions == targets.num_positions
    for t in range(positions):
        part = slice(targets.offsets[t], targets.offsets[t + 1])
        ids = targets.token_ids[part].astype(np.int64)
        assert (np.diff(ids) > 0).all()
        assert (ids < vocab_size).all()
        assert np.isfinite(logits[t, ids]).all()
        if targets.counts is not None:
            assert call["rounds"] == targets.counts[part].sum()
        else:
            assert (targets.weights[part] > 0).all()
            if call["sampler"] not in ("topk", "topp") and call.get("self_normalise", True):
                np.testing.assert_allclose(1.0, targets.weights[part].sum(dtype=np.float64), rtol=1e-5)
    if call["sampler"] in ("topk", "topp"):
        held = dense(targets, vocab_size)
        np.testing.assert_allclose(np.where(held > 0, probabilities(logits), 0), held, rtol=1e-4)


@given(rows(), calls, keys, st.integers(0, 2**32 - 6), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_any_split_gives_the_same_records(logits, call, key, first_position, cut):
    """Positions drawn in two calls are those of one call."""
    whole = draw(logits, first_position=first_position, **call, **key)
    cut = min(cut, logits.shape[0])
    parts = [
        draw(logits[:cut], first_position=first_position, **call, **key),
        draw(logits[cut:], first_position=first_position + cut, **call, **key),
    ]
    values = "counts" if whole.counts is not None else "weights"
    assert whole.token_ids.tolist() == np.concatenate([part.token_ids for part in parts]).tolist()
    assert getattr(whole, values).tolist() == np.concatenate([getattr(part, values) for part in parts]).tolist()
    assert np.diff(whole.offsets).tolist() == np.concatenate([np.diff(part.offsets) for part in parts]).tolist()


@given(rows(), calls, keys)
@settings(max_examples=60, deadline=None)
def test_types_that_hold_the_same_logits_give_the_same_records(logits, call, key):
    """float16 and bfloat16 rows give the records of their float32 values."""
    expected = draw(logits, **call, **key)
    assert expected == draw(logits.astype(np.float16), **call, **key)
    assert expected == draw((logits.view(np.uint32) >> 16).astype(np.uint16), dtype="bfloat16", **call, **key)
