"""One module that is the merge of the samples' models, whose coefficients are learned from them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merge_core import random
from merge_core.calibration.models import Batch, Group, Outputs
from merge_core.errors import CalibrationFailed
from merge_core.learning import Cached, Layout, Learned, Merged, Vectors, learn, objectives, round_robin
from merge_core.learning.steps import Kept, Point

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.calibration.learner import Learner
    from merge_core.calibration.vectors import StoredVectors

_SAVED_AFTER = 5.0
"""Seconds after which a run is saved again; a kill loses no more."""


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


class Training:
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
        groups, size, count = (
            grouped(self.samples),
            self.keys.step_size(self.samples),
            self.keys.count_steps(self.samples),
        )
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
                missed = objectives.cross_entropy(*truth(outputs, sample.batch)).item()
                sums.setdefault("check labels", []).append(missed)
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


def truth(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of a batch that has labels, the labels, and which of them count (None: all)."""
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
