"""The kinds of problems: where the `type` of every one leads."""

from __future__ import annotations

from fastapi import APIRouter

from app.errors import HttpProblem, answers
from app.schemas import PROBLEM_TYPES, ProblemTypeList, ProblemTypeRead
from workers.problems import PROBLEMS, ProblemType

router = APIRouter(prefix=PROBLEM_TYPES.rstrip("/"), tags=["problems"])


@router.get("")
def list_problems() -> ProblemTypeList:
    """Every code there is, with its status, what it means, and whether the same may work later."""
    return ProblemTypeList(data=[_read(kind) for kind in PROBLEMS.values()])


@router.get("/{code}", responses=answers("not-found"))
def read_problem(code: str) -> ProblemTypeRead:
    """One code."""
    if code not in PROBLEMS:
        raise HttpProblem("not-found", f"there is no problem {code[:60]!r}; there are {', '.join(PROBLEMS)}")
    return _read(PROBLEMS[code])


def _read(kind: ProblemType) -> ProblemTypeRead:
    return ProblemTypeRead(type=PROBLEM_TYPES + kind.code, **vars(kind))
