"""What the user asked for: mergekit's recipe format, read strictly, with a few keys of our own.

A recipe is YAML or the same as JSON. Of several documents one is the output and the others are stages, whose names are
models for one another. Unknown keys are refused with a suggestion, or listed as warnings under `unknown_keys: warn`.
Keys of ours: `seed`, `semantics`, `scope`, `statistics`, `alignment`, `exclude`, `allow_nonfinite`, `patches`,
`outputs`, `limits`, `unknown_keys`, and beside a model its own `base_model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, PrivateAttr

from merge_core.chat_templates import CHAT_TEMPLATES
from merge_core.documents import MAX_DOCUMENTS, Keys, escaped, load_documents, read_as, suggestion, unknown_keys
from merge_core.errors import Problem, RecipeError
from merge_core.keys import (
    EMPTY_IS_NONE,
    PLACE,
    AlignmentKeys,
    DTypeName,
    Limits,
    ModelEntry,
    ModuleEntry,
    Outputs,
    PatchEntry,
    Slice,
    Statistics,
    TakenModel,
    TokenizerKeys,
    TokenizerSource,
)
from merge_core.method import MergeMethod, Scope, Semantics
from merge_core.methods import METHODS, find_method
from merge_core.references import ModelRef
from merge_core.settings import Parameters

_OTHER_TOOLS = {
    "experts": "a mixture of experts (mergekit-moe)",
    "genome": "an evolutionary search (mergekit-evolve)",
    "layer_slices": "a recipe of bakllama",
}
_FORKS = {"core_space": "a proposal for mergekit", "emr": "a fork of mergekit", "lrp": "a fork of mergekit"}
_SHORTEST_TEMPLATE = 20

RecipeData = dict[str, Any] | list[dict[str, Any]]


class Recipe(Keys):
    """A merge recipe. `Recipe.from_text` reads YAML or JSON, `Recipe.from_data` what was parsed already."""

    merge_method: str = Field(json_schema_extra={"enum": list(METHODS)})
    models: Annotated[list[ModelEntry] | None, EMPTY_IS_NONE] = Field(None, max_length=64)
    slices: Annotated[list[Slice] | None, EMPTY_IS_NONE] = Field(None, max_length=1000)
    modules: Annotated[dict[str, ModuleEntry] | None, EMPTY_IS_NONE] = Field(
        None, max_length=64, description="one entry per part of the model, such as text_decoder and vision_tower"
    )
    base_model: ModelRef | None = None
    parameters: Parameters = Field({})
    dtype: DTypeName | None = Field(None, description="number format of the output (arithmetic is float32)")
    out_dtype: DTypeName | None = Field(None, description="number format of the output; goes before dtype")
    tokenizer: TokenizerKeys | None = None
    tokenizer_source: TokenizerSource | None = Field(None, description="the older form of `tokenizer: {source: …}`")
    chat_template: str | None = Field(None, description=f"auto, {', '.join(CHAT_TEMPLATES)}, or Jinja text")
    name: str | None = Field(None, max_length=200, description="a title for the model card")
    seed: int = Field(0, ge=0, lt=2**63, description="of all random numbers")
    semantics: Semantics = Field("mergekit", description="whose meaning of a method name counts where two differ")
    scope: Scope | None = Field(None, description="whether thresholds are taken per tensor or over the whole model")
    statistics: Statistics = Field({}, description="files of numbers that the method asks for: name → safetensors")
    alignment: AlignmentKeys | None = Field(None, description="permute the models first, so that their neurons meet")
    exclude: list[str] = Field([], max_length=1000, description="pieces of tensor names that are copied from the base")
    allow_nonfinite: bool = Field(False, description="let NaN and infinity through instead of refusing them")
    patches: list[PatchEntry] = Field([], max_length=64, description="deltas and signatures to add to what was merged")
    outputs: Outputs = Outputs()
    limits: Limits = Limits()
    unknown_keys: Literal["error", "warn"] = "error"

    _warnings: list[str] = PrivateAttr([])
    _ignored: list[Problem] = PrivateAttr([])
    _stages: tuple[Recipe, ...] = ()
    _pointer: str = "#"

    @property
    def method(self) -> type[MergeMethod]:
        return find_method(self.merge_method, self.semantics)

    @property
    def vocabulary(self) -> TokenizerKeys | None:
        """What is wanted of the output's tokenizer; None: the donor's is copied."""
        if self.tokenizer_source is not None:
            return TokenizerKeys(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def stages(self) -> tuple[Recipe, ...]:
        """The merges whose names this one uses as models, directly or through one another, each after those it needs:
        the other documents of the recipe.
        """
        return self._stages

    @property
    def warnings(self) -> tuple[str, ...]:
        """Keys that were ignored, one sentence each (only under `unknown_keys: warn`), and stages that nothing uses."""
        return tuple(self._warnings)

    @property
    def ignored(self) -> tuple[Problem, ...]:
        """The keys that nobody knows, of all documents (only under `unknown_keys: warn`)."""
        documents = (*self.stages, self)
        return tuple(document.located(problem) for document in documents for problem in document._ignored)

    def located(self, problem: Problem) -> Problem:
        """A problem of this document, its pointer as seen from the whole recipe."""
        if problem.pointer is None:
            return problem
        return replace(problem, pointer=self._pointer + problem.pointer.removeprefix("#"))

    @classmethod
    def from_text(cls, text: str | bytes) -> Self:
        """Read YAML or JSON, of one document or several. Raises `RecipeError`."""
        documents = load_documents(text)
        return cls.from_data(documents if len(documents) > 1 else next(iter(documents), None))

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read parsed YAML or JSON, a list where there are several documents.

        Raises `RecipeError` naming every key that is wrong.
        """
        return cls._of_documents(data) if isinstance(data, list) else cls._of_document(data)

    @classmethod
    def _of_document(cls, data: Any) -> Self:
        if not isinstance(data, Mapping):
            raise RecipeError("a recipe is a mapping with merge_method and models, slices or modules")
        if not {"models", "slices", "modules"} & set(data):
            for key, what in _OTHER_TOOLS.items():
                if key in data:
                    raise RecipeError.of([Problem(f"{what} is not supported: it is no merge of weights", f"#/{key}")])
        recipe = read_as(cls, data, missing={"merge_method": f"say which method: one of {', '.join(METHODS)}"})
        problems = [*recipe._structure()]
        if recipe.merge_method in METHODS:
            unknown = [
                *map(_hinted, unknown_keys(recipe, "#")),
                *recipe._unknown_parameters(),
                *recipe._unknown_statistics(),
            ]
            if recipe.unknown_keys == "error":
                problems += unknown
            else:
                recipe._ignored = unknown
                recipe._warnings = [f"{problem}; ignored" for problem in unknown]
        if problems:
            raise RecipeError.of(problems)
        return recipe

    @classmethod
    def _of_documents(cls, written: Sequence[Any]) -> Self:
        """The output's recipe, with its stages: the document without a name, or the last that no other uses."""
        if not 1 <= len(written) <= MAX_DOCUMENTS:
            raise RecipeError(f"a recipe has 1 to {MAX_DOCUMENTS} documents, not {len(written)}")
        documents, problems = [], []
        for i, data in enumerate(written):
            try:
                documents.append(cls._of_document(data if isinstance(data, Mapping) else None))
                documents[-1]._pointer = f"#/{i}" if len(written) > 1 else "#"
            except RecipeError as error:
                found = error.problems or [Problem(str(error), "#")]
                problems += [replace(each, pointer=f"#/{i}{(each.pointer or '#')[1:]}") for each in found]
        if problems:
            raise RecipeError.of(problems)
        return documents[0] if len(documents) == 1 else _in_stages(documents)

    def to_data(self) -> RecipeData:
        """The recipe as it was given, tidied: plain data that `from_data` reads back; with stages a list."""
        documents = [document.model_dump(mode="json", exclude_unset=True) for document in (*self.stages, self)]
        return documents if self.stages else documents[0]

    def to_yaml(self, *, with_place: bool = True) -> str:
        """`to_data` as text, the output's document last; not `with_place`: without where the result goes."""
        data = self.to_data()
        documents = data if isinstance(data, list) else [data]
        if not with_place and "outputs" in documents[-1]:
            outputs = {key: value for key, value in documents[-1].pop("outputs").items() if key not in PLACE}
            documents[-1] |= {"outputs": outputs} if outputs else {}
        return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)

    def canonical(self) -> RecipeData:
        """What the recipe means: without what cannot change a byte of any tensor."""
        data = self.to_data()
        kept = [
            {key: value for key, value in document.items() if key not in ("limits", "outputs")}
            for document in (data if isinstance(data, list) else [data])
        ]
        kept[-1] |= {"outputs": self.outputs.meaning} if self.outputs.meaning else {}
        return kept if isinstance(data, list) else kept[0]

    def parameter_blocks(self) -> Iterator[tuple[str, Parameters, bool]]:
        """Every `parameters` mapping: its JSON pointer, itself, and whether it stands beside one model."""
        yield "#/parameters", self.parameters, False
        for pointer, part in self.parts().values():
            if part is not self:
                yield f"{pointer}/parameters", part.parameters, False
            for i, entry in enumerate(part.models or []):
                yield f"{pointer}/models/{i}/parameters", entry.parameters, True
            for i, piece in enumerate(part.slices or []):
                yield f"{pointer}/slices/{i}/parameters", piece.parameters, False
                for j, source in enumerate(piece.sources):
                    yield f"{pointer}/slices/{i}/sources/{j}/parameters", source.parameters, True

    def parts(self) -> dict[str | None, tuple[str, Recipe | ModuleEntry]]:
        """Name of a module (None: the recipe has none and is one itself) → its JSON pointer, and what it is made of."""
        if self.modules is None:
            return {None: ("#", self)}
        return {name: (f"#/modules/{escaped(name)}", module) for name, module in self.modules.items()}

    def taken_models(self) -> Iterator[tuple[str, TakenModel]]:
        """Every mention of a model under `models`, `slices` or `modules`, and its JSON pointer."""
        for pointer, part in self.parts().values():
            for i, entry in enumerate(part.models or []):
                yield f"{pointer}/models/{i}", entry
            for i, piece in enumerate(part.slices or []):
                for j, source in enumerate(piece.sources):
                    yield f"{pointer}/slices/{i}/sources/{j}", source

    def statistics_blocks(self) -> Iterator[tuple[str, Mapping[str, ModelRef], bool]]:
        """Every `statistics` mapping: its JSON pointer, itself, and whether it stands beside one model."""
        yield "#/statistics", self.statistics, False
        for pointer, taken in self.taken_models():
            yield f"{pointer}/statistics", taken.statistics, True

    def role_of(self, ref: ModelRef) -> str:
        """What a source is to the merge or to one of its stages; empty where it is simply one of the models."""
        documents = (self, *self.stages)
        if ref == self.base_model:
            return "base"
        taken = [each for document in documents for _, each in document.taken_models()]
        if any(ref == each.model for each in taken) or any(ref == document.base_model for document in documents):
            return ""
        if tuned := [str(each.model) for each in taken if each.base_model == ref]:
            return f"base of {', '.join(tuned)}"
        if strengths := [f"{put.strength:g}" for document in documents for put in document.patches if put.patch == ref]:
            return f"patch, strength {', '.join(strengths)}"
        blocks = [files for document in documents for _, files, _ in document.statistics_blocks()]
        names = [name for files in blocks for name, file in files.items() if file == ref]
        names += ["covariance"] if ref == self.outputs.covariance else []
        return f"statistics: {', '.join(dict.fromkeys(names))}" if names else ""

    def _structure(self) -> Iterator[Problem]:
        if sum(given is not None for given in (self.models, self.slices, self.modules)) != 1:
            yield Problem("give exactly one of models, slices and modules")
        for pointer, part in self.parts().values():
            if part is not self and (part.models is None) == (part.slices is None):
                yield Problem("give exactly one of models and slices", pointer)
        if self.merge_method not in METHODS:
            detail = f"there is no method {self.merge_method[:60]!r}{suggestion(self.merge_method, METHODS)}"
            if fork := _FORKS.get(self.merge_method):
                detail = f"{self.merge_method} is a method of {fork}, which is not supported"
            yield Problem(detail, "#/merge_method")
            return
        if self.scope is not None and self.scope not in self.method.scopes:
            scopes = ", ".join(self.method.scopes)
            yield Problem(f"{self.merge_method} measures over {scopes}, not over {self.scope}", "#/scope")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            yield Problem("give tokenizer or tokenizer_source, not both", "#/tokenizer_source")
        yield from self._output_structure()
        yield from self._template_structure()
        for i, put in enumerate(self.patches):
            if put.patch in [other.patch for other in self.patches[:i]]:
                yield Problem(f"{put.patch} is listed twice; give it one strength", f"#/patches/{i}/patch")
        if self.outputs.reversible and not self.patches:
            yield Problem("there are no patches that could be taken off again", "#/outputs/reversible")
        if self.alignment is not None:
            yield from self._alignment_structure(self.alignment)
        for i, pattern in enumerate(self.exclude):
            if not pattern:
                yield Problem("an empty pattern would exclude every tensor", f"#/exclude/{i}")
        for pointer, part in self.parts().values():
            for i, entry in enumerate(part.models or []):
                if entry.model in [other.model for other in (part.models or [])[:i]]:
                    yield Problem(f"{entry.model} is listed twice; give it one weight", f"{pointer}/models/{i}/model")
            for i, piece in enumerate(part.slices or []):
                yield from _slice_structure(piece, f"{pointer}/slices/{i}")

    def _output_structure(self) -> Iterator[Problem]:
        kind = self.outputs.kind
        if kind == "full":
            return
        if self.base_model is None:
            yield Problem(f"the {kind} is what differs from a base; name it as base_model", "#/outputs")
        elif self.base_model.adapter is not None:
            what = f"{self.base_model} is a model with something on it, and a {kind} is put on a model that is stored"
            yield Problem(f"{what}; write that model as base_model", "#/base_model")

    def _template_structure(self) -> Iterator[Problem]:
        text = self.chat_template
        if text in (None, "auto", *CHAT_TEMPLATES):
            return
        if text is not None and (len(text) < _SHORTEST_TEMPLATE or "{" not in text):
            names = ("auto", *CHAT_TEMPLATES)
            detail = f"{text[:60]!r} is neither {', '.join(names)} nor a Jinja template{suggestion(text, names)}"
            yield Problem(detail, "#/chat_template")

    def aligned_models(self) -> dict[ModelRef, str]:
        """Every model whose weights are merged, the base first, and the JSON pointer of its first mention."""
        found = {} if self.base_model is None else {self.base_model: "#/base_model"}
        for pointer, part in self.parts().values():
            for i, piece in enumerate(part.slices or []):
                if piece.base_model:
                    found.setdefault(piece.base_model, f"{pointer}/slices/{i}/base_model")
        for pointer, taken in self.taken_models():
            found.setdefault(taken.model, f"{pointer}/model")
        return found

    def _alignment_structure(self, keys: AlignmentKeys) -> Iterator[Problem]:
        yield from alignment_structure(keys, has_base=self.base_model is not None, models=len(self.aligned_models()))
        for pointer, part in self.parts().values():
            for i, piece in enumerate(part.slices or []):
                if len({source.layer_range for source in piece.sources}) > 1:
                    detail = "aligned models meet layer by layer, so all sources of a slice must take the same layers"
                    yield Problem(detail, f"{pointer}/slices/{i}/sources")
        for pointer, statistics, _ in self.statistics_blocks():
            if statistics:
                detail = "statistics of a model do not move with its neurons; align the model first, then measure"
                yield Problem(detail, pointer)
        for pointer, taken in self.taken_models():
            if taken.base_model is not None:
                detail = "a model and its own base must stay as they were to one another; leave alignment away"
                yield Problem(detail, f"{pointer}/base_model")

    def _unknown_parameters(self) -> Iterator[Problem]:
        known = self.method.parameters()
        meaning = (
            f"{self.merge_method} (semantics: {self.method.semantics})"
            if len(METHODS[self.merge_method]) > 1
            else self.merge_method
        )
        for pointer, parameters, beside_model in self.parameter_blocks():
            for name in parameters:
                if name not in known:
                    has = ", ".join(known)
                    yield Problem(
                        f"{meaning} has no parameter {name!r}{suggestion(name, known)} (it has {has})",
                        f"{pointer}/{escaped(name)}",
                    )
                elif beside_model and not known[name]:
                    yield Problem(
                        f"{name} is for all models alike: put it under the recipe's or the slice's parameters",
                        f"{pointer}/{escaped(name)}",
                    )

    def _unknown_statistics(self) -> Iterator[Problem]:
        known = self.method.statistics
        has = f"it takes {', '.join(known)}" if known else "it takes none"
        for pointer, statistics, beside_model in self.statistics_blocks():
            for name in statistics:
                if name not in known:
                    detail = f"{self.merge_method} takes no statistics {name[:60]!r}{suggestion(name, known)} ({has})"
                    yield Problem(detail, f"{pointer}/{escaped(name)}")
                elif beside_model and not known[name].per_model:
                    detail = f"{name} is for all models alike: put it under the recipe's statistics"
                    yield Problem(detail, f"{pointer}/{escaped(name)}")
        for pointer, taken in self.taken_models():
            if taken.base_model is not None and not self.method.own_bases:
                detail = f"{self.merge_method} subtracts one base from all models: the recipe's base_model"
                yield Problem(detail, f"{pointer}/base_model")


