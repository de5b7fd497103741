"""Chats: from rows of messages to records of answers alone, one chat a sequence or packed."""

import datetime as dt
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from capture_data import shard_bytes

import sklformat as skl
from sklformat.cli import main
from sklformat.distill.loader.dataset import SparseLogitDataset
from sklformat.distill.models import loading
from sklformat.distill.teacher.drawing import Drawer
from sklformat.sampler import draw

SEQ_LEN = 64
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<sep>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


TEXT = "<bos>user\nalpha<sep>\n<bos>assistant\nbeta<sep>\n"
ANSWER = {"role": "assistant", "content": "beta"}


def make_chats(count=9):
    rng = np.random.default_rng(0)

    def words():
        return " ".join(rng.choice(tiny.WORDS, int(rng.integers(1, 4))))

    def turns(pairs):
        return [{"role": r, "content": words()} for _ in range(pairs) for r in ("user", "assistant")]

    return [{"messages": turns(1 + i % 2)} for i in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher with a chat template, and chats."""
    root = tmp_path_factory.mktemp("chats")
    tokenizer = tiny.with_template(tiny.train_tokenizer(tiny.make_documents()), "<bos> $A")
    tokenizer.chat_template = TEMPLATE
    tiny.write_model(root / "teacher", tokenizer)
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in make_chats()))
    return root


@pytest.fixture
def cache(place, tmp_path, capfd):
    """Run ``sklformat cache``: status, parsed stdout or None, stderr."""

    def run(out, text, *words):
        flags = ("--text", text, "--out", tmp_path / out, "--seq-len", SEQ_LEN, "--rounds", 5)
        status = main(["cache", "--teacher", str(place / "teacher"), *map(str, (*flags, *words)), "--json"])
        printed, err = capfd.readouterr()
        return status, json.loads(printed) if printed else None, err

    return run


def refusal(result):
    [line] = [line for line in result[2].splitlines() if not line.startswith("cache cache: loading the teacher")]
    assert (1, None) == result[:2]
    return line


def expected_chats(place):
    """Tokens of each chat and the places of its answers, by the template's own words."""
    tokenizer = loading.load_tokenizer(place / "teacher")
    end = tokenizer.convert_tokens_to_ids("<sep>")
    for chat in make_chats():
        ids = tokenizer.apply_chat_template(chat["messages"])["input_ids"]
        begin = np.cumsum(np.array(ids) == tokenizer.bos_token_id)  # 1, 2, …: which message
        head = len(tokenizer("assistant\n", add_special_tokens=False)["input_ids"]) + 1
        answers = np.zeros(len(ids), bool)
        for message in range(2, len(chat["messages"]) + 1, 2):
            places = np.flatnonzero(begin == message)
            answers[places[head : list(np.array(ids)[places]).index(end) + 1]] = True
        yield ids, answers


def test_only_answers_have_records(place, cache, tmp_path):
    """One chat is one sequence; positions that predict answers have the draws they would have, others have none."""
    status, result, err = cache("cache", place / "chats.jsonl", "--batch-size", 1)
    assert (0, 9) == (status, result["sequences"]), err
    assert [] == skl.verify(tmp_path / "cache")
    found = skl.open(tmp_path / "cache")
    assert 0 == found.header.seq_len
    chats = {tuple(ids): answers for ids, answers in expected_chats(place)}
    assert 9 == len(found) == len(chats)
    model = loading.load_model(place / "teacher")
    for i, sequence in enumerate(found):
        answers = chats.pop(tuple(sequence.tokens.tolist()))
        has_records = np.diff(sequence.targets.offsets) > 0
        assert answers[1:].tolist() == has_records.tolist()
        with torch.no_grad():
            logits = model(torch.from_numpy(sequence.tokens[None, :-1].astype(np.int64))).logits[0]
        drawn = draw(logits, rounds=5, sampler="systematic", sequence=i)
        is_of_answer = np.repeat(has_records, np.diff(drawn.offsets))
        assert drawn.token_ids[is_of_answer].tolist() == sequence.targets.token_ids.tolist()
        assert drawn.counts[is_of_answer].tolist() == sequence.targets.counts.tolist()
    assert {} == chats
    assert result["positions"] == sum(int((np.diff(s.targets.offsets) > 0).sum()) for s in found)


@pytest.mark.parametrize("words", [(), ("--packing", "packed")])
def test_a_cache_of_chats_is_checked_against_its_tokens(cache, tmp_path, capfd, words):
    """check makes the sequences as the cache was captured: one chat each, long ones truncated, or packed."""
    shared = ("--truncate", "start", "--packing-seed", 3, "--first-sequence", 2)
    rows = [*make_chats(8), {"messages": [{"role": "user", "content": "mu " * 90}, ANSWER]}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, result, err = cache("cache", tmp_path / "long.jsonl", *shared, *words)
    assert 0 == status, err
    check = ["check", str(tmp_path / "cache"), "--tokens", str(tmp_path / "cache/tokens")]
    assert 0 == main(check), capfd.readouterr().err
    assert f"all {result['sequences']} sequences" in capfd.readouterr().out


def test_prompts_are_no_labels(place, cache, tmp_path):
    """Training sees answers alone, for every method."""
    cache("cache", place / "chats.jsonl")
    for batch in SparseLogitDataset(tmp_path / "cache", batch_size=3):
        has_records = batch.targets.offsets.diff() > 0
        assert (batch.labels.flatten() != -100).tolist() == has_records.tolist()
        assert has_records.any()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]},
        {"conversations": [{"from": "human", "value": "alpha"}, {"from": "gpt", "value": "beta"}]},
        {"prompt": [{"role": "user", "content": "alpha"}], "completion": [{"role": "assistant", "content": "beta"}]},
        {"dialog": [{"role": "user", "content": "alpha", "name": None}, {"role": "assistant", "content": "beta"}]},
    ],
)
def test_rows_of_every_shape(place, cache, tmp_path, row):
    """Each common shape of a row is the same chat."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ("--field", "dialog") if "dialog" in row else ()
    status, _, err = cache("cache", tmp_path / "rows.jsonl", *words)
    assert 0 == status, err
    [sequence] = skl.open(tmp_path / "cache")
    assert TEXT == loading.load_tokenizer(place / "teacher").decode(sequence.tokens)


def test_a_file_that_is_skipped_decides_nothing(cache, place, tmp_path):
    """What the others must be is said by the first row that is something."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.json").write_text('[{"name": "x"}]')
    (tmp_path / "rows" / "b.jsonl").write_text((place / "chats.jsonl").read_text())
    status, result, err = cache("cache", tmp_path / "rows", "--on-bad-file", "skip")
    assert (0, 9) == (status, result["sequences"]), err
    assert "skipped 1 of 2 files" in err


