"""What the user asked for: mergekit's recipe format, read strictly, with a few keys of our own.

A recipe is YAML or the same as JSON. Of several documents one is the output and the others are stages, whose names are
models for one another. Unknown keys are refused with a suggestion, or listed as warnings under `unknown_keys: warn`.
Keys of ours: `seed`, `semantics`, `scope`, `statistics`, `exclude`, `allow_nonfinite`, `outputs`, `limits`,
`unknown_keys`, and beside a model its own `base_model`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from merge_core.chat_templates import CHAT_TEMPLATES
from merge_core.errors import Problem, RecipeError
from merge_core.method import MergeMethod, Scope, Semantics
from merge_core.methods import METHODS, find_method
from merge_core.sizes import Bytes

MAX_RECIPE_BYTES = 256 * 1024
MAX_DEPTH = 32
_OTHER_TOOLS = {
    "experts": "a mixture of experts (mergekit-moe)",
    "genome": "an evolutionary search (mergekit-evolve)",
    "layer_slices": "a recipe of bakllama",
}
_FORKS = {"core_space": "a proposal for mergekit", "emr": "a fork of mergekit", "lrp": "a fork of mergekit"}
MAX_DOCUMENTS = 64
MIN_MEMORY = 512 * 2**20
_SHORTEST_TEMPLATE = 20

Scalar = float | str
RecipeData = dict[str, Any] | list[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One case of a setting: for tensor names that contain `filter`, a value or a gradient over the layers."""

    values: tuple[Scalar, ...]
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        return self.filter in (None, "*") or self.filter in tensor

    def at(self, place: float) -> Scalar | None:
        """The value at `place` (0 first layer, 1 last layer), interpolated linearly; None of an empty gradient."""
        if not self.values:
            return None
        position = place * (len(self.values) - 1)
        lower = math.floor(position)
        upper = min(lower + 1, len(self.values) - 1)
        low, high, share = self.values[lower], self.values[upper], position - lower
        if isinstance(low, str) or isinstance(high, str):
            return low
        return low if share == 0 else (1 - share) * low + share * high


@dataclass(frozen=True)
class Setting:
    """A parameter as written: a number, a gradient `[0, 0.5, 1]`, or a list of `{filter, value}` of which the first
    match counts.
    """

    entries: tuple[Entry, ...]
    written: Any

    def evaluate(self, tensor: str, place: float) -> Scalar | None:
        """The value for one tensor, or None where no entry matches it, or the one that does is an empty list."""
        return next((entry.at(place) for entry in self.entries if entry.matches(tensor)), None)

    @classmethod
    def parse(cls, written: Any) -> Self:
        """Raises ValueError on anything that is not a setting."""
        if isinstance(written, cls):
            return written
        if isinstance(written, Mapping):
            return cls((_conditional(written),), written)
        if not isinstance(written, list):
            return cls((Entry((_scalar(written),)),), written)
        if all(isinstance(item, Mapping) for item in written):
            return cls(tuple(_conditional(item) for item in written), written)
        if any(isinstance(item, Mapping) for item in written):
            raise ValueError("a list holds numbers (a gradient) or {filter, value} entries, not both")
        return cls((Entry(tuple(_number(item) for item in written)),), written)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        write = core_schema.plain_serializer_function_ser_schema(lambda setting: setting.written)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=write)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        value = {
            "anyOf": [
                {"type": "number"},
                {"type": "boolean"},
                {"type": "array", "items": {"type": "number"}},
            ]
        }
        entry = {
            "type": "object",
            "properties": {"filter": {"type": "string"}, "value": value},
            "required": ["value"],
            "additionalProperties": False,
        }
        return {"anyOf": [*value["anyOf"], {"type": "string"}, entry, {"type": "array", "items": entry}]}


def _scalar(written: Any) -> Scalar:
    if isinstance(written, str):
        try:
            return _number(written)
        except ValueError:
            return written
    return _number(written)


