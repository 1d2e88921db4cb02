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


def test_secrets_may_be_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Docker and others mount them; what the environment says goes before."""
    (tmp_path / "database_url").write_text("postgresql://user:password@host/database\n")
    (tmp_path / "weightsmith_secret_key").write_text("from-a-file\n")
    monkeypatch.setenv("WEIGHTSMITH_SECRETS", str(tmp_path))
    read = Settings()
    assert read.database_url == "postgresql://user:password@host/database"
    assert read.secret_key is not None and read.secret_key.get_secret_value() == "from-a-file"

    monkeypatch.setenv("WEIGHTSMITH_SECRET_KEY", "from-the-environment")
    read = Settings()
    assert read.secret_key is not None and read.secret_key.get_secret_value() == "from-the-environment"

    monkeypatch.setenv("WEIGHTSMITH_SECRETS", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="WEIGHTSMITH_SECRETS: there is no folder"):
        Settings()
