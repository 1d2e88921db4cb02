"""The task body: claim the job, call the core, record the outcome. Safe to deliver any number of times."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from celery.signals import worker_process_init
from sqlalchemy.exc import SQLAlchemyError

from merge_core.errors import Canceled, StorageFailed, WeightsmithError
from merge_core.files import is_held
from merge_core.imports import quick_imports
from workers import reservations
from workers.artifacts import open_artifacts
from workers.candidates import forget_candidates
from workers.celery_app import celery_app
from workers.database import TROUBLE, DatabaseUnavailable, persistently, said
from workers.hub.access import place_of
from workers.hub.opening import HubOptions, JobHub
from workers.hub.upload import Publication
from workers.jobs import FINISHED, JobKind, JobState, JobStore, Lease, LeaseLost
from workers.kinds import WORK
from workers.logs import logs_of
from workers.problems import problem, problem_of
from workers.published import published_by
from workers.queue import RUN_JOB, Queue, artifact_folder, partial_folder, partial_folders, remove_partial
from workers.settings import WORKER_VARIABLE, Settings
from workers.tables import Job
from workers.units import Assisting, Leading, NothingToDo, UnitStore

if TYPE_CHECKING:
    from merge_core.artifact import Artifact
    from merge_core.calibration.document import Calibration
    from merge_core.progress import Progress

INTERNAL_ERROR = problem_of("internal-error", "an unexpected error, which the worker's log describes")
log = logging.getLogger(__name__)
_kept: JobStore | None = None


@celery_app.task(name=RUN_JOB)
def run_job(job_id: str) -> None:
    """Run the job whose turn it is, which need not be the one that the message names; with none free, help with one
    that runs; else do nothing.
    """
    settings = Settings()
    try:
        _run_next(settings, job_id)
    except DatabaseUnavailable as error:
        log.warning("%s; the job is announced again", error)
    except TROUBLE as error:
        log.warning("the database cannot be used: %s; the job is given back when its lease runs out", said(error))


def _run_next(settings: Settings, job_id: str) -> None:
    store = _kept or JobStore(settings)
    holder = f"{os.environ.get(WORKER_VARIABLE, socket.gethostname())}/{os.getpid()}"
    try:
        lease = store.claim_next(holder)
        if lease is not None:
            with logs_of(store, lease):
                log.info("attempt %d begins", lease.attempt)
                _work(settings, store, lease)
        elif (job := UnitStore(store).find(job_id)) is not None:
            _assist(settings, store, job, holder)
    finally:
        if store is not _kept:
            store.close()


@worker_process_init.connect
def _keep_store(**_: object) -> None:
    """Open the database once for all jobs of a worker's child: to compile statements anew costs as much as a merge."""
    global _kept
    # If it is not there now, each job looks again.
    with contextlib.suppress(DatabaseUnavailable):
        _kept = JobStore(Settings())


def _assist(settings: Settings, store: JobStore, job: Job, holder: str) -> None:
    """Take units of a job that another worker holds, until there is nothing more to do."""
    log.info("assists another worker", extra={"job_id": job.id})
    with Assisting(store, job.id, holder) as share, contextlib.suppress(NothingToDo):
        with quick_imports():
            work = WORK[JobKind(job.kind)]()

        document = work.document.from_data(job.recipe)
        folders = partial_folders(settings, job.id)
        if not folders or work.assist is None:
            return
        help_with = work.assist
        roots = JobHub(store, job.owner, HubOptions.of(job.hub), job.resolved, share.stop).roots
        if work.evaluates:
            about = (job.owner, job.recipe, job.request_id, job.resolved, job.hub)
            led = Lease(job.id, holder, job.attempt, JobKind(job.kind), *about)
            help_with = partial(help_with, **_scoring(settings, store, led, document, roots))
        try:
            help_with(
                document,
                folders[max(folders)],
                share,
                roots=roots,
                memory=min(document.limits.memory, settings.max_memory),
                threads=document.limits.threads or settings.threads,
                device=settings.device,
                stop=share.stop,
            )
        except WeightsmithError as error:
            detail = "an assistant could not go on, which whoever leads will find too: %s"
            log.warning(detail, error, extra={"job_id": job.id})
            share.fail()


def _work(settings: Settings, store: JobStore, lease: Lease) -> None:
    with Keeper(store, lease) as keeper:
        try:
            persistently(partial(_check_disk, settings, store, lease), settings.lease_seconds)
            with _publication(settings, store, lease, keeper) as publication:
                artifact = _run(settings, store, lease, keeper, publication)
                merged = keeper.snapshot()
                kept = artifact if publication is None else publication.kept(artifact)
                _put(settings, kept, keeper)
                published = None if publication is None else publication.commit(artifact, keeper.prove, keeper.report)
        except LeaseLost:
            log.warning("%s is no longer this worker's", lease.job_id)
            if (job := store.get(lease.job_id)) is None or job.state in FINISHED:
                remove_partial(settings, lease.job_id)  # else it is its successor's
        except Canceled:
            log.info("canceled")
            _end(settings, keeper, store.confirm_cancel)
        except WeightsmithError as error:
            log.warning("failed: %s", error)
            _end(settings, keeper, partial(store.fail, error=problem(error)))
        except TROUBLE:
            raise
        except Exception:
            _end(settings, keeper, partial(store.fail, error=INTERNAL_ERROR))
            raise
        else:
            files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in kept.files]
            succeed = partial(store.succeed, files=files, warnings=artifact.warnings, progress=merged)
            _end(settings, keeper, partial(succeed, published=published), keep=True)
            log.info("succeeded", extra={"files": len(files), "bytes": sum(file.size for file in kept.files)})


