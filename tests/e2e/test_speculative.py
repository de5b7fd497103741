"""The recipe that measures speculative decoding: drafts are accepted as often as sum_v min(p, q) says."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers

RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "speculative.py"
VOCAB, PROMPTS, NEW_TOKENS, DRAFTED = 24, 12, 64, 3


@pytest.fixture(scope="module")
def speculative():
    return SimpleNamespace(**runpy.run_path(str(RECIPE)))


def model(seed):
    """A model that is far from uniform."""
    one = tiny.new_model(VOCAB, max_positions=128, seed=seed).eval()
    with torch.no_grad():
        one.get_input_embeddings().weight.mul_(20)
        one.get_output_embeddings().weight.mul_(12)
    return one


def test_drafts_are_accepted_as_often_as_the_overlap_says(speculative):
    """Each try is accepted by itself with its own probability: false alarm 6e-7, 5 standard errors."""
    teacher, student = model(1), model(2)
    student.generation_config.update(
        num_assistant_tokens=DRAFTED, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    teacher.generation_config.eos_token_id = None
    transformers.set_seed(3)
    fates, chances = [], []
    for number in range(PROMPTS):
        prompt = torch.tensor([number, (5 * number) % VOCAB])
        ids, tried, passes = speculative.generate(teacher, student, prompt, NEW_TOKENS)
        assert len(ids) == len(prompt) + NEW_TOKENS
        along = speculative.overlaps(teacher, student, ids)
        places = [place for place, _ in tried]
        assert places == sorted(set(places))  # no place is tried twice
        # Each pass tries until the first refusal, so that it refuses one draft at most.
        assert sum(not fate for _, fate in tried) <= passes
        fates += [fate for _, fate in tried]
        chances += along[[place - 1 for place in places]].tolist()
    error = math.sqrt(sum(a * (1 - a) for a in chances)) / len(chances)
    assert 0.2 < sum(chances) / len(chances) < 0.8
    assert error < 0.02
    assert sum(fates) / len(fates) == pytest.approx(sum(chances) / len(chances), abs=5 * error)


def test_the_overlap_is_that_of_the_two_distributions(speculative):
    teacher, student = model(1), model(2)
    ids = torch.arange(9) % VOCAB
    found = speculative.overlaps(teacher, student, ids)
    for place in range(1, len(ids)):
        p, q = (one(ids[None, :place]).logits[0, -1].double().softmax(0) for one in (teacher, student))
        assert float(found[place - 1]) == pytest.approx(float(sum(map(min, p.tolist(), q.tolist()))), abs=1e-5)
