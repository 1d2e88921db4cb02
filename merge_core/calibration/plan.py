"""What a calibration takes, from headers and configs: the plan of the merge that it is for, and models that run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core import __version__
from merge_core.calibration.document import Calibration
from merge_core.checkpoint import locate
from merge_core.documents import canonical_json
from merge_core.errors import IncompatibleModels, MemoryLimitExceeded, Problem
from merge_core.merge import opened, plan_only
from merge_core.plan import Plan
from merge_core.references import ModelRef
from merge_core.snapshots import snapshot_of
from merge_core.weights import Weights

LIBRARIES_BYTES = 600 * 2**20
"""What the process needs before a model is loaded: interpreter, torch, transformers."""
_FLOAT = 4
_HEADS = {
    "language_model": ("ForCausalLM", "LMHeadModel"),
    "text_classification": ("ForSequenceClassification",),
    "image_classification": ("ForImageClassification",),
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class CalibrationPlan:
    """What will be done. `merging`: the plan of the same merge without the numbers that are looked for; `known_bytes`:
    of the memory what can be known, `activations` an estimate of the rest, 0 where the config does not tell;
    `scratch`: of the disk, until the end.
    """

    document: Calibration
    merging: Plan
    known_bytes: int
    activations: int
    scratch: int = 0

    @property
    def warnings(self) -> Sequence[str]:
        found = list(self.merging.warnings)
        if not self.activations:
            found.append("the config does not tell what a model takes while it runs; its weights alone are planned for")
        return found

    @property
    def digest(self) -> str:
        """The same for the same calibration of the same models."""
        told = [__version__, self.document.to_data(), self.merging.sources_digest]
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()

    @property
    def peak_memory(self) -> int:
        return max(self.merging.memory.peak, self.known_bytes + self.activations)

    @property
    def output_bytes(self) -> int:
        keys = self.document.keys
        return int(keys.merge) * self.merging.output_bytes + keys.written_bytes(self.merging) + self.scratch

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors that are merged."""
        return {step.name: step.shape for step in self.merging.steps if step.method is not None}

    def to_dict(self, *, steps: bool = False) -> dict[str, Any]:
        """The plan for people and for JSON: that of the merge, and what the calibration adds to it."""
        keys, made = self.document.keys, self.merging.to_dict(steps=steps)
        made["bytes_written"] = made["bytes_written"] if keys.merge else 0
        return {
            **made,
            "method": self.document.merge_method,
            "calibration": keys.method,
            "task": keys.task,
            "data": [file.file for file in keys.data],
            "peak_memory": self.peak_memory,
            "memory_of_activations": self.activations,
            "bytes_on_disk": self.output_bytes,
            "warnings": list(self.warnings),
        }


def plan_calibration(
    document: Calibration,
    *,
    roots: Sequence[Path] | None = None,
    memory: int | None = None,
    threads: int | None = None,
) -> CalibrationPlan:
    """The plan alone. Raises `WeightsmithError` for all that headers and configs can tell: models that do not fit, that
    are of another kind than `task` says, or that do not fit into memory while they run.
    """
    template = document.template
    merging = plan_only(template, roots=roots, memory=memory, threads=threads)
    document.keys.check_plan(merging)
    with opened(template, roots) as models:
        problems = [*_problems(document, {str(ref): weights for ref, weights in models.items()})]
        config = next(iter(models.values())).text_config
    if problems:
        raise IncompatibleModels.of(problems)
    elements = [math.prod(step.shape) for step in merging.steps]
    largest = max(elements, default=0)
    known = LIBRARIES_BYTES + _FLOAT * sum(elements) + (4 if document.keys.gradients else 1) * _FLOAT * largest
    known += document.keys.held_bytes(merging)
    scratch = _said(document, config) + _FLOAT * sum(elements) * _made_first(document, roots)
    plan = CalibrationPlan(document, merging, known, _activations(document, config), scratch)
    limit = memory or document.limits.memory
    if plan.peak_memory > limit:
        wanted, there = plan.peak_memory / 2**20, limit / 2**20
        detail = f"to run a model of {_FLOAT * sum(elements) / 2**20:,.0f} MiB in float32 takes about {wanted:,.0f} MiB"
        detail += f" in all, but the limit is {there:,.0f} MiB; raise limits.memory, or lower batch or context"
        raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory")])
    return plan


