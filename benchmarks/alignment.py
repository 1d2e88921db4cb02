"""What aligning two Llama-shaped checkpoints costs: `python -m benchmarks.alignment`, the last line of `make bench`.

The second is a noisy copy of the first with its neurons, attention groups and heads in a random order (all exact
symmetries but that of the residual stream), so that what is found can be told from what is right. The limit is 1 GiB.

Environment: `SIZE` and `WORK` as `benchmarks.bench` has them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.one import peak
from benchmarks.synthetic import SHAPES, build
from merge_core.align import AlignmentDocument, align, applying, plan_only
from merge_core.alignment.derive import derive
from merge_core.alignment.permutations import Permutations
from merge_core.merge import merge

SEED = 7


def main() -> None:
    """Make the models, align them in a process of its own, print what it took and whether it was right."""
    if len(sys.argv) > 1:
        print(json.dumps(_aligned(Path(sys.argv[1]))))
        return
    size = os.environ.get("SIZE", "large")
    work = Path(os.environ.get("WORK", Path(__file__).parent.parent / "build" / "bench")).absolute()
    shape = SHAPES[size]
    base, tuned = build(work / size, shape, 1)
    moved, out, planted = (work / name for name in ("moved", "aligned", "planted.safetensors"))
    spec = derive(shape.tensors, shape.config)
    Permutations(spec, {"m0": spec.random(SEED)}).save(planted)
    try:
        for folder in (moved, out):
            shutil.rmtree(folder, ignore_errors=True)
        merge(applying(planted, str(tuned), "m0"), moved)
        (work / "align.json").write_text(json.dumps({"models": [str(base), str(moved)]}))
        before, begun = os.times(), time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.alignment", str(work)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        wall, after = time.perf_counter() - begun, os.times()
        if ran.returncode:
            raise SystemExit(ran.stderr)
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        told: dict[str, Any] = json.loads(ran.stdout)
        found = Permutations.open(out / "alignment.safetensors").models[str(moved)]
        right = spec.then(spec.random(SEED), found)
        wrong = sum(int((index != np.arange(len(index))).sum()) for index in right.values())
        Console(width=150).print(
            f"aligning two models of {shape.parameters / 1e9:.2f} billion parameters: {wall:.1f} s, {cpu:.1f} CPU s, "
            f"peak {told['rss_mb']:,.0f} MB (planned {told['planned_mb']:,.0f}: the limit of 1,074 MB and at most "
            f"{told['assignment_mb']:,.0f} for an assignment); {wrong:,} of {sum(spec.permutations.values()):,} "
            "elements not where they were"
        )
    finally:
        for folder in (moved, out):
            shutil.rmtree(folder, ignore_errors=True)
        planted.unlink(missing_ok=True)


def _aligned(work: Path) -> dict[str, float]:
    """Align, and say what it took."""
    document = AlignmentDocument.from_text((work / "align.json").read_bytes())
    plan = plan_only(document).plan
    align(document, work / "aligned", cache=work / "cache")
    return {"rss_mb": peak() / 1e6, "planned_mb": plan.peak / 1e6, "assignment_mb": plan.assignment / 1e6}


if __name__ == "__main__":
    main()
