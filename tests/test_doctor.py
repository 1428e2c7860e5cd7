"""`chainrun doctor`: what it says of real clusters, of the answers of other versions, and what its probe finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_cluster import Cluster, require_slurm

from chainrun import experiment
from chainrun.launch import doctor, judge, probe, site, slurm

PROGRAMS = Path(__file__).parent / "programs"
SITES = Path(__file__).parent.parent / "docs" / "sites"


def described(tmp_path: Path, **keys) -> experiment.Experiment:
    keys = {"name": "digits", "function": "train.py:train", "dir": str(tmp_path / "runs"), **keys}
    return experiment.from_dict(keys, tmp_path)


def named(findings) -> dict[str, judge.Finding]:
    return {one.name: one for one in findings}


def ask(folder: Path, *words: str, env: dict[str, str], code: int, keys: dict | None = None) -> dict:
    """Run the command with --json, as a user would; return what it printed."""
    done = start(folder, *words, env=env, keys=keys).communicate(timeout=200)
    told = json.loads(done[0])
    assert told["works"] == (code == 0), told
    return {one["name"]: one for one in told["findings"]}


def start(folder: Path, *words: str, env: dict[str, str], keys: dict | None = None) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    if keys is not None:
        (folder / "train.py").write_text("import torch\n\ndef train(run, lr=0.1): ...\n")
        (folder / "digits.yaml").write_text(json.dumps({"function": "train.py:train", **keys}))
        words = ("digits.yaml", *words)
    command = [sys.executable, "-m", "chainrun", "doctor", *words, "--json"]
    return subprocess.Popen(
        command, env=env, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def fake(folder: Path, name: str, text: str) -> str:
    """Put a script in front of a SLURM command; return the PATH with it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# ---- without SLURM ----------------------------------------------------------------------------------


def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which no program is on PATH."""
    (tmp_path / "empty").mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    return {**kept, "PATH": str(tmp_path / "empty")}


def test_without_slurm_an_experiment_for_here_works_and_one_for_slurm_does_not(tmp_path):
    """The missing commands are named, and what can be checked here is."""
    found = ask(tmp_path / "x", env=bare(tmp_path), code=0, keys={})
    assert found["SLURM"]["verdict"] == "note"
    assert "sbatch" in found["SLURM"]["text"]
    assert found["function"]["verdict"] == found["directory"]["verdict"] == "ok"
    nothing = site.Site(missing=site.COMMANDS)
    (finding,) = judge.examine(nothing, described(tmp_path, slurm={"time": "1h"}))
    assert finding.verdict == "problem"


def test_a_wrong_file_is_wrong_usage_and_a_wrong_function_a_problem(tmp_path):
    """An experiment that cannot be read ends with 2; a function that cannot be loaded is found and named."""
    process = start(tmp_path, env=bare(tmp_path), keys={"slrum": {}})
    assert "slrum" in process.communicate(timeout=60)[1]
    assert process.returncode == 2
    keys = {"function": "bad.py:train"}
    (tmp_path / "bad.py").write_text("import nowhere\ndef train(run): ...\n")
    found = ask(tmp_path, env=bare(tmp_path), code=1, keys=keys)
    assert "nowhere" in found["function"]["text"]


def test_the_doctor_does_not_import_torch(tmp_path):
    """torch and the user's function are imported in a process of their own."""
    code = (
        "import sys; from chainrun.cli import main; code = main(['doctor', '--json']);"
        "print(code, [name for name in ('torch', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=bare(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "1 []"
    assert json.loads(done.stdout)["findings"]


# ---- what SLURM answers, in every version ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("slurm-wlm 22.05.8", (22, 5)),
        ("23.11.10", (23, 11)),
        ("slurm 24.11.5-1", (24, 11)),
        ("26.05.0-0rc1", (26, 5)),
        ("", None),
        ("unknown", None),
    ],
)
def test_versions_are_read(text, version):
    """Packagers' prefixes and suffixes do not matter, and no version is no error."""
    assert site.read_version(text) == version


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-00:00:00", 86400),
        ("2-12", 216000),
        ("02:30:00", 9000),
        ("30:00", 1800),
        ("60", 3600),
        ("30 sec", 30),
        ("UNLIMITED", None),
        ("infinite", None),
        ("NONE", None),
        ("N/A", None),
        ("", None),
        ("Unknown", None),
    ],
)
def test_times_are_read(text, seconds):
    """All of SLURM's ways to write a time, and to write that there is none."""
    assert site.read_seconds(text) == seconds


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("(null)", 0),
        ("gpu:4", 4),
        ("gpu", 1),
        ("gpu:a100", 1),
        ("gpu:3090:2", 2),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:a100_1g.5gb:7(S:0,1),nvme:1", 7),
        ("gpu:a100:4,gpu:h100:2", 6),
        ("shard:8,gpus:3", 0),
    ],
)
def test_gpus_are_counted(gres, count):
    """Types, sockets and other resources in Gres do not confuse the count."""
    assert site.read_gpus(gres) == count


