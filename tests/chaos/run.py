"""Carries out a schedule, watches what comes of it, and says what must not have happened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from tests.chaos import audit
from tests.chaos.faults import Cancel, KillWorker, Scene, Steps
from tests.chaos.merges import Case
from tests.chaos.schedule import Moment, Planned, Wave
from tests.chaos.world import World
from tests.services import eventually
from workers import credentials, signing
from workers.jobs import FINISHED, JobKind, JobState
from workers.tables import Job

CANCEL_SECONDS = 2.0
END_SECONDS = 90.0
"""Within this after the last fault every job has ended."""
TRIES = 3
"""So often is a phase waited for that may be too short to be seen."""
ANSWER_SECONDS = 60.0
TIDY_SECONDS = 90.0
DATABASE = ("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm")
ALWAYS_THERE = (*DATABASE, "migrating.lock", "janitor.lock", "site", signing.KEY_FILE, credentials.KEY_FILE)
"""Files of the data folder that belong to no job."""
PASSING = (503, 507)
"""Statuses that say: not now."""


class Stuck(Exception):
    """Something does not end; there is no going on."""


@dataclass
class Happened:
    """A fault under way: what it is to do next, and which jobs it has to let go on."""

    planned: Planned
    steps: Steps
    at: float
    before: Mapping[str, Job]
    due: float = 0.0
    until: Callable[[], bool] | None = None
    is_over: bool = False
    is_at_it: bool = False
    recovered: float | None = None

    def is_due(self) -> bool:
        return time.monotonic() >= self.due and (self.until is None or self.until())


@dataclass
class Canceled:
    """How long a cancel took, and of what."""

    job_id: str
    phase: str
    at: float
    alone: bool
    seconds: float | None = None


@dataclass
class Outcome:
    """What a run came to."""

    wrong: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    restarts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    repeated: dict[str, int] = field(default_factory=dict)
    cancels: list[Canceled] = field(default_factory=list)
    logged: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    tidy_seconds: float = 0.0
    stop_seconds: float = 0.0


class Run:
    """One broker, one database, one schedule."""

    def __init__(self, world: World, references: Mapping[str, Mapping[str, str]]) -> None:
        self.world, self.references = world, references
        self.outcome = Outcome()
        self._started = time.monotonic()
        self._takeovers: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._cases: dict[str, Case] = {}
        self._phases: dict[str, Counter[str]] = defaultdict(Counter)
        self._met: set[str] = set()

    def go(self, waves: Sequence[Wave], *, phases: bool = False) -> Outcome:
        """All waves; if asked for, a cancel and a kill in each phase that was seen; then a last look at all."""
        try:
            for number, wave in enumerate(waves, 1):
                self._wave(number, wave)
                if len(self.outcome.wrong) > 20:
                    raise Stuck("too much is wrong to go on")
            if phases:
                self._each_phase(len(waves))
            self._check_disk()
        except (Stuck, AssertionError) as error:
            self._wrong(str(error))
        self.outcome.wrong += audit.violations(audit.moves(self.world.engine), self._takeovers, self._retries)
        self._time_cancels()
        self._count_repeated()
        self.outcome.wrong += self.world.stop()
        self.outcome.stop_seconds = self.world.stop_seconds
        self._read_logs()
        left = [str(path.relative_to(self.world.folder)) for path in (self.world.folder / "tmp").iterdir()]
        self.outcome.wrong += [f"a temporary file was left behind: {path}" for path in left]
        self.outcome.seconds = time.monotonic() - self._started
        return self.outcome

    def note(self, said: str) -> None:
        """What is going on, for whoever watches."""
        print(f"  {time.monotonic() - self._started:7.2f}  {said}", file=sys.stderr, flush=True)

    # One wave.

    def _wave(self, number: int, wave: Wave) -> None:
        self.note(f"wave {number}: {wave}")
        self._happening: list[Happened] = []
        scenes: list[Scene] = []
        waiting, happening = list(wave.faults), self._happening
        for planned in [planned for planned in waiting if planned.moment.is_before]:
            waiting.remove(planned)
            scenes.append(self._scene(planned, {}, alone=False))
            happening.append(self._begin(planned, scenes[-1], {}))
            self._step_all()
        jobs = {job_id: case for case in wave.cases for job_id in [self._post(case)]}
        self._cases |= jobs
        for happened in happening:
            for job_id in [] if happened.is_over else jobs:
                self._takeovers[job_id] += happened.planned.fault.takes
        phases: dict[str, list[str]] = {job_id: [] for job_id in jobs}
        come: dict[int, float] = {}
        last = time.monotonic()
        while True:
            rows = self.world.jobs(list(jobs))
            for job_id, job in rows.items():
                if job.phase and job.phase != (phases[job_id] or [""])[-1]:
                    phases[job_id].append(job.phase)
                if job.phase:
                    self._phases[job.phase][jobs[job_id].title] += 1
            now = time.monotonic()
            for scene in scenes:
                scene.jobs = rows
            for i, planned in enumerate(wave.faults):
                if planned not in waiting:
                    continue
                if i not in come and planned.moment.has_come(list(rows.values()), max(map(len, phases.values()))):
                    come[i] = now + planned.moment.after
                if come.get(i, now + 1) <= now:
                    waiting.remove(planned)
                    scene = self._scene(planned, rows, alone=len(wave.faults) == 1)
                    scenes.append(scene)
                    happening.append(self._begin(planned, scene, rows))
            self._step_all()
            over = [happened for happened in happening if happened.is_over]
            self._look_for_recovery(over, rows)
            if waiting or len(over) < len(happening):
                last = now
            elif all(job.state in FINISHED for job in self.world.jobs(list(jobs)).values()):
                break  # asked again: what has just happened may have begun one of them anew
            if now > last + END_SECONDS:
                states = {job.id: f"{job.state} {job.phase} {job.progress}" for job in rows.values()}
                raise Stuck(f"wave {number}: not ended {END_SECONDS:.0f} s after the last fault: {states}")
            time.sleep(0.03)
        self.world.settle()
        rows = self.world.jobs(list(jobs))
        self._look_for_recovery(happening, rows)
        allowed = {code for scene in scenes for code in scene.allowed_codes}
        for scene in scenes:
            self.outcome.wrong += [f"wave {number}: {said}" for said in scene.wrong]
        for job in rows.values():
            for said in self._check_end(jobs[job.id], job, allowed):
                self._wrong(f"wave {number}: {said}")
        if (there := self.world.count()) != len(self._cases):
            raise Stuck(f"wave {number}: there are {there} jobs, where {len(self._cases)} were asked for")
        self._delete([job for job in rows.values() if number % 3 == 0])

    def _each_phase(self, number: int) -> None:
        """What must be true in every phase is tried in every phase, on a job of its own."""
        cases = {case.title: case for case in self._cases.values() if case.code is None}
        where = {}
        for phase, seen in self._phases.items():
            if longest := max((title for title in seen if title in cases), key=seen.__getitem__, default=""):
                where[phase] = cases[longest]
        tried = [(fault, phase) for phase in ("queued", *where) for fault in (Cancel(), KillWorker())]
        for fault, phase in tried:
            case = where.get(phase) or next(iter(where.values()))
            for _ in range(TRIES):
                number += 1
                shutil.rmtree(self.world.data / "cache", ignore_errors=True)  # what is known is not found out again
                before = set(self._cases)
                self._wave(number, Wave((case,), (Planned(fault, Moment("in", 0, phase=phase), seed=1),)))
                if phase in self._met:
                    if fault != Cancel():
                        self.outcome.restarts[phase] += set(self._cases) - before
                    break
            else:
                self._wrong(f"{fault} was to come while {phase}, which passed too fast {TRIES} times")

    def _scene(self, planned: Planned, rows: dict[str, Job], *, alone: bool) -> Scene:
        return Scene(
            self.world,
            rows,
            random.Random(planned.seed),
            self.note,
            cancel=lambda job: self._cancel(job, alone=alone),
            retry=self._retry,
        )

    def _begin(self, planned: Planned, scene: Scene, rows: Mapping[str, Job]) -> Happened:
        states = ", ".join(f"{job.state} {job.phase}" for job in rows.values())
        self._met = {job.phase or job.state for job in rows.values()}
        self.note(f"{planned.fault}   [{states}]")
        before = {job_id: job for job_id, job in rows.items() if job.state not in FINISHED}
        for job_id in before:
            self._takeovers[job_id] += planned.fault.takes
        return Happened(planned, planned.fault.happen(scene), time.monotonic(), before)

    def _step_all(self) -> None:
        """Let what is happening go on; what one fault asks of the service may have to wait for what another does."""
        for happened in list(self._happening):
            while not happened.is_over and not happened.is_at_it and happened.is_due():
                happened.until = None
                happened.is_at_it = True
                try:
                    wanted = next(happened.steps)
                except StopIteration:
                    happened.is_over = True
                else:
                    if callable(wanted):
                        happened.until = wanted
                    else:
                        happened.due = time.monotonic() + wanted
                finally:
                    happened.is_at_it = False

    def _look_for_recovery(self, over: Sequence[Happened], rows: Mapping[str, Job]) -> None:
        """A fault is got over when the service is ready and every job that it met has ended or is worked on again."""
        left = [happened for happened in over if happened.recovered is None]
        if not left or not all(self._goes_on(happened, rows) for happened in left[:1]):
            return
        if self.world.is_ready():
            for happened in left:
                if self._goes_on(happened, rows):
                    happened.recovered = time.monotonic() - happened.at
                    self.outcome.recoveries[happened.planned.fault.name].append(happened.recovered)

    def _goes_on(self, happened: Happened, rows: Mapping[str, Job]) -> bool:
        return all(
            rows[job_id].state in FINISHED
            or (rows[job_id].version > job.version and self.world.worker_of(rows[job_id]) is not None)
            for job_id, job in happened.before.items()
        )

    # What clients do.

    def _post(self, case: Case) -> str:
        key = {"Idempotency-Key": uuid.uuid4().hex}
        answer = self._ask("POST", f"/v1/{case.kind.plural}", json=case.document, headers=key)
        if answer.status_code != 202:
            raise Stuck(f"{case.title} was answered {answer.status_code} {answer.text[:500]}")
        return str(answer.json()["id"])

    def _cancel(self, job: Job, *, alone: bool) -> None:
        answer = self._ask("POST", f"{_path(job)}/cancel")
        self.note(f"cancel of {job.id}: {answer.status_code}")
        if answer.status_code in (200, 202):
            self.outcome.cancels.append(Canceled(job.id, job.phase or job.state, time.time(), alone))
        elif answer.status_code != 409:
            self._wrong(f"cancel of {job.id} was answered {answer.status_code} {answer.text[:200]}")

    def _retry(self, job: Job) -> None:
        self._retries[job.id] += 1
        answer = self._ask("POST", f"{_path(job)}/retry")
        self.note(f"retry of {job.id}: {answer.status_code}")
        if answer.status_code not in (202, 409):
            self._wrong(f"retry of {job.id} was answered {answer.status_code} {answer.text[:200]}")

    def _delete(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            # A first try may have arrived although nobody heard of it.
            if (answer := self._ask("DELETE", _path(job))).status_code not in (204, 404, 410):
                self._wrong(f"DELETE of {job.id} was answered {answer.status_code} {answer.text[:200]}")
            elif (answer := self._ask("GET", _path(job))).status_code not in (404, 410):
                self._wrong(f"{job.id} is deleted and was answered {answer.status_code} {answer.text[:200]}")

    def _ask(self, verb: str, path: str, **options: Any) -> httpx2.Response:
        """Ask until somebody answers; answers that say "not now" are asked again."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            with contextlib.suppress(httpx2.HTTPError):
                answer = self.world.http.request(verb, path, **options)
                if answer.status_code not in PASSING or time.monotonic() > deadline:
                    return answer
            if time.monotonic() > deadline:
                raise Stuck(f"{verb} {path} was not answered within {ANSWER_SECONDS:.0f} s")
            self._step_all()
            time.sleep(0.05)

    # What must be true.

    def _check_end(self, case: Case, job: Job, allowed: set[str]) -> Iterator[str]:
        canceled = any(canceled.job_id == job.id for canceled in self.outcome.cancels)
        self.outcome.ends[job.state if job.error is None else f"failed: {job.error['code']}"] += 1
        who = f"{case.title} ({job.id})"
        told = self._ask("GET", _path(job)).json()
        if told["status"] != job.state:
            yield f"{who} is {job.state}, and {told['status']} over HTTP"
        if job.state == JobState.CANCELED:
            if not canceled:
                yield f"{who} was canceled by nobody"
        elif job.state == JobState.FAILED:
            yield from self._check_failure(who, case, told["error"], allowed)
        elif case.code is not None:
            yield f"{who} succeeded, where it cannot"
        else:
            yield from self._check_files(who, case, job)

    def _check_failure(self, who: str, case: Case, error: Any, allowed: set[str]) -> Iterator[str]:
        if not isinstance(error, dict) or not all(error.get(key) for key in ("code", "title", "detail")):
            yield f"{who} failed and does not say why: {error}"
        elif error["code"] not in {case.code, *allowed}:
            yield f"{who} failed with {error['code']}: {error['detail']}"

    def _check_files(self, who: str, case: Case, job: Job) -> Iterator[str]:
        wanted = self.references[case.title]
        listed = self._ask("GET", f"{_path(job)}/files").json().get("data", [])
        if {file["path"]: file["sha256"] for file in listed} != wanted:
            yield f"{who} succeeded with other files than the library makes: {listed}"
            return
        for file in listed:
            content = self._ask("GET", file["url"]).content
            if hashlib.sha256(content).hexdigest() != wanted[file["path"]]:
                yield f"{who}: {file['path']} was not downloaded as it should be"

    def _check_disk(self) -> None:
        """Nothing is left that no row names, once the janitor has been."""
        left: list[str] = []

        def is_tidy() -> bool:
            left[:] = self._unnamed()
            return not left

        started = time.monotonic()
        with contextlib.suppress(AssertionError):
            eventually(is_tidy, TIDY_SECONDS)
        self.outcome.tidy_seconds = time.monotonic() - started
        self.outcome.wrong += [f"no row names {path}" for path in left]

    def _unnamed(self) -> list[str]:
        data = self.world.data
        named = {Path(name) for name in ALWAYS_THERE}
        for job in self.world.jobs(list(self._cases)).values():
            if job.state == JobState.SUCCEEDED and job.deleted_at is None:
                named |= {Path("artifacts", job.id, file["path"]) for file in job.files}
        kept = ("cache/sha256", "broker/control", "models")
        found = [path.relative_to(data) for path in data.rglob("*") if path.is_file()]
        folders = [path.relative_to(data) for path in (data / "artifacts").iterdir() if path.is_dir()]
        ids = {path.parent for path in named}
        files = [path for path in found if path not in named and not str(path).startswith(kept)]
        return sorted(map(str, [*files, *(folder for folder in folders if folder not in ids)]))

    def _time_cancels(self) -> None:
        moves = audit.moves(self.world.engine)
        for canceled in self.outcome.cancels:
            ends = [
                move.at
                for move in moves
                if move.what == "job"
                and move.job_id == canceled.job_id
                and JobState(move.after) in FINISHED
                and move.before != move.after
            ]
            after = [at for at in ends if at > canceled.at - CANCEL_SECONDS]
            if after:
                canceled.seconds = max(min(after) - canceled.at, 0.0)
            if canceled.alone and (canceled.seconds is None or canceled.seconds > CANCEL_SECONDS):
                self._wrong(f"{canceled.job_id}: its cancel while {canceled.phase} took {canceled.seconds} s")
        for move in moves:
            self.outcome.units[move.what] += 1

    def _count_repeated(self) -> None:
        """How many units were taken again after a worker was killed in each phase: at most the one that it was at."""
        repeated = audit.repeated(audit.moves(self.world.engine))
        for phase, jobs in self.outcome.restarts.items():
            count = max(repeated.get(job_id, 0) for job_id in jobs)
            self.outcome.repeated[phase] = count
            if count > 1:
                self._wrong(f"a worker was killed while {phase}, and {count} units were taken again")

    def _read_logs(self) -> None:
        """Errors that faults explain are counted; what nobody expects is wrong."""
        for name, log in self.world.logs().items():
            for error in _errors(log):
                self.outcome.logged[error[:110]] += 1
                if not EXPLAINED.search(error):
                    self._wrong(f"{name} logs {error[:300]}")

    def _wrong(self, said: str) -> None:
        self.note(f"WRONG: {said}")
        self.outcome.wrong.append(said)


