"""EoRA's covariances (Liu et al., 2024): of each linear layer the mean of x xᵀ of what enters it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from merge_core.calibration.measurer import GramMeasurer, examples_of
from merge_core.calibration.method import Made

if TYPE_CHECKING:
    from merge_core.calibration.bench import Bench


class EoraCovariances(GramMeasurer):
    """The covariances, about 0, of what enters the fine-tune's linear layers, on unlabelled data.

    Of tensors without one EoRA takes the plain singular value decomposition. The same file serves as `covariance`
    under `outputs: {kind: delta, encoding: low_rank}`.
    """

    title: ClassVar[str] = "Covariances of inputs for EoRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.21271"
    serves: ClassVar[Sequence[str]] = ("eora",)

    method: Literal["eora"]

    def template(self, data: dict[str, Any]) -> dict[str, Any]:
        return data | {"merge_method": "low_rank"}

    def run(self, bench: Bench) -> Made:
        return Made({"covariance": self.grams(bench, "covariance.safetensors", 0, examples_of(bench.groups))})