def test_the_configuration_is_read_with_all_that_is_odd_in_it():
    """Values with blanks and `=`, unset ones, sections, lines that are none, and double keys."""
    text = """Configuration data as of 2026-01-01T00:00:00
AuthInfo                = socket=/run/munge.sock,cred_expire=15
JobSubmitPlugins        = (null)
PowerPlugin             =
SlurmctldHost[0]        = a(10.0.0.1)
SLURM_VERSION           = 25.11.1

Cgroup Support Configuration:
SignalChildrenProcesses = yes
AuthInfo                = other

Slurmctld(primary) at a is UP
"""
    config = site.read_config(text)
    assert config["AuthInfo"] == "socket=/run/munge.sock,cred_expire=15"
    assert config["JobSubmitPlugins"] == config["PowerPlugin"] == ""
    assert config["SignalChildrenProcesses"] == "yes"
    found = site.Site(config=config)
    assert (found.hold, found.parameter("AuthInfo", "socket")) == (16, "/run/munge.sock")


def test_records_of_scontrol_are_read_with_blanks_and_empty_values():
    """SubmitLine of 26.05 holds blanks, StdErr may be empty, an array has several records."""
    text = "JobId=7 SubmitLine=sbatch -t 1 job.sh StdErr= EndTime=Unknown\nJobId=8 TimeLimit=UNLIMITED\n\n"
    first, second = slurm.records(text)
    assert (first["SubmitLine"], first["StdErr"], first["EndTime"]) == ("sbatch -t 1 job.sh", "", "Unknown")
    assert second == {"JobId": "8", "TimeLimit": "UNLIMITED"}


def test_nodes_that_are_alike_are_counted_together_and_broken_ones_do_not_count():
    """Flags behind a state do not matter; drained, down and failed nodes are not usable."""
    text = "a|8|1000|gpu:2|idle*|h1\na|8|1000|gpu:2|idle*|h2\na|4+|1000+|(null)|drained|h3\nbroken line\n"
    alike, other = site.read_nodes(text)
    assert (alike.count, alike.gpus, alike.usable) == (2, 2, True)
    assert (other.cpus, other.memory, other.usable) == (4, 1000, False)


# ---- what follows from it ---------------------------------------------------------------------------


def imagined(**config: str) -> site.Site:
    """A site as its own answers describe it, with one partition of two nodes."""
    told = {
        "JobRequeue": "1",
        "PreemptType": "preempt/none",
        "ProctrackType": "proctrack/linuxproc",
        **config,
    }
    return site.Site(
        version=site.read_version(told.get("SLURM_VERSION", "24.11.5")),
        version_text=told.get("SLURM_VERSION", "24.11.5"),
        config=told,
        partitions={
            "gpu": {"PartitionName": "gpu", "State": "UP", "Default": "YES", "MaxTime": "1-00:00:00"}
        },
        nodes=site.read_nodes("gpu|8|64000|gpu:a100:4|idle|h1\ngpu|8|64000|gpu:a100:4|idle|h2\n"),
        unlimited="this SLURM has no accounting",
    )


