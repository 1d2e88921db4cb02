"""What ways of learning coefficients by gradient share: the keys of the optimizer, teachers, rounds, and the curve."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from merge_core import random
from merge_core.calibration.method import Calibrator, DataFile, Made
from merge_core.calibration.models import Batch, Group, Outputs
from merge_core.errors import CalibrationFailed, Problem
from merge_core.learning import (
    Cached,
    Form,
    Layout,
    Learned,
    Merged,
    Schedule,
    Vectors,
    learn,
    objectives,
    round_robin,
)
from merge_core.learning.steps import Kept, Point

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.calibration.vectors import StoredVectors
    from merge_core.plan import Plan
    from merge_core.recipe import Recipe

COEFFICIENTS = "coefficients"
_SAVED_AFTER = 5.0
"""Seconds after which a run is saved again; a kill loses no more."""
Objective = Literal["distillation", "cross_entropy", "entropy"]
Statistics = Mapping[str, str | Sequence[str | None]]


@dataclass(frozen=True)
class Sample:
    """A batch, its group, and the model that teaches it, if any does."""

    batch: Batch
    group: Group
    teacher: int | None
    number: int
    check: bool = False

    @property
    def file(self) -> str:
        """Where what the teacher says of it is kept."""
        return f"teachers/{'check' if self.check else 'data'}-{self.teacher}-{self.number}.safetensors"


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
        bench.expected = taught + self.passes * self._count(samples)
        self._teach(bench, [*samples, *checks])
        with bench.vectors() as stored, bench.opened(None) as module:
            run = _Run(self, bench, module, stored, samples, checks)
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

    def learned(self, run: _Run) -> tuple[list[dict[str, Any]], Learned, Layout, Mapping[str, float] | None]:
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
        return objectives.cross_entropy(*_truth(outputs, batch)), {}

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

    def _count(self, samples: Sequence[Sample]) -> int:
        """How many steps there are."""
        if (steps := self.wanted_steps) is not None:
            return steps
        return math.ceil(len(samples) * self.epochs / self._size(samples))

    def _size(self, samples: Sequence[Sample]) -> int:
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


class _Run:
    """One module that is the merge, and the samples."""

    def __init__(
        self,
        keys: Learner,
        bench: Bench,
        module: nn.Module,
        stored: StoredVectors,
        samples: Sequence[Sample],
        checks: Sequence[Sample],
    ) -> None:
        self.keys, self.bench, self.module = keys, bench, module
        self.samples, self.checks = samples, checks
        self.vectors: Vectors = Cached(stored, bench.room)
        heads = {name: each for name, each in bench.models.tensors(module).items() if _has(name, keys.heads)}
        self.tensors = {name: each for name, each in bench.tensors(module).items() if name not in heads}
        self._stored, self._heads = stored, {name: each for name, each in heads.items() if name in stored.names(0)}
        self._head_of: int | None = None
        self._saved = -math.inf
        if keys.heads and not self._heads:
            raise CalibrationFailed(f"heads: no tensor of the models has {', '.join(keys.heads)} in its name")

    @property
    def learnable(self) -> dict[str, tuple[int, ...]]:
        """The tensors that may be learned: parameters, none twice, that are not excluded."""
        found: dict[int, str] = {}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and not _has(name, self.keys.exclude):
                found.setdefault(id(tensor), name)
        shapes = {name: tuple(self.tensors[name].shape) for name in found.values()}
        if not shapes:
            raise CalibrationFailed("exclude leaves no tensor whose coefficients could be learned")
        return shapes

    def fixed(self, layout: Layout) -> dict[str, tuple[float, ...]]:
        """The coefficients of all tensors that are merged and not learned."""
        learned = {id(self.tensors[name]) for name in layout.parts}
        return {name: self.bench.fixed(name) for name, each in self.tensors.items() if id(each) not in learned}

    def learn(self, name: str, layout: Layout, *, fixed: Mapping[str, Sequence[float]] | None = None) -> Learned:
        """The coefficients, from where an earlier attempt was."""
        keys, bench = self.keys, self.bench
        merged = Merged(
            self.module, self.vectors, layout, fixed=self.fixed(layout) | dict(fixed or {}), tensors=self.tensors
        )
        rounds = self._rounds()
        found = bench.saved(f"{name}.safetensors")
        kept = None if found is None else Kept(**found[1], tensors=found[0])
        if kept is not None and kept.best is not None:
            kept = replace(kept, best=(kept.best[0], kept.best[1]))
        bench.tick(name, kept.step if kept else 0, len(rounds))
        try:
            return learn(
                merged,
                keys.initial,
                self._loss,
                rounds,
                keys.schedule_of(),
                check=self._check if self.checks else None,
                every=keys.every,
                choose=keys.choose == "best",
                kept=kept,
                keep=lambda kept: self._keep(name, kept, len(rounds)),
                told=lambda step: bench.tick(name, step, len(rounds)),
            )
        except FloatingPointError as error:
            raise CalibrationFailed(f"{error}; take a lower rate, or look at the models and the data") from None
        finally:
            merged.close()

    def curves(self, name: str, learned: Learned) -> list[dict[str, Any]]:
        """What the report tells: the losses of the steps, and of what is held out."""
        steps = [{key: value for key, value in point.items() if not key.startswith("check")} for point in learned.curve]
        found = [{"name": name, "points": [point for point in steps if "loss" in point]}]
        if self.checks:
            points = [_held_out(point) for point in learned.curve if "check" in point]
            found.append({"name": "check" if name == "training" else f"{name}, check", "points": points})
        return found

    def line(self, weight: float) -> dict[str, Any]:
        """What plain task arithmetic comes to on the data that are held out."""
        alike = tuple(weight for _ in self.bench.places)
        merged = Merged(
            self.module, self.vectors, Layout.of({}), fixed=dict.fromkeys(self.tensors, alike), tensors=self.tensors
        )
        merged.close()
        with torch.no_grad():
            return {"name": f"task arithmetic at {weight:g}", **_held_out(self._check())}

    def _rounds(self) -> list[list[Sample]]:
        groups, size, count = grouped(self.samples), self.keys._size(self.samples), self.keys._count(self.samples)
        is_counted = self.keys.wanted_steps is not None
        epochs = math.ceil(count * size / len(self.samples)) if is_counted else self.keys.epochs
        order = [
            sample
            for number in range(epochs)
            for sample in round_robin([_shuffled(group, number, i) for i, group in enumerate(groups)])
        ]
        return [order[place * size : (place + 1) * size] for place in range(count)]

    def _loss(self, sample: Sample) -> tuple[Tensor, dict[str, float]]:
        self.bench.tick()
        outputs, taught = self._outputs(sample)
        lost, told = self.keys.losses(outputs, sample, taught)
        name = sample.group.name
        return lost * sample.group.weight, {**told, f"on {name}": lost.item()}

    def _check(self) -> dict[str, float]:
        """The mean of what is minimised over the data that are held out, of each group, and of the true labels."""
        sums: dict[str, list[float]] = {"check": []}
        for sample in self.checks:
            self.bench.tick()
            outputs, taught = self._outputs(sample)
            lost = self.keys.losses(outputs, sample, taught)[0].item()
            sums["check"].append(lost)
            sums.setdefault(f"check {sample.group.name}", []).append(lost)
            if sample.batch.labels is not None:
                truth = objectives.cross_entropy(*_truth(outputs, sample.batch)).item()
                sums.setdefault("check labels", []).append(truth)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def _outputs(self, sample: Sample) -> tuple[Outputs, Mapping[str, Tensor]]:
        taught = {} if sample.teacher is None else self._taught(sample)
        self._put_on(sample.group.expert)
        return self.bench.models.run(self.module, sample.batch, self.keys.hidden(self.module)), taught

    def _put_on(self, expert: int | None) -> None:
        """Give the module the heads of a model."""
        if not self._heads or expert is None or expert == self._head_of:
            return
        for name, tensor in self._heads.items():
            tensor.data = self._stored.stored(name, expert).to(tensor.device, tensor.dtype)
        self._head_of = expert

    def _taught(self, sample: Sample) -> Mapping[str, Tensor]:
        found = self.bench.saved(sample.file)
        assert found is not None  # the teachers were asked first
        device = next(self.module.parameters()).device
        return {name: tensor.to(device) for name, tensor in found[0].items()}

    def _keep(self, name: str, kept: Kept, steps: int) -> None:
        if time.monotonic() - self._saved < _SAVED_AFTER and kept.step < steps:
            return
        told = {"step": kept.step, "points": kept.points, "best": kept.best}
        self.bench.save(f"{name}.safetensors", kept.tensors, told)
        self._saved = time.monotonic()


def _has(name: str, pieces: Sequence[str]) -> bool:
    return any(piece in name for piece in pieces)


def grouped(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each file, and of each teacher where a file has several."""
    groups: dict[tuple[int, int | None], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((id(sample.group), sample.teacher), []).append(sample)
    return list(groups.values())


def _truth(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    assert batch.labels is not None
    if batch.mask is None:
        return outputs.logits, batch.labels, None
    return objectives.next_tokens(outputs.logits, batch.labels, batch.mask)


def _shuffled(group: Sequence[Sample], epoch: int, number: int) -> list[Sample]:
    """In another order in each epoch but the first."""
    if epoch == 0:
        return list(group)
    order = random.permutation(random.stream_key(epoch, number, "order"), len(group))
    return [group[place] for place in order.tolist()]


def _held_out(point: Mapping[str, Any]) -> Point:
    found = {key.removeprefix("check "): value for key, value in point.items() if key.startswith("check ")}
    step = {"step": point["step"]} if "step" in point else {}
    return {**step, "loss": point["check"], **found}


def _told(layout: Layout, learned: Learned, shares: Mapping[str, float] | None) -> Iterator[dict[str, Any]]:
    for name in layout.parts:
        told = [[round(value, 6) for value in model] for model in learned.coefficients[name].tolist()]
        entry: dict[str, Any] = {"tensor": name, "coefficients": told}
        yield entry | ({"importance": shares[name]} if shares else {})
