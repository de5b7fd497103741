"""llama.cpp's base logits: drawn records follow the distributions that were written; the clip is kept."""

import struct

import numpy as np
import pytest
from converted import run

import sklformat as skl

V, N_CTX, CHUNKS = 37, 10, 3
FIRST = N_CTX // 2
DRAWN = {"sampler": "multinomial", "rounds": 40}


def write_kld(path, tokens, logits, n_chunk=None):
    """A file of these tokens [C, n_ctx] and float32 logits [C, n_ctx, V], as the perplexity tool writes it."""
    chunks, n_ctx, n_vocab = logits.shape
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<iii", n_ctx, n_vocab, n_chunk or chunks))
        file.write(tokens.astype("<i4").tobytes())
        for chunk in logits.astype(np.float32):
            for row in chunk[n_ctx // 2 : n_ctx - 1]:
                file.write(kld_row(row))
    return path


def kld_row(row):
    largest, smallest = row.max(), max(row.min(), row.max() - np.float32(16))
    log_sum = np.float32(np.log(np.exp(row.astype(np.float64) - largest).sum()))
    scale = np.float32((largest - smallest) / np.float32(65535))
    steps = np.zeros(row.size + row.size % 2, "<u2")
    if scale:
        steps[: row.size] = np.where(row > smallest, np.rint((row - smallest) / scale), 0)
    return struct.pack("<ff", scale, smallest - largest - log_sum) + steps.tobytes()


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture
def dense():
    """Tokens and logits; those of the last chunk reach far below the clip, and one of its rows is uniform."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (CHUNKS, N_CTX, V))
    logits[-1] *= 8
    logits[-1, FIRST] = 3.25
    return rng.integers(0, V, (CHUNKS, N_CTX)), logits.astype(np.float32)


@pytest.fixture
def source(tmp_path, dense):
    return write_kld(tmp_path / "base.kld", *dense)


def test_top_probabilities(tmp_path, dense, source):
    """The largest probabilities of each row come back within the code's 5 %, at the second half's positions alone."""
    tokens, logits = dense
    made = run(source, tmp_path / "cache", sampler="topk", k=5)
    cache = skl.open(tmp_path / "cache")
    assert len(cache) == CHUNKS
    for chunk, probs in enumerate(softmax(logits)):
        sequence = cache[chunk]
        assert sequence.tokens.tolist() == tokens[chunk].tolist()
        lengths = np.diff(sequence.targets.offsets)
        assert lengths[:FIRST].tolist() == [0] * FIRST
        for t in range(FIRST, N_CTX - 1):
            begin, end = sequence.targets.offsets[t : t + 2]
            ids, weights = sequence.targets.token_ids[begin:end], sequence.targets.weights[begin:end]
            np.testing.assert_allclose(weights, probs[t][ids], rtol=0.05, atol=1e-6)
            top = np.sort(probs[t])[-len(ids) :]
            np.testing.assert_allclose(np.sort(probs[t][ids]), top, rtol=1e-3)
    header = cache.header
    assert (header.sampler, header.biased, header.vocab_size) == ("topk", True, V)
    assert header.capture["converted"]["values"] == "log-probabilities"
    assert header.capture["converted"]["source"] == {
        "chunks": CHUNKS, "tokens_per_chunk": N_CTX, "temperature": 1, "k": 5,
    }  # fmt: skip
    assert any("clipped, at most so much; they are left out" in sentence for sentence in made.says)
    assert any("positions in the first half of each chunk have none" in sentence for sentence in made.says)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_draws(tmp_path, dense, source, sampler):
    """Counts, averaged over seeds, are the probabilities: z-scores of 4 sigma, but those of clipped ids."""
    _, logits = dense
    probs = softmax(logits)
    rounds, seeds = 120, 25
    sums = np.zeros((CHUNKS, N_CTX, V))
    for seed in range(seeds):
        out = tmp_path / f"cache-{seed}"
        made = run(source, out, sampler=sampler, rounds=rounds, seed=seed)
        cache = skl.open(out)
        for chunk in range(CHUNKS):
            targets = cache[chunk].targets
            positions = np.repeat(np.arange(N_CTX - 1), np.diff(targets.offsets))
            np.add.at(sums[chunk], (positions, targets.token_ids), targets.counts)
    assert "sampler " + sampler + ": unbiased" in "\n".join(made.says)
    assert not skl.open(tmp_path / "cache-0").header.biased
    assert (sums[:, :FIRST] == 0).all()
    rows = slice(FIRST, N_CTX - 1)
    expected = probs[:, rows] * rounds * seeds
    z = (sums[:, rows] - expected) / np.sqrt(np.maximum(expected, 1))
    assert np.abs(z).max() < 4.5  # of 444 values; 1 in 300 sets of fair draws is worse
    assert skl.open(tmp_path / "cache-0").fingerprint != skl.open(tmp_path / "cache-1").fingerprint


def test_clipped_values_share_the_rest():
    """What was clipped gets no more than what the others leave of 1; elsewhere the minimum is exact."""
    from sklformat.interop.neighbours.llama_cpp import _log_probs

    rng = np.random.default_rng(1)
    far, near = rng.normal(0, 20, (4, 1000)), rng.normal(0, 1, (4, 1000))
    far[:, 7] = far.max() + 1
    for logits, clipped in ((far, True), (near, False)):
        words = np.stack([np.frombuffer(kld_row(row), "<u2") for row in logits.astype(np.float32)])
        logs = _log_probs(words, 1000, 0).astype(np.float64)
        probs = softmax(logits)
        floor = np.exp(words[:, 2:4].copy().view("<f4").astype(np.float64))
        kept = words[:, 4:] > 0
        assert (~kept).sum() > (100 if clipped else 0)
        np.testing.assert_allclose(np.exp(logs[kept]), probs[kept], rtol=2e-4)
        assert (np.exp(logs) <= floor)[~kept].all() or not clipped
        np.testing.assert_allclose(np.exp(logs).sum(1), 1, atol=2e-4)


def test_same_bytes_and_resumed(tmp_path, source):
    """The same seed gives the same bytes, whether or not a conversion was stopped between chunks."""
    run(source, tmp_path / "a", **DRAWN, sequences_per_shard=1)
    run(source, tmp_path / "b", **DRAWN, sequences_per_shard=1, seed=0)
    assert skl.open(tmp_path / "a").fingerprint == skl.open(tmp_path / "b").fingerprint
    from sklformat.interop.kinds import find_kind, open_reading
    from sklformat.interop.readings import Asked

    assert find_kind(source) == "llama-cpp-kld"
    reading, _ = open_reading(source, "llama-cpp-kld", Asked(**DRAWN))
    rows = list(reading.rows(0))
    (last,) = reading.rows(2)
    assert (last.token_ids == rows[2].token_ids).all()
    assert (last.values == rows[2].values).all()


def test_many_rounds_are_weights(tmp_path, source):
    """More rounds than a count holds give ratios, which are no renormalised top-k."""
    made = run(source, tmp_path / "cache", sampler="multinomial", rounds=500)
    header = skl.open(tmp_path / "cache").header
    assert (header.kind, header.rounds, header.biased) == ("ratios", 500, False)
    assert "renormalised" not in "\n".join(made.says)


def test_a_file_cut_short(tmp_path, source):
    """Whole chunks of a stopped run are converted where the others may be dropped, which are counted."""
    source.write_bytes(source.read_bytes()[:-7])
    with pytest.raises(skl.CorruptError, match="row 2: the file ends before chunk 2 of 3 does: it was not written to"):
        run(source, tmp_path / "none", **DRAWN)
    run(source, tmp_path / "cache", **DRAWN, on_bad_row="drop")
    cache = skl.open(tmp_path / "cache")
    assert len(cache) == 2
    assert cache.header.capture["converted"]["dropped"] == {"positions": 0, "sequences": 1}


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (8, 2, "cannot have chunks of 2 tokens, vocab_size 37 and 3 chunks"),
        (8, -5, "cannot have chunks of -5 tokens"),
        (12, 0, "vocab_size 0 and"),
        (12, 1 << 30, "vocab_size 1073741824 and"),
        (16, 0, "and 0 chunks"),
        (16, 2**31 - 1, "has 1148 bytes, but 2147483647 chunks of 10 tokens and vocab_size 37 need 807453851292"),
        (8, 2**31 - 1, "has 1148 bytes, but 3 chunks of 2147483647 tokens"),
        (16, 2, "has 1148 bytes, but 2 chunks"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, source, place, number, message):
    """Sizes of the head must be possible and fit the file; nothing is made of them before."""
    data = bytearray(source.read_bytes())
    data[place : place + 4] = struct.pack("<i", number)
    source.write_bytes(data)
    with pytest.raises(skl.CorruptError, match=f"base.kld: header: .*{message}"):
        run(source, tmp_path / "out", **DRAWN)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((float("nan"), -9), "row 0: position 5: scale nan and least -9.0 cannot be"),
        ((1e-4, float("inf")), "least inf cannot be"),
        ((-1e-4, -9), "cannot be"),
        ((1e-4, 3), "cannot be"),
        ((1e30, -9), "cannot be"),
        ((1e-4, -1), r"position 5: probabilities sum to .*, not 1"),
        ((1e-4, -30), r"position 5: probabilities sum to .*, not 1"),
    ],
)
def test_rows_that_cannot_be(tmp_path, source, values, message):
    """A row whose numbers are no distribution is refused by its position."""
    data = bytearray(source.read_bytes())
    begin = 20 + 4 * CHUNKS * N_CTX
    data[begin : begin + 8] = struct.pack("<ff", *values)
    source.write_bytes(data)
    with pytest.raises(skl.CorruptError, match=message):
        run(source, tmp_path / "out", **DRAWN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "does not say how its records were made; give --sampler"),
        ({"sampler": "multinomial"}, "give --rounds"),
        ({"sampler": "topk"}, "give --k"),
        ({"sampler": "topp"}, "--sampler must be multinomial, systematic or topk, got topp"),
        ({"sampler": "topk", "k": 3, "rounds": 4}, "--sampler topk draws nothing; leave out --rounds and --seed"),
        ({**DRAWN, "k": 3}, "--k is for --sampler topk; --rounds says how often multinomial draws"),
        ({"sampler": "systematic", "rounds": 65536}, "^rounds must be in 1..65535, got 65536"),
        ({**DRAWN, "seed": 1 << 64}, "^seed and sequence must be in"),
        ({"sampler": "topk", "k": 65536}, "^k must be in 1..65535, got 65536"),
        ({**DRAWN, "vocab_size": 36}, "says vocab_size 37, --vocab-size says 36; leave --vocab-size out"),
        ({**DRAWN, "values": "logits"}, "--values: of no use for llama-cpp-kld; leave it out"),
    ],
)
def test_what_flags_cannot_be(tmp_path, source, settings, message):
    """Flags say how to draw, and nothing that the file says."""
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", **settings)


def test_another_file(tmp_path):
    """A file that is none."""
    (tmp_path / "a.kld").write_bytes(b"_logit")
    with pytest.raises(
        skl.CorruptError, match="not a file of llama-cpp-kld: it does not begin with _logits_ and three"
    ):
        run(tmp_path / "a.kld", tmp_path / "out", from_="llama-cpp-kld", **DRAWN)
