import math

import numpy as np
import peft
import pytest
import tiny
import torch
from record_data import COLUMNS, distribution, write_cache

import sklformat as skl
from sklformat.distill.losses.metrics import EvaluationSums
from sklformat.distill.models import outputs
from sklformat.distill.student import validation
from sklformat.distill.student.validation import HeldOut, validate
from sklformat.errors import SettingsError

VOCAB, POSITIONS, SEQUENCES = 60, 16, 7


def new_model(seed, vocab_size=VOCAB, **sizes):
    """A model whose logits are far enough apart for its figures to differ."""
    model = tiny.new_model(vocab_size, seed=seed, **sizes)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def reference(path, student, sequences):
    """Every figure by its definition, in float64, position after position."""
    cache, rows, bins = skl.open(path), [], {}
    for i in sequences:
        sequence = cache[i]
        log_p = distribution(student, sequence.tokens)
        offsets, targets = sequence.targets.offsets, sequence.targets
        for t in range(targets.num_positions):
            span = slice(offsets[t], offsets[t + 1])
            if span.start == span.stop:
                continue
            weights = targets.weights if targets.counts is None else targets.counts / cache.header.rounds
            w, label = weights[span].astype(np.float64), sequence.tokens[t + 1]
            cross = -(w * log_p[t, targets.token_ids[span]]).sum()
            right = log_p[t].argmax() == label
            of_columns = [float(sequence.columns[name][t]) for name in COLUMNS if name in sequence.columns]
            rows.append([-log_p[t, label], right, cross, cross + (w * np.log(w)).sum(), *of_columns])
            confidence = math.exp(log_p[t].max())
            bins.setdefault(math.ceil(confidence * 15), []).append(confidence - right)
    names = ("lm_loss", "accuracy", "cross_entropy", "kl_to_records", *COLUMNS)
    figures = dict(zip(names, np.mean(rows, 0).tolist(), strict=False))
    error = sum(abs(sum(gaps)) for gaps in bins.values()) / len(rows)
    return figures | {"calibration_error": error, "num_positions": len(rows)}


@pytest.fixture(scope="module")
def student():
    return new_model(1)


@pytest.fixture(scope="module")
def teacher():
    return new_model(2)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (SEQUENCES, POSITIONS + 1))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher, tokens):
    return write_cache(tmp_path_factory.mktemp("validation") / "records.skl", teacher, tokens)