def _check_disk(settings: Settings, store: JobStore, lease: Lease) -> None:
    with store.session() as session:
        reservations.check(session, settings, lease.job_id)


def _end(settings: Settings, keeper: Keeper, move: Callable[[Lease], None], *, keep: bool = False) -> None:
    """Make the job's last move; what the attempts at it left is removed only by whoever made it, and what was finished
    unless it is to `keep`.
    """
    if not keeper.finish(move):
        return
    job_id, artifacts = keeper.lease.job_id, open_artifacts(settings)
    remove_partial(settings, job_id)
    if keeper.lease.kind is JobKind.SEARCH:
        # What cannot be removed now, the janitor removes later.
        with contextlib.suppress(*TROUBLE, StorageFailed):
            forget_candidates(keeper.store, Job.parent == job_id)
    out = artifact_folder(settings, job_id)
    if not keep:
        # What cannot be removed now, the janitor removes later.
        with contextlib.suppress(StorageFailed):
            artifacts.delete(job_id)
    if not keep or not (settings.keep_local or artifacts.holds(out)):
        shutil.rmtree(out, ignore_errors=True)


def _put(settings: Settings, artifact: Artifact, keeper: Keeper) -> None:
    """Put what is finished into the artifact store."""
    from merge_core.progress import Progress

    artifacts = open_artifacts(settings)
    if artifacts.holds(artifact.folder):
        return
    progress = Progress("storing", bytes_written_total=sum(file.size for file in artifact.files))
    counting = threading.Lock()

    def sent(size: int) -> None:
        with counting:
            progress.bytes_written += size

    keeper.report(progress)
    artifacts.put_folder(keeper.lease.job_id, artifact.folder, artifact.files, sent=sent, stop=keeper.stop)


def _publication(
    settings: Settings, store: JobStore, lease: Lease, keeper: Keeper
) -> contextlib.AbstractContextManager[Publication | None]:
    """What sends the result to a Hub, where the document wants it there."""
    with quick_imports():
        document = WORK[lease.kind]().document.from_data(lease.recipe)
    place = place_of(document)
    if place is None:
        return contextlib.nullcontext()
    hub = JobHub(store, lease.owner, HubOptions.of(lease.hub), lease.resolved)
    return Publication(
        lease.job_id,
        place,
        hub.publisher(),
        xet=settings.hub_xet,
        removes=not document.outputs.keep,  # type: ignore[attr-defined]  # a place is in outputs
        stop=keeper.stop,
    )


def _run(
    settings: Settings, store: JobStore, lease: Lease, keeper: Keeper, publication: Publication | None
) -> Artifact:
    # Here and not above: torch must be imported in the child that uses it, and only once the lease is kept alive.
    with quick_imports():
        from merge_core.merge import adopt

        work = WORK[lease.kind]()

    out = artifact_folder(settings, lease.job_id)
    partial_output = _take_over(settings, lease, keeper)
    if out.exists():
        # An earlier attempt died between finishing the artifact and saying so.
        return adopt(out)
    document = work.document.from_data(lease.recipe)
    run: Callable[..., Artifact] = work.run
    if work.assist is not None:
        wake = partial(Queue(store, celery_app).wake, lease.job_id)
        run = partial(run, share=Leading(store, lease, stop=keeper.stop, prove=keeper.prove, wake=wake))
    if work.reads_jobs:
        run = partial(run, published=published_by(store, open_artifacts(settings), lease.owner, document))
    if publication is not None:
        run = partial(run, delivery=publication)
    roots = JobHub(store, lease.owner, HubOptions.of(lease.hub), lease.resolved, keeper.stop).roots
    if work.evaluates:
        run = partial(run, **_scoring(settings, store, lease, document, roots))
    if work.runs_models:
        from workers.calibrating import TransformersModels
        from workers.evaluators.data import Shelves

        shelves = Shelves(store, lease.owner, roots)
        run = partial(run, models=TransformersModels(cast("Calibration", document), shelves))
    return run(
        document,
        out,
        roots=roots,
        partial=partial_output,
        memory=min(document.limits.memory, settings.max_memory),
        threads=document.limits.threads or settings.threads,
        cache=settings.cache,
        device=settings.device,
        report=keeper.report if publication is None else publication.telling(keeper.report),
        stop=keeper.stop,
    )


def _scoring(settings: Settings, store: JobStore, lease: Lease, document: Any, roots: Any) -> dict[str, Any]:
    """What scores the candidates of a search, and remembers what they came to."""
    from workers.evaluators import Around, evaluator_of
    from workers.trials import TrialStore

    around = Around(settings, store, lease, document, roots)
    return {"evaluator": evaluator_of(around), "kept": TrialStore(store, lease.job_id, lease.owner)}


