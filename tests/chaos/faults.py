"""What can happen. A fault is data that is drawn before anything runs, so that a seed tells all."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import psutil

from tests.chaos.world import LEASE_SECONDS, STOP_SECONDS, Member, World
from workers.database import for_reading
from workers.jobs import FINISHED, JobKind
from workers.tables import Job

Steps = Iterator[float | Callable[[], bool]]
"""What to wait for before the next step: so many seconds, or until something is true."""


@dataclass
class Scene:
    """The jobs that a fault meets, and what it tells about them."""

    world: World
    jobs: dict[str, Job]
    rng: random.Random
    note: Callable[[str], None]
    cancel: Callable[[Job], None]
    retry: Callable[[Job], None]
    allowed_codes: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.state not in FINISHED]

    def worker(self) -> psutil.Process | None:
        """Mostly who works on one of the jobs, else anybody who could."""
        busy = [found for job in self.unfinished() if (found := self.world.worker_of(job)) is not None]
        if busy and self.rng.random() < 0.8:
            return self.rng.choice(busy)
        return self._any([child for member in self.world.members.values() for child in member.children()])

    def member(self, *, further: bool = False) -> Member | None:
        """Mostly the one whose child works; `further`: not the one that serves."""
        worker = self.worker()
        found = None if worker is None else self.world.member_of(worker)
        if found is None or (further and found.name == "serve"):
            running = [member for member in self.world.members.values() if member.is_running]
            found = self._any([member for member in running if not further or member.name != "serve"])
        return found

    def _any(self, these: Sequence[Any]) -> Any:
        return self.rng.choice(these) if these else None


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong. `takes`: whether a job may be taken from its worker by it."""

    name: ClassVar[str]
    takes: ClassVar[int] = 1

    @classmethod
    def fits(cls, world: World) -> bool:
        return True

    @classmethod
    def draw(cls, rng: random.Random) -> Fault:
        return cls()

    def happen(self, scene: Scene) -> Steps:
        raise NotImplementedError

    def __str__(self) -> str:
        drawn = ", ".join(f"{each.name} {getattr(self, each.name):.2g}" for each in fields(self))
        return self.name + (f" ({drawn})" if drawn else "")


@dataclass(frozen=True)
class KillChild(Fault):
    """As the kernel kills for memory."""

    name = "kill -9 of a pool child"

    def happen(self, scene: Scene) -> Steps:
        _kill(scene, scene.worker())
        yield 0.0


@dataclass(frozen=True)
class KillWorker(Fault):
    name = "kill -9 of a worker"

    def happen(self, scene: Scene) -> Steps:
        member = scene.member()
        for process in member.workers() if member else []:
            _kill(scene, process)
        yield 0.0


@dataclass(frozen=True)
class _Pause(Fault):
    """What takes a while."""

    seconds: float
    longest: ClassVar[float] = 2.0
    shortest: ClassVar[float] = 0.0

    @classmethod
    def draw(cls, rng: random.Random) -> Fault:
        return cls(round(rng.uniform(cls.shortest, cls.longest), 2))


@dataclass(frozen=True)
class KillService(_Pause):
    """`kill -9` of the process that answers and supervises; an operator's tool starts it again."""

    name = "kill -9 of the API"

    def happen(self, scene: Scene) -> Steps:
        yield from _kill_member(scene, scene.world.members["serve"], self.seconds)


@dataclass(frozen=True)
class KillSupervisor(_Pause):
    name = "kill -9 of a worker's supervisor"

    def happen(self, scene: Scene) -> Steps:
        if member := scene.member(further=True):
            yield from _kill_member(scene, member, self.seconds)


@dataclass(frozen=True)
class StopWorker(_Pause):
    """As a deployment does it."""

    name = "SIGTERM of a worker"

    def happen(self, scene: Scene) -> Steps:
        if member := scene.member(further=True):
            yield from _stop_member(scene, member, self.seconds)


@dataclass(frozen=True)
class StopService(_Pause):
    name = "SIGTERM of the service"

    def happen(self, scene: Scene) -> Steps:
        yield from _stop_member(scene, scene.world.members["serve"], self.seconds)