EXPLAINED = re.compile(
    "OperationalError|ConnectionError|ConnectionRefusedError|ConnectionResetError|TimeoutError|BrokenPipeError"
    "|No space left on device|disk I/O error|database or disk is full|WorkerLostError"
    "|exited with 'signal 9|ExceptionWithTraceback|QueryCanceled|InterfaceError|DatabaseUnavailable"
    "|timeout graceful shutdown exceeded|Cannot connect to redis"
)
"""What may stand in a log while databases are locked, brokers gone and disks full."""


NAMED = re.compile(r"[A-Za-z_][\w.]*(:|$)")
"""An exception's name, at the beginning of its line."""


def _errors(log: str) -> Iterator[str]:
    """What each line says that tells of an error, and the last line of each traceback."""
    is_inside = False
    for line in log.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if found := said.get("exception"):
                    lines = str(found).rpartition("Traceback (most recent call last):")[2].splitlines()
                    yield next((line for line in lines if NAMED.match(line)), lines[-1])
                elif said.get("level") in ("error", "critical"):
                    yield str(said.get("message")).splitlines()[0]
        elif line.startswith("Traceback (most recent call last)"):
            is_inside = True
        elif is_inside and line and not line.startswith((" ", "\t", "|", "+")):
            is_inside = False
            yield line


def _path(job: Job) -> str:
    return f"/v1/{JobKind(job.kind).plural}/{job.id}"
