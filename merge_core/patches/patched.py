"""A model with deltas on it, computed row by row as the rows are read; no patched copy is stored.

    W'[a:b] = W[a:b] + Σ strength · δ[a:b]

The sum comes in float32 (float64 where anything is stored so), unrounded. A tensor that one delta alone replaces, at
strength 1, comes as that delta stores it, bit for bit. A head that the base ties to an embedding follows it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from merge_core.cards import Card
from merge_core.dtypes import FLOAT32, FLOAT64, DType
from merge_core.errors import IncompatibleModels, Problem
from merge_core.headers import TensorInfo
from merge_core.patches.delta import Delta
from merge_core.patches.encoding import DeltaTensor, digest_of
from merge_core.patches.encodings.replacement import ReplacementTensor
from merge_core.weights import Companions, Weights


@dataclass(frozen=True)
class ScaledDelta:
    """A delta to be added so many times; `name` is what messages call it."""

    delta: Delta
    name: str
    strength: float = 1.0


@dataclass(frozen=True)
class _Part:
    """What one patch does to one tensor."""

    patch: int
    tensor: DeltaTensor
    strength: float


class Patched(Weights):
    """A model with deltas on it.

    Whoever replaces values must be told the truth about what they were: the base's tensor is proved by its digest
    before its rows are first used. What is added may be added to another base of the same shapes.
    """

    def __init__(self, base: Weights, patches: Sequence[ScaledDelta], model: Weights | None = None) -> None:
        """`model`: whose config and tokenizer it has. Without it they are the base's, or, where a patch adds tensors,
        takes some away or gives them another shape, those that lie beside that patch.

        Raises `IncompatibleModels` naming every tensor that does not fit.
        """
        self.base, self.patches, self.path = base, tuple(patches), base.path
        self.origins = (*base.origins, *(origin for patch in patches for origin in patch.delta.file.origins))
        self._problems: list[Problem] = []
        self._notes: list[str] = list(base.notes)
        self._parts: dict[str, list[_Part]] = {}
        for number, patch in enumerate(self.patches):
            self._add(number, patch)
        for patch in self.patches:
            for name in self._taken_away(patch):
                if name in self._parts:
                    self._refuse(patch, f"removes {name}, which another delta changes", name)
        if self._problems:
            raise IncompatibleModels.of(self._problems)
        self._note_replacements()
        self._follow_ties()
        removed = {name for patch in self.patches if patch.strength for name in patch.delta.removed}
        self.tensors = {
            name: self._changed(name) for name in dict.fromkeys([*base.tensors, *self._parts]) if name not in removed
        }
        self.notes = tuple(dict.fromkeys(self._notes))
        self.shards = dict(base.shards)
        for number, patch in enumerate(self.patches):
            for file, shard in patch.delta.file.shards.items():
                self.shards[_prefixed(number, file)] = shard
        beside = [patch for patch in self.patches if patch.delta.model and self._alters_shapes(patch)]
        self.described_by = beside[-1] if beside and model is None else None
        """The patch whose config and tokenizer it has, if it does not have the base's."""
        self._model = model or (self.described_by and self.described_by.delta.model) or base
        self.config = self._model.config or base.config
        self._proved: set[str] = set()
        self._proving = threading.Lock()

    # What each patch does.

    def _add(self, number: int, patch: ScaledDelta) -> None:
        if not math.isfinite(patch.strength):
            self._refuse(patch, f"a strength of {patch.strength} is no number to multiply with")
        if patch.strength == 0:
            return
        if patch.strength != 1 and (taken := self._taken_away(patch)):
            self._refuse(patch, f"removes {taken[0]}, which it can only do whole: use a strength of 1")
        for name, tensor in patch.delta.tensors.items():
            if self._fits(patch, tensor, self.base.tensors.get(name)):
                self._parts.setdefault(name, []).append(_Part(number, tensor, patch.strength))
        for name, parts in self._parts.items():
            entries = [part.tensor.entry for part in parts]
            if len(parts) > 1 and any(not entry.base or entry.base.shape != entry.shape for entry in entries):
                self._refuse(patch, f"changes {name}, which another delta adds or gives another shape", name)

    def _taken_away(self, patch: ScaledDelta) -> list[str]:
        """What the base has and would not have with a patch on it, heads left out that are tied anyway."""
        names = patch.delta.removed if patch.strength else ()
        infos = [info for name in names if (info := self.base.tensors.get(name)) is not None]
        return [info.name for info in infos if self.base.tied_partner(info.name, info.shape) is None]

    def _alters_shapes(self, patch: ScaledDelta) -> bool:
        """Whether a patch makes a model that its base's config may not describe."""
        entries = [tensor.entry for tensor in patch.delta.tensors.values()]
        altered = any(entry.base is None or entry.base.shape != entry.shape for entry in entries)
        return bool(patch.strength) and (altered or bool(self._taken_away(patch)))

    def _follow_ties(self) -> None:
        """Do to a head, where a copy of it is stored, what is done to the embedding that the config ties it to."""
        for info in self.base.tensors.values():
            partner = self.base.tied_partner(info.name, info.shape)
            if partner is not None and partner.name in self._parts and info.name not in self._parts:
                self._parts[info.name] = self._parts[partner.name]

    def _fits(self, patch: ScaledDelta, tensor: DeltaTensor, info: TensorInfo | None) -> bool:
        """Whether a patch changes a tensor of the base; what does not fit is a problem."""
        entry = tensor.entry
        name = entry.name
        if entry.base is None:
            if info is not None:
                self._refuse(patch, f"adds {name}, which the base has: it was made from another base", name)
            elif patch.strength != 1:
                self._refuse(patch, f"adds {name}, which it can only do whole: use a strength of 1", name)
            return info is None
        if info is None:
            self._refuse(patch, f"changes {name}, which the base has not", name)
            return False
        if info.shape != entry.base.shape:
            made = f"was made from a {name} of {list(entry.base.shape)}"
            self._refuse(patch, f"{made}, but that of the base is {list(info.shape)}", name)
        elif tensor.replaces and info.dtype != entry.base.dtype:
            made = f"was made from a {name} in {entry.base.dtype}, but that of the base is in {info.dtype}"
            self._refuse(patch, f"{made}: it holds new values, not differences, and is for its own base alone", name)
        elif not tensor.replaces and info.dtype.kind != "float":
            self._refuse(patch, f"adds to {name}, which the base stores as {info.dtype}", name)
        elif patch.strength != 1 and entry.shape != entry.base.shape:
            self._refuse(patch, f"gives {name} another shape, which it can only do whole: use a strength of 1", name)
        elif patch.strength != 1 and {entry.dtype.kind, entry.base.dtype.kind} != {"float"}:
            self._notes.append(f"{name}: only a strength of 1 replaces what is no float; it stays as in the base")
            return False
        return True

    def _changed(self, name: str) -> TensorInfo:
        """How a tensor comes from here."""
        parts = self._parts.get(name)
        if parts is None:
            return self.base.tensors[name]
        entry = parts[0].tensor.entry
        if self._is_replaced(name):
            file = next(iter(entry.parts.values())).file
            return TensorInfo(name, entry.dtype, entry.shape, _prefixed(parts[0].patch, file), 0)
        formats = {self.base.tensors[name].dtype, *(part.tensor.working for part in parts)}
        return replace(self.base.tensors[name], dtype=FLOAT64 if FLOAT64 in formats else FLOAT32)

    def _note_replacements(self) -> None:
        """Tell of strengths with which values are put in place beyond what they are."""
        beyond = {}
        for name, parts in self._parts.items():
            strengths = [part.strength for part in parts if isinstance(part.tensor, ReplacementTensor)]
            if strengths and (min(strengths) < 0 or sum(strengths) > 1 + 1e-6):
                beyond[name] = sum(strengths)
        if beyond:
            name, total = next(iter(beyond.items()))
            others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
            self._notes.append(
                f"new values are put in place of {name}{others} with strengths that come to {total:g}: between 0 and 1 "
                "they give means of these values, others go beyond them, where a running variance may be negative"
            )

    def _is_replaced(self, name: str) -> bool:
        """Whether a tensor comes as a delta stores it."""
        parts = self._parts.get(name, [])
        last = parts[-1:] if len(parts) == 1 else []
        return any(part.tensor.replaces and part.strength == 1 for part in last)

    def _refuse(self, patch: ScaledDelta, detail: str, tensor: str | None = None) -> None:
        self._problems.append(Problem(f"{patch.name}: {detail}", tensor=tensor, file=patch.name))

    # Rows.

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        parts = self._parts.get(info.name)
        stored = self.base.tensors.get(info.name)
        if parts is None:
            assert stored is not None
            return self.base.rows(stored, start, stop, space)
        self._prove(info.name)
        base = self._base_rows(parts, stored, start, stop)
        if self._is_replaced(info.name):
            rows = parts[0].tensor.replaced(base, start, stop)
        else:
            assert base is not None
            rows = self._sum(parts, base, info.dtype, start, stop)
        if space is None:
            return rows
        out = space[: rows.nbytes].view(rows.dtype).reshape(rows.shape)
        return out.copy_(rows)

    @staticmethod
    def _sum(parts: Sequence[_Part], base: Tensor, dtype: DType, start: int, stop: int) -> Tensor:
        """The base's rows and what is added; new values are mixed with them, because the difference of a small value to
        a large one would not give it back.
        """
        mixed = sum(part.strength for part in parts if isinstance(part.tensor, ReplacementTensor))
        rows = base.to(dtype.torch, copy=True)
        if mixed:
            rows = rows.zero_() if mixed == 1 else rows.mul_(1 - mixed)
        for part in parts:
            if isinstance(part.tensor, ReplacementTensor):
                added = part.tensor.values(start, stop).to(dtype.torch)
            else:
                added = part.tensor.change(base, start, stop).to(dtype.torch)
            rows += added if part.strength == 1 else added * part.strength
        return rows

    def _base_rows(self, parts: Sequence[_Part], stored: TensorInfo | None, start: int, stop: int) -> Tensor | None:
        """The base's rows, where they are needed and there."""
        is_needed = stored is not None and any(part.tensor.entry.shape == stored.shape for part in parts)
        return self.base.rows(stored, start, stop) if stored is not None and is_needed else None

    def prepare(self, info: TensorInfo, pool: Executor | None) -> None:
        if (stored := self.base.tensors.get(info.name)) is not None:
            self.base.prepare(stored, pool)
        self._prove(info.name)
        for part in self._parts.get(info.name, ()):
            part.tensor.prepare()

    def _prove(self, name: str) -> None:
        """Raise `IncompatibleModels` unless the base's tensor is the one that values of it are replaced in."""
        wanted = [part for part in self._parts.get(name, ()) if part.tensor.replaces and part.tensor.entry.base]
        if name in self._proved or not wanted:
            return
        with self._proving:
            if name in self._proved:
                return
            digest = digest_of(self.base, self.base.tensors[name])
            for part in wanted:
                assert part.tensor.entry.base is not None
                if part.tensor.entry.base.blake3 != digest:
                    patch = self.patches[part.patch].name
                    detail = (
                        f"{patch}: {name} of the base is not the one that the delta was made from; it holds new "
                        "values, not differences, and is for its own base alone"
                    )
                    raise IncompatibleModels(detail, [Problem(detail, tensor=name, file=patch)])
            self._proved.add(name)

    def place(self, info: TensorInfo) -> tuple[int, int] | None:
        return None if info.name in self._parts else self.base.place(self.base.tensors[info.name])

    def ranges(self, info: TensorInfo) -> Iterator[tuple[str, int, int]]:
        if (stored := self.base.tensors.get(info.name)) is not None:
            yield from self.base.ranges(stored)
        for part in self._parts.get(info.name, ()):
            for stored in part.tensor.entry.parts.values():
                yield _prefixed(part.patch, stored.file), stored.begin, stored.begin + stored.nbytes

    def temporary(self, info: TensorInfo) -> float:
        stored = self.base.tensors.get(info.name)
        below = 0.0 if stored is None else self.base.temporary(stored)
        parts = self._parts.get(info.name)
        if parts is None:
            return below
        below += 0 if stored is None else stored.dtype.itemsize
        most = max(part.tensor.temporary + 2 * part.tensor.working.itemsize for part in parts)
        return below + info.dtype.itemsize + most

    def thread_bytes(self, info: TensorInfo) -> int:
        stored = self.base.tensors.get(info.name)
        below = 0 if stored is None else self.base.thread_bytes(stored)
        return below + max((part.tensor.thread_bytes for part in self._parts.get(info.name, ())), default=0)

    def is_whole(self, info: TensorInfo) -> bool:
        stored = self.base.tensors.get(info.name)
        return stored is not None and self.base.is_whole(stored)

    def format(self, info: TensorInfo) -> DType:
        if info.name not in self._parts or not self._is_replaced(info.name):
            return self.base.format(self.base.tensors[info.name])
        return info.dtype

    # What lies beside.

    @property
    def companions(self) -> Companions:
        return self._model.companions or self.base.companions

    @property
    def cards(self) -> Mapping[str, Card]:
        theirs = (patch.delta.cards for patch in self.patches)
        return {
            **self.base.cards,
            **{_prefixed(i, name): card for i, cards in enumerate(theirs) for name, card in cards.items()},
        }

    @property
    def settings(self) -> Mapping[str, Path]:
        return {**self.base.settings, **{f"delta/{name}": path for name, path in self._own_settings().items()}}

    def _own_settings(self) -> Mapping[str, Path]:
        return {} if self._model is self.base else self._model.settings

    def descriptor(self, file: str) -> int:
        for number, patch in enumerate(self.patches):
            own = file.removeprefix(_prefixed(number, ""))
            if own != file:
                return patch.delta.file.descriptor(own)
        return self.base.descriptor(file)

    def close(self) -> None:
        self.base.close()
        for patch in self.patches:
            patch.delta.close()


def _prefixed(number: int, file: str) -> str:
    """The name of a delta's file where it stands beside those of its base."""
    return f"delta-{number + 1}/{file}"