class Wrapper(torch.nn.Module):
    """Calls a model as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **named):
        return self.module(*args, **named)


def close(expected, found, **tolerance):
    """Two results are one up to rounding."""
    for name in validation.Validation.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), **tolerance or {"rel": 1e-5, "abs": 1e-7})


def check(path, student, sequences, found):
    """All figures are those of the definitions; the columns are float16, so that a float32 mean equals to 1e-6."""
    expected = reference(path, student, sequences)
    columns = {name: expected.pop(name) for name in COLUMNS}
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-6, abs=1e-6), name
    assert found.num_sequences == len(sequences)
    assert found.kl == pytest.approx(expected["cross_entropy"] - columns["entropy"], abs=1e-5)
    assert found.teacher_loss == pytest.approx(-columns["label_logprob"], rel=1e-6)


def test_figures_are_those_of_their_definitions(cache, student):
    """Each figure equals a float64 computation over the whole vocabulary, position after position, records and all."""
    held_out = HeldOut(cache, range(2, SEQUENCES), batch_size=2)
    found = validate(student, held_out)
    check(cache, student, range(2, SEQUENCES), found)
    assert found.num_positions == 5 * (POSITIONS - 2)
    assert "KL to the records" in str(found)
    assert f"the teacher's {found.teacher_loss:.4f}" in str(found)
    assert f"KL to the teacher: {found.kl:.4f}" in str(found)


def test_sequences_of_any_length(tmp_path, student, teacher, tokens):
    """Ragged sequences are padded in the batch and measured as they are."""
    lengths = [3, 9, 17, 5]
    path = write_cache(
        tmp_path / "records.skl", teacher, [row[:n] for row, n in zip(tokens, lengths, strict=False)], ragged=True
    )
    found = validate(student, HeldOut(path, batch_size=3))
    check(path, student, range(4), found)
    assert found.num_positions == 2 + (8 - 2) + (16 - 2) + 4


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_measure_each_sequence_once(cache, student, monkeypatch, world_size):
    """Shares of several processes add up to the figures of one; all take equally many steps, some of them empty."""
    alone = validate(student, HeldOut(cache, range(1, SEQUENCES), batch_size=1))
    shares, steps = [], set()
    for rank in range(world_size):
        held_out = HeldOut(cache, range(1, SEQUENCES), batch_size=1, rank=rank, world_size=world_size)
        steps.add(len([batch for batch, _ in held_out]))
        monkeypatch.setattr(validation.dist, "all_reduce", lambda tensor: shares.append(tensor.clone()))
        validate(student, held_out) if rank < SEQUENCES - 1 else None
    assert len(steps) == 1
    monkeypatch.setattr(validation.dist, "all_reduce", lambda tensor: tensor.copy_(torch.stack(shares).sum(0)))
    close(alone, validate(student, held_out))


def test_sums_of_batches_add_up(cache, student):
    """The tensors of two sums added are the sums of both, calibration bins included."""
    held_out = HeldOut(cache, batch_size=3)
    whole, parts = EvaluationSums(), [EvaluationSums() for _ in held_out]
    for (batch, columns), part in zip(held_out, parts, strict=True):
        for sums in (whole, part):
            logits_PV = outputs.logits(student, batch.input_ids).flatten(0, 1)
            named = {f"{name}_P": values for name, values in columns.items()}
            sums.update(logits_PV, batch.labels.flatten(), targets=batch.targets, **named)
    for part in parts[1:]:
        parts[0].tensor += part.tensor
    assert torch.allclose(whole.tensor, parts[0].tensor, rtol=1e-12)
    assert whole.calibration_error == pytest.approx(parts[0].calibration_error)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_kl_to_the_teacher_is_unbiased(tmp_path, student, teacher, tokens, sampler):
    """
    Over 300 drawings of one text cross_entropy is H(teacher, student) in the mean, and kl is KL(teacher || student).

    Within 5 standard errors, estimated of 30 drawings: a right estimator misses that with one seed in 39 000.  The
    divergence from the records themselves is off by more than 20 of them.
    """
    many = 300
    path = write_cache(tmp_path / "records.skl", teacher, [tokens[0]] * many, sampler=sampler, rounds=5, bare=())
    log_p, log_q = (distribution(model, tokens[0]) for model in (student, teacher))
    q = np.exp(log_q)
    cross, kl = -(q * log_p).sum(-1).mean(), (q * (log_q - log_p)).sum(-1).mean()
    single = [validate(student, HeldOut(path, range(i, i + 1))) for i in range(0, many, 10)]
    found = validate(student, HeldOut(path, batch_size=50))
    error = np.std([one.cross_entropy for one in single], ddof=1) / many**0.5
    assert abs(found.cross_entropy - cross) < 5 * error
    assert abs(found.kl - kl) < 5 * error + 1e-3  # entropies are float16
    assert found.kl_to_records - kl > 20 * error


def test_what_is_no_divergence_is_not_given(tmp_path, student, teacher, tokens):
    """kl is None without the column entropy and for records that are not drawn without bias; teacher_loss likewise."""

    def figures(name, **how):
        return validate(student, HeldOut(write_cache(tmp_path / f"{name}.skl", teacher, tokens[:2], **how)))

    bare = figures("bare", columns=())
    assert (bare.kl, bare.teacher_loss) == (None, None)
    assert "teacher" not in str(bare)
    topk = figures("topk", sampler="topk", rounds=0, k=5)
    assert topk.kl is None
    assert topk.teacher_loss is not None
    check_topk = reference(tmp_path / "topk.skl", student, range(2))
    assert topk.cross_entropy == pytest.approx(check_topk["cross_entropy"], rel=1e-5)
    assert figures("divided", proposal_temperature=0.8).kl is None
    said = {"settings": {"capture": {"sampler": {"unbiased": True}}}}
    assert figures("undivided", proposal_temperature=0.8, **said).kl is not None


def test_the_head_gives_what_the_model_gives(cache, student, monkeypatch):
    """Hidden states and head in blocks give the figures of the whole logits, under LoRA and in a wrapper too."""
    whole = validate(student, HeldOut(cache), forward=lambda batch: outputs.logits(student, batch.input_ids))
    monkeypatch.setattr(validation, "_BLOCK_ELEMENTS", 5 * VOCAB)
    close(whole, validate(student, HeldOut(cache)))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(new_model(1), config)
    by_model = validate(adapted, HeldOut(cache), forward=lambda batch: adapted(input_ids=batch.input_ids).logits)
    assert abs(by_model.lm_loss - whole.lm_loss) > 1e-3
    close(by_model, validate(adapted, HeldOut(cache)))
    close(by_model, validate(Wrapper(adapted), HeldOut(cache)))


def test_a_head_that_is_no_matrix_is_asked_for_logits(cache, student):
    """A model that changes its logits by itself is measured by them."""

    class Squared(type(student)):
        def forward(self, *args, **named):
            output = super().forward(*args, **named)
            output.logits = output.logits + output.logits.square() / 50
            return output

    odd = Squared(student.config)
    odd.load_state_dict(student.state_dict())
    close(
        validate(odd, HeldOut(cache), forward=lambda batch: odd(input_ids=batch.input_ids).logits),
        validate(odd, HeldOut(cache)),
    )
    assert validate(odd, HeldOut(cache)).lm_loss != validate(student, HeldOut(cache)).lm_loss


def test_ids_beyond_the_cache_do_not_count(cache, student):
    """A head padded to a round number is cut to the cache's ids before the softmax."""
    padded = new_model(1, VOCAB + 4)
    with torch.no_grad():
        padded.lm_head.weight[:VOCAB] = student.lm_head.weight
        padded.lm_head.weight[VOCAB:] = 100
        padded.model.embed_tokens.weight[:VOCAB] = student.model.embed_tokens.weight
        for name, parameter in padded.model.layers.named_parameters():
            parameter.copy_(student.model.layers.get_parameter(name))
    close(validate(student, HeldOut(cache)), validate(padded, HeldOut(cache)))


