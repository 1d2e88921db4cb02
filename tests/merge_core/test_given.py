"""What a recipe gives a method besides models: bases beside them, and files of measured numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_core.errors import CheckpointNotFound, IncompatibleModels, NonFinite, RecipeError, WeightsmithError
from merge_core.kernels.plain import rounded
from merge_core.merge import merge, plan_only
from merge_core.method import Block
from merge_core.methods.darex import DarexQ, analytic_q
from merge_core.methods.half_reset import HalfReset, category_of
from merge_core.methods.ssd import SelectiveSynapticDampening
from merge_core.recipe import Recipe
from tests.conftest import CONFIG, method_recipe, mixed_tensors, numbers, write_checkpoint

SSD: dict[str, Any] = {
    "merge_method": "ssd",
    "models": [{"model": "m0"}],
    "statistics": {"importance": "same.safetensors", "forget_importance": "same.safetensors"},
}


def run(models: Path, out: Path, recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    merge(Recipe.from_data(recipe), out, roots=[models])
    return load_file(out / "model.safetensors")


def refusal(models: Path, recipe: dict[str, Any]) -> WeightsmithError:
    with pytest.raises(WeightsmithError) as refused:
        plan_only(Recipe.from_data(recipe), roots=[models])
    return refused.value


def test_dampening_with_importances_from_files(models: Path, tmp_path: Path) -> None:
    everything = numbers(mixed_tensors(0))["same"]
    forgotten = {name: 100 * each**4 for name, each in everything.items()}
    save_file(forgotten, models / "forget.safetensors")

    merged = run(
        models, tmp_path / "out", {**SSD, "statistics": SSD["statistics"] | {"forget_importance": "forget.safetensors"}}
    )

    for name, tensor in mixed_tensors(1).items():
        if tensor.is_floating_point():
            importance, forget = everything[name].double(), forgotten[name].double()
            factor = torch.where(forget > 10 * importance, (importance / forget).clamp(max=1), 1.0)
            expected = tensor.double() * factor
            torch.testing.assert_close(merged[name].double(), expected, rtol=2**-8, atol=1e-6)
            assert bool((factor < 1).any()) or tensor.numel() < 20
        else:
            assert torch.equal(merged[name], tensor)


def test_a_difference_from_another_base_is_added_in_float64_and_rounded_once(models: Path, tmp_path: Path) -> None:
    recipe = method_recipe("transfer", parameters={"lambda": 0.5, "weight": 0.7})
    merged = run(models, tmp_path / "out", recipe)

    for name, target in mixed_tensors(0).items():
        if target.is_floating_point():
            old = mixed_tensors(4)[name].double()
            deltas = [(mixed_tensors(seed)[name].double() - old) * 0.7 for seed in (1, 2, 3)]
            expected = target.double() + (deltas[0] + deltas[1] + deltas[2]) * 0.5
            assert torch.equal(merged[name], rounded(expected, target.dtype)), name


def test_files_are_named_hashed_and_counted(models: Path, tmp_path: Path) -> None:
    plan = plan_only(Recipe.from_data(method_recipe("transfer")), roots=[models]).to_dict(steps=True)
    assert plan["models"] == ["base", "m0", "m1", "m2", "old"]
    assert plan["roles"] == {"base": "base", "old": "base of m0, m1, m2"}
    assert [source["model"] for source in plan["steps"][0]["given"]["base_model"]] == ["old"] * 3

    run(models, tmp_path / "out", SSD)

    plan = plan_only(Recipe.from_data(SSD), roots=[models]).to_dict()
    assert plan["roles"] == {"same.safetensors": "statistics: importance, forget_importance"}
    lock = json.loads((tmp_path / "out" / "merge.lock.json").read_text())
    given = lock["sources"][1]
    assert given["model"] == "same.safetensors" and len(given["files"][0]["sha256"]) == 64
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- `same.safetensors` (statistics: importance, forget_importance)" in card
    assert plan["bytes_read"] > sum(tensor.nbytes for tensor in mixed_tensors(1).values()) + given["files"][0]["size"]


@pytest.mark.parametrize(
    ("change", "pointer", "says"),
    [
        ({"statistics": {"importance": "same.safetensors"}}, "#/statistics/forget_importance", "needs statistics"),
        (
            {"statistics": {"importence": "same.safetensors", **SSD["statistics"]}},
            "#/statistics/importence",
            "did you mean importance?",
        ),
        (
            {"models": [{"model": "m0", "statistics": {"importance": "same.safetensors"}}]},
            "#/models/0/statistics/importance",
            "for all models alike",
        ),
        ({"models": [{"model": "m0", "base_model": "base"}]}, "#/models/0/base_model", "one base"),
        (
            {"merge_method": "transfer", "base_model": "base", "statistics": None},
            "#/models/0/base_model",
            "what m0 was tuned from",
        ),
        (
            {"merge_method": "darex", "base_model": "base", "statistics": None, "parameters": {"q": "analytic"}},
            "#/statistics/activations",
            "the mean of what enters",
        ),
        (
            {
                "merge_method": "darex",
                "base_model": "base",
                "statistics": {"activations": "strangers.safetensors"},
                "parameters": {"q": "analytic"},
            },
            "#/statistics/activations",
            "no tensor in strangers.safetensors",
        ),
        (
            {"merge_method": "graft", "base_model": "base", "statistics": {"mask": "same.safetensors"}},
            "#/statistics/mask",
            "no use for mask",
        ),
        ({"merge_method": "linear", "parameters": {"weight": 1}}, "#/statistics/importance", "takes none"),
    ],
)
def test_recipes_that_give_too_little_or_too_much(
    models: Path, change: dict[str, Any], pointer: str, says: str
) -> None:
    save_file({"strange": torch.ones(3)}, models / "strangers.safetensors")

    refused = refusal(models, {**SSD, **change})

    assert isinstance(refused, RecipeError)
    assert any(problem.pointer == pointer and says in problem.detail for problem in refused.problems), str(refused)


def test_a_file_that_is_not_there(models: Path) -> None:
    refused = refusal(models, {**SSD, "statistics": SSD["statistics"] | {"importance": "nowhere.safetensors"}})
    assert isinstance(refused, CheckpointNotFound) and "nowhere.safetensors" in str(refused)


def _without_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def _with_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(25)


@pytest.mark.parametrize(
    ("damage", "says"), [(_without_a_tensor, "lacks model.norm.weight"), (_with_another_shape, "must be [24]")]
)
def test_files_that_do_not_fit(models: Path, damage: Callable[[dict[str, torch.Tensor]], None], says: str) -> None:
    tensors = numbers(mixed_tensors(0))["same"]
    damage(tensors)
    save_file(tensors, models / "same.safetensors")

    refused = refusal(models, SSD)

    assert isinstance(refused, IncompatibleModels)
    assert says in str(refused) and refused.problems[0].tensor == "model.norm.weight"
    if "lacks" in says:
        plan_only(Recipe.from_data({**SSD, "exclude": ["model.norm"]}), roots=[models])


def test_a_base_that_does_not_fit_its_model(models: Path) -> None:
    tensors = mixed_tensors(4)
    del tensors["model.norm.weight"]
    write_checkpoint(models / "old", tensors)
    refused = refusal(models, method_recipe("transfer"))
    assert isinstance(refused, IncompatibleModels) and "old lacks model.norm.weight" in str(refused)


@pytest.mark.parametrize("where", ["same.safetensors", "old"])
def test_a_number_that_is_none_is_refused(models: Path, tmp_path: Path, where: str) -> None:
    file = models / where / "model.safetensors" if where == "old" else models / where
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file)
    with pytest.raises(NonFinite, match="element 3"):
        run(models, tmp_path / "out", SSD if where != "old" else method_recipe("transfer"))


@pytest.mark.parametrize("title", ["half_reset", "darex"])
def test_what_no_measurement_reads_is_checked_when_it_is_merged(models: Path, tmp_path: Path, title: str) -> None:
    tensors = mixed_tensors(1)
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.numel():
            tensor.flatten()[0] = torch.inf
    write_checkpoint(models / "bad", tensors, config={})
    with pytest.raises(NonFinite):
        run(models, tmp_path / "out", {**method_recipe(title), "models": [{"model": "bad"}]})


def test_dampening_of_0d_tensors_and_where_nothing_is_to_be_forgotten() -> None:
    method = SelectiveSynapticDampening(alpha=2)
    for forget, expected in ((8.0, 0.75), (0.0, 3.0), (4.0, 3.0)):
        block = Block.of([3.0], importance=[2.0], forget_importance=[forget])
        assert method.merge(block, {}) == torch.tensor(expected)
    zeros = Block.of([[3.0, 4.0]], importance=[[0.0, 0.0]], forget_importance=[[0.0, 1.0]])
    assert method.merge(zeros, {}).tolist() == [3.0, 0.0]


def test_a_given_mask_is_grafted_bit_for_bit(models: Path, tmp_path: Path) -> None:
    floats = {name: tensor for name, tensor in mixed_tensors(0).items() if tensor.is_floating_point()}
    masks = {name: numbers(floats)["same"][name] > 0.5 for name in floats}
    save_file(masks, models / "mask.safetensors")
    recipe = method_recipe("graft-given", statistics={"mask": "mask.safetensors"})

    merged = run(models, tmp_path / "out", recipe)

    for name, base in floats.items():
        assert torch.equal(merged[name], torch.where(masks[name], mixed_tensors(1)[name], base))


def test_half_of_each_category_is_the_base_s_bit_for_bit(models: Path, tmp_path: Path) -> None:
    recipe = {"merge_method": "half_reset", "base_model": "base", "models": [{"model": "m0"}]}
    merged = run(models, tmp_path / "out", recipe)

    base, tuned = mixed_tensors(0), mixed_tensors(1)
    reset: dict[str, list[bool]] = {}
    for name, tensor in merged.items():
        if tensor.is_floating_point() and tensor.numel():
            assert torch.equal(tensor, base[name]) != torch.equal(tensor, tuned[name])
            reset.setdefault(category_of(name), []).append(torch.equal(tensor, base[name]))
    assert {category: sum(which) for category, which in reset.items()} == {
        category: int(len(which) / 2 + 0.5) for category, which in reset.items()
    }
    other = run(models, tmp_path / "other", {**recipe, "seed": 1})
    assert any(not torch.equal(merged[name], other[name]) for name in merged)
    some = run(models, tmp_path / "some", {**recipe, "parameters": {"categories": "norm", "fraction": 1}})
    assert all(torch.equal(some[name], (base if "norm" in name else tuned)[name]) for name in some)


def test_half_of_the_elements_are_the_base_s(models: Path, tmp_path: Path) -> None:
    parameters = {"unit": "element", "fraction": 0.25}
    recipe = {"merge_method": "half_reset", "base_model": "base", "models": [{"model": "m0"}], "parameters": parameters}
    merged = run(models, tmp_path / "out", recipe)["model.layers.1.mlp.down_proj.weight"]
    base, tuned = (mixed_tensors(seed)["model.layers.1.mlp.down_proj.weight"] for seed in (0, 1))
    is_reset = merged == base
    assert torch.equal(merged, torch.where(is_reset, base, tuned))
    assert 0.2 < is_reset.float().mean() < 0.3


def test_categories_are_known() -> None:
    with pytest.raises(ValueError, match="heads"):
        HalfReset(categories="attention, heads")


def test_an_analytic_q_counts_the_bias_as_a_column_and_gives_it_and_the_rest_a_q(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    delta = {
        "fc.weight": torch.randn(6, 10, generator=generator),
        "fc.bias": torch.randn(6, generator=generator),
        "norm.weight": torch.randn(10, generator=generator),
        "head.weight": torch.randn(3, 10, generator=generator),
    }
    activations = torch.randn(10, generator=generator)
    save_file({name: torch.zeros_like(each) for name, each in delta.items()}, tmp_path / "base.safetensors")
    save_file(delta, tmp_path / "tuned.safetensors")
    save_file({"fc.weight": activations}, tmp_path / "means.safetensors")
    recipe = {
        "merge_method": "darex",
        "base_model": "base.safetensors",
        "models": [{"model": "tuned.safetensors", "statistics": {"activations": "means.safetensors"}}],
        "parameters": {"q": "analytic", "drop_rate": [{"filter": "head", "value": 0}, {"value": 0.5}]},
    }

    merged = run(tmp_path, tmp_path / "out", recipe)

    c = torch.cat([delta["fc.weight"] * activations, delta["fc.bias"][:, None]], dim=1).double()
    q = analytic_q(c.sum(1).numpy(), (c * c).sum(1).numpy(), 0.5, 0.3, 0.95).mean()
    assert torch.equal(merged["head.weight"], delta["head.weight"])
    for name in ("fc.weight", "fc.bias", "norm.weight"):
        kept = merged[name] != 0
        torch.testing.assert_close(merged[name][kept], delta[name][kept] / float(q))
        assert 0 < kept.sum() < kept.numel()


def test_darex_with_q_of_what_is_kept_is_plain_dare() -> None:
    block = Block.of([[1.0, 2.0, 3.0, 4.0]], base=[0.0] * 4, seed=3)
    merged = DarexQ(drop_rate=(0.5,), q=(0.5,)).merge(block, {})
    assert torch.equal(merged, torch.where(block.uniform() >= 0.5, torch.tensor([2.0, 4.0, 6.0, 8.0]), 0.0))


def _with_rows(folder: Path, tensors: dict[str, torch.Tensor], rows: int) -> None:
    """A model with so many tokens, of ones where it has more."""
    changed = dict(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        longer = torch.cat([tensors[name], torch.ones(max(0, rows - 96), 24, dtype=tensors[name].dtype)])
        changed[name] = longer[:rows].clone()
    write_checkpoint(folder, changed, config=CONFIG | {"vocab_size": rows})


TRANSFER: dict[str, Any] = {
    "merge_method": "transfer",
    "base_model": "base",
    "models": [{"model": "m0", "base_model": "old"}],
}


def test_rows_that_only_a_fine_tune_has_are_added_to_zeros(models: Path, tmp_path: Path) -> None:
    _with_rows(models / "m0", mixed_tensors(1), 99)
    assert "[99, 24]" in str(refusal(models, TRANSFER))

    merged = run(models, tmp_path / "out", TRANSFER | {"parameters": {"vocabulary": "pad_zero", "lambda": 0.5}})

    assert merged["lm_head.weight"].shape == (99, 24) and bool((merged["lm_head.weight"][96:] == 0.5).all())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 99
    assert "96 rows of tokens become 99" in (tmp_path / "out" / "README.md").read_text()

    cut = run(models, tmp_path / "cut", TRANSFER | {"parameters": {"vocabulary": "truncate", "lambda": 0.5}})
    assert torch.equal(cut["lm_head.weight"], merged["lm_head.weight"][:96])
    assert torch.equal(cut["model.norm.weight"], merged["model.norm.weight"])


def test_rows_that_a_fine_tune_lost_are_not_subtracted(models: Path) -> None:
    _with_rows(models / "m0", mixed_tensors(1), 90)
    refused = refusal(models, TRANSFER | {"parameters": {"vocabulary": "pad_zero"}})
    assert isinstance(refused, IncompatibleModels) and "truncate" in str(refused)
    by_name = {"vocabulary": [{"filter": "embed", "value": "pad_zero"}, {"value": "truncate"}]}
    assert "one word for the whole merge" in str(refusal(models, TRANSFER | {"parameters": by_name}))
