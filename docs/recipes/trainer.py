"""
Train a transformers student from a cache with transformers' own Trainer, whose every argument is a flag.

    python trainer.py --cache CACHE --student STUDENT --output_dir RUN --max_steps 1000

A run that was stopped resumes at its last checkpoint, or at ``--resume_from_checkpoint``.  Under torchrun each process
takes its share of every step.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sklformat.integrations.transformers import SparseKDTrainer


@dataclass
class Data:
    """What the Trainer does not know of."""

    cache: str
    student: str
    hold_out: int = 16


def main() -> None:
    data, args = HfArgumentParser((Data, TrainingArguments)).parse_args_into_dataclasses()
    # Whatever type it was saved in: in bfloat16 small updates would be rounded away; --bf16 is for the matrix products.
    student = AutoModelForCausalLM.from_pretrained(data.student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(data.student)
    trainer = SparseKDTrainer(student, args, cache=data.cache, hold_out=data.hold_out, processing_class=tokenizer)
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or last)
    trainer.save_model()
    if data.hold_out:
        trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
