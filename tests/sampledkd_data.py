"""Caches as SampledKD writes them: draws, the most frequent in slots, a manifest by the SHA-1 of the tokens."""

import hashlib
import json

import numpy as np

SLOTS, ROUNDS = 12, 50


def draw(rng, positions, vocab_size, *, unique=6, rounds=ROUNDS):
    """Ids and counts of each position: at most ``unique`` different ids, whose counts sum to ``rounds``."""
    drawn = []
    for _ in range(positions):
        ids = rng.choice(vocab_size, unique, replace=False)
        draws = rng.choice(ids, rounds, p=rng.dirichlet(np.ones(unique)))
        drawn.append(np.unique(draws, return_counts=True))
    return drawn


def seven_bits(counts, rounds):
    """Probabilities in 127ths; those with the largest rounding errors are shifted by one towards a sum of 127."""
    shares = np.float32(counts) / np.float32(rounds)
    codes = np.rint(shares * 127).astype(int)
    missing = 127 - codes.sum()
    if missing:
        order = np.argsort(-np.abs(shares * 127 - codes), kind="stable")[: abs(missing)]
        codes[order] = np.clip(codes[order] + np.sign(missing), 0, 127)
    return codes


def item_of(key, drawn, valid, vocab_size, *, rounds=ROUNDS, slots=SLOTS):
    import torch

    packed = np.zeros((len(drawn), slots, 3), np.uint8)
    for t, (ids, counts) in enumerate(drawn):
        if not valid[t]:
            continue
        kept = np.argsort(-counts, kind="stable")[:slots]
        codes = seven_bits(counts[kept], rounds)
        for slot in range(slots):
            word = vocab_size & 0x1FFFF
            if slot < len(kept):
                word = (int(ids[kept[slot]]) & 0x1FFFF) | (int(codes[slot]) << 17)
            packed[t, slot] = list(word.to_bytes(3, "little"))
    stored = {"U": slots, "N": rounds, "id_bits": 17, "prob_bits": 7, "sentinel_id": vocab_size}
    return {
        "key": key,
        "valid_mask": torch.tensor(np.array(valid)),
        "topk_m": 12,
        "H_hat_u8": torch.zeros(len(drawn), dtype=torch.uint8),
        "rs": stored | {"packed": torch.tensor(packed.reshape(-1))},
    }


def key_of(tokens, kind="<i8"):
    return hashlib.sha1(np.asarray(tokens).astype(kind).tobytes()).hexdigest()


def write(path, items, *, per_shard=2, temperature=1.0, signature=()):
    """A directory of items in the order of the capture."""
    import torch

    path.mkdir()
    places, shards = {}, []
    for begin in range(0, len(items), per_shard):
        part = items[begin : begin + per_shard]
        name = f"shard_{len(shards):06d}.pt"
        torch.save(part, path / name)
        places |= {item["key"]: {"shard": len(shards), "index": i} for i, item in enumerate(part)}
        shards.append({"path": name, "n": len(part)})
    about = {"teacher_name": "a/teacher", "kd_temperature": temperature, "rs_samples": ROUNDS, **dict(signature)}
    manifest = {"signature": about, "items": places, "shards": shards, "stats": {}}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True))
    return path