def test_what_json_cannot_say(cache, tmp_path):
    """Tables hold dates and bytes beside the words of a message; they are no fault."""
    said = {"role": "user", "content": "alpha", "at": dt.date(2026, 1, 2)}
    pq.write_table(pa.Table.from_pylist([{"messages": [said, ANSWER]}]), tmp_path / "rows.parquet")
    status, _, err = cache("cache", tmp_path / "rows.parquet")
    assert 0 == status, err


def test_prompt_and_completion_as_text(place, cache, tmp_path):
    """Text without a template: the prompt is read, the completion and the end of text are learnt from."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "alpha ", "completion": "beta"}) + "\n")
    status, _, err = cache("cache", tmp_path / "rows.jsonl")
    assert 0 == status, err
    [sequence] = skl.open(tmp_path / "cache")
    tokenizer = loading.load_tokenizer(place / "teacher")
    assert "<bos>alpha beta<|endoftext|>" == tokenizer.decode(sequence.tokens)
    has_records = np.diff(sequence.targets.offsets) > 0
    assert "beta<|endoftext|>" == tokenizer.decode(sequence.tokens[1:][has_records])


def test_packed_chats(place, cache, tmp_path):
    """--packing packed: chats fill sequences one after the other, and answers alone have records."""
    status, _, err = cache("cache", place / "chats.jsonl", "--packing", "packed", "--columns", "document_start")
    assert 0 == status, err
    found = skl.open(tmp_path / "cache")
    assert SEQ_LEN == found.header.seq_len
    chats = {tuple(ids): answers for ids, answers in expected_chats(place)}
    tokens = np.concatenate([found[0].tokens, *(s.tokens[1:] for s in list(found)[1:])])
    has_records = np.concatenate([[False], *(np.diff(s.targets.offsets) > 0 for s in found)])
    starts = np.concatenate(
        [found[0].columns["document_start"], *(s.columns["document_start"][1:] for s in list(found)[1:])]
    )
    borders = np.flatnonzero(starts)
    for begin, end in itertools.pairwise(borders):
        assert chats.pop(tuple(tokens[begin:end].tolist())).tolist() == has_records[begin:end].tolist()
    assert len(chats) <= 3


def test_packed_chats_that_begin_with_a_long_prompt(cache, tmp_path):
    """The sequences before the first answer have no records, and stop nobody; where there are no others is nothing."""
    prompt, answer = ({"role": role, "content": " ".join(tiny.WORDS[:12] * 20)} for role in ("user", "assistant"))
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": [prompt, answer]}) + "\n")
    text = tmp_path / "long.jsonl"
    status, result, err = cache("cache", text, "--packing", "packed")
    assert 0 == status, err
    has_records = [sequence.targets.num_records > 0 for sequence in skl.open(tmp_path / "cache")]
    assert result["sequences"] == len(has_records)
    assert [False, False, True] == [*has_records[:2], has_records[-1]]
    refused = cache("none", text, "--packing", "packed", "--num-sequences", 2)
    assert "2 sequences were packed, and no position of them predicts an answer" in refused[2]
    assert (1, []) == (refused[0], list((tmp_path / "none").iterdir()))


def test_long_chats_are_truncated(cache, place, tmp_path):
    """What they lose is said; one that loses all answers is left out; the other side may be cut instead."""
    for side, kept, lost in (("end", 8, "; 1 of them lose all answers so and are left out"), ("start", 9, "")):
        rows = [*make_chats(8), {"messages": [{"role": "user", "content": "mu " * 90}, ANSWER]}]
        (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        status, result, err = cache(side, tmp_path / "long.jsonl", "--truncate", side)
        assert (0, kept) == (status, result["sequences"])
        assert f"warning: 1 of 9 documents are longer than seq_len {SEQ_LEN} and lose their {side}{lost}\n" in err
    lengths = [sequence.tokens.size for sequence in skl.open(tmp_path / "start")]
    assert SEQ_LEN + 1 == max(lengths)
    [long] = [sequence for sequence in skl.open(tmp_path / "start") if sequence.tokens.size == max(lengths)]
    tokenizer = loading.load_tokenizer(place / "teacher")
    text = tokenizer.decode(long.tokens)
    assert text.startswith("<bos>")  # which it keeps, as the teacher knows no text without
    assert text.endswith(" mu <sep>\n<bos>assistant\nbeta<sep>\n")


def test_text_that_loses_its_start_keeps_bos(place, cache, tmp_path):
    """So do texts that are one sequence each, whose BOS comes with packing."""
    (tmp_path / "long.txt").write_text("mu " * 90 + "beta")
    shared = ("--packing", "single", "--columns", "document_start")
    for side, end in (("start", " mu beta<|endoftext|>"), ("end", " mu")):
        assert 0 == cache(side, tmp_path / "long.txt", "--truncate", side, *shared)[0]
        [sequence] = skl.open(tmp_path / side)
        text = loading.load_tokenizer(place / "teacher").decode(sequence.tokens)
        assert (SEQ_LEN + 1, True, True) == (sequence.tokens.size, text.startswith("<bos>"), text.endswith(end))
        assert [0] == np.flatnonzero(sequence.columns["document_start"]).tolist()


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"messages": []}], (), "line 1: field 'messages' is an empty chat"),
        ([{"messages": ["hello"]}], (), "line 1: field 'messages', message 0 is text, must have role and content"),
        ([{"messages": [{"content": "x"}]}], (), "message 0 has no role; it has content"),
        ([{"messages": [{"role": "user"}]}], (), "message 0 (user) has neither content nor tool_calls"),
        ([{"messages": [{"role": "user", "content": 4}]}], (), "message 0: content is a number, must be text"),
        (
            [{"conversations": [{"from": "alien", "value": "x"}]}],
            (),
            "message 0 is from 'alien'; known are assistant, b",
        ),
        (
            [{"prompt": "a", "completion": []}],
            (),
            "prompt is text and completion a list; both must be text, or both li",
        ),
        ([{"prompt": "a", "completion": ""}], (), "field 'completion' is empty; there is no answer to learn from"),
        ([{"messages": [{"role": "user", "content": "x"}], "tools": "{"}], (), "field 'tools' is not JSON"),
        (
            [{"messages": [{"role": "user", "content": "x"}], "tools": 4}],
            (),
            "field 'tools' is a number, must be a list",
        ),
        ([{"messages": [{"role": "user", "content": "x"}]}], (), "line 1: no message is the assistant's; there is no"),
        ([{"text": "x", "messages": []}], (), "has text in 'text' and a chat in 'messages'; give --field messages for"),
        ([*make_chats(1), {"text": "x"}], (), "line 2 holds text, "),
        (
            [{"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}],
            (),
            "line 1 holds half a surrogate pair, whi",
        ),
        ([{"text": "x"}, *make_chats(1)], (), "line 2 holds a chat in 'messages', "),
        (make_chats(1), ("--bos", "document"), "bos document: a chat begins as its template says; leave --bos out"),
    ],
)
def test_what_is_no_chat_is_refused(cache, tmp_path, rows, words, message):
    """One line with file, row and field."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert message in refusal(cache("cache", tmp_path / "rows.jsonl", *words))
    assert not list((tmp_path / "cache").glob("*.skl*"))


