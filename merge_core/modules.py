"""The modules of a model, such as its text decoder and its vision tower, told from the names of its tensors.

A module is named by what stands before its tensors' names (`vision_tower`, `model.layers`), by the last words of that
where they are clear (`decoder` for `model.decoder`), or by its role in a model of several: `text_decoder`,
`vision_tower`, `audio_tower`, `multi_modal_projector`. `default` is what no other module of the recipe holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from merge_core.layers import stacks

DEFAULT = "default"
Role = Literal["text", "vision", "audio", "projector"]
_ROLES: dict[str, Role] = {
    "text_decoder": "text",
    "vision_tower": "vision",
    "audio_tower": "audio",
    "multi_modal_projector": "projector",
}
_SIGNS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("projector", re.compile(r"(^|_)(projector|connector|merger|aligner|projection)s?(_|$)")),
    ("vision", re.compile(r"vision|visual|image|(^|_)vit(_|$)|siglip")),
    ("audio", re.compile(r"audio|speech")),
)


@dataclass(frozen=True)
class Module:
    """Part of a model: tensors below `prefix`, or of one `role`, or all that none of `others` holds."""

    prefix: str | None = None
    role: Role | None = None
    others: tuple[Module, ...] = ()

    def holds(self, tensor: str) -> bool:
        """Whether a tensor is in this module."""
        if self.prefix is not None:
            return tensor.startswith(f"{self.prefix}.")
        if self.role is not None:
            return role_of(tensor) == self.role
        return not any(other.holds(tensor) for other in self.others)


def role_of(tensor: str) -> Role:
    """What a tensor is there for, as far as its name says; text where it says nothing."""
    parts = [part.lower() for part in tensor.split(".")]
    return next((role for role, sign in _SIGNS if any(sign.search(part) for part in parts)), "text")


def find_modules(names: Sequence[str], tensors: Iterable[str]) -> dict[str, Module]:
    """The modules of these names in a model with these tensors; a name that means none is not there."""
    tensors = list(tensors)
    found = {name: module for name in names if name != DEFAULT and (module := _find(name, tensors)) is not None}
    if DEFAULT in names:
        found[DEFAULT] = Module(others=tuple(found.values()))
    return found


def names_of_modules(tensors: Iterable[str]) -> list[str]:
    """Names that a recipe could use for the modules of a model."""
    tensors = list(tensors)
    roles = {role_of(tensor) for tensor in tensors}
    named = [name for name, role in _ROLES.items() if role in roles] if len(roles) > 1 else []
    return [DEFAULT, *named, *(prefix.removesuffix(".") for prefix in stacks(tensors) if prefix)]


def _find(name: str, tensors: Sequence[str]) -> Module | None:
    if any(tensor.startswith(f"{name}.") for tensor in tensors):
        return Module(prefix=name)
    role = _ROLES.get(name)
    roles = {role_of(tensor) for tensor in tensors}
    if role is not None:
        return Module(role=role) if role in roles and len(roles) > 1 else None
    ends = {tensor[: match.end() - 1] for tensor in tensors if (match := re.search(rf"\.{re.escape(name)}\.", tensor))}
    return Module(prefix=ends.pop()) if len(ends) == 1 else None
