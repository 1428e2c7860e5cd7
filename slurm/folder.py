"""One cluster's folder: which processes belong to it, how they are started, asked and stopped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL

STOP_SECONDS = 10.0
MARK = "SLURM_FOLDER"  # every process that `up` starts has this variable, so we never guess whose it is
MADE_BY_UP = (
    "slurm.conf",
    "slurmdbd.conf",
    "gres.conf",
    "cgroup.conf",
    "munge.key",
    "fast_signals.so",
    "slurm",
)
MADE_BY_UP += ("run", "state", "spool", "log", "mysql")
FREEZER = Path("/sys/fs/cgroup/freezer")  # where SLURM keeps a job's processes together with cgroup/v1


class ClusterError(Exception):
    """Something for the user to read, shown without a traceback."""


class Cluster:
    """The folder of a cluster and the processes that belong to it."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder.resolve()
        self.conf = self.dir / "slurm.conf"
        # What jobs start has this name in SLURM_CLUSTER_NAME, so no two folders may share it.
        self.name = "t" + hashlib.sha1(bytes(self.dir)).hexdigest()[:12]
        self.slurm = self.dir / "slurm"  # a link to SLURM's programs, where they are not the machine's own

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep an `up` and a `down` (the watchdog's, say) of this folder from running at once."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(self.dir, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def processes(self) -> dict[int, str]:
        """Return pid -> kind of the processes that provably belong to this folder, except ourselves.

        These are the ones that `up` started, the ones with the cluster's name in their environment, and
        whatever descends from them. What cannot be shown to be ours is never touched, whatever its name.
        """
        ours = {f"{MARK}={self.dir}".encode(), f"SLURM_CLUSTER_NAME={self.name}".encode()}
        found: dict[int, str] = {}
        parent: dict[int, int] = {}
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):  # it has ended, or it is somebody else's
                process = Path(f"/proc/{pid}")
                parent[pid] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                if ours.intersection((process / "environ").read_bytes().split(b"\0")):
                    argv = (process / "cmdline").read_text(errors="replace").split("\0")
                    node = argv[argv.index("-N") + 1 :][:1] if argv[0].endswith("/slurmd") else []
                    found[pid] = "watchdog" if "--after" in argv else " ".join([Path(argv[0]).name, *node])
        while children := {pid for pid in parent.keys() - found.keys() if parent[pid] in found}:
            found.update(dict.fromkeys(children, "job"))
        found.pop(os.getpid(), None)
        return found

    def end(self, how: signal.Signals, kind: str = "") -> None:
        """Signal processes of one kind, or all, until none is left; raise if that takes long."""

        def none_left() -> bool:
            pids = [pid for pid, name in self.processes().items() if name.startswith(kind)]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
            return not pids

        if not wait(none_left, STOP_SECONDS):
            raise ClusterError(f"these processes of {self.dir} do not end: {self.processes()}")

    def nodes(self) -> list[str]:
        """Return the names of the nodes in slurm.conf."""
        lines = self.conf.read_text().splitlines()
        return [line.split()[0].partition("=")[2] for line in lines if line.startswith("NodeName=n")]

    def environment(self) -> dict[str, str]:
        """Return our environment, aimed at this cluster and free of what an outer SLURM job put there."""
        outer = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
        return {**clean, "SLURM_CONF": str(self.conf), "PATH": self.path()}

    def path(self) -> str:
        """Return PATH with this cluster's programs first."""
        path = os.environ.get("PATH", os.defpath)
        return f"{self.slurm}/usr/bin:{self.slurm}/usr/sbin:{path}" if self.slurm.exists() else path

    def find(self, name: str) -> str:
        """Return the path of a program of this cluster, or its bare name."""
        return find(name, self.path()) or name

    def ask(self, *argv: str, timeout: float = 5) -> str | None:
        """Return what a SLURM command prints, or None if it failed or got no answer."""
        command = [self.find(argv[0]), *argv[1:]]
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            return subprocess.check_output(
                command, env=self.environment(), text=True, timeout=timeout, stderr=DEVNULL
            )
        return None

    def start(self, name: str, *argv: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a daemon, in a session of its own since a Ctrl-C is not meant for it."""
        environment = {**self.environment(), **variables}
        environment[MARK] = str(self.dir)  # last: slurmstepd's title overwrites the beginning
        command = [self.find(argv[0]), *argv[1:]]
        with (self.dir / f"log/{name}.out").open("wb") as out:
            return subprocess.Popen(
                command,
                cwd=self.dir,
                env=environment,
                stdin=DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End all processes: first in the order that SLURM wants, then by force whatever is left."""
        self.end(signal.SIGKILL, "watchdog")
        if {"munged", "slurmctld"} <= set(self.processes().values()):
            jobs = (self.ask("squeue", "-h", "-o", "%A") or "").split()
            if jobs and self.ask("scancel", *jobs) is not None:
                wait(lambda: not self.ask("squeue", "-h"), STOP_SECONDS)
        with contextlib.suppress(ClusterError):
            for daemon in ("slurmd n", "slurmctld", "slurmdbd", "mariadbd", "munged"):
                self.end(signal.SIGTERM, daemon)
        self.end(signal.SIGKILL)

    def delete(self) -> None:
        """Delete what `up` made, and the folder too unless others put something there."""
        for node in (
            self.nodes() if self.conf.exists() else ()
        ):  # they are there in the profile `cgroup` alone
            for group, _, _ in os.walk(FREEZER / f"slurm_{node}", topdown=False):
                os.rmdir(group)
        for path in (self.dir / name for name in MADE_BY_UP):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.dir.rmdir()


def find(name: str, path: str | None = None) -> str | None:
    """Return the path of a program on PATH or in the sbin beside a bin there (users' PATHs lack sbin)."""
    folders = (path or os.environ.get("PATH", os.defpath)).split(os.pathsep)
    folders += [folder.removesuffix("bin") + "sbin" for folder in folders if folder.endswith("/bin")]
    return shutil.which(name, path=os.pathsep.join(folders))


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until the condition holds; return whether it did in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
