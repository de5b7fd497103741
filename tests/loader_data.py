"""Small caches for the loader's tests, and batch streams as plain values."""

import numpy as np

import sklformat as skl

VOCAB, POSITIONS, ROUNDS, SEQUENCES = 1000, 16, 10, 23


def make_targets(rng, positions):
    """Records of a sequence; every fifth position has none."""
    token_ids, counts, offsets = [], [], [0]
    for t in range(positions):
        ids, number = np.unique(rng.integers(0, VOCAB, ROUNDS), return_counts=True)
        if t % 5 == 4:
            ids, number = ids[:0], number[:0]
        token_ids.append(ids)
        counts.append(number)
        offsets.append(offsets[-1] + ids.size)
    return skl.SparseTargets(token_ids=np.concatenate(token_ids), counts=np.concatenate(counts), offsets=offsets)


def labels_of(tokens, targets):
    """The tokens but the first; -100 where a position has no record."""
    return np.where(np.diff(targets.offsets) > 0, tokens[1:], -100).tolist()


def starts_of(i, length):
    """Where documents begin in sequence i, [length + 1]: at uneven distances, not always at its first token."""
    return (np.arange(length + 1) + i) % 7 == i % 3


def write_cache(
    directory,
    *,
    seq_len=POSITIONS,
    lengths=None,
    store_tokens=True,
    seed=7,
    columns=(),
    capture=None,
    sequences=SEQUENCES,
    records=make_targets,
    **settings,
):
    """
    Two shards of 23 sequences; returns what went in.

    Args:
        seed: Of tokens and records.
        records: Makes those of a sequence.
        settings: Of the header.
    """
    rng = np.random.default_rng(seed)
    data, shard_size = [], 15
    directory.mkdir()
    for number, first in enumerate(range(0, sequences, shard_size)):
        header = skl.Header(
            **{"vocab_size": VOCAB, "kind": "counts", "rounds": ROUNDS} | settings,
            seq_len=seq_len,
            shard_number=number,
            first_sequence=first,
            store_tokens=store_tokens,
            columns=columns,
            capture=capture or {},
        )
        with skl.ShardWriter(directory / f"shard-{number:05d}.skl", header=header) as writer:
            for i in range(first, min(first + shard_size, sequences)):
                length = (seq_len or POSITIONS) if lengths is None else lengths[i]
                tokens, targets = rng.integers(0, VOCAB, length + 1), records(rng, length)
                values = {"entropy": np.zeros(length), "document_start": starts_of(i, length)}
                values["label_logprob"] = np.where(np.diff(targets.offsets) > 0, -0.5 - tokens[1:] / VOCAB, 0)
                writer.append(tokens, targets, {name: values[name] for name in columns})
                data.append((tokens, targets))
    return data


def rows(batches):
    """A batch stream as plain values, one entry a sequence."""
    out = []
    for batch in batches:
        size, positions = batch.input_ids.shape
        offsets = batch.targets.offsets.reshape(-1)
        for row in range(size):
            begin, end = int(offsets[row * positions]), int(offsets[(row + 1) * positions])
            out.append(
                (
                    tuple(batch.input_ids[row].tolist()),
                    tuple(batch.labels[row].tolist()),
                    tuple(batch.targets.token_ids[begin:end].tolist()),
                )
            )
    return out
