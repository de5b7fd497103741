"""
Table 11: adapting the teacher to the text that the student learns.

The paper: an 8 B teacher gains little over CE on text that it was not trained on, and more after fine-tuning there.
Here one teacher learns the standard library's docstrings, another is that one after a fine-tuning on its source, which
is what the students read.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
from typing import Any

from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, Options, options
from drawing import bars
from students import CE, DIGITS, Records, Student, means, rounds_for, train_all
from teacher import Teacher, model_of, packed, read, teacher

from sklformat.distill import output_head
from sklformat.distill.models import loading, tokenization
from sklformat.distill.student.training import train
from sklformat.distill.text.corpus import Encoding, write_token_store
from sklformat.distill.text.documents import Document, standard_library_documents
from sklformat.distill.text.fingerprints import tokenizer_fingerprint, vocabulary_fingerprint
from sklformat.settings.train import TrainConfig

PAPER = {"CE": {"LM loss": 2.99}, "not adapted": {"LM loss": 2.98}, "adapted": {"LM loss": 2.96}}


def main() -> None:
    given = options(__doc__)
    claim = Claim("table11", "a teacher of other text helps little until it is fine-tuned (Table 11)", given)
    of = teacher(given)
    of_prose = _teacher_of_prose(of, given)
    adapted = _train(of, "adapted", student=str(of_prose), tokens="tokens", share=0.25)
    rounds = rounds_for(of, 12.0)
    results = {"CE": train_all(of, [CE], given)[CE]}
    for name, directory in (("not adapted", of_prose), ("adapted", adapted)):
        other = _as_teacher(of, given, directory)
        student = Student(records=Records(rounds=rounds), label=f"teacher {name}")
        results[name] = train_all(other, [student], given)[student]
    for name, found in results.items():
        claim.add(name, paper=PAPER[name], **{"LM loss": means(found), "ECE %": means(found, "calibration_error")})
    first = (means(results["CE"]) - means(results["not adapted"])).within()
    more = (means(results["not adapted"]) - means(results["adapted"])).within()
    rule = (
        "the student of the adapted teacher has less LM loss than that of the other, and than CE, with 95 % confidence"
    )
    gain = (means(results["CE"]) - means(results["adapted"])).within()
    verdict = SHOWN if more[0] > 0 and gain[0] > 0 else CONTRADICTED if more[1] < 0 else NOT_SHOWN
    notes = [f"teacher of other text against CE: {first[0]:+.3f} to {first[1]:+.3f} nats (95 %)"]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        bars(axes, {name: means(found) for name, found in results.items()}, room=0.2)
        axes.set_xlabel("LM loss, nats")

    claim.end(rule, verdict, draw, digits=DIGITS, notes=notes)


def _teacher_of_prose(of: Teacher, given: Options) -> Any:
    tokenizer = loading.load_tokenizer(of.directory / "tokenizer")
    encode = tokenization.TextEncoder(tokenizer)
    if not (of.directory / "prose").exists():
        write_token_store(
            of.directory / "prose",
            _docstrings(60 if given.is_quick else None),
            encode,
            vocab_size=tokenization.num_ids(tokenizer),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            vocabulary_fingerprint=vocabulary_fingerprint(tokenizer, tokenization.num_ids(tokenizer)),
            encoding=Encoding.of(encode),
        )
    return _train(of, "of-prose", student=None, tokens="prose", share=1.0)


def _docstrings(most: int | None) -> list[Document]:
    found = []
    for document in itertools.islice(standard_library_documents(), most):
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(ast.parse(document.text)) if isinstance(node, nodes)]
        if text := "\n\n".join(filter(None, texts)):
            found.append(Document(document.name, text))
    return found


def _train(of: Teacher, name: str, *, student: str | None, tokens: str, share: float) -> Any:
    settings = dict(of.size.teacher)
    settings["steps"] = max(1, round(settings["steps"] * share))
    if student is not None:
        settings = {k: v for k, v in settings.items() if k not in ("hidden_size", "num_layers", "num_heads")}
    train(
        TrainConfig(
            out=of.directory / name,
            tokens=of.directory / tokens,
            seq_len=of.size.seq_len,
            method="ce",
            student=student,
            tokenizer=str(of.directory / "tokenizer"),
            save_every=100,
            keep_checkpoint=False,
            **settings,
        )
    )
    return of.directory / name / "model"


def _as_teacher(of: Teacher, given: Options, directory: Any) -> Teacher:
    """The same texts with what another model says of them."""
    part = read(given, directory, packed(of.directory, of.size, "tokens"), len(of.train.tokens))
    held_out = read(given, directory, packed(of.directory, of.size, "held-out"), len(of.held_out.tokens))
    head = output_head(model_of(given, directory)).weight.detach()
    return dataclasses.replace(of, head=head, train=part, held_out=held_out)


if __name__ == "__main__":
    main()
