"""Patches as work of their own: extract a signature, apply patches to a model, remove them again.

Usage: `patch(Patch.from_text(text), "out")`. To apply is a merge that copies one model and has `patches`. To remove is
one that puts the reversal on, or that makes the model again without its patches, from sources that its lock proves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field

from merge_core.artifact import LOCK_NAME, Artifact
from merge_core.checkpoint import check_below, locate
from merge_core.documents import LoneDocument, read_as, unknown_keys
from merge_core.errors import CheckpointError, IncompatibleModels, Problem, RecipeError, WeightsmithError
from merge_core.extraction import SignaturePlan, Wanted, extract_signature, plan_signature
from merge_core.headers import clip, read_json
from merge_core.keys import DTypeName, Limits, PatchEntry
from merge_core.merge import merge, opened, plan_only
from merge_core.patches.delta import Delta
from merge_core.patches.encoding import Encoding
from merge_core.patches.encodings.dense import Dense
from merge_core.patches.encodings.levels import MOST_LEVELS, Levels
from merge_core.patches.signatures import BatchNorm
from merge_core.plan import Plan
from merge_core.progress import Report
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.reversal import KIND, REVERSAL_NAME
from merge_core.sizes import Bytes
from merge_core.snapshots import supply_of
from merge_core.sources import Sources

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "extract": ("base_model", "clean", "corrupted", "layers"),
    "apply": ("model", "patches"),
    "remove": ("model",),
}
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "extract": ("batch_norm", "replace", "encoding", "levels", "scale"),
    "apply": ("reversible", "dtype", "max_shard_size"),
    "remove": ("reversal", "sources", "max_shard_size"),
}


def _layers(written: Any) -> Any:
    is_count = type(written) is int and written >= 1
    if not is_count and not (isinstance(written, list) and all(isinstance(piece, str) for piece in written)):
        raise ValueError("a number of layers, 1 or more, or a list of pieces of tensor names")
    return written


class Patch(LoneDocument):
    """What is to be done with patches: `operation` says what, and with it which other keys there are."""

    a_kind: ClassVar[str] = "a patch"

    operation: Literal["extract", "apply", "remove"]

    base_model: ModelRef | None = Field(None, description="extract: what the other models were tuned from")
    clean: ModelRef | None = Field(None, description="extract: tuned on clean data")
    corrupted: list[ModelRef] = Field(
        [], max_length=64, description="extract: tuned on corrupted data; their mean counts"
    )
    layers: Annotated[int | list[str] | None, BeforeValidator(_layers)] = Field(
        None, description="extract: so many from the input on, or pieces of tensor names"
    )
    batch_norm: BatchNorm = Field("replace", description="extract: what becomes of all BatchNorms")
    replace: list[str] = Field(
        [],
        max_length=64,
        description="extract: pieces of names of tensors that are replaced as BatchNorms are; [downsample] as the "
        "official code does",
    )
    encoding: Literal["levels", "dense"] = Field("levels", description="extract: quantised, or all numbers in float32")
    levels: int = Field(256, ge=2, le=MOST_LEVELS, description="extract: how many; 256 take a byte each")
    scale: Literal["linear", "log"] = Field("linear", description="extract: how levels lie between the extremes")

    model: ModelRef | None = Field(None, description="apply, remove: the model")
    patches: list[PatchEntry] = Field(
        [], max_length=64, description="apply: deltas and signatures, each with its strength"
    )
    reversible: bool = Field(True, description="apply: keep beside the model what the patches changed")
    dtype: DTypeName | None = Field(None, description="apply: number format of the output")
    max_shard_size: Bytes | None = Field(None, ge=1, description="apply, remove: most bytes of tensors in one file")

    reversal: ModelRef | None = Field(None, description="remove: the file, if it is not in the model's folder")
    sources: dict[str, ModelRef] = Field(
        {}, description="remove: where models that the lock names are now, if there is no reversal"
    )

    limits: Limits = Limits()

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read parsed YAML or JSON. Raises `RecipeError` naming every key that is wrong."""
        if not isinstance(data, Mapping):
            raise RecipeError("a patch is a mapping with an operation: extract, apply or remove")
        document = read_as(cls, data, missing={"operation": "say which: extract, apply or remove"})
        problems = [*document._structure(), *unknown_keys(document, "#")]
        if problems:
            raise RecipeError.of(problems)
        return document

    def _structure(self) -> Iterator[Problem]:
        needed, allowed = _NEEDED[self.operation], _ALLOWED[self.operation]
        for key in needed:
            if getattr(self, key) in (None, [], {}):
                yield Problem(f"{self.operation} needs {key}", f"#/{key}")
        for key in sorted(self.model_fields_set - {*needed, *allowed, "operation", "limits"}):
            if key in type(self).model_fields:
                keys = ", ".join((*needed, *allowed))
                yield Problem(f"{self.operation} has no {key}; it has {keys}", f"#/{key}")
        for key, pieces in (("layers", self.layers), ("replace", self.replace)):
            for i, piece in enumerate(pieces if isinstance(pieces, list) else []):
                if not piece:
                    yield Problem("an empty piece is in every name", f"#/{key}/{i}")
        for i, model in enumerate(self.corrupted):
            if model in self.corrupted[:i]:
                yield Problem(f"{model} is listed twice", f"#/corrupted/{i}")
        if self.encoding == "dense":
            for key in ("levels", "scale"):
                if key in self.model_fields_set:
                    yield Problem("dense stores all numbers; leave this away", f"#/{key}")
        elif self.scale == "log" and self.levels < 3:
            yield Problem("log takes 3 levels at least: one for zero and one for each sign", "#/levels")
        if self.sources and self.reversal is not None:
            yield Problem("a reversal needs no sources; leave them away", "#/sources")

    def wanted(self) -> Wanted:
        """The signature to be extracted."""
        assert self.base_model is not None and self.clean is not None and self.layers is not None
        encoding: Encoding = Dense() if self.encoding == "dense" else Levels(levels=self.levels, scale=self.scale)
        layers = self.layers if isinstance(self.layers, int) else tuple(self.layers)
        return Wanted(
            self.base_model,
            self.clean,
            tuple(self.corrupted),
            layers,
            self.batch_norm,
            tuple(self.replace),
            encoding,
        )

    def applying(self) -> Recipe:
        """The recipe that puts the patches on the model. Raises `RecipeError`."""
        data = self.to_data()
        return _recipe(
            [{"model": data["model"]}],
            {
                "patches": data["patches"],
                "outputs": {"reversible": self.reversible, **self._shards},
                **({"dtype": self.dtype} if self.dtype else {}),
                "limits": data.get("limits"),
            },
        )

    @property
    def _shards(self) -> dict[str, Any]:
        return {} if self.max_shard_size is None else {"max_shard_size": self.max_shard_size}


