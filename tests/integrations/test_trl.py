"""TRL 1.16 itself: docs/recipes/trl_sft.py in its SFTTrainer, and SparseKDTrainer with its SFTConfig."""

import json

import forked
import pytest
import tiny
import torch
from loader_data import VOCAB, write_cache
from trl_runs import run

from sklformat.distill import SparseLogitDataset, linear_sparse_kl, output_head

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cache and a student in a directory."""
    directory = tmp_path_factory.mktemp("trl")
    write_cache(directory / "cache")
    torch.manual_seed(0)
    tiny.write_model(directory / "student", tiny.train_tokenizer(tiny.make_documents()), vocab_size=VOCAB)
    return directory


def logged(place, out, ranks, *words):
    done = forked.run_ranks(
        ranks,
        run,
        place / "cache",
        place / "student",
        place / out,
        "--steps",
        3,
        "--log-every",
        1,
        "--hold-out",
        5,
        *words,
    )
    assert [0] * ranks == [one.status for one in done], done
    return json.loads(done[0].stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(place):
    """Four sequences a step on one process."""
    return logged(place, "alone", 1, "--batch-size", 4)


def figures(log, name):
    return [line[name] for line in log if name in line]


def test_evaluation_is_the_loss_of_what_is_held_out(place):
    """After steps without effect, ``eval_loss`` is ``linear_sparse_kl`` on the five held-out sequences."""
    from transformers import AutoModelForCausalLM

    log = logged(place, "still", 1, "--batch-size", 4, "--learning-rate", 0)
    student = AutoModelForCausalLM.from_pretrained(place / "student")
    (batch,) = SparseLogitDataset(place / "cache", 5, shuffle=False, sequences=range(18, 23))
    hidden = student.base_model(batch.input_ids).last_hidden_state.flatten(0, 1)
    expected = linear_sparse_kl(hidden, output_head(student), batch.targets).item()
    assert figures(log, "eval_loss") == pytest.approx([expected] * 3, rel=1e-5)


@pytest.mark.parametrize(("ranks", "words"), [(1, ("--batch-size", 2, "--accumulation", 2)), (2, ("--batch-size", 2))])
def test_micro_batches_and_processes_add_up(place, alone, ranks, words):
    """Two micro-batches, or two processes: losses and norms of gradients of the same four sequences at once."""
    log = logged(place, f"divided-{ranks}", ranks, *words)
    for name in ("loss", "grad_norm"):
        assert len(figures(alone, name)) == 3
        assert figures(log, name) == pytest.approx(figures(alone, name), rel=1e-4)


def test_sparse_kd_trainer_takes_an_sft_config(place):
    """Its settings of training count, those of text are not read."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    from sklformat.integrations.transformers import SparseKDTrainer

    student = AutoModelForCausalLM.from_pretrained(place / "student")
    config = SFTConfig(
        str(place / "kd"),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = SparseKDTrainer(student, config, cache=place / "cache", hold_out=5)
    trainer.train()
    log = trainer.state.log_history
    assert len(figures(log, "kl_to_records")) == 2
    assert trainer.evaluate()["eval_num_sequences"] == 5
