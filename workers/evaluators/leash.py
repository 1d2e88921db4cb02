"""Runs a command that ends with whoever started it: when our input ends, all of our process group is killed.

Run as a script, in a session of its own, by `workers.evaluators.command`; imports nothing but the standard library.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Exit as the command does."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=watch, daemon=True).start()
    status = command.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)  # noqa: T201
        sys.exit(127)
