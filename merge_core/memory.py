"""How much memory a plan needs, and how many threads and how large blocks fit under its limit."""

from __future__ import annotations

import os
from collections.abc import Sequence

from merge_core.errors import MemoryLimitExceeded, Problem
from merge_core.method import Scope
from merge_core.plan import WRITING_BLOCKS, MemoryPlan, Step

FLOOR_BYTES = 400 * 2**20
"""What the process needs before the first block: interpreter, torch, libraries, histograms."""
BLOCK_ELEMENTS = 2**20
CUDA_BLOCK_ELEMENTS = 2**22
_LEAST_BLOCK = 2**17
"""Rather fewer threads than smaller blocks."""


def plan_memory(
    steps: Sequence[Step], scope: Scope, limit: int, threads: int | None, block_elements: int, *, on_gpu: bool
) -> MemoryPlan:
    """As many threads and as large blocks as fit under the limit; raises `MemoryLimitExceeded` where not even one grain
    does.
    """
    threads = threads or len(os.sched_getaffinity(0))
    available = limit - FLOOR_BYTES
    needed, worst = max(
        ((_memory_of([step], scope, 1, 1, on_gpu), step) for step in steps), key=lambda need: need[0], default=(0, None)
    )
    if worst is not None and needed > available:
        detail = (
            f"{worst.name} {list(worst.shape)} needs {needed / 2**20:,.0f} MiB for its smallest block and "
            f"{FLOOR_BYTES / 2**20:,.0f} MiB besides, but the limit is {limit / 2**20:,.0f} MiB; raise limits.memory"
        )
        raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory", tensor=worst.name)])
    while threads > 1 and _memory_of(steps, scope, threads, _LEAST_BLOCK, on_gpu) > available:
        threads -= 1
    while block_elements > 1 and _memory_of(steps, scope, threads, block_elements, on_gpu) > available:
        block_elements //= 2
    return MemoryPlan(threads, block_elements, FLOOR_BYTES + _memory_of(steps, scope, threads, block_elements, on_gpu))


def _memory_of(steps: Sequence[Step], scope: Scope, threads: int, block_elements: int, on_gpu: bool) -> int:
    """Bytes that so many threads need for blocks of so many elements, or of a grain where that is more."""
    in_work = written = 0
    for step in steps:
        least = step.least_rows * step.grains.width
        block = min(max(least, block_elements // max(1, least) * least), step.grains.rows * step.grains.width)
        in_work = max(in_work, block * step.element_bytes(on_gpu=on_gpu) + step.thread_bytes(scope))
        written = max(written, block * step.dtype.itemsize)
    return threads * in_work + (threads + WRITING_BLOCKS) * written
