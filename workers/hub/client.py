"""One guarded way to speak with a Hub, for each endpoint and token.

The token is given by whoever calls, in each request, and never found anywhere: not in the environment, nor in the home
of whoever runs the service. An endpoint is one that the operator allows; where its answers lead is held against the
rules for other people's addresses (`workers.outbound.Guard`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from pydantic import SecretStr

from merge_core import __version__
from workers.hub.errors import HubGated, HubLied, HubNotAllowed, HubNotFound, HubTokenRefused, HubUnavailable
from workers.outbound import ForbiddenAddress, Guard

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from workers.settings import Settings

CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0
_PREPARED = threading.Lock()
_guards: dict[str, Guard] = {}
"""By the host of an endpoint, what its answers may lead to."""


@dataclass(frozen=True)
class HubClient:
    """A Hub, as somebody with this token sees it; `folder` is where what comes from it may be kept."""

    endpoint: str
    folder: Path
    token: SecretStr | None = None
    allow: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, settings: Settings, endpoint: str | None = None, token: SecretStr | None = None) -> HubClient:
        """A Hub that the settings allow, by default the first. Raises `HubNotAllowed`."""
        wanted = (endpoint or settings.hub_endpoint).rstrip("/")
        allowed = [each.rstrip("/") for each in (settings.hub_endpoint, *settings.hub_endpoint_allow)]
        if wanted not in allowed or not wanted:
            known = ", ".join(filter(None, allowed)) or "none"
            raise HubNotAllowed(wanted[:200] or "?hub_endpoint", f"is no Hub that this service calls; it calls {known}")
        return cls(wanted, settings.hub_folder, token, tuple(settings.endpoint_allow))

    @cached_property
    def guard(self) -> Guard:
        """What may be called: this Hub, and from there public addresses, and those that the operator allows."""
        return Guard([*self.allow, self.host])

    @property
    def host(self) -> str:
        return httpx2.URL(self.endpoint).host

    @cached_property
    def api(self) -> HfApi:
        """The Hub's own client."""
        with _PREPARED:
            _prepare(self.folder)
            _guards[self.host] = self.guard
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.secret, library_name="weightsmith", library_version=__version__)

    @property
    def secret(self) -> str | bool:
        """The token as huggingface_hub takes it: False is nobody's, not even that of whoever runs this."""
        return False if self.token is None else self.token.get_secret_value()

    @cached_property
    def http(self) -> httpx2.Client:
        """For bytes, in ranges. Redirects are not followed: the token is for the Hub alone."""
        timeout = httpx2.Timeout(CONNECT_SECONDS, read=READ_SECONDS)
        return httpx2.Client(
            event_hooks={"request": [_checked_by(self.guard)]},
            timeout=timeout,
            headers={"User-Agent": f"weightsmith/{__version__}", "Accept-Encoding": "identity"},
        )

    def authorization(self, url: httpx2.URL) -> dict[str, str]:
        """The header by which the Hub knows who asks; nothing for any other place."""
        here = httpx2.URL(self.endpoint)
        if self.token is None or (url.scheme, url.host, url.port) != (here.scheme, here.host, here.port):
            return {}
        return {"Authorization": f"Bearer {self.token.get_secret_value()}"}

    @contextmanager
    def told(self, name: str, *, what: str = "") -> Iterator[None]:
        """Failures of huggingface_hub as ours. `name`: what the document calls the model; `what` was asked for."""
        with _PREPARED:
            _prepare(self.folder)
        from huggingface_hub import errors

        who = "nobody's token" if self.token is None else "this token"
        try:
            yield
        except errors.GatedRepoError:
            asks = "ask for access on its page, and name a credential with a token of yours"
            raise HubGated(name, f"is gated, and {who} is not let in: {asks}") from None
        except errors.RevisionNotFoundError:
            raise HubNotFound(name, f"has no such revision at {self.endpoint}") from None
        except errors.EntryNotFoundError as error:
            if isinstance(error, errors.LocalEntryNotFoundError):
                raise self.unavailable(name) from None
            raise HubNotFound(name, f"has no {what or 'such file'} at {self.endpoint}") from None
        except errors.RepositoryNotFoundError:
            private = "or it is private: store a Hub token as a credential and name that"
            detail = f"is no model here, and no repository at {self.endpoint} that {who} may see"
            raise HubNotFound(name, f"{detail}; it may be misspelt, {private}") from None
        except errors.HFValidationError as error:
            raise HubNotFound(name, f"is no Hub id: {error}") from None
        except errors.HfHubHTTPError as error:
            raise self._refused(name, error.response.status_code) from None
        except ForbiddenAddress as error:
            raise HubNotAllowed(name, f"leads to an address that is not called from here: {error}") from None
        except OSError as error:
            raise self.unavailable(name, type(error).__name__) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise HubLied(name, f"is described by {self.endpoint} in a form that cannot be read") from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise
            raise self.unavailable(name, type(error).__name__) from None

    def _refused(self, name: str, status: int) -> Exception:
        if status == 401:
            return HubTokenRefused(name, f"{self.endpoint} does not take the token; store a good one and try again")
        if status == 403:
            return HubGated(
                name, f"{self.endpoint} forbids it to this token; it may lack the right to read this repository"
            )
        return self.unavailable(name, f"status {status}")

    def unavailable(self, name: str, what: str = "no answer") -> HubUnavailable:
        """That a model cannot be had now."""
        return HubUnavailable(
            name, f"{self.endpoint} cannot be reached, or cannot answer now ({what}); try again later"
        )


def _checked_by(guard: Guard) -> Callable[[Any], None]:
    def check(request: Any) -> None:
        url = guard.check(str(request.url.copy_with(fragment=None)))
        try:
            guard.addresses(url.host, url.port or 443)
        except (OSError, UnicodeError):
            return  # whoever connects says so; behind a proxy only that knows names

    return check


def _check_any(request: Any) -> None:
    """Hold a request of huggingface_hub against the rules of the Hubs that were opened."""
    host = request.url.host
    guards = list(_guards.values())
    own = _guards.get(host)
    for guard in [own] if own is not None else guards:
        try:
            _checked_by(guard)(request)
        except ForbiddenAddress:
            if guard is (own or guards[-1]):
                raise
        else:
            return


def _prepare(folder: Path) -> None:
    """Keep huggingface_hub from what is not the job's: the login and cache of whoever runs this, and telling others."""
    import sys

    if "huggingface_hub" not in sys.modules:
        os.environ |= {
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
    from huggingface_hub import set_client_factory

    global _is_guarded
    if not _is_guarded:
        set_client_factory(guarded_client)
        _is_guarded = True


_is_guarded = False


def guarded_client() -> Any:
    """The client that huggingface_hub makes for itself, with a look at every address."""
    from huggingface_hub.utils import _http

    client = _http.default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks.get("request", []), _check_any]}
    return client
