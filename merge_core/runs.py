"""What takes part in a merge: runs of output tensors that are made alike, each from its inputs.

Coverage is proved from the names that are stored, with no table of architectures: every tensor of the donor (the base,
else the first model) is in the output exactly once, or `left_out` says why not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_core.documents import canonical_json
from merge_core.errors import IncompatibleModels, Problem, RecipeError, WeightsmithError
from merge_core.headers import MAX_TENSORS, TensorInfo
from merge_core.keys import ModuleEntry, Slice, SliceSource
from merge_core.layers import by_layer, in_stack, place_of, stacks
from merge_core.modules import Module, Role, find_modules, names_of_modules, role_of
from merge_core.plan import ConfigEdit, TiedPair
from merge_core.recipe import Recipe, referenced_models
from merge_core.references import ModelRef
from merge_core.settings import Parameters
from merge_core.weights import Weights, is_embedding

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Keys of a config that list one entry per layer."""


def digest_of(models: Sequence[ModelRef], checkpoints: Mapping[ModelRef, Weights]) -> str:
    """Which files a plan is made from: changes whenever one of them does."""
    files: list[list[Any]] = []
    for model in models:
        for shard in checkpoints[model].shards.values():
            place, stamps = str(shard.path), [shard.size, shard.inode, shard.mtime_ns, shard.ctime_ns]
            if (origin := shard.snapshot) is not None:
                place, stamps = f"{origin.repo}@{origin.commit}/{shard.path.name}", [shard.size]
            files.append([str(model), place, *stamps, shard.header_sha256])
    for model in models:
        for name, path in checkpoints[model].settings.items():
            files.append([str(model), name, hashlib.sha256(path.read_bytes()).hexdigest()])
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()


@dataclass
class Findings:
    """What planning came upon: why it cannot be, and what the user should know."""

    problems: list[Problem] = field(default_factory=list)
    recipe_problems: list[Problem] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add_recipe_problem(self, problem: Problem) -> None:
        """One per place of the recipe, however many tensors it concerns."""
        if problem.pointer not in {known.pointer for known in self.recipe_problems}:
            self.recipe_problems.append(problem)

    def raise_any(self) -> None:
        """Raise what was found so far; what is wrong with the recipe goes before what its models lack."""
        error: type[WeightsmithError] = RecipeError if self.recipe_problems else IncompatibleModels
        if found := self.recipe_problems or self.problems:
            raise error.of(found)


@dataclass
class Input:
    """One model taking part in a run of output tensors."""

    ref: ModelRef
    parameters: Parameters
    pointer: str
    first_layer: int = 0
    own_base: ModelRef | None = None
    statistics: Mapping[str, ModelRef] = field(default_factory=dict)


@dataclass
class Run:
    """Output tensors that are made alike: those of `models`, or of one slice.

    `levels` are the parameters of what they stand in, the innermost first. If `is_copied`, the one input is copied.
    """

    inputs: list[Input]
    base: ModelRef | None
    levels: tuple[Parameters, ...]
    pointer: str
    is_copied: bool = False

    @property
    def donor(self) -> Input:
        return next((taken for taken in self.inputs if taken.ref == self.base), self.inputs[0])


@dataclass(frozen=True)
class Wanted:
    """One output tensor: what and whose it is, each input's name for it, its place in the layers (0 first, 1 last)."""

    name: str
    info: TensorInfo
    owner: ModelRef
    names: tuple[str, ...]
    place: float


@dataclass(frozen=True)
class Part:
    """A module of the recipe (None: all of it), and its runs, one per slice where there are slices."""

    name: str | None
    pointer: str
    slices: Sequence[Slice]
    runs: list[Run]


