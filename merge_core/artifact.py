"""The result beside the weights: lock, model card, recipe, config and tokenizer files.

`merge.lock.json` says all that is needed to make the same bytes again and to prove that they are: recipe, seed,
versions, sha256 of every file that was read and written, a digest per tensor.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from merge_core import __version__
from merge_core.adapters import CONFIG_NAME as ADAPTER_CONFIG_NAME
from merge_core.aligned import PAPER
from merge_core.files import WrittenFile, write_small, write_text
from merge_core.merged import leaves
from merge_core.plan import Plan
from merge_core.references import ModelRef
from merge_core.snapshots import Snapshot
from merge_core.weights import Companions, Weights

LOCK_NAME = "merge.lock.json"
CARD_NAME = "README.md"
RECIPE_NAME = "mergekit_config.yml"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


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
    files = [*weights, *(_place(file, folder / name) for name, file in small_files(plan, checkpoints).items())]
    files.append(write_text(folder / RECIPE_NAME, plan.recipe.to_yaml(with_place=False)))
    files.append(write_text(folder / CARD_NAME, model_card(plan, warnings)))
    lock = {
        **made_here(),
        "exact_on": plan.exact_on,
        "recipe": plan.recipe.canonical(),
        "seed": plan.recipe.seed,
        "plan": plan.digest,
        "sources": [
            source_entry(model, weights, sources, plan.companions)
            for model, weights in (leaves(plan.models, checkpoints) | dict(beside)).items()
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


def model_card(plan: Plan, warnings: Sequence[str] = ()) -> str:
    """The README of the merged model, in the Hub's conventions."""
    method = plan.recipe.method
    roles = {model: plan.recipe.role_of(model) for model in plan.leaves}
    parts = [
        f"{path}@{revision}" if revision else path
        for model, role in roles.items()
        for path, revision in ((model.path, model.revision), (model.adapter, model.adapter_revision))
        if path and not role.startswith(("statistics", "patch"))
    ]
    named = [part for part in dict.fromkeys(parts) if _HUB_ID.fullmatch(part)]
    front: dict[str, Any] = {"library_name": "peft" if plan.is_adapter else "transformers"}
    front["tags"] = ["merge", "weightsmith", plan.recipe.merge_method]
    if named:
        front = {"base_model": named, "base_model_relation": "adapter" if plan.is_adapter else "merge"} | front
    title = plan.recipe.name or f"{plan.recipe.merge_method} merge"
    made = f"Merged with Weightsmith {__version__} by [{method.title}]({method.paper})."
    if plan.alignment is not None:
        aligned = f"[weight matching]({PAPER})"
        made += f" Before that the neurons were brought into one order by {aligned}: `{plan.alignment.file}`."
    paragraphs = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {' '.join(title.split())}",
        made,
        *_usage(plan),
        "## Models\n\n" + "\n".join(f"- `{model}`{role and f' ({role})'}" for model, role in roles.items()),
        f"## Recipe\n\n```yaml\n{plan.recipe.to_yaml(with_place=False)}```",
    ]
    if notes := [*plan.left_out, *warnings]:
        paragraphs.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes))
    if plan.recipe.outputs.reversible:
        paragraphs.append("`weightsmith patch remove` takes the patches off again, to the same bytes as without them.")
    paragraphs.append(
        f"`{LOCK_NAME}` holds the sha256 of every file that was read and written and of every tensor; the same recipe "
        "on the same models gives the same bytes."
    )
    return "\n\n".join(paragraphs) + "\n"


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
    commits = {"commit": _commit(model.path, model.revision, weights.origins)}
    if model.adapter is not None:
        commits["adapter_commit"] = _commit(model.adapter, model.adapter_revision, weights.origins)
    return {"model": str(model), **commits, "files": files}


def _commit(path: str, revision: str | None, origins: Sequence[Snapshot]) -> str | None:
    """The commit of the repository that a name means; None where it means a local folder."""
    return next((origin.commit for origin in origins if origin.answers(path, revision)), None)


def _place(source: Path | bytes, target: Path) -> WrittenFile:
    if isinstance(source, bytes):
        return write_small(target, source)
    shutil.copyfile(source, target)
    data = target.read_bytes()
    return WrittenFile(target.name, len(data), hashlib.sha256(data).hexdigest())
