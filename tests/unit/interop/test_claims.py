"""What would make a worse student without a word: draws that are none, other tokens, halves of two conversions."""

import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest

import sklformat as skl
from sklformat.cache.writer import ShardWriter
from sklformat.format.header import Header
from sklformat.interop import convert
from sklformat.interop.kinds import find_kind
from sklformat.interop.sources import CacheSource
from sklformat.settings.convert import ConvertConfig

V = 10
TOP = np.log([[0.7, 0.2], [0.6, 0.1], [0.9, 0.05]]).tolist()
ROW = {"input_ids": [5, 3, 8, 2], "token_ids": [[3, 9], [8, 1], [2, 4]], "logprobs": TOP}
TOPK = {"vocab_size": V, "sampler": "topk"}


def run(source, destination, **settings):
    return convert(ConvertConfig(source=source, destination=destination, **{**TOPK, **settings}))


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_the_most_likely_ids_are_no_draws(tmp_path, sampler):
    """Weights of draws sum to 1; those that do not were not drawn, whatever the flag says."""
    source = jsonl(tmp_path / "a.jsonl", ROW)
    message = f"--sampler {sampler}, but weights of a position sum to 0.700 .. 0.950, those of draws to 1; give --sampl"
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", sampler=sampler, rounds=20)
    drawn = ROW | {"logprobs": np.log([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]]).tolist()}
    made = run(jsonl(tmp_path / "b.jsonl", drawn), tmp_path / "drawn", sampler=sampler, rounds=20)
    assert f"weights in 7-bit ratios, sampler {sampler}: unbiased" in made.says


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ({"prompt_token_ids": [5, 3], "prompt_logprobs": [None, {"3": {"logprob": -0.2, "rank": 1}}]}, {}),
        ({"logprobs": TOP, "target_token_ids": [[3, 9], [8, 1], [2, 4]]}, {"convention": "own", "tokens": True}),
        ({"input_ids": [5, 3, 8, 2], "token_ids": [[3, 9], [8, 1], [2, 4]], "top_values": TOP}, {}),
    ],
    ids=["vllm", "axolotl", "distillkit-raw"],
)
def test_kinds_of_the_most_likely_ids_take_no_other_sampler(tmp_path, line, settings):
    """Kinds that hold the most likely ids stay biased."""
    source = jsonl(tmp_path / "a.jsonl", line)
    if "tokens" in settings:
        np.save(tmp_path / "t.npy", [[5, 3, 8, 2]])
        settings = settings | {"tokens": tmp_path / "t.npy"}
    with pytest.raises(ValueError, match="which are no draws of multinomial; leave out --sampler, or give --sampler"):
        run(source, tmp_path / "out", sampler="multinomial", **settings)
    run(source, tmp_path / "biased", **settings)
    assert skl.open(tmp_path / "biased").header.biased


def test_ids_that_a_type_has_rounded_are_refused(tmp_path):
    """A float16 has no 3001: it is 3000 by now, another token."""
    content = {"input_ids": [[1, 7, 9]], "logprobs": np.log(np.full((1, 2, 2), 0.3))}
    np.savez(tmp_path / "a.npz", **content, token_ids=np.array([[[3001, 4], [5, 2]]], np.float16))
    message = "token_ids are floats of 11 significant bits, which do not hold every whole number from 2048 on: id 3000"
    with pytest.raises(skl.CorruptError, match=message):
        run(tmp_path / "a.npz", tmp_path / "out", vocab_size=6000)
    np.savez(tmp_path / "b.npz", **content, token_ids=np.array([[[2047, 4], [5, 2]]], np.float16))
    run(tmp_path / "b.npz", tmp_path / "small", vocab_size=6000)
    assert skl.open(tmp_path / "small")[0].targets.token_ids.tolist()[:2] == [4, 2047]
    np.savez(tmp_path / "c.npz", **content, token_ids=np.array([[[2049, 4], [5, 2]]], np.float16))
    with pytest.raises(skl.CorruptError, match="id 2048 may have been another; save ids as integers"):
        run(tmp_path / "c.npz", tmp_path / "even", vocab_size=6000)


