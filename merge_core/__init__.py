"""Arithmetic on checkpoints: recipe → plan → tensors → shards → artifact. Start reading at `merge.py`."""

__version__ = "0.1.0"
