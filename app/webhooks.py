"""The webhook that a request asks for, in headers: the document stays as others write it, and an address that is a
secret in itself stays out of query strings, which are logged everywhere.
"""

# No `from __future__ import annotations`: FastAPI reads the annotations of dependencies.

from typing import Annotated, Any

from fastapi import Depends, Header, Request

from app.deps import SettingsDep
from app.errors import HttpProblem
from workers.outbound import MAX_URL, ForbiddenAddress, Guard
from workers.signing import NoSigningKey, Signer
from workers.webhooks import EVENTS

_NAMES = tuple(EVENTS.values())


def _webhook(
    request: Request,
    settings: SettingsDep,
    webhook_url: Annotated[
        str | None,
        Header(max_length=MAX_URL, description="where to POST what becomes of the job (Standard Webhooks); https"),
    ] = None,
    webhook_events: Annotated[
        str | None,
        Header(
            max_length=200, description=f"which of {', '.join(_NAMES)} to tell, with commas; all of them unless given"
        ),
    ] = None,
) -> dict[str, Any] | None:
    events = list(dict.fromkeys((webhook_events or ",".join(_NAMES)).replace(",", " ").lower().split()))
    if webhook_url is None:
        if webhook_events is not None:
            raise _wrong("webhook-events", "there is no Webhook-Url to tell anything to")
        return None
    if unknown := [name for name in events if name not in _NAMES]:
        raise _wrong("webhook-events", f"there is no event {unknown[0][:60]!r}; there are {', '.join(_NAMES)}")
    guard = request.app.state.guard
    assert isinstance(guard, Guard)
    try:
        guard.check(webhook_url)
        Signer(settings)
    except (ForbiddenAddress, NoSigningKey) as error:
        raise _wrong("webhook-url", str(error)) from None
    return {"url": webhook_url, "events": events}


def _wrong(header: str, detail: str) -> HttpProblem:
    place = {"pointer": f"#/header/{header}", "detail": detail}
    return HttpProblem("invalid-request", f"{header}: {detail}", errors=[place])


WebhookDep = Annotated[dict[str, Any] | None, Depends(_webhook)]
"""Where to tell what of a job, as its row has it: `url` and `events`; None if nobody asked."""
