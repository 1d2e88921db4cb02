"""Machine code of kernels: kept, proved, loaded without numba."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from merge_core import kernels
from merge_core.kernels import machine_code

MODULE = "merge_core.kernels.compiled"
NUMBERS = np.array([1.0, np.inf, 2.0], np.float32)


def first_nonfinite() -> int:
    """By a kernel that nothing is in memory of."""
    found = np.zeros(1, np.int64)
    machine_code.Kernel(MODULE, "find_nonfinite")(NUMBERS.ctypes.data, 2, NUMBERS.size, found)
    return int(found[0])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """Keeps code in another folder; what is compiled from then on is in the list, and comes from where it was kept."""

    def keep_in(folder: Path) -> list[str]:
        made: list[str] = []
        before = machine_code.folders()

        def compile_(module: str, name: str, arguments: object, symbol: str) -> bytes:
            made.append(name)
            kept = next(file for folder in before if (file := folder / f"{symbol}.o").exists())
            return kept.read_bytes()[machine_code._SEAL :]

        assert first_nonfinite() == 1
        monkeypatch.setattr(machine_code, "folders", lambda: (folder,))
        monkeypatch.setattr(machine_code, "_compile", compile_)
        return made

    return keep_in


def test_code_is_kept_and_what_was_damaged_is_made_again(compiled: Callable[[Path], list[str]], tmp_path: Path) -> None:
    made = compiled(tmp_path / "code")

    assert [first_nonfinite(), first_nonfinite()] == [1, 1] and made == ["find_nonfinite"]

    (file,) = (tmp_path / "code").iterdir()
    for damaged in (file.read_bytes()[:-100], b""):
        file.write_bytes(damaged)
        assert first_nonfinite() == 1
    assert len(made) == 3


def test_where_nothing_can_be_kept_each_process_compiles(compiled: Callable[[Path], list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = compiled(tmp_path / "file" / "code")

    assert [first_nonfinite(), first_nonfinite()] == [1, 1] and len(made) == 2


def test_code_of_other_sources_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for source in machine_code._SOURCES:
        shutil.copy(machine_code._HERE / f"{source}.py", tmp_path)
    monkeypatch.setattr(machine_code, "_HERE", tmp_path)
    names = []
    for source in ("", *machine_code._SOURCES):
        if source:
            (tmp_path / f"{source}.py").write_text((tmp_path / f"{source}.py").read_text() + "# changed\n")
        names.append(machine_code.folders.__wrapped__()[0].name)
    assert len(set(names)) == len(names)


def test_arrays_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="one after the other"):
        machine_code.kernel(MODULE, "uniform")(np.uint64(1), 0, np.zeros(8, np.float32)[::2])


def test_kept_kernels_do_without_numba() -> None:
    assert kernels.first_nonfinite(torch.zeros(3)) == -1
    program = """
import sys, torch
from merge_core import kernels
assert kernels.first_nonfinite(torch.tensor([0.0, torch.nan])) == 1
assert "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