def _number(written: Any) -> float:
    if isinstance(written, bool | int | float | str):
        try:
            number = float(written)
        except (ValueError, OverflowError):
            raise ValueError(f"{str(written)[:60]!r} is not a number") from None
        if math.isfinite(number):
            return number
    raise ValueError(f"{str(written)[:60]!r} is not a finite number")


def _conditional(written: Mapping[str, Any]) -> Entry:
    if unknown := sorted(map(str, set(written) - {"filter", "value"})):
        raise ValueError(f"an entry has only filter and value, not {', '.join(unknown)}")
    if "value" not in written:
        raise ValueError("an entry needs a value")
    pattern, value = written.get("filter"), written["value"]
    if pattern is not None and not isinstance(pattern, str):
        raise ValueError("a filter is a piece of a tensor name")
    if isinstance(value, list):
        return Entry(tuple(_number(item) for item in value), pattern)
    return Entry((_scalar(value),), pattern)


class ModelRef(BaseModel):
    """Which model: `path[@revision][+adapter[@revision]]`, local folders or files, later Hub ids.

    mergekit's dict form, `{model: {path, revision}, lora: …}`, is read too; it alone can name a path with `@` or `+`.

    >>> str(ModelRef.model_validate("org/model@main+org/adapter"))
    'org/model@main+org/adapter'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, written: Any) -> Any:
        if isinstance(written, str):
            return cls._split(written)
        if not isinstance(written, Mapping) or not set(written) <= {
            "model",
            "lora",
            "override_architecture",
            "path",
            "revision",
        }:
            raise ValueError("a model is a text, or {model: {path, revision}, lora: …}")
        if "path" in written:
            return cls._part(written)
        read = cls._part(written.get("model"))
        if written.get("lora") is None:
            return read
        if read.get("adapter"):
            raise ValueError("a model has one adapter: name it behind '+' or as lora, not both")
        adapter = cls._part(written["lora"])
        if adapter.get("adapter"):
            raise ValueError("an adapter has no adapter of its own")
        return {**read, "adapter": adapter["path"], "adapter_revision": adapter["revision"]}

    @classmethod
    def _split(cls, text: str) -> dict[str, str | None]:
        if text.count("+") > 1 or any(part.count("@") > 1 for part in text.split("+")):
            raise ValueError(f"{text[:200]!r} has more than one '+', or more than one '@' in a part")
        model, plus, adapter = text.partition("+")
        read = cls._named(model)
        if not plus:
            return read
        named = cls._named(adapter)
        return {**read, "adapter": named["path"], "adapter_revision": named["revision"]}

    @classmethod
    def _named(cls, text: str) -> dict[str, str | None]:
        path, _, revision = text.partition("@")
        return cls._part({"path": path, "revision": revision or None})

    @classmethod
    def _part(cls, part: Any) -> dict[str, str | None]:
        if isinstance(part, str):
            return cls._split(part)
        if not isinstance(part, Mapping) or not set(part) <= {"path", "revision"}:
            raise ValueError("a model part is a text or {path, revision}")
        path, revision = part.get("path"), part.get("revision")
        if not isinstance(path, str) or not path or "\0" in path or not isinstance(revision, str | None):
            raise ValueError(f"{str(path)[:200]!r} names no model")
        return {"path": path, "revision": revision}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        path = {"path": text, "revision": {"anyOf": [text, {"type": "null"}]}}
        part = {"anyOf": [text, _object(path, "path")]}
        whole = {"model": part, "lora": {"anyOf": [part, {"type": "null"}]}, "override_architecture": {}}
        description = "path[@revision][+adapter[@revision]], or {model: {path, revision}, lora: …}"
        return {"description": description, "anyOf": [*part["anyOf"], _object(whole, "model")]}

    @model_serializer
    def _write(self) -> Any:
        if not any(sign in path for sign in "+@" for path in (self.path, self.adapter or "")):
            return str(self)
        model = {"path": self.path} | ({"revision": self.revision} if self.revision else {})
        lora = {"path": self.adapter} | ({"revision": self.adapter_revision} if self.adapter_revision else {})
        return {"model": model} | ({"lora": lora} if self.adapter else {})

    def __str__(self) -> str:
        model, adapter = (
            f"{path}@{revision}" if revision else path
            for path, revision in ((self.path, self.revision), (self.adapter, self.adapter_revision))
        )
        return f"{model}+{adapter}" if adapter else str(model)


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _tokenizer_source(written: Any) -> Any:
    """`union`, `base` or a model, which older recipes write as `model:REF`."""
    if written in (None, "union", "base") or isinstance(written, ModelRef):
        return written
    return _reference(written.removeprefix("model:") if isinstance(written, str) else written)


def _row_source(written: Any) -> Any:
    if isinstance(written, ModelToken | ZeroRow):
        return written
    if isinstance(written, Mapping) and "kind" in written:
        kinds: dict[Any, type[ModelToken | ZeroRow]] = {"model_token": ModelToken, "zero": ZeroRow}
        if written["kind"] not in kinds:
            raise ValueError(f"kind is model_token or zero, not {str(written['kind'])[:60]!r}")
        return _validated(kinds[written["kind"]], written)
    return _reference(written)


def _reference(written: Any) -> ModelRef:
    return _validated(ModelRef, written)


def _validated(form: type[_Form], written: Any) -> _Form:
    try:
        return form.model_validate(written)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        detail = str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"]
        raise ValueError(f"{where}: {detail}" if where else detail) from None


_Form = TypeVar("_Form", bound=BaseModel)
DTypeName = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"],
    BeforeValidator(lambda written: written.removeprefix("torch.") if isinstance(written, str) else written),
]
Parameters = Annotated[dict[str, Setting], BeforeValidator(lambda written: {} if written is None else written)]
Statistics = Annotated[dict[str, ModelRef], BeforeValidator(lambda written: {} if written is None else written)]


class _Keys(BaseModel):
    """Keeps keys it does not know, so that all of them can be reported at once."""

    model_config = ConfigDict(frozen=True, extra="allow")


class TakenModel(_Keys):
    """A model that takes part, and what stands beside it."""

    model: ModelRef
    parameters: Parameters = {}
    base_model: ModelRef | None = Field(None, description="what this model was tuned from, where the method asks it")
    statistics: Statistics = Field({}, description="files of numbers about this model: name → safetensors")


class ModelEntry(TakenModel):
    """One of `models`."""


class SliceSource(TakenModel):
    """One of a slice's `sources`: layers `layer_range[0]` to `layer_range[1]` (exclusive) of a model."""

    layer_range: tuple[int, int]


