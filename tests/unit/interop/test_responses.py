"""Answers of vLLM and SGLang in all their layouts against one dense truth."""

import base64
import json

import numpy as np
import pytest

import sklformat as skl
from sklformat.interop import convert
from sklformat.settings.convert import ConvertConfig

V, P, R, K = 40, 6, 3, 4


class Truth:
    """Ids of a prompt [P] and an answer [R], and the teacher's log-probs [P + R, V] of each token."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.tokens = rng.integers(0, V, P + R)
        self.tokens[2] = V - 1
        logits = rng.normal(size=(P + R, V)) * 2
        self.logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def top(self, t):
        return np.argsort(-self.logs[t], kind="stable")[:K]

    def ranked(self, t):
        """As vLLM has it: the token itself, then the k most likely; pairs of id and rank."""
        order = np.argsort(-self.logs[t], kind="stable")
        label = int(self.tokens[t])
        rank = int(np.flatnonzero(order == label)[0]) + 1
        return [(label, rank), *((int(order[r]), r + 1) for r in range(K) if order[r] != label)]

    def by_id(self, t):
        return {
            str(i): {"logprob": float(self.logs[t, i]), "rank": rank, "decoded_token": "x"}
            for i, rank in self.ranked(t)
        }

    def triples(self, t):
        return [[float(self.logs[t, i]), int(i), None] for i in self.top(t)]


def vllm_request(truth):
    """The class RequestOutput, dumped."""
    return {
        "prompt_token_ids": truth.tokens[:P].tolist(),
        "prompt_logprobs": [None, *(truth.by_id(t) for t in range(1, P))],
        "outputs": [
            {"token_ids": truth.tokens[P:].tolist(), "logprobs": [truth.by_id(t) for t in range(P, P + R)]},
        ],
    }


def vllm_flat(truth):
    """The same with flat_logprobs, where a label that is among the most likely comes twice."""

    def flat(first, last, *, null):
        starts, ends, ids, logs, ranks = [0] * null, [0] * null, [], [], []
        for t in range(first, last):
            starts.append(len(ids))
            pairs = [truth.ranked(t)[0], *((int(i), r + 1) for r, i in enumerate(truth.top(t)))]
            ids += [i for i, _ in pairs]
            ranks += [r for _, r in pairs]
            logs += [float(truth.logs[t, i]) for i, _ in pairs]
            ends.append(len(ids))
        return {"start_indices": starts, "end_indices": ends, "token_ids": ids, "logprobs": logs, "ranks": ranks}

    output = {"token_ids": truth.tokens[P:].tolist(), "logprobs": flat(P, P + R, null=0)}
    prompt = {"prompt_token_ids": truth.tokens[:P].tolist(), "prompt_logprobs": flat(1, P, null=1)}
    return prompt | {"outputs": [output]}


def vllm_completion(truth):
    """The completions endpoint with return_tokens_as_token_ids and return_token_ids, in a batch's result file."""
    top = [{f"token_id:{i}": float(truth.logs[t, i]) for i, _ in truth.ranked(t)} for t in range(P, P + R)]
    choice = {
        "prompt_logprobs": vllm_request(truth)["prompt_logprobs"],
        "prompt_token_ids": truth.tokens[:P].tolist(),
        "token_ids": truth.tokens[P:].tolist(),
        "logprobs": {"tokens": [], "token_logprobs": [], "top_logprobs": top},
    }
    return {"custom_id": "7", "response": {"status_code": 200, "body": {"model": "teacher", "choices": [choice]}}}


def vllm_chat(truth):
    """The chat endpoint, which says the token itself and of the k most likely as many as there is room for."""
    content = [
        {
            "token": "x",
            "top_logprobs": [
                {"token": f"token_id:{i}", "logprob": float(truth.logs[t, i])} for i, _ in truth.ranked(t)[:K]
            ],
        }
        for t in range(P, P + R)
    ]
    return {
        "model": "teacher",
        "prompt_logprobs": vllm_request(truth)["prompt_logprobs"],
        "prompt_token_ids": truth.tokens[:P].tolist(),
        "choices": [{"token_ids": truth.tokens[P:].tolist(), "logprobs": {"content": content}}],
    }


def sglang_nested(truth, start=0):
    """The native endpoint; the last id of the vocabulary is reported as 0, the first row is null."""
    shown = np.where(truth.tokens == V - 1, 0, truth.tokens)
    meta = {
        "weight_version": "3",
        "input_token_logprobs": [
            [None if t == start else float(truth.logs[t, truth.tokens[t]]), int(shown[t]), None]
            for t in range(start, P)
        ],
        "input_top_logprobs": [None, *(truth.triples(t) for t in range(start + 1, P))],
        "output_top_logprobs": [truth.triples(t) for t in range(P, P + R)],
    }
    return {"input_ids": truth.tokens[:P].tolist(), "output_ids": truth.tokens[P:].tolist(), "meta_info": meta}


