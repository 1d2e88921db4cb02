"""How the service stops: at once for whoever sends something new, in a few seconds for whoever waits."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

if TYPE_CHECKING:
    from workers.supervisor import Supervisor

GRACE_SECONDS = 3
"""For answers that are being sent; a download that takes longer is gone on with by its client's next range."""
log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn that stops its workers while it stops itself, and lets go of those who only wait.

    The first SIGTERM or SIGINT: no more connections, the job at work is queued again, answers are finished, streams
    end. The second: everything ends now, as after `kill -9`.
    """

    def __init__(self, app: FastAPI, host: str, port: int, supervisor: Supervisor) -> None:
        # Logs are set up already, and requests logged by `app.requests`.
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                # By then nobody is connected any more.
                timeout_graceful_shutdown=GRACE_SECONDS + 1,
            )
        )
        self._app, self._supervisor = app, supervisor

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            end_now(self._supervisor, sig)
        threading.Thread(target=self._supervisor.stop, name="stopping").start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # There is none where the service did not get so far as to open its database.
        if (watch := getattr(self._app.state, "watch", None)) is not None:
            await watch.close()
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._hang_up)
        await super().shutdown(sockets)

    def _hang_up(self) -> None:
        """Cut the connections that are left, which ends their answers as a client that leaves does."""
        if left := list(self.server_state.connections):
            log.info("%d answers were cut: their clients read too slowly", len(left))
        for connection in left:
            if connection.transport is not None:
                connection.transport.abort()


def end_now(supervisor: Supervisor, number: int) -> None:
    """End this process and its workers, with nothing said to anybody."""
    supervisor.kill()
    os._exit(128 + number)
