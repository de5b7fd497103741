"""
Measure speculative decoding: a student drafts, its teacher accepts or corrects, by transformers' assisted generation.

    python speculative.py TEACHER STUDENT TEXT...

Prints which share of the drafts the teacher accepts, and beside it what sum_v min(p, q) predicts: at the very places
that were tried, on the generated text, and on held-out text, where ``sklformat eval --teacher`` measures it.  Sampling
at temperature 1 over the whole vocabulary, so that what comes out is distributed as the teacher's own text.
"""

import argparse
import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed
from transformers.generation.candidate_generator import AssistedCandidateGenerator


def read_windows(paths: list[Path], tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """At most as many stretches of the text, [length] ids each, spread over it; no two share a token."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    windows = []
    for file in files:
        if file.is_file() and not file.name.startswith("."):
            ids = tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"]
            windows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [windows[i * len(windows) // count] for i in range(count)] if len(windows) > count else windows


@torch.inference_mode()
def overlaps(teacher: Any, student: Any, ids: Tensor) -> Tensor:
    """Sum over the vocabulary of min(p, q) for each token of ids [L] but the first, given those before it: [L - 1]."""
    p, q = (model(ids[None, :-1]).logits[0].float().softmax(-1) for model in (teacher, student))
    return torch.minimum(p, q).sum(-1)


def generate(teacher: Any, student: Any, prompt: Tensor, new_tokens: int) -> tuple[Tensor, list[tuple[int, bool]], int]:
    """Prompt and what is generated behind it; place and fate of each draft that was tried; passes of the teacher."""
    passes = []
    update = AssistedCandidateGenerator.update_candidate_strategy

    def watch(self: Any, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Called after each pass of the teacher, which has scored every draft and the token behind them."""
        passes.append((input_ids.shape[1], scores.shape[1] - 1, int(num_matches)))
        update(self, input_ids, scores, num_matches)

    # No end of text: an accepted one would be counted as refused.  No top_k: transformers' own default is 50.
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new_tokens, pad_token_id=0)
    with mock.patch.object(AssistedCandidateGenerator, "update_candidate_strategy", watch):
        mask = torch.ones_like(prompt[None])
        ids = teacher.generate(prompt[None], attention_mask=mask, generation_config=config, assistant_model=student)[0]
    tried = []
    for end, num_drafted, num_accepted in passes:
        first = end - num_accepted - 1  # the accepted drafts, and one token of the teacher's
        # Behind the first refused draft none is tried.
        tried += [(first + i, i < num_accepted) for i in range(min(num_accepted + 1, num_drafted))]
    return ids, tried, len(passes)


def spread(values: list[float]) -> str:
    """Mean and its standard error, percent, where each value is of one prompt."""
    found = torch.tensor(values, dtype=torch.float64)
    return f"{100 * found.mean():.2f} % ± {100 * found.std() / math.sqrt(len(values)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speculative decoding beside sum of min(p, q).")
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("text", nargs="+", type=Path, help="plain text that the student did not learn from")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--drafted", type=int, default=4, help="tokens that the student drafts at a time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
        for path in (options.teacher, options.student)
    )
    # The number of drafts stays, and no draft is held back because the student is not sure of it.
    student.generation_config.update(
        num_assistant_tokens=options.drafted,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    teacher.generation_config.eos_token_id = None
    length = options.prompt_tokens + options.new_tokens
    windows = read_windows(options.text, AutoTokenizer.from_pretrained(options.teacher), length, options.prompts)
    if len(windows) < 2:
        parser.error(f"the text has {len(windows)} stretches of {length} tokens; give more text, or fewer --new-tokens")

    set_seed(options.seed)
    accepted, expected, variance, num_passes = 0, 0.0, 0.0, 0
    on_generated, on_text, num_tried = [], [], 0
    for window in windows:
        given = torch.tensor(window, device=device)
        ids, tried, passes = generate(teacher, student, given[: options.prompt_tokens], options.new_tokens)
        along = overlaps(teacher, student, ids).double()
        at_tried = along[[place - 1 for place, _ in tried]]
        accepted += sum(fate for _, fate in tried)
        expected += float(at_tried.sum())
        variance += float((at_tried * (1 - at_tried)).sum())
        num_tried += len(tried)
        num_passes += passes
        on_generated.append(float(along[options.prompt_tokens - 1 :].mean()))
        on_text.append(float(overlaps(teacher, student, given)[options.prompt_tokens - 1 :].mean()))
    error = math.sqrt(variance) / num_tried  # each try is accepted with probability sum of min(p, q), by itself
    print(f"drafts accepted: {100 * accepted / num_tried:.2f} % of {num_tried:,} tried")
    chance = f"a try's chance gives ± {100 * error:.2f}"
    print(f"sum of min(p, q) at these places: {100 * expected / num_tried:.2f} %; {chance}")
    print(f"sum of min(p, q) on all generated text: {spread(on_generated)}")
    print(f"sum of min(p, q) on the held-out text: {spread(on_text)}")
    print(f"tokens per pass of the teacher: {len(windows) * options.new_tokens / num_passes:.2f}")


if __name__ == "__main__":
    main()
