"""Real SLURMs for tests: the fixture `slurm_cluster`, and `beside`, for a test that mostly waits for one of its own.

Where SLURM is not installed, tests
that ask for it are skipped, or fail if CHAINRUN_REQUIRE_SLURM=1 (as in CI, where a skip would hide a mistake).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "cluster"
PROGRAMS = ("slurmctld", "slurmd", "munged", "gcc")
# as it was before any test: what runs beside tests does not see what those set
ENVIRONMENT = {"RES_OPTIONS": "timeout:1", **os.environ}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def script(
    *argv: str, env: dict[str, str] | None = None, timeout: float = 90
) -> subprocess.CompletedProcess[str]:
    """Run slurm/cluster and return what it said and how it ended."""
    # a job on a node of its own does not wait for other tests: one that did would miss the end of its walltime
    nice = shutil.which("nice", path=(env or os.environ).get("PATH")) if os.geteuid() == 0 else None
    command = [*([nice, "-n", "-10"] if nice else []), sys.executable, str(SCRIPT), *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


class Cluster:
    """A running cluster, and the few things that tests do with one."""

    def __init__(self, folder: str, conf: str, path: str | None = None) -> None:
        self.dir = Path(folder)
        self.conf = Path(conf)
        outer = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")
        inherited = {key: value for key, value in ENVIRONMENT.items() if not key.startswith(outer)}
        self.env = {**inherited, "SLURM_CONF": conf, **({"PATH": path} if path else {})}

    @classmethod
    def up(cls, *options: str) -> Cluster:
        """Start a cluster that goes down by itself if this process is killed.

        Another Debian's SLURM is downloaded first, if it is not cached. Where that fails, or the profile cgroup
        cannot work, the test is skipped.
        """
        done = script("up", "--json", "--owner-pid", str(os.getpid()), *options, timeout=300)
        if any(what in done.stderr for what in ("cannot get SLURM of Debian", "the profile cgroup needs")):
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        return cls(answer["dir"], answer["conf"], answer["path"])

    @classmethod
    @contextmanager
    def own(cls, *options: str) -> Iterator[Cluster]:
        """Start the host's SLURM for this block alone, with signals that come soon."""
        require_slurm()
        cluster = cls.up("--fast-signals", *options)
        try:
            yield cluster
        finally:
            cluster.down()

    def down(self) -> None:
        """Stop it and check that this went well."""
        done = script("down", str(self.dir))
        assert done.returncode == 0, done.stderr

    def run(
        self, *argv: str, check: bool = True, cwd: Path | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that uses this cluster; with check, an exit code other than 0 fails the test."""
        program = shutil.which(argv[0], path=self.env.get("PATH")) or argv[0]  # not from this process's PATH
        done = subprocess.run(
            [program, *argv[1:]],
            env=self.env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{argv} -> {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def sbatch(self, script_text: str, *options: str, cwd: Path) -> str:
        """Submit a batch script (its `#!` line is added) and return the job's id."""
        path = cwd / "job.sh"
        path.write_text("#!/bin/bash\n" + script_text)
        return self.run("sbatch", "--parsable", *options, str(path), cwd=cwd).stdout.strip()

    def job(self, jobid: str | int) -> dict[str, str]:
        """Return the fields of `scontrol show job` (of an array's first record)."""
        record = self.run("scontrol", "show", "job", "-o", str(jobid)).stdout.partition("\n")[0]
        return dict(re.findall(r"([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|\s*$)", record))

    def wait_job(
        self, jobid: str | int, states: str | Collection[str] = ENDED, timeout: float = 60
    ) -> dict[str, str]:
        """Wait until the job is in one of the states, by default any final one; return its fields."""
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + 2 * timeout  # a busy machine is no failure
        while (fields := self.job(jobid))["JobState"] not in wanted:
            assert time.monotonic() < deadline, f"job {jobid} is not {wanted} after {timeout} s: {fields}"
            time.sleep(0.1)
        return fields


def require_slurm() -> None:
    """Skip the test, or fail it if CHAINRUN_REQUIRE_SLURM=1, where SLURM is not installed."""
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)} (see slurm/README.md)"
        if os.environ.get("CHAINRUN_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """A cluster of two nodes that looks at time limits every 2 s, shared by all tests of the session."""
    require_slurm()
    cluster = Cluster.up("--fast-signals")
    yield cluster
    cluster.down()


def beside(body: Callable[[Path], None]) -> Callable[[dict[str, Future[None]]], None]:
    """Make a test of a body that mostly waits: it runs in a thread, from the group's first test on, beside the others.

    The test itself waits for the body's end, and fails as it does. Keep such tests at the end of their module.

    Args:
        body: called with a folder of its own; starts its own clusters.
    """

    def test(running: dict[str, Future[None]]) -> None:
        running[body.__name__].result()

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    test.body = body  # type: ignore[attr-defined]
    return test


@pytest.fixture(scope="session")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """The bodies of all tests made by `beside` that are to run in this session, two at a time, the longest first."""
    items = [item for item in request.session.items if hasattr(item.function, "body")]
    # pytest-xdist 3.8 does not group with pytest 9.2: each worker would run all of them
    grouped = "PYTEST_XDIST_WORKER" not in os.environ or all(item.nodeid.endswith("@slurm") for item in items)
    assert grouped, "the group's tests are not kept together"
    items.sort(key=lambda item: ORDER.index(item.name) if item.name in ORDER else len(ORDER))
    with ThreadPoolExecutor(2) as pool:
        yield {
            item.name: pool.submit(item.function.body, tmp_path_factory.mktemp("beside")) for item in items
        }


ORDER = (
    "test_chains_are_exact_on_every_version_however_they_are_cut",
    "test_walltimes_cut_one_process_and_two_nodes_and_both_equal_the_plain_program",
)
