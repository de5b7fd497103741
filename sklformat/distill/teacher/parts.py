"""
Rows of logits of which each process has a part of the ids: their draws, and their most probable ids.

All processes of a group do this together, of the same rows, and all of them get the result.  They exchange once what
says where each draw lies: the sums over blocks of 256 ids of all of them.  Then each finds the ids that are its own,
and once more they meet for these.  Blocks are counted from the first id of a part: where parts begin at multiples of
256 the draws are those of one process with whole rows, bit for bit (``RowDraws``); elsewhere the sums of the blocks at
a border round otherwise, as they do between C and a GPU.  The most probable ids are always the same.

Nothing here waits for the device.  Shape letters: P positions of one slice, V vocabulary, N rounds, M places, C blocks
of 256 ids of all parts, X numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sklformat.distill.kernels.drawn import Drawn, Sums
from sklformat.distill.losses.heads import Shard
from sklformat.distill.teacher import row_draws
from sklformat.distill.teacher.row_draws import BLOCK, RowDraws


@dataclass(frozen=True)
class Found:
    """
    What the rows of a slice gave.

    Attributes:
        sums: Of whole rows.
        label: [P] float32, the logits of the labels; None where there are none.
        drawn: Draws, or None.
        logits: [P, N] float32 of the draws; None where they were not asked for.
        keys: int64 [P, M] of the most probable ids (``row_draws.top_keys``), or None.
    """

    sums: Sums
    label: Tensor | None
    drawn: Drawn | None = None
    logits: Tensor | None = None
    keys: Tensor | None = None


class Part:
    """
    The ids that this process has, beside those of the others; to be made by all of them at once.

    Args:
        shard: Which they are.
        width: How many.

    Attributes:
        shard: The same.
        vocab_size: V.

    Raises:
        ValueError: The parts do not make up a vocabulary, in the order of the processes.
    """

    def __init__(self, shard: Shard, width: int) -> None:
        shard.check(width)
        self.shard, self._width, self.vocab_size = shard, width, shard.vocab_size
        found: list[Any] = [None] * dist.get_world_size(shard.group)
        dist.all_gather_object(found, (shard.first, width), group=shard.group)
        ends = [0, *(first + count for first, count in found)]
        if ends[-1] != self.vocab_size or any(
            count < 1 or first != end for (first, count), end in zip(found, ends, strict=False)
        ):
            said = ", ".join(f"{first} to {first + count - 1}" for first, count in found)
            raise ValueError(
                f"processes have the ids {said}; need parts that follow each other, none of them empty, up to "
                f"{self.vocab_size - 1}"
            )
        self._widths = [count for _, count in found]
        self._blocks = [-(-count // BLOCK) for count in self._widths]
        self._first_block = sum(self._blocks[: dist.get_rank(shard.group)])

    def draw(
        self,
        draws: RowDraws,
        logits_PV: Tensor,
        places_P: Tensor,
        sequence: int,
        *,
        labels_P: Tensor | None = None,
        want_entropy: bool = False,
        want_logits: bool = False,
    ) -> Found:
        """
        Draws from rows, as ``RowDraws.draw``.

        Args:
            draws: The law.
            logits_PV: Of the ids that are here, float32, float16 or bfloat16, P >= 1.
            places_P: As of ``RowDraws.draw``.
            sequence: As of ``RowDraws.draw``.
            labels_P: int64, ids whose logits are wanted too.
            want_entropy: Whether ``sums`` are to hold entropies.
            want_logits: Whether the logits of the draws are wanted.
        """
        some, want_logits = draws.rows_at_once, want_logits or draws.is_tempered
        parts = [
            self._draw_some(
                draws,
                logits_PV[at : at + some],
                places_P[at : at + some],
                sequence,
                None if labels_P is None else labels_P[at : at + some],
                want_entropy=want_entropy,
                want_logits=want_logits,
            )
            for at in range(0, len(logits_PV), some)
        ]
        whole: Found = _joined(parts)
        return whole

    def tops(
        self, logits_PV: Tensor, places: int, *, labels_P: Tensor | None = None, want_entropy: bool = False
    ) -> Found:
        """Keys of the most probable ids of rows, ``places`` of each or as many as there are; else as ``draw``."""
        own = _sums(logits_PV, want_entropy=want_entropy)
        keys_PM = row_draws.top_keys(logits_PV, min(places, self._width), self.shard.first)
        room = min(places, max(self._widths)) - keys_PM.shape[1]
        keys_PM = torch.nn.functional.pad(keys_PM, (0, room), value=torch.iinfo(torch.int64).min)
        found, (keys,) = self._exchange(own, self._labels(logits_PV, labels_P), keys_PM)
        return replace(found, keys=torch.cat(keys, 1).topk(min(places, self.vocab_size), dim=1).values)

    def whole_row(self, logits_V: Tensor) -> Tensor:
        """A row of logits, on all processes; for a message."""
        padded_V = torch.nn.functional.pad(logits_V, (0, max(self._widths) - len(logits_V)))
        found = [torch.empty_like(padded_V) for _ in self._widths]
        dist.all_gather(found, padded_V, group=self.shard.group)
        return torch.cat([row[:width] for row, width in zip(found, self._widths, strict=True)])

    def _draw_some(
        self,
        draws: RowDraws,
        logits_PV: Tensor,
        places_P: Tensor,
        sequence: int,
        labels_P: Tensor | None,
        *,
        want_entropy: bool,
        want_logits: bool,
    ) -> Found:
        own = _sums(logits_PV, want_entropy=want_entropy)
        e_PCW, offset_P1 = draws.powers(logits_PV, own.largest[:, None])
        sums_PC = torch.nn.functional.pad(e_PCW.sum(-1), (0, max(self._blocks) - e_PCW.shape[1]))
        found, (offsets, sums) = self._exchange(own, self._labels(logits_PV, labels_P), offset_P1, sums_PC)
        largest_offset_P1 = torch.stack(offsets).amax(0)
        masses = [
            sums_PC[:, :count].double() * _power_of_two(offset_P1 - largest_offset_P1)
            for offset_P1, sums_PC, count in zip(offsets, sums, self._blocks, strict=True)
        ]
        block_PN, share_PN, total_P1 = draws.locate(torch.cat(masses, 1), places_P, sequence)
        own_PN = block_PN - self._first_block
        is_own_PN = (own_PN >= 0) & (own_PN < e_PCW.shape[1])
        ids_PN = draws.find(e_PCW, own_PN.clamp_(0, e_PCW.shape[1] - 1), share_PN).clamp_(max=self._width - 1)
        bits_PN = logits_PV.gather(1, ids_PN).float().view(torch.int32) if want_logits else None
        ids_PN, bits_PN = self.shard.sums(
            torch.where(is_own_PN, ids_PN + self.shard.first, 0).int(),
            None if bits_PN is None else torch.where(is_own_PN, bits_PN, 0),
        )
        logits_PN = None if bits_PN is None else bits_PN.view(torch.float32)
        weights_PN = None
        if logits_PN is not None and draws.is_tempered:
            largest_P1 = found.sums.largest[:, None]
            total_q_P1 = draws.against(total_P1, largest_offset_P1, largest_P1)
            total_p_P1 = found.sums.total[:, None] if draws.is_unbiased else None
            weights_PN = draws.weigh(logits_PN - largest_P1, total_p_P1, total_q_P1)
        drawn = Drawn(ids_PN, weights_PN, found.sums.is_bad, found.sums.log_sum(), found.sums.entropy)
        return replace(found, drawn=drawn, logits=logits_PN)

    def _labels(self, logits_PV: Tensor, labels_P: Tensor | None) -> Tensor | None:
        """int32 [P], the bits of the labels' logits; 0 of those that another process has."""
        if labels_P is None:
            return None
        own_P = labels_P - self.shard.first
        label_P1 = logits_PV.gather(1, own_P.clamp(0, self._width - 1)[:, None]).float().view(torch.int32)
        return torch.where((own_P >= 0) & (own_P < self._width), label_P1[:, 0], 0)

    def _exchange(self, own: Sums, label_P: Tensor | None, *fields: Tensor) -> tuple[Found, list[list[Tensor]]]:
        """Sums of whole rows, the labels' logits, and the fields of all processes, [P, X] each, by one collective."""
        optional = [part[:, None] for part in (own.entropy, label_P) if part is not None]
        given = [own.largest[:, None], own.total[:, None], *fields, *optional]
        words = [part.contiguous().view(torch.int32) for part in given]
        message_PX = torch.cat(words, 1)
        found_SPX = message_PX.new_empty((len(self._widths), *message_PX.shape))
        dist.all_gather(list(found_SPX.unbind()), message_PX, group=self.shard.group)
        largest, total, *rest = (
            [process.contiguous().view(part.dtype) for process in of_all.unbind()]
            for part, of_all in zip(given, torch.split(found_SPX, [part.shape[1] for part in words], 2), strict=True)
        )
        labels = None if label_P is None else torch.cat(rest.pop(), 1).sum(1).int().view(torch.float32)
        entropy = None if own.entropy is None else rest.pop()
        return Found(_of_rows(largest, total, entropy), labels), rest