class Slice(_Keys):
    """One run of output layers, made from equally many layers of each source."""

    sources: list[SliceSource] = Field(min_length=1, max_length=64)
    base_model: ModelRef | None = None
    parameters: Parameters = {}
    residual_weight: float | None = Field(None, description="read for mergekit's sake; has no effect")


class ModelToken(_Keys):
    """A row of a model's embeddings: that of one of its tokens, by text or by number."""

    kind: Literal["model_token"]
    model: ModelRef
    token: str | None = None
    token_id: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give exactly one of token and token_id")
        return self


class ZeroRow(_Keys):
    """A row of zeros."""

    kind: Literal["zero"]


class TokenKeys(_Keys):
    """Where a token's row comes from in models that do not have it, or with `force` in all of them."""

    source: Annotated[ModelToken | ZeroRow | ModelRef, BeforeValidator(_row_source)]
    force: bool = False


class TokenizerKeys(_Keys):
    """The output's tokenizer: `union` of all models' tokens, the `base` model's, or that of a model."""

    source: Annotated[Literal["union", "base"] | ModelRef, BeforeValidator(_tokenizer_source)] = "union"
    tokens: dict[str, TokenKeys] = Field({}, max_length=100_000)
    pad_to_multiple_of: int | None = Field(None, ge=1, le=2**20, description="rows of the embeddings; of mean rows")
    keep_padding: bool = Field(False, description="keep the base's rows beyond its tokenizer")


