"""Whether a published merge is what its lock says: its files, its sources, and its tensors, made again.

Usage: `verify(PublishedFolder("merged"), sample=16)`. Nothing of what was published is trusted, its lock least of all:
a tensor agrees only if the bytes in its file, the digest in the lock and what the recipe makes of the sources are one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import torch
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from merge_core import __version__
from merge_core.aligned import FILE_NAME as ALIGNMENT_NAME
from merge_core.artifact import LOCK_NAME, made_here, small_files
from merge_core.checkpoint import PICKLED, check_below
from merge_core.errors import Canceled, CheckpointError, CheckpointNotFound, WeightsmithError
from merge_core.headers import (
    MAX_HEADER_BYTES,
    MAX_INDEX_BYTES,
    MAX_JSON_BYTES,
    MAX_TENSORS,
    TensorInfo,
    clip,
    open_regular,
    parse_header,
    parse_json,
)
from merge_core.layout import INDEX_NAME
from merge_core.merge import merge
from merge_core.merged import leaves
from merge_core.on_demand import OnDemand, Stop, on_demand
from merge_core.patching import moved
from merge_core.plan import Plan, Step
from merge_core.progress import Progress, Report
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.reversal import REVERSAL_NAME
from merge_core.snapshots import library_of, snapshot_of, supplied, supply_of, window_of
from merge_core.sources import Sources

USUAL_SAMPLE = 16
_READ = 2**22
_LOADED = (".safetensors", ".safetensors.index.json", "config.json", ".py", ".jinja", *PICKLED)
"""What the names of files end with that bear on what a model is."""
_BESIDE = (REVERSAL_NAME, ALIGNMENT_NAME)
"""Files of tensors that are not the model's."""
_CLOSE = 0.01
"""How far numbers that depend on the machine may be from those of another, of their own size."""


