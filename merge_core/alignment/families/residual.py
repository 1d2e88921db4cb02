"""The residual stream: what every layer of a tower reads from and adds to. Its elements may stand in any one order, the
same everywhere: in embeddings, norms, what layers read and write, and heads. A model whose output is the stream itself
then gives its hidden states in that order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge_core.alignment.families import settings
from merge_core.alignment.families.attention import Attention
from merge_core.alignment.families.draft import Draft, Module, by_stack, is_norm, stack
from merge_core.alignment.families.neurons import ROUTER, Neurons
from merge_core.alignment.spec import Axis, Concat
from merge_core.headers import clip
from merge_core.weights import is_embedding

_INTO = re.compile(r"(^|\.)(embeddings_project|embedding_hidden_mapping_in|project_in)$")
_PATCHES = re.compile(r"(^|[._])patch_?embed")
_TOKEN = re.compile(r"(?i)(^|[._])(tokens?|embed|pos_embed)$")
_SCALE = re.compile(r"(?i)(^|\.)(layer_?scale\w*|lambda_?\d|gamma_?\d|ls\d)(\.|$)")
_HEAD = re.compile(r"(^|\.)(\w*lm_head|proj_out|\w*classifier|score|qa_outputs|pooler\.dense|embed_out|head)$")
_AFTER_POOLER = re.compile(r"(^|\.)(classifier|seq_relationship|score)$")
_READERS = frozenset({"pre_classifier", "classifier.dense"})
_UNKNOWN = "how it reads from the residual stream or adds to it is not known; without `residual` it stays as it is"


@dataclass(frozen=True)
class _Role:
    """An axis that is the residual stream, of a tensor in a layer of a stack."""

    stack: str
    tensor: str
    number: int


@dataclass(frozen=True)
class _Tower:
    """A part of a model with one residual stream: its stacks of layers, all of its tensors, and the stream's width."""

    tensors: frozenset[str]
    width: int
    axis: Axis


def place(
    draft: Draft,
    attentions: Sequence[Attention],
    parts: Sequence[Neurons],
    transposed: frozenset[str],
    joint: Mapping[str, tuple[str, int]],
) -> None:
    """Put the residual permutation of every tower into a draft, or refuse what stands beside it and is not known.

    `joint`: the projections of texts and of images into one space, and which of their axes is that space.
    """
    roles = [*_of_attentions(attentions, transposed), *_of_parts(draft, parts, transposed)]
    for role in roles:
        if role.stack == role.tensor:
            draft.refuse(role.tensor, _UNKNOWN)
    towers = _towers(draft, roles, [each for each in attentions if each.is_cross], joint)
    if draft.is_refused:
        return
    known = {role.tensor for role in roles}
    for tower in towers:
        for role in roles:
            if role.tensor in tower.tensors:
                draft.put(role.tensor, role.number, tower.axis)
        for tensor, number in joint.values():
            if tensor in tower.tensors:
                draft.put(tensor, 1 - number, tower.axis)
        rest = _Rest(draft, tower, known | {tensor for tensor, _ in joint.values()})
        rest.place()


def _in_layer(path: str, tensor: str, number: int) -> _Role:
    outer = stack(path)
    return _Role(tensor if outer == path else outer, tensor, number)


def _of_attentions(attentions: Sequence[Attention], transposed: frozenset[str]) -> Iterator[_Role]:
    for each in attentions:
        for module in each.linears:
            outwards = module is each.output
            number = int(outwards == (module.path in transposed))
            yield _in_layer(each.query.path, module.parameters["weight"], number)
        if bias := each.output.parameters.get("bias"):
            yield _in_layer(each.query.path, bias, 0)


def _of_parts(draft: Draft, parts: Sequence[Neurons], transposed: frozenset[str]) -> Iterator[_Role]:
    for part in parts:
        if part.ups[0].path in _READERS:
            draft.fix(part.down.parameters.values())
            yield _Role("", part.ups[0].parameters["weight"], 1)
            continue
        for module in part.linears:
            shape, weight = draft.weight(module), module.parameters["weight"]
            inwards = module is not part.down
            number = len(shape) - 1 - int(inwards == (module.path in transposed))
            yield _in_layer(module.path, weight, number)
        if bias := part.down.parameters.get("bias"):
            yield _in_layer(part.down.path, bias, len(draft.shapes[bias]) - 1)


