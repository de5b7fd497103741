"""
What do draws cost inside vLLM?  Positions/s of its prefill alone, with the head over every row, with draws as well, and
with its own prompt_logprobs.

Needs vLLM; on a CPU: ``make vllm`` builds an environment with it. Run:

    build/integrations/vllm/bin/python benchmarks/engines.py [--sequences 24] [--vocab-size 32000]
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import processor

import sklformat as skl
from sklformat.distill.engines import messages, vllm
from sklformat.distill.engines.desk import Desk
from sklformat.distill.engines.feed import Feed
from sklformat.distill.models import loading

ROUNDS = 50
SAMPLING = {"sampler": "multinomial", "proposal_temperature": 1.0, "k": None, "p": None, "seed": 0}


def write_teacher(directory, arguments):
    model = loading.new_llama(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        num_heads=arguments.hidden_size // 64,
        max_positions=arguments.seq_len,
        seed=0,
    )
    with torch.no_grad():
        model.lm_head.weight *= 12  # few ids are probable, as in a trained teacher
    model.save_pretrained(directory)


def run_plain(engine, prompts, **wanted):
    """Requests that nobody looks into."""
    for number, prompt in enumerate(prompts):
        engine.submit(number, prompt[:-1], **wanted)
    while engine.is_busy:
        engine.step()


def run_draws(engine, prompts, desk):
    feed = Feed(engine, desk, prompts.__getitem__, lambda _: None)
    assert len(prompts) == sum(1 for _ in feed.records(range(len(prompts))))


def measured(ways, positions, repeats):
    """Of each way: positions/s, and the worker's own µs per position, which busy neighbours change less; medians."""
    import psutil

    alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    [worker] = [p for p in alive if "Worker" in " ".join(p.cmdline())]

    def spent():
        times = worker.cpu_times()
        return times.user + times.system

    for run in ways.values():
        run()
    found = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            begin, before = time.perf_counter(), spent()
            run()
            found[name].append((positions / (time.perf_counter() - begin), (spent() - before) / positions * 1e6))
    return {name: tuple(map(statistics.median, zip(*runs, strict=True))) for name, runs in found.items()}


def cost_of_a_draw(arguments):
    """Seconds per row of skl.draw by itself, on one thread, of logits that are in DRAM."""
    logits = torch.randn(256, arguments.vocab_size) * 4
    times = []
    for number in range(8):
        begin = time.perf_counter()
        skl.draw(logits, rounds=ROUNDS, sequence=number)
        times.append((time.perf_counter() - begin) / len(logits))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not in this environment; make vllm builds one that has it")
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    positions = arguments.sequences * arguments.seq_len
    shape = arguments.sequences, arguments.seq_len + 1
    prompts = np.random.default_rng(0).integers(0, arguments.vocab_size, shape).astype(np.uint32)
    settings = messages.Settings(
        kind="counts",
        rounds=ROUNDS,
        sampling=SAMPLING | {"self_normalise": True},
        columns=(),
        vocab_size=arguments.vocab_size,
        on_device=False,
    )
    with tempfile.TemporaryDirectory() as directory:
        write_teacher(Path(directory), arguments)
        plan = vllm.Plan(Path(directory), dtype="float32", seq_len=arguments.seq_len)
        plan.whole.model_config.max_logprobs = 64
        with plan.started("") as engine:
            found = measured(
                {
                    "prefill alone": lambda: run_plain(engine, prompts),
                    "prompt_logprobs=64": lambda: run_plain(engine, prompts, prompt_logprobs=64),
                    "the same, flat": lambda: run_plain(engine, prompts, prompt_logprobs=64, flat_logprobs=True),
                },
                positions,
                arguments.repeats,
            )
        with messages.listening() as (listener, path), plan.started(path) as drawing, Desk(listener, settings) as desk:
            found |= measured(
                {
                    # Nothing is known of these sequences, so the head runs over their rows and nothing is drawn.
                    "head over every row": lambda: run_plain(drawing, prompts),
                    "head and draws": lambda: run_draws(drawing, prompts, desk),
                },
                positions,
                arguments.repeats,
            )
    cost = cost_of_a_draw(arguments)
    sizes = f"{arguments.num_layers} layers of {arguments.hidden_size}, {arguments.vocab_size:,} ids, float32"
    print(f"{processor()}; {plan.described}; {sizes}; {arguments.sequences} sequences of {arguments.seq_len} positions")
    for name, (rate, own) in found.items():
        print(f"{name:<22}{rate:8,.0f} positions/s{own:10.1f} µs of the worker's own time per position")
    share = cost * 1e6 / found["prefill alone"][1]
    print(f"{ROUNDS} draws of a row by themselves: {cost * 1e6:.1f} µs, {share:.1%} of its prefill")


if __name__ == "__main__":
    main()
