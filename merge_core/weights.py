"""Named tensors that a merge reads from, by rows, wherever the rows come from.

A `Checkpoint` reads them from its files. Others wrap one and compute rows from it: planner, executor and methods never
know which.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from merge_core.cards import Card
from merge_core.dtypes import DType
from merge_core.errors import CheckpointError
from merge_core.headers import Shard, TensorInfo
from merge_core.snapshots import Snapshot

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_NUMBERED = re.compile(r"(^|\.)\d+\.")
_EMBEDDING = re.compile(r"embed(?!_out)|(^|[._])(wte|wpe|shared|project_in|patch|pre_layrnorm|pre_layernorm)([._]|$)")


def is_embedding(tensor: str) -> bool:
    """Whether a tensor outside the layers stands before them (embeddings) rather than after (final norm, head)."""
    return _EMBEDDING.search(tensor) is not None


Companions = Mapping[str, Path | bytes]
"""Files beside the weights, by name: where each lies, or what it holds."""


class Weights(ABC):
    """Named tensors, described by headers, read by rows.

    Attributes: `path`, what was opened; `tensors`, name → `TensorInfo` in storage order; `shards`, every file that rows
    come from, name → `Shard`; `config`, the parsed `config.json` or an empty dict; `notes`, what the user should know
    about how they came to be; `origins`, the snapshots that files of theirs are in.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    shards: Mapping[str, Shard]
    config: Mapping[str, Any]
    notes: Sequence[str] = ()
    origins: Sequence[Snapshot] = ()
    planning_bytes: int = 0
    """Memory that it took to make them of other weights."""

    @abstractmethod
    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor in its dtype, `[stop - start, *shape[1:]]`; a 0-d tensor has one row.

        They are put into `space` (uint8, large enough) if it is given. Raises `CheckpointError`.
        """

    @abstractmethod
    def place(self, info: TensorInfo) -> tuple[int, int] | None:
        """The descriptor and offset where a tensor's rows lie as they are; None where they have to be computed."""

    @abstractmethod
    def ranges(self, info: TensorInfo) -> Iterator[tuple[str, int, int]]:
        """Which bytes of which files in `shards` a tensor's rows come from: name, begin and end."""

    @abstractmethod
    def temporary(self, info: TensorInfo) -> float:
        """Bytes of memory per element of a block for computing a tensor's rows, besides the rows; 0 for stored ones."""

    def format(self, info: TensorInfo) -> DType:
        """The number format that the model keeps a tensor in; computed rows may come in a wider one."""
        return info.dtype

    @property
    def settings(self) -> Mapping[str, Path]:
        """The small files that say what the weights are, by the names that the lock gives them."""
        return {}

    @property
    @abstractmethod
    def companions(self) -> Companions:
        """The tokenizer and other small files that belong with the weights. Raises `PathNotAllowed`."""

    @property
    def cards(self) -> Mapping[str, Card]:
        """The model cards of what the weights are made of, by the names that the lock gives them: first the model's,
        then those of what is put on it. One that cannot be read is not among them.
        """
        return {}

    @abstractmethod
    def descriptor(self, file: str) -> int:
        """A file of `shards`, open for reading; the same one every time. Raises `CheckpointError` if it changed."""

    @abstractmethod
    def close(self) -> None:
        """Close every file."""

    def prepare(self, info: TensorInfo, pool: Executor | None) -> None:  # noqa: B027 — most have nothing to find out
        """Find out what must be known before a tensor's rows can be computed, many threads at once; nothing for stored
        ones. Rows are right without it, but may be slow.
        """

    def thread_bytes(self, info: TensorInfo) -> int:
        """Bytes of memory per thread for computing a tensor's rows, however many at once."""
        return 0

    def always_read(self) -> Iterable[str]:
        """Files of `shards` that are read whichever tensors are."""
        return ()

    def is_whole(self, info: TensorInfo) -> bool:
        """Whether a tensor's rows can only be computed all at once."""
        return False

    @property
    def ties_embeddings(self) -> bool:
        """Whether the config says that the output head is the input embedding."""
        tied = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        return tied is True

    @property
    def text_section(self) -> str | None:
        """Where a multimodal config describes its language model; None: at the top."""
        return next((name for name in _TEXT_CONFIGS if isinstance(self.config.get(name), dict)), None)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config about the language model."""
        return self.config[self.text_section] if self.text_section else self.config

    def find(self, name: str, shape: tuple[int, ...]) -> TensorInfo | None:
        """The stored tensor that answers to `name`: itself, or the embedding that the config ties it to.

        A tied head is not stored; its partner is the only stored embedding of the wanted `shape`.
        """
        return self.tensors.get(name) or self.tied_partner(name, shape)

    def tied_partner(self, head: str, shape: tuple[int, ...]) -> TensorInfo | None:
        """The embedding that the config ties a head to, whether the head is stored or not; None if it ties none."""
        if not self.ties_embeddings or len(shape) != 2 or is_embedding(head) or _NUMBERED.search(head):
            return None
        partners = self._embeddings[shape]
        return partners[0] if len(partners) == 1 else None

    @cached_property
    def _embeddings(self) -> Mapping[tuple[int, ...], list[TensorInfo]]:
        found: dict[tuple[int, ...], list[TensorInfo]] = defaultdict(list)
        for info in self.tensors.values():
            if is_embedding(info.name):
                found[info.shape].append(info)
        return found

    def ends_inside(self, info: TensorInfo) -> CheckpointError:
        """The error of a file that became shorter than its header says."""
        what = f"ends inside {info.name}; it was changed while being read"
        return CheckpointError(self.shards[info.file].path, what, tensor=info.name)

    @staticmethod
    def row_bytes(info: TensorInfo) -> int:
        """Bytes of one row of a tensor; a 0-d tensor has one row."""
        return info.nbytes // info.rows if info.rows else 0

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a shard is no longer the file whose header was read."""
        for shard in self.shards.values():
            if shard.snapshot is None and not (shard.path.exists() and shard.is_still(shard.path.stat())):
                raise CheckpointError(shard.path, "changed while it was being merged; start the merge again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Derived(Weights):
    """Weights made of others, `inner`, and like those in all that is not said otherwise."""

    def __init__(self, inner: Weights) -> None:
        self.inner = inner
        self.path, self.tensors, self.shards = inner.path, inner.tensors, inner.shards
        self.config, self.notes, self.planning_bytes = inner.config, inner.notes, inner.planning_bytes
        self.origins = inner.origins

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        return self.inner.rows(info, start, stop, space)

    def place(self, info: TensorInfo) -> tuple[int, int] | None:
        return self.inner.place(info)

    def ranges(self, info: TensorInfo) -> Iterator[tuple[str, int, int]]:
        return self.inner.ranges(info)

    def temporary(self, info: TensorInfo) -> float:
        return self.inner.temporary(info)

    def format(self, info: TensorInfo) -> DType:
        return self.inner.format(info)

    @property
    def settings(self) -> Mapping[str, Path]:
        return self.inner.settings

    @property
    def companions(self) -> Companions:
        return self.inner.companions

    @property
    def cards(self) -> Mapping[str, Card]:
        return self.inner.cards

    def descriptor(self, file: str) -> int:
        return self.inner.descriptor(file)

    def close(self) -> None:
        self.inner.close()

    def prepare(self, info: TensorInfo, pool: Executor | None) -> None:
        self.inner.prepare(info, pool)

    def thread_bytes(self, info: TensorInfo) -> int:
        return self.inner.thread_bytes(info)

    def always_read(self) -> Iterable[str]:
        return self.inner.always_read()

    def is_whole(self, info: TensorInfo) -> bool:
        return self.inner.is_whole(info)
