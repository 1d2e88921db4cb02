"""Models that lie elsewhere, as the core sees them: folders of a repository at one commit, and where its bytes are had.

A snapshot's folder holds its small files as they are, and stand-ins for the large ones: sparse files of the true size
that hold only the true header. So all is planned, and every lie found out, by the code that reads local files; the
bytes behind the headers come from a `Supply`. Who makes snapshots and supplies is not the core's affair: it has no
network.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

Range = tuple[Path, int, int]
"""A file of a snapshot by its stand-in, and which of its bytes: begin and end."""


class OpenFile(int):
    """The descriptor of a file that is open for as long as anybody has this very object."""

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self)


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, or a folder of it; `name` is what it is called in messages.

    `folder` holds its files. Those in `stand_ins`, name → sha256, hold no more than a header; the others are real.
    `revision`: as it was asked for.
    """

    name: str
    repo: str
    commit: str
    folder: Path
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None

    def answers(self, path: str) -> bool:
        """Whether a name may mean it, whatever its revision."""
        return path == self.repo or path.startswith(f"{self.repo}/")


class Supply(Protocol):
    """The bytes of the files of a job's snapshots, each named by its stand-in; for many threads at once.

    `in_files`: whether files come whole, as descriptors, rather than as ranges of bytes. What cannot be had raises
    `CheckpointError`; a wait for it ends with `Canceled` when `stop` says so.
    """

    in_files: bool

    def window(self, limit: int) -> int:
        """Bytes of memory that it takes where the whole process may have `limit`, besides the space that it fills."""

    def begin(self, window: int, *, stop: Callable[[], bool], received: Callable[[int], None]) -> None:
        """Bytes will be asked for: it may take as much memory as was planned, and tells what comes over the network."""

    def open(self, file: Path) -> OpenFile:
        """A whole file; only if they come `in_files`."""

    def read(self, file: Path, offset: int, space: memoryview) -> None:
        """Fill `space` with the bytes of a file from an offset on."""

    def expect(self, reads: Iterable[tuple[str, Sequence[Range]]]) -> None:
        """By tensor, in order, what will be read next; in place of what was expected so far and not begun."""

    def done(self, tensor: str) -> None:
        """What was expected for a tensor will not be read again."""

    def sha256(self, file: Path) -> tuple[str, bool]:
        """The file's sha256 as its origin has it, and whether it was proved here, by all of its bytes. Raises
        `CheckpointError` where these have another.
        """

    def end(self) -> None:
        """Nothing more will be asked for."""


class Library(Protocol):
    """Finds snapshots by the names that documents have for models."""

    @property
    def supply(self) -> Supply:
        """Of all snapshots that were found."""

    def known(self, path: str, revision: str | None) -> tuple[Snapshot, Path] | None:
        """What a name was found to mean before, which it means from then on."""

    def find(self, path: str, revision: str | None) -> tuple[Snapshot, Path] | None:
        """The snapshot that a name means, and the folder or file in it; None for what is no name of a repository.

        Raises `CheckpointError`, which names what it was looking for as `path`.
        """

    def __iter__(self) -> Iterator[Snapshot]:
        """Those that were found."""


class Roots(tuple[Path, ...]):
    """Where models may lie: below these folders (or `anywhere`), and in the snapshots that a library finds."""

    library: Library | None
    anywhere: bool

    def __new__(cls, folders: Iterable[Path] = (), library: Library | None = None, *, anywhere: bool = False) -> Self:
        roots = super().__new__(cls, folders)
        roots.library, roots.anywhere = library, anywhere
        return roots


def library_of(roots: Sequence[Path] | None) -> Library | None:
    """Where snapshots are found, if anywhere."""
    return roots.library if isinstance(roots, Roots) else None


def snapshots_of(roots: Sequence[Path] | None) -> list[Snapshot]:
    """The snapshots that were found so far."""
    return list(library_of(roots) or ())


def folders_of(roots: Sequence[Path] | None) -> Sequence[Path] | None:
    """The folders that files may lie in, those of snapshots too; None: anywhere."""
    if not isinstance(roots, Roots):
        return roots
    return None if roots.anywhere else [*roots, *(snapshot.folder for snapshot in snapshots_of(roots))]


def snapshot_of(path: Path, roots: Sequence[Path] | None) -> Snapshot | None:
    """The snapshot that a path lies in."""
    return next((each for each in snapshots_of(roots) if path.is_relative_to(each.folder)), None)


def origin_of(path: str, revision: str | None, origins: Iterable[Snapshot]) -> Snapshot | None:
    """Which of the snapshots a name means; None where it means a local folder."""
    found = [origin for origin in origins if origin.answers(path)]
    # One commit may have been asked for under several revisions: its folder is known by the first.
    return next((origin for origin in found if origin.revision == revision), found[0] if found else None)


def supply_of(roots: Sequence[Path] | None) -> Supply | None:
    """Where the bytes behind stand-ins come from; None where there are none."""
    library = library_of(roots)
    return library.supply if library is not None and any(snapshot.stand_ins for snapshot in library) else None


def window_of(roots: Sequence[Path] | None, limit: int) -> int:
    """Bytes of memory for what lies elsewhere, of so many that the whole process may have."""
    supply = supply_of(roots)
    return 0 if supply is None else supply.window(limit)


@contextmanager
def supplied(
    roots: Sequence[Path] | None, window: int, stop: Callable[[], bool], received: Callable[[int], None]
) -> Iterator[Supply | None]:
    """The supply of what lies elsewhere, while it is read from; None where all lies here."""
    supply = supply_of(roots)
    if supply is None:
        yield None
        return
    supply.begin(window, stop=stop, received=received)
    try:
        yield supply
    finally:
        supply.end()
