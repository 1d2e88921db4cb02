"""What stands under a recipe's `search`: the method, the numbers that are searched for, the evaluator, the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from merge_core.coefficients.spaces import Choices, Range, Space
from merge_core.coefficients.strategies import Direction
from merge_core.documents import Keys
from merge_core.keys import FileName

Method = Literal["greedy_soup", "grid", "random", "tpe", "cma_es"]
DRAWN: Sequence[Method] = ("random", "tpe", "cma_es")
"""Methods that have no end of their own."""
MOST_TRIALS = 10_000
_Scalar = float | int | str | bool


def _places(written: Any) -> Any:
    return [written] if isinstance(written, str) else written


def _numbers_only(written: Any) -> Any:
    if isinstance(written, bool):
        raise ValueError("this is a truth value; a number was expected")
    return written


_Number = Annotated[float, BeforeValidator(_numbers_only), Field(allow_inf_nan=False)]


class SpaceKeys(Keys):
    """One of `space`: which values, and where in the recipe they are put."""

    at: Annotated[list[str] | None, BeforeValidator(_places)] = Field(
        None,
        min_length=1,
        max_length=256,
        description="JSON pointers into the recipe, such as #/models/0/parameters/weight, or into one of its stages, "
        "stage#/parameters/t; without it, the recipe's parameter of this name",
    )
    per_model: bool = Field(False, description="one number for each of the recipe's models, put beside it")
    low: _Number | None = None
    high: _Number | None = None
    step: _Number | None = Field(None, gt=0, description="numbers so far apart, from low on")
    points: int | None = Field(None, ge=2, le=1000, description="of a grid without step: so many numbers (11)")
    log: bool = Field(False, description="what counts is the ratio of numbers")
    integer: bool = Field(False, description="whole numbers")
    choices: list[_Scalar] | None = Field(None, min_length=1, max_length=100, description="instead: one of these")

    @model_validator(mode="after")
    def _is_a_space(self) -> Self:
        if self.at is not None and self.per_model:
            raise ValueError("per_model says where by itself; leave at or per_model away")
        if self.choices is not None:
            if given := [
                key for key in ("low", "high", "step", "points", "log", "integer") if key in self.model_fields_set
            ]:
                raise ValueError(f"choices stand alone; leave {', '.join(given)} away")
            if len({(type(choice), choice) for choice in self.choices}) < len(self.choices):
                raise ValueError("a choice is listed twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}; low comes first")
        if self.log and self.low <= 0:
            raise ValueError("log needs numbers above 0")
        if self.log and self.step is not None:
            raise ValueError("log has no steps; say how many points")
        if self.integer and any(n is not None and n != int(n) for n in (self.low, self.high, self.step)):
            raise ValueError("with integer, low, high and step are whole numbers")
        if self.step is not None and self.points is not None:
            raise ValueError("give step or points, not both")
        return self

    def space(self) -> Space:
        """The values."""
        if self.choices is not None:
            return Choices(tuple(self.choices))
        assert self.low is not None and self.high is not None
        return Range(self.low, self.high, self.step, self.log, self.integer, self.points or 11)


class HttpKeys(Keys):
    """An evaluator over HTTP: it is POSTed where the candidate can be read, and answers its metrics."""

    url: str = Field(min_length=1, max_length=2000)
    timeout: _Number = Field(600.0, gt=0, le=86_400, description="seconds for one candidate, all attempts together")


class CommandKeys(Keys):
    """A command that whoever runs the service has named; it gets the candidate's folder and answers on stdout."""

    name: str = Field(min_length=1, max_length=100)
    options: dict[str, Any] = Field({}, description="given to the command as they are")
    timeout: _Number = Field(600.0, gt=0, le=86_400, description="seconds for one candidate")


class DataKeys(Keys):
    """A file of data below the model folders."""

    file: FileName
    limit: int | None = Field(None, ge=1, description="so many examples, from the first on (default: all)")


class PerplexityKeys(DataKeys):
    """Of a text, by a causal language model with a tokenizer; `limit` counts windows."""

    context: int = Field(512, ge=2, le=2**20, description="tokens of a window")
    batch: int = Field(4, ge=1, le=1024, description="windows at a time")


