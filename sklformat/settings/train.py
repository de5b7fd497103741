"""The settings of ``sklformat train``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from sklformat.settings.limits import check_least
from sklformat.settings.text import Packing, Truncate

Method = Literal[
    "ce", "random_sampling", "topk", "topk_normalised", "label_smoothing", "ghost_token", "naive_fix", "full"
]
Divergence = Literal[
    "forward_kl", "reverse_kl", "forward_reverse_kl", "jsd", "mse", "l1", "total_variation"
]  # fmt: skip
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]
Decode = Literal["auto", "cpu", "cuda"]
ScheduleName = Literal["cosine", "linear", "constant", "wsd"]

_DIVERGENCE_NAMES = {
    "forward_kl": "KL",
    "reverse_kl": "reverse KL",
    "forward_reverse_kl": "mean of KL and reverse KL",
    "jsd": "Jensen-Shannon divergence",
    "mse": "squared distance",
    "l1": "L1 distance",
    "total_variation": "total variation",
}
_OF_TOKENS = ("packing", "packing_seed", "truncate")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Train a student. If stopped, the same command resumes from the last checkpoint."""

    out: Path
    """Directory of the run: checkpoint, metrics.jsonl, and at the end model/ in transformers' layout."""

    cache: tuple[str | Path, ...] = ()
    """Caches of teacher records to learn from, directories or URLs; methods ce and full take their tokens only."""

    cache_weights: tuple[float, ...] = field(default=(), metadata={"once": True})
    """Of several caches: how much of the stream is of each, such as .7 .3; the default: their numbers of sequences."""

    window: int = 0
    """Shuffle within windows of this many sequences; 0: all, or a step's where lengths differ. Only with --cache."""

    hold_out: int = 0
    """Sequences at the end of each cache that training never sees. Only with --cache."""

    tokens: Path | None = None
    """Token store to learn from instead of a cache (methods ce and full)."""

    seq_len: int = 0
    """Positions per sequence; only with --tokens; a cache knows its own."""

    packing_seed: int = 0
    """Seed of the order in which documents are packed; only with --tokens."""

    packing: Packing = "auto"
    """With --tokens: whether documents fill sequences or each is one, as sklformat cache has it."""

    truncate: Truncate = "end"
    """With --tokens: what a document loses that is longer than seq_len and a sequence of its own."""

    isolate_documents: bool = False
    """With --tokens: keep packed documents apart, as sklformat cache has it. A cache says itself whether it is so."""

    method: Method = "random_sampling"
    """What the student learns from. full: a teacher that runs alongside. topk and the four after it: a Top-K cache."""

    divergence: Divergence = "forward_kl"
    """How far the student is from what the method says. Sampled records stay unbiased with forward_kl and mse alone."""

    temperature: float = 1.0
    """Divides the logits of student and teacher, the loss times its square; with methods full and topk_normalised."""

    lr_ratio: float = 1.0
    """Rate of hard tokens over that of easy ones, by how sure the teacher is of the text's token; their mean stays."""

    easy_percentile: float = 50.0
    """With --lr-ratio: percentile of a step's confidences, 0..100, above which tokens are easy."""

    teacher: str | None = None
    """Teacher that runs alongside the student, path or name of a transformers model; only with method full."""

    student: str | None = None
    """Student to start from: path or name of a transformers model, or a finished run; none: a new Llama as below."""

    tokenizer: str | None = None
    """Tokenizer of the student, path or name (a teacher's directory has one); none: that of --student or --teacher."""

    trust_remote_code: bool = False
    """Run the code that came with student, teacher or tokenizer. Look at it first."""

    adapter_base: str | None = None
    """Where student or teacher is an adapter (peft): the model that it belongs to; none: as the adapter says."""

    hidden_size: int = 256
    """Width of a new Llama."""

    num_layers: int = 4
    """Layers of a new Llama."""

    num_heads: int = 4
    """Attention heads of a new Llama; must divide hidden_size."""

    batch_size: int = 8
    """Sequences per micro-batch, on each process."""

    accumulation: int = 1
    """Micro-batches per step, on each process."""

    steps: int = 1000
    """Optimizer steps."""

    learning_rate: float = 1e-3
    """Peak learning rate, from which --schedule lets it fall."""

    schedule: ScheduleName = "cosine"
    """How it falls after the warm-up: along a cosine or a line, not at all, or at the end alone (wsd)."""

    warmup: float = 0.04
    """Share of the steps, 0..1, over which the learning rate rises."""

    warmup_steps: int = 0
    """Steps over which it rises, instead of a share; so that more --steps do not change it."""

    min_learning_rate: float = 0.1
    """Share of the peak, 0..1, to which the learning rate falls."""

    decay: float = 0.2
    """With wsd: share of the steps, 0..1, at the end over which it falls, along a line."""

    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices."""

    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"once": True})
    """AdamW's decay rates of the two moments."""

    adam_eps: float = 1e-8
    """AdamW's epsilon."""

    max_grad_norm: float = 1.0
    """Norm above which gradients are scaled down to it; 0: never."""

    ce_weight: float = 0.0
    """Weight of cross-entropy on the text's own next token, 0..1; the rest is the method's."""

    seed: int = 0
    """Seed of the new student's weights and of the order of the sequences."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights and optimizer are of --param-dtype."""

    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1, …; auto: the GPU if there is one."""

    num_workers: int = 0
    """Processes that read batches ahead; 0: none."""

    decode: Decode = "auto"
    """Where records of kind counts become ids and probabilities: cpu, cuda; auto: on the GPU if that is what trains."""

    save_every: int = 200
    """Steps between checkpoints."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    report_to: tuple[Tracker, ...] = ()
    """Where else the lines of metrics.jsonl go; the default: tensorboard, if it is installed."""

    keep_checkpoint: bool = True
    """Keep the checkpoint when the run is finished, so that --steps may grow: three times the size of the weights."""

    eval_every: int = 0
    """Steps between evaluations on sequences that training never sees; 0: none. Needs --hold-out or --eval-cache."""

    eval_cache: str | Path | None = None
    """Another cache of the same tokenizer to evaluate on, instead of the sequences held out."""

    eval_sequences: int = 0
    """Sequences to evaluate on, the first of them, of several caches as many of each; 0: all that are held out."""

    best_by: Literal["lm_loss", "kl", "none"] = "lm_loss"
    """What the model in best/ is the best by: LM loss, KL to the teacher (to the records without entropies); none."""

    shard: bool = False
    """Divide the student and its optimizer between the processes (FSDP2), for students that fit no single GPU."""

    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass instead of keeping them: less memory, a third slower."""

    compile: bool = False
    """Let torch.compile make the kernels of the student's layers: faster on GPUs after a slow first step."""

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights, gradients and AdamW's moments. bfloat16: half the memory, and updates below 1/256 are lost."""

    lora_rank: int = 0
    """Rank of a LoRA adapter (peft) that learns in place of the student's weights; 0: none. Only with --student."""

    lora_alpha: float = 0.0
    """LoRA's alpha, which is divided by the rank; 0: twice the rank."""

    lora_targets: tuple[str, ...] = ()
    """Layers with LoRA, by the ends of their names; all-linear, the default: each linear one below the head."""

    def __post_init__(self) -> None:
        if isinstance(self.cache, str | Path) or self.cache is None:  # in Python one need not be a tuple
            object.__setattr__(self, "cache", () if self.cache is None else (self.cache,))
        if bool(self.cache) == (self.tokens is not None):
            raise ValueError("give exactly one of cache and tokens")
        if self.cache_weights and len(self.cache_weights) != len(self.cache):
            raise ValueError(
                f"cache_weights needs one for each cache, got {len(self.cache_weights)} for {len(self.cache)}"
            )
        if self.tokens is not None and self.method not in ("ce", "full"):
            raise ValueError(f"method {self.method} needs a cache; a token store serves ce and full only")
        if (self.tokens is not None) != (self.seq_len > 0):
            raise ValueError(f"seq_len belongs to tokens and must be >= 1 there, got {self.seq_len}")
        if (self.method == "full") != (self.teacher is not None):
            raise ValueError(f"teacher belongs to method full, got method {self.method} and teacher {self.teacher}")
        of_tokens = [f for f in fields(self) if f.name in _OF_TOKENS and getattr(self, f.name) != f.default]
        if self.cache and of_tokens:
            raise ValueError(f"{of_tokens[0].name} belongs to tokens; a cache says itself how it was packed")
        if not self.cache and (self.window or self.hold_out):
            raise ValueError(f"window and hold_out belong to a cache, got {self.window} and {self.hold_out}")
        if self.decode == "cuda" and self.method in ("ce", "full"):
            raise ValueError(f"decode cuda is about a cache's records, of which method {self.method} reads none")
        if self.method == "ce" and self.ce_weight != 0:
            raise ValueError("ce_weight mixes cross-entropy into another method; method ce is all of it")
        self._check_loss()
        check_least(self, 1, "hidden_size", "num_layers", "num_heads", "batch_size", "accumulation", "steps")
        check_least(self, 1, "save_every", "log_every")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")
        for name in ("warmup", "min_learning_rate", "decay", "ce_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise ValueError("learning_rate must be > 0, weight_decay >= 0")
        if not (all(0 <= beta < 1 for beta in self.betas) and self.adam_eps > 0):
            raise ValueError(f"betas must be in [0, 1) and adam_eps > 0, got {self.betas} and {self.adam_eps}")
        check_least(self, 0, "num_workers", "seed", "window", "hold_out", "max_grad_norm", "warmup_steps")
        self._check_ways()
        self._check_evaluation()

    def _check_loss(self) -> None:
        """What says how the loss is taken, beside the method."""
        if self.method == "ce" and self.divergence != "forward_kl":
            raise ValueError(f"divergence {self.divergence} is from a teacher, of which method ce knows nothing")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {self.temperature}")
        if self.temperature != 1 and self.method not in ("full", "topk_normalised"):
            raise ValueError(
                f"temperature {self.temperature:g} with method {self.method}: records of a teacher at temperature 1 "
                "cannot be brought to another; methods full and topk_normalised have the logits for it"
            )
        if not (0 < self.lr_ratio < math.inf and 0 < self.easy_percentile < 100):
            raise ValueError(
                f"lr_ratio must be > 0 and easy_percentile in (0, 100), got {self.lr_ratio} and {self.easy_percentile}"
            )
        if self.lr_ratio == 1:
            if self.easy_percentile != 50:
                raise ValueError(f"easy_percentile belongs to lr_ratio, got {self.easy_percentile} without")
            return
        if not self.cache and self.teacher is None:
            raise ValueError("lr_ratio needs a teacher's confidence: give a cache, or method full")
        if self.decode == "cuda":
            raise ValueError("lr_ratio reads records on the host before a step; give decode cpu")

    def _check_ways(self) -> None:
        """What says how the student learns, on how many processes, and in what memory."""
        check_least(self, 0, "lora_rank", "lora_alpha")
        if self.lora_rank and self.student is None:
            raise ValueError("lora_rank needs a student; a new Llama has nothing that an adapter could build on")
        if not self.lora_rank and (self.lora_alpha or self.lora_targets):
            raise ValueError(
                f"lora_alpha and lora_targets belong to lora_rank, got {self.lora_alpha} and {self.lora_targets}"
            )
        if self.param_dtype == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError(f"param_dtype bfloat16 needs dtype bfloat16, got {self.dtype}; products are no better")

    def _check_evaluation(self) -> None:
        check_least(self, 0, "eval_every", "eval_sequences")
        if self.eval_every and not self.hold_out and self.eval_cache is None:
            raise ValueError("eval_every needs sequences that training never sees: give hold_out, or an eval_cache")
        if not self.eval_every and (self.eval_cache is not None or self.eval_sequences):
            raise ValueError(
                f"eval_cache and eval_sequences belong to eval_every, got {self.eval_cache} and {self.eval_sequences}"
            )

    @property
    def loss_name(self) -> str:
        """What the training loss is."""
        rates = "" if self.lr_ratio == 1 else f", hard tokens {self.lr_ratio:g} times"
        if self.method == "ce":
            return f"cross-entropy{rates}"
        name = f"{_DIVERGENCE_NAMES[self.divergence]} to the {'teacher' if self.method == 'full' else 'records'}"
        if self.method not in ("full", "random_sampling"):
            name = f"{name} ({self.method})"
        if self.temperature != 1:
            name = f"{self.temperature:g}² {name} at temperature {self.temperature:g}"
        if self.ce_weight:
            name = f"{1 - self.ce_weight:g} {name} + {self.ce_weight:g} cross-entropy"
        return f"{name}{rates}"
