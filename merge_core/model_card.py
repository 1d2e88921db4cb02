"""The card of what a merge made, in the Hub's conventions: whose child it is, under which license, how to verify it.

The same recipe on the same models gives the same card: it tells of no time and no machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from merge_core import __version__
from merge_core.aligned import PAPER
from merge_core.cards import CARD_NAME, Card, License, read_card
from merge_core.checkpoint import Checkpoint
from merge_core.files import WrittenFile
from merge_core.plan import Plan
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.snapshots import origin_of
from merge_core.weights import Weights

LOCK_NAME = "merge.lock.json"
_MERGEKIT_NAMES = """
    arcee_fusion breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear karcher linear model_stock
    multislerp nearswap nuslerp passthrough ram ramplus_tl sce slerp task_arithmetic ties
"""
MERGEKIT_METHODS = frozenset(_MERGEKIT_NAMES.split())
"""The methods that mergekit 0.1.5 has, by the names that it has for them."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Parent:
    """What a merge descends from: a model, an adapter or a patch. `name` is as the recipe writes it, `path` without the
    revision.

    `hub_id` and `commit` are None where it is no repository; a folder that is called as one, `org/name`, counts as a
    copy of it.
    """

    name: str
    path: str
    is_model: bool
    hub_id: str | None
    commit: str | None
    card: Card | None


def parents_of(recipe: Recipe, leaves: Mapping[ModelRef, Weights]) -> list[Parent]:
    """All that the weights of a merge descend from, in the recipe's order; numbers that a method takes are not among
    it. `leaves`: what the recipe and its stages name, opened.
    """
    found: dict[str, Parent] = {}
    for ref, weights in leaves.items():
        role = recipe.role_of(ref)
        if role.startswith("statistics"):
            continue
        cards = dict(weights.cards)
        if role.startswith("patch") and isinstance(weights, Checkpoint):
            beside = read_card(weights.path.parent / CARD_NAME, weights.roots)
            cards = {} if beside is None else {CARD_NAME: beside}
        own = cards.pop(CARD_NAME, None)
        parts = [(ref.path, ref.revision, own, not role.startswith("patch"))]
        if ref.adapter is not None:
            parts.append((ref.adapter, ref.adapter_revision, next(iter(cards.values()), None), False))
        for path, revision, card, is_model in parts:
            name = f"{path}@{revision}" if revision else path
            origin = origin_of(path, revision, weights.origins)
            hub_id = origin.repo if origin is not None else path if _HUB_ID.fullmatch(path) else None
            commit = None if origin is None else origin.commit
            found.setdefault(name, Parent(name, path, is_model, hub_id, commit, card))
    return list(found.values())


def model_card(
    plan: Plan,
    parents: Sequence[Parent],
    warnings: Sequence[str] = (),
    files: Sequence[WrittenFile] = (),
    *,
    is_made: bool = True,
) -> str:
    """The README of what a plan makes. `files`: all others but the lock, which come to a table of their sha256;
    `is_made`: it is not one whose weights are computed as they are read.
    """
    method = plan.recipe.method
    title = plan.recipe.name or f"{plan.recipe.merge_method} merge"
    made = f"Merged with Weightsmith {__version__} by [{method.title}]({method.paper})."
    if plan.alignment is not None:
        aligned = f"[weight matching]({PAPER})"
        made += f" Before that the neurons were brought into one order by {aligned}: `{plan.alignment.file}`."
    front = yaml.safe_dump(front_of(plan, parents), sort_keys=False, allow_unicode=True)
    paragraphs = [
        f"---\n{front}---",
        f"# {' '.join(title.split())}",
        made,
        *_usage(plan),
        "## Models\n\n" + "\n".join(_models(plan, parents)),
        f"## License\n\n{_licenses(parents)}",
        f"## Recipe\n\n```yaml\n{plan.recipe.to_yaml(with_place=False)}```",
    ]
    if notes := [*plan.left_out, *warnings]:
        paragraphs.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes))
    if plan.recipe.outputs.reversible:
        paragraphs.append("`weightsmith patch remove` takes the patches off again, to the same bytes as without them.")
    if is_made:
        paragraphs.append(f"## Verifying\n\n{_verifying()}")
    else:
        paragraphs.append("The weights are computed as they are read; run, the same recipe gives the same bytes.")
    if files:
        rows = [f"| `{file.path}` | {file.size:,} | `{file.sha256}` |" for file in files]
        paragraphs.append("What `sha256sum` gives of each file:")
        paragraphs.append("\n".join(["| file | bytes | sha256 |", "| --- | ---: | --- |", *rows]))
    return "\n\n".join(paragraphs) + "\n"


