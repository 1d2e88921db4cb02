"""Transformers: what may be permuted inside their layers, what joins two towers, and the residual stream."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from merge_core.alignment.families import attention, neurons, residual
from merge_core.alignment.families.attention import Attention
from merge_core.alignment.families.draft import Draft, stack
from merge_core.alignment.families.neurons import Neurons
from merge_core.weights import is_embedding

_ATTENTION = re.compile(r"(?i)(^|\.)\w*att(n|ention)\w*(\.|$)")
_NUMBERED = re.compile(r"\.\d+\.")
_TRANSPOSED = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
_PROJECTIONS = {"text": re.compile(r"(^|\.)text_projection$"), "image": re.compile(r"(^|\.)visual(\.|_)proj(ection)?$")}


class Transformer:
    """The attention and the feed-forward parts that are found in a model."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.attentions: list[Attention] = attention.find(draft)
        self.parts: list[Neurons] = neurons.find(draft, {m.path for each in self.attentions for m in each.linears})

    @property
    def is_one(self) -> bool:
        """Whether there is attention, or a feed-forward part in numbered layers."""
        return bool(self.attentions) or any(_NUMBERED.search(f"{part.path}.") for part in self.parts)

    def place(self, config: Mapping[str, Any], *, with_residual: bool) -> None:
        """Put the symmetries into the draft."""
        draft = self.draft
        transposed = self._transposed()
        attention.place(draft, config, self.attentions, transposed)
        neurons.place(draft, self.parts, transposed)
        self._refuse_unknown(config)
        joint = self._place_joint()
        if with_residual and not draft.is_refused:
            residual.place(draft, self.attentions, self.parts, transposed, joint)

    def _transposed(self) -> frozenset[str]:
        """Linear layers that keep their weights as (in, out), which shows where a bias is as long as the columns."""
        draft = self.draft
        named = [module for module in draft.modules.values() if module.word in _TRANSPOSED]
        shows = [
            draft.shapes[module.parameters["bias"]] == shape[1:]
            for module in named
            if "bias" in module.parameters and len(shape := draft.weight(module)) == 2 and shape[0] != shape[1]
        ]
        return frozenset(module.path for module in named) if shows and all(shows) else frozenset()

    def _refuse_unknown(self, config: Mapping[str, Any]) -> None:
        """Refuse matrices of attention or feed-forward parts that have no place."""
        draft = self.draft
        if any(part.get("num_kv_shared_layers") for part in (config, *config.values()) if isinstance(part, Mapping)):
            for each in self.attentions:
                draft.refuse_module(each.query, "layers share their keys and values (num_kv_shared_layers)")
        linears = [module for attention in self.attentions for module in attention.linears]
        linears += [module for part in self.parts for module in part.linears]
        known = draft.placed.union(*(module.parameters.values() for module in linears))
        for name, shape in draft.shapes.items():
            if name in known or len(shape) < 2 or not _NUMBERED.search(name):
                continue
            if _ATTENTION.search(name):
                draft.refuse(name, "it is part of an attention, and its role is not known")
            elif neurons.FEED_FORWARD.search(name) and not neurons.ROUTER.search(name) and not is_embedding(name):
                draft.refuse(name, "it is part of a feed-forward layer, and its role is not known")

    def _reads_joint(self, size: int, projections: set[str]) -> bool:
        """Whether more than two towers, or something outside of them, may read the joint space of this size."""
        stacks = {stack(each.query.path) for each in self.attentions}
        towers = {path.split(".")[0] for path in stacks}
        outside = (name for name in self.draft.shapes if name.split(".")[0] not in towers and name not in projections)
        return len(stacks) != 2 or any(size in self.draft.shapes[name] for name in outside)

    def _place_joint(self) -> dict[str, tuple[str, int]]:
        """Two towers that meet in one space: the outputs of both projections follow one permutation.

        Text and image → the weight, and which of its axes the outputs are.
        """
        draft = self.draft
        found = {}
        for side, wanted in _PROJECTIONS.items():
            fitting = [m for m in draft.modules.values() if wanted.search(m.path) and len(draft.weight(m)) == 2]
            if len(fitting) == 1:
                name = fitting[0].parameters["weight"]
                rows = 0 if name.endswith(".weight") else 1  # a bare parameter is multiplied from the right
                found[side] = (fitting[0], name, rows)
        if len(found) != 2:
            return {}
        size = draft.shapes[found["text"][1]][found["text"][2]]
        fits = all(draft.shapes[name][rows] == size for _, name, rows in found.values())
        plain = all(module.parameters.keys() == {"weight"} for module, _, _ in found.values())
        if fits and plain and not self._reads_joint(size, {name for _, name, _ in found.values()}):
            for _, name, rows in found.values():
                draft.put(name, rows, draft.permutation("joint", size))
        return {side: (name, rows) for side, (_, name, rows) in found.items()}
