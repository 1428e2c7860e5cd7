"""A disk that fails under a training: one clear line, nothing good is lost, and the run comes out the same.

Every case is a real training in a process of its own (faults/broken_disk.py); the disk is made to fail by a shim
between it and the C library (faults/disk.c).
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import disk
import pytest

pytestmark = pytest.mark.xdist_group("faults")  # all cases are run once, not in each test process

FOREVER = 1 << 30
FILE, MANIFEST = "rank-00000.pt", "/.manifest.json"
EIO = "Input/output error"


def failing(call: str, part: str, error: int, skip: int = 0) -> list:
    """Return a fault that lasts: see disk_fault in faults/disk.c."""
    return [call, part, skip, FOREVER, error]


# A save cannot be made: what fails, and how it is said. {step} is the save's.
REFUSED = {
    "the write of a file": (failing("write", FILE, errno.EIO), rf"{FILE} could not be written: {EIO}"),
    "a later write of a file": (
        failing("write", FILE, errno.EIO, 1),
        rf"{FILE} could not be written: {EIO}",
    ),
    "the fsync of a file": (failing("fsync", FILE, errno.EIO), rf"{FILE} could not be written: {EIO}"),
    "a full disk found by fsync": (
        failing("fsync", FILE, errno.ENOSPC),
        rf"{FILE} could not be written: No space left on device",
    ),
    "a quota": (
        failing("write", FILE, errno.EDQUOT),
        rf"{FILE} could not be written: Disk quota exceeded",
    ),
    "a permission": (
        failing("open", FILE, errno.EACCES),
        rf"{FILE} could not be written: Permission denied",
    ),
    "the manifest's write": (
        failing("write", MANIFEST, errno.EIO),
        rf"step-{{step}}.tmp could not be committed: {EIO}",
    ),
    "the manifest's fsync": (
        failing("fsync", MANIFEST, errno.EIO),
        rf"step-{{step}}.tmp could not be committed: {EIO}",
    ),
    "the manifest's rename": (
        failing("rename", MANIFEST, errno.EIO),
        rf"step-{{step}}.tmp could not be committed: {EIO}",
    ),
    "the fsync of its directory": (
        failing("fsync", "{step}.tmp$", errno.EIO),
        rf"step-{{step}}.tmp could not be committed: {EIO}",
    ),
    "the commit's rename": (
        failing("rename", "{step}.tmp$", errno.EIO),
        rf"step-{{step}}.tmp could not be committed: {EIO}",
    ),
    "the commit's fsync": (
        failing("fsync", "/checkpoints$", errno.EIO),
        rf"step-{{step}}.tmp could not be committed: {EIO}",
    ),
    "the making of its directory": (
        failing("change", "{step}.tmp", errno.EIO),
        rf"step-{{step}}.tmp could not be made: {EIO}",
    ),
    "every change": (failing("change", "/runs/", errno.EROFS), r"could not be \w+: Read-only file system"),
    "the metrics' write": (
        failing("write", "metrics.jsonl", errno.EIO),
        rf"metrics.jsonl could not be written: {EIO}",
    ),
    "the metrics' fsync": (
        failing("fsync", "metrics.jsonl", errno.EIO),
        rf"metrics.jsonl could not be written: {EIO}",
    ),
    "a real read-only remount": ("readonly", r"could not be \w+: Read-only file system"),
    "its directory is removed": ("save", r"step-{step}.tmp.* could not be \w+: No such file or directory"),
}

# The training does not notice, or need not.
HARMLESS = {
    "short writes": ["write", "/runs/", 0, FOREVER, 0],
    "the journal's write": failing("write", "journal.jsonl", errno.EIO),
    "the lock's heartbeat": failing("change", "/.lock", errno.EIO),
    "the removal of old checkpoints": failing("unlink", "/checkpoints/", errno.EIO),
}

REMOVED = ("checkpoints", "checkpoints in a save", "run")

PERIODIC, FINAL = {"at": 4, "until": 8, "step": "00000006"}, {"at": 10, "until": 0, "step": "00000012"}


def cases() -> dict[str, dict]:
    """Return what broken_disk.py is told, by the name of each case."""
    found = {"nothing": {"at": 99, "until": 0, "what": []}}
    whats = {name: what for name, (what, _) in REFUSED.items()} | HARMLESS | {name: name for name in REMOVED}
    for name, what in whats.items():
        for when, save in (("periodic", PERIODIC), ("final", FINAL)):
            told = json.loads(json.dumps(what).replace("{step}", save["step"]))
            found[f"{name}, {when}"] = {"at": save["at"], "until": save["until"], "what": told}
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, dict]:
    """What came of every case, by its name."""
    folder, all_cases = tmp_path_factory.mktemp("faults"), cases()
    mounted = None
    for number, (name, case) in enumerate(list(all_cases.items())):
        case |= {"rank": 0, "ballast": 5_000_000 if "later" in name else 0}  # written in pieces, or at once
        case["folder"] = str(folder / str(number))
        Path(case["folder"]).mkdir()
        if case["what"] == "readonly":
            mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", case["folder"]]
            if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
                del all_cases[name]
            else:
                mounted = [*(mounted or []), case["folder"]]
    (folder / "cases").write_text(json.dumps(list(all_cases.values())))
    command = [sys.executable, str(disk.FAULTS / "broken_disk.py"), str(folder / "cases")]
    environment = disk.environment(disk.shim(folder), folder)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        for each in mounted or []:
            subprocess.run(["umount", "--lazy", each], check=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(all_cases, map(json.loads, done.stdout.splitlines()), strict=True))


def told_of(told: dict[str, dict], name: str) -> dict:
    if name not in told:
        pytest.skip("a file system cannot be mounted here")
    found = told[name]
    for each in found["segments"]:
        assert each["ended"] is not None, (name, each)  # it came to an end by itself
        assert each["ended"][2] == [], name  # and no thread of it was left
        assert not any("Traceback" in line for line in each["said"]), each["said"]
    return found


def assert_the_same_in_the_end(told: dict[str, dict], found: dict) -> None:
    """Compare result and metrics with those of the case in which nothing fails."""
    assert found["segments"][-1]["ended"][0] == "done", found
    assert found["result"] == told["nothing"]["result"]
    assert found["metrics"] == told["nothing"]["metrics"]
    assert len(found["metrics"]) == 12
    assert set(found["segments"][-1]["disk"].values()) == {None}


def warnings(segment: dict) -> list[str]:
    return [line for line in segment["said"] if "warning: " in line and "may differ" not in line]


@pytest.mark.parametrize("name", REFUSED)
def test_a_periodic_save_that_fails_is_one_clear_line_and_the_training_goes_on(told, name):
    """It names the file and what the disk said; the older checkpoint stays, and the next save is made."""
    found = told_of(told, f"{name}, periodic")
    (segment,) = found["segments"]
    (line,) = warnings(segment)
    assert "warning: no checkpoint at step 6: " in line
    assert re.search(REFUSED[name][1].format(step="00000006"), line), line
    assert line.endswith("; the training goes on without it")
    assert found["then"] == {"step-00000003": None}
    assert_the_same_in_the_end(told, found)


@pytest.mark.parametrize("name", REFUSED)
def test_a_final_save_that_fails_is_the_runs_clear_error(told, name):
    """The newest checkpoint before it stays, and from there the same command ends the run as if nothing had been."""
    found = told_of(told, f"{name}, final")
    failed, *_ = found["segments"]
    if name == "its directory is removed":  # once: of the two saves at the end the last one is made
        assert failed["ended"][0] == "done"
    else:
        kind, reason, _ = failed["ended"]
        assert kind == "failed"
        assert reason.startswith("no checkpoint at step 12: ")
        assert re.search(REFUSED[name][1].format(step="00000012"), reason), reason
        assert set(failed["disk"]) - {"step-00000006"} == {"step-00000009"}  # a full disk costs the older one
        assert any("resuming at step 9 from step-00000009" in line for line in found["segments"][1]["said"])
    assert_the_same_in_the_end(told, found)


@pytest.mark.parametrize("when", ["periodic", "final"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_no_checkpoint_needs_may_fail(told, name, when):
    """Short writes are taken up again; without journal, heartbeat or retention every checkpoint is made."""
    found = told_of(told, f"{name}, {when}")
    (segment,) = found["segments"]
    assert not any("no checkpoint" in line for line in segment["said"])
    if when == "periodic":
        assert found["then"] == {"step-00000006": None, "step-00000003": None}
    assert_the_same_in_the_end(told, found)


@pytest.mark.parametrize("when", ["periodic", "final"])
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints in a save"])
def test_a_removed_directory_of_checkpoints_is_told_of_and_made_again(told, name, when):
    """The training is well, and what it saves next is safe."""
    found = told_of(told, f"{name}, {when}")
    (segment,) = found["segments"]
    gone = [
        line for line in warnings(segment) if re.search(r"/checkpoints is gone, .*; it is made again", line)
    ]
    assert len(gone) == 1
    assert len(warnings(segment)) == (2 if "save" in name else 1)
    assert_the_same_in_the_end(told, found)


@pytest.mark.parametrize("when", ["periodic", "final"])
def test_a_removed_run_directory_ends_the_training_with_a_clear_error(told, when):
    """It is not made again by the way, with half of what was in it."""
    found = told_of(told, f"run, {when}")
    (segment,) = found["segments"]
    kind, reason, _ = segment["ended"]
    assert kind == "failed"
    assert re.search(r"the run directory .*/runs/broken is gone: it was removed or renamed", reason)
    assert not found["exists"]


def test_where_one_rank_cannot_write_no_rank_takes_the_checkpoint(tmp_path):
    """The other rank, and rank 0, go on with the training; the next checkpoint is of both."""
    described = {
        "function": f"{disk.FAULTS / 'broken_disk.py'}:train",
        "args": {"rank": 1, "what": failing("write", "rank-00001.pt", errno.EIO), **PERIODIC},
        "dir": str(tmp_path / "runs"),
        "checkpoint": {"every": {"steps": 3}},
        "local": {"tasks": 2},
    }
    del described["args"]["step"]
    (tmp_path / "broken.yaml").write_text(json.dumps(described))
    command = [sys.executable, "-m", "chainrun", "run", str(tmp_path / "broken.yaml")]
    environment = disk.environment(disk.shim(tmp_path), tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(
        rf"no checkpoint at step 6: rank 1: .*rank-00001.pt could not be written: {EIO}", done.stderr
    ), done.stderr
    assert json.loads(Path(f"{tmp_path}.then").read_text()) == {"step-00000003": None}
