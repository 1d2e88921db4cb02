"""The steps: coefficients from raw numbers, a merged module, losses of a round, and the optimizer.

A run can be given up after any step and taken up from what it kept (`Kept`), to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from merge_core.learning.forms import Form
from merge_core.learning.gradients import Merged

_Batch = TypeVar("_Batch")
Loss = tuple[Tensor, Mapping[str, float]]
"""A scalar to minimise, and what the curve tells of it."""
Point = dict[str, Any]
"""`{"step": 3, "loss": 0.7, ...}`: the loss that a step began with, and what else was measured."""


@dataclass(frozen=True)
class Schedule:
    """AdamW, and how its rate changes: constant, a cosine down to 0 at the last step, or `restarts` of one after every
    `period` steps. `clip`: the most that the norm of a gradient may be; `anchor`: γ of Expert Merging, which adds
    γ · the mean over columns of Σᵢ |c − c_first|.
    """

    rate: float = 0.5
    decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    shape: Literal["constant", "cosine", "restarts"] = "restarts"
    period: int = 50
    clip: float | None = 1.0
    anchor: float = 0.0

    def rate_at(self, step: int, steps: int) -> float:
        """The rate of a step, from 0."""
        if self.shape == "constant":
            return self.rate
        passed = step % self.period / self.period if self.shape == "restarts" else step / max(1, steps)
        return self.rate * (1 + math.cos(math.pi * passed)) / 2


@dataclass
class Kept:
    """What a run has come to after `step` steps: all it takes to go on. `tensors` are float64, `points` the curve."""

    step: int
    tensors: dict[str, Tensor]
    points: list[Point]
    best: tuple[float, int] | None = None


@dataclass(frozen=True)
class Learned:
    """`values`: the coefficients of all parts, `[models, width]`, float64; `coefficients`: the same by tensor."""

    values: Tensor
    coefficients: Mapping[str, Tensor]
    curve: Sequence[Point]
    best_step: int | None = None


@dataclass
class _State:
    raw: Tensor
    constants: Tensor
    points: list[Point] = field(default_factory=list)
    best: tuple[float, int] | None = None
    best_values: Tensor | None = None


def learn(
    merged: Merged,
    form: Form,
    loss: Callable[[_Batch], Loss],
    rounds: Sequence[Sequence[_Batch]],
    schedule: Schedule,
    *,
    check: Callable[[], Mapping[str, float]] | None = None,
    every: int = 1,
    choose: bool = True,
    kept: Kept | None = None,
    keep: Callable[[Kept], None] = lambda kept: None,
    told: Callable[[int], None] = lambda step: None,
) -> Learned:
    """Minimise the mean loss of each round, one round a step; the module is left as the result.

    `check` measures the module before every `every`-th step and at the end; with `choose` the coefficients with which
    the first number that it gives was the least are the result, else the last. `keep` is given what to go on from,
    after each step; `told` hears how many steps are done. What they and `loss` raise ends the run. Raises
    `FloatingPointError` where a loss is no finite number.
    """
    state, optimizer = _begin(merged, form, schedule, kept)
    first = form(torch.full_like(state.raw, form.start(merged.vectors.models)), torch.ones_like(state.constants))
    for step in range(kept.step if kept else 0, len(rounds)):
        values = _values(form, state)
        merged.write(values)
        measured = dict(_checked(state, check, step, values)) if step % every == 0 else {}
        point = _losses(merged, loss, rounds[step], step)
        optimizer.zero_grad()
        values.backward(merged.gradient)  # type: ignore[no-untyped-call]
        if schedule.anchor:
            away = (_values(form, state) - first).abs().sum(0).mean()
            (schedule.anchor * away).backward()  # type: ignore[no-untyped-call]
            point |= {"anchor": schedule.anchor * away.item()}
            point["loss"] += point["anchor"]
        if schedule.clip is not None:
            torch.nn.utils.clip_grad_norm_([state.raw, state.constants], schedule.clip)
        optimizer.param_groups[0]["lr"] = schedule.rate_at(step, len(rounds))
        optimizer.step()
        state.points.append(point | measured)
        keep(_kept(state, optimizer, step + 1))
        told(step + 1)
    values = _values(form, state).detach()
    if check is not None:
        merged.write(values)
        state.points.append({"step": len(rounds), **_checked(state, check, len(rounds), values)})
    if check is not None and choose:
        assert state.best_values is not None  # something was measured
        values = state.best_values
    merged.write(values)
    best = state.best[1] if state.best and choose else None
    return Learned(values, merged.layout.split(values), tuple(state.points), best)


def round_robin(groups: Sequence[Sequence[_Batch]]) -> list[_Batch]:
    """One of each group in turn, as long as it has any, so that all groups are seen alike."""
    longest = max(map(len, groups), default=0)
    return [group[place] for place in range(longest) for group in groups if place < len(group)]


def _begin(merged: Merged, form: Form, schedule: Schedule, kept: Kept | None) -> tuple[_State, torch.optim.AdamW]:
    models, width = merged.vectors.models, merged.layout.width
    raw = torch.full((models, width), form.start(models), dtype=torch.float64)
    state = _State(raw, torch.ones(form.constants, dtype=torch.float64))
    if kept is not None:
        state.raw, state.constants = kept.tensors["raw"].clone(), kept.tensors["constants"].clone()
        state.points, state.best = list(kept.points), kept.best
        state.best_values = kept.tensors.get("best")
    both = [state.raw.requires_grad_(), state.constants.requires_grad_()]
    optimizer = torch.optim.AdamW(
        both, lr=schedule.rate, betas=schedule.betas, weight_decay=schedule.decay, foreach=False
    )
    if kept is not None:
        for name, parameter in zip(("raw", "constants"), both, strict=True):
            if f"{name}.exp_avg" in kept.tensors:
                moments = {each: kept.tensors[f"{name}.{each}"].clone() for each in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(kept.step)), **moments}
    return state, optimizer


def _values(form: Form, state: _State) -> Tensor:
    return form(state.raw, state.constants)


def _losses(merged: Merged, loss: Callable[[_Batch], Loss], batches: Sequence[_Batch], step: int) -> Point:
    merged.clear()
    found: dict[str, float] = {"loss": 0.0}
    counts: dict[str, int] = {"loss": len(batches)}
    for batch in batches:
        lost, measured = loss(batch)
        if not math.isfinite(value := lost.item()):
            raise FloatingPointError(f"the loss is {value} in step {step}")
        (lost / len(batches)).backward()  # type: ignore[no-untyped-call]
        found["loss"] += value
        for name, number in measured.items():
            found[name] = found.get(name, 0.0) + number
            counts[name] = counts.get(name, 0) + 1
    return {"step": step} | {name: value / counts[name] for name, value in found.items()}


def _checked(
    state: _State, check: Callable[[], Mapping[str, float]] | None, step: int, values: Tensor
) -> Mapping[str, float]:
    if check is None:
        return {}
    with torch.no_grad():
        found = check()
    decides = next(iter(found.values()))
    if not math.isfinite(decides):
        raise FloatingPointError(f"what is measured is {decides} in step {step}")
    if state.best is None or decides < state.best[0]:
        state.best, state.best_values = (decides, step), values.detach().clone()
    return found


def _kept(state: _State, optimizer: torch.optim.AdamW, step: int) -> Kept:
    tensors = {"raw": state.raw.detach().clone(), "constants": state.constants.detach().clone()}
    for name, parameter in (("raw", state.raw), ("constants", state.constants)):
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state.get(parameter, {}):
                tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment].clone()
    if state.best_values is not None:
        tensors["best"] = state.best_values
    return Kept(step, tensors, list(state.points), state.best)
