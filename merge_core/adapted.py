"""A model with an adapter on it, computed row by row as the rows are read; no merged copy is stored.

    W'[a:b] = W[a:b] + s · Σᵣ B[a:b, r] · A[r]

The sum over the rank runs in order, so that a row's bits depend on no block. A changed tensor comes in float32 (float64
where a part of it is stored so), unrounded: what is rounded is the output of the merge, once.

LoRA: https://arxiv.org/abs/2106.09685, DoRA: https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from merge_core import kernels
from merge_core.adapters import CONFIG_NAME, Adapter, Factors
from merge_core.cards import Card
from merge_core.dtypes import FLOAT32, FLOAT64, DType
from merge_core.errors import IncompatibleModels, Problem
from merge_core.headers import TensorInfo
from merge_core.layers import stacks
from merge_core.statistics import grain_sums
from merge_core.weights import Companions, Weights

FILE_PREFIX = "adapter/"
"""Before an adapter's files where they stand beside those of its base."""
_MOST_DROPPED = 3
"""Parts of a name before its layers that a base may have otherwise."""


@dataclass(frozen=True)
class _Change:
    """What an adapter makes of one tensor W: it is `replaced` by another, becomes W + `scale` · L·R, and each row is
    brought to the norm `magnitude`, as far as there is each.

    L, `[rows, rank]`, and R, `[rank, width]`, are stored as they are, or both transposed (`is_turned`). Without `right`
    L is one column, which is added (a bias).
    """

    scale: float = 1.0
    left: TensorInfo | None = None
    right: TensorInfo | None = None
    is_turned: bool = False
    magnitude: TensorInfo | None = None
    replaced: TensorInfo | None = None

    @property
    def parts(self) -> list[TensorInfo]:
        return [info for info in (self.left, self.right, self.magnitude, self.replaced) if info is not None]

    @property
    def rank(self) -> int:
        return 1 if self.right is None else self.right.shape[1 if self.is_turned else 0]


