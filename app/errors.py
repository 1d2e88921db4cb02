"""Error → status in one table; one body shape, RFC 9457."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from app.schemas import ProblemRead
from merge_core.errors import WeightsmithError
from workers.jobs import IllegalMove
from workers.problems import problem

STATUS: Mapping[str, int] = {
    "invalid-recipe": 422,
    "incompatible-models": 422,
    "bad-checkpoint": 422,
    "model-not-found": 422,
    "path-not-allowed": 403,
    "unsafe-format": 422,
    "memory-limit": 422,
    "non-finite": 422,
    "insufficient-storage": 507,
    "storage-failed": 503,
}
CODES: Mapping[int, str] = {404: "not-found", 405: "method-not-allowed"}
TYPE = "urn:weightsmith:problem:"
log = logging.getLogger(__name__)


class HttpProblem(Exception):
    """A problem that only HTTP knows."""

    def __init__(
        self, status: int, code: str, title: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.headers = status, headers
        self.body = {"code": code, "title": title, "detail": detail}


def problem_response(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
    """`application/problem+json`."""
    content = {"type": TYPE + str(body["code"]), "status": status, **body}
    return JSONResponse(content, status, dict(headers or {}), media_type="application/problem+json")


_CONTENT = {"application/problem+json": {"schema": ProblemRead.model_json_schema()}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"description": "The recipe or the request is not valid.", "content": _CONTENT},
    "4XX": {"description": "The request cannot be carried out.", "content": _CONTENT},
    "5XX": {"description": "The service cannot carry it out now.", "content": _CONTENT},
}
"""What the OpenAPI document says of every route's failures."""


def install(app: FastAPI) -> None:
    """Make every failure a problem."""

    @app.exception_handler(WeightsmithError)
    def expected(request: Request, error: WeightsmithError) -> JSONResponse:
        return problem_response(STATUS.get(error.code, 500), problem(error))

    @app.exception_handler(OperationalError)
    def no_database(request: Request, error: OperationalError) -> JSONResponse:
        log.warning("the database cannot be used: %s", error)
        detail = "the service's database cannot be used now; try again"
        body = {
            "code": "database-unavailable",
            "title": "The database cannot be used",
            "detail": detail,
            "retryable": True,
        }
        return problem_response(503, body, {"Retry-After": "5"})

    @app.exception_handler(HttpProblem)
    def http_problem(request: Request, error: HttpProblem) -> JSONResponse:
        return problem_response(error.status, error.body, error.headers)

    @app.exception_handler(IllegalMove)
    def illegal_move(request: Request, error: IllegalMove) -> JSONResponse:
        return problem_response(
            409, {"code": "invalid-state", "title": "The job is not in a state for that", "detail": str(error)}
        )

    @app.exception_handler(RequestValidationError)
    def bad_parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        places = [
            {"pointer": "#/" + "/".join(map(str, found["loc"])), "detail": found["msg"]} for found in error.errors()
        ]
        detail = "; ".join(f"{place['pointer'][2:]}: {place['detail']}" for place in places)
        return problem_response(
            422, {"code": "invalid-request", "title": "The request is not valid", "detail": detail, "errors": places}
        )

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        title = HTTPStatus(error.status_code).phrase
        body = {
            "code": CODES.get(error.status_code, title.lower().replace(" ", "-")),
            "title": title,
            "detail": str(error.detail),
        }
        return problem_response(error.status_code, body, error.headers)

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.exception("unexpected error in %s %s", request.method, request.url.path, exc_info=error)
        body = {
            "code": "internal-error",
            "title": "Something is wrong with Weightsmith itself",
            "detail": "the service's log describes it",
        }
        return problem_response(500, body)
