"""Models by Hub id: which commit a name means, and a snapshot of it for the core to plan with.

A revision is asked for once, when the job is accepted; what it meant goes with the job, and every attempt and worker
uses that commit. A snapshot takes a few small requests: the listing, config, index and tokenizer, and of each file of
weights the header by range. It is kept in the data folder, under its commit, which never means anything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from merge_core.adapters import CONFIG_NAME as ADAPTER_CONFIG
from merge_core.adapters import WEIGHTS_NAME as ADAPTER_WEIGHTS
from merge_core.artifact import LOCK_NAME
from merge_core.cards import CARD_NAME, MAX_CARD_BYTES
from merge_core.checkpoint import COMPANIONS, MAX_COMPANION_BYTES, PICKLED
from merge_core.errors import Canceled
from merge_core.files import disk_error
from merge_core.headers import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_INDEX_BYTES, MAX_JSON_BYTES, clip
from merge_core.patches.delta import DELTA_NAME
from merge_core.reversal import REVERSAL_NAME
from merge_core.snapshots import Snapshot, Supply
from workers.hub.client import HubClient
from workers.hub.errors import HubLied, HubNotFound
from workers.hub.ranges import RangeReader, RemoteFile, never

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, ModelInfo

    from workers.hub.cached import HubCache

PLANNING_PATIENCE = 20.0
"""Seconds for which a Hub that does not answer is asked again while somebody waits for a plan."""
MAX_WEIGHT_FILES = 2000
FIRST_BYTES = 2**16
"""Of a file of weights, asked for at once: most headers are no longer."""
SMALL_FILE = 2**24
"""Weights that the Hub has no sha256 of are taken whole up to this size, and proved by git's; none are larger."""
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}")
_MODEL, _INDEX = "model.safetensors", ".safetensors.index.json"
_ALONE = (ADAPTER_WEIGHTS, DELTA_NAME, REVERSAL_NAME)
"""Files of weights that are looked for by their names, whatever else is there."""
_SMALL: Mapping[str, int] = {
    "config.json": MAX_CONFIG_BYTES,
    ADAPTER_CONFIG: MAX_CONFIG_BYTES,
    LOCK_NAME: MAX_JSON_BYTES,
    **dict.fromkeys(COMPANIONS, MAX_COMPANION_BYTES),
    CARD_NAME: MAX_CARD_BYTES,
}
_OPTIONAL = frozenset((*COMPANIONS, CARD_NAME))
"""Small files that are left away where they are too large."""
_AT_ONCE = 8
DATASETS = "datasets"
"""Leads the names of data sets, as in the Hub's own addresses."""


@dataclass(frozen=True)
class Resolved:
    """What a name came to mean, as the job keeps it: a repository, its commit, and the place in it."""

    path: str
    revision: str | None
    endpoint: str
    repo: str
    commit: str
    inside: str

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """Where a name leads if it is one of a Hub: a repository, and what follows its id."""

    repo: str
    inside: str

    @classmethod
    def of(cls, path: str) -> Place | None:
        """None for what is no name of a repository, such as the path of a local folder; `datasets/org/name` is one."""
        parts = path.split("/")
        leading = parts[:1] if parts[0] == DATASETS else []
        del parts[: len(leading)]
        is_plain = all(part and part not in (".", "..") and part.isprintable() and "\\" not in part for part in parts)
        if len(parts) < 2 or not is_plain or len(path) > 500:
            return None
        if not all(_NAME.fullmatch(part) and ".." not in part and "--" not in part for part in parts[:2]):
            return None
        return cls("/".join([*leading, *parts[:2]]), "/".join(parts[2:]))

    @property
    def is_dataset(self) -> bool:
        return is_dataset(self.repo)


def is_dataset(repo: str) -> bool:
    """Whether a repository is a data set's."""
    return repo.startswith(f"{DATASETS}/")


