"""The models in the service's folders: the names that recipes may use, found by looking, with no weight read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merge_core.checkpoint import check_below
from merge_core.errors import WeightsmithError
from merge_core.headers import MAX_CONFIG_BYTES, read_json

MAX_DEPTH = 6
MAX_ENTRIES = 50_000
"""Files and folders that are looked at, of all there are."""
_SUFFIX = ".safetensors"
_ADAPTER = "adapter_config.json"

Kind = Literal["model", "adapter", "file"]


@dataclass(frozen=True)
class LocalModel:
    """A folder with weights, or a lone file. `name`: what a recipe calls it; `size`: bytes of its safetensors files."""

    name: str
    kind: Kind
    size: int
    path: Path
    root: Path

    def config(self) -> Mapping[str, Any]:
        """What its `config.json` says; nothing where it has none that can be read."""
        if self.kind != "model":
            return {}
        try:
            found = read_json(self.path / "config.json", MAX_CONFIG_BYTES, [self.root])
        except WeightsmithError:
            return {}
        inner = found.get("text_config")
        return {**inner, **found} if isinstance(inner, dict) else found


def local_models(roots: Sequence[Path]) -> tuple[list[LocalModel], bool]:
    """All models by name, and whether there was more to look at than `MAX_ENTRIES`.

    What no recipe could name is left out: links that lead elsewhere, what an earlier root hides, names with `@` or
    `+`, which stand for something else there. So are folders and files whose names begin with a dot.
    """
    found, left = list[LocalModel](), MAX_ENTRIES
    for i, root in enumerate(roots):
        walk = _Walk(root, left)
        hidden = roots[:i]
        found += [each for each in walk if not any(os.path.lexists(other / each.name) for other in hidden)]
        left = walk.left
    return sorted(found, key=lambda each: each.name), left < 0


class _Walk:
    """The models below one root; `left` of the entries that may be looked at, negative if there were more."""

    def __init__(self, root: Path, left: int) -> None:
        self.root, self.left = root, left
        self._seen: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[LocalModel]:
        yield from self._folder(self.root, 0)

    def _folder(self, folder: Path, depth: int) -> Iterator[LocalModel]:
        entries = self._entries(folder)
        weights = {entry.name: size for entry in entries if (size := self._weights(entry)) is not None}
        names = {entry.name for entry in entries}
        single = "model.safetensors" in weights or len(weights) == 1
        if weights and depth > 0 and (single or any(name.endswith(f"{_SUFFIX}.index.json") for name in names)):
            size = weights.get("model.safetensors", sum(weights.values()))
            yield self._model(folder, "adapter" if _ADAPTER in names else "model", size)
        else:
            for name, size in weights.items():
                yield self._model(folder / name, "file", size)
        if depth < MAX_DEPTH:
            for entry in entries:
                if entry.name not in weights and _is_folder(entry) and _can_be_named(entry.name):
                    yield from self._folder(folder / entry.name, depth + 1)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, by name; nothing where it was looked at before, leads elsewhere or cannot be read."""
        try:
            check_below(folder, [self.root])
            now = folder.stat()
            if (now.st_dev, now.st_ino) in self._seen:
                return []
            self._seen.add((now.st_dev, now.st_ino))
            entries = []
            with os.scandir(folder) as listed:
                for entry in listed:
                    self.left -= 1
                    if self.left < 0:
                        break
                    entries.append(entry)
        except (WeightsmithError, OSError):
            return []
        return sorted(entries, key=lambda entry: entry.name)

    def _weights(self, entry: os.DirEntry[str]) -> int | None:
        """The size of a file of weights; None of anything else."""
        if not entry.name.endswith(_SUFFIX) or not _can_be_named(entry.name):
            return None
        try:
            check_below(Path(entry.path), [self.root])
            return entry.stat().st_size if entry.is_file() else None
        except (WeightsmithError, OSError):
            return None

    def _model(self, path: Path, kind: Kind, size: int) -> LocalModel:
        return LocalModel(path.relative_to(self.root).as_posix(), kind, size, path, self.root)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _can_be_named(name: str) -> bool:
    return not name.startswith(".") and name.isprintable() and not any(sign in name for sign in "@+")
