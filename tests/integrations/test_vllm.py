"""vLLM 0.32 itself, its CPU build, as the teacher's engine: make vllm."""

import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import vllm_runs
from engine_data import SecondRunner
from system import members, wait_for
from vllm_runs import NUM_SEQUENCES, SEQ_LEN, STEP_TOKENS, config_of

import sklformat as skl
from sklformat.cli import main
from sklformat.distill.engines import hooks, vllm
from sklformat.distill.engines.serving import cache_by_vllm
from sklformat.distill.models import loading, tokenization
from sklformat.distill.models.identities import config_fingerprint
from sklformat.distill.rescoring.passes import rescore
from sklformat.distill.teacher.ranks import Ranks
from sklformat.errors import EngineError
from sklformat.settings.rescore import RescoreConfig

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<sep>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
NAMES = ("label_logprob", "entropy", "record_logprob")


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """A little memory for keys and values, and one core for each of two workers."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small Llama of float32 with heads of 32, text, and chats."""
    root = tmp_path_factory.mktemp("vllm")
    documents = tiny.make_documents(40, 300)
    tokenizer = tiny.with_template(tiny.train_tokenizer(documents), "<bos> $A")
    tokenizer.chat_template = TEMPLATE
    model = tiny.new_model(
        2000,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        max_positions=SEQ_LEN,
        separator_id=tokenization.separator_id(tokenizer),
    )
    with torch.no_grad():
        model.lm_head.weight *= 20
    loading.save(model.eval(), tokenizer, root / "teacher")
    (root / "text").mkdir()
    for document in documents:
        (root / "text" / document.name).write_text(document.text)
    rng = np.random.default_rng(0)

    def says(role):
        return {"role": role, "content": " ".join(rng.choice(tiny.WORDS, int(rng.integers(1, 5))))}

    rows = [{"messages": [says(role) for role in ("user", "assistant") * (1 + i % 2)]} for i in range(30)]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def share_of_equal_draws(place, directory, rounds=50, seed=3):
    """Of all draws, those that transformers' own logits give by the same uniforms; records only where they belong."""
    model = loading.load_model(place / "teacher")
    equal = drawn = 0
    with skl.open(directory) as cache, torch.inference_mode():
        for number, sequence in enumerate(cache):
            ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
            logits = model(ids[:, :-1]).logits[0, :, : cache.header.vocab_size]
            expected = skl.draw(logits, rounds, cache.header.sampler, seed=seed, sequence=number)
            for position in range(len(sequence.targets.offsets) - 1):
                found, wanted = (counts_at(targets, position) for targets in (sequence.targets, expected))
                if found:
                    equal += sum(min(count, found.get(token, 0)) for token, count in wanted.items())
                    drawn += rounds
    return equal / drawn


def counts_at(targets, position):
    pairs = slice(*targets.offsets[position : position + 2])
    return dict(zip(targets.token_ids[pairs].tolist(), targets.counts[pairs].tolist(), strict=True))


@pytest.fixture(scope="module")
def whole(place):
    """A cache in one run, of chunks: a step has room for two prompts and a piece of the third."""
    config = config_of(place, place / "whole", columns=NAMES)
    return cache_by_vllm(config, Ranks(), step_tokens=STEP_TOKENS + 7)


def test_draws_are_those_of_transformers(place, whole):
    """In float32 at most one draw in some thousand falls elsewhere."""
    assert (NUM_SEQUENCES, NUM_SEQUENCES * SEQ_LEN) == (whole.sequences, whole.positions)
    assert [] == skl.verify(whole.directory)
    assert share_of_equal_draws(place, whole.directory) >= 0.999


def test_columns_are_those_of_transformers(place, whole):
    """Log-probs and entropies to the precision of float16."""
    model = loading.load_model(place / "teacher")
    with skl.open(whole.directory) as cache, torch.inference_mode():
        for sequence in list(cache)[:5]:
            ids = torch.from_numpy(sequence.tokens.astype(np.int64))
            scores = model(ids[None, :-1]).logits[0, :, : cache.header.vocab_size].log_softmax(-1)
            labels = scores.gather(1, ids[1:, None])[:, 0]
            entropies = torch.special.entr(scores.exp()).sum(-1)
            np.testing.assert_allclose(sequence.columns["label_logprob"], labels, atol=0.03)
            np.testing.assert_allclose(sequence.columns["entropy"], entropies, atol=0.02)


def test_the_header_says_who_made_it(place, whole):
    """Engine, version and hook, that nobody repeats it, and the config's fingerprint as transformers has it."""
    with skl.open(whole.directory) as cache:
        capture = cache.header.capture
    assert {"name": "vllm", "hook": "runner", "tensor_parallel": 1} == capture["engine"]
    assert capture["versions"]["vllm"].startswith("0.32")
    assert capture["repeatable"] is False
    assert config_fingerprint(loading.load_model(place / "teacher")) == capture["teacher"]["config"]


