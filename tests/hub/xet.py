"""What Xet clients send and fetch: content-addressed chunks, kept by hf_xet itself in folders (`local://`).

Each client that uploads gets a folder of its own, as a folder serves one process at a time; what a commit names is
taken out of it. Each client that downloads gets a copy of the folder that holds everything.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

_HOUR = 3600
_BOOKEND = b"\xff" * 32
_RECORD = 48


class XetStore:
    """Where the double keeps what comes and goes by Xet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._all = folder / "all"
        self._all.mkdir(parents=True)
        self._handed_out = 0
        self._turn = threading.Lock()
        self._session = None

    def folder_for_upload(self) -> Path:
        with self._turn:
            self._handed_out += 1
            folder = self._folder / f"in-{self._handed_out}"
        folder.mkdir()
        return folder

    def folder_for_download(self) -> Path:
        with self._turn:
            self._handed_out += 1
            folder = self._folder / f"out-{self._handed_out}"
            shutil.copytree(self._all, folder)
        return folder

    def bytes_received(self) -> int:
        """Of all chunks that clients have sent, compressed as they were."""
        return sum(path.stat().st_size for path in self._folder.glob("in-*/xet/xorbs/xorbs/*") if not path.suffixes[1:])

    def take(self, sha256: str, target: Path) -> str | None:
        """Write the file with this sha256 to `target`, if anybody has sent it; its Xet hash."""
        with self._turn:
            for sent in sorted(self._folder.glob("in-*")):
                for shard in sent.glob("xet/xorbs/shards/*.mdb"):
                    if (found := _files_of(shard).get(sha256)) is not None:
                        self._rebuild(sent, *found, target)
                        return found[0]
        return None

    def _rebuild(self, sent: Path, file_hash: str, size: int, target: Path) -> None:
        from hf_xet import XetFileInfo, XetSession

        self._session = self._session or XetSession()
        credentials = {"token": "-", "token_expiry_unix_secs": int(time.time()) + _HOUR}
        copy = self._folder / f"copy-{file_hash}"
        shutil.copytree(sent, copy)  # the client may still hold its own
        partial = target.with_name(f".{target.name}")
        with self._session.new_file_download_group(endpoint=f"local://{copy}", **credentials) as group:
            group.start_download_file(XetFileInfo(file_hash, size), str(partial))
        shutil.rmtree(copy)
        with self._session.new_upload_commit(endpoint=f"local://{self._all}", **credentials) as commit:
            commit.start_upload_file(str(partial), sha256=target.name)
        partial.rename(target)


def _files_of(shard: Path) -> dict[str, tuple[str, int]]:
    """The files that a shard of Xet's metadata describes: Xet hash and size by sha256."""
    data, at, found = shard.read_bytes(), _RECORD, {}
    while (file_hash := data[at : at + 32]) != _BOOKEND:
        flags, segments = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (32, 36))
        sizes = (data[at + _RECORD * (1 + i) + 36 :][:4] for i in range(segments))
        size = sum(int.from_bytes(each, "little") for each in sizes)
        at += _RECORD * (1 + segments * (2 if flags & 1 << 31 else 1))
        if flags & 1 << 30:
            found[_hexadecimal(data[at : at + 32])] = (_hexadecimal(file_hash), size)
            at += _RECORD
    return found


def _hexadecimal(raw: bytes) -> str:
    """A hash as it is written: four numbers of eight bytes, each from its highest byte."""
    return b"".join(raw[i : i + 8][::-1] for i in range(0, 32, 8)).hex()