def _sums(logits_PV: Tensor, *, want_entropy: bool) -> Sums:
    """Of the ids that are here."""
    sums = row_draws.sum_rows(logits_PV)
    if not want_entropy:
        return sums
    apart_PV = (logits_PV - sums.largest[:, None]).clamp_(min=-row_draws.LARGEST_LOGIT)  # so that 0 times it is 0
    moment_P = torch.linalg.vecdot(apart_PV.exp(), apart_PV)
    return replace(sums, entropy=(sums.total.log() - moment_P / sums.total).float())


def _of_rows(largest: list[Tensor], total: list[Tensor], entropy: list[Tensor] | None) -> Sums:
    """Sums of whole rows from those of their parts, [P, 1] each."""
    largest_SP = torch.cat(largest, 1).T
    largest_P = largest_SP.amax(0)  # NaN where a part has it
    factor_SP = (largest_SP.double() - largest_P).exp()
    total_SP = torch.where(factor_SP > 0, torch.cat(total, 1).T * factor_SP, 0.0)  # none of a part that is all masked
    total_P = total_SP.sum(0)
    is_bad_P = row_draws.bad_rows(largest_P[:, None])
    if entropy is None:
        return Sums(largest_P, total_P, is_bad_P, None)
    share_SP = total_SP / total_P
    # The entropy of which part it is, and that within each.
    within_SP = torch.where(share_SP > 0, share_SP * torch.cat(entropy, 1).T, 0.0)
    entropy_P = (torch.special.entr(share_SP) + within_SP).sum(0)
    return Sums(largest_P, total_P, is_bad_P, entropy_P.clamp(min=0).float())


def _power_of_two(exponents: Tensor) -> Tensor:
    """2 to integers that are not above 0, in float64; 0 where it has no normal number for it."""
    return ((exponents.clamp(-1023, 0).long() + 1023) << 52).view(torch.float64)


def _joined(parts: list[Any]) -> Any:
    """What several slices gave as that of one."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return replace(parts[0], **{name: _joined([getattr(part, name) for part in parts]) for name in vars(parts[0])})
