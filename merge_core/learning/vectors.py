"""What a learned merge is made of, tensor by tensor: an origin or none, and a vector of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Vectors(Protocol):
    """Gives tensors one at a time, wherever they are; `models` is how many vectors a tensor has."""

    @property
    def models(self) -> int: ...

    def origin(self, name: str) -> Tensor | None:
        """θ₀ of a tensor, in its own dtype; None where nothing is added to."""

    def vector(self, name: str, model: int) -> Tensor:
        """δᵢ of a tensor, or θᵢ where there is no origin: float32, or float64 where a source is."""


class StateVectors:
    """δᵢ = θᵢ − θ₀ of tensors that are in memory, or θᵢ without a base."""

    def __init__(self, base: Mapping[str, Tensor] | None, models: Sequence[Mapping[str, Tensor]]) -> None:
        self._base, self._models = base, models

    @property
    def models(self) -> int:
        return len(self._models)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._models[0][name].shape)

    def origin(self, name: str) -> Tensor | None:
        return None if self._base is None else self._base[name]

    def vector(self, name: str, model: int) -> Tensor:
        mine = self._models[model][name]
        return widened(mine) if self._base is None else difference(mine, self._base[name])


class Cached:
    """Other vectors, of which so many bytes are kept: those that are asked for first."""

    def __init__(self, inner: Vectors, most_bytes: int) -> None:
        self._inner, self._left = inner, most_bytes
        self._kept: dict[tuple[str, int], Tensor] = {}

    @property
    def models(self) -> int:
        return self._inner.models

    def origin(self, name: str) -> Tensor | None:
        found = self._find(name, -1)
        return found if found is not None or (made := self._inner.origin(name)) is None else self._keep(name, -1, made)

    def vector(self, name: str, model: int) -> Tensor:
        found = self._find(name, model)
        return found if found is not None else self._keep(name, model, self._inner.vector(name, model))

    def _find(self, name: str, model: int) -> Tensor | None:
        return self._kept.get((name, model))

    def _keep(self, name: str, model: int, made: Tensor) -> Tensor:
        if made.nbytes <= self._left:
            self._left -= made.nbytes
            self._kept[name, model] = made
        return made


def widened(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is so already."""
    return tensor.float() if tensor.itemsize < 8 else tensor.double()


def difference(tensor: Tensor, base: Tensor) -> Tensor:
    """θ − θ₀, subtracted in float32 or better."""
    return widened(tensor) - widened(base)
