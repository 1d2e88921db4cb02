"""Where the models of a job may lie: the service's folders, and a Hub as the owner's credential sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.errors import Problem, RecipeError
from merge_core.snapshots import Roots
from workers.credentials import HubToken, Vault, open_credential
from workers.hub.client import HubClient
from workers.hub.ranges import never

if TYPE_CHECKING:
    from pydantic import SecretStr

    from merge_core.snapshots import Supply
    from workers.hub.resolve import HubLibrary
    from workers.jobs import JobStore
    from workers.settings import Settings

USUAL_CREDENTIAL = "hub"
"""The credential that is used where none is named, if its owner has it."""


@dataclass(frozen=True)
class HubOptions:
    """How a job speaks with a Hub: by the name of a credential of its owner's, and at which endpoint."""

    credential: str | None = None
    endpoint: str | None = None

    @classmethod
    def of(cls, kept: Mapping[str, Any] | None) -> HubOptions:
        """As a job's row has them."""
        return cls(**kept) if kept else cls()

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class JobHub:
    """The Hub of one job. `pinned`: what its names came to mean when it was accepted; None while it is planned first.

    `roots` are for the core; once it planned with them, `fields` are columns of the job's row.
    """

    store: JobStore
    owner: str
    options: HubOptions = HubOptions()
    pinned: Sequence[Mapping[str, Any]] | None = None
    stop: Callable[[], bool] = never

    def __post_init__(self) -> None:
        settings = self.store.settings
        self._token: SecretStr | None = None
        if self.pinned is None:
            self._check(settings)
        self._library = open_library(settings, self._client, pinned=self.pinned, stop=self.stop)
        self.roots = Roots(settings.roots, self._library)

    @property
    def resolved(self) -> list[dict[str, Any]]:
        """What names of repositories came to mean."""
        return [] if self._library is None else self._library.resolved

    def fields(self) -> dict[str, Any]:
        """As `JobStore.add` takes them: which commits, and which credential was used."""
        used = HubOptions(self._credential(), self.options.endpoint)
        return {"resolved": self.resolved, "hub": used.to_data() if used != HubOptions() else None}

    def publisher(self) -> HubClient:
        """The Hub as whoever publishes there: somebody whose token is known. Raises `RecipeError` without one."""
        if self._credential() is None:
            detail = (
                f"to publish, a token is needed that may write there: PUT it to /v1/credentials/{USUAL_CREDENTIAL}, or "
                "under another name that ?hub_credential= then says"
            )
            raise RecipeError.of([Problem(detail, "#/outputs/hub")])
        if not self.store.settings.hub_endpoint and self.options.endpoint is None:
            raise RecipeError.of([Problem("this service knows no Hub; name one by ?hub_endpoint=", "#/outputs/hub")])
        return self._client()

    def _check(self, settings: Settings) -> None:
        """Refuse at once what was asked for by name and is not there."""
        if self.options.credential is not None:
            self._opened(self.options.credential)
        if self.options.endpoint is not None:
            HubClient.of(settings, self.options.endpoint)

    def _credential(self) -> str | None:
        """The name of the credential."""
        if self.options.credential is not None or self.pinned is not None:
            return self.options.credential
        has_usual = Vault(self.store).find(self.owner, USUAL_CREDENTIAL) is not None
        return USUAL_CREDENTIAL if has_usual else None

    def _opened(self, name: str) -> SecretStr:
        secrets = open_credential(self.store, self.owner, name)
        if not isinstance(secrets, HubToken):
            detail = f"the credential {name!r} is {secrets.kind}; a Hub takes one of the kind hub-token"
            raise RecipeError.of([Problem(detail, "#/query/hub_credential")])
        return secrets.token

    def _client(self) -> HubClient:
        name = self._credential()
        token = None if name is None else self._opened(name)
        return HubClient.of(self.store.settings, self.options.endpoint, token)


def open_library(
    settings: Settings,
    make_client: Callable[[], HubClient],
    *,
    pinned: Sequence[Mapping[str, Any]] | None = None,
    stop: Callable[[], bool] = never,
) -> HubLibrary | None:
    """The snapshots of a job; None where there is no Hub. `make_client` is called when the first of them is wanted."""
    if not (settings.hub_endpoint or settings.hub_endpoint_allow or pinned):
        return None
    from workers.hub.resolve import HubLibrary

    return HubLibrary(make_client, partial(_supply, settings), pinned, stop=stop)


def _supply(settings: Settings, library: HubLibrary) -> Supply:
    """How the files of a job come: as the settings say, or cached if all have room there together."""
    from workers.hub.cached import Cached
    from workers.hub.streamed import Streamed

    sizes = {file.sha256: file.size for file in library.files.values()}
    fits = sum(sizes.values()) <= settings.hub_cache_bytes and _has_room(library.client.folder, sum(sizes.values()))
    if settings.hub_mode == "cached" or (settings.hub_mode == "auto" and fits):
        most, reserve = settings.hub_cache_bytes, settings.disk_reserve
        return Cached(library.client, library.files, most_bytes=most, reserve=reserve)
    return Streamed(library.client, library.files)


def _has_room(folder: Path, size: int) -> bool:
    """Whether the disk can take so much at once, what is in the cache already included."""
    import shutil

    from merge_core.files import nearest_existing

    cached = sum(blob.stat().st_size for blob in (folder / "cache").glob("*--*/blobs/*") if blob.exists())
    return size <= shutil.disk_usage(nearest_existing(folder)).free // 2 + cached
