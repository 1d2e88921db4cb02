"""How a plan is made: from headers and configs alone, before a weight is read.

Everything that can be refused is refused here: missing tensors, shapes, layer counts, parameters, filters that match
nothing, memory. Coverage is proved from the names that are stored, with no table of architectures: every tensor of the
donor (the base, else the first model) is in the output exactly once, or `left_out` says why not.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from merge_core import __version__
from merge_core.checkpoint import Checkpoint, is_embedding
from merge_core.dtypes import OUTPUT, DType
from merge_core.errors import IncompatibleModels, MemoryLimitExceeded, Problem, RecipeError, WeightsmithError
from merge_core.headers import TensorInfo
from merge_core.layout import Slot, lay_out
from merge_core.method import MergeMethod, Scope
from merge_core.plan import WRITING_BLOCKS, ConfigEdit, MemoryPlan, Plan, Source, Step, TiedPair
from merge_core.recipe import ModelRef, Parameters, Recipe, Setting, SliceSource, canonical_json

FLOOR_BYTES = 400 * 2**20
"""What the process needs before the first block: interpreter, torch, libraries, histograms."""
BLOCK_ELEMENTS = 2**20
CUDA_BLOCK_ELEMENTS = 2**22
_LEAST_BLOCK = 2**17
"""Rather fewer threads than smaller blocks."""
_LAYER = re.compile(r"^(|.*?\.)(0|[1-9]\d*)\.(.+)$")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Keys of a config that list one entry per layer."""


def make_plan(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Checkpoint],
    *,
    memory: int | None = None,
    threads: int | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    max_shard_size: int | None = None,
    on_gpu: bool = False,
) -> Plan:
    """Plan a merge from headers.

    `checkpoints` must hold every model that `referenced_models` names. `memory` (bytes) and `threads` go before the
    recipe's limits; `block_elements` bounds a block from above. Raises `RecipeError`, `IncompatibleModels` or
    `MemoryLimitExceeded`, each naming all that is wrong.
    """
    return _Planner(recipe, checkpoints, on_gpu).plan(memory, threads, block_elements, max_shard_size)


def referenced_models(recipe: Recipe) -> dict[ModelRef, str]:
    """Every model the recipe names, in order, and the JSON pointer of its first mention."""
    found: dict[ModelRef, str] = {}
    if recipe.base_model:
        found[recipe.base_model] = "#/base_model"
    for i, entry in enumerate(recipe.models or []):
        found.setdefault(entry.model, f"#/models/{i}/model")
    for i, piece in enumerate(recipe.slices or []):
        if piece.base_model:
            found.setdefault(piece.base_model, f"#/slices/{i}/base_model")
        for j, source in enumerate(piece.sources):
            found.setdefault(source.model, f"#/slices/{i}/sources/{j}/model")
    return found


@dataclass
class _Input:
    """One model taking part in a run of output tensors."""

    ref: ModelRef
    parameters: Parameters
    pointer: str
    first_layer: int = 0


@dataclass
class _Run:
    """Output tensors that are made alike: a recipe's `models`, or one slice."""

    inputs: list[_Input]
    base: ModelRef | None
    parameters: Parameters
    pointer: str

    @property
    def donor(self) -> _Input:
        return next((taken for taken in self.inputs if taken.ref == self.base), self.inputs[0])


@dataclass(frozen=True)
class _Wanted:
    """One output tensor: what and whose it is, each input's name for it, its place in the layers (0 first, 1 last)."""

    name: str
    info: TensorInfo
    owner: ModelRef
    names: tuple[str, ...]
    place: float


