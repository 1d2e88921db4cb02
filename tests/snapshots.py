"""Snapshots of what lies elsewhere, for tests of the core: elsewhere is another folder of the same disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from merge_core.snapshots import OpenFile, Range, Snapshot

WINDOW = 32 * 2**20
COMMIT = "c0ffee" * 6 + "c0ff"


def stand_in(real: Path, place: Path) -> str:
    """Make a sparse file of the size of a safetensors file that holds its header; the sha256 of the real one."""
    with real.open("rb") as file:
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little"))
    place.write_bytes(header)
    os.truncate(place, real.stat().st_size)
    return hashlib.sha256(real.read_bytes()).hexdigest()


class FolderSupply:
    """Supplies stand-ins from the folder they were made of, and remembers what it was asked for."""

    def __init__(self, *, in_files: bool) -> None:
        self.in_files = in_files
        self.real: dict[Path, Path] = {}
        self.sha256s: dict[Path, str] = {}
        self.reads: list[Range] = []
        self.expected: list[tuple[str, Sequence[Range]]] = []
        self.finished: list[str] = []
        self.is_open = False
        self.received: Callable[[int], None] = lambda count: None
        self._lock = threading.Lock()

    def window(self, limit: int) -> int:
        return WINDOW

    def begin(self, window: int, *, stop: Callable[[], bool], received: Callable[[int], None]) -> None:
        assert window == WINDOW
        self.is_open, self.received = True, received

    def open(self, file: Path) -> OpenFile:
        assert self.in_files and self.is_open
        return OpenFile(os.open(self.real[file], os.O_RDONLY))

    def read(self, file: Path, offset: int, space: memoryview) -> None:
        assert not self.in_files and self.is_open
        with self._lock:
            self.reads.append((file, offset, offset + len(space)))
            self.received(len(space))
        with self.real[file].open("rb") as stream:
            stream.seek(offset)
            assert stream.readinto(space) == len(space)

    def expect(self, reads: Iterable[tuple[str, Sequence[Range]]]) -> None:
        self.expected = list(reads)

    def done(self, tensor: str) -> None:
        self.finished.append(tensor)

    def sha256(self, file: Path) -> tuple[str, bool]:
        return self.sha256s[file], self.in_files

    def end(self) -> None:
        self.is_open = False


class FolderLibrary:
    """Finds `org/NAME` in a folder of models, as snapshots with stand-ins in another."""

    def __init__(self, models: Path, snapshots: Path, *, in_files: bool = False) -> None:
        self.models, self.snapshots, self.supply = models, snapshots, FolderSupply(in_files=in_files)
        self.found: dict[tuple[str, str | None], tuple[Snapshot, Path]] = {}

    def known(self, path: str, revision: str | None) -> tuple[Snapshot, Path] | None:
        return self.found.get((path, revision))

    def find(self, path: str, revision: str | None) -> tuple[Snapshot, Path] | None:
        org, _, name = path.partition("/")
        if org != "org":
            return None
        folder = self.snapshots / COMMIT / name
        if not folder.exists():
            shutil.copytree(self.models / name, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            for real in (self.models / name).glob("*.safetensors"):
                self.supply.sha256s[folder / real.name] = stand_in(real, folder / real.name)
        stand_ins = {file.name: self.supply.sha256s[file] for file in folder.glob("*.safetensors")}
        self.supply.real |= {folder / each: self.models / name / each for each in stand_ins}
        shown = f"{path}@{revision}" if revision else path
        snapshot = Snapshot(shown, path, COMMIT, folder, stand_ins, revision)
        self.found[path, revision] = snapshot, folder
        return self.found[path, revision]

    def __iter__(self) -> Iterator[Snapshot]:
        return (snapshot for snapshot, _ in self.found.values())
