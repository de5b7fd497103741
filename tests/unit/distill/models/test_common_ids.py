"""Which ids a tokenizer and a model share: V is what the model's head has."""

import pytest
import tiny

from sklformat.distill.models import loading, tokenization


@pytest.fixture
def tokenizer():
    """290 ids, and one more that was added."""
    tokenizer = tiny.train_tokenizer(tiny.make_documents(3))
    assert 290 == tokenization.num_ids(tokenizer)
    tokenizer.add_tokens(["<img>"])
    return tokenizer


@pytest.mark.parametrize(("width", "ids"), [(290, 290), (291, 291), (320, 291)])
def test_an_added_token_does_not_widen_the_vocabulary(tokenizer, width, ids):
    """V is the head's width where tokens were added beyond it, and the tokenizer's ids where the head is padded."""
    assert ids == loading.check_fit(tokenizer, tiny.new_model(width))


def test_a_head_that_lacks_more_than_added_tokens_is_refused(tokenizer):
    """A head without rows for learned tokens belongs to another tokenizer; the message has both numbers."""
    with pytest.raises(
        ValueError, match=r"has 291 ids, the model only 288; 2 of those beyond are no added tokens, so they do not"
    ):
        loading.check_fit(tokenizer, tiny.new_model(288))


def test_an_id_beyond_is_named(tokenizer):
    """The message names token, id and the model's bound."""
    said = tokenization.why_beyond(tokenizer, 290, 290)
    assert said.startswith(
        "holds '<img>' (id 290), which the tokenizer has and the model, with ids below 290, has not;"
    )