@dataclass
class _Planner:
    recipe: Recipe
    checkpoints: Mapping[ModelRef, Checkpoint]
    on_gpu: bool = False
    problems: list[Problem] = field(default_factory=list)
    recipe_problems: list[Problem] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tied: list[TiedPair] = field(default_factory=list)
    config_edit: ConfigEdit = field(default_factory=ConfigEdit)

    def __post_init__(self) -> None:
        self.method = self.recipe.method
        self.scope: Scope = self.recipe.scope or self.method.scopes[0]
        self.models = tuple(referenced_models(self.recipe))
        self.index = {model: i for i, model in enumerate(self.models)}

    def plan(self, memory: int | None, threads: int | None, block_elements: int, max_shard_size: int | None) -> Plan:
        runs = self._runs_of_slices() if self.recipe.slices else [self._run_of_models()]
        self._check_inputs(runs)
        self._raise()
        donor = self.index[self.recipe.base_model or runs[0].donor.ref]
        wanted = self._wanted_of_slices(runs) if self.recipe.slices else self._wanted_of_models(runs[0])
        self._raise()
        steps = tuple(step for run, tensors in wanted for tensor in tensors if (step := self._step(run, tensor)))
        self._check_filters(wanted)
        self._check_scope(steps)
        self._raise()
        metadata = {"format": "pt", "weightsmith": __version__, "recipe": canonical_json(self.recipe.canonical())}
        slots = [Slot(step.name, step.dtype, step.shape) for step in steps]
        return Plan(
            recipe=self.recipe,
            models=self.models,
            donor=donor,
            scope=self.scope,
            steps=steps,
            shards=lay_out(slots, max_shard_size or self.recipe.outputs.max_shard_size, metadata),
            memory=_plan_memory(
                steps,
                self.scope,
                memory or self.recipe.limits.memory,
                threads or self.recipe.limits.threads,
                block_elements,
                on_gpu=self.on_gpu,
            ),
            sources_digest=self._sources_digest(),
            config_edit=self.config_edit,
            companions=tuple(self.checkpoints[self.models[donor]].companions),
            tied=tuple(self.tied),
            left_out=tuple(self.left_out),
            warnings=(*self.recipe.warnings, *self.warnings),
        )

    # Who takes part.

    def _run_of_models(self) -> _Run:
        inputs = [
            _Input(entry.model, entry.parameters, f"#/models/{i}") for i, entry in enumerate(self.recipe.models or [])
        ]
        base = self.recipe.base_model
        if base and all(taken.ref != base for taken in inputs):
            inputs.insert(0, _Input(base, {}, "#/base_model"))
        return _Run(inputs, base, {}, "#")

    def _runs_of_slices(self) -> list[_Run]:
        runs = []
        for i, piece in enumerate(self.recipe.slices or []):
            inputs = [self._slice_input(source, f"#/slices/{i}/sources/{j}") for j, source in enumerate(piece.sources)]
            runs.append(_Run(inputs, piece.base_model or self.recipe.base_model, piece.parameters, f"#/slices/{i}"))
        return runs

    @staticmethod
    def _slice_input(source: SliceSource, pointer: str) -> _Input:
        return _Input(source.model, source.parameters, pointer, source.layer_range[0])

    def _check_inputs(self, runs: Sequence[_Run]) -> None:
        fewest, most = self.method.count
        for run in runs:
            others = [taken for taken in run.inputs if taken.ref != run.base or self.method.base == "model"]
            if self.method.base == "model":
                others = [taken for taken in others if taken.pointer != "#/base_model"]
            elif run.base is None:
                self.recipe_problems.append(Problem(f"{self.recipe.merge_method} needs a base_model", "#/base_model"))
                continue
            elif all(taken.ref != run.base for taken in run.inputs):
                detail = (
                    f"the base {run.base} is not among the sources of this slice, so its layers are not known; add it"
                )
                self.recipe_problems.append(Problem(detail, f"{run.pointer}/sources"))
            if not fewest <= len(others) <= (most or len(others)):
                wants = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
                beside = " besides the base" if self.method.base == "required" else ""
                models = "models" if fewest > 1 else "model"
                detail = f"{self.recipe.merge_method} takes {wants} {models}{beside}, not {len(others)}"
                self.recipe_problems.append(
                    Problem(detail, f"{run.pointer}/{'sources' if self.recipe.slices else 'models'}")
                )
        for model in self.models:
            if self.checkpoints[model].config.get("quantization_config") and not self.method.copies:
                detail = f"{model} is quantised (its config has a quantization_config); merge the unquantised weights"
                self.problems.append(Problem(detail))

    # Which tensors there are.

    def _wanted_of_models(self, run: _Run) -> list[tuple[_Run, list[_Wanted]]]:
        donor = self.checkpoints[run.donor.ref]
        stacks = _stacks(donor.tensors)
        if not self._same_layers(run, stacks):
            return []
        heads = self._tied_heads(donor, run.donor.ref, run.inputs)
        tensors = []
        for info in donor.tensors.values():
            if info.name in heads:
                continue
            place = 0.0
            if layer := _LAYER.match(info.name):
                numbers = stacks[layer[1]]
                place = numbers[int(layer[2])] / (len(numbers) - 1) if len(numbers) > 1 else 1.0
            tensors.append(_Wanted(info.name, info, run.donor.ref, (info.name,) * len(run.inputs), place))
        self._report_extras(donor, run.donor.ref, run.inputs)
        return [(run, tensors)]

    def _same_layers(self, run: _Run, stacks: Mapping[str, Mapping[int, int]]) -> bool:
        same = True
        for taken in run.inputs:
            theirs = _stacks(self.checkpoints[taken.ref].tensors)
            for prefix, numbers in stacks.items():
                if prefix in theirs and len(theirs[prefix]) != len(numbers):
                    same = False
                    has = f"{taken.ref} has {len(theirs[prefix])} layers in {prefix}*"
                    self.problems.append(Problem(f"{has}, but {run.donor.ref} has {len(numbers)}", taken.pointer))
        return same

    def _tied_heads(self, donor: Checkpoint, name: ModelRef, inputs: Sequence[_Input]) -> set[str]:
        """Heads that the donor's config ties to an embedding, which are stored once.

        Where a model stores a tied head, that it really is its embedding is checked when the merge runs.
        """
        heads = {}
        for info in donor.tensors.values():
            if partner := donor.tied_partner(info.name, info.shape):
                heads[info.name] = partner.name
                self.left_out.append(f"{info.name}: the config ties it to {partner.name}, which is stored once")
        for taken in inputs:
            theirs = self.checkpoints[taken.ref]
            for info in theirs.tensors.values():
                partner = theirs.tied_partner(info.name, info.shape)
                if partner is None and info.name in heads and not theirs.config:
                    partner = theirs.tensors.get(heads[info.name])
                if partner is not None:
                    self.tied.append(TiedPair(self.index[taken.ref], info, partner))
                elif info.name in heads:
                    self._refuse_head(taken, info, name)
        return set(heads)

    def _report_extras(
        self, donor: Checkpoint, name: ModelRef, inputs: Sequence[_Input], *, but: str | None = None
    ) -> None:
        """Tensors that another model has and the output will not; those below the prefix `but` are told elsewhere."""
        for taken in inputs:
            theirs = self.checkpoints[taken.ref]
            lost = []
            for info in theirs.tensors.values():
                if info.name in donor.tensors or (but is not None and _in_stack(info.name, but)):
                    continue
                if donor.tied_partner(info.name, info.shape) is None:
                    lost.append(info.name)
                elif theirs.tied_partner(info.name, info.shape) is None:
                    self._refuse_head(taken, info, name)
            self._leave_out(lost, taken.ref, name)

    def _refuse_head(self, taken: _Input, head: TensorInfo, donor: ModelRef) -> None:
        has = f"{taken.ref} has a head of its own, {head.name}"
        detail = f"{has}, which {donor} ties to its embeddings; it would be lost"
        self.problems.append(Problem(detail, taken.pointer, tensor=head.name))

    def _leave_out(self, lost: Sequence[str], model: ModelRef, donor: ModelRef) -> None:
        if lost:
            shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            note = f"{shown}: only {model} has {'it' if len(lost) == 1 else 'them'}, {donor} has not"
            if note not in self.left_out:
                self.left_out.append(note)

    def _wanted_of_slices(self, runs: Sequence[_Run]) -> list[tuple[_Run, list[_Wanted]]]:
        prefix = self._common_prefix()
        pieces = self.recipe.slices or []
        for run, piece in zip(runs, pieces, strict=True):
            for taken, source in zip(run.inputs, piece.sources, strict=True):
                has = len(_stacks(self.checkpoints[taken.ref].tensors)[prefix])
                if source.layer_range[1] > has:
                    detail = f"{taken.ref} has {has} layers, so layer_range {list(source.layer_range)} is not in it"
                    self.problems.append(Problem(detail, f"{taken.pointer}/layer_range"))
        self._raise()

        owner = self.recipe.base_model or runs[0].donor.ref
        donor = self.checkpoints[owner]
        outer = list({taken.ref: taken for run in (runs[0], runs[-1]) for taken in run.inputs}.values())
        heads = self._tied_heads(donor, owner, outer)
        self._report_extras(donor, owner, outer, but=prefix)
        outside = [info for info in donor.tensors.values() if not _in_stack(info.name, prefix)]
        outside = [info for info in outside if info.name not in heads]

        wanted = [(runs[0], _around(runs[0], owner, [info for info in outside if is_embedding(info.name)]))]
        made: list[tuple[ModelRef, int]] = []
        for run, piece in zip(runs, pieces, strict=True):
            length = piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
            layers = _by_layer(self.checkpoints[run.donor.ref].tensors, prefix)
            tensors = []
            for i in range(length):
                place = i / (length - 1) if length > 1 else 1.0
                for rest, info in layers[run.donor.first_layer + i].items():
                    names = tuple(f"{prefix}{taken.first_layer + i}.{rest}" for taken in run.inputs)
                    tensors.append(_Wanted(f"{prefix}{len(made)}.{rest}", info, run.donor.ref, names, place))
                made.append((run.donor.ref, run.donor.first_layer + i))
            self._report_layer_extras(run, prefix, length)
            wanted.append((run, tensors))
        wanted.append((runs[-1], _around(runs[-1], owner, [info for info in outside if not is_embedding(info.name)])))
        self.config_edit = self._edit_config(donor, made)
        return wanted

    def _edit_config(self, donor: Checkpoint, made: Sequence[tuple[ModelRef, int]]) -> ConfigEdit:
        """What the donor's config must say of the output's layers; an entry per layer comes from that layer's model."""
        values: dict[str, Any] = {}
        for key in _LAYER_COUNTS:
            if isinstance(donor.text_config.get(key), int):
                values[key] = len(made)
        if donor.config and not values:
            self.warnings.append("config.json names no layer count that could be set to the output's")
        for key in _PER_LAYER:
            if isinstance(donor.text_config.get(key), list):
                values[key] = [self._of_layer(model, key, layer) for model, layer in made]
        return ConfigEdit(donor.text_section, values)

    def _of_layer(self, model: ModelRef, key: str, layer: int) -> Any:
        entries = self.checkpoints[model].text_config.get(key)
        if isinstance(entries, list) and layer < len(entries):
            return entries[layer]
        detail = f"the config of {model} has no entry of {key} for layer {layer}, which the output's config needs"
        if all(problem.detail != detail for problem in self.problems):
            self.problems.append(Problem(detail))
        return None

    def _common_prefix(self) -> str:
        prefixes = {model: self._layer_prefix(model) for model in self.models}
        if len(set(prefixes.values())) > 1 and not self.problems:
            named = ", ".join(f"{model} has {prefix}*" for model, prefix in prefixes.items())
            self.problems.append(Problem(f"the models name their layers differently: {named}"))
        self._raise()
        return next(iter(prefixes.values()))

    def _layer_prefix(self, model: ModelRef) -> str:
        """What stands before the layer number in the names of the layers that `layer_range` counts."""
        checkpoint = self.checkpoints[model]
        stacks = {
            prefix: numbers
            for prefix, numbers in _stacks(checkpoint.tensors).items()
            if list(numbers) == list(range(len(numbers)))
        }
        config = checkpoint.text_config
        declared = [config[key] for key in _LAYER_COUNTS if isinstance(config.get(key), int)]
        fitting = [prefix for prefix, numbers in stacks.items() if not declared or len(numbers) == declared[0]]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting:
            wanted = f"the {declared[0]} numbered layers that its config says" if declared else "numbered layers"
            detail = f"{model} has not {wanted}, so it cannot be sliced"
        else:
            runs = ", ".join(f"{prefix}*" for prefix in fitting)
            detail = f"{model} has several runs of layers ({runs}); slices cannot tell which is meant"
        self.problems.append(Problem(detail))
        return ""

    def _report_layer_extras(self, run: _Run, prefix: str, length: int) -> None:
        ours = _by_layer(self.checkpoints[run.donor.ref].tensors, prefix)
        for taken in run.inputs:
            theirs = _by_layer(self.checkpoints[taken.ref].tensors, prefix)
            for i in range(length):
                lost = sorted(theirs[taken.first_layer + i].keys() - ours[run.donor.first_layer + i].keys())
                self._leave_out([f"{prefix}{taken.first_layer + i}.{rest}" for rest in lost], taken.ref, run.donor.ref)

    # How each is made.

    def _step(self, run: _Run, wanted: _Wanted) -> Step | None:
        info = wanted.info
        sources: list[tuple[_Input, Source]] = []
        for taken, name in zip(run.inputs, wanted.names, strict=True):
            found = self.checkpoints[taken.ref].find(name, info.shape)
            if found is None:
                self.problems.append(
                    Problem(f"{taken.ref} lacks {name}, which {wanted.owner} has", taken.pointer, tensor=name)
                )
            elif found.shape != info.shape:
                hint = (
                    "; vocabularies differ, and row maps are not supported yet"
                    if is_embedding(name) or "head" in name
                    else ""
                )
                detail = f"{name} is {list(found.shape)} in {taken.ref} but {list(info.shape)} in {wanted.owner}{hint}"
                self.problems.append(Problem(detail, taken.pointer, tensor=name))
            elif (found.dtype.kind == "float") != (info.dtype.kind == "float"):
                detail = f"{name} is stored as {found.dtype} in {taken.ref} but as {info.dtype} in {wanted.owner}"
                self.problems.append(Problem(detail, taken.pointer, tensor=name))
            else:
                sources.append((taken, Source(self.index[taken.ref], found)))
        if len(sources) < len(run.inputs):
            return None
        donor = next(source for taken, source in sources if taken is run.donor)
        others = tuple(source for taken, source in sources if taken is not run.donor)

        if info.dtype.kind != "float" and self.method.copies:
            source = next(source for taken, source in sources if taken.pointer != "#/base_model")
            return Step(wanted.name, info.shape, info.dtype, (source,), reason="passed through")
        if info.dtype.kind in ("integer", "bool"):
            return Step(wanted.name, info.shape, info.dtype, (donor, *others), reason="integers are not averaged")
        if any(pattern in wanted.name for pattern in self.recipe.exclude):
            return Step(wanted.name, info.shape, self._output_dtype(info), (donor,), reason="excluded by the recipe")
        method, base, taking_part = self._resolve(run, wanted, sources)
        if method is None:
            return None
        if method.is_copy and taking_part:
            source = taking_part[0]
            return Step(wanted.name, info.shape, self._output_dtype(source.info), (source,), reason="passed through")
        if info.dtype.kind == "packed":
            self.problems.append(
                Problem(f"{info.name} is stored as {info.dtype}; merge the unquantised weights", tensor=info.name)
            )
            return None
        if info.elements == 0:
            return Step(wanted.name, info.shape, self._output_dtype(info), (donor,), reason="it is empty")
        return Step(wanted.name, info.shape, self._output_dtype(info), taking_part, base, method)

    def _output_dtype(self, info: TensorInfo) -> DType:
        written = self.recipe.out_dtype or self.recipe.dtype
        return OUTPUT[written] if written and info.dtype.kind == "float" else info.dtype

    def _resolve(
        self, run: _Run, wanted: _Wanted, sources: Sequence[tuple[_Input, Source]]
    ) -> tuple[MergeMethod | None, Source | None, tuple[Source, ...]]:
        """The method with its parameters for one tensor, the base, and the models that take part."""
        required = self.method.required_parameters()
        base = (
            next((source for taken, source in sources if taken.ref == run.base), None)
            if self.method.base == "required"
            else None
        )
        names = {taken.pointer: name for taken, name in zip(run.inputs, wanted.names, strict=True)}
        values: dict[str, Any] = {}
        taking_part: list[Source] = []
        per_model: dict[str, list[float]] = defaultdict(list)
        for taken, source in sources:
            if source is base:
                continue
            found: dict[str, Any] = {}
            for name in (name for name, is_per_model in self.method.parameters().items() if is_per_model):
                found[name] = self._lookup(name, names[taken.pointer], wanted.place, taken.parameters, run.parameters)
            missing = sorted(name for name, value in found.items() if value is None and name in required)
            if taken.ref == run.base and (missing or (taken.pointer == "#/base_model" and not required & found.keys())):
                continue
            for name in missing:
                detail = f"{taken.ref} has no {name} for {wanted.name}; give it beside the model or for all"
                self._add_recipe_problem(Problem(detail, f"{taken.pointer}/parameters/{name}"))
            taking_part.append(source)
            for name, value in found.items():
                default = self.method.model_fields[_field(self.method, name)].default
                per_model[name].append(value if value is not None else default[0] if name not in required else 1.0)
        for name in (name for name, is_per_model in self.method.parameters().items() if not is_per_model):
            value = self._lookup(name, wanted.name, wanted.place, run.parameters)
            if value is not None:
                values[name] = value
            elif name in required:
                detail = f"{self.recipe.merge_method} needs {name}, which has no value for {wanted.name}"
                self._add_recipe_problem(Problem(detail, f"#/parameters/{name}"))
        if self.recipe_problems:
            return None, base, tuple(taking_part)
        try:
            method = self.method.model_validate(
                {**values, **{name: tuple(column) for name, column in per_model.items()}}
            )
        except ValidationError as error:
            for problem in error.errors():
                name = str(problem["loc"][0]) if problem["loc"] else ""
                detail = (
                    str(problem["ctx"]["error"])
                    if problem["type"] == "value_error"
                    else f"{name} = {problem['input']}: {problem['msg']}"
                )
                self._add_recipe_problem(Problem(detail, f"#/parameters/{name}" if name else "#/parameters"))
            return None, base, tuple(taking_part)
        return method, base, tuple(taking_part)

    def _lookup(self, parameter: str, tensor: str, place: float, *levels: Mapping[str, Setting]) -> Any:
        """The first level that has a value for this tensor, the innermost first; the recipe's own is the last."""
        for level in (*levels, self.recipe.parameters):
            if parameter in level and (value := level[parameter].evaluate(tensor, place)) is not None:
                return value
        return None

    def _add_recipe_problem(self, problem: Problem) -> None:
        if problem.pointer not in {known.pointer for known in self.recipe_problems}:
            self.recipe_problems.append(problem)

    # What cannot be.

    def _check_filters(self, wanted: Sequence[tuple[_Run, Sequence[_Wanted]]]) -> None:
        names = {name for _, tensors in wanted for tensor in tensors for name in (tensor.name, *tensor.names)}
        patterns = [
            (entry.filter, f"{pointer}/{parameter}")
            for pointer, parameters, _ in self.recipe.parameter_blocks()
            for parameter, setting in parameters.items()
            for entry in setting.entries
            if entry.filter not in (None, "*")
        ]
        patterns += [(pattern, f"#/exclude/{i}") for i, pattern in enumerate(self.recipe.exclude)]
        for pattern, pointer in patterns:
            if pattern is not None and not any(pattern in name for name in names):
                problem = Problem(f"no tensor's name contains {pattern[:60]!r}", pointer)
                if self.recipe.unknown_keys == "error":
                    self.recipe_problems.append(problem)
                else:
                    self.warnings.append(f"{problem}; ignored")

    def _check_scope(self, steps: Sequence[Step]) -> None:
        if self.scope != "model":
            return
        merged = [step for step in steps if step.method]
        for step in merged[1:]:
            first = merged[0]
            if [source.model for source in step.reads] != [source.model for source in first.reads]:
                detail = f"over the whole model every tensor needs the same models; {step.name} and {first.name} differ"
                self.recipe_problems.append(Problem(detail, "#/scope"))
                return
            for name in self.method.measured:
                if getattr(step.method, name) != getattr(first.method, name):
                    places = f"{first.name} and {step.name}"
                    detail = f"over the whole model {name} must be one value; it differs between {places}"
                    self.recipe_problems.append(Problem(detail, f"#/parameters/{name}"))
                    return

    def _sources_digest(self) -> str:
        """Which files the plan was made from: changes whenever one of them does."""
        shards = [
            [str(model), str(shard.path), shard.size, shard.inode, shard.mtime_ns, shard.ctime_ns, shard.header_sha256]
            for model in self.models
            for shard in self.checkpoints[model].shards.values()
        ]
        return hashlib.sha256(canonical_json(shards).encode()).hexdigest()

    def _raise(self) -> None:
        error: type[WeightsmithError] = RecipeError if self.recipe_problems else IncompatibleModels
        if found := self.recipe_problems or self.problems:
            raise error.of(found)


