"""slurm/cluster on real daemons: it boots, its timings are short, and it never leaves anything behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster as slurm
from slurm_cluster import Cluster, script

pytestmark = pytest.mark.slurm


def processes_naming(folder: Path) -> list[str]:
    """Return the processes with the folder in their arguments, environment or working directory.

    Broader than what `down` looks for, and independent of it.
    """
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                arguments = (process / "cmdline").read_bytes()
                traces = [
                    arguments,
                    (process / "environ").read_bytes(),
                    os.readlink(process / "cwd").encode(),
                ]
            except OSError:
                continue
            if any(bytes(folder) in trace for trace in traces):
                found.append(f"{process.name}: {arguments!r}")
    return found


def gone(cluster: Cluster, seconds: float = 0) -> bool:
    """Return whether the cluster's folder and processes have vanished within some time."""
    deadline = time.monotonic() + seconds
    while cluster.dir.exists() or processes_naming(cluster.dir):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def second_cluster() -> Iterator[Cluster]:
    """A cluster for one test to damage; what the test leaves of it is taken down."""
    slurm.require_slurm()
    cluster = Cluster.up("--nodes", "1")
    yield cluster
    script("down", str(cluster.dir))


def test_a_job_step_runs_on_both_nodes(slurm_cluster: Cluster) -> None:
    """One srun starts one task on each virtual node."""
    done = slurm_cluster.run("srun", "-N2", "--ntasks-per-node=1", "printenv", "SLURMD_NODENAME")
    assert sorted(done.stdout.split()) == ["n1", "n2"]


def test_two_clusters_run_side_by_side(slurm_cluster: Cluster, second_cluster: Cluster) -> None:
    """SLURM_CONF selects the cluster, and taking one down leaves the other and its jobs alone."""
    jobs = [
        cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 60").stdout.strip()
        for cluster in (slurm_cluster, second_cluster)
    ]
    assert slurm_cluster.run("sinfo", "-h", "-o", "%D").stdout.split() == ["2"]
    assert second_cluster.run("sinfo", "-h", "-o", "%D").stdout.split() == ["1"]
    second_cluster.wait_job(jobs[1], "RUNNING")
    second_cluster.down()
    assert slurm_cluster.wait_job(jobs[0], "RUNNING")["JobState"] == "RUNNING"
    slurm_cluster.run("scancel", jobs[0])
    assert gone(second_cluster)


def test_another_version_runs_beside_the_hosts(slurm_cluster: Cluster) -> None:
    """PATH and SLURM_CONF select a cluster with a SLURM of its own, and `down` leaves nothing of it."""
    other = Cluster.up("--version", "trixie", "--nodes=1")
    try:
        assert other.run("sinfo", "-V").stdout.split()[1].startswith("24.11.")
        job = other.run(
            "sbatch", "--parsable", "--output=/dev/null", "--wrap", "srun sinfo -V"
        ).stdout.strip()
        assert other.wait_job(job)["JobState"] == "COMPLETED"
        assert slurm_cluster.run("sinfo", "-V").stdout != other.run("sinfo", "-V").stdout
    finally:
        other.down()
    assert gone(other)
    assert (slurm_cluster.dir / "slurm").exists() is False
    assert slurm_cluster.run("sinfo", "-h", "-o", "%D").stdout.split() == ["2"]


def test_sacct_knows_finished_jobs_with_accounting() -> None:
    """The profile has a database of its own inside the folder, which `down` stops and deletes too."""
    cluster = Cluster.up("--version", "bookworm", "--profile", "accounting", "--nodes=1")
    try:
        cluster.run("srun", "--job-name=noted", "true")
        deadline = time.monotonic() + 30
        while "noted|COMPLETED" not in cluster.run("sacct", "-nXPo", "jobname,state").stdout:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert script("status", str(cluster.dir)).stdout.count("alive") == 5
    finally:
        cluster.down()
    assert gone(cluster)


