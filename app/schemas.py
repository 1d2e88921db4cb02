"""Response bodies."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from merge_core.method import Given
from workers.jobs import JobKind, JobState, RecipeData
from workers.tables import Event, Job, Trial

PROBLEM_TYPES = "/v1/problems/"
"""Where a problem's `type` leads: to what it means."""


class Urls(BaseModel):
    """Where to go on from a job."""

    self: str
    cancel: str
    retry: str
    events: str
    logs: str
    recipe: str
    files: str
    manifest: str
    report: str
    tensors: str


class Durations(BaseModel):
    """How long it took, in seconds; null where it has not come to that, or is not over."""

    queued: float | None
    running: float | None


class ResolvedRead(BaseModel):
    """What the name of a Hub model meant."""

    path: str = Field(description="as the document has it")
    revision: str | None
    endpoint: str
    repo: str
    commit: str
    inside: str = Field(description="the folder or file in the repository; empty for all of it")


class PublishedRead(BaseModel):
    """Where on a Hub a result is. `pr_url`: the pull request that asks for it."""

    repo: str
    commit: str
    url: str
    pr_url: str | None


class JobRead(BaseModel):
    """One job. Times are RFC 3339, UTC."""

    id: str
    kind: JobKind
    status: JobState
    phase: str = Field(description="what the worker is doing; empty unless running")
    progress: dict[str, Any] = Field(
        description="tensors and bytes done of how many, those received and sent over the network, rate in bytes per "
        "second, seconds left, tensor at work, and `tensors_finished`: runs of places among the `tensors` of the job"
    )
    attempt: int
    error: dict[str, Any] | None = Field(description="the problem that a failed job ended in")
    warnings: list[str]
    labels: dict[str, str]
    priority: int = Field(description="the queued job with the highest is taken first")
    deadline_at: datetime | None = Field(description="a job that is not done then has failed")
    recipe: RecipeData = Field(description="the document that was sent, tidied")
    plan: dict[str, Any]
    resolved: list[ResolvedRead] = Field(description="the commits that names of Hub models meant when it was accepted")
    hub: PublishedRead | None = Field(description="where on a Hub the result is, if the document wants it there")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    durations: Durations
    urls: Urls

    @classmethod
    def of(cls, job: Job) -> Self:
        """The job as its resource."""
        path = f"/v1/{JobKind(job.kind).plural}/{job.id}"
        return cls(
            id=job.id,
            kind=JobKind(job.kind),
            status=JobState(job.state),
            phase=job.phase,
            progress=job.progress,
            attempt=job.attempt,
            error=job.error and {"type": PROBLEM_TYPES + job.error.get("code", ""), **job.error},
            warnings=job.warnings,
            labels=job.labels,
            priority=job.priority,
            deadline_at=_moment(job.deadline_at),
            recipe=job.recipe,
            plan=job.plan,
            resolved=[ResolvedRead.model_validate(each) for each in job.resolved],
            hub=PublishedRead.model_validate(job.published) if job.published else None,
            created_at=moment(job.created_at),
            started_at=_moment(job.started_at),
            finished_at=_moment(job.finished_at),
            durations=Durations(
                queued=_between(job.created_at, job.started_at), running=_between(job.started_at, job.finished_at)
            ),
            urls=Urls(self=path, **{name: f"{path}/{name}" for name in Urls.model_fields if name != "self"}),
        )


