"""Runs recipes with mergekit, for `tests.oracle`; started by the Python of mergekit's own environment.

    python mergekit_runs.py JOBS.json

JOBS.json lists jobs `{recipe, out, several, work}`. Prints a line of JSON per job: null, or what mergekit failed with.
mergekit is imported once and each job runs in a fork, so that none sees what another left behind.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from mergekit.scripts.multimerge import main as several_documents
from mergekit.scripts.run_yaml import main as one_document


def run(job: dict[str, Any]) -> str | None:
    """One job, in a process of its own."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        with os.fdopen(writing, "w") as answer:
            answer.write(json.dumps(_carry_out(job)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else "the process ended without a word"


def _carry_out(job: dict[str, Any]) -> str | None:
    options = ["--no-write-model-card", "--quiet", "--random-seed", "1", "--lora-merge-dtype", "float32"]
    options += ["--lora-merge-cache", f"{job['work']}/adapters"]
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            if job["several"]:
                places = ["-I", f"{job['work']}/stages", "--out-path", job["out"]]
                several_documents([job["recipe"], *places, *options], standalone_mode=False)
            else:
                one_document([job["recipe"], job["out"], *options], standalone_mode=False)
    except BaseException as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {' '.join(lines)[:200]}" if lines else type(error).__name__
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(each)), flush=True)