def _problems(document: Calibration, models: Mapping[str, Weights]) -> Iterator[Problem]:
    """What cannot be run, and why."""
    task = document.keys.task
    places = {str(document.base_model): "#/base_model"} if document.base_model else {}
    places |= {str(entry.model): f"#/models/{i}/model" for i, entry in enumerate(document.models or ())}
    for name, weights in models.items():
        if name not in places:
            continue
        if not weights.config:
            yield Problem(f"{name} has no config.json, without which nothing can run it", places[name])
            continue
        if document.keys.own and places[name] == "#/base_model":
            continue  # of which the heads do not count
        kinds = [str(kind) for kind in weights.config.get("architectures") or ()]
        if kinds and not any(kind.endswith(_HEADS[task]) for kind in kinds):
            detail = f"{name} is a {', '.join(kinds)[:200]}, and task is {task}"
            yield Problem(f"{detail}, which is run by one that is called …{_HEADS[task][0]}", "#/calibrate/task")
    first = next(iter(models.values()))
    name = next(iter(models))
    there = set(first.companions)
    if task != "image_classification" and not there.intersection(_TOKENIZERS):
        yield Problem(f"{name} has no tokenizer, without which it reads no text", places.get(name, "#"))
    if task == "image_classification" and "preprocessor_config.json" not in there:
        yield Problem(f"{name} has no preprocessor_config.json, which says how it sees images", places.get(name, "#"))


def _activations(document: Calibration, config: Mapping[str, Any]) -> int:
    """About what a transformer keeps of a batch until the pass backwards is done: the states of each layer, about
    fourteen times their width, its attention, and the logits three times.
    """
    width, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    if not isinstance(width, int) or not isinstance(layers, int):
        return 0
    keys = document.keys
    if keys.task == "image_classification":
        side, patch = config.get("image_size"), config.get("patch_size")
        if not isinstance(side, int) or not isinstance(patch, int) or not patch:
            return 0
        tokens, classes = (side // patch) ** 2 + 1, 0
    else:
        tokens = min(keys.context, config.get("max_position_embeddings") or keys.context)
        classes = int(config.get("vocab_size") or 0) if keys.task == "language_model" else 0
    inner = config.get("intermediate_size") or 4 * width
    heads = config.get("num_attention_heads") or 1
    kept = layers if keys.gradients else 1
    per_token = kept * (8 * width + 4 * inner + 2 * heads * tokens) + 3 * classes
    return _FLOAT * keys.batch * tokens * per_token


def _said(document: Calibration, config: Mapping[str, Any]) -> int:
    """What teachers say of their samples, where so much is known of these: logits, and one layer's states."""
    keys, models = document.keys, len(document.models or ())
    if not keys.taught or keys.task != "language_model":
        return 0
    tokens = min(keys.context, config.get("max_position_embeddings") or keys.context)
    each = _FLOAT * tokens * (int(config.get("vocab_size") or 0) + int(config.get("hidden_size") or 0))
    files = (*keys.data, *keys.checks)
    return sum(each * (file.samples or keys.samples or 0) * (models if file.model is None else 1) for file in files)


def _made_first(document: Calibration, roots: Sequence[Path] | None) -> int:
    """How many models are made of others before they can run: those with adapters, or that lie elsewhere."""
    refs = [*([document.base_model] if document.base_model else []), *(entry.model for entry in document.models or ())]
    return sum(lies_elsewhere(ref, roots) for ref in refs)


def lies_elsewhere(ref: ModelRef, roots: Sequence[Path] | None) -> bool:
    """Whether a model's files, as they lie here, are not all that it is."""
    return ref.adapter is not None or snapshot_of(locate(ref.path, roots, ref.revision), roots) is not None
