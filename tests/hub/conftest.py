"""What the tests of both directions need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LOWEST = "1.31.0"
"""Of huggingface_hub, what pyproject.toml allows."""


@pytest.fixture(scope="session")
def lowest_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH, with the lowest huggingface_hub that is allowed and what it needs."""
    folder = tmp_path_factory.mktemp("lowest")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, f"huggingface-hub=={LOWEST}"]
    subprocess.run(command, check=True)
    return folder
