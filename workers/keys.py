"""API keys: who may ask for what. Of a key's secret only the sha256 is kept.

A secret has 256 random bits, so that its digest needs no salt and no slowness: there is nothing to guess it from.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection, Sequence
from enum import StrEnum

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.exc import OperationalError

from workers.jobs import JobStore, new_id
from workers.tables import ApiKey

PREFIX = "wsk_"
OWNER_PATTERN = r"^[a-z0-9][a-z0-9._@-]{0,63}$"
"""What an owner may be called."""
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET = re.compile(rf"{PREFIX}[{_ALPHABET}]{{43}}")
_USED_SECONDS = 60.0


class Scope(StrEnum):
    """What a key is good for. Alignments and patches are jobs as merges are."""

    MERGES_READ = "merges:read"
    MERGES_WRITE = "merges:write"
    FILES_READ = "files:read"
    ADMIN = "admin"


EVERYTHING = frozenset(Scope)
USUAL = (Scope.MERGES_READ, Scope.MERGES_WRITE, Scope.FILES_READ)


def new_secret() -> str:
    """`wsk_` and 32 random bytes in 43 letters and digits.

    >>> len(new_secret()), new_secret()[:4]
    (47, 'wsk_')
    """
    number = int.from_bytes(secrets.token_bytes(32))
    digits = []
    for _ in range(43):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return PREFIX + "".join(digits)


def check_owner(owner: str) -> None:
    """Raises ValueError for an owner's name that is none."""
    if not re.fullmatch(OWNER_PATTERN, owner):
        allowed = "at most 64 small letters, digits and ._@-, the first a letter or digit"
        raise ValueError(f"{owner[:60]!r} cannot be an owner: {allowed}")


class KeyRing:
    """The keys of all owners."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def create(
        self, owner: str, scopes: Collection[Scope], *, name: str = "", expires_at: float | None = None
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which is nowhere else. Raises ValueError for an owner's name that is none."""
        check_owner(owner)
        secret = new_secret()
        key = ApiKey(
            id=new_id("key_"),
            owner=owner,
            name=name,
            digest=_digest(secret),
            scopes=sorted(scopes),
            created_at=time.time(),
            expires_at=expires_at,
        )
        with self._store.session() as session:
            session.add(key)
        return key, secret

    def known(self, secret: str) -> ApiKey | None:
        """The key that has this secret and is good now. Notes its use, at most once a minute."""
        if not _SECRET.fullmatch(secret):
            return None
        digest, now = _digest(secret), time.time()
        with self._store.reading() as session:
            key = session.scalars(select(ApiKey).where(ApiKey.digest == digest)).one_or_none()
        if key is None or not hmac.compare_digest(key.digest, digest) or not _is_good(key, now):
            return None
        if key.used_at is None or key.used_at < now - _USED_SECONDS:
            self._note_use(key.id, now)
        return key

    def page(self, owner: str | None = None, *, limit: int = 100, before: str | None = None) -> Sequence[ApiKey]:
        """An owner's keys, or everybody's, newest first, older than the id `before`."""
        query = select(ApiKey).order_by(ApiKey.id.desc()).limit(limit)
        if owner is not None:
            query = query.where(ApiKey.owner == owner)
        if before is not None:
            query = query.where(ApiKey.id < before)
        with self._store.reading() as session:
            return session.scalars(query).all()

    def find(self, key_id: str, owner: str | None = None) -> ApiKey | None:
        """A key, if it is that owner's, or whoever's it is."""
        with self._store.reading() as session:
            return session.scalars(select(ApiKey).where(*_named(key_id, owner))).one_or_none()

    def revoke(self, key_id: str, owner: str | None = None) -> bool:
        """Make a key good for nothing, from now on and for ever. False: there is no such key."""
        which = update(ApiKey).where(*_named(key_id, owner))
        with self._store.session() as session:
            now = time.time()
            if session.execute(
                which.where(ApiKey.revoked_at.is_(None)).values(revoked_at=now).returning(ApiKey.id)
            ).all():
                return True
        return self.find(key_id, owner) is not None

    def _note_use(self, key_id: str, now: float) -> None:
        unused = or_(ApiKey.used_at.is_(None), ApiKey.used_at < now - _USED_SECONDS)
        try:
            with self._store.session() as session:
                session.execute(update(ApiKey).where(ApiKey.id == key_id, unused).values(used_at=now))
        except OperationalError:
            # Whoever only reads need not wait for a writer.
            return


def _named(key_id: str, owner: str | None) -> list[ColumnElement[bool]]:
    return [ApiKey.id == key_id, *([] if owner is None else [ApiKey.owner == owner])]


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _is_good(key: ApiKey, now: float) -> bool:
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now)
