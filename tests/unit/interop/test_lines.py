"""Lines of JSON of NeMo-Aligner, slime and EasyDistill: each row at the position that it is about."""

import json

import numpy as np
import pytest
from converted import assert_probs, run

import sklformat as skl

V, K = 30, 4
KINDS = ("nemo-aligner", "slime", "easydistill")


def teach(seed, length):
    """Tokens [length], and of each position the logits [length, V], its top ids [length, K] and probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (length, V))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ids = np.argsort(-probs, axis=1)[:, :K]
    return rng.integers(0, V, length), logits, ids, np.take_along_axis(probs, ids, 1)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def nemo_line(taught, mask, index=0):
    """Of L tokens L - 1 tokens and the labels that follow them; logits are less their largest, as it writes them."""
    tokens, logits, ids, _ = taught
    logits = logits[:-1] - logits[:-1].max(1, keepdims=True)
    return {
        "tokens": tokens[:-1].tolist(),
        "labels": tokens[1:].tolist(),
        "loss_mask": [float(one) for one in mask],
        "topk_logits": np.take_along_axis(logits, ids[:-1], 1).tolist(),
        "topk_token_ids": ids[:-1].tolist(),
        "log_sum_exp_logits": np.log(np.exp(logits).sum(1)).tolist(),
        "index": index,
    }


def slime_lines(taughts, responses, **metadata):
    """Metadata, then of each sequence rows about the last ``responses`` tokens, from the positions before them."""
    lines = [{"__metadata__": True, "distillation_type": "top_k", "top_k": K} | metadata]
    for (tokens, _, ids, probs), number in zip(taughts, responses, strict=True):
        rows = slice(tokens.size - number - 1, tokens.size - 1)
        lines.append(
            {
                "prompt": "text",
                "tokens": tokens.tolist(),
                "response": "text",
                "response_length": number,
                "teacher_log_probs": np.linspace(-1, 0, number).tolist(),
                "teacher_top_k_ids": ids[rows].tolist(),
                "teacher_top_k_logprobs": np.log(probs[rows]).tolist(),
            }
        )
    return lines


def easydistill_line(taught, number):
    """{id: probability} of the last ``number`` tokens; the token itself always among them, as vLLM gives it."""
    tokens, logits, ids, _ = taught
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = []
    for t in range(tokens.size - number - 1, tokens.size - 1):
        names = dict.fromkeys([int(tokens[t + 1]), *ids[t].tolist()])
        rows.append({str(name): probs[t, name] for name in names})
    return rows


def write_tokens(path, taughts):
    return write(path, [{"input_ids": tokens.tolist()} for tokens, *_ in taughts])


def test_nemo_aligner(tmp_path):
    """Labels make the last token, a mask empties positions, tokens behind the last counted one are padding."""
    taughts = [teach(seed, 8) for seed in range(3)]
    masks = [[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]
    lines = [nemo_line(*pair) for pair in zip(taughts, masks, strict=True)]
    lines[1]["labels"][4:] = [-100] * 3
    lines[1]["tokens"][5:] = [0] * 2
    run(write(tmp_path / "a_0.jsonl", lines), tmp_path / "out", vocab_size=V)
    cache = skl.open(tmp_path / "out")
    for i, ((tokens, _, ids, probs), mask) in enumerate(zip(taughts, masks, strict=True)):
        end = int(np.flatnonzero(mask)[-1]) + 1
        assert cache[i].tokens.tolist() == tokens[: end + 1].tolist()
        assert_probs(
            tmp_path / "out",
            i,
            [ids[t] if mask[t] else [] for t in range(end)],
            [probs[t] if mask[t] else [] for t in range(end)],
        )
    converted = cache.header.capture["converted"]
    assert converted["from"] == "nemo-aligner"
    assert converted["values"] == "log-probabilities"


def test_nemo_aligner_rounded(tmp_path):
    """A normaliser in bfloat16 may make a row's mass 1.0012; the mass that is left is then 0."""
    line = nemo_line(teach(0, 3), [1, 1])
    line["topk_logits"] = [[0.0, -1.0, -2.0, -3.0]] * 2
    line["log_sum_exp_logits"] = [float(np.log(np.exp([0.0, -1, -2, -3]).sum()) - 0.0012)] * 2
    run(write(tmp_path / "a.jsonl", [line]), tmp_path / "out", vocab_size=V)
    assert skl.open(tmp_path / "out")[0].targets.weights.max() < 1


def test_slime(tmp_path):
    """Rows are about the response's own tokens; equal beginnings of sequences stay apart."""
    taughts = [teach(seed, 25) for seed in range(3)]
    for tokens, *_ in taughts:
        tokens[:20] = 7
    responses = [5, 3, 24]
    run(write(tmp_path / "a.jsonl", slime_lines(taughts, responses)), tmp_path / "out", vocab_size=V)
    for i, ((tokens, _, ids, probs), number) in enumerate(zip(taughts, responses, strict=True)):
        empty = 24 - number
        assert skl.open(tmp_path / "out")[i].tokens.tolist() == tokens.tolist()
        expected = ([[]] * empty + list(values[empty:24]) for values in (ids, probs))
        assert_probs(tmp_path / "out", i, *expected)
        label_logprob = skl.open(tmp_path / "out")[i].columns["label_logprob"]
        np.testing.assert_allclose(label_logprob, [0] * empty + list(np.linspace(-1, 0, number)), rtol=1e-3)
    header = skl.open(tmp_path / "out").header
    assert header.biased
    assert header.capture["converted"]["source"] == {"k": K, "tail": "known"}


