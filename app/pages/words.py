"""What pages say of jobs in people's words. All of it is in every template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from app.words import iso_time, shown_bytes, shown_seconds, shown_time
from workers.jobs import JobKind, RecipeData

_MOST_NAMES = 3
_MODELS = ("models", "model", "job", "patch", "patches", "corrupted", "clean")
_KIND_WORDS: Mapping[JobKind, str] = {JobKind.VERIFICATION: "verify"}


def job_name(kind: str, document: RecipeData) -> str:
    """What a job makes of what, on one line: its method or operation, and the models."""
    made = output_of(document)
    if isinstance(inner := made.get("recipe"), dict | list):
        made = {**output_of(inner), **made}
    what = made.get("merge_method") or made.get("operation") or _KIND_WORDS.get(JobKind(kind), kind)
    names = list(dict.fromkeys(_names(made)))
    shown = ", ".join(names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        shown += f" and {len(names) - _MOST_NAMES} more"
    base = made.get("base_model")
    onto = f" on {_short(str(base))}" if isinstance(base, str) and names and _short(base) not in names else ""
    return f"{what}: {shown}{onto}" if shown else str(what)


def output_of(document: Any) -> dict[str, Any]:
    """Of several documents the one that is the output: it has no name, or is the last."""
    each = [one for one in (document if isinstance(document, list) else [document]) if isinstance(one, dict)]
    return next((one for one in reversed(each) if not one.get("name")), each[-1] if each else {})


def models_of(document: Any) -> list[str]:
    """The models of the output, as the document names them."""
    each = output_of(document).get("models") or []
    return [str(one.get("model", "")) if isinstance(one, dict) else str(one) for one in each]


def _names(made: Any) -> Iterator[str]:
    """The names of the models in a document, wherever they stand, in order."""
    for key, value in made.items():
        if key in ("slices", "modules", "sources"):
            for each in value.values() if isinstance(value, dict) else value:
                if isinstance(each, dict):
                    yield from _names(each.get("slice", each))
        elif key in _MODELS:
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict):
                    yield from _names(each)
                elif isinstance(each, str):
                    yield _short(each)


def _short(model: str) -> str:
    """A model's name without the folders before it."""
    return "+".join(part.rstrip("/").rpartition("/")[2] or part for part in model.split("+"))


FILTERS: Mapping[str, Callable[..., str]] = {
    "bytes": shown_bytes,
    "seconds": shown_seconds,
    "moment": shown_time,
    "iso": iso_time,
}
