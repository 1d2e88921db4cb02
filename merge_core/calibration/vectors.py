"""The tensors of models in folders, one at a time, as learning takes them (`merge_core.learning.Vectors`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from merge_core.errors import CheckpointError
from merge_core.learning.vectors import difference, widened
from merge_core.weights import Weights


class StoredVectors:
    """δᵢ = θᵢ − θ₀, or θᵢ without a base, read whenever they are asked for."""

    def __init__(self, base: Weights | None, models: Sequence[Weights], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._base, self._models, self._shapes = base, models, shapes

    @property
    def models(self) -> int:
        return len(self._models)

    def origin(self, name: str) -> Tensor | None:
        return None if self._base is None else self._read(self._base, name)

    def vector(self, name: str, model: int) -> Tensor:
        mine = self._read(self._models[model], name)
        return widened(mine) if self._base is None else difference(mine, self._read(self._base, name))

    def names(self, model: int) -> Collection[str]:
        """The tensors that a model has."""
        return self._models[model].tensors

    def stored(self, name: str, model: int) -> Tensor:
        """A tensor of a model as it is, whatever its shape is elsewhere."""
        weights = self._models[model]
        if (info := weights.tensors.get(name)) is None:
            raise CheckpointError(weights.path, f"lacks {name}", tensor=name)
        return weights.rows(info, 0, info.rows).reshape(info.shape)

    def _read(self, weights: Weights, name: str) -> Tensor:
        info = weights.find(name, self._shapes[name])
        if info is None:
            raise CheckpointError(weights.path, f"lacks {name}", tensor=name)
        return weights.rows(info, 0, info.rows).reshape(info.shape)
