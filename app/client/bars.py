"""What bars show of jobs and downloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from app.bars import terminal_bar

if TYPE_CHECKING:
    from app.client.objects import Job


@contextmanager
def job_bar(wanted: bool | Callable[[Job], None]) -> Iterator[Callable[[Job], None]]:
    """Yields what to tell of a job's progress: the bar, where one is wanted and there is a terminal."""
    if callable(wanted):
        yield wanted
        return
    with terminal_bar(wanted) as bar:
        if bar is None:
            yield lambda job: None
            return
        task = bar.add_task("waiting", total=None)

        def report(job: Job) -> None:
            done = job.progress
            bar.update(
                task,
                description=job.phase or job.status,
                completed=done.bytes_read + done.bytes_written,
                total=done.bytes_read_total + done.bytes_written_total or None,
            )

        yield report


@contextmanager
def download_bar(wanted: bool, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what to tell of bytes that have arrived."""
    with terminal_bar(wanted) as bar:
        if bar is None:
            yield lambda count: None
            return
        task = bar.add_task("downloading", total=total)
        yield lambda count: bar.advance(task, count)
