"""Servers of others, for tests: they write down what arrives and answer as they are told."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Received:
    """A server that writes down what arrives, and answers as it is told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda handler: plain_answer(handler, 200)
        received = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                received.requests.append((self.path, headers, body))
                self.message = (headers, body)
                received.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port


def plain_answer(handler: BaseHTTPRequestHandler, status: int, headers: Sequence[tuple[str, str]] = ()) -> None:
    handler.send_response(status)
    for name, value in (*headers, ("Content-Length", "0")):
        handler.send_header(name, value)
    handler.end_headers()


@contextmanager
def receiving(context: ssl.SSLContext | None = None) -> Iterator[Received]:
    received = Received()
    if context is not None:
        received.server.socket = context.wrap_socket(received.server.socket, server_side=True)
    thread = threading.Thread(target=received.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield received
    finally:
        received.server.shutdown()
        received.server.server_close()
        thread.join()
