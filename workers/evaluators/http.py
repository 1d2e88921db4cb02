"""An evaluator over HTTP: we POST where the candidate can be read, and it answers metrics.

The message is signed as webhooks are (https://www.standardwebhooks.com); its id is the trial's, so that whoever is
asked twice can tell. 200 answers with metrics; 202 asks to be asked again, after `Retry-After`; who answers 429 or 5xx
is asked again, later each time; all else is an end. No redirect is followed, and only allowed addresses are called.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx2

from merge_core import __version__
from merge_core.errors import Canceled, EvaluationFailed
from workers.candidates import shown
from workers.evaluators import Around, digest_of
from workers.outbound import ForbiddenAddress, Guard
from workers.signing import Signer

if TYPE_CHECKING:
    from merge_core.search.keys import HttpKeys
    from merge_core.search.trials import Candidate

MOST_BYTES = 64 * 1024
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_POLL = 0.1
_SHOWN = 300


class _Again(Exception):
    """It may be asked again, after so many seconds; None: as usual."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        self.why, self.seconds = why, seconds
        super().__init__(why)


class HttpEvaluator:
    """Asks one URL (`merge_core.search.trials.Evaluator`)."""

    needs_folder = False

    def __init__(self, around: Around, keys: HttpKeys) -> None:
        self._around, self._keys = around, keys
        self._guard = Guard(around.settings.evaluator_allow)

    @property
    def digest(self) -> str:
        return digest_of("http", url=self._keys.url)

    def evaluate(self, candidate: Candidate) -> Mapping[str, Any]:
        around = self._around
        with shown(around.store, around.lease, candidate.recipe, around.roots, candidate.stop) as view:
            return self._ask(candidate, self._message(candidate, view))

    def _message(self, candidate: Candidate, view: str) -> str:
        place, trial = self._around.settings.public_url, candidate.trial
        told = {
            "search": self._around.lease.job_id,
            "trial": trial.number,
            "values": dict(trial.values),
            "metrics": dict(self._around.document.keys.wanted),
            "endpoint": f"{place}/hub",
            "repo": f"views/{view}",
            "recipe": candidate.recipe.to_data(),
        }
        body = {"type": "candidate.evaluate", "timestamp": datetime.now(UTC).isoformat(), "data": told}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"))

    def _ask(self, candidate: Candidate, message: str) -> Mapping[str, Any]:
        until = time.monotonic() + self._keys.timeout
        attempts, why = 0, ""
        while (left := until - time.monotonic()) > 0:
            try:
                return _metrics(_interruptible(partial(self._post, candidate, message, left), candidate.stop))
            except _Again as again:
                why = f": {again.why}"
                wait = again.seconds if again.seconds is not None else min(_FIRST_WAIT * 2**attempts, _LONGEST_WAIT)
                attempts += 1
            _sleep(min(wait, max(0.0, until - time.monotonic())), candidate.stop)
        raise EvaluationFailed(f"the evaluator gave no metrics within {self._keys.timeout:g} s{why}")

    def _post(self, candidate: Candidate, message: str, seconds: float) -> str:
        """The text of a good answer. Raises `_Again` or `EvaluationFailed`."""
        now, name = datetime.now(UTC), f"msg_{candidate.trial.digest[:32]}"
        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"Weightsmith/{__version__}",
            "webhook-id": name,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Signer(self._around.settings).sign(self._around.lease.owner, name, now, message),
        }
        transport = self._guard.transport(seconds=seconds, most_bytes=MOST_BYTES)
        try:
            with httpx2.Client(transport=transport, trust_env=False, timeout=seconds) as http:
                answer = http.post(self._keys.url, content=message.encode(), headers=headers)
        except ForbiddenAddress as error:
            raise EvaluationFailed(str(error)) from None
        except httpx2.TimeoutException:
            raise _Again("no answer in time") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            if "too long" in str(error):
                raise EvaluationFailed(f"the evaluator answered more than {MOST_BYTES:,} bytes") from None
            raise _Again(f"no answer ({str(error)[:200] or type(error).__name__})") from None
        status, text = answer.status_code, answer.text
        if status == 202 or status == 429 or status >= 500:
            raise _Again(f"it answered {status} {_short(text)}".strip(), _seconds(answer.headers.get("retry-after")))
        if status != 200:
            raise EvaluationFailed(f"the evaluator answered {status}, and 200 was expected: {_short(text)}")
        return text


def _metrics(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise EvaluationFailed(f"the evaluator answered no JSON: {_short(text)}") from None
    # What they are is looked at by whoever asked.
    return found.get("metrics", found) if isinstance(found, dict) else found  # type: ignore[no-any-return]


def _short(text: str) -> str:
    return text[:_SHOWN] + ("…" if len(text) > _SHOWN else "")


def _seconds(written: str | None) -> float | None:
    """What `Retry-After` says, where it says seconds."""
    return float(written) if written is not None and written.isdecimal() and len(written) < 6 else None


def _sleep(seconds: float, stop: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if stop():
            raise Canceled("the search was canceled")
        time.sleep(min(left, _POLL))


def _interruptible(call: Callable[[], str], stop: Callable[[], bool]) -> str:
    """What a call that only waits comes to; given up, and left to its own end, where `stop` says so."""
    came: list[str | BaseException] = []

    def work() -> None:
        try:
            came.append(call())
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=work, name="evaluator", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
        if thread.is_alive() and stop():
            raise Canceled("the search was canceled")
    if isinstance(came[0], BaseException):
        raise came[0]
    return came[0]
