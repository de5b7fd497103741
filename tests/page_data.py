"""Caches of the same tokens from several made-up teachers, for the tests of the page."""

import numpy as np

import sklformat as skl


def write_beside(path, other, seed=1, rounds=7, columns=(), kind="counts", misplaced=()):
    """
    A cache of another's tokens, with records of its own: counts in ``rounds`` rounds, or ratios of 5 ids.

    The sequences of ``misplaced`` are about other tokens.
    """
    rng = np.random.default_rng(seed)
    with skl.open(other) as cache:
        header = skl.Header(
            vocab_size=cache.header.vocab_size,
            seq_len=cache.header.seq_len,
            kind=kind,
            rounds=rounds if kind == "counts" else 0,
            columns=columns,
        )
        with skl.CacheWriter(path, header=header, sequences_per_shard=3) as writer:
            for number, one in enumerate(cache):
                tokens = one.tokens[::-1] if number in misplaced else one.tokens
                writer.append(tokens, *_said(rng, header, tokens))
    return path


def _said(rng, header, tokens):
    """Records and columns of a teacher that often draws the label, and says nothing of a position in nine."""
    ids, values, offsets = [], [], [0]
    for t, label in enumerate(tokens[1:].tolist()):
        if t % 9 != 4:
            others = rng.integers(0, header.vocab_size, 4)
            drawn, counts = np.unique(
                np.where(rng.random(header.rounds or 5) < rng.random(), label, rng.choice(others, header.rounds or 5)),
                return_counts=True,
            )
            ids.append(drawn)
            values.append(counts)
        offsets.append(offsets[-1] + (ids[-1].size if t % 9 != 4 else 0))
    ids, values = np.concatenate(ids), np.concatenate(values)
    given = {"counts": values} if header.kind == "counts" else {"weights": values / 8}
    columns = {"label_logprob": np.where(np.diff(offsets) > 0, -4 * rng.random(len(offsets) - 1), 0)}
    targets = skl.SparseTargets(token_ids=ids, offsets=offsets, **given)
    return targets, {name: columns[name] for name in header.columns}