@pytest.mark.parametrize("changed", ["tokens", "convention"])
def test_a_conversion_is_resumed_as_it_was_begun(tmp_path, monkeypatch, changed):
    """With other tokens, or rows about other tokens, the second half would not go with the first."""
    rows = {"token_ids": [[3, 9], [8, 1], [2, 4], [1, 0]], "logprobs": np.log([[0.6, 0.4]] * 4).tolist()}
    source = jsonl(tmp_path / "a.jsonl", *[rows] * 6)
    for name, first in (("a.npy", 5), ("b.npy", 1)):
        np.save(tmp_path / name, np.tile([first, 3, 8, 2], (6, 1)))
    begun = {"drop_last_row": True, "tokens": tmp_path / "a.npy", "sequences_per_shard": 2}
    others = {"tokens": {"tokens": tmp_path / "b.npy"}, "convention": {"drop_last_row": False, "convention": "own"}}
    append, calls = ShardWriter.append, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        append(self, *arguments)

    monkeypatch.setattr(ShardWriter, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", **begun)
    with pytest.raises(skl.SettingsError, match="was begun by a conversion with another source or other settings"):
        run(source, tmp_path / "out", **(begun | others[changed]))
    run(source, tmp_path / "out", **begun)
    run(source, tmp_path / "whole", **begun)
    for shard in (tmp_path / "whole").iterdir():
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_a_destination_in_the_source_is_refused(tmp_path):
    """It would change the source while it is read, and could not be resumed."""
    (tmp_path / "parts").mkdir()
    jsonl(tmp_path / "parts" / "a.jsonl", ROW)
    with pytest.raises(ValueError, match="parts/out: lies in the source; choose a destination outside of"):
        run(tmp_path / "parts", tmp_path / "parts" / "out")


def test_weights_that_were_divided_are_not_called_unbiased(tmp_path):
    """The sentence follows the rule of the header."""
    header = Header(vocab_size=V, seq_len=2, kind="ratios", rounds=4, sampler="multinomial", proposal_temperature=0.8)
    targets = skl.SparseTargets(token_ids=[1, 2, 3], weights=[0.5, 0.5, 1.0], offsets=[0, 2, 3])
    for name, capture in (("divided", {}), ("kept", {"sampler": {"unbiased": True}})):
        with ShardWriter(tmp_path / f"{name}.skl", header=dataclasses.replace(header, capture=capture)) as writer:
            writer.append([1, 2, 3], targets)
    assert (
        "importance weights, divided by their sum or cut, which bi"
        in CacheSource(tmp_path / "divided.skl", None).says[0]
    )
    assert CacheSource(tmp_path / "kept.skl", None).says[0].endswith("sampler multinomial: unbiased")


@pytest.mark.parametrize(
    "line",
    [
        ROW | {"meta_info": {"source": "wiki"}},
        ROW | {"prompt_logprobs": None},
        ROW | {"__metadata__": True},
        [{"2024": "a year"}],
    ],
)
def test_ones_own_lines_are_nobody_elses(tmp_path, line):
    """A kind is guessed from what nobody else writes, not from a name that anybody may give."""
    assert find_kind(jsonl(tmp_path / "a.jsonl", line)) == "jsonl"


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama-cpp-kld", "megatron", "sampledkd", "whittle", "automodel"])
def test_a_directory_for_a_file(tmp_path, kind):
    """What is a file for one kind and a directory for another is told by one line that says what to give."""
    source, is_file = tmp_path / "source", kind in ("vllm", "sglang", "llama-cpp-kld")
    source.mkdir() if is_file else jsonl(source, ROW)
    np.save(tmp_path / "t.npy", [[1, 2, 3]])
    error, message = (
        (IsADirectoryError, "source: is a directory, .* is a file; give the file")
        if is_file
        else (NotADirectoryError, "source: is a file, .* is a directory; give the directory")
    )
    with pytest.raises(error, match=message):
        run(source, tmp_path / "out", from_=kind)


@pytest.mark.parametrize("kind", ["sampledkd", "automodel"])
def test_half_a_directory_has_no_manifest(tmp_path, kind):
    """The file that is missing is named."""
    (tmp_path / "source").mkdir()
    np.save(tmp_path / "t.npy", [[1, 2, 3]])
    settings = {"sampler": None} | ({"tokens": tmp_path / "t.npy"} if kind == "sampledkd" else {})
    with pytest.raises(
        skl.CorruptError,
        match=r"source: has no manifest\.json(, which says where items are; copy all of it|; copy all of the cache)",
    ):
        run(tmp_path / "source", tmp_path / "out", from_=kind, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"convention": "own", "drop_last_row": True}, "leaves out the row of the first token; leave out --drop-last"),
        ({"rounds": 50}, r"a\.jsonl: --sampler topk draws nothing; leave out --rounds"),
    ],
)
def test_flags_that_contradict(tmp_path, settings, message):
    """Of two flags that cannot both be meant none is followed in silence."""
    row = {"input_ids": [5, 3, 8], "token_ids": [[3, 9], [8, 1], [2, 4]], "logprobs": TOP}
    with pytest.raises(ValueError, match=message):
        run(jsonl(tmp_path / "a.jsonl", row), tmp_path / "out", **settings)


