"""One vocabulary for all models: the output's tokens, and every model's rows gathered in their order while streaming.

What the recipe's `tokenizer` says is done to the models before the merge, so that no method knows of it. Tensors of the
vocabulary (embeddings, heads) are those outside the layers with a row per token, as many as the config's `vocab_size`.
A row that a model lacks comes from the one model that has it, else the base, else the mean of those that do, else it is
zero; the recipe may say otherwise. Rows of padding are the mean of the model's other rows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge_core import tokenizers
from merge_core.chat_templates import CHAT_TEMPLATES
from merge_core.errors import CheckpointError, IncompatibleModels, Problem, RecipeError
from merge_core.gathered import MEAN, PADDING, ZERO, Gathered, RowMap
from merge_core.headers import TensorInfo, clip
from merge_core.keys import ModelToken, TokenizerKeys, ZeroRow
from merge_core.layers import stacks
from merge_core.recipe import Recipe, referenced_models
from merge_core.references import ModelRef
from merge_core.runs import Findings, Structure
from merge_core.tokenizers import NewToken, Tokenizer
from merge_core.weights import Companions, Weights, is_embedding

_NOWHERE = -1
_POSITIONS = re.compile(r"position|token_type|(^|[._])wpe([._]|$)")
_GENERATION = "generation_config.json"
_PARSED = 5
"""Bytes of memory per byte of a tokenizer.json, to read and extend it."""
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def in_one_vocabulary(recipe: Recipe, checkpoints: Mapping[ModelRef, Weights]) -> Mapping[ModelRef, Weights]:
    """The models as the recipe's tokenizer and chat template make them: gathered, with the output's config and files.

    Without those keys the models as they are. Raises `RecipeError`, `IncompatibleModels` or `CheckpointError`.
    """
    if recipe.vocabulary is None and recipe.chat_template is None:
        return checkpoints
    structure = Structure(recipe, checkpoints, Findings())
    made = dict(checkpoints)
    if recipe.vocabulary is not None:
        made |= _Union(recipe.vocabulary, structure, checkpoints).gathered()
    if recipe.chat_template is not None:
        made[structure.donor] = _with_template(recipe.chat_template, structure, checkpoints, made[structure.donor])
    return made


class _Union:
    """The output's vocabulary, and how each model's is mapped to it."""

    def __init__(self, wish: TokenizerKeys, structure: Structure, checkpoints: Mapping[ModelRef, Weights]) -> None:
        self.wish, self.structure, self.checkpoints = wish, structure, checkpoints
        self.refs = list(structure.taking_part)
        self.index = {ref: i for i, ref in enumerate(self.refs)}
        self.files = {ref: checkpoints[ref].companions for ref in self.refs}
        self.owner = wish.source if isinstance(wish.source, ModelRef) else structure.donor
        self.files.setdefault(self.owner, checkpoints[self.owner].companions)
        self.prints = {ref: tokenizers.fingerprint(files) for ref, files in self.files.items()}
        self.pointer = "#/tokenizer_source" if structure.recipe.tokenizer_source is not None else "#/tokenizer"
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def gathered(self) -> dict[ModelRef, Weights]:
        """Every model that takes part, with the output's rows."""
        self.sizes = {ref: self._vocabulary_size(ref) for ref in self.refs}
        self._check_sources()
        self._raise()
        if not all(tokenizers.is_readable(files) for files in self.files.values()):
            return self._copied()
        self._collect()
        self._choose_rows()
        self._raise()
        files = self._files()
        donor = self.structure.donor
        distinct = {self.prints[ref]: theirs for ref, theirs in self.files.items()}.values()
        taken = _PARSED * sum(tokenizers.definition_bytes(theirs) for theirs in distinct)
        made: dict[ModelRef, Weights] = {}
        for ref, theirs in self.files.items():
            weights = self.checkpoints[ref]
            named = {name: theirs[name] for name in tokenizers.TOKENIZER_FILES if name in theirs}
            made[ref] = Gathered(
                weights,
                self._config(weights) if ref == donor else weights.config,
                files if ref == donor else theirs,
                self._row_maps(ref) if ref in self.index else {},
                self.notes if ref == donor else (),
                {name: file for name, file in named.items() if isinstance(file, Path)},
                taken,
            )
        self._raise()
        return made

    def _raise(self) -> None:
        if self.problems:
            is_recipe = any(problem.pointer and problem.pointer.startswith("#/tokenizer") for problem in self.problems)
            raise (RecipeError if is_recipe else IncompatibleModels).of(self.problems)

    # Which tokens there are.

    def _vocabulary_size(self, ref: ModelRef) -> int:
        """How many rows a model's tensors of the vocabulary have."""
        weights, where = self.checkpoints[ref], self.structure.taking_part[ref]
        stored = {info.shape[0] for info in _outside(weights) if len(info.shape) == 2}
        declared = weights.text_config.get("vocab_size", weights.config.get("vocab_size"))
        if type(declared) is int and declared in stored:
            return declared
        embeddings = {
            info.shape[0]
            for info in _outside(weights)
            if len(info.shape) == 2 and is_embedding(info.name) and _is_of_tokens(info.name)
        }
        if type(declared) is int:
            has = f", but its embeddings have {sorted(embeddings)}" if embeddings else ""
            detail = f"{ref}: no tensor has the {declared:,} rows that its config's vocab_size says{has}"
            self.problems.append(Problem(detail, where))
        elif len(embeddings) != 1:
            detail = f"{ref}: its config has no vocab_size, so which tensors have a row per token is not known"
            self.problems.append(Problem(detail, where))
        return next(iter(embeddings), 0)

    def _check_sources(self) -> None:
        for token, wanted in self.wish.tokens.items():
            pointer = _pointer(token)
            model = wanted.source.model if isinstance(wanted.source, ModelToken) else wanted.source
            if not token:
                self.problems.append(Problem("an empty text is no token", pointer))
            if isinstance(model, ModelRef) and model not in self.index:
                named = ", ".join(map(str, self.refs))
                self.problems.append(Problem(f"{model} is not one of the models that are merged ({named})", pointer))

    def _copied(self) -> dict[ModelRef, Weights]:
        """Tokenizers that are not read: all the same files, so that nothing has to be known of them."""
        simple = not self.wish.tokens and self.wish.pad_to_multiple_of is None
        alike = len(set(self.prints.values())) == 1 and len(set(self.sizes.values())) == 1
        known = all(set(tokenizers.VOCABULARY_FILES) & set(files) for files in self.files.values())
        if not simple or not alike or not known:
            for ref in self.files:
                self._read(ref)
        return {}

    def _collect(self) -> None:
        """Number the output's tokens, and note which row each model has for each of them."""
        owner = self._read(self.owner)
        limit = self._limit(self.owner)
        self.dropped = [token for token, place in owner.ids.items() if place >= limit]
        ids = {token: place for token, place in owner.ids.items() if place < limit}
        self.special = {name: token for name, token in owner.special.items() if token in ids}
        if self.dropped:
            self._note(f"left out, because beyond the vocab_size of {self.owner}: {_some(self.dropped)}")
        end = max(ids.values(), default=-1) + 1
        regular: dict[str, ModelRef] = {}
        added: dict[str, tokenizers.Flags] = {}
        read = {self.prints[self.owner]: owner}
        found: dict[ModelRef, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        places: dict[str, int] = {token: i for i, token in enumerate(ids)}
        for ref in self.refs:
            # One vocabulary at a time: each has some hundred thousand texts.
            theirs = read.get(self.prints[ref]) or self._read(ref)
            limit = self._limit(ref)
            for token, place in (
                sorted(theirs.ids.items(), key=lambda item: item[1]) if self.wish.source == "union" else ()
            ):
                if token not in places and place < limit:
                    places[token] = len(places)
                    if token in theirs.added:
                        added[token] = theirs.added[token]
                    else:
                        regular[token] = ref
            self._look_up(ref, theirs, limit)
            known = [(places[token], place) for token, place in theirs.ids.items() if token in places and place < limit]
            found[ref] = tuple(np.array(known, np.int64).reshape(-1, 2).T)  # type: ignore[assignment]
            if self.prints[ref] != self.prints[self.owner]:
                read = {self.prints[self.owner]: owner, self.prints[ref]: theirs}
        for token in self.wish.tokens:
            if token not in places:
                places[token] = len(places)
                added[token] = _PLAIN
        self.new = [NewToken(token, end + i, None) for i, token in enumerate(regular)]
        self.new += [NewToken(token, end + len(regular) + i, flags) for i, (token, flags) in enumerate(added.items())]
        self.donors = dict.fromkeys(regular.values())
        self.ids = ids | {token.content: token.id for token in self.new}
        self.end = max(self.ids.values(), default=-1) + 1
        numbers = np.array([self.ids[token] for token in places], np.int64)
        self.owned = np.zeros(self.end, bool)
        self.owned[numbers] = True
        self.found = {ref: (numbers[which], theirs) for ref, (which, theirs) in found.items()}

    def _read(self, ref: ModelRef) -> Tokenizer:
        try:
            return Tokenizer.read(str(ref), self.files[ref])
        except CheckpointError as error:
            raise error.as_written((), referenced_models(self.structure.recipe)[ref]) from None

    def _limit(self, ref: ModelRef) -> float:
        """Ids from here on have no row."""
        if ref in self.sizes:
            return self.sizes[ref]
        declared = self.checkpoints[ref].text_config.get("vocab_size")
        return declared if type(declared) is int else math.inf

    def _look_up(self, ref: ModelRef, theirs: Tokenizer, limit: float) -> None:
        """The rows that `tokens` asks this model for, by number."""
        if not hasattr(self, "asked"):
            self.asked: dict[str, int] = {}
        for token, wanted in self.wish.tokens.items():
            source = wanted.source
            if isinstance(source, ZeroRow) or (source.model if isinstance(source, ModelToken) else source) != ref:
                continue
            if isinstance(source, ModelToken) and source.token_id is not None:
                row: int | None = source.token_id
                lacks = f"{ref} has no row {row}: its vocabulary has {limit:,} rows"
            else:
                name = source.token if isinstance(source, ModelToken) and source.token is not None else token
                row = theirs.ids.get(name)
                lacks = f"{ref} has no token {clip(name)!r}"
            if row is None or row >= limit:
                self.problems.append(Problem(lacks, _pointer(token)))
            else:
                self.asked[token] = row

    # Where rows come from.

    def _choose_rows(self) -> None:
        size = self.end
        padded = max(size, self.sizes[self.structure.donor]) if self.wish.keep_padding else size
        multiple = self.wish.pad_to_multiple_of or 1
        self.size = -(-padded // multiple) * multiple
        having = np.full((len(self.refs), self.size), _NOWHERE, np.int32)
        for ref, (numbers, rows) in self.found.items():
            having[self.index[ref], numbers] = rows
        spare_model, spare_row = self._spares(having)
        forced = np.zeros(self.size, bool)
        for token, wanted in self.wish.tokens.items():
            place = self.ids[token]
            forced[place] = wanted.force
            source = wanted.source
            if isinstance(source, ZeroRow):
                spare_model[place] = ZERO
            elif token in self.asked:
                spare_model[place] = self.index[source.model if isinstance(source, ModelToken) else source]
                spare_row[place] = self.asked[token]
        self.having, self.forced, self.spare_model, self.spare_row = having, forced, spare_model, spare_row
        self.kept_padding = padded

    def _spares(self, having: NDArray[np.int32]) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
        """For each token what a model takes that has no row for it."""
        has, count = having >= 0, (having >= 0).sum(0)
        first = has.argmax(0)
        model = np.where(count == 1, first, MEAN).astype(np.int16)
        if self.structure.recipe.base_model is not None:
            model[has[0]] = 0
        model[count == 0] = ZERO
        model[self.end :] = PADDING
        model[: self.end][~self.owned] = PADDING
        lost = [token for token, place in self.ids.items() if count[place] == 0 and token not in self.wish.tokens]
        if lost:
            self._note(f"in {self.owner} but in no model that is merged, so that their rows are zero: {_some(lost)}")
        row = having[np.where(model >= 0, model, 0), np.arange(self.size)]
        return model, np.where(model >= 0, row, 0).astype(np.int32)

    def _row_maps(self, ref: ModelRef) -> dict[str, RowMap]:
        own, weights, size = self.index[ref], self.checkpoints[ref], self.sizes[ref]
        having = self.having[own]
        takes = (having >= 0) & ~self.forced
        models = np.where(takes, own, self.spare_model).astype(np.int16)
        rows = np.where(takes, having, self.spare_row).astype(np.int32)
        free = np.ones(self.size, bool)
        free[: self.end] = ~self.owned
        free[self.kept_padding :] = False
        unused = np.zeros(self.size, bool)
        unused[: min(size, self.size)] = True
        unused[self.found[ref][1][self.found[ref][1] < self.size]] = False
        models[free & unused] = own
        rows[free & unused] = np.flatnonzero(free & unused)
        used = {int(model) for model in np.unique(models) if model >= 0} | {own}
        if (models == MEAN).any():
            used |= set(np.flatnonzero((self.having[:, models == MEAN] >= 0).any(1)).tolist())
        hidden = {info.shape[1] for info in _outside(weights) if len(info.shape) == 2 and info.shape[0] == size}
        maps = {}
        for info in _outside(weights):
            if info.shape[0] != size or (len(info.shape) == 1 and size in hidden) or not _is_of_tokens(info.name):
                continue
            sources = {}
            for model in sorted(used):
                other = self.refs[model]
                theirs = self.checkpoints[other].find(info.name, (self.sizes[other], *info.shape[1:]))
                if theirs is None or theirs.shape != (self.sizes[other], *info.shape[1:]):
                    detail = f"{ref} takes rows of {info.name} from {other}, which has none of that length"
                    self.problems.append(Problem(detail, self.structure.taking_part[other], tensor=info.name))
                else:
                    sources[model] = (self.checkpoints[other], theirs)
            if len(sources) == len(used):
                maps[info.name] = RowMap(own, models, rows, self.having, sources)
        return maps

    # What is said of it.

    def _files(self) -> Companions:
        """The output's files: the owner's tokenizer with the output's tokens, and the donor's other files."""
        donors = [self.files[ref] for ref in self.donors]
        made = tokenizers.changed(str(self.owner), self.files[self.owner], self.dropped, self.new, donors)
        others = self.files[self.structure.donor]
        kept = {name: file for name, file in others.items() if name not in tokenizers.TOKENIZER_FILES}
        if _GENERATION in others:
            found = tokenizers.json_of(others, _GENERATION)
            values = self._token_ids(found, tokenizers.json_of(self.files[self.owner], _GENERATION))
            if values != {key: found.get(key) for key in values}:
                kept[_GENERATION] = tokenizers.edited_json(others, _GENERATION, values)
        return {**made, **kept}

    def _config(self, weights: Weights) -> dict[str, Any]:
        """The donor's config with the output's size and the ids that its tokens have now."""
        config, section = dict(weights.config), weights.text_section
        theirs = self.checkpoints[self.owner]
        config |= self._token_ids(config, theirs.config)
        if section is not None:
            text = dict(config[section])
            text |= self._token_ids(text, theirs.text_config) | {"vocab_size": self.size}
            config[section] = text
        if section is None or "vocab_size" in config:
            config["vocab_size"] = self.size
        return config

    def _token_ids(self, written: Mapping[str, Any], owners: Mapping[str, Any]) -> dict[str, Any]:
        """What keys like `eos_token_id` must say: as the owner of the tokenizer has it, else the same tokens' ids."""
        if self.owner == self.structure.donor:
            return {}
        values = {}
        for key, value in written.items():
            if key.endswith("_token_id") and value is not None:
                values[key] = owners[key] if owners.get(key) is not None else self._translated(key, value)
        return values

    def _translated(self, key: str, value: Any) -> Any:
        numbers, rows = self.found[self.structure.donor]
        now = {int(row): int(number) for number, row in zip(numbers, rows, strict=True)}
        old = value if isinstance(value, list) else [value]
        if found := [now[number] for number in old if isinstance(number, int) and number in now]:
            return found if isinstance(value, list) else found[0]
        token = self.special.get(key.removesuffix("_id"))
        return None if token is None else self.ids[token]

    def _note(self, note: str) -> None:
        self.notes.append(note)


def in_equal_rows(recipe: Recipe, checkpoints: Mapping[ModelRef, Weights]) -> Mapping[ModelRef, Weights]:
    """The models with equally many rows of tokens, where the method has a parameter `vocabulary` that asks for it:
    `pad_zero` adds rows of zeros at the end of the shorter, `truncate` leaves the last rows of the longer away.

    Raises `IncompatibleModels` where padding would subtract rows that nothing is subtracted from.
    """
    if "vocabulary" not in recipe.method.parameters():
        return checkpoints
    for pointer, parameters, _ in recipe.parameter_blocks():
        setting = parameters.get("vocabulary")
        if setting is not None and (pointer != "#/parameters" or isinstance(setting.written, list)):
            detail = "vocabulary is one word for the whole merge; write it under the recipe's own parameters"
            raise RecipeError.of([Problem(detail, f"{pointer}/vocabulary")])
    setting = recipe.parameters.get("vocabulary")
    policy = None if setting is None else setting.evaluate("", 0.0)
    if policy not in ("pad_zero", "truncate"):
        return checkpoints
    structure = Structure(recipe, checkpoints, Findings())
    refs = list(structure.taking_part)
    maps: dict[ModelRef, dict[str, RowMap]] = {ref: {} for ref in refs}
    problems = []
    for name in [info.name for info in _outside(checkpoints[structure.donor]) if _is_of_tokens(info.name)]:
        having = {ref: info for ref in refs if (info := checkpoints[ref].tensors.get(name)) and info.shape}
        counts = {ref: info.shape[0] for ref, info in having.items()}
        if len(set(counts.values())) == 1 or len({info.shape[1:] for info in having.values()}) > 1:
            continue
        for taken in (taken for run in structure.runs for taken in run.inputs):
            if taken.own_base is not None and policy == "pad_zero":
                old, tuned = counts.get(taken.own_base, 0), counts.get(taken.ref, 0)
                if old > tuned:
                    detail = f"{name} has {old:,} rows in {taken.own_base}, but {tuned:,} in {taken.ref}, tuned from it"
                    what = f"{detail}; padded with zeros it would lose them: write vocabulary: truncate"
                    problems.append(Problem(what, f"{taken.pointer}/base_model", tensor=name))
        size = (max if policy == "pad_zero" else min)(counts.values())
        for ref, info in having.items():
            maps[ref][name] = _cut_or_padded(checkpoints[ref], info, size)
    if problems:
        raise IncompatibleModels.of(problems)
    return {**checkpoints, **{ref: _with_rows(checkpoints[ref], maps[ref], policy) for ref in refs if maps[ref]}}


def _cut_or_padded(weights: Weights, info: TensorInfo, size: int) -> RowMap:
    rows = np.arange(size, dtype=np.int32)
    models = np.where(rows < info.shape[0], 0, ZERO).astype(np.int16)
    return RowMap(0, models, rows, np.empty((1, 0), np.int32), {0: (weights, info)})


def _with_rows(weights: Weights, maps: Mapping[str, RowMap], policy: str) -> Weights:
    """A model with other numbers of rows, which its config says where it said the old one."""
    changed = {row_map.info.shape[0]: row_map.size for row_map in maps.values()}
    config = dict(weights.config)
    if (section := weights.text_section) is not None:
        config[section] = _resized(weights.text_config, changed)
    (old, new), *_ = changed.items()
    note = f"vocabulary: {policy}: {old:,} rows of tokens become {new:,}; the tokenizer stays as it is"
    return Gathered(weights, _resized(config, changed), weights.companions, maps, [] if old == new else [note])


def _resized(config: Mapping[str, Any], changed: Mapping[int, int]) -> dict[str, Any]:
    size = config.get("vocab_size")
    return {**config, "vocab_size": changed[size]} if type(size) is int and size in changed else dict(config)


def _with_template(
    written: str, structure: Structure, checkpoints: Mapping[ModelRef, Weights], donor: Weights
) -> Weights:
    """The donor with the chat template that the recipe asks for."""
    files, notes = donor.companions, list(donor.notes)
    text: str | None = written
    if written == "auto":
        found = [tokenizers.chat_template(checkpoints[ref].companions) for ref in structure.taking_part]
        counted = Counter(template for template in found if template is not None)
        text = max(counted, key=counted.__getitem__) if counted else None
        if text is None:
            notes.append("chat_template: auto: no model has a chat template, so the output has none")
    template = CHAT_TEMPLATES.get(written)
    if template is not None:
        text = template.text
        if tokenizers.is_readable(files):
            ids = Tokenizer.read(str(structure.donor), files).ids
            if missing := [token for token in template.tokens if token not in ids]:
                what = f"chat_template: {written} writes {_some(missing)}, which the output's tokenizer has not"
                notes.append(
                    f"{what}; a tokenizer with them is `tokenizer: {{source: union}}` or a model that has them"
                )
            if template.end is not None and template.end in ids:
                files = _ending_at(ids[template.end], files, donor.config)
    if text is not None:
        files = tokenizers.with_chat_template(files, text)
    return Gathered(donor, donor.config, files, notes=notes, planning_bytes=donor.planning_bytes)


def _ending_at(token: int, files: Companions, config: Mapping[str, Any]) -> Companions:
    """The files, with a generation config by which a turn of the chat template ends generation too."""
    found = tokenizers.json_of(files, _GENERATION).get("eos_token_id", config.get("eos_token_id"))
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if token in ends:
        return files
    return {**files, _GENERATION: tokenizers.edited_json(files, _GENERATION, {"eos_token_id": [*ends, token]})}


def _outside(weights: Weights) -> Iterator[TensorInfo]:
    """Tensors with rows that stand in no numbered layer."""
    return (info for info in weights.tensors.values() if info.shape and not stacks([info.name]))


def _is_of_tokens(name: str) -> bool:
    return _POSITIONS.search(name) is None


def _pointer(token: str) -> str:
    return "#/tokenizer/tokens/" + token.replace("~", "~0").replace("/", "~1")


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(repr(clip(token)) for token in tokens[:5])
    return f"{len(tokens)} tokens ({shown}{', …' if len(tokens) > 5 else ''})" if len(tokens) > 1 else f"token {shown}"
