"""Which of many results no other beats: the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence


def front(scores: Sequence[Sequence[float]]) -> list[int]:
    """The numbers of the results that no other is as good as in everything and better in something; of equals all.

    `scores`: one row for each result, more being better.

    >>> front([[1, 5], [2, 4], [1, 4], [2, 4]])
    [0, 1, 3]
    """
    # What beats a row comes before it in this order, and what beats that is in the front: so only these are compared.
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda place: tuple(scores[place]), reverse=True):
        if not any(_beats(scores[other], scores[i]) for other in kept):
            kept.append(i)
    return sorted(kept)


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))