@pytest.mark.parametrize(
    ("config", "name", "verdict", "words"),
    [
        ({"SLURM_VERSION": "22.05.8"}, "version", "ok", "requeued by chainrun"),
        ({"SLURM_VERSION": "23.02.1"}, "version", "ok", "SLURM_JOB_END_TIME is set"),
        ({"SLURM_VERSION": "21.08.1"}, "version", "warning", "from 22.05 on"),
        ({"SLURM_VERSION": "26.05.5"}, "version", "ok", "requeue_delay"),
        ({}, "hold", "note", "121 s"),
        ({"AuthInfo": "cred_expire=5"}, "hold", "ok", "6 s"),
        (
            {"SLURM_VERSION": "25.11.0", "SchedulerParameters": "bf_interval=1,requeue_delay=1"},
            "hold",
            "ok",
            "1 s",
        ),
        ({"SLURM_VERSION": "24.11.5", "SchedulerParameters": "requeue_delay=1"}, "hold", "note", "121 s"),
        ({"JobRequeue": "0"}, "requeue", "note", "--requeue"),
        ({"ProctrackType": "proctrack/cgroup"}, "signals", "note", "exec"),
        (
            {"ProctrackType": "proctrack/cgroup", "SignalChildrenProcesses": "yes"},
            "signals",
            "ok",
            "every process",
        ),
        (
            {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"},
            "preemption",
            "warning",
            "without a grace time",
        ),
        (
            {"PreemptType": "preempt/partition_prio", "PreemptMode": "CANCEL"},
            "preemption",
            "warning",
            "`chainrun submit` goes on",
        ),
        (
            {"PreemptType": "preempt/qos", "PreemptMode": "GANG,SUSPEND"},
            "preemption",
            "note",
            "suspended",
        ),
        ({"JobSubmitPlugins": "lua"}, "plugins", "note", "--probe"),
    ],
)
def test_a_setting_has_its_verdict(config, name, verdict, words, tmp_path):
    """Each setting of a site that a chain depends on is judged, with the reason."""
    found = named(judge.examine(imagined(**config), described(tmp_path, slurm={"time": "1h"})))[name]
    assert found.verdict == verdict
    assert words in found.text


@pytest.mark.parametrize(
    ("keys", "name", "words"),
    [
        ({}, "walltime", "slurm.time is missing"),
        ({"time": "2d"}, "walltime", "gpu allows 1d"),
        ({"time": "1h", "partition": "gpus"}, "partition", "did you mean 'gpu'"),
        ({"time": "1h", "nodes": 3}, "resources", "has 2 such"),
        ({"time": "1h", "gpus_per_node": 8}, "resources", "2 with 8 CPUs, 4 GPUs"),
        ({"time": "1h", "tasks_per_node": 4, "cpus_per_task": 4}, "resources", "16 CPUs"),
        ({"time": "1h", "extra": {"mem": "128G"}}, "resources", "131072 MB"),
    ],
)
def test_what_does_not_fit_is_a_problem(keys, name, words, tmp_path):
    """Time, partition, nodes, CPUs, GPUs and memory are compared with what the site has."""
    found = named(judge.examine(imagined(), described(tmp_path, slurm=keys)))[name]
    assert found.verdict == "problem"
    assert words in found.text
    if found.yaml:  # what it proposes is accepted, and helps
        line = experiment.yamlfile.yaml.safe_load(found.yaml)
        better = described(tmp_path, slurm={**keys, **line["slurm"]})
        assert named(judge.examine(imagined(), better))[name].verdict == "ok"


def test_limits_of_accounting_are_read_and_judged(tmp_path, monkeypatch):
    """The least limit of QOS and association counts; an account that is not the user's is a problem."""
    qos = site.read_table(
        "Name|GraceTime|PreemptMode|MaxWall|MaxSubmitPU\nnormal|00:00:00|cluster|02:00:00|\n"
        "short|00:05:00|requeue|00:30:00|1\n"
    )
    mine = site.read_table("Cluster|Account|User|MaxSubmit|MaxWall|Def QOS\nc|p1|me|10||normal\n")
    told = replace(
        imagined(), qos={row["Name"]: row for row in qos}, associations=tuple(mine), unlimited=None
    )

    def judged(**keys) -> dict[str, judge.Finding]:
        return named(judge._limits(told, described(tmp_path, slurm=keys)))

    found = judged(time="1h")
    assert found["accounting"].verdict == "ok"
    assert "10 (account p1)" in found["accounting"].text
    found = judged(time="4h")
    assert found["qos time"].yaml == "slurm: {time: 2h}"
    found = judged(time="10min", extra={"qos": "short"})
    assert found["accounting"].verdict == "warning"
    assert "requeue remains" in found["accounting"].text
    assert "yours: p1" in judged(time="1h", extra={"account": "p2"})["account"].text


def test_variables_of_sbatch_that_chainrun_hides_are_named_with_the_line_that_replaces_them(monkeypatch):
    """An account in the shell's environment would be missing in every job."""
    monkeypatch.setenv("SBATCH_ACCOUNT", "p1")
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    found = named(judge.examine(imagined(), None))["environment"]
    line = experiment.yamlfile.yaml.safe_load(found.yaml)
    assert line == {"slurm": {"partition": "gpu", "extra": {"account": "p1"}}}


def test_a_partition_that_takes_jobs_from_login_nodes_only_is_noted(tmp_path):
    """AllocNodes tells that sbatch will fail inside jobs, without a probe."""
    told = imagined()
    told.partitions["gpu"]["AllocNodes"] = "login[1-2]"
    assert "login[1-2]" in named(judge.examine(told, None))["sbatch"].text


def test_a_reservation_is_noted(tmp_path):
    """Its end is the job's too, which the job's own limit does not tell."""
    found = named(
        judge.examine(
            imagined(), described(tmp_path, slurm={"time": "1h", "extra": {"reservation": "course"}})
        )
    )
    assert found["reservation"].page == "reservations.md"


MOUNTS = """21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:5 / /home rw shared:1 - nfs4 server:/home rw
23 21 0:6 / /scratch rw - lustre mds:/s rw
24 23 0:7 / /scratch/local\\040disk rw - tmpfs none rw
25 21 0:8 / /home2 rw - beegfs none rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "verdict"),
    [
        ("/home/me/runs", "nfs4", "ok"),
        ("/scratch/runs", "lustre", "ok"),
        ("/scratch/local disk/runs", "tmpfs", "warning"),
        ("/home2/runs", "beegfs", "ok"),
        ("/homeless/runs", "ext4", "warning"),
    ],
)
def test_a_directory_that_other_nodes_do_not_see_is_a_warning(path, kind, verdict, monkeypatch):
    """The filesystem of a directory, also of one not made yet, is the deepest mount above it."""
    assert doctor.filesystem(Path(path), MOUNTS)[0] == kind
    monkeypatch.setattr(doctor, "filesystem", lambda path: (kind, "/"))
    assert doctor._sharing(imagined(), None, "shared dir", Path(path)).verdict == verdict


def test_space_is_compared_with_the_checkpoints_to_come(tmp_path):
    """With a checkpoint there, keep + 1 of its size must fit on the disk."""
    from chainrun.checkpoint.store import seal
    from chainrun.rundir import RunDir

    run = RunDir(tmp_path / "runs" / "digits").create()
    assert doctor._directory(run).verdict == "ok"
    folder = run.checkpoint(7)
    folder.mkdir()
    manifest = {
        "format": 2,
        "step": 7,
        "time": 0,
        "files": {"rank-00000.pt": {"size": 10**16, "xxh3_128": ""}},
    }
    (folder / "manifest.json").write_bytes(seal(manifest))
    found = doctor._directory(run)
    assert found.verdict == "problem"
    assert "more are needed" in found.text


def answers(**changes) -> dict:
    """What a probe that went well has found, with changes to what its first rank wrote."""
    here = {"python": doctor.platform.python_version(), "executable": sys.executable, "token": "t"}
    loaded = {"torch": doctor.metadata.version("torch"), "gpus": 4, "seconds": 2.0, "error": None}
    head = {
        "host": "h1",
        "node": "n1",
        "restart": None,
        "ranks": 1,
        "end": 1000.0,
        "warned": 920.0,
        "end_in_environment": True,
        "sbatch": {"ok": True, "text": "8"},
        "seen": ["n1"],
        "tried": True,
        "loaded": loaded,
        **here,
        **changes,
    }
    second = [] if "requeue" in changes else [{"restart": "1"}]
    return {"job": "7", "state": "COMPLETED", "token": "t", "log": [], "first": [head], "second": second}


@pytest.mark.parametrize(
    ("changes", "handoff", "name", "verdict", "words"),
    [
        ({}, "auto", "handoff", "ok", "requeue"),
        ({}, "auto", "signals", "ok", "80 s before the end"),
        ({}, "ahead", "handoff", "ok", "by ahead"),
        ({"requeue": "disabled"}, "auto", "handoff", "ok", "resubmit"),
        ({"requeue": "disabled"}, "requeue", "handoff", "problem", "resubmit does"),
        ({"sbatch": {"ok": False, "text": "no"}}, "resubmit", "handoff", "problem", "requeue does"),
        (
            {"requeue": "disabled", "sbatch": {"ok": False, "text": "no"}},
            "auto",
            "handoff",
            "problem",
            "exit code 75",
        ),
        ({"warned": None}, "auto", "signals", "warning", "by the clock"),
        ({"warned": None, "end": None}, "auto", "signals", "problem", "not known either"),
        ({"token": None}, "auto", "shared dir", "problem", "did not see"),
        ({"python": "3.9.1"}, "auto", "python", "warning", "3.9.1"),
        (
            {"loaded": {"torch": None, "gpus": 0, "seconds": 1.0, "error": "No module named 'torch'"}},
            "auto",
            "python",
            "problem",
            "No module",
        ),
        ({"loaded": None, "tried": False}, "auto", "python", "problem", "being imported"),
        ({"tried": False}, "auto", "probe", "problem", "before it had tried all"),
    ],
)
def test_what_a_probe_has_found_is_judged(changes, handoff, name, verdict, words, tmp_path):
    """A handoff that works is ok, one that does not is a problem if another is asked for or none is left."""
    asked = described(tmp_path, chain={"handoff": handoff}, slurm={"time": "1h"})
    found = named(doctor.tried(answers(**changes), asked))[name]
    assert found.verdict == verdict
    assert words in found.text


def test_a_probe_that_left_nothing_says_what_may_be_wrong(tmp_path):
    """No file from the nodes: the directory or Python is not there."""
    nothing = {**answers(), "first": [], "second": [], "state": "FAILED", "log": ["No such file"]}
    (found,) = doctor.tried(nothing, described(tmp_path, slurm={"time": "1h"}))
    assert found.verdict == "problem"
    assert "No such file" in found.text


# ---- real clusters ------------------------------------------------------------------------------------


@pytest.mark.slurm
def test_a_real_cluster_is_read_and_an_experiment_that_fits_is_taken(slurm_cluster, tmp_path):
    """Version, partition and nodes are SLURM's own; sbatch --test-only takes the very job of a submission."""
    found = ask(tmp_path, env=slurm_cluster.env, code=0, keys={"slurm": {"time": "2h", "nodes": 2}})
    version = slurm_cluster.run("sbatch", "--version").stdout.split()[1]
    assert version in found["version"]["text"]
    assert "main: up, 2 of 2 nodes" in found["partition"]["text"]
    assert "to start at" in found["submission"]["text"]
    assert found["hold"]["text"].endswith("6 s")
    assert found["accounting"]["verdict"] == "note"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slurm
def test_a_real_cluster_refuses_what_the_doctor_calls_a_problem(slurm_cluster, tmp_path, monkeypatch):
    """Nodes that are not there are a problem by their count and by SLURM's own word."""
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.env["SLURM_CONF"])
    asked = described(tmp_path, slurm={"time": "1h", "nodes": 3})
    found = named(judge.examine(site.read_site(), asked))
    assert found["resources"].yaml == "slurm: {nodes: 2}"
    assert doctor._rehearse(asked).verdict == "problem"


