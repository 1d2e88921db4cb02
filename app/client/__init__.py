"""The Python client: the API's words, for programs and for `weightsmith submit`.

    with Client("http://127.0.0.1:8000") as client:
        job = client.merges.submit("recipe.yml")
        client.merges.wait(job, progress=True)
        client.merges.download(job, "merged")

It needs no torch and none of the service's libraries.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from app.client.access import ApiKeys, Credentials
from app.client.data import Data, DataFile
from app.client.errors import (
    Damaged,
    JobCanceled,
    JobEnded,
    JobFailed,
    NotFound,
    NotWeightsmith,
    Refused,
    ServiceError,
    Unreachable,
)
from app.client.jobs import Jobs, Searches
from app.client.objects import Event, File, Job, Plan, Progress
from app.client.service import Methods, Models, Recipes, System
from app.client.transport import Transport

__all__ = [
    "Client",
    "Damaged",
    "DataFile",
    "Event",
    "File",
    "Job",
    "JobCanceled",
    "JobEnded",
    "JobFailed",
    "Jobs",
    "NotFound",
    "NotWeightsmith",
    "Plan",
    "Progress",
    "Refused",
    "ServiceError",
    "Unreachable",
]
DEFAULT_URL = "http://127.0.0.1:8000"


class Client:
    """One service, for one owner.

    `url` and `api_key` are WEIGHTSMITH_URL's and WEIGHTSMITH_API_KEY's where they are not given. `timeout` is how long
    an answer may take, in seconds; `patience`, how long a service that has answered before, and does not now or says
    that it cannot now, is asked again before the error is raised. Threads may share a client.
    """

    def __init__(
        self, url: str | None = None, *, api_key: str | None = None, timeout: float = 60, patience: float = 60
    ) -> None:
        url = url or os.environ.get("WEIGHTSMITH_URL") or DEFAULT_URL
        api_key = api_key or os.environ.get("WEIGHTSMITH_API_KEY")
        self._transport = Transport(url, api_key, timeout=timeout, patience=patience)
        self.url = self._transport.url
        self.merges = Jobs(self._transport, "merges")
        self.alignments = Jobs(self._transport, "alignments")
        self.patches = Jobs(self._transport, "patches")
        self.verify = Jobs(self._transport, "verify")
        self.views = Jobs(self._transport, "views")
        self.analyses = Jobs(self._transport, "analyses")
        self.searches = Searches(self._transport, "searches")
        self.calibrations = Jobs(self._transport, "calibrations")
        self.recipes = Recipes(self._transport)
        self.methods = Methods(self._transport)
        self.models = Models(self._transport)
        self.data = Data(self._transport)
        self.credentials = Credentials(self._transport)
        self.api_keys = ApiKeys(self._transport)
        self.system = System(self._transport)

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def jobs_of(self, job_id: str) -> Jobs:
        """`merges`, `alignments`, `patches`, `verify`, `views`, `analyses`, `searches` or `calibrations`: those that a
        job with this id is of.
        """
        kinds = {
            "mrg": self.merges,
            "aln": self.alignments,
            "pat": self.patches,
            "vrf": self.verify,
            "viw": self.views,
            "anl": self.analyses,
            "sch": self.searches,
            "cal": self.calibrations,
        }
        try:
            return kinds[job_id.partition("_")[0]]
        except KeyError:
            raise ServiceError(f"{job_id[:60]!r} is no job's id; those begin with mrg_, aln_ or pat_") from None

    def close(self) -> None:
        self._transport.close()
