"""Methods: what each does, its equation, its paper, its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from app.pages.rendering import PageDep
from app.routes.methods import list_methods
from app.schemas import MethodRead

NEEDS = {
    "base": "a base model",
    "no-base": "no base model",
    "one": "just one model, besides any base",
    "many": "any number of models",
    "files": "may read files of numbers",
}
"""What can be asked of methods, and its words."""
_BASE = {
    "required": "a base, which the models were tuned from",
    "optional": "with a base what the models learned is merged, without one the models themselves",
    "model": "no base",
}
_FORMULA = re.compile(r"\S {4}|^\S{1,4}( \S+)? [=←~] ", re.MULTILINE)
_TYPES = {"number": "number", "integer": "whole number", "boolean": "yes or no", "string": "text"}
router = APIRouter()


@router.get("/methods")
def read(
    page: PageDep,
    q: Annotated[str, Query(max_length=200)] = "",
    needs: Annotated[str, Query(max_length=32)] = "",
) -> HTMLResponse:
    """All methods, of which those are shown that have every word of `q` and that need what is asked."""
    words = q.lower().split()
    entries = [
        Entry(method, is_shown=needs in ("", *_needs(method)) and all(word in _text(method) for word in words))
        for method in list_methods().data
    ]
    return page("methods.html", entries=entries, q=q, needs=needs, choices=NEEDS)


@dataclass(frozen=True)
class Parameter:
    """A parameter in words."""

    name: str
    type: str
    usual: str
    description: str


@dataclass(frozen=True)
class Entry:
    """A method as the page shows it."""

    method: MethodRead
    is_shown: bool

    @property
    def needs(self) -> list[str]:
        return _needs(self.method)

    @property
    def text(self) -> str:
        """What is searched."""
        return _text(self.method)

    @property
    def takes(self) -> str:
        """How many models, and whether a base."""
        fewest, most = self.method.models["min"], self.method.models["max"]
        count = f"{fewest}" if fewest == most else f"{fewest} to {most}" if most else f"{fewest} or more"
        return f"{count} {'model' if most == 1 else 'models'}; {_BASE[self.method.base]}"

    @property
    def equation(self) -> Iterator[tuple[bool, str]]:
        """Its paragraphs, and whether each is a formula; of several in a line each has its own."""
        for paragraph in filter(None, self.method.equation.split("\n\n")):
            if _FORMULA.search(paragraph):
                yield True, "\n".join(re.split(r"\n| {4,}", paragraph.strip()))
            else:
                yield False, paragraph

    @property
    def more(self) -> list[str]:
        """What its description says after the summary, without the example in Python."""
        paragraphs = self.method.description.split("\n\n")[1:]
        return [each.replace("\n", " ") for each in paragraphs if not each.startswith(">>>")]

    @property
    def parameters(self) -> list[Parameter]:
        schema = self.method.parameters
        return [
            _parameter(name, about, is_needed=name in schema.get("required", ()), is_own=name in self.method.per_model)
            for name, about in schema.get("properties", {}).items()
        ]


def _needs(method: MethodRead) -> list[str]:
    most = method.models["max"]
    found = ["base" if method.base == "required" else "no-base", "one" if most == 1 else "many"]
    return [*found, "files"] if method.statistics else found


def _text(method: MethodRead) -> str:
    return f"{method.name} {method.title} {method.description} {' '.join(method.parameters['properties'])}".lower()


def _parameter(name: str, about: Mapping[str, Any], *, is_needed: bool, is_own: bool) -> Parameter:
    inner = about.get("items", about)
    default = about.get("default")
    if is_own and isinstance(default, list):
        default = default[0]
    kind = f"{_type(inner)}, for each model" if is_own else _type(inner)
    return Parameter(name, kind, "needed" if is_needed else _usual(default), about.get("description", ""))


def _type(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    return " ".join((_TYPES[schema["type"]], _range(schema))).strip()


def _range(schema: Mapping[str, Any]) -> str:
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    low = f"from {least:g}" if least is not None else f"above {above:g}" if above is not None else ""
    high = f"to {most:g}" if most is not None else f"below {below:g}" if below is not None else ""
    return f"{low} {high}".strip()


def _usual(value: Any) -> str:
    if value is None:
        return "none unless given"
    if isinstance(value, bool):
        return f"usually {'yes' if value else 'no'}"
    return f"usually {value:g}" if isinstance(value, float) else f"usually {value}"