class Adapted(Weights):
    """A model with an adapter on it; `tensors` are the model's."""

    def __init__(self, base: Weights, adapter: Adapter, name: str) -> None:
        """`name` is the adapter's in messages. Raises `IncompatibleModels` naming every tensor that does not fit."""
        self.base, self.adapter, self.path, self.config = base, adapter, base.path, base.config
        self.origins = (*base.origins, *adapter.weights.origins)
        self._changes = _Fitting(base, adapter, name).changes()
        self.tensors = {info.name: self._changed(info) for info in base.tensors.values()}
        theirs = adapter.weights.shards.items()
        self.shards = {**base.shards, **{FILE_PREFIX + file: shard for file, shard in theirs}}

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        change = self._changes.get(info.name)
        weights, stored = self._stored(info)
        if change is None or change.left is None:
            return weights.rows(stored, start, stop, space)
        size = self.row_bytes(info) * (stop - start)
        buffer = torch.empty(size, dtype=torch.uint8) if space is None else space[:size]
        rows = buffer.view(info.dtype.torch).reshape(stop - start, -1)
        left, right = self._left(change, start, stop), self._right(change)
        kernels.low_rank(
            weights.rows(stored, start, stop).reshape(stop - start, -1),
            left.to(rows.dtype).contiguous(),
            right.to(rows.dtype).contiguous(),
            change.scale,
            rows,
        )
        if change.magnitude is not None:
            rows *= self._factors(change.magnitude, rows, start, stop)
        return rows.reshape(stop - start, *info.shape[1:])

    def _stored(self, info: TensorInfo) -> tuple[Weights, TensorInfo]:
        """W: of the base, or what replaces it."""
        change = self._changes.get(info.name)
        if change is None or change.replaced is None:
            return self.base, self.base.tensors[info.name]
        return self.adapter.weights, change.replaced

    def _left(self, change: _Change, start: int, stop: int) -> Tensor:
        """Some rows of L."""
        assert change.left is not None
        weights, info = self.adapter.weights, change.left
        if not change.is_turned:
            return weights.rows(info, start, stop).reshape(stop - start, -1)
        length = info.elements // change.rank
        flat = replace(info, shape=(info.elements,))
        columns = [weights.rows(flat, r * length + start, r * length + stop) for r in range(change.rank)]
        return torch.stack(columns, dim=1)

    def _right(self, change: _Change) -> Tensor:
        """All of R."""
        if change.right is None:
            return torch.ones(1, 1)
        rows = self.adapter.weights.rows(change.right, 0, change.right.rows).reshape(change.right.rows, -1)
        return rows.T if change.is_turned else rows

    def _factors(self, magnitude: TensorInfo, rows: Tensor, start: int, stop: int) -> Tensor:
        """What brings each row to its norm, `[rows, 1]`; the norms are summed in float64 by lanes."""
        squares = rows.to(torch.float64).square().reshape(1, -1)
        norms = torch.from_numpy(grain_sums(squares, rows.shape[1])).sqrt()
        flat = replace(magnitude, shape=(magnitude.elements,))
        wanted = self.adapter.weights.rows(flat, start, stop).to(torch.float64)
        return (wanted.unsqueeze(1) / norms).to(rows.dtype)

    def place(self, info: TensorInfo) -> tuple[int, int] | None:
        weights, stored = self._stored(info)
        return None if self._is_computed(info) else weights.place(stored)

    def ranges(self, info: TensorInfo) -> Iterator[tuple[str, int, int]]:
        change = self._changes.get(info.name, _Change())
        if change.replaced is None:
            yield from self.base.ranges(self.base.tensors[info.name])
        for part in change.parts:
            yield FILE_PREFIX + part.file, part.begin, part.begin + part.nbytes

    def temporary(self, info: TensorInfo) -> float:
        weights, stored = self._stored(info)
        change = self._changes.get(info.name)
        if change is None or change.left is None:
            return weights.temporary(stored)
        width = max(1, info.elements // max(1, info.rows))
        left = change.rank * (change.left.dtype.itemsize + 2 * info.dtype.itemsize) / width
        return weights.temporary(stored) + stored.dtype.itemsize + left + (24 if change.magnitude else 0)

    def thread_bytes(self, info: TensorInfo) -> int:
        weights, stored = self._stored(info)
        change = self._changes.get(info.name)
        if change is None or change.right is None:
            return weights.thread_bytes(stored)
        sizes = change.right.dtype.itemsize + 2 * info.dtype.itemsize
        return weights.thread_bytes(stored) + change.right.elements * sizes

    def format(self, info: TensorInfo) -> DType:
        return self.base.format(self.base.tensors[info.name])

    @property
    def companions(self) -> Companions:
        return self.base.companions

    @property
    def cards(self) -> Mapping[str, Card]:
        return {**self.base.cards, **{FILE_PREFIX + name: card for name, card in self.adapter.cards.items()}}

    @property
    def settings(self) -> Mapping[str, Path]:
        return {**self.base.settings, FILE_PREFIX + CONFIG_NAME: self.adapter.path / CONFIG_NAME}

    def descriptor(self, file: str) -> int:
        if file.startswith(FILE_PREFIX):
            return self.adapter.weights.descriptor(file.removeprefix(FILE_PREFIX))
        return self.base.descriptor(file)

    def close(self) -> None:
        self.base.close()
        self.adapter.weights.close()

    def _is_computed(self, info: TensorInfo) -> bool:
        change = self._changes.get(info.name)
        return change is not None and change.left is not None

    def _changed(self, info: TensorInfo) -> TensorInfo:
        """How a tensor of the base comes from here."""
        change = self._changes.get(info.name)
        if change is None:
            return info
        if not self._is_computed(info):
            _, stored = self._stored(info)
            return replace(stored, name=info.name, file=FILE_PREFIX + stored.file)
        is_double = FLOAT64 in (info.dtype, *(part.dtype for part in change.parts))
        return replace(info, dtype=FLOAT64 if is_double else FLOAT32)


@dataclass
class _Fitting:
    """Finds what each part of an adapter is for, by name and shape."""

    base: Weights
    adapter: Adapter
    name: str

    def changes(self) -> dict[str, _Change]:
        """Tensor name of the base → what becomes of it; raises `IncompatibleModels`."""
        self._problems: list[Problem] = []
        self._found: dict[str, _Change] = {}
        names = self._names()
        turned = {
            self._is_turned(self.base.tensors[names[f"{module}.weight"]], factors)
            for module, factors in self.adapter.modules.items()
            if f"{module}.weight" in names and not factors.is_embedding
        }
        for saved, replaced in self.adapter.saved.items():
            if stored := names.get(saved):
                self._check_shape(self.base.tensors[stored], replaced, replaced.shape)
                self._add(stored, replaced, _Change(replaced=replaced))
        for module, factors in self.adapter.modules.items():
            if stored := names.get(f"{module}.weight"):
                self._add(stored, factors.up, self._of_factors(stored, factors, turned))
            if factors.bias is not None and (stored := names.get(f"{module}.bias")):
                self._check_shape(self.base.tensors[stored], factors.bias, factors.bias.shape)
                self._add(stored, factors.bias, _Change(factors.scale, factors.bias))
        self._follow_ties()
        if self._problems:
            raise IncompatibleModels.of(self._problems)
        return self._found

    def _follow_ties(self) -> None:
        """A head that the config ties is its embedding, also where a copy of it is stored."""
        for info in self.base.tensors.values():
            if (partner := self.base.tied_partner(info.name, info.shape)) is None:
                continue
            if info.name in self._found:
                part = self._found[info.name].parts[0]
                self._refuse(f"changes {info.name}, which the base's config ties to {partner.name}", part)
            elif partner.name in self._found:
                self._found[info.name] = self._found[partner.name]

    def _of_factors(self, stored: str, factors: Factors, turned: set[bool | None]) -> _Change:
        info = self.base.tensors[stored]
        is_turned = factors.is_embedding or self._is_turned(info, factors)
        if is_turned is None:
            is_turned = self.adapter.config.fan_in_fan_out
            if turned == {None, not is_turned}:
                detail = (
                    f"is for {stored}, which is square, and {CONFIG_NAME} has fan_in_fan_out: {str(is_turned).lower()}"
                )
                self._refuse(f"{detail}, which the adapter's other weights contradict; correct it", factors.up)
        up, down = factors.up.shape[0], factors.down.shape[1:]
        shape = (*down, up) if is_turned else (up, *down)
        self._check_shape(info, factors.up, shape)
        if factors.magnitude is not None:
            if is_turned:
                self._refuse(f"holds norms over columns of {stored} (DoRA), which is not supported", factors.magnitude)
            elif factors.magnitude.elements != info.rows:
                detail = f"has {factors.magnitude.elements} norms, but {stored} has {info.rows} rows"
                self._refuse(detail, factors.magnitude)
        left, right = (factors.down, factors.up) if is_turned else (factors.up, factors.down)
        return _Change(factors.scale, left, right, bool(is_turned), factors.magnitude)

    @staticmethod
    def _is_turned(info: TensorInfo, factors: Factors) -> bool | None:
        """Whether a weight is stored `[inputs, outputs]`, as far as shapes tell."""
        if len(info.shape) != 2 or info.shape[0] == info.shape[1]:
            return False if len(info.shape) != 2 else None
        return info.shape == (math.prod(factors.down.shape[1:]), factors.up.shape[0])

    def _check_shape(self, info: TensorInfo, part: TensorInfo, shape: Sequence[int]) -> None:
        if info.shape != tuple(shape):
            grown = "; vocabularies that an adapter enlarges are not supported" if len(info.shape) == 2 else ""
            hint = grown if part in self.adapter.saved.values() else ""
            self._refuse(f"is for a tensor of shape {list(shape)}, but {info.name} is {list(info.shape)}{hint}", part)
        elif info.dtype.kind != "float":
            self._refuse(f"is for {info.name}, which is stored as {info.dtype}; use the unquantised model", part)

    def _add(self, stored: str, part: TensorInfo, change: _Change) -> None:
        before = self._found.get(stored)
        if before is not None and (before.left is not None or change.left is None):
            self._refuse(f"changes {stored}, which the adapter changes already", part)
        self._found[stored] = change if before is None else replace(change, replaced=before.replaced)

    def _refuse(self, detail: str, part: TensorInfo) -> None:
        detail = f"{self.name}: {part.name} {detail}"
        self._problems.append(Problem(detail, tensor=part.name, file=self.name))

    # Which tensor of the base is meant.

    def _names(self) -> dict[str, str]:
        """The adapter's name of each tensor it changes → the base's; what has none is a problem.

        A name that the base has means that tensor. The others differ from the base's by what stands before the layers,
        all in the same way: `model.layers.0.…` may be `layers.0.…` or `language_model.model.layers.0.…`.
        """
        wanted = {f"{module}.weight": factors.up for module, factors in self.adapter.modules.items()}
        wanted |= {
            f"{module}.bias": factors.bias
            for module, factors in self.adapter.modules.items()
            if factors.bias is not None
        }
        wanted |= self.adapter.saved
        names = {name: name for name in wanted if name in self.base.tensors}
        rest = [name for name in wanted if name not in names]
        fits = {tuple(found.items()) for found in map(dict, self._renamings(rest))}
        best = max((len(found) for found in fits), default=0)
        fits = {found for found in fits if len(found) == best}
        if len(fits) > 1:
            (name, one), (_, other) = (found[0] for found in sorted(fits)[:2])
            self._refuse(f"may be for {one} or for {other} of the base", wanted[name])
            return {}
        names |= dict(*fits)
        for name in rest:
            if name not in names:
                self._refuse(self._why_unknown(name, wanted[name]), wanted[name])
        return names

    def _renamings(self, rest: Sequence[str]) -> Iterator[dict[str, str]]:
        """Every way to put another beginning before the layers under which some of the names are the base's."""
        if not rest:
            return
        named = next((name for name in rest if stacks([name])), rest[0])
        parts = named.split(".")
        layer = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
        for dropped in range(max(1, min(layer, _MOST_DROPPED + 1))):
            tail = ".".join(parts[dropped:])
            begin = named.removesuffix(tail)
            for name in self.base.tensors:
                if name == tail or name.endswith("." + tail):
                    new = name.removesuffix(tail)
                    renamed = {one: new + one.removeprefix(begin) for one in rest if one.startswith(begin)}
                    yield {one: known for one, known in renamed.items() if known in self.base.tensors}

    def _why_unknown(self, name: str, part: TensorInfo) -> str:
        for stored in (info for info in self.base.tensors.values() if len(info.shape) == 2):
            if self.base.tied_partner(name, stored.shape):
                return f"changes {name}, which the base's config ties to {stored.name} and stores once"
        return f"matches nothing in the base, which has no {name}"
