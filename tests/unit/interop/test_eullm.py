"""eullm's teacher cache: what its shards say comes back, at the temperature that is said."""

import json
import zipfile

import numpy as np
import pytest
from converted import assert_probs, patch_zip, run

import sklformat as skl

V, K = 60, 6


def bfloat16(values):
    """float32 rounded to the nearest bfloat16, ties to even, as bits."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def sequence(seed, length, temperatures, scale=3.0):
    """Tokens [L], ids [L - 1, K], their logits as bits, the normalisers [L - 1, n], and log-probs [L - 1, V]."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (length - 1, V)).astype(np.float32)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    logz = np.stack([np.log(np.exp(logits / t).sum(1)) for t in temperatures], 1).astype(np.float32)
    return rng.integers(0, V, length), ids, bfloat16(np.take_along_axis(logits, ids, 1)), logz, logits


def write(directory, sequences, per_shard=2, temperatures=(1.0, 2.0), **changes):
    """A directory as eullm's writer leaves it, with the pickled names and numpy 1's additional member."""
    directory.mkdir()
    shards = []
    for first in range(0, len(sequences), per_shard):
        part = sequences[first : first + per_shard]
        shards.append(f"shard-{len(shards):05d}.npz")
        np.savez(
            directory / shards[-1],
            seq_ids=np.array([f"doc-{first + i}" for i in range(len(part))], object),
            offsets=np.cumsum([0, *(len(one[1]) for one in part)]),
            token_offsets=np.cumsum([0, *(len(one[0]) for one in part)]),
            token_ids=np.concatenate([one[0] for one in part]).astype(np.int32),
            topk_ids=np.concatenate([one[1] for one in part]).astype(np.uint32),
            topk_logits=np.concatenate([one[2] for one in part]),
            logz=np.concatenate([one[3] for one in part]),
        )
        with zipfile.ZipFile(directory / shards[-1], "a") as archive, archive.open("allow_pickle.npy", "w") as member:
            np.lib.format.write_array(member, np.array(True))  # numpy 1 took the argument for an array
    provenance = {
        "teacher_model": "teacher", "teacher_precision": "bf16", "tokenizer_fingerprint": "ab", "top_k": K,
        "vocab_size": V, "temperatures": list(temperatures), "teacher_adapter": None, "notes": {},
    }  # fmt: skip
    manifest = {"format_version": 1, "provenance": provenance, "shards": shards, "n_sequences": len(sequences)}
    manifest |= {name: value for name, value in changes.items() if name in manifest}
    provenance |= {name: value for name, value in changes.items() if name in provenance}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (2.0, 1.0), (2.0, 4.0)])
def test_probabilities(tmp_path, temperatures):
    """Ids, probabilities and the tail's mass come back; at temperature 1 where it is there, else at the one said."""
    sequences = [sequence(seed, 5 + seed, temperatures) for seed in range(5)]
    source = write(tmp_path / "eullm", sequences, temperatures=temperatures)
    made = run(source, tmp_path / "cache")
    cache = skl.open(tmp_path / "cache")
    temperature = 1.0 if 1.0 in temperatures else temperatures[0]
    masses = []
    for i, (tokens, ids, _, _, logits) in enumerate(sequences):
        probs = np.exp(logits / temperature) / np.exp(logits / temperature).sum(1, keepdims=True)
        assert cache[i].tokens.tolist() == tokens.tolist()
        assert_probs(tmp_path / "cache", i, ids, np.take_along_axis(probs, ids, 1), rtol=0.06)
        masses.extend(np.take_along_axis(probs, ids, 1).sum(1))
    converted = cache.header.capture["converted"]
    assert converted["source"] == {
        "temperature": temperature, "k": K, "tail": "known", "teacher_model": "teacher", "teacher_precision": "bf16",
        "tokenizer_fingerprint": "ab",
    }  # fmt: skip
    assert converted["mass"] == pytest.approx(np.mean(masses), rel=0.01)
    assert cache.header.biased
    assert any(f"at temperature {temperature:g}" in sentence for sentence in made.says)


def test_rounded_sums_above_1(tmp_path):
    """bfloat16 logits of a sure teacher less an exact normaliser give more than 1; this is rounding, and is scaled."""
    tokens, ids, bits, logz, logits = sequence(0, 40, (1.0, 2.0))
    logits[:, 0] = np.linspace(20, 60, 39)
    ids[:, 0], ids[:, 1:] = 0, np.arange(1, K)
    bits = bfloat16(np.take_along_axis(logits, ids, 1))
    logz = np.stack([np.log(np.exp(logits.astype(np.float64) / t).sum(1)) for t in (1, 2)], 1).astype(np.float32)
    largest = (bits[:, 0].astype(np.uint32) << 16).view(np.float32) - logz[:, 0]
    assert largest.max() > 0.05
    source = write(tmp_path / "eullm", [(tokens, ids, bits, logz)])
    run(source, tmp_path / "cache")
    targets = skl.open(tmp_path / "cache")[0].targets
    assert 0.85 < targets.weights[targets.token_ids == 0].min() <= targets.weights.max() == 1


