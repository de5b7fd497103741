"""The settings of ``sklformat eval``."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from sklformat.settings.files import TextFiles
from sklformat.settings.limits import check_least
from sklformat.settings.text import Bos, Packing, SpecialTokens, Truncate

_OF_TEXT = (
    "field", "bos", "special_tokens", "isolate_documents", "packing", "truncate", "packing_seed", "num_sequences"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(TextFiles):
    """Measure a student on held-out text or a held-out part of a cache: LM loss, calibration, distance to a teacher."""

    student: str
    """Model to measure, path or name of a transformers model with its tokenizer."""

    tokenizer: str | None = None
    """Tokenizer of the student, path or name; none: the student's own. A teacher without one is taken to share it."""

    seq_len: int = 0
    """With text or tokens: positions per sequence; take what the student was trained with. A cache knows its own."""

    text: tuple[Path, ...] = ()
    """Held-out text: plain text, .jsonl, .json, .parquet, .arrow, also compressed (.gz, .zst), and directories of them."""  # noqa: E501

    tokens: Path | None = None
    """Token store of the held-out text, instead of the text."""

    cache: str | Path | None = None
    """Cache to measure on instead, its text and its records, a directory or a URL; see --hold-out."""

    hold_out: int = 0
    """With --cache: this many sequences at its end; 0: those that the student's run held out, all of another cache."""

    sequences: str = ""
    """With --cache: the sequences A:B, from A to before B, instead of those at its end."""

    bos: Bos = "auto"
    """With text: where the token goes that begins a text, as sklformat cache has it; a token store says it itself."""

    special_tokens: SpecialTokens = "text"
    """With text: what the name of a special token inside it is, as sklformat cache has it."""

    isolate_documents: bool = False
    """Keep packed documents apart, as sklformat cache has it; take what the student was trained with."""

    packing: Packing = "auto"
    """Whether documents fill sequences or each is one, as sklformat cache has it."""

    truncate: Truncate = "end"
    """What a document loses that is longer than seq_len and a sequence of its own."""

    packing_seed: int = 0
    """Seed of the order in which documents are packed, and of the choice of sequences."""

    num_sequences: int = 0
    """Sequences to measure on, spread over the text; 0: all."""

    teacher: str | None = None
    """Teacher to compare with, path or name of a transformers model of the same tokenizer."""

    trust_remote_code: bool = False
    """Run the code that came with a model or tokenizer. Look at it first."""

    adapter_base: str | None = None
    """Where student or teacher is an adapter (peft): the model that it belongs to; none: as the adapter says."""

    ce_loss: float | None = None
    """LM loss of the student trained with cross-entropy, nats per token; with --full-loss for "% CE to FullKD"."""

    full_loss: float | None = None
    """LM loss of the student trained on the teacher's whole distributions, nats per token."""

    bins: int = 15
    """Confidence bins of the calibration error, of equal width."""

    batch_size: int = 4
    """Sequences at once; their logits are held in memory."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the models' weights in memory; the metrics are computed in float32."""

    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1, …; auto: the GPU if there is one."""

    out: Path | None = None
    """JSON file for the result; none: not written."""

    def __post_init__(self) -> None:
        if [bool(self.text), self.tokens is not None, self.cache is not None].count(True) != 1:
            raise ValueError("give one of --text, --tokens (a token store) and --cache")
        if self.cache is None and not self.seq_len:
            raise ValueError("text and tokens need seq_len, such as that which the student was trained with")
        check_least(self, 1, "bins", "batch_size")
        check_least(self, 0, "num_sequences", "packing_seed", "hold_out", "seq_len")
        self._check_part()
        if self.tokens is not None and (self.bos, self.special_tokens) != ("auto", "text"):
            raise ValueError("bos and special_tokens belong to text; the token store says how it was made")
        TextFiles.__post_init__(self)
        if self.tokens is not None and self.field is not None:
            raise ValueError("field belongs to text; tokens have none")
        if (self.ce_loss is None) != (self.full_loss is None):
            raise ValueError("ce_loss and full_loss belong together: give both or none")

    def _check_part(self) -> None:
        if self.cache is None:
            if self.hold_out or self.sequences:
                raise ValueError("hold_out and sequences choose a part of a cache, which is not given")
            return
        said = [f.name for f in fields(self) if f.name in _OF_TEXT and getattr(self, f.name) != f.default]
        if said:
            raise ValueError(f"{said[0]} belongs to text or tokens; a cache says it itself")
        if self.hold_out and self.sequences:
            raise ValueError(f"give hold_out or sequences, got {self.hold_out} and {self.sequences}")
        if self.sequences and not re.fullmatch(r"\d*:\d*", self.sequences):
            raise ValueError(f"sequences must be A:B, such as 900:1000, got {self.sequences!r}")
