"""Shared by all tests: a real SLURM, and a command line that runs chainrun as a user would."""

from __future__ import annotations

from slurm_cluster import running, slurm_cluster  # noqa: F401 fixtures


def pytest_collection_modifyitems(items):
    """Put what runs beside other tests last: it is waited for when those have run."""
    items.sort(key=lambda item: hasattr(getattr(item, "function", None), "body"))
