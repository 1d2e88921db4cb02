"""Evaluators of others: whatever they say or do not say, it is told, in time, and nothing of ours is told to them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from merge_core.errors import Canceled, EvaluationFailed, RecipeError
from merge_core.search.document import Search
from merge_core.search.trials import Candidate, Pruned, Trial
from tests.receivers import Received, receiving
from tests.services import eventually, is_alive
from workers.evaluators import Around, check_evaluator, http
from workers.evaluators.command import _LEASH, CommandEvaluator
from workers.evaluators.data import Shelves
from workers.evaluators.http import MOST_BYTES, HttpEvaluator
from workers.jobs import JobKind, Lease
from workers.settings import Settings

TRIAL = Trial(7, {"weight": 0.5}, "d" * 64)


def document(**evaluator: Any) -> Search:
    search = {"method": "random", "trials": 2, "space": {"weight": {"low": 0, "high": 1}}, "evaluator": evaluator}
    models = [{"model": "a"}, {"model": "b"}]
    return Search.from_data(
        {"merge_method": "linear", "models": models, "search": search | {"metrics": {"score": "maximize"}}}
    )


def candidate(folder: Path | None = None, *, stop: Callable[[], bool] = lambda: False, **bars: Any) -> Candidate:
    recipe = document(http={"url": "https://e"}).candidate(TRIAL.values)
    return Candidate(TRIAL, recipe, "plan", folder, stop, bars.get("bars", {}), "score", "maximize")


@pytest.fixture
def received() -> Iterator[Received]:
    with receiving() as found:
        yield found


@pytest.fixture
def asks(tmp_path: Path, received: Received, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mapping[str, Any]]:
    """Asks an evaluator about a candidate that is shown already."""
    monkeypatch.setattr(http, "shown", lambda *_: contextlib.nullcontext("viw_1"))
    monkeypatch.setattr(http, "_FIRST_WAIT", 0.01)

    def ask(*, allow: str = "127.0.0.1", timeout: float = 20, **how: Any) -> Mapping[str, Any]:
        settings = Settings(data=tmp_path, evaluator_allow=[allow], public_url="https://w.example")
        asked = document(http={"url": f"http://127.0.0.1:{received.port}/", "timeout": timeout})
        lease = Lease("sch_1", "w/1", 1, JobKind.SEARCH, "ann", {})
        around = Around(settings, SimpleNamespace(settings=settings), lease, asked, [])  # type: ignore[arg-type]
        assert asked.keys.evaluator.http is not None
        return HttpEvaluator(around, asked.keys.evaluator.http).evaluate(candidate(**how))

    return ask


def says(status: int, body: Any = b"", **headers: str) -> Callable[[Any], None]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler: Any) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(data)

    return answer


def in_turn(*answers: Callable[[Any], None]) -> Callable[[Any], None]:
    left = list(answers)
    return lambda handler: left.pop(0)(handler)


@pytest.mark.parametrize("body", [{"score": 0.5}, {"metrics": {"score": 0.5}, "about": "it"}])
def test_metrics_come_alone_or_under_their_name(asks: Any, received: Received, body: Any) -> None:
    received.answer = says(200, body)
    assert asks() == {"score": 0.5}
    ((path, headers, told),) = received.requests
    data = json.loads(told)["data"]
    assert path == "/" and headers["webhook-id"] == f"msg_{'d' * 32}" and headers["webhook-signature"].startswith("v1,")
    assert data["endpoint"] == "https://w.example/hub" and data["repo"] == "views/viw_1" and data["trial"] == 7
    assert data["values"] == {"weight": 0.5} and data["metrics"] == {"score": "maximize"}


def test_who_is_not_ready_is_asked_again_with_the_same_id(asks: Any, received: Received) -> None:
    later = [says(status, b"", Retry_After="0") for status in (202, 503, 429)]
    received.answer = in_turn(*later, says(500), says(200, {"score": 1}))
    assert asks() == {"score": 1}
    assert len(received.requests) == 5 and len({headers["webhook-id"] for _, headers, _ in received.requests}) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (says(404, b"no such model"), "answered 404, and 200 was expected: no such model"),
        (says(302, b"", Location="http://127.0.0.1:1/"), "answered 302, and 200 was expected"),
        (says(200, b"<html>fine</html>"), "answered no JSON: <html>fine</html>"),
        (says(200, b"[" * 30_000), "answered no JSON"),
        (says(200, b" " * (MOST_BYTES + 1)), f"more than {MOST_BYTES:,} bytes"),
    ],
)
def test_what_is_no_answer_is_told(asks: Any, received: Received, answer: Any, said: str) -> None:
    received.answer = answer
    with pytest.raises(EvaluationFailed) as failed:
        asks()
    assert said in str(failed.value) and len(str(failed.value)) < 500 and len(received.requests) == 1


def test_who_takes_too_long_is_not_waited_for(asks: Any, received: Received) -> None:
    over = threading.Event()
    received.answer = lambda handler: over.wait(60)
    with pytest.raises(EvaluationFailed, match=r"no metrics within 0.3 s: no answer in time"):
        asks(timeout=0.3)
    over.set()
    received.answer = says(503, b"busy", Retry_After="60")
    with pytest.raises(EvaluationFailed, match=r"no metrics within 2 s: it answered 503 busy"):
        asks(timeout=2)


def test_only_addresses_that_are_allowed_are_asked(asks: Any, received: Received) -> None:
    with pytest.raises(EvaluationFailed, match="no public address"):
        asks(allow="10.0.0.0/8")
    assert received.requests == []


def test_a_cancel_does_not_wait_for_the_answer(asks: Any, received: Received) -> None:
    over = threading.Event()
    received.answer = lambda handler: over.wait(60)
    began = time.monotonic()
    with pytest.raises(Canceled):
        asks(timeout=120, stop=lambda: bool(received.requests))
    assert time.monotonic() - began < 30
    over.set()


# Commands.


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mapping[str, Any]]:
    """Runs Python code as the command, on a candidate's folder."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:secret@host/db")
    monkeypatch.setenv("WEIGHTSMITH_SECRET_KEY", "secret")
    folder = tmp_path / "candidates" / "7"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"score": 0.75}')

    def run(code: str, *, timeout: float = 20, options: Any = {}, **how: Any) -> Mapping[str, Any]:  # noqa: B006
        keys = document(command={"name": "mine", "timeout": timeout, "options": options}).keys.evaluator.command
        assert keys is not None
        return CommandEvaluator([sys.executable, "-S", "-c", code], keys).evaluate(candidate(folder, **how))

    return run


