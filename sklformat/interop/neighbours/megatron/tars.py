"""
Where everything is in a directory of Megatron's: ranks, iterations or samples, micro-batches.

* ``cp{C}_dp{D}__{last}.tar``: a member per iteration, with a list of the micro-batches of one context-parallel rank;
* ``dp{D}__{last}.tar``: a member per iteration, with one tensor of whole sequences;
* ``dp{D}__{start}-{end}.tar``: a member per range of the samples of all ranks, with one such tensor; the newest.

Samples are in the order of the global batches: micro-batch m of rank d is number m * ranks + d.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sklformat.errors import CorruptError, UnsupportedError, describe_bad_json
from sklformat.interop.neighbours.megatron.batches import Batch
from sklformat.interop.neighbours.megatron.members import Member, find_members
from sklformat.interop.tables.files import natural
from sklformat.interop.tables.pickles import read_torch

TAR = re.compile(r"(?:cp(?P<cp>\d+)_)?dp(?P<dp>\d+)__(?P<first>\d+)(?:-(?P<end>\d+))?\.tar")
_MEMBER = re.compile(r"(?P<first>\d+)(?:-(?P<end>\d+))?\.pt\.zst")
META = "_meta.json"

_Step = tuple[int, int]  # first and end, of iterations or of samples


class _Member(NamedTuple):
    file: Member
    step: _Step

    @property
    def path(self) -> Path:
        return self.file.path


class Tars:
    """
    Where each member of each rank is; its content is read when one asks.

    Attributes:
        steps: In order, without a gap.
        unit: What they count, "iterations" or "samples".
        ranks: Context-parallel and data-parallel.
        meta: What all tars say of themselves.
        left_out: Names of files that are no part of it.
        layout: What the names tell, in words.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out = sorted(
            f.name for f in path.iterdir() if f.suffix in (".stale", ".tmp") and ".tar" in f.suffixes
        )
        self.meta: dict[str, Any] = {}
        members: dict[tuple[int, int], list[_Member]] = {}
        kinds = set()
        for file in sorted(path.glob("*.tar"), key=natural):
            name = TAR.fullmatch(file.name)
            if name is None:
                raise CorruptError("is no name of these tars, cpC_dpD__LAST.tar or dpD__START-END.tar", path=file)
            kinds.add(name["end"] is not None)
            members.setdefault((int(name["cp"] or 0), int(name["dp"])), []).extend(self._index(file, name))
        if len(kinds) != 1:
            what = "tars by iterations and tars by samples" if kinds else "no tar"
            raise CorruptError(f"holds {what}; must hold those of one run", path=path)
        self._version = self.meta.get("saver", {}).get("format_version", 1)
        if self._version not in (1, 2):
            raise UnsupportedError(f"format_version {self._version}; known are 1 and 2", path=path)
        self.unit = "samples" if kinds.pop() else "iterations"
        self.layout = f"a tensor for each range of {self.unit}" if self._version == 2 else "lists of micro-batches"
        self._check_ranks(members)
        self._members = members
        self.steps = [member.step for member in members[0, 0]]

    def _index(self, file: Path, name: re.Match[str]) -> list[_Member]:
        found = []
        for member in find_members(file):
            if member.name == META:
                self._check_meta(file, member.read())
            elif step := _MEMBER.fullmatch(member.name):
                first = int(step["first"])
                found.append(_Member(member, (first, first + 1 if step["end"] is None else int(step["end"]))))
        last = int(name["first"]) + 1 if name["end"] is None else int(name["end"])
        if not found or found[-1].step[1] != last:
            there = found[-1].step[1] - 1 if found else "nothing"
            raise CorruptError(f"ends with {there}, must with {last - 1}: it is cut short", path=file)
        return found

    def _check_meta(self, file: Path, content: bytes) -> None:
        try:
            meta = json.loads(content)
        except ValueError as error:
            raise CorruptError(describe_bad_json(error), path=file, section=META) from None
        if not isinstance(meta, dict) or not isinstance(meta.get("saver", {}), dict):
            raise CorruptError("is no object with an object saver", path=file, section=META)
        self.meta = self.meta or meta
        if meta != self.meta:
            name = next(n for n in {**self.meta, **meta} if self.meta.get(n) != meta.get(n))
            raise CorruptError(
                f"{name} is {meta.get(name)}, of another tar {self.meta.get(name)}; convert the tars of one run",
                path=file,
                section=META,
            )

    def _check_ranks(self, members: dict[tuple[int, int], list[_Member]]) -> None:
        """Every rank is there, with the same steps one behind the other."""
        self.ranks = max(cp for cp, _ in members) + 1, max(dp for _, dp in members) + 1
        saved = self.meta.get("saver", {}).get("dp_size_save", self.ranks[1])
        self.ranks = self.ranks[0], max(self.ranks[1], saved) if isinstance(saved, int) else self.ranks[1]
        for cp in range(self.ranks[0]):
            for dp in range(self.ranks[1]):
                if (cp, dp) not in members:
                    raise CorruptError(
                        f"no tar of data-parallel rank {dp}, context-parallel rank {cp}; there were "
                        f"{self.ranks[1]} times {self.ranks[0]} ranks; copy all of them",
                        path=self.path,
                    )
        for each in members.values():
            each.sort(key=lambda member: member.step)
            for one, other in pairwise(each):
                if other.step[0] < one.step[1]:
                    raise CorruptError(
                        f"{self.unit} from {other.step[0]} on are in {one.path.name} too; remove the older tar",
                        path=other.path,
                    )
                if other.step[0] > one.step[1]:
                    gap = f"{self.unit} {one.step[1]} to {other.step[0] - 1}"
                    raise CorruptError(f"{gap} are in no tar of its rank; copy all tars", path=other.path)
        steps = [member.step for member in members[0, 0]]
        for each in members.values():
            others = [member.step for member in each]
            if others != steps:
                odd = min(set(steps) ^ set(others))
                raise CorruptError(
                    f"{self.unit} {odd[0]} to {odd[1] - 1} are not there for each rank; {each[0].path.name} differs "
                    f"from {members[0, 0][0].path.name}; copy all tars",
                    path=self.path,
                )

    def load(self, number: int) -> list[list[list[Batch]]]:
        """Micro-batches [cp][dp][m] of a step."""
        cps, dps = self.ranks
        step = self.steps[number]
        loaded = [[self._decode(self._members[cp, dp][number]) for dp in range(dps)] for cp in range(cps)]
        counts = {len(batches) for ranks in loaded for batches in ranks}
        if len(counts) != 1:
            raise CorruptError(f"{self.unit} from {step[0]} on: ranks differ in micro-batches", path=self.path)
        return loaded

    def _decode(self, member: _Member) -> list[Batch]:
        where = f"{self.unit} {member.step[0]} to {member.step[1] - 1}"
        try:
            return self._batches(read_torch(member.path, member.file.unpack()), member.step)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"{where}: not what Megatron writes: {error}", path=member.path) from None

    def _batches(self, payload: Any, step: _Step) -> list[Batch]:
        values, low, high = payload["values"], payload["indices_low"], payload["bit_17"]
        if isinstance(values, list):
            return [Batch.checked(*parts) for parts in zip(values, low, high, strict=True)]
        whole = Batch.checked(values, low, high, payload.get("cu_seqlens_padded"))
        count, saver, ranks = whole.values.shape[1], self.meta.get("saver", {}), self.ranks[1]
        if self.unit == "samples" and count * ranks != step[1] - step[0]:
            raise ValueError(f"{count} samples of each of {ranks} ranks")
        size = saver.get("mbs_save", count if ranks == 1 else None)
        if not isinstance(size, int) or size < 1 or count % size:
            raise ValueError(f"{count} samples do not divide into micro-batches of {size} (mbs_save)")
        return [whole.part(begin, begin + size) for begin in range(0, count, size)]
