"""What a cache holds, in numbers; what each payload adds up to is proven in tests/unit/native/test_stats.py."""

import json
import math
import re

import numpy as np
import pytest
from operation_data import ROUNDS, header, sequence, write

import sklformat as skl
from sklformat.cli import main
from sklformat.format.layout import HEADER_SIZE
from sklformat.settings.inspection import StatsConfig


def make(path, *, shift=0):
    """12 sequences of 64 positions, of 8 rounds that all fall on the label or beside it."""
    rng = np.random.default_rng(0)
    header = skl.Header(vocab_size=400, seq_len=64, kind="counts", rounds=8, sampler="multinomial")
    with skl.ShardWriter(path, header=header) as writer:
        for _ in range(12):
            tokens = rng.integers(0, 399, 65)
            labels = np.roll(tokens, shift)[1:]
            ids = np.stack([labels, labels + 1], 1).ravel()
            writer.append(
                tokens,
                skl.SparseTargets(token_ids=ids, counts=np.tile([6, 2], 64), offsets=np.arange(0, 130, 2)),
            )
    return path


def test_what_is_said_of_a_sound_cache(tmp_path, capsys):
    """By the command line as in Python; nothing is suspicious."""
    path = make(tmp_path / "a.skl")
    found = skl.stats(path)
    labels = found["labels"]
    assert (1.0, False) == (labels["in_support"]["mean"], labels["suspicious"])
    assert 0.75 == found["confidence"]["mean"] == labels["confidence"]["mean"]
    assert [*range(0, 64, 4)] == [part["first"] for part in labels["along_the_sequence"]]
    assert found["entropy"]["mean"] == pytest.approx(0.5623351446 + 1 / 16)
    assert sum(size for name, size in found["bytes"].items() if name != "total") == path.stat().st_size
    assert 0 == main(["stats", str(path), "--json"])
    assert found == json.loads(capsys.readouterr().out)


def test_misaligned_records_are_suspicious(tmp_path, capsys):
    """One sentence says so."""
    path = make(tmp_path / "a.skl", shift=1)
    assert skl.stats(path)["labels"]["suspicious"]
    assert 0 == main(["stats", str(path)])
    assert "tokens and records look misaligned" in capsys.readouterr().out


def test_a_sample_states_its_error(tmp_path):
    """By the seed; at least two sequences."""
    path = make(tmp_path / "a.skl")
    assert skl.stats(path, sample=5) == skl.stats(path, sample=5)
    assert skl.stats(path, sample=5)["labels"]["chance"]["error"] > 0
    with pytest.raises(ValueError, match="sample must be >= 2, got 1"):
        StatsConfig(path="x", sample=1)


