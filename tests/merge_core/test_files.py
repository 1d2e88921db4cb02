"""Files grow from front to back, whatever the pieces, past the page cache or through it."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core import files
from merge_core.files import PAGE, PagedFile

SIZES = st.sampled_from([1, 2, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 2**20 - 1, 2**20, 2**20 + PAGE, 2**21 + 7])


def pieces(sizes: list[int]) -> list[memoryview]:
    """Random bytes; every other piece begins on a page of memory, as the blocks of a merge do."""
    made = []
    for number, size in enumerate(sizes):
        space = torch.empty(size + 2 * PAGE, dtype=torch.uint8)
        first = -space.data_ptr() % PAGE + number % 2
        part = space[first : first + size].numpy()
        part[:] = list(random.Random(number).randbytes(size))  # type: ignore[call-overload]
        made.append(memoryview(part))
    return made


@settings(max_examples=40)
@given(st.lists(SIZES, min_size=1, max_size=6), st.integers(0, 6))
def test_any_pieces_make_the_file_and_it_can_be_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], killed_after: int
) -> None:
    path = tmp_path_factory.mktemp("file") / "shard"
    given_, whole = pieces(sizes), b""
    done = PagedFile(path, sum(sizes))
    told: list[int] = []
    for piece in given_[:killed_after]:
        done.append(piece)
        whole += bytes(piece)
        done.when_written(len(whole), functools.partial(told.append, len(whole)))
    done.close()
    reached = max(told, default=0)
    assert path.read_bytes()[:reached] == whole[:reached], "what is said to be written is"

    again, at = PagedFile(path, sum(sizes)), 0
    again.go_to(reached)
    for piece in given_:
        if at >= reached:
            again.append(piece)
        at += len(piece)
    again.complete()

    assert path.read_bytes() == b"".join(bytes(piece) for piece in given_)
    assert not path.stat().st_mode & 0o022


def test_a_file_system_that_takes_no_direct_writes_gets_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.pwrite, []

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data, offset)

    monkeypatch.setattr(files.os, "pwrite", pwrite)
    file = PagedFile(tmp_path / "shard", 10_000)
    (piece,) = pieces([10_000])
    file.append(piece)
    file.complete()
    assert (tmp_path / "shard").read_bytes() == bytes(piece)
    assert refused == [0]