def test_from_any_sequence(tmp_path):
    """A stopped conversion is resumed at any sequence, in any shard."""
    from sklformat.interop.kinds import find_kind, open_reading
    from sklformat.interop.readings import Asked

    source = write(tmp_path / "eullm", [sequence(seed, 4, (1.0, 2.0)) for seed in range(5)])
    assert find_kind(source) == "eullm"
    reading, _ = open_reading(source, "eullm", Asked(vocab_size=V))
    rows = list(reading.rows(0))
    for start in range(6):
        rest = list(reading.rows(start))
        assert [row.input_ids.tolist() for row in rest] == [row.input_ids.tolist() for row in rows[start:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "manifest.json: has format_version 2; 1 is known here"),
        ({"shards": "shard-00000.npz"}, "lacks provenance or shards"),
        ({"shards": ["../shard-00000.npz"]}, "names a shard '../shard-00000.npz', which is no file of this directory"),
        ({"shards": ["shard-00000.npz", "b.npz"]}, "names b.npz, which is missing; copy the whole directory"),
        ({"vocab_size": "many"}, "vocab_size is 'many', must be a positive integer"),
        ({"temperatures": [0]}, r"temperatures are \[0\], must be positive numbers"),
        ({"temperatures": [1.0]}, r"logz has shape \(8, 2\), the manifest makes it \(8, 1\)"),
        ({"top_k": 7}, r"topk_ids has shape \(8, 6\), the manifest makes it \(8, 7\)"),
        ({"n_sequences": 9}, "manifest.json: tells of 9 sequences, its shards hold 3"),
        ({"vocab_size": 12}, "row 0: .* is not in .0, 12., the vocab_size"),
    ],
)
def test_manifests_that_cannot_be(tmp_path, changes, message):
    """A manifest that contradicts its shards is refused."""
    source = write(tmp_path / "eullm", [sequence(seed, 5, (1.0, 2.0)) for seed in range(3)], **changes)
    with pytest.raises(skl.CorruptError, match=message):
        run(source, tmp_path / "out", from_="eullm")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logz", None, "shard-00000.npz: has no logz among its arrays"),
        ("offsets", np.array([0, 4, 9]), "npz: offsets does not rise from 0 to 8"),
        ("offsets", np.array([0, 3, 8]), "row 0: 5 tokens and 3 rows of records"),
        ("offsets", np.array([0, 8]), "offsets and token_offsets are of different numbers of sequences"),
        ("topk_logits", np.zeros((8, K), np.float32), "topk_logits has 2 axes of float32"),
        ("topk_logits", np.zeros((8, K), np.uint32), "topk_logits is uint32, must be the bits of bfloat16"),
        ("logz", np.full((8, 2), np.nan, np.float32), "row 0: position 0: logprob nan of id"),
        ("logz", np.full((8, 2), -9, np.float32), "row 0: position 0: logprob .* cannot be"),
        ("token_ids", np.array([{}] * 10, object), "npz: Object arrays cannot be loaded"),
    ],
)
def test_shards_that_cannot_be(tmp_path, name, change, message):
    """A shard with missing, misshapen or impossible arrays is refused; pickled ones are not read."""
    source = write(tmp_path / "eullm", [sequence(seed, 5, (1.0, 2.0)) for seed in range(2)])
    shard = source / "shard-00000.npz"
    with np.load(shard) as file:
        arrays = {member: file[member] for member in file.files if member not in ("seq_ids", name)}
    np.savez(shard, **arrays, **({} if change is None else {name: change}))
    with pytest.raises(skl.CorruptError, match=message):
        run(source, tmp_path / "out")


def test_stopped_runs_and_damage(tmp_path):
    """Shards without a manifest are those of a run that was stopped; a shard that was cut short is damaged."""
    source = write(tmp_path / "eullm", [sequence(0, 5, (1.0, 2.0))])
    shard = source / "shard-00000.npz"
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(skl.CorruptError, match=r"shard-00000\.npz: not an npz file"):
        run(source, tmp_path / "out")
    (source / "manifest.json").unlink()
    with pytest.raises(
        skl.CorruptError, match=r"has no manifest\.json: its writer was stopped before the end; finish the"
    ):
        run(source, tmp_path / "out", from_="eullm")
    (source / "manifest.json").write_text("{")
    with pytest.raises(skl.CorruptError, match=r"manifest\.json"):
        run(source, tmp_path / "out", from_="eullm")


@pytest.mark.parametrize(
    ("field", "number", "message"),
    [("method", 99, "npz: That compression method is not supported"), ("flags", 1, "npz: .* is encrypted")],
)
def test_zip_files_of_another_kind(tmp_path, field, number, message):
    """A member that is packed in an unknown way, or encrypted, can't be read."""
    source = write(tmp_path / "eullm", [sequence(0, 5, (1.0, 2.0))])
    patch_zip(source / "shard-00000.npz", field, number)
    with pytest.raises(skl.CorruptError, match=message):
        run(source, tmp_path / "out")


def test_what_flags_cannot_be(tmp_path):
    """The manifest says the vocabulary, and which row is which."""
    source = write(tmp_path / "eullm", [sequence(0, 5, (1.0, 2.0))])
    with pytest.raises(ValueError, match="says vocab_size 60, --vocab-size says 61"):
        run(source, tmp_path / "out", vocab_size=61)
    with pytest.raises(ValueError, match="--convention: of no use for eullm"):
        run(source, tmp_path / "out", convention="own")
