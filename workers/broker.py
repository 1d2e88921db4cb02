"""Where kombu's brokers lose their way, put right: nothing else in the project knows how a broker works inside."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kombu.exceptions import ChannelError
from kombu.transport import filesystem, redis, virtual
from kombu.utils.json import dumps


class _Unacked(redis.QoS):
    """Forgets a message that Redis could not be told is done. Kombu's would count it as unfinished for ever, and a
    worker that may have one message at a time would take no other, nor notice that its connection has ended.
    """

    def ack(self, delivery_tag: str) -> None:
        with self._done(delivery_tag):
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        with self._done(delivery_tag):
            super().reject(delivery_tag, requeue)

    @contextlib.contextmanager
    def _done(self, delivery_tag: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            virtual.QoS.ack(self, delivery_tag)
            raise


class _Whole(filesystem.Channel):
    """Lets a message appear when it is whole. Kombu's writes into a file that readers see, and a worker that reads the
    half of one ends.
    """

    def _put(self, queue: str, payload: dict[str, Any], **_: Any) -> None:  # type: ignore[override]  # kombu's own name
        folder = Path(self.data_folder_out)
        growing = folder / f".{uuid.uuid4()}"
        try:
            growing.write_text(dumps(payload))
            # Messages are read in the order of their names.
            growing.rename(folder / f"{round(time.monotonic() * 1000)}_{uuid.uuid4()}.{queue}.msg")
        except OSError as error:
            growing.unlink(missing_ok=True)
            raise ChannelError(f"no message can be added to {folder}: {error}") from error


def mend() -> None:
    """Use these instead of kombu's own."""
    redis.Channel.QoS = _Unacked
    filesystem.Transport.Channel = _Whole
