"""What will be done, as data: one step per output tensor, its shards, its memory. `planner.py` makes it.

A plan is made from headers and configs alone; the worker is held to it.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from merge_core import __version__, kernels
from merge_core.documents import canonical_json
from merge_core.dtypes import FLOAT32, FLOAT64, DType
from merge_core.headers import TensorInfo
from merge_core.kernels.vectors import RUN_ELEMENTS
from merge_core.layout import ShardLayout
from merge_core.method import ExactOn, Known, MergeMethod, Scope, Stage
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.statistics import Grains
from merge_core.weights import Companions

WRITING_BLOCKS = 3
"""Merged blocks that may wait for the disk, besides one per thread."""
UNFUSED_BLOCK_ELEMENTS = 2**17
"""The temporaries of plain torch are as long as the block, and quickest while they fit into the cache."""
STATISTICS_BYTES = 5 * 2**19
"""Histograms of one model's ranks."""
_RUN_BYTES = 48
"""What an element of a run of rows takes in all: as it is stored and in float32, of two sources, and in float64."""


@dataclass(frozen=True)
class Source:
    """One tensor that a step reads: `model` is an index into `Plan.models`.

    Where its rows are computed: `temporary` bytes of memory per element and `thread_bytes` per thread for that,
    `file_bytes` to read for all of them, and whether only all can be had at once (`is_whole`). A `small` one is
    read whole with every block.
    """

    model: int
    info: TensorInfo
    temporary: float = 0
    thread_bytes: int = 0
    file_bytes: int | None = None
    is_whole: bool = False
    small: bool = False

    @property
    def stored_bytes(self) -> int:
        """Bytes of files that its rows come from."""
        return self.info.nbytes if self.file_bytes is None else self.file_bytes


@dataclass(frozen=True)
class Step:
    """How one output tensor comes to be.

    Without a `method` the first source is copied, and `reason` says why; its other sources are only compared with it.
    `given`: by name what else the method takes, for all models or for each, None where there is nothing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    sources: tuple[Source, ...]
    base: Source | None = None
    method: MergeMethod | None = None
    reason: str = ""
    given: Mapping[str, tuple[Source | None, ...]] = field(default_factory=dict)

    @cached_property
    def grains(self) -> Grains:
        return Grains.of(self.shape)

    @cached_property
    def least_rows(self) -> int:
        """How many rows a block has at least: those of a grain, or all."""
        whole = self.method is not None and self.method.extent(self.shape) == "tensor"
        whole = whole or any(source.is_whole for source in self.reads)
        return self.grains.rows if whole else min(self.grains.size, self.grains.rows)

    def block_rows(self, most: int, *, on_gpu: bool = False) -> int:
        """Rows of a block of at most so many elements, or of as few as there can be."""
        if not on_gpu and self.method is not None and not self.is_fused:
            most = min(most, UNFUSED_BLOCK_ELEMENTS)
        least = self.least_rows
        return min(max(least, most // max(1, least * self.grains.width) * least), self.grains.rows)

    @property
    def working(self) -> DType:
        """What the arithmetic is done in: float32, or float64 where a source is stored so or the method asks it."""
        asked = self.method is not None and self.method.precision == "float64"
        return FLOAT64 if asked or any(source.info.dtype is FLOAT64 for source in self.reads) else FLOAT32

    @cached_property
    def reads(self) -> tuple[Source, ...]:
        """Every tensor that the step reads."""
        return (*self.merges, *(source for each in self.given.values() for source in each if source is not None))

    @property
    def merges(self) -> tuple[Source, ...]:
        """The tensors that are merged, the base first."""
        return self.sources if self.base is None else (self.base, *self.sources)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its sources."""
        return sum(source.stored_bytes for source in self.reads)

    @property
    def is_fused(self) -> bool:
        """Whether the compiled kernels do all of it, a grain at a time; not so for a whole tensor of several."""
        formats = (self.dtype.torch, *(source.info.dtype.torch for source in self.reads))
        by_grain = self.least_rows <= self.grains.size
        return self.method is not None and self.method.is_fused and by_grain and kernels.serve(formats)

    def element_bytes(self, *, on_gpu: bool = False) -> int:
        """Bytes of main memory per element of a block in work, temporaries included; the merged block comes on top."""
        stored = sum(source.info.dtype.itemsize + math.ceil(source.temporary) for source in self.reads)
        if self.method is None:
            return stored + 8
        if on_gpu:
            return stored
        if (held := self.method.held(self.shape)) is not None:
            whole = sum(source.info.dtype.itemsize for source in self.reads if source.is_whole)
            return math.ceil(held * self.working.itemsize) + whole
        if self.is_fused:
            return stored if any(source.temporary for source in self.reads) else 0
        per_model, fixed = self.method.workspace
        arrays = len(self.reads) + 1 + per_model * len(self.sources) + fixed
        return arrays * self.working.itemsize + stored

    def thread_bytes(self, scope: Scope) -> int:
        """Bytes of memory that a thread needs however long its blocks are: one grain of all sources and a mark per
        element and model, small sources, histograms.
        """
        grain = min(self.grains.size, self.grains.rows) * max(1, self.grains.width)
        space = grain * (4 * len(self.reads) + len(self.sources)) if self.is_fused else 0
        small = [source.info for source in self.reads if source.small]
        space += sum(info.nbytes + info.elements * self.working.itemsize for info in small)
        if self.method is not None and self.method.held(self.shape) is not None:
            space = _RUN_BYTES * min(max(RUN_ELEMENTS, self.grains.width), self.grains.rows * self.grains.width)
        computing = max((source.thread_bytes for source in self.reads), default=0)
        return space + computing + self.counting_bytes(scope)

    def counting_bytes(self, scope: Scope) -> int:
        """Those for histograms."""
        stages = self.method.stages(scope) if self.method is not None else ()
        each = max([stage.space for stage in stages] + [STATISTICS_BYTES] * (len(stages) > 1), default=0)
        return each * len(self.sources)

    def kept_bytes(self, scope: Scope) -> int:
        """Bytes of memory that measuring takes per thread until it is finished."""
        stages = self.method.stages(scope) if self.method else ()
        return sum(stage.kept(self.grains.rows) for stage in stages) * len(self.sources)


