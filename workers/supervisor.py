"""Keeps one worker process running, and the reaper beside it.

A child of its own process group: when it dies, whatever it left behind is ended too, its jobs are given back at once,
and a new one starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid

from workers import alive
from workers.celery_app import make_celery
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
    """Starts a Celery worker for `settings` and keeps it alive until `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self._name, self._started, self._failures = "", 0.0, 0
        self._reported = -alive.REPORT_SECONDS
        self._dead: set[str] = set()
        self._store = JobStore(settings)
        self._queue = Queue(self._store, make_celery(settings))
        self._janitor = Janitor(self._store, self._queue.artifacts)
        self._courier = Courier(self._store, Guard(settings.webhook_allow))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        self._start_worker()
        self._thread.start()
        self._courier.start()

    def stop(self) -> None:
        """End the worker; a job that it was at is queued again and goes on where it was."""
        self._stopping.set()
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                log.info("the worker is at a job, which goes on where it is when a worker starts again")
            self._end_worker()
        self._thread.join(STOP_SECONDS)
        self._courier.stop()
        try:
            self._give_back(died=False)
            alive.take_leave(self._store, self._name)
        finally:
            self._store.close()

    def wait(self) -> None:
        """Block until `stop`."""
        self._stopping.wait()

    def _start_worker(self) -> None:
        self._name, self._started = f"worker-{uuid.uuid4().hex[:12]}", time.monotonic()
        # The warning against running as root is about pickled messages; ours are JSON.
        quiet = ["-W", "ignore::UserWarning:celery.platforms"]
        celery = ["-m", "celery", "--quiet", "--app", "workers.celery_app", "worker"]
        options = ["--hostname", f"{self._name}@%h", "--loglevel", "ERROR", "--without-gossip", "--without-mingle"]
        command = [sys.executable, *quiet, *celery, *options]
        # What Celery has to say goes to stderr; on stdout it only takes its leave.
        self.process = subprocess.Popen(
            command, env=self._environment(), stdout=subprocess.DEVNULL, start_new_session=True
        )

    def _environment(self) -> dict[str, str]:
        ours = {
            WORKER_VARIABLE: self._name,
            SUPERVISOR_VARIABLE: str(os.getpid()),
            # SIGTERM stops the worker without waiting for the job, which another attempt continues.
            "REMAP_SIGTERM": "SIGQUIT",
        }
        return os.environ | self.settings.environment() | ours

    def _watch(self) -> None:
        while not self._stopping.wait(REAP_SECONDS):
            # Whatever goes wrong here, a locked database or a full process table, is tried again.
            try:
                self._keep_worker()
                self._give_back(died=True)
                self._report()
                self._queue.reap()
                self._janitor.sweep()
            except Exception:
                log.exception("supervising failed; trying again")

    def _report(self) -> None:
        """Say that the worker lives, now and then."""
        if time.monotonic() - self._reported >= alive.REPORT_SECONDS:
            alive.report(self._store, self._name, device=self.settings.device)
            self._reported = time.monotonic()

    def _keep_worker(self) -> None:
        assert self.process is not None
        hangs = not self._store.is_idle() and self._store.is_silent(f"{self._name}/")
        if self.process.poll() is None and not hangs:
            return
        log.warning("the worker %s; starting another", "hangs" if hangs else f"ended ({self.process.returncode})")
        self._end_worker()
        self._give_back(died=True)
        alive.take_leave(self._store, self._name)
        self._reported = -alive.REPORT_SECONDS
        self._failures = min(self._failures + 1, 8) if time.monotonic() - self._started < STEADY_SECONDS else 0
        if not self._stopping.wait(min(0.2 * 2**self._failures, 30)):
            self._start_worker()

    def _end_worker(self) -> None:
        """End the worker and whatever is left of its process group."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._dead.add(self._name)

    def _give_back(self, *, died: bool) -> None:
        """Queue again what dead workers of ours held; a name is forgotten only once that has been written."""
        for name in sorted(self._dead):
            self._store.release(f"{name}/", died=died)
            self._dead.discard(name)
