"""Files of data that were sent: what evaluators score on, and what calibrations learn from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from app.client.transport import Transport

_PIECE = 2**20


@dataclass(frozen=True)
class DataFile:
    """A file of data that was sent; documents call it `data:` and its name."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Self:
        """From the service's answer."""
        return cls(found["name"], found["size"], found["sha256"])


class Data:
    """`client.data`: the owner's files of data."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def put(self, file: str | os.PathLike[str], name: str | None = None) -> DataFile:
        """Send a file under a name, by default its own, in place of what had it."""
        path = Path(file)
        headers = {"Content-Type": "application/octet-stream"}
        return DataFile.of(
            self._transport.json("PUT", self._path(name or path.name), content=_Content(path), headers=headers)
        )

    def get(self, name: str) -> DataFile:
        """What there is to tell of one."""
        return DataFile.of(self._transport.json("GET", self._path(name)))

    def list(self) -> Iterator[DataFile]:
        """By name."""
        return map(DataFile.of, self._transport.pages("/v1/data"))

    def delete(self, name: str) -> None:
        """Remove one."""
        self._transport.request("DELETE", self._path(name))

    @staticmethod
    def _path(name: str) -> str:
        return f"/v1/data/{quote(name, safe='')}"


@dataclass(frozen=True)
class _Content:
    """A file's bytes, from the beginning each time that they are sent."""

    path: Path

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as opened:
            while piece := opened.read(_PIECE):
                yield piece
