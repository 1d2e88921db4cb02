"""Signing in with an API key, and out."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.responses import Response

from app import sessions
from app.deps import QueueDep, SettingsDep
from app.pages.rendering import PageDep
from workers.credentials import NoSecretKey
from workers.keys import KeyRing

router = APIRouter()


@router.get("/sign-in")
def ask(page: PageDep, next: str = "/") -> HTMLResponse:  # noqa: A002
    """The form."""
    return page("sign_in.html", next=_inside(next), error="")


@router.post("/sign-in")
async def sign_in(
    request: Request,
    page: PageDep,
    queue: QueueDep,
    settings: SettingsDep,
    key: Annotated[str, Form(max_length=200)] = "",
    next: Annotated[str, Form()] = "/",  # noqa: A002
) -> Response:
    """Begin a session, and go where one wanted to go."""
    secret = key.strip()
    if await run_in_threadpool(KeyRing(queue.store).known, secret) is None:
        error = "This key is not good: it is unknown, revoked or expired."
        return page("sign_in.html", status=401, next=_inside(next), error=error)
    response = RedirectResponse(_inside(next), 303)
    try:
        sessions.begin(response, settings, secret, is_https=request.url.scheme == "https")
    except NoSecretKey as error:
        return page("sign_in.html", status=500, next=_inside(next), error=f"Nobody can sign in here: {error}")
    return response


@router.post("/sign-out")
def sign_out() -> Response:
    """End the session."""
    response = RedirectResponse("/sign-in", 303)
    sessions.end(response)
    return response


def _inside(address: str) -> str:
    """Where to go on: a path of ours, or the start."""
    told = urlsplit(address)
    is_ours = not told.scheme and not told.netloc and address.startswith("/") and address[1:2] not in ("/", "\\")
    return address if is_ours and address.isprintable() else "/"
