"""The importances that selective synaptic dampening asks for (Foster et al., 2023), or its loss-free form (2024).

I = mean over batches of (∂L/∂θ)², L the mean cross entropy of a batch; without labels of |∂ mean ‖logits‖² / ∂θ|.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from merge_core.calibration.measurer import Measurer, examples_of, parameters_among
from merge_core.calibration.method import DataFile, Made
from merge_core.measuring import importances
from merge_core.measuring.examples import Examples, Forward

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench
    from merge_core.recipe import Recipe


class SsdImportances(Measurer):
    """How much each weight matters to all training data, and to what is to be forgotten.

    `data` are all, what is to be forgotten included; `forget` is that alone. The `batch` counts: gradients are squared
    batch by batch, as the authors do, not sample by sample. `without_labels` is LFSSD.
    """

    title: ClassVar[str] = "Importances for selective synaptic dampening"
    paper: ClassVar[str] = "https://arxiv.org/abs/2308.07707"
    serves: ClassVar[Sequence[str]] = ("ssd",)
    second: ClassVar[str] = "forget"

    method: Literal["ssd"]
    forget: list[DataFile] = Field(min_length=1, max_length=64, description="what is to be forgotten")
    batch: int = Field(64, ge=1, le=1024, description="samples whose mean loss is squared together")
    without_labels: bool = Field(False, description="by the logits' squared norm: no labels are asked for (LFSSD)")

    @property
    def needs_labels(self) -> bool:
        return not self.without_labels

    @property
    def checks(self) -> Sequence[DataFile]:
        return self.forget

    def template(self, data: dict[str, Any]) -> dict[str, Any]:
        return data | {"merge_method": "linear", "parameters": {"weight": 1.0}}

    def files_of(self, recipe: Recipe) -> int:
        return 2

    def bytes_of(self, tensor: str, shape: Sequence[int]) -> int:
        return 4 * math.prod(shape)

    def run(self, bench: Bench) -> Made:
        def of(module: nn.Module, forward: Forward, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            learned = parameters_among(tensors)
            yield from importances(
                module,
                forward,
                examples,
                without_labels=self.without_labels,
                tensors=learned,
                most_bytes=bench.room,
            )
            for name, tensor in tensors.items():  # running statistics, which no loss depends on by a gradient
                if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    yield name, torch.zeros(tensor.shape)

        files = {}
        for title, groups in (("importance", bench.groups), ("forget_importance", bench.checks)):
            examples: list[Examples] = examples_of(groups)
            files[title] = self.measured(bench, f"{title}.safetensors", 0, examples, of)
        forgotten = [{"file": group.file, "samples": group.samples} for group in bench.checks]
        return Made(files, told={"forget": forgotten})