def test_documents_apart_are_measured_apart(tmp_path, student, teacher, tokens):
    """Where documents did not see each other, the student reads each by itself; without their borders it is refused."""
    border, isolated = 9, {"capture": {"packing": {"isolated": True}}}
    starts = np.arange(POSITIONS + 1) == border
    path = write_cache(
        tmp_path / "apart.skl", teacher, tokens[:2], columns=(*COLUMNS, "document_start"), starts=starts,
        settings=isolated, bare=(border - 1,),
    )  # fmt: skip
    losses = []
    for row in tokens[:2]:
        for part in (row[:border], row[border:]):
            losses += (-distribution(student, part)[np.arange(len(part) - 1), part[1:]]).tolist()
    found = validate(student, HeldOut(path))
    assert found.num_positions == len(losses)
    assert found.lm_loss == pytest.approx(np.mean(losses), rel=1e-5)
    write_cache(tmp_path / "lost.skl", teacher, tokens[:2], settings=isolated)
    with pytest.raises(SettingsError, match=r"lost.skl: .* without the column document_start, .*--isolate-documents"):
        HeldOut(tmp_path / "lost.skl")


def test_a_model_is_left_as_it_was(cache):
    """Dropout is off for the time of the call, each module's mode is what it was, and no gradient is made."""
    model = new_model(1).train()
    model.model.norm.eval()
    model.config.attention_dropout = 0.5
    modes = [module.training for module in model.modules()]
    seen = []
    result = validate(model, HeldOut(cache, batch_size=3), reach=seen.append)
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert seen == [3, 6, 7]
    close(validate(new_model(1), HeldOut(cache)), result)


def test_what_cannot_be_measured_is_refused(tmp_path, cache, student, teacher, tokens):
    """A narrow student, broken weights, rows of another number and a part without records are named."""
    with pytest.raises(SettingsError, match="the student has 50 logits, the cache 60 ids; widen its embedding"):
        validate(new_model(1, 50), HeldOut(cache), forward=lambda batch: torch.zeros(*batch.input_ids.shape, 50))
    with pytest.raises(
        ValueError, match="the student: gives logits that are no finite numbers; its weights are broken"
    ):
        validate(student, HeldOut(cache), forward=lambda batch: torch.full((*batch.input_ids.shape, VOCAB), math.nan))
    with pytest.raises(ValueError, match="the student gives 1 rows of logits or hidden states for 128 inputs"):
        validate(student, HeldOut(cache), forward=lambda _: torch.zeros(1, VOCAB))
    empty = write_cache(tmp_path / "empty.skl", teacher, tokens[:3], bare=range(POSITIONS))
    with pytest.raises(
        ValueError, match=r"empty.skl: sequences 1:3 have no record, so that there is nothing to measure"
    ):
        validate(student, HeldOut(empty, range(1, 3)))
