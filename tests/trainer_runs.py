"""Students of SparseKDTrainer, here and as several processes: their losses, figures and refusals, as plain values."""

import json
import os
import warnings
from pathlib import Path

import torch
from loader_data import VOCAB
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainingArguments

from sklformat.integrations.transformers import SparseKDTrainer

QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
STEPS = 20
# Sequences of a step and of an epoch's last one: three micro-batches of one, of which the last process has fewer.
SPLIT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
WHOLE = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}


def arguments(out, **changes):
    """A TrainingArguments for a short run that logs each step and saves nothing."""
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(out), **QUIET | defaults | {"learning_rate": 1e-2} | changes)


def llama(**changes):
    """A Llama of two layers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def gpt2():
    """A GPT-2 with dropout and a tied head."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32))


def losses(trainer, name="loss"):
    """A figure of every line of the log that has it."""
    return [line[name] for line in trainer.state.log_history if name in line]


def trained(out, cache, student=None, **changes):
    """A trainer after its run."""
    own = {name: changes.pop(name) for name in ("hold_out", "eval_cache", "method", "ce_weight") if name in changes}
    args = arguments(out, **changes)
    if args.fsdp:
        take_for_accelerators(args)
    trainer = SparseKDTrainer(student or llama(), args, cache=cache, **own)
    trainer.train()
    return trainer


def run(place, ways):
    """What one of several processes comes to in each of these ways, among them DDP and both to shard a student."""
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    cache, out = place / "ragged", place / f"out{os.environ['RANK']}"
    found = {}
    for way in ways:
        tied = way.endswith("tied")
        student = sharded(place) if way == "loaded sharded" else llama(tie_word_embeddings=tied)
        fsdp = {"fsdp": True, "fsdp_config": {"version": 2}} if way.startswith("fsdp2") else {}
        trainer = trained(out, cache, student, hold_out=3, max_steps=STEPS, **SPLIT, **fsdp)
        found[way] = {"losses": losses(trainer, "kl_to_records"), "logged": losses(trainer), "eval": trainer.evaluate()}
        found[way]["wrapper"] = type(trainer.model_wrapped).__name__
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # which accelerate leaves there
    try:
        SparseKDTrainer(llama(), arguments(out, fsdp=True, fsdp_config={"version": 2}), cache=cache)
    except ValueError as error:
        found["refused"] = str(error)
    Path(place / f"found{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def take_for_accelerators(args):
    """Have accelerate take these processes for such with accelerators: it shards nowhere else; torch does, by gloo."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    assert args.parallel_mode.value == "distributed"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def sharded(place):
    """A student that transformers itself shards while it loads it."""
    from transformers.distributed import DistributedConfig

    return LlamaForCausalLM.from_pretrained(place / "llama", distributed_config=DistributedConfig(fsdp_size=2))
