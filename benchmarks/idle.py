"""What a service costs that nobody asks for anything: `python -m benchmarks.idle [SECONDS]`.

CPU seconds of the API, its supervisor, its worker and the worker's child over a minute, on both brokers, as a share of
one core, and how long a job that then comes waits for its worker. Exit status 1 where it is over the bar.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from tests.services import Service, running_redis, running_service

BAR = 0.01
JOBS = 5
RECIPE = {"merge_method": "linear", "models": [{"model": "m"}], "parameters": {"weight": 1}}


def main() -> None:
    """Measure both brokers."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models" / "m").mkdir(parents=True)
        save_file({"w": torch.ones(8)}, folder / "models" / "m" / "model.safetensors")
        (folder / "models" / "m" / "config.json").write_text("{}")
        for broker in ("filesystem", "redis"):
            if broker == "redis":
                with running_redis(folder / "redis") as url:
                    rows.append(measure(broker, folder, seconds, REDIS_URL=url))
            else:
                rows.append(measure(broker, folder, seconds))
    print(f"idle for {seconds:.0f} s, CPU as a share of one core; then {JOBS} jobs, one at a time")
    print("| broker | in all | by process | from POST to running |\n| --- | --- | --- | --- |")
    for row in rows:
        print(row[1])
    if max(share for share, _ in rows) > BAR:
        sys.exit(f"over {BAR:.0%} of a core")


def measure(broker: str, folder: Path, seconds: float, **settings: str) -> tuple[float, str]:
    """The share of a core, and the table's row."""
    with running_service(folder / broker, folder / "models", **settings) as service:
        # Once all has been imported, and a worker's child has come and gone.
        service.ended(service.post(RECIPE))
        time.sleep(5)
        before = spent(service)
        time.sleep(seconds)
        after = spent(service)
        shares = {what: (after[what] - before.get(what, 0.0)) / seconds for what in after}
        waits = [wait(service) for _ in range(JOBS)]
    share = sum(shares.values())
    parts = ", ".join(f"{what} {part:.2%}" for what, part in shares.items())
    median = statistics.median(waits)
    return share, f"| {broker} | {share:.2%} | {parts} | {median:.2f} s (at most {max(waits):.2f} s) |"


def spent(service: Service) -> dict[str, float]:
    """CPU seconds so far: the service's process, then its worker's and what that forked."""
    processes = [psutil.Process(service.process.pid), *service.worker_processes()]
    found: dict[str, float] = {}
    for process in processes:
        what = "service" if process.pid == service.process.pid else "worker" if leads(process) else "child"
        times = process.cpu_times()
        found[what] = found.get(what, 0.0) + times.user + times.system
    return found


def leads(process: psutil.Process) -> bool:
    """Whether a process is a worker and not its child."""
    return process.pid == process.ppid() or "celery" not in " ".join(psutil.Process(process.ppid()).cmdline())


def wait(service: Service) -> float:
    """Seconds from a job's row to its worker, when there was nothing to do for a while."""
    time.sleep(3)
    job = service.ended(service.post(RECIPE))
    started, created = (datetime.fromisoformat(job[name]) for name in ("started_at", "created_at"))
    return (started - created).total_seconds()


if __name__ == "__main__":
    main()
