"""`python -m tests.chaos`: many merges while everything that can break does, on either broker and database.

The seed and the schedule are told first, and again with the command that repeats it when something was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.faults import FAULTS
from tests.chaos.merges import CASES, references, write_models
from tests.chaos.run import Outcome, Run
from tests.chaos.schedule import Wave, draw
from tests.chaos.world import World

DISK_VARIABLE = "WEIGHTSMITH_CHAOS_DISK"
DISK_SIZE = "1g"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--merges", type=int, default=50)
    parser.add_argument("--broker", choices=["filesystem", "redis", "both"], default="both")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], help="[default: SQLite, with Redis PostgreSQL]")
    parser.add_argument(
        "--phases", action=argparse.BooleanOptionalAction, default=True, help="try each phase at the end"
    )
    parser.add_argument("--fault", action="append", metavar="NAME", help="only faults with this in their names")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and data")
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _with_small_disk([*sys.argv[1:], *([] if "--seed" in sys.argv else ["--seed", str(given.seed)])])
    brokers = ["filesystem", "redis"] if given.broker == "both" else [given.broker]
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    disk = Path(os.environ[DISK_VARIABLE]) if DISK_VARIABLE in os.environ else None
    kinds = [kind for kind in FAULTS if not given.fault or any(part in kind.name for part in given.fault)]
    print(f"seed {given.seed}; {given.merges} merges on each of {', '.join(brokers)}; in {folder}")
    print("the disk is a tmpfs" if disk else "no tmpfs can be mounted here: files are kept from growing instead")
    write_models(folder / "models")
    wanted = references(folder / "models", folder / "references")
    good = True
    for broker in brokers:
        data = disk / broker if disk else folder / broker / "data"
        database = given.database or ("postgresql" if broker == "redis" else "sqlite")
        world = World(folder / broker, folder / "models", data, broker, database, is_small_disk=disk is not None)
        waves = draw(given.seed, given.merges, CASES, kinds, world)
        _tell_schedule(waves)
        with world.running():
            outcome = Run(world, wanted).go(waves, phases=given.phases)
        shutil.rmtree(data, ignore_errors=True)
        _tell(broker, database, outcome)
        if outcome.wrong:
            good = False
            again = f"--seed {given.seed} --merges {given.merges} --broker {broker} --database {database}"
            print(
                f"\nagain: python -m tests.chaos {again}{''.join(f' --fault {part!r}' for part in given.fault or [])}"
            )
            _tell_schedule(waves)
    if disk:
        subprocess.run(["umount", disk], check=False)
        shutil.rmtree(disk, ignore_errors=True)
    if good and not given.keep:
        shutil.rmtree(folder)
    sys.exit(0 if good else 1)


def _tell_schedule(waves: Sequence[Wave]) -> None:
    for number, wave in enumerate(waves, 1):
        print(f"  {number:3}  {wave}")


def _tell(broker: str, database: str, outcome: Outcome) -> None:
    ends = ", ".join(f"{count} {end}" for end, count in sorted(outcome.ends.items()))
    print(f"\n{broker}, {database}: {sum(outcome.ends.values())} jobs in {outcome.seconds:.0f} s: {ends}")
    print(f"tidy after {outcome.tidy_seconds:.1f} s, stopped in {outcome.stop_seconds:.1f} s")
    print(f"moves written down: {dict(outcome.units)}")
    print(f"\n{'fault':<45} times   recovered after, seconds: median, most")
    for name, seconds in sorted(outcome.recoveries.items()):
        print(f"{name:<45} {len(seconds):5}   {statistics.median(seconds):6.2f} {max(seconds):6.2f}")
    found: dict[str, list[float]] = defaultdict(list)
    for canceled in outcome.cancels:
        if canceled.seconds is not None:
            found[canceled.phase].append(canceled.seconds)
    print(f"\n{'canceled while':<45} times   ended after, seconds: most")
    for phase, seconds in sorted(found.items()):
        print(f"{phase:<45} {len(seconds):5}   {max(seconds):6.2f}")
    if outcome.repeated:
        print(f"\n{'worker killed while':<45} units taken again")
        for phase, count in outcome.repeated.items():
            print(f"{phase:<45} {count:5}")
    if outcome.logged:
        print("\nin the logs")
        for error, count in outcome.logged.most_common():
            print(f"{count:6}  {error}")
    print(f"\n{len(outcome.wrong)} things were wrong")
    for said in outcome.wrong:
        print(f"  {said}")


def _with_small_disk(arguments: Sequence[str]) -> None:
    """Start again where a tmpfs of our own can be mounted, which vanishes with us; go on here where none can."""
    if DISK_VARIABLE in os.environ:
        return
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    alone = ["unshare", *user, "--mount", "--"]
    with contextlib.suppress(OSError):
        disk = tempfile.mkdtemp(prefix="chaos-disk-")
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE},mode=700", "tmpfs", disk]
        if subprocess.run([*alone, *mount], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            os.environ[DISK_VARIABLE] = disk
            again = [sys.executable, "-m", "tests.chaos", *arguments]
            os.execvp("unshare", [*alone, "sh", "-c", f'{" ".join(mount)} && exec "$@"', "chaos", *again])
        Path(disk).rmdir()


if __name__ == "__main__":
    main()