class ProblemRead(BaseModel):
    """What went wrong (RFC 9457): `errors` has a pointer into the recipe, a tensor or a file for each place."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool = False
    errors: list[dict[str, str]] = []
    request_id: str | None = Field(None, description="by which the service's log tells more")


class ProblemTypeRead(BaseModel):
    """A kind of problem, for programs `code` and for people the rest."""

    type: str
    code: str
    status: int = Field(description="of an answer that says it; a job may end in it too")
    title: str
    meaning: str
    retryable: bool = Field(description="whether the same may work later")


class ProblemTypeList(BaseModel):
    """Every kind of problem."""

    data: list[ProblemTypeRead]


class JobPage(BaseModel):
    """Jobs, newest first; `next` is the `after` of the following page."""

    data: list[JobRead]
    has_more: bool
    next: str | None


class EventRead(BaseModel):
    """Something that happened to a job; `seq` numbers a job's events from 1 and may leave numbers out."""

    seq: int
    at: datetime
    event: str = Field(description="state, phase, warning or log")
    data: dict[str, Any]

    @classmethod
    def of(cls, event: Event) -> Self:
        return cls(seq=event.seq, at=moment(event.at), event=event.kind, data=event.data)


class EventPage(BaseModel):
    """Events, oldest first; `next` is the `after` of what follows, now or later."""

    data: list[EventRead]
    has_more: bool
    next: int


class TrialRead(BaseModel):
    """A trial of a search: `status` is open until it is done, pruned, or refused because nothing can be made of it."""

    number: int
    status: Literal["open", "done", "pruned", "refused"]
    values: dict[str, Any] = Field(description="by the names in the search; of a soup: the numbers of its `models`")
    metrics: dict[str, float]
    steps: dict[str, float] = Field(description="the first metric on the way, by step")
    detail: str | None = Field(description="why it is refused")
    digest: str = Field(description="trials with the same digest come to the same, and are made once")
    seconds: float | None = Field(description="merging and evaluating; null where another search had made it")
    finished_at: datetime | None

    @classmethod
    def of(cls, row: Trial) -> Self:
        outcome = row.outcome or {}
        return cls(
            number=row.number,
            status=row.state,
            values=row.tried,
            metrics=outcome.get("metrics", {}),
            steps=outcome.get("steps", {}),
            detail=outcome.get("detail"),
            digest=row.digest,
            seconds=row.seconds,
            finished_at=_moment(row.finished_at),
        )


class TrialPage(BaseModel):
    """Trials, in order; `next` is the `after` of the following page."""

    data: list[TrialRead]
    has_more: bool
    next: int | None


class PhaseRead(BaseModel):
    """A phase of a job; `seconds` is null while it lasts."""

    phase: str
    started_at: datetime
    seconds: float | None


class SourceRead(BaseModel):
    """What was read of one model."""

    model: str | None
    commit: str | None
    files: int
    bytes: int


class Report(BaseModel):
    """How a job went. What it has not come to yet is null or empty."""

    id: str
    status: JobState
    attempts: int
    workers_lost: int
    phases: list[PhaseRead]
    planned: dict[str, Any]
    done: dict[str, Any] = Field(description="the progress, as it was last")
    files: int
    bytes: int = Field(description="of all files")
    sources: list[SourceRead] | None
    seed: int | None
    exact_on: str | None = Field(description="where the same recipe gives the same bytes")
    left_out: list[str]
    warnings: list[str]
    alignment: dict[str, Any] | None = Field(description="how far each tensor was and is")
    verification: dict[str, Any] | None = Field(
        description="which files and tensors agree, differ, or were not checked"
    )
    error: dict[str, Any] | None


class TensorsRead(BaseModel):
    """The tensors that a job writes, in the order of its output, and which of them are whole.

    Nothing is listed before a worker knows them, of jobs that were over in a moment, and of kinds that write no model.
    """

    names: list[str]
    finished: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(
        description="runs of places: the first, and the one after the last"
    )


class Digested(BaseModel):
    """A file, named and proved."""

    name: str
    digest: dict[str, str]


