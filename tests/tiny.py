"""A tiny text, its tokenizer and token store, and models too small to learn much of it."""

import copy

import numpy as np
import tokenizers

from sklformat.distill.models import loading, tokenization
from sklformat.distill.text.corpus import write_token_store
from sklformat.distill.text.documents import Document
from sklformat.distill.text.fingerprints import tokenizer_fingerprint, vocabulary_fingerprint

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


def make_documents(count=10, words=80):
    rng = np.random.default_rng(0)
    return [Document(f"d{i}.txt", " ".join(rng.choice(WORDS, words))) for i in range(count)]


def train_tokenizer(documents, vocab_size=290):
    return tokenization.train_tokenizer([document.text for document in documents], vocab_size)


def with_template(tokenizer, template):
    """The same tokenizer with <bos> and <sep>, whose own call puts what ``template`` says around a text, ``$A``."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "extra_special_tokens": ["<sep>"]})
    marks = {word: tokenizer.convert_tokens_to_ids(word) for word in template.split() if word != "$A"}
    post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=list(marks.items()))
    tokenizer.backend_tokenizer.post_processor = post_processor
    return tokenizer


def write_store(directory, tokenizer, documents):
    return write_token_store(
        directory,
        documents,
        tokenization.TextEncoder(tokenizer, bos="none"),
        vocab_size=tokenization.num_ids(tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocabulary_fingerprint=vocabulary_fingerprint(tokenizer, tokenization.num_ids(tokenizer)),
    )


def new_model(vocab_size, **sizes):
    """A Llama of one layer."""
    defaults = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 64, "seed": 0}
    return loading.new_llama(**{"vocab_size": vocab_size} | defaults | sizes)


def write_model(directory, tokenizer, **sizes):
    """A model for a tokenizer, saved beside it."""
    sizes = {
        "vocab_size": tokenization.num_ids(tokenizer),
        "separator_id": tokenization.separator_id(tokenizer),
    } | sizes
    model = new_model(**sizes)
    loading.save(model, tokenizer, directory)
    return model.eval()


def write_place(directory):
    """Tokenizer and tokens in a directory; returns the tokenizer."""
    documents = make_documents()
    tokenizer = train_tokenizer(documents)
    tokenizer.save_pretrained(directory / "tokenizer")
    write_store(directory / "tokens", tokenizer, documents)
    return tokenizer
