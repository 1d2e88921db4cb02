"""Documents that are read strictly: YAML or JSON, plain data, and no key that nobody knows.

A document's form is a pydantic model made of `Keys`: `read_as` makes one of parsed data, `unknown_keys` finds what the
form does not have, and every problem is told with its JSON pointer.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from merge_core.errors import Problem, RecipeError

MAX_DOCUMENT_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_DOCUMENTS = 64
MAX_VALUES = 20_000
_MAX_DIGITS = 100
_MAX_SUGGESTIONS = 50

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"
_Form = TypeVar("_Form", bound=BaseModel)


class Keys(BaseModel):
    """Keeps keys it does not know, so that all of them can be reported at once."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def known_keys(self) -> Collection[str]:
        """The keys that mean something here."""
        return type(self).model_fields


class LoneDocument(Keys):
    """A document of its own, of which a text holds one: `a_kind` is what messages call it, as "a patch"."""

    a_kind: ClassVar[str]

    @classmethod
    def from_text(cls, text: str | bytes) -> Self:
        """Read YAML or JSON. Raises `RecipeError`."""
        documents = load_documents(text, cls.a_kind.partition(" ")[2])
        if len(documents) > 1:
            raise RecipeError(f"{cls.a_kind} is one document, not {len(documents)}")
        return cls.from_data(next(iter(documents), None))

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read parsed YAML or JSON. Raises `RecipeError` naming every key that is wrong."""
        raise NotImplementedError

    def to_data(self) -> dict[str, Any]:
        """The document as it was given, tidied: plain data that `from_data` reads back."""
        return self.model_dump(mode="json", exclude_unset=True)

    def to_yaml(self) -> str:
        """`to_data` as text."""
        return yaml.safe_dump(self.to_data(), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML without aliases (they can expand without end), without merge keys and without duplicate keys."""

    depth = 0
    values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise RecipeError("a YAML alias (*name) is not read; write the value out")
        self.depth += 1
        self.values += 1
        if self.depth > MAX_DEPTH:
            raise RecipeError(f"nested deeper than {MAX_DEPTH} levels")
        if self.values > MAX_VALUES:
            raise RecipeError(f"more than {MAX_VALUES:,} keys and values")
        try:
            node = super().compose_node(parent, index)
        finally:
            self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and len(node.value) > _MAX_DIGITS and node.tag in _NUMBERS:
            raise RecipeError(f"line {node.start_mark.line + 1}: a number of {len(node.value):,} characters")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"line {key_node.start_mark.line + 1}: a key must be a plain text")
            if key_node.tag == _MERGE:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: a merge key (<<) is not read; write it out")
            if key_node.value in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: key {key_node.value[:60]!r} appears twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_documents(text: str | bytes, kind: str = "recipe") -> list[Any]:
    """The YAML or JSON documents of a text, those without content left out. Raises `RecipeError`; `kind` is its word
    for what was to be read.
    """
    if len(text) > MAX_DOCUMENT_BYTES:
        raise RecipeError(f"the {kind} has {len(text):,} bytes; at most {MAX_DOCUMENT_BYTES:,} are read")
    try:
        if (parsed := _as_json(text)) is not None:
            return [parsed]
        documents = list(islice(yaml.load_all(text, _Loader), MAX_DOCUMENTS + 1))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(f"the {kind} is not valid YAML: {line}{error.problem}") from None
    except RecipeError:
        raise
    except Exception as error:
        # PyYAML's constructors raise whatever they stumble over: ValueError, KeyError, AttributeError, …
        raise RecipeError(f"the {kind} is not valid YAML: {str(error)[:200]}") from None
    if len(documents) > MAX_DOCUMENTS:
        raise RecipeError(f"the {kind} has more than {MAX_DOCUMENTS} documents")
    return [document for document in documents if document is not None]


def _as_json(text: str | bytes) -> Any:
    """What JSON says; None where it is not that, and may be YAML. Raises `RecipeError`."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            return None
    if text.lstrip()[:1] not in ("{", "["):
        return None
    if text.count(",") + text.count(":") > MAX_VALUES:
        return None
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_number)
    except (json.JSONDecodeError, RecursionError):
        return None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise RecipeError(f"key {ascii(name)[:60]} appears twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise RecipeError(f"{name} is no number that JSON has")


def read_as(form: type[_Form], data: Mapping[str, Any], missing: Mapping[str, str] | None = None) -> _Form:
    """Parsed YAML or JSON as one of the form; a key of the form that is null counts as not given.

    `missing` says of a key at the top what to do where it is not there. Raises `RecipeError` naming all that is wrong.
    """
    if problem := _not_plain(data, "#", MAX_DEPTH):
        raise RecipeError.of([problem])
    given = {key: value for key, value in data.items() if value is not None or key not in form.model_fields}
    try:
        return form.model_validate(given)
    except ValidationError as error:
        problems = []
        for found in error.errors():
            pointer = "#/" + "/".join(escaped(str(part)) for part in found["loc"])
            key = found["loc"][0] if found["type"] == "missing" and len(found["loc"]) == 1 else None
            problems.append(Problem((missing or {}).get(str(key), _detail(found)), pointer))
        raise RecipeError.of(problems) from None


def validated(form: type[_Form], written: Any) -> _Form:
    """A part of a document, inside a validator of the whole. Raises ValueError of the first thing that is wrong."""
    try:
        return form.model_validate(written)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        raise ValueError(f"{where}: {_detail(found)}" if where else _detail(found)) from None


def _detail(found: ErrorDetails) -> str:
    return str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"]


def _not_plain(data: Any, pointer: str, depth: int) -> Problem | None:
    """What in a document is neither text, number, truth, list nor mapping, and so could not be written down again."""
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
            if problem := _not_plain(value, f"{pointer}/{escaped(key)}", depth - 1):
                return problem
        return None
    if isinstance(data, list | tuple):
        return next(
            filter(None, (_not_plain(value, f"{pointer}/{i}", depth - 1) for i, value in enumerate(data))), None
        )
    if isinstance(data, float):
        return None if math.isfinite(data) else Problem(f"{data} is no finite number", pointer)
    if data is None:
        return None
    return Problem(f"a {type(data).__name__} means nothing here; if it is meant as a text, put it in quotes", pointer)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unknown_keys(model: Keys, pointer: str) -> Iterator[Problem]:
    """Keys that no part of the document knows, wherever they stand."""
    unknown = [name for name in model.model_extra or {} if name not in model.known_keys]
    for i, name in enumerate(unknown):
        near = suggestion(name, model.known_keys) if i < _MAX_SUGGESTIONS else ""
        detail = f"unknown key {name[:60]!r}{near}"
        yield Problem(detail, f"{pointer}/{escaped(name)}")
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Keys):
            yield from unknown_keys(value, f"{pointer}/{name}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if isinstance(item, Keys):
                    yield from unknown_keys(item, f"{pointer}/{name}/{escaped(key)}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for i, item in enumerate(value):
                if isinstance(item, Keys):
                    yield from unknown_keys(item, f"{pointer}/{name}/{i}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` where a known name is close to this one, else nothing."""
    close = difflib.get_close_matches(name[:60], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def escaped(key: str) -> str:
    """A key as a part of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")


def canonical_json(data: Any) -> str:
    """One text for equal data: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