def _hinted(problem: Problem) -> Problem:
    others = {"#/search": ("a search", "a search"), "#/calibrate": ("calibrate", "a calibration")}
    if problem.pointer not in others:
        return problem
    key, kind = others[problem.pointer]
    return replace(problem, detail=f"a recipe with {key} makes no merge but {kind}, which is a job of its own kind")


def referenced_models(recipe: Recipe) -> dict[ModelRef, str]:
    """Every model the recipe names, in order, and the JSON pointer of its first mention."""
    found: dict[ModelRef, str] = {}
    if recipe.base_model:
        found[recipe.base_model] = "#/base_model"
    for pointer, part in recipe.parts().values():
        for i, entry in enumerate(part.models or []):
            found.setdefault(entry.model, f"{pointer}/models/{i}/model")
        for i, piece in enumerate(part.slices or []):
            if piece.base_model:
                found.setdefault(piece.base_model, f"{pointer}/slices/{i}/base_model")
            for j, source in enumerate(piece.sources):
                found.setdefault(source.model, f"{pointer}/slices/{i}/sources/{j}/model")
    for pointer, taken in recipe.taken_models():
        if taken.base_model and recipe.method.own_bases:
            found.setdefault(taken.base_model, f"{pointer}/base_model")
    for pointer, statistics, _ in recipe.statistics_blocks():
        for name, ref in statistics.items():
            if name in recipe.method.statistics:
                found.setdefault(ref, f"{pointer}/{name}")
    if recipe.vocabulary is not None and isinstance(recipe.vocabulary.source, ModelRef):
        key = "tokenizer/source" if recipe.tokenizer_source is None else "tokenizer_source"
        found.setdefault(recipe.vocabulary.source, f"#/{key}")
    if recipe.outputs.covariance is not None:
        found.setdefault(recipe.outputs.covariance, "#/outputs/covariance")
    return found


