"""What is put into an artifact store is there whole, or not at all once the janitor has been there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_core.errors import Canceled, StorageFailed
from merge_core.files import WrittenFile
from workers.artifacts import ArtifactStore, FolderStore, open_artifacts
from workers.settings import Settings

JOB = "mrg_1"


@pytest.fixture
def artifacts(tmp_path: Path) -> Iterator[ArtifactStore]:
    yield FolderStore(tmp_path / "shared" / "artifacts")


def made(folder: Path, **sizes: int) -> list[WrittenFile]:
    """A finished artifact's files: the lock is the first of them, so that its place shows who cared."""
    files = []
    for name, size in {"merge.lock.json": 100, "deep/model.safetensors": 3 * 2**20 + 7, **sizes}.items():
        content = random.Random(name).randbytes(size)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        files.append(WrittenFile(name, size, hashlib.sha256(content).hexdigest()))
    return files


def read_back(artifacts: ArtifactStore, files: list[WrittenFile]) -> None:
    assert artifacts.files(JOB) == {file.path: file.size for file in files}
    for file in files:
        whole = b"".join(artifacts.read(JOB, file.path, 0, file.size))
        assert hashlib.sha256(whole).hexdigest() == file.sha256


def test_what_was_put_is_read(artifacts: ArtifactStore, tmp_path: Path) -> None:
    files = made(tmp_path / "out")
    sent: list[int] = []
    assert list(artifacts.list()) == [] and artifacts.files(JOB) == {}
    artifacts.put_folder(JOB, tmp_path / "out", files, sent=sent.append)
    assert sum(sent) == sum(file.size for file in files)
    assert list(artifacts.list()) == [JOB]
    read_back(artifacts, files)
    content = (tmp_path / "out" / "deep/model.safetensors").read_bytes()
    for start, end in [(0, 1), (2**20 - 1, 2**20 + 1), (5, len(content)), (7, 7), (len(content) - 1, len(content))]:
        assert b"".join(artifacts.read(JOB, "deep/model.safetensors", start, end)) == content[start:end]


def test_what_is_not_there_is_said_before_a_byte_is_sent(artifacts: ArtifactStore) -> None:
    with pytest.raises(FileNotFoundError):
        artifacts.read(JOB, "nothing", 0, 1)


def test_deleted_is_gone_and_may_be_deleted_again(artifacts: ArtifactStore, tmp_path: Path) -> None:
    files = made(tmp_path / "out")
    artifacts.put_folder(JOB, tmp_path / "out", files)
    artifacts.put_folder(f"{JOB}0", tmp_path / "out", files)
    for _ in range(2):
        artifacts.delete(JOB)
        assert artifacts.files(JOB) == {} and list(artifacts.list()) == [f"{JOB}0"]


def test_a_canceled_put_can_go_on_or_be_removed(artifacts: ArtifactStore, tmp_path: Path) -> None:
    files = made(tmp_path / "out", second=2**20)
    done = 0

    def stop() -> bool:
        return done > 4 * 2**20

    def sent(size: int) -> None:
        nonlocal done
        done += size

    with pytest.raises(Canceled):
        artifacts.put_folder(JOB, tmp_path / "out", files, sent=sent, stop=stop)
    assert list(artifacts.list()) == [JOB], "what nobody finished can be found"
    assert "merge.lock.json" not in artifacts.files(JOB), "the lock comes last"
    (tmp_path / "out" / "deep/model.safetensors").unlink()
    artifacts.put_folder(JOB, tmp_path / "out", files)
    read_back(artifacts, files)
    artifacts.delete(JOB)
    assert list(artifacts.list()) == []


def test_putting_again_changes_nothing(artifacts: ArtifactStore, tmp_path: Path) -> None:
    files = made(tmp_path / "out")
    for _ in range(2):
        artifacts.put_folder(JOB, tmp_path / "out", files)
    read_back(artifacts, files)


def test_what_lies_where_it_is_kept_is_not_moved(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    artifacts = open_artifacts(settings)
    files = made(settings.artifacts / JOB)
    assert artifacts.holds(settings.artifacts / JOB)
    artifacts.put_folder(JOB, settings.artifacts / JOB, files)
    read_back(artifacts, files)
    (settings.artifacts / f".{JOB}.1.partial").mkdir()
    assert list(artifacts.list()) == [JOB], "work that grows is not stored yet"


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    artifacts = FolderStore(tmp_path / "file" / "artifacts")
    with pytest.raises(StorageFailed, match="Not a directory"):
        artifacts.put_folder(JOB, tmp_path / "out", made(tmp_path / "out"))
    with pytest.raises(StorageFailed, match="Not a directory"):
        list(artifacts.list())