READ = "import json, os, sys; request = json.load(open(os.environ['WEIGHTSMITH_REQUEST'])); "


def test_a_command_reads_the_folder_and_prints_metrics(runs: Any) -> None:
    about = "json.load(open(sys.argv[1] + '/config.json')) | request | {'env': sorted(os.environ)}"
    code = f"{READ}print(json.dumps({about}))"
    found = runs(code, options={"shots": 5})
    assert found["score"] == 0.75 and found["options"] == {"shots": 5} and found["values"] == {"weight": 0.5}
    ours = {"PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}
    assert set(found["env"]) - ours == {"HOME", "TMPDIR", "WEIGHTSMITH_REQUEST"} | ({"LC_CTYPE"} & set(found["env"]))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('fine')", "printed no JSON: fine"),
        ("pass", "printed no JSON"),
        ("import sys; print('half', flush=True); sys.exit('no GPU')", "ended with 1: no GPU"),
        ("import os; os.kill(os.getpid(), 9)", "ended with 137"),
        ("print('x' * 70_000)", "printed more than 65,536 bytes"),
        ("import time; time.sleep(60)", "was not done within 0.5 s"),
        ("import os, time; os.close(1); os.close(2); time.sleep(60)", "was not done within 0.5 s"),
    ],
)
def test_what_a_command_says_instead_is_told(runs: Any, code: str, said: str) -> None:
    timeout = 0.5 if "0.5" in said else 20
    with pytest.raises(EvaluationFailed) as failed:
        runs(code, timeout=timeout)
    assert str(failed.value).startswith("the command mine ") and said in str(failed.value)


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    keys = document(command={"name": "mine"}).keys.evaluator.command
    assert keys is not None
    (tmp_path / "7").mkdir()
    with pytest.raises(EvaluationFailed, match="ended with 127: /no/such: No such file or directory"):
        CommandEvaluator(["/no/such"], keys).evaluate(candidate(tmp_path / "7"))


