"""Files of data that owners sent, which their jobs read as `data:NAME`.

Their bytes lie in the data folder, for each owner under sha256 and name; rows say which of them a name means. So a file
that is replaced stays whole for whoever reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import select

from merge_core.errors import CheckpointNotFound
from merge_core.files import disk_error
from workers.jobs import JobStore
from workers.quotas import admit_upload
from workers.tables import Upload

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
SCHEME = "data:"
"""Leads the name of a file that was sent, where a document names it."""


class Uploads:
    """The files that one owner sent."""

    def __init__(self, store: JobStore, owner: str) -> None:
        self._store, self.owner = store, owner
        self.folder = store.settings.uploads / hashlib.sha256(owner.encode()).hexdigest()[:32]

    @contextmanager
    def coming(self, name: str) -> Iterator[Coming]:
        """A file that comes in pieces; it has its name once it is `kept`, and otherwise nothing of it stays."""
        partial = self.folder / f".{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as opened:
                yield Coming(self, name, partial, opened)
        except OSError as error:
            raise disk_error(error, self.folder, 0) from None
        finally:
            partial.unlink(missing_ok=True)

    def find(self, name: str) -> Upload | None:
        """What there is to tell of a file."""
        with self._store.reading() as session:
            return session.get(Upload, (self.owner, name))

    def page(self, *, limit: int, after: str = "") -> Sequence[Upload]:
        """Some of them by name."""
        mine = select(Upload).where(Upload.owner == self.owner, Upload.name > after)
        with self._store.reading() as session:
            return session.scalars(mine.order_by(Upload.name).limit(limit)).all()

    def path(self, name: str) -> Path:
        """Where the bytes of a file are. Raises `CheckpointNotFound`."""
        found = self.find(name)
        if found is None:
            raise CheckpointNotFound(f"{SCHEME}{name[:100]}", "is no file that you sent: PUT it to /v1/data/NAME first")
        return self._place(found)

    def keep(self, name: str, size: int, sha256: str, partial: Path) -> Upload:
        """Give what came its name, and what had it before no more. Raises `QuotaTooSmall`."""
        with self._store.session() as session:
            before = session.get(Upload, (self.owner, name))
            admit_upload(session, self._store.settings, self.owner, size, instead_of=before.size if before else 0)
            old = self._place(before) if before else None
            kept = session.merge(Upload(owner=self.owner, name=name, size=size, sha256=sha256, changed_at=time.time()))
            place = self._place(kept)
            place.parent.mkdir(exist_ok=True)
            partial.replace(place)
        if old is not None and old != place:
            _remove(old)
        return kept

    def delete(self, name: str) -> bool:
        """Forget a file; whether it was there."""
        with self._store.session() as session:
            found = session.get(Upload, (self.owner, name))
            if found is None:
                return False
            place = self._place(found)
            session.delete(found)
        _remove(place)
        return True

    def _place(self, upload: Upload) -> Path:
        return self.folder / upload.sha256 / upload.name


def _remove(place: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        place.unlink()
    with contextlib.suppress(OSError):  # the same bytes may have another name
        place.parent.rmdir()


class Coming:
    """A file that is being sent."""

    def __init__(self, uploads: Uploads, name: str, partial: Path, opened: BinaryIO) -> None:
        self._uploads, self._name, self._partial, self._opened = uploads, name, partial, opened
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        """The next bytes of it."""
        self._opened.write(piece)
        self._digest.update(piece)
        self.size += len(piece)

    def kept(self) -> Upload:
        """It is whole. Raises `QuotaTooSmall`."""
        self._opened.flush()
        return self._uploads.keep(self._name, self.size, self._digest.hexdigest(), self._partial)
