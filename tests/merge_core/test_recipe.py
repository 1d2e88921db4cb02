"""mergekit's format, read strictly."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.errors import RecipeError
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.settings import Setting
from merge_core.sizes import parse_bytes

GOOD: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": 0.5, "density": [0.1, 0.9]}}, {"model": "b"}],
    "parameters": {"weight": 1, "normalize": "false"},
    "dtype": "torch.bfloat16",
}


def test_yaml_and_json_mean_the_same() -> None:
    text = """
    merge_method: ties
    base_model: base
    models:
      - model: a
        parameters: {weight: 0.5, density: [0.1, 0.9]}
      - model: b
    parameters: {weight: 1, normalize: "false"}
    dtype: torch.bfloat16
    """
    with pytest.raises(RecipeError, match="'false' is not a number"):
        Recipe.from_data({**GOOD, "parameters": {"weight": [1, "false"]}})
    assert Recipe.from_text(text).canonical() == Recipe.from_data(GOOD).canonical()


@pytest.mark.parametrize(
    ("written", "place", "expected"),
    [
        (0.5, 0.7, 0.5),
        (True, 0, 1.0),
        ("1e-3", 0, 0.001),
        ([0, 1], 0.25, 0.25),
        ([0, 0.5, 0.3, 0.7, 1], 0.25, 0.5),
        ([0, 0.5, 0.3, 0.7, 1], 0.125, 0.25),
        ([0, 1, 3], 1.0, 3.0),
        ([7], 1.0, 7.0),
        ([{"filter": "mlp", "value": 2}, {"value": [3, 5]}], 0.5, 4.0),
        ([{"filter": "attn", "value": 2}, {"filter": "*", "value": 6}], 0.5, 2.0),
        ([{"filter": "mlp", "value": 2}], 0.5, None),
        ("mean", 0, "mean"),
    ],
)
def test_settings_are_numbers_gradients_or_filters(written: Any, place: float, expected: object) -> None:
    value = Setting.parse(written).evaluate("model.layers.1.self_attn.q_proj.weight", place)
    assert value == pytest.approx(expected) if isinstance(expected, float) else value == expected


@pytest.mark.parametrize(
    "written", [None, {}, {"q_proj": 1}, [1, {"value": 1}], [{"value": None}], [{"filter": "a"}], [[0, 1]]]
)
@pytest.mark.parametrize("key", ["weight", "density"])
def test_what_is_no_setting_is_refused_with_its_place(written: Any, key: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.from_data({**GOOD, "parameters": {key: written}})
    assert refused.value.problems[0].pointer == f"#/parameters/{key}"


TYPOS: list[tuple[dict[str, Any], str, str]] = [
    ({"merge_method": "tise"}, "#/merge_method", "did you mean ties?"),
    ({"basemodel": "x"}, "#/basemodel", "did you mean base_model?"),
    ({"parameters": {"densty": 1, "weight": 1}}, "#/parameters/densty", "did you mean density?"),
    ({"models": [{"model": "a", "wieght": 1}]}, "#/models/0/wieght", "unknown key 'wieght'"),
    ({"models": [{"model": "a", "parameters": {"weigth": 1}}]}, "#/models/0/parameters/weigth", "did you mean weight?"),
    (
        {"models": [{"model": "a", "parameters": {"normalize": 1}}]},
        "#/models/0/parameters/normalize",
        "for all models alike",
    ),
    ({"limits": {"memry": 1}}, "#/limits/memry", "did you mean memory?"),
    ({"models": [{"model": "a"}, {"model": "a"}]}, "#/models/1/model", "listed twice"),
    (
        {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
        "#",
        "exactly one of models, slices and modules",
    ),
    ({"models": [{"model": "a+b+c"}]}, "#/models/0/model", "more than one '+'"),
    ({"models": [{"model": "a@b@c"}]}, "#/models/0/model", "more than one '@'"),
    ({"dtype": "int4"}, "#/dtype", "Input should be"),
    ({"seed": -1}, "#/seed", "greater than or equal to 0"),
    ({"outputs": {"max_shard_size": "five"}}, "#/outputs/max_shard_size", "is not a size"),
    ({"exclude": [""]}, "#/exclude/0", "exclude every tensor"),
]


@pytest.mark.parametrize(("change", "pointer", "says"), TYPOS, ids=[pointer for _, pointer, _ in TYPOS])
def test_a_mistake_is_named_with_its_place(change: dict[str, Any], pointer: str, says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.from_data({**GOOD, **change})
    assert pointer in [problem.pointer or "#" for problem in refused.value.problems]
    assert says in str(refused.value)


def test_unknown_keys_can_be_listed_instead() -> None:
    recipe = Recipe.from_data(
        {**GOOD, "basemodel": "x", "parameters": {"weight": 1, "densty": 1}, "unknown_keys": "warn"}
    )
    assert len(recipe.warnings) == 2 and all("ignored" in warning for warning in recipe.warnings)
    assert "densty" not in recipe.method.parameters()


ODD = [b"\xff", {"path": 3}, {"path": "a@b@c"}, "\ud800", 10**5000, {1: 2}, object()]


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_odd_values_of_unknown_keys_are_refused_or_kept(value: Any) -> None:
    try:
        recipe = Recipe.from_data({**GOOD, "foo": value, "unknown_keys": "warn"})
    except RecipeError:
        return
    assert Recipe.from_data(recipe.to_data()) == recipe
    recipe.to_yaml().encode()


def test_deep_nesting_is_refused_before_anything_reads_it() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RecipeError, match="nested deeper"):
        Recipe.from_data({**GOOD, "parameters": {"weight": deep}})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.from_data({**GOOD, "basemodel": 1, "parameters": {"densty": 1, "wait": 1}})
    assert len(refused.value.problems) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\n---\nb: 2\n", "0/merge_method: say which"),
        ("a: &x [1]\nb: *x\n", "alias"),
        ("merge_method: ties\nmerge_method: slerp\n", "appears twice"),
        ("[" * 5000, "nested deeper"),
        ("{" * 40 + "}" * 40, "nested deeper"),
        ("a: [1", "not valid YAML"),
        ("? [a]\n: 1\n", "key must be a plain text"),
        ("x" * 300_000, "at most"),
        ("", "is a mapping"),
        ("7", "is a mapping"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: 2001-99-99\n", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("a: !!bool foo\n", "not valid YAML"),
        ("a: !!timestamp foo\n", "not valid YAML"),
        ("a: !!binary /w==\n", "a bytes means nothing here"),
        ("name: 2001-01-01\n", "put it in quotes"),
        ("1: a\n", "is not a text"),
        ('"\\ud800": a\n', "is not"),
        ("seed: 1" + "0" * 30 + "\n", "number too large"),
        ("experts: []\nbase_model: x\ngate_mode: hidden\n", "mixture of experts"),
        ("genome: {}\ntasks: []\n", "evolutionary"),
    ],
)
def test_hostile_and_foreign_texts_are_refused_in_words(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.from_text(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(Recipe.model_fields)), JSON)
def test_whatever_stands_at_a_key_is_read_or_refused(key: str, value: Any) -> None:
    try:
        recipe = Recipe.from_data({**GOOD, key: value})
    except RecipeError:
        return
    assert Recipe.from_data(recipe.to_data()) == recipe


def test_model_references() -> None:
    whole = ModelRef.model_validate("org/m@refs/pr/1+org/a@v1")
    assert (whole.path, whole.revision) == ("org/m", "refs/pr/1")
    assert (whole.adapter, whole.adapter_revision) == ("org/a", "v1")
    as_dict = {"model": {"path": "org/m", "revision": "v2"}, "lora": "org/a"}
    assert str(ModelRef.model_validate(as_dict)) == "org/m@v2+org/a"
    for odd in ("/x/pl+us", "/x/a@t"):
        for form in (
            {"path": odd},
            {"model": {"path": odd, "revision": "v1"}, "lora": "org/a@v2"},
            {"model": "m", "lora": {"path": odd}},
        ):
            ref = ModelRef.model_validate(form)
            assert odd in (ref.path, ref.adapter) and ModelRef.model_validate(ref.model_dump()) == ref
    for twice in ("org/m+", {"model": "m+a", "lora": "b"}, {"model": "m", "lora": "a+b"}):
        with pytest.raises(RecipeError, match=r"names no model|one adapter|adapter of its own"):
            Recipe.from_data({**GOOD, "base_model": twice})
    with pytest.raises(RecipeError, match="a model is a text"):
        Recipe.from_data({**GOOD, "base_model": {"path": "x", "revison": "main"}})


@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("KB", 10**3), ("MiB", 2**20), ("gb", 10**9), (" GiB", 2**30)]))
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{number}{unit[0]}") == number * unit[1]


def test_a_key_without_a_value_is_not_given() -> None:
    nothing = dict.fromkeys(
        ("tokenizer_source", "tokenizer", "chat_template", "slices", "modules", "out_dtype", "name")
    )
    assert Recipe.from_data({**nothing, **GOOD}) == Recipe.from_data(GOOD)