class Published(Protocol):
    """The files of a merge that somebody published, none of which is to be trusted."""

    name: str
    is_whole: bool
    """Whether every file that was published can be looked at."""

    def sizes(self) -> Mapping[str, int]:
        """Every file in its folder, in bytes. Raises `WeightsmithError`."""

    def sha256(self, file: str) -> str | None:
        """What its origin says of a file that has to be fetched; None for one to be hashed here."""

    def read(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        """Bytes of a file, in parts. Raises `WeightsmithError`, also where there are fewer."""

    def header(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        """The same of the header of a file of weights, which is there already."""


class PublishedFolder:
    """A folder of this machine, or a repository by its snapshot. `name`: what it is called in messages."""

    def __init__(self, folder: Path, *, roots: Sequence[Path] | None = None, name: str | None = None) -> None:
        self.folder, self.roots, self.name = folder, roots, name or str(folder)
        self._snapshot = snapshot_of(folder, roots)
        self.is_whole = self._snapshot is None
        if not folder.is_dir():
            raise CheckpointNotFound(clip(self.name), "there is no such folder; name that of a finished merge")
        check_below(folder, roots)

    def sizes(self) -> Mapping[str, int]:
        try:
            files = [entry for entry in os.scandir(self.folder) if entry.is_file()]
            return {entry.name: entry.stat().st_size for entry in sorted(files, key=lambda entry: entry.name)}
        except OSError as error:
            raise CheckpointError(clip(self.name), f"cannot be read: {error.strerror}") from None

    def sha256(self, file: str) -> str | None:
        return None if self._snapshot is None else self._snapshot.stand_ins.get(file)

    def read(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        if self.sha256(file) is not None:
            yield from self._fetched(self.folder / file, begin, end)
            return
        yield from self.header(file, begin, end)

    def header(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        descriptor, _ = open_regular(self.folder / file, self.roots)
        with os.fdopen(descriptor, "rb", buffering=0) as opened:
            opened.seek(begin)
            while begin < end:
                data = opened.read(min(_READ, end - begin))
                if not data:
                    raise CheckpointError(clip(file), "became shorter while it was read")
                begin += len(data)
                yield data

    def _fetched(self, file: Path, begin: int, end: int) -> Iterator[bytes]:
        """Bytes that the stand-in has not; while there is a supply of them."""
        supply = supply_of(self.roots)
        assert supply is not None
        for start in range(begin, end, _READ):
            size = min(_READ, end - start)
            if supply.in_files:
                data = os.pread(supply.open(file), size, start)
            else:
                space = bytearray(size)
                supply.read(file, start, memoryview(space))
                data = bytes(space)
            if len(data) < size:
                raise CheckpointError(clip(file.name), "became shorter while it was read")
            yield data


# What a lock says.

_Hex = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
_Name = Annotated[str, StringConstraints(pattern=r"^\.{0,2}[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,250}$")]
_Text = Annotated[str, StringConstraints(max_length=4096)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class LockedFile(_Part):
    """A file, as a lock names it."""

    path: _Text
    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: _Hex


class _PublishedFile(LockedFile):
    path: _Name


class LockedSource(_Part):
    """What was read of one model."""

    model: _Text
    commit: _Text | None = None
    adapter_commit: _Text | None = None
    files: Annotated[list[LockedFile], Field(max_length=MAX_TENSORS)]


class _LockedTensor(_Part):
    blake3: _Hex


class Lock(_Part):
    """What `merge.lock.json` says, as far as it bears on whether it is true."""

    version: Literal[1]
    machine: _Text = ""
    made_with: dict[str, _Text] = {}
    recipe: dict[str, Any] | list[dict[str, Any]]
    sources: Annotated[list[LockedSource], Field(max_length=10_000)]
    files: Annotated[list[_PublishedFile], Field(max_length=100_000)]
    tensors: Annotated[dict[str, _LockedTensor], Field(max_length=MAX_TENSORS)]

    @classmethod
    def of(cls, published: Published) -> Self:
        """The lock of what was published. Raises `CheckpointError`."""
        where = Path(published.name) / LOCK_NAME
        size = published.sizes().get(LOCK_NAME)
        if size is None:
            raise CheckpointNotFound(clip(published.name), f"has no {LOCK_NAME}, so nothing tells how it was made")
        if size > MAX_JSON_BYTES:
            raise CheckpointError(where, f"is larger than {MAX_JSON_BYTES:,} bytes")
        data = parse_json(where, b"".join(published.read(LOCK_NAME, 0, size)))
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)[0]
            place = clip("/".join(map(str, found["loc"])))
            raise CheckpointError(where, f"is no lock of ours: {place}: {clip(found['msg'])}") from None

    @property
    def method(self) -> str:
        """The method of its last document, for people."""
        last = self.recipe[-1] if isinstance(self.recipe, list) and self.recipe else self.recipe
        return clip(last.get("merge_method", "") if isinstance(last, dict) else "")

    def places(self, sources: Mapping[str, ModelRef], roots: Sequence[Path] | None) -> dict[str, ModelRef]:
        """Where its models are, by the names it has for them: at the commits that it had them at, where repositories
        can be found at all, unless `sources` says otherwise.
        """
        found: dict[str, ModelRef] = {}
        for source in self.sources if library_of(roots) is not None else ():
            named = {"revision": source.commit, "adapter_revision": source.adapter_commit}
            if commits := {key: commit for key, commit in named.items() if commit is not None}:
                with contextlib.suppress(ValidationError):
                    found[source.model] = ModelRef.model_validate(source.model).model_copy(update=commits)
        return {**found, **sources}

    def made_again(self, sources: Mapping[str, ModelRef]) -> Recipe:
        """Its recipe, with other places for the models of some names. Raises `RecipeError`."""
        places = {name: ref.model_dump() for name, ref in sources.items()}
        return Recipe.from_data(moved(self.recipe, places) if places else self.recipe)


# What was found.


class Outcome(StrEnum):
    """What came of looking. `UNCHECKED`: nobody can tell here, and `why` says so."""

    AGREES = "agrees"
    DIFFERS = "differs"
    UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Checked:
    """A file, a source's file or a tensor, and what came of looking at it; `why` where it does not agree."""

    name: str
    outcome: Outcome
    why: str = ""
    digest: str | None = None


@dataclass
class Verification:
    """What was found of a published merge. `tensors` are those that were chosen, of so many that there are."""

    name: str
    lock: Lock
    tensors_total: int = 0
    seed: int = 0
    files: list[Checked] = field(default_factory=list)
    sources: list[Checked] = field(default_factory=list)
    tensors: list[Checked] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        """`DIFFERS` if anything published does; `AGREES` if a tensor was made again, and all that were agree."""
        found = {each.outcome for each in (*self.files, *self.tensors)}
        if Outcome.DIFFERS in found:
            return Outcome.DIFFERS
        return Outcome.AGREES if any(each.outcome is Outcome.AGREES for each in self.tensors) else Outcome.UNCHECKED

    def to_data(self) -> dict[str, Any]:
        """The report, as plain data."""

        def told(found: Sequence[Checked], name: str) -> list[dict[str, Any]]:
            return [
                {name: each.name, "outcome": each.outcome}
                | ({"digest": each.digest} if each.digest else {})
                | ({"why": each.why} if each.why else {})
                for each in found
            ]

        return {
            "verified": self.name,
            "outcome": self.outcome,
            "made_with": self.lock.made_with,
            "machine": self.lock.machine,
            "verified_with": made_here(),
            "tensors_total": self.tensors_total,
            "tensors_chosen": len(self.tensors),
            "seed": self.seed,
            "tensors": told(self.tensors, "tensor"),
            "files": told(self.files, "path"),
            "sources": told(self.sources, "path"),
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """The report in words: what matters first, and one line for each thing that does not agree."""
        counts = {outcome: sum(each.outcome is outcome for each in self.tensors) for outcome in Outcome}
        lines = [f"{self.name}: {_VERDICT[self.outcome]}"]
        of = f"{len(self.tensors):,} of {self.tensors_total:,} tensors were chosen (seed {self.seed})"
        if len(self.tensors) == self.tensors_total:
            of = f"all {self.tensors_total:,} tensors were chosen"
        lines.append(
            f"{of}: {counts[Outcome.AGREES]:,} agree, {counts[Outcome.DIFFERS]:,} differ, "
            f"{counts[Outcome.UNCHECKED]:,} could not be checked"
        )
        whole = sum(each.outcome is Outcome.AGREES for each in self.files)
        lines.append(f"{whole:,} of {len(self.files):,} files have the size and sha256 that the lock says")
        for what, found in (("file", self.files), ("source", self.sources), ("tensor", self.tensors)):
            lines += [f"{what} {each.name} {_WORD[each.outcome]}: {each.why}" for each in found if each.why]
        return "\n".join([*lines, *self.notes]) + "\n"


_VERDICT = {
    Outcome.AGREES: "is what its lock says",
    Outcome.DIFFERS: "is NOT what its lock says",
    Outcome.UNCHECKED: "could not be checked",
}
_WORD = {Outcome.AGREES: "agrees", Outcome.DIFFERS: "differs", Outcome.UNCHECKED: "could not be checked"}


# Looking.


def verify(
    published: Published,
    *,
    sample: int | None = USUAL_SAMPLE,
    seed: int = 0,
    sources: Mapping[str, ModelRef] | None = None,
    roots: Sequence[Path] | None = None,
    memory: int | None = None,
    threads: int | None = None,
    scratch: Path | None = None,
    cache: Path | None = None,
    report: Report = lambda progress: None,
    stop: Stop = lambda: False,
) -> Verification:
    """Check a published merge: all its files, and so many tensors (None: all), drawn by `seed`, made again.

    `sources`: where models that the lock names are now. `scratch`: a folder for what has to be kept meanwhile. The
    other parameters are those of `merge`. What differs, or cannot be checked, is told and no error. Raises
    `CheckpointError` if there is no lock, or one that is no lock of ours; `Canceled`; `StorageFailed`.
    """
    lock = Lock.of(published)
    sources = lock.places(sources or {}, roots)
    names = sorted(lock.tensors)
    chosen = names if sample is None else sorted(random.Random(seed).sample(names, min(sample, len(names))))  # noqa: S311
    found = Verification(published.name, lock, len(names), seed)
    work = _Work(
        published, lock, found, Progress("checking files"), report, stop, threads or len(os.sched_getaffinity(0))
    )
    work.check_files()
    with ExitStack() as stack:
        folder = scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightsmith-verify-")))
        how = {"roots": roots, "memory": memory, "threads": threads, "stop": stop}
        try:
            work.check_tensors(chosen, lock.made_again(sources), folder, sources, cache, how)
        except (Canceled, KeyboardInterrupt):
            raise
        except WeightsmithError as error:
            why = f"the recipe cannot be carried out here: {clip(str(error))}"
            known = {each.name for each in found.tensors}
            found.tensors += [Checked(name, Outcome.UNCHECKED, why) for name in chosen if name not in known]
    found.tensors.sort(key=lambda each: each.name)
    if (made := lock.made_with.get("weightsmith", "")) != __version__ and found.outcome is not Outcome.AGREES:
        found.notes.append(
            f"it was made with Weightsmith {clip(made)!r}; this is {__version__}, whose bytes may be others"
        )
    return found


@dataclass
class _Work:
    """The checks, as they are made; `threads` hash files at once."""

    published: Published
    lock: Lock
    found: Verification
    progress: Progress
    report: Report
    stop: Stop
    threads: int

    # Files.

    def check_files(self) -> None:
        """Compare every file that the lock names with what it says."""
        sizes = self.published.sizes()
        self.progress.bytes_read_total = sum(sizes.get(file.path, 0) for file in self.lock.files)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="files") as pool:
            self.found.files += pool.map(lambda file: self._check_file(file, sizes.get(file.path)), self.lock.files)
        named = {file.path for file in self.lock.files} | {LOCK_NAME}
        others = [name for name in sizes if name not in named]
        why = "the lock says nothing of it, and whoever loads the model may read it"
        self.found.files += [Checked(clip(name), Outcome.DIFFERS, why) for name in others if name.endswith(_LOADED)]
        if rest := [name for name in others if not name.endswith(_LOADED)]:
            shown = ", ".join(map(clip, rest[:5])) + (", …" if rest[5:] else "")
            self.found.notes.append(f"the lock says nothing of {shown}")

    def _check_file(self, file: LockedFile, size: int | None) -> Checked:
        if size is None and not self.published.is_whole:
            return Checked(file.path, Outcome.UNCHECKED, "it is not among the files that are fetched")
        if size is None:
            return Checked(file.path, Outcome.DIFFERS, "it is not there")
        if size != file.size:
            return Checked(file.path, Outcome.DIFFERS, f"it has {size:,} bytes, not {file.size:,}")
        sha256 = hashlib.sha256()
        digest = self.published.sha256(file.path)
        try:
            for data in self.published.read(file.path, 0, size) if digest is None else ():
                self._tick(len(data))
                sha256.update(data)
        except CheckpointError as error:
            return Checked(file.path, Outcome.DIFFERS, clip(error.reason))
        digest = digest or sha256.hexdigest()
        if digest != file.sha256:
            return Checked(file.path, Outcome.DIFFERS, f"its sha256 is {digest}, not {file.sha256}", digest)
        return Checked(file.path, Outcome.AGREES, digest=digest)

    def _tensors(self) -> dict[str, TensorInfo]:
        """Where the published tensors lie, by their files' own headers; a file that lies about itself has none."""
        found: dict[str, TensorInfo] = {}
        sizes, lies = self.published.sizes(), 0
        for file in (file.path for file in self.lock.files):
            if not file.endswith(".safetensors") or file in _BESIDE or (size := sizes.get(file, 0)) < 8:
                continue
            try:
                length = int.from_bytes(b"".join(self.published.header(file, 0, 8)), "little")
                if length > min(size - 8, MAX_HEADER_BYTES):
                    raise CheckpointError(file, f"has a header of {length:,} bytes")
                raw = b"".join(self.published.header(file, 8, 8 + length))
                for info in parse_header(Path(file), raw, size):
                    if found.setdefault(info.name, info) is not info:
                        raise CheckpointError(file, f"holds {clip(info.name)}, which {found[info.name].file} holds too")
            except CheckpointError as error:
                lies += 1
                self.found.files.append(Checked(file, Outcome.DIFFERS, clip(error.reason)))
        if not lies:
            self._check_index(found, sizes)
        return found

    def _check_index(self, stored: Mapping[str, TensorInfo], sizes: Mapping[str, int]) -> None:
        """Tell of an index that leads elsewhere."""
        named = {file.path for file in self.lock.files}
        if INDEX_NAME not in named or not 0 < (size := sizes.get(INDEX_NAME, 0)) <= MAX_INDEX_BYTES:
            return
        try:
            index = parse_json(Path(INDEX_NAME), b"".join(self.published.read(INDEX_NAME, 0, size)))
            if index.get("weight_map") != {name: info.file for name, info in stored.items()}:
                raise CheckpointError(INDEX_NAME, "does not say where the tensors are")
        except CheckpointError as error:
            self.found.files.append(Checked(INDEX_NAME, Outcome.DIFFERS, clip(error.reason)))

    # Tensors.

    def check_tensors(
        self,
        chosen: Sequence[str],
        recipe: Recipe,
        scratch: Path,
        places: Mapping[str, ModelRef],
        cache: Path | None,
        how: Mapping[str, Any],
    ) -> None:
        """Make tensors again, and compare them. Raises `WeightsmithError` where none of them can be made."""
        stored = self._tensors()
        if recipe.outputs.kind != "full":
            self._check_difference(chosen, stored, recipe, scratch, places, cache, how)
            return
        with on_demand(recipe, scratch, **how) as made:
            self._enter("reading sources")
            changed = self._check_sources(made, chosen, places, cache)
            self._check_small_files(made, changed)
            self._check_coverage(made.plan, stored)
            made.prepare(self._preparing(made))
            self._enter("making tensors again")
            self.progress.tensors_total, self.progress.tensors_done = len(chosen), 0
            for name in chosen:
                self.progress.tensor = name
                self.found.tensors.append(self._check_tensor(made, name, stored.get(name), changed))
                self.progress.tensors_done += 1
                self._tick(0)

    def _check_tensor(self, made: OnDemand, name: str, info: TensorInfo | None, changed: Mapping[Path, str]) -> Checked:
        step = made.plan.by_name.get(name)
        if step is None:
            return Checked(name, Outcome.DIFFERS, "the recipe makes no such tensor")
        if info is None:
            return Checked(name, Outcome.DIFFERS, "no file has it")
        if (info.shape, info.dtype) != (step.shape, step.dtype):
            wanted, there = f"{step.dtype} {list(step.shape)}", f"{info.dtype} {list(info.shape)}"
            return Checked(name, Outcome.DIFFERS, f"the recipe makes it {wanted}, but it is {there}")
        try:
            ours, theirs, distance = self._compared(made, step, info)
            if ours != theirs:
                made.check_unchanged()
        except Canceled:
            raise
        except WeightsmithError as error:
            return Checked(name, Outcome.UNCHECKED, f"it cannot be made again: {clip(str(error))}")
        because = next((changed[path] for path in _files_of(made, step) if path in changed), "")
        if not because and _depends_on_machine(made, step) and (distance < _CLOSE or _is_aligned_here(made)):
            because = f"its bytes depend on the machine, and are others here (relative distance {distance:.1e})"
        return self._judged(name, ours, theirs, because)

    def _judged(self, name: str, ours: str | None, theirs: str, because: str) -> Checked:
        """A tensor by its digests, as made here and as published; `because`: why they may well differ."""
        locked = self.lock.tensors[name].blake3
        if theirs != locked:
            return Checked(name, Outcome.DIFFERS, f"its bytes have the blake3 {theirs}, not {locked}", theirs)
        if ours == theirs:
            return Checked(name, Outcome.AGREES, digest=ours)
        if because:
            return Checked(name, Outcome.UNCHECKED, because, theirs)
        return Checked(name, Outcome.DIFFERS, f"the recipe makes other numbers, of the blake3 {ours}", theirs)

    def _compared(self, made: OnDemand, step: Step, info: TensorInfo) -> tuple[str, str, float]:
        """The digests of a tensor as it is made and as it was published, and how far they are apart: relative to what
        was published, in the L2 norm.
        """
        ours, theirs, apart, size = blake3(), blake3(), 0.0, 0.0
        file, begin, end = made.place(step.name)
        for piece, data in made.make(made.pieces(file, begin, end), stop=self.stop):
            at = info.begin + piece.begin - begin
            there = bytearray().join(self.published.read(info.file, at, at + len(data)))
            ours.update(data)
            theirs.update(there)
            self._tick(len(data))
            if data != there and step.dtype.kind == "float":
                one, other = (
                    torch.frombuffer(each, dtype=torch.uint8).view(step.dtype.torch).double()
                    for each in (bytearray(data), there)
                )
                apart += float((one - other).square().sum())
                size += float(other.square().sum())
        return ours.hexdigest(), theirs.hexdigest(), (apart / size) ** 0.5 if size > 0 else float("inf")

    def _check_coverage(self, plan: Plan, stored: Mapping[str, TensorInfo]) -> None:
        """Tell of tensors that stand in a file and not in the lock, or that the recipe makes and the lock has not."""
        for name in sorted(stored.keys() - self.lock.tensors.keys()):
            why = f"it holds {clip(name)}, of which the lock says nothing"
            self.found.files.append(Checked(stored[name].file, Outcome.DIFFERS, why))
        if missing := sorted(plan.by_name.keys() - self.lock.tensors.keys()):
            more = f" and {len(missing) - 1:,} more" if missing[1:] else ""
            why = f"the recipe makes {clip(missing[0])}{more}, of which the lock says nothing"
            self.found.files.append(Checked(LOCK_NAME, Outcome.DIFFERS, why))

    def _check_difference(
        self,
        chosen: Sequence[str],
        stored: Mapping[str, TensorInfo],
        recipe: Recipe,
        scratch: Path,
        places: Mapping[str, ModelRef],
        cache: Path | None,
        how: Mapping[str, Any],
    ) -> None:
        """A delta or an adapter is made again as a whole: where its parts lie is known only then."""
        artifact = merge(recipe, scratch / "again", partial=scratch / ".again", cache=cache, report=self.report, **how)
        again = parse_json(Path(LOCK_NAME), (artifact.folder / LOCK_NAME).read_bytes())
        read = [(each["model"], file["path"], file["sha256"]) for each in again["sources"] for file in each["files"]]
        because = next(filter(None, [self._check_source(*each, places) for each in read]), "")
        if again["exact_on"] == "this machine":
            because = because or "its bytes depend on the machine, and are others here"
        window = window_of(how["roots"], how["memory"] or recipe.limits.memory)
        with supplied(how["roots"], window, self.stop, self.progress.receive):
            for name in chosen:
                if (info := stored.get(name)) is None:
                    self.found.tensors.append(Checked(name, Outcome.DIFFERS, "no file has it"))
                    continue
                theirs = blake3()
                for data in self.published.read(info.file, info.begin, info.begin + info.nbytes):
                    theirs.update(data)
                self.found.tensors.append(self._judged(name, artifact.tensors.get(name), theirs.hexdigest(), because))

    # Sources.

    def _check_sources(
        self, made: OnDemand, chosen: Sequence[str], places: Mapping[str, ModelRef], cache: Path | None
    ) -> dict[Path, str]:
        """Compare what is read of the sources with the lock: what is to be said of each file that is another."""
        steps = tuple(made.plan.by_name[name] for name in chosen if name in made.plan.by_name)
        plan = made.plan if made.plan.passes_before else replace(made.plan, steps=steps)
        beside = list(made.compared.values())
        with closing(Sources.of(plan, made.inputs, cache, self.stop, beside, made.supply)) as reading:
            hashes = reading.result()
        self.found.notes += reading.notes
        changed: dict[Path, str] = {}
        for ref, weights in (leaves(made.plan.models, made.inputs) | dict(made.compared)).items():
            read = {name: (path, _sha256_of(path)) for name, path in weights.settings.items()}
            read |= {
                name: (shard.path, hashes[shard.path]) for name, shard in weights.shards.items() if shard.path in hashes
            }
            for name, (path, digest) in read.items():
                if why := self._check_source(str(ref), name, digest, places):
                    changed[path] = why
        return changed

    def _check_source(self, model: str, file: str, digest: str, places: Mapping[str, ModelRef]) -> str:
        """What is to be said of a source's file that is another than the lock says; nothing of one that is not."""
        was = next((name for name, place in places.items() if str(place) == model), model)
        locked = next((source for source in self.lock.sources if source.model == was), None)
        known = next((each.sha256 for each in locked.files if each.path == file), None) if locked else None
        shown, why = clip(f"{model}/{file}"), ""
        if known is None:
            why = f"the lock says nothing of {shown}"
        elif known != digest:
            why = f"{shown} is not the file that was read: its sha256 is {digest}, not {known}"
        self.found.sources.append(Checked(shown, Outcome.DIFFERS if why else Outcome.AGREES, why, digest))
        return why

    def _check_small_files(self, made: OnDemand, changed: Mapping[Path, str]) -> None:
        """Compare config and tokenizer files with what the recipe makes of them."""
        there = {each.name: each for each in self.found.files}
        for name, content in small_files(made.plan, made.inputs).items():
            digest = _sha256_of(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
            if (found := there.get(name)) is None:
                self.found.files.append(
                    Checked(name, Outcome.DIFFERS, "the recipe makes it, but it is not in the lock")
                )
            elif found.outcome is Outcome.AGREES and found.digest != digest:
                outcome = Outcome.UNCHECKED if changed else Outcome.DIFFERS
                why = f"the recipe makes another of it, of the sha256 {digest}"
                self.found.files[self.found.files.index(found)] = replace(found, outcome=outcome, why=why)

    # Telling.

    def _enter(self, phase: str) -> None:
        self.progress.phase = phase
        self._tick(0)

    def _tick(self, read: int) -> None:
        if self.stop():
            raise Canceled("verifying was canceled")
        self.progress.bytes_read += read
        self.report(self.progress)

    def _preparing(self, made: OnDemand) -> Report:
        def report(progress: Progress) -> None:
            if progress.phase != self.progress.phase:
                self._enter(progress.phase)
            self._tick(0)

        return report


def _files_of(made: OnDemand, step: Step) -> Iterator[Path]:
    """Every file that bears on a tensor's bytes, configs included."""
    whole = made.plan.passes_before or made.compared
    for source in (source for each in (made.plan.steps if whole else [step]) for source in each.reads):
        weights = made.inputs[source.model]
        yield from weights.settings.values()
        names = {*weights.always_read(), *(name for name, _, _ in weights.ranges(source.info))}
        yield from (weights.shards[name].path for name in names)
    for weights in made.compared.values():
        yield from (shard.path for shard in weights.shards.values())


def _depends_on_machine(made: OnDemand, step: Step) -> bool:
    of_stages = any(stage.exact_on == "this machine" for stage in made.plan.stages.values())
    own = step.method is not None and type(step.method).exact_on == "this machine"
    return own or of_stages or _is_aligned_here(made)


def _is_aligned_here(made: OnDemand) -> bool:
    """Whether permutations were found anew, which another machine finds otherwise."""
    return bool(made.compared)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