def test_a_command_may_tell_how_far_it_is_and_be_given_up(runs: Any) -> None:
    steps = "for step in (1, 2): print(json.dumps({'step': step, 'value': step / 10}), flush=True)\n"
    steps += "print('{\"score\": 1}')"
    assert runs("import json\n" + steps) == {"score": 1}
    with pytest.raises(Pruned):
        runs("import json\n" + steps, bars={2: 0.25})


def test_nothing_of_a_command_is_left(runs: Any, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(note)!r}, 'w').write(str(p.pid))"

    def is_gone() -> bool:
        return not psutil.pid_exists(int(note.read_text()))

    with pytest.raises(Canceled):
        runs(child + "; p.wait()", stop=lambda: note.exists() and note.read_text() != "")
    eventually(is_gone)
    with pytest.raises(EvaluationFailed, match="no JSON"):
        runs(child)
    eventually(is_gone)


def test_a_command_ends_with_whoever_started_it() -> None:
    leash = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_LEASH), "sleep", "60"], stdin=subprocess.PIPE, start_new_session=True
    )
    child = eventually(lambda: psutil.Process(leash.pid).children())[0]
    assert leash.stdin is not None
    leash.stdin.close()  # as the system does for who was killed
    assert leash.wait(60) == -9
    eventually(lambda: not is_alive(child))


# Before a search is accepted.


def shelves(settings: Settings) -> Shelves:
    return Shelves(SimpleNamespace(settings=settings), "ann", settings.roots)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("evaluator", "pointer", "said"),
    [
        ({"http": {"url": "http://127.0.0.1/"}}, "http/url", "no public address"),
        ({"http": {"url": "ftp://e.example/"}}, "http/url", "only https URLs are called"),
        ({"http": {"url": "https://u:p@e.example/"}}, "http/url", "password"),
        ({"command": {"name": "arcs"}}, "command/name", "no command 'arcs'; did you mean arc? (it has arc;"),
    ],
)
def test_what_a_service_does_not_ask_is_refused(tmp_path: Path, evaluator: Any, pointer: str, said: str) -> None:
    settings = Settings(data=tmp_path, evaluator_commands={"arc": ["true"]}, public_url="https://w.example")
    with pytest.raises(RecipeError) as refused:
        check_evaluator(document(**evaluator), shelves(settings))
    (problem,) = refused.value.problems
    assert problem.pointer == f"#/search/evaluator/{pointer}" and said in problem.detail
    check_evaluator(document(command={"name": "arc"}), shelves(settings))
    check_evaluator(document(http={"url": "https://e.example/"}), shelves(settings))


def test_without_commands_or_a_place_of_its_own_a_service_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="WEIGHTSMITH_EVALUATOR_COMMANDS"):
        check_evaluator(document(command={"name": "arc"}), shelves(Settings(data=tmp_path)))
    with pytest.raises(RecipeError, match="WEIGHTSMITH_PUBLIC_URL"):
        check_evaluator(document(http={"url": "https://e.example/"}), shelves(Settings(data=tmp_path)))
    assert os.environ.get("WEIGHTSMITH_PUBLIC_URL") is None
