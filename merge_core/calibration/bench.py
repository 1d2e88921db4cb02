"""What a way of calibrating works with: the models, the data, a folder that survives kills, and who waits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge_core.calibration.models import Group, Models
from merge_core.calibration.plan import CalibrationPlan
from merge_core.calibration.vectors import StoredVectors
from merge_core.checkpoint import Checkpoint
from merge_core.errors import CalibrationFailed, Canceled
from merge_core.files import fsync_folder
from merge_core.journal import Journal
from merge_core.progress import Progress, Report


@dataclass
class Bench:
    """`folder`: what an attempt leaves there, the next one finds; `out`: where files of statistics go; `places`: the
    folders of the base (or None) and of the models, as files that are here; `expected`: the steps of all
    phases together, as far as they are known.
    """

    plan: CalibrationPlan
    models: Models
    folder: Path
    out: Path
    base: Path | None
    places: Sequence[Path]
    journal: Journal
    memory: int
    progress: Progress
    report: Report
    stop: Callable[[], bool]
    written: list[str] = field(default_factory=list)
    expected: int = 0
    _before: int = 0
    _steps: int = 0

    # Data.

    @cached_property
    def groups(self) -> Sequence[Group]:
        """The data. Raises `CalibrationFailed` where there are none, or no labels where these are needed."""
        return self._groups(check=False)

    @cached_property
    def checks(self) -> Sequence[Group]:
        """The data that are held out."""
        return self._groups(check=True)

    def _groups(self, *, check: bool) -> Sequence[Group]:
        self.tick("reading data", 0, 0)
        found = self.models.groups(self.base or self.places[0], self.places, check=check)
        for group in found:
            if self.plan.document.keys.needs_labels and any(batch.labels is None for batch in group.batches):
                raise CalibrationFailed(f"{group.file} has no labels, which {self.plan.document.keys.method} needs")
        return found

    # Models.

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors that the recipe merges."""
        return self.plan.shapes

    @contextmanager
    def opened(self, model: int | None) -> Iterator[nn.Module]:
        """One of the recipe's models, ready to run; None: the base, or the first where there is none."""
        self.tick()
        yield self.models.load((self.base or self.places[0]) if model is None else self.places[model])

    @contextmanager
    def vectors(self) -> Iterator[StoredVectors]:
        """What the models add to the base, or the models where there is none, from the files."""
        with ExitStack() as stack:
            base = None if self.base is None else stack.enter_context(Checkpoint.open(self.base))
            models = [stack.enter_context(Checkpoint.open(place)) for place in self.places]
            yield StoredVectors(base, models, self.shapes)

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """A model's parameters and buffers, by the names of the tensors that the recipe merges. Raises
        `CalibrationFailed` where it has none of that name and shape.
        """
        there = self.models.tensors(module)
        found: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            tensor = there.get(name)
            if tensor is None or tuple(tensor.shape) != shape:
                has = "has no such tensor" if tensor is None else f"has {list(tensor.shape)} there"
                detail = f"{name} {list(shape)}: {type(module).__name__} of transformers {has}"
                raise CalibrationFailed(f"{detail}; exclude the tensor, or convert the model")
            found[name] = tensor
        return found

    def fixed(self, name: str) -> tuple[float, ...]:
        """The coefficient of each model in a tensor that is not learned, as the recipe's `weight` says."""
        method = self.plan.merging.by_name[name].method
        weight = tuple(getattr(method, "weight", (0.0,)))
        weight = weight * len(self.places) if len(weight) == 1 else weight
        return tuple(each / sum(weight) for each in weight) if self.base is None else weight

    @property
    def room(self) -> int:
        """Bytes of memory that the plan leaves: half of it may be kept in."""
        return max(0, self.memory - self.plan.peak_memory) // 2

    # What is known and written.

    def known(self, name: str) -> Any:
        """What an earlier attempt noted, or None."""
        return self.journal.notes.get(name)

    def note(self, name: str, value: Any) -> None:
        """Remember plain data, whatever happens."""
        self.journal.note(name, value)

    def save(self, name: str, tensors: Mapping[str, Tensor], told: Mapping[str, Any] | None = None) -> None:
        """Remember tensors, and plain data with them, in a file that is there whole or not at all."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}")
        save_file(_plain(tensors), new, metadata={"told": json.dumps(told or {})})
        new.replace(path)

    def saved(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was remembered under that name."""
        from safetensors import safe_open

        path = self.folder / name
        if not path.exists():
            return None
        with safe_open(path, "pt") as opened:
            told = json.loads((opened.metadata() or {}).get("told", "{}"))
        return load_file(path), told

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """A file of statistics of the result; the name that it has there."""
        path = self.out / name
        save_file(_plain(tensors), path, metadata={"format": "pt"})
        return self.wrote(name)

    def wrote(self, name: str) -> str:
        """A file of that name is in `out`, whoever wrote it."""
        if name not in self.written:
            self.written.append(name)
        fsync_folder(self.out)
        return name

    def tick(self, phase: str = "", done: int | None = None, total: int | None = None, what: str = "") -> None:
        """Tell how far a phase is, which counts beside what was `expected` of all. Raises `Canceled` where the job is
        to stop, or whatever `stop` raises.
        """
        if self.stop():
            raise Canceled("the calibration was canceled")
        progress = self.progress
        if phase and phase != progress.phase:
            self._before += self._steps
            progress.phase, self._steps = phase, 0
        if done is not None and total is not None:
            self._steps = total
            progress.steps_done = self._before + done
            progress.steps_total = max(self.expected, self._before + total)
        progress.tensor = what
        self.report(progress)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