def test_control_groups_are_made_and_removed() -> None:
    """With the profile a job's processes are in groups named after its node, and `down` removes those too."""
    cluster = Cluster.up("--profile", "cgroup", "--nodes=1")
    try:
        groups = cluster.run("srun", "cat", "/proc/self/cgroup").stdout
        node = cluster.run("sinfo", "-h", "-o", "%N").stdout.strip()
        assert f"freezer:/slurm_{node}/" in groups
    finally:
        cluster.down()
    assert gone(cluster)
    assert not Path(f"/sys/fs/cgroup/freezer/slurm_{node}").exists()


def test_a_mirror_out_of_reach_is_one_line(tmp_path: Path) -> None:
    """Without a network or a mirror, another version ends with one clear message and nothing half done."""
    release = dict(line.partition("=")[::2] for line in Path("/etc/os-release").read_text().splitlines())
    sources = f"deb http://127.0.0.1:9/debian {release.get('VERSION_CODENAME', 'none')} main\n"
    (tmp_path / "sources").write_text(sources)
    settings = {"sourcelist": tmp_path / "sources", "sourceparts": tmp_path / "none"}
    (tmp_path / "apt.conf").write_text("".join(f'Dir::Etc::{k} "{v}";\n' for k, v in settings.items()))
    cache = tmp_path / "cache"
    environment = {"APT_CONFIG": str(tmp_path / "apt.conf"), "CHAINRUN_SLURM_CACHE": str(cache)}
    done = script("up", "--version", "trixie", env={**os.environ, **environment})
    assert done.returncode == 1
    assert done.stderr.startswith("slurm/cluster: cannot get SLURM of Debian trixie: ")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["lock"]


