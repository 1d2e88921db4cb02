"""DAREx-q's q (Deng et al., 2025): by what the pruned model says on a few samples, by labels, or layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from merge_core.calibration.measurer import Measurer, examples_of, groups_of
from merge_core.calibration.method import Made
from merge_core.calibration.models import Outputs
from merge_core.errors import CalibrationFailed, Problem, RecipeError
from merge_core.learning import Cached, Layout, Learned, Merged, Schedule, Vectors, learn
from merge_core.learning.steps import Kept
from merge_core.measuring import (
    Dropped,
    Examples,
    Reciprocal,
    largest,
    layers_of,
    means,
    near,
    search_divisor,
    top_logits,
)
from merge_core.measuring.examples import Forward
from merge_core.methods.darex import ANALYTIC, DarexQ

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.plan import Plan, Step
    from merge_core.recipe import Recipe

Choice = Literal["output_change", "top_logits", "labels", "analytic", "gradient"]
Told = dict[str, Any]
_CHECKS = 20
"""So often the whole data are looked at while q is learned."""


class DarexDivisors(Measurer):
    """q of each model, for the model alone on its base, with what the recipe's `seed` and `drop_rate` drop.

    One for all tensors, searched on a grid: by `output_change`, the mean |h − h'| of the last hidden layer beside the
    fine-tune's, over several masks but the one farthest from their mean; by `top_logits`, the mean squared difference
    of the fine-tune's five largest logits; by `labels`, the cross entropy. One for each layer: `analytic`, which the
    merge finds from mean inputs that are measured here, or `gradient`, which learns them by `top_logits`; where the
    authors give up after five steps without progress, the best of all is kept. The authors advise one q for all layers
    of a language model. Tensors with `drop_rate` 0 stay whole.
    """

    title: ClassVar[str] = "q for DAREx-q"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.09344"
    serves: ClassVar[Sequence[str]] = ("darex",)

    method: Literal["darex"]
    by: Choice | None = Field(
        None, description="what q is chosen by (top_logits for language models, else output_change)"
    )
    masks: int | None = Field(
        None, ge=1, le=64, description="of what is dropped, that are tried (output_change, labels: 4; top_logits: 1)"
    )
    step: float | None = Field(None, gt=0, lt=1, description="of the coarse grid from 1 − p on (half of that)")
    most: float | None = Field(None, gt=0, le=1, description="the largest q of the grid (ten times 1 − p)")
    steps: int = Field(200, ge=1, le=100_000, description="of learning by gradient")
    rate: float = Field(1e-2, gt=0, allow_inf_nan=False, description="of learning by gradient, by AdamW")

    @property
    def chosen(self) -> Choice:
        return self.by or ("top_logits" if self.task == "language_model" else "output_change")

    @property
    def needs_labels(self) -> bool:
        return self.chosen == "labels"

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        if recipe.base_model is None:
            yield Problem("what is dropped is a difference to a base; name it as base_model", "#/base_model")
        q = "q is what is looked for; leave this away"
        if "q" in recipe.parameters:
            yield Problem(q, "#/parameters/q")
        for i, entry in enumerate(recipe.models or ()):
            if "q" in entry.parameters:
                yield Problem(q, f"#/models/{i}/parameters/q")
        unused = ["masks", "step", "most"] if self.chosen in ("analytic", "gradient") else []
        unused += ["steps", "rate"] if self.chosen != "gradient" else []
        for name in unused:
            if name in self.model_fields_set:
                yield Problem(f"{self.chosen} has no use for it; leave this away", f"#/calibrate/{name}")

    def template(self, data: dict[str, Any]) -> dict[str, Any]:
        return data | {"parameters": dict(data.get("parameters") or {}) | {"q": 1.0}}

    def bytes_of(self, tensor: str, shape: Sequence[int]) -> int:
        return 4 * math.prod(shape[1:]) if self.chosen == ANALYTIC and len(shape) > 1 else 0

    def written_bytes(self, plan: Plan) -> int:
        return super().written_bytes(plan) + 300 * len(plan.steps) * self.files_of(plan.recipe)

    def check_plan(self, plan: Plan) -> None:
        for model, entry in enumerate(plan.recipe.models or ()):
            rates = {_drop_rate(step, model) for step in plan.steps if step.method is not None} - {0.0}
            if len(rates) != 1 and self.chosen != ANALYTIC:
                needed = "a q is for one drop_rate; a tensor that is to stay whole has 0"
                there = ", ".join(map(str, sorted(rates))) or "nothing else"
                detail = f"{needed}, but {entry.model} has {there}"
                raise RecipeError.of([Problem(detail, "#/parameters/drop_rate")])

    def run(self, bench: Bench) -> Made:
        if self.chosen == ANALYTIC:
            return self._means(bench)
        told: list[Told] = []
        curves: list[Told] = []
        beside: list[Mapping[str, Any]] = []
        names = [str(entry.model) for entry in bench.plan.document.models or ()]
        for model, name in enumerate(names):
            one = _One(self, bench, model, name)
            found = one.learned() if self.chosen == "gradient" else one.searched()
            beside.append({"q": one.setting(found.q)})
            told.append({"model": name, **found.told})
            curves.append({"name": name, "points": found.points})
        across = {} if self.chosen == "gradient" else {"across": "q"}
        return Made(beside=beside, told={"objective": self.chosen, **across, "curves": curves, "divisors": told})

    def _means(self, bench: Bench) -> Made:
        groups = bench.groups

        def of(module: nn.Module, forward: Forward, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            yield from means(module, forward, examples, tensors=tensors).items()

        files = []
        for model in range(len(bench.places)):
            examples: list[Examples] = examples_of(groups_of(groups, model))
            files.append(self.measured(bench, f"activations-{model}.safetensors", model, examples, of))
        return Made({"activations": files}, {"q": ANALYTIC}, told={"objective": ANALYTIC})


@dataclass(frozen=True)
class _Found:
    """q of each tensor, and what is told of how it was found."""

    q: Mapping[str, float]
    told: Mapping[str, Any]
    points: Sequence[Told]


class _One:
    """One model on its base, with a part of what it learned dropped."""

    def __init__(self, keys: DarexDivisors, bench: Bench, model: int, name: str) -> None:
        self.keys, self.bench, self.model, self.name = keys, bench, model, name
        self.examples = examples_of(groups_of(bench.groups, model))
        self.rates = {name: _drop_rate(bench.plan.merging.by_name[name], model) for name in bench.shapes}
        self.drop_rate = max(self.rates.values())
        self.whole = [tensor for tensor, rate in self.rates.items() if rate == 0]

    # One q for all.

    def searched(self) -> _Found:
        keys, bench = self.keys, self.bench
        masks = keys.masks or (1 if keys.chosen == "top_logits" else 4)
        self._teach()
        with bench.vectors() as stored, bench.opened(None) as module:
            tensors = bench.tensors(module)
            vectors = Cached(stored, bench.room)
            merges = [self._merged(module, tensors, vectors, mask) for mask in range(masks)]

            def score(q: float) -> float:
                noted = f"q of {self.model}: {q!r}"
                bench.tick(f"{self.name}: q", what=f"{q:g}")
                if bench.known(noted) is None:
                    scores = []
                    for merged in merges:
                        merged.write(torch.full((1, merged.layout.width), 1 / q, dtype=torch.float64))
                        scores.append(self._change(module))
                    found = sum(scores) / masks if keys.chosen == "labels" else near(scores)
                    bench.note(noted, [found] if math.isfinite(found) else [])
                known: list[float] = bench.known(noted)
                return known[0] if known else math.inf

            found = search_divisor(score, self.drop_rate, most=keys.most, step=keys.step)
            for merged in merges:
                merged.close()
        tried = [(q, score) for q, score in found.tried if math.isfinite(score)]
        if not tried:
            raise CalibrationFailed(f"{self.name}: whatever q is, the pruned model says nothing that is a number")
        q = dict.fromkeys(self.rates, found.q) | dict.fromkeys(self.whole, 1.0)
        points = [{"step": q, "loss": score} for q, score in sorted(tried)]
        return _Found(q, {"q": found.q, "drop_rate": self.drop_rate, "tried": tried}, points)

    # One for each layer.

    def learned(self) -> _Found:
        keys, bench = self.keys, self.bench
        self._teach()
        with bench.vectors() as stored, bench.opened(None) as module:
            tensors = bench.tensors(module)
            shapes = {name: tuple(tensors[name].shape) for name in self._dropped(tensors)}
            layout = layers_of(shapes)
            merged = self._merged(module, tensors, Cached(stored, bench.room), 0, layout)
            kept_in = f"learned-{self.model}.safetensors"
            saved = bench.saved(kept_in)
            kept = None if saved is None else Kept(**saved[1], tensors=saved[0])
            if kept is not None and kept.best is not None:
                kept.best = (kept.best[0], kept.best[1])

            def keep(kept: Kept) -> None:
                bench.save(kept_in, kept.tensors, {"step": kept.step, "points": kept.points, "best": kept.best})

            try:
                learned = learn(
                    merged,
                    Reciprocal(self.drop_rate),
                    lambda place: (self._lost(module, place), {}),
                    [[step % len(self.examples)] for step in range(keys.steps)],
                    Schedule(rate=keys.rate, decay=0.01, shape="cosine"),
                    check=lambda: {"all": self._change(module)},
                    every=max(1, keys.steps // _CHECKS),
                    kept=kept,
                    keep=keep,
                    told=lambda step: bench.tick(f"{self.name}: q of each layer", step, keys.steps),
                )
            except FloatingPointError as error:
                raise CalibrationFailed(f"{error}; take a lower rate, or look at the models and the data") from None
            finally:
                merged.close()
        return self._of_layers(learned, layout)

    def _of_layers(self, learned: Learned, layout: Layout) -> _Found:
        q = {name: float(f"{1 / each[0, 0].item():.6g}") for name, each in learned.coefficients.items()}
        points = [{**point, "loss": point["all"]} for point in learned.curve if "all" in point]
        others = sum(q.values()) / len(q)
        tensors = [{"tensor": name, "q": value} for name, value in q.items()]
        told = {"drop_rate": self.drop_rate, "best_step": learned.best_step, "tensors": tensors}
        return _Found(dict.fromkeys(self.rates, others) | q | dict.fromkeys(self.whole, 1.0), told, points)

    # What both do.

    def setting(self, q: Mapping[str, float]) -> Any:
        """q as a recipe says it: a number, or filters, of which the first that is a piece of a tensor's name counts."""
        usual = max(set(q.values()), key=lambda value: (sum(other == value for other in q.values()), value))
        said = {name for name, value in q.items() if value != usual}
        while True:
            filters = sorted(said, key=lambda name: (-len(name), name))
            wrong = {name for name, value in q.items() if _first(filters, name, q, usual) != value}
            if not wrong:
                break
            said |= wrong
        if not filters:
            return usual
        return [*({"filter": name, "value": q[name]} for name in filters), {"value": usual}]

    def _dropped(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The tensors that a coefficient is for, each once."""
        found: dict[int, str] = {}
        for name, tensor in tensors.items():
            if name not in self.whole and isinstance(tensor, nn.Parameter):
                found.setdefault(id(tensor), name)
        return list(found.values())

    def _check_dropped(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in self.whole and not isinstance(tensor, nn.Parameter):
                detail = f"{name} is a running statistic, of which nothing can be dropped"
                raise CalibrationFailed(f"{detail}: give it drop_rate 0, by a filter")

    def _merged(
        self,
        module: nn.Module,
        tensors: Mapping[str, Tensor],
        vectors: Vectors,
        mask: int,
        layout: Layout | None = None,
    ) -> Merged:
        """The base with what the model learned, a part of it dropped; what stays whole is merged once."""
        self._check_dropped(tensors)
        seed = self.bench.plan.document.seed + mask
        dropped = Only(Dropped(vectors, self.drop_rate, seed, self.whole), self.model)
        names = self._dropped(tensors)
        shapes = {name: tuple(tensors[name].shape) for name in names}
        coefficient = {id(tensors[name]) for name in names}
        fixed = {name: (1.0,) for name, tensor in tensors.items() if id(tensor) not in coefficient}
        return Merged(module, dropped, layout or Layout.shared(shapes), fixed=fixed, tensors=tensors)

    @property
    def _layers(self) -> Callable[[nn.Module], Sequence[int]]:
        """Whose states are compared: the last layer's, where that is what counts."""

        def last(module: nn.Module) -> Sequence[int]:
            config: Any = getattr(module, "config", None)
            config = config.get_text_config() if hasattr(config, "get_text_config") else config
            return (int(config.num_hidden_layers),)

        return last if self.keys.chosen == "output_change" else lambda module: ()

    def _run(self, module: nn.Module, example: Examples) -> Outputs:
        self.bench.tick()
        return self.bench.models.run(module, example.inputs, self._layers(module))

    def _teach(self) -> None:
        """What the fine-tune says, remembered in files."""
        if self.keys.chosen == "labels" or self.bench.known(f"taught {self.model}"):
            return
        with self.bench.opened(self.model) as module, torch.no_grad():
            for place, example in enumerate(self.examples):
                self.bench.tick(f"{self.name}: what it says", place, len(self.examples))
                found = self._run(module, example)
                self.bench.save(self._file(place), self._of_teacher(found))
        self.bench.note(f"taught {self.model}", True)

    def _of_teacher(self, found: Outputs) -> dict[str, Tensor]:
        """What is compared, of all tokens."""
        if found.hidden:
            return {"hidden": found.hidden[0]}
        values, classes = largest(found.logits)
        return {"values": values, "classes": classes}

    def _file(self, place: int) -> str:
        return f"taught-{self.model}/{place}.safetensors"

    def _taught(self, place: int, like: Tensor) -> dict[str, Tensor]:
        found = self.bench.saved(self._file(place))
        assert found is not None  # the fine-tune was asked first
        return {name: tensor.to(like.device) for name, tensor in found[0].items()}

    @torch.no_grad()
    def _change(self, module: nn.Module) -> float:
        """How far the module is from what it should say, over all samples; the mean of the batches' means."""
        lost = [self._lost(module, place).item() for place in range(len(self.examples))]
        return sum(lost) / len(lost)

    def _lost(self, module: nn.Module, place: int) -> Tensor:
        example = self.examples[place]
        found = self._run(module, example)
        if self.keys.chosen == "output_change":
            (hidden,) = found.hidden
            apart = (hidden - self._taught(place, hidden)["hidden"]).abs().mean(-1)
            mask = None if example.mask is None else example.mask.to(apart.device)
            return apart.mean() if mask is None or mask.shape != apart.shape else apart[mask.bool()].mean()
        counted = example.counted(found.logits)
        if self.keys.chosen == "labels":
            return nn.functional.cross_entropy(counted, example.right(found.logits))
        taught = self._taught(place, counted)
        return top_logits(counted, example.counted(taught["values"]), example.counted(taught["classes"]))


class Only(Vectors):
    """One model's of several vectors."""

    def __init__(self, inner: Vectors, model: int) -> None:
        self._inner, self._model = inner, model

    @property
    def models(self) -> int:
        return 1

    def origin(self, name: str) -> Tensor | None:
        return self._inner.origin(name)

    def vector(self, name: str, model: int) -> Tensor:
        return self._inner.vector(name, self._model)


def _drop_rate(step: Step, model: int) -> float:
    assert isinstance(step.method, DarexQ)  # the template's
    return step.method.drop_rate_of(model)


def _first(filters: Sequence[str], name: str, q: Mapping[str, float], usual: float) -> float:
    return next((q[piece] for piece in filters if piece in name), usual)
