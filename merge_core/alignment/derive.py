"""Which permutations leave the function of a model as it is, by the names and shapes of its tensors and its config.

Nothing here lists architectures. Roles of tensors come from words that the field shares (`q_proj`, `query`, …), order
from the numbers in names, structure from shapes; the config says only what shapes cannot, such as how many heads there
are. Where these do not suffice, what is not known to be exact stays as it is, or the model is refused and a spec of the
user's own is asked for. No weight is read, so nobody has run the model: names that lie are believed.

The exact symmetries: Ainsworth et al., "Git Re-Basin" (https://arxiv.org/abs/2209.04836) for neurons, channels and
residual streams; those of attention are checked by permuting small models of every family at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_core.alignment.families import channels
from merge_core.alignment.families.draft import Draft
from merge_core.alignment.families.transformer import Transformer
from merge_core.alignment.spec import PermutationSpec
from merge_core.errors import IncompatibleModels


def derive(
    tensors: Mapping[str, Sequence[int]], config: Mapping[str, Any], *, residual: bool = False
) -> PermutationSpec:
    """The permutations of a model of these tensors (name → shape) that leave its function as it is.

    With `residual`, also the one permutation of the residual stream of each tower of a transformer; without it, every
    layer keeps the order of what it reads and adds to. Raises `IncompatibleModels`, which names the tensors that have
    no known role.
    """
    draft = Draft(tensors)
    transformer = Transformer(draft)
    if transformer.is_one:
        transformer.place(config, with_residual=residual)
    else:
        channels.place(draft, config)
    spec = draft.finish()
    if not spec.permutations:
        raise IncompatibleModels("nothing in this model is known to be free to permute")
    return spec
