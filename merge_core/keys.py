"""What stands under a recipe's keys: models, slices and modules, the tokenizer, outputs and limits."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from merge_core.documents import Keys, suggestion, validated
from merge_core.patches.encoding import Encoding
from merge_core.patches.encodings import ENCODINGS
from merge_core.references import ModelRef
from merge_core.settings import Parameters
from merge_core.sizes import Bytes

MIN_MEMORY = 512 * 2**20
DEFAULT_RANK = 32
"""Of an adapter of which the recipe says nothing more."""

DTypeName = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"],
    BeforeValidator(lambda written: written.removeprefix("torch.") if isinstance(written, str) else written),
]
Statistics = Annotated[dict[str, ModelRef], BeforeValidator(lambda written: {} if written is None else written)]
_NAME_ON_HUB = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
EMPTY_IS_NONE = BeforeValidator(lambda written: None if written in ([], {}) else written)


class TakenModel(Keys):
    """A model that takes part, and what stands beside it."""

    model: ModelRef
    parameters: Parameters = Field({})
    base_model: ModelRef | None = Field(None, description="what this model was tuned from, where the method asks it")
    statistics: Statistics = Field({}, description="files of numbers about this model: name → safetensors")


class ModelEntry(TakenModel):
    """One of `models`."""


class SliceSource(TakenModel):
    """One of a slice's `sources`: layers `layer_range[0]` to `layer_range[1]` (exclusive) of a model."""

    layer_range: tuple[int, int]


class Slice(Keys):
    """One run of output layers, made from equally many layers of each source."""

    sources: list[SliceSource] = Field(min_length=1, max_length=64)
    base_model: ModelRef | None = None
    parameters: Parameters = Field({})
    residual_weight: float | None = Field(None, description="read for mergekit's sake; has no effect")


class ModelToken(Keys):
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


class ZeroRow(Keys):
    """A row of zeros."""

    kind: Literal["zero"]


def _tokenizer_source(written: Any) -> Any:
    """`union`, `base` or a model, which older recipes write as `model:REF`."""
    if written in ("union", "base") or isinstance(written, ModelRef):
        return written
    return validated(ModelRef, written.removeprefix("model:") if isinstance(written, str) else written)


def _row_source(written: Any) -> Any:
    if isinstance(written, ModelToken | ZeroRow):
        return written
    if isinstance(written, Mapping) and "kind" in written:
        kinds: dict[Any, type[ModelToken | ZeroRow]] = {"model_token": ModelToken, "zero": ZeroRow}
        if written["kind"] not in kinds:
            raise ValueError(f"kind is model_token or zero, not {str(written['kind'])[:60]!r}")
        return validated(kinds[written["kind"]], written)
    return validated(ModelRef, written)


class TokenKeys(Keys):
    """Where a token's row comes from in models that do not have it, or with `force` in all of them."""

    source: Annotated[ModelToken | ZeroRow | ModelRef, BeforeValidator(_row_source)]
    force: bool = False


TokenizerSource = Annotated[Literal["union", "base"] | ModelRef, BeforeValidator(_tokenizer_source)]


class TokenizerKeys(Keys):
    """The output's tokenizer: `union` of all models' tokens, the `base` model's, or that of a model."""

    source: TokenizerSource = "union"
    tokens: dict[str, TokenKeys] = Field({}, max_length=100_000)
    pad_to_multiple_of: int | None = Field(None, ge=1, le=2**20, description="rows of the embeddings; of mean rows")
    keep_padding: bool = Field(False, description="keep the base's rows beyond its tokenizer")


class ModuleEntry(Keys):
    """One of `modules`: how one part of the model is made."""

    models: Annotated[list[ModelEntry] | None, EMPTY_IS_NONE] = Field(None, max_length=64)
    slices: Annotated[list[Slice] | None, EMPTY_IS_NONE] = Field(None, max_length=1000)
    parameters: Parameters = Field({})


