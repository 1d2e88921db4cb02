"""What a service can do and how it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from app.client.documents import Document, body_of
from app.client.objects import Method, Plan
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


class Models:
    """`client.models`: the models in the service's folders."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[dict[str, Any]]:
        """Each with the `name` that recipes have for it, its kind, size and architecture, by name."""
        return self._transport.pages("/v1/models")


class Recipes:
    """`client.recipes`: recipes that are only looked at."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def validate(self, recipe: Document, *, steps: bool = False) -> Plan:
        """What a recipe would read, write and need; with `steps`, tensor by tensor. Raises `Refused`."""
        body, media_type = body_of(recipe)
        asked, headers = {"steps": str(steps).lower()}, {"Content-Type": media_type}
        return Plan.of(
            self._transport.json("POST", "/v1/recipes:validate", content=body, headers=headers, params=asked)
        )

    def import_(self, text: str | bytes) -> dict[str, Any]:
        """A published recipe, or a model card with one in it: what it means here, and its keys without effect."""
        body = text.encode() if isinstance(text, str) else text
        return self._transport.json("POST", "/v1/recipes:import", content=body)


class System:
    """`client.system`: the service itself."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get(self) -> dict[str, Any]:
        """Version, limits, workers and disk."""
        return self._transport.json("GET", "/v1/system")

    def quota(self) -> dict[str, Any]:
        """What the caller may have, and has now."""
        return self._transport.json("GET", "/v1/quota")

    def webhook_secret(self) -> dict[str, Any]:
        """What the caller's webhooks know the service's messages by."""
        return self._transport.json("GET", "/v1/webhook-secret")

    def is_ready(self) -> bool:
        """Whether the service can do its work now; it is asked once, and not waited for."""
        return self._transport.answers_well("/readyz")
