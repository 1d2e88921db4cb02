"""The result beside the weights: lock, model card, recipe, config and tokenizer files.

`merge.lock.json` says all that is needed to make the same bytes again and to prove that they are: recipe, seed,
versions, sha256 of every file that was read and written, a digest per tensor.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from merge_core import __version__
from merge_core.adapters import CONFIG_NAME as ADAPTER_CONFIG_NAME
from merge_core.cards import CARD_NAME
from merge_core.files import WrittenFile, write_small, write_text
from merge_core.merged import leaves
from merge_core.model_card import LOCK_NAME as LOCK_NAME
from merge_core.model_card import model_card, parents_of
from merge_core.plan import Plan
from merge_core.references import ModelRef
from merge_core.snapshots import origin_of
from merge_core.weights import Companions, Weights

RECIPE_NAME = "mergekit_config.yml"


@dataclass(frozen=True)
class Artifact:
    """A finished merge: where it is, its files, the digest of every tensor, and what the user should know."""

    folder: Path
    files: tuple[WrittenFile, ...]
    tensors: Mapping[str, str]
    warnings: tuple[str, ...]
    resumed_tensors: int = 0


def write_companions(
    plan: Plan,
    checkpoints: Sequence[Weights],
    folder: Path,
    *,
    weights: Sequence[WrittenFile],
    tensors: Mapping[str, str],
    sources: Mapping[Path, str],
    warnings: Sequence[str],
    beside: Mapping[ModelRef, Weights],
) -> list[WrittenFile]:
    """Write everything beside the weights into `folder`; the lock, which names all other files, comes last."""
    files = [*weights, *(place_file(file, folder / name) for name, file in small_files(plan, checkpoints).items())]
    files.append(write_text(folder / RECIPE_NAME, plan.recipe.to_yaml(with_place=False)))
    read = leaves(plan.models, checkpoints) | dict(beside)
    parents = parents_of(plan.recipe, read)
    files.append(write_text(folder / CARD_NAME, model_card(plan, parents, warnings, files)))
    lock = {
        **made_here(),
        "exact_on": plan.exact_on,
        "recipe": plan.recipe.canonical(),
        "seed": plan.recipe.seed,
        "plan": plan.digest,
        "sources": [
            source_entry(model, weights, sources, plan.companions) | _cards(weights) for model, weights in read.items()
        ],
        "files": [asdict(file) for file in files],
        "tensors": {name: {"blake3": tensors[name]} for name in sorted(tensors)},
        "left_out": list(plan.left_out),
        "warnings": list(warnings),
    }
    files.append(write_text(folder / LOCK_NAME, json.dumps(lock, indent=2, ensure_ascii=False) + "\n"))
    return files


def small_files(plan: Plan, checkpoints: Sequence[Weights]) -> Companions:
    """Config and tokenizer files as the output needs them: what each holds, or where it lies."""
    donor, found = checkpoints[plan.donor], dict[str, Path | bytes]()
    if donor.config and not plan.is_adapter:
        found["config.json"] = f"{json.dumps(plan.edited_config(donor.config), indent=2)}\n".encode()
    if plan.adapter_config is not None:
        found[ADAPTER_CONFIG_NAME] = f"{json.dumps(plan.adapter_config, indent=2, ensure_ascii=False)}\n".encode()
    return found | dict(plan.companions)


def made_here() -> dict[str, Any]:
    """What a lock says of the program and the machine."""
    versions = {"weightsmith": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"version": 1, "made_with": versions, "machine": platform.machine()}


def read_artifact(folder: Path) -> Artifact:
    """A finished artifact from its lock, which is the only file of that kind."""
    (lock_file,) = folder.glob("*.lock.json")
    raw = lock_file.read_bytes()
    lock = json.loads(raw)
    files = [WrittenFile(**file) for file in lock["files"]]
    files.append(WrittenFile(lock_file.name, len(raw), hashlib.sha256(raw).hexdigest()))
    return Artifact(
        folder,
        tuple(files),
        {name: entry["blake3"] for name, entry in lock.get("tensors", {}).items()},
        tuple(lock["warnings"]),
    )


def source_entry(
    model: ModelRef, weights: Weights, sources: Mapping[Path, str], copied: Companions | None = None
) -> dict[str, Any]:
    """What a lock says of a model: every file that was read, `sources` being those that were hashed, or `copied`."""
    files = [
        {"path": file, "size": shard.size, "sha256": sources[shard.path]}
        for file, shard in weights.shards.items()
        if shard.path in sources
    ]
    small = dict(weights.settings)
    if paths := [file for file in (copied or {}).values() if isinstance(file, Path)]:
        small |= {name: file for name, file in weights.companions.items() if file in paths and isinstance(file, Path)}
    for name, path in small.items():
        data = path.read_bytes()
        files.append({"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    commits = {"commit": _commit(model.path, model.revision, weights)}
    if model.adapter is not None:
        commits["adapter_commit"] = _commit(model.adapter, model.adapter_revision, weights)
    return {"model": str(model), **commits, "files": files}


def _commit(path: str, revision: str | None, weights: Weights) -> str | None:
    """The commit of the repository that a name means; None where it means a local folder."""
    origin = origin_of(path, revision, weights.origins)
    return None if origin is None else origin.commit


def _cards(weights: Weights) -> dict[str, Any]:
    """What a lock says of the model cards that the output's card was made from; no tensor depends on them."""
    cards = [{"path": name, "size": card.size, "sha256": card.sha256} for name, card in weights.cards.items()]
    return {"cards": cards} if cards else {}


def place_file(source: Path | bytes, target: Path) -> WrittenFile:
    """Write a small file, or copy it."""
    if isinstance(source, bytes):
        return write_small(target, source)
    shutil.copyfile(source, target)
    return WrittenFile.of(target)
