"""Memory is a contract: the plan says the most, the process is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merge_core.recipe import Recipe
from tests.conftest import METHOD_RECIPES, method_recipe, write_checkpoint

PROGRAM = """
import json, sys
from pathlib import Path
from merge_core.merge import merge, plan_only
from merge_core.recipe import Recipe
recipe, models, out = Recipe.from_text(sys.argv[1]), [Path(sys.argv[2])], sys.argv[3]
planned = plan_only(recipe, roots=models, threads=2).memory.peak
merge(recipe, out, roots=models, threads=2)
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps([planned, int(status["VmHWM"].split()[0]) * 1024]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and three fine-tunes, each one tensor of 96 MB in bf16: 768 MB where all are held in float32."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        tensor = torch.randn(48_000, 1000, generator=torch.Generator().manual_seed(seed)).bfloat16()
        write_checkpoint(folder / name, {"model.embed.weight": tensor})
        del tensor
    return folder


@pytest.mark.parametrize("title", METHOD_RECIPES)
def test_the_process_stays_under_its_limit_and_under_its_plan(large: Path, tmp_path: Path, title: str) -> None:
    recipe = json.dumps(method_recipe(title, limits={"memory": "512MiB"}))
    Recipe.from_text(recipe)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, recipe, str(large), str(tmp_path / "out")],
        check=True,
        capture_output=True,
        text=True,
    )
    planned, measured = json.loads(ran.stdout)
    assert measured <= planned <= 512 * 2**20