@pytest.mark.slurm
def test_a_configuration_that_is_not_there_is_said_at_once(slurm_cluster, tmp_path, monkeypatch):
    """SLURM's commands wait a minute for a missing SLURM_CONF; the doctor does not ask them."""
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    monkeypatch.setattr(slurm, "ask", lambda *command, **_: pytest.fail(f"asked {command}"))
    assert "none.conf, which is not there" in named(judge.examine(site.read_site(), None))["controller"].text


@pytest.mark.slurm
def test_a_scontrol_that_hangs_does_not_hang_the_doctor(slurm_cluster, tmp_path, monkeypatch):
    """Its time limit ends the wait, the finding names it, and nothing more is asked."""
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.env["SLURM_CONF"])
    monkeypatch.setenv(
        "PATH", fake(tmp_path / "bin", "scontrol", f"echo x >> {tmp_path}/asked; exec sleep 600")
    )
    read = site.read_site(timeout=1)
    assert "did not answer within 1 s" in (read.silent or "")
    assert (tmp_path / "asked").read_text() == "x\n"
    found = named(judge.examine(read, described(tmp_path)))
    assert found["controller"].verdict == "problem"


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("profile", "partition", "name", "verdict", "words"),
    [
        ("norequeue", "main", "requeue", "note", "JobRequeue=0"),
        ("preempt", "low", "preemption", "warning", "GraceTime leaves 20 s"),
        ("preempt", "high", "preemption", "ok", "PreemptMode=OFF"),
        ("gpu", "main", "resources", "ok", "main has 2 such"),
    ],
)
def test_other_real_clusters_are_judged(profile, partition, name, verdict, words, tmp_path, monkeypatch):
    """A site without requeue, one with preemption and one with GPUs have their findings."""
    require_slurm()
    cluster = Cluster.up("--profile", profile)
    try:
        monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
        keys = {"time": "1h", "partition": partition, "gpus_per_node": 2 * (profile == "gpu")}
        asked = described(tmp_path, slurm=keys)
        found = named(judge.examine(site.read_site(), asked))[name]
        assert (found.verdict, words in found.text) == (verdict, True), found
        assert doctor._rehearse(asked).verdict == "ok"
    finally:
        cluster.down()


