"""Which model: the text or mapping by which a document names one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_serializer, model_validator
from pydantic_core import CoreSchema


class ModelRef(BaseModel):
    """Which model: `path[@revision][+adapter[@revision]]`, local folders or files, or Hub ids: `org/name[/sub/folder]`.

    mergekit's dict form, `{model: {path, revision}, lora: …}`, is read too, with a `subfolder` beside the path; it
    alone can name a path with `@` or `+`.

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
            "subfolder",
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
        if not isinstance(part, Mapping) or not set(part) <= {"path", "revision", "subfolder"}:
            raise ValueError("a model part is a text or {path, revision, subfolder}")
        path, revision, inside = part.get("path"), part.get("revision"), part.get("subfolder")
        if isinstance(path, str) and isinstance(inside, str) and inside.strip("/"):
            path = f"{path.rstrip('/')}/{inside.strip('/')}"
        elif inside is not None:
            raise ValueError("a subfolder is a path such as sub/folder")
        if not isinstance(path, str) or not path or "\0" in path or not isinstance(revision, str | None):
            raise ValueError(f"{str(path)[:200]!r} names no model")
        return {"path": path, "revision": revision}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        optional = {"anyOf": [text, {"type": "null"}]}
        path = {"path": text, "revision": optional, "subfolder": optional}
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
