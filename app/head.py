"""HEAD wherever GET is."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

IS_HEAD = "weightsmith.is_head"


def is_head(request: Request) -> bool:
    """Whether only the headers are asked for."""
    return bool(request.scope.get(IS_HEAD))


class HeadAsGet:
    """Answers HEAD as GET without the body; a route whose body is costly looks for `IS_HEAD` in the scope."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        asked = {**scope, "method": "GET", IS_HEAD: True}
        try:
            await self._app(asked, receive, send_without_body)
        finally:
            scope["route"] = asked.get("route")  # which the line that tells of the request names