@dataclass(frozen=True)
class Freeze(_Pause):
    """A machine that sleeps for longer than its leases, and wakes up believing that they are good."""

    name = "a worker asleep for longer than its lease"
    shortest, longest = 1.3 * LEASE_SECONDS, 2 * LEASE_SECONDS

    def happen(self, scene: Scene) -> Steps:
        member = scene.member(further=True)
        asleep = [] if member is None else member.family()
        scene.note(f"{member.name if member else 'nobody'} sleeps: {[process.pid for process in asleep]}")
        for process in asleep:
            _signal(process, signal.SIGSTOP)
        yield self.seconds
        for process in asleep:
            _signal(process, signal.SIGCONT)


@dataclass(frozen=True)
class FreezeChild(_Pause):
    """A child that hangs, as on a dead disk; it may wake up before its supervisor ends it."""

    name = "a pool child asleep"
    shortest, longest = 0.5, 2 * LEASE_SECONDS

    def happen(self, scene: Scene) -> Steps:
        child = scene.worker()
        if child is not None:
            _signal(child, signal.SIGSTOP)
            yield self.seconds
            _signal(child, signal.SIGCONT)


@dataclass(frozen=True)
class Join(_Pause):
    """A worker more, for a while."""

    name = "a worker joins"
    shortest, longest = 2.0, 8.0

    def happen(self, scene: Scene) -> Steps:
        member = scene.world.add(f"joined {len(scene.world.members)}", ["worker"])
        member.start()
        yield self.seconds
        member.is_wanted = False
        yield from _stopped(scene, member)


@dataclass(frozen=True)
class KillRedis(_Pause):
    """With everything that it knew."""

    name = "kill -9 of Redis"
    takes = 0

    @classmethod
    def fits(cls, world: World) -> bool:
        return world.broker == "redis"

    def happen(self, scene: Scene) -> Steps:
        redis = scene.world.redis
        assert redis is not None
        redis.kill()
        yield self.seconds
        redis.start()


@dataclass(frozen=True)
class DropBroker(_Pause):
    name = "connections to the broker dropped"
    takes = 0

    @classmethod
    def fits(cls, world: World) -> bool:
        return world.broker == "redis"

    def happen(self, scene: Scene) -> Steps:
        wire = scene.world.broker_wire
        assert wire is not None
        wire.refuse(True)
        yield self.seconds
        wire.refuse(False)


@dataclass(frozen=True)
class StallBroker(_Pause):
    name = "the broker does not answer"
    takes = 0
    shortest, longest = 1.0, 8.0

    @classmethod
    def fits(cls, world: World) -> bool:
        return world.broker == "redis"

    def happen(self, scene: Scene) -> Steps:
        wire = scene.world.broker_wire
        assert wire is not None
        wire.stall(True)
        yield self.seconds
        wire.stall(False)
        wire.drop()


@dataclass(frozen=True)
class DropDatabase(Fault):
    name = "connections to the database dropped"
    takes = 0

    @classmethod
    def fits(cls, world: World) -> bool:
        return world.database != "sqlite"

    def happen(self, scene: Scene) -> Steps:
        scene.world.drop_database_connections()
        yield 0.0


@dataclass(frozen=True)
class CutDatabase(_Pause):
    name = "no way to the database"
    longest = 2 * LEASE_SECONDS

    @classmethod
    def fits(cls, world: World) -> bool:
        return world.database != "sqlite"

    def happen(self, scene: Scene) -> Steps:
        wire = scene.world.database_wire
        assert wire is not None
        wire.refuse(True)
        yield self.seconds
        wire.refuse(False)


@dataclass(frozen=True)
class LockDatabase(_Pause):
    name = "the database locked by somebody"
    shortest, longest = 0.5, 2 * LEASE_SECONDS

    def happen(self, scene: Scene) -> Steps:
        with scene.world.database_locked():
            yield self.seconds


