"""Shared by all tests: a real SLURM, and a command line that runs chainrun as a user would."""

from __future__ import annotations

from slurm_cluster import running, slurm_cluster  # noqa: F401 fixtures