def sglang_flat(truth, *, counted=False, packed=False):
    """Flat arrays of the prompt, with the rows without values counted in the shape or not, in base64 or not."""
    answer = sglang_nested(truth)
    meta = answer["meta_info"]
    del meta["input_top_logprobs"]
    ids = np.concatenate([truth.top(t) for t in range(1, P)]).astype("<i4")
    logs = np.concatenate([truth.logs[t, truth.top(t)] for t in range(1, P)]).astype("<f4")
    meta["input_top_logprobs_shape"] = [P if counted else P - 1, K]
    meta["input_top_logprobs_null_prefix"] = 1
    for name, array in (("idx", ids), ("val", logs)):
        key = f"input_top_logprobs_{name}_flat"
        if packed:
            meta[f"{key}_b64"] = base64.b64encode(array.tobytes()).decode()
            meta[f"{key}_b64_dtype"] = array.dtype.name
        else:
            meta[key] = array.tolist()
    return answer


LAYOUTS = {
    "request": vllm_request,
    "flat": vllm_flat,
    "completion": vllm_completion,
    "chat": vllm_chat,
    "nested": sglang_nested,
    "flat lists": sglang_flat,
    "flat counted": lambda truth: sglang_flat(truth, counted=True),
    "base64": lambda truth: sglang_flat(truth, packed=True),
}


def run(tmp_path, *lines, **settings):
    source = tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = convert(ConvertConfig(source=source, destination=tmp_path / "cache", vocab_size=V, **settings))
    return skl.open(tmp_path / "cache"), made