def alignment_structure(keys: AlignmentKeys, *, has_base: bool, models: int) -> Iterator[Problem]:
    """What is wrong with the alignment of so many models, the base included."""
    if keys.is_stored:
        for name in ("method", "to", "seed", "max_sweeps", "residual", "spec"):
            if name in keys.model_fields_set:
                yield Problem("the permutations are read from a file; leave this away", f"#/alignment/{name}")
        return
    if keys.names:
        yield Problem("names are those in a file of permutations, which is not given", "#/alignment/names")
    if keys.to == "base" and not has_base:
        yield Problem("there is no base_model to align to; write first or mean", "#/alignment/to")
    if keys.spec is not None and "residual" in keys.model_fields_set:
        yield Problem("the spec says which permutations there are; leave this away", "#/alignment/residual")
    if models < 2:
        yield Problem("one model alone has nothing to be aligned to; name another, or a base_model", "#/alignment")


def _slice_structure(piece: Slice, pointer: str) -> Iterator[Problem]:
    lengths = []
    for j, source in enumerate(piece.sources):
        first, last = source.layer_range
        if not 0 <= first <= last:
            detail = f"layer_range [{first}, {last}] must go from one layer on to a later one"
            yield Problem(detail, f"{pointer}/sources/{j}/layer_range")
        lengths.append(last - first)
        if source.model in [other.model for other in piece.sources[:j]]:
            detail = (
                f"{source.model} is listed twice in this slice, which mergekit refuses too; to merge layers of one "
                "model with one another, name a copy of it (a link will do)"
            )
            yield Problem(detail, f"{pointer}/sources/{j}/model")
    if len(set(lengths)) > 1:
        yield Problem(f"the sources of a slice must span equally many layers, not {lengths}", f"{pointer}/sources")


