"""The way back from a patched model: a delta that holds what the patched tensors were before.

It is made for the very tensors that were written, so that it changes no other model, and gives back their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from merge_core.checkpoint import Checkpoint
from merge_core.errors import Canceled
from merge_core.files import WrittenFile
from merge_core.journal import Journal
from merge_core.merged import MergedWeights, Unrounded
from merge_core.patches.encoding import Difference
from merge_core.patches.encodings.sparse import Sparse
from merge_core.patches.writing import Extraction, assemble, encode_all
from merge_core.plan import Plan

REVERSAL_NAME = "reversal.safetensors"
KIND = "reversal"
"""What a reversal's provenance says it is."""


def write_reversal(
    plan: Plan, before: Unrounded, folder: Path, journal: Journal, stop: Callable[[], bool]
) -> WrittenFile:
    """Write beside the patched weights in `folder` what they were `before`, rounded as if it had been written."""
    clean = MergedWeights(str(before.path), before.rounded, before.inputs)
    clean.start(plan.memory, stop=stop)

    def tick(count: int = 0) -> None:
        if stop():
            raise Canceled("the merge was canceled")

    with Checkpoint.open(folder) as patched:
        infos = [info for info in clean.tensors.values() if info.name in plan.reversible]
        pairs = [(Difference(clean, info, patched, patched.tensors.get(info.name), tick), Sparse()) for info in infos]
        removed = tuple(name for name in patched.tensors if name not in clean.tensors)
        extraction = Extraction(tuple(pairs), removed)
        encoded, _ = encode_all(extraction, folder, journal, threads=1, watch=tick)
        written, _ = assemble(encoded, extraction, folder, provenance(plan), name=REVERSAL_NAME, stop=tick)
    return written


def provenance(plan: Plan) -> dict[str, Any]:
    """What a reversal says of itself."""
    return {"kind": KIND, "patches": [{"patch": str(put.patch), "strength": put.strength} for put in plan.patches]}
