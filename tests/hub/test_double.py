"""The double is a Hub to the real client: whatever it says here, workers may be told by the real one."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from tests.hub import Hub, running_hub
from tests.hub.conftest import LOWEST

ROOT = Path(__file__).parents[2]


def run_round(hub: Hub, folder: Path, *, path: Path | None = None, xet: bool) -> str:
    """Let the client, of the version under `path`, do its whole round; the version that did it."""
    hub.put("alice/open", {"a.txt": b"a"})
    hub.put("org/gated", {"config.json": b"{}"}, gated="manual")
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(str(each) for each in (path, ROOT) if each),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "" if xet else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "tests.hub.round", folder, hub.endpoint, hub.alice.token, hub.bob.token]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.leaks == []
    shards = {path: entry for path, entry in hub.repos["alice/merged"].files().items() if entry.is_lfs}
    assert all(bool(entry.xet_hash) is xet for entry in shards.values()) and len(shards) == 2
    if not xet:
        assert [hub.uploads[entry.sha256] for entry in shards.values()] == [1, 1]
    return done.stdout.strip()


@pytest.mark.parametrize("how", [pytest.param("whole", marks=pytest.mark.slow), "in parts", "xet"])
def test_the_client_does_its_whole_round(tmp_path: Path, how: str) -> None:
    with running_hub(tmp_path / "hub", xet=how == "xet", part=100_000 if how == "in parts" else None, page=2) as hub:
        assert run_round(hub, tmp_path / "client", xet=how == "xet") == importlib.metadata.version("huggingface-hub")
        assert len(hub.asked("^PUT /part")) == (6 if how == "in parts" else 0)


@pytest.mark.slow
def test_the_lowest_client_that_is_allowed_does_it_too(tmp_path: Path, lowest_client: Path) -> None:
    allowed = re.search(r'"huggingface-hub>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    assert allowed is not None and LOWEST.startswith(allowed[1])
    for xet in (False, True):
        with running_hub(tmp_path / f"hub-{xet}", xet=xet) as hub:
            assert run_round(hub, tmp_path / f"client-{xet}", path=lowest_client, xet=xet) == LOWEST


def fetch(hub: Hub, path: str, **headers: str) -> httpx2.Response:
    with httpx2.Client(trust_env=False, timeout=60, follow_redirects=True) as client:
        return client.get(hub.endpoint + path, headers=headers)


def test_what_is_asked_is_written_down_and_goes_wrong_as_told(tmp_path: Path) -> None:
    data = os.urandom(200_000)
    file = "/org/model/resolve/main/model.safetensors"
    with running_hub(tmp_path) as hub:
        hub.put("org/model", {"model.safetensors": data})
        assert fetch(hub, file).content == data
        assert fetch(hub, file, range="bytes=10-19").content == data[10:20]
        assert [(each.host, each.status, each.sent) for each in hub.asked("^GET")] == [
            ("hub", 302, 0),
            ("cdn", 200, len(data)),
            ("hub", 302, 0),
            ("cdn", 206, 10),
        ]

        hub.fail("/resolve/", times=2, status=503)
        hub.fail("/resolve/", times=1, status=429, headers={"Retry-After": "3"})
        answers = [fetch(hub, file) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [503, 503, 429, 200]
        assert answers[2].headers["retry-after"] == "3"

        hub.fail("/objects/", cut=1000)
        with pytest.raises(httpx2.RemoteProtocolError):
            fetch(hub, file)

        hub.fail("/objects/", flip=150_000)
        found = fetch(hub, file, range="bytes=149999-150001").content
        assert found == bytes([data[149_999], data[150_000] ^ 0xFF, data[150_001]])

        with httpx2.Client(trust_env=False, timeout=60) as client:
            link = client.get(hub.endpoint + file).headers["location"]
            assert client.get(link).status_code == 200
            hub.expire_links()
            assert client.get(link).status_code == 403

        entry = hub.repos["org/model"].files()["model.safetensors"]
        entry.told_size, entry.told_sha256, entry.told_path = 7, "0" * 64, "../../model.safetensors"
        (told,) = fetch(hub, "/api/models/org/model/tree/main").json()
        assert (told["size"], told["lfs"]["oid"], told["path"]) == (7, "0" * 64, "../../model.safetensors")


def test_a_commit_may_be_made_though_its_answer_is_lost(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        hub.put("alice/model", {"a.txt": b"a"})
        hub.fail("/commit/", status=503, afterwards=True)
        header = '{"key": "header", "value": {"summary": "It", "description": ""}}\n'
        headers = {"Authorization": f"Bearer {hub.alice.token}"}
        with httpx2.Client(trust_env=False, timeout=60, headers=headers) as client:
            answer = client.post(f"{hub.endpoint}/api/models/alice/model/commit/main", content=header)
        assert answer.status_code == 503
        assert [commit.title for commit in hub.commits("alice/model")] == ["It", "Upload"]
