"""`weightsmith serve | worker | migrate | reseal`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.cli.terminal import DATA, MODELS, failures_told, settings_of
from merge_core import __version__

if TYPE_CHECKING:
    from workers.settings import Settings
    from workers.supervisor import Supervisor

log = logging.getLogger(__name__)
WORKERS = click.option(
    "--workers", type=click.IntRange(0), help="Worker processes.  [default: one, or one for each GPU; 0 only serves]"
)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@DATA
@MODELS
@WORKERS
def serve(host: str, port: int, data: Path | None, models: tuple[Path, ...], workers: int | None) -> None:
    """Run the service and its workers: no Redis, no Docker.

    Models are read only from the folders given by --models; recipes name them by their paths below these.
    """
    with failures_told():
        from app.auth import Doors, doors_for, is_loopback
        from app.main import create_app
        from app.serving import Server
        from workers.logs import configure_logs
        from workers.supervisor import Supervisor

        settings = settings_of(data, models, workers=workers)
        if settings.public_url is None and port:
            reached = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 — where others find it they say
            settings = settings.model_copy(update={"public_url": f"http://{reached}:{port}"})
        configure_logs(settings, "service")
        doors = doors_for(settings, host)
        if doors is Doors.OPEN and not is_loopback(host):
            log.warning("anybody who can reach %s can use this service; it asks for no keys", host)
        supervisor = Supervisor(settings)
        server = Server(create_app(settings, host=host), host, port, supervisor)
        with closing(server.config.bind_socket()) as listening, _supervised(supervisor):
            _tell_start(settings, f"http://{host}:{listening.getsockname()[1]}")
            if doors is Doors.KEYS:
                log.info("API keys are asked for; `weightsmith keys create OWNER` makes one")
            server.run(sockets=[listening])
        # Nothing is left to do, and taking torch apart costs seconds of the ten that `docker stop` gives.
        logging.shutdown()
        os._exit(0 if server.started else 1)


@click.command()
@DATA
@MODELS
@WORKERS
def worker(data: Path | None, models: tuple[Path, ...], workers: int | None) -> None:
    """Run more workers on this machine, or on another with the same database and broker; those that see the same data
    folder help one another with large merges.
    """
    with failures_told():
        from workers.logs import configure_logs
        from workers.supervisor import Supervisor

        settings = settings_of(data, models, workers=workers)
        configure_logs(settings, "supervisor")
        supervisor = Supervisor(settings)
        with _supervised(supervisor):
            supervisor.wait()


@click.command()
@DATA
def migrate(data: Path | None) -> None:
    """Bring the database's tables up to date. `serve` and `worker` do so too when they start; this is for who wants it
    done before, once.
    """
    with failures_told():
        from workers import database

        settings = settings_of(data, ())
        settings.prepare()
        engine = database.open_database(settings)
        click.echo(f"{database.shown(engine.url)}: tables at revision {database.revision(engine)}")
        engine.dispose()


@click.command()
@DATA
def reseal(data: Path | None) -> None:
    """Seal stored credentials anew under the first key in WEIGHTSMITH_SECRET_KEY, so that those behind it can go."""
    with failures_told():
        from workers import credentials
        from workers.jobs import JobStore

        with closing(JobStore(settings_of(data, ()))) as store:
            done, lost = credentials.reseal(store)
    click.echo(f"{done} sealed anew")
    for owner, name in lost:
        click.echo(f"error: no key opens the credential of {owner}: {name}; it is to be stored anew", err=True)
    sys.exit(1 if lost else 0)


def _tell_start(settings: Settings, url: str) -> None:
    """Where the service is: for eyes on a terminal, in the log elsewhere."""
    roots = ", ".join(map(str, settings.roots))
    if sys.stderr.isatty():
        click.echo(f"Weightsmith {__version__}: {url}", err=True)
        click.echo(f"  models in {roots}\n  data in {settings.data.absolute()}", err=True)
    else:
        about = {"version": __version__, "url": url, "models": roots, "data": str(settings.data.absolute())}
        log.info("started", extra=about)


def _leave(*_: object) -> None:
    """SIGTERM is Ctrl-C: what was started is stopped on the way out."""
    raise KeyboardInterrupt


@contextmanager
def _supervised(supervisor: Supervisor) -> Iterator[None]:
    """A worker that runs until the end, however that comes. A signal while it is being stopped ends it at once."""
    from app.serving import end_now

    if not supervisor.hears_broker():
        log.warning("the broker that REDIS_URL names does not answer; jobs wait until it does")
    signal.signal(signal.SIGTERM, _leave)
    supervisor.start()
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: end_now(supervisor, number))
        supervisor.stop()