def test_given_ids_are_scored(place, whole, tmp_path):
    """A second teacher's log-probs at the records of a cache, and its other columns, are those of transformers."""
    model = loading.load_model(place / "teacher")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)
    loading.save(model, loading.load_tokenizer(place / "teacher"), tmp_path / "second")
    given = {"cache": str(whole.directory), "teacher": str(tmp_path / "second")}
    for engine in ("transformers", "vllm"):
        rescore(RescoreConfig(out=tmp_path / engine, engine=engine, **given))
    for ours, theirs in zip(skl.open(tmp_path / "vllm"), skl.open(tmp_path / "transformers"), strict=True):
        assert theirs.targets == ours.targets
        for name in NAMES:
            np.testing.assert_allclose(ours.columns[name], theirs.columns[name], rtol=2**-9, atol=0.01, err_msg=name)
    assert [] == skl.verify(tmp_path / "vllm")


def run(place, out, whom, after):
    """The process that something happens to; all processes of its group are gone when this returns."""
    words = [sys.executable, vllm_runs.__file__, place, out, whom, after]
    process = subprocess.Popen(map(str, words), stdout=subprocess.PIPE, text=True, start_new_session=True)
    said, _ = process.communicate()

    wait_for(lambda: not members(process.pid))
    return process.returncode, said


@pytest.mark.parametrize("whom", ["driver", "worker"])
def test_killed_and_resumed(place, tmp_path, whom):
    """Whoever is killed, the others end too; what was there stays, and the same command makes the rest."""
    status, said = run(place, tmp_path / "cache", whom, 30)
    if whom == "driver":
        assert -9 == status
    else:
        assert 1 == status
        assert "run the same command again to resume" in " ".join(said.split())
    done = cache_by_vllm(config_of(place, tmp_path / "cache"), Ranks(), step_tokens=STEP_TOKENS)
    assert NUM_SEQUENCES == done.sequences
    assert 0 < done.sequences_made <= NUM_SEQUENCES - 25
    assert [] == skl.verify(done.directory)
    assert share_of_equal_draws(place, done.directory) >= 0.999


def test_chats(place, tmp_path, capfd):
    """By the command: records for answers alone, each those of transformers' logits."""
    words = ("--teacher", place / "teacher", "--text", place / "chats.jsonl", "--out", tmp_path / "cache")
    assert 0 == main(
        ["cache", "--engine", "vllm", *map(str, words), "--seq-len", str(SEQ_LEN), "--seed", "3", "--json"]
    )
    assert 30 == json.loads(capfd.readouterr().out)["sequences"]
    with skl.open(tmp_path / "cache") as cache:
        masks = [np.diff(sequence.targets.offsets) > 0 for sequence in cache]
    assert all(mask.any() and not mask.all() for mask in masks)
    assert share_of_equal_draws(place, tmp_path / "cache") >= 0.999
    own = ["cache", *map(str, words[:4]), "--out", str(tmp_path / "own"), "--seq-len", str(SEQ_LEN), "--rounds", "5"]
    assert 0 == main(own)
    with skl.open(tmp_path / "own") as cache:
        for mask, sequence in zip(masks, cache, strict=True):
            assert mask.tolist() == (np.diff(sequence.targets.offsets) > 0).tolist()


def test_the_layer_alone(place, tmp_path):
    """Where the runner's method is not known: the same draws, one request at a time."""
    config = config_of(place, tmp_path / "cache", num_sequences=12)
    done = cache_by_vllm(config, Ranks(), hook="layer")
    assert 12 == done.sequences
    assert share_of_equal_draws(place, done.directory) >= 0.999


def test_two_workers(place, tmp_path, monkeypatch):
    """A teacher divided in two: logits are gathered, and drawn from once."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    done = cache_by_vllm(config_of(place, tmp_path / "cache", tensor_parallel=2, num_sequences=12), Ranks())
    assert 12 == done.sequences
    assert share_of_equal_draws(place, done.directory) >= 0.999


def test_a_model_that_it_does_not_serve(place, tmp_path):
    """In one line, with vLLM's own reason."""
    broken = tmp_path / "broken"
    loading.load_tokenizer(place / "teacher").save_pretrained(broken)
    config = json.loads((place / "teacher" / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(EngineError, match="vLLM does not serve it: "):
        cache_by_vllm(config_of(place, tmp_path / "cache", teacher=str(broken)), Ranks())


@pytest.mark.parametrize("method", [hooks.FIRST_RUNNER, hooks.SECOND_RUNNER])
def test_both_runners_are_known(method):
    """This version's methods have the parameters that were recorded."""
    assert hooks.is_known(method, vllm._find(method))


def test_the_second_runner_is_shown():
    """It needs a GPU; its own method is called here with a step as it would get one, and says nothing of its own."""
    own = vllm._find(hooks.SECOND_RUNNER)
    unwrapped = {hooks.SECOND_RUNNER.name: inspect.unwrap(own.compute_prompt_logprobs)}
    owner = type("Worker", (own,), unwrapped | {"finish_step": SecondRunner.finish_step})
    shown = []
    hooks.wrap(hooks.SECOND_RUNNER, owner, shown.append)
    worker = owner(64, torch.device("cpu"))
    worker._compute_logits = None
    requests = [SimpleNamespace(name=f"{n}-a", prompt=np.arange(9), done=done) for n, done in ((0, 0), (1, 5), (2, 9))]
    assert {} == worker.finish_step([(requests[0], 9), (requests[1], 3), (requests[2], 1)], torch.zeros(13, 2))
    [step] = shown
    assert [("0-a", 0, 9, 0, 9), ("1-a", 5, 3, 9, 9)] == [tuple(rows) for rows in step.rows]
