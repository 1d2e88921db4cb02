"""Whether the base may be the wrong one: what a model is to its base, and models are to one another, tells.

Of whole models, with δᵢ = θᵢ − θ₀, four findings are told, each with the number it is made of:

- *same*: no entry of the model differs from the base. It is the base.
- *far*: ‖δᵢ‖ ≥ ½ ‖θ₀‖. Fine-tuning moves weights by a few per cent; weights that have nothing to do with the base, but
  their size, are √2 ‖θ₀‖ away from it.
- *outlier*: ‖δᵢ‖/‖θ₀‖ is eight times the median of the other models', and there are two others at least. So far apart
  lie models of two bases.
- *together*: ‖θᵢ − θⱼ‖ is less than half of both ‖δᵢ‖ and ‖δⱼ‖. Task vectors that were found independently are nearly
  at right angles, so that two models are further from one another than either from the base; two that share most of
  their way from it were tuned from something that lies between: the true base, or one from the other.
- *rounded*: the model is stored in another number format than the base, and differs from it by no more than rounding
  to the coarser of the two does, ‖δᵢ‖ ≤ u ‖θ₀‖ with the unit roundoff u. It is the base in another format.

They are reasons to look, and no proof: a model that was trained for long is far too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from merge_core.analysis.survey import Figures

FAR = 0.5
OUTLIER = 8.0
TOGETHER = 0.5


@dataclass(frozen=True)
class Suspicion:
    """Something about the base that should be looked at: which rule, of which models (by place), what it is made of,
    and in words.
    """

    rule: Literal["same", "far", "outlier", "together", "rounded"]
    models: tuple[int, ...]
    value: float
    words: str


def suspicions(names: Sequence[str], whole: Figures, roundoff: Sequence[float]) -> list[Suspicion]:
    """What is suspicious about the base of the models with these names, given the figures of all tensors together.

    `roundoff`: of each model, the unit roundoff of the coarser number format, 0 where the base has the same.
    """
    squares = whole.gram.diagonal().tolist()
    base = math.sqrt(whole.base)
    relative = [math.sqrt(square) / base if base else 0.0 for square in squares]
    found = []
    for i, name in enumerate(names):
        others = [each for j, each in enumerate(relative) if j != i and whole.changed[j]]
        if not whole.changed[i]:
            found.append(Suspicion("same", (i,), 0.0, f"{name} is the base: no entry differs"))
        elif relative[i] <= roundoff[i]:
            words = f"{name} differs from the base by rounding alone ({relative[i]:.2g}): the same in another format"
            found.append(Suspicion("rounded", (i,), relative[i], words))
        elif relative[i] >= FAR:
            words = (
                f"{name} is {relative[i]:.2f} times the base's length away from it, where a fine-tune is a few "
                "hundredths: it was hardly tuned from this base"
            )
            found.append(Suspicion("far", (i,), relative[i], words))
        elif len(others) > 1 and relative[i] >= OUTLIER * (usual := statistics.median(others)) > 0:
            words = (
                f"{name} is {relative[i] / usual:.0f} times as far from the base as the others usually are: it may "
                "have another base than they"
            )
            found.append(Suspicion("outlier", (i,), relative[i] / usual, words))
    for i in range(len(names)):
        for j in range(i):
            between = max(0.0, squares[i] + squares[j] - 2 * float(whole.gram[i, j]))
            nearer = min(squares[i], squares[j])
            if nearer > 0 and between < TOGETHER**2 * nearer:
                share = math.sqrt(between / nearer)
                words = (
                    f"{names[j]} and {names[i]} are much nearer to one another than to the base ({share:.2f} of the "
                    "way): their true base lies between, or one was tuned from the other"
                )
                found.append(Suspicion("together", (j, i), share, words))
    return found
