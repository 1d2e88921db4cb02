"""How DAREx-q chooses q (Deng et al. 2025, arXiv 2410.09344): one for the whole model, by what outputs it gives, or one
for each layer, by gradient. The analytic q of each layer the method itself finds, from `means`.

With what a seed drops dropped, a merge with q is θ₀ + (1/q) δ′, so that `merge_core.learning` writes it into a module:
with `Dropped` task vectors, which are those that the method `darex` drops with the same seed, and coefficients 1/q.

    vectors = Dropped(StateVectors(base, [tuned]), drop_rate=0.9, seed=0)
    merged = Merged(net, vectors, Layout.shared(shapes))

    def change(q):
        merged.write(torch.tensor([[1 / q]], dtype=torch.float64))
        return float((hidden(net) - hidden_of_tuned).abs().mean())

    search_divisor(change, drop_rate=0.9).q

    loss = lambda batch: (top_logits(net(batch), *largest(of_tuned(batch))), {})
    learn(merged, Reciprocal(0.9), loss, rounds, schedule)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_core import random
from merge_core.learning import Form, Layout, Vectors
from merge_core.learning.parts import Parts

PATIENCE = 3
"""So many values of q in a row may be no better before the coarse grid is left."""
TOP = 5
"""Of so many logits, the fine-tune's largest, the authors compare."""


class Dropped(Vectors):
    """Other vectors without the entries that the method `darex` drops of them by chance, and not divided. Tensors in
    `whole` lose none.
    """

    def __init__(self, inner: Vectors, drop_rate: float, seed: int = 0, whole: Collection[str] = ()) -> None:
        self._inner, self._drop_rate, self._seed, self._whole = inner, drop_rate, seed, whole

    @property
    def models(self) -> int:
        return self._inner.models

    def origin(self, name: str) -> Tensor | None:
        return self._inner.origin(name)

    def vector(self, name: str, model: int) -> Tensor:
        vector = self._inner.vector(name, model)
        if name in self._whole:
            return vector
        drawn = random.uniform(random.stream_key(self._seed, model, name), 0, vector.numel(), vector.device)
        return torch.where(drawn.reshape(vector.shape) >= self._drop_rate, vector, 0.0)


@dataclass(frozen=True)
class Reciprocal(Form):
    """c = 1/q with q = |raw| + 1 − p, from just above plain DARE."""

    drop_rate: float
    initial: float = 1e-4

    def start(self, models: int) -> float:
        return self.initial

    def __call__(self, raw: Tensor, constants: Tensor) -> Tensor:
        return 1 / (raw.abs() + (1 - self.drop_rate))


def layers_of(shapes: Mapping[str, Sequence[int]]) -> Layout:
    """A coefficient for each tensor of two dimensions or more, which the bias beside it has too; one for all others."""
    columns: dict[str, int] = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            columns[name.rpartition(".")[0] if name.endswith(".weight") else name] = len(columns)
    others = len(columns)
    parts = {}
    for name, shape in shapes.items():
        layer = name.rpartition(".")[0]
        is_of = len(shape) > 1 or name.endswith(".bias")
        column = columns.get(name, columns.get(layer, others)) if is_of else others
        if math.prod(shape):
            parts[name] = Parts(name, tuple(shape), range(column, column + 1))
    return Layout(parts, others + 1)


@dataclass(frozen=True)
class Searched:
    """The q that was found, and what each that was tried came to, in order."""

    q: float
    tried: tuple[tuple[float, float], ...]


def search_divisor(
    score: Callable[[float], float],
    drop_rate: float,
    *,
    most: float | None = None,
    step: float | None = None,
) -> Searched:
    """The q with the least score: from 1 − p to `most` (ten times that, at most 1) by `step` (half of it) until more
    than three in a row were no better, then by tenths of a step around the best. Of equal scores the least q counts.

    >>> search_divisor(lambda q: abs(q - 0.23), drop_rate=0.9).q
    0.23
    """
    kept = 1 - drop_rate
    step = kept / 2 if step is None else step
    most = min(1.0, 10 * kept) if most is None else most
    found: dict[float, float] = {}

    def better(q: float) -> bool:
        before = min(found.values(), default=math.inf)
        found[q] = score(q)
        return found[q] < before

    worse = 0
    for number in range(int((most - kept) / step + 1e-9) + 1):
        worse = 0 if better(_rounded(kept + number * step)) else worse + 1
        if worse > PATIENCE:
            break
    best = _least(found)
    for number in (*range(-9, 0), *range(1, 10)):
        q = _rounded(best + number * step / 10)
        if kept - 1e-9 <= q <= most + 1e-9 and q not in found:
            better(q)
    return Searched(_least(found), tuple(found.items()))


def near(scores: Sequence[float]) -> float:
    """The mean over several masks without the one farthest from the mean, as the authors do with four; of one or two,
    their mean.
    """
    middle = sum(scores) / len(scores)
    if len(scores) < 3:
        return middle
    left = sorted(scores, key=lambda score: abs(score - middle))[:-1]
    return sum(left) / len(left)


def largest(logits: Tensor, count: int = TOP) -> tuple[Tensor, Tensor]:
    """The largest logits and their classes, `[..., count]`, or all where there are fewer: what is kept of a teacher."""
    found = logits.topk(min(count, logits.shape[-1]), dim=-1)
    return found.values, found.indices


def top_logits(logits: Tensor, values: Tensor, classes: Tensor) -> Tensor:
    """Mean squared difference between logits, `[places, classes]`, and those that were the largest."""
    return (logits.gather(-1, classes) - values).square().mean()


def _rounded(q: float) -> float:
    """To twelve digits: no more than what a recipe is to say."""
    return float(f"{q:.12g}")


def _least(found: Mapping[float, float]) -> float:
    """The least q of those with the least score; one that is no number counts as the worst."""
    return min(found, key=lambda q: (found[q] if not math.isnan(found[q]) else math.inf, q))
