"""Axolotl's data sets, written from the description of their columns: nothing here is shared with the reader."""

import json

import numpy as np


def v1(ids, logs):
    """The column ``logprobs`` of the first form."""
    return [
        [{"token": f"token_id:{int(one)}", "logprob": float(log)} for one, log in zip(*row, strict=True)]
        for row in zip(ids, logs, strict=True)
    ]


def prepared(tokens, ids, logs, masked=()):
    """A row as Axolotl's preparation makes it, from rows about the next token; entries of positions are masked."""
    length, k = len(tokens), ids.shape[1]
    mask = [[0 if t in masked else 1] * k for t in range(length - 1)] + [[0] * k]
    return {
        "input_ids": [int(token) for token in tokens],
        "attention_mask": [1] * length,
        "labels": [int(token) for token in tokens],
        "target_logprobs": [*np.asarray(logs)[: length - 1].tolist(), [-1e9] * k],
        "target_token_ids": [*np.asarray(ids)[: length - 1].tolist(), [0] * k],
        "target_mask": mask,
    }


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
