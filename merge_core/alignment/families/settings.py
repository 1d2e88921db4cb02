"""What a config says about the layers of one part of a model: how many heads, and how positions come in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from merge_core.alignment.families.draft import stack

Layout: TypeAlias = Literal["parts", "heads"]

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_SIDES = ("encoder", "decoder")
_WORDS = {
    "text": {"text", "language", "llm", "lm", "thinker", "talker"},
    "vision": {"vision", "visual", "image", "vit"},
    "audio": {"audio", "speech"},
    "encoder": {"encoder"},
    "decoder": {"decoder"},
    "qformer": {"qformer"},
}
_ROTARY = re.compile(r"(^|_)(rope|rotary|mrope)(_|$)")
_FRACTIONS = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
_LEARNED = re.compile(
    r"pos(ition(al)?)?_?emb|embed_positions|(^|\.)wpe\.|relative_attention_bias|relative_position_bias|rel_embeddings"
    r"|distance_embedding|rel_pos_[hw]|pos_conv"
)


def _sections(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and depth < 4:
            yield str(key), value
            yield from _sections(value, depth + 1)


def _subjects(text: str) -> set[str]:
    found = set(re.split(r"[._]", text.lower()))
    return {subject for subject, words in _WORDS.items() if words & found}


def speaks_of(path: str, subject: str) -> bool:
    """Whether the words of a path name a part of a model: `vision`, `text`, …"""
    return subject in _subjects(path)


def section(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The part of a config that speaks of the layers at a path.

    >>> config = {"text_config": {"num_attention_heads": 8}, "vision_config": {"num_attention_heads": 2}}
    >>> section(config, "vision_tower.encoder.layers"), section(config, "model.layers")
    ({'num_attention_heads': 2}, {'num_attention_heads': 8})
    """
    wanted = _subjects(stack(path))
    found = config
    named = [(key, value) for key, value in _sections(config) if _heads(value, path) is not None]
    fitting = [value for key, value in named if wanted & _subjects(key)]
    if fitting:
        found = fitting[-1]
    elif _heads(config, path) is None:
        texts = [value for key, value in named if speaks_of(key, "text")]
        found = texts[0] if texts else config
    return found


def _heads(config: Mapping[str, Any], path: str) -> object:
    words = path.split(".")
    sided = [f"{side}_attention_heads" for side in _SIDES if side in words]
    for key in (*sided, *_HEADS):
        if config.get(key) is not None:
            return config[key]
    return None


def heads(config: Mapping[str, Any], path: str) -> int | None:
    """How many query heads the attention at a path has; None if the config does not say."""
    found = _heads(section(config, path), path)
    if isinstance(found, (list, tuple)):  # one number for each stage: the first number in the path is the stage's
        stage = re.search(r"\.(\d+)\.", path)
        place = int(stage[1]) if stage else len(found)
        found = found[place] if place < len(found) else None
    return found if type(found) is int and found > 0 else None


def turns_values(config: Mapping[str, Any], path: str) -> bool:
    """Whether positions turn the values of the attention at a path, besides queries and keys."""
    return section(config, path).get("rotary_value") is True


def layout(config: Mapping[str, Any], path: str, word: str, usual: Layout) -> Layout | None:
    """How a fused matrix of this name holds queries, keys and values, given what it usually does; None: not known."""
    mine = section(config, path)
    if word == "query_key_value" and mine.get("multi_query_group_num") is not None:
        return "parts"
    if word == "c_attn" and mine.get("multi_query") is False:
        return "heads"
    if word == "qkv_proj" and mine.get("rotary_dim") is not None:
        return None  # cut into parts for several devices, each with queries, values and keys
    return usual


@dataclass(frozen=True)
class Positions:
    """How positions reach the attention, so far as it matters to its symmetries.

    `rotary`: positions turn the first elements of queries and keys: so many `dimensions`, or that `fraction` of a head,
    or all. `heads_differ`: a head's place decides about its bias, as with ALiBi, or nothing says that it does not.
    """

    rotary: bool
    heads_differ: bool
    fraction: float | None = None
    dimensions: int | None = None

    def turned(self, head: int) -> int:
        """How many of the elements of a head, the first, are turned by its position."""
        if not self.rotary:
            return 0
        if self.dimensions is not None:
            return min(self.dimensions, head)
        return head if self.fraction is None else min(int(head * self.fraction), head)


def positions(config: Mapping[str, Any], path: str, tensors: Iterable[str], *, biased: bool) -> Positions:
    """How positions reach the attention of a stack of layers, given the names of the tensors of its part of the model,
    and whether a bias that is not in an attention is added to all heads.

    What nothing is said about stays as it is: q and k dimensions are free only where learned positions are seen and no
    part of the config speaks of a rotation; heads are free only where positions are learned or rotate.
    """
    mine = section(config, path)
    if mine.get("attention_type") == "block_sparse":  # which blocks a head sees is drawn for each head
        biased = True
    if _has_alibi(mine):
        return Positions(rotary=_speaks_of_rotation(mine), heads_differ=True)
    if _speaks_of_rotation(mine) or any(name.endswith("rotary_emb.inv_freq") for name in tensors):
        fractions = set(_numbers(mine, _FRACTIONS))
        dimensions = mine.get("rotary_dim")
        fraction = fractions.pop() if len(fractions) == 1 else None
        return Positions(True, biased, fraction, dimensions if type(dimensions) is int and dimensions > 0 else None)
    elsewhere = _speaks_of_rotation(config) or any(_speaks_of_rotation(value) for _, value in _sections(config))
    learned = any(_LEARNED.search(name) for name in tensors)
    return Positions(rotary=elsewhere or not learned, heads_differ=biased or not (learned or elsewhere))


def _speaks_of_rotation(config: Mapping[str, Any]) -> bool:
    if config.get("position_embedding_type") in ("rotary", "rope") or config.get("alibi") is False:
        return True
    whole = [config, *(value for key, value in config.items() if key == "attn_config" and isinstance(value, Mapping))]
    said = ((str(key), value) for each in whole for key, value in each.items())
    return any(_ROTARY.search(key) and not (key == "rope" and value is False) for key, value in said)


def _has_alibi(config: Mapping[str, Any]) -> bool:
    attention = config.get("attn_config")
    nested = attention.get("alibi") if isinstance(attention, Mapping) else None
    return True in (config.get("alibi"), nested) or config.get("position_embedding_type") == "alibi"


def _numbers(config: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[float]:
    parts = [config, *(value for key, value in _sections(config) if _ROTARY.search(key) or key.endswith("attention"))]
    for part in parts:
        for key in keys:
            if isinstance(value := part.get(key), (int, float)) and 0 < value <= 1:
                yield float(value)
