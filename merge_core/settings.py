"""Parameters as a recipe writes them: numbers, gradients over the layers, and cases by tensor name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

Scalar = float | str


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
    if isinstance(written, str) and not _is_number(written):
        return written
    return _number(written)


def _is_number(written: str) -> bool:
    """Whether a text is a number, NaN and infinity included, which then is refused as one."""
    try:
        float(written)
    except ValueError:
        return False
    return True


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


Parameters = Annotated[dict[str, Setting], BeforeValidator(lambda written: {} if written is None else written)]
