"""Recipes as people have published them: read leniently, and told what was ignored.

mergekit reads past every key it does not know, so many published recipes hold keys without effect. Here they are taken
out, each with a note of what mergekit does with it; what is left is a recipe that `Recipe` reads strictly. A recipe may
also stand in a model card, in a fenced block.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_core.documents import load_documents
from merge_core.errors import Problem, RecipeError
from merge_core.recipe import Recipe

MAX_CARD_BYTES = 2 * 2**20
_FENCE = re.compile(r"( *)(`{3,}|~{3,})\s*(\w*)")
_RECIPE_KEYS = {"merge_method", "experts", "genome", "layer_slices"}
_NO_EFFECT = {
    "residual_weight": "mergekit reads it and does nothing with it",
    "embed_slerp": "an old key, which mergekit reads past",
    "input_model_parameters": "an old key, which mergekit reads past; parameters stand beside their model",
}
_BESIDE = "mergekit reads past it here; a parameter stands under `parameters`"
_PAST = "mergekit reads past it, so it has no effect"


@dataclass(frozen=True)
class Ignored:
    """A key without effect: its JSON pointer in what was published, and what mergekit does with it."""

    pointer: str
    what: str


@dataclass(frozen=True)
class Published:
    """A published recipe: what it means, strictly written, and what of it was ignored."""

    recipe: Recipe
    ignored: tuple[Ignored, ...]
    found_in: str


def read_published(text: str | bytes) -> Published:
    """Read a recipe, or the one in a model card. Raises `RecipeError`."""
    if len(text) > MAX_CARD_BYTES:
        raise RecipeError(f"this has {len(text):,} bytes; at most {MAX_CARD_BYTES:,} are read")
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig", errors="replace")
    documents, found_in = _documents(text)
    lenient = Recipe.from_data(_one_or_many([_lenient(document) for document in documents]))
    ignored = [*_names(documents), *(_ignored(problem, lenient) for problem in lenient.ignored)]
    strict = copy.deepcopy(documents)
    for each in ignored:
        _remove(strict, each.pointer)
    return Published(Recipe.from_data(_one_or_many(strict)), tuple(ignored), found_in)


def _documents(text: str) -> tuple[list[dict[str, Any]], str]:
    """The recipe's documents as plain data, and where they stood."""
    in_blocks = []
    for language, block in _fenced(text):
        try:
            loaded = load_documents(block)
        except RecipeError:
            if language in ("yaml", "yml") and "merge_method" in block:
                raise
            continue
        in_blocks += [found for found in loaded if isinstance(found, Mapping) and _RECIPE_KEYS & found.keys()]
    if in_blocks:
        distinct = [found for i, found in enumerate(in_blocks) if found not in in_blocks[:i]]
        return [dict(found) for found in distinct], "model card"
    if "```" in text or "~~~" in text or (text.startswith("---") and re.search(r"^#+ ", text, re.M)):
        raise RecipeError("this looks like a model card, but no fenced block in it that ends holds a merge_method")
    loaded = load_documents(text)
    if not loaded or not all(isinstance(found, Mapping) for found in loaded):
        raise RecipeError("a recipe is a mapping with merge_method and models, slices or modules")
    return [dict(found) for found in loaded], "recipe"


def _fenced(text: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a Markdown text, in lists too: language and content."""
    fence, language, indent, lines = "", "", 0, list[str]()
    for line in text.splitlines():
        if not fence and (opening := _FENCE.match(line)):
            indent, fence, language, lines = len(opening[1]), opening[2], opening[3].lower(), []
        elif fence and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            yield language, "\n".join(lines)
            fence = ""
        elif fence:
            lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])


def _one_or_many(documents: Sequence[Mapping[str, Any]]) -> Any:
    return documents[0] if len(documents) == 1 else list(documents)


def _lenient(document: Mapping[str, Any]) -> dict[str, Any]:
    return {**document, "unknown_keys": "warn"}


def _names(documents: Sequence[Mapping[str, Any]]) -> list[Ignored]:
    """A lone document's name, which titles the card here; stages need theirs."""
    if len(documents) > 1 or "name" not in documents[0]:
        return []
    return [Ignored("#/name", "mergekit-yaml reads past it; only stages of mergekit-multi need names")]


def _ignored(problem: Problem, recipe: Recipe) -> Ignored:
    pointer = problem.pointer or "#"
    key = pointer.rpartition("/")[2]
    if key in _NO_EFFECT:
        return Ignored(pointer, _NO_EFFECT[key])
    if "/parameters/" in pointer:
        return Ignored(pointer, f"{recipe.merge_method} has no such parameter, and mergekit reads past it")
    known = {name for document in (*recipe.stages, recipe) for name in document.method.parameters()}
    return Ignored(pointer, _BESIDE if key in known else _PAST)


def _remove(documents: list[dict[str, Any]], pointer: str) -> None:
    path = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    holder: Any = documents[0] if len(documents) == 1 else documents
    for part in path[:-1]:
        holder = holder[int(part)] if isinstance(holder, list) else holder[part]
    del holder[path[-1]]
