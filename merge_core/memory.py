"""How much memory a plan needs, and how many threads and how large blocks fit under its limit."""

from __future__ import annotations

import os
from collections.abc import Sequence

from merge_core.errors import MemoryLimitExceeded, Problem
from merge_core.method import Scope
from merge_core.plan import WRITING_BLOCKS, MemoryPlan, Plan, Step

FLOOR_BYTES = 400 * 2**20
"""What the process needs before the first block: interpreter, torch, libraries, histograms."""
BLOCK_ELEMENTS = 2**22
_LEAST_BLOCK = 2**17
"""Rather fewer threads than smaller blocks."""


def plan_memory(
    steps: Sequence[Step],
    scope: Scope,
    limit: int,
    threads: int | None,
    block_elements: int,
    *,
    on_gpu: bool,
    stages: Sequence[Plan] = (),
    planning: int = 0,
    window: int = 0,
) -> MemoryPlan:
    """As many threads and as large blocks as fit under the limit, with what the stages that are read need for theirs;
    raises `MemoryLimitExceeded` where not even one grain does. Where blocks are whole tensors, fewer merged ones wait
    for the disk before blocks of others shrink. With room left two tensors are measured at once, so that no thread
    waits for the last block of one. `planning`: bytes that the plan itself took, which blocks use again; `window`: what
    is held of files that lie elsewhere.
    """
    workers = threads or len(os.sched_getaffinity(0))
    outputs = workers + WRITING_BLOCKS
    floor = FLOOR_BYTES + window
    available = limit - floor
    if planning > available:
        wanted = (floor + planning) / 2**20
        detail = f"to read the tokenizers takes {wanted:,.0f} MiB in all, but the limit is {limit / 2**20:,.0f} MiB"
        raise MemoryLimitExceeded(f"{detail}; raise limits.memory", [Problem(detail, "#/limits/memory")])
    of_stages = [(step, stage.scope) for stage in stages for step in stage.steps]
    kept = max([_kept_bytes(steps, scope), *(_kept_bytes(stage.steps, stage.scope) for stage in stages)])
    measuring = max([step.kept_bytes(scope) + step.counting_bytes(scope) for step in steps], default=0)

    def needs(block_elements: int, ahead: int = 1) -> int:
        """Bytes that so many threads need for blocks of so many elements, or of a grain where that is more."""
        work = [_block_bytes(step, scope, block_elements, on_gpu) for step in steps]
        measured = [_block_bytes(step, scope, block_elements, on_gpu)[0] for step, scope in of_stages]
        in_work = max([*(bytes_ for bytes_, _ in work), *measured], default=0) + kept + (ahead - 1) * measuring
        return workers * in_work + outputs * max((written for _, written in work), default=0)

    least = [(sum(_block_bytes(step, scope, 1, on_gpu)), step) for step in steps]
    least += [(_block_bytes(step, scope, 1, on_gpu)[0], step) for step, scope in of_stages]
    needed, worst = max(least, key=lambda need: need[0], default=(0, None))
    if worst is not None and needed > available:
        detail = (
            f"{worst.name} {list(worst.shape)} needs {needed / 2**20:,.0f} MiB for its smallest block and "
            f"{floor / 2**20:,.0f} MiB besides, but the limit is {limit / 2**20:,.0f} MiB; raise limits.memory"
        )
        raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory", tensor=worst.name)])
    has_whole = any(step.least_rows == step.grains.rows > step.grains.size for step in steps)
    while workers > 1 and needs(_LEAST_BLOCK) > available:
        workers, outputs = workers - 1, outputs - 1
    while has_whole and outputs > 1 and needs(_LEAST_BLOCK) > available:
        outputs -= 1
    while block_elements > 1 and needs(block_elements) > available:
        block_elements //= 2
    while outputs > 1 and needs(block_elements) > available:
        outputs -= 1
    # What is read of models that are merged themselves, or that lie elsewhere, is found out one tensor after the other.
    is_simple = scope == "tensor" and not stages and not window
    ahead = 2 if is_simple and needs(block_elements, 2) <= available else 1
    peak = floor + max(planning, needs(block_elements, ahead))
    return MemoryPlan(workers, block_elements, outputs, peak, window, ahead)


def _block_bytes(step: Step, scope: Scope, block_elements: int, on_gpu: bool) -> tuple[int, int]:
    """Bytes that a thread needs for a block of a step in work, and those of the merged block."""
    block = step.block_rows(block_elements, on_gpu=on_gpu) * step.grains.width
    return block * step.element_bytes(on_gpu=on_gpu) + step.thread_bytes(scope), block * step.dtype.itemsize


def _kept_bytes(steps: Sequence[Step], scope: Scope) -> int:
    """Bytes that measurements take per thread until they are finished, those of a whole model at once."""
    kept = [step.kept_bytes(scope) for step in steps]
    return sum(kept) if scope == "model" else max(kept, default=0)
