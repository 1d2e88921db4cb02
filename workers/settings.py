"""The environment, read once, shared by the service and its workers."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)
from sqlalchemy import URL

from merge_core.sizes import Bytes

WORKER_VARIABLE = "WEIGHTSMITH_WORKER"
"""Set by a supervisor: the name under which its worker's leases can be told from others."""
VIEWS_AT_ONCE = 4
"""Views that one API computes at a time."""
HELD_BY_READERS = 96 * 2**20
"""Blocks of views that were computed and wait for whoever asked for them; a larger one is read alone."""
SUPERVISOR_VARIABLE = "WEIGHTSMITH_SUPERVISOR"
"""Set by a supervisor: its process id, without which its worker is not to go on."""


def _split_paths(written: object) -> object:
    if not isinstance(written, str):
        return written
    return (
        json.loads(written) if written.startswith("[") else [Path(part) for part in written.split(os.pathsep) if part]
    )


def _check_place(written: str) -> str:
    scheme, separator, rest = written.partition("://")
    if separator and (scheme != "s3" or not rest.strip("/")):
        raise ValueError(f"{written} is neither a folder nor s3://bucket/prefix")
    return written


def _check_hub(written: str) -> str:
    if written and not written.startswith(("https://", "http://")):
        raise ValueError("it is like https://huggingface.co, or empty for no Hub at all")
    return written.rstrip("/")


def _check_url(written: str) -> str:
    if not written.startswith(("https://", "http://")):
        raise ValueError("it is like https://merges.example.org")
    return written.rstrip("/")


def _check_redis(written: str) -> str:
    scheme, separator, _ = written.partition("://")
    if scheme not in ("redis", "rediss", "unix") or not separator:
        raise ValueError("it is like redis://:password@host:6379/0, rediss://… for TLS, or unix:///path/of/socket?db=0")
    return written


