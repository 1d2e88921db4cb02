"""A wire that can be cut: a TCP proxy before a broker, a database or the service itself."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Proxy:
    """Passes bytes between whoever connects to `port` and a server of this machine, in a thread of its own."""

    def __init__(self, upstream: int, tls: ssl.SSLContext | None = None) -> None:
        """With `tls`, whoever connects speaks it, and the server behind does not."""
        self.upstream, self.port, self._tls = upstream, 0, tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._wires: set[asyncio.StreamWriter] = set()
        self._is_refusing = self._is_cutting_answers = False
        self._flowing = asyncio.Event()
        self._flowing.set()

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def drop(self) -> None:
        """Cut every connection there is."""
        self._do(self._cut)

    def refuse(self, refusing: bool) -> None:
        """Cut every connection, and each new one at once, until told otherwise."""

        def change() -> None:
            self._is_refusing = refusing
            if refusing:
                self._cut()

        self._do(change)

    def stall(self, stalling: bool) -> None:
        """Keep the connections and let nothing pass, until told otherwise."""
        self._do(self._flowing.clear if stalling else self._flowing.set)

    def cut_answers(self, cutting: bool) -> None:
        """Let requests through and cut the connection at the first byte of an answer, until told otherwise."""

        def change() -> None:
            self._is_cutting_answers = cutting

        self._do(change)

    def _do(self, change: Callable[[], Any]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (change(), done.set()))
        done.wait()

    def _cut(self) -> None:
        for wire in self._wires:
            wire.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_refusing:
            writer.transport.abort()
            return
        try:
            there = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, there[1]}
        self._wires |= both
        try:
            await asyncio.gather(
                self._pass(reader, there[1], is_answer=False), self._pass(there[0], writer, is_answer=True)
            )
        finally:
            self._wires -= both
            for wire in both:
                wire.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                await self._flowing.wait()
                if is_answer and self._is_cutting_answers:
                    break
                writer.write(data)
                await writer.drain()
        writer.transport.abort() if is_answer else writer.close()

    async def _close(self) -> None:
        self._server.close()
        self._flowing.set()
        self._cut()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(tasks, timeout=2) if tasks else None
