"""An evaluator that is a command: whoever runs the service has named it, a search says which, and with what options.

It is called with the candidate's folder; `WEIGHTSMITH_REQUEST` names a JSON file with values, options and metrics. What
it prints is one JSON object: the metrics. Lines before it of the form `{"step": 1, "value": 0.5}` tell the first metric
as far as it is known. It gets none of our environment but what it takes to run, and ends with us.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.errors import Canceled, EvaluationFailed
from merge_core.search.keys import finite
from workers.evaluators import digest_of

if TYPE_CHECKING:
    from merge_core.search.keys import CommandKeys
    from merge_core.search.trials import Candidate

MOST_BYTES = 64 * 1024
_TOLD = 2000
"""Of what it said on its standard error output, the last so many characters."""
_PASSED = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_POLL = 0.1
_LEASH = Path(__file__).with_name("leash.py")


class CommandEvaluator:
    """Runs one command (`merge_core.search.trials.Evaluator`)."""

    needs_folder = True

    def __init__(self, command: Sequence[str], keys: CommandKeys) -> None:
        self._command, self._keys = list(command), keys

    @property
    def digest(self) -> str:
        return digest_of("command", command=self._command, options=self._keys.options)

    def evaluate(self, candidate: Candidate) -> Mapping[str, Any]:
        assert candidate.folder is not None
        with tempfile.TemporaryDirectory(prefix="evaluate-", dir=candidate.folder.parent) as scratch:
            request = Path(scratch) / "request.json"
            told = {
                "trial": candidate.trial.number,
                "values": dict(candidate.trial.values),
                "options": self._keys.options,
            }
            request.write_text(json.dumps(told))
            passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
            environment = {**passed, "HOME": scratch, "TMPDIR": scratch, "WEIGHTSMITH_REQUEST": str(request)}
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LEASH), *self._command, str(candidate.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd=scratch,
                start_new_session=True,
            )
            try:
                said, complained = self._listen(process, candidate)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()
        status = process.returncode
        if status != 0:
            raise EvaluationFailed(
                f"the command {self._keys.name} ended with {status}: {_last(complained) or _last(said)}"
            )
        try:
            found = json.loads(said)
        except (ValueError, RecursionError):
            raise EvaluationFailed(f"the command {self._keys.name} printed no JSON: {_last(said)}") from None
        return found  # type: ignore[no-any-return]  # what it is is looked at by whoever asked

    def _listen(self, process: subprocess.Popen[bytes], candidate: Candidate) -> tuple[bytes, bytes]:
        """What the command printed, without the lines that tell steps, and of what it complained the end."""
        until = time.monotonic() + self._keys.timeout
        said, complained, line = bytearray(), bytearray(), bytearray()
        size = 0
        assert process.stdout is not None and process.stderr is not None
        with selectors.DefaultSelector() as pipes:
            pipes.register(process.stdout, selectors.EVENT_READ)
            pipes.register(process.stderr, selectors.EVENT_READ)
            while pipes.get_map():
                ready = pipes.select(_POLL)
                if not ready and process.poll() is not None:
                    break  # what it left behind keeps the pipes open
                for key, _ in ready:
                    data = os.read(key.fd, 2**14)
                    if not data:
                        pipes.unregister(key.fileobj)
                    elif key.fileobj is process.stderr:
                        complained = (complained + data)[-_TOLD:]
                    else:
                        size += len(data)
                        if size > MOST_BYTES:
                            detail = f"the command {self._keys.name} printed more than {MOST_BYTES:,} bytes"
                            raise EvaluationFailed(detail)
                        line += data
                        while b"\n" in line:
                            whole, _, rest = bytes(line).partition(b"\n")
                            line = bytearray(rest)
                            if not _told_step(whole, candidate):
                                said += whole + b"\n"
                if candidate.stop():
                    raise Canceled("the search was canceled")
                if time.monotonic() > until:
                    detail = f"the command {self._keys.name} was not done within {self._keys.timeout:g} s"
                    raise EvaluationFailed(f"{detail}: {_last(complained)}" if complained else detail)
        while process.poll() is None and time.monotonic() < until and not candidate.stop():
            time.sleep(_POLL / 10)
        if process.poll() is None:
            raise EvaluationFailed(f"the command {self._keys.name} was not done within {self._keys.timeout:g} s")
        return bytes(said + line), bytes(complained)


def _told_step(line: bytes, candidate: Candidate) -> bool:
    """Whether a line tells a step, which the candidate then knows."""
    if not line.lstrip().startswith(b'{"step"'):
        return False
    try:
        found = json.loads(line)
    except ValueError:
        return False
    if set(found) != {"step", "value"} or not isinstance(found["step"], int) or not finite(found["value"]):
        return False
    candidate.tell(found["step"], float(found["value"]))
    return True


def _last(text: bytes | bytearray) -> str:
    return text.decode(errors="replace").strip()[-300:]