def follow(length, seed):
    """Tokens [L] and, for each, the ids [L, 3] that a teacher who knows what comes next has for the token after."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 200, length + 1)
    ids = np.stack([tokens[1:], (tokens[1:] + 1) % 200, (tokens[1:] + 2) % 200], 1)
    return tokens[:-1].tolist(), ids.tolist()


@pytest.mark.parametrize(
    ("settings", "token"),
    [({"drop_last_row": True}, None), ({"convention": "own"}, "token t + 2")],
)
def test_rows_that_are_one_place_off_are_noticed(tmp_path, settings, token):
    """A teacher's likely ids hold the right token far more often than its neighbours."""
    tokens, ids = follow(80, 0)
    row = {"input_ids": tokens, "token_ids": ids, "logprobs": np.log([[0.6, 0.2, 0.1]] * 80).tolist()}
    made = run(jsonl(tmp_path / "a.jsonl", row), tmp_path / "out", vocab_size=200, **settings)
    warned = [sentence for sentence in made.says if "the rows seem to be one place off" in sentence]
    assert [sentence.split(" of the positions, ")[1].split(" at ")[0] for sentence in warned] == [token] * bool(token)


def test_rows_of_axolotl_that_are_one_less_than_tokens(tmp_path):
    """Rows about tokens 1 to L - 1 said to be about the next are one too late, as in Axolotl itself."""
    tokens, ids = follow(80, 1)
    row = {"target_token_ids": ids[:-1], "logprobs": np.log([[0.6, 0.2, 0.1]] * 79).tolist()}
    np.save(tmp_path / "t.npy", [tokens])
    asked = {"vocab_size": 200, "tokens": tmp_path / "t.npy"}
    source = jsonl(tmp_path / "a.jsonl", row)
    made = run(source, tmp_path / "late", convention="next", **asked)
    assert any("token t at 100%; the rows seem to be one place off" in sentence for sentence in made.says)
    made = run(source, tmp_path / "right", convention="own", **asked)
    assert not any("one place off" in sentence for sentence in made.says)


@pytest.mark.parametrize("version", [1, 2])
def test_a_header_that_is_larger_than_its_array(tmp_path, version):
    """An array of 256 TiB that a few bytes claim to be is refused before memory is taken for it."""
    file = io.BytesIO()
    head = {"descr": "<i8", "fortran_order": False, "shape": (2**45,)}
    (np.lib.format.write_array_header_1_0 if version == 1 else np.lib.format.write_array_header_2_0)(file, head)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("input_ids", "token_ids", "logprobs"):
            archive.writestr(f"{name}.npy", file.getvalue() + bytes(8))
    with pytest.raises(skl.CorruptError, match=r"\.npy has \d+ bytes, its header says shape \[35184372088832\]"):
        run(tmp_path / "a.npz", tmp_path / "out")
