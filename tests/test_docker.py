"""What can be known of docker/ without an engine; `make docker-smoke` tries the rest."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from workers.settings import Settings

FOLDER = Path(__file__).parents[1] / "docker"
FILES = ("compose.yaml", "compose.gpu.yaml", "compose.dev.yaml")


def services(file: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / file).read_text())["services"])


@pytest.mark.parametrize("name", ["api", "worker", "migrate", "secrets"])
def test_what_is_ours_is_confined(name: str) -> None:
    service = services("compose.yaml")[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_only_the_api_can_be_reached_and_from_this_machine_alone() -> None:
    found = services("compose.yaml")
    assert {name for name, service in found.items() if "ports" in service} == {"api"}
    assert found["api"]["ports"] == ["${WEIGHTSMITH_LISTEN:-127.0.0.1:8000}:8000"]
    assert found["redis"]["networks"] == found["postgres"]["networks"] == ["back"]
    networks = yaml.safe_load((FOLDER / "compose.yaml").read_text())["networks"]
    assert networks["back"]["internal"]


@pytest.mark.parametrize("name", ["api", "worker"])
def test_memory_is_what_the_settings_allow_and_a_gibibyte(name: str) -> None:
    variable = {"api": "WEIGHTSMITH_VIEW_MEMORY", "worker": "WEIGHTSMITH_MAX_MEMORY"}[name]
    service = services("compose.yaml")[name]
    default = re.fullmatch(rf"\${{{variable}:-(\d+)GiB}}", service["environment"][variable])
    assert default is not None and service["mem_limit"] == f"{int(default[1]) + 1}g"


@pytest.mark.parametrize("file", [*FILES, "Dockerfile"])
def test_settings_that_are_named_exist(file: str) -> None:
    of_the_composition = {f"WEIGHTSMITH_{name}" for name in ("MODELS", "LISTEN", "EXTRAS", "TAG", "GPU_MEMORY")}
    known = of_the_composition | {*Settings.variables().values()}
    assert set(re.findall(r"\bWEIGHTSMITH_\w+", (FOLDER / file).read_text())) <= known


def test_further_files_speak_of_services_there_are() -> None:
    known = services("compose.yaml").keys()
    for file in FILES[1:]:
        assert services(file).keys() <= known


def test_each_image_says_whether_it_is_well() -> None:
    _, *stages = re.split(r"^FROM .* AS (\w+)\n", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    found = dict(zip(stages[::2], stages[1::2], strict=True))
    assert found.keys() == {"build", "common", "worker", "api"}
    assert all("\nHEALTHCHECK " in found[target] and "\nCMD " in found[target] for target in ("worker", "api"))
    assert "\nUSER 10001:10001\n" in found["common"]


def test_secrets_are_made_once_and_for_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> dict[str, str]:
        subprocess.run([FOLDER / "make-secrets", tmp_path], check=True, capture_output=True)
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    first = made()
    assert made() == first
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    monkeypatch.setenv("WEIGHTSMITH_SECRETS", str(tmp_path))
    assert {name for name in Settings().model_fields_set if name != "secrets"} >= {"secret_key", "webhook_key"}
    assert Settings().database_url == f"postgresql://weightsmith:{first['postgres_password']}@postgres/weightsmith"
    (tmp_path / "weightsmith_secret_key").unlink()
    again = made()
    assert again["weightsmith_secret_key"] != first["weightsmith_secret_key"]
    assert json.dumps(again | {"weightsmith_secret_key": ""}) == json.dumps(first | {"weightsmith_secret_key": ""})
    assert os.access(FOLDER / "make-secrets", os.X_OK)
