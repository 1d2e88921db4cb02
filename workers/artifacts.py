"""Where finished artifacts are kept: a folder, which many machines may share, or S3.

Work grows in the data folder of the machine that does it. What is finished is put here, the lock after everything that
it names, and only then does the job's row say that it succeeded.
"""

from __future__ import annotations

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merge_core.errors import Canceled, StorageFailed
from workers.settings import Settings

if TYPE_CHECKING:
    from merge_core.files import WrittenFile

CHUNK = 2**20
LOCK_SUFFIX = ".lock.json"


class ArtifactStore(ABC):
    """Artifacts by the ids of their jobs. Every method raises `StorageFailed` where the store cannot be used."""

    @abstractmethod
    def put_folder(
        self,
        job_id: str,
        folder: Path,
        files: Sequence[WrittenFile],
        *,
        sent: Callable[[int], None] = lambda size: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Store these files of a folder; those that an earlier attempt stored are not sent again.

        `sent` is told of so many bytes more, from any thread; `stop` is asked whether to give up (`Canceled`).
        """

    @abstractmethod
    def files(self, job_id: str) -> dict[str, int]:
        """What is stored of a job, complete or not: the sizes by path."""

    @abstractmethod
    def read(self, job_id: str, path: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to before `end`. Raises `FileNotFoundError`, before the first byte is asked for."""

    @abstractmethod
    def delete(self, job_id: str) -> None:
        """Remove all that is stored of a job, complete or not; there may be nothing."""

    @abstractmethod
    def list(self) -> Iterator[str]:
        """The ids of the jobs of which anything is stored, complete or not."""

    def local(self, job_id: str, path: str) -> Path | None:
        """The file itself, where it lies in a folder of this machine."""
        return None

    def link(self, job_id: str, path: str, seconds: float) -> str | None:
        """A URL that gives the file to whoever has it, so long, where the store can make one."""
        return None

    def holds(self, folder: Path) -> bool:
        """Whether what is finished in this folder need not be put anywhere."""
        return False


def open_artifacts(settings: Settings) -> ArtifactStore:
    """The store that the settings name; the artifacts' place in the data folder if they name none."""
    place = settings.artifact_store
    if place is None or not place.startswith("s3://"):
        return FolderStore(Path(place) if place else settings.artifacts)
    try:
        from workers.s3 import S3Artifacts
    except ModuleNotFoundError as error:
        raise StorageFailed(f"{place} needs a package: pip install 'weightsmith[s3]'") from error
    return S3Artifacts(settings)


class FolderStore(ArtifactStore):
    """A folder with a folder for each job, which appears whole."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def put_folder(
        self,
        job_id: str,
        folder: Path,
        files: Sequence[WrittenFile],
        *,
        sent: Callable[[int], None] = lambda size: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        target, incoming = self.root / job_id, self._incoming(job_id)
        if self.holds(folder):
            return
        try:
            if not target.exists():
                for file in lock_last(files):
                    _copy(folder / file.path, incoming / file.path, file.size, sent, stop)
                incoming.rename(target)
            shutil.rmtree(incoming, ignore_errors=True)
        except OSError as error:
            raise StorageFailed(f"the artifact cannot be put into {self.root}: {error.strerror or error}") from error

    def files(self, job_id: str) -> dict[str, int]:
        return {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for folder in (self._incoming(job_id), self.root / job_id)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def read(self, job_id: str, path: str, start: int, end: int) -> Iterator[bytes]:
        file = (self.root / job_id / path).open("rb")

        def chunks() -> Iterator[bytes]:
            with file:
                file.seek(start)
                left = end - start
                while left > 0 and (chunk := file.read(min(CHUNK, left))):
                    left -= len(chunk)
                    yield chunk

        return chunks()

    def delete(self, job_id: str) -> None:
        for folder in (self._incoming(job_id), self.root / job_id):
            try:
                shutil.rmtree(folder)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise StorageFailed(f"{folder} cannot be removed: {error.strerror or error}") from error

    def list(self) -> Iterator[str]:
        try:
            names = sorted(path.name for path in self.root.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageFailed(f"{self.root} cannot be read: {error.strerror or error}") from error
        ids = (
            name[1:].removesuffix(_INCOMING) if name.endswith(_INCOMING) else name
            for name in names
            if not name.startswith(".") or name.endswith(_INCOMING)
        )
        yield from dict.fromkeys(ids)

    def local(self, job_id: str, path: str) -> Path | None:
        return self.root / job_id / path

    def holds(self, folder: Path) -> bool:
        return folder.absolute().parent == self.root

    def _incoming(self, job_id: str) -> Path:
        return self.root / f".{job_id}{_INCOMING}"


_INCOMING = ".incoming"


def lock_last(files: Sequence[WrittenFile]) -> list[WrittenFile]:
    """The files in the order in which they are stored: the lock, which names the others, comes last."""
    return sorted(files, key=lambda file: file.path.endswith(LOCK_SUFFIX))


def _copy(source: Path, target: Path, size: int, sent: Callable[[int], None], stop: Callable[[], bool]) -> None:
    """Copy a file, which has its name only when it is whole; one that is there already stays."""
    if target.is_file() and target.stat().st_size == size:
        sent(size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with source.open("rb") as reader, unfinished.open("wb") as writer:
            while chunk := reader.read(CHUNK):
                if stop():
                    raise Canceled("storing the artifact was canceled")
                writer.write(chunk)
                sent(len(chunk))
            writer.flush()
            os.fsync(writer.fileno())
        unfinished.rename(target)
    finally:
        unfinished.unlink(missing_ok=True)
