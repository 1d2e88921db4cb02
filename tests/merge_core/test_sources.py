"""Input files are hashed once, and never wrongly."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from merge_core import sources
from merge_core.artifact import LOCK_NAME
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import method_recipe


def hashes_in_lock(models: Path, out: Path, cache: Path) -> dict[str, str]:
    """What the lock says of the inputs, having checked it against the files."""
    merge(Recipe.from_data(method_recipe("linear")), out, roots=[models], cache=cache)
    lock = json.loads((out / LOCK_NAME).read_text())
    found = {
        f"{source['model']}/{file['path']}": file["sha256"] for source in lock["sources"] for file in source["files"]
    }
    for name, digest in found.items():
        assert hashlib.sha256((models / name).read_bytes()).hexdigest() == digest
    return found


@pytest.fixture
def settled(models: Path) -> Path:
    """The models as if written long ago, except for the time stamp that nobody can set."""
    for file in models.rglob("*.safetensors"):
        os.utime(file, ns=(10**18, 10**18))
    return models


def test_a_file_is_hashed_once(settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_SETTLED_NS", 0)
    first = hashes_in_lock(settled, tmp_path / "one", tmp_path / "cache")
    monkeypatch.setattr(sources.Sources, "_hash", None)
    assert hashes_in_lock(settled, tmp_path / "two", tmp_path / "cache") == first


def test_a_file_that_changed_is_hashed_again(settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_SETTLED_NS", 0)
    hashes_in_lock(settled, tmp_path / "one", tmp_path / "cache")
    file = settled / "m0" / "model-00001-of-00002.safetensors"
    stamps = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    hashes_in_lock(settled, tmp_path / "two", tmp_path / "cache")


def test_a_file_changed_a_moment_ago_is_not_remembered(models: Path, tmp_path: Path) -> None:
    hashes_in_lock(models, tmp_path / "one", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("sha256/*"))


def test_a_cache_that_cannot_be_read_or_written_is_done_without(models: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    hashes_in_lock(models, tmp_path / "one", tmp_path / "cache")


def test_hashing_that_falls_behind_holds_the_merge(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_WORTH_A_TASK", 1)
    monkeypatch.setattr(os, "sysconf", lambda name: 1)  # a machine with one byte of memory
    dropped: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, start, size, advice: dropped.append(size))
    hashes_in_lock(models, tmp_path / "one", tmp_path / "cache")
    assert sum(dropped) > 0
