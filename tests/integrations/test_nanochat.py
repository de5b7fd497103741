"""
docs/recipes/nanochat_kd.py in a stand-in for nanochat, which is no package: its interface, read from its source.

That is ``GPT.forward(idx, targets=None)`` with logits cut to the vocabulary and capped at 15 in float32, changed as the
recipe says, and the loop of scripts/base_train.py with what it saves.
"""

import itertools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loader_data import POSITIONS, VOCAB, write_cache
from torch import nn
from torch.nn import functional

from sklformat.distill import SparseLogitDataset

RECIPE = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "docs/recipes/nanochat_kd.py")))
PADDED_VOCAB, WIDTH = 1024, 16


class GPT(nn.Module):
    """Embedding, a causal mean for attention, one layer, and nanochat's head."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.wte = nn.Embedding(PADDED_VOCAB, WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, PADDED_VOCAB, bias=False)

    def forward(self, idx, targets=None):
        x = self.wte(idx)
        past = torch.arange(1, idx.shape[1] + 1, dtype=x.dtype)[:, None]
        x = functional.rms_norm(x + self.mlp(x.cumsum(1) / past), (WIDTH,))
        if isinstance(targets, tuple):
            return RECIPE.distillation_loss(x, self.lm_head.weight[: self.config.vocab_size], targets)
        logits = self.lm_head(x)[..., : self.config.vocab_size].float()
        logits = 15 * torch.tanh(logits / 15)
        if targets is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nanochat") / "cache"
    write_cache(directory)
    return directory


def new_model():
    torch.manual_seed(0)
    model = GPT()
    nn.init.normal_(model.lm_head.weight, std=4)  # logits that the cap bends
    return model


def batches(cache, batch_size=4, resume=None):
    return RECIPE.cached_batches(str(cache), batch_size, POSITIONS, "cpu", resume)


def trained(cache, steps, saved=None):
    """nanochat's loop, with two micro-batches in a step; what it saves has passed through JSON."""
    model, losses, resume = new_model(), [], None
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        resume = json.loads(saved["loader"])
    loader = batches(cache, 4, resume)
    x, y, state = next(loader)
    for _ in range(steps):
        for _ in range(2):
            loss = model(x, y) / 2
            loss.backward()
            losses.append(loss.item())
            x, y, state = next(loader)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    return losses, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": json.dumps(state)}


def test_the_loss_is_that_of_the_capped_head(cache):
    """Value and gradients are those of dense float64 logits, cut and capped as nanochat does it."""
    x, y, _ = next(batches(cache))
    model = new_model()
    loss = model(x, y)
    loss.backward()
    dense = new_model().double()
    hidden = dense.wte(x)
    past = torch.arange(1, POSITIONS + 1, dtype=torch.float64)[:, None]
    hidden = functional.rms_norm(hidden + dense.mlp(hidden.cumsum(1) / past), (WIDTH,))
    logits = 15 * torch.tanh(dense.lm_head(hidden)[..., :VOCAB] / 15)
    assert float(logits.detach().abs().max()) > 10
    ids, probs = y[0].long(), y[1].double()
    terms = torch.xlogy(probs, probs) - probs * logits.log_softmax(-1).gather(-1, ids)
    expected = terms.sum() / x.numel()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        reference = dict(dense.named_parameters())[name].grad
        torch.testing.assert_close(
            parameter.grad.double(), reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max())
        )
    assert not model.lm_head.weight.grad[VOCAB:].any()


def test_micro_batches_add_up(cache):
    """Half the losses of two micro-batches are the loss of both in one, where positions without records differ too."""
    model = new_model()
    halves = [model(x, y) / 2 for x, y, _ in itertools.islice(batches(cache, 2), 2)]
    whole = model(*next(batches(cache, 4))[:2])
    assert sum(half.item() for half in halves) == pytest.approx(whole.item(), rel=1e-6)


def test_resuming_is_exact(cache):
    """A checkpoint has fetched a batch that it has not trained on: that one comes next, also where an epoch ends."""
    straight, _ = trained(cache, 5)
    for done in (1, 2, 3):
        first, saved = trained(cache, done)
        rest, _ = trained(cache, 5 - done, saved)
        assert straight == first + rest


def test_epochs_follow_each_other(cache):
    """Each epoch is the stream's, in its own order."""
    dataset = SparseLogitDataset(cache, 4)
    expected = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        expected += [batch.input_ids.tolist() for batch in dataset]
    assert expected == [x.tolist() for x, _, _ in itertools.islice(batches(cache), len(expected))]


def test_what_does_not_fit_is_refused(cache, tmp_path, monkeypatch):
    """Sequences of another length, documents that did not see each other, more records than there is room for."""
    isolated = {"columns": ("document_start",), "capture": {"packing": {"isolated": True}}}
    write_cache(tmp_path / "isolated", **isolated)
    with pytest.raises(ValueError, match="did not see each other"):
        next(batches(tmp_path / "isolated"))
    with pytest.raises(ValueError, match="sequences of 16 positions; give --max-seq-len 16"):
        next(RECIPE.cached_batches(str(cache), 4, 8, "cpu"))
    monkeypatch.setitem(RECIPE.cached_batches.__globals__, "RECORDS", 2)
    with pytest.raises(ValueError, match="more than 2 records"):
        next(batches(cache))


@pytest.mark.integration
def test_a_compiled_model_gives_the_same(cache):
    """nanochat compiles its model for one shape: the loss stays outside the graph, and nothing is compiled twice."""
    model = new_model()
    compiled = torch.compile(model, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x, y, _ in itertools.islice(batches(cache), 3):
            assert compiled(x, y).item() == pytest.approx(model(x, y).item(), rel=1e-6)