def oracle(cache):
    """The means that the view makes of sums, one position after the other."""
    entropies, expected, chance, hits, empty, positions = [], [], [], 0, 0, 0
    for one in cache:
        n = one.targets.num_positions
        for t in range(n):
            begin, end = one.targets.offsets[t : t + 2]
            ids, counts = one.targets.token_ids[begin:end].tolist(), one.targets.counts[begin:end].tolist()
            positions += 1
            if not counts:
                empty += 1
                continue
            plain = -sum(c / ROUNDS * math.log(c / ROUNDS) for c in counts)
            entropies.append(plain + (len(counts) - 1) / (2 * ROUNDS))
            expected.append(1 - counts.count(1) / ROUNDS)
            if one.tokens is not None:
                hits += one.tokens[t + 1] in ids
                chance.append(one.tokens[(t + n // 2) % n + 1] in ids)
    filled = len(entropies)
    return {
        "empty": empty / positions,
        "entropy": sum(entropies) / filled,
        "expected": sum(expected) / filled,
        "in_support": hits / filled,
        "chance": sum(chance) / filled,
    }


@pytest.mark.parametrize("changes", [{}, {"seq_len": 0}], ids=["equal lengths", "ragged lengths"])
def test_the_formulas(tmp_path, changes):
    """Miller-Madow, Good-Turing and chance are as in a slow and obvious count."""
    path = write(tmp_path / "a", 9, **changes)
    found = skl.stats(path)
    said = {
        "empty": found["positions_without_records"]["mean"],
        "entropy": found["entropy"]["mean"],
        **{name: found["labels"][name]["mean"] for name in ("expected", "in_support", "chance")},
    }
    with skl.open(path) as cache:
        assert oracle(cache) == pytest.approx(said, abs=1e-7)
        lengths = [one.targets.num_positions for one in cache]
        assert {"shortest": min(lengths), "mean": np.mean(lengths), "longest": max(lengths)} == found["lengths"]
        places = found["labels"]["along_the_sequence"]
        assert sum(place["positions"] for place in places) == sum(
            int((np.diff(c.targets.offsets) > 0).sum()) for c in cache
        )


def test_columns(tmp_path):
    """What a column holds exactly is not estimated; documents and the tokens that begin them are counted."""
    columns = ("label_logprob", "entropy", "document_start")
    packing = {"packing": {"separator_id": 7, "bos": {"id": 3}}}
    path = write(tmp_path / "a", 9, columns=columns, capture=packing)
    found = skl.stats(path)
    with skl.open(path) as cache:
        has = np.concatenate([np.diff(one.targets.offsets) > 0 for one in cache])
        for name in columns[:2]:
            values = np.concatenate([one.columns[name] for one in cache]).astype(np.float64)
            assert found[name]["mean"] == pytest.approx(values[has].mean())
        documents = sum(int(one.columns["document_start"].sum()) for one in cache)
        tokens = np.concatenate([one.tokens for one in cache])
    said = found["tokens"]
    assert "exact, of the column entropy" == found["entropy"]["method"]
    assert documents == said["documents"]
    assert (tokens == 3).sum() / documents == said["bos_a_document"]
    assert {"id": 7, "share": (tokens == 7).mean()} == said["separator"]
    assert "(exact, of the column)" in str(found)
    assert "weights" not in found


def test_ratios(tmp_path):
    """The mass that Top-K kept is what the label is expected to be in."""
    path = write(tmp_path / "a", 5, kind="ratios", rounds=0, sampler="topk")
    found = skl.stats(path)
    with skl.open(path) as cache:
        filled = sum(int((np.diff(one.targets.offsets) > 0).sum()) for one in cache)
        mass = sum(float(one.targets.weights.sum(dtype=np.float64)) for one in cache) / filled
    assert found["retained_mass"]["mean"] == found["labels"]["expected"]["mean"] == pytest.approx(mass)
    assert "of the records alone" in found["entropy"]["method"]
    assert sum(found["weights"]["histogram"]) == found["records"]
    assert "retained mass" in str(found)


def test_what_people_read(tmp_path):
    """Drawn records have a largest that is too high by chance, kept ones have not; what is least is said to be."""
    drawn = str(skl.stats(write(tmp_path / "a", 5)))
    assert "8 in each sequence" in drawn
    assert " % (the largest record, too high by chance)" in drawn
    assert re.search(r"nats \(Miller-Madow\)$", drawn, re.MULTILINE)
    assert re.search(r"; expected [0-9.]+ %, by chance", drawn)
    kept = str(skl.stats(write(tmp_path / "b", 5, seq_len=0, kind="ratios", rounds=0, sampler="topk")))
    assert "3 to 6 in a sequence" in kept
    assert " % (the largest record)" in kept
    systematic = str(skl.stats(write(tmp_path / "c", 5, sampler="systematic")))
    assert re.search(r"; expected at least [0-9.]+ %, by chance", systematic)
    weighted = {"kind": "ratios", "proposal_temperature": 0.5, "sampler": "multinomial"}
    assert re.search(r"label has a record +[0-9.]+ %; by chance", str(skl.stats(write(tmp_path / "d", 5, **weighted))))


def test_large_numbers_have_all_their_digits(tmp_path):
    """Of whatever size; a mean above 10 000 has no power of ten."""
    found = skl.stats(write(tmp_path / "a", 3, columns=("document_start",)))
    found["tokens"]["documents"] = 1_234_567_890_123
    found["unique_tokens"]["mean"] = 123_456.7
    said = str(found)
    assert re.search(r"^documents +1,234,567,890,123$", said, re.MULTILINE)
    assert re.search(r"^unique tokens +123,457; half", said, re.MULTILINE)


def test_without_tokens(tmp_path):
    """No labels, so nothing is said of them; the rest is."""
    found = skl.stats(write(tmp_path / "a", 4, store_tokens=False))
    assert {"labels", "tokens"}.isdisjoint(found)
    assert 0 == found["bytes"]["tokens"]
    assert "label" not in str(found)


def test_an_empty_cache(tmp_path, capsys):
    """Nothing is unknown but means, which people are not told."""
    path = write(tmp_path / "a", 0)
    found = skl.stats(path)
    assert (0, 0, None) == (found["sequences"], found["positions"], found["entropy"]["mean"])
    assert found["labels"]["suspicious"] is None
    assert 0 == main(["stats", str(path)])
    assert ["path", "sequences", "positions", "bytes: headers, index and padding"] == [
        line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()
    ]


def test_repeated_sequences(tmp_path):
    """By the alignment checksums of their tokens."""
    of = header()
    with skl.CacheWriter(tmp_path / "a", header=of) as writer:
        for number in (0, 1, 0, 0):
            writer.append(*sequence(of, number))
    assert 2 == skl.stats(tmp_path / "a")["repeated_sequences"]


def test_damage_is_named(tmp_path, capsys):
    """File, block and byte; exit status 1."""
    path = write(tmp_path / "a", 3)
    shard = path / "shard-00000.skl"
    data = bytearray(shard.read_bytes())
    data[HEADER_SIZE + 64] ^= 1
    shard.write_bytes(data)
    assert 1 == main(["stats", str(path)])
    said = capsys.readouterr().err
    assert f"{shard}: block 0: byte {HEADER_SIZE}: payload checksum" in said
    assert said.endswith("; sklformat verify lists all that is damaged, and says how to fix it\n")


def test_behind_a_url(tmp_path):
    """The same numbers as of the files here."""
    fsspec = pytest.importorskip("fsspec")
    path, store = write(tmp_path / "a", 7), fsspec.filesystem("memory")
    try:
        for file in path.iterdir():
            store.pipe(f"/stats/{file.name}", file.read_bytes())
        assert skl.stats(path) == skl.stats("memory://stats") | {"path": str(path)}
    finally:
        store.rm("/stats", recursive=True)


def test_errors_of_samples_are_as_large_as_said(tmp_path):
    """Squared errors of 200 samples of 20 of 60 sequences against the squares of what they state: within a third."""
    path = write(tmp_path / "a", 60, per_shard=60, seq_len=0)
    truth = skl.stats(path)["unique_tokens"]["mean"]
    found = [skl.stats(path, sample=20, seed=seed)["unique_tokens"] for seed in range(200)]
    real = np.mean([(one["mean"] - truth) ** 2 for one in found])
    assert 2 / 3 < real / np.mean([one["error"] ** 2 for one in found]) < 3 / 2
    assert " ± " in str(skl.stats(path, sample=20))
    assert skl.stats(path)["unique_tokens"]["error"] is None
    assert skl.stats(path, sample=60) == skl.stats(path)


def drawn(path, seed, *, shift, power=2):
    """8 sequences of 128 labels and 12 rounds of one Zipf law, over ids in another order at each position."""
    rng = np.random.default_rng(seed)
    law = np.arange(1.0, 301.0) ** -power
    law /= law.sum()
    of = skl.Header(vocab_size=300, seq_len=128, kind="counts", rounds=12, sampler="multinomial")
    with skl.ShardWriter(path, header=of) as writer:
        for _ in range(8):
            first = rng.integers(0, 300, (128, 1))
            draws = (first + rng.choice(300, (128, 13), p=law)) % 300
            ids, counts = zip(*(np.unique(row[1:], return_counts=True) for row in draws), strict=True)
            offsets = np.cumsum([0, *map(len, ids)])
            tokens = np.append(rng.integers(0, 300), np.roll(draws[:, 0], shift))
            writer.append(
                tokens,
                skl.SparseTargets(token_ids=np.concatenate(ids), counts=np.concatenate(counts), offsets=offsets),
            )
    return path


@pytest.mark.parametrize("seed", range(5))
def test_alarms(tmp_path, seed):
    """
    Aligned records raise none, misaligned ones do.

    What is stated of false alarms is a bound by Hoeffding; of labels from the teacher itself both rates are within five
    of their largest standard errors.
    """
    labels = skl.stats(drawn(tmp_path / "a.skl", seed, shift=0))["labels"]
    gap = labels["expected"]["mean"] - labels["chance"]["mean"]
    assert labels["false_alarm_rate"] == pytest.approx(math.exp(-8 * 128 * gap**2 / 16))
    assert labels["false_alarm_rate"] < 1e-6
    assert labels["suspicious"] is False
    assert labels["in_support"]["mean"] == pytest.approx(labels["expected"]["mean"], abs=5 / math.sqrt(8 * 128))
    labels = skl.stats(drawn(tmp_path / "b.skl", seed, shift=1))["labels"]
    assert labels["suspicious"] is True
    assert labels["in_support"]["mean"] == pytest.approx(labels["chance"]["mean"], abs=5 / math.sqrt(8 * 128))


def test_too_flat_to_tell(tmp_path):
    """Where records say little of labels, noise is not called suspicious."""
    labels = skl.stats(drawn(tmp_path / "a.skl", 0, shift=1, power=0))["labels"]
    assert (None, True) == (labels["suspicious"], labels["false_alarm_rate"] > 1e-4)


def test_systematic_draws_hold_more_labels_than_good_turing_says(tmp_path):
    """By sum N p^2 over Np <= 1 and sum (2 - Np) / N over 1 < Np < 2; each rate within five standard errors."""
    rounds, positions = 12, 8 * 128
    law = np.arange(1.0, 301.0) ** -1.2
    law /= law.sum()
    times = rounds * law
    above = float((times * law)[times <= 1].sum() + ((2 - times) / rounds)[(times > 1) & (times < 2)].sum())
    rng = np.random.default_rng(0)
    of = skl.Header(vocab_size=300, seq_len=128, kind="counts", rounds=rounds, sampler="systematic")
    with skl.ShardWriter(tmp_path / "a.skl", header=of) as writer:
        rows = np.tile(np.log(law).astype(np.float32), (128, 1))
        for sequence in range(8):
            records = skl.draw(rows, rounds, "systematic", sequence=sequence)
            writer.append(rng.choice(300, 129, p=law), records)
    labels = skl.stats(tmp_path / "a.skl")["labels"]
    assert labels["expected"]["method"].endswith("the least of systematic draws")
    assert above > 0.1
    assert labels["in_support"]["mean"] - labels["expected"]["mean"] == pytest.approx(above, abs=5 / positions**0.5 / 2)
