"""Ranges of a file's bytes from a Hub: asked for until they are there, from wherever the Hub says that they lie."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import httpx2

from merge_core.errors import Canceled
from workers.hub.client import HubClient
from workers.hub.errors import HubGated, HubLied, HubNotAllowed, HubNotFound, HubTokenRefused
from workers.outbound import ForbiddenAddress

PATIENCE = 300.0
"""Seconds for which a file is asked for again and again, while not one byte comes."""
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_ASKED = 0.25, 20.0, 120.0
_HOPS = 5
_EXPIRED = (400, 401, 403, 404, 410)
"""What a link says that is no longer good."""


@dataclass
class RemoteFile:
    """A file of a repository at a commit. `sha256`, where the Hub has one; `name` is what messages call it."""

    repo: str
    commit: str
    path: str
    size: int
    sha256: str | None
    name: str
    link: httpx2.URL | None = field(default=None, repr=False)
    """Where its bytes lie, if that is another place; good for some time. It is signed, so nobody is shown it."""

    def url(self, endpoint: str) -> httpx2.URL:
        return httpx2.URL(f"{endpoint}/{self.repo}/resolve/{self.commit}/{quote(self.path)}")


def never() -> bool:
    """What asks whether to stop, where nothing does."""
    return False


class RangeReader:
    """Reads ranges for many threads. `stop` is asked while it waits, a true answer raises `Canceled`; `received` is
    told of bytes as they come; `patience` is in seconds.
    """

    def __init__(
        self,
        client: HubClient,
        *,
        stop: Callable[[], bool] = never,
        received: Callable[[int], None] = lambda count: None,
        patience: float = PATIENCE,
    ) -> None:
        self._client, self._stop, self._received, self._patience = client, stop, received, patience
        self._ended = threading.Event()

    def read(
        self,
        file: RemoteFile,
        begin: int,
        spaces: Sequence[memoryview],
        filled: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Fill one space after the other with the bytes from `begin` on; `filled` is told how many spaces are full as
        soon as the next one is.

        Raises `Canceled`, or one of `workers.hub.errors`.
        """
        space = _Spaces(spaces, filled)
        failures, fresh, last = 0, 0, time.monotonic()
        while not space.is_full:
            came = 0
            wait: float | None = None
            said = "no answer"
            try:
                at = begin + space.done
                with self._get(file, at, begin + space.size) as answer:
                    wait, said = self._judge(file, answer, at, is_fresh=fresh)
                    if wait is None:
                        said = "its answers break off"
                        for part in answer.iter_raw():
                            self.check()
                            self._received(len(part))
                            space.put(memoryview(part))
                            came += len(part)
                            if space.is_full:
                                return
            except _Expired:
                file.link, fresh = None, fresh + 1
                continue
            except ForbiddenAddress as error:
                raise HubNotAllowed(file.name, f"leads to an address that is not called from here: {error}") from None
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
                said = type(error).__name__
            now = time.monotonic()
            if came:
                failures, fresh, last = 0, 0, now
                continue
            failures += 1
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (failures - 1)) * random.uniform(0.8, 1.2)  # noqa: S311
            pause = max(pause, wait or 0.0)
            if now - last + pause > self._patience:
                raise self._client.unavailable(file.name, said)
            self.pause(pause)

    def pause(self, seconds: float) -> None:
        """Wait, unless it is all over. Raises `Canceled`."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            self._ended.wait(min(left, 0.1))
        self.check()

    def check(self) -> None:
        """Raise `Canceled` if nobody wants the bytes any more."""
        if self._ended.is_set() or self._stop():
            raise Canceled("the merge was canceled")

    def end(self) -> None:
        """Whoever reads is to stop."""
        self._ended.set()

    def _get(self, file: RemoteFile, begin: int, end: int) -> _Streamed:
        """The answer to a range, from where the Hub sends whoever asks."""
        asked = {"Range": f"bytes={begin}-{end - 1}"}
        url = file.link or file.url(self._client.endpoint)
        for _ in range(_HOPS):
            self.check()
            request = self._client.http.build_request("GET", url, headers=asked | self._client.authorization(url))
            answer = self._client.http.send(request, stream=True)
            if not answer.has_redirect_location:
                return _Streamed(answer)
            answer.close()
            following = url.join(answer.headers["Location"])
            if not self._client.authorization(following) and following.host != url.host:
                file.link = following
            url = following
        raise HubLied(file.name, "leads from one address to another without end")

    def _judge(
        self, file: RemoteFile, answer: httpx2.Response, begin: int, *, is_fresh: int
    ) -> tuple[float | None, str]:
        """None where the bytes follow; else how long to wait, and what the Hub said."""
        status = answer.status_code
        if status == 206:
            _check_range(file, answer.headers.get("Content-Range", ""), begin)
            return None, ""
        if status == 200 and begin == 0:
            length = answer.headers.get("Content-Length")
            if length is not None and length.isdecimal() and int(length) != file.size:
                raise HubLied(file.name, f"has {int(length):,} bytes, but its listing says {file.size:,}")
            return None, ""
        if status in (429, 500, 502, 503, 504, 408):
            return _retry_after(answer.headers.get("Retry-After", "")), f"status {status}"
        if status in _EXPIRED and file.link is not None:
            if is_fresh > 3:
                raise HubLied(file.name, f"is sent from a place that says {status} to every link to it")
            raise _Expired
        if status == 416:
            raise HubLied(file.name, f"is shorter than the {file.size:,} bytes that its listing says")
        if status == 200:
            raise HubLied(file.name, "is sent from its beginning whatever part of it is asked for; use hub_mode=cached")
        if status == 401:
            raise HubTokenRefused(file.name, f"{self._client.endpoint} does not take the token for it")
        if status == 403:
            raise HubGated(file.name, "may not be read with this token")
        raise HubNotFound(file.name, f"is not at {self._client.endpoint} any more (status {status})")


class _Spaces:
    """Spaces that are filled one after the other: `done` of all their `size`."""

    def __init__(self, spaces: Sequence[memoryview], filled: Callable[[int], None]) -> None:
        self._spaces, self._filled = spaces, filled
        self.size, self.done = sum(map(len, spaces)), 0
        self._full = self._at = 0

    @property
    def is_full(self) -> bool:
        return self.done == self.size

    def put(self, data: memoryview) -> None:
        """What does not fit is left out."""
        while data and self._full < len(self._spaces):
            space = self._spaces[self._full]
            count = min(len(space) - self._at, len(data))
            space[self._at : self._at + count] = data[:count]
            self._at, self.done, data = self._at + count, self.done + count, data[count:]
            if self._at == len(space):
                self._full, self._at = self._full + 1, 0
                self._filled(self._full)


class _Expired(Exception):
    """A link is no longer good."""


class _Streamed:
    def __init__(self, answer: httpx2.Response) -> None:
        self._answer = answer

    def __enter__(self) -> httpx2.Response:
        return self._answer

    def __exit__(self, *_: object) -> None:
        self._answer.close()


def _check_range(file: RemoteFile, written: str, begin: int) -> None:
    unit, _, rest = written.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdecimal() or int(first) != begin:
        raise HubLied(file.name, f"was asked for from byte {begin:,} on, but {written[:60]!r} came")
    if total.isdecimal() and int(total) != file.size:
        raise HubLied(file.name, f"has {int(total):,} bytes, but its listing says {file.size:,}")


def _retry_after(written: str) -> float:
    """Seconds; a date is taken for a moment."""
    return min(_LONGEST_ASKED, float(written)) if written.strip().isdecimal() else 1.0
