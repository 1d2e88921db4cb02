"""The mean of several models as weights, computed row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from merge_core.dtypes import FLOAT32, FLOAT64
from merge_core.headers import TensorInfo
from merge_core.weights import Derived, Weights


class MeanOf(Derived):
    """The mean of models with the same names and shapes: numbers in float32, or float64 where one is stored so; what
    is no number is the first model's. `shards` are the files of all, each name led by its model's number.
    """

    def __init__(self, models: Sequence[Weights]) -> None:
        super().__init__(models[0])
        self.models = tuple(models)
        self.path = Path("the mean of " + " and ".join(str(weights.path) for weights in models))
        self.tensors = {name: self._info(info) for name, info in models[0].tensors.items()}
        self._files = {f"{n}/{file}": (weights, file) for n, weights in enumerate(models) for file in weights.shards}
        self.shards = {name: weights.shards[file] for name, (weights, file) in self._files.items()}

    def _info(self, info: TensorInfo) -> TensorInfo:
        stored = [weights.tensors[info.name].dtype for weights in self.models]
        if any(dtype.kind != "float" for dtype in stored):
            return replace(info, file=f"0/{info.file}")
        return replace(info, dtype=FLOAT64 if FLOAT64 in stored else FLOAT32, file=f"0/{info.file}")

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        theirs = self._theirs(info)
        if not self._is_mean(info):
            return self.inner.rows(theirs[0], start, stop, space)
        total = torch.zeros((stop - start, *info.shape[1:]) if info.shape else (), dtype=info.dtype.torch)
        for weights, stored in zip(self.models, theirs, strict=True):
            total += weights.rows(stored, start, stop)
        total /= len(self.models)
        if space is None:
            return total
        rows = space[: total.nbytes].view(info.dtype.torch).reshape(total.shape)
        return rows.copy_(total)

    def place(self, info: TensorInfo) -> tuple[int, int] | None:
        return None if self._is_mean(info) else self.inner.place(self._theirs(info)[0])

    def ranges(self, info: TensorInfo) -> Iterator[tuple[str, int, int]]:
        for number, (weights, stored) in enumerate(zip(self.models, self._theirs(info), strict=True)):
            for file, begin, end in weights.ranges(stored):
                yield f"{number}/{file}", begin, end

    def temporary(self, info: TensorInfo) -> float:
        theirs = zip(self.models, self._theirs(info), strict=True)
        return info.dtype.itemsize + max(
            weights.temporary(stored) + stored.dtype.itemsize for weights, stored in theirs
        )

    def thread_bytes(self, info: TensorInfo) -> int:
        theirs = zip(self.models, self._theirs(info), strict=True)
        return max(weights.thread_bytes(stored) for weights, stored in theirs)

    def is_whole(self, info: TensorInfo) -> bool:
        return any(weights.is_whole(stored) for weights, stored in zip(self.models, self._theirs(info), strict=True))

    def prepare(self, info: TensorInfo, pool: Executor | None) -> None:
        for weights, stored in zip(self.models, self._theirs(info), strict=True):
            weights.prepare(stored, pool)

    def always_read(self) -> Iterator[str]:
        for number, weights in enumerate(self.models):
            yield from (f"{number}/{file}" for file in weights.always_read())

    def descriptor(self, file: str) -> int:
        weights, name = self._files[file]
        return weights.descriptor(name)

    def close(self) -> None:
        for weights in self.models:
            weights.close()

    def _is_mean(self, info: TensorInfo) -> bool:
        return all(weights.tensors[info.name].dtype.kind == "float" for weights in self.models)

    def _theirs(self, info: TensorInfo) -> list[TensorInfo]:
        return [weights.tensors[info.name] for weights in self.models]
