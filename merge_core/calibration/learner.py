"""What ways of learning coefficients by gradient share: the keys of the optimizer, teachers, rounds, and the curve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from merge_core.calibration.method import Calibrator, DataFile, Made
from merge_core.calibration.models import Group, Outputs
from merge_core.calibration.training import Sample, Training, grouped, truth
from merge_core.errors import Problem
from merge_core.learning import Form, Layout, Learned, Schedule, objectives

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.plan import Plan
    from merge_core.recipe import Recipe

COEFFICIENTS = "coefficients"
Objective = Literal["distillation", "cross_entropy", "entropy"]
Statistics = Mapping[str, str | Sequence[str | None]]


class Learner(Calibrator):
    """Base class of ways that learn coefficients of models or of their differences to the base by gradient."""

    epochs: int = Field(1, ge=1, le=100_000, description="how often all data are seen")
    steps: int | None = Field(None, ge=1, le=1_000_000, description="instead: so many steps, data anew as they end")
    accumulate: int | None = Field(
        None, ge=1, le=100_000, description="batches of a step (default: one of each of the data)"
    )
    rate: float = Field(0.1, gt=0, allow_inf_nan=False, description="of learning, by AdamW")
    decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="of raw coefficients, by AdamW")
    schedule: Literal["constant", "cosine", "restarts"] = Field("constant", description="how the rate changes")
    period: int = Field(50, ge=1, description="of restarts: steps from one to the next")
    clip: float | None = Field(None, gt=0, allow_inf_nan=False, description="the most that a gradient's norm may be")
    exclude: list[str] = Field([], max_length=1000, description="pieces of names of tensors that are not learned")
    heads: list[str] = Field(
        [],
        max_length=100,
        description="pieces of names of tensors that are each model's own: samples are seen with those of their model",
    )
    check: list[DataFile] = Field([], max_length=64, description="data that are held out")
    choose: Literal["best", "last"] = Field(
        "best", description="the result: the step that was best on what is held out, or the last, whatever that says"
    )
    every: int = Field(1, ge=1, description="steps from one look at what is held out to the next")
    compare: list[float] = Field(
        [], max_length=8, description="weights of plain task arithmetic that the data held out are looked at with, too"
    )

    objective: ClassVar[Objective] = "cross_entropy"

    @property
    def wanted(self) -> Objective:
        """What is minimised."""
        return self.objective

    @property
    def needs_labels(self) -> bool:
        return self.wanted == "cross_entropy"

    @property
    def checks(self) -> Sequence[DataFile]:
        return self.check

    @property
    def own(self) -> Sequence[str]:
        return self.heads

    @property
    def wanted_steps(self) -> int | None:
        """So many steps; None: as many as the epochs have."""
        return None if {"epochs", "steps"} & self.model_fields_set == {"epochs"} else self.steps

    @property
    def initial(self) -> Form:
        """How raw numbers become coefficients, and where they begin."""
        raise NotImplementedError

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        if recipe.base_model is None and recipe.method.base == "required":
            yield Problem("what models add is added to a base; name it as base_model", "#/base_model")
        for i, entry in enumerate(recipe.models or ()):
            if entry.statistics:
                yield Problem("its coefficients are what is learned; leave this away", f"#/models/{i}/statistics")
        if recipe.statistics:
            yield Problem("coefficients are what is learned; leave this away", "#/statistics")
        for name in ("every", "compare", "choose"):
            if name in self.model_fields_set and not self.check:
                yield Problem("nothing is held out; name data under check", f"#/calibrate/{name}")
        if "period" in self.model_fields_set and self.schedule != "restarts":
            yield Problem("only restarts have a period", "#/calibrate/period")
        if {"steps", "epochs"} <= self.model_fields_set:
            yield Problem("give steps or epochs, not both", "#/calibrate/epochs")
        for name in ("exclude", "heads"):
            if any(not piece for piece in getattr(self, name)):
                yield Problem("an empty piece is in every tensor's name", f"#/calibrate/{name}")
        for name, files in (("data", self.data), ("check", self.check)):
            for i, file in enumerate(files):
                if self.heads and file.model is None:
                    yield Problem("with heads, say which model it is about", f"#/calibrate/{name}/{i}/model")

    def template(self, data: dict[str, Any]) -> dict[str, Any]:
        parameters = dict(data.get("parameters") or {})
        return data | {"merge_method": "task_arithmetic", "parameters": {"weight": 0} | parameters}

    def written_bytes(self, plan: Plan) -> int:
        per_tensor = 4 * self.most_parts + 200
        return 2**20 + (len(plan.recipe.models or ()) + 3) * len(plan.steps) * per_tensor

    @property
    def most_parts(self) -> int:
        """Coefficients of a tensor at most, about."""
        return 1

    # Doing it.

    def run(self, bench: Bench) -> Made:
        samples = [*self._samples(bench, bench.groups)]
        checks = [*self._samples(bench, bench.checks, check=True)] if self.check else []
        taught = sum(sample.teacher is not None for sample in (*samples, *checks))
        bench.expected = taught + self.passes * self.count_steps(samples)
        self._teach(bench, [*samples, *checks])
        with bench.vectors() as stored, bench.opened(None) as module:
            run = Training(self, bench, module, stored, samples, checks)
            lines = [run.line(weight) for weight in self.compare]
            curves, learned, layout, shares = self.learned(run)
            tensors = [*_told(layout, learned, shares)]
        return Made(
            statistics=self._written(bench, learned, layout),
            told={
                "objective": self.wanted,
                "steps": learned.curve[-1]["step"] + (0 if checks else 1),
                "best_step": learned.best_step,
                "curves": curves,
                **({"lines": lines} if lines else {}),
                "tensors": tensors,
            },
        )

    @property
    def passes(self) -> int:
        """How often coefficients are learned."""
        return 1

    def layout(self, bench: Bench, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """How many coefficients each of the tensors that may be learned has."""
        return Layout.of(shapes)

    def learned(self, run: Training) -> tuple[list[dict[str, Any]], Learned, Layout, Mapping[str, float] | None]:
        """The curves, what was learned, where it belongs, and the importance of each tensor where that counted."""
        layout = self.layout(run.bench, run.learnable)
        found = run.learn("training", layout)
        return run.curves("training", found), found, layout, None

    def losses(self, outputs: Outputs, sample: Sample, taught: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """What is minimised of a sample, and what the curve tells of it."""
        logits, batch = outputs.logits, sample.batch
        if self.wanted == "entropy":
            return objectives.entropy(logits, batch.mask), {}
        assert batch.labels is not None  # or the bench had refused the data
        return objectives.cross_entropy(*truth(outputs, batch)), {}

    def hidden(self, module: nn.Module) -> Sequence[int]:
        """The layers whose states are compared."""
        return ()

    def _samples(self, bench: Bench, groups: Sequence[Group], *, check: bool = False) -> Iterator[Sample]:
        number = 0
        for group in groups:
            if self.wanted != "distillation":
                teachers: list[int | None] = [None]
            else:
                teachers = list(range(len(bench.places))) if group.expert is None else [group.expert]
            for teacher in teachers:
                for batch in group.batches:
                    yield Sample(batch, group, teacher, number, check)
                    number += 1

    def _teach(self, bench: Bench, samples: Sequence[Sample]) -> None:
        """What each teacher says of its samples, one teacher in memory at a time."""
        left = [sample for sample in samples if sample.teacher is not None]
        done = sum((bench.folder / sample.file).exists() for sample in left)
        if left:
            bench.tick("teachers", done, len(left))
        for teacher in sorted({sample.teacher for sample in left if sample.teacher is not None}):
            mine = [sample for sample in left if sample.teacher == teacher]
            missing = [sample for sample in mine if not (bench.folder / sample.file).exists()]
            if not missing:
                continue
            with bench.opened(teacher) as module, torch.no_grad():
                for sample in missing:
                    found = bench.models.run(module, sample.batch, self.hidden(module))
                    hidden = {f"hidden.{i}": each for i, each in enumerate(found.hidden)}
                    bench.save(sample.file, {"logits": found.logits, **hidden})
                    done += 1
                    bench.tick("teachers", done, len(left))
                del module

    def count_steps(self, samples: Sequence[Sample]) -> int:
        """How many steps there are."""
        if (steps := self.wanted_steps) is not None:
            return steps
        return math.ceil(len(samples) * self.epochs / self.step_size(samples))

    def step_size(self, samples: Sequence[Sample]) -> int:
        """Batches of a step."""
        return self.accumulate or len(grouped(samples))

    def _written(self, bench: Bench, learned: Learned, layout: Layout) -> Statistics:
        files = []
        for model in range(len(bench.places)):
            named = {name: each[model].float() for name, each in learned.coefficients.items()}
            files.append(bench.write(f"{COEFFICIENTS}-{model}.safetensors", named))
        return {COEFFICIENTS: files}

    def schedule_of(self) -> Schedule:
        """The optimizer's."""
        return Schedule(self.rate, self.decay, shape=self.schedule, period=self.period, clip=self.clip)


def _told(layout: Layout, learned: Learned, shares: Mapping[str, float] | None) -> Iterator[dict[str, Any]]:
    for name in layout.parts:
        told = [[round(value, 6) for value in model] for model in learned.coefficients[name].tolist()]
        entry: dict[str, Any] = {"tensor": name, "coefficients": told}
        yield entry | ({"importance": shares[name]} if shares else {})