def test_packed_chats_may_be_kept_apart(place, cache, tmp_path):
    """Answers in a packed sequence have the draws of their chat alone; chats that are one each have what they had."""
    status, _, err = cache("cache", place / "chats.jsonl", "--packing", "packed", "--isolate-documents")
    assert 0 == status, err
    assert [] == skl.verify(tmp_path / "cache")
    model = loading.load_model(place / "teacher")
    answers = {tuple(ids): marked for ids, marked in expected_chats(place)}
    whole = borders = same = records = 0
    for number, sequence in enumerate(skl.open(tmp_path / "cache")):
        starts = sequence.columns["document_start"]
        begins = sorted({0, *np.flatnonzero(starts).tolist(), len(starts)})
        has_records = np.diff(sequence.targets.offsets) > 0
        assert not has_records[starts[1:]].any()
        borders += int(starts[1:].sum())
        for begin, end in itertools.pairwise(begins):
            ids = sequence.tokens[begin : min(end, SEQ_LEN)]
            marked = answers.get(tuple(sequence.tokens[begin:end].tolist()))
            if marked is not None:
                whole += 1
                assert marked[1:].tolist() == has_records[begin : end - 1].tolist()
            if not ids.size:
                continue
            with torch.no_grad():
                logits = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0]
            drawn = draw(logits, rounds=5, sampler="systematic", sequence=number, first_position=begin)
            for t in np.flatnonzero(has_records[begin : begin + ids.size]):
                found = sequence.targets.token_ids[slice(*sequence.targets.offsets[begin + t : begin + t + 2])]
                same += drawn.token_ids[slice(*drawn.offsets[t : t + 2])].tolist() == found.tolist()
                records += 1
    assert min(whole, borders) > 3
    assert same / records > 0.98  # logits of other shapes differ by 1e-7
    assert 0 == cache("plain", place / "chats.jsonl", "--columns", "document_start")[0]
    assert 0 == cache("apart", place / "chats.jsonl", "--isolate-documents")[0]
    plain, apart = skl.open(tmp_path / "plain"), skl.open(tmp_path / "apart")
    assert [one.targets for one in plain] == [one.targets for one in apart]


