"""Metrics against values worked out by hand, and sums over batches against one batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from sklformat.distill.losses.metrics import (
    EvaluationSums,
    ReliabilitySums,
    acceptance_rate,
    calibration_error,
    lm_loss,
    percent_ce_to_full,
    reliability,
    top1_agreement,
)
from sklformat.distill.losses.targets import Ragged


def random_batch(num_positions=40, vocab_size=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(num_positions, vocab_size, generator=g)
    teacher = student + torch.randn(num_positions, vocab_size, generator=g)
    labels = torch.randint(vocab_size, (num_positions,), generator=g)
    labels[::7] = -100
    return student, labels, teacher


def test_lm_loss_is_cross_entropy():
    """LM loss is torch's mean cross-entropy, ignored labels left out."""
    student, labels, _ = random_batch()
    assert functional.cross_entropy(student.double(), labels).item() == pytest.approx(
        lm_loss(student, labels), rel=1e-6
    )


def test_calibration_error_by_hand():
    """Two bins: 0.4 and 0.5 with one right, 0.9 with one wrong: (2 |0.5 - 0.45| + |0 - 0.9|) / 3."""
    confidences, correct = torch.tensor([0.4, 0.5, 0.9]), torch.tensor([True, False, False])
    assert pytest.approx((2 * 0.05 + 0.9) / 3) == calibration_error(confidences, correct, bins=2)
    table = reliability(confidences, correct, bins=2)
    assert pytest.approx([0.45, 0.9]) == list(table.confidence)
    assert pytest.approx([0.5, 0.0]) == list(table.accuracy)
    assert pytest.approx([2 / 3, 1 / 3]) == list(table.share)


def test_bins_take_their_upper_edge():
    """A confidence on an edge belongs to the bin below it; 0 and 1 belong to the first and the last."""
    table = reliability(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), torch.ones(5), bins=4)
    assert pytest.approx([0.4, 0.2, 0.2, 0.2]) == list(table.share)


def test_perfectly_calibrated_predictions_have_no_error():
    """Where each bin is right as often as it claims, the error is 0; always wrong at confidence 1, it is 1."""
    confidences = torch.tensor([0.75] * 4 + [0.5] * 2)
    assert pytest.approx(0.0) == calibration_error(confidences, torch.tensor([1, 1, 1, 0, 1, 0]))
    assert pytest.approx(1.0) == calibration_error(torch.ones(3), torch.zeros(3))


def test_empty_bins_are_nan_and_weigh_nothing():
    """An empty bin has no mean to show, and does not enter the error."""
    table = reliability(torch.tensor([0.95]), torch.tensor([True]), bins=3)
    assert math.isnan(table.confidence[0])
    assert math.isnan(table.accuracy[1])
    assert pytest.approx(0.05) == table.calibration_error


def test_acceptance_rate_by_hand():
    """sum min(p, q) of (0.5, 0.5) and (0.8, 0.2) is 0.7; of equal distributions 1; of disjoint ones 0."""
    student = torch.tensor([[0.5, 0.5], [0.3, 0.7]]).log()
    teacher = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log()
    assert pytest.approx((0.7 + 1.0) / 2) == acceptance_rate(student, teacher)
    apart = torch.tensor([[100.0, -100.0]])
    assert pytest.approx(0.0) == acceptance_rate(apart, -apart)


def test_top1_agreement_by_hand():
    """One of two positions with the same most likely token is one half."""
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[5.0, 0.0], [5.0, 0.0]])
    assert pytest.approx(0.5) == top1_agreement(student, teacher)


def test_percent_ce_to_full_is_the_papers():
    """Table 1: CE 2.81, Top-K 12 2.87 and FullKD 2.75 is minus 100 percent; FullKD itself is 100."""
    assert pytest.approx(-100.0) == percent_ce_to_full(2.81, 2.75, 2.87)
    assert pytest.approx(100.0) == percent_ce_to_full(2.81, 2.75, 2.75)
    assert pytest.approx(0.0) == percent_ce_to_full(2.81, 2.75, 2.81)