def _take_over(settings: Settings, lease: Lease, keeper: Keeper) -> Path:
    """The job's folder, with what earlier attempts finished and assistants may be at, or a new one if a worker not
    quite dead still holds it.

    The lease is proved first: a worker that slept through its end must not take anything from its successor.
    """
    keeper.prove()
    folders = partial_folders(settings, lease.job_id)
    latest = max(folders, default=1)
    # An earlier attempt may finish, and its folder vanish, at any moment.
    with contextlib.suppress(FileNotFoundError):
        if latest in folders and is_held(folders[latest]):
            return partial_folder(settings, lease.job_id, latest + 1)
    return partial_folder(settings, lease.job_id, latest)


class Keeper:
    """Keeps a lease alive from a thread of its own, stores the progress, and learns of cancels."""

    def __init__(self, store: JobStore, lease: Lease) -> None:
        self.store, self.lease = store, lease
        self._progress: Progress | None = None
        self._state = JobState.RUNNING
        self._phase, self._since, self._told = "starting", time.monotonic(), "starting"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._writes: Progress | None = None
        self._told_order: Sequence[str] = ()
        self._lost = False
        self._done = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._enter("")
        try:
            self.store.count_phases(self.lease.kind, self._seconds)
        except SQLAlchemyError as failed:
            log.warning("how long its phases took could not be counted: %s", failed)

    def report(self, progress: Progress) -> None:
        self._progress = progress
        if progress.order:
            self._writes = progress  # which of its tensors are done holds while they are stored, too
        if progress.phase != self._phase:
            self._enter(progress.phase)

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        # What follows the colon is one job's own.
        self._seconds[self._phase.partition(":")[0]] += now - self._since
        self._phase, self._since = phase, now

    def stop(self) -> bool:
        """Whether to give the job up; raises `LeaseLost` where it is another's by now."""
        if self._lost:
            raise LeaseLost(self.lease.job_id)
        return self._state is JobState.CANCELING

    def prove(self) -> None:
        """Raise `LeaseLost` unless the lease is good at this moment."""
        phase = self._progress.phase if self._progress else "starting"
        beat = partial(self.store.heartbeat, self.lease, phase=phase, progress=self.snapshot())
        self._state = persistently(beat, self.store.settings.lease_seconds)

    def snapshot(self) -> dict[str, Any]:
        progress = self._progress
        if progress is None:
            return {}
        is_search, in_steps = progress.trials_total > 0, progress.steps_total > 0
        return {
            "tensors_done": progress.tensors_done,
            "tensors_total": progress.tensors_total,
            "bytes_read": progress.bytes_read,
            "bytes_read_total": progress.bytes_read_total,
            "bytes_written": progress.bytes_written,
            "bytes_written_total": progress.bytes_written_total,
            "bytes_received": progress.bytes_received,
            "bytes_sent": progress.bytes_sent,
            **({"trials_done": progress.trials_done, "trials_total": progress.trials_total} if is_search else {}),
            **({"steps_done": progress.steps_done, "steps_total": progress.steps_total} if in_steps else {}),
            "fraction": round(progress.fraction, 4),
            "bytes_per_second": round(progress.rate),
            "seconds_left": None if progress.seconds_left is None else round(progress.seconds_left, 1),
            "tensor": progress.tensor,
            "tensors_finished": None if self._writes is None else self._writes.finished.runs(),
        }

    def finish(self, move: Callable[[Lease], None]) -> bool:
        """Make the job's last move, with no heartbeat after it; False if the job is another's by now."""
        with self._writing:
            self._done.set()
            try:
                persistently(partial(move, self.lease), self.store.settings.lease_seconds)
            except LeaseLost:
                log.warning("%s passed to another worker before its end was recorded", self.lease.job_id)
                return False
        return True

    def _keep(self) -> None:
        while not self._done.is_set():
            with self._writing:
                if not self._done.is_set():
                    self._beat()
            self._done.wait(self.store.settings.heartbeat_seconds)

    def _beat(self) -> None:
        phase = self._progress.phase if self._progress else "starting"
        try:
            self._state = self.store.heartbeat(self.lease, phase=phase, progress=self.snapshot())
            if self._writes is not None and self._writes.order is not self._told_order:
                order = self._writes.order
                self.store.keep_order(self.lease, order)
                self._told_order = order
            if phase != self._told:
                self.store.tell(self.lease, "phase", {"phase": phase})
                self._told = phase
            if self._state is JobState.CANCELING and self._progress is None:
                # Nothing has been begun, so there is nothing to wait for: importing torch alone can take seconds.
                self.store.confirm_cancel(self.lease)
        except LeaseLost:
            self._lost = self._state is not JobState.CANCELING
        except TROUBLE as error:
            log.warning("the lease of %s could not be renewed, trying again: %s", self.lease.job_id, said(error))
        except Exception:
            log.exception("the lease of %s could not be renewed; trying again", self.lease.job_id)
