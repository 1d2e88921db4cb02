"""Which elements of a tensor share a coefficient: runs of them, random sets of them, or all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from merge_core import kernels, random

Rule = Literal["runs", "random"]
_AT_ONCE = 2**20
"""Elements whose products are held at a time, in float64."""


@dataclass(frozen=True)
class Parts:
    """The parts of one tensor: `columns` are theirs in the matrix of all coefficients, `[models, columns]`.

    `runs`: the k-th run of ⌈n / K⌉ elements in row-major order, so that the last may be shorter and not all K may be
    used, as `torch.chunk` cuts (Expert Merging++). `random`: each element in one of K parts, ⌊K u⌋ by the uniform
    number u at its index (aTLAS ×K).
    """

    tensor: str
    shape: tuple[int, ...]
    columns: range
    rule: Rule = "runs"
    seed: int = 0

    @property
    def count(self) -> int:
        return len(self.columns)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def sums(self, one: Tensor, other: Tensor) -> Tensor:
        """Σ one ⊙ other over each part: `[count]`, float64."""
        found = torch.zeros(self.count, dtype=torch.float64, device=one.device)
        one, other = one.reshape(-1), other.reshape(-1)
        for start, stop, part in self._pieces(one.device):
            products = one[start:stop].double() * other[start:stop].double()
            if isinstance(part, int):
                found[part] += products.sum()
            elif one.device.type == "cpu":
                found += torch.bincount(part, products, self.count)
            else:  # where it adds up in any order
                for k in range(self.count):
                    found[k] += torch.where(part == k, products, 0.0).sum()
        return found

    def times(self, vector: Tensor, coefficients: Tensor) -> Tensor:
        """Each element times its part's coefficient (`[count]`): the vector's shape and dtype."""
        found = torch.empty_like(vector)
        flat, into = vector.reshape(-1), found.view(-1)
        coefficients = coefficients.to(vector.device, vector.dtype)
        for start, stop, part in self._pieces(vector.device):
            factor = coefficients[part]
            torch.mul(flat[start:stop], factor, out=into[start:stop])
        return found

    def _pieces(self, device: torch.device) -> Iterator[tuple[int, int, int | Tensor]]:
        """Pieces of bounded size and the part that each is in, or the part of each of its elements."""
        size = -(-self.elements // self.count) if self.rule == "runs" else self.elements
        for begin in range(0, self.elements, max(1, size)):
            end = min(begin + size, self.elements)
            for start in range(begin, end, _AT_ONCE):
                stop = min(start + _AT_ONCE, end)
                is_whole = self.rule == "runs" or self.count == 1
                yield start, stop, begin // size if is_whole else self._drawn[start:stop].to(device).long()

    @cached_property
    def _drawn(self) -> Tensor:
        """The part of each element: one byte each, or two where there are more than 256 parts."""
        key, kind = random.stream_key(self.seed, 0, self.tensor), torch.uint8 if self.count <= 256 else torch.int16
        found = torch.empty(self.elements, dtype=kind)
        for start in range(0, self.elements, _AT_ONCE):
            count = min(_AT_ONCE, self.elements - start)
            found[start : start + count] = drawn(kernels.uniform(key, start, count, torch.device("cpu")), self.count)
        return found


def drawn(uniform: Tensor, count: int) -> Tensor:
    """The random part, 0 to `count` − 1, of elements with these uniform numbers (multiples of 2⁻²⁴ in [0, 1))."""
    return (uniform.double() * count).long()


@dataclass(frozen=True)
class Layout:
    """Where the coefficients of each learned tensor are among all: `[models, width]`."""

    parts: Mapping[str, Parts]
    width: int

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, Sequence[int]],
        parts: int | Mapping[str, int] = 1,
        *,
        rule: Rule = "runs",
        seed: int = 0,
    ) -> Self:
        """Coefficients of its own for each tensor; `parts` for all alike or by name, where a tensor with 0, or without
        elements, is not learned.
        """
        found: dict[str, Parts] = {}
        width = 0
        for name, shape in shapes.items():
            count = parts if isinstance(parts, int) else parts.get(name, 0)
            if count < 1 or math.prod(shape) == 0:
                continue
            found[name] = Parts(name, tuple(shape), range(width, width + count), rule, seed)
            width += count
        return cls(found, width)

    @classmethod
    def shared(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """One coefficient for the whole of each model."""
        there = {name: tuple(shape) for name, shape in shapes.items() if math.prod(shape)}
        return cls({name: Parts(name, shape, range(1)) for name, shape in there.items()}, 1)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """The coefficients of each tensor, `[models, parts]`."""
        return {name: values[:, each.columns.start : each.columns.stop] for name, each in self.parts.items()}