def metrics_of(evaluation):
    names = ("lm_loss", "accuracy", "calibration_error", "acceptance_rate", "top1_agreement", "num_positions", "kl")
    return [getattr(evaluation, name) for name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_batches_add_up_to_the_whole(dtype, monkeypatch):
    """Metrics of batches, and of blocks within them, equal those of everything at once."""
    student, labels, teacher = random_batch()
    student, teacher = student.to(dtype), teacher.to(dtype)
    whole, parts = EvaluationSums(), EvaluationSums()
    whole.update(student, labels, teacher)
    monkeypatch.setattr("sklformat.distill.losses.sums.BLOCK_ELEMENTS_CPU", 30)
    for start in (0, 13, 26):
        stop = 40 if start == 26 else start + 13
        parts.update(student[start:stop], labels[start:stop], teacher[start:stop])
    assert pytest.approx(metrics_of(whole), rel=1e-6) == metrics_of(parts)
    kept = labels != -100
    assert int(kept.sum()) == parts.num_positions
    assert pytest.approx(whole.acceptance_rate, rel=1e-6) == acceptance_rate(student[kept], teacher[kept])
    assert pytest.approx(whole.top1_agreement, rel=1e-6) == top1_agreement(student[kept], teacher[kept])
    confidences, best = torch.softmax(student[kept].double(), 1).max(1)
    assert calibration_error(confidences, best == labels[kept]) == pytest.approx(whole.calibration_error, abs=1e-5)


def test_divergence_and_loss_of_the_teacher_are_exact():
    """KL(teacher || student) and the teacher's own loss are torch's in float64; ids that both mask add nothing."""
    student, labels, teacher = random_batch()
    student[:, 3] = teacher[:, 3] = -math.inf
    labels[labels == 3] = 4
    sums, kept = EvaluationSums(), labels != -100
    sums.update(student, labels, teacher)
    log_p, log_q = (logits[kept].double().log_softmax(1) for logits in (student, teacher))
    log_p[:, 3] = log_q[:, 3] = -1e9  # 0 times infinity
    kl = functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    assert kl.item() == pytest.approx(sums.kl, rel=1e-6)
    assert functional.nll_loss(log_q, labels[kept]).item() == pytest.approx(sums.teacher_loss, rel=1e-6)
    student[:, 5] = -math.inf
    missing = EvaluationSums()
    missing.update(student, torch.full_like(labels, 4), teacher)
    assert missing.kl == math.inf


def test_records_are_read_at_the_positions_that_count():
    """Positions without label or records are in no figure; a record of probability 0 on a masked id adds nothing."""
    student, _, _ = random_batch(3)
    student[1, 2] = -math.inf
    probs = torch.tensor([0.25, 0.75, 1.0, 0.5, 0.5, 0.0])
    targets = Ragged(torch.tensor([1, 4, 0, 7, 8, 2]), probs, torch.tensor([0, 3, 6, 6]))
    sums = EvaluationSums()
    sums.update(student, torch.tensor([-100, 5, 6]), targets=targets)
    assert sums.num_positions == 1
    log_p = student[1].double().log_softmax(0)
    cross = -(log_p[7] + log_p[8]).item() / 2
    assert cross == pytest.approx(sums.cross_entropy, rel=1e-6)
    assert cross - math.log(2) == pytest.approx(sums.kl_to_records, rel=1e-6)


def test_wrong_arguments_raise():
    """Shapes, ranges and emptiness are named."""
    student, labels, teacher = random_batch()
    with pytest.raises(ValueError, match=r"logits have shape \[\d+, \d+\], labels_P \[3\]; need \[P, V\] and \[P\]"):
        lm_loss(student, labels[:3])
    with pytest.raises(ValueError, match="teacher_logits_PV has shape"):
        acceptance_rate(student, teacher[:, :3])
    with pytest.raises(ValueError, match=r"confidences holds a value outside \[0, 1\]"):
        calibration_error(torch.tensor([1.5]), torch.tensor([1]))
    with pytest.raises(ValueError, match="outside"):
        calibration_error(torch.tensor([math.nan]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"confidences has shape \[2\], correct \[3\]"):
        calibration_error(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="no predictions: a reliability table needs at least one"):
        calibration_error(torch.ones(0), torch.ones(0))
    with pytest.raises(ValueError, match="bins is 0; need at least 1"):
        ReliabilitySums(0)
    with pytest.raises(ValueError, match="no position with a label was seen: there is nothing to average"):
        lm_loss(student, torch.full_like(labels, -100))
    without_teacher = EvaluationSums()
    without_teacher.update(student, labels)
    with pytest.raises(ValueError, match="the teacher's logits"):
        _ = without_teacher.acceptance_rate
    without_teacher.update(student, labels, teacher)
    with pytest.raises(ValueError, match="34 of 68 positions came with the teacher's logits; give it to all"):
        _ = without_teacher.kl
    ids, probs = torch.tensor([1, 11]), torch.tensor([0.5, 0.5])
    for wrong, message in ((ids, "token_ids go from 1 to 11"), (ids - 2, "token_ids go from -1 to 9")):
        with pytest.raises(ValueError, match=f"{message}; the logits have 11 ids"):
            EvaluationSums().update(student[:1], labels[1:2], targets=Ragged(wrong, probs, torch.tensor([0, 2])))
    for offsets in ([0, 3], [1, 3]):
        message = f"targets are 1 positions with records {offsets[0]} to 3, of which 2 are there; labels_P has 1"
        with pytest.raises(ValueError, match=message):
            EvaluationSums().update(student[:1], labels[1:2], targets=Ragged(ids, probs, torch.tensor(offsets)))
    with pytest.raises(ValueError, match="labels go from 11 to 11; the logits have 11 ids"):
        lm_loss(student, torch.full_like(labels, 11))
    with pytest.raises(ValueError, match=r"CE and FullKD have the same loss, 2\.0: there is no gap to close"):
        percent_ce_to_full(2.0, 2.0, 1.0)
