"""SampledKD's caches: counts where they are certain, weights elsewhere, found by the tokens."""

import itertools
import json

import numpy as np
import pytest
import sampledkd_data as data

import sklformat as skl
from sklformat.interop import convert
from sklformat.settings.convert import ConvertConfig

torch = pytest.importorskip("torch")
V = 900


def run(source, tokens, **settings):
    """Converted; the tokens are written beside the source."""
    file = source.with_name(f"{source.name}-tokens.jsonl")
    file.write_text("".join(json.dumps({"input_ids": np.asarray(row).tolist()}) + "\n" for row in tokens))
    settings = {"destination": source.with_name(f"{source.name}-cache"), **settings}
    return convert(ConvertConfig(source=source, tokens=file, **settings))


def capture(count=5, length=9, *, unique=6, vocab_size=V, seed=0):
    """Tokens, draws and items of sequences without padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (count, length))
    drawn = [data.draw(rng, length - 1, vocab_size, unique=unique) for _ in range(count)]
    valid = np.ones(length - 1, bool)
    items = [data.item_of(data.key_of(t), d, valid, vocab_size) for t, d in zip(tokens, drawn, strict=True)]
    return tokens, drawn, items


def positions_of(sequence, values="counts"):
    """Ids and values of each position."""
    targets = sequence.targets
    pairs = itertools.pairwise(targets.offsets.tolist())
    return [(targets.token_ids[a:b].tolist(), getattr(targets, values)[a:b].tolist()) for a, b in pairs]


def test_counts_that_are_certain(tmp_path):
    """Where slots are left, counts come back exactly, in the order of the tokens, not of the capture."""
    tokens, drawn, items = capture()
    order = [3, 0, 4, 1, 2]
    made = run(data.write(tmp_path / "a", items), tokens[order])
    cache = skl.open(made.destination)
    for sequence, n in zip(cache, order, strict=True):
        assert sequence.tokens.tolist() == tokens[n].tolist()
        assert positions_of(sequence) == [(ids.tolist(), counts.tolist()) for ids, counts in drawn[n]]
    header = cache.header
    assert (header.kind, header.rounds, header.sampler, header.vocab_size) == ("counts", 50, "multinomial", V)
    assert not header.biased
    source = header.capture["converted"]["source"]
    assert (source["teacher"], source["temperature"], source["approximate"]) == ("a/teacher", 1.0, False)
    assert "the values are 50 draws" in str(made)


def test_weights_where_counts_are_not_certain(tmp_path):
    """With all slots filled, ids may be missing: weights are the 7-bit ones, and the header says biased."""
    tokens, drawn, items = capture(unique=30)
    drawn[0][2] = np.array([5, 8]), np.array([20, 30])
    items[0] = data.item_of(items[0]["key"], drawn[0], np.ones(8, bool), V)
    made = run(data.write(tmp_path / "a", items), tokens)
    cache = skl.open(made.destination)
    assert (cache.header.kind, cache.header.sampler) == ("ratios", "topk")
    assert cache.header.capture["converted"]["source"]["approximate"]
    assert "counts are certain at 1 of 40 positions; elsewhere" in str(made)
    assert "at 39 positions less frequent ids may be missing" in str(made)
    for sequence, its in zip(cache, drawn, strict=True):
        for (ids, weights), (all_ids, counts) in zip(positions_of(sequence, "weights"), its, strict=True):
            kept = np.argsort(-counts, kind="stable")[:12]
            codes = data.seven_bits(counts[kept], 50) / 127
            shares = counts[kept] / 50 if len(counts) == 2 else codes
            wanted = dict(zip(all_ids[kept].tolist(), shares, strict=True))
            assert dict(zip(ids, weights, strict=True)) == pytest.approx(wanted, rel=0.05)
    with pytest.raises(ValueError, match="ratios cannot become counts: sampler topk drew nothing"):
        run(tmp_path / "a", tokens, kind="counts", destination=tmp_path / "out")


def test_rounds_that_seven_bits_do_not_tell(tmp_path):
    """Where rounding hides counts, though nothing is missing, weights are approximate and of no known bias."""
    tokens, drawn, items = capture(1)
    drawn[0][0] = np.arange(11), np.array([190, *[1] * 10])
    items = [data.item_of(items[0]["key"], drawn[0], np.ones(8, bool), V, rounds=200)]
    made = run(data.write(tmp_path / "a", items), tokens)
    header = skl.open(made.destination).header
    assert (header.kind, header.sampler, header.biased) == ("ratios", "unknown", False)


def test_padding_is_removed(tmp_path):
    """Padding at the ends goes, with the records that it has not; masked positions between have none."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, V, (3, 9))
    masks = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1, 1]], bool)
    drawn = [data.draw(rng, 8, V) for _ in range(3)]
    items = [data.item_of(data.key_of(t), d, m, V) for t, d, m in zip(tokens, drawn, masks, strict=True)]
    cache = skl.open(run(data.write(tmp_path / "a", items), tokens).destination)
    for sequence, n, begin, end in zip(cache, range(3), (0, 3, 0), (5, 7, 8), strict=True):
        assert sequence.tokens.tolist() == tokens[n, begin : end + 1].tolist()
        wanted = [(i.tolist(), c.tolist()) for i, c in drawn[n]][begin:end]
        if n == 2:
            wanted[2] = [], []
        assert positions_of(sequence) == wanted


def test_tokens_of_32_bits(tmp_path):
    """The key may be that of 32-bit ids."""
    tokens, _, items = capture()
    for item, row in zip(items, tokens, strict=True):
        item["key"] = data.key_of(row, "<i4")
    assert run(data.write(tmp_path / "a", items), tokens).sequences == 5