class HubLibrary:
    """The snapshots of a job (`merge_core.snapshots.Library`).

    `pinned`: what names came to mean when the job was accepted; a job that has it looks nothing else up. `make_client`
    is called when the first name of a repository is met, `make_supply` when all that the job names was found.
    """

    def __init__(
        self,
        make_client: Callable[[], HubClient],
        make_supply: Callable[[HubLibrary], Supply],
        pinned: Sequence[Mapping[str, Any]] | None = None,
        *,
        stop: Callable[[], bool] = never,
        patience: float = PLANNING_PATIENCE,
    ) -> None:
        self._make_client, self._make_supply, self._stop, self._patience = make_client, make_supply, stop, patience
        self._is_pinned = pinned is not None
        self._pinned = {(each["path"], each["revision"]): Resolved(**each) for each in pinned or ()}
        self._found: dict[tuple[str, str | None], tuple[Snapshot, Path]] = {}
        self._meant: dict[tuple[str, str | None], Resolved] = {}
        self.files: dict[Path, RemoteFile] = {}
        """What stand-ins stand for."""
        self._lock = threading.RLock()

    @cached_property
    def client(self) -> HubClient:
        return self._make_client()

    @cached_property
    def supply(self) -> Supply:
        return self._make_supply(self)

    @property
    def resolved(self) -> list[dict[str, Any]]:
        """What the names came to mean."""
        return [meant.to_data() for meant in self._meant.values()]

    def __iter__(self) -> Iterator[Snapshot]:
        return iter([snapshot for snapshot, _ in self._found.values()])

    def known(self, path: str, revision: str | None) -> tuple[Snapshot, Path] | None:
        if (path, revision) in self._pinned:
            return self.find(path, revision)
        return self._found.get((path, revision))

    def find(self, path: str, revision: str | None) -> tuple[Snapshot, Path] | None:
        with self._lock:
            if (path, revision) not in self._found:
                place = Place.of(path)
                if place is None or place.is_dataset or (self._is_pinned and (path, revision) not in self._pinned):
                    return None
                self._found[path, revision] = self._resolve(path, revision, place)
            return self._found[path, revision]

    def data(self, path: str, revision: str | None) -> tuple[Path, RemoteFile | None] | None:
        """A file of a data set, `datasets/org/name/file`: where it is, or the stand-in of its size and what that stands
        for (`fetched`). None for what is no such name, or was not one when the job was accepted.
        """
        place = Place.of(path)
        if place is None or not place.is_dataset or (self._is_pinned and (path, revision) not in self._pinned):
            return None
        with self._lock:
            _, target = self._resolve(path, revision, place)
        return target, self.files.get(target)

    def fetched(self, file: RemoteFile, cache: HubCache) -> Path:
        """A large file of a data set whole and proved, in the cache."""

        def received(_: int) -> None:
            if self._stop():
                raise Canceled("canceled while data were fetched")

        return cache.fetch(self.client, file, received)

    def _resolve(self, path: str, revision: str | None, place: Place) -> tuple[Snapshot, Path]:
        name = f"{path}@{revision}" if revision else path
        meant = self._pinned.get((path, revision))
        listed: _Listing | None = None
        if meant is None:
            listed = _Listing.of(self.client, name, place.repo, revision)
            meant = Resolved(path, revision, self.client.endpoint, place.repo, listed.commit, place.inside)
        maker = _SnapshotMaker(self.client, name, meant, self._stop, self._patience)
        try:
            snapshot, target, files = maker.make(listed)
        except OSError as error:
            raise disk_error(error, self.client.folder, 0) from None
        self._meant[path, revision] = meant
        self.files |= {snapshot.folder / each: file for each, file in files.items()}
        return snapshot, target


@dataclass(frozen=True)
class _Listed:
    """A file as the Hub lists it. `sha1` is git's, of what git has, which is not the file itself where `sha256` is."""

    size: int
    sha256: str | None
    sha1: str | None


@dataclass(frozen=True)
class _Listing:
    """A repository at a commit: its files by their paths."""

    commit: str
    files: Mapping[str, _Listed]

    @classmethod
    def of(cls, client: HubClient, name: str, repo: str, revision: str | None) -> _Listing:
        """Ask the Hub. Raises one of `workers.hub.errors`, also where the files of what is listed may not be read."""
        api = client.api
        kind, repo_id = ("dataset", repo.removeprefix(f"{DATASETS}/")) if is_dataset(repo) else ("model", repo)
        ask = api.dataset_info if kind == "dataset" else api.model_info
        with client.told(name):
            info = ask(repo_id, revision=revision, files_metadata=True, timeout=PLANNING_PATIENCE)
            if info.gated:
                api.auth_check(repo_id, repo_type=kind)
        return cls._of_info(name, info)

    @classmethod
    def _of_info(cls, name: str, info: ModelInfo | DatasetInfo) -> _Listing:
        if not isinstance(info.sha, str) or not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise HubLied(name, "has no commit that the Hub would name")
        files: dict[str, _Listed] = {}
        for each in info.siblings or []:
            path = each.rfilename
            pure = PurePosixPath(path)
            if (
                pure.is_absolute()
                or not pure.parts
                or {"..", "."} & set(path.split("/"))
                or not path.isprintable()
                or "\\" in path
            ):
                raise HubLied(name, f"lists a file that could lie anywhere: {clip(path)}")
            sha256 = each.lfs.sha256 if each.lfs is not None else None
            size = each.lfs.size if each.lfs is not None else each.size
            if type(size) is not int or size < 0 or (sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256)):
                raise HubLied(name, f"lists {clip(path)} without a size or sha256 that could be meant")
            files[path] = _Listed(size, sha256, each.blob_id)
        return cls(info.sha, files)


