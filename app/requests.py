"""What holds for every request: its id, its line in the log, how long it took, and a problem if all else fails."""

from __future__ import annotations

import asyncio
import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from app.errors import problem_response
from app.measures import REQUEST_SECONDS
from workers.jobs import new_id
from workers.problems import problem_of

HEADER = "X-Request-ID"
_GIVEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,99}")
log = logging.getLogger(__name__)


class Requests:
    """Gives each request an id, the caller's own if that is plain: 1 to 100 letters, digits and `._:/+=-`.

    The id is in every answer, in every line that is logged meanwhile and on the job that is made. The line that tells
    of a request names its route, never its query, which may hold what is nobody's business.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _GIVEN.fullmatch(given) else new_id("req_")
        with bound_contextvars(request_id=request_id):
            await _Told(scope, request_id, send).run(self.app, receive)


class _Told:
    """One request."""

    def __init__(self, scope: Scope, request_id: str, send: Send) -> None:
        self.scope, self.request_id, self._send = scope, request_id, send
        self.started = time.perf_counter()
        self.status, self.streams = 0, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[HEADER] = self.request_id
            self.streams = headers.get("content-type", "").startswith("text/event-stream")
        await self._send(message)

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        try:
            await app(self.scope, receive, self.send)
        except asyncio.CancelledError:
            # The service stops and could wait no longer. Nobody above has anything to add but a traceback.
            log.warning("cut off", extra=self.about())
        except Exception as error:
            log.exception("unexpected error", exc_info=error, extra=self.about())
            if self.status:
                raise
            answer = problem_response(problem_of("internal-error", "the service's log describes it"))
            await answer(self.scope, receive, self.send)
        finally:
            self.tell()

    def about(self) -> dict[str, str]:
        """The route, as it is written: what is in its place would make as many metrics as there are jobs."""
        return {"method": self.scope["method"], "route": getattr(self.scope.get("route"), "path", "unknown")}

    def tell(self) -> None:
        seconds, about = time.perf_counter() - self.started, self.about()
        # No status: the client left before there was an answer. nginx writes 499 for that.
        status = self.status or 499
        if not self.streams:
            method = about["method"] if about["method"] in _METHODS else "other"
            REQUEST_SECONDS.labels(method, about["route"], str(status)).observe(seconds)
        quiet = about["route"] in _QUIET and status < 400
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            extra={**about, "status": status, "ms": round(seconds * 1000, 1)},
        )


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
"""What asks every few seconds whether all is well."""
