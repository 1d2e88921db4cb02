"""Finished jobs as what somebody published: their files, wherever the artifact store has them, to be verified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_core.errors import CheckpointError, CheckpointNotFound, Problem, RecipeError
from workers.artifacts import ArtifactStore
from workers.jobs import JobKind, JobState, JobStore


class StoredFiles:
    """What a job that succeeded made (`merge_core.verify.Published`)."""

    def __init__(self, artifacts: ArtifactStore, job_id: str) -> None:
        self._artifacts, self.name = artifacts, job_id

    is_whole = True

    def sha256(self, file: str) -> None:
        """Nothing: it is hashed here."""

    def sizes(self) -> Mapping[str, int]:
        return self._artifacts.files(self.name)

    def header(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        return self.read(file, begin, end)

    def read(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        try:
            found = self._artifacts.read(self.name, file, begin, end)
        except FileNotFoundError:
            raise CheckpointError(f"{self.name}/{file}", "is not in the artifact store any more") from None
        for data in found:
            begin += len(data)
            yield data
        if begin < end:
            raise CheckpointError(f"{self.name}/{file}", "is shorter in the artifact store than it was")


def published_by(store: JobStore, artifacts: ArtifactStore, owner: str, document: Any) -> StoredFiles | None:
    """The files of the job that a document names, if that is its owner's and succeeded; None where it names none.

    Raises `CheckpointNotFound`, also for somebody else's, or `RecipeError` for a job that is not done.
    """
    job_id: str | None = getattr(document, "job", None)
    if job_id is None:
        return None
    job = store.find(job_id, owner, JobKind.MERGE) or store.find(job_id, owner, JobKind.PATCH)
    if job is None:
        error = CheckpointNotFound(job_id, "is no merge of yours")
        error.problems = (Problem(str(error), "#/job"),)
        raise error
    if job.state != JobState.SUCCEEDED:
        raise RecipeError.of([Problem(f"{job.id} is {job.state}; only what succeeded can be verified", "#/job")])
    return StoredFiles(artifacts, job.id)