def test_temperature_is_said(tmp_path):
    """Draws at another temperature are about another distribution."""
    tokens, _, items = capture()
    made = run(data.write(tmp_path / "a", items, temperature=2.0), tokens)
    assert "they were drawn at temperature 2.0, and are about that distribution" in str(made)
    assert skl.open(made.destination).header.capture["converted"]["source"]["temperature"] == 2.0


def test_ids_that_wrapped(tmp_path):
    """A vocabulary of more than 17 bits can't be read back."""
    tokens, _, items = capture(2, vocab_size=151_936)
    with pytest.raises(
        ValueError, match=r"151,936 ids, which it stores in 17 bits: those from 131,072 on became other"
    ):
        run(data.write(tmp_path / "a", items), tokens)


def test_sequences_without_records_are_named(tmp_path):
    """Keys that are missing, twice, never written, or of another item: refused, or dropped when told."""
    tokens, _, items = capture(6)
    source = data.write(tmp_path / "a", items)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["items"][items[4]["key"]] = {"shard": 3, "index": 0}
    manifest["items"][items[5]["key"]] = {"shard": 0, "index": 0}
    (source / "manifest.json").write_text(json.dumps(manifest))
    other = np.arange(9)
    for row, message in (
        (other, f"row 1: no item has the key of its tokens, {data.key_of(other)}; give them as they were captured"),
        (tokens[0], "row 1: its tokens are those of sequence 0, which has their records"),
        (tokens[4], f"row 1: the item of key {items[4]['key']} was never written"),
        (tokens[5], f"row 1: the item of key {items[5]['key']} is that of {items[0]['key']}: several processes wrote"),
    ):
        with pytest.raises(skl.CorruptError, match=message):
            run(source, [tokens[0], row], destination=tmp_path / "out")
    made = run(source, [tokens[0], other, *tokens], on_bad_row="drop")
    cache = skl.open(made.destination)
    assert [one.tokens.tolist() for one in cache] == tokens[:4].tolist()
    assert cache.header.capture["converted"]["dropped"] == {"positions": 0, "sequences": 4}


def test_items_that_do_not_fit(tmp_path):
    """An item must have a position less than its tokens, and one that is no padding."""
    tokens, drawn, items = capture(3)
    items[0] = data.item_of(items[0]["key"], drawn[0][:-1], np.ones(7, bool), V)
    items[1] = data.item_of(items[1]["key"], drawn[1], np.zeros(8, bool), V)
    items[2] = data.item_of(items[2]["key"], drawn[2], np.arange(8) == 7, V)
    source = data.write(tmp_path / "a", items)
    for n, message in enumerate(
        ("9 tokens, its item has 7 positions", "all of its tokens are padding", "all of its tokens but one are padding")
    ):
        with pytest.raises(skl.CorruptError, match=f"row 0: {message}"):
            run(source, tokens[n : n + 1])


def edit(name, change):
    def harm(path):
        (path / name).write_bytes(change((path / name).read_bytes()))

    return harm


def save(name, change):
    def harm(path):
        items = torch.load(path / name, weights_only=True)
        torch.save(change(items), path / name)

    return harm


def with_stored(items, **changes):
    items[0]["rs"] |= changes
    return items


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda path: (path / "shard_000001.pt").unlink(),
            "shard_000001.pt: is missing, the manifest names it; copy all",
        ),
        (edit("shard_000001.pt", lambda b: b[:-300]), "weights_only=True. refuses it"),
        (edit("shard_000001.pt", lambda b: b"rubbish"), "weights_only=True. refuses it"),
        (save("shard_000001.pt", lambda items: items[:1]), "holds 1 items, the manifest says 2 items"),
        (save("shard_000001.pt", lambda items: {"a": 1}), "holds no list, the manifest says 2 items"),
        (save("shard_000001.pt", lambda items: [1, 2]), "item 0: not what SampledKD writes"),
        (
            save("shard_000001.pt", lambda items: with_stored(items, id_bits=18)),
            "item 0: not .*: 18 and 7 bits, not 17 and 7",
        ),
        (
            save("shard_000001.pt", lambda items: with_stored(items, U=11)),
            "item 0: not what SampledKD writes: cannot resh",
        ),
        (
            save("shard_000001.pt", lambda items: with_stored(items, N=40)),
            "has an item of 40 rounds, 900 ids .*; convert each run alone",
        ),
        (edit("manifest.json", lambda b: b[:-20]), r"manifest\.json: .*JSON"),
        (edit("manifest.json", lambda b: b"[]"), "no manifest of SampledKD"),
        (
            edit("manifest.json", lambda b: b'{"items":{"a":1,"a":2}}'),
            "no manifest of SampledKD: .*a stands in it twice",
        ),
        (edit("manifest.json", lambda b: b'{"items":{},"shards":[]}'), "holds no item"),
    ],
)
def test_caches_that_are_not_whole(tmp_path, harm, message):
    """Missing and damaged shards, manifests that say something else, items of several runs: one line each."""
    tokens, _, items = capture()
    source = data.write(tmp_path / "a", items)
    harm(source)
    with pytest.raises(skl.CorruptError, match=message) as error:
        run(source, tokens)
    assert "\n" not in str(error.value)


def test_what_the_user_must_say(tmp_path):
    """Tokens are nowhere in the files; the vocabulary is."""
    tokens, _, items = capture(2)
    source = data.write(tmp_path / "a", items)
    with pytest.raises(ValueError, match="holds no token ids; give --tokens"):
        convert(ConvertConfig(source=source, destination=tmp_path / "out"))
    with pytest.raises(ValueError, match="says vocab_size 900, --vocab-size says 901; leave --vocab-size out"):
        run(source, tokens, vocab_size=901)
