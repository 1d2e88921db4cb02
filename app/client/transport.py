"""Requests to one service: its address, the key, what is tried again and for how long, and problems as exceptions."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx2

from app.client.errors import NotFound, NotWeightsmith, Refused, ServiceError, Unreachable

TRY_AGAIN = frozenset({429, 502, 503, 504})
"""Statuses that say that nothing was done and that it may work later."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
STRANGER_SECONDS = 1.0
"""How long an address is tried at which no service has answered yet: it is rather wrong than busy."""


class Patience:
    """How long failures in a row are borne, with longer and longer pauses between."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """Something went well."""
        self._until, self._pause = time.monotonic() + self._seconds, FIRST_PAUSE

    def spend(self, error: ServiceError) -> None:
        """Pause before the next try; raises the error when there shall be none."""
        asked = error.retry_after if isinstance(error, Refused) else None
        pause = self._pause * random.uniform(0.5, 1) if asked is None else max(asked, 0)  # noqa: S311  no secret
        if time.monotonic() + pause > self._until:
            raise error
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
        time.sleep(pause)


class Transport:
    """Speaks HTTP with one service; may be used by several threads."""

    def __init__(self, url: str, api_key: str | None, *, timeout: float, patience: float) -> None:
        try:
            found = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ServiceError(f"{url} is no address: {error}") from None
        if found.scheme not in ("http", "https") or not found.host:
            raise ServiceError(f"{url} is no address of a service; one looks like http://127.0.0.1:8000")
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ServiceError("the API key has characters that no key has; was it copied whole?")
        self.url = str(found.copy_with(userinfo=b""))
        self.timeout = timeout
        self._patience, self._has_answered = patience, False
        # A proxy has no way to this machine's own addresses.
        local = found.host in ("127.0.0.1", "localhost", "::1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # No redirect is followed with it, so that the key goes nowhere else and a client of an http address never
        # speaks TLS; reading the certificates for it would take a tenth of a second.
        self._http = httpx2.Client(
            base_url=found, headers=headers, timeout=timeout, trust_env=not local, verify=found.scheme == "https"
        )

    def close(self) -> None:
        self._http.close()

    def patience(self) -> Patience:
        return Patience(self._patience if self._has_answered else min(self._patience, STRANGER_SECONDS))

    def request(self, verb: str, path: str, *, repeatable: bool = True, **options: Any) -> httpx2.Response:
        """The answer to a request that went well. `repeatable`: it may be sent again where nobody knows whether it
        arrived. Raises `ServiceError`.
        """
        patience = self.patience()
        while True:
            try:
                with self.stream(verb, path, **options) as response:
                    response.read()
                    return response
            except Unreachable as error:
                never_sent = isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)
                if not repeatable and not never_sent:
                    raise
                patience.spend(error)
            except Refused as error:
                if error.status not in TRY_AGAIN and not (error.status == 409 and error.retry_after is not None):
                    raise
                patience.spend(error)

    def json(self, verb: str, path: str, *, repeatable: bool = True, **options: Any) -> dict[str, Any]:
        """As `request`; the JSON object that was answered."""
        response = self.request(verb, path, repeatable=repeatable, **options)
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise NotWeightsmith(f"{self.url} does not answer like Weightsmith; is it the right address?")
        return found

    def pages(self, path: str, asked: Sequence[tuple[str, Any]] = ()) -> Iterator[dict[str, Any]]:
        """The objects on all pages of a list; each page is asked for when it is needed."""
        found = self.json("GET", path, params=list(asked))
        while True:
            yield from _entries(found)
            if not found.get("next"):
                return
            found = self.json("GET", path, params=[*asked, ("after", found["next"])])

    def many(self, path: str) -> list[dict[str, Any]]:
        """As `json`; the objects in a list that is not in pages."""
        return _entries(self.json("GET", path))

    def answers_well(self, path: str) -> bool:
        """Whether a question, asked once, is answered with success."""
        try:
            with self.stream("GET", path):
                return True
        except ServiceError:
            return False

    @contextmanager
    def stream(self, verb: str, path: str, *, elsewhere: bool = False, **options: Any) -> Iterator[httpx2.Response]:
        """One request, tried once, whose answer the caller reads. With `elsewhere`, a redirect is followed, once and
        without the key: a service may send its files from another. Raises `ServiceError`, also while it is read.
        """
        try:
            with ExitStack() as stack:
                response = stack.enter_context(self._http.stream(verb, path, **options))
                self._has_answered = True
                if response.has_redirect_location:
                    leads = response.url.join(response.headers["Location"]).copy_with(userinfo=b"")
                    if not elsewhere:
                        raise ServiceError(f"{self.url} leads on to {leads}; give the address that is meant")
                    # The other knows the file by a tag of its own; what arrives is proved by its sha256 anyway.
                    headers = {name: value for name, value in options["headers"].items() if name != "If-Range"}
                    other = stack.enter_context(httpx2.Client(timeout=self.timeout))
                    response = stack.enter_context(other.stream(verb, leads, headers=headers))
                if not response.is_success:
                    response.read()
                    raise _refused(response)
                yield response
        except httpx2.HTTPError as error:
            why = str(error) or type(error).__name__
            raise Unreachable(f"{self.url} cannot be reached: {why}; is `weightsmith serve` running?") from error


def _entries(page: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects on a page."""
    found = page.get("data")
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise NotWeightsmith("that is no list; is it the right address?")
    return found


def _refused(response: httpx2.Response) -> Refused:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, Mapping):
        problem = {}
    kind = NotFound if response.status_code == 404 else Refused
    return kind(response.status_code, problem, retry_after=_seconds(response.headers.get("retry-after")))


def _seconds(written: str | None) -> float | None:
    """Retry-After in seconds; dates, which our service never gives, count as absent."""
    return float(written) if written and written.isascii() and written.isdecimal() and len(written) < 8 else None
