"""The authors' own numbers, through whole merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden import run_case

FOLDER = Path(__file__).parents[1] / "data" / "golden"
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_golden_case(case: dict[str, Any], tmp_path: Path) -> None:
    assert run_case(FOLDER, case, tmp_path) == ""
