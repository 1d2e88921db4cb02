"""`make docker-smoke`: build the images, start the composition, merge through it with two workers of which one is
killed, and hold everything against what docs/deployment.md says.

It needs a Docker engine with Compose; `--if-there` says loudly that there is none, and is content.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch

from app.client import Client, Job
from merge_core import __version__
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import write_checkpoint
from tests.services import eventually, free_port

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docker"
ADDRESS = "http://127.0.0.1:8000"
"""Where the pages say that the service is."""
TAG = "smoke"
TARGETS = ("api", "worker")
RECIPE: dict[str, Any] = {
    "merge_method": "della",
    "base_model": "base",
    "models": [{"model": "chat"}, {"model": "code"}, {"model": "m3"}],
    "parameters": {"weight": 0.5, "density": 0.4, "epsilon": 0.1},
    "outputs": {"max_shard_size": "20MB"},
    "limits": {"threads": 1},
    "seed": 7,
}
STAND_IN = """
set -eu
data=/var/lib/postgresql/data
bin=$(echo /usr/lib/postgresql/*/bin)
run() { setpriv --reuid postgres --regid postgres --init-groups "$@"; }
if [ ! -e "$data/PG_VERSION" ]; then
  install -d -m 700 -o postgres -g postgres "$data"
  install -m 600 -o postgres -g postgres "$POSTGRES_PASSWORD_FILE" /tmp/password
  run "$bin/initdb" -D "$data" -U "$POSTGRES_USER" --pwfile /tmp/password -E UTF8 >/dev/null
  echo 'host all all all scram-sha-256' >> "$data/pg_hba.conf"
  run "$bin/pg_ctl" -D "$data" -w -o "-c listen_addresses=" start >/dev/null
  run "$bin/createdb" -U "$POSTGRES_USER" "$POSTGRES_DB"
  run "$bin/pg_ctl" -D "$data" -w stop >/dev/null
fi
exec setpriv --reuid postgres --regid postgres --init-groups "$bin/postgres" -D "$data" -c 'listen_addresses=*'
"""
"""What the official image of PostgreSQL does with its variables, for a plain one in its place."""
started = time.monotonic()


def tell(what: str) -> None:
    print(f"{time.monotonic() - started:6.1f} s  {what}", flush=True)


def ran(*command: object, **options: Any) -> str:
    """What a command says. Raises `AssertionError` with all of it where it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=FOLDER, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def docker(*arguments: object) -> str:
    return ran("docker", *arguments, env=os.environ | {"DOCKER_BUILDKIT": "1"})


def why_not() -> str | None:
    """Why there is nothing to try it on."""
    if shutil.which("docker") is None:
        return "no docker command is here"
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        return "no Docker engine answers (DOCKER_HOST, or its usual socket)"
    return None if compose_command() else "neither `docker compose` nor `docker-compose` is here"


def compose_command() -> list[str]:
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else []


def inspected(container: str) -> dict[str, Any]:
    return dict(json.loads(docker("inspect", container))[0])


@dataclass
class Composition:
    """The composition of compose.yaml under a name of its own, with what `scratch` has beside it."""

    name: str
    scratch: Path
    port: int = field(default_factory=free_port)

    @property
    def models(self) -> Path:
        return self.scratch / "models"

    @property
    def command(self) -> list[str]:
        files = [FOLDER / "compose.yaml", self.scratch / "override.yaml"]
        command = compose_command()
        if command == ["docker-compose"]:  # of the years before a file had a name for its project
            nameless = self.scratch / "compose.yaml"
            nameless.write_text(re.sub(r"^name: .*\n", "", files[0].read_text(), flags=re.MULTILINE))
            files[0] = nameless
        options = [part for file in files for part in ("--file", str(file))]
        return [*command, "--project-name", self.name, "--project-directory", str(FOLDER), *options]

    @property
    def environment(self) -> dict[str, str]:
        ours = {"WEIGHTSMITH_TAG": TAG, "WEIGHTSMITH_MODELS": str(self.models)}
        return os.environ | ours | {"WEIGHTSMITH_LISTEN": f"127.0.0.1:{self.port}"}

    def compose(self, *arguments: object) -> str:
        return ran(*self.command, *arguments, env=self.environment)

    def containers(self, service: str) -> list[str]:
        # docker-compose of Debian does not list those that have ended.
        labels = [f"label=com.docker.compose.{key}" for key in (f"project={self.name}", f"service={service}")]
        return sorted(
            docker("ps", "--all", "--quiet", "--no-trunc", "--filter", labels[0], "--filter", labels[1]).split()
        )

    def container(self, service: str) -> str:
        (only,) = self.containers(service)
        return only

    def is_healthy(self) -> bool:
        """Whether all have got well; raises if one never will."""
        for service in ("secrets", "migrate"):
            for state in (inspected(each)["State"] for each in self.containers(service)):
                assert state["Status"] != "exited" or state["ExitCode"] == 0, self.compose("logs", service)
        found = [each for service in ("redis", "postgres", *TARGETS) for each in self.containers(service)]
        return all(inspected(each)["State"].get("Health", {}).get("Status") == "healthy" for each in found)

    def logs(self, container: str) -> str:
        result = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=True)
        return result.stdout + result.stderr

    def left(self) -> list[str]:
        """What there is of it on the engine."""
        label = f"label=com.docker.compose.project={self.name}"
        found = docker("ps", "--all", "--quiet", "--filter", label)
        found += docker("volume", "ls", "--quiet", "--filter", label) + docker(
            "network", "ls", "--quiet", "--filter", label
        )
        return found.split()


@contextmanager
def composition() -> Iterator[Composition]:
    """A composition that is not started yet, and of which nothing is left."""
    with tempfile.TemporaryDirectory(prefix="weightsmith-smoke-") as scratch:
        Path(scratch).chmod(0o755)  # another user's container reads the models
        made = Composition(f"weightsmith-smoke-{os.getpid()}", Path(scratch))
        try:
            yield made
        except BaseException:
            for service in (*TARGETS, "migrate", "postgres"):
                for container in made.containers(service):
                    print(f"--- {service} {container[:12]}\n{made.logs(container)[-6000:]}", file=sys.stderr)
            raise
        finally:
            if (made.scratch / "override.yaml").exists():
                made.compose("down", "--volumes", "--remove-orphans", "--timeout", 1)
            images = [f"weightsmith-{target}:{TAG}" for target in TARGETS]
            docker("image", "rm", "--force", *images)
            assert not made.left()


def build() -> None:
    # Where pip is told about packages by the environment or the base image, it is not to ask PyTorch's index besides.
    has_wheels = "PIP_FIND_LINKS" in os.environ
    index = os.environ.get("TORCH_INDEX", "" if has_wheels else None)
    arguments = [] if index is None else ["--build-arg", f"TORCH_INDEX={index}"]
    for target in TARGETS:
        image = f"weightsmith-{target}:{TAG}"
        docker("build", "--network=host", *arguments, "--file", "Dockerfile", "--target", target, "--tag", image, "..")
        size = int(docker("image", "inspect", "--format", "{{.Size}}", image))
        tell(f"image {target}: {size / 1e9:.2f} GB with its base")


def shown(page: str) -> list[str]:
    """The commands of a page that need an engine, block by block."""
    return re.findall(r"^```sh docker\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)


class Reader:
    """Somebody who types what the pages show: `docker compose` is this composition for them."""

    def __init__(self, world: Composition) -> None:
        self.world, self.place = world, world.scratch / "clone" / "docker"
        self.place.mkdir(parents=True)
        programs = world.scratch / "bin"
        programs.mkdir()
        # Their images are built already; a file besides compose.yaml is added to what there is.
        (programs / "docker").write_text(
            f"""#!/bin/sh
[ "$1" = compose ] || exec {shutil.which("docker")} "$@"
shift
[ "$1" = build ] && exit
[ "$1 $2" = "-f compose.yaml" ] && shift 2
[ "$1" = -f ] && {{ file=$2; shift 2; set -- --file "{FOLDER}/$file" "$@"; }}
exec {shlex.join(world.command)} "$@"
"""
        )
        (programs / "docker").chmod(0o755)
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        self.environment = world.environment | {"PATH": path}

    def types(self, block: str) -> str:
        """What the commands say; each block begins in the folder `docker`."""
        text = block.replace("cd docker\n", "").replace(ADDRESS, f"http://127.0.0.1:{self.world.port}")
        text = text.replace("curl ", "curl --fail-with-body --silent --show-error ")
        command = ["bash", "-euo", "pipefail", "-c", text]
        result = subprocess.run(command, cwd=self.place, env=self.environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout


def keep_house(world: Composition, reader: Reader, client: Client, job: Job) -> None:
    """Backup, restore, upgrade and the change of the secret key, as docs/operations.md shows them."""
    backup, restore, upgrade, rotation = shown("operations.md")
    client.credentials.put("hub", kind="hub-token", token="hf_of_nobody")
    before = {file.path: file.sha256 for file in client.merges.files(job)}
    reader.types(backup)
    client.merges.delete(job)
    reader.types(restore)
    eventually(world.is_healthy, 120)
    client.merges.download(job, world.scratch / "restored")
    assert {file.path: file.sha256 for file in client.merges.files(job)} == before
    for path in before:
        assert (world.scratch / "restored" / path).read_bytes() == (world.scratch / "downloaded" / path).read_bytes()
    sizes = {path.name: path.stat().st_size for path in reader.place.iterdir()}
    tell(f"a merge that was deleted came back from the backup ({sizes['backup.dump'] / 1e3:.0f} kB of database)")
    reader.types(upgrade)
    eventually(world.is_healthy, 120)
    tell("upgraded, to the same version: migrated again and healthy")
    assert "1 sealed anew" in reader.types(rotation)
    eventually(world.is_healthy, 120)
    assert "1 sealed anew" in docker("exec", world.container("api"), "weightsmith", "reseal")
    assert [each.name for each in client.credentials.list()] == ["hub"]
    tell("the secret key is another one, and the stored credential opens under it alone")


def make_models(folder: Path) -> None:
    for seed, name in enumerate(["base", "chat", "code", "m3"]):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{n}.weight": torch.randn(1000, 2000, generator=generator).bfloat16() for n in range(20)}
        for file in write_checkpoint(folder / name, tensors, shards=2).iterdir():
            file.chmod(0o644)


def override(is_stand_in: bool) -> dict[str, Any]:
    """What differs from how it is usually run: leases that end sooner, and units that are small beside the models."""
    quick = {"WEIGHTSMITH_LEASE_SECONDS": "6", "WEIGHTSMITH_UNIT_BYTES": "4MB", "WEIGHTSMITH_ALONE_SECONDS": "0"}
    services: dict[str, Any] = {name: {"environment": quick} for name in TARGETS}
    if is_stand_in:
        services["postgres"] = {"entrypoint": ["bash", "-c", STAND_IN.replace("$", "$$")]}
    return {"services": services}


def is_stand_in(image: str) -> bool:
    """Whether an image that is here has not the official one's entrypoint."""
    if subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode:
        return False
    there = ["test", "-e", "/usr/local/bin/docker-entrypoint.sh"]
    return (
        subprocess.run(
            ["docker", "run", "--rm", "--network=none", "--entrypoint", *there[:1], image, *there[1:]]
        ).returncode
        != 0
    )


def check_confinement(world: Composition) -> None:
    """Nobody is root, nothing can be written but what is to be, and Redis and PostgreSQL are within."""
    for service in TARGETS:
        for container in world.containers(service):
            assert docker("exec", container, "id", "-u").strip() == "10001"
            found = inspected(container)["HostConfig"]
            assert found["ReadonlyRootfs"] and found["CapDrop"] == ["ALL"] and not found["Privileged"]
            refused = subprocess.run(
                ["docker", "exec", container, "touch", "/opt/here"], capture_output=True, text=True
            )
            assert refused.returncode and "Read-only file system" in refused.stderr
            compilers = "for each in gcc cc g++ clang ld; do command -v $each; done; true"
            assert not docker("exec", container, "sh", "-c", compilers)
            environment = " ".join(inspected(container)["Config"]["Env"])
            password = docker("exec", container, "cat", "/run/secrets/postgres_password").strip()
            assert len(password) > 40 and password not in environment
    version = docker("exec", world.container("api"), "weightsmith", "--version")
    assert version.strip().endswith(__version__), version
    tell("api and workers: uid 10001, read-only root, no capabilities, no compiler, no secret in the environment")
    for service in ("redis", "postgres"):
        found = inspected(world.container(service))
        assert not any(found["NetworkSettings"]["Ports"].values()) and not found["HostConfig"]["PortBindings"]
        networks = list(found["NetworkSettings"]["Networks"])
        assert networks == [f"{world.name}_back"], networks
    assert json.loads(docker("network", "inspect", f"{world.name}_back"))[0]["Internal"]
    published = inspected(world.container("api"))["NetworkSettings"]["Ports"]["8000/tcp"]
    assert {each["HostIp"] for each in published} == {"127.0.0.1"}
    tell("Redis and PostgreSQL are published nowhere, on a network without a way out; the API on loopback alone")


def check_contents(world: Composition) -> None:
    """All of the packages is in the images, templates and scripts too."""
    packages = ("app", "workers", "merge_core")
    here = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    find = f"cd /opt/weightsmith/lib/python3*/site-packages && find {' '.join(packages)} -type f"
    find += " -not -path '*__pycache__*'"
    for target in TARGETS:
        there = set(docker("exec", world.containers(target)[0], "sh", "-c", find).split())
        assert there == here, there ^ here
    tell(f"both images have all {len(here)} files of the packages")


def check_health(world: Composition) -> None:
    url = f"http://127.0.0.1:{world.port}"
    ready = httpx2.get(f"{url}/readyz", trust_env=False).json()
    assert {name: check["status"] for name, check in ready["checks"].items()} == dict.fromkeys(ready["checks"], "ok")
    assert "2 reported" in ready["checks"]["workers"]["detail"]
    assert httpx2.get(f"{url}/v1/merges", trust_env=False).status_code == 401
    tell("ready: " + ", ".join(f"{name} {check['status']}" for name, check in ready["checks"].items()))


def leader(world: Composition, job: Job) -> str | None:
    """The container whose worker has the job."""
    begun = [each for each in world.containers("worker") if _says(world, each, job, "attempt 1 begins")]
    return begun[0] if begun else None


def _says(world: Composition, container: str, job: Job, words: str) -> bool:
    return any(job.id in line and words in line for line in world.logs(container).splitlines())


def merge_and_kill(world: Composition, client: Client) -> Job:
    """A merge whose leading worker is killed in its middle has the library's bytes."""
    workers = world.containers("worker")
    docker("update", "--cpus", "0.5", *workers)  # long enough to be killed in the middle of it
    job = client.merges.submit(RECIPE)
    eventually(lambda: client.merges.get(job).progress.tensors_done >= 2, 120)
    victim = leader(world, job)
    assert victim is not None, "nobody says that the job is at work"
    docker("kill", victim)
    docker("update", "--cpus", "2", *workers)
    then = client.merges.get(job)
    assert then.status == "running" and then.progress.tensors_done < then.progress.tensors_total
    tell(f"worker {workers.index(victim) + 1} of {len(workers)} killed at {then.progress.tensors_done} tensors of 20")
    job = client.merges.wait(job)
    assert job.attempt == 2, job
    other = next(each for each in workers if each != victim)
    assert _says(world, other, job, "attempt 2 begins")
    tell(f"the other one went on and succeeded: attempt {job.attempt}")
    downloaded = world.scratch / "downloaded"
    client.merges.download(job, downloaded)
    whole = merge(Recipe.from_data(RECIPE), world.scratch / "whole", roots=[world.models])
    shards = {file.path: file.sha256 for file in whole.files if file.path.endswith(".safetensors")}
    assert len(shards) >= 4
    assert {file.path: file.sha256 for file in client.merges.files(job) if file.path in shards} == shards
    for path in shards:
        assert (downloaded / path).read_bytes() == (world.scratch / "whole" / path).read_bytes()
    tell(f"{len(shards)} shards downloaded: the library's bytes")
    docker("start", victim)
    eventually(world.is_healthy, 120)
    tell("the killed worker is back and well")
    return job


def check_kernels(world: Composition) -> None:
    """Nothing was compiled: the image has had the machine code."""
    compiled = docker("exec", world.container("api"), "find", "/data", "-name", "kernels-*")
    assert not compiled, compiled
    tell("no kernel was compiled in a container")


def check_stop(world: Composition) -> None:
    begun = time.monotonic()
    world.compose("stop", *TARGETS)
    took = time.monotonic() - begun
    codes = [inspected(each)["State"]["ExitCode"] for target in TARGETS for each in world.containers(target)]
    assert codes and not any(codes), codes
    tell(f"api and workers stopped of themselves in {took:.1f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--if-there", action="store_true", help="be content where there is no engine")
    asked = parser.parse_args(arguments)
    if reason := why_not():
        print(f"\n*** DOCKER-SMOKE DID NOT RUN: {reason}. The images and the composition are untried. ***\n")
        return 0 if asked.if_there else 1
    version = docker("version", "--format", "{{.Server.Version}}").strip()
    tell(f"engine {version}, {' '.join(compose_command())}")
    build()
    with composition() as world:
        make_models(world.models)
        stands_in = is_stand_in("postgres:15")
        if stands_in:
            tell("postgres:15 is not the official image here: it is started as that would start it")
        (world.scratch / "override.yaml").write_text(json.dumps(override(stands_in)))
        reader = Reader(world)
        start, first, *others = shown("deployment.md")
        reader.types(start)
        eventually(world.is_healthy, 180)
        tell("docker compose up: secrets made, tables made, api, worker, redis and postgres healthy")
        key = (reader.place / "key").read_text().strip()
        with Client(f"http://127.0.0.1:{world.port}", api_key=key) as client:
            client.merges.wait(str(json.loads(reader.types(first))["id"]))
        tell("the first key made, and the first merge by curl succeeded")
        for block in others:
            reader.types(block)
        world.compose("up", "--detach", "--no-build", "--scale", "worker=2")
        eventually(world.is_healthy, 120)
        tell("scaled to two workers: healthy")
        check_confinement(world)
        check_contents(world)
        eventually(lambda: "2 reported" in httpx2.get(f"http://127.0.0.1:{world.port}/readyz", trust_env=False).text)
        check_health(world)
        with Client(f"http://127.0.0.1:{world.port}", api_key=key) as client:
            job = merge_and_kill(world, client)
            check_kernels(world)
            keep_house(world, reader, client, job)
        check_stop(world)
    tell("stopped; no container, network, volume or image of it is left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