def test_slime_without_log_probs_of_tokens(tmp_path):
    """The response's own log-probs may be left out."""
    lines = slime_lines([teach(0, 9)], [4])
    del lines[1]["teacher_log_probs"]
    run(write(tmp_path / "a.jsonl", lines), tmp_path / "out", vocab_size=V)
    assert skl.open(tmp_path / "out").header.columns == ()


def test_easydistill(tmp_path):
    """Rows are about the last tokens that are given; each has its token among its ids."""
    taughts, responses = [teach(seed, 9) for seed in range(3)], [4, 8, 1]
    lines = [easydistill_line(*pair) for pair in zip(taughts, responses, strict=True)]
    source, tokens = write(tmp_path / "a.jsonl", lines), write_tokens(tmp_path / "t.jsonl", taughts)
    run(source, tmp_path / "out", vocab_size=V, tokens=tokens)
    for i, line in enumerate(lines):
        empty = 8 - len(line)
        ids = [[]] * empty + [[int(name) for name in row] for row in line]
        assert_probs(tmp_path / "out", i, ids, [[]] * empty + [list(row.values()) for row in line])


def test_easydistill_of_another_answer(tmp_path):
    """Tokens that were not generated with the rows, or end before the rows do, are refused."""
    taught = teach(0, 9)
    line = easydistill_line(taught, 5)
    taught[0][6] = next(token for token in range(V) if str(token) not in line[2])
    asked = {"vocab_size": V, "from_": "easydistill"}
    source = write(tmp_path / "a.jsonl", [line])
    with pytest.raises(
        skl.CorruptError, match=r"row 0: a\.jsonl line 1: row 2 does not have \d+, which --tokens gives"
    ):
        run(source, tmp_path / "out", tokens=write_tokens(tmp_path / "t.jsonl", [taught]), **asked)
    broken = write(tmp_path / "b.jsonl", ["", easydistill_line(teach(1, 9), 5)])
    both = write_tokens(tmp_path / "w.jsonl", [taught, teach(1, 9)])
    run(broken, tmp_path / "kept", tokens=both, on_bad_row="drop", **asked)
    assert skl.open(tmp_path / "kept")[0].tokens.tolist() == teach(1, 9)[0].tolist()
    short = (taught[0][:5], *taught[1:])
    with pytest.raises(skl.CorruptError, match="has 5 rows, --tokens gives prompt and response 5 tokens in total"):
        run(source, tmp_path / "out", tokens=write_tokens(tmp_path / "u.jsonl", [short]), **asked)
    with pytest.raises(ValueError, match="says nothing of the text; give the tokens of each prompt and the response"):
        run(source, tmp_path / "out", **asked)
    with pytest.raises(ValueError, match="--tokens holds more sequences"):
        tokens = write_tokens(tmp_path / "v.jsonl", [teach(0, 9), teach(0, 9)])
        run(source, tmp_path / "out", tokens=tokens, on_bad_row="drop", **asked)