@dataclass
class Structure:
    """The runs of a recipe and the tensors of each; `findings` takes what is wrong or worth knowing."""

    recipe: Recipe
    checkpoints: Mapping[ModelRef, Weights]
    findings: Findings
    tied: list[TiedPair] = field(default_factory=list)
    config_edits: list[ConfigEdit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.models = tuple(referenced_models(self.recipe))
        self.parts = [
            Part(name, pointer, part.slices or [], self._runs(part, pointer))
            for name, (pointer, part) in self.recipe.parts().items()
        ]
        self.runs = [run for part in self.parts for run in part.runs]

    @property
    def donor(self) -> ModelRef:
        """Whose tensors, config and tokenizer the output has, as far as slices do not say otherwise."""
        return self.base or self.runs[0].donor.ref

    @property
    def base(self) -> ModelRef | None:
        """The base that the merge is about: none where a model is copied only to be compared with it, so that whatever
        that model has besides is kept.
        """
        is_compared = self.recipe.outputs.kind != "full" and self.recipe.method.copies
        return None if is_compared else self.recipe.base_model

    @property
    def taking_part(self) -> dict[ModelRef, str]:
        """Every model whose weights are merged, the donor first, and where the recipe names it."""
        places = referenced_models(self.recipe)
        taken = [each for run in self.runs for each in run.inputs]
        bases = [each.own_base for each in taken if each.own_base is not None and self.recipe.method.own_bases]
        return {ref: places[ref] for ref in (self.donor, *(each.ref for each in taken), *bases)}

    def wanted(self) -> list[tuple[Run, list[Wanted]]]:
        """Every output tensor, in order, below the run that makes it."""
        found: list[tuple[Run, list[Wanted]]] = []
        for part, module in zip(self.parts, self._modules(), strict=True):
            wanted = self._wanted_of_slices if part.slices else self._wanted_of_models
            found += wanted(part, module)
            self.findings.raise_any()
        return found + self._wanted_of_no_module()

    def _modules(self) -> list[Module]:
        """What each part of the recipe makes; raises for a name that means nothing, and for tensors in two modules."""
        if self.recipe.modules is None:
            return [Module()]
        tensors = self.checkpoints[self.donor].tensors
        found = find_modules(list(self.recipe.modules), tensors)
        for part in self.parts:
            if part.name not in found:
                there = ", ".join(names_of_modules(tensors))
                detail = f"{self.donor} has no module {str(part.name)[:60]!r}; it has {there}, or any prefix of tensors"
                self.findings.recipe_problems.append(Problem(detail, part.pointer))
        for tensor in tensors:
            holding = [name for name, module in found.items() if module.holds(tensor)]
            if len(holding) > 1:
                detail = f"modules {' and '.join(holding)} both hold {tensor}; let each tensor be in one"
                self.findings.add_recipe_problem(Problem(detail, "#/modules"))
        self.findings.raise_any()
        return [found[str(part.name)] for part in self.parts]

    def _wanted_of_no_module(self) -> list[tuple[Run, list[Wanted]]]:
        """The donor's tensors that are in none of the recipe's modules: they are copied."""
        if self.recipe.modules is None:
            return []
        donor = self.checkpoints[self.donor]
        modules = self._modules()
        rest = [info for info in donor.tensors.values() if not any(module.holds(info.name) for module in modules)]
        source = Input(self.donor, {}, "#/base_model" if self.base else self.runs[0].donor.pointer)
        heads = self._tied_heads(self.donor, [source], {info.name: info for info in rest}) if rest else set()
        run = Run([source], None, (), "#", is_copied=True)
        return [(run, _around(run, self.donor, [info for info in rest if info.name not in heads]))]

    def _tensors(self, model: ModelRef, module: Module) -> Mapping[str, TensorInfo]:
        """A model's tensors in one module."""
        tensors = self.checkpoints[model].tensors
        return tensors if self.recipe.modules is None else {n: tensors[n] for n in tensors if module.holds(n)}

    # Who takes part.

    def _runs(self, part: Recipe | ModuleEntry, pointer: str) -> list[Run]:
        base = self.base
        outer = () if part is self.recipe else (part.parameters,)
        if not part.slices:
            inputs = [
                Input(entry.model, entry.parameters, f"{pointer}/models/{i}", 0, entry.base_model, entry.statistics)
                for i, entry in enumerate(part.models or [])
            ]
            if base and all(taken.ref != base for taken in inputs):
                inputs.insert(0, Input(base, {}, "#/base_model"))
            return [Run(inputs, base, outer, pointer)]
        runs = []
        for i, piece in enumerate(part.slices):
            here = f"{pointer}/slices/{i}"
            inputs = [self._slice_input(source, f"{here}/sources/{j}") for j, source in enumerate(piece.sources)]
            runs.append(Run(inputs, piece.base_model or base, (piece.parameters, *outer), here))
        return runs

    @staticmethod
    def _slice_input(source: SliceSource, pointer: str) -> Input:
        first_layer = source.layer_range[0]
        return Input(source.model, source.parameters, pointer, first_layer, source.base_model, source.statistics)

    # Which tensors there are.

    def _wanted_of_models(self, part: Part, module: Module) -> list[tuple[Run, list[Wanted]]]:
        run = part.runs[0]
        owner = run.donor.ref
        ours = self._tensors(owner, module)
        layers = stacks(ours)
        if not self._same_layers(run, layers):
            return []
        heads = self._tied_heads(owner, run.inputs, ours)
        tensors = [
            Wanted(info.name, info, owner, (info.name,) * len(run.inputs), place_of(info.name, layers))
            for info in ours.values()
            if info.name not in heads
        ]
        self._report_extras(owner, run.inputs, module)
        return [(run, tensors)]

    def _same_layers(self, run: Run, layers: Mapping[str, Mapping[int, int]]) -> bool:
        same = True
        for taken in run.inputs:
            theirs = stacks(self.checkpoints[taken.ref].tensors)
            for prefix, numbers in layers.items():
                if prefix in theirs and len(theirs[prefix]) != len(numbers):
                    same = False
                    has = f"{taken.ref} has {len(theirs[prefix])} layers in {prefix}*"
                    self.findings.problems.append(
                        Problem(f"{has}, but {run.donor.ref} has {len(numbers)}", taken.pointer)
                    )
        return same

    def _tied_heads(self, owner: ModelRef, inputs: Sequence[Input], ours: Mapping[str, TensorInfo]) -> set[str]:
        """Heads among the owner's tensors `ours` that its config ties to an embedding, which are stored once.

        Where a model stores a tied head, that it really is its embedding is checked when the merge runs.
        """
        donor = self.checkpoints[owner]
        heads = {}
        for info in ours.values():
            if partner := donor.tied_partner(info.name, info.shape):
                heads[info.name] = partner.name
                self.findings.left_out.append(
                    f"{info.name}: the config ties it to {partner.name}, which is stored once"
                )
        for taken in inputs:
            theirs = self.checkpoints[taken.ref]
            for info in theirs.tensors.values():
                partner = theirs.tied_partner(info.name, info.shape)
                if partner is None and info.name in heads and not theirs.config:
                    partner = theirs.tensors.get(heads[info.name])
                if partner is not None:
                    pair = TiedPair(self.models.index(taken.ref), info, partner)
                    self.tied += [pair] if pair not in self.tied else []
                elif info.name in heads:
                    self._refuse_head(taken, info, owner)
        return set(heads)

    def _report_extras(
        self, owner: ModelRef, inputs: Sequence[Input], module: Module, *, but: str | None = None
    ) -> None:
        """Tensors that another model has and the output will not; those below the prefix `but` are told elsewhere."""
        donor = self.checkpoints[owner]
        for taken in inputs:
            theirs = self.checkpoints[taken.ref]
            lost = []
            for info in self._tensors(taken.ref, module).values():
                if info.name in donor.tensors or (but is not None and in_stack(info.name, but)):
                    continue
                if donor.tied_partner(info.name, info.shape) is None:
                    lost.append(info.name)
                elif theirs.tied_partner(info.name, info.shape) is None:
                    self._refuse_head(taken, info, owner)
            self._leave_out(lost, taken.ref, owner)

    def _refuse_head(self, taken: Input, head: TensorInfo, donor: ModelRef) -> None:
        has = f"{taken.ref} has a head of its own, {head.name}"
        detail = f"{has}, which {donor} ties to its embeddings; it would be lost"
        self.findings.problems.append(Problem(detail, taken.pointer, tensor=head.name))

    def _leave_out(self, lost: Sequence[str], model: ModelRef, donor: ModelRef) -> None:
        if lost:
            shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            note = f"{shown}: only {model} has {'it' if len(lost) == 1 else 'them'}, {donor} has not"
            if note not in self.findings.left_out:
                self.findings.left_out.append(note)

    def _wanted_of_slices(self, part: Part, module: Module) -> list[tuple[Run, list[Wanted]]]:
        runs = part.runs
        prefix = self._common_prefix(part, module)
        for run, piece in zip(runs, part.slices, strict=True):
            for taken, source in zip(run.inputs, piece.sources, strict=True):
                has = len(stacks(self.checkpoints[taken.ref].tensors)[prefix])
                if source.layer_range[1] > has:
                    detail = f"{taken.ref} has {has} layers, so layer_range {list(source.layer_range)} is not in it"
                    self.findings.problems.append(Problem(detail, f"{taken.pointer}/layer_range"))
        self.findings.raise_any()

        owner = self.base or runs[0].donor.ref
        ours = self._tensors(owner, module)
        outer = list({taken.ref: taken for run in (runs[0], runs[-1]) for taken in run.inputs}.values())
        heads = self._tied_heads(owner, outer, ours)
        self._report_extras(owner, outer, module, but=prefix)
        outside = [info for info in ours.values() if not in_stack(info.name, prefix) and info.name not in heads]

        wanted = [(runs[0], _around(runs[0], owner, [info for info in outside if is_embedding(info.name)]))]
        made: list[tuple[ModelRef, int]] = []
        count = len(outside)
        for run, piece in zip(runs, part.slices, strict=True):
            length = piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
            layers = by_layer(self.checkpoints[run.donor.ref].tensors, prefix)
            first = run.donor.first_layer
            count += sum(len(layers[layer]) for layer in range(first, first + length))
            if count > MAX_TENSORS:
                detail = f"the slices make more tensors than the {MAX_TENSORS:,} that a checkpoint may have"
                raise RecipeError.of([Problem(detail, run.pointer)])
            tensors = []
            for i in range(length):
                place = i / (length - 1) if length > 1 else 1.0
                for rest, info in layers[run.donor.first_layer + i].items():
                    names = tuple(f"{prefix}{taken.first_layer + i}.{rest}" for taken in run.inputs)
                    tensors.append(Wanted(f"{prefix}{len(made)}.{rest}", info, run.donor.ref, names, place))
                made.append((run.donor.ref, run.donor.first_layer + i))
            self._report_layer_extras(run, prefix, length)
            wanted.append((run, tensors))
        wanted.append((runs[-1], _around(runs[-1], owner, [info for info in outside if not is_embedding(info.name)])))
        self.config_edits.append(self._edit_config(owner, role_of(prefix), made))
        return wanted

    def _edit_config(self, owner: ModelRef, role: Role, made: Sequence[tuple[ModelRef, int]]) -> ConfigEdit:
        """What the donor's config must say of the output's layers; an entry per layer comes from that layer's model."""
        section, config = self._config_of(owner, role)
        values: dict[str, Any] = {}
        for key in _LAYER_COUNTS:
            if isinstance(config.get(key), int):
                values[key] = len(made)
        if self.checkpoints[owner].config and not values:
            self.findings.warnings.append("config.json names no layer count that could be set to the output's")
        for key in _PER_LAYER:
            if isinstance(config.get(key), list):
                values[key] = [self._of_layer(model, role, key, layer) for model, layer in made]
        return ConfigEdit(section, values)

    def _config_of(self, model: ModelRef, role: Role) -> tuple[str | None, Mapping[str, Any]]:
        """Where a config describes what has that role, None for its top, and what stands there."""
        weights = self.checkpoints[model]
        if role == "text":
            return weights.text_section, weights.text_config
        section = next((name for name in weights.config if name.startswith(role) and name.endswith("_config")), None)
        return section, weights.config[section] if section and isinstance(weights.config[section], dict) else {}

    def _of_layer(self, model: ModelRef, role: Role, key: str, layer: int) -> Any:
        entries = self._config_of(model, role)[1].get(key)
        if isinstance(entries, list) and layer < len(entries):
            return entries[layer]
        detail = f"the config of {model} has no entry of {key} for layer {layer}, which the output's config needs"
        if all(problem.detail != detail for problem in self.findings.problems):
            self.findings.problems.append(Problem(detail))
        return None

    def _common_prefix(self, part: Part, module: Module) -> str:
        refs = dict.fromkeys([self.donor, *(taken.ref for run in part.runs for taken in run.inputs)])
        prefixes = {model: self._layer_prefix(model, module) for model in refs}
        if len(set(prefixes.values())) > 1 and not self.findings.problems:
            named = ", ".join(f"{model} has {prefix}*" for model, prefix in prefixes.items())
            self.findings.problems.append(Problem(f"the models name their layers differently: {named}"))
        self.findings.raise_any()
        return next(iter(prefixes.values()))

    def _layer_prefix(self, model: ModelRef, module: Module) -> str:
        """What stands before the layer number in the names of the layers that `layer_range` counts."""
        complete = {
            prefix: numbers
            for prefix, numbers in stacks(self._tensors(model, module)).items()
            if list(numbers) == list(range(len(numbers)))
        }
        role: Role = role_of(next(iter(complete))) if len(complete) == 1 else "text"
        config = self._config_of(model, role)[1]
        declared = [config[key] for key in _LAYER_COUNTS if isinstance(config.get(key), int)]
        fitting = [prefix for prefix, numbers in complete.items() if not declared or len(numbers) == declared[0]]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting:
            wanted = f"the {declared[0]} numbered layers that its config says" if declared else "numbered layers"
            detail = f"{model} has not {wanted}, so it cannot be sliced"
        else:
            runs = ", ".join(f"{prefix}*" for prefix in fitting)
            detail = f"{model} has several runs of layers ({runs}); put the slices under modules, one for each"
        self.findings.problems.append(Problem(detail))
        return ""

    def _report_layer_extras(self, run: Run, prefix: str, length: int) -> None:
        ours = by_layer(self.checkpoints[run.donor.ref].tensors, prefix)
        for taken in run.inputs:
            theirs = by_layer(self.checkpoints[taken.ref].tensors, prefix)
            for i in range(length):
                lost = sorted(theirs[taken.first_layer + i].keys() - ours[run.donor.first_layer + i].keys())
                self._leave_out([f"{prefix}{taken.first_layer + i}.{rest}" for rest in lost], taken.ref, run.donor.ref)


def _around(run: Run, owner: ModelRef, infos: Sequence[TensorInfo]) -> list[Wanted]:
    """Tensors before or after the layers, which every model knows by the same name."""
    return [Wanted(info.name, info, owner, (info.name,) * len(run.inputs), 0.0) for info in infos]
