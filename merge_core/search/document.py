"""A search: a recipe, and under `search` which of its numbers are looked for.

A trial's recipe is the same one with values in their places, without `search`. A place is a JSON pointer into the
output's document, `#/parameters/weight`, or led by the name of a stage: `stage#/parameters/weight`. What the result
shall be (`outputs`) counts for the result alone: a candidate is a whole model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

from pydantic import Field

from merge_core.coefficients import strategies
from merge_core.coefficients.spaces import Choices, Space
from merge_core.coefficients.strategies import MODELS, Strategy, Values
from merge_core.documents import escaped
from merge_core.errors import Problem, RecipeError
from merge_core.recipe import Recipe
from merge_core.search.keys import DRAWN, MOST_TRIALS, SearchKeys

_MISSING = object()
_NOT_SEARCHED = ("search", "outputs", "limits", "unknown_keys", "name")
_OF_GREEDY = ("accept",)


class Search(Recipe):
    """A recipe with a `search`."""

    search: SearchKeys | None = Field(None, description="which numbers are looked for, and by what score")

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read parsed YAML or JSON, a list where there are several documents. Raises `RecipeError` naming every key
        that is wrong.
        """
        found = super().from_data(data)
        problems = [problem for stage in found.stages for problem in _only_in_output(stage)]
        if found.search is None:
            problems.append(found.located(Problem("say what is searched for, and by what score", "#/search")))
        elif not problems:
            problems += [found.located(problem) for problem in found._search_problems(found.search)]
        if problems:
            raise RecipeError.of(problems)
        return found

    @property
    def keys(self) -> SearchKeys:
        assert self.search is not None  # or `from_data` had refused it
        return self.search

    # What is searched for.

    @cached_property
    def spaces(self) -> Mapping[str, Space]:
        """The values of each number, by its name; those per model are numbered: `weight[0]`."""
        return {name: space for name, (space, _) in self._places.items()}

    @cached_property
    def _places(self) -> Mapping[str, tuple[Space, Sequence[str]]]:
        """Each number's values, and where they go."""
        found: dict[str, tuple[Space, Sequence[str]]] = {}
        for name, keys in self.keys.space.items():
            if keys.per_model:
                for i in range(len(self.models or ())):
                    found[f"{name}[{i}]"] = keys.space(), [_beside(name, i)]
            else:
                found[name] = keys.space(), keys.at or [_for_all(name)]
        return found

    @cached_property
    def template(self) -> Any:
        """The recipe as plain data, without what is not a candidate's."""
        data = self.to_data()
        documents = data if isinstance(data, list) else [data]
        for document in documents:
            for key in ("search", "outputs"):
                document.pop(key, None)
        if self.keys.method == "greedy_soup" and self.merge_method == "linear":
            parts = [documents[-1], *documents[-1].get("models", ())]
            if not any("weight" in (part.get("parameters") or {}) for part in parts):
                documents[-1]["parameters"] = {**(documents[-1].get("parameters") or {}), "weight": 1}
        return data

    def candidate(self, values: Values, *, whole: bool = True) -> Recipe:
        """The recipe of a trial; not `whole`: with the outputs that are wanted of the result. Raises `RecipeError`."""
        data = copy.deepcopy(self.template)
        output = data[-1] if isinstance(data, list) else data
        if not whole and "outputs" in self.model_fields_set:
            output["outputs"] = self.outputs.model_dump(mode="json", exclude_unset=True)
        if self.keys.method == "greedy_soup":
            output["models"] = [output["models"][number] for number in values[MODELS]]
        else:
            for name, (_, places) in self._places.items():
                for place in places:
                    _put(data, place, values[name])
        return Recipe.from_data(data)

    @property
    def first(self) -> Values | None:
        """The values as the recipe has them, where it has all of them and each may be tried."""
        data = self.template
        found = {name: _at(data, places[0]) for name, (_, places) in self._places.items()}
        return found if all(self.spaces[name].holds(value) for name, value in found.items()) else None

    @property
    def usual(self) -> Values:
        """A trial that has to work: as the recipe is written, or in the middle of what may be tried; all models."""
        if self.keys.method == "greedy_soup":
            return {MODELS: list(range(len(self.models or ())))}
        middle = {name: space.grid()[len(space.grid()) // 2] for name, space in self.spaces.items()}
        return self.first or middle

    @property
    def each_choice(self) -> Iterator[Values]:
        """Trials that have to work too: every choice once, every model of a soup alone."""
        if self.keys.method == "greedy_soup":
            yield from ({MODELS: [number]} for number in range(len(self.models or ())))
        for name, space in self.spaces.items():
            if isinstance(space, Choices):
                yield from ({**self.usual, name: value} for value in space.values)

    @property
    def ends(self) -> Iterator[Values]:
        """All numbers at their least, and at their most: a method may refuse that."""
        if self.spaces:
            yield {name: space.ends[0] for name, space in self.spaces.items()}
            yield {name: space.ends[-1] for name, space in self.spaces.items()}

    @property
    def most_trials(self) -> int:
        """How many trials there are at most."""
        keys = self.keys
        if keys.method == "greedy_soup":
            return max(1, 2 * len(self.models or ()) - 1)
        most = keys.trials or MOST_TRIALS
        return min(most, strategies.grid_size(self.spaces)) if keys.method == "grid" else most

    def strategy(self) -> Strategy:
        """What is tried next, begun anew."""
        keys, directions = self.keys, list(self.keys.wanted.values())
        if keys.method == "greedy_soup":
            return strategies.greedy(len(self.models or ()), keys.accept, directions[0])
        if keys.method == "grid":
            return strategies.grid(self.spaces, keys.trials)
        if keys.method == "random":
            return strategies.at_random(self.spaces, self.most_trials, keys.seed)
        return strategies.sampled(
            keys.method,
            self.spaces,
            directions,
            trials=self.most_trials,
            parallel=keys.parallel,
            seed=keys.seed,
            first=self.first,
        )

    # What is wrong with it.

    def _search_problems(self, keys: SearchKeys) -> Iterator[Problem]:
        if not keys.wanted:
            kind = keys.evaluator.kind
            yield Problem(f"say which metrics of {kind} count: accuracy: maximize", "#/search/metrics")
        if self.unknown_keys == "warn":
            yield Problem("a search is read strictly; leave this away", "#/unknown_keys")
        if keys.method == "greedy_soup":
            yield from self._greedy_problems(keys)
            return
        for name in _OF_GREEDY:
            if name in keys.model_fields_set:
                yield Problem("only a greedy soup accepts", f"#/search/{name}")
        if not keys.space:
            yield Problem("name at least one number that is searched for", "#/search/space")
        if keys.method in DRAWN and keys.trials is None and keys.seconds is None:
            yield Problem("without an end: say how many trials, or for how many seconds", "#/search/trials")
        seen: dict[str, str] = {}
        wrong = False
        for name, entry in keys.space.items():
            for problem in self._space_problems(name, entry, seen):
                wrong = True
                yield problem
        if wrong:
            return
        if keys.method == "cma_es":
            numbers = [name for name, space in self.spaces.items() if not isinstance(space, Choices)]
            if len(numbers) < len(self.spaces) or len(numbers) < 2:
                yield Problem("cma_es needs two numbers or more, and no choices; take tpe", "#/search/method")
        if keys.method == "grid" and keys.trials is None and strategies.grid_size(self.spaces) > MOST_TRIALS:
            size = strategies.grid_size(self.spaces)
            yield Problem(f"the grid has {size:,} trials; at most {MOST_TRIALS:,} are made", "#/search/space")

    def _greedy_problems(self, keys: SearchKeys) -> Iterator[Problem]:
        if self.models is None:
            yield Problem("a greedy soup chooses among models; list them", "#/models")
        if self.stages:
            yield Problem("a greedy soup has one document", "#")
        for name in ("space", "trials", "seed", "parallel", "prune"):
            if name in keys.model_fields_set:
                yield Problem("the models alone say what a greedy soup tries; leave this away", f"#/search/{name}")

    def _space_problems(self, name: str, entry: Any, seen: dict[str, str]) -> Iterator[Problem]:
        here = f"#/search/space/{escaped(name)}"
        if entry.per_model:
            if self.models is None:
                yield Problem("the recipe has no models; say where, by at", f"{here}/per_model")
            places = [_beside(name, i) for i in range(len(self.models or ()))]
        else:
            places = entry.at or [_for_all(name)]
        for place in places:
            if place in seen:
                yield Problem(f"{place} is {seen[place]}'s already", here)
            seen[place] = name
            if why := self._unfit(place):
                yield Problem(f"{place[:200]}: {why}", f"{here}/at" if entry.at else here)

    def _unfit(self, place: str) -> str | None:
        """Why a number cannot be put there."""
        stage, sharp, pointer = place.partition("#")
        if not sharp or not pointer.startswith("/") or len(pointer) < 2:
            return "this is no JSON pointer into the recipe, such as #/parameters/weight"
        if stage and stage not in [each.name for each in self.stages]:
            return f"the recipe has no stage {stage[:60]!r}"
        if (top := _keys_of(pointer)[0]) in _NOT_SEARCHED:
            return f"{top} is nothing to search for"
        if re.search(r"/(model|base_model|patch|layer_range|statistics)(/|$)", pointer):
            return "which files are read is nothing to search for; take a greedy soup, or a weight that may be 0"
        try:
            _put(copy.deepcopy(self.template), place, 0)
        except LookupError:
            return "the recipe has no such place"
        return None


def _beside(name: str, model: int) -> str:
    return f"#/models/{model}/parameters/{escaped(name)}"


def _for_all(name: str) -> str:
    return f"#/parameters/{escaped(name)}"


def _only_in_output(stage: Recipe) -> Iterator[Problem]:
    if isinstance(stage, Search) and stage.search is not None:
        yield stage.located(
            Problem("a search is that of the whole recipe; put it into the output's document", "#/search")
        )


def _keys_of(place: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in place.split("/")[1:]]


def _document(data: Any, stage: str) -> Any:
    """The document that a place is in: the output's, or that of a stage."""
    if not isinstance(data, list):
        return data
    return data[-1] if not stage else next(each for each in data if each.get("name") == stage)


def _put(data: Any, place: str, value: Any) -> None:
    """Put a value where it belongs; `parameters` are made where there are none. Raises `LookupError`."""
    stage, _, pointer = place.partition("#")
    inside = _document(data, stage)
    *path, last = _keys_of(pointer)
    for key in path:
        if key == "parameters" and isinstance(inside, dict) and inside.get(key) is None:
            inside[key] = {}
        inside = _below(inside, key)
    if isinstance(inside, list):
        inside[_index(last, inside)] = value
    elif isinstance(inside, dict) and (
        last in inside or (path and path[-1] == "parameters") or last in Recipe.model_fields
    ):
        inside[last] = value
    else:
        raise LookupError(place)


def _at(data: Any, place: str) -> Any:
    """What the recipe has there; nothing that may be tried, where it has none."""
    stage, _, pointer = place.partition("#")
    inside = _document(data, stage)
    try:
        for key in _keys_of(pointer):
            inside = _below(inside, key)
    except LookupError:
        return _MISSING
    return inside


def _below(inside: Any, key: str) -> Any:
    if isinstance(inside, list):
        return inside[_index(key, inside)]
    if isinstance(inside, dict):
        return inside[key]
    raise LookupError(key)


def _index(key: str, data: Sequence[Any]) -> int:
    if not key.isdecimal() or len(key) > 6 or int(key) >= len(data):
        raise LookupError(key)
    return int(key)
