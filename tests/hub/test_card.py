"""What the cards of a Hub's models say comes to stand on the merge's card."""

from __future__ import annotations

from pathlib import Path

from merge_core.cards import MAX_CARD_BYTES, front_matter
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint
from tests.hub import running_hub
from tests.hub.test_in import Service


def test_a_merge_of_hub_models_inherits_what_their_cards_say(tmp_path: Path) -> None:
    front = b"---\nlicense: mit\nlanguage: de\npipeline_tag: text-generation\n---\n"
    cards = {"base": front, "m0": front + b"# M0", "m1": front + b"x" * MAX_CARD_BYTES}
    recipe = {"merge_method": "task_arithmetic", "base_model": "org/base", "parameters": {"weight": 1}}
    with running_hub(tmp_path / "hub") as hub:
        for seed, (name, card) in enumerate(cards.items()):
            folder = write_checkpoint(tmp_path / name, mixed_tensors(seed), config=CONFIG)
            (folder / "README.md").write_bytes(card)
            hub.put(f"org/{name}", folder)
        service = Service(hub, tmp_path / "data")

        def card_of(*models: str) -> str:
            document = Recipe.from_data({**recipe, "models": [{"model": model} for model in models]})
            merge(document, tmp_path / "-".join(models).replace("/", "-"), roots=service.roots())
            return (tmp_path / "-".join(models).replace("/", "-") / "README.md").read_text()

        text = card_of("org/m0@main")
        found = front_matter(text.encode())
        assert found["base_model"] == ["org/base", "org/m0"] and found["license"] == "mit"
        assert found["language"] == ["de"] and found["pipeline_tag"] == "text-generation"
        assert all(f"`{hub.repos[f'org/{name}'].resolve('main')}`" in text for name in ("base", "m0"))
        too_large = card_of("org/m1")
        assert "license" not in front_matter(too_large.encode()) and "- `org/m1`: none is said" in too_large