def front_of(plan: Plan, parents: Sequence[Parent]) -> dict[str, Any]:
    """The keys at the top of the card, as the Hub knows them."""
    front: dict[str, Any] = {}
    if named := _base_models(plan, parents):
        front["base_model"] = named
        front["base_model_relation"] = "adapter" if plan.is_adapter else "merge"
    common = common_license(parents)
    front |= common.front() if common is not None else {}
    if languages := _once(language for parent in parents if parent.card for language in parent.card.languages):
        front["language"] = languages
    models = [parent.card for parent in parents if parent.card and parent.is_model]
    for key in ("pipeline_tag", "library_name"):
        said = _once(value for card in models if (value := card.plain(key)))
        front |= {key: said[0]} if len(said) == 1 else {}
    front["library_name"] = "peft" if plan.is_adapter else front.pop("library_name", "transformers")
    others = ["mergekit"] if is_for_mergekit(plan.recipe) else []
    front["tags"] = _once(["merge", *others, "weightsmith", plan.recipe.merge_method])
    return front


def _base_models(plan: Plan, parents: Sequence[Parent]) -> list[str]:
    """The parents that the Hub knows, or the model that an adapter is for."""
    if plan.adapter_config is not None:
        base = str(plan.adapter_config.get("base_model_name_or_path"))
        return [base] if _HUB_ID.fullmatch(base) else []
    base_model = plan.recipe.base_model
    of = {base_model.path} if plan.is_adapter and base_model is not None else None
    return _once(parent.hub_id for parent in parents if parent.hub_id and (of is None or parent.path in of))


def common_license(parents: Sequence[Parent]) -> License | None:
    """The license that all parents' cards say; None where one says none or another."""
    said = {parent.card.license if parent.card else None for parent in parents}
    return said.pop() if len(said) == 1 else None


def is_for_mergekit(recipe: Recipe) -> bool:
    """Whether mergekit reads the recipe, and with the same meaning: it reads past every key of ours."""
    return all(map(_is_plain, (recipe, *recipe.stages)))


def _is_plain(recipe: Recipe) -> bool:
    changed = (recipe.statistics, recipe.alignment, recipe.exclude, recipe.patches, recipe.outputs.meaning)
    taken = [each for _, each in recipe.taken_models()]
    return (
        recipe.merge_method in MERGEKIT_METHODS
        and recipe.method.semantics == "mergekit"
        and recipe.scope in (None, "tensor")
        and "float64" not in (recipe.dtype, recipe.out_dtype)
        and not any(changed)
        and not any(each.base_model or each.statistics for each in taken)
        and not (recipe.tokenizer is not None and recipe.tokenizer.keep_padding)
    )


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _usage(plan: Plan) -> list[str]:
    """What to do with what is no model by itself."""
    if plan.difference is None:
        return []
    base = f"`{plan.recipe.base_model}`"
    if plan.difference.kind == "adapter":
        return [f"This is no model but a LoRA adapter for {base}, which PEFT loads."]
    return [
        f"This is no model but what differs from {base}, stored as {plan.difference.encoding}: write `base+delta` "
        "where a recipe names a model, with the place of the base before the sign and of this folder behind it."
    ]


def _models(plan: Plan, parents: Sequence[Parent]) -> Iterator[str]:
    """A line for everything that was read, with the commits that revisions stood for."""
    commits = {parent.name: parent.commit for parent in parents if parent.commit}
    for model in plan.leaves:
        role = plan.recipe.role_of(model)
        names = [f"{path}@{revision}" if revision else path for path, revision in _parts(model)]
        at = [f"`{commits[name]}`" for name in names if name in commits]
        yield f"- `{model}`{role and f' ({role})'}" + (f", commit {' and '.join(at)}" if at else "")


def _parts(model: ModelRef) -> Iterator[tuple[str, str | None]]:
    yield model.path, model.revision
    if model.adapter is not None:
        yield model.adapter, model.adapter_revision


def _licenses(parents: Sequence[Parent]) -> str:
    if (common := common_license(parents)) is not None:
        return f"All models that it is made of say: {common}."
    said = {parent.name: parent.card.license if parent.card else None for parent in parents}
    if not any(said.values()):
        return "None of the models says its license in a card. Find out which they have before you publish this."
    lines = [f"- `{name}`: {'none is said' if each is None else each}" for name, each in said.items()]
    return "The models say:\n\n" + "\n".join(lines) + "\n\nSo none is said here: choose one that all of them allow."


def _verifying() -> str:
    return (
        f"`{LOCK_NAME}` holds the sha256 of every file that was read and written and of every tensor; the same recipe "
        "on the same models gives the same bytes, and `weightsmith verify` makes them again to see."
    )
