"""What is tried next: each strategy yields the values of some trials at a time, and is sent what all of them came to.

A strategy depends on nothing but its parameters and what it was sent, so that it can be started again and answered
what is known already: it comes to the same place (see docs/decisions/0030).
"""

from __future__ import annotations

import itertools
import logging
import random
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from merge_core.coefficients.greedy_soup import Accept, soups
from merge_core.coefficients.spaces import Choices, Space, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

Values = Mapping[str, Any]
"""One trial: a value for each name; of a soup, `models` are the numbers of its ingredients."""
Direction = Literal["maximize", "minimize"]
MODELS = "models"


@dataclass(frozen=True)
class Scored:
    """What a trial came to: a number for each metric, in their order; None where it was given up before its end."""

    scores: tuple[float, ...] | None


Strategy = Generator[Sequence[Values], Sequence[Scored], None]
_ROUND = 64
"""Trials of which none depends on another that are planned together."""


def greedy(models: int, accept: Accept, direction: Direction) -> Strategy:
    """A greedy soup of so many models, by the first metric."""
    sign = 1.0 if direction == "maximize" else -1.0
    tries = soups(models, accept)
    asked = next(tries)
    while True:
        scored = yield [{MODELS: list(chosen)} for chosen in asked]
        try:
            asked = tries.send([sign * each.scores[0] if each.scores else -float("inf") for each in scored])
        except StopIteration:
            return


def grid(spaces: Mapping[str, Space], most: int | None = None) -> Strategy:
    """Every combination, the last name changing fastest; the first `most` of them."""
    every = (
        dict(zip(spaces, values, strict=True)) for values in itertools.product(*(s.grid() for s in spaces.values()))
    )
    yield from _together(itertools.islice(every, most))


def grid_size(spaces: Mapping[str, Space]) -> int:
    """How many combinations there are."""
    size = 1
    for space in spaces.values():
        size *= len(space.grid())
    return size


def at_random(spaces: Mapping[str, Space], trials: int, seed: int) -> Strategy:
    """Values drawn independently of one another, evenly (or in the logarithm)."""
    draw = random.Random(seed)  # noqa: S311 — nothing to be kept secret
    yield from _together({name: _drawn(space, draw) for name, space in spaces.items()} for _ in range(trials))


def _drawn(space: Space, draw: random.Random) -> Value:
    if isinstance(space, Choices) or space.step is not None or (space.integer and not space.log):
        return draw.choice(space.grid())
    if not space.log:
        return draw.uniform(space.low, space.high)
    import math

    value = math.exp(draw.uniform(math.log(space.low), math.log(space.high)))
    return min(max(round(value), round(space.low)), round(space.high)) if space.integer else value


def _together(every: Any) -> Strategy:
    every = iter(every)
    while some := list(itertools.islice(every, _ROUND)):
        yield some


def sampled(
    method: Literal["tpe", "cma_es"],
    spaces: Mapping[str, Space],
    directions: Sequence[Direction],
    *,
    trials: int,
    parallel: int,
    seed: int,
    first: Values | None = None,
) -> Strategy:
    """Values that a sampler of Optuna proposes, `parallel` at a time: the tree-structured Parzen estimator (Bergstra
    et al., 2011; with several metrics Ozaki et al., 2020) or CMA-ES (Hansen and Ostermeier, 2001), which goes by the
    first metric. `first` is tried first of all.

    https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization, https://doi.org/10.1162/106365601750190398
    """
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    directions = directions[:1] if method == "cma_es" else directions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(directions=list(directions), sampler=_sampler(method, seed))
    if first is not None:
        study.enqueue_trial(dict(first))
    distributions = {name: _distribution(space) for name, space in spaces.items()}
    left = trials
    while left > 0:
        asked = []
        for _ in range(min(parallel, left)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                asked.append(study.ask(distributions))
        left -= len(asked)
        scored = yield [{name: trial.params[name] for name in spaces} for trial in asked]
        for trial, each in zip(asked, scored, strict=True):
            if each.scores is None:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, list(each.scores[: len(directions)]))


def _sampler(method: str, seed: int) -> BaseSampler:
    from optuna.samplers import CmaEsSampler, TPESampler

    if method == "cma_es":
        return CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return TPESampler(seed=seed, multivariate=True)


def _distribution(space: Space) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(space, Choices):
        return CategoricalDistribution(list(space.values))
    if space.integer:
        return IntDistribution(int(space.low), int(space.high), log=space.log, step=int(space.step or 1))
    return FloatDistribution(float(space.low), float(space.high), log=space.log, step=space.step)
