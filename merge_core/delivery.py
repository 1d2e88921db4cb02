"""Finished files that go elsewhere while a merge is still at work on the next."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from merge_core.files import WrittenFile


class Delivery(Protocol):
    """Takes each file of weights as soon as it is complete, durable and hashed, in the order of the plan.

    `removes`: whether a file is removed here once it is delivered, so that no more than two are on the disk at a time.
    """

    removes: bool

    def deliver(self, path: Path, file: WrittenFile) -> None:
        """Return when the file has arrived and need not be sent again; called by a thread of its own, of one file at a
        time. Whatever it raises ends the merge.
        """

    def give_up(self) -> None:
        """End what is under way soon, by an error: the merge has come to nothing. From any thread."""
