"""
The samplers' law in float64 and plain Python: what csrc/sampler.c must agree with, written without looking at it.

Philox4x32-10 follows Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

import numpy as np

MASK = 2**32 - 1


def philox(counter, key):
    """One block: four 32-bit words from a counter of four and a key of two."""
    words, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * words[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * words[2], 2**32)
        words = [high1 ^ words[1] ^ k0, low1, high0 ^ words[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return words


def uniforms(rounds, *, seed, sequence, position):
    """[rounds] float64 in [0, 1): two to a block, 53 bits each, low word first."""
    values = []
    for block in range((rounds + 1) // 2):
        counter = (block, position, sequence & MASK, sequence >> 32)
        w = philox(counter, (seed & MASK, seed >> 32))
        values += [((w[1] << 32 | w[0]) >> 11) * 2.0**-53, ((w[3] << 32 | w[2]) >> 11) * 2.0**-53]
    return np.array(values[:rounds])


def probabilities(logits, temperature=1.0):
    """[..., V] float64 softmax of temperature * logits."""
    x = np.asarray(logits, np.float64) * temperature
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def points(rounds, sampler, **key):
    """[rounds] points in [0, 1), ascending."""
    if sampler == "systematic":
        return (np.arange(rounds) + uniforms(1, **key)[0]) / rounds
    return np.sort(uniforms(rounds, **key))


def dense(targets, vocab_size):
    """[T, V] float64: counts or weights at their ids, 0 elsewhere."""
    pairs = targets.counts if targets.counts is not None else targets.weights
    out = np.zeros((targets.num_positions, vocab_size))
    rows = np.repeat(np.arange(targets.num_positions), np.diff(targets.offsets))
    out[rows, targets.token_ids] = pairs
    return out
