"""Tokenizers as data: which token has which id, and the same files with tokens added or taken away.

What is read and written are the JSON files of the Hugging Face layout, `tokenizer.json` above all. Ids are those that
the `tokenizers` library gives when it loads a file: an added token that the model's vocabulary has keeps its id there,
any other gets the next free one, whatever the file says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_core.errors import CheckpointError
from merge_core.headers import clip, read_json, read_small
from merge_core.weights import Companions

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARY_FILES = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
"""What `tokenizer.json` says too; older classes read it, and it must not say something else."""
_DEFINITION, _CONFIG, _MAP, _ADDED = TOKENIZER_FILES[:4]
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
Flags = Mapping[str, Any]


@dataclass(frozen=True)
class NewToken:
    """A token that a tokenizer shall have besides its own. `flags`: how an added token is matched; None: it is a token
    of the vocabulary itself.
    """

    content: str
    id: int
    flags: Flags | None


@dataclass(frozen=True)
class Tokenizer:
    """Every token's id, and which of them are added tokens, with how they are matched."""

    ids: Mapping[str, int]
    added: Mapping[str, Flags]
    special: Mapping[str, str]
    """Tokens with a part to play: `eos_token` → its text."""

    @classmethod
    def read(cls, model: str, files: Companions) -> Tokenizer:
        """From a model's files. Raises `CheckpointError` where they are missing, wrong, or in a form not read here."""
        if _DEFINITION in files:
            definition = _definition(files)
            ids, listed = _vocabulary(definition, files), definition.get("added_tokens") or []
        elif "vocab.json" in files:
            ids, listed = {**_json(files, "vocab.json")}, []
        elif "vocab.txt" in files:
            ids = {token: i for i, token in enumerate(_text(files, "vocab.txt").splitlines())}
            listed = []
        else:
            raise _unreadable(model, files)
        try:
            return cls._of(ids, _listed(files, listed), _special(files))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(model, f"has tokenizer files that cannot be understood: {clip(str(error))}") from None

    @classmethod
    def _of(cls, ids: dict[str, int], listed: Iterable[Flags], special: Mapping[str, str]) -> Tokenizer:
        if not all(isinstance(token, str) and type(place) is int and place >= 0 for token, place in ids.items()):
            raise ValueError("a vocabulary is texts and their ids")
        "".join(ids).encode()  # no half characters, which could not be written
        count, added = len(ids), {}
        last = -1
        for entry in listed:
            content = entry["content"]
            if content and content not in added:
                ids.setdefault(content, last + 1 if last >= count else count)
                last = max(last, ids[content])
                added[content] = {name: entry.get(name, default) for name, default in _FLAGS.items()}
        return cls(ids, added, special)


