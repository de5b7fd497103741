"""All small sequences: three ids, three rounds, the layouts that a shard can have, and tokens and columns for them."""

import numpy as np
import reference
from reference import COUNTS, R24, R24W, R32, RATIOS

VOCAB_SIZE = ROUNDS = 3
LAYOUTS = [(COUNTS, R24), (COUNTS, R24W), (COUNTS, R32), (RATIOS, R24), (RATIOS, R32)]


def settings_of(kind, profile, **changes):
    """Ragged, 3 ids, counts of 3 rounds."""
    rounds = ROUNDS if kind == COUNTS else 0
    return reference.Settings(
        **{"kind": kind, "profile": profile, "vocab_size": VOCAB_SIZE, "rounds": rounds} | changes
    )


def name_of(value):
    names = {COUNTS: "counts", RATIOS: "ratios"}, {R24: "R24", R24W: "R24W", R32: "R32"}
    return "-".join(name[item] for name, item in zip(names, value, strict=True))


def sequence_of(of, positions):
    """Positions with tokens and the columns that the settings name, all of which follow from the positions."""
    tokens = [(len(records) + t) % VOCAB_SIZE for t, records in enumerate([*positions, []])]
    columns = {
        "label_logprob": [-1.5 * len(records) for records in positions],
        "entropy": [0.25 * len(records) for records in positions],
        "document_start": [token == 0 for token in tokens],
        "record_logprob": [-0.5 * (1 + token_id) for records in positions for token_id, _ in records],
    }
    kept = {name: column for bit, (name, column) in enumerate(columns.items()) if of.columns >> bit & 1}
    return reference.Sequence(tokens, [list(records) for records in positions], **kept)


def weights_of(of, sequence):
    """The weights of a sequence of kind ratios; coding them gives its codes.  None for counts."""
    if of.kind == COUNTS:
        return None
    return [
        [
            (token_id, float(np.float32(v)) * 2.0 ** (of.scale_log2 - 31))
            for (token_id, _), v in zip(records, values, strict=True)
        ]
        for records, values in zip(sequence.positions, sequence.values(), strict=True)
    ]