def test_the_walltime_warning_arrives_soon(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """A job of one minute that asks for USR2 25 s before its end has it within 20 s of its start."""
    (tmp_path / "task.py").write_text(
        "import signal, time\n"
        "start = time.monotonic()\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\n"
        "print('ready', flush=True)\n"
        "signal.sigwait({signal.SIGUSR2})\n"
        "print(time.monotonic() - start, flush=True)\n"
    )
    text = f"exec srun --output={tmp_path}/out {sys.executable} {tmp_path}/task.py\n"
    job = slurm_cluster.sbatch(text, "--time=1", "--signal=USR2@25", cwd=tmp_path)
    fields = slurm_cluster.wait_job(job, timeout=45)
    assert fields["JobState"] == "COMPLETED", fields
    ready, seconds = (tmp_path / "out").read_text().split()
    assert ready == "ready"
    assert 1 < float(seconds) < 20


def test_a_requeued_job_starts_again_within_seconds(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """After `scontrol requeue` the same job starts again in about 6 s and counts its restart."""
    text = (
        'echo ${SLURM_RESTART_COUNT:-none} $(date +%s.%N) >> starts\n[ "$SLURM_RESTART_COUNT" ] || sleep 60\n'
    )
    job = slurm_cluster.sbatch(text, cwd=tmp_path)
    slurm_cluster.wait_job(job, "RUNNING")
    while not (tmp_path / "starts").exists():
        time.sleep(0.05)
    requeued = time.time()
    slurm_cluster.run("scontrol", "requeue", job)
    fields = slurm_cluster.wait_job(job, "COMPLETED", timeout=45)
    (first, _), (second, started) = (line.split() for line in (tmp_path / "starts").read_text().splitlines())
    assert (first, second, fields["Restarts"]) == ("none", "1", "1")
    assert 4 < float(started) - requeued < 20


def test_down_cleans_up_after_a_crash(second_cluster: Cluster, tmp_path: Path) -> None:
    """Daemons killed by SIGKILL leave job processes behind; `down` finds them, even a detached one."""
    text = "setsid sleep 600 &\nsrun env -i sleep 601\n"
    job = second_cluster.sbatch(text, cwd=tmp_path)
    second_cluster.wait_job(job, "RUNNING")
    time.sleep(0.5)
    assert script("status", str(second_cluster.dir)).returncode == 0
    for name in ("slurmctld", "slurmd.n1"):
        os.kill(int((second_cluster.dir / f"run/{name}.pid").read_text()), signal.SIGKILL)
    status = script("status", str(second_cluster.dir))
    assert status.returncode == 1
    assert [line.split()[-1] for line in status.stdout.splitlines() if "slurm" in line] == ["dead", "dead"]
    assert processes_naming(second_cluster.dir)
    second_cluster.down()
    assert gone(second_cluster)
    assert not processes_naming(tmp_path)


def test_nothing_survives_the_owner(tmp_path: Path) -> None:
    """When the process that wanted the cluster is killed, the cluster and its jobs go too."""
    slurm.require_slurm()
    with subprocess.Popen(["sleep", "600"]) as owner:
        try:
            answer = json.loads(script("up", "--json", "--nodes=1", "--owner-pid", str(owner.pid)).stdout)
            cluster = Cluster(answer["dir"], answer["conf"])
            job = cluster.sbatch("sleep 600\n", cwd=tmp_path)
            cluster.wait_job(job, "RUNNING")
        finally:
            owner.kill()
    assert gone(cluster, seconds=30)


def test_a_failed_up_leaves_nothing(tmp_path: Path) -> None:
    """A port that stays taken is tried again, then reported with the daemon's own words."""
    slurm.require_slurm()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        folder = Path(f"/tmp/slurm-failed-{os.getpid()}")
        done = script("up", str(folder), "--slurm-conf-extra", f"SlurmctldPort={taken.getsockname()[1]}")
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert gone(Cluster(str(folder), str(folder / "slurm.conf")))


def test_a_long_folder_is_refused(tmp_path: Path) -> None:
    """A folder too long for the sockets in it is an error that says how long it may be."""
    slurm.require_slurm()
    folder = tmp_path / ("x" * 100)
    done = script("up", str(folder))
    assert done.returncode == 1
    assert "too long for the sockets in it, it may have 75 bytes" in done.stderr
    assert not folder.exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """`up` never mixes its files with others', and `down` touches no folder without a cluster."""
    slurm.require_slurm()
    (folder := Path(f"/tmp/slurm-mine-{os.getpid()}")).mkdir()
    (folder / "run").write_text("mine")
    try:
        assert "is not empty" in script("up", str(folder)).stderr
        assert "no cluster in" in script("down", str(folder)).stderr
        assert (folder / "run").read_text() == "mine"
    finally:
        (folder / "run").unlink()
        folder.rmdir()


def test_missing_programs_are_named() -> None:
    """Without SLURM one line says what is missing and how to install it."""
    done = script("up", "--fast-signals", env={"PATH": "/nonexistent"})
    assert done.returncode == 1
    assert done.stderr == (
        "slurm/cluster: not found on PATH: munged, slurmctld, slurmd, sinfo, gcc; on Debian or Ubuntu, as root: "
        "apt-get install --no-install-recommends munge slurm-wlm gcc libc6-dev\n"
    )


def test_wrong_usage_is_exit_code_2() -> None:
    """What SLURM would silently ignore, such as a too short credential lifetime, is refused."""
    done = script("up", "--cred-expire", "4")
    assert done.returncode == 2
    assert "'4' is not a whole number from 5 on" in done.stderr


def test_tests_are_skipped_only_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SLURM the fixture skips, and fails where CHAINRUN_REQUIRE_SLURM=1."""
    monkeypatch.setattr(slurm, "PROGRAMS", ("no-such-program",))
    monkeypatch.delenv("CHAINRUN_REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program"):
        slurm.require_slurm()
    monkeypatch.setenv("CHAINRUN_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-program"):
        slurm.require_slurm()
