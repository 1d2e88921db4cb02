"""A calibration: a recipe, and under `calibrate` which of its numbers are measured or learned, and on what."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Self, Union

from pydantic import Field

from merge_core.calibration.method import Calibrator
from merge_core.calibration.methods import CALIBRATORS
from merge_core.documents import suggestion
from merge_core.errors import Problem, RecipeError
from merge_core.recipe import Recipe

if TYPE_CHECKING:
    AnyCalibrator = Calibrator
else:
    AnyCalibrator = Annotated[Union[tuple(CALIBRATORS.values())], Field(discriminator="method")]  # noqa: UP007

_LEFT_AWAY = {
    "slices": "layers are calibrated where they are",
    "modules": "one list of models is calibrated",
    "patches": "patches are put on what was merged; calibrate without them",
    "alignment": "align the models first, then calibrate",
    "tokenizer": "models are run with the vocabulary that they have",
    "tokenizer_source": "models are run with the vocabulary that they have",
}


class Calibration(Recipe):
    """A recipe with `calibrate`."""

    calibrate: AnyCalibrator | None = Field(None, description="which numbers are measured or learned, and on what")

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read parsed YAML or JSON. Raises `RecipeError` naming every key that is wrong."""
        if isinstance(data, list) and len(data) != 1:
            raise RecipeError("a calibration is one document; stages cannot be calibrated through")
        data = data[0] if isinstance(data, list) else data
        if isinstance(data, Mapping) and (problem := _unnamed(data.get("calibrate"))) is not None:
            raise RecipeError.of([problem])
        try:
            found = super().from_data(data)
        except RecipeError as error:
            raise RecipeError.of(map(_without_tag, error.problems)) if error.problems else error from None
        if problems := [*found._problems()]:
            raise RecipeError.of(problems)
        return found

    @property
    def keys(self) -> Calibrator:
        assert self.calibrate is not None  # or `from_data` had refused it
        return self.calibrate

    @property
    def without(self) -> dict[str, Any]:
        """The recipe as plain data, without what is to be done with it."""
        data = self.to_data()
        assert isinstance(data, dict)
        data.pop("calibrate", None)
        return copy.deepcopy(data)

    @property
    def template(self) -> Recipe:
        """A recipe that merges the same tensors and needs no statistics. Raises `RecipeError`."""
        data = self.without
        data.pop("outputs", None)
        return Recipe.from_data(self.keys.template(data))

    def expert_of(self, model: Any) -> int | None:
        """The place of a model among the recipe's; None: it is about all of them."""
        if model is None:
            return None
        return [entry.model for entry in self.models or ()].index(model)

    def _problems(self) -> Iterator[Problem]:
        keys = self.keys
        if self.merge_method not in keys.serves:
            served = " or ".join(keys.serves)
            yield Problem(f"{keys.method} finds numbers for {served}; write merge_method: {served}", "#/merge_method")
        for name, why in _LEFT_AWAY.items():
            if getattr(self, name):
                yield Problem(f"{why}; leave this away", f"#/{name}")
        if self.models is None:
            return
        if self.unknown_keys == "warn":
            yield Problem("a calibration is read strictly; leave this away", "#/unknown_keys")
        for entry in self.models:
            if entry.base_model is not None and not self.method.own_bases:
                yield Problem("the recipe has one base", "#/models")
        known = [entry.model for entry in self.models]
        for name, files in (("data", keys.data), (keys.second, keys.checks)):
            for i, file in enumerate(files):
                if file.model is not None and file.model not in known:
                    there = ", ".join(map(str, known))
                    near = suggestion(str(file.model), map(str, known))
                    what = f"{file.model} is none of the models ({there}){near}"
                    yield Problem(what, f"#/calibrate/{name}/{i}/model")
        yield from keys.problems(self)


def _unnamed(calibrate: Any) -> Problem | None:
    """Why it is not known how to calibrate."""
    names = ", ".join(CALIBRATORS)
    if not isinstance(calibrate, Mapping):
        return Problem(f"say how and on what: {{method: one of {names}, data: [{{file: …}}]}}", "#/calibrate")
    method = calibrate.get("method")
    if method is None:
        return Problem(f"say how: one of {names}", "#/calibrate/method")
    if method not in CALIBRATORS:
        near = suggestion(str(method), CALIBRATORS)
        return Problem(f"there is no {str(method)[:60]!r} among {names}{near}", "#/calibrate/method")
    return None


def _without_tag(problem: Problem) -> Problem:
    """A problem whose pointer is one into what was written: pydantic's has the method in it."""
    parts = (problem.pointer or "#").split("/")
    if parts[:2] == ["#", "calibrate"] and len(parts) > 2 and parts[2] in CALIBRATORS:
        return replace(problem, pointer="/".join([*parts[:2], *parts[3:]]))
    return problem
