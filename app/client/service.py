"""What a service can do and how it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from app.client.objects import Method
from app.client.transport import Transport


class Methods:
    """`client.methods`: the merge methods, with each meaning that a name has."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Sequence[Method]:
        return self._read("/v1/methods")

    def get(self, name: str) -> Sequence[Method]:
        """One method, with each meaning of its name."""
        return self._read(f"/v1/methods/{quote(name, safe='')}")

    def _read(self, path: str) -> Sequence[Method]:
        return [Method.of(each) for each in self._transport.many(path)]


class System:
    """`client.system`: the service itself."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get(self) -> dict[str, Any]:
        """Version, limits, workers and disk."""
        return self._transport.json("GET", "/v1/system")

    def is_ready(self) -> bool:
        """Whether the service can do its work now; it is asked once, and not waited for."""
        return self._transport.answers_well("/readyz")
