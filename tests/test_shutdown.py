"""Stopping is quick, whatever the service is at, and costs nobody anything."""

from __future__ import annotations

import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import method_recipe, write_checkpoint
from tests.services import Service, eventually, is_alive, running_service

pytestmark = [pytest.mark.xdist_group("service"), pytest.mark.faults]
SLOWLY = {"WEIGHTSMITH_KERNELS": "plain"}
HANDED_BACK = 3.0
GONE = 10.0
"""After so long `docker stop` kills."""


@pytest.fixture(scope="module")
def one_large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one tensor that takes seconds to merge by plain kernels."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        generator = torch.Generator().manual_seed(seed)
        write_checkpoint(folder / name, {"w": torch.randn(6000, 4000, generator=generator).bfloat16()})
    return folder


def row(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    """A job as the database has it, which can be asked while the service is not there."""
    with closing(sqlite3.connect(service.data / "jobs.sqlite", timeout=10)) as database:
        database.row_factory = sqlite3.Row
        return dict(database.execute("SELECT * FROM jobs WHERE id = ?", (job["id"],)).fetchone())


def running(service: Service) -> dict[str, Any]:
    """A job in the middle of its tensor."""
    job = service.post(method_recipe("ties-paper"))
    eventually(lambda: service.job(job)["progress"].get("bytes_read", 0) > 0)
    return job


@contextmanager
def stalled(service: Service, path: str) -> Iterator[socket.socket]:
    """A client that asks for something and reads no more than the beginning of it."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
        assert client.recv(16).startswith(b"HTTP/1.1 200")
        yield client


def seconds_until(what: Callable[[], Any], patience: float = 30) -> float:
    started = time.monotonic()
    eventually(what, patience)
    return time.monotonic() - started


def test_a_running_job_is_handed_back_at_once_and_goes_on_where_it_was(one_large: Path, tmp_path: Path) -> None:
    with running_service(tmp_path / "data", one_large, **SLOWLY) as service:
        job = running(service)
        service.process.send_signal(signal.SIGTERM)
        assert seconds_until(lambda: row(service, job)["state"] == "queued") < HANDED_BACK
        assert seconds_until(lambda: service.process.poll() is not None) < GONE
        assert service.process.returncode == 0
        assert row(service, job)["deaths"] == 0 and row(service, job)["holder"] is None
    with running_service(tmp_path / "data", one_large) as service:
        assert service.ended(job)["status"] == "succeeded" and service.job(job)["attempt"] == 2
        whole = merge(Recipe.from_data(job["recipe"]), tmp_path / "whole", roots=[one_large])
        assert service.files(job) == {file.path: file.sha256 for file in whole.files}


@pytest.mark.parametrize("asked", ["files/model.safetensors", "events"])
def test_a_client_that_hangs_holds_nobody_up(one_large: Path, tmp_path: Path, asked: str) -> None:
    with running_service(tmp_path / "data", one_large) as service:
        job = service.post(method_recipe("linear"))
        ended = service.ended(job) if asked != "events" else job
        with stalled(service, f"{ended['urls']['self']}/{asked}"):
            service.process.send_signal(signal.SIGTERM)
            eventually(lambda: not accepts(service), GONE)
            assert seconds_until(lambda: service.process.poll() is not None) < GONE
        assert service.process.returncode == 0
        assert '"level": "error"' not in service.log.read_text()


def accepts(service: Service) -> bool:
    host, port = service.url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_the_second_signal_ends_everything_at_once(one_large: Path, tmp_path: Path) -> None:
    with running_service(tmp_path / "data", one_large, **SLOWLY) as service:
        done = service.ended(service.post({**method_recipe("linear"), "limits": {"threads": 1}}))
        running(service)
        workers = service.worker_processes()
        with stalled(service, f"{done['urls']['self']}/files/model.safetensors"):
            service.process.send_signal(signal.SIGTERM)
            eventually(lambda: not accepts(service))  # two signals that come at once are one
            service.process.send_signal(signal.SIGTERM)
            assert seconds_until(lambda: service.process.poll() is not None) < 1.5
        assert workers
        eventually(lambda: not any(is_alive(worker) for worker in workers), 3)