class PatchEntry(Keys):
    """One of `patches`: a delta or a signature, added so many times."""

    patch: ModelRef
    strength: float = Field(1.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_one_file(self) -> Self:
        if self.patch.adapter:
            raise ValueError(f"{self.patch} is not one file, or one folder with a delta in it")
        return self


def _file(written: Any) -> Any:
    if isinstance(written, str) and (not written or "\0" in written):
        raise ValueError(f"{written[:200]!r} names no file")
    return written


FileName = Annotated[str, BeforeValidator(_file)]
"""A path as models have it: from the working directory, or below one of a service's model folders."""


def _spec(written: Any) -> Any:
    if not isinstance(written, str | dict):
        raise ValueError("a spec is the name of a file, or what would stand in it")
    return _file(written)


class AlignmentKeys(Keys):
    """How models are permuted before anything else is done with them, so that what corresponds has the same place."""

    method: Literal["weight_matching"] = "weight_matching"
    to: Literal["base", "first", "mean"] | None = Field(
        None,
        description="what the models are matched with: the base (the default, if there is one), the first, or "
        "the mean of all others in turn",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the order in which permutations are visited")
    max_sweeps: int = Field(100, ge=1, le=10_000, description="visits of every permutation at most")
    residual: bool = Field(
        False, description="permute the residual stream too, which only models trained from different starts need"
    )
    spec: Annotated[str | dict[str, Any], BeforeValidator(_spec)] | None = Field(
        None,
        description="which permutations there are, as JSON or a file of it; without it, what is known of the "
        "model's family",
    )
    permutations: FileName | None = Field(
        None, description="permutations that were found before: alignment.safetensors"
    )
    names: dict[str, str] = Field({}, description="what that file calls a model, where it is not as here")

    @property
    def is_stored(self) -> bool:
        """Whether the permutations are read and not found."""
        return self.permutations is not None


def _repo(written: Any) -> Any:
    """`owner/name`, as a Hub would have it."""
    if not isinstance(written, str):
        return written
    parts = written.split("/")
    good = all(_NAME_ON_HUB.fullmatch(part) and not re.search(r"--|\.\.", part) for part in parts)
    if len(parts) != 2 or not good or len(written) > 96 or written.endswith(".git"):
        raise ValueError(
            f"{written[:120]!r} is no repo of a Hub, which is owner/name: two names of letters, digits, `-`, `_` and "
            "`.`, neither of them with one of the last three twice in a row or at an end; 96 characters in all"
        )
    return written


def _branch(written: Any) -> Any:
    if not isinstance(written, str):
        return written
    odd = re.search(r"[^\w./-]|\.\.|//|^[-/.]|[/.]$|^refs/|\.lock$|^[0-9a-f]{40}$", written)
    if not written or odd or len(written) > 200 or not written.isascii():
        raise ValueError(f"{written[:120]!r} names no branch; a commit or a pull request cannot be written to")
    return written


class HubKeys(Keys):
    """Where on a Hub the result is published."""

    repo: Annotated[str, BeforeValidator(_repo)] = Field(description="owner/name; made if it is not there")
    private: bool = Field(True, description="whether a repo that is made is private; one that is there stays as it is")
    revision: Annotated[str, BeforeValidator(_branch)] = Field(
        "main", description="the branch that it is committed to; made from main if it is not there"
    )
    create_pr: bool = Field(False, description="ask for it by a pull request on that branch, and change nothing")
    commit_message: str | None = Field(
        None, min_length=1, max_length=4000, description="its first line is the title; without it, what was merged"
    )

    @field_validator("commit_message")
    @classmethod
    def _has_a_title(cls, written: str | None) -> str | None:
        if written is not None and (not written.strip() or "\0" in written):
            raise ValueError("a commit message has words; leave it away for one of ours")
        return written


def _with_encodings(schema: dict[str, Any]) -> None:
    """Let the schema of outputs show the keys of every encoding, and that a kind may stand alone."""
    for encoding in ENCODINGS.values():
        for key, about in encoding.model_json_schema()["properties"].items():
            schema["properties"].setdefault(key, about | {"description": f"of {encoding.name}: {about['description']}"})
    whole = dict(schema)
    schema.clear()
    schema["anyOf"] = [whole, {"type": "string", "enum": whole["properties"]["kind"]["enum"]}]


PLACE = frozenset({"hub", "keep"})
"""The keys of `outputs` that say where the result goes, and nothing of what it is."""


class Outputs(Keys):
    """What the result is and how it is stored: `full`, `delta` and `adapter` alone are read as the kind.

    Besides these keys there are those of the encoding, such as `rank` of `low_rank`, which an adapter is by nature.
    """

    model_config = ConfigDict(json_schema_extra=_with_encodings)

    kind: Literal["full", "delta", "adapter"] = Field(
        "full", description="a model, its difference to base_model, or that as a LoRA adapter"
    )
    max_shard_size: Bytes = Field(5 * 10**9, ge=1, description="of a model: the most bytes of tensors in one file")
    encoding: str | None = Field(
        None, description="of a delta: how differences are stored", json_schema_extra={"enum": [*ENCODINGS, None]}
    )
    covariance: ModelRef | None = Field(
        None, description="of what enters the columns of matrices, by tensor name: weighs low ranks as EoRA does"
    )

    hub: HubKeys | None = Field(None, description="where on a Hub the result is published")
    keep: bool = Field(True, description="keep the weights here too; false only with `hub`: they go as they are made")
    reversible: bool = Field(False, description="keep what patches changed as it was before, so that they come off")

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, written: Any) -> Any:
        return {"kind": written} if isinstance(written, str) else written

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.keep and self.hub is None:
            raise ValueError("without hub, what is not kept here is nowhere; leave keep away, or name a repo of a hub")
        if not self.keep and self.reversible:
            raise ValueError("what patches changed is found by reading what was written; leave keep away")
        if self.kind == "full":
            if self.encoding or self.covariance:
                raise ValueError("a model has no encoding and no covariance; write kind: delta or kind: adapter")
            return self
        if self.reversible:
            raise ValueError(f"a base is there again without its {self.kind}; leave reversible away")
        if "max_shard_size" in self.model_fields_set:
            raise ValueError(f"a{'n' if self.kind == 'adapter' else ''} {self.kind} is one file; leave it away")
        if self.kind == "adapter" and self.encoding is not None:
            raise ValueError("an adapter is low_rank by its nature; leave encoding away")
        if self.kind == "delta" and self.encoding is not None and self.encoding not in ENCODINGS:
            known = ", ".join(ENCODINGS)
            raise ValueError(
                f"there is no encoding {self.encoding[:60]!r}{suggestion(self.encoding, ENCODINGS)} ({known})"
            )
        if self.covariance is not None and self._encoding is not ENCODINGS["low_rank"]:
            raise ValueError("a covariance weighs low_rank only")
        self.made_encoding()
        return self

    @property
    def _encoding(self) -> type[Encoding]:
        return ENCODINGS["low_rank" if self.kind == "adapter" else self.encoding or "sparse"]

    @property
    def known_keys(self) -> Collection[str]:
        own = super().known_keys
        return own if self.kind == "full" else [*own, *self._encoding.model_fields]

    def made_encoding(self) -> Encoding:
        """How differences are stored."""
        fields = self._encoding.model_fields
        given = {key: value for key, value in (self.model_extra or {}).items() if key in fields and value is not None}
        if self.kind == "adapter" and not {"rank", "energy", "threshold"} & given.keys():
            given["rank"] = DEFAULT_RANK
        return validated(self._encoding, given)

    @property
    def meaning(self) -> dict[str, Any]:
        """What bears on the bytes of the result's tensors: nothing of a model."""
        if self.kind == "full":
            return {}
        return self.model_dump(mode="json", exclude_unset=True, exclude=set(PLACE))

    @property
    def goes(self) -> bool:
        """Whether the weights leave this machine as they are made, one file after the other."""
        return self.hub is not None and not self.keep


class Limits(Keys):
    """What the merge may use; never changes a byte of the result."""

    memory: Bytes = Field(2**30, ge=MIN_MEMORY, description="bytes of memory for the whole process")
    threads: int | None = Field(None, ge=1, le=1024)
