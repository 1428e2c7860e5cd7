"""The benchmark of checkpoints runs, with whatever peers are installed here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "checkpoints"
SMALL = ["--size", "1", "--rounds", "1", "--only", "chainrun;safetensors"]


@pytest.mark.parametrize("measure", ["durable", "stall", "boundary"])
def test_measures_print_a_row_for_what_is_installed_and_names_what_is_not(measure, tmp_path):
    """One layer, one round: chainrun is in the table, and no file is left."""
    command = [sys.executable, str(BENCHMARK), measure, *SMALL, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert rows[1].startswith("chainrun ") and "safetensors " in rows[1]
    for name in ["run.step()", "run.poll()"] if measure == "boundary" else ["chainrun"]:
        assert any(row.startswith(f"{name} ") for row in rows[2:]), done.stdout
    assert not list(tmp_path.iterdir())
