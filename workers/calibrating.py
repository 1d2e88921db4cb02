"""Whole models for calibrations, run by transformers on files of data (`merge_core.calibration.models.Models`).

Models are loaded from their folders alone: nothing is fetched, and no code of a model is run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.documents import canonical_json
from merge_core.errors import CalibrationFailed, CheckpointError, EvaluationFailed, Problem, RecipeError
from workers.evaluators.data import (
    LINES,
    PARQUET,
    Shelves,
    field_of,
    image_of,
    is_parquet,
    no_rows,
    rows_of,
    sha256_of,
    text_of,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merge_core.calibration.document import Calibration
    from merge_core.calibration.method import Calibrator, DataFile
    from merge_core.calibration.models import Batch, Group, Outputs

_KINDS = {
    "language_model": "AutoModelForCausalLM",
    "text_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
Rows = Sequence[tuple[str, Mapping[str, Any]]]


def check_models(document: Calibration, shelves: Shelves) -> None:
    """Raise `RecipeError` or `CheckpointError` where the packages, or the files of data, are not there."""
    keys = document.keys
    files = [("data", i, file) for i, file in enumerate(keys.data)]
    files += [(keys.second, i, file) for i, file in enumerate(keys.checks)]
    needed = ["transformers", *(["pyarrow"] if any(is_parquet(file.file) for _, _, file in files) else [])]
    needed += ["PIL"] if keys.task == "image_classification" else []
    for name in needed:
        if find_spec(name) is None:
            detail = f"a calibration needs the package {name}: pip install 'weightsmith[eval]'"
            raise RecipeError.of([Problem(detail, "#/calibrate")])
    for where, i, file in files:
        pointer = f"#/calibrate/{where}/{i}/file"
        if keys.task != "language_model" and (why := no_rows(file.file)):
            raise RecipeError.of([Problem(why, pointer)])
        try:
            shelves.look(file.file)
        except CheckpointError as error:
            raise error.as_written(shelves.roots, pointer) from None


class TransformersModels:
    """Models of one calibration."""

    def __init__(self, document: Calibration, shelves: Shelves) -> None:
        self._keys: Calibrator = document.keys
        self._shelves, self._document, settings = shelves, document, shelves.store.settings
        self._device = settings.device
        self._threads = document.limits.threads or settings.threads or len(os.sched_getaffinity(0))
        self._padding: int | None = None

    @property
    def digest(self) -> str:
        keys = self._keys
        told = [version("transformers"), version("torch")]
        told += [sha256_of(*self._shelves.open(file.file)) for file in (*keys.data, *keys.checks)]
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()

    @contextmanager
    def working(self) -> Iterator[None]:
        from workers.evaluators.models import quietly

        try:
            with quietly(self._threads, gradients=True):
                yield
        except EvaluationFailed as error:
            raise CalibrationFailed(str(error).replace("the candidate", "a model"), error.problems) from error

    # Models.

    def load(self, folder: Path) -> nn.Module:
        import torch
        import transformers

        from workers.evaluators.models import load

        kind, device = getattr(transformers, _KINDS[self._keys.task]), self._device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        how = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        model, told = load(kind, folder, **how)
        if missing := sorted(key for key in told["missing_keys"] if not any(piece in key for piece in self._keys.own)):
            lacks = f"{folder.name} lacks {', '.join(missing[:3])}, which a {type(model).__name__} needs"
            raise CalibrationFailed(f"{lacks}; task is {self._keys.task}")
        if self._padding is not None and model.config.pad_token_id is None:
            model.config.pad_token_id = self._padding
        return model.to(device).eval()  # type: ignore[no-any-return]

    def tensors(self, module: nn.Module) -> Mapping[str, Tensor]:
        import torch
        from transformers.core_model_loading import revert_weight_conversion

        there = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
        with torch.no_grad():
            stored = revert_weight_conversion(module, dict(there))  # type: ignore[arg-type]
        same = {_place_of(tensor): tensor for tensor in reversed(there.values())}
        named = {name: same.get(_place_of(tensor)) for name, tensor in stored.items()}
        # Files from before a model was renamed, or without the prefix of a model with a head, are read too.
        prefix = getattr(module, "base_model_prefix", "")
        bare = {name.removeprefix(f"{prefix}."): tensor for name, tensor in named.items()} if prefix else {}
        return {name: tensor for name, tensor in (there | bare | named).items() if tensor is not None}

    def run(self, module: nn.Module, batch: Batch, hidden: Sequence[int] = ()) -> Outputs:
        from merge_core.calibration.models import Outputs

        device = next(module.parameters()).device
        given = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        how: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
        how |= {"use_cache": False} if self._keys.task == "language_model" else {}
        found = module(**given, **how)
        states = [found.hidden_states[layer].float() for layer in hidden]
        return Outputs(found.logits.float(), states)

    # Data.

    def groups(self, base: Path, experts: Sequence[Path], *, check: bool) -> Sequence[Group]:
        from merge_core.calibration.models import Group

        keys = self._keys
        files = keys.checks if check else keys.data
        prepared = [self._batches(file, base, experts, self._document.expert_of(file.model)) for file in files]
        return [
            Group(
                file.file,
                None if file.model is None else str(file.model),
                self._document.expert_of(file.model),
                batches,
                file.weight,
            )
            for file, batches in zip(files, prepared, strict=True)
        ]

    def _batches(self, file: DataFile, base: Path, experts: Sequence[Path], expert: int | None) -> list[Batch]:
        path, roots = self._shelves.open(file.file)
        most = file.samples or self._keys.samples
        if self._keys.task == "language_model":
            return self._texts(file, path, roots, base, expert, most)
        rows = list(islice(rows_of(path, roots), most))
        if not rows:
            raise CalibrationFailed(f"{file.file} has no samples")
        prepare = self._sequences if self._keys.task == "text_classification" else self._images
        classes = self._config(base if expert is None else experts[expert])
        make, size = prepare(file, path, roots, base, expert, classes), self._keys.batch
        return [make(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _tokenizer(self, folder: Path) -> Any:
        import transformers

        from workers.evaluators.models import load

        return load(transformers.AutoTokenizer, folder)

    def _config(self, folder: Path) -> Any:
        import transformers

        from workers.evaluators.models import load

        return load(transformers.AutoConfig, folder)

    def _context(self, config: Any) -> int:
        return min(self._keys.context, int(getattr(config, "max_position_embeddings", None) or self._keys.context))

    def _texts(
        self, file: DataFile, path: Path, roots: Sequence[Path], folder: Path, expert: int | None, most: int | None
    ) -> list[Batch]:
        """Token after token: windows of a text, or the beginnings of texts."""
        import torch

        from merge_core.calibration.models import Batch

        tokenizer, size = self._tokenizer(folder), self._context(self._config(folder).get_text_config())
        if path.suffix in LINES or path.suffix == PARQUET:
            texts = (str(field_of(row, file.text, place)) for place, row in rows_of(path, roots))
            each = (tokenizer(text, verbose=False)["input_ids"][:size] for text in texts)
        else:
            whole = tokenizer(text_of(path, roots), verbose=False)["input_ids"]
            each = (whole[start : start + size] for start in range(0, len(whole), size))
        samples = list(islice((tokens for tokens in each if len(tokens) > 1), most))
        if not samples:
            raise CalibrationFailed(f"{file.file} has no samples: none of its texts has two tokens")
        found, at_once = [], self._keys.batch
        for start in range(0, len(samples), at_once):
            rows = samples[start : start + at_once]
            tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for i, row in enumerate(rows):
                tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            found.append(Batch({"input_ids": tokens, "attention_mask": mask}, tokens, mask, expert, len(rows)))
        return found

    def _sequences(
        self, file: DataFile, path: Path, roots: Sequence[Path], folder: Path, expert: int | None, classes: Any
    ) -> Callable[[Rows], Batch]:
        tokenizer = self._tokenizer(folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None and self._keys.batch > 1:
            raise CalibrationFailed("the tokenizer has no padding, so that texts go one by one: write batch: 1")
        self._padding = tokenizer.pad_token_id
        size = self._context(self._config(folder))

        def make(rows: Rows) -> Batch:
            from merge_core.calibration.models import Batch

            texts = [str(field_of(row, file.text, place)) for place, row in rows]
            pairs = None if file.pair is None else [str(field_of(row, file.pair, place)) for place, row in rows]
            given = tokenizer(
                texts, pairs, padding=len(rows) > 1, truncation=True, max_length=size, return_tensors="pt"
            )
            return Batch(dict(given), self._labels(file, classes, rows), None, expert, len(rows))

        return make

    def _images(
        self, file: DataFile, path: Path, roots: Sequence[Path], folder: Path, expert: int | None, classes: Any
    ) -> Callable[[Rows], Batch]:
        import transformers

        from workers.evaluators.models import load

        processor = load(transformers.AutoImageProcessor, folder, backend="pil")

        def make(rows: Rows) -> Batch:
            from merge_core.calibration.models import Batch

            images = [image_of(field_of(row, file.image, place), path, roots, place) for place, row in rows]
            given = processor(images=images, return_tensors="pt")
            return Batch(dict(given), self._labels(file, classes, rows), None, expert, len(rows))

        return make

    def _labels(self, file: DataFile, config: Any, rows: Rows) -> Any:
        """The classes, or None where they are not needed and not all there."""
        import torch

        from workers.evaluators.models import label_of

        if not self._keys.needs_labels and any(file.label not in row for _, row in rows):
            return None
        return torch.tensor([label_of(field_of(row, file.label, place), config, place) for place, row in rows])


def _place_of(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """What two names of one tensor have in common."""
    return tensor.data_ptr(), tuple(tensor.shape)
