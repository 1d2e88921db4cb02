"""The one table of everything that can go wrong, for HTTP answers and for the jobs' rows alike (RFC 9457).

A code is for programs and never changes its meaning; `detail` is for people and says what to do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_core import errors
from merge_core.errors import WeightsmithError
from workers.hub import errors as hub_errors


@dataclass(frozen=True)
class ProblemType:
    """A kind of problem. `status`: the HTTP status of an answer that says it. `retryable`: the same may work later."""

    code: str
    status: int
    title: str
    meaning: str
    retryable: bool = False


def _of(error: type[WeightsmithError], status: int) -> ProblemType:
    """The kind of problem that an error of the core is."""
    return ProblemType(error.code, status, error.title, inspect.getdoc(error) or "", error.retryable)


_TYPES = (
    _of(errors.RecipeError, 422),
    _of(errors.IncompatibleModels, 422),
    _of(errors.CheckpointError, 422),
    _of(errors.CheckpointNotFound, 422),
    _of(errors.PathNotAllowed, 403),
    _of(errors.UnsafeFormat, 422),
    _of(hub_errors.HubGated, 403),
    _of(hub_errors.HubTokenRefused, 422),
    _of(hub_errors.HubUnavailable, 503),
    _of(hub_errors.HubLied, 502),
    _of(hub_errors.HubNotAllowed, 403),
    _of(hub_errors.HubForbidden, 403),
    _of(hub_errors.HubConflict, 409),
    _of(errors.MemoryLimitExceeded, 422),
    _of(errors.NonFinite, 422),
    _of(errors.InsufficientStorage, 507),
    _of(errors.StorageFailed, 503),
    _of(errors.DeviceNotFound, 500),
    _of(errors.OutputExists, 500),
    _of(errors.EvaluationFailed, 502),
    _of(errors.CalibrationFailed, 422),
    _of(errors.Canceled, 409),
    _of(errors.WeightsmithError, 500),
    ProblemType("bad-request", 400, "Not understood", "The request is not HTTP as it should be."),
    ProblemType(
        "unauthorized",
        401,
        "A key is needed",
        "Send a good API key as `Authorization: Bearer wsk_…`. One that is unknown, revoked or expired is not good.",
    ),
    ProblemType("forbidden", 403, "Not allowed", "The key is good, but not for this; `detail` says what it lacks."),
    ProblemType("not-found", 404, "Not found", "There is no such thing, or it is somebody else's."),
    ProblemType("method-not-allowed", 405, "Method not allowed", "The thing is there, but cannot be asked for that."),
    ProblemType(
        "invalid-state",
        409,
        "The job is not in a state for that",
        "Read the job's `status`; `detail` says what it needs.",
    ),
    ProblemType(
        "credential-not-found",
        422,
        "There is no such credential",
        "A job names a credential that its owner does not have, or has deleted. Store it and retry the job.",
    ),
    ProblemType(
        "credential-sealed",
        500,
        "The credential cannot be opened",
        "The key that it was sealed under is not among those of the service. Store the credential anew.",
    ),
    ProblemType(
        "no-secret-key",
        503,
        "Credentials cannot be kept here",
        "Who runs the service has not given it a key to seal them under, or one that cannot be used.",
    ),
    ProblemType("gone", 410, "Gone", "It was there and has been removed."),
    ProblemType("precondition-failed", 412, "Precondition failed", "The thing is not the one that `If-Match` names."),
    ProblemType("payload-too-large", 413, "Payload too large", "Less is read here; `detail` says how much."),
    ProblemType(
        "unsupported-media-type", 415, "Unsupported media type", "Send JSON or YAML, and say so in `Content-Type`."
    ),
    ProblemType(
        "range-not-satisfiable",
        416,
        "Range not satisfiable",
        "`Range` asks for nothing that is there; see Content-Range.",
    ),
    ProblemType(
        "misdirected-request",
        421,
        "Not for this service",
        "Without keys the service answers only on this machine, by the name of localhost.",
    ),
    ProblemType(
        "quota-exceeded",
        429,
        "Too much at once",
        "You have as much as you may for now; `used`, `allowed` and Retry-After say more, GET /v1/quota all of it.",
        retryable=True,
    ),
    ProblemType(
        "quota",
        403,
        "More than is allowed",
        "This is more than you may have, and waiting does not change it; `used` and `allowed` say what you may.",
    ),
    ProblemType(
        "invalid-request",
        422,
        "The request is not valid",
        "A parameter or header is wrong; `errors` says which and why.",
    ),
    ProblemType(
        "idempotency-key-reused",
        422,
        "The idempotency key was used for another request",
        "A key stands for one request for 24 hours; take a new key for a new one.",
    ),
    ProblemType(
        "worker-lost",
        500,
        "The worker died",
        "Workers died at the job, mostly for want of memory. A retry goes on where the last one was.",
        retryable=True,
    ),
    ProblemType(
        "deadline-exceeded",
        504,
        "The job was not done in time",
        "The job's own deadline passed. Give it longer, or a higher priority.",
        retryable=True,
    ),
    ProblemType(
        "internal-error",
        500,
        "Something is wrong with Weightsmith itself",
        "It is not the request's fault; the log describes it.",
        retryable=True,
    ),
    ProblemType(
        "preparing",
        503,
        "The view is being prepared",
        "What all of its weights depend on is still being found out; Retry-After says when to ask again.",
        retryable=True,
    ),
    ProblemType(
        "too-many-readers",
        503,
        "Too much is being computed",
        "As many views are being read as the service computes at a time; Retry-After says when to ask again.",
        retryable=True,
    ),
    ProblemType(
        "not-ready",
        503,
        "Not ready",
        "Something that the service depends on is missing; `checks` says what.",
        retryable=True,
    ),
    ProblemType(
        "database-unavailable",
        503,
        "The database cannot be used",
        "Nothing was changed; try again in a few seconds.",
        retryable=True,
    ),
)
PROBLEMS: Mapping[str, ProblemType] = {kind.code: kind for kind in _TYPES}
"""Every kind of problem, by its code. To add one, add it here; a test holds that no other code is used."""


def problem(error: WeightsmithError) -> dict[str, Any]:
    """An expected failure as plain data: `problem_of`, with one entry in `errors` for each place that is wrong."""
    places = [
        {key: value for key, value in vars(found).items() if value is not None}
        for found in error.problems
        if found.pointer or found.tensor or found.file
    ]
    return problem_of(error.code if error.code in PROBLEMS else WeightsmithError.code, str(error), errors=places)


def problem_of(code: str, detail: str, *, errors: Sequence[Mapping[str, Any]] = (), **members: Any) -> dict[str, Any]:
    """A problem as plain data: `code`, `title`, `status`, `detail`, `retryable`, further members, and `errors`."""
    kind = PROBLEMS[code]
    told: dict[str, Any] = {"code": code, "title": kind.title, "status": kind.status, "detail": detail}
    told |= {"retryable": kind.retryable, **members}
    return told | ({"errors": [dict(place) for place in errors]} if errors else {})
