"""What this site's SLURM is like, as SLURM itself tells it: version, configuration, partitions, nodes, limits."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
from dataclasses import dataclass, field

from chainrun.launch import slurm

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
PATIENCE = 10.0  # seconds that each command may take; after the first that takes longer, none is asked
_NOTHING = ("", "(null)", "NONE", "N/A", "UNLIMITED", "INFINITE", "none", "n/a", "infinite", "unlimited")


@dataclass(frozen=True)
class Nodes:
    """Nodes of one partition that are alike."""

    partition: str
    count: int
    cpus: int
    memory: int
    """MB, as SLURM counts."""
    gpus: int
    state: str
    hosts: frozenset[str]
    """The machines that they are; several nodes can be one."""

    @property
    def usable(self) -> bool:
        """Whether a job could run there, now or later, without anybody repairing something first."""
        return not re.search(r"down|drain|fail|unk|maint|future", self.state, re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """All that was read; what could not be read is empty, the reason in `silent` or `unlimited`."""

    missing: tuple[str, ...] = ()
    """SLURM's commands that are not on PATH."""
    silent: str | None = None
    """Why the controller gave no answer; None where it did."""
    version: tuple[int, int] | None = None
    version_text: str = ""
    config: dict[str, str] = field(default_factory=dict)
    partitions: dict[str, dict[str, str]] = field(default_factory=dict)
    nodes: tuple[Nodes, ...] = ()
    qos: dict[str, dict[str, str]] = field(default_factory=dict)
    associations: tuple[dict[str, str], ...] = ()
    unlimited: str | None = None
    """Why accounting's limits could not be read; None where they were."""

    @property
    def answers(self) -> bool:
        """Whether there is a SLURM that jobs can be submitted to."""
        return not self.missing and self.silent is None

    @property
    def default_partition(self) -> str | None:
        """The partition of jobs that name none."""
        names = [name for name, one in self.partitions.items() if one.get("Default") == "YES"]
        return names[0] if names else None

    def parameter(self, key: str, name: str) -> str | None:
        """Return one of the comma-separated settings of a key, ``""`` for a bare word, None where unset."""
        for part in self.config.get(key, "").split(","):
            word, _, value = part.strip().partition("=")
            if word.lower() == name.lower():
                return value
        return None

    @property
    def hold(self) -> float:
        """Seconds that a requeued job waits before it may start again."""
        if self.version and self.version >= (25, 11) and (delay := self.parameter(*_REQUEUE_DELAY)):
            with contextlib.suppress(ValueError):
                return float(delay)
        try:
            return float(self.parameter("AuthInfo", "cred_expire") or 120) + 1
        except ValueError:
            return 121.0


_REQUEUE_DELAY = ("SchedulerParameters", "requeue_delay")


def read_site(timeout: float = PATIENCE) -> Site:
    """Ask SLURM about itself; never raises for what SLURM does, and never waits long for it."""
    missing = tuple(command for command in COMMANDS if shutil.which(command) is None)
    if "scontrol" in missing or "sinfo" in missing:
        return Site(missing=missing)
    conf = os.environ.get("SLURM_CONF")
    if conf and not os.path.exists(conf):  # SLURM's own commands would wait a minute for it
        return Site(missing=missing, silent=f"SLURM_CONF is {conf}, which is not there")
    banner = slurm.ask("sinfo", "--version", most=timeout)
    text = banner.text.strip() if banner.ok else ""
    answers = []
    for command in (
        ("scontrol", "show", "config"),
        ("scontrol", "--all", "--oneliner", "show", "partition"),
        ("sinfo", "--all", "--noheader", "--exact", "--Node", "--format=%R|%c|%m|%G|%T|%n"),
    ):
        answer = slurm.ask(*command, most=timeout)
        if not answer.ok:
            return Site(missing, answer.text, read_version(text), text)
        answers.append(answer.text)
    config = read_config(answers[0])
    partitions = {one["PartitionName"]: one for one in slurm.records(answers[1]) if "PartitionName" in one}
    text = config.get("SLURM_VERSION", text)
    qos, associations, unlimited = _limits(config, timeout)
    return Site(
        missing=missing,
        version=read_version(text),
        version_text=text,
        config=config,
        partitions=partitions,
        nodes=read_nodes(answers[2]),
        qos=qos,
        associations=associations,
        unlimited=unlimited,
    )


