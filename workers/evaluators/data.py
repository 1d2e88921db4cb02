"""Files of examples: text, JSON lines or parquet, of bounded size. They lie below the model folders, were sent by the
job's owner (`data:NAME`), or are in a data set on the Hub (`datasets/org/name/file[@revision]`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.checkpoint import check_below
from merge_core.errors import CheckpointError, CheckpointNotFound, EvaluationFailed
from merge_core.headers import clip, open_regular
from merge_core.snapshots import folders_of, library_of
from workers.hub.cached import HubCache
from workers.hub.ranges import RemoteFile
from workers.hub.resolve import DATASETS, HubLibrary
from workers.jobs import JobStore
from workers.uploads import SCHEME, Uploads

MOST_IMAGE_BYTES = 64 * 2**20
_READ = 2**22
LINES, PARQUET = (".jsonl", ".ndjson"), ".parquet"


@dataclass(frozen=True)
class Shelves:
    """Where the data of a job may be. `roots` are those of its models."""

    store: JobStore
    owner: str
    roots: Sequence[Path]

    def look(self, file: str) -> None:
        """Make sure that data are there, and are not too large; of a data set nothing is fetched yet, but its commit
        is what the name means from now on. Raises `CheckpointError`.
        """
        self._found(file)

    def open(self, file: str) -> tuple[Path, Sequence[Path]]:
        """Where data are, whole, and the folders that they may really lie in. Raises `CheckpointError`, `Canceled`."""
        path, roots, remote = self._found(file)
        if remote is None:
            return path, roots
        library = library_of(self.roots)
        assert isinstance(library, HubLibrary)
        settings = self.store.settings
        cache = HubCache(library.client.folder / "cache", settings.hub_cache_bytes, settings.disk_reserve)
        return library.fetched(remote, cache), [cache.folder]

    def _found(self, file: str) -> tuple[Path, Sequence[Path], RemoteFile | None]:
        most = self.store.settings.evaluator_data_bytes
        if file.startswith(SCHEME):
            uploads = Uploads(self.store, self.owner)
            return uploads.path(file.removeprefix(SCHEME)), [uploads.folder], None
        try:
            return find_data(file, self.roots, most), self.roots, None
        except CheckpointNotFound:
            library = library_of(self.roots)
            path, revision = name_of(file), file[len(name_of(file)) + 1 :]
            found = library.data(path, revision or None) if isinstance(library, HubLibrary) else None
            if found is None:
                raise
        target, remote = found
        check_size(file, target.stat().st_size, most)
        return target, [target.parent], remote


def name_of(file: str) -> str:
    """What a document calls data, without the revision of a data set."""
    return file.partition("@")[0] if file.startswith(f"{DATASETS}/") else file


def is_parquet(file: str) -> bool:
    """Whether data are rows of a parquet file, by what a document calls them."""
    return name_of(file).endswith(PARQUET)


def no_rows(file: str) -> str | None:
    """Why data have no rows, by what a document calls them; None: they may have some."""
    endings = (*LINES, PARQUET)
    if name_of(file).endswith(endings):
        return None
    return f"{file[:200]} is none of {', '.join(endings)}, which are read here"


def check_size(file: str, size: int, most: int) -> None:
    """Raise `CheckpointError` for more than may be read."""
    if size > most:
        raise CheckpointError(clip(file), f"has {size:,} bytes; data of an evaluator has at most {most:,}")


def find_data(file: str, roots: Sequence[Path], most_bytes: int) -> Path:
    """A file of data below the model folders. Raises `CheckpointError`."""
    for root in folders_of(roots) or ():
        check_below(root / file, [root])
        if os.path.lexists(root / file):
            descriptor, found = open_regular(root / file, roots)
            os.close(descriptor)
            check_size(file, found.st_size, most_bytes)
            return root / file
    raise CheckpointNotFound(clip(file), "is in none of this service's model folders")


def sha256_of(path: Path, roots: Sequence[Path]) -> str:
    """What stands for the data."""
    descriptor, _ = open_regular(path, roots)
    digest = hashlib.sha256()
    with os.fdopen(descriptor, "rb") as opened:
        while data := opened.read(_READ):
            digest.update(data)
    return digest.hexdigest()


def text_of(path: Path, roots: Sequence[Path]) -> str:
    """All of a text."""
    descriptor, _ = open_regular(path, roots)
    with os.fdopen(descriptor, "rb") as opened:
        try:
            return opened.read().decode()
        except UnicodeDecodeError:
            raise EvaluationFailed(f"{path.name} is no UTF-8 text") from None


def rows_of(path: Path, roots: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The examples of a file and where each is: one JSON object in each line, or the rows of a parquet file."""
    descriptor, _ = open_regular(path, roots)
    with os.fdopen(descriptor, "rb") as opened:
        if path.suffix == PARQUET:
            yield from _of_parquet(path, opened)
            return
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            place = f"{path.name}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise EvaluationFailed(f"{place}: this is no JSON") from None
            if not isinstance(row, dict):
                raise EvaluationFailed(f"{place}: a JSON object was expected")
            yield place, row


def _of_parquet(path: Path, opened: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(opened).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise EvaluationFailed(f"{path.name} cannot be read as parquet: {str(error)[:200]}") from None


def field_of(row: Mapping[str, Any], name: str, place: str) -> Any:
    """A field that every example has."""
    if name not in row:
        raise EvaluationFailed(f"{place}: there is no field {name!r}; it has {', '.join(map(repr, list(row)[:20]))}")
    return row[name]


def image_of(value: Any, path: Path, roots: Sequence[Path], place: str) -> Any:
    """An image as PIL has it: its bytes, or a file beside the data, in RGB."""
    import io

    from PIL import Image, UnidentifiedImageError

    content = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
    if isinstance(content, str):
        check_below(path.parent / content, roots)
        descriptor, found = open_regular(path.parent / content, roots)
        with os.fdopen(descriptor, "rb") as opened:
            content = opened.read() if found.st_size <= MOST_IMAGE_BYTES else None
    if not isinstance(content, bytes) or len(content) > MOST_IMAGE_BYTES:
        raise EvaluationFailed(f"{place}: the image is neither a file nor bytes, at most {MOST_IMAGE_BYTES:,} of them")
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise EvaluationFailed(f"{place}: the image cannot be read: {str(error)[:200]}") from None
