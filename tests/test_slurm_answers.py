"""What SLURM's commands say is understood whatever a person or a site has set; nothing of a job leaks into the next."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from chainrun import experiment
from chainrun.errors import ExperimentError
from chainrun.launch import slurm

END = 1793503800  # 2026-11-01 01:30 in New York, for the second time that night


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, *cases: str) -> None:
    """Put a scontrol first on PATH that knows the jobs and reservations of the shell's `cases`."""
    lines = ["#!/bin/sh", '[ -z "$SLURM_TIME_FORMAT$SQUEUE_FORMAT" ] || exit 1']
    lines += [
        f'at() {{ date -d "@$(({END} + $1))" +%Y-%m-%dT%H:%M:%S; }}',
        'case "$*" in',
        *cases,
        "*) exit 1;;",
        "esac",
    ]
    (folder / "scontrol").write_text("\n".join(lines))
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_end_is_read_in_every_time_zone_and_format(tmp_path, monkeypatch):
    """Also in the hour that autumn has twice, and where a person wants times to be relative."""
    scontrol(tmp_path, monkeypatch, '*"job 7") echo "JobId=7 JobName=x EndTime=$(at 0) TimeLimit=1";;')
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SQUEUE_FORMAT", "%A")
    for zone in ("America/New_York", "Asia/Kathmandu", "UTC"):
        monkeypatch.setenv("TZ", zone)
        assert slurm.end_time("7") == END


@pytest.mark.parametrize(
    ("reservation", "overrun", "end"),
    [
        ("EndTime=$(at -600) Flags=SPEC_NODES", "0 min", -600),
        ("EndTime=$(at -600) Flags=", "5 min", -300),
        ("EndTime=$(at 600) Flags=", "0 min", 0),
        ("EndTime=$(at -600) Flags=FLEX,SPEC_NODES", "0 min", 0),
        ("EndTime=$(at -600) Flags=", "UNLIMITED", 0),
    ],
)
def test_a_reservation_ends_its_jobs(tmp_path, monkeypatch, reservation, overrun, end):
    """The earlier of the two ends counts, unless the site lets jobs overrun, or the reservation is only a preference."""
    scontrol(
        tmp_path,
        monkeypatch,
        '*"job 7") echo "JobId=7 EndTime=$(at 0) Reservation=course";;',
        f'*"reservation course") echo "ReservationName=course {reservation}";;',
        f'*"show config") echo "ResvOverRun             = {overrun}";;',
    )
    assert slurm.end_time("7") == END + end


def test_a_job_without_an_end_has_none(tmp_path, monkeypatch):
    """SLURM's words for it are no error."""
    for word in ("Unknown", "NONE", "N/A"):
        scontrol(tmp_path, monkeypatch, f'*"job 7") echo "JobId=7 EndTime={word} TimeLimit=UNLIMITED";;')
        assert slurm.end_time("7") is None


@pytest.mark.parametrize(
    ("reason", "is_held"),
    [
        ("JobHeldAdmin", True),
        ("JobHeldUser", True),
        ("launch failed requeued held", True),
        ("launch_failed_requeued_held", True),
        ("Too many requeues", True),
        ("ReservationDeleted", True),
        ("Priority", False),
        ("Dependency", False),
    ],
)
def test_which_reasons_need_a_person(reason, is_held):
    """SLURM's reasons for a hold are recognized, in the words of all its versions; others are waited for."""
    found = slurm.held("7", "PENDING", reason)
    assert (found is not None) == is_held
    assert found is None or re.search("to let it go on.*: scontrol (release 7|update JobId=7 )", found)


def test_a_job_leaves_nothing_of_itself_to_the_next():
    """Its variables, devices and folders stay; so do a person's options for sbatch. What the user has set goes on."""
    inside = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_GPUS": "0",
        "SLURM_CONF": "/etc/slurm/slurm.conf",
        "SLURM_EXPORT_ENV": "NONE",
        "SBATCH_TIMELIMIT": "1",
        "SUBMITIT_EXECUTOR": "slurm",
        "CUDA_VISIBLE_DEVICES": "3",
        "PMI_RANK": "1",
        "TMPDIR": "/local/77",
        "WANDB_MODE": "offline",
    }
    assert slurm.outside(inside) == {"SLURM_CONF": "/etc/slurm/slurm.conf", "WANDB_MODE": "offline"}
    outside = {"CUDA_VISIBLE_DEVICES": "3", "TMPDIR": "/scratch/me"}
    assert slurm.outside(outside) == outside


def test_an_option_that_makes_no_chain_is_refused(tmp_path):
    """Elements of an array would all want the one run directory; another cluster's jobs could not be asked for."""
    for key in ("array", "clusters"):
        data = {"name": "x", "function": "json:dumps", "slurm": {"time": "1h", "extra": {key: "0-3"}}}
        with pytest.raises(
            ExperimentError, match=rf"slurm\.extra\.{key}: found --{key}, which chainrun sets"
        ):
            experiment.from_dict(data, tmp_path)
