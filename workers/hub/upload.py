"""A job's result on a Hub: each file of weights as soon as it is complete, and one commit of all at the end."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from merge_core.errors import Canceled, WeightsmithError
from workers.hub.errors import HubUnavailable
from workers.hub.files import is_large
from workers.problems import PROBLEMS

if TYPE_CHECKING:
    from merge_core.artifact import Artifact
    from merge_core.files import WrittenFile
    from merge_core.keys import HubKeys
    from merge_core.progress import Progress, Report
    from workers.hub.client import HubClient

PATIENCE_SECONDS = 600.0
"""How long a Hub that does not answer is asked again."""
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 30.0
_TICK_SECONDS = 0.2
log = logging.getLogger(__name__)


class PublishingFailed(WeightsmithError):
    """What the Hub said when a job's result was sent there; `problem` has it as data."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        self.code, self.title = problem["code"], PROBLEMS[problem["code"]].title
        self.retryable = PROBLEMS[problem["code"]].retryable
        super().__init__(problem["detail"])


class Publication:
    """Sends what a job makes to where its recipe says, as a `merge_core.delivery.Delivery`, and commits it.

    `stop` is asked whether to give up. The work is done by a process of its own, which ends with this one; the token
    goes to it by a pipe. Nothing is done before the first file.
    """

    def __init__(
        self,
        job_id: str,
        keys: HubKeys,
        client: HubClient,
        *,
        xet: str = "auto",
        removes: bool = False,
        stop: Callable[[], bool] = lambda: False,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.removes, self.sent = removes, 0
        self._keys, self._stop, self._patience = keys, stop, patience
        self._where = client
        self._asked = {
            "job_id": job_id,
            "repo": keys.repo,
            "private": keys.private,
            "revision": keys.revision,
            "create_pr": keys.create_pr,
            "endpoint": client.endpoint,
            "folder": str(client.folder),
            "allow": list(client.allow),
            "xet": xet,
        }
        self._process: subprocess.Popen[str] | None = None
        self._answers: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._is_over = False
        self._before = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_up()

    def deliver(self, path: Path, file: WrittenFile) -> None:
        asked = {"path": str(path), "name": file.path, "size": file.size, "sha256": file.sha256}
        self._ask({"do": "send", **asked})
        self._before += file.size
        self.sent = self._before

    def kept(self, artifact: Artifact) -> Artifact:
        """What stays here of an artifact: all of it, or all but the weights."""
        if not self.removes:
            return artifact
        return replace(artifact, files=tuple(file for file in artifact.files if not is_large(file.path)))

    def commit(self, artifact: Artifact, prove: Callable[[], None], report: Report) -> dict[str, Any]:
        """Commit all files of a finished artifact, once, and see that the Hub has them as they are: `repo`, `commit`,
        `url`, and `pr_url` if it was asked for by a pull request.

        `prove` raises unless the job is still this worker's.
        """
        from merge_core.progress import Progress

        files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in artifact.files]
        total = sum(file.size for file in artifact.files)
        progress = Progress("committing", bytes_written=self.sent, bytes_written_total=total)
        report(progress)
        whole = any(file.path.startswith("model") and file.path.endswith(".safetensors") for file in artifact.files)
        message = self._keys.commit_message or "Upload a merge made by Weightsmith"
        asked = {"folder": str(artifact.folder), "files": files, "message": message, "replaces_weights": whole}
        published = self._ask({"do": "commit", **asked}, prove)
        if self.removes:
            for file in artifact.files:
                if is_large(file.path):
                    (artifact.folder / file.path).unlink(missing_ok=True)
        return published

    def telling(self, report: Report) -> Report:
        """A report that also tells how many bytes went over the network."""

        def tell(progress: Progress) -> None:
            progress.bytes_sent = self.sent
            report(progress)

        return tell

    def give_up(self) -> None:
        with self._starting:
            self._is_over = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()

    # The process.

    def _ask(self, what: Mapping[str, Any], first: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """What came of it. A Hub that cannot answer is asked again, for so long; raises as it says otherwise. Each time
        `first` is called before.
        """
        began, wait = time.monotonic(), _FIRST_WAIT_SECONDS
        while True:
            first()
            try:
                return self._asked_once(what)
            except PublishingFailed as error:
                if error.code != HubUnavailable.code or time.monotonic() + wait > began + self._patience:
                    raise
                log.warning("%s; trying again in %.0f s", error, wait)
            until = time.monotonic() + wait
            while time.monotonic() < until:
                self._look_up()
                time.sleep(_TICK_SECONDS)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)

    def _asked_once(self, what: Mapping[str, Any]) -> dict[str, Any]:
        process = self._running()
        try:
            self._write(process, what)
        except OSError:
            raise self._lost(process) from None
        while True:
            self._look_up()
            try:
                answer = self._answers.get(timeout=_TICK_SECONDS)
            except Empty:
                continue
            if answer is None:
                raise self._lost(process)
            if "sent" in answer:
                self.sent = self._before + answer["sent"]
            elif "failed" in answer:
                raise PublishingFailed(answer["failed"])
            elif "broken" in answer:
                log.error("sending to the Hub broke: %s", answer["broken"])
                raise PublishingFailed(_broken(self._keys.repo))
            else:
                return dict(answer["done"])

    def _look_up(self) -> None:
        """Raise if nobody wants it any more."""
        try:
            if self._is_over or self._stop():
                raise Canceled("publishing was canceled")
        except BaseException:
            self.give_up()
            raise

    def _running(self) -> subprocess.Popen[str]:
        with self._starting:
            if self._is_over:
                raise Canceled("publishing was canceled")
            if self._process is None:
                self._answers = SimpleQueue()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "workers.hub.sender"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=_environment(),
                    cwd=Path(__file__).parents[2],
                )
                token = self._where.token
                assert token is not None
                self._write(self._process, {**self._asked, "token": token.get_secret_value()})
                threading.Thread(target=_listen, args=(self._process, self._answers), daemon=True).start()
            return self._process

    @staticmethod
    def _write(process: subprocess.Popen[str], what: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()

    def _lost(self, process: subprocess.Popen[str]) -> PublishingFailed:
        """The process ended, as when memory was short: the next question starts another."""
        process.kill()
        status = process.wait()
        with self._starting:
            self._process = None
        detail = f"the process that sends to {self._where.endpoint} ended with status {status}"
        return PublishingFailed({"code": HubUnavailable.code, "detail": detail})


def _listen(process: subprocess.Popen[str], answers: SimpleQueue[dict[str, Any] | None]) -> None:
    assert process.stdout is not None
    with suppress(ValueError, OSError):
        for line in process.stdout:
            answers.put(json.loads(line))
    answers.put(None)


def _environment() -> dict[str, str]:
    """What the process needs of ours: none of our secrets, nothing of whoever runs the service."""
    strange = ("HF_", "HUGGING", "WEIGHTSMITH_", "REDIS_URL", "DATABASE_URL", "AWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(strange)}


def _broken(repo: str) -> dict[str, Any]:
    return {"code": "internal-error", "detail": f"{repo}: an unexpected error, which the worker's log describes"}
