"""A small real HTTP server that answers as a test says, or breaks off."""

from __future__ import annotations

import http.server
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Asked:
    """One request."""

    verb: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    """What to answer. `breaks_after`: the connection is reset after so many bytes of the body."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    breaks_after: int | None = None

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class NoAnswer(Exception):
    """The request was read; the connection is reset without an answer."""


@dataclass
class Faulty:
    """The server's address, and what was asked of it in order."""

    url: str
    asked: list[Asked]


@contextmanager
def faulty_server(answer: Callable[[Asked], Answer]) -> Iterator[Faulty]:
    """Serve with `answer`, which may raise `NoAnswer`."""
    asked: list[Asked] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 0

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found = Asked(self.command, self.path, headers, body)
            asked.append(found)
            try:
                given = answer(found)
            except NoAnswer:
                self.reset()
                return
            content = given.content
            self.send_response(given.status)
            for name, value in {"Content-Length": str(len(content)), **given.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if given.breaks_after is None:
                self.wfile.write(content)
            else:
                self.wfile.write(content[: given.breaks_after])
                # What was sent is to arrive; a reset would take it back.
                self.connection.shutdown(socket.SHUT_WR)
                self.close_connection = True

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815  as http.server names them

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Faulty(f"http://127.0.0.1:{server.server_port}", asked)
    finally:
        server.shutdown()
        server.server_close()