@dataclass
class _SnapshotMaker:
    """Makes the snapshot of a place at a commit, or finds the one that is there."""

    client: HubClient
    name: str
    meant: Resolved
    stop: Callable[[], bool]
    patience: float

    def make(self, listed: _Listing | None) -> tuple[Snapshot, Path, Mapping[str, RemoteFile]]:
        """The snapshot, the folder or file that the name means, and what its stand-ins stand for."""
        kept = self._kept()
        if kept is None:
            listed = listed or self._listed_again()
            self._build(listed)
            kept = self._kept()
            assert kept is not None
        folder, about = kept
        os.utime(folder)  # the janitor goes by that
        meant = self.meant
        directory = about["directory"]
        files = {
            name: RemoteFile(meant.repo, meant.commit, _joined(directory, name), size, sha256, f"{self.name}/{name}")
            for name, (size, sha256) in about["stand_ins"].items()
        }
        stand_ins = {name: file.sha256 or "" for name, file in files.items()}
        shown = _joined(meant.repo, directory) + (f"@{meant.revision}" if meant.revision else "")
        snapshot = Snapshot(shown, meant.repo, meant.commit, folder, stand_ins, meant.revision)
        return snapshot, folder / about["file"] if about["file"] else folder, files

    @property
    def _place(self) -> Path:
        """Where the snapshot is kept: beside its folder lies what there is to know of it."""
        endpoint = hashlib.sha256(self.client.endpoint.encode()).hexdigest()[:12]
        inside = quote(self.meant.inside, safe="")
        if len(inside) > 150:
            inside = hashlib.sha256(inside.encode()).hexdigest()
        repo = self.meant.repo.replace("/", "--")
        return self.client.folder / "snapshots" / endpoint / repo / self.meant.commit / f"@{inside}"

    def _kept(self) -> tuple[Path, dict[str, Any]] | None:
        about = self._place / "about.json"
        try:
            return self._place / "files", json.loads(about.read_text())
        except FileNotFoundError:
            return None

    def _listed_again(self) -> _Listing:
        found = _Listing.of(self.client, self.name, self.meant.repo, self.meant.commit)
        if found.commit != self.meant.commit:
            raise HubLied(self.name, f"is at commit {found.commit} where {self.meant.commit} was asked for")
        return found

    def _build(self, listed: _Listing) -> None:
        """Make the snapshot beside its place, and let it appear there whole."""
        reader = RangeReader(self.client, stop=self.stop, patience=self.patience)
        directory, file = self._directory(listed)
        partial = self._place.with_name(f".{self._place.name[:100]}.{uuid.uuid4().hex}")
        folder = partial / "files"
        folder.mkdir(parents=True)
        try:
            stand_ins = _Building(self, listed, reader, directory, folder).fill(file)
            about = {"directory": directory, "file": file, "stand_ins": stand_ins}
            (partial / "about.json").write_text(json.dumps(about))
            try:
                partial.rename(self._place)
            except OSError:
                if self._kept() is None:  # else somebody else was quicker, with the same
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _directory(self, listed: _Listing) -> tuple[str, str]:
        """The folder of the repository that is meant, and the file in it where that is meant alone."""
        inside = self.meant.inside.rstrip("/")
        if inside in listed.files:
            directory, _, file = inside.rpartition("/")
            return directory, file
        if inside and not any(path.startswith(f"{inside}/") for path in listed.files):
            raise HubNotFound(self.name, f"has no folder or file {clip(inside)} in {self.meant.repo}")
        return inside, ""