def plan_patch(
    document: Patch, *, roots: Sequence[Path] | None, memory: int | None = None, threads: int | None = None
) -> Plan | SignaturePlan:
    """The plan alone: headers are read, no weights. Raises `WeightsmithError`."""
    if document.operation == "extract":
        limit = memory or document.limits.memory
        return plan_signature(document.wanted(), roots=roots, limit=limit, threads=threads or document.limits.threads)
    recipe = document.applying() if document.operation == "apply" else _Removal(document, roots).recipe
    with _as_asked():
        return plan_only(recipe, roots=roots, memory=memory, threads=threads)


def patch(
    document: Patch,
    out: str | Path,
    *,
    roots: Sequence[Path] | None = None,
    partial: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Do what a document says into the folder `out`, which appears whole or not at all; see `merge`."""
    out = Path(out).absolute()
    partial = partial or out.parent / f".{out.name}.partial"
    if document.operation == "extract":
        return extract_signature(
            document.wanted(),
            out,
            document=document.to_data(),
            roots=roots,
            partial=partial,
            limit=memory or document.limits.memory,
            threads=threads or document.limits.threads,
            cache=cache,
            report=report,
            stop=stop,
        )
    if document.operation == "apply":
        recipe = document.applying()
    else:
        removal = _Removal(document, roots)
        removal.prove(threads or 1, cache, stop)
        recipe = removal.recipe
    with _as_asked():
        return merge(
            recipe,
            out,
            roots=roots,
            partial=partial,
            memory=memory,
            threads=threads,
            cache=cache,
            device=device,
            report=report,
            stop=stop,
        )


def describe(delta: Delta) -> dict[str, Any]:
    """What a patch is, as plain data: where it comes from, and of each tensor how it is stored."""
    tensors = [
        {
            **tensor.entry.settings,
            "tensor": name,
            "encoding": tensor.entry.encoding,
            "shape": list(tensor.entry.shape),
            "dtype": str(tensor.entry.dtype),
            "bytes": sum(info.nbytes for info in tensor.entry.parts.values()),
        }
        for name, tensor in delta.tensors.items()
    ]
    return {
        "kind": delta.provenance.get("kind", "delta"),
        "bytes": sum(shard.size for shard in delta.file.shards.values()),
        "provenance": dict(delta.provenance),
        "removed": list(delta.removed),
        "tensors": tensors,
    }


class _Removal:
    """How the patches of a model come off: `recipe` makes it without them. Raises `RecipeError` where nothing can."""

    def __init__(self, document: Patch, roots: Sequence[Path] | None) -> None:
        assert document.model is not None
        self.document, self.roots, self.model = document, roots, document.model
        self.lock: Mapping[str, Any] | None = None
        if self.model.adapter:
            raise RecipeError.of([Problem(f"{self.model} is not the folder of a patched model", "#/model")])
        pointer = "#/model" if document.reversal is None else "#/reversal"
        try:
            self.recipe = self._recipe()
        except OSError as error:
            raise CheckpointError(clip(self.model.path), f"cannot be read: {clip(str(error))}") from None
        except CheckpointError as error:
            raise error.as_written(roots or (), pointer) from None

    def _recipe(self) -> Recipe:
        reversal = self.document.reversal
        if reversal is not None:
            return self._by_reversal(reversal)
        folder = locate(self.model.path, self.roots, self.model.revision)
        check_below(folder, self.roots)
        if not self.document.sources and (folder / REVERSAL_NAME).is_file():
            path = f"{self.model.path.rstrip('/')}/{REVERSAL_NAME}"
            return self._by_reversal(ModelRef(path=path, revision=self.model.revision))
        return self._by_lock(folder)

    def _by_reversal(self, reversal: ModelRef) -> Recipe:
        with Delta.open(locate(reversal.path, self.roots, reversal.revision), roots=self.roots) as delta:
            if delta.provenance.get("kind") != KIND:
                detail = f"{reversal} is a patch but no reversal, which a model gets when patches are applied"
                raise RecipeError.of([Problem(detail, "#/reversal")])
            if lossy := [name for name, tensor in delta.tensors.items() if not tensor.replaces]:
                detail = f"{reversal} holds no bits of {clip(lossy[0])}, only a difference; a reversal holds what was"
                raise RecipeError.of([Problem(detail, "#/reversal", tensor=lossy[0])])
        both = {
            "model": {"path": self.model.path, "revision": self.model.revision},
            "lora": {"path": reversal.path, "revision": reversal.revision},
        }
        return _recipe([{"model": both}], self._keys)

    def _by_lock(self, folder: Path) -> Recipe:
        """What the lock says was done, without patches, once `prove` has shown that the sources are those it names."""
        if not (folder / LOCK_NAME).is_file():
            detail = (
                f"{self.model} has no {REVERSAL_NAME} and no {LOCK_NAME}, so nobody knows what it was before; give its "
                "reversal, or use the model that the patches were put on"
            )
            raise RecipeError.of([Problem(detail, "#/model")])
        check_below(folder / LOCK_NAME, self.roots)
        self.lock = read_json(folder / LOCK_NAME, roots=self.roots)
        written = self.lock.get("recipe")
        found = written if isinstance(written, list) else [written]
        documents = [dict(each) for each in found if isinstance(each, Mapping)]
        if not documents or not documents[-1].pop("patches", None):
            raise RecipeError.of([Problem(f"{self.model} was made without patches, says its lock", "#/model")])
        documents[-1] |= {key: value for key, value in self._keys.items() if value}
        try:
            recipe = Recipe.from_data(documents if len(documents) > 1 else documents[0])
        except RecipeError as error:
            detail = f"the recipe in {LOCK_NAME} of {self.model} cannot be made again: {error}"
            raise RecipeError.of([Problem(detail, "#/model")]) from None
        if not self.document.sources:
            return recipe
        elsewhere = [
            moved(each, {name: ref.model_dump() for name, ref in self.document.sources.items()}) for each in documents
        ]
        return Recipe.from_data(elsewhere if len(elsewhere) > 1 else elsewhere[0])

    @property
    def _keys(self) -> dict[str, Any]:
        return {"outputs": self.document._shards, "limits": self.document.to_data().get("limits")}

    def prove(self, threads: int, cache: Path | None, stop: Callable[[], bool]) -> None:
        """Read the sources and raise `IncompatibleModels` unless they are the files that the lock names."""
        if self.lock is None:
            return
        hashes = self._hashes(self.lock.get("sources"))
        with opened(self.recipe, self.roots) as models:
            inputs, supply = list(models.values()), supply_of(self.roots)
            with closing(Sources.whole(inputs, threads=threads, cache=cache, stop=stop, supply=supply)) as reading:
                found = reading.result()
            for ref, weights in models.items():
                named = [name for name, place in self.document.sources.items() if place == ref] or [str(ref)]
                for name, shard in weights.shards.items():
                    if any(found[shard.path] not in hashes.get(model, ()) for model in named):
                        detail = (
                            f"{ref}: {clip(name)} is not the file that {self.model} was made from, says its lock; give "
                            "the reversal, or say under sources where that model is now"
                        )
                        raise IncompatibleModels(detail, [Problem(detail, "#/sources", file=name)])

    @staticmethod
    def _hashes(sources: Any) -> dict[str, set[str]]:
        """By model the sha256 of its files, of a lock that anybody may have written."""
        found: dict[str, set[str]] = {}
        for source in sources if isinstance(sources, list) else ():
            files = source.get("files") if isinstance(source, Mapping) else None
            if isinstance(files, list):
                hashes = {str(file.get("sha256")) for file in files if isinstance(file, Mapping)}
                found[str(source.get("model"))] = hashes
        return found


def _recipe(models: list[dict[str, Any]], keys: Mapping[str, Any]) -> Recipe:
    with _as_asked():
        given = {key: value for key, value in keys.items() if value not in (None, {})}
        return Recipe.from_data({"merge_method": "passthrough", "models": models, **given})


def moved(data: Any, places: Mapping[str, Any]) -> Any:
    """A recipe's data with other places for the models of some names."""
    if isinstance(data, Mapping):
        named = ("model", "base_model")
        return {
            key: places.get(value, value) if key in named and isinstance(value, str) else moved(value, places)
            for key, value in data.items()
        }
    return [moved(value, places) for value in data] if isinstance(data, list) else data


@contextmanager
def _as_asked() -> Iterator[None]:
    """Problems of the recipe that was made of a document, with the places that they have in the document."""
    try:
        yield
    except (RecipeError, IncompatibleModels) as error:
        raise type(error).of(map(_in_document, error.problems)) from None
    except WeightsmithError as error:
        error.problems = tuple(map(_in_document, error.problems))
        raise


def _in_document(problem: Problem) -> Problem:
    pointer = (problem.pointer or "").replace("#/models/0/model", "#/model").replace("#/outputs/", "#/")
    return replace(problem, pointer=pointer or None)
