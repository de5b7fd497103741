"""
Held-out text as data of two tasks of lm-evaluation-harness: its perplexity, and the last word of its lines.

    python lm_eval_data.py TEXT... --out my-lm-eval

Writes OUT/text.jsonl, a row for each file, and OUT/cloze.jsonl, a row for each line whose last word is one of four:
the others are words of the same text that are about as frequent.  lm_eval_text.yaml and lm_eval_cloze.yaml beside
this file are the tasks; both look for the data in my-lm-eval.  docs/evaluation.md has the command.
"""

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

LAST_WORD = re.compile(r"^(.*\S)\s+([^\W\d_]{3,})[\s.!?]*$")
NEAR = 20  # places in the order of frequency, up and down, from which the wrong words come


def text_files(paths: list[Path]) -> list[Path]:
    """The files themselves, and all of a directory in the order of their names; hidden ones left out."""
    found = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [file for file in inside if file.is_file() and not file.name.startswith(".")]
    return found


def cloze_rows(texts: list[str], least_words: int, most: int, seed: int) -> list[dict]:
    """Lines without their last word, with four words to choose from."""
    counts = Counter(re.findall(r"[^\W\d_]{3,}", "\n".join(texts)))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    rank = {word: place for place, word in enumerate(ranked)}
    lines = dict.fromkeys(line.strip() for text in texts for line in text.splitlines())  # each line once, in order
    generator = random.Random(seed)
    rows = []
    for line in lines:
        found = LAST_WORD.match(line)
        if not found or len(found[1].split()) < least_words:
            continue
        context, word = found.groups()
        near = [other for other in ranked[max(0, rank[word] - NEAR) : rank[word] + NEAR + 1] if other != word]
        if len(near) < 3:
            continue
        choices = [word, *generator.sample(near, 3)]
        generator.shuffle(choices)
        rows.append({"context": context, "choices": choices, "answer": choices.index(word)})
    return sorted(generator.sample(rows, min(most, len(rows))), key=lambda row: row["context"])


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the data of the tasks in lm_eval_text.yaml and lm_eval_cloze.yaml."
    )
    parser.add_argument("text", nargs="+", type=Path, help="plain text that the student did not learn from")
    parser.add_argument("--out", type=Path, default=Path("my-lm-eval"))
    parser.add_argument("--least-words", type=int, default=5, help="of a line, before its last one")
    parser.add_argument("--most", type=int, default=1000, help="lines of the cloze task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    texts = [path.read_text(encoding="utf-8") for path in text_files(options.text)]
    texts = [text for text in texts if text.strip()]
    rows = cloze_rows(texts, options.least_words, options.most, options.seed)
    if not rows:
        parser.error(f"{options.text[0]}: no line ends in a word behind {options.least_words} others; give other text")
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / "text.jsonl", [{"text": text} for text in texts])
    write_rows(options.out / "cloze.jsonl", rows)


if __name__ == "__main__":
    main()