class MultipleChoiceKeys(DataKeys):
    """How often a causal language model finds the right choice the most likely; JSON lines or parquet."""

    question: str = Field("question", description="the field with what comes before a choice")
    choices: str = Field("choices", description="the field with a list of texts")
    answer: str = Field("answer", description="the field with the number of the right one, from 0, or its text")
    normalize: bool = Field(True, description="likelihood per byte of a choice, so that long ones are not worse")
    batch: int = Field(8, ge=1, le=1024, description="choices at a time")


class ClassificationKeys(DataKeys):
    """How often a classifier of texts or images is right; JSON lines or parquet."""

    text: str = Field("text", description="the field with the text")
    pair: str | None = Field(None, description="the field with a second text")
    image: str | None = Field(None, description="instead of text: the field with an image, as a file or its bytes")
    label: str = Field("label", description="the field with the class: its number, or its name in the model's config")
    batch: int = Field(8, ge=1, le=1024, description="examples at a time")


class HarnessKeys(Keys):
    """Tasks of lm-evaluation-harness; its metrics are `task/metric`, or `task/metric,filter`."""

    tasks: list[Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")]] = Field(min_length=1, max_length=32)
    limit: int | None = Field(None, ge=1, description="examples of each task")
    batch: int = Field(8, ge=1, le=1024)
    shots: int | None = Field(None, ge=0, le=100, description="examples that are shown before the question")


class EvaluatorKeys(Keys):
    """What scores a candidate: exactly one of these."""

    http: HttpKeys | None = None
    command: CommandKeys | None = None
    perplexity: PerplexityKeys | None = None
    multiple_choice: MultipleChoiceKeys | None = None
    classification: ClassificationKeys | None = None
    lm_eval: HarnessKeys | None = None
    version: str = Field(
        "",
        max_length=200,
        description="another version measures otherwise: what is known of earlier ones does not count",
    )

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(getattr(self, kind) is not None for kind in KINDS) != 1:
            raise ValueError(f"name one evaluator: {', '.join(KINDS)}")
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


KINDS = ("http", "command", "perplexity", "multiple_choice", "classification", "lm_eval")
_USUAL: Mapping[str, Mapping[str, Direction]] = {
    "perplexity": {"perplexity": "minimize"},
    "multiple_choice": {"accuracy": "maximize"},
    "classification": {"accuracy": "maximize"},
}


class SearchKeys(Keys):
    """Which numbers of the recipe are searched for, how, by what score, and for how long."""

    method: Method
    space: dict[str, SpaceKeys] = Field({}, max_length=256, description="by a name of one's own, which trials have too")
    evaluator: EvaluatorKeys
    metrics: dict[str, Direction] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="what is to be large or small; the first decides which of the Pareto front is the result",
    )
    trials: int | None = Field(None, ge=1, le=MOST_TRIALS, description="so many at most")
    seconds: _Number | None = Field(None, gt=0, description="no trial begins after so long")
    seed: int = Field(0, ge=0, lt=2**32)
    parallel: int = Field(
        4, ge=1, le=64, description="trials that a sampler chooses at a time, before any of them is known"
    )
    together: int | None = Field(
        None,
        ge=1,
        le=16,
        description="candidates that one worker makes side by side, reading the models once (1; grid: 4)",
    )
    prune: bool = Field(False, description="give a trial up that is worse than the median at the same step")
    accept: Literal["gt", "ge"] = Field(
        "gt", description="of a greedy soup: a model stays if the score rises, or falls not"
    )
    merge: bool = Field(False, description="make the best model too, beside its recipe")

    @property
    def wanted(self) -> Mapping[str, Direction]:
        """The metrics and their directions."""
        return self.metrics or _USUAL.get(self.evaluator.kind, {})

    @property
    def at_a_time(self) -> int:
        return self.together or (4 if self.method == "grid" else 1)


def finite(value: Any) -> bool:
    """Whether it is a number, and one that can be compared."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
