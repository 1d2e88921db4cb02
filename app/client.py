"""A small client of the service, for `weightsmith submit`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from merge_core.errors import WeightsmithError
from merge_core.progress import Progress

POLL_SECONDS = 0.5
RETRIES = 5


class ServiceError(WeightsmithError):
    """The service refused, failed, or cannot be reached."""

    code = "service-error"
    title = "The service did not do it"


class Client:
    """Speaks to one service."""

    def __init__(self, url: str) -> None:
        # A proxy has no way to this machine's own addresses.
        try:
            local = httpx2.URL(url).host in ("127.0.0.1", "localhost", "::1")
            self._http = httpx2.Client(base_url=url, timeout=60, trust_env=not local)
        except httpx2.InvalidURL as error:
            raise ServiceError(f"{url} is no address: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, document: bytes, kind: str = "merges") -> dict[str, Any]:
        """POST a document (YAML or JSON) to the jobs of this kind, such as a recipe to `merges`; the job."""
        return self._call("POST", f"/v1/{kind}", content=document, headers={"Content-Type": "application/yaml"})

    def wait(self, job: dict[str, Any], report: Callable[[Progress], None] = lambda progress: None) -> dict[str, Any]:
        """Poll until the job has ended. Raises `ServiceError` unless it succeeded."""
        while True:
            job = self._call("GET", job["urls"]["self"], retries=RETRIES)
            done = job["progress"]
            report(
                Progress(
                    phase=job["phase"] or job["status"],
                    tensors_done=done.get("tensors_done", 0),
                    tensors_total=done.get("tensors_total", 0),
                    bytes_read=done.get("bytes_read", 0),
                    bytes_read_total=done.get("bytes_read_total", 0),
                    bytes_written=done.get("bytes_written", 0),
                    bytes_written_total=done.get("bytes_written_total", 0),
                )
            )
            if job["status"] == "succeeded":
                return job
            if job["status"] in ("failed", "canceled"):
                why = (job["error"] or {}).get("detail", "")
                raise ServiceError(f"{job['id']} {job['status']}{f': {why}' if why else ''}")
            time.sleep(POLL_SECONDS)

    def download(self, job: dict[str, Any], folder: Path) -> list[Path]:
        """Every file of a finished job, each appearing only once its sha256 is right."""
        folder.mkdir(parents=True, exist_ok=True)
        return [self._fetch(file, folder) for file in self._call("GET", job["urls"]["files"])["data"]]

    def _fetch(self, file: dict[str, Any], folder: Path) -> Path:
        target = folder / Path(file["path"]).name
        partial = target.with_name(f".{target.name}.partial")
        digest = hashlib.sha256()
        try:
            with self._http.stream("GET", file["url"]) as response, partial.open("wb") as stream:
                if not response.is_success:
                    response.read()
                    raise _refused(response)
                for data in response.iter_bytes():
                    digest.update(data)
                    stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            if digest.hexdigest() != file["sha256"]:
                raise ServiceError(f"{file['path']} arrived damaged (its sha256 differs); download it again")
            partial.rename(target)
        except httpx2.HTTPError as error:
            raise ServiceError(f"{file['path']} did not arrive: {error}") from None
        finally:
            partial.unlink(missing_ok=True)
        return target

    def _call(self, verb: str, path: str, *, retries: int = 0, **options: Any) -> dict[str, Any]:
        for attempt in range(retries + 1):
            try:
                response = self._http.request(verb, path, **options)
                break
            except httpx2.HTTPError as error:
                if attempt == retries:
                    raise ServiceError(
                        f"{self._http.base_url} cannot be reached: {error}; is `weightsmith serve` running?"
                    ) from None
                time.sleep(POLL_SECONDS * 2**attempt)
        if not response.is_success:
            raise _refused(response)
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"id", "data"} & set(found):
            raise ServiceError(f"{self._http.base_url} does not answer like Weightsmith; is it the right address?")
        return found


def _refused(response: httpx2.Response) -> ServiceError:
    try:
        body = response.json()
        return ServiceError(f"{body['title']}: {body['detail']}")
    except (ValueError, KeyError, TypeError):
        return ServiceError(f"the service answered {response.status_code}")