_EMPTY_IS_NONE = BeforeValidator(lambda written: None if written in ([], {}) else written)


class ModuleEntry(_Keys):
    """One of `modules`: how one part of the model is made."""

    models: Annotated[list[ModelEntry] | None, _EMPTY_IS_NONE] = Field(None, max_length=64)
    slices: Annotated[list[Slice] | None, _EMPTY_IS_NONE] = Field(None, max_length=1000)
    parameters: Parameters = {}


class Outputs(_Keys):
    """How the result is stored. `max_shard_size`: the most bytes of tensors in one file."""

    max_shard_size: Bytes = Field(5 * 10**9, ge=1)


class Limits(_Keys):
    """What the merge may use; never changes a byte of the result."""

    memory: Bytes = Field(2**30, ge=MIN_MEMORY, description="bytes of memory for the whole process")
    threads: int | None = Field(None, ge=1, le=1024)


class Recipe(_Keys):
    """A merge recipe. `Recipe.from_text` reads YAML or JSON, `Recipe.from_data` what was parsed already."""

    merge_method: str = Field(json_schema_extra={"enum": list(METHODS)})
    models: Annotated[list[ModelEntry] | None, _EMPTY_IS_NONE] = Field(None, max_length=64)
    slices: Annotated[list[Slice] | None, _EMPTY_IS_NONE] = Field(None, max_length=1000)
    modules: Annotated[dict[str, ModuleEntry] | None, _EMPTY_IS_NONE] = Field(
        None, max_length=64, description="one entry per part of the model, such as text_decoder and vision_tower"
    )
    base_model: ModelRef | None = None
    parameters: Parameters = {}
    dtype: DTypeName | None = Field(None, description="number format of the output (arithmetic is float32)")
    out_dtype: DTypeName | None = Field(None, description="number format of the output; goes before dtype")
    tokenizer: TokenizerKeys | None = None
    tokenizer_source: Annotated[Literal["union", "base"] | ModelRef | None, BeforeValidator(_tokenizer_source)] = Field(
        None, description="the older form of `tokenizer: {source: …}`"
    )
    chat_template: str | None = Field(None, description=f"auto, {', '.join(CHAT_TEMPLATES)}, or Jinja text")
    name: str | None = Field(None, max_length=200, description="a title for the model card")
    seed: int = Field(0, ge=0, lt=2**63, description="of all random numbers")
    semantics: Semantics = Field("mergekit", description="whose meaning of a method name counts where two differ")
    scope: Scope | None = Field(None, description="whether thresholds are taken per tensor or over the whole model")
    statistics: Statistics = Field({}, description="files of numbers that the method asks for: name → safetensors")
    exclude: list[str] = Field([], max_length=1000, description="pieces of tensor names that are copied from the base")
    allow_nonfinite: bool = Field(False, description="let NaN and infinity through instead of refusing them")
    outputs: Outputs = Outputs()
    limits: Limits = Limits()
    unknown_keys: Literal["error", "warn"] = "error"

    _warnings: list[str] = []
    _ignored: list[Problem] = []
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
        if isinstance(data, list):
            return cls._of_documents(data)
        if not isinstance(data, Mapping):
            raise RecipeError("a recipe is a mapping with merge_method and models, slices or modules")
        if problem := _not_plain(data, "#", MAX_DEPTH):
            raise RecipeError.of([problem])
        if not {"models", "slices", "modules"} & set(data):
            for key, what in _OTHER_TOOLS.items():
                if key in data:
                    raise RecipeError.of([Problem(f"{what} is not supported: it is no merge of weights", f"#/{key}")])
        data = {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError.of(_problems(error)) from None
        problems = [*recipe._structure()]
        if recipe.merge_method in METHODS:
            unknown = [*_unknown_keys(recipe, "#"), *recipe._unknown_parameters(), *recipe._unknown_statistics()]
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
                documents.append(cls.from_data(data if isinstance(data, Mapping) else None))
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

    def to_yaml(self) -> str:
        """`to_data` as text, the output's document last."""
        data = self.to_data()
        documents = data if isinstance(data, list) else [data]
        return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)

    def canonical(self) -> RecipeData:
        """What the recipe means: without what cannot change a byte of any tensor."""
        data = self.to_data()
        kept = [
            {key: value for key, value in document.items() if key not in ("limits", "outputs")}
            for document in (data if isinstance(data, list) else [data])
        ]
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
        return {name: (f"#/modules/{_escaped(name)}", module) for name, module in self.modules.items()}

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
        blocks = [files for document in documents for _, files, _ in document.statistics_blocks()]
        names = [name for files in blocks for name, file in files.items() if file == ref]
        return f"statistics: {', '.join(dict.fromkeys(names))}" if names else ""

    def _structure(self) -> Iterator[Problem]:
        if sum(given is not None for given in (self.models, self.slices, self.modules)) != 1:
            yield Problem("give exactly one of models, slices and modules")
        for pointer, part in self.parts().values():
            if part is not self and (part.models is None) == (part.slices is None):
                yield Problem("give exactly one of models and slices", pointer)
        if self.merge_method not in METHODS:
            detail = f"there is no method {self.merge_method[:60]!r}{_suggest(self.merge_method, METHODS)}"
            if fork := _FORKS.get(self.merge_method):
                detail = f"{self.merge_method} is a method of {fork}, which is not supported"
            yield Problem(detail, "#/merge_method")
            return
        if self.scope is not None and self.scope not in self.method.scopes:
            scopes = ", ".join(self.method.scopes)
            yield Problem(f"{self.merge_method} measures over {scopes}, not over {self.scope}", "#/scope")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            yield Problem("give tokenizer or tokenizer_source, not both", "#/tokenizer_source")
        yield from self._template_structure()
        for i, pattern in enumerate(self.exclude):
            if not pattern:
                yield Problem("an empty pattern would exclude every tensor", f"#/exclude/{i}")
        for pointer, part in self.parts().values():
            for i, entry in enumerate(part.models or []):
                if entry.model in [other.model for other in (part.models or [])[:i]]:
                    yield Problem(f"{entry.model} is listed twice; give it one weight", f"{pointer}/models/{i}/model")
            for i, piece in enumerate(part.slices or []):
                yield from _slice_structure(piece, f"{pointer}/slices/{i}")

    def _template_structure(self) -> Iterator[Problem]:
        text = self.chat_template
        if text in (None, "auto", *CHAT_TEMPLATES):
            return
        if text is not None and (len(text) < _SHORTEST_TEMPLATE or "{" not in text):
            names = ("auto", *CHAT_TEMPLATES)
            detail = f"{text[:60]!r} is neither {', '.join(names)} nor a Jinja template{_suggest(text, names)}"
            yield Problem(detail, "#/chat_template")

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
                        f"{meaning} has no parameter {name!r}{_suggest(name, known)} (it has {has})",
                        f"{pointer}/{_escaped(name)}",
                    )
                elif beside_model and not known[name]:
                    yield Problem(
                        f"{name} is for all models alike: put it under the recipe's or the slice's parameters",
                        f"{pointer}/{_escaped(name)}",
                    )

    def _unknown_statistics(self) -> Iterator[Problem]:
        known = self.method.statistics
        has = f"it takes {', '.join(known)}" if known else "it takes none"
        for pointer, statistics, beside_model in self.statistics_blocks():
            for name in statistics:
                if name not in known:
                    detail = f"{self.merge_method} takes no statistics {name[:60]!r}{_suggest(name, known)} ({has})"
                    yield Problem(detail, f"{pointer}/{_escaped(name)}")
                elif beside_model and not known[name].per_model:
                    detail = f"{name} is for all models alike: put it under the recipe's statistics"
                    yield Problem(detail, f"{pointer}/{_escaped(name)}")
        for pointer, taken in self.taken_models():
            if taken.base_model is not None and not self.method.own_bases:
                detail = f"{self.merge_method} subtracts one base from all models: the recipe's base_model"
                yield Problem(detail, f"{pointer}/base_model")


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
    return found


