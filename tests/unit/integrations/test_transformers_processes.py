"""SparseKDTrainer on two processes: DDP and FSDP2 give the losses of one process."""

import json

import forked
import pytest
from loader_data import SEQUENCES, write_cache
from trainer_runs import STEPS, WHOLE, llama, losses, run, trained

LENGTHS = [5 + i % 12 for i in range(SEQUENCES)]
FIGURES = ["eval_lm_loss", "eval_kl_to_records", "eval_calibration_error", "eval_loss", "eval_num_positions"]
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "ddp, tied": "DistributedDataParallel",
    "fsdp2": "FSDPLlamaForCausalLM",
    "fsdp2, tied": "FSDPLlamaForCausalLM",
    "loaded sharded": "FSDPLlamaForCausalLM",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A ragged cache and a student on disk."""
    directory = tmp_path_factory.mktemp("trainer")
    write_cache(directory / "ragged", seq_len=0, lengths=LENGTHS)
    llama().save_pretrained(directory / "llama")
    return directory


def pair(place, *ways):
    """What two processes came to."""
    done = forked.run_ranks(2, run, place, ways)
    assert [0, 0] == [one.status for one in done], done
    return [json.loads((place / f"found{rank}.json").read_text()) for rank in range(2)]


def check_as_one(place, found, *ways):
    """
    Three micro-batches on each of two processes, the last of an epoch short and one of them empty, are one batch of
    six: 20 losses within 1e-5 and the same figures.
    """
    for tied in {way.endswith("tied") for way in ways}:
        student = llama(tie_word_embeddings=tied)
        alone = trained(place / "alone", place / "ragged", student, hold_out=3, max_steps=STEPS, **WHOLE)
        wanted, figures = losses(alone), alone.evaluate()
        assert STEPS == len(wanted)
        for rank in found:
            for way in ways:
                if way.endswith("tied") == tied:
                    assert WRAPPERS[way] == rank[way]["wrapper"]
                    assert pytest.approx(wanted, rel=1e-5) == rank[way]["losses"]
                    assert pytest.approx(wanted, rel=1e-5) == rank[way]["logged"]
                    seen = [rank[way]["eval"][name] for name in FIGURES]
                    assert pytest.approx([figures[name] for name in FIGURES], rel=1e-4) == seen


def test_two_processes_have_the_losses_of_one(place):
    """By DDP; and FSDP is refused on CPUs, where accelerate takes the flag and shards nothing."""
    found = pair(place, "ddp")
    check_as_one(place, found, "ddp")
    message = "fsdp is asked for, and accelerate does not shard on cpu, where each process would hold the whole student"
    assert all(rank["refused"].startswith(message) for rank in found)


@pytest.mark.integration
def test_sharded_students_have_the_losses_of_one(place):
    """By accelerate's FSDP2 and by transformers' own, by gloo on CPUs; head and embedding apart, and one."""
    ways = ("ddp, tied", "fsdp2", "fsdp2, tied", "loaded sharded")
    check_as_one(place, pair(place, *ways), *ways)
