"""`python -m merge_core.kernels`: compile the kernels now, so that no merge has to wait for it."""

from __future__ import annotations

from merge_core import kernels

if __name__ == "__main__":
    kernels.prepare()
