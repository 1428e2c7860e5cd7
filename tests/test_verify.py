"""`chainrun verify` finds what makes a resume inexact, and says nothing where it is exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "faulty.py"


def verify(folder: Path, fault: str) -> tuple[int, dict]:
    file = folder / "exp.yaml"
    file.write_text(json.dumps({"function": f"{PROGRAM}:train", "args": {"fault": fault}}))
    command = [
        sys.executable,
        "-m",
        "chainrun",
        "verify",
        str(file),
        "--steps",
        "12",
        "--cuts",
        "4",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {"text": done.stderr}


def test_an_exact_training_is_called_identical(tmp_path):
    """No difference, exit code 0."""
    code, verdict = verify(tmp_path, "none")
    assert verdict["text"] == "identical over 12 steps, 1 cuts"
    assert code == 0


@pytest.mark.parametrize(
    ("fault", "parts", "cause"),
    [
        ("optimizer", ["model"], "AdamW is not registered"),
        ("scheduler", ["model", "optimizer"], "StepLR is not registered"),
        ("local", ["metrics"], "keep it in run.state"),
        ("clock", ["metrics"], "does not repeat itself"),
    ],
)
def test_a_planted_fault_is_found_and_its_cause_named(tmp_path, fault, parts, cause):
    """The first step, the parts that differ, and the remedy."""
    code, verdict = verify(tmp_path, fault)
    assert code == 1
    assert not verdict["exact"]
    assert verdict["step"] == 1 if fault == "clock" else verdict["step"] >= 5
    assert set(parts) & set(verdict["parts"])
    assert cause in verdict["text"]


def test_a_function_without_a_step_is_told_so(tmp_path):
    """Nothing to compare is an error, not a success."""
    code, verdict = verify(tmp_path, "no step")
    assert code == 1
    assert "took no step" in verdict["text"]
