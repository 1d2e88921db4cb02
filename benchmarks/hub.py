"""`make bench-hub`: a merge that reads from a Hub and publishes there, and what of it is ever on the disk.

Models lie on a Hub of the tests' own, over real HTTP on this machine; they are streamed, each file of the result is
sent as soon as it is complete and removed. Told are the most bytes that the service's folder took on the disk, against
two files of the result, the most memory of any one process, and whether the tensors that are then downloaded are those
that a merge of local files gives. Exit status 1 if it is not, or if more than two files and a little were on the disk.

Environment: `SIZE` (small: 0.3 billion parameters, large: 1.1), `WORK` (where the models lie).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import psutil
import torch
from blake3 import blake3
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.table import Table

from app.client import Client
from benchmarks.synthetic import SHAPES, build
from merge_core.checkpoint import Checkpoint
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.hub import running_hub
from tests.services import running_service

HERE = Path(__file__).parent
FILE_BYTES = 100 * 10**6
BESIDE_BYTES = 20 * 10**6
"""For the database, logs, headers, tokenizers and what a file system rounds up."""
console = Console()


class Watch:
    """The most that a folder takes on the disk, and that one process below `root` takes of memory, while it runs."""

    def __init__(self, folder: Path, root: int) -> None:
        self.disk = self.memory = 0
        self._folder, self._root, self._over = folder, root, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.disk = max(self.disk, _on_disk(self._folder))
            for process in psutil.Process(self._root).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self.memory = max(self.memory, process.memory_info().rss)


def main() -> int:
    """Measure and print."""
    disable_progress_bars()
    size = os.environ.get("SIZE", "small")
    work = Path(os.environ.get("WORK", HERE.parent / "build" / "bench")).absolute()
    names = [path.name for path in build(work / size, SHAPES[size], 3)]
    with tempfile.TemporaryDirectory(prefix="weightsmith-hub-", dir=work) as scratch:
        return _measure(Path(scratch), work / size, names)


def _measure(folder: Path, models: Path, names: list[str]) -> int:
    recipe = {
        "merge_method": "ties",
        "base_model": names[0],
        "models": [{"model": name} for name in names[1:]],
        "parameters": {"density": 0.2, "weight": 0.5},
        "outputs": {"max_shard_size": FILE_BYTES},
    }
    local = merge(Recipe.from_data(recipe), folder / "local", roots=[models])
    shutil.rmtree(folder / "local")
    far = recipe | {
        "base_model": f"org/{names[0]}",
        "models": [{"model": f"org/{name}"} for name in names[1:]],
        "outputs": {"max_shard_size": FILE_BYTES, "keep": False, "hub": {"repo": "alice/merged"}},
    }
    with running_hub(folder / "hub") as hub:
        for name in names:
            hub.put(f"org/{name}", models / name)
        settings = {
            "WEIGHTSMITH_HUB_ENDPOINT": hub.endpoint,
            "WEIGHTSMITH_ENDPOINT_ALLOW": f"127.0.0.1,{httpx2.URL(hub.cdn).host}",
            "WEIGHTSMITH_HUB_MODE": "streamed",
        }
        with (
            running_service(folder / "data", models, **settings) as service,
            Client(service.url) as client,
            Watch(folder / "data", service.process.pid) as watch,
        ):
            service.http.put("/v1/credentials/hub", json={"kind": "hub-token", "token": hub.alice.token})
            began = time.monotonic()
            job = client.merges.wait(client.merges.submit(far))
            seconds = time.monotonic() - began
            assert job.status == "succeeded", job.error
            planned = int(service.get(f"/v1/merges/{job.id}")["plan"]["peak_memory"])
        found = Path(
            snapshot_download(
                "alice/merged", endpoint=hub.endpoint, token=hub.alice.token, cache_dir=str(folder / "cache")
            )
        )
        is_same = local.tensors == _tensors(found)
        files = sorted((path.stat().st_size for path in found.glob("*.safetensors")), reverse=True)
    most = sum(files[:2])
    table = Table(title=f"{sum(files) / 1e9:.2f} GB of {len(files)} files, from {len(names)} models of a Hub to a Hub")
    for name in ("", "most", "against"):
        table.add_column(name, justify="right")
    table.add_row("on the disk", f"{watch.disk / 1e6:,.0f} MB", f"two files: {most / 1e6:,.0f} MB")
    table.add_row("memory of a process", f"{watch.memory / 1e6:,.0f} MB", f"planned: {planned / 1e6:,.0f} MB")
    table.add_row("seconds", f"{seconds:,.1f}", "")
    console.print(table)
    console.print(
        "the same tensors as from local files" if is_same else "[red]not the tensors that local files give[/red]"
    )
    return 0 if is_same and watch.disk <= most + BESIDE_BYTES else 1


def _tensors(folder: Path) -> dict[str, str]:
    """blake3 by name of every tensor in a folder's files."""
    with Checkpoint.open(folder) as stored:
        return {
            name: blake3(stored.rows(info, 0, info.rows).reshape(-1).view(torch.uint8).numpy()).hexdigest()
            for name, info in stored.tensors.items()
        }


def _on_disk(folder: Path) -> int:
    """Bytes that the files below a folder take; those that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total


if __name__ == "__main__":
    sys.exit(main())
