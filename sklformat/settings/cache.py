"""The settings of ``sklformat cache``."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sklformat.files.places import is_url
from sklformat.format.columns import STARTS, check_names
from sklformat.format.layout import COLUMNS
from sklformat.sampler import MAX_COUNT_ROUNDS, MAX_K, MAX_ROUNDS, check_temperature
from sklformat.settings.files import TextFiles
from sklformat.settings.limits import check_least
from sklformat.settings.text import Bos, Packing, SpecialTokens, Truncate

ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]

_RUN_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OF_VLLM = ("tensor_parallel", "gpu_memory")
# What engine vllm cannot do as it is asked, and why.
_NOT_OF_VLLM = {
    "isolate_documents": "needs a mask of attention within a sequence, which engine vllm has not",
    "adapter_base": "belongs to an adapter, engine vllm runs whole models",
    "batch_size": "is of a fixed grid of batches, engine vllm makes its own",
    "device": "is not for engine vllm to choose: it runs on what it was built for",
    "device_map": "is not for engine vllm: tensor_parallel divides a teacher between its devices",
}


@dataclass(frozen=True, kw_only=True)
class CacheConfig(TextFiles):
    """
    Run a teacher over text and keep sparse records of its predictions. If stopped, the same command resumes it.

    Many GPUs: torchrun --nproc-per-node 8 -m sklformat cache …, on one machine or many.
    """

    teacher: str
    """Teacher: a directory saved by transformers' save_pretrained, or a Hugging Face name, or name@revision. Its tokenizer is used."""  # noqa: E501

    out: str | Path
    """Cache: a directory, or a URL (s3://, gs://, hf://, …). One that a stopped run left is resumed."""

    work_dir: Path | None = None
    """With a URL: local directory for the shards that are not uploaded yet."""

    text: tuple[Path, ...] = ()
    """Text to run over: plain text, .jsonl, .json, .parquet, .arrow, also compressed (.gz, .zst), and directories of them."""  # noqa: E501

    dataset: tuple[str, ...] = dataclasses.field(default=(), metadata={"once": True})
    """Hugging Face dataset to run over instead: name and, where it has several, configuration; or a directory: one that save_to_disk wrote, or of data files."""  # noqa: E501

    dataset_split: str = "train"
    """Part of the dataset."""

    tokens: Path | None = None
    """Tokens to run over instead, made earlier with the teacher's tokenizer: a token store, or a RaggedMmap of mmap_ninja."""  # noqa: E501

    bos: Bos = "auto"
    """Where the token goes that begins a text: before each document, before each packed sequence (window), nowhere; auto: where the tokenizer itself puts it."""  # noqa: E501

    special_tokens: SpecialTokens = "text"
    """What the name of a special token inside text is: characters like any other (text), or the token (keep), as in chats that a template rendered already."""  # noqa: E501

    isolate_documents: bool = False
    """Keep packed documents apart: positions begin at 0 with each, attention stays within it, nothing predicts its first token. Stores document_start."""  # noqa: E501

    author: tuple[str, ...] = dataclasses.field(default=(), metadata={"once": True})
    """Who wrote the text, where a model did: "teacher", or its name or fingerprint; then how it was sampled, as temperature=0.7. Kept in the headers; train says where author and teacher differ."""  # noqa: E501

    seq_len: int = 1024
    """Positions in a sequence, at most where each document is one; the student must train on the same."""

    packing: Packing = "auto"
    """packed: documents fill sequences one after the other; single: each is a sequence of its own length; auto: chats are single, text is packed."""  # noqa: E501

    truncate: Truncate = "end"
    """What a document loses that is longer than seq_len and a sequence of its own: its end or its start."""

    num_sequences: int | None = None
    """How many sequences to cache. None: all that the text gives."""

    first_sequence: int = 0
    """Number of the packed sequence that becomes sequence 0 of the cache."""

    sampler: Literal["multinomial", "systematic", "topk", "topp"] = "systematic"
    """How records are taken from the teacher's distribution. multinomial (the paper's) and systematic (evenly spaced
    draws, less noise) are unbiased, the others are not."""

    rounds: int = 50
    """Draws per position, for multinomial and systematic."""

    k: int | None = None
    """Tokens kept per position, for topk; the most that are kept, for topp."""

    p: float | None = None
    """Share of the probability kept, in (0, 1], for topp."""

    proposal_temperature: float = 1.0
    """Exponent t of the proposal q ∝ p^t that tokens are drawn from; 1: the teacher's distribution, kept as counts."""

    unbiased_weights: bool = False
    """With a proposal: weights p / q / rounds as they are, unbiased; else divided by their sum, as in the paper."""

    seed: int = 0
    """Seed of the draws."""

    packing_seed: int = 0
    """Seed of the order in which documents are packed; the student must use the same."""

    sequences_per_shard: int = 1024
    """Sequences in one file."""

    batch_size: int = 8
    """Sequences in one forward pass of the teacher. Logits depend on it in their last bits."""

    dtype: ModelDtype = "auto"
    """Type of the teacher's weights and logits; auto: bfloat16 on a GPU, float32 on the CPU."""

    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1, …; auto: the GPU if there is one. Each process takes a GPU of its own, which draws counts itself."""  # noqa: E501

    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the teacher; vllm: any model that vLLM serves, faster, but no other run repeats the bytes (docs/engines.md)."""  # noqa: E501

    tensor_parallel: int = 1
    """Parts that one teacher is divided into: on as many processes of torchrun; with engine vllm on as many devices."""

    gpu_memory: float | None = None
    """With engine vllm: share of a GPU's memory that it takes, in (0, 1]. None: what vLLM takes."""

    device_map: Literal["one", "auto"] = "one"
    """auto: spread a teacher that is too large for one GPU over all GPUs of the process (needs accelerate)."""

    trust_remote_code: bool = False
    """Run the code that came with the teacher. Look at it first."""

    adapter_base: str | None = None
    """If the teacher is an adapter (peft): the model that it belongs to; none: as the adapter says."""

    store_tokens: bool = True
    """Whether the cache holds the tokens as well (2 or 3 bytes per position), so that training needs no text."""

    columns: tuple[str, ...] = ()
    """More to store, separated by commas: label_logprob and entropy (2 bytes per position each), record_logprob (2 bytes per record), document_start (a bit per token)."""  # noqa: E501

    ring_mib: int = 64
    """Shared memory between the teacher and the writer process, MiB."""

    run: str | None = None
    """Of processes that no torchrun started, such as tasks of a Slurm array: name of the run, the same for all. They share --out (or --work-dir), start when they can, and are started again when they died."""  # noqa: E501

    rank: int | None = None
    """With --run: number of this process, from 0. Shard k is the work of rank k mod world_size."""

    world_size: int | None = None
    """With --run: number of processes, the same for all."""

    finish: bool = False
    """With --run, instead of --rank and --world-size: write the manifest if all ranks are done, which the last one does by itself, else say which are not."""  # noqa: E501

    keep_versions: bool = False
    """Resume a cache that other versions of torch, transformers or sklformat began: sound, but not repeatable bit for bit."""  # noqa: E501

    def __post_init__(self) -> None:
        if sum((bool(self.text), bool(self.dataset), self.tokens is not None)) != 1:
            raise ValueError("give one of --text, --dataset and --tokens (a token store)")
        if self.tokens is not None and self.special_tokens != "text":
            raise ValueError("special_tokens belongs to text or a dataset; tokens are made already")
        TextFiles.__post_init__(self)
        if self.tokens is not None and self.field is not None:
            raise ValueError("field belongs to text or a dataset; tokens have none")
        if wrong := [word for word in self.author[1:] if not all(word.partition("="))]:
            raise ValueError(f"author: after the name come settings as NAME=VALUE, got {', '.join(wrong)}")
        names = {name for given in self.columns for name in given.split(",")}
        names |= {STARTS} if self.isolate_documents else set()
        check_names(names)
        object.__setattr__(self, "columns", tuple(name for name in COLUMNS if name in names))
        check_least(self, 1, "seq_len", "sequences_per_shard", "batch_size", "ring_mib", "num_sequences")
        if is_url(self.out) != (self.work_dir is not None):
            raise ValueError(
                f"out {self.out} is a URL: give work_dir, a directory here for shards that are not uploaded yet"
                if self.work_dir is None
                else f"work_dir belongs to an out that is a URL, got {self.out}"
            )
        if self.work_dir is not None and ":/" in str(self.work_dir):
            raise ValueError(f"work_dir {self.work_dir} is a URL, must be a directory here")
        self._check_sampler()
        check_engine(self, divides=True)
        if self.engine == "transformers" and self.tensor_parallel > 1 and self.device_map != "one":
            raise ValueError("tensor_parallel divides a teacher among processes, device_map among GPUs; give one")
        self._check_run()

    def _check_run(self) -> None:
        is_rank = self.rank is not None or self.world_size is not None
        if self.run is None:
            if is_rank or self.finish:
                raise ValueError("rank, world_size and finish belong to a run: give run, its name")
            return
        if not _RUN_NAME.fullmatch(self.run):
            raise ValueError(f"run must be 1 to 64 letters, digits, dots, dashes and underscores, got {self.run!r}")
        if self.finish and is_rank:
            raise ValueError("finish is not the work of a rank: leave out rank and world_size")
        if self.finish:
            return
        if self.rank is None or self.world_size is None or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"run {self.run} needs world_size, and rank in 0..world_size - 1; got rank {self.rank} and world_size "
                f"{self.world_size}"
            )

    def _check_sampler(self) -> None:
        if self.draws and not 1 <= self.rounds <= MAX_ROUNDS:
            raise ValueError(f"rounds must be >= 1 and <= {MAX_ROUNDS} for sampler {self.sampler}, got {self.rounds}")
        if self.sampler == "topk" and (self.k is None or not 1 <= self.k <= MAX_K):
            raise ValueError(f"sampler topk needs k in 1..{MAX_K}, got {self.k}")
        if self.sampler == "topp" and (self.p is None or not 0 < self.p <= 1):
            raise ValueError(f"sampler topp needs p in (0, 1], got {self.p}")
        if self.draws and (self.k is not None or self.p is not None):
            raise ValueError(f"k and p belong to topk and topp, not to sampler {self.sampler}")
        if not self.draws and self.proposal_temperature != 1:
            raise ValueError(f"sampler {self.sampler} draws nothing, so proposal_temperature must be 1")
        check_temperature(self.proposal_temperature)
        if self.unbiased_weights and self.proposal_temperature == 1:
            raise ValueError(
                "unbiased_weights belongs to a proposal_temperature other than 1; at 1 nothing is weighted"
            )

    @property
    def draws(self) -> bool:
        """Whether records are drawn, in ``rounds`` rounds, rather than chosen."""
        return self.sampler in ("multinomial", "systematic")

    @property
    def kind(self) -> str:
        """Kind of the records: "counts" where these say it all, else "ratios"."""
        counted = self.draws and self.proposal_temperature == 1 and self.rounds <= MAX_COUNT_ROUNDS
        return "counts" if counted else "ratios"

    @property
    def directory(self) -> Path:
        """Where shards are written here."""
        return Path(self.out) if self.work_dir is None else self.work_dir

    @property
    def url(self) -> str | None:
        """Where they are uploaded to, if they are."""
        return None if self.work_dir is None else str(self.out)

    @property
    def teacher_name(self) -> str:
        """Path or name of the teacher, without its revision."""
        return self._teacher[0]

    @property
    def revision(self) -> str | None:
        """Revision of a teacher on the hub; None: its newest."""
        return self._teacher[1]

    @property
    def _teacher(self) -> tuple[str, str | None]:
        return name_and_revision(self.teacher)

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of ``skl.draw`` that say how; rounds, sequence and position are not among them."""
        return {
            "sampler": self.sampler,
            "proposal_temperature": self.proposal_temperature,
            "k": self.k,
            "p": self.p,
            "seed": self.seed,
            "self_normalise": not self.unbiased_weights,
        }


def name_and_revision(teacher: str) -> tuple[str, str | None]:
    """A model's path or name, and the revision behind it, where there is one: of name@revision."""
    name, _, revision = teacher.partition("@")
    return (teacher, None) if not revision or Path(teacher).exists() else (name, revision)


def check_engine(config: Any, *, divides: bool = False) -> None:
    """
    Make sure that settings are of the engine that a verb runs its teacher by.

    Args:
        config: The settings.
        divides: Whether the verb divides a teacher of transformers too.

    Raises:
        ValueError: One belongs to another engine.
    """
    check_least(config, 1, "tensor_parallel")
    if config.gpu_memory is not None and not 0 < config.gpu_memory <= 1:
        raise ValueError(f"gpu_memory must be in (0, 1], got {config.gpu_memory}")
    names = _OF_VLLM[divides:] if config.engine == "transformers" else _NOT_OF_VLLM
    fields = [f for f in dataclasses.fields(config) if f.name in names]
    given = [f.name for f in fields if getattr(config, f.name) != f.default]
    if given and config.engine == "transformers":
        raise ValueError(f"{given[0]} belongs to engine vllm, engine is transformers")
    if given:
        raise ValueError(f"{given[0]} {_NOT_OF_VLLM[given[0]]}; leave it out, or take engine transformers")
