"""Caches of what a tiny teacher says of given tokens: records drawn from its distributions, and columns."""

import functools

import numpy as np
import torch

import sklformat as skl

COLUMNS = ("label_logprob", "entropy")


def distribution(model, tokens):
    """Log-probabilities of a model in float64, [T, V], of one sequence by itself."""
    return _distribution(model, tuple(tokens.tolist()))


@functools.cache
def _distribution(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1).numpy()


def write_cache(
    path, teacher, tokens, *, columns=COLUMNS, bare=(4, 5), starts=None, settings=None, ragged=False, **how
):
    """The teacher's records of some sequences; positions ``bare`` have none.  ``settings`` go to the header."""
    how = {"sampler": "multinomial", "rounds": 20} | how
    drawn = how["sampler"] in ("multinomial", "systematic")
    counted = drawn and how.get("proposal_temperature", 1.0) == 1.0
    header = skl.Header(
        vocab_size=teacher.config.vocab_size, seq_len=0 if ragged else len(tokens[0]) - 1,
        kind="counts" if counted else "ratios",
        rounds=how["rounds"] if drawn else 0, sampler=how["sampler"], columns=columns,
        proposal_temperature=how.get("proposal_temperature", 1.0), **(settings or {}),
    )  # fmt: skip
    with skl.ShardWriter(path, header=header) as writer:
        for number, ids in enumerate(tokens):
            log_q = distribution(teacher, ids)
            targets = skl.draw(log_q.astype(np.float32), sequence=number, **how)
            targets = without(targets, bare)
            kept = np.diff(targets.offsets) > 0
            values = {
                "label_logprob": np.where(kept, log_q[np.arange(len(log_q)), ids[1:]], 0),
                "entropy": np.where(kept, -(np.exp(log_q) * log_q).sum(-1), 0),
                "document_start": starts,
            }
            writer.append(ids, targets, {name: values[name] for name in columns})
    return path


def without(targets, bare):
    positions = np.repeat(np.arange(targets.num_positions), np.diff(targets.offsets))
    kept = ~np.isin(positions, bare)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(positions[kept], minlength=targets.num_positions))])
    given = {name: getattr(targets, name) for name in ("counts", "weights") if getattr(targets, name) is not None}
    return skl.SparseTargets(
        token_ids=targets.token_ids[kept], offsets=offsets, **{name: value[kept] for name, value in given.items()}
    )
