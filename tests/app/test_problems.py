"""One table of problems: every code that is used is in it, every one in it is used, and says the same everywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from merge_core.errors import WeightsmithError
from workers.problems import PROBLEMS, problem
from workers.settings import Settings

ROOT = Path(__file__).parents[2]
MADE_BY = {"HttpProblem", "problem_of", "answers", "ProblemType"}


@cache
def _source() -> Sequence[tuple[ast.AST, str]]:
    """Every piece of the service's source, and its file."""
    return list(_pieces())


def _pieces() -> Iterator[tuple[ast.AST, str]]:
    for package in ("app", "workers", "merge_core"):
        for file in (ROOT / package).rglob("*.py"):
            path = file.relative_to(ROOT)
            if not {"client", "cli"} & {part.removesuffix(".py") for part in path.parts}:
                place = str(path)
                for node in ast.walk(ast.parse(file.read_text())):
                    yield node, place


def _codes(node: ast.AST) -> Iterator[str]:
    """The codes that are used here: in a call, in a dictionary, or as that of an error."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[*given]) if name in MADE_BY:
            found = given if name == "answers" else given[:1]
        case ast.Dict(keys=keys, values=values):
            found = [value for key, value in zip(keys, values, strict=True) if _is(key, "code")]
        case ast.AnnAssign(target=ast.Name(id="code"), value=ast.expr() as value):
            found = [value]
        case ast.Assign(targets=[ast.Name(id="code")], value=value):
            found = [value]
        case _:
            return
    yield from (each.value for each in found if isinstance(each, ast.Constant) and isinstance(each.value, str))


def _is(node: ast.expr | None, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text


def test_every_code_that_is_used_is_in_the_table() -> None:
    unknown = {
        f"{place}:{getattr(node, 'lineno', 0)}: {code}"
        for node, place in _source()
        for code in _codes(node)
        if code not in PROBLEMS
    }
    assert not unknown


def test_every_code_in_the_table_is_used() -> None:
    elsewhere = (node for node, place in _source() if place != "workers/problems.py")
    assert PROBLEMS.keys() <= {node.value for node in elsewhere if isinstance(node, ast.Constant)}


def _tree(root: type[WeightsmithError]) -> Iterator[type[WeightsmithError]]:
    yield root
    for below in root.__subclasses__():
        yield from _tree(below)


@pytest.mark.parametrize(
    "error", [each for each in _tree(WeightsmithError) if each.__module__.startswith("merge_core")]
)
def test_the_core_s_errors_say_what_the_table_says(error: type[WeightsmithError]) -> None:
    found = PROBLEMS[error.code]
    assert (found.title, found.retryable) == (error.title, error.retryable)


def test_an_error_from_elsewhere_is_a_problem_too() -> None:
    class Unheard(WeightsmithError):
        code = "unheard-of"

    assert problem(Unheard("strange"))["code"] == "merge-failed"


def test_a_problem_s_type_leads_to_what_it_means(tmp_path: Path) -> None:
    with TestClient(create_app(Settings(data=tmp_path))) as client:
        refused = client.get("/v1/merges/mrg_none").json()
        assert refused["type"] == "/v1/problems/not-found"
        meant = client.get(refused["type"]).json()
        assert meant.items() >= {key: refused[key] for key in ("type", "code", "status", "title", "retryable")}.items()
        assert meant["meaning"]
        assert [each["code"] for each in client.get("/v1/problems").json()["data"]] == list(PROBLEMS)
        assert client.get("/v1/problems/none").status_code == 404