def _plan_memory(
    steps: Sequence[Step], scope: Scope, limit: int, threads: int | None, block_elements: int, *, on_gpu: bool
) -> MemoryPlan:
    """As many threads and as large blocks as fit under the limit; raises `MemoryLimitExceeded` where not even one grain
    does.
    """
    threads = threads or len(os.sched_getaffinity(0))
    available = limit - FLOOR_BYTES
    needed, worst = max(
        ((_memory_of([step], scope, 1, 1, on_gpu), step) for step in steps), key=lambda need: need[0], default=(0, None)
    )
    if worst is not None and needed > available:
        detail = (
            f"{worst.name} {list(worst.shape)} needs {needed / 2**20:,.0f} MiB for its smallest block and "
            f"{FLOOR_BYTES / 2**20:,.0f} MiB besides, but the limit is {limit / 2**20:,.0f} MiB; raise limits.memory"
        )
        raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory", tensor=worst.name)])
    while threads > 1 and _memory_of(steps, scope, threads, _LEAST_BLOCK, on_gpu) > available:
        threads -= 1
    while block_elements > 1 and _memory_of(steps, scope, threads, block_elements, on_gpu) > available:
        block_elements //= 2
    return MemoryPlan(threads, block_elements, FLOOR_BYTES + _memory_of(steps, scope, threads, block_elements, on_gpu))


