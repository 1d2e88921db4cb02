"""Artifacts in S3, or in what speaks its language (MinIO, R2, Ceph): `bucket/prefix/JOB/FILE`, its sha256 beside it.

Files are sent several at once, the larger ones in parts. A part that the store refuses for a moment is sent again. What
a kill left of a part-wise upload is no object and cannot be listed here: a lifecycle rule of the bucket removes it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

from merge_core.errors import Canceled, StorageFailed
from workers.artifacts import CHUNK, ArtifactStore, lock_last

if TYPE_CHECKING:
    from obstore.store import ClientConfig

    from merge_core.files import WrittenFile
    from workers.settings import Settings

FILES_AT_ONCE = 4
PARTS_AT_ONCE = 2
PART = 8 * 2**20
MOST_PARTS = 10_000
SEND_SECONDS = 120.0
"""How long a request that fails for the store's reasons is repeated while an artifact is sent."""
ANSWER_SECONDS = 10.0
"""The same where somebody waits for the answer."""
STOP_SECONDS = 1.0
_DIGEST = "sha256"


class S3Artifacts(ArtifactStore):
    """A prefix of a bucket."""

    def __init__(self, settings: Settings) -> None:
        assert settings.artifact_store is not None
        self.place = settings.artifact_store.rstrip("/")
        self.bucket, _, prefix = self.place.removeprefix("s3://").partition("/")
        given: dict[str, Any] = {
            "endpoint": settings.s3_endpoint,
            "region": settings.s3_region,
            "access_key_id": settings.s3_access_key_id and settings.s3_access_key_id.get_secret_value(),
            "secret_access_key": settings.s3_secret_access_key and settings.s3_secret_access_key.get_secret_value(),
        }
        # What is not given is looked for in the AWS_ variables.
        config: dict[str, Any] = {key: value for key, value in given.items() if value}
        client: ClientConfig = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "15m"}
        if (settings.s3_endpoint or "").startswith("http://"):
            client["allow_http"] = True

        def store(patience: float) -> S3Store:
            retries: Any = {"max_retries": 50, "retry_timeout": timedelta(seconds=patience)}
            return S3Store(self.bucket, prefix=prefix or None, client_options=client, retry_config=retries, **config)

        with self._in_words():
            self._sending, self._asking = store(SEND_SECONDS), store(ANSWER_SECONDS)

    def put_folder(
        self,
        job_id: str,
        folder: Path,
        files: Sequence[WrittenFile],
        *,
        sent: Callable[[int], None] = lambda size: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        there = self.files(job_id)
        *others, last = lock_last(files)
        ended = threading.Event()
        pool, futures = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="store"), set[Future[None]]()

        def put(file: WrittenFile) -> None:
            key = f"{job_id}/{file.path}"
            try:
                if there.get(file.path) == file.size and self._digest(key) == file.sha256:
                    sent(file.size)
                else:
                    self._put(key, folder / file.path, file, sent, ended)
            except OSError as error:
                raise StorageFailed(f"{file.path} cannot be put into {self.place}: {error}") from error

        try:
            for batch in (others, [last]):
                if stop():
                    raise Canceled("storing the artifact was canceled")
                futures = {pool.submit(put, file) for file in batch}
                _wait_for(futures, stop)
        finally:
            # Parts that were sent are taken back; a request that hangs is not waited for: whoever canceled waits.
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            wait(futures, timeout=STOP_SECONDS)

    def _put(
        self, key: str, source: Path, file: WrittenFile, sent: Callable[[int], None], ended: threading.Event
    ) -> None:
        def chunks() -> Iterator[bytes]:
            with source.open("rb") as reader:
                while chunk := reader.read(CHUNK):
                    if ended.is_set():
                        # Raised through the upload, which takes back the parts that it has sent.
                        raise Canceled("storing the artifact was canceled")
                    yield chunk
                    sent(len(chunk))

        part = max(PART, file.size // (MOST_PARTS - 1))
        attributes = {_DIGEST: file.sha256, "Content-Type": "application/octet-stream"}
        with self._in_words():
            obstore.put(
                self._sending,
                key,
                chunks() if file.size > PART else b"".join(chunks()),
                attributes=attributes,
                chunk_size=part,
                max_concurrency=PARTS_AT_ONCE,
            )

    def files(self, job_id: str) -> dict[str, int]:
        with self._in_words():
            pages = obstore.list(self._asking, prefix=job_id)
            return {found["path"].partition("/")[2]: found["size"] for page in pages for found in page}

    def read(self, job_id: str, path: str, start: int, end: int) -> Iterator[bytes]:
        with self._in_words():
            if start >= end:
                obstore.head(self._asking, f"{job_id}/{path}")
                return iter(())
            found = obstore.get(self._asking, f"{job_id}/{path}", options={"range": (start, end)})

        def chunks() -> Iterator[bytes]:
            with self._in_words():
                for chunk in found.stream(min_chunk_size=CHUNK):
                    yield bytes(chunk)

        return chunks()

    def delete(self, job_id: str) -> None:
        with self._in_words():
            for page in obstore.list(self._asking, prefix=job_id):
                obstore.delete(self._asking, [found["path"] for found in page])

    def list(self) -> Iterator[str]:
        with self._in_words():
            yield from obstore.list_with_delimiter(self._asking)["common_prefixes"]

    def link(self, job_id: str, path: str, seconds: float) -> str | None:
        with self._in_words():
            return obstore.sign(self._asking, "GET", f"{job_id}/{path}", timedelta(seconds=seconds))

    def _digest(self, key: str) -> str | None:
        with self._in_words():
            found = obstore.get(self._sending, key, options={"head": True})
            return found.attributes.get(_DIGEST)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """What the store said, without what it repeats of the request: a key and a signature may be among it."""
        try:
            yield
        except (BaseError, FileNotFoundError, PermissionError) as error:
            said = re.search(r"<Code>(\w+)</Code>", str(error))
            code = said.group(1) if said else ""
            if isinstance(error, (NotFoundError, FileNotFoundError)) and code != "NoSuchBucket":
                raise FileNotFoundError(f"there is no such object in {self.place}") from None
            raise StorageFailed(f"{self.place} cannot be used: {self._reason(error, code)}") from None

    def _reason(self, error: Exception, code: str) -> str:
        if code == "NoSuchBucket":
            return f"there is no bucket {self.bucket} (WEIGHTSMITH_ARTIFACTS)"
        if "Missing" in str(error) and "AccessKey" in str(error):
            return "no key was given (WEIGHTSMITH_S3_ACCESS_KEY_ID and WEIGHTSMITH_S3_SECRET_ACCESS_KEY)"
        status = re.search(r"status code: (\d{3})", str(error))
        if status and status.group(1) in ("401", "403"):
            return f"the store refuses the key, {code or 'without a reason'} (WEIGHTSMITH_S3_ACCESS_KEY_ID)"
        if status:
            return f"the store answered {status.group(1)} {code}".rstrip()
        first = str(error).partition("\n")[0]
        return re.sub(r".* - ", "", first) if " - " in first else first[:200]


def _wait_for(futures: set[Future[None]], stop: Callable[[], bool]) -> None:
    """Wait for all, or for the first that fails, or until `stop` says so."""
    waiting = futures
    while waiting:
        done, waiting = wait(waiting, timeout=0.1, return_when="FIRST_EXCEPTION")
        for future in done:
            future.result()
        if waiting and stop():
            raise Canceled("storing the artifact was canceled")
