"""Adding a merge method is adding one file: in a copy of the project with one more, all know the method."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import CONFIG, mixed_tensors, write_checkpoint

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "writing-a-method.md").read_text()
ONE_FILE = PAGE.partition("```python method\n")[2].partition("```\n")[0]
LOOK = """
import json, sys
from pathlib import Path
from fastapi.testclient import TestClient
from app.main import create_app
from merge_core.merge import merge
from merge_core.methods import METHODS
from merge_core.recipe import Recipe
from tests.conftest import method_recipe
from workers.settings import Settings

models, out = map(Path, sys.argv[1:])
recipe = {"merge_method": "halfway", "base_model": "base", "models": [{"model": "one"}], "parameters": {"share": 0.25}}
merge(Recipe.from_data(recipe), out / "merged", roots=[models])
with TestClient(create_app(Settings(data=out / "data", model_roots=[models]))) as client:
    listed = {method["name"]: method for method in client.get("/v1/methods").json()["data"]}
    found = {
        "package": METHODS["halfway"]["mergekit"].__module__,
        "listed": listed["halfway"],
        "alone": client.get("/v1/methods/halfway").json()["data"],
        "document": client.get("/openapi.json").json()["components"]["schemas"]["Recipe"]["properties"]["merge_method"],
        "validated": client.post("/v1/recipes:validate", json=recipe).status_code,
        "example": method_recipe("halfway"),
        "mistaken": client.post("/v1/recipes:validate", json={**recipe, "merge_method": "halfwya"}).text,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's code with the one file more; without what numba compiled, and so without numba."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("app", "workers", "merge_core", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "merge_core" / "methods" / "halfway.py").write_text(ONE_FILE)
    return folder


def run(copy: Path, *arguments: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy), "WEIGHTSMITH_KERNELS": "plain"}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_file_more_is_a_method_more_in_recipes_and_in_the_api(copy: Path, tmp_path: Path) -> None:
    base, one = mixed_tensors(0), mixed_tensors(1)
    write_checkpoint(tmp_path / "models" / "base", base, config=CONFIG)
    write_checkpoint(tmp_path / "models" / "one", one, config=CONFIG)

    found: dict[str, Any] = json.loads(run(copy, "-c", LOOK, tmp_path / "models", tmp_path))

    assert found["package"] == "merge_core.methods.halfway" and [found["listed"]] == found["alone"]
    assert found["listed"]["parameters"]["properties"]["share"]["description"] == "s: how far to go"
    assert "halfway" in found["document"]["enum"]
    assert found["example"]["parameters"] == {"share": 0.25} and len(found["example"]["models"]) == 1
    assert found["validated"] == 200 and "did you mean halfway?" in found["mistaken"]
    merged = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
    start, end = base["lm_head.weight"].float(), one["lm_head.weight"].float()
    assert torch.equal(merged, (start + 0.25 * (end - start)).bfloat16())


def test_a_file_more_is_tested_by_the_contract(copy: Path) -> None:
    said = run(
        copy, "-m", "pytest", "-p", "no:cacheprovider", "tests/merge_core/test_method_contract.py", "-k", "halfway"
    )
    assert int(said.split(" passed")[0].split()[-1]) >= 8
