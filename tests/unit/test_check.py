"""sklformat check: a whole cache against whatever holds the tokens, before training."""

import json

import numpy as np
import pytest
from loader_data import POSITIONS, ROUNDS, SEQUENCES, VOCAB, make_targets, write_cache
from mmap_ninja import RaggedMmap
from mmap_ninja import numpy as ninja_arrays
from system import complaint

import sklformat as skl
from sklformat import cli
from sklformat.check import check_tokens
from sklformat.distill.text import corpus, packing


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("check") / "cache"
    return directory, np.stack([tokens for tokens, _ in write_cache(directory)])


def run(capfd, *words):
    status = cli.main(["check", *map(str, words)])
    out, err = capfd.readouterr()
    return status, out, complaint(err)


def write(kind, path, tokens):
    """Tokens on disk, as one of the things that check reads."""
    if kind == "npy":
        path = path.with_suffix(".npy")
        np.save(path, tokens.astype(np.uint16))
    elif kind == "ragged":
        RaggedMmap.from_lists(path, [row.astype(np.int32) for row in tokens])
    else:
        ninja_arrays.from_ndarray(path, tokens.astype(np.int32))
    return path


@pytest.mark.parametrize("kind", ["npy", "ragged", "ninja"])
def test_right_and_wrong_tokens(capfd, cache, tmp_path, kind):
    """The right tokens are 0 and one line; wrong ones are 1 and one line with sequence, checksums and cause."""
    directory, tokens = cache
    right = write(kind, tmp_path / "right", tokens)
    status, out, err = run(capfd, directory, "--tokens", right)
    assert (0, "") == (status, err)
    assert f"{directory}: all 23 sequences are those of {right}, which has 23\n" == out
    more = write(kind, tmp_path / "more", np.concatenate([tokens, tokens[:2]]))
    status, out, _ = run(capfd, directory, "--tokens", more, "--json")
    assert (0, 23, 25) == (status, json.loads(out)["sequences"], json.loads(out)["available"])
    swapped = tokens.copy()
    swapped[[4, 20]] = tokens[[20, 4]]
    status, out, err = run(capfd, directory, "--tokens", write(kind, tmp_path / "swapped", swapped))
    assert (1, "") == (status, out)
    assert "sequence 4: alignment checksum 0x" in err
    assert "(sequences 4 and 20 are swapped)" in err
    status, out, err = run(capfd, directory, "--tokens", write(kind, tmp_path / "few", tokens[:-2]))
    assert (1, "") == (status, out)
    assert (
        "21 sequences of tokens given, the cache reaches to sequence 22; the 21 are right: pack all of the text" in err
    )


def test_one_shard(capfd, cache, tmp_path):
    """A shard by itself is held against the tokens of its global sequence numbers."""
    directory, tokens = cache
    path = write("npy", tmp_path / "tokens", tokens)
    status, out, _ = run(capfd, directory / "shard-00001.skl", "--tokens", path)
    assert (0, True) == (status, "all 8 sequences" in out)


def test_the_store_of_a_capture(capfd, tmp_path):
    """A token store is packed again with seed, separator and length of the cache; another seed of it is found out."""
    rng = np.random.default_rng(4)
    documents = [corpus.Document(f"d{i}", " ".join(map(str, rng.integers(0, VOCAB, 30)))) for i in range(20)]
    corpus.write_token_store(
        tmp_path / "store",
        documents,
        lambda texts: [[int(word) for word in text.split()] for text in texts],
        vocab_size=VOCAB,
        tokenizer_fingerprint="0" * 32,
    )
    settings = {"seq_len": POSITIONS, "separator_id": 3, "seed": 5, "first": 2}
    packed = packing.PackedSequences(tmp_path / "store", **settings)
    capture = {"packing": {"separator_id": 3, "first_sequence": 2}}
    for name, header in {
        "right": {"packing_seed": 5, "capture": capture},
        "seed": {"packing_seed": 6, "capture": capture},
        "silent": {"packing_seed": 5},
    }.items():
        made = skl.Header(vocab_size=VOCAB, seq_len=POSITIONS, kind="counts", rounds=ROUNDS, **header)
        with skl.ShardWriter(tmp_path / f"{name}.skl", header=made) as writer:
            for i in range(9):
                writer.append(packed[i], make_targets(rng, POSITIONS))
    status, out, _ = run(capfd, tmp_path / "right.skl", "--tokens", tmp_path / "store")
    assert (0, True) == (status, "all 9 sequences" in out)
    status, _, err = run(capfd, tmp_path / "seed.skl", "--tokens", tmp_path / "store")
    assert (1, True) == (status, "another packing seed, tokenizer or corpus" in err)
    status, _, err = run(capfd, tmp_path / "silent.skl", "--tokens", tmp_path / "store")
    assert (1, True) == (status, "does not say how its tokens were packed" in err)


def test_what_holds_no_tokens(capfd, cache, tmp_path):
    """Nothing there, and a directory or a file that is no such thing, are one line each."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("1 2 3")
    nothing = "neither a .npy array, nor an mmap-ninja store, nor a token store; sklformat.check.check_tokens takes"
    for name, message in (("none", "no such file or directory"), ("empty", nothing), ("text", nothing)):
        status, out, err = run(capfd, cache[0], "--tokens", tmp_path / name)
        assert (1, "") == (status, out)
        assert f"{tmp_path / name}: {message}" in err


def test_from_python(cache):
    """check_tokens takes any source, and tells how far it is."""
    directory, tokens = cache
    told = []
    with skl.open(directory) as opened:
        check_tokens(opened, lambda i: tokens[i], lambda *words: told.append(words))
        assert [("check", SEQUENCES, SEQUENCES)] == told
        with pytest.raises(ValueError, match="sequence 0: tokens must be a 1-D array of integers"):
            check_tokens(opened, lambda i: tokens[i] + 0.5)
