"""Everything that can go wrong and is not a bug: one tree, with the facts as attributes.

The core knows no HTTP and no queue. `code` is a stable slug that the service turns into a problem type; `problems`
names every place that is wrong (a key of the recipe, a tensor, a file), so that one run shows all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_core.snapshots import snapshots_of


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where: `pointer` is a JSON pointer into the recipe, `#/models/0/model`."""

    detail: str
    pointer: str | None = None
    tensor: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.pointer[2:]}: {self.detail}" if self.pointer and len(self.pointer) > 2 else self.detail


class WeightsmithError(Exception):
    """An expected failure. The message says what is wrong, where, what was expected and what to do."""

    code: str = "merge-failed"
    title: str = "The merge failed"
    retryable: bool = False

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> WeightsmithError:
        """One error for many problems; its message lists them."""
        found = list(problems)
        if len(found) == 1:
            return cls(str(found[0]), found)
        shown = [f"- {problem}" for problem in found[:20]]
        if len(found) > 20:
            shown.append(f"- and {len(found) - 20} more")
        return cls("\n".join([f"{len(found)} problems:", *shown]), found)


class RecipeError(WeightsmithError):
    """The recipe cannot be meant: unknown keys, wrong values, a method that does not exist."""

    code = "invalid-recipe"
    title = "The recipe is not valid"


class IncompatibleModels(WeightsmithError):
    """The models do not fit the recipe or one another: shapes, layers, missing tensors."""

    code = "incompatible-models"
    title = "The models do not fit together"


class CheckpointError(WeightsmithError):
    """A checkpoint cannot be used."""

    code = "bad-checkpoint"
    title = "A checkpoint cannot be read"

    def __init__(self, file: Path | str, reason: str, *, tensor: str | None = None) -> None:
        self.file, self.reason, self.tensor = str(file), reason, tensor
        super().__init__(f"{file}: {reason}", [Problem(f"{file}: {reason}", tensor=tensor, file=str(file))])

    def as_written(self, roots: Sequence[Path], pointer: str) -> CheckpointError:
        """The same error as the recipe sees the world: paths as seen from the roots, and where it names them."""
        file, reason = self.file, self.reason
        for snapshot in snapshots_of(roots):
            place = str(snapshot.folder)
            file, reason = (text.replace(f"{place}/", f"{snapshot.name}/") for text in (file, reason))
            file, reason = (snapshot.name if text == place else text for text in (file, reason))
        for root in sorted(map(str, roots), key=len, reverse=True):
            file, reason = ("." if text == root else text.replace(f"{root}/", "") for text in (file, reason))
        error = type(self)(file, reason, tensor=self.tensor)
        error.problems = tuple(Problem(found.detail, pointer, found.tensor, found.file) for found in error.problems)
        return error


class CheckpointNotFound(CheckpointError):
    """There is nothing where the recipe points."""

    code = "model-not-found"
    title = "A model was not found"


class PathNotAllowed(CheckpointError):
    """A path, links resolved, leads out of the folders that may be read."""

    code = "path-not-allowed"
    title = "A path is outside the configured model roots"


class UnsafeFormat(CheckpointError):
    """Pickled weights."""

    code = "unsafe-format"
    title = "A checkpoint is in a format that can run code"


class MemoryLimitExceeded(WeightsmithError):
    """Not even the smallest block fits."""

    code = "memory-limit"
    title = "The merge does not fit in its memory limit"


class DeviceNotFound(WeightsmithError):
    """No such device, or none that this process sees."""

    code = "device-not-found"
    title = "The device is not there"


class InsufficientStorage(WeightsmithError):
    """The disk is too small, or filled up on the way."""

    code = "insufficient-storage"
    title = "Not enough free disk space"
    retryable = True


class StorageFailed(WeightsmithError):
    """The file system refused something: a broken disk, a lost mount, missing rights."""

    code = "storage-failed"
    title = "A file could not be read or written"
    retryable = True


class OutputExists(WeightsmithError):
    """The output would overwrite something."""

    code = "output-exists"
    title = "The output folder is not empty"


class NonFinite(WeightsmithError):
    """NaN or infinity in a weight that was read, or made by rounding into a narrower dtype."""

    code = "non-finite"
    title = "A weight is not a finite number"

    def __init__(self, tensor: str, where: str, message: str) -> None:
        self.tensor, self.where = tensor, where
        super().__init__(message, [Problem(message, tensor=tensor, file=where)])


class EvaluationFailed(WeightsmithError):
    """What scores the candidates of a search did not: it was not there, took too long, or said what is no score. What
    it said of other candidates is kept; a retry asks for the rest.
    """

    code = "evaluation-failed"
    title = "A candidate was not evaluated"
    retryable = True


class CalibrationFailed(WeightsmithError):
    """A calibration came to nothing: a model cannot be run, data cannot be read or lack what is needed, or what was
    learned is no number. What is known by then is kept; a retry goes on from there.
    """

    code = "calibration-failed"
    title = "The calibration failed"


class Canceled(WeightsmithError):
    """Somebody asked for the merge to stop."""

    code = "canceled"
    title = "The merge was canceled"
