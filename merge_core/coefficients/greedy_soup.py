"""Greedy soups (Wortsman et al., 2022, recipe 1): average in one model after the other, as long as the score rises.

https://arxiv.org/abs/2203.05482
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

Accept = Literal["gt", "ge"]
Chosen = tuple[int, ...]


@dataclass(frozen=True)
class GreedySoup:
    """What a greedy soup came to, models by their numbers: each one's own score, the order in which they were tried,
    the ingredients, whose plain average is the soup, and its score.
    """

    scores: tuple[float, ...]
    order: tuple[int, ...]
    ingredients: tuple[int, ...]
    score: float


def soups(models: int, accept: Accept = "gt") -> Generator[Sequence[Chosen], Sequence[float], GreedySoup]:
    """The soups that have to be scored, some at a time: yields models to be averaged, is sent the scores of all these.

    First each model alone; then, from the best to the worst, of equals the later first as the authors' code has it,
    the soup so far with one more.
    """
    if models < 1:
        raise ValueError("a soup needs at least one model")
    scores = tuple((yield [(model,) for model in range(models)]))
    order = tuple(sorted(range(models), key=scores.__getitem__)[::-1])
    ingredients, best = [order[0]], scores[order[0]]
    for model in order[1:]:
        (score,) = yield [(*ingredients, model)]
        if score > best or (accept == "ge" and score == best):
            ingredients.append(model)
            best = score
    return GreedySoup(scores, order, tuple(ingredients), best)


def greedy_soup(models: int, evaluate: Callable[[Sequence[int]], float], *, accept: Accept = "gt") -> GreedySoup:
    """Choose which of so many models to average.

    `evaluate` scores the plain average of the models of the given numbers on held-out data, more being better. One
    stays if the score with it is more than without (`ge`: not less).

    >>> value = {(0,): 0.7, (1,): 0.9, (2,): 0.8, (1, 2): 0.95, (1, 2, 0): 0.9}
    >>> greedy_soup(3, lambda chosen: value[tuple(chosen)]).ingredients
    (1, 2)
    """
    tries = soups(models, accept)
    asked = next(tries)
    while True:
        try:
            asked = tries.send([evaluate(list(chosen)) for chosen in asked])
        except StopIteration as end:
            found: GreedySoup = end.value
            return found
