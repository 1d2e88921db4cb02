"""Weights that are chosen with data: each takes `evaluate`, which scores a candidate."""