@pytest.mark.slurm
def test_the_probe_finds_what_works_and_what_is_refused_and_leaves_nothing(slurm_cluster, tmp_path):
    """One probe where all works, beside one where requeue and sbatch are refused, and one that Ctrl-C ends."""
    keys = {"slurm": {"time": "1h", "nodes": 2}}
    refusing = fake(
        tmp_path / "bin",
        "scontrol",
        f'[ "$1" = requeue ] && {{ echo is disabled >&2; exit 1; }}; exec {which("scontrol")} "$@"',
    )
    fake(
        tmp_path / "bin",
        "sbatch",
        f'[ "$1" = --hold ] && {{ echo no sbatch here >&2; exit 1; }}; exec {which("sbatch")} "$@"',
    )
    good = start(tmp_path / "good", "--probe", env=slurm_cluster.env, keys=keys)
    bad_env = {**slurm_cluster.env, "PATH": refusing}
    bad = start(tmp_path / "bad", "--probe", env=bad_env, keys={**keys, "dir": "deep/er"})
    stopped = start(tmp_path / "stopped", "--probe", env=slurm_cluster.env, keys=keys)
    until = time.monotonic() + 60
    while not list((tmp_path / "stopped").glob("runs/doctor-*/start-0-rank-1.json")):
        assert time.monotonic() < until, stopped.poll()
        time.sleep(0.1)
    stopped.send_signal(signal.SIGINT)
    assert "is cancelled" in stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 130

    found = finding(good, works=True)
    assert "n1, n2" in found["probe"]["text"]
    assert "came to Python on all 2 nodes" in found["signals"]["text"]
    assert "SLURM_RESTART_COUNT=1" in found["requeue"]["text"]
    assert found["handoff"]["text"].endswith("by requeue")
    for name in ("sbatch", "shared dir", "end", "python"):
        assert found[name]["verdict"] == "ok", found[name]

    found = finding(bad, works=False)
    assert "is disabled" in found["requeue"]["text"]
    assert "no sbatch here" in found["sbatch"]["text"]
    assert "exit code 75" in found["handoff"]["text"]
    assert found["signals"]["verdict"] == "ok"

    assert_no_job(slurm_cluster)
    left = [path.name for name in ("good", "bad", "stopped") for path in (tmp_path / name).iterdir()]
    assert set(left) == {"train.py", "digits.yaml"}


