"""Settings reach the worker whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workers.settings import Settings

OTHERS: dict[str, Any] = {
    "data": Path("/srv/weights"),
    "model_roots": [Path("/a:b"), Path("/c")],
    "redis_url": "redis://:x@y/0",
    "threads": 3,
    "device": "auto",
    "max_memory": 123,
    "keep_local": True,
    "log_format": "json",
    "lease_seconds": 0.25,
}


@pytest.mark.parametrize("given", [{}, OTHERS], ids=["defaults", "others"])
def test_a_worker_reads_the_settings_that_its_supervisor_has(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**given)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)

    read = Settings()

    assert read.roots == settings.roots and read.data == settings.data.absolute()
    same = {name: getattr(settings, name) for name in Settings.model_fields if name not in ("data", "model_roots")}
    assert {name: getattr(read, name) for name in same} == same
