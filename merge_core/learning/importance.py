"""Which tensors get more coefficients: the importance metric of Expert Merging++ (arXiv 2509.25712).

I_l = Σₖ |c̄_kl| · mean|τ_kl| · n_l, divided by its sum over all tensors, with c̄ the coefficients that a first pass
learned; then K_l = ⌊B · I_l^κ / Σ I^κ⌋ coefficients, of B in all. A tensor with none stays at its first coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from merge_core.learning.parts import Layout
from merge_core.learning.vectors import Vectors


def importances(vectors: Vectors, layout: Layout, coefficients: Tensor) -> dict[str, float]:
    """The share of each learned tensor: n_l · mean|τ| is Σ|τ|, so the shares are of what is really added."""
    found = {}
    for name, each in layout.split(coefficients.detach()).items():
        total = 0.0
        for model in range(vectors.models):
            vector = vectors.vector(name, model)
            total += float(each[model].abs().mean()) * float(vector.double().abs().sum())
        found[name] = total
    whole = sum(found.values())
    return {name: value / whole if whole else 1 / len(found) for name, value in found.items()}


def chunks(shares: Mapping[str, float], budget: int, steepness: float = 1.0) -> dict[str, int]:
    """How many coefficients each tensor gets, `budget` being about how many there are of each model: `steepness` is κ,
    with which 0 is the same for all.
    """
    powers = {name: share**steepness if share else 0.0 for name, share in shares.items()}
    whole = sum(powers.values())
    return {name: int(budget * power / whole) if whole else 0 for name, power in powers.items()}
