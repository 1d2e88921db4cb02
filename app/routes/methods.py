"""The merge methods, from the registry."""

from __future__ import annotations

import inspect
import sys

from fastapi import APIRouter

from app.errors import HttpProblem, answers
from app.schemas import MethodList, MethodRead
from merge_core.method import MergeMethod
from merge_core.methods import METHODS

router = APIRouter(prefix="/v1/methods", tags=["methods"])


@router.get("")
def list_methods() -> MethodList:
    """Every method: what it does, its paper, its parameters as JSON Schema."""
    return MethodList(data=[_read(method) for meanings in METHODS.values() for method in meanings.values()])


@router.get("/{name}", responses=answers("not-found"))
def read_method(name: str) -> MethodList:
    """One method, with each meaning its name has."""
    if name not in METHODS:
        raise HttpProblem("not-found", f"there is no method {name[:60]!r}; there are {', '.join(METHODS)}")
    return MethodList(data=[_read(method) for method in METHODS[name].values()])


def _read(method: type[MergeMethod]) -> MethodRead:
    description = inspect.cleandoc(method.__doc__ or "")
    fewest, most = method.count
    return MethodRead(
        name=method.name,
        semantics=method.semantics,
        title=method.title,
        summary=description.partition("\n\n")[0].replace("\n", " "),
        description=description,
        equation=_equation(method),
        paper=method.paper,
        base=method.base,
        models={"min": fewest, "max": most},
        scopes=list(method.scopes),
        per_model=[name for name, is_per_model in method.parameters().items() if is_per_model],
        own_bases=method.own_bases,
        statistics=dict(method.statistics),
        parameters=method.model_json_schema(by_alias=True),
    )


def _equation(method: type[MergeMethod]) -> str:
    """What stands in the method's file below its first sentence, by which files begin."""
    text = inspect.cleandoc(sys.modules[method.__module__].__doc__ or "")
    return inspect.cleandoc(text.partition("\n\n")[2])
