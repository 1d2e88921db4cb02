"""One merge in a process of its own, timed from inside: `python -m benchmarks.one MODELS OUT CACHE < recipe.json`.

Prints JSON: `first_read_s` from the start of the process, `merge_s` and `merge_cpu_s` from the first block to the last
byte on the disk, `rss_mb` of the whole process, `bytes` read and written, `planned_mb`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from merge_core.imports import quick_imports

with quick_imports():
    from merge_core import blocks, execute, shards
    from merge_core.merge import merge
    from merge_core.recipe import Recipe

_marks: dict[str, float] = {}


def _watch(owner: Any, name: str, before: str = "", after: str = "") -> None:
    """Note when a method is first begun, or last ended."""
    original = getattr(owner, name)

    def watched(*given: Any, **named: Any) -> Any:
        if before and before not in _marks:
            _marks[before], _marks[f"{before}_cpu"] = time.perf_counter(), time.process_time()
        try:
            return original(*given, **named)
        finally:
            if after:
                _marks[after], _marks[f"{after}_cpu"] = time.perf_counter(), time.process_time()

    setattr(owner, name, watched)


def main() -> None:
    """Merge, then say what it took; see the module."""
    models, out, cache = (Path(argument) for argument in sys.argv[1:])
    counted: dict[str, Any] = {}
    _watch(execute.Execution, "run", before="begun")
    _watch(blocks.Blocks, "_rows", before="read")
    _watch(shards.ShardWriter, "finish", after="done")

    def report(progress: Any) -> None:
        counted["bytes"] = progress.bytes_read + progress.bytes_written

    begun = time.time() - time.perf_counter()
    merge(Recipe.from_text(sys.stdin.read()), out, roots=[models], cache=cache, report=report)
    told = {
        "first_read_s": begun + _marks["read"] - float(os.environ["BENCH_STARTED"]),
        "merge_s": _marks["done"] - _marks["begun"],
        "merge_cpu_s": _marks["done_cpu"] - _marks["begun_cpu"],
        "rss_mb": peak() / 1e6,
        "bytes": counted["bytes"],
    }
    print(json.dumps(told))


def peak() -> int:
    """The most memory of this process, in bytes; `getrusage` would count what the parent held when it forked."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
