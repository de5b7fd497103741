"""Position weights by the teacher's confidence in the label, against sorting by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sklformat.distill.losses.confidence import easy_hard_weights, label_confidence
from sklformat.distill.losses.targets import Ragged


@settings(max_examples=60, deadline=None)
@given(
    confidences=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, None]), min_size=1, max_size=30),
    ratio=st.sampled_from([0.5, 1.0, 1.5, 2.0, 10.0]),
    percentile=st.floats(0.01, 99.99),
    cut=st.integers(0, 30),
)
def test_hard_tokens_have_their_rate(confidences, ratio, percentile, cut):
    """One of two weights each, in their ratio, with a mean of 1; parts of a step have those of the whole."""
    labels_P = torch.tensor([-100 if c is None else 3 for c in confidences])
    values_P = torch.tensor([0.3 if c is None else c for c in confidences])
    weights_P = easy_hard_weights(values_P, labels_P, lr_ratio=ratio, easy_percentile=percentile)
    counted = sorted(c for c in confidences if c is not None)
    assert not weights_P[labels_P == -100].any()
    if not counted:
        return
    assert math.isclose(float(weights_P.sum()), len(counted), rel_tol=1e-5)
    border = counted[math.ceil(len(counted) * percentile / 100) - 1]
    hard = [w for w, c in zip(weights_P.tolist(), confidences, strict=True) if c is not None and c <= border]
    easy = [w for w, c in zip(weights_P.tolist(), confidences, strict=True) if c is not None and c > border]
    assert len(hard) >= len(counted) * percentile / 100
    assert len(set(hard)) == 1
    assert len(set(easy)) <= 1
    if easy:
        assert math.isclose(hard[0] / easy[0], ratio, rel_tol=1e-5)
    of_step_M = torch.log(values_P[labels_P != -100])  # a logarithm sorts them alike
    settings = {"lr_ratio": ratio, "easy_percentile": percentile, "of_step_M": of_step_M}
    parts = [
        easy_hard_weights(torch.log(values_P[part]), labels_P[part], **settings)
        for part in (slice(cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(parts), weights_P)


def test_records_say_how_sure_the_teacher_is():
    """The record of the label; 0 where it is no record, or there is no label or record at all."""
    targets = Ragged(
        torch.tensor([4, 1, 2, 4]).int(), torch.tensor([0.75, 0.25, 1.0, 1.0]), torch.tensor([0, 2, 3, 4, 4])
    )
    labels_P = torch.tensor([1, 4, -100, 4])
    assert label_confidence(targets, labels_P).tolist() == [0.25, 0.0, 0.0, 0.0]


def test_rates_that_cannot_be():
    ones, labels_P = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    for ratio in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(
            ValueError, match=f"lr_ratio is {ratio}; need a finite number above 0, 1 for one rate of all"
        ):
            easy_hard_weights(ones, labels_P, lr_ratio=ratio)
    for percentile in (0.0, 100.0, math.nan):
        with pytest.raises(ValueError, match=f"easy_percentile is {percentile}; need a number between 0 and 100"):
            easy_hard_weights(ones, labels_P, lr_ratio=2.0, easy_percentile=percentile)
    with pytest.raises(ValueError, match=r"confidence_P has shape \[2\], labels_P \[1\]"):
        easy_hard_weights(ones, labels_P[:1], lr_ratio=2.0)