def fingerprint(files: Companions) -> str:
    """The same for two models whose tokenizer files are the same."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES[:-2]:
        if name in files:
            digest.update(name.encode() + hashlib.sha256(_bytes(files[name])).digest())
    return digest.hexdigest()


def definition_bytes(files: Companions) -> int:
    """How long tokenizer.json is."""
    file = files.get(_DEFINITION, b"")
    return file.stat().st_size if isinstance(file, Path) else len(file)


def is_readable(files: Companions) -> bool:
    """Whether the ids of a tokenizer can be read from its files."""
    return any(name in files for name in (_DEFINITION, "vocab.json", "vocab.txt"))


def changed(
    model: str, files: Companions, dropped: Collection[str], new: Sequence[NewToken], donors: Iterable[Companions]
) -> Companions:
    """A tokenizer's files without some tokens and with others.

    `donors`: the files of models that the new tokens come from; merges (BPE) and scores (Unigram) are taken from there,
    after those of the tokenizer itself. Raises `CheckpointError`.
    """
    if not dropped and not new:
        return {name: files[name] for name in TOKENIZER_FILES if name in files}
    if _DEFINITION not in files:
        has = "has no tokenizer.json, so that tokens cannot be added to it or taken away"
        raise CheckpointError(model, f"{has}; load it with transformers' AutoTokenizer and save it again")
    gone = frozenset(dropped)
    before = Tokenizer.read(model, files)
    wanted = {token: place for token, place in before.ids.items() if token not in gone}
    wanted |= {token.content: token.id for token in new}
    flags = {token: entry for token, entry in before.added.items() if token not in gone}
    flags |= {token.content: token.flags for token in new if token.flags is not None}

    definition = _definition(files)
    regular = [token for token in new if token.flags is None]
    if regular or gone:
        _edit_vocabulary(definition, gone, wanted, regular, list(donors))
    entries = [{"id": wanted[token], "content": token, **entry} for token, entry in flags.items()]
    definition["added_tokens"] = sorted(entries, key=lambda entry: entry["id"])
    if Tokenizer._of(_vocabulary(definition, files), definition["added_tokens"], {}).ids != wanted:
        _edit_vocabulary(definition, gone, wanted, regular, ())
    if Tokenizer._of(_vocabulary(definition, files), definition["added_tokens"], {}).ids != wanted:
        what = "has a vocabulary with holes in its ids, which its kind of tokenizer cannot keep"
        raise CheckpointError(model, f"{what} when tokens are added; give another tokenizer source")

    made: dict[str, Path | bytes] = {_DEFINITION: _encoded(definition)}
    for name in (_CONFIG, _MAP):
        if name in files:
            made[name] = _encoded(_without(_json(files, name), gone, flags, wanted))
    if _ADDED in files:
        made[_ADDED] = _encoded({token: wanted[token] for token in flags})
    kept = [name for name in TOKENIZER_FILES if name in files and name not in made and name not in VOCABULARY_FILES]
    return made | {name: files[name] for name in kept}


def chat_template(files: Companions) -> str | None:
    """A model's chat template, if it has one."""
    if "chat_template.jinja" in files:
        return _text(files, "chat_template.jinja")
    for name in (_CONFIG, "chat_template.json"):
        found = _json(files, name).get("chat_template") if name in files else None
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def with_chat_template(files: Companions, text: str) -> Companions:
    """The same files with this chat template, said once, where every version of transformers reads it."""
    config = _json(files, _CONFIG) if _CONFIG in files else {}
    kept = {name: file for name, file in files.items() if not name.startswith("chat_template.")}
    return {**kept, _CONFIG: _encoded({**config, "chat_template": text})}


def edited_json(files: Companions, name: str, values: Mapping[str, Any]) -> bytes:
    """One of the JSON files with some values set, or taken away where they are None."""
    found = {**(_json(files, name) if name in files else {}), **values}
    return _encoded({key: value for key, value in found.items() if value is not None or key not in values})


def json_of(files: Companions, name: str) -> Mapping[str, Any]:
    """One of the JSON files, or an empty mapping where it is missing."""
    return _json(files, name) if name in files else {}


def _edit_vocabulary(
    definition: dict[str, Any],
    gone: Collection[str],
    wanted: Mapping[str, int],
    regular: Sequence[NewToken],
    donors: Sequence[Companions],
) -> None:
    """Make the vocabulary that of `wanted`, added tokens included, so that nothing moves when it has grown."""
    model = definition["model"]
    if isinstance(model["vocab"], list):
        scores = {token: score for token, score in model["vocab"] if token not in gone}
        worst = min(scores.values(), default=0.0) - 10.0
        for donor in donors:
            theirs = _definition(donor)["model"]["vocab"] if _DEFINITION in donor else []
            scores = (dict(theirs) if isinstance(theirs, list) else {}) | scores
        by_id = {place: token for token, place in wanted.items()}
        model["vocab"] = [[by_id[i], scores.get(by_id[i], worst)] for i in range(len(by_id)) if i in by_id]
        return
    grown = set(wanted) - set(model["vocab"]) if regular or not gone else set()
    model["vocab"] = {token: wanted[token] for token in model["vocab"] if token not in gone}
    model["vocab"] |= {token: wanted[token] for token in sorted(grown, key=wanted.__getitem__)}
    if "merges" not in model:
        return
    merges = [pair for pair in _merges(model) if not any(token in gone for token in (*pair, "".join(pair)))]
    known, vocabulary = set(merges), model["vocab"]
    for donor in donors if regular else ():
        for pair in _merges(_definition(donor)["model"]) if _DEFINITION in donor else ():
            if pair not in known and all(token in vocabulary for token in (*pair, "".join(pair))):
                known.add(pair)
                merges.append(pair)
    model["merges"] = [list(pair) for pair in merges]


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for pair in model.get("merges") or ():
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        yield left, right


