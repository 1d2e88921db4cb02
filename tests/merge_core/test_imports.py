"""What a process leaves out of its imports."""

from __future__ import annotations

import subprocess
import sys


def test_torch_is_imported_without_its_stand_ins_and_finds_them_later() -> None:
    program = """
import sys
from merge_core.imports import quick_imports
with quick_imports():
    import torch
assert "torch._meta_registrations" not in sys.modules and "torch._refs" not in sys.modules
assert torch.linalg.svdvals(torch.eye(2)).tolist() == [1, 1]
import torch._meta_registrations
assert (torch.empty(3, 4, device="meta") @ torch.empty(4, 5, device="meta")).shape == (3, 5)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_libraries_that_use_more_of_torch_are_given_all_of_it() -> None:
    """In their own order, as transformers has it, it would import in a circle."""
    program = """
from merge_core.imports import quick_imports, whole_torch
with quick_imports():
    import torch
whole_torch()
import torch._decomp.decompositions
"""
    subprocess.run([sys.executable, "-c", program], check=True)
