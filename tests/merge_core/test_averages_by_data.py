"""Averages that measured numbers weigh: by Fisher information, and RegMean's by what enters the layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core import matrices
from merge_core.errors import RecipeError
from merge_core.merge import merge, plan_only
from merge_core.method import Block
from merge_core.methods.fisher import FisherAverage
from merge_core.methods.regmean import RegMean
from merge_core.recipe import Recipe
from tests.conftest import method_recipe, mixed_tensors
from tests.merge_core.test_matrices import holds_what_it_says

SHAPES = [(1, 7), (7, 1), (5, 5), (12, 30), (30, 12)]


def models_of(shape: tuple[int, ...], count: int = 3) -> Tensor:
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(0))


def inputs_of(columns: int, samples: int, count: int = 3) -> Tensor:
    """What enters each model's layer: its columns differ in size by a thousand."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, samples, columns, generator=generator) * torch.logspace(-2, 1, columns)


def grams_of(inputs: Tensor) -> Tensor:
    return inputs.double().mT @ inputs.double() / inputs.shape[1]


def regmean(models: Tensor, grams: Tensor, alpha: float, weights: Tensor) -> Tensor:
    """The paper's formula as it stands."""
    diagonals = torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    grams = (alpha * grams + (1 - alpha) * diagonals) * weights[:, None, None]
    return torch.linalg.solve(grams.sum(0), (grams @ models.double().mT).sum(0)).T


