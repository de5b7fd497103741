"""
``sklformat cache`` as tasks of Ray: one for each rank, on whatever machines the cluster has.

    pip install ray
    python docs/recipes/ray_cache.py --ranks 8 --gpus 1 -- --teacher my-teacher --text my-text --out /shared/my-cache

What stands behind ``--`` are flags of ``sklformat cache``; ``--out`` is a directory that all machines see. A task that
dies is started again by Ray, and resumes; the last one to end writes the manifest. So does the same command, if all of
it was stopped.
"""

import argparse
import runpy
import sys

import ray


def run_rank(rank: int, ranks: int, run: str, words: list[str]) -> int:
    """One rank, in the process of Ray's worker, so that both end together."""
    sys.argv = ["sklformat", "cache", *words, "--run", run, "--rank", str(rank), "--world-size", str(ranks)]
    try:
        runpy.run_module("sklformat", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:  # Ray shows the line that says why
            raise RuntimeError(f"rank {rank} ended with status {end.code}") from None
    return rank


def main() -> None:
    parser = argparse.ArgumentParser(description="sklformat cache as tasks of Ray")
    parser.add_argument("--ranks", type=int, required=True, help="tasks, each with a teacher of its own")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a task")
    parser.add_argument("--cpus", type=float, default=1, help="cores of a task")
    parser.add_argument("--run", default="ray", help="name of the run")
    parser.add_argument("--retries", type=int, default=3, help="how often a task is started again")
    parser.add_argument("words", nargs="+", help="flags of sklformat cache, behind --")
    args = parser.parse_args()
    ray.init()
    task = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=args.retries, retry_exceptions=True)(run_rank)
    waiting = [task.remote(rank, args.ranks, args.run, args.words) for rank in range(args.ranks)]
    while waiting:
        [done], waiting = ray.wait(waiting)
        print(f"rank {ray.get(done)} has ended, {len(waiting)} have not", flush=True)


if __name__ == "__main__":
    main()
