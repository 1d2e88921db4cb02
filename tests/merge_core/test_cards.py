"""Model cards: what the parents' say is taken over where they agree, told where they do not, and hurts nobody."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from merge_core.artifact import Artifact
from merge_core.cards import MAX_CARD_BYTES, Card, front_matter, read_card
from merge_core.merge import merge
from merge_core.model_card import MERGEKIT_METHODS, Parent, common_license, is_for_mergekit
from merge_core.recipe import Recipe
from merge_core.snapshots import Roots
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint
from tests.merge_core.test_adapters import write_adapter
from tests.oracle import RECIPES
from tests.snapshots import COMMIT, FolderLibrary

TIES = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [{"model": "org/m0"}, {"model": "mine"}],
    "parameters": {"weight": 1, "density": 0.5},
}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """`org/base` and its fine-tunes `org/m0` and `mine`, without cards."""
    for seed, name in enumerate(["org/base", "org/m0", "mine"]):
        write_checkpoint(tmp_path / "family" / name, mixed_tensors(seed), config=CONFIG)
    return tmp_path / "family"


def write_card(folder: Path, front: str, body: str = "# A model\n") -> None:
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n{body}")


def merged(family: Path, out: Path, recipe: dict[str, Any] = TIES, **keys: Any) -> tuple[Artifact, str, dict[str, Any]]:
    """The artifact, its card, and the card's front matter as the Hub's own client reads it."""
    artifact = merge(Recipe.from_data({**recipe, **keys}), out, roots=[family])
    text = (out / "README.md").read_text()
    card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    front = card.data.to_dict()
    assert front == yaml.safe_load(text.split("---\n")[1])
    for parent in front.get("base_model", []):
        validate_repo_id(parent)
    return artifact, text, front


def test_the_card_tells_the_hub_whose_child_it_is(family: Path, tmp_path: Path) -> None:
    fronts = {
        "org/base": "license: apache-2.0\nlanguage: en\npipeline_tag: text-generation\nlibrary_name: transformers",
        "org/m0": "license: apache-2.0\nlanguage: [ja, no, en]\ntags: [chat]",
        "mine": "license: [apache-2.0]\npipeline_tag: text-generation\nlicense_link: LICENSE",
    }
    for name, front in fronts.items():
        write_card(family / name, front)
    artifact, text, front = merged(family, tmp_path / "out")
    assert front == {
        "base_model": ["org/base", "org/m0"],
        "base_model_relation": "merge",
        "license": "apache-2.0",
        "language": ["en", "ja", "no"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "weightsmith", "ties"],
    }
    assert "merge_method: ties" in text and "`mine`" in text and "say: apache-2.0." in text
    told = {file.path: file.sha256 for file in artifact.files if file.path not in ("README.md", "merge.lock.json")}
    assert told and all(f"`{path}`" in text and f"`{sha256}`" in text for path, sha256 in told.items())


def test_no_license_is_said_where_parents_differ_and_the_card_says_who_has_which(family: Path, tmp_path: Path) -> None:
    write_card(family / "org/base", "license: mit")
    write_card(family / "org/m0", "license: other\nlicense_name: my-own\nlicense_link: https://example.com/L")
    _, text, front = merged(family, tmp_path / "out")
    assert "license" not in front and "license_name" not in front
    assert "- `org/base`: mit\n- `org/m0`: other (my-own, https://example.com/L)\n- `mine`: none is said" in text
    assert "choose one that all of them allow" in text
    write_card(family / "mine", "license: mit")
    (family / "org/m0/README.md").unlink()
    _, text, front = merged(family, tmp_path / "again")
    assert "license" not in front and "- `org/m0`: none is said" in text
    for name in ("org/base", "mine"):
        (family / name / "README.md").unlink()
    _, text, front = merged(family, tmp_path / "none")
    assert "license" not in front and "Find out which they have before you publish this." in text


@given(st.lists(st.sampled_from(["mit", "apache-2.0", "", None]), min_size=1, max_size=5))
def test_a_license_is_taken_over_only_if_every_parent_says_it(said: list[str | None]) -> None:
    def parent(i: int, name: str | None) -> Parent:
        card = None if name is None else Card(0, "", front_matter(f"---\nlicense: {name}\n---\n".encode()))
        return Parent(str(i), str(i), True, None, None, card)

    found = common_license([parent(i, name) for i, name in enumerate(said)])
    assert (found is not None) == (len(set(said)) == 1 and bool(said[0]))
    assert found is None or found.front() == {"license": said[0]}


def test_revisions_are_told_as_commits_and_named_without_them(models: Path, tmp_path: Path) -> None:
    for name in ("base", "m1"):
        write_card(models / name, "license: mit")
    recipe = {**TIES, "base_model": "org/base", "models": [{"model": "m0"}, {"model": "org/m1@v2"}]}
    roots = Roots([models], FolderLibrary(models, tmp_path / "snapshots"))
    merge(Recipe.from_data(recipe), tmp_path / "out", roots=roots)
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(text.encode())["base_model"] == ["org/base", "org/m1"]
    assert f"- `org/base` (base), commit `{COMMIT}`\n" in text
    assert f"- `org/m1@v2`, commit `{COMMIT}`\n" in text and "- `m0`\n" in text
    assert "- `org/m1@v2`: mit" in text and "- `m0`: none is said" in text


def test_an_adapter_is_a_parent_and_may_be_the_child(family: Path, tmp_path: Path) -> None:
    write_card(family / "org/base", "license: mit\nlibrary_name: transformers")
    q_proj = mixed_tensors(0)["model.layers.0.self_attn.q_proj.weight"].float()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    tensors = {f"{prefix}_A.weight": q_proj[:4], f"{prefix}_B.weight": q_proj[:, :4].contiguous()}
    for name in ("org/lora", "org/lora2"):
        write_adapter(family / name, tensors, base_model_name_or_path="org/base")
        write_card(family / name, "license: cc-by-nc-4.0\nlibrary_name: peft")
    plain = {"merge_method": "passthrough", "models": [{"model": "org/base+org/lora"}]}
    artifact, text, front = merged(family, tmp_path / "on", plain)
    assert front["base_model"] == ["org/base", "org/lora"] and "license" not in front
    assert front["library_name"] == "transformers" and "- `org/lora`: cc-by-nc-4.0" in text
    (source,) = json.loads((artifact.folder / "merge.lock.json").read_text())["sources"]
    assert [card["path"] for card in source["cards"]] == ["README.md", "adapter/README.md"]
    summed = {"merge_method": "linear", "models": [{"model": "org/lora"}, {"model": "org/lora2"}]}
    _, _, front = merged(family, tmp_path / "sum", summed, parameters={"weight": 1})
    assert (front["base_model"], front["base_model_relation"]) == (["org/base"], "adapter")
    assert front["library_name"] == "peft" and front["license"] == "cc-by-nc-4.0"
    _, _, front = merged(family, tmp_path / "delta", outputs={"kind": "adapter", "rank": 2})
    assert (front["base_model"], front["base_model_relation"]) == (["org/base"], "adapter")


def test_cards_change_the_card_and_what_the_lock_says_of_it_and_nothing_else(family: Path, tmp_path: Path) -> None:
    write_card(family / "mine", "license: mit")
    one, _, _ = merged(family, tmp_path / "one")
    two, _, _ = merged(family, tmp_path / "two")
    assert one.files == two.files, "the same bytes, always"
    write_card(family / "mine", "license: apache-2.0")
    three, _, _ = merged(family, tmp_path / "three")
    changed = {old.path for old, new in zip(one.files, three.files, strict=True) if old != new}
    assert changed == {"README.md", "merge.lock.json"} and one.tensors == three.tensors
    locks = [json.loads((folder / "merge.lock.json").read_text()) for folder in (tmp_path / "one", tmp_path / "three")]
    raw = (family / "mine/README.md").read_bytes()
    assert locks[1]["sources"][2]["cards"] == [
        {"path": "README.md", "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    ]
    assert [source["files"] for source in locks[0]["sources"]] == [source["files"] for source in locks[1]["sources"]]
    assert "# A model" not in (tmp_path / "three/README.md").read_text()


HOSTILE = {
    "an alias bomb": "---\na: &a [x]\nb: &b [*a, *a]\nlicense: mit\n---\n",
    "a tag": "---\nlicense: !!python/object/apply:os.system [echo]\n---\n",
    "twice": "---\nlicense: mit\nlicense: apache-2.0\n---\n",
    "no end": "---\nlicense: mit\n",
    "deep": f"---\nlicense: {'[' * 5000}\n---\n",
    "a list": "---\n- license: mit\n---\n",
    "two documents": "---\na: 1\n...\nlicense: mit\n---\n",
    "markup": "---\nlicense: \"mit`\\n- `evil\"\nlanguage: ['a b', {a: 1}, 3, '<b>']\npipeline_tag: [x]\n---\n",
    "types": "---\nlicense: {a: 1}\nlanguage: 3\npipeline_tag: 2020-01-01\nlibrary_name: true\n---\n",
    "long": f"---\nlicense: {'x' * 1000}\nlanguage: {'y' * 1000}\n---\n",
    "nothing": "",
    "empty": "---\n---\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_card_that_is_hostile_says_nothing(family: Path, tmp_path: Path, text: str) -> None:
    for name in ("org/base", "org/m0", "mine"):
        (family / name / "README.md").write_text(text)
    _, card, front = merged(family, tmp_path / "out")
    assert front.keys() == {"base_model", "base_model_relation", "library_name", "tags"}
    assert front["library_name"] == "transformers" and "evil" not in card and "Find out which" in card


def test_what_is_no_card_is_left_alone(family: Path, tmp_path: Path) -> None:
    """A card too large, a pipe, a link out of the roots, a folder: as if there were none, and at once."""
    secret = tmp_path / "secret"
    secret.write_text("---\nlicense: secret\n---\n")
    (family / "org/base/README.md").write_bytes(b"---\nlicense: mit\n---\n" + b"x" * MAX_CARD_BYTES)
    os.mkfifo(family / "org/m0/README.md")
    (family / "mine/README.md").symlink_to(secret)
    _, text, front = merged(family, tmp_path / "out")
    assert "license" not in front and "secret" not in text and "Find out which" in text
    assert read_card(family, [family]) is None and read_card(family / "nothing.md", None) is None
    outside = read_card(family / "mine/README.md", None)
    assert outside is not None and outside.license is not None, "without roots a link may lead anywhere"


def test_a_card_may_be_written_on_windows_and_have_odd_keys() -> None:
    assert front_matter(b"---\n1: x\nnull: y\nlicense: mit\n---\n") == {"license": "mit"}
    assert front_matter(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# x\r\n") == {"license": "mit"}


ALSO_MERGEKIT: list[dict[str, Any]] = [
    {},
    {"seed": 7, "limits": {"memory": "1GB"}, "outputs": {"max_shard_size": "1GB"}, "name": "x"},
    {"scope": "tensor"},
    {"dtype": "float32", "out_dtype": "bfloat16", "tokenizer": {"source": "union"}},
]
NOT_MERGEKIT: list[dict[str, Any]] = [
    {"scope": "model"},
    {"semantics": "paper", "parameters": {"density": 0.5}},
    {"exclude": ["norm"]},
    {"dtype": "float64"},
    {"alignment": {"to": "base"}},
    {"patches": [{"patch": "p"}]},
    {"outputs": "delta"},
    {"tokenizer": {"source": "base", "keep_padding": True}},
    {"merge_method": "magmax", "parameters": {}},
    {"merge_method": "transfer", "models": [{"model": "a", "base_model": "b"}], "parameters": {}},
]


def test_the_mergekit_tag_is_for_recipes_that_mean_the_same_there() -> None:
    for keys in ALSO_MERGEKIT:
        assert is_for_mergekit(Recipe.from_data(TIES | keys)), keys
    for keys in NOT_MERGEKIT:
        assert not is_for_mergekit(Recipe.from_data(TIES | keys)), keys
    stage = {**TIES, "name": "stage"}
    last = {"merge_method": "linear", "models": [{"model": "stage"}, {"model": "x"}], "parameters": {"weight": 1}}
    assert is_for_mergekit(Recipe.from_data([stage, last]))
    assert not is_for_mergekit(Recipe.from_data([stage | {"exclude": ["norm"]}, last]))


def test_the_methods_of_mergekit_are_those_that_it_was_compared_by() -> None:
    trials = yaml.safe_load(RECIPES.read_text())["trials"]
    documents = [each for trial in trials for each in trial.get("documents", [trial.get("recipe")])]
    assert {document["merge_method"] for document in documents} == MERGEKIT_METHODS
