"""How a plan is made: from headers and configs alone, before a weight is read.

Everything that can be refused is refused here: missing tensors, shapes, layer counts, parameters, filters that match
nothing, memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from merge_core import __version__
from merge_core.adapter_sums import Placed, plan_sum
from merge_core.documents import canonical_json
from merge_core.dtypes import OUTPUT, DType
from merge_core.errors import Problem, RecipeError
from merge_core.given import GivenFinder
from merge_core.headers import TensorInfo
from merge_core.layout import Slot, lay_out
from merge_core.memory import BLOCK_ELEMENTS, plan_memory
from merge_core.method import Scope
from merge_core.parameters import Resolver
from merge_core.plan import Plan, Source, Step
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.runs import Findings, Input, Run, Structure, Wanted, digest_of
from merge_core.weights import Weights, is_embedding

_VOCABULARIES_DIFFER = (
    "; where vocabularies differ, write `tokenizer: {source: union}` for every token of all models, or "
    "`tokenizer: {source: base}` for the base's"
)


_MAX_COMPARISONS = 20_000_000


def make_plan(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Weights],
    *,
    memory: int | None = None,
    threads: int | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    max_shard_size: int | None = None,
    on_gpu: bool = False,
    window: int = 0,
    stages: Mapping[ModelRef, Plan] | None = None,
    written: Recipe | None = None,
) -> Plan:
    """Plan a merge from headers.

    `checkpoints` must hold every model that `referenced_models` names. `memory` (bytes) and `threads` go before the
    recipe's limits; `block_elements` bounds a block from above; `window` bytes are for what lies elsewhere. `stages`
    are the plans of those models that are merges themselves, with all they read; `written` is what was asked for, where
    `recipe` is only the last part of it. Raises `RecipeError`, `IncompatibleModels` or `MemoryLimitExceeded`, each
    naming all that is wrong.
    """
    alone = {model: weights for model, weights in checkpoints.items() if isinstance(weights, Placed)}
    if alone:
        return plan_sum(recipe, alone, memory, threads, block_elements, on_gpu=on_gpu, window=window)
    planner = _Planner(recipe, checkpoints, on_gpu, stages or {}, written or recipe)
    return planner.plan(memory, threads, block_elements, max_shard_size, window)


class _Planner:
    def __init__(
        self,
        recipe: Recipe,
        checkpoints: Mapping[ModelRef, Weights],
        on_gpu: bool,
        stages: Mapping[ModelRef, Plan],
        written: Recipe,
    ) -> None:
        self.written = written
        self.recipe, self.checkpoints, self.on_gpu, self.stages = recipe, checkpoints, on_gpu, stages
        self.findings = Findings()
        self.structure = Structure(recipe, checkpoints, self.findings)
        self.resolver = Resolver(recipe, self.findings)
        self.method = recipe.method
        self.scope: Scope = recipe.scope or self.method.scopes[0]
        self.models = self.structure.models
        self.index = {model: i for i, model in enumerate(self.models)}
        self.given = GivenFinder(recipe, checkpoints, self._source, self.findings)

    def plan(
        self, memory: int | None, threads: int | None, block_elements: int, max_shard_size: int | None, window: int
    ) -> Plan:
        self._check_inputs(self.structure.runs)
        self.findings.raise_any()
        donor = self.index[self.structure.donor]
        wanted = self.structure.wanted()
        self._check_work(sum(len(tensors) for _, tensors in wanted))
        steps = tuple(step for run, tensors in wanted for tensor in tensors if (step := self._step(run, tensor)))
        self._check_filters(wanted)
        self._check_scope(steps)
        self.given.check_use()
        self.findings.raise_any()
        metadata = {"format": "pt", "weightsmith": __version__, "recipe": canonical_json(self.written.canonical())}
        slots = [Slot(step.name, step.dtype, step.shape) for step in steps]
        return Plan(
            recipe=self.written,
            models=self.models,
            donor=donor,
            scope=self.scope,
            steps=steps,
            shards=lay_out(slots, max_shard_size or self.recipe.outputs.max_shard_size, metadata),
            memory=plan_memory(
                steps,
                self.scope,
                memory or self.recipe.limits.memory,
                threads or self.recipe.limits.threads,
                block_elements,
                on_gpu=self.on_gpu,
                stages=tuple(self.stages.values()),
                planning=max(self.checkpoints[model].planning_bytes for model in self.models),
                window=window,
            ),
            sources_digest=digest_of(self.models, self.checkpoints),
            config_edits=tuple(self.structure.config_edits),
            companions=self.checkpoints[self.models[donor]].companions,
            tied=tuple(self.structure.tied),
            left_out=(*self._of_stages("left_out"), *self.findings.left_out),
            warnings=(
                *self._of_stages("warnings"),
                *self.recipe.warnings,
                *self.findings.warnings,
                *self._notes(),
            ),
            stages=self.stages,
        )

    def _of_stages(self, what: Literal["left_out", "warnings"]) -> Iterator[str]:
        for name, stage in self.stages.items():
            for note in () if stage.is_before_patches else getattr(stage, what):
                yield f"{name}: {note}"

    def _check_inputs(self, runs: Sequence[Run]) -> None:
        fewest, most = self.method.count
        for run in runs:
            others = [taken for taken in run.inputs if taken.ref != run.base or self.method.base == "model"]
            if self.method.base == "model":
                others = [taken for taken in others if taken.pointer != "#/base_model"]
            elif run.base is None and self.method.base == "required":
                self.findings.recipe_problems.append(
                    Problem(f"{self.recipe.merge_method} needs a base_model", "#/base_model")
                )
                continue
            elif run.base is not None and all(taken.ref != run.base for taken in run.inputs):
                detail = (
                    f"the base {run.base} is not among the sources of this slice, so its layers are not known; add it"
                )
                self.findings.recipe_problems.append(Problem(detail, f"{run.pointer}/sources"))
            where = f"{run.pointer}/{'sources' if '/slices/' in run.pointer else 'models'}"
            if self._adds_nothing(run):
                self.findings.warnings.append(f"{where}: only the base takes part, so its tensors are copied")
                continue
            if not fewest <= len(others) <= (most or len(others)):
                wants = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
                beside = " besides the base" if self.method.base != "model" and run.base else ""
                models = "models" if fewest > 1 else "model"
                detail = f"{self.recipe.merge_method} takes {wants} {models}{beside}, not {len(others)}"
                self.findings.recipe_problems.append(Problem(detail, where))
        for model in self.models:
            weights = self.checkpoints[model]
            if weights.tensors and weights.config.get("quantization_config") and not self.method.copies:
                detail = f"{model} is quantised (its config has a quantization_config); merge the unquantised weights"
                self.findings.problems.append(Problem(detail))

    def _adds_nothing(self, run: Run) -> bool:
        """Whether a method that adds to a base is given the base alone, which mergekit lets through."""
        adds = self.method.base == "required" and self.method.count == (1, None)
        return adds and run.base is not None and all(taken.ref == run.base for taken in run.inputs)

    def _step(self, run: Run, wanted: Wanted) -> Step | None:
        info = wanted.info
        if run.is_copied:
            source = self._source(run.donor.ref, info)
            dtype = self._output_dtype(run.donor.ref, info)
            return Step(wanted.name, info.shape, dtype, (source,), reason="in no module of the recipe")
        sources: list[tuple[Input, Source]] = []
        for taken, name in zip(run.inputs, wanted.names, strict=True):
            found = self.checkpoints[taken.ref].find(name, info.shape)
            if found is None:
                self.findings.problems.append(
                    Problem(f"{taken.ref} lacks {name}, which {wanted.owner} has", taken.pointer, tensor=name)
                )
            elif found.shape != info.shape:
                hint = _VOCABULARIES_DIFFER if is_embedding(name) or "head" in name else ""
                detail = f"{name} is {list(found.shape)} in {taken.ref} but {list(info.shape)} in {wanted.owner}{hint}"
                self.findings.problems.append(Problem(detail, taken.pointer, tensor=name))
            elif (found.dtype.kind == "float") != (info.dtype.kind == "float"):
                detail = f"{name} is stored as {found.dtype} in {taken.ref} but as {info.dtype} in {wanted.owner}"
                self.findings.problems.append(Problem(detail, taken.pointer, tensor=name))
            else:
                sources.append((taken, self._source(taken.ref, found)))
        if len(sources) < len(run.inputs):
            return None
        donor = next(source for taken, source in sources if taken is run.donor)
        others = tuple(source for taken, source in sources if taken is not run.donor)

        dtype = self._output_dtype(wanted.owner, info)
        if info.dtype.kind != "float" and self.method.copies:
            source = next(source for taken, source in sources if taken.pointer != "#/base_model")
            return Step(wanted.name, info.shape, info.dtype, (source,), reason="passed through")
        if info.dtype.kind in ("integer", "bool"):
            return Step(wanted.name, info.shape, info.dtype, (donor, *others), reason="integers are not averaged")
        if any(pattern in wanted.name for pattern in self.recipe.exclude):
            return Step(wanted.name, info.shape, dtype, (donor,), reason="excluded by the recipe")
        if self._adds_nothing(run):
            return Step(wanted.name, info.shape, dtype, (donor,), reason="only the base takes part")
        method, base, taking_part = self.resolver.resolve(run, wanted, sources)
        if method is None:
            return None
        if method.is_copy and taking_part:
            source = taking_part[0]
            dtype = self._output_dtype(self.models[source.model], source.info)
            return Step(wanted.name, info.shape, dtype, (source,), reason="passed through")
        if info.dtype.kind == "packed":
            self.findings.problems.append(
                Problem(f"{info.name} is stored as {info.dtype}; merge the unquantised weights", tensor=info.name)
            )
            return None
        if info.elements == 0:
            return Step(wanted.name, info.shape, dtype, (donor,), reason="it is empty")
        named = zip(sources, wanted.names, strict=True)
        models = [(taken, name) for (taken, source), name in named if any(source is part for part in taking_part)]
        given = self.given.find(method, wanted, models)
        return Step(wanted.name, info.shape, dtype, taking_part, base, method, given=given)

    def _source(self, model: ModelRef, info: TensorInfo) -> Source:
        weights = self.checkpoints[model]
        stored = sum(end - begin for _, begin, end in weights.ranges(info))
        return Source(
            self.index[model],
            info,
            weights.temporary(info),
            weights.thread_bytes(info),
            None if stored == info.nbytes else stored,
            weights.is_whole(info),
        )

    def _output_dtype(self, model: ModelRef, info: TensorInfo) -> DType:
        written = self.recipe.out_dtype or self.recipe.dtype
        return OUTPUT[written] if written and info.dtype.kind == "float" else self.checkpoints[model].format(info)

    def _check_work(self, tensors: int) -> None:
        """Refuse what would take too long only to look at: every filter is held against every tensor's name."""
        filters = sum(
            len(setting.entries)
            for _, parameters, _ in self.recipe.parameter_blocks()
            for setting in parameters.values()
            if len(setting.entries) > 1
        )
        if (filters + len(self.recipe.exclude)) * tensors > _MAX_COMPARISONS:
            many = f"{filters + len(self.recipe.exclude):,} filters and patterns for {tensors:,} tensors"
            raise RecipeError.of([Problem(f"{many} are too many; say the same with fewer", "#/parameters")])

    def _check_filters(self, wanted: Sequence[tuple[Run, Sequence[Wanted]]]) -> None:
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
                    self.findings.recipe_problems.append(problem)
                else:
                    self.findings.warnings.append(f"{problem}; ignored")

    def _check_scope(self, steps: Sequence[Step]) -> None:
        if self.scope != "model":
            return
        measured = [step for step in steps if step.method and step.method.stages(self.scope)]
        for step in measured[1:]:
            first = measured[0]
            if [source.model for source in step.merges] != [source.model for source in first.merges]:
                both = [[str(self.models[source.model]) for source in each.merges] for each in (first, step)]
                one, other = map(", ".join, both)
                detail = (
                    "over the whole model every tensor needs the same models in the same order, but "
                    f"{first.name} has {one} and {step.name} has {other}"
                )
                self.findings.recipe_problems.append(Problem(detail, "#/scope"))
                return
            for name in self.method.measured:
                if getattr(step.method, name) != getattr(first.method, name):
                    places = f"{first.name} and {step.name}"
                    detail = f"over the whole model {name} must be one value; it differs between {places}"
                    self.findings.recipe_problems.append(Problem(detail, f"#/parameters/{name}"))
                    return

    def _notes(self) -> list[str]:
        return list(dict.fromkeys(note for model in self.models for note in self.checkpoints[model].notes))