def assert_holds(sequence, truth, first=1, unsure=False):
    """
    Rows about tokens ``first`` on are the k most likely, with their probabilities to the code's step; those of the
    answer one fewer where it is not sure that the least likely one is among them.
    """
    assert sequence.tokens.tolist() == truth.tokens.tolist()
    targets = sequence.targets
    for t in range(1, P + R):
        begin, end = targets.offsets[t - 1], targets.offsets[t]
        found = dict(zip(targets.token_ids[begin:end].tolist(), targets.weights[begin:end].tolist(), strict=True))
        expected = truth.top(t)[: K - (unsure and t >= P)] if t >= first else []
        expected = [i for i in expected if np.exp(truth.logs[t, i]) > 2e-3]
        assert set(found) >= set(map(int, expected))
        assert set(found) <= set(map(int, truth.top(t))) if t >= first else not found
        for i in expected:
            assert found[int(i)] == pytest.approx(np.exp(truth.logs[t, i]), rel=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(tmp_path, layout):
    """Each is recognised by its content, and its rows, moved to the token before, are the k most likely and no more."""
    truths = [Truth(seed) for seed in range(3)]
    cache, made = run(tmp_path, *(LAYOUTS[layout](truth) for truth in truths))
    for i, truth in enumerate(truths):
        assert_holds(cache[i], truth, unsure=layout in ("completion", "chat"))
    told = cache.header.capture["converted"]
    assert told["from"] == ("vllm" if layout in ("request", "flat", "completion", "chat") else "sglang")
    assert told["values"] == "log-probabilities"
    assert cache.header.biased
    assert "row t describes token t, given those before it; rows are moved to the token before" in made.says


def test_a_prompt_that_is_scored_in_part(tmp_path):
    """With a start offset the last rows are about the last tokens; positions before it have no records."""
    truth = Truth(0)
    cache, _ = run(tmp_path, sglang_nested(truth, start=3))
    assert_holds(cache[0], truth, first=4)


def test_tokens_given(tmp_path):
    """An answer without the ids of its prompt takes them from --tokens, of prompts or of whole sequences."""
    truth = Truth(1)
    answer = vllm_request(truth)
    del answer["prompt_token_ids"]
    for number, size in enumerate((P, P + R)):
        (tmp_path / str(number)).mkdir()
        np.save(tmp_path / "tokens.npy", truth.tokens[None, :size])
        cache, _ = run(tmp_path / str(number), answer, tokens=tmp_path / "tokens.npy")
        assert_holds(cache[0], truth)
    other = truth.tokens.copy()
    other[1] = (other[1] + 1) % V
    np.save(tmp_path / "tokens.npy", other[None])
    with pytest.raises(skl.CorruptError, match=rf"row 0: its token 1 is {truth.tokens[1]}, the prompt's is {other[1]}"):
        run(tmp_path, answer, tokens=tmp_path / "tokens.npy")
    with pytest.raises(skl.CorruptError, match="says other ids of its prompt than --tokens; give the tokens of these"):
        run(tmp_path, vllm_request(truth), tokens=tmp_path / "tokens.npy")


def test_several_choices_are_several_sequences(tmp_path):
    """Each choice of an answer is a sequence of its own."""
    first, second = Truth(0), Truth(0)
    second.tokens = np.concatenate([first.tokens[:P], (first.tokens[P:] + 1) % V])
    answer = vllm_request(first)
    answer["outputs"] += vllm_request(second)["outputs"]
    cache, _ = run(tmp_path, answer)
    assert_holds(cache[0], first)
    assert_holds(cache[1], second)


def test_minus_infinity(tmp_path):
    """vLLM writes -9999 for a probability of 0: no record comes of it."""
    truth = Truth(0)
    gone = truth.top(2)[1]
    truth.logs[2, gone] = -9999.0
    answer = vllm_request(truth)
    cache, _ = run(tmp_path, answer)
    targets = cache[0].targets
    assert gone not in targets.token_ids[targets.offsets[1] : targets.offsets[2]]


def spoil_text(answer, text="the"):
    answer["response"]["body"]["choices"][0]["logprobs"]["top_logprobs"][0] = {text: -1.0}


def spoil_all(answer):
    answer["prompt_logprobs"] = None
    answer["outputs"][0]["logprobs"] = None


def meta(**changes):
    return lambda answer: answer["meta_info"].update({f"input_{name}": value for name, value in changes.items()})


BAD = [
    ("completion", spoil_text, "names tokens by their text .'the'., which several may share; ask for return_tokens"),
    (
        "completion",
        lambda a: spoil_text(a, "7"),
        "names tokens by their text .'7'., which several may share; ask for return_tokens",
    ),
    (
        "chat",
        lambda a: a["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1].update(token="7"),
        "names tokens by their text .'7'., which several may share; ask for return_tokens",
    ),
    (
        "request",
        lambda a: a["outputs"][0]["logprobs"].reverse(),
        "has log-probs of the ids .*, and none of its generated token 0, which is",
    ),
    (
        "request",
        lambda a: a["prompt_logprobs"].append({"1": {"logprob": -1.0}}),
        "has log-probs of 7 prompt tokens, the prompt has 6",
    ),
    ("request", lambda a: a.pop("prompt_token_ids"), "does not say the ids of its prompt; give them with --tokens"),
    ("request", lambda a: a["outputs"][0]["logprobs"].pop(), "has ids of 3 generated tokens, but log-probs of 2"),
    ("request", lambda a: a["outputs"][0].pop("token_ids"), "but not their ids; ask for return_token_ids"),
    ("request", spoil_all, "has no log-probs; ask for prompt_logprobs or logprobs"),
    ("flat", lambda a: a["prompt_logprobs"]["ranks"].pop(), "has flat lists of different lengths: 25 token_ids, 25 lo"),
    ("flat", lambda a: a["prompt_logprobs"]["end_indices"].__setitem__(3, 99), "token 3 has entries 10 to 99 of 25"),
    ("nested", meta(token_logprobs=[[None, 1, None]]), "has 1 input_token_logprobs and 6 input_top_logprobs"),
    ("nested", lambda a: a.update(meta_info={}), "has no log-probs; ask for return_logprob with top_logprobs_num"),
    ("flat lists", meta(top_logprobs_shape=[9, 9]), r"log-probs in flat arrays of shape \[9, 9\]"),
    ("base64", meta(top_logprobs_idx_flat_b64="$"), "idx_flat_b64 is damaged: "),
    ("base64", meta(top_logprobs_val_flat_b64_dtype="O"), "has numbers of type 'O', which is not known here"),
    ("nested", meta(top_logprobs=[[["x"]]]), "is no answer with log-probs: IndexError"),
]


@pytest.mark.parametrize(("layout", "spoil", "message"), BAD, ids=[message for *_, message in BAD])
def test_answers_that_cannot_be(tmp_path, layout, spoil, message):
    """One line says which answer it is and what to ask the engine for; told to, the conversion goes past it."""
    truth = Truth(0)
    bad = LAYOUTS[layout](truth)
    spoil(bad)
    good = LAYOUTS[layout](Truth(1))
    kind = "sglang" if "meta_info" in good else "vllm"
    with pytest.raises(skl.CorruptError, match=f"row 1: .*{message}"):
        run(tmp_path, good, bad, from_=kind)
    cache, made = run(tmp_path, good, bad, good, from_=kind, on_bad_row="drop")
    assert len(cache) == 2
    assert any("1 sequences" in sentence for sentence in made.says)


def test_flags_that_the_answers_say(tmp_path):
    """What an answer says itself can't be said otherwise."""
    with pytest.raises(ValueError, match="--convention: of no use for vllm; leave it out"):
        run(tmp_path, vllm_request(Truth(0)), convention="next")
