"""What scores the candidates of searches: one module for each kind. `evaluator_of` opens the one that a search names.

Whether a service has an evaluator, and may be asked to use it, is found out before a search is accepted
(`check_evaluator`). What needs torch or transformers is imported when it is opened, in a worker's child.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.documents import canonical_json, suggestion
from merge_core.errors import CheckpointError, Problem, RecipeError
from workers.evaluators.data import Shelves, is_parquet, no_rows
from workers.outbound import ForbiddenAddress, Guard
from workers.signing import NoSigningKey, Signer

if TYPE_CHECKING:
    from merge_core.search.document import Search
    from merge_core.search.trials import Evaluator
    from workers.jobs import JobStore, Lease
    from workers.settings import Settings

HERE = "#/search/evaluator"


@dataclass(frozen=True)
class Around:
    """What an evaluator may need of the service; `lease` names the search, whether this worker leads it or not."""

    settings: Settings
    store: JobStore
    lease: Lease
    document: Search
    roots: Sequence[Path]


def evaluator_of(around: Around) -> Evaluator:
    """The evaluator that a search names. Raises `RecipeError` if the service does not have it any more."""
    keys = around.document.keys.evaluator
    shelves = Shelves(around.store, around.lease.owner, around.roots)
    check_evaluator(around.document, shelves)
    if keys.http is not None:
        from workers.evaluators.http import HttpEvaluator

        return HttpEvaluator(around, keys.http)
    if keys.command is not None:
        from workers.evaluators.command import CommandEvaluator

        return CommandEvaluator(around.settings.evaluator_commands[keys.command.name], keys.command)
    from workers.evaluators import models

    if keys.perplexity is not None:
        return models.Perplexity(around, keys.perplexity)
    if keys.multiple_choice is not None:
        return models.MultipleChoice(around, keys.multiple_choice)
    if keys.classification is not None:
        return models.Classification(around, keys.classification)
    return models.Harness(around, keys.lm_eval)


def check_evaluator(document: Search, shelves: Shelves) -> None:
    """Raise `RecipeError` for an evaluator that a search may not ask for here."""
    keys, settings = document.keys.evaluator, shelves.store.settings
    if keys.http is not None:
        try:
            Guard(settings.evaluator_allow).check(keys.http.url)
            Signer(settings)
        except (ForbiddenAddress, NoSigningKey) as error:
            raise _refused(document, str(error), "http/url") from None
        if settings.public_url is None:
            detail = "an evaluator has to be told where this service is; who runs it sets WEIGHTSMITH_PUBLIC_URL"
            raise _refused(document, detail, "http")
    elif keys.command is not None:
        if keys.command.name not in settings.evaluator_commands:
            names = sorted(settings.evaluator_commands)
            there = f"it has {', '.join(names)}" if names else "it has none"
            what = f"this service has no command {keys.command.name[:60]!r}{suggestion(keys.command.name, names)}"
            how = "who runs it sets WEIGHTSMITH_EVALUATOR_COMMANDS"
            raise _refused(document, f"{what} ({there}; {how})", "command/name")
    else:
        _check_own(document, shelves)


def _check_own(document: Search, shelves: Shelves) -> None:
    """Whether there is what our own evaluators need: packages, and the file of data."""
    keys = document.keys.evaluator
    needed = ["transformers"] if keys.lm_eval is None else ["lm_eval", "accelerate"]
    data = keys.perplexity or keys.multiple_choice or keys.classification
    if data is not None and is_parquet(data.file):
        needed.append("pyarrow")
    if keys.classification is not None and keys.classification.image is not None:
        needed.append("PIL")
    for name in needed:
        if find_spec(name) is None:
            package = "'weightsmith[eval]'" if keys.lm_eval is None else "'lm_eval[hf]'"
            raise _refused(document, f"{keys.kind} needs a package: pip install {package}", keys.kind)
    if data is None:
        return
    if keys.perplexity is None and (why := no_rows(data.file)):
        raise _refused(document, why, f"{keys.kind}/file")
    try:
        shelves.look(data.file)
    except CheckpointError as error:
        pointer = document.located(Problem("", f"{HERE}/{keys.kind}/file")).pointer or "#"
        raise error.as_written(shelves.roots, pointer) from None


def _refused(document: Search, detail: str, place: str) -> RecipeError:
    error = RecipeError.of([document.located(Problem(detail, f"{HERE}/{place}"))])
    assert isinstance(error, RecipeError)
    return error


def digest_of(kind: str, **told: Any) -> str:
    """A digest of what an evaluator measures."""
    return hashlib.sha256(canonical_json([kind, told]).encode()).hexdigest()
