"""The command line, as its user meets it."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from app.cli import main
from merge_core import kernels
from tests.conftest import method_recipe
from tests.services import running_service


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: object, cwd: Path, status: int = 1) -> str:
    """What a command says that cannot be, without a process of its own."""
    monkeypatch.chdir(cwd)
    ran = CliRunner().invoke(main, list(map(str, arguments)))
    assert ran.exit_code == status, ran.output
    assert ran.exception is None or isinstance(ran.exception, SystemExit)
    return ran.stderr


def weightsmith(
    *arguments: object, cwd: Path, status: int = 0, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *map(str, arguments)]
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, input=stdin, timeout=600)
    assert ran.returncode == status, ran.stderr
    assert "Traceback" not in ran.stderr
    return ran


@pytest.fixture
def recipe(models: Path) -> Path:
    path = models / "recipe.yml"
    path.write_text(yaml.safe_dump(method_recipe("ties-paper")))
    return path


def test_help_is_quick_and_names_the_commands(tmp_path: Path) -> None:
    told = weightsmith("--help", cwd=tmp_path).stdout
    assert all(command in told for command in ("serve", "worker", "merge", "plan", "submit"))
    imports = f"{sys.executable} -X importtime -m app.cli --help"
    loaded = subprocess.run(imports.split(), cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert " torch" not in loaded


def test_merge_and_plan(models: Path, recipe: Path) -> None:
    told = weightsmith("plan", recipe, "--steps", cwd=models).stdout
    assert "measured per model" in told and "lm_head.weight  bfloat16[96, 24]" in told
    planned = json.loads(weightsmith("plan", "-", "--json", cwd=models, stdin=recipe.read_text()).stdout)
    assert planned["passes"] == (3 if kernels.are_compiled() else 4)

    done = weightsmith("merge", recipe, "out", "--shard-size", "10KB", "--threads", 1, "--memory", "600MiB", cwd=models)

    assert done.stdout.startswith("out: 20 tensors")
    shards = sorted((models / "out").glob("*.safetensors"))
    assert len(shards) > 1 and sum(len(load_file(shard)) for shard in shards) == 20
    assert "is not an empty folder" in weightsmith("merge", recipe, "out", cwd=models, status=1).stderr


def test_patches_go_on_and_come_off(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: starting others takes most of the time of such a test."""
    monkeypatch.chdir(models)

    def ran(*arguments: object, status: int = 0) -> str:
        result = CliRunner().invoke(main, ["patch", *map(str, arguments)])
        assert result.exit_code == status, result.output
        return result.output

    asked = ["--base", "base", "--clean", "m0", "--corrupted", "m1", "--layer", "q_proj", "--levels", 16]
    assert ran("extract", "signature", *asked).startswith("signature: 6 tensors")
    told = ran("inspect", "signature")
    assert told.startswith("robust weight signature: 3 tensors in") and "corrupted   m1" in told
    assert "model.layers.2.self_attn.q_proj.weight  bfloat16[24, 24]  levels, 296 bytes" in told
    assert json.loads(ran("inspect", "signature", "--json"))["provenance"]["clean"] == "m0"

    ran("apply", "m2", "on", "-p", "signature", 0.5)
    ran("remove", "on", "off")

    on, off = (load_file(models / name / "model.safetensors") for name in ("on", "off"))
    assert sum(not torch.equal(on[name], off[name]) for name in off) == 3
    before = load_file(models / "m2" / "model-00001-of-00002.safetensors")
    assert all(torch.equal(off[name], before[name]) for name in before)
    assert "m2 has no reversal.safetensors and no merge.lock.json" in ran("remove", "m2", "again", status=1)
    assert "either --layers or --layer" in ran("extract", "more", *asked, "--layers", 1, status=2)
    assert "replace/0: no tensor's name contains" in ran("extract", "more", *asked, "--replace", "odd", status=1)


def test_mistakes_are_one_message(models: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.write_text(recipe.read_text().replace("ties", "tise"))
    assert weightsmith("merge", recipe, "out", cwd=models, status=1).stderr == (
        "error: merge_method: there is no method 'tise'; did you mean ties?\n"
    )
    assert not (models / "out").exists()
    told = partial(refused, monkeypatch, cwd=models)
    assert "is not a size" in told("merge", recipe, "out", "--memory", "lots", status=2)
    recipe.write_text(yaml.safe_dump(method_recipe("ties-paper", outputs={"hub": {"repo": "alice/merged"}})))
    assert "outputs/hub: a service" in told("merge", recipe, "out")
    assert "cannot be reached" in told("submit", recipe, "--url", "http://127.0.0.1:1")


def test_what_cannot_be_read_or_reached_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "file").touch()
    good = tmp_path / "good.yml"
    good.write_text(yaml.safe_dump(method_recipe("linear")))
    for arguments in (
        ["merge", "bytes.yml", "out"],
        ["plan", "bytes.yml"],
        ["merge", good, "file/out"],
        ["merge", good, "file"],
        ["submit", good, "--url", "http://[::1"],
        ["serve", "--data", "file"],
    ):
        told = refused(monkeypatch, *arguments, cwd=tmp_path)
        assert told.startswith("error: "), told
    refused(monkeypatch, "merge", good, "out", "--shard-size", "0", cwd=tmp_path, status=2)
    refused(monkeypatch, "submit", good, "--url", "http://127.0.0.1:1", "--download", "file", cwd=tmp_path, status=2)


def test_a_server_that_is_not_ours_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Html(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Html) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "r.yml").write_text("{}")
        url = f"http://127.0.0.1:{server.server_port}"
        told = refused(monkeypatch, "submit", "r.yml", "--url", url, cwd=tmp_path)
        server.shutdown()
    assert "does not answer like Weightsmith" in told


@pytest.mark.xdist_group("service")
def test_submit_wait_download(models: Path, recipe: Path, tmp_path: Path) -> None:
    with running_service(tmp_path / "data", models) as service:
        ran = weightsmith("submit", recipe, "--url", service.url, "--wait", "--download", tmp_path / "here", cwd=models)
        job_id = ran.stdout.splitlines()[0]
        job = service.get(f"/v1/merges/{job_id}")
        assert job["status"] == "succeeded"
        assert {path.name for path in (tmp_path / "here").iterdir()} == service.files(job).keys()

        def jobs(*arguments: object, status: int = 0) -> str:
            ran = CliRunner().invoke(main, ["jobs", *map(str, arguments), "--url", service.url])
            assert ran.exit_code == status, ran.output
            return ran.output

        assert jobs("list", "--status", "succeeded").startswith(job_id) and jobs("list", "--status", "failed") == ""
        assert "model.safetensors" in jobs("show", job_id) and json.loads(jobs("show", job_id, "--json")) == job
        jobs("watch", job_id)
        assert "succeeded" in jobs("cancel", job_id, "mrg_1", status=1)
        assert jobs("download", job_id, tmp_path / "again").count("\n") == len(service.files(job))
        assert "no job's id" in jobs("show", "x", status=1)
        assert jobs("delete", job_id) == f"{job_id}  deleted\n" and jobs("list") == ""

        broken = recipe.with_name("broken.yml")
        broken.write_text("merge_method: ties\nmodels: [{model: nowhere}]\nbase_model: base\nparameters: {weight: 1}\n")
        refused = weightsmith("submit", broken, "--url", service.url, "--wait", cwd=models, status=1).stderr
        assert "nowhere" in refused
    weightsmith("merge", recipe, tmp_path / "local", cwd=models)
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "here" / path.name).read_bytes() == path.read_bytes()
