"""A capture by vLLM to which something happens after some sequences, in a process of its own."""

import os
import signal
import sys
from pathlib import Path

SEQ_LEN, NUM_SEQUENCES, STEP_TOKENS = 64, 60, 130


def config_of(place, out, **changes):
    from sklformat.settings.cache import CacheConfig

    given = {"teacher": str(place / "teacher"), "text": (place / "text",), "out": Path(out), "engine": "vllm"}
    given |= {"seq_len": SEQ_LEN, "num_sequences": NUM_SEQUENCES, "sequences_per_shard": 25, "seed": 3}
    return CacheConfig(**given | changes)


def strike(whom):
    """Kill this process, or the one that draws."""
    import psutil

    if whom == "driver":
        os.kill(os.getpid(), signal.SIGKILL)
    [worker] = [p for p in psutil.Process().children(recursive=True) if "Worker" in " ".join(p.cmdline())]
    worker.kill()


def main(place, out, whom, after):
    from sklformat.distill.engines.serving import cache_by_vllm
    from sklformat.distill.teacher.caching import Part
    from sklformat.distill.teacher.ranks import Ranks
    from sklformat.errors import SklError

    push = Part.push

    def struck(part, *rest):
        pushed = push(part, *rest)
        if part.made + 1 == after:
            strike(whom)
        return pushed

    Part.push = struck
    try:
        print(cache_by_vllm(config_of(place, out), Ranks(), step_tokens=STEP_TOKENS))
    except SklError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