@dataclass(frozen=True)
class TiedPair:
    """Two stored tensors that the config calls one; that they are equal is checked when the merge runs."""

    model: int
    tensor: TensorInfo
    partner: TensorInfo


@dataclass(frozen=True)
class PlannedPatch:
    """A patch on what was merged, and the tensors that it changes."""

    patch: ModelRef
    strength: float
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """Threads, elements per block, merged blocks that may wait or be made at once, and the peak they lead to (bytes,
    the whole process), of which `window` for what is held of files that lie elsewhere. `ahead`: how many tensors may be
    measured while another is merged.
    """

    threads: int
    block_elements: int
    outputs: int
    peak: int
    window: int = 0
    ahead: int = 1


@dataclass(frozen=True)
class AlignmentPlan:
    """How the models of a document are brought into one order before anything else is done with them.

    `file`: where the permutations are found, or put, and whether they `are_stored` already. `moved`: the models that
    are permuted, matched with the `reference`, or with the mean of the others in turn where there is none. `sizes`: of
    the permutations. `peak`: memory of the whole process meanwhile (bytes), of which `assignment` for the largest
    linear assignment problem may go beyond the limit, and `window` is for what is held of files that lie elsewhere.
    `read`: bytes read in one sweep over all permutations.
    """

    file: str
    are_stored: bool
    moved: tuple[ModelRef, ...]
    reference: ModelRef | None
    sizes: tuple[int, ...]
    threads: int = 1
    peak: int = 0
    assignment: int = 0
    read: int = 0
    window: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The plan for people and for JSON."""
        sizes = Counter(self.sizes)
        told: dict[str, Any] = {
            "file": self.file,
            "stored": self.are_stored,
            "models": [str(model) for model in self.moved],
            "permutations": [{"size": size, "count": sizes[size]} for size in sorted(sizes, reverse=True)],
        }
        if not self.are_stored:
            matched = "the mean of the others" if self.reference is None else str(self.reference)
            told |= {"matched_with": matched, "bytes_per_sweep": self.read}
            told |= {"peak_memory": self.peak, "largest_assignment": self.assignment}
        return told


@dataclass(frozen=True)
class ConfigEdit:
    """What `config.json` must say differently where layers were sliced: new `values` in a `section`, or at the top."""

    section: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DifferencePlan:
    """What is kept of the merged model: by what it differs from the base, as a `kind` of output in one `file`.

    Its size only the values tell: `most_bytes` at most. `read_bytes` are read to compare; `threads` encode at once;
    of so many tensors all rows are held (`held_whole`).
    """

    kind: Literal["delta", "adapter"]
    file: str
    encoding: str
    most_bytes: int
    read_bytes: int
    threads: int
    held_whole: int
    exact_on: ExactOn


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, as data."""

    recipe: Recipe
    models: tuple[ModelRef, ...]
    donor: int
    scope: Scope
    steps: tuple[Step, ...]
    shards: tuple[ShardLayout, ...]
    memory: MemoryPlan
    sources_digest: str
    config_edits: tuple[ConfigEdit, ...] = ()
    adapter_config: Mapping[str, Any] | None = None
    companions: Companions = field(default_factory=dict)
    tied: tuple[TiedPair, ...] = ()
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    stages: Mapping[ModelRef, Plan] = field(default_factory=dict)
    patches: tuple[PlannedPatch, ...] = ()
    """Where there are any, the one model is a stage: all that comes before them."""
    is_before_patches: bool = False
    difference: DifferencePlan | None = None
    alignment: AlignmentPlan | None = None

    @cached_property
    def by_name(self) -> dict[str, Step]:
        return {step.name: step for step in self.steps}

    @cached_property
    def digest(self) -> str:
        """The same for two merges that write the same files: recipe, sources, version, output layout, a reversal."""
        layout = [hashlib.sha256(shard.header).hexdigest() for shard in self.shards]
        beside = ["reversible"] if self.recipe.outputs.reversible else []
        text = canonical_json([__version__, self.recipe.canonical(), self.sources_digest, layout, *beside])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def measured(self) -> tuple[Step, ...]:
        """The steps that need measuring, in name order: what the scope `model` sums over."""
        found = [step for step in self.steps if step.method and step.method.stages(self.scope)]
        return tuple(sorted(found, key=lambda step: step.name))

    @property
    def passes_before(self) -> Sequence[Stage]:
        """The passes over the whole model that come before any tensor can be made."""
        first = self.measured[0].method if self.scope == "model" and self.measured else None
        return () if first is None else first.stages("model")

    def warnings_of(self, known: Known) -> Sequence[str]:
        """What the user should know of what those passes came to."""
        first = self.measured[0].method if self.passes_before else None
        return () if first is None else first.warnings(known)

    @property
    def exact_on(self) -> ExactOn:
        """Where the same recipe gives the same bytes: on any machine, unless a method that was used promises less."""
        used = {type(step.method).exact_on for step in self.steps if step.method}
        used |= {"this machine"} if self.alignment is not None and not self.alignment.are_stored else set()
        used |= {stage.exact_on for stage in self.stages.values()}
        used |= {self.difference.exact_on} if self.difference is not None else set()
        return "this machine" if "this machine" in used else "any machine"

    @property
    def is_adapter(self) -> bool:
        """Whether the output is an adapter and no model."""
        return self.adapter_config is not None or (self.difference is not None and self.difference.kind == "adapter")

    @property
    def output_bytes(self) -> int:
        """Bytes of the weights that are written, and the most that a reversal or a difference can come to."""
        if self.difference is not None:
            return self.difference.most_bytes
        reversal = sum(slot.nbytes for shard in self.shards for slot in shard.slots if slot.name in self.reversible)
        return sum(shard.size for shard in self.shards) + reversal

    @property
    def disk_bytes(self) -> int:
        """Of these, what is on the disk at a time: at most two files where each goes when it is complete."""
        if self.difference is not None or not self.recipe.outputs.goes:
            return self.output_bytes
        sizes = [shard.size for shard in self.shards]
        beside = self.output_bytes - sum(sizes)
        return max((sum(sizes[i : i + 2]) for i in range(len(sizes))), default=0) + beside

    @property
    def beside_bytes(self) -> int:
        """Bytes of the files that are written beside the weights: the tokenizer's above all."""
        files = self.companions.values()
        return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files)

    @property
    def reversible(self) -> Collection[str]:
        """The tensors of which the reversal keeps what they were without patches."""
        return {name for put in self.patches for name in put.tensors} if self.recipe.outputs.reversible else ()

    @property
    def passes(self) -> int:
        """The most times that one tensor is read whole."""
        return max((math.floor(self._reads(step)) for step in self.steps), default=1)

    @property
    def input_bytes(self) -> int:
        """Bytes read from the models, every pass counted that is reckoned with."""
        merging = sum(int(self._reads(step) * step.stored_bytes) for step in self.steps)
        compared = 0 if self.difference is None else self.difference.read_bytes
        return merging + compared + sum(stage._measuring_bytes for stage in self.stages.values())

    @property
    def _measuring_bytes(self) -> int:
        return sum(int((self._reads(step) - 1) * step.stored_bytes) for step in self.steps)

    @property
    def leaves(self) -> tuple[ModelRef, ...]:
        """The models that weights are read from, and the patches: those of the stages in their place."""
        return tuple(dict.fromkeys(self._leaves(self.stages)))

    def _leaves(self, stages: Mapping[ModelRef, Plan]) -> Iterator[ModelRef]:
        for model in self.models:
            yield from stages[model]._leaves(stages) if model in stages else (model,)
        yield from (put.patch for put in self.patches)

    @property
    def unpatched(self) -> Plan:
        """How the tensors are made, without the patches on them."""
        return self.stages[self.models[0]] if self.patches else self

    def edited_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The donor's `config.json` as the output needs it."""
        edited = copy.deepcopy(dict(config))
        if not config:
            return edited
        for edit in self.config_edits:
            (edited[edit.section] if edit.section else edited).update(edit.values)
        if written := self.recipe.out_dtype or self.recipe.dtype:
            edited["dtype" if "dtype" in config else "torch_dtype"] = written
        return edited

    def _reads(self, step: Step) -> float:
        stages = step.method.stages(self.scope) if step.method else ()
        return 1 + sum(stage.reads for stage in stages if stage.expected)

    def to_dict(self, *, steps: bool = False) -> dict[str, Any]:
        """The plan for people and for JSON; `steps` adds one entry per output tensor."""
        made = self.unpatched
        plan = {
            "method": self.recipe.merge_method,
            "semantics": self.recipe.method.semantics,
            "scope": made.scope,
            "models": [str(model) for model in made.models],
            "roles": {str(model): role for model in made.models if (role := self.recipe.role_of(model))},
            "donor": str(made.models[made.donor]),
            "tensors": len(self.steps),
            "tensors_merged": sum(step.method is not None for step in made.steps),
            "passes": made.passes,
            "bytes_read": self.input_bytes,
            "bytes_written": self.output_bytes,
            "bytes_on_disk": self.disk_bytes,
            "bytes_beside": self.beside_bytes,
            "peak_memory": self.memory.peak,
            "threads": self.memory.threads,
            "bytes_written_at_most": self.difference is not None,
            "shards": [{"file": file, "size": size, "tensors": tensors} for file, size, tensors in self._files()],
            "left_out": list(self.left_out),
            "warnings": list(self.warnings),
        }
        if self.difference is not None:
            plan["outputs"] = {
                "kind": self.difference.kind,
                "encoding": self.difference.encoding,
                "held_whole": self.difference.held_whole,
            }
        if self.alignment is not None:
            plan["alignment"] = self.alignment.to_dict()
        if stages := {name: stage for name, stage in self.stages.items() if not stage.is_before_patches}:
            plan["stages"] = [{"name": str(name), **stage._stage_dict()} for name, stage in stages.items()]
        if self.patches:
            plan["patches"] = [
                {"patch": str(put.patch), "strength": put.strength, "tensors": len(put.tensors)} for put in self.patches
            ]
        return plan | ({"steps": [self._step_dict(step) for step in self.steps]} if steps else {})

    def _files(self) -> list[tuple[str, int, int]]:
        """Name, size and number of tensors of each file of weights."""
        if self.difference is not None:
            return [(self.difference.file, self.difference.most_bytes, len(self.steps))]
        return [(shard.file, shard.size, len(shard.slots)) for shard in self.shards]

    def _stage_dict(self) -> dict[str, Any]:
        kept = ("method", "semantics", "scope", "models", "donor", "tensors", "tensors_merged", "left_out", "warnings")
        return {key: value for key, value in self.to_dict().items() if key in (*kept, "alignment")}

    def _step_dict(self, step: Step) -> dict[str, Any]:
        if self.patches:
            put = {str(patch.patch): patch.strength for patch in self.patches if step.name in patch.tensors}
            below = self.unpatched.by_name.get(step.name)
            made = self._made_dict(step) if below is None else self.unpatched._made_dict(below)
            return {**made, "shape": list(step.shape), "dtype": str(step.dtype), "patches": put}
        return self._made_dict(step)

    def _made_dict(self, step: Step) -> dict[str, Any]:
        return {
            "tensor": step.name,
            "shape": list(step.shape),
            "dtype": str(step.dtype),
            "sources": [self._source_dict(source) for source in step.merges],
            "given": {
                name: [None if source is None else self._source_dict(source) for source in each]
                for name, each in step.given.items()
            },
            "parameters": step.method.model_dump(by_alias=True) if step.method else None,
            "copied_because": step.reason or None,
        }

    def _source_dict(self, source: Source) -> dict[str, str]:
        return {"model": str(self.models[source.model]), "tensor": source.info.name}