@dataclass
class _Building:
    """One snapshot as it is filled."""

    maker: _SnapshotMaker
    listed: _Listing
    reader: RangeReader
    directory: str
    folder: Path

    def fill(self, only: str) -> dict[str, tuple[int, str]]:
        """Put the files there; the stand-ins, by name, with size and sha256 of what they stand for."""
        here = {
            path.rpartition("/")[2]: listed
            for path, listed in self.listed.files.items()
            if path.rpartition("/")[0] == self.directory
        }
        if only:
            here = {only: here[only]}
        if is_dataset(self.maker.meant.repo):
            return self._data(only, here)
        small = {name for name in here if name in _SMALL or name.endswith(_INDEX) or (only and not _is_weights(name))}
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hub") as pool:
            list(pool.map(lambda name: self._small(name, here[name]), sorted(small)))
            weights = [name for name in here if _is_weights(name)]
            wanted = [name for name in self._wanted(weights) if name in here]
            if len(wanted) > MAX_WEIGHT_FILES:
                detail = f"has {len(wanted):,} files of weights; at most {MAX_WEIGHT_FILES:,} are read"
                raise HubNotFound(self.maker.name, detail)
            made = list(pool.map(lambda name: self._weights(name, here[name]), wanted))
        for name in here:
            if name.endswith(PICKLED):  # so that whoever opens the folder finds what it is
                (self.folder / name).touch()
        return {name: stand_in for name, stand_in in zip(wanted, made, strict=True) if stand_in is not None}

    def _wanted(self, weights: Sequence[str]) -> list[str]:
        """The files of weights that anybody might open, as `merge_core.checkpoint` looks for them."""
        alone = [name for name in _ALONE if name in weights]
        if _MODEL in weights:
            return [*alone, _MODEL]
        indexes = sorted(self.folder.glob(f"*{_INDEX}"))
        index = self.folder / f"{_MODEL}.index.json"
        if index in indexes or len(indexes) == 1:
            try:
                written = json.loads((index if index in indexes else indexes[0]).read_bytes())
                shards = {name for name in written["weight_map"].values() if isinstance(name, str)}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return alone  # whoever opens the index says what is wrong with it
            return sorted({*alone, *(shards & set(weights))})
        return sorted(weights)

    def _data(self, only: str, here: Mapping[str, _Listed]) -> dict[str, tuple[int, str]]:
        """A file of a data set: a stand-in that holds nothing, or the whole file, if it is small and has no sha256."""
        if not only:
            raise HubNotFound(self.maker.name, f"is a folder; name a file in it, such as {_like(here)}")
        listed = here[only]
        if listed.sha256 is None:
            self._weights(only, listed)
            return {}
        (self.folder / only).touch()
        os.truncate(self.folder / only, listed.size)
        return {only: (listed.size, listed.sha256)}

    def _remote(self, name: str, listed: _Listed) -> RemoteFile:
        meant, path = self.maker.meant, _joined(self.directory, name)
        return RemoteFile(meant.repo, meant.commit, path, listed.size, listed.sha256, f"{self.maker.name}/{name}")

    def _small(self, name: str, listed: _Listed) -> None:
        most = _SMALL.get(name, MAX_INDEX_BYTES if name.endswith(_INDEX) else MAX_JSON_BYTES)
        if listed.size <= most:
            (self.folder / name).write_bytes(self._whole(self._remote(name, listed), listed))
        elif name not in _OPTIONAL:
            raise HubNotFound(f"{self.maker.name}/{name}", f"is larger than {most:,} bytes")

    def _whole(self, file: RemoteFile, listed: _Listed) -> bytes:
        data = bytearray(listed.size)
        if data:
            self.reader.read(file, 0, [memoryview(data)])
        if listed.sha256 is not None:
            is_right = hashlib.sha256(data).hexdigest() == listed.sha256
        else:
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
            is_right = listed.sha1 is None or blob.hexdigest() == listed.sha1
        if not is_right:
            raise HubLied(file.name, "came with other bytes than the Hub's own digest of it says")
        return bytes(data)

    def _weights(self, name: str, listed: _Listed) -> tuple[int, str] | None:
        """A stand-in, for which size and sha256 are returned; or the whole file, if it is small and has no sha256."""
        file, place = self._remote(name, listed), self.folder / name
        if listed.sha256 is None:
            if listed.size > SMALL_FILE:
                detail = f"has {listed.size:,} bytes, of which the Hub has no sha256: it is in neither LFS nor Xet"
                raise HubLied(file.name, detail)
            place.write_bytes(self._whole(file, listed))
            return None
        start = self._range(file, 0, min(FIRST_BYTES, listed.size))
        length = 8 + int.from_bytes(start[:8], "little")
        if len(start) < length <= min(listed.size, 8 + MAX_HEADER_BYTES):
            start += self._range(file, len(start), length)
        place.write_bytes(start[:length])
        os.truncate(place, listed.size)
        return listed.size, listed.sha256

    def _range(self, file: RemoteFile, begin: int, end: int) -> bytes:
        data = bytearray(end - begin)
        if data:
            self.reader.read(file, begin, [memoryview(data)])
        return bytes(data)


def _like(names: Iterable[str]) -> str:
    """A file that somebody may have meant."""
    found = sorted(name for name in names if name.endswith((".jsonl", ".ndjson", ".parquet", ".txt")))
    return clip(found[0]) if found else "data.jsonl"


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _joined(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory and name else directory or name