_Document = TypeVar("_Document", bound=Recipe)


def _in_stages(documents: Sequence[_Document]) -> _Document:
    """The output of several documents, its stages in the order they can be made. Raises `RecipeError`."""
    named: dict[str, _Document] = {}
    problems, unnamed = [], [document for document in documents if document.name is None]
    for document in documents:
        if document.name is not None and named.setdefault(document.name, document) is not document:
            first = named[document.name]._pointer
            detail = f"there is a stage {document.name!r} already ({first[2:]}); give each its own name"
            problems.append(document.located(Problem(detail, "#/name")))
    for document in unnamed[1:]:
        detail = "only one document may have no name, the output; give the others names to use as models"
        problems.append(document.located(Problem(detail, "#/name")))
    uses = {
        document._pointer: [
            (named[ref.path], pointer) for ref, pointer in referenced_models(document).items() if ref.path in named
        ]
        for document in documents
    }
    used = {stage._pointer for stages in uses.values() for stage, _ in stages}
    output = next(iter(unnamed), None) or next((found for found in documents[::-1] if found._pointer not in used), None)
    for document in documents:
        if document is not output:
            for key in ("limits", "outputs"):
                if key in document.model_fields_set:
                    detail = f"{key} are those of the whole merge; put them into the output's document"
                    problems.append(document.located(Problem(detail, f"#/{key}")))
    order: list[_Document] = []

    def visit(document: _Document, above: tuple[_Document, ...]) -> None:
        path = (*above, document)
        for stage, pointer in uses[document._pointer]:
            if stage in path:
                path = (*path[path.index(stage) :], stage)
                detail = f"the stages need one another: {' → '.join(str(found.name) for found in path)}"
                raise RecipeError.of([document.located(Problem(detail, pointer))])
            if not any(stage is known for known in order):
                visit(stage, path)
        order.append(document)

    if problems:
        raise RecipeError.of(problems)
    if output is not None:
        visit(output, ())
    needed = tuple(order)
    for document in documents:
        if not any(document is known for known in order):
            visit(document, ())
    assert output is not None  # where every document is used by another there is a cycle
    output._stages = needed[:-1]
    idle = [document for document in documents if not any(document is known for known in needed)]
    output._warnings = [
        *(f"stage {stage.name}: {warning}" for stage in output.stages for warning in stage._warnings),
        *output._warnings,
        *(f"stage {document.name} is not made: nothing uses it" for document in idle),
    ]
    for stage in output.stages:
        stage._warnings = []
    return output
