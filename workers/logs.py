"""Logs: one JSON object a line from every process of ours, Celery's and uvicorn's records too; pretty on a terminal.

Code logs by the standard library: `log.info("what happened", extra={"job_id": …})`. What holds for everything that a
request or a job logs is bound once, by `bind_request` or `bind_process`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.contextvars import bind_contextvars, get_contextvars, merge_contextvars
from structlog.typing import Processor

from workers.jobs import JobStore, Lease, LeaseLost
from workers.redaction import redact, redact_event
from workers.settings import Settings

OURS = ("app", "workers", "merge_core")
MOST_LINES = 500
"""How many lines of one attempt become events of its job."""
_process: dict[str, Any] = {}
log = logging.getLogger(__name__)


def configure_logs(settings: Settings, process: str) -> None:
    """Send everything that this process logs to stderr; `process` says which of ours it is."""
    bind_process(process=process)
    pretty = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter(pretty=pretty))
    root = logging.getLogger()
    root.handlers = [handler]
    # Others' loggers tell at `info` what they do; ours tell what became of jobs and requests.
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())
    logging.captureWarnings(capture=True)


def bind_process(**values: Any) -> None:
    """Add this to whatever the process logs from now on, in every thread; None takes it out again."""
    for name, value in values.items():
        if value is None:
            _process.pop(name, None)
        else:
            _process[name] = value


def bind_request(**values: Any) -> None:
    """Add this to whatever the request at hand logs from now on."""
    bind_contextvars(**values)


def current_request() -> str | None:
    """The id of the request at hand."""
    return get_contextvars().get("request_id")


@contextmanager
def logs_of(store: JobStore, lease: Lease) -> Iterator[None]:
    """What is logged meanwhile names the job, and becomes events of it."""
    about = {"job_id": lease.job_id, "attempt": lease.attempt, "owner": lease.owner, "request_id": lease.request_id}
    handler = _JobEvents(store, lease)
    bind_process(**about)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        bind_process(**dict.fromkeys(about))


class _JobEvents(logging.Handler):
    """Keeps the lines at info and above as events of a job, so many of one attempt."""

    def __init__(self, store: JobStore, lease: Lease) -> None:
        super().__init__(logging.INFO)
        self._store, self._lease, self._left, self._writing = store, lease, MOST_LINES, False

    def emit(self, record: logging.LogRecord) -> None:
        # What storing a line logs is not stored: there would be no end to it.
        if self._writing or not record.name.startswith(OURS) or self._left < 0:
            return
        message = redact(record.getMessage())[:2000]
        if self._left == 0:
            message = f"after {MOST_LINES} lines, what follows is in the worker's own log alone"
        self._left -= 1
        self._writing = True
        try:
            with contextlib.suppress(LeaseLost):
                self._store.tell(self._lease, "log", {"level": record.levelname.lower(), "message": message})
        except Exception as error:
            log.warning("a line could not be kept as an event of its job: %s", error)
        finally:
            self._writing = False


def _formatter(*, pretty: bool) -> logging.Formatter:
    renderer: list[Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if pretty
        else [structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer(default=str)]
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
            merge_contextvars,
            _of_process,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            redact_event,
            *renderer,
        ],
    )


def _of_process(logger: Any, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    for name, value in _process.items():
        event.setdefault(name, value)
    return event