def _written(value: Any) -> str:
    """A setting as it is written in the environment."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, default=str)
    return str(value)


def _split_words(written: object) -> object:
    if not isinstance(written, str):
        return written
    return json.loads(written) if written.startswith("[") else written.replace(",", " ").split()


class Settings(BaseSettings):
    """`WEIGHTSMITH_DATA=/srv/weightsmith`, `WEIGHTSMITH_MODEL_ROOTS=/models:/more`, `REDIS_URL`, `DATABASE_URL`, …

    Everything has a default under which one machine needs no other service: SQLite and a filesystem broker in the data
    folder.
    """

    # What is wrong is told without what was given, which may be a password.
    model_config = SettingsConfigDict(env_prefix="WEIGHTSMITH_", populate_by_name=True, hide_input_in_errors=True)

    data: Path = Field(Path("weightsmith-data"), description="where jobs, artifacts and the embedded broker live")
    model_roots: Annotated[list[Path], NoDecode, BeforeValidator(_split_paths)] = Field(
        [],
        description="folders that recipes may name models in, separated by colons (default: models in the data folder)",
    )
    redis_url: Annotated[str, AfterValidator(_check_redis)] | None = Field(
        None,
        validation_alias=AliasChoices("redis_url", "REDIS_URL"),
        description="Redis as the broker (default: files in the data folder)",
    )
    database_url: str | None = Field(
        None,
        validation_alias=AliasChoices("database_url", "DATABASE_URL"),
        description="PostgreSQL as the database (default: SQLite in the data folder)",
    )
    secrets: Path | None = Field(
        None,
        description="a folder of files with settings that nobody is to see, such as Docker's /run/secrets; each is "
        "named like its variable in small letters: `database_url`, `weightsmith_secret_key`",
    )
    artifact_store: Annotated[str, AfterValidator(_check_place)] | None = Field(
        None,
        validation_alias=AliasChoices("artifact_store", "WEIGHTSMITH_ARTIFACTS"),
        description="where finished artifacts are kept, a folder or s3://bucket/prefix (default: in the data folder)",
    )
    s3_endpoint: str | None = Field(
        None,
        description="the store's URL if it is not Amazon's, such as https://minio:9000 (default: AWS_ENDPOINT_URL)",
    )
    s3_region: str | None = Field(None, description="the bucket's region (default: AWS_REGION)")
    s3_access_key_id: SecretStr | None = Field(None, description="default: AWS_ACCESS_KEY_ID")
    s3_secret_access_key: SecretStr | None = Field(None, description="default: AWS_SECRET_ACCESS_KEY")
    s3_redirect: bool = Field(False, description="send who downloads to the store itself, with a link that expires")
    keep_local: bool = Field(False, description="keep a copy in the data folder of what the artifact store has")
    auth: Literal["auto", "keys", "none"] = Field(
        "auto", description="whether API keys are asked for; `auto`: unless the service listens on loopback alone"
    )
    secret_key: SecretStr | None = Field(
        None,
        description="what credentials are sealed under, 32 random bytes in base64; several, separated by commas, while "
        "one takes another's place, the new one first (default: a file in the data folder)",
    )
    endpoint_allow: Annotated[list[str], NoDecode, BeforeValidator(_split_words)] = Field(
        [],
        description="hosts, addresses and networks that owners' own S3 stores, and files of Hubs, may be at although "
        "they are not public",
    )
    hub_endpoint: Annotated[str, AfterValidator(_check_hub)] = Field(
        "https://huggingface.co", description="the Hub that models named by id are on; empty for none"
    )
    hub_endpoint_allow: Annotated[list[str], NoDecode, BeforeValidator(_split_words)] = Field(
        [], description="further Hubs that a job may name with ?hub_endpoint="
    )
    hub_mode: Literal["auto", "cached", "streamed"] = Field(
        "auto",
        description="how models come from a Hub: whole files into a cache on the disk, or ranges that no disk sees; "
        "`auto`: cached where a job's files fit into the cache together",
    )
    hub_cache_bytes: Bytes = Field(
        50 * 10**9, description="the most that files from Hubs take of the disk; the longest unused go first"
    )
    hub_xet: Literal["auto", "off"] = Field(
        "auto", description="how files go to a Hub: by Xet where it takes that, or `off`, by LFS to any"
    )
    quota_running_jobs: int | None = Field(None, ge=0, description="an owner's jobs that run at once (default: any)")
    quota_queued_jobs: int | None = Field(None, ge=0, description="an owner's jobs that wait (default: any)")
    quota_job_bytes: Bytes | None = Field(None, description="what one job may read and write (default: any)")
    quota_daily_bytes: Bytes | None = Field(
        None, description="what an owner's jobs may read and write in 24 hours (default: any)"
    )
    quota_disk_bytes: Bytes | None = Field(
        None, description="what an owner's artifacts and unfinished jobs may take of the disk (default: any)"
    )
    max_memory: Bytes = Field(4 * 2**30, description="the most that a recipe's limits.memory may ask for")
    view_memory: Bytes = Field(
        2**31, description="what the API may hold to compute what is read of views, libraries included"
    )
    view_cache: Bytes = Field(256 * 2**20, description="what the API keeps of views' blocks that were computed")
    threads: int | None = Field(None, ge=1, description="compute threads of one merge (default: the cores, shared out)")
    workers: int | None = Field(None, ge=0, description="worker processes (default: one, or one for each GPU)")
    unit_bytes: Bytes = Field(
        256 * 2**20,
        ge=1,
        description="the most output, about, that one worker takes of a merge that others may help with",
    )
    alone_seconds: float = Field(
        3.0, ge=0, description="how long a merge is one worker's alone: others would take as long to begin"
    )
    device: str = Field("cpu", description="where merges compute: cpu, cuda, cuda:1 … or auto; the bytes are the same")
    lease_seconds: float = Field(30.0, gt=0, description="how long a silent worker keeps a job")
    heartbeat_seconds: float = Field(0.5, gt=0, description="how often a worker reports and looks for a cancel")
    max_wait: float = Field(60.0, ge=0, le=60, description="the longest that ?wait= holds an answer back, in seconds")
    max_stream: float = Field(3600.0, gt=0, description="when a stream of events is to be opened anew, in seconds")
    max_attempts: int = Field(5, ge=1, description="how many workers may die at a job before it is given up")
    webhook_key: SecretStr | None = Field(
        None,
        description="what webhooks' secrets are made from: 32 random characters or more, the same on all machines; "
        "several, with commas, while they change (default: a file in the data folder)",
    )
    webhook_allow: Annotated[list[str], NoDecode, BeforeValidator(_split_words)] = Field(
        [],
        description="hosts, addresses and networks that webhooks may be at although they are not public, or speak http",
    )
    webhook_retry_seconds: float = Field(
        5.0,
        gt=0,
        description="how long after a failed delivery the first retry comes; further ones take 4 times longer",
    )
    public_url: Annotated[str, AfterValidator(_check_url)] | None = Field(
        None,
        description="where this service is reached, such as https://merges.example.org: what evaluators are told "
        "(default: where `weightsmith serve` listens)",
    )
    evaluator_allow: Annotated[list[str], NoDecode, BeforeValidator(_split_words)] = Field(
        [],
        description="hosts, addresses and networks that evaluators of searches may be at although they are not "
        "public, or speak http",
    )
    evaluator_commands: dict[str, list[str]] = Field(
        {},
        description="commands that evaluate candidates of searches on the workers, by the names that recipes have for "
        'them: `{"arc": ["python3", "/srv/arc.py"]}` (default: none)',
    )
    evaluator_data_bytes: Bytes = Field(2**30, description="the largest file of data that an evaluator reads")
    redeliver_seconds: float = Field(10.0, gt=0, description="how long a queued job waits before it is announced again")
    keep_days: float | None = Field(
        None, gt=0, description="how long finished artifacts are kept (default: until somebody deletes them)"
    )
    event_days: float = Field(30.0, gt=0, description="how long what happened to a job that has ended is kept")
    alive_file: Path | None = Field(
        None, description="a file that a supervisor touches every ten seconds while all its workers live"
    )
    disk_reserve: Bytes = Field(64 * 2**20, description="disk that is given to no job")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least of what is logged")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`json`: one object a line; `console`: for eyes; `auto`: that on a terminal, else JSON"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What was given, then the environment, then the files in `secrets`, if that is named in the environment."""
        folder = os.environ.get(f"{cls.model_config['env_prefix']}SECRETS")
        if not folder:
            return init_settings, env_settings
        if not Path(folder).is_dir():
            raise ValueError(f"WEIGHTSMITH_SECRETS: there is no folder {folder}")
        return init_settings, env_settings, SecretsSettingsSource(settings_cls, secrets_dir=folder)

    @property
    def roots(self) -> list[Path]:
        return [root.absolute() for root in self.model_roots] or [self.data.absolute() / "models"]

    @property
    def artifacts(self) -> Path:
        """Where work grows, and where what is finished stays unless an artifact store is named."""
        return self.data.absolute() / "artifacts"

    @property
    def uploads(self) -> Path:
        """Files of data that owners sent."""
        return self.data.absolute() / "uploads"

    @property
    def cache(self) -> Path:
        """What need not be found out twice: the inputs' hashes."""
        return self.data.absolute() / "cache"

    @property
    def hub_folder(self) -> Path:
        """What comes from Hubs: snapshots' headers and small files, and the cache of whole files."""
        return self.data.absolute() / "hub"

    @property
    def memory_of_view(self) -> int:
        """What one view may hold, as its plan reckons: `VIEWS_AT_ONCE` share what the API may, beside its libraries and
        what readers hold.
        """
        libraries = 400 * 2**20
        return libraries + max(0, self.view_memory - libraries - HELD_BY_READERS) // VIEWS_AT_ONCE

    @property
    def broker(self) -> Path:
        return self.data.absolute() / "broker"

    @cached_property
    def site(self) -> str:
        """A name that all have who see this data folder, and nobody else."""
        path = self.data.absolute() / "site"
        if not path.exists():
            mine = path.with_name(f".site-{uuid.uuid4().hex}")
            mine.write_text(uuid.uuid4().hex)
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(mine)
            mine.unlink()
        return path.read_text()

    @cached_property
    def database(self) -> str | URL:
        return self.database_url or URL.create("sqlite", database=str(self.data.absolute() / "jobs.sqlite"))

    @classmethod
    def variables(cls) -> dict[str, str]:
        """The environment variable that each setting is read from."""
        found = {}
        for name, field in cls.model_fields.items():
            alias = field.validation_alias
            written = [choice for choice in alias.choices if choice != name] if isinstance(alias, AliasChoices) else []
            found[name] = str(written[0]) if written else f"WEIGHTSMITH_{name.upper()}"
        return found

    def environment(self) -> dict[str, str]:
        """These settings as variables, for another process of the same service, wherever that starts."""
        absolute = self.model_copy(update={"data": self.data.absolute(), "model_roots": self.roots})
        values = {name: getattr(absolute, name) for name in type(self).model_fields}
        return {self.variables()[name]: _written(value) for name, value in values.items() if value is not None}

    def prepare(self) -> None:
        """Make the folders that are missing."""
        for folder in (self.data, self.artifacts, *([] if self.model_roots else self.roots)):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.broker, *(self.broker / name for name in ("queue", "control"))):
            folder.mkdir(mode=0o700, exist_ok=True)
