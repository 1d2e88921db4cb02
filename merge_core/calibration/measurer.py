"""What ways of calibrating share that run models as they are, and write down what is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from merge_core.calibration.method import Calibrator
from merge_core.calibration.models import Batch, Group
from merge_core.calibration.tensor_file import TensorFile
from merge_core.errors import CalibrationFailed, Problem
from merge_core.measuring import Examples, grams
from merge_core.measuring.examples import NO_LABEL, Forward

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.plan import Plan
    from merge_core.recipe import Recipe

_LOOK = "look at the model's weights, and at the data"
Measure = Callable[[nn.Module, Forward, Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]]
"""Measures a module, run by a function of an example's inputs, whose tensors have names."""


class Measurer(Calibrator):
    """Base of the ways that measure. Data without a `model` are for all models, the others each for its own."""

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        for key, files in (("data", self.data), (self.second, self.checks)):
            for i, file in enumerate(files):
                if "weight" in file.model_fields_set:
                    detail = "whatever is measured counts alike; leave this away, or give fewer samples"
                    yield Problem(detail, f"#/calibrate/{key}/{i}/weight")
        about = {None if file.model is None else str(file.model) for file in self.data}
        for i, entry in enumerate(recipe.models or ()):
            if None not in about and str(entry.model) not in about:
                detail = f"no data are about {entry.model}; add some, or leave model away where data are for all"
                yield Problem(detail, f"#/models/{i}/model")
            if entry.statistics:
                yield Problem("its numbers are what is measured; leave this away", f"#/models/{i}/statistics")
        if recipe.base_model is not None and recipe.method.base == "model":
            yield Problem(f"{recipe.merge_method} has no base; list it among the models", "#/base_model")
        if recipe.statistics:
            yield Problem("numbers are what is measured; leave this away", "#/statistics")

    def files_of(self, recipe: Recipe) -> int:
        """How many files are written."""
        return len(recipe.models or ())

    def bytes_of(self, tensor: str, shape: Sequence[int]) -> int:
        """What a file has about a tensor."""
        raise NotImplementedError

    def written_bytes(self, plan: Plan) -> int:
        each = sum(self.bytes_of(step.name, step.shape) + 2 * len(step.name) + 200 for step in plan.steps)
        return 2**20 + self.files_of(plan.recipe) * each

    def measured(self, bench: Bench, file: str, model: int | None, examples: Sequence[Examples], of: Measure) -> str:
        """Measure one of the recipe's models (None: the base) and write what is found; the file's name. What an earlier
        attempt wrote is there already. Raises `CalibrationFailed` where nothing was found at all.
        """
        if bench.known(file) and (bench.out / file).exists():
            return bench.wrote(file)
        phase = f"measuring {'the base' if model is None else bench.plan.document.models[model].model}"  # type: ignore[index]
        done = 0
        with bench.opened(model) as module:

            def forward(batch: Batch) -> Tensor:
                nonlocal done
                bench.tick(phase, done % len(examples), len(examples))
                done += 1
                return bench.models.run(module, batch).logits

            count = 0
            with TensorFile(bench.out / file, bench.shapes) as written:
                try:
                    tensors = bench.tensors(module)
                    for name, numbers in of(module, forward, tensors):
                        if not bool(torch.isfinite(numbers).all()):
                            raise CalibrationFailed(f"{name}: what is measured is no finite number; {_LOOK}")
                        for alias in _names_of(tensors, name):
                            written.add(alias, numbers)
                        count += 1
                        bench.tick(phase, what=name)
                except ValueError as error:
                    raise CalibrationFailed(f"{self.method}: {error}") from None
                if not count:
                    raise CalibrationFailed(
                        f"{self.method}: {type(module).__name__} has no tensor of which it measures"
                    )
        bench.note(file, True)
        return bench.wrote(file)


class GramMeasurer(Measurer):
    """Base of those that measure the mean of x xᵀ of what enters linear layers."""

    gradients: ClassVar[bool] = False

    exclude: list[str] = Field(
        [], max_length=1000, description="pieces of names of tensors that are not measured, such as very wide matrices"
    )

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        if any(not piece for piece in self.exclude):
            yield Problem("an empty piece would exclude every tensor", "#/calibrate/exclude")

    def is_measured(self, tensor: str) -> bool:
        return not any(piece in tensor for piece in self.exclude)

    def bytes_of(self, tensor: str, shape: Sequence[int]) -> int:
        return 4 * shape[1] ** 2 if len(shape) == 2 and self.is_measured(tensor) else 0

    def held_bytes(self, plan: Plan) -> int:
        """A sum in float64, and what comes of it in float32."""
        return 3 * max((self.bytes_of(step.name, step.shape) for step in plan.steps), default=0)

    def grams(self, bench: Bench, file: str, model: int, examples: Sequence[Examples]) -> str:
        """Measure a model; the file's name."""

        def of(module: nn.Module, forward: Forward, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            chosen = {name: tensor for name, tensor in tensors.items() if self.is_measured(name)}
            return grams(module, forward, examples, tensors=chosen, most_bytes=bench.room)

        return self.measured(bench, file, model, examples, of)


def _names_of(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """All names that a tensor has."""
    return [alias for alias, tensor in tensors.items() if tensor is tensors[name]]


def groups_of(groups: Sequence[Group], model: int | None) -> list[Group]:
    """The data that are for a model; for the base, those that are for no model alone, else all."""
    for_all = [group for group in groups if group.expert is None]
    if model is None:
        return for_all or list(groups)
    return [group for group in groups if group.expert in (None, model)]


def parameters_among(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of floating point, each once."""
    found: dict[int, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            found.setdefault(id(tensor), name)
    return {name: tensors[name] for name in found.values()}


def examples_of(groups: Sequence[Group], *, single: bool = False) -> list[Examples]:
    """The batches as they are measured with; `single`: one row in each."""
    batches = [batch for group in groups for batch in group.batches]
    return [_example(each) for batch in batches for each in (_rows(batch) if single else [batch])]


def _rows(batch: Batch) -> Iterator[Batch]:
    for row in range(batch.rows):
        at = slice(row, row + 1)
        labels, mask = (None if each is None else each[at] for each in (batch.labels, batch.mask))
        yield Batch({name: each[at] for name, each in batch.inputs.items()}, labels, mask, batch.expert, 1)


def _example(batch: Batch) -> Examples:
    if batch.mask is None or batch.labels is None:
        return Examples(batch, batch.labels, batch.inputs.get("attention_mask") if batch.mask is None else batch.mask)
    nothing = torch.full_like(batch.labels[:, :1], NO_LABEL)
    said = batch.labels[:, 1:].masked_fill(batch.mask[:, 1:] == 0, NO_LABEL)
    return Examples(batch, torch.cat([said, nothing], dim=1), batch.mask)
