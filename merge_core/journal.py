"""What a piece of work has finished, line by line, so that it can go on after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_core.files import disk_error

JOURNAL = "journal.jsonl"


class Journal:
    """Lines of JSON, appended as things are finished; only a journal of the same plan counts."""

    def __init__(self, path: Path, plan_digest: str) -> None:
        self.path, self.plan_digest = path, plan_digest
        self.tensors: dict[str, str] = {}
        self.notes: dict[str, Any] = {}
        self.is_new = True
        self._descriptor: int | None = None

    def open(self) -> None:
        """Read what there is, and be ready to append."""
        self.read()
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if self.is_new:
            os.ftruncate(self._descriptor, 0)
            self._append({"plan": self.plan_digest})

    def read(self) -> None:
        """Read what there is, which somebody else may go on with."""
        lines = self._read()
        self.is_new = not lines or lines[0].get("plan") != self.plan_digest
        for line in [] if self.is_new else lines[1:]:
            if "tensor" in line:
                self.tensors[line["tensor"]] = line["blake3"]
            elif "note" in line:
                self.notes[line["note"]] = line["value"]

    def clear_folder(self) -> None:
        """Remove what lies beside a new journal: another plan's unfinished work."""
        if not self.is_new:
            return
        for left in self.path.parent.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left != self.path:
                left.unlink()

    def tensor(self, name: str, digest: str) -> None:
        self._append({"tensor": name, "blake3": digest})

    def note(self, name: str, value: Any) -> None:
        self.notes[name] = value
        self._append({"note": name, "value": value})

    def sync(self) -> None:
        """Let what was recorded outlive the machine too."""
        assert self._descriptor is not None
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._descriptor is not None
        text = json.dumps(line)
        try:
            # A line begins with its newline, so that one cut short by a kill spoils nothing that follows.
            os.write(self._descriptor, f"\n{_seal(text)} {text}".encode())
        except OSError as error:
            raise disk_error(error, self.path.parent, len(text)) from None

    def _read(self) -> list[dict[str, Any]]:
        """The lines that are as they were written; one that was torn or changed counts as never written."""
        try:
            text = self.path.read_text(errors="replace")
        except FileNotFoundError:
            return []
        sealed = [line.partition(" ") for line in text.split("\n")]
        return [json.loads(text) for seal, _, text in sealed if text and seal == _seal(text)]


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
