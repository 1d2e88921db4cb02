"""Attention: key-value groups, the heads inside a group, and the dimensions inside a head.

Exact are: whole groups; query heads inside a group; value dimensions, tied to the output columns of every query head
of the group; query and key dimensions that no rotation turns. Not exact, and never proposed: heads across groups alone,
and anything that mixes rotated dimensions.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merge_core.alignment.families import settings
from merge_core.alignment.families.draft import MOST_BLOCKS, Draft, Module, by_stack, nearest, pattern, stack
from merge_core.alignment.families.settings import Layout
from merge_core.alignment.spec import Axis, Concat, Fixed
from merge_core.headers import clip

_QUERY = ("q_proj", "query", "q", "q_lin", "wq", "query_proj", "to_q")
_KEY = ("k_proj", "key", "k", "k_lin", "wk", "key_proj", "to_k")
_VALUE = ("v_proj", "value", "v", "v_lin", "wv", "value_proj", "to_v")
_OUTPUT = (
    "o_proj",
    "out_proj",
    "out_lin",
    "wo",
    "Wo",
    "dense",
    "c_proj",
    "proj",
    "projection",
    "o",
    "to_out.0",
    "to_out",
)

_FUSED: dict[str, Layout] = {
    "qkv": "parts",
    "qkv_proj": "parts",
    "c_attn": "parts",
    "Wqkv": "parts",
    "W_pack": "parts",
    "in_proj": "parts",
    "query_key_value": "heads",
    "wqkv": "heads",
}
"""How queries, keys and values lie in one matrix: as three parts, or together for each head or group of heads."""

_QK_NORM = re.compile(r"(^|\.)((q|k|query|key)_?(layer_?)?norm|(layer_?)?norm_?(q|k)|ln_?(q|k)|(q|k)_?ln)$")
_OUTPUT_NORM = re.compile(r"(^|\.)(attn_sub_norm|inner_attn_ln)$")
_PER_HEAD_BIAS = re.compile(r"relative\w*_bias(_table)?$")
_SHARED_BIAS = re.compile(r"(^|[._])rel(ative)?_(\w*bias|pos)")
_PER_DIMENSION = re.compile(r"(^|\.)(distance_embedding|rel_pos_[hw])$")
_BUFFER = re.compile(r"(^|\.)(masked|inv_freq|position_ids|relative_position_index|relative_coords_table)$")
_OF_KEY = re.compile(r"(^|_)k(ey)?(_|$)|norm_?k$|ln_?k$")
_CROSS = re.compile(r"(?i)encoder_?attn|encdecattention|cross_?att|multihead_attn")


@dataclass
class Attention:
    """One attention: the path that its names begin with, its linear layers, which may be one module for queries, keys
    and values (`layout` says how they lie in it), and what else stands below the path.
    """

    path: str
    query: Module
    key: Module
    value: Module
    output: Module
    layout: Layout | None
    others: list[Module] = field(default_factory=list)

    @property
    def is_cross(self) -> bool:
        """Whether keys and values come from another part of the model."""
        return _CROSS.search(self.path) is not None

    @property
    def linears(self) -> tuple[Module, ...]:
        return (self.query, self.output) if self.layout else (self.query, self.key, self.value, self.output)


def find(draft: Draft) -> list[Attention]:
    """Every attention in a model. One that lacks a part is refused."""
    found = []
    for module in draft.modules.values():
        layout = _FUSED.get(module.word)
        if module.word == "in_proj" and not module.parameters.get("weight", "").endswith("in_proj_weight"):
            layout = None
        if module.word not in _QUERY and layout is None:
            continue
        if len(draft.weight(module)) < 2:
            continue
        beside = draft.children[module.parent]
        if layout:
            key, value = module, module
        else:
            keys, values = (next((beside[w] for w in words if w in beside), None) for words in (_KEY, _VALUE))
            if keys is None or values is None:
                draft.refuse_module(module, "a query without key and value beside it")
                continue
            key, value = keys, values
        path, output = _output(draft, module.parent)
        if output is None:
            draft.refuse_module(module, f"attention without an output layer ({', '.join(_OUTPUT[:3])}, …) beside it")
            continue
        found.append(Attention(path, module, key, value, output, layout))
    _add_others(draft, found)
    return found


def _output(draft: Draft, path: str) -> tuple[str, Module | None]:
    """The output layer of an attention whose queries are at a path, and the path they have in common."""
    for word in _OUTPUT:
        if module := draft.modules.get(f"{path}.{word}" if path else word):
            return path, module
    parent = path.rpartition(".")[0]
    return parent, draft.modules.get(f"{parent}.output.dense")


def _add_others(draft: Draft, attentions: list[Attention]) -> None:
    """Give every attention the modules below its path that are none of its linear layers.

    Where an attention's layers stand among others of the same layer, these are only the ones with telling names.
    """
    known = {module.path for each in attentions for module in each.linears}
    scopes = {each.path: each for each in attentions}
    in_layer = Counter(each.path.rpartition(".")[0] for each in attentions)
    layers = {path: each for each in attentions if in_layer[path := each.path.rpartition(".")[0]] == 1}
    telling = (_QK_NORM, _PER_DIMENSION, _PER_HEAD_BIAS, _OUTPUT_NORM)
    for module in draft.modules.values():
        if module.path in known:
            continue
        if path := nearest(module.path, scopes):
            alone = not path.rpartition(".")[2].isdecimal()
            if alone or any(kind.search(module.path) for kind in telling):
                scopes[path].others.append(module)
        elif _PER_HEAD_BIAS.search(module.path) and (path := nearest(module.path, layers)):
            layers[path].others.append(module)


@dataclass(frozen=True)
class _Axes:
    """The rows of queries, or of keys, as a whole; one element for each of their heads; one for each dimension."""

    whole: Axis
    heads: Axis
    dimensions: Axis


class _Heads:
    """The axes of one attention."""

    def __init__(self, draft: Draft, attention: Attention, transposed: bool) -> None:
        self.draft, self.attention = draft, attention
        self.rows, self.columns = (1, 0) if transposed else (0, 1)

    def sizes(self, heads: int) -> tuple[int, int, int] | None:
        """Groups, elements of a query or key head, and of a value head; None if they do not fit, and is refused."""
        draft, attention = self.draft, self.attention
        if heads > MOST_BLOCKS:
            draft.refuse_module(attention.query, f"{heads:,} heads; at most {MOST_BLOCKS:,} can be permuted")
            return None
        query, output = draft.weight(attention.query), draft.weight(attention.output)
        if len(query) != 2 or len(output) != 2:
            draft.refuse_module(attention.query, "attention whose weights are no matrices")
            return None
        inside = output[self.columns]
        if attention.layout:
            size, left = divmod(inside, heads)
            slots, rest = divmod(query[self.rows], size) if size else (0, 1)
            groups, odd = divmod(slots - heads, 2)
            if left or rest or odd or groups < 1 or heads % groups:
                draft.refuse_module(attention.query, f"not made of {heads} query heads with keys and values")
                return None
            return groups, size, size
        size, left = divmod(query[self.rows], heads)
        deep, rest = divmod(inside, heads)
        keys, values = draft.weight(attention.key), draft.weight(attention.value)
        fits = not left and not rest and size and deep and len(keys) == len(values) == 2
        groups = keys[self.rows] // size if fits else 0
        if groups < 1 or keys[self.rows] != groups * size or values[self.rows] != groups * deep or heads % groups:
            draft.refuse_module(attention.query, f"its keys, values and output do not fit {heads} query heads")
            return None
        return groups, size, deep

    def place(self, heads: int, positions: settings.Positions, shared: str | None) -> None:
        """Put the axes of the attention into the draft; `shared` names a permutation of heads of several layers."""
        sizes = self.sizes(heads)
        if sizes is None:
            return
        groups, size, deep = sizes
        draft, attention, path = self.draft, self.attention, self.attention.path
        repeat = heads // groups
        fixed = positions.turned(size)

        def inside(name: str, count: int) -> list[Axis]:
            return [draft.permutation(f"{path}.{name}.{group}", count) for group in range(groups)]

        if any(self._is_per_dimension(module, size) for module in attention.others):
            # one order for the dimensions of all heads, which a spec can say only where each head stands alone
            fixed = fixed if repeat == 1 and attention.layout != "heads" else size
            turned = [draft.permutation(f"{path}.qk", size - fixed)] * groups
        else:
            turned = inside("qk", size - fixed)
        qk = [Concat((Fixed(fixed), each)) if 0 < fixed < size else each for each in turned]
        if fixed == size:
            qk = [Fixed(size)] * groups
        vo = inside("vo", deep)
        outer = None if positions.heads_differ else shared or f"{path}.{'heads' if repeat == 1 else 'groups'}"
        names = [None if positions.heads_differ else f"{path}.heads.{group}" for group in range(groups)]

        def of_queries(each: list[Axis]) -> list[Axis]:
            """What is inside each group's query heads, for all heads of the group."""
            return [draft.blocks(name, [axis] * repeat) for name, axis in zip(names, each, strict=True)]

        one: list[Axis] = [Fixed(1)] * groups
        queries = _Axes(draft.blocks(outer, of_queries(qk)), draft.blocks(outer, of_queries(one)), qk[0])
        keys = _Axes(draft.blocks(outer, qk), draft.blocks(outer, one), qk[0])
        values, output = draft.blocks(outer, vo), draft.blocks(outer, of_queries(vo))
        if attention.layout == "parts":
            draft.put_rows(attention.query, Concat((queries.whole, keys.whole, values)), self.rows)
        elif attention.layout == "heads":
            each = [Concat(parts) for parts in zip(of_queries(qk), qk, vo, strict=True)]
            draft.put_rows(attention.query, draft.blocks(outer, each), self.rows)
        else:
            for module, axis in ((attention.query, queries), (attention.key, keys)):
                draft.put_rows(module, axis.whole, self.rows)
            draft.put_rows(attention.value, values, self.rows)
        draft.put(attention.output.parameters["weight"], self.columns, output)
        for module in attention.others:
            self._place_other(module, keys if _OF_KEY.search(module.word) else queries, output)

    def _is_per_dimension(self, module: Module, size: int) -> bool:
        """Whether numbers for each dimension of a head, the same for all heads or not, stand beside the heads."""
        shape = self.draft.weight(module)
        known = _PER_DIMENSION.search(module.path) or (_QK_NORM.search(module.path) and len(shape) <= 2)
        return bool(known) and shape[-1:] == (size,)

    def _place_other(self, module: Module, mine: _Axes, output: Axis) -> None:
        """Place what stands beside the linear layers of an attention, or refuse it."""
        draft, shape = self.draft, self.draft.weight(module)
        weight = module.parameters.get("weight", "")
        whole, heads, dimensions = (draft.size(axis) for axis in (mine.whole, mine.heads, mine.dimensions))
        is_qk_norm = _QK_NORM.search(module.path) is not None
        if unknown := module.parameters.keys() - {"weight", "bias"}:
            draft.refuse(module.parameters[min(unknown)], "not known in an attention")
        elif _BUFFER.search(module.path) or (module.path == self.attention.path and not weight):
            draft.fix(module.parameters.values())
        elif is_qk_norm and shape == (dimensions,):
            draft.put_vectors(module, mine.dimensions)
        elif is_qk_norm and shape == (whole,):
            draft.put_vectors(module, mine.whole)
        elif is_qk_norm and shape == (heads, dimensions) and len(module.parameters) == 1:
            draft.put(weight, 0, mine.heads)
            draft.put(weight, 1, mine.dimensions)
        elif _PER_DIMENSION.search(module.path) and shape[-1:] == (dimensions,):
            draft.put(weight, len(shape) - 1, mine.dimensions)
        elif _PER_HEAD_BIAS.search(module.path) and shape[-1:] == (heads,):
            draft.put(weight, len(shape) - 1, mine.heads)
        elif _OUTPUT_NORM.search(module.path) and shape == (draft.size(output),):
            draft.put_vectors(module, output)
        elif module.word.lower() not in ("layernorm", "layer_norm"):
            draft.refuse_module(module, "not known in an attention")


