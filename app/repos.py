"""What can be downloaded as a model: named files of one commit, wherever their bytes come from.

`app.routes.hub` shows repos in the Hub's protocol, `app.sending` sends their files. To show another kind of thing,
make a `Repo` of it and a `Shelf` to find it on, and name the shelf in `open_shelves`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anyio import CapacityLimiter

from workers.artifacts import LOCK_SUFFIX, ArtifactStore
from workers.jobs import JobKind, JobState
from workers.queue import Queue
from workers.tables import Job

LINK_SECONDS = 3600.0
COMMIT_DIGITS = 40


@dataclass(frozen=True)
class RepoFile:
    """A file of a repo. `etag`, 40 or 64 hex digits, stands for its bytes: their sha256, or whatever else decides them
    where nobody has computed them all; `sha256` is None then.
    """

    path: str
    size: int
    etag: str
    sha256: str | None = None


class Repo(ABC):
    """Files that belong together and never change.

    Attributes: `id`, shelf and name, such as `merges/mrg_01…`; `title`, for people; `files`, all of them by path
    (folders are parts of paths), sorted; `commit`, 40 hex digits that stand for all their bytes; `created_at` and
    `made_at`, seconds since 1970.
    """

    id: str
    title: str
    files: Mapping[str, RepoFile]
    commit: str
    created_at: float
    made_at: float

    @abstractmethod
    def read(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes of a file from `start` to before `end`; called in a thread, and so is the iterator.

        Raises `FileNotFoundError` or `WeightsmithError`, before the first byte is asked for wherever that can be known.
        """

    @property
    def threads(self) -> CapacityLimiter | None:
        """In which threads what is `read` is iterated over, where that may take long; None: in those of the routes."""
        return None

    def is_there(self, path: str) -> bool:
        """Whether a file of `files` can still be read."""
        return True

    def local(self, path: str) -> Path | None:
        """The file itself, where it lies on this machine."""
        return None

    def link(self, path: str) -> str | None:
        """Where else whoever wants the file is to get it, where that is wanted."""
        return None


class Shelf(Protocol):
    """Repos of one kind, each of which belongs to somebody."""

    def find(self, name: str, owner: str) -> Repo | None:
        """The repo of this name; None: there is none, or it is somebody else's."""

    def page(self, owner: str, limit: int, before: str | None) -> Sequence[Repo]:
        """At most so many repos of an owner, newest first, those whose names sort before `before` (None: all)."""


class JobRepo(Repo):
    """What a job that succeeded made."""

    def __init__(self, job: Job, artifacts: ArtifactStore, *, redirects: bool = False) -> None:
        """`redirects`: send whoever downloads to the store itself, where it has links."""
        self._job, self._artifacts, self._redirects = job, artifacts, redirects
        self.id = f"{JobKind(job.kind).plural}/{job.id}"
        self.title = f"{job.kind} {job.id}"
        self.created_at = job.created_at
        self.made_at = job.finished_at or job.created_at
        self.files = {
            file["path"]: RepoFile(file["path"], file["size"], etag=file["sha256"], sha256=file["sha256"])
            for file in sorted(job.files, key=lambda file: str(file["path"]))
        }
        self.commit = _commit(self.files)

    def read(self, path: str, start: int, end: int) -> Iterator[bytes]:
        return self._artifacts.read(self._job.id, path, start, end)

    def is_there(self, path: str) -> bool:
        target = self.local(path)
        if target is not None:
            return target.is_file()
        return self._artifacts.files(self._job.id).get(path) == self.files[path].size

    def local(self, path: str) -> Path | None:
        return self._artifacts.local(self._job.id, path)

    def link(self, path: str) -> str | None:
        return self._artifacts.link(self._job.id, path, LINK_SECONDS) if self._redirects else None


def _commit(files: Mapping[str, RepoFile]) -> str:
    """The beginning of the lock's sha256: the lock names all other files with theirs."""
    locks = [file.etag for file in files.values() if file.path.endswith(LOCK_SUFFIX)]
    listing = "\n".join(f"{file.path} {file.etag}" for file in files.values())
    return (locks[0] if locks else hashlib.sha256(listing.encode()).hexdigest())[:COMMIT_DIGITS]


class JobShelf:
    """What jobs of a kind have made."""

    def __init__(self, queue: Queue, kind: JobKind) -> None:
        self._queue, self._kind = queue, kind

    def find(self, name: str, owner: str) -> Repo | None:
        job = self._queue.store.find(name, owner, self._kind)
        return self._repo(job) if job is not None and job.state == JobState.SUCCEEDED else None

    def page(self, owner: str, limit: int, before: str | None) -> Sequence[Repo]:
        done = (JobState.SUCCEEDED,)
        jobs = self._queue.store.page(owner=owner, kind=self._kind, states=done, limit=limit, before=before)
        return [self._repo(job) for job in jobs]

    def _repo(self, job: Job) -> Repo:
        return job_repo(self._queue, job)


def job_repo(queue: Queue, job: Job) -> JobRepo:
    """What a job that succeeded made, as its store gives it."""
    return JobRepo(job, queue.artifacts, redirects=queue.store.settings.s3_redirect)


def open_shelves(queue: Queue) -> Mapping[str, Shelf]:
    """All shelves, by the first part of their repos' ids."""
    return {kind.plural: JobShelf(queue, kind) for kind in (JobKind.MERGE, JobKind.PATCH)}