@pytest.mark.parametrize("alpha", [0, 0.9, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_regmean_is_the_papers_formula(shape: tuple[int, int], alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    models, grams = models_of(shape), grams_of(inputs_of(shape[1], samples=200))
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    monkeypatch.setattr(matrices, "RUN_ELEMENTS", 40)

    block = Block.of(models, gram=list(grams), tensor="t")
    merged = RegMean(alpha=alpha, weight=tuple(weights.tolist())).merge(block, {})

    rounded = grams.float().double()
    torch.testing.assert_close(merged, regmean(models, rounded, alpha, weights), rtol=1e-5, atol=1e-6)


def test_regmean_answers_each_models_inputs_as_that_model_does_where_they_differ() -> None:
    models, inputs = models_of((20, 12)), inputs_of(12, samples=200)
    own = torch.zeros_like(inputs)
    for model in range(3):
        own[model, :, 4 * model : 4 * model + 4] = inputs[model, :, 4 * model : 4 * model + 4]

    merged = RegMean(alpha=1).merge(Block.of(models, gram=list(grams_of(own))), {}).float()

    torch.testing.assert_close(own @ merged.T, own @ models.mT, rtol=1e-4, atol=1e-4)


def test_no_weights_near_regmeans_answer_all_inputs_better() -> None:
    models, inputs = models_of((20, 12)), inputs_of(12, samples=200)

    merged = RegMean(alpha=1).merge(Block.of(models, gram=list(grams_of(inputs))), {})

    def error(weights: Tensor) -> float:
        return float(((weights - models.double()) @ inputs.double().mT).square().mean())

    for near in models_of((20, 12), 5).double():
        assert error(merged) < min(error(merged + 1e-3 * near), error(merged - 1e-3 * near))


def test_where_no_input_goes_the_average_stays() -> None:
    """A column that is always 0, and with α = 1 whatever nine examples leave out of twelve columns."""
    models, inputs = models_of((6, 12)), inputs_of(12, samples=3)
    inputs[:, :, 4] = 0
    grams = grams_of(inputs)
    mean = models.double().mean(0)

    for alpha in (0.9, 1):
        change = RegMean(alpha=alpha).merge(Block.of(models, gram=list(grams)), {}) - mean
        assert torch.isfinite(change).all() and change[:, 4].abs().max() == 0

    sizes = grams.sum(0).diagonal().sqrt()
    seen = (torch.cat(list(inputs)).double() / sizes).nan_to_num()
    away = torch.eye(12, dtype=torch.float64) - torch.linalg.pinv(seen) @ seen
    assert ((change * sizes) @ away).norm() < 1e-4 * (change * sizes).norm()


def test_equal_models_are_their_own_regmean_however_bad_the_numbers() -> None:
    models = models_of((6, 5), 1).expand(3, 6, 5)
    for grams in (torch.zeros(3, 5, 5), -torch.ones(3, 5, 5), torch.full((3, 5, 5), 1e-38)):
        merged = RegMean().merge(Block.of(models, gram=list(grams)), {})
        torch.testing.assert_close(merged.float(), models[0])


def test_a_regmean_without_all_grams_or_by_wish_is_the_average() -> None:
    models, grams = models_of((6, 5)), list(grams_of(inputs_of(5, 20)))
    for block, chosen in [
        (Block.of(models, gram=[*grams[:2], None]), RegMean(weight=(1.0, 1.0, 2.0))),
        (Block.of(models, gram=grams), RegMean(weight=(1.0, 1.0, 2.0), solve=False)),
    ]:
        expected = (models[0] + models[1] + 2 * models[2]) / 4
        torch.testing.assert_close(chosen.merge(block, {}).float(), expected)


@pytest.mark.parametrize("shape", [(200, 200), (600, 200), (200, 600)], ids=str)
def test_regmean_holds_what_it_says(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the given numbers and their float64, which the plan reckons with by itself."""
    models = models_of(shape).double()
    grams = grams_of(inputs_of(shape[1], 100))
    block = Block.of(models, gram=list(grams))
    block.working = torch.float64
    block.given = {"gram": [type(block.stored[0]).of(gram) for gram in grams]}
    holds_what_it_says(RegMean(), block, models[0], monkeypatch)


def test_fisher_is_the_papers_formula_by_any_norm() -> None:
    models = models_of((6, 5))
    fisher = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(1)) ** 4
    weights = torch.tensor([1.0, 0.5, 2.0])
    for method, known, norms in [
        (FisherAverage(weight=(1.0, 0.5, 2.0)), {}, torch.ones(3)),
        (FisherAverage(weight=(1.0, 0.5, 2.0), normalize=True), {"norms": [1.0, 2.0, 4.0]}, torch.tensor([1.0, 2, 4])),
    ]:
        each = fisher.clamp(min=1e-6) * (weights / norms)[:, None, None]
        merged = method.merge(Block.of(models, fisher=list(fisher)), known)
        torch.testing.assert_close(merged, (each * models).sum(0) / each.sum(0))


def test_both_with_files_beside_the_models(models: Path, tmp_path: Path) -> None:
    """Fisher information that is a thousand times another's leaves the other model nothing, unless it is normalised."""
    floats = {name: each for name, each in mixed_tensors(0).items() if each.is_floating_point()}
    some = {name: torch.rand(each.shape, generator=torch.Generator().manual_seed(3)) for name, each in floats.items()}
    for number, scale in enumerate((1000.0, 1.0)):
        scaled = {name: each * scale for name, each in some.items() if name != "lm_head.weight"}
        save_file(scaled, models / f"fisher{number}.safetensors")
    listed = [{"model": f"m{number}", "statistics": {"fisher": f"fisher{number}.safetensors"}} for number in range(2)]
    sources = [load(models / f"m{number}") for number in range(2)]
    for normalize, shares in ((False, (1000 / 1001, 1 / 1001)), (True, (0.5, 0.5))):
        recipe = {"merge_method": "fisher", "models": listed, "parameters": {"normalize": normalize}}
        merge(Recipe.from_data(recipe), tmp_path / f"out-{normalize}", roots=[models])
        merged = load(tmp_path / f"out-{normalize}")
        for name in floats:
            one, other = (0.5, 0.5) if name == "lm_head.weight" else shares
            expected = one * sources[0][name].double() + other * sources[1][name].double()
            torch.testing.assert_close(merged[name].double(), expected, rtol=2**-7, atol=2e-3)

    plan = plan_only(Recipe.from_data(method_recipe("regmean")), roots=[models])
    assert plan.by_name["model.layers.0.mlp.up_proj.weight"].given["gram"][0] is not None


def load(folder: Path) -> dict[str, Tensor]:
    return {name: each for file in sorted(folder.glob("model*.safetensors")) for name, each in load_file(file).items()}


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_weights_that_cannot_be_are_told(models: Path, method: str) -> None:
    for weight in (0, -1):
        with pytest.raises(RecipeError, match=r"sum to zero|greater than or equal to 0"):
            plan_only(Recipe.from_data(method_recipe(method, parameters={"weight": weight})), roots=[models])
