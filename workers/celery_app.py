"""The Celery app and its options. Imports no torch: a forked child that inherits torch's threads hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from celery import Celery
from celery.signals import setup_logging, worker_init, worker_ready

from workers import broker
from workers.logs import bind_process, configure_logs
from workers.settings import SUPERVISOR_VARIABLE, WORKER_VARIABLE, Settings

PARENT_SECONDS = 1.0
TASKS_PER_CHILD = 100
"""How many jobs a child may run one after the other. Importing torch costs ten times what a small merge does."""
CHILD_BYTES = 400 * 2**20
"""A child that ever took more ends with its job: the plan of the next one counts on no more (`memory.FLOOR_BYTES`)."""
REPLACE_SECONDS = 0.2


def make_celery(settings: Settings) -> Celery:
    """A Celery app on Redis where `REDIS_URL` is set, else on kombu's filesystem broker in the data folder.

    No result backend: the job's row in the database is the truth, a message only says that it is worth a look.
    """
    broker.mend()
    if settings.redis_url:
        url, options = (
            _redis_broker(settings.redis_url),
            {"visibility_timeout": 86_400, "socket_connect_timeout": 3, "socket_timeout": 5},
        )
    else:
        url, options = "filesystem://localhost", _filesystem_options(settings)
    app = Celery("weightsmith", broker=url, include=["workers.tasks"])
    app.conf.update(
        broker_transport_options=options,
        broker_connection_retry_on_startup=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        worker_max_tasks_per_child=TASKS_PER_CHILD,
        worker_max_memory_per_child=CHILD_BYTES // 1024,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app


def _redis_broker(url: str) -> str:
    """The URL as kombu understands it, which names sockets otherwise and believes any TLS certificate unless told."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "unix":
        query = {"virtual_host": query.pop("db", "0"), **query}
        return f"redis+socket://{parts.netloc}{parts.path}?{urlencode(query)}"
    if parts.scheme == "rediss":
        query = {"ssl_cert_reqs": "required", **query}
    return urlunsplit(parts._replace(query=urlencode(query)))


def _filesystem_options(settings: Settings) -> dict[str, Any]:
    queue = str(settings.broker / "queue")
    return {
        "data_folder_in": queue,
        "data_folder_out": queue,
        "control_folder": str(settings.broker / "control"),
        "polling_interval": 0.1,
    }


@setup_logging.connect
def _log(**_: object) -> None:
    configure_logs(Settings(), "worker")
    bind_process(worker=os.environ.get(WORKER_VARIABLE))


@worker_init.connect
def _before_forking(**_: object) -> None:
    Settings().prepare()
    # Billiard makes a folder for files that it unlinks at once; a worker that is killed would leave it behind.
    multiprocessing.current_process()._config["tempdir"] = tempfile.gettempdir()  # type: ignore[attr-defined]
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the worker forked; its children would hang")
    if supervisor := os.environ.get(SUPERVISOR_VARIABLE):
        threading.Thread(target=_die_with, args=(int(supervisor),), name="parent", daemon=True).start()


@worker_ready.connect
def _replace_children_soon(sender: Any, **_: object) -> None:
    """Celery learns at once that a child has ended, but not that it is gone, for which it looks every five seconds on
    Redis. A child that grew ends with its job, and the next job would wait for its successor.
    """
    if sender.hub is not None and not hasattr(sender.pool, "replacing"):
        sender.pool.replacing = sender.hub.call_repeatedly(REPLACE_SECONDS, sender.pool.maintain_pool)


def _die_with(supervisor: int) -> None:
    """End the worker and its children when its supervisor is gone, however that went."""
    while os.getppid() == supervisor:
        time.sleep(PARENT_SECONDS)
    os.killpg(os.getpgid(0), signal.SIGKILL)


celery_app = make_celery(Settings())
