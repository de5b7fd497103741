"""Whittle's batches and NeMo Automodel's cache for EAGLE-3: value for value, and what may be wrong with them."""

import json

import numpy as np
import pytest

import sklformat as skl
from sklformat.interop import convert
from sklformat.settings.convert import ConvertConfig

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file
V, B, T, K = 40, 3, 7, 4


def run(source, **settings):
    return convert(ConvertConfig(source=source, destination=source.with_name(f"{source.name}-cache"), **settings))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def assert_records(sequence, wanted):
    """Each position holds the wanted ids with these probabilities, which the ratio code keeps within 5 %."""
    targets = sequence.targets
    assert targets.offsets.size - 1 == len(wanted)
    for t, probs in enumerate(wanted):
        part = np.s_[targets.offsets[t] : targets.offsets[t + 1]]
        found = dict(zip(targets.token_ids[part].tolist(), targets.weights[part], strict=True))
        assert found == pytest.approx(probs, rel=0.05)


def top(logs, k=K):
    """The k most probable ids of each row and their log-probs."""
    ids = np.argsort(-logs, axis=-1)[..., :k]
    return ids, np.take_along_axis(logs, ids, -1)


def batches(count=3, seed=0):
    """Tokens [count, B, T] and logits [count, B, T, V]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, (count, B, T)), rng.normal(size=(count, B, T, V)).astype(np.float32)


def write_whittle(path, tokens, logits, *, k=K, every=10, dtype=torch.float32):
    """As Whittle: one file for each batch that is kept, numbered on; the batch's own number inside."""
    (path / "logits").mkdir(parents=True)
    for n, (ids, values) in enumerate(zip(tokens, logits, strict=True)):
        places, kept = top(values, k) if k else (None, values)
        content = {"input_ids": torch.tensor(ids), "batch_idx": n * every, "top_k": k}
        torch.save(content | {"logits": torch.tensor(kept).to(dtype)}, path / "logits" / f"logits_batch_{n:06d}.pt")
        if k:
            (path / "indices").mkdir(exist_ok=True)
            beside = {"indices": torch.tensor(places), "batch_idx": n * every}
            torch.save(beside, path / "indices" / f"indices_batch_{n:06d}.pt")
    torch.save({"top_k": k, "save_interval": every, "model": "a/teacher"}, path / "metadata.pt")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whittle_top_k(tmp_path, dtype):
    """Logits of the top k, normalised over these; the last row, about no token that is there, is left out."""
    tokens, logits = batches()
    made = run(write_whittle(tmp_path / "a", tokens, logits, dtype=dtype), vocab_size=V)
    cache = skl.open(made.destination)
    assert len(cache) == 9
    for i, sequence in enumerate(cache):
        n, b = divmod(i, B)
        assert sequence.tokens.tolist() == tokens[n, b].tolist()
        ids, kept = top(logits[n, b, :-1])
        probs = np.exp(log_softmax(kept))
        assert_records(sequence, [dict(zip(*pair, strict=True)) for pair in zip(ids.tolist(), probs, strict=True)])
    converted = cache.header.capture["converted"]
    assert (converted["from"], converted["values"]) == ("whittle", "renormalised")
    assert converted["source"]["metadata"]["model"] == "a/teacher"
    assert "3 batches were saved, those from 0 to 20 were seen" in str(made)


def test_whittle_whole(tmp_path):
    """Logits of the whole vocabulary give log-probs whose rest is known; --k says how many are kept."""
    tokens, logits = batches()
    source = write_whittle(tmp_path / "a", tokens, logits, k=None)
    with pytest.raises(ValueError, match="holds whole distributions; give --k"):
        run(source)
    with pytest.raises(ValueError, match="--k is 41, its distributions have 40 values"):
        run(source, k=41)
    with pytest.raises(ValueError, match="says vocab_size 40, --vocab-size says 41; leave --vocab-size out"):
        run(source, k=3, vocab_size=41)
    cache = skl.open(run(source, k=3).destination)
    for i, sequence in enumerate(cache):
        n, b = divmod(i, B)
        ids, logs = top(log_softmax(logits[n, b, :-1]), 3)
        assert_records(
            sequence, [dict(zip(*pair, strict=True)) for pair in zip(ids.tolist(), np.exp(logs), strict=True)]
        )
    assert cache.header.capture["converted"]["values"] == "log-probabilities"
    assert cache.header.vocab_size == V


def unlink(name):
    return lambda path: (path / name).unlink()