@dataclass(frozen=True)
class FillDisk(_Pause):
    """No room, for a while; `left` bytes can still be written."""

    left: int
    name = "the disk is full"
    longest = 4.0

    @classmethod
    def draw(cls, rng: random.Random) -> Fault:
        return cls(round(rng.uniform(0.5, cls.longest), 2), rng.choice([0, 2**20, 2**23]))

    def happen(self, scene: Scene) -> Steps:
        scene.allowed_codes |= {"insufficient-storage"}
        with scene.world.disk_full(self.left):
            yield self.seconds


@dataclass(frozen=True)
class StalledReader(Fault):
    """Somebody asks for a large file, or for the events, and reads nothing of it."""

    name = "a stalled reader"
    takes = 0

    def happen(self, scene: Scene) -> Steps:
        world = scene.world
        with for_reading(world.engine).connect() as connection:
            done = connection.execute(
                Job.__table__.select()
                .where(Job.state == "succeeded", Job.deleted_at.is_(None))
                .order_by(Job.id.desc())
                .limit(1)
            ).mappings()
            job = next(iter(done), None)
        if job is not None:
            largest = max(job["files"], key=lambda file: int(file["size"]))
            world.stalled_reader(f"/v1/{JobKind(job['kind']).plural}/{job['id']}/files/{largest['path']}", "*/*")
        for each in scene.unfinished():
            world.stalled_reader(f"/v1/{JobKind(each.kind).plural}/{each.id}/events", "text/event-stream")
        yield 0.0


@dataclass(frozen=True)
class LoseAnswers(_Pause):
    """What people send arrives, and they never hear of it."""

    name = "answers lost on their way"
    takes = 0
    shortest, longest = 0.5, 3.0

    def happen(self, scene: Scene) -> Steps:
        scene.world.wire.cut_answers(True)
        yield self.seconds
        scene.world.wire.cut_answers(False)


@dataclass(frozen=True)
class Cancel(Fault):
    name = "cancel"
    takes = 0

    def happen(self, scene: Scene) -> Steps:
        if unfinished := scene.unfinished():
            scene.cancel(scene.rng.choice(unfinished))
        yield 0.0


@dataclass(frozen=True)
class CancelAndRetry(_Pause):
    """Somebody changes their mind twice."""

    name = "cancel, then retry"
    takes = 0

    def happen(self, scene: Scene) -> Steps:
        if unfinished := scene.unfinished():
            job = scene.rng.choice(unfinished)
            scene.cancel(job)
            yield lambda: scene.jobs[job.id].state in FINISHED
            yield self.seconds
            scene.retry(job)


FAULTS: tuple[type[Fault], ...] = (
    KillChild,
    KillWorker,
    KillService,
    KillSupervisor,
    StopWorker,
    StopService,
    Freeze,
    FreezeChild,
    Join,
    KillRedis,
    DropBroker,
    StallBroker,
    DropDatabase,
    CutDatabase,
    LockDatabase,
    FillDisk,
    StalledReader,
    LoseAnswers,
    Cancel,
    CancelAndRetry,
)


def _kill(scene: Scene, process: psutil.Process | None) -> None:
    if process is not None:
        scene.note(f"kill -9 {process.pid}")
        _signal(process, signal.SIGKILL)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _kill_member(scene: Scene, member: Member, pause: float) -> Steps:
    if member.is_running:
        scene.note(f"kill -9 {member.name}")
        member.kill()
        yield pause
        yield from _start(member)


def _stop_member(scene: Scene, member: Member, pause: float) -> Steps:
    if member.is_running:
        yield from _stopped(scene, member)
        yield pause
        yield from _start(member)


def _stopped(scene: Scene, member: Member) -> Steps:
    scene.note(f"SIGTERM {member.name}")
    member.terminate()
    told = time.monotonic()
    while member.is_running and time.monotonic() < told + STOP_SECONDS:
        yield 0.05
    scene.note(f"{member.name} stopped after {time.monotonic() - told:.1f} s")
    if member.is_running:
        scene.wrong.append(f"{member.name} did not stop within {STOP_SECONDS:.0f} s of SIGTERM")
        member.kill()


def _start(member: Member) -> Steps:
    if not member.is_running:
        member.start()
    yield 0.0
