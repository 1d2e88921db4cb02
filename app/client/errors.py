"""What can go wrong between a client and a service. Nothing in here ever holds an API key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merge_core.errors import WeightsmithError

if TYPE_CHECKING:
    from app.client.objects import Job


class ServiceError(WeightsmithError):
    """The service refused, failed, or cannot be reached; the message says what to do about it."""

    code = "service-error"
    title = "The service did not do it"


class Unreachable(ServiceError):
    """No answer came, however often it was tried."""


class NotWeightsmith(ServiceError):
    """Something else answers at this address."""


class Refused(ServiceError):
    """The service answered with a problem (RFC 9457), whose fields are attributes here.

    `code` is a stable word such as `invalid-recipe`; `errors` has one entry for each place that is wrong, with a JSON
    pointer into the recipe, a tensor or a file; `problem` is all that the service said.
    """

    def __init__(self, status: int, problem: Mapping[str, Any], *, retry_after: float | None = None) -> None:
        self.status, self.problem, self.retry_after = status, dict(problem), retry_after
        self.code = str(problem.get("code", ""))
        self.title = str(problem.get("title") or f"the service answered {status}")
        self.detail = str(problem.get("detail", ""))
        self.retryable = bool(problem.get("retryable", False))
        places = problem.get("errors")
        self.errors: list[dict[str, Any]] = list(places) if isinstance(places, list) else []
        super().__init__(f"{self.title}: {self.detail}" if self.detail else self.title)


class NotFound(Refused):
    """There is nothing by this name, or it is somebody else's."""


class JobEnded(ServiceError):
    """A job that was waited for ended otherwise than well; `job` is how it ended."""

    def __init__(self, job: Job) -> None:
        self.job = job
        problem = job.error or {}
        self.code = str(problem.get("code", job.status))
        self.detail = str(problem.get("detail", ""))
        self.retryable = bool(problem.get("retryable", False))
        places = problem.get("errors")
        self.errors: list[dict[str, Any]] = list(places) if isinstance(places, list) else []
        super().__init__(f"{job.id} {job.status}" + (f": {self.detail}" if self.detail else ""))


class JobFailed(JobEnded):
    """The job failed: `code`, `detail` and `errors` are those of its problem."""


class JobCanceled(JobEnded):
    """Somebody canceled the job."""


class Damaged(ServiceError):
    """A file arrived otherwise than the service says it is, or it has a name that leads elsewhere."""
