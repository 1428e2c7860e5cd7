"""Shared by all tests: a real SLURM, and a command line that runs chainrun as a user would."""

from __future__ import annotations

import gc

from slurm_cluster import running, slurm_cluster  # noqa: F401 fixtures


def pytest_collection_modifyitems(items):
    """Put what runs beside other tests last: it is waited for when those have run."""
    items.sort(key=lambda item: hasattr(getattr(item, "function", None), "body"))


def pytest_collection_finish(session):
    """Put what importing has made out of the garbage collector's sight: looks through all objects are then quick."""
    gc.collect()
    gc.freeze()