def _towers(
    draft: Draft, roles: Sequence[_Role], crossing: Sequence[Attention], joint: Mapping[str, tuple[str, int]]
) -> list[_Tower]:
    """The parts of a model with a residual stream of their own: encoder and decoder have one, towers that only meet in
    a joint space one each.
    """
    stacks = sorted({role.stack for role in roles if role.stack})
    widths: dict[str, set[int]] = {path: set() for path in stacks}
    first: dict[str, _Role] = {}
    for role in roles:
        if role.stack:
            width = _width(draft, first.setdefault(role.stack, role))
            widths[role.stack].add(_width(draft, role))
            if _width(draft, role) != width:
                draft.refuse(role.tensor, f"the residual stream of {clip(role.stack)} is not {width} wide here")
    belongs = by_stack(draft.shapes, stacks)
    projections = {tensor for tensor, _ in joint.values()}
    if len(stacks) > 1 and crossing:
        if len(set().union(*widths.values())) > 1:
            draft.refuse_module(crossing[0].key, "the residual streams of encoder and decoder differ in width")
        tensors = [tensor for path in stacks for tensor in belongs[path]]
        groups = [("residual", stacks[0], tensors)]
    elif len(stacks) > 1 and not joint:
        what = f"how {clip(stacks[0])} and {clip(stacks[1])} pass on to one another is not known"
        draft.refuse(first[stacks[1]].tensor, what)
        groups = []
    else:
        names = {path: "residual" if len(stacks) == 1 else f"{path}.residual" for path in stacks}
        groups = [(names[path], path, [t for t in belongs[path] if t not in projections]) for path in stacks]
    if draft.is_refused:
        return []
    found = []
    for name, path, tensors in groups:
        width = min(widths[path])
        for side, (tensor, number) in joint.items():
            if len(stacks) == 1 or settings.speaks_of(path, "vision") == (side == "image"):
                tensors = [*tensors, tensor]
                if draft.shapes[tensor][1 - number] != width:
                    draft.refuse(tensor, f"does not read the residual stream of {clip(path)}, which is {width} wide")
        found.append(_Tower(frozenset(tensors), width, draft.permutation(name, width)))
    return found


def _width(draft: Draft, role: _Role) -> int:
    shape = draft.shapes[role.tensor]
    return shape[role.number] if 0 <= role.number < len(shape) else 0


class _Rest:
    """What stands around the layers of a tower: embeddings, norms, heads."""

    def __init__(self, draft: Draft, tower: _Tower, known: set[str]) -> None:
        self.draft, self.tower, self.known = draft, tower, known
        self.has_pooler = any(re.search(r"(^|\.)pooler\.dense\.weight$", tensor) for tensor in tower.tensors)

    def place(self) -> None:
        for module in self.draft.modules.values():
            for kind, tensor in module.parameters.items():
                if tensor in self.tower.tensors and tensor not in self.known:
                    self._place(module, kind, tensor)

    def _place(self, module: Module, kind: str, tensor: str) -> None:
        draft, width = self.draft, self.tower.width
        shape = draft.shapes[tensor]
        weight = draft.weight(module)
        if width not in shape and not (len(shape) == 2 and shape[1] == 2 * width and self._is_head(module)):
            return
        if tensor in draft.placed and not (ROUTER.search(module.path) and shape[-1] == width):
            return
        is_linear = len(weight) >= 2
        if kind == "bias" and is_linear and self._is_head(module):
            return
        if (
            (kind == "bias" and is_linear and self._writes(module))
            or (
                not is_linear
                and shape == (width,)
                and (is_norm(module.path) or _SCALE.search(tensor) or self._is_token(tensor))
            )
            or (kind == "weight" and self._writes(module))
        ):
            draft.put(tensor, 0, self.tower.axis)
        elif kind == "weight" and self._is_token(tensor) and shape[-1] == width:
            draft.put(tensor, len(shape) - 1, self.tower.axis)
        elif kind == "weight" and len(shape) == 2 and self._is_head(module):
            if not (self.has_pooler and _AFTER_POOLER.search(module.path)):
                axis = self.tower.axis
                draft.put(tensor, 1, axis if shape[1] == width else Concat((axis, axis)))
        else:
            draft.refuse(tensor, _UNKNOWN)

    def _writes(self, module: Module) -> bool:
        """Whether a linear layer or a convolution outside of the layers makes the stream of something else."""
        shape = self.draft.weight(module)
        into = _INTO.search(module.path) or (len(shape) > 2 and _PATCHES.search(module.path))
        return bool(into) and shape[0] == self.tower.width

    def _is_head(self, module: Module) -> bool:
        """Whether a linear layer only reads the stream."""
        shape = self.draft.weight(module)
        named = _HEAD.search(module.path) or ROUTER.search(module.path) or module.path.endswith(tuple(_READERS))
        return bool(named) and len(shape) == 2 and shape[1] in (self.tower.width, 2 * self.tower.width)

    @staticmethod
    def _is_token(tensor: str) -> bool:
        return is_embedding(tensor) or _TOKEN.search(tensor) is not None