def _limits(
    config: dict[str, str], timeout: float
) -> tuple[dict[str, dict[str, str]], tuple[dict[str, str], ...], str | None]:
    if not config.get("AccountingStorageType", "").endswith("slurmdbd"):
        return {}, (), "this SLURM has no accounting"
    who = (f"user={getpass.getuser()}", f"cluster={config.get('ClusterName', '')}")
    answers = []
    for what in (("qos",), ("associations", *who)):
        answer = slurm.ask("sacctmgr", "--parsable2", "show", *what, most=timeout)
        if not answer.ok:
            return {}, (), answer.text
        answers.append(read_table(answer.text))
    return {row["Name"]: row for row in answers[0] if row.get("Name")}, tuple(answers[1]), None


def read_version(text: str) -> tuple[int, int] | None:
    """Return (year, month) of `slurm-wlm 22.05.8`, `24.11.5-1` or `26.05.0-rc1`; None for any other text."""
    match = re.search(r"(?<![\d.])(\d\d)\.(\d\d?)(?!\d)", text)
    return (int(match[1]), int(match[2])) if match else None


def read_config(text: str) -> dict[str, str]:
    """Return the settings of ``scontrol show config``; an unset one is empty, of a double one the first counts."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and re.fullmatch(r"[\w\[\]]+", key.strip()):
            found.setdefault(key.strip(), "" if value.strip() == "(null)" else value.strip())
    return found


def read_nodes(text: str) -> tuple[Nodes, ...]:
    """Return the nodes of sinfo's lines ``partition|cpus|memory|gres|state|host``, those alike together."""
    found: dict[tuple[str, int, int, int, str], list[str]] = {}
    for line in text.splitlines():
        row = line.strip().split("|")
        if len(row) == 6:
            partition, cpus, memory, gres, state, host = row
            kind = (partition, _number(cpus), _number(memory), read_gpus(gres), state)
            found.setdefault(kind, []).append(host)
    return tuple(
        Nodes(partition, len(hosts), cpus, memory, gpus, state, frozenset(hosts))
        for (partition, cpus, memory, gpus, state), hosts in found.items()
    )


def read_gpus(gres: str) -> int:
    """Return how many GPUs ``gpu:a100:4(S:0-1),gpu:1,nvme:2`` has."""
    pieces = [piece.split(":") for piece in re.sub(r"\([^)]*\)", "", gres).split(",")]
    return sum(int(piece[-1]) if piece[-1].isdigit() else 1 for piece in pieces if piece[0] == "gpu")


def read_table(text: str) -> list[dict[str, str]]:
    """Return the rows of ``sacctmgr --parsable2`` by the names in its first line."""
    lines = [line.split("|") for line in text.splitlines() if "|" in line]
    return [dict(zip(lines[0], row, strict=False)) for row in lines[1:]] if lines else []


def read_seconds(text: str) -> float | None:
    """Return the seconds of SLURM's ``1-00:00:00``, ``02:00:00``, ``30:00``, ``60`` (minutes) or ``30 sec``.

    None where there is no limit or no such time: UNLIMITED, INFINITE, NONE, N/A, empty.
    """
    text = text.strip()
    if text in _NOTHING:
        return None
    if match := re.fullmatch(r"(\d+) ?(sec|min|hours?|days?)\w*", text):
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2][0]]
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None or len(numbers) == 3:  # hours first
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:  # minutes first
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return float(int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds)


def read_memory(text: str) -> int | None:
    """Return the MB of sbatch's ``16G``, ``4000`` or ``1T``; None for any other text."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip().upper())
    if match is None:
        return None
    return int(int(match[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[match[2]])


def read_count(text: str) -> int | None:
    """Return a limit such as MaxSubmit; None where there is none."""
    return int(text) if text.strip().isdigit() else None


def _number(text: str) -> int:
    match = re.match(r"\d+", text)  # `4+` where sinfo has put unlike nodes together all the same
    return int(match[0]) if match else 0


def ambient() -> list[str]:
    """Return the names of sbatch's variables that are set here, which chainrun hides from sbatch."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))