class Manifest(BaseModel):
    """An in-toto Statement v1 with SLSA's provenance v1 as its predicate."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[Digested]
    predicateType: Literal["https://slsa.dev/provenance/v1"]  # noqa: N815
    predicate: dict[str, Any]


class Limits(BaseModel):
    """What the service takes."""

    document_bytes: int
    memory: int = Field(description="the most that limits.memory may ask for, in bytes")
    page: int
    wait_seconds: float
    labels: int
    deadline_seconds: int


class SystemRead(BaseModel):
    """The service: what it is, what it takes, how busy it is."""

    version: str
    versions: dict[str, str] = Field(description="of what it is built on")
    kinds: list[JobKind]
    methods: int
    limits: Limits
    queued: int = Field(description="jobs that wait for a worker")
    running: int = Field(description="jobs that a worker has")
    workers: int = Field(description="workers that reported lately")


class FileRead(BaseModel):
    """One file of a finished job."""

    path: str
    size: int
    sha256: str
    url: str


class FileList(BaseModel):
    """The files of a finished job."""

    data: list[FileRead]


class WebhookSecret(BaseModel):
    """What an owner's webhooks verify messages with."""

    secret: str = Field(description="`whsec_` and base64, as the libraries of Standard Webhooks take it")


class DeliveryRead(BaseModel):
    """A message to a webhook. Its `id` is the `webhook-id` of every attempt at it."""

    id: str
    event: str = Field(description="such as merge.succeeded")
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    last_error: str | None = Field(description="what came of the latest attempt, where it failed")
    created_at: datetime
    delivered_at: datetime | None
    next_attempt_at: datetime | None


class DeliveryList(BaseModel):
    """Messages to a job's webhook, oldest first."""

    data: list[DeliveryRead]


class Validation(BaseModel):
    """What a recipe would do, from headers alone."""

    plan: dict[str, Any]
    recipe: RecipeData
    resolved: list[ResolvedRead] = Field([], description="the commits that names of Hub models mean now")


class IgnoredKey(BaseModel):
    """A key of a published recipe that has no effect."""

    pointer: str
    what: str = Field(description="what mergekit does with it")


class Imported(BaseModel):
    """A published recipe as it is read here; `yaml` is the same as text, to be POSTed."""

    recipe: RecipeData
    yaml: str
    found_in: str = Field(description="recipe or model card")
    ignored: list[IgnoredKey]


class MethodRead(BaseModel):
    """A merge method with one meaning of its name."""

    name: str
    semantics: str = Field(description="whose meaning: mergekit's (the default) or the paper's (`semantics: paper`)")
    title: str
    summary: str
    description: str
    equation: str = Field(description="formulas as text, and what they need to be understood; paragraphs of lines")
    paper: str
    base: str
    models: dict[str, int | None]
    scopes: list[str]
    per_model: list[str] = Field(description="parameters that may differ per model")
    own_bases: bool = Field(description="whether `base_model` stands beside each model: what it was tuned from")
    statistics: dict[str, Given] = Field(description="files of numbers that the recipe's `statistics` may name")
    parameters: dict[str, Any] = Field(description="JSON Schema")


class MethodList(BaseModel):
    """Every merge method."""

    data: list[MethodRead]


class ModelRead(BaseModel):
    """A model in one of the service's folders; what its config does not say is null."""

    name: str = Field(description="what recipes call it")
    kind: Literal["model", "adapter", "file"] = Field(
        description="a folder with weights, one with an adapter's, or a lone file of weights"
    )
    bytes: int = Field(description="of its files of weights")
    architecture: str | None
    dtype: str | None
    layers: int | None
    hidden_size: int | None
    vocabulary: int | None


class ModelPage(BaseModel):
    """Models by name; `next` is the `after` of the following page."""

    data: list[ModelRead]
    has_more: bool
    next: str | None
    incomplete: bool = Field(description="whether the folders have more in them than is looked at")


class Check(BaseModel):
    """Something that the service depends on."""

    status: Literal["ok", "warning", "failing"]
    detail: str


class Health(BaseModel):
    """Whether the service is up, and what it depends on."""

    status: str
    checks: dict[str, Check] = {}


def moment(seconds: float) -> datetime:
    """A time of a row as answers show it."""
    return datetime.fromtimestamp(seconds, UTC)


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else moment(seconds)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 3)