def change(name, **changes):
    def harm(path):
        torch.save(torch.load(path / name, weights_only=True) | changes, path / name)

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (unlink("logits/logits_batch_000001.pt"), "000002.pt: file 1 is missing before it; copy all of logits and ind"),
        (unlink("indices/indices_batch_000001.pt"), "indices_batch_000001.pt: is missing; copy all of logits and"),
        (change("logits/logits_batch_000001.pt", batch_idx=0), "batch 10 of shape .*, its logits are batch 0 of shape"),
        (change("logits/logits_batch_000001.pt", logits=torch.zeros(3, 6, 4)), r"logits of shape \(3, 6, 4\)"),
        (change("logits/logits_batch_000001.pt", logits=None), "000001.pt: not what Whittle writes"),
        (
            change("logits/logits_batch_000001.pt", logits=torch.full((3, 7, 4), torch.nan)),
            "row 3: position 0: logprob nan",
        ),
        (change("indices/indices_batch_000001.pt", indices=torch.full((3, 7, 4), V)), "row 3: position 0: token id 40"),
        (lambda path: (path / "logits/logits_batch_000001.pt").write_bytes(b"x"), "weights_only=True. refuses it"),
    ],
)
def test_whittle_that_is_not_whole(tmp_path, harm, message):
    """Missing, damaged and mixed files: one line each."""
    source = write_whittle(tmp_path / "a", *batches())
    harm(source)
    with pytest.raises(skl.CorruptError, match=message):
        run(source, vocab_size=V)


def test_whittle_in_another_order(tmp_path):
    """Batches must rise, and distributions be of one vocabulary."""
    tokens, logits = batches()
    source = write_whittle(tmp_path / "a", tokens, logits, k=None)
    change("logits/logits_batch_000001.pt", batch_idx=0)(source)
    with pytest.raises(skl.CorruptError, match=r"000001\.pt: is batch 0, behind batch 0"):
        run(source, k=3)
    change("logits/logits_batch_000001.pt", batch_idx=10, logits=torch.zeros(B, T, V - 1))(source)
    with pytest.raises(skl.CorruptError, match="row 3: logits of 39 ids, others have 40"):
        run(source, k=3)
    (tmp_path / "b").mkdir()
    with pytest.raises(skl.CorruptError, match=r"holds no logits/logits_batch_\*.pt"):
        run(tmp_path / "b", from_="whittle", k=3)


SELECTED = np.array([30, 2, 5, 7, 11, 13, 17, 19, 23, 29])
S = 9


def shifted(array):
    """One place to the left, with a zero behind."""
    return np.concatenate([array[:, 1:], np.zeros_like(array[:, :1])], axis=1)


