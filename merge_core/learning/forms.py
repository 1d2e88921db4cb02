"""How raw numbers become coefficients. Both are `[models, columns]`, float64; `constants` are raw numbers of all."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Form(ABC):
    """A small function that autograd can differentiate."""

    constants: int = 0
    """Raw numbers besides those of the coefficients, which start at 1."""

    @abstractmethod
    def start(self, models: int) -> float:
        """What raw numbers begin with."""

    @abstractmethod
    def __call__(self, raw: Tensor, constants: Tensor) -> Tensor:
        """The coefficients."""


@dataclass(frozen=True)
class Plain(Form):
    """c = raw: any number, as aTLAS has it (from 0)."""

    initial: float = 0.0

    def start(self, models: int) -> float:
        return self.initial

    def __call__(self, raw: Tensor, constants: Tensor) -> Tensor:
        return raw


@dataclass(frozen=True)
class Clamped(Form):
    """c = raw within [0, 1], as the authors of AdaMerging have it (from 0.3); beyond it there is no gradient."""

    initial: float = 0.3

    def start(self, models: int) -> float:
        return self.initial

    def __call__(self, raw: Tensor, constants: Tensor) -> Tensor:
        return raw.clamp(0.0, 1.0)


@dataclass(frozen=True)
class Sigmoid(Form):
    """c = σ(raw), so that c begins with `initial`, in (0, 1): Expert Merging."""

    initial: float = 0.1

    def start(self, models: int) -> float:
        return math.log(self.initial / (1 - self.initial))

    def __call__(self, raw: Tensor, constants: Tensor) -> Tensor:
        return torch.sigmoid(raw)


@dataclass(frozen=True)
class Softmax(Form):
    """c = softmax over the models of β · raw, with one β for all: a learned soup, which begins as the average."""

    constants = 1

    def start(self, models: int) -> float:
        return 1.0

    def __call__(self, raw: Tensor, constants: Tensor) -> Tensor:
        return torch.softmax(constants[0] * raw, dim=0)
