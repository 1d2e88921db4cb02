"""`make vendor`: put the npm packages that the page uses into `app/pages/static/vendor`, as their list says.

The list, `packages.json`, has each package's version and the integrity that the npm registry tells of it, which of its
folders and files are taken, and the sha256 of all that was. This needs `npm`; the page itself does not.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

VENDOR = Path(__file__).parent.parent / "app" / "pages" / "static" / "vendor"
LIST = VENDOR / "packages.json"


def listed() -> dict[str, dict[str, Any]]:
    return dict(json.loads(LIST.read_text()))


def found(package: str) -> dict[str, str]:
    """The sha256 of each file that is there."""
    folder = VENDOR / package
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fetch(package: str, entry: dict[str, Any]) -> None:
    """Put a package's files in place. Raises `SystemExit` if the registry has another package by that name."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted = f"{package}@{entry['version']}"
        subprocess.run(["npm", "pack", wanted, "--silent", "--pack-destination", scratch], check=True)
        (archive,) = Path(scratch).glob("*.tgz")
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if entry.setdefault("integrity", integrity) != integrity:
            raise SystemExit(f"{wanted} has the integrity {integrity}, and not {entry['integrity']}, which is recorded")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        for taken, place in entry["taken"].items():
            source = Path(scratch) / "package" / taken
            files = [source] if source.is_file() else sorted(path for path in source.rglob("*.js") if path.is_file())
            for file in files:
                target = VENDOR / package / place / file.relative_to(source if source.is_dir() else source.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    entry["files"] = found(package)


def main() -> int:
    packages = listed()
    for package, entry in packages.items():
        fetch(package, entry)
    LIST.write_text(json.dumps(packages, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