def place(draft: Draft, config: Mapping[str, Any], attentions: list[Attention], transposed: frozenset[str]) -> None:
    """Put the symmetries of every attention into a draft; `transposed` are modules whose weights are (in, out)."""
    with_bias: dict[str, list[bool]] = defaultdict(list)
    for each in attentions:
        with_bias[pattern(each.path)].append(any(_PER_HEAD_BIAS.search(module.path) for module in each.others))
    numbered = {stack(each.path) for each in attentions if stack(each.path) != each.path}
    known = {tensor for each in attentions for module in each.others for tensor in module.parameters.values()}
    positions = {}
    stacks = by_stack(draft.shapes, numbered)
    owners = {tensor: path for path, tensors in stacks.items() for tensor in tensors}
    for path, tensors in stacks.items():
        biased_elsewhere = any(_SHARED_BIAS.search(name) and name not in known for name in tensors)
        positions[path] = settings.positions(config, path, tensors, biased=biased_elsewhere)
    for each in attentions:
        heads = settings.heads(config, each.path)
        layout = each.layout and settings.layout(config, each.path, each.query.word, each.layout)
        if settings.turns_values(config, each.path):
            draft.refuse_module(each.value, "positions turn its values as well (rotary_value)")
        elif heads is None:
            what = f"the config does not say how many heads {clip(each.path)} has (num_attention_heads)"
            draft.refuse_module(each.query, what)
        elif each.layout and (layout is None or "q_attn" in draft.children[each.query.parent]):
            draft.refuse_module(each.query, "how queries, keys and values lie in it is not known")
        else:
            alike = with_bias[pattern(each.path)]
            # a bias that only the first of several layers holds is added in all of them: one order of heads for all
            shared = f"{stack(each.path)}.heads" if any(alike) and not all(alike) else None
            axes = _Heads(draft, replace(each, layout=layout), each.query.path in transposed)
            axes.place(heads, positions[owners[each.query.parameters["weight"]]], shared)
