"""Tokens that stand around a text, and the names of special tokens inside of one."""

import pytest
import tiny

from sklformat.distill.models.tokenization import TextEncoder, choose_bos, template_ids


@pytest.fixture(scope="module")
def plain():
    return tiny.train_tokenizer(tiny.make_documents())


def test_bos_follows_the_tokenizers_own_call(plain):
    """What it puts before a text stands before each document; nothing where it puts nothing; a flag decides else."""
    with_bos = tiny.with_template(plain, "<bos> $A")
    bos_id = with_bos.bos_token_id
    assert ([bos_id], []) == template_ids(with_bos)
    assert ("document", bos_id) == choose_bos(with_bos, "auto") == choose_bos(with_bos, "document")
    assert ("window", bos_id) == choose_bos(with_bos, "window")
    assert ("none", None) == choose_bos(with_bos, "none") == choose_bos(plain, "auto")
    silent = tiny.with_template(plain, "$A")  # has a BOS and does not put it
    assert ("none", None) == choose_bos(silent, "auto")
    assert ("document", bos_id) == choose_bos(silent, "document")
    ended = tiny.with_template(plain, "<bos> $A <|endoftext|>")  # the separator stands there anyway
    assert ("document", bos_id) == choose_bos(ended, "auto")


def test_a_template_that_packing_does_not_follow_is_refused(plain):
    """Several tokens before a text, or another behind it than the separator, are named, with what to do."""
    for template, around in (("<bos> <sep> $A", "<bos> <sep> … "), ("<bos> $A <sep>", "<bos> … <sep>")):
        with pytest.raises(ValueError, match=f"puts {around} around a text, which packing does not; give bos none, or"):
            choose_bos(tiny.with_template(plain, template), "auto")
    without = tiny.with_template(plain, "$A")
    without.bos_token = None
    with pytest.raises(ValueError, match="bos window: the tokenizer has no BOS token; give bos none, or set its bos_t"):
        choose_bos(without, "window")


def test_names_of_special_tokens_in_a_text(plain):
    """They are characters or the tokens, as asked; either way they are counted. A BOS is not put twice."""
    tokenizer = tiny.with_template(plain, "<bos> $A")
    texts = ["<bos>alpha<sep>beta", "beta <sep>", "alpha"]
    bos, sep = tokenizer.convert_tokens_to_ids(["<bos>", "<sep>"])
    as_text, kept = TextEncoder(tokenizer), TextEncoder(tokenizer, special_tokens="keep")
    ids = as_text(texts)
    assert texts == [tokenizer.decode(part) for part in ids]
    assert not {bos, sep} & {token for part in ids for token in part}
    found = kept(texts)
    assert [0, 0, 0] == [part.count(bos) for part in found]
    assert [1, 1, 0] == [part.count(sep) for part in found]
    assert bos == TextEncoder(tokenizer, bos="window", special_tokens="keep")(texts)[0][0]
    for encoder in (as_text, kept):
        assert (3, 3, 1, "<sep>") == (encoder.num_texts, encoder.num_names, encoder.num_rendered, encoder.example)
