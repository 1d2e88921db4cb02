"""Expert Merging and Expert Merging++ (Zhang et al., 2025): coefficients by which the merge does as each expert does.

L = β_k (T² CE(softmax(z_k / T), z / T) + w_h mean_l MSE(h_l, h_kl)) on unlabelled samples of task k, and
γ mean_l Σₖ |c_kl − c₀|.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from merge_core.calibration.learner import Learner, Objective
from merge_core.calibration.models import Outputs
from merge_core.errors import CalibrationFailed, Problem
from merge_core.learning import Form, Layout, Learned, Schedule, Sigmoid, chunks, importances, objectives

if TYPE_CHECKING:
    from merge_core.calibration.training import Sample, Training
    from merge_core.recipe import Recipe


class ExpertMerging(Learner):
    """One coefficient for each tensor and expert; with `chunks` then more for the important tensors.

    Unlabelled samples suffice, five of each expert: what the expert says of them is what the merge shall say. Defaults
    are the authors'. `chunks: B` is Expert Merging++: from what was learned, tensor l has importance
    I_l = Σₖ |c_kl| · mean|τ_kl| · n_l / Σ, and gets ⌊B L I_l^κ / Σ I^κ⌋ of B L coefficients, L being how many tensors
    there are; one that gets none stays at the first coefficient. These are learned anew.
    """

    title: ClassVar[str] = "Expert Merging"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.25712"
    serves: ClassVar[Sequence[str]] = ("expert_merging",)
    objective: ClassVar[Objective] = "distillation"
    taught: ClassVar[bool] = True

    method: Literal["expert_merging"]
    samples: int | None = Field(5, ge=1, le=1_000_000, description="so many of each file, where it does not say")
    accumulate: int | None = Field(8, ge=1, le=100_000, description="batches of a step")
    rate: float = Field(0.5, gt=0, allow_inf_nan=False, description="of learning, by AdamW")
    decay: float = Field(1e-5, ge=0, allow_inf_nan=False, description="of raw coefficients, by AdamW")
    schedule: Literal["constant", "cosine", "restarts"] = Field("restarts", description="how the rate changes")
    clip: float | None = Field(1.0, gt=0, allow_inf_nan=False, description="the most that a gradient's norm may be")
    exclude: list[str] = Field(
        ["vision_model", "lm_head", "norm", "embed_tokens", "bias"],
        max_length=1000,
        description="pieces of names of tensors that are not learned: they take the recipe's weight, which is 0",
    )
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="T: of the logits that are compared")
    hidden_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="w_h: of hidden states beside logits")
    layers: list[int] | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="whose states are compared, 0 being the embeddings (default: the middle one)",
    )
    anchor: float = Field(5.0, ge=0, allow_inf_nan=False, description="γ: how much coefficients are held at the first")
    first: float = Field(0.1, gt=0, lt=1, description="the coefficient that all begin with")
    chunks: float | None = Field(
        None, gt=0, le=64, description="B: Expert Merging++ with so many coefficients for each tensor on average"
    )
    steepness: float = Field(1.0, ge=0, le=10, description="κ: how much more important tensors get")

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        yield from super().problems(recipe)
        if self.chunks is None and "steepness" in self.model_fields_set:
            yield Problem("only chunks are shared out by importance", "#/calibrate/steepness")
        if self.hidden_weight == 0 and self.layers:
            yield Problem("hidden states do not count; leave this away", "#/calibrate/layers")

    @property
    def initial(self) -> Form:
        return Sigmoid(self.first)

    @property
    def most_parts(self) -> int:
        return 1 + int(self.chunks or 0)

    @property
    def passes(self) -> int:
        return 1 if self.chunks is None else 2

    def schedule_of(self) -> Schedule:
        return Schedule(
            self.rate, self.decay, shape=self.schedule, period=self.period, clip=self.clip, anchor=self.anchor
        )

    def hidden(self, module: nn.Module) -> Sequence[int]:
        if self.hidden_weight == 0:
            return ()
        config: Any = getattr(module, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        count = int(getattr(config, "num_hidden_layers", 0))
        if self.layers is None:
            return ((count + 1) // 2,)
        if wrong := [layer for layer in self.layers if not 0 <= layer <= count]:
            raise CalibrationFailed(f"calibrate/layers: {wrong[0]} is no layer of a model that has {count}, from 0 on")
        return self.layers

    def losses(self, outputs: Outputs, sample: Sample, taught: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        mask = sample.batch.mask
        lost = objectives.distillation(outputs.logits, taught["logits"], self.temperature, mask)
        told = {"logits": lost.item()}
        if outputs.hidden:
            theirs = [taught[f"hidden.{i}"] for i in range(len(outputs.hidden))]
            hidden = objectives.hidden_states(outputs.hidden, theirs, mask)
            lost = lost + self.hidden_weight * hidden
            told["hidden"] = hidden.item()
        return lost, told

    def learned(self, run: Training) -> tuple[list[dict[str, Any]], Learned, Layout, Mapping[str, float] | None]:
        layout = Layout.of(run.learnable)
        if self.chunks is None:
            found = run.learn("training", layout)
            return run.curves("training", found), found, layout, None
        whole = run.learn("per tensor", layout)
        curves = run.curves("per tensor", whole)
        shares = importances(run.vectors, layout, whole.values)
        counts = chunks(shares, round(self.chunks * len(shares)), self.steepness)
        cut = Layout.of(run.learnable, counts)
        if not cut.parts:
            raise CalibrationFailed("chunks: so few coefficients leave none for any tensor; raise it")
        at_first = [self.first] * run.vectors.models
        left = {name: at_first for name in layout.parts if name not in cut.parts}
        found = run.learn("chunks", cut, fixed=left)
        return [*curves, *run.curves("chunks", found)], _with(found, left), cut, shares


def _with(found: Learned, left: Mapping[str, Sequence[float]]) -> Learned:
    """What was learned, with the tensors whose coefficients stayed as they were."""
    import torch

    stayed = {name: torch.tensor(each, dtype=torch.float64)[:, None] for name, each in left.items()}
    return Learned(found.values, {**found.coefficients, **stayed}, found.curve, found.best_step)