@pytest.mark.slurm
def test_a_directory_that_the_nodes_do_not_see_is_found_by_the_probe(slurm_cluster, tmp_path, monkeypatch):
    """The job starts, the folder is not there for its ranks: a problem, not a hang, and no job is left."""
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.env["SLURM_CONF"])
    setup = [f"mv {tmp_path}/runs {tmp_path}/elsewhere"]  # before the ranks start
    asked = described(tmp_path, slurm={"time": "1h", "nodes": 2, "setup": setup})
    (found,) = doctor.tried(probe.probe(asked, tmp_path, None), asked)
    assert (found.verdict, found.name) == ("problem", "shared dir")
    assert_no_job(slurm_cluster)


def assert_no_job(cluster):
    """Check that no job of the doctor is left; one that was cancelled may take a moment to be gone."""
    until = time.monotonic() + 60
    while "doctor-" in (left := cluster.run("squeue", "-h", "--format=%j %T").stdout):
        assert time.monotonic() < until, left
        time.sleep(0.2)


def which(name: str) -> str:
    return str(doctor.shutil.which(name))


def finding(process: subprocess.Popen, *, works: bool) -> dict[str, dict]:
    out, err = process.communicate(timeout=120)
    told = json.loads(out)
    assert told["works"] == works, told
    assert process.returncode == (0 if works else 1)
    assert "waits to start again" in err or not works
    return {one["name"]: one for one in told["findings"]}