def test_estimate_of_chats(place, cache, tmp_path, capfd):
    """What is predicted for the answers of some chats is what their capture takes, prompts and all."""
    _, made, _ = cache("cache", place / "chats.jsonl")
    flags = ("--text", place / "chats.jsonl", "--seq-len", SEQ_LEN, "--rounds", 5, "--calibration-sequences", 9)
    words = map(str, ("--teacher", place / "teacher", "--positions", made["positions"], *flags))
    assert 0 == main(["estimate", *words, "--json"])
    found = json.loads(capfd.readouterr().out)
    assert (9, made["positions"]) == (found["sequences"], found["positions"])
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.skl")) == pytest.approx(
        found["bytes"], rel=0.05
    )


def test_students_of_chats(place, cache, tmp_path, capfd):
    """Training from the cache, or with cross-entropy from its tokens, and measuring, see answers alone."""
    assert 0 == cache("cache", place / "chats.jsonl")[0]
    teacher = place / "teacher"
    shared = ("--student", teacher, "--steps", 3, "--batch-size", 3)
    for name, words in {
        "random": ("--cache", tmp_path / "cache"),
        "ce": ("--tokens", tmp_path / "cache/tokens", "--seq-len", SEQ_LEN, "--method", "ce"),
        "ce-cache": ("--cache", tmp_path / "cache", "--method", "ce"),
    }.items():
        assert 0 == main(["train", "--out", str(tmp_path / name), *map(str, (*shared, *words))]), capfd.readouterr().err
    model, total, count = loading.load_model(teacher), 0.0, 0
    for ids, answers in expected_chats(place):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            log_probs = model(tokens[:, :-1]).logits[0].double().log_softmax(-1)
        labels = torch.where(torch.from_numpy(answers[1:]), tokens[0, 1:], -100)
        total += float(torch.nn.functional.nll_loss(log_probs, labels, ignore_index=-100, reduction="sum"))
        count += int(answers[1:].sum())
    capfd.readouterr()
    for words in (("--text", place / "chats.jsonl"), ("--tokens", tmp_path / "cache/tokens")):
        assert 0 == main(["eval", "--student", *map(str, (teacher, "--seq-len", SEQ_LEN, *words)), "--json"])
        found = json.loads(capfd.readouterr().out)
        assert (9, count) == (found["num_sequences"], found["num_tokens"])
        assert total / count == pytest.approx(found["lm_loss"], abs=1e-5)


