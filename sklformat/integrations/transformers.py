"""
SparseKDTrainer: transformers' Trainer, with a cache as its data and distillation as its loss.

Everything else is the Trainer's own: optimizer, schedule, mixed precision, accumulation, DDP, FSDP2, checkpoints, logs.
What of it would quietly spoil a run is refused when the trainer is made.
Shape letters: B sequences, T positions, P = B·T positions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, get_last_checkpoint

from sklformat.cache.reader import Cache
from sklformat.cache.tokens import TokenSource
from sklformat.distill.loader.batches import Targets
from sklformat.distill.loader.conflicts import check_borders, check_same_ids
from sklformat.distill.loader.dataset import SparseLogitDataset
from sklformat.distill.loader.sources import Source, Sources
from sklformat.distill.loader.steps import Steps, StepSampler
from sklformat.distill.losses.kl import IGNORED_LABEL, linear_sparse_kl
from sklformat.distill.models import adapters, outputs
from sklformat.distill.models.devices import to_device
from sklformat.distill.models.heads import run_to_head
from sklformat.distill.student.inputs import check_made_by, check_method, check_student
from sklformat.distill.student.processes import Process
from sklformat.distill.student.validation import HeldOut, check_unseen, validate
from sklformat.integrations import checkpoints
from sklformat.integrations.arguments import (
    LossArguments,
    Method,
    check_arguments,
    check_decode,
    check_hold_out,
    check_launched,
    precision_note,
)
from sklformat.integrations.inputs import inputs_of, moved, weigh, with_confidence
from sklformat.integrations.sums import LossSum
from sklformat.progress import say
from sklformat.settings.train import Decode, Divergence


class SparseKDTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """
    Trains a student from a cache; arguments that are not named here are the Trainer's own.

    Each process has its share of ``SparseLogitDataset``'s stream.  ``train(resume_from_checkpoint=…)`` resumes exactly:
    bit for bit on one process, and with the same sequences in each step on any number of them that makes as large a
    step.  A step's loss is the mean over the positions that count in all its micro-batches and processes, whatever
    ``average_tokens_across_devices`` says, so that its gradient is that of one large batch.

    The log names the training loss for what it is too: ``kl_to_records``, or ``cross_entropy`` for method "ce"; with
    ``ce_weight``, other methods and the balancing loss of experts it is ``loss`` alone.  ``evaluate()`` gives the
    figures of ``student.validation.Validation`` that there are, as ``eval_lm_loss``, ``eval_kl_to_records``,
    ``eval_kl``, ``eval_calibration_error`` and so on, and as ``eval_loss`` their mixture alpha lm_loss + (1 - alpha)
    kl_to_records, alpha being ``ce_weight``, 1 for method "ce".

    Args:
        model: A causal language model of transformers or peft; None: ``model_init`` makes it.
        args: The order has ``data_seed``, else ``seed``; ``train_sampling_strategy="sequential"`` keeps the cache's.
            Without ``dataloader_drop_last`` the last step of an epoch has the sequences that are left.
        cache: A directory, one shard, a URL, a cache that ``skl.open`` opened, ``Teachers``, or a list of these.
        weights: As for ``SparseLogitDataset``, of a list.
        hold_out: Sequences at the end of the one cache that are evaluated on, and never trained on.
        eval_cache: Another cache to evaluate on instead, or several by name: their figures are ``eval_name_…``.
        method, ce_weight, divergence, temperature, lr_ratio, easy_percentile: As ``LossArguments`` has them; with an
            lr_ratio the host decodes the records.
        tokens: The training program's own tokens, as for ``SparseLogitDataset``; None: those of the cache.
        window: As for ``SparseLogitDataset``; None: for a ragged cache the sequences of a step, else none.
        decode: As for ``SparseLogitDataset``; "auto": "cuda" where a GPU trains and knows the records.
        processing_class: The student's tokenizer; saved with the model, and compared with the cache's.
        others: The Trainer's own.

    Raises:
        ValueError: An argument is out of range, contradicts another one, or would quietly spoil the run; the loss
            cannot train the model's head; sequences to evaluate on are trained on; by ``train``: the loss is no longer
            finite.
        SettingsError: Records and method, tokenizer and cache, or student and cache do not belong together.
        ResumeError: By ``train``: the checkpoint was made with other data or settings; says both values.
        FormatError, AlignmentError, FileNotFoundError: As ``SparseLogitDataset``.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        cache: Source | Sequence[Source],
        weights: Sequence[float] | None = None,
        hold_out: int = 0,
        eval_cache: Path | str | Cache | Mapping[str, Path | str | Cache] | None = None,
        method: Method = "random_sampling",
        ce_weight: float = 0.0,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        lr_ratio: float = 1.0,
        easy_percentile: float = 50.0,
        tokens: Any = None,
        window: int | None = None,
        decode: Decode = "auto",
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args  # as the Trainer does
        check_arguments(args, others)
        self.loss = LossArguments(method=method, ce_weight=ce_weight, divergence=divergence, temperature=temperature,
                                  lr_ratio=lr_ratio, easy_percentile=easy_percentile)  # fmt: skip
        check_decode(decode, self.loss)
        self.sources, part = Sources.of(cache, tokens, None), None
        if hold_out:
            part = check_hold_out(cache, self.sources.sizes[0], hold_out, eval_cache)
            cache = self.sources.caches[0]
            self.sources = Sources.of(cache, tokens, part)
        self.source, self._parts = cache, {"tokens": tokens, "sequences": part}
        for each in self.sources.caches:
            check_method(each, method)
            check_borders(each)
            if processing_class is not None:
                check_made_by(processing_class, each)
        self.weights, self.window = weights, window
        self._share = {"rank": args.process_index, "world_size": args.world_size}
        self._decode, note = self.sources.decoding("cpu" if method == "ce" or lr_ratio != 1 else decode, args.device)
        if note and args.process_index == 0:
            say(f"note: {note}")
        self._resumed: dict[str, Any] | None = None
        self._check_records: Callable[[], None] | None = None  # of the last micro-batch
        self.sampler: StepSampler  # of the last loader
        self._losses = LossSum()
        if part is not None:
            held_out: Any = self._held_out(cache, args, range(part.stop, part.stop + hold_out), tokens)
        elif isinstance(eval_cache, Mapping):
            held_out = {name: self._held_out(each, args) for name, each in eval_cache.items()}
        else:
            held_out = None if eval_cache is None else self._held_out(eval_cache, args)
        super().__init__(model, args, eval_dataset=held_out, processing_class=processing_class, **others)
        # A step's loss is its share of the mean over all micro-batches; a loss that is not finite stops the run.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.args.logging_nan_inf_filter = False
        check_launched(self.args, self.accelerator, self.model)
        if model is not None:
            self._check_student(self.model)
        self.add_callback(_Epochs(self))

    def call_model_init(self, trial: Any = None) -> Any:
        """The Trainer's own, checked."""
        model = super().call_model_init(trial)
        self._check_student(model)
        return model

    def _check_student(self, model: Any) -> None:
        for cache in self.sources.caches:
            check_student(model, cache)
        notes = (outputs.balance_note(adapters.unwrapped(outputs.unwrapped(model))), precision_note(model))
        for note in filter(None, notes if self.is_world_process_zero() else ()):
            say(f"note: {note}")

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The stream's share of this process, by steps that can be skipped without reading them; see ``Steps``."""
        args, window = self.args, self.window
        shuffled = getattr(args, "train_sampling_strategy", "random") == "random"
        if window is None and shuffled and any(cache.header.seq_len == 0 for cache in self.sources.caches):
            window = self.sequences_per_step
        dataset = SparseLogitDataset(
            self.source,
            batch_size=self._train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=shuffled,
            tail="drop" if args.dataloader_drop_last else "pad",
            weights=self.weights,
            window=window,
            prefetch=0,
            decode=self._decode,
            **self._parts,
            **self._share,
        )
        with_confidence(dataset, self.loss, is_first=self.is_world_process_zero())
        self.sampler = StepSampler(dataset, args.gradient_accumulation_steps)
        workers = {
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
        }
        return DataLoader(
            Steps(dataset),
            batch_sampler=self.sampler,
            collate_fn=functools.partial(inputs_of, loss=self.loss, isolated=dataset.isolated),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            **(workers if args.dataloader_num_workers else {}),
        )

    @property
    def sequences_per_step(self) -> int:
        """Sequences of a step, over its micro-batches and all processes."""
        return int(self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of a step, none where there is none left; the positions that count in all processes'."""
        if self.control.should_training_stop:
            return [], None
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.sampler.taken += len(batches)
        self._losses.steps += bool(batches)
        weigh(batches, self.loss, Process(self.args.process_index, self.args.world_size, device))
        total = torch.stack([batch["counted"] for batch in batches]).sum() if batches else torch.tensor(0)
        return batches, self.accelerator.reduce(to_device(total, device), reduction="sum")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        there, self._check_records = moved(inputs, self.args.device)
        return there

    def check_records(self) -> None:
        """Refuse to learn from a bad record that a GPU found; of earlier micro-batches the next one tells."""
        if self._check_records is not None:
            self._check_records()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """
        The share of a micro-batch in its step's loss, times the number of processes, whose gradients are averaged.

        Without ``num_items_in_batch``, the positions that count in the whole step, the mean of this micro-batch alone.

        Raises:
            ValueError: Outputs are asked for.
        """
        if return_outputs:
            raise ValueError("the chunked loss makes no logits that could be returned; call the model for them")
        total = inputs["counted"] if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        labels_P = inputs["labels"].flatten()
        hidden_PD, head, balance = run_to_head(model, inputs["input_ids"], inputs.get("position_ids"))
        with self.accelerator.autocast():
            loss = linear_sparse_kl(
                hidden_PD,
                head,
                Targets(inputs["token_ids"], inputs["probs"], inputs["offsets"]),
                labels_P=labels_P,
                position_weights_P=inputs.get("weights", (labels_P != IGNORED_LABEL).float()),
                normaliser=total,
                **self.loss.of_loss,
            )
        if num_items_in_batch is None:
            return loss + balance
        self._losses.add(loss)
        share = to_device(inputs["counted"], loss.device) / total.clamp(min=1)
        return (loss + balance * share) * self.accelerator.num_processes

    def _settle(self) -> float:
        """The sum of the losses since the last line of the log, each of them a finite number."""
        total = self._losses.settle(functools.partial(self.accelerator.reduce, reduction="sum"))
        if not math.isfinite(total):
            last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
            kept = "there is no checkpoint" if last is None else f"the last checkpoint is {last}"
            raise ValueError(
                f"{self.args.output_dir}: by step {self.state.global_step} a loss was no finite number; {kept}; train "
                "from there, or again, with a lower learning_rate"
            )
        return total

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """The Trainer's own, with the training loss under its name; the last line, too, is of a finite loss."""
        if "train_loss" in logs:
            self._settle()
        if "loss" in logs and self._losses.steps:
            logs = self.loss.named(logs, self._settle() / self._losses.steps)
            self._losses.clear()
        super().log(logs, *rest, **named)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Held-out sequences: those of the trainer, by name where there are several, or of another cache."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(self.eval_dataset, Mapping) and isinstance(chosen, str):
            chosen = self.eval_dataset.get(chosen, chosen)
        if chosen is None:
            raise ValueError("nothing to evaluate on: make the trainer with hold_out or eval_cache")
        return chosen if isinstance(chosen, HeldOut) else self._held_out(chosen, self.args)

    def _held_out(
        self, cache: Any, args: TrainingArguments, part: range | None = None, tokens: TokenSource | None = None
    ) -> HeldOut:
        held_out = HeldOut(cache, part, batch_size=args.eval_batch_size, tokens=tokens, **self._share)
        check_same_ids(held_out.cache, self.sources.caches[0])
        if part is None or len(self.sources.caches) > 1:  # of one cache they are others by their numbers
            trained = zip(self.sources.caches, self.sources.spans, strict=True)
            check_unseen(held_out.cache, held_out.sequences, trained, self.sources.where)
        return held_out

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,  # noqa: ARG002  there are no predictions
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The figures of ``Validation``; of held-out sequences alone."""
        if not isinstance(dataloader, HeldOut):
            raise TypeError(f"{description} over a {type(dataloader).__name__}; it is over held-out sequences alone")
        if self.is_in_train:
            self._settle()
        # Over no batches it brings the model to its place and into evaluation mode.
        output = super().evaluation_loop([], description, True, ignore_keys, metric_key_prefix)
        self.callback_handler.eval_dataloader = dataloader
        with self.accelerator.autocast():
            found = validate(
                self.model,
                dataloader,
                forward=lambda batch: run_to_head(
                    self.model, batch.input_ids, batch.position_ids if dataloader.isolated else None
                )[:2],
                device=self.args.device,
                reach=lambda _: self.callback_handler.on_prediction_step(self.args, self.state, self.control),
            )
        figures = {name: value for name, value in dataclasses.asdict(found).items() if value is not None}
        figures["loss"] = self.loss.mixture(found.lm_loss, found.kl_to_records)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return output._replace(metrics=output.metrics | metrics, num_samples=found.num_sequences)

    def train(self, resume_from_checkpoint: Path | str | bool | None = None, *rest: Any, **named: Any) -> Any:
        """The Trainer's own; a checkpoint that is resumed says where the stream stood."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        self._resumed = None
        if isinstance(resume_from_checkpoint, str | Path) and not self.args.ignore_data_skip:
            self._resumed = checkpoints.read(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *rest, **named)

    def _save_checkpoint(self, model: Any, trial: Any, *rest: Any, **named: Any) -> None:
        self._settle()  # a broken student replaces no checkpoint
        if self.args.should_save:
            directory = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            settings = self._settings(self.sampler) | {checkpoints.WHOLE: not self.args.save_only_model}
            checkpoints.write(directory, self.sampler.state_dict(), settings)
        super()._save_checkpoint(model, trial, *rest, **named)

    def _settings(self, sampler: StepSampler) -> dict[str, Any]:
        """What the sequences of a step and their loss depend on, beside the stream."""
        return {
            **dataclasses.asdict(self.loss),
            "sequences_per_step": self.sequences_per_step,
            "steps_per_epoch": sampler.steps_per_epoch,
        }

    def begin(self) -> None:
        """Stand where the Trainer begins or resumes, and make sure that the checkpoint stood there."""
        sampler, saved = self.sampler, self._resumed
        self._losses.clear()
        sampler.stand_after(self.state.global_step)
        if saved is None:
            sampler.taken = 0
            return
        earlier = dataclasses.asdict(LossArguments())  # of versions that do not say it
        checkpoints.check_settings(earlier | saved["settings"], self._settings(sampler))
        sampler.check_stands(saved["stream"])


class _Epochs(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Tells the trainer of each epoch before its first batch is made, and of each step before it is taken."""

    def __init__(self, trainer: SparseKDTrainer) -> None:
        self._trainer, self._begun = trainer, False

    def on_train_begin(self, _args: object, state: Any, control: Any, **__: object) -> None:
        self._trainer.begin()
        self._begun = False
        # The Trainer looks only after a step, and so takes one more where a finished run is resumed.
        control.should_training_stop = state.global_step >= state.max_steps

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self._trainer.check_records()

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        if self._begun:
            self._trainer.sampler.next_epoch()
        self._begun = True
