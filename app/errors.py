"""Every failure as a problem, RFC 9457. Their kinds are one table: `workers.problems`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from app.schemas import PROBLEM_TYPES
from merge_core.errors import WeightsmithError
from workers.database import TROUBLE, said
from workers.idempotency import KeyReused
from workers.jobs import IllegalMove
from workers.logs import current_request
from workers.problems import PROBLEMS, problem, problem_of
from workers.quotas import QuotaExceeded

MEDIA_TYPE = "application/problem+json"
_BY_STATUS: Mapping[int, str] = {400: "bad-request", 404: "not-found", 405: "method-not-allowed"}
log = logging.getLogger(__name__)


class HttpProblem(Exception):
    """A problem that only HTTP knows: a code of `PROBLEMS`, and what is wrong in this case."""

    def __init__(self, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.headers, self.body = headers, problem_of(code, detail, **members)


def problem_response(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
    """What `problem_of` made, as an answer."""
    content = {"type": PROBLEM_TYPES + body["code"], **body} | (
        {"request_id": found} if (found := current_request()) else {}
    )
    return JSONResponse(content, body["status"], dict(headers or {}), media_type=MEDIA_TYPE)


def answers(*codes: str) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of answers with these problems."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = PROBLEMS[code]
        example = {"type": PROBLEM_TYPES + code, **problem_of(code, "what is wrong here, and what to do")}
        content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemRead"}, "examples": {}}}
        entry = found.setdefault(kind.status, {"description": "", "content": content})
        entry["description"] += f"{' ' if entry['description'] else ''}`{code}`: {kind.meaning}"
        entry["content"][MEDIA_TYPE]["examples"][code] = {"summary": kind.title, "value": example}
    return found


def install(app: FastAPI) -> None:
    """Make every failure a problem."""

    @app.exception_handler(WeightsmithError)
    def expected(request: Request, error: WeightsmithError) -> JSONResponse:
        return problem_response(problem(error))

    @app.exception_handler(QuotaExceeded)
    def over_quota(request: Request, error: QuotaExceeded) -> JSONResponse:
        wait = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return problem_response(problem(error) | error.facts(), wait)

    def no_database(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TROUBLE)
        log.warning("the database cannot be used: %s", said(error))
        detail = "the service's database cannot be used now; try again"
        return problem_response(problem_of("database-unavailable", detail), {"Retry-After": "5"})

    for trouble in TROUBLE:
        app.add_exception_handler(trouble, no_database)

    @app.exception_handler(HttpProblem)
    def http_problem(request: Request, error: HttpProblem) -> JSONResponse:
        return problem_response(error.body, error.headers)

    @app.exception_handler(IllegalMove)
    def illegal_move(request: Request, error: IllegalMove) -> JSONResponse:
        return problem_response(problem_of("invalid-state", str(error)))

    @app.exception_handler(KeyReused)
    def key_reused(request: Request, error: KeyReused) -> JSONResponse:
        return problem_response(problem_of("idempotency-key-reused", str(error)))

    @app.exception_handler(RequestValidationError)
    def bad_parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        places = [
            {"pointer": "#/" + "/".join(map(str, found["loc"])), "detail": found["msg"]} for found in error.errors()
        ]
        detail = "; ".join(f"{place['pointer'][2:]}: {place['detail']}" for place in places)
        return problem_response(problem_of("invalid-request", detail, errors=places))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        code = _BY_STATUS.get(error.status_code)
        if code is None:
            log.error("an answer of %s that no problem stands for: %s", error.status_code, error.detail)
            code = "internal-error"
        detail = str(error.detail)
        if detail == HTTPStatus(error.status_code).phrase:
            detail = f"{request.method} {request.url.path[:200]}: {PROBLEMS[code].title.lower()}; see /docs"
        return problem_response(problem_of(code, detail), error.headers)
