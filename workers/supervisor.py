"""Keeps worker processes running, and the reaper beside them.

Each is a child of its own process group: when it dies, whatever it left behind is ended too, its jobs and units are
given back at once, and a new one starts.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from workers import alive
from workers.celery_app import make_celery
from workers.database import TROUBLE, said
from workers.janitor import Janitor
from workers.jobs import JobStore
from workers.outbound import Guard
from workers.queue import Queue
from workers.settings import SUPERVISOR_VARIABLE, WORKER_VARIABLE, Settings
from workers.webhooks import Courier

REAP_SECONDS = 1.0
STOP_SECONDS = 2.0
STEADY_SECONDS = 60.0
log = logging.getLogger(__name__)


class Supervisor:
    """Starts Celery workers for `settings` and keeps them alive until `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._dead: set[str] = set()
        self._store = JobStore(settings)
        self._queue = Queue(self._store, make_celery(settings))
        self._janitor = Janitor(self._store, self._queue.artifacts)
        self._courier = Courier(self._store, Guard(settings.webhook_allow))
        self._stopping, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self.workers = [_Worker(each) for each in shared_out(settings)]

    def start(self) -> None:
        for worker in self.workers:
            worker.start()
        self._thread.start()
        self._courier.start()

    def stop(self) -> None:
        """End the workers; jobs that they were at are queued again and go on where they were. Once is enough, and
        whoever calls it again waits for the first.
        """
        with self._ending:
            self._stop()

    def kill(self) -> None:
        """End the workers at once. Their jobs are queued again when their leases run out."""
        for worker in self.workers:
            worker.kill()

    def _stop(self) -> None:
        if self._stopping.is_set():
            return
        self._stopping.set()
        # A round that saw a worker end now would take that for a death.
        self._thread.join(STOP_SECONDS / 2)
        for worker in self.workers:
            worker.terminate()
        until = time.monotonic() + STOP_SECONDS
        for worker in self.workers:
            if not worker.has_ended(within=max(0.0, until - time.monotonic())):
                log.info("a worker is at a job, which goes on where it is when a worker starts again")
            self._end(worker)
        try:
            self._give_back(died=False)
        except TROUBLE as error:
            log.warning("what its worker held is given back when its lease runs out: %s", said(error))
        finally:
            self._courier.stop()
            self._store.close()

    def hears_broker(self) -> bool:
        """Whether the broker answers; without it jobs wait."""
        return self._queue.broker_is_reachable()

    def wait(self) -> None:
        """Block until `stop`."""
        self._stopping.wait()

    def _watch(self) -> None:
        while not self._stopping.wait(REAP_SECONDS):
            # Whatever goes wrong here, a locked database or a full process table, is tried again.
            try:
                for worker in self.workers:
                    self._keep(worker)
                self._give_back(died=True)
                self._report()
                self._queue.reap()
                self._janitor.sweep()
            except TROUBLE as error:
                log.warning("the database cannot be used, trying again: %s", said(error))
            except Exception:
                log.exception("supervising failed; trying again")

    def _report(self) -> None:
        """Say that the workers live, now and then."""
        for worker in self.workers:
            if worker.is_running and time.monotonic() - worker.reported >= alive.REPORT_SECONDS:
                alive.report(self._store, worker.name, device=worker.device)
                worker.reported = time.monotonic()
                self._show_life()

    def _show_life(self) -> None:
        """Touch the file by which a container's health is known, if all workers live; the database has heard of it."""
        if self.settings.alive_file is not None and all(worker.is_running for worker in self.workers):
            self.settings.alive_file.touch()

    def _keep(self, worker: _Worker) -> None:
        """Start a worker again that has ended, later the more often it did."""
        if worker.is_running:
            if self._store.is_idle() or not self._store.is_silent(f"{worker.name}/"):
                return
            log.warning("a worker hangs; starting another")
        elif not worker.is_over:
            log.warning("a worker ended (%s); starting another", worker.status)
        if not worker.is_over:
            self._end(worker)
            self._give_back(died=True)
        if worker.is_due and not self._stopping.is_set():
            worker.start()

    def _end(self, worker: _Worker) -> None:
        worker.end()
        self._dead.add(worker.name)

    def _give_back(self, *, died: bool) -> None:
        """Give back what dead workers of ours held; a name is forgotten only once that has been written."""
        for name in sorted(self._dead):
            self._store.release(f"{name}/", died=died)
            alive.take_leave(self._store, name)
            self._dead.discard(name)


class _Worker:
    """One Celery worker with the one child that runs tasks; each time it is started it has another name.

    `is_over`: nothing of it is left.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment, self.device = environment, environment["WEIGHTSMITH_DEVICE"]
        self._process: subprocess.Popen[bytes] | None = None
        self.name, self.reported, self.is_over = "", 0.0, True
        self._started, self._due, self._failures = 0.0, 0.0, 0

    def start(self) -> None:
        self.name, self._started = f"worker-{uuid.uuid4().hex[:12]}", time.monotonic()
        self.reported, self.is_over = -alive.REPORT_SECONDS, False
        # The warning against running as root is about pickled messages; ours are JSON.
        quiet = ["-W", "ignore::UserWarning:celery.platforms"]
        celery = ["-m", "celery", "--quiet", "--app", "workers.celery_app", "worker"]
        options = ["--hostname", f"{self.name}@%h", "--loglevel", "ERROR", "--without-gossip", "--without-mingle"]
        command = [sys.executable, *quiet, *celery, *options]
        ours = {
            WORKER_VARIABLE: self.name,
            SUPERVISOR_VARIABLE: str(os.getpid()),
            # SIGTERM stops the worker without waiting for the job, which another attempt continues.
            "REMAP_SIGTERM": "SIGQUIT",
        }
        environment = os.environ | self._environment | ours
        # What Celery has to say goes to stderr; on stdout it only takes its leave.
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)

    @property
    def status(self) -> int | None:
        return None if self._process is None else self._process.returncode

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def is_due(self) -> bool:
        """Whether it may be started again."""
        return time.monotonic() >= self._due

    def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def has_ended(self, *, within: float) -> bool:
        try:
            return self._process is None or self._process.wait(within) is not None
        except subprocess.TimeoutExpired:
            return False

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """End the worker and whatever is left of its process group."""
        if self._process is None:
            return
        self.kill()
        self._process.wait()
        self.is_over = True
        now = time.monotonic()
        self._failures = min(self._failures + 1, 8) if now - self._started < STEADY_SECONDS else 0
        self._due = now + min(0.2 * 2**self._failures, 30)


def shared_out(settings: Settings) -> list[Mapping[str, str]]:
    """The environment of each worker: on a GPU of its own where they compute on GPUs, with its share of the cores."""
    gpus = visible_gpus() if settings.device in ("cuda", "auto") else []
    count = settings.workers if settings.workers is not None else max(1, len(gpus))
    threads = settings.threads or (max(1, len(os.sched_getaffinity(0)) // count) if count > 1 else None)
    common = settings.model_copy(update={"threads": threads})
    if not gpus:
        return [common.environment()] * count
    on_gpu = common.model_copy(update={"device": "cuda"}).environment()
    return [{**on_gpu, "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(count)]


def visible_gpus() -> list[str]:
    """The GPUs that processes of ours may use, as CUDA names them; found without CUDA, which must not be begun here."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = [part.strip() for part in named.split(",")]
        # What follows a number that is none is not visible.
        return list(itertools.takewhile(lambda gpu: gpu not in ("", "-1"), gpus))
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted(filter(str.isdecimal, numbers), key=int)
