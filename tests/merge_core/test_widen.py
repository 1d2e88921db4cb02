"""WIDEN: columns, tokens and zeros, against the paper's formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_core.kernels.vectors import Rows
from merge_core.method import Block, Known
from merge_core.methods.widen import Widen
from merge_core.statistics import Grains, Statistic


def widen(models: Tensor, base: Tensor, *, tensor: str = "t", length: int = 1, **parameters: float) -> Tensor:
    method = Widen.model_validate(parameters)
    grains = Grains(len(base), base[0].numel(), 3)
    blocks = []
    for first in range(0, grains.count, length):
        rows = slice(*grains.row_range(first, min(first + length, grains.count)))
        blocks.append(Block([Rows.of(model[rows]) for model in models], Rows.of(base[rows]), tensor, grains, first))
    known: Known = {}
    (stage,) = method.stages("tensor")
    found: dict[str, Statistic] = {}
    for block in reversed(blocks):
        stage.observe(block, known, found)
    stage.finish(found, known)
    return torch.cat([method.merge(block, known) for block in blocks])


def oracle(models: Tensor, base: Tensor, ratio: float, calibration: float) -> Tensor:
    models, base = models.double(), base.double()
    magnitudes = (models.norm(dim=1) - base.norm(dim=0)).abs()
    directions = 1 - torch.cosine_similarity(models, base.expand_as(models), dim=1)
    weights = []
    for distances in (magnitudes, directions):
        ranks = torch.argsort(torch.argsort(distances, dim=1, stable=True), dim=1) / distances.shape[1]
        important = ranks > ratio * ranks.mean(dim=1, keepdim=True)
        weights.append(torch.where(important, calibration, torch.softmax(ranks.double(), dim=0)))
    weight = (weights[0] + weights[1]).unsqueeze(1) / 2
    return base + (weight * (models - base)).sum(0)


@pytest.fixture
def made() -> tuple[Tensor, Tensor]:
    base = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    return base + 0.1 * torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(1)), base


@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (0.5, 0.3), (1.7, 1.0)])
def test_agrees_with_the_paper(made: tuple[Tensor, Tensor], ratio: float, calibration: float) -> None:
    ours = widen(*made, above_average_value_ratio=ratio, score_calibration_value=calibration)
    torch.testing.assert_close(ours.double(), oracle(*made, ratio, calibration), rtol=1e-6, atol=1e-6)


def test_the_columns_of_an_embedding_are_its_tokens(made: tuple[Tensor, Tensor]) -> None:
    models, base = made
    whole = widen(models, base, tensor="model.embed_tokens.weight", length=100)
    expected = oracle(models.transpose(1, 2), base.T, 1.0, 1.0).T
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=1e-6)
    for length in (1, 2, 3):
        assert torch.equal(widen(models, base, tensor="model.embed_tokens.weight", length=length), whole)


def test_a_convolution_is_the_matrix_of_its_output_channels(made: tuple[Tensor, Tensor]) -> None:
    models, base = made
    cut = widen(models.reshape(3, 10, 2, 2, 2), base.reshape(10, 2, 2, 2))
    assert torch.equal(cut.reshape(10, 8), widen(models, base))


def test_a_column_of_zeros_has_not_turned_and_one_that_was_has_turned_by_one(made: tuple[Tensor, Tensor]) -> None:
    models, base = made
    base[:, 2] = 0
    models[:, :, 2] = 0
    models[0, 4, 2] = 1e-4  # the least change of magnitude, but a new direction
    found: dict[str, Statistic] = {}
    known: Known = {}
    (stage,) = Widen(above_average_value_ratio=0.0, score_calibration_value=2.0).stages("tensor")
    stage.observe(Block.of(models, base), known, found)
    stage.finish(found, known)
    assert [weights[2] < 1 for weights in known["weights"]] == [False, True, True]
    assert torch.isfinite(widen(models, base)).all()
