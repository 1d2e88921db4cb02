"""What happens to a job, as it happens, over connections that may break."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2

from app.client.errors import NotWeightsmith, ServiceError, Unreachable
from app.client.objects import FINISHED, Event
from app.client.transport import TRY_AGAIN, Transport

LASTING_SECONDS = 5.0
"""A stream that went on for so long was ended by a service that lets none go on for ever."""
SILENCE_SECONDS = 60.0
"""The service sends a comment every few seconds; a connection silent for so long is dead."""


def follow(transport: Transport, path: str, after: int) -> Iterator[Event]:
    """The events since number `after`, until the job has ended. Each kept event comes once, in order, also where the
    connection broke between.
    """
    patience = transport.patience()
    ended = False
    while True:
        opened = time.monotonic()
        try:
            for event in _connect(transport, path, after):
                patience.renew()
                if event.seq is not None and event.seq < after:
                    continue
                if event.seq == after:
                    # What is not kept comes without a number, and so with that of the event before it.
                    event = replace(event, seq=None)
                after = event.seq or after
                ended = ended or event.kind == "done" or event.data.get("status") in FINISHED
                yield event
                if event.kind == "done":
                    return
            if ended:
                return
            if time.monotonic() - opened > LASTING_SECONDS:
                patience.renew()
            raise Unreachable(f"{transport.url} ended the stream of events before the job's end")
        except _NothingMore:
            return
        except ServiceError as error:
            if ended:
                return
            status = getattr(error, "status", None)
            if isinstance(error, NotWeightsmith) or (status is not None and status not in TRY_AGAIN):
                raise
            patience.spend(error)


class _NothingMore(Exception):
    """The job ended, and all its events were sent before."""


def _connect(transport: Transport, path: str, after: int) -> Iterator[Event]:
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    if after:
        headers["Last-Event-ID"] = str(after)
    timeout = httpx2.Timeout(transport.timeout, read=SILENCE_SECONDS)
    with transport.stream("GET", path, headers=headers, timeout=timeout) as response:
        if response.status_code == 204:
            raise _NothingMore
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise NotWeightsmith(f"{transport.url} sends no events there; is it the right address?")
        for sent in httpx2.EventSource(response):
            if sent.data:
                yield Event.of(_data(sent))


def _data(sent: httpx2.ServerSentEvent) -> dict[str, Any]:
    try:
        data = json.loads(sent.data)
    except ValueError:
        data = {"text": sent.data}
    if not isinstance(data, dict):
        data = {"value": data}
    number = int(sent.id) if sent.id.isascii() and sent.id.isdecimal() else None
    return {"kind": sent.event, "seq": number, "at": data.pop("at", None), "data": data}