def _memory_of(steps: Sequence[Step], scope: Scope, threads: int, block_elements: int, on_gpu: bool) -> int:
    """Bytes that so many threads need for blocks of so many elements, or of a grain where that is more."""
    in_work = written = 0
    for step in steps:
        grain = min(step.grains.size, step.grains.rows) * step.grains.width
        block = min(max(grain, block_elements // max(1, grain) * grain), step.grains.rows * step.grains.width)
        in_work = max(in_work, block * step.element_bytes(on_gpu=on_gpu) + step.thread_bytes(scope))
        written = max(written, block * step.dtype.itemsize)
    return threads * in_work + (threads + WRITING_BLOCKS) * written


def _stacks(names: Iterable[str]) -> dict[str, dict[int, int]]:
    """Prefix → each number that follows it → its place among them: `model.layers.` → {0: 0, 1: 1, 2: 2}."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if layer := _LAYER.match(name):
            found[layer[1]].add(int(layer[2]))
    return {prefix: {number: i for i, number in enumerate(sorted(numbers))} for prefix, numbers in found.items()}


def _around(run: _Run, owner: ModelRef, infos: Sequence[TensorInfo]) -> list[_Wanted]:
    """Tensors before or after the layers, which every model knows by the same name."""
    return [_Wanted(info.name, info, owner, (info.name,) * len(run.inputs), 0.0) for info in infos]


def _in_stack(name: str, prefix: str) -> bool:
    layer = _LAYER.match(name)
    return layer is not None and layer[1] == prefix


def _by_layer(tensors: Mapping[str, TensorInfo], prefix: str) -> dict[int, dict[str, TensorInfo]]:
    found: dict[int, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        if (layer := _LAYER.match(name)) and layer[1] == prefix:
            found[int(layer[2])][layer[3]] = info
    return found


def _field(method: type[MergeMethod], parameter: str) -> str:
    return next(name for name, field in method.model_fields.items() if parameter in (name, field.alias))
