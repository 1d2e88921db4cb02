"""A browser for tests: Debian's Chromium where it is, or the one that Playwright installs.

`python -m tests.browsers` sees to it that there is one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
"""Tests look at our own pages alone; nothing is to be asked of anybody else meanwhile."""
FLAGS += ("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")


def installed() -> str | None:
    """The path of a Chromium that is there."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if os.path.exists(path) else None  # noqa: PTH110


def main() -> int:
    if installed():
        return 0
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "check": True}
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], **quiet)
    else:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)
    return 0 if installed() else 1


if __name__ == "__main__":
    sys.exit(main())
