"""Published recipes: read leniently, told what has no effect, refused by name where they are for other tools."""

from __future__ import annotations

import textwrap
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from merge_core.errors import RecipeError
from merge_core.published import read_published
from merge_core.recipe import Recipe

LEGACY = """
name: legacy-example
merge_method: linear
slices:
  - sources:
      - {model: org/A, layer_range: [0, 4], revision: dpo-v0, parameters: {weight: 1.0}}
      - {model: org/B, layer_range: [0, 4], weight: 0.3, parameters: {weight: 0.0}}
    residual_weight: 0.1
parameters: {embed_slerp: true, normalize: true, dare_pruning_rate: 0.2}
input_model_parameters: {org/A: {weight: 0.2}}
tokenizer_source: model:org/A
"""


def test_what_has_no_effect_is_told_and_taken_out() -> None:
    published = read_published(LEGACY)

    assert {each.pointer for each in published.ignored} == {
        "#/name",
        "#/slices/0/sources/0/revision",
        "#/slices/0/sources/1/weight",
        "#/parameters/embed_slerp",
        "#/parameters/dare_pruning_rate",
        "#/input_model_parameters",
    }
    assert all("mergekit" in each.what or "`parameters`" in each.what for each in published.ignored)
    strict = yaml.safe_load(published.recipe.to_yaml())
    assert "name" not in strict and "weight" not in strict["slices"][0]["sources"][1]
    assert strict["parameters"] == {"normalize": True}
    assert Recipe.from_data(strict).to_data() == published.recipe.to_data()


def test_a_recipe_is_found_in_a_model_card() -> None:
    recipe = "merge_method: linear\nmodels:\n- model: a\n- model: b\nparameters:\n  weight: 1\n"
    card = f"---\ntags: [merge]\n---\n# A model\n\n```python\nimport torch\n```\n\nMade so:\n\n```yaml\n{recipe}```\n"

    published = read_published(card.encode())

    assert published.found_in == "model card" and published.recipe == Recipe.from_text(recipe)
    in_a_list = "1. Made so:\n\n" + textwrap.indent(f"```yaml\n{recipe}```\n", "   ")
    assert read_published(in_a_list).recipe == Recipe.from_text(recipe)


@pytest.mark.parametrize(
    ("more", "pointer"),
    [
        ("tokenizer: {source: union, tokens: {</s>: {source: a, x: 1}}}", "#/tokenizer/tokens/<~1s>/x"),
        ("parameters: {a/b: 1}", "#/parameters/a~1b"),
        ("statistics: {a/b: c}", "#/statistics/a~1b"),
        ("a~/b: 1", "#/a~0~1b"),
    ],
)
def test_keys_with_slashes_are_told_and_taken_out(more: str, pointer: str) -> None:
    published = read_published(f"merge_method: iso_c\nbase_model: b\nmodels: [{{model: a}}]\n{more}")
    assert [each.pointer for each in published.ignored] == [pointer]


def test_several_documents_of_a_card_are_stages() -> None:
    stage = "name: first\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}"
    last = "merge_method: slerp\nbase_model: first\nmodels: [{model: c}]\nparameters: {t: 0.5}"

    published = read_published(f"# Card\n```yaml\n{stage}\n```\nthen\n```yaml\n{last}\n```\n")

    assert published.recipe.merge_method == "slerp"
    assert [each.name for each in published.recipe.stages] == ["first"] and not published.ignored


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base_model: a\ngate_mode: hidden\nexperts: [{source_model: b}]", "a mixture of experts"),
        ("merge_method: moe\nbase_model: a\nexperts: [{source_model: b}]", "a mixture of experts"),
        ("genome: {models: [a, b], merge_method: ties}\ntasks: [{name: x}]", "an evolutionary search"),
        ("layer_slices: [{model: a, start: 0, end: 4}]", "bakllama"),
        ("merge_method: core_space\nmodels: [{model: a}]", "core_space is a method of a proposal for mergekit"),
        ("merge_method: nonsense\nmodels: [{model: a}]", "there is no method 'nonsense'"),
        ("---\ntags: [merge]\n---\n# A card\n\nno recipe\n", "no fenced block"),
        ("# A card\n```yaml\nmerge_method: [\n```\n", "not valid YAML"),
        ("", "a recipe is a mapping"),
        ("just text", "a recipe is a mapping"),
        ("[1, 2]", "a recipe is a mapping"),
    ],
)
def test_what_is_no_recipe_is_refused_by_its_name(text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        read_published(text)


@given(st.text(alphabet="`~#-: \nmerge_od[]{}0", max_size=300) | st.binary(max_size=200))
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    try:
        read_published(text)
    except RecipeError as error:
        assert str(error)


def test_fences_without_end_are_read_in_one_go() -> None:
    begun = time.process_time()
    with pytest.raises(RecipeError):
        read_published("# Card\n" + "\n".join("`" * (3 + i % 500) for i in range(8000)))
    assert time.process_time() - begun < 20