def test_who_wrote_the_text(place, cache, tmp_path, capfd):
    """--author stands in the headers with the settings; training says where another model than the teacher wrote."""
    written = {}
    for name, words in {
        "none": (),
        "teacher": ("--author", "teacher", "temperature=0.7", "top_p=0.95"),
        "other": ("--author", "some-other-model", "temperature=1"),
    }.items():
        assert 0 == cache(name, place / "chats.jsonl", *words)[0]
        header = skl.open(tmp_path / name).header
        written[name] = header.capture.get("author"), header.teacher_fingerprint
        capfd.readouterr()
        shared = ("--cache", tmp_path / name, "--student", place / "teacher", "--steps", 1, "--batch-size", 3)
        assert 0 == main(["train", "--out", str(tmp_path / f"run-{name}"), *map(str, shared)])
        note = f"note: {tmp_path / name}: its text was written by some-other-model, its records are of another model; w"
        assert (name == "other") == (note in capfd.readouterr().err)
    assert written["none"][0] is None
    sampling = {"temperature": "0.7", "top_p": "0.95"}
    assert {"name": "teacher", "fingerprint": written["teacher"][1], "sampling": sampling} == written["teacher"][0]
    assert {"name": "some-other-model", "sampling": {"temperature": "1"}} == written["other"][0]
    status, _, err = cache("bad", place / "chats.jsonl", "--author", "teacher", "hot")
    assert (2, "author: after the name come settings as NAME=VALUE, got hot" in err) == (status, True)


def test_a_capture_of_chats_is_resumed(place, cache, tmp_path, monkeypatch):
    """Stopped within a batch of unlike lengths, or ended early, it goes on to the bytes of an undisturbed run."""
    words = ("--batch-size", 3, "--sequences-per-shard", 4)
    assert 0 == cache("whole", place / "chats.jsonl", *words)[0]
    draw_sequence = Drawer.draw

    def stopping(drawer, sequence, *rest):
        if sequence == 5:
            raise KeyboardInterrupt
        return draw_sequence(drawer, sequence, *rest)

    monkeypatch.setattr(Drawer, "draw", stopping)
    assert 130 == cache("stopped", place / "chats.jsonl", *words)[0]
    monkeypatch.setattr(Drawer, "draw", draw_sequence)
    assert 0 == cache("short", place / "chats.jsonl", *words, "--num-sequences", 4)[0]
    for out, made in (("stopped", 4), ("short", 5)):
        assert made == cache(out, place / "chats.jsonl", *words)[1]["sequences_made"]
        assert shard_bytes(tmp_path / "whole") == shard_bytes(tmp_path / out)