# ---- the pages for sites --------------------------------------------------------------------------------


def snippets() -> list[tuple[str, str]]:
    found = []
    for page in sorted(SITES.glob("*.md")):
        for number, block in enumerate(page.read_text().split("```yaml\n")[1:], 1):
            found.append((f"{page.name} {number}", block.partition("```")[0]))
    return found


@pytest.mark.parametrize("text", [text for _, text in snippets()], ids=[name for name, _ in snippets()])
def test_every_experiment_on_the_pages_for_sites_is_one(text, tmp_path):
    """chainrun's own loader takes each YAML block, and what it says is what is loaded."""
    (tmp_path / "page.yaml").write_text(text)
    loaded = experiment.load(tmp_path / "page.yaml")
    assert loaded.slurm.time is not None


def test_the_pages_and_the_lines_that_the_doctor_names_are_there(tmp_path):
    """Each page named in the code exists, is linked from docs/slurm.md, and each has a YAML block that loads."""
    package = Path(judge.__file__).parent
    code = (package / "judge.py").read_text() + (package / "doctor.py").read_text()
    links = (SITES.parent / "slurm.md").read_text()
    pages = {page.name for page in SITES.glob("*.md")}
    assert {name for name in pages if f'"{name}"' in code} == pages
    for page in pages:
        assert f"(sites/{page})" in links, page
