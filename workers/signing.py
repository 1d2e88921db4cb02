"""What messages to webhooks are signed with: a secret for each owner, made from a key of the service and kept nowhere.

With several keys a message has a signature for each, so that a key can be renewed while receivers still know the old
one: put the new key first, let receivers fetch their new secret, then take the old key away.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import secrets
from datetime import datetime
from pathlib import Path

from sqlalchemy import make_url
from standardwebhooks import Webhook

from workers.settings import Settings

KEY_FILE = "webhook.key"
_LEAST_LENGTH = 32


class NoSigningKey(Exception):
    """There is no key that all machines of this service share."""


class Signer:
    """Knows every owner's secrets. Raises `NoSigningKey` where there can be none."""

    def __init__(self, settings: Settings) -> None:
        if settings.webhook_key is not None:
            self._keys = [key.encode() for key in settings.webhook_key.get_secret_value().replace(",", " ").split()]
            if not self._keys or min(map(len, self._keys)) < _LEAST_LENGTH:
                raise NoSigningKey(f"WEIGHTSMITH_WEBHOOK_KEY is shorter than {_LEAST_LENGTH} characters")
        elif make_url(settings.database).get_backend_name() == "sqlite":
            self._keys = [_key_in_file(settings.data.absolute() / KEY_FILE)]
        else:
            raise NoSigningKey("webhooks need WEIGHTSMITH_WEBHOOK_KEY, the same on all machines of this service")

    def secret(self, owner: str) -> str:
        """What an owner verifies messages with: `whsec_` and 32 bytes in base64."""
        return self._secrets(owner)[0]

    def sign(self, owner: str, message: str, at: datetime, body: str) -> str:
        """The `webhook-signature` of a message: one for each key."""
        return " ".join(Webhook(secret).sign(message, at, body) for secret in self._secrets(owner))

    def _secrets(self, owner: str) -> list[str]:
        made = [hmac.digest(key, f"webhook:{owner}".encode(), "sha256") for key in self._keys]
        return [f"whsec_{base64.b64encode(secret).decode()}" for secret in made]


def _key_in_file(file: Path) -> bytes:
    """The key of a service on one machine; of two processes that make it, both get the first's."""
    if not file.exists():
        draft = file.with_name(f".{KEY_FILE}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(32))
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            file.hardlink_to(draft)
        draft.unlink()
    return file.read_bytes().strip()
