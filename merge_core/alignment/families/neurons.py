"""Hidden neurons: between the linear layers into a feed-forward part and the one out of it stands an elementwise
function, so its neurons may stand in any order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from merge_core.alignment.families.draft import Draft, Module, is_norm, nearest
from merge_core.alignment.spec import Axis, Concat
from merge_core.headers import clip

_PAIRS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("w1",), "w2"),
    (("w12",), "w3"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("linear_1",), "linear_2"),
    (("fc_in",), "fc_out"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("Wi",), "Wo"),
    (("weights_in",), "weights_out"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate_dense",), "output_dense"),
    (("intermediate.dense",), "output.dense"),
    (("pwconv1",), "pwconv2"),
    (("ffn",), "ffn_output"),
    (("pre_classifier",), "classifier"),
)
"""What the linear layers into neurons and out of them are called, side by side; of several, the first that is there."""

_HALVES = frozenset({"gate_up_proj", "w12", "Wi", "weights_in"})
"""Layers whose outputs are two halves, one the gate of the other."""

_INNER_NORM = re.compile(r"(^|\.)(ffn_sub_norm|ffn_layernorm)$")
_SEQUENCE = re.compile(r"(?i)(^|[._])(mlp|ffn|feed_forward)$")
_HEAD = re.compile(r"(^|\.)classifier$")
FEED_FORWARD = re.compile(r"(?i)(^|\.)(\w*mlp\w*|ffn|feed_forward|\w*experts?|intermediate)(\.|$)")
ROUTER = re.compile(r"(^|\.)(gate|router|\w*expert_gate)(\.\w+)?$")


@dataclass(frozen=True)
class Neurons:
    """One feed-forward part: the path its names share, the layers into it and the layer out of it."""

    path: str
    ups: tuple[Module, ...]
    down: Module

    @property
    def linears(self) -> tuple[Module, ...]:
        return (*self.ups, self.down)


def find(draft: Draft, taken: set[str]) -> list[Neurons]:
    """Every feed-forward part whose layers are not `taken` by something else."""
    found = []
    for path in _paths(draft):
        for ups, down in _pairs(draft, path):
            modules = [draft.modules.get(f"{path}.{word}" if path else word) for word in (*ups, down)]
            linears = [each for each in modules if each is not None and len(draft.weight(each)) in (2, 3)]
            if len(linears) == len(modules) and not any(each.path in taken for each in linears):
                taken.update(each.path for each in linears)
                found.append(Neurons(path, tuple(linears[:-1]), linears[-1]))
                break
    return found


def _paths(draft: Draft) -> Iterator[str]:
    """Every path that something stands below."""
    seen: set[str] = set()
    for module in draft.modules.values():
        path = module.parent
        while path not in seen:
            seen.add(path)
            yield path
            path = path.rpartition(".")[0]


def _pairs(draft: Draft, path: str) -> Iterator[tuple[tuple[str, ...], str]]:
    yield from _PAIRS
    linears = [word for word, module in draft.children.get(path, {}).items() if len(draft.weight(module)) == 2]
    if _SEQUENCE.search(path) and len(linears) == 2 and all(word.isdecimal() for word in linears):
        first, second = sorted(linears, key=int)
        yield (first,), second
    if _HEAD.search(path) and set(linears) == {"dense", "out_proj"}:
        yield ("dense",), "out_proj"


def place(draft: Draft, parts: list[Neurons], transposed: frozenset[str]) -> None:
    """Put the neurons of every feed-forward part into a draft; `transposed` are modules whose weights are (in, out)."""
    placed = [(part, axis) for part in parts if (axis := _place(draft, part, transposed)) is not None]
    scopes = {part.path: (draft.size(axis), _width(draft, part, transposed), axis) for part, axis in placed}
    for module in draft.modules.values():
        path = nearest(module.path, scopes)
        if path and not any(tensor in draft.placed for tensor in module.parameters.values()):
            _place_beside(draft, module, *scopes[path], is_inside=FEED_FORWARD.search(path) is not None)


def _width(draft: Draft, part: Neurons, transposed: frozenset[str]) -> int:
    up = part.ups[0]
    return draft.weight(up)[0 if up.path in transposed else -1]


def _place(draft: Draft, part: Neurons, transposed: frozenset[str]) -> Axis | None:
    """Place one part; the axis of its neurons, or None if it is refused."""
    down = draft.weight(part.down)
    stacked = len(down) == 3
    if any(len(draft.weight(up)) != len(down) for up in part.ups) or (stacked and not _is_stack(draft, part)):
        draft.refuse_module(part.ups[0], "how the neurons of several experts lie in it is not known")
        return None
    columns = 0 if part.down.path in transposed else len(down) - 1
    axis = draft.permutation(f"{part.path}.neurons" if part.path else "neurons", down[columns])
    for up in part.ups:
        rows = 1 if stacked or up.path in transposed else 0
        found = draft.weight(up)[rows]
        halves = up.word in _HALVES and found == 2 * down[columns]
        if not halves and found != down[columns]:
            draft.refuse_module(up, f"has {found} outputs, but {clip(part.down.path)} takes {down[columns]}")
            return None
        whole: Axis = Concat((axis, axis)) if halves else axis
        draft.put(up.parameters["weight"], rows, whole)
        if bias := up.parameters.get("bias"):
            draft.put(bias, len(draft.shapes[bias]) - 1, whole)
    draft.put(part.down.parameters["weight"], columns, axis)
    draft.fix(part.down.parameters.values())
    for each in part.linears:
        if unknown := each.parameters.keys() - {"weight", "bias"}:
            draft.refuse(each.parameters[min(unknown)], "not known in a feed-forward layer")
    if stacked:
        _place_experts(draft, part)
    return axis


def _is_stack(draft: Draft, part: Neurons) -> bool:
    """Whether the weights of several experts lie as [experts, out, in]; the other way round, halves do not fit so."""
    up, down = draft.weight(part.ups[0]), draft.weight(part.down)
    return len(part.ups) == 1 and up[0] == down[0] and up[2] == down[1] and up[1] == 2 * down[2]


def _place_experts(draft: Draft, part: Neurons) -> None:
    """Experts in one tensor may change places together with the rows of the router, if nothing else knows them."""
    experts = draft.weight(part.down)[0]
    parent = part.path.rpartition(".")[0]
    routers = [module for module in draft.children.get(parent, {}).values() if ROUTER.search(module.path)]
    if len(routers) == 1 and draft.weight(routers[0])[:1] == (experts,):
        axis = draft.permutation(part.path, experts)
        draft.put_rows(routers[0], axis)
        for each in part.linears:
            for tensor in each.parameters.values():
                draft.put(tensor, 0, axis)


def _place_beside(draft: Draft, module: Module, size: int, width: int, axis: Axis, *, is_inside: bool) -> None:
    """Place what stands among the layers of a feed-forward part and has as many elements as it has neurons.

    Where the part reads as many, what only stands beside it is no part of it; what is inside (`is_inside`) may be.
    """
    shape = draft.weight(module)
    known = not module.parameters.keys() - {"weight", "bias"}
    if not any(
        size in draft.shapes[tensor] or 2 * size in draft.shapes[tensor] for tensor in module.parameters.values()
    ):
        return
    if known and len(shape) > 2 and shape[:2] == (size, 1):  # a convolution of each channel alone
        draft.put_rows(module, axis)
    elif known and shape == (size,) and is_norm(module.path) and (size != width or _INNER_NORM.search(module.path)):
        draft.put_vectors(module, axis)
    elif known and set(shape[:-1]) == {1} and shape[-1] == size and module.word == "grn":
        for tensor in module.parameters.values():
            draft.put(tensor, len(shape) - 1, axis)
    elif size != width or not (ROUTER.search(module.path) or (len(shape) <= 1 and not is_inside)):
        draft.refuse_module(module, f"stands among {size} neurons, and it is not known how they pass through it")