@pytest.mark.parametrize("kind", KINDS)
def test_several_files_from_any_sequence(tmp_path, kind):
    """Chunks come in the order of their numbers, and a stopped conversion is resumed at any sequence."""
    from sklformat.interop.kinds import find_kind, open_reading
    from sklformat.interop.readings import Asked
    from sklformat.interop.tokens import TokenFile

    taughts, order = [teach(seed, 6) for seed in range(6)], (0, 2, 10)
    (tmp_path / "parts").mkdir()
    for place, number in enumerate(order):
        pair = taughts[2 * place : 2 * place + 2]
        lines = {
            "nemo-aligner": lambda pair: [nemo_line(one, [1] * 5) for one in pair],
            "slime": lambda pair: slime_lines(pair, [3, 3]),
            "easydistill": lambda pair: [easydistill_line(one, 3) for one in pair],
        }[kind](pair)
        write(tmp_path / "parts" / f"data_{number}.jsonl", lines)
    assert find_kind(tmp_path / "parts") == kind
    tokens = TokenFile(write_tokens(tmp_path / "t.jsonl", taughts)) if kind == "easydistill" else None
    reading, _ = open_reading(tmp_path / "parts", kind, Asked(vocab_size=V, tokens=tokens))
    for start in range(7):
        rest = [row.input_ids.tolist() for row in reading.rows(start)]
        assert rest == [tokens.tolist() for tokens, *_ in taughts[start:]]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nemo-aligner", {"labels": [1, 2]}, "labels has 2 values for 5 tokens"),
        ("nemo-aligner", {"labels": [40] * 5}, "position 0: labels has 40, but the token that comes next is"),
        ("nemo-aligner", {"tokens": [0.5] * 5}, "tokens has float64 in place of ids"),
        ("nemo-aligner", {"loss_mask": [0] * 5}, "loss_mask leaves no position"),
        ("nemo-aligner", {"log_sum_exp_logits": None}, "has no list log_sum_exp_logits"),
        ("nemo-aligner", {"log_sum_exp_logits": [float("nan")] * 5}, "position 0: logprob nan"),
        ("nemo-aligner", {"topk_token_ids": [[1] * K] * 5}, "token_ids has 1 twice"),
        ("nemo-aligner", {"topk_token_ids": [[1]] * 5}, "position 0: 1 token_ids, but 4 topk_logits"),
        ("nemo-aligner", {"topk_token_ids": [[1]], "topk_logits": [[0.0]]}, "topk_token_ids has 1 rows for 5 tokens"),
        ("slime", {"response_length": 2}, "has 3 rows for a response_length of 2"),
        ("slime", {"teacher_log_probs": [-1.0]}, "teacher_log_probs has 1 values for 3 rows"),
        (
            "slime",
            {"teacher_log_probs": [0.5] * 3},
            "column label_logprob holds 0.5 at position 2; a log-probability is",
        ),
        ("slime", {"tokens": [1, 2, 3]}, "has 3 tokens for a response of 3 behind a prompt"),
        ("slime", {"teacher_top_k_ids": [[1], [2], [3]]}, "position 0: 1 token_ids, but 4 teacher_top_k_logprobs"),
        (
            "slime",
            {"teacher_top_k_ids": [[1, 2]] * 3, "teacher_top_k_logprobs": [[-1.0, -2]] * 3},
            "row 0 of the response has 2 ids, not 4, the top_k",
        ),
        ("slime", {"teacher_top_k_ids": [[-1, 2, 3, 4]] * 3}, "position 2: token id -1 is not in"),
        ("easydistill", [{"a": 0.5}], "has ids or probabilities that are no numbers"),
        ("easydistill", [0.5], "is no list of objects, one for each token of a response"),
        ("easydistill", {}, "is no list of objects"),
    ],
)
def test_lines_that_cannot_be(tmp_path, kind, change, message):
    """A line whose parts contradict each other is refused with its file and number, or dropped when told."""
    taughts = [teach(seed, 6) for seed in range(2)]
    lines = {
        "nemo-aligner": [nemo_line(one, [1] * 5) for one in taughts],
        "slime": slime_lines(taughts, [3, 3]),
        "easydistill": [easydistill_line(one, 3) for one in taughts],
    }[kind]
    lines[-2] = lines[-2] | change if kind != "easydistill" else change
    asked = {"vocab_size": V, "from_": kind}
    if kind == "easydistill":
        asked["tokens"] = write_tokens(tmp_path / "t.jsonl", taughts)
    source = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(skl.CorruptError, match=f"row 0: .*{message}"):
        run(source, tmp_path / "none", **asked)
    run(source, tmp_path / "out", on_bad_row="drop", **asked)
    cache = skl.open(tmp_path / "out")
    assert cache[-1].tokens.tolist() == taughts[1][0].tolist()


def test_a_line_cut_short(tmp_path):
    """The last line of a run that was killed is refused, or dropped when told."""
    source = write(tmp_path / "a.jsonl", [nemo_line(teach(seed, 6), [1] * 5) for seed in range(2)])
    source.write_bytes(source.read_bytes()[:-40])
    with pytest.raises(skl.CorruptError, match=r"row 1: a\.jsonl line 2: not JSON"):
        run(source, tmp_path / "none", vocab_size=V)
    run(source, tmp_path / "out", vocab_size=V, on_bad_row="drop")
    assert len(skl.open(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (
            {"distillation_type": "sampled_kl"},
            ValueError,
            "is of distillation_type 'sampled_kl', which holds no distrib",
        ),
        ({"__metadata__": False}, skl.CorruptError, "does not begin with a line of metadata, which says how rows"),
        ({"top_k": None}, skl.CorruptError, "line 1: top_k is None, must be a number of ids"),
    ],
)
def test_slime_metadata(tmp_path, metadata, error, message):
    """Samples of a KL are no distributions; and what rows are is said by the first line."""
    source = write(tmp_path / "a.jsonl", slime_lines([teach(0, 6)], [3], **metadata))
    with pytest.raises(error, match=message):
        run(source, tmp_path / "out", vocab_size=V, from_="slime")


def test_slime_of_different_k(tmp_path):
    """Files of one directory have one k."""
    (tmp_path / "parts").mkdir()
    for number in range(2):
        write(tmp_path / "parts" / f"{number}.jsonl", slime_lines([teach(0, 6)], [3], top_k=K + number))
    with pytest.raises(skl.CorruptError, match="its files have different top_k: 4, 5"):
        run(tmp_path / "parts", tmp_path / "out", vocab_size=V)
    with pytest.raises(ValueError, match="--tokens: of no use for slime; leave it out"):
        run(tmp_path / "parts" / "0.jsonl", tmp_path / "out", vocab_size=V, tokens=tmp_path / "t.npy")