def write_automodel(path, tokens, logits, lengths, learnt, *, k=None, per_shard=2, dtype=torch.float32):
    """As Automodel: everything one place to the left; probabilities over the selected ids alone."""
    path.mkdir()
    mask = np.arange(S) < np.array(lengths)[:, None]
    left = shifted(logits)
    draft = left[:, :, SELECTED]
    probs = torch.tensor(draft).softmax(2)
    first = np.isin(left.argmax(2), SELECTED)
    arrays = {
        "input_ids": torch.tensor(shifted(tokens)),
        "attention_mask": torch.tensor(shifted(mask.astype(np.int64))),
        "loss_mask": torch.tensor(shifted(learnt.astype(np.int64))),
        "aux_hidden_states": torch.zeros(len(tokens), S, 6),
        "position_mask": torch.tensor((first & shifted(learnt.astype(np.int64)).astype(bool))[:, :, None]),
    }
    if k is None:
        arrays["target_probs"] = probs.to(dtype)
    else:
        values, places = probs.topk(k, dim=2)
        arrays |= {"target_probs_values": values.to(dtype), "target_probs_indices": places.to(torch.int32)}
    for n in range(0, len(tokens), per_shard):
        part = {name: array[n : n + per_shard].contiguous() for name, array in arrays.items()}
        save_file(part, path / f"shard-{n // per_shard:06d}.safetensors")
    manifest = {
        "format_version": 2, "num_samples": len(tokens), "shard_size": per_shard, "draft_vocab_size": len(SELECTED),
        "target_probs_topk": k or 0, "selected_token_ids": SELECTED.tolist(), "target_model": "a/teacher",
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def samples(count=5, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [S, 5, S, 7, 4][:count]
    learnt = rng.random((count, S)) < 0.8
    logits = rng.normal(size=(count, S, V)).astype(np.float32)
    logits[:, :, SELECTED] += 1.5  # so that the first choice is mostly one of these
    return rng.integers(1, V, (count, S)), logits, lengths, learnt


@pytest.mark.parametrize(("k", "asked"), [(3, {}), (None, {"k": 3}), (None, {"k": len(SELECTED)})])
def test_automodel(tmp_path, k, asked):
    """Rows are shifted back, garbage and padding go, ids are those of the teacher's vocabulary."""
    tokens, logits, lengths, learnt = samples()
    made = run(write_automodel(tmp_path / "a", tokens, logits, lengths, learnt, k=k), vocab_size=V, **asked)
    cache = skl.open(made.destination)
    assert len(cache) == 5
    kept = k or asked["k"]
    for i, sequence in enumerate(cache):
        length = lengths[i]
        # Of the original: tokens from the second on; row t there is about token t + 1.
        assert sequence.tokens.tolist() == tokens[i, 1:length].tolist()
        wanted = []
        for t in range(1, length - 1):
            probs = np.exp(log_softmax(logits[i, t, SELECTED]))
            places = np.argsort(-probs)[:kept]
            there = learnt[i, t] and logits[i, t].argmax() in SELECTED
            wanted.append(dict(zip(SELECTED[places].tolist(), probs[places], strict=True)) if there else {})
        assert_records(sequence, wanted)
    converted = cache.header.capture["converted"]
    assert (converted["from"], converted["values"]) == ("automodel", "renormalised")
    assert converted["source"]["manifest"]["target_model"] == "a/teacher"
    assert converted["source"]["draft_vocab_size"] == 10
    assert "probabilities over the 10 ids of the draft model's vocabulary alone" in str(made)


def test_automodel_in_bfloat16(tmp_path):
    """Stored at half the size, the same records."""
    tokens, logits, lengths, learnt = samples()
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        run(write_automodel(tmp_path / name, tokens, logits, lengths, learnt, k=3, dtype=dtype), vocab_size=V)
    for one, other in zip(skl.open(tmp_path / "a-cache"), skl.open(tmp_path / "b-cache"), strict=True):
        assert one.targets.offsets.tolist() == other.targets.offsets.tolist()
        np.testing.assert_allclose(np.sort(one.targets.weights), np.sort(other.targets.weights), rtol=0.1)


def test_flags_of_stacked_tensors(tmp_path):
    """The vocabulary is in no file; --k is for whole distributions."""
    source = write_automodel(tmp_path / "a", *samples(), k=3)
    with pytest.raises(ValueError, match="does not say how many ids the teacher has; give --vocab-size"):
        run(source)
    with pytest.raises(ValueError, match="--k: of no use for top-k records; leave it out"):
        run(source, vocab_size=V, k=2)
    with pytest.raises(ValueError, match="--rounds: of no use for automodel; leave it out"):
        run(source, vocab_size=V, rounds=2)


def stored(**changes):
    """A change of the first shard; None: without the array."""
    from safetensors.torch import load_file

    def harm(path):
        file = path / "shard-000000.safetensors"
        arrays = load_file(file) | changes
        save_file({name: array for name, array in arrays.items() if array is not None}, file)

    return harm


def said(**changes):
    def harm(path):
        content = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(content | changes))

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (unlink("shard-000001.safetensors"), "shard-000001.safetensors: is missing; copy all shards"),
        (said(num_samples=9), "shard-000002.safetensors: input_ids has shape .*, 2 samples and input_ids"),
        (said(selected_token_ids=[]), "selected_token_ids, num_samples or shard_size is empty"),
        (said(selected_token_ids=[1, 2]), "row 0: id . is none of the 2 in selected_token_ids"),
        (said(selected_token_ids="x"), "no manifest of Automodel"),
        (said(selected_token_ids=list(range(38, 48))), "row 0: position .: token id 4. is not in"),
        (lambda path: (path / "manifest.json").write_text("{"), r"manifest\.json: .*JSON"),
        (stored(position_mask=None), "position_mask has shape None, 2 samples and input_ids"),
        (stored(target_probs_indices=torch.zeros(2, 9, 2, dtype=torch.int32)), "target_probs_indices differ in shape"),
        (stored(target_probs_values=torch.full((2, 9, 3), torch.nan)), "row 0: position .: logprob nan"),
        (stored(target_probs_values=torch.full((2, 9, 3), -1.0)), "row 0: position .: logprob nan"),
        (
            stored(attention_mask=torch.zeros(2, 9, dtype=torch.int64)),
            "row 0: fewer than two of its tokens are no padding",
        ),
        (lambda path: (path / "shard-000000.safetensors").write_bytes(b"12345678901"), "not a safetensors file"),
    ],
)
def test_automodel_that_is_not_whole(tmp_path, harm, message):
    """Missing, damaged and false files: one line each."""
    source = write_automodel(tmp_path / "a", *samples(), k=3)
    harm(source)
    with pytest.raises(skl.CorruptError, match=message) as error:
        run(source, vocab_size=V)
    assert "\n" not in str(error.value)


def test_automodel_of_another_version(tmp_path):
    """A manifest of a later version is refused by its number."""
    source = write_automodel(tmp_path / "a", *samples(), k=3)
    said(format_version=3)(source)
    with pytest.raises(skl.UnsupportedError, match="format_version 3; known is 2"):
        run(source, vocab_size=V)
