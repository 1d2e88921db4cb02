"""Who signed in on the page: their API key, sealed in a cookie that no script can read.

Nothing is kept here: a key that is revoked or expires ends every session that it began.
"""

from __future__ import annotations

import time

from cryptography.fernet import InvalidToken
from starlette.requests import HTTPConnection
from starlette.responses import Response

from workers.credentials import seal_of
from workers.settings import Settings

COOKIE = "weightsmith"
SECONDS = 12 * 3600
"""After which one signs in again."""


def begin(response: Response, settings: Settings, secret: str, *, is_https: bool) -> None:
    """Give a browser its session. Raises `NoSecretKey`."""
    sealed = seal_of(settings).encrypt_at_time(secret.encode(), int(time.time())).decode()
    response.set_cookie(COOKIE, sealed, SECONDS, httponly=True, samesite="lax", secure=is_https)


def end(response: Response) -> None:
    """Take it away."""
    response.delete_cookie(COOKIE, httponly=True, samesite="lax")


def secret_in(connection: HTTPConnection, settings: Settings) -> str | None:
    """The API key of the session that a request belongs to; None: to none that is good. Raises `NoSecretKey`."""
    sealed = connection.cookies.get(COOKIE)
    if sealed is None:
        return None
    try:
        return seal_of(settings).decrypt(sealed.encode(), ttl=SECONDS).decode()
    except (InvalidToken, ValueError):
        return None