_Document = TypeVar("_Document", bound=Recipe)


class _RecipeLoader(yaml.SafeLoader):
    """YAML without aliases (they can expand without end) and without duplicate keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise RecipeError("the recipe uses a YAML alias (*name); write the value out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RecipeError(f"the recipe is nested deeper than {MAX_DEPTH} levels")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"line {key_node.start_mark.line + 1}: a key must be a plain text")
            if key_node.value in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: key {key_node.value[:60]!r} appears twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_documents(text: str | bytes) -> list[Any]:
    """The YAML or JSON documents of a text, those without content left out. Raises `RecipeError`."""
    if len(text) > MAX_RECIPE_BYTES:
        raise RecipeError(f"the recipe has {len(text):,} bytes; at most {MAX_RECIPE_BYTES:,} are read")
    try:
        documents = list(yaml.load_all(text, _RecipeLoader))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(f"the recipe is not valid YAML: {line}{error.problem}") from None
    except RecipeError:
        raise
    except Exception as error:
        # PyYAML's constructors raise whatever they stumble over: ValueError, KeyError, AttributeError, …
        raise RecipeError(f"the recipe is not valid YAML: {str(error)[:200]}") from None
    return [document for document in documents if document is not None]


def _not_plain(data: Any, pointer: str, depth: int) -> Problem | None:
    """What in a recipe is neither text, number, truth, list nor mapping, and so could not be written down again."""
    if depth == 0:
        return Problem(f"nested deeper than {MAX_DEPTH} levels", pointer)
    if isinstance(data, str):
        return None if _is_unicode(data) else Problem("a text that is not valid Unicode", pointer)
    if isinstance(data, int):
        return None if abs(data) < 2**64 else Problem("a number too large to mean anything here", pointer)
    if isinstance(data, Mapping):
        for key, value in data.items():
            if not isinstance(key, str) or not _is_unicode(key):
                return Problem(f"key {ascii(key)[:60]} is not a text", pointer)
            if problem := _not_plain(value, f"{pointer}/{_escaped(key)}", depth - 1):
                return problem
        return None
    if isinstance(data, list | tuple):
        return next(
            filter(None, (_not_plain(value, f"{pointer}/{i}", depth - 1) for i, value in enumerate(data))), None
        )
    if data is None or isinstance(data, float):
        return None
    return Problem(f"a {type(data).__name__} means nothing here; if it is meant as a text, put it in quotes", pointer)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _problems(error: ValidationError) -> Iterator[Problem]:
    for found in error.errors():
        pointer = "#/" + "/".join(_escaped(str(part)) for part in found["loc"])
        detail = str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"]
        if found["type"] == "missing" and found["loc"] == ("merge_method",):
            detail = f"say which method: one of {', '.join(METHODS)}"
        yield Problem(detail, pointer)


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


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _unknown_keys(model: _Keys, pointer: str) -> Iterator[Problem]:
    """Keys that no part of the recipe knows, wherever they stand."""
    for name in model.model_extra or {}:
        yield Problem(
            f"unknown key {name[:60]!r}{_suggest(name, type(model).model_fields)}", f"{pointer}/{_escaped(name)}"
        )
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, _Keys):
            yield from _unknown_keys(value, f"{pointer}/{name}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if isinstance(item, _Keys):
                    yield from _unknown_keys(item, f"{pointer}/{name}/{_escaped(key)}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for i, item in enumerate(value):
                if isinstance(item, _Keys):
                    yield from _unknown_keys(item, f"{pointer}/{name}/{i}")


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:60], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


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


def canonical_json(data: Any) -> str:
    """One text for equal data: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