def _without(
    config: Mapping[str, Any], gone: Collection[str], flags: Mapping[str, Flags], wanted: Mapping[str, int]
) -> dict[str, Any]:
    """tokenizer_config.json or special_tokens_map.json for the tokens that there are now."""
    kept = {name: value for name, value in config.items() if name not in _NAMED or _content(value) not in gone}
    for name in _LISTED:
        if isinstance(kept.get(name), list):
            kept[name] = [value for value in kept[name] if _content(value) not in gone]
    if "added_tokens_decoder" in kept:
        ordered = sorted(flags, key=wanted.__getitem__)
        kept["added_tokens_decoder"] = {str(wanted[token]): {"content": token, **flags[token]} for token in ordered}
    return kept


def _definition(files: Companions) -> dict[str, Any]:
    found = _json(files, _DEFINITION)
    model = found.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise CheckpointError(_where(files, _DEFINITION), "has no model with a vocabulary")
    return found


def _vocabulary(definition: Mapping[str, Any], files: Companions) -> dict[str, int]:
    vocab = definition["model"]["vocab"]
    if isinstance(vocab, dict):
        return dict(vocab)
    try:
        return {token: i for i, (token, _) in enumerate(vocab)}
    except (TypeError, ValueError):
        raise CheckpointError(_where(files, _DEFINITION), "has a vocabulary that is no list of pairs") from None


def _listed(files: Companions, listed: Sequence[Flags]) -> Iterator[Flags]:
    """Added tokens in the order in which transformers adds them."""
    yield from listed
    config = json_of(files, _CONFIG)
    decoder = config.get("added_tokens_decoder") or {}
    yield from (entry for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])))
    for token, _ in sorted(json_of(files, _ADDED).items(), key=lambda item: int(item[1])):
        yield {"content": token}
    for source in (config, json_of(files, _MAP)):
        values = [source.get(name) for name in _NAMED]
        values += [value for name in _LISTED if isinstance(source.get(name), list) for value in source[name]]
        for value in values:
            if named := _content(value):
                yield {"content": named, "special": True, "normalized": False}


def _special(files: Companions) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in (json_of(files, _MAP), json_of(files, _CONFIG)):
        found |= {name: token for name in _NAMED if (token := _content(source.get(name)))}
    return found


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else None


def _unreadable(model: str, files: Companions) -> CheckpointError:
    if sentencepiece := [name for name in ("tokenizer.model", "spiece.model") if name in files]:
        has = f"has its tokenizer only as {sentencepiece[0]}, whose ids are not read here"
        return CheckpointError(model, f"{has}; load it with transformers' AutoTokenizer and save it as tokenizer.json")
    return CheckpointError(model, "has no tokenizer files, so which row of its embeddings is which token is not known")


def _json(files: Companions, name: str) -> dict[str, Any]:
    file = files[name]
    if isinstance(file, Path):
        return read_json(file)
    found = json.loads(file)
    assert isinstance(found, dict)
    return found


def _text(files: Companions, name: str) -> str:
    try:
        return _bytes(files[name]).decode()
    except UnicodeDecodeError:
        raise CheckpointError(_where(files, name), "is not UTF-8 text") from None


def _bytes(file: Path | bytes) -> bytes:
    return read_small(file) if isinstance(file, Path) else file


def _where(files: Companions, name: str) -> Path | str:
    file = files[name]
    return file if isinstance(file, Path) else name


def _encoded(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
