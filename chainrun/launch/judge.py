"""What SLURM says of itself and what the experiment asks for, judged: one finding for each thing looked at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from chainrun.durations import format_duration
from chainrun.errors import nearest
from chainrun.experiment import Experiment, Slurm
from chainrun.launch import submit
from chainrun.launch.site import Nodes, Site, ambient, read_count, read_memory, read_seconds

Verdict = Literal["ok", "note", "warning", "problem"]
OLDEST = (22, 5)  # the oldest SLURM that chainrun is tested with


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    verdict: Verdict
    name: str
    """What was looked at, in a word; of two findings with one name the later one holds."""
    text: str
    """What was found, and what follows from it."""
    yaml: str = ""
    """A line for the experiment file."""
    ask: str = ""
    """What to ask the site for."""
    page: str = ""
    """The page in docs/sites that tells more."""


def examine(site: Site, described: Experiment | None) -> Iterator[Finding]:
    """Judge what SLURM says of itself, and whether the experiment fits."""
    conf = os.environ.get("SLURM_CONF")
    if site.missing:
        text = f"not on PATH: {', '.join(site.missing)}"
        if described is not None and described.slurm == Slurm():
            yield Finding(
                "note", "SLURM", f"{text}; the experiment has no slurm section: `chainrun run` trains here"
            )
        else:
            text += "; log in where jobs are submitted (a module may have to be loaded), or train here: chainrun run"
            yield Finding("problem", "SLURM", text)
        return
    if site.silent is not None:
        text = (
            f"{site.silent}; nothing else was asked. Is slurmctld up, and is this the cluster (SLURM_CONF)?"
        )
        yield Finding("problem", "controller", text)
        return
    where = f"cluster {site.config.get('ClusterName', 'without a name')}" + f", SLURM_CONF={conf}" * bool(
        conf
    )
    yield Finding("ok", "controller", f"answers; {where}")
    yield _version(site)
    yield _requeue(site, described)
    yield _hold(site, described)
    yield _signals(site)
    wait = site.config.get("KillWait", "30 sec")
    text = (
        f"after scancel a job has {wait} for its last checkpoint (KillWait); a walltime stop does not need it"
    )
    yield Finding("ok", "kill", text)
    if plugin := site.config.get("JobSubmitPlugins"):
        text = f"JobSubmitPlugins={plugin} may change or refuse what is asked for; --probe shows it"
        yield Finding("note", "plugins", text)
    if names := ambient():
        yield _environment(names)
    age, array = site.config.get("MinJobAge", "unknown"), site.config.get("MaxArraySize", "unknown")
    text = f"finished jobs are forgotten after MinJobAge ({age}), chainrun keeps its own record; "
    text += f"MaxArraySize ({array}) does not matter, it submits no arrays"
    yield Finding("ok", "records", text)
    yield from _limits(site, described)
    asked = described.slurm.partition if described else None
    partitions: list[str | None] = [*asked.split(",")] if asked else [site.default_partition]
    judged = [list(_partition(site, name, described)) for name in partitions]
    # of several the job runs in one where it can
    yield from min(judged, key=lambda found: sum(one.verdict == "problem" for one in found))
    if described is not None:
        yield _time(described)


def _environment(names: list[str]) -> Finding:
    """Of sbatch's own variables, which chainrun hides from it."""
    own = {name: name[7:].lower() for name in names}
    extra = {key: os.environ[name] for name, key in own.items() if key in ("account", "qos", "reservation")}
    given = {"partition": os.environ["SBATCH_PARTITION"]} if "SBATCH_PARTITION" in own else {}
    line = json.dumps({**given, **({"extra": extra} if extra else {})}) if given or extra else ""
    text = f"{', '.join(names)}: hidden from sbatch, so that every job of a chain is alike, wherever it is submitted"
    return Finding("note", "environment", text, f"slurm: {line}" if line else "")


def _version(site: Site) -> Finding:
    if site.version is None:
        return Finding("note", "version", f"{site.version_text or 'unknown'}, which chainrun cannot read")
    follows = [
        "SLURM_JOB_END_TIME is set" if site.version >= (23, 2) else "the job's end comes from scontrol alone"
    ]
    if site.version < (24, 5):
        follows.append(
            "a preempted job that ends inside its grace time is requeued by chainrun, not by SLURM"
        )
    if site.version >= (25, 11):
        follows.append("requeue_delay can shorten the wait of a requeued job")
    text = f"SLURM {site.version_text}: {'; '.join(follows)}"
    if site.version < OLDEST:
        return Finding("warning", "version", f"{text}. chainrun is tested from 22.05 on")
    return Finding("ok", "version", text)


def _requeue(site: Site, described: Experiment | None) -> Finding:
    if site.config.get("JobRequeue") != "0":
        return Finding("ok", "requeue", "JobRequeue=1; chainrun submits with --requeue")
    text = (
        "JobRequeue=0: jobs are not requeued unless they ask for it. chainrun's jobs do (--requeue); where the site "
        "takes that away, the segment that ends submits the next job (resubmit). --probe shows which"
    )
    only = described is not None and described.chain.handoff == "requeue"
    line = "chain: {handoff: auto}" if only else ""
    return Finding("warning" if only else "note", "requeue", text, line, page="requeue-forbidden.md")


def _hold(site: Site, described: Experiment | None) -> Finding:
    text = f"a requeued job may start again after {site.hold:.0f} s"
    if site.hold <= 30:
        return Finding("ok", "hold", text)
    text += " (the credential's lifetime, cred_expire in AuthInfo)"
    if described is not None and described.chain.handoff == "ahead":
        return Finding("ok", "hold", f"{text}; chain.handoff: ahead avoids that")
    new = site.version is not None and site.version >= (25, 11)
    ask = "requeue_delay=5 in SchedulerParameters" if new else ""
    text += "; a job submitted ahead does not wait, and keeps its place in the queue"
    return Finding("note", "hold", text, "chain: {handoff: ahead}", ask)


def _signals(site: Site) -> Finding:
    kind = site.config.get("ProctrackType", "unknown")
    if "cgroup" not in kind:
        return Finding("ok", "signals", f"{kind}: SLURM's signals reach the processes of a step")
    if site.config.get("SignalChildrenProcesses", "").lower() in ("yes", "true", "1"):
        return Finding(
            "ok", "signals", f"{kind} with SignalChildrenProcesses: signals reach every process of a step"
        )
    text = f"{kind}: SLURM signals only what srun starts itself. A wrapper around Python (a container's) must exec it"
    return Finding("note", "signals", text, page="containers.md")


def _limits(site: Site, described: Experiment | None) -> Iterator[Finding]:
    if site.unlimited is not None:
        text = f"{site.unlimited}: limits of accounts and QOS cannot be read; chainrun needs neither sacct nor sacctmgr"
        yield Finding("note", "accounting", text, page="no-accounting.md")
        return
    account = str(described.slurm.extra.get("account") or "") if described else ""
    rows = [row for row in site.associations if account in ("", row.get("Account"))]
    if account and not rows:
        mine = ", ".join(sorted({row.get("Account", "") for row in site.associations})) or "none"
        text = f"account {account}: you have no association with it; yours: {mine}"
        yield Finding(
            "problem", "account", text, "slurm: {extra: {account: …}}".replace("…", mine.split(",")[0])
        )
    names = [_qos_of(described), *(row.get("Def QOS", "") for row in rows[:1])]
    names += [
        site.partitions.get(name or "", {}).get("QoS", "") for name in [first_partition(site, described)]
    ]
    limits = [*rows[:1], *(site.qos[name] for name in dict.fromkeys(names) if name and name in site.qos)]
    least: dict[str, tuple[float, str]] = {}
    for row in limits:
        which = f"QOS {row['Name']}" if "Name" in row else f"account {row.get('Account')}"
        for column, key in (("MaxSubmit", "jobs"), ("MaxSubmitPU", "jobs"), ("MaxWall", "time")):
            text = row.get(column, "")
            value = read_seconds(text) if key == "time" else read_count(text)
            if value is not None and value < least.get(key, (float("inf"), ""))[0]:
                least[key] = (value, which)
    jobs, wall = least.get("jobs"), least.get("time")
    if jobs and jobs[0] < 2:
        text = (
            f"{jobs[1]} lets you have {jobs[0]:.0f} job in the queue: a next job beside the running one (resubmit, "
            "ahead) will be refused; requeue remains"
        )
        verdict: Verdict = "problem" if described and described.chain.handoff == "resubmit" else "warning"
        yield Finding(verdict, "accounting", text, "chain: {handoff: requeue}", page="no-sbatch-on-nodes.md")
    else:
        text = f"accounting is on; jobs in the queue: {f'{jobs[0]:.0f} ({jobs[1]})' if jobs else 'no limit seen'}"
        yield Finding("ok", "accounting", text)
    time = described.slurm.time if described else None
    if wall and time and time > wall[0]:
        text = f"slurm.time is {format_duration(time)}, {wall[1]} allows {format_duration(wall[0])}"
        yield Finding("problem", "qos time", text, _time_line(wall[0]), page="debug-queue.md")


def _qos_of(described: Experiment | None) -> str:
    return str(described.slurm.extra.get("qos", "")) if described else ""


def first_partition(site: Site, described: Experiment | None) -> str | None:
    asked = described.slurm.partition if described else None
    return asked.split(",")[0] if asked else site.default_partition


def _time_line(seconds: float) -> str:
    return f"slurm: {{time: {format_duration(seconds // 60 * 60)}}}"


# ---- the partition and what is asked of it --------------------------------------------------------------


def _partition(site: Site, name: str | None, described: Experiment | None) -> Iterator[Finding]:
    names = ", ".join(site.partitions) or "none"
    if name is None:
        verdict: Verdict = "note" if described is None else "problem"
        text = f"there is no default partition; there are: {names}"
        yield Finding(
            verdict, "partition", text, f"slurm: {{partition: {next(iter(site.partitions), 'NAME')}}}"
        )
        return
    one = site.partitions.get(name)
    if one is None:
        text = f"slurm.partition: there is no {name}{nearest(name, site.partitions)}; there are: {names}"
        yield Finding("problem", "partition", text)
        return
    if one.get("State") != "UP":
        text = f"{name} is {one.get('State')}: jobs there do not start; partitions: {names}"
        yield Finding("problem", "partition", text)
        return
    limit, default = read_seconds(one.get("MaxTime", "")), read_seconds(one.get("DefaultTime", ""))
    nodes = [group for group in site.nodes if group.partition == name]
    text = f"{name}: up, {sum(group.count for group in nodes if group.usable)} of {sum(g.count for g in nodes)} nodes "
    text += f"usable, time limit {format_duration(limit) if limit else 'none'}"
    yield Finding("ok", "partition", text)
    yield _preemption(site, name, one, described)
    if one.get("AllocNodes", "ALL") not in ("ALL", ""):
        text = f"{name} takes jobs from {one['AllocNodes']} only: a job may not be able to submit the next; --probe shows it"
        yield Finding("note", "sbatch", text, "chain: {handoff: requeue}", page="no-sbatch-on-nodes.md")
    if described is None:
        return
    if reservation := described.slurm.extra.get("reservation"):
        text = f"{reservation}: SLURM ends its jobs with it, without a warning; chainrun asks for its end and stops before"
        yield Finding("note", "reservation", text, page="reservations.md")
    time = described.slurm.time
    if time is None:
        text = f"slurm.time is missing; {name} allows {format_duration(limit) if limit else 'any time'}"
        yield Finding("problem", "walltime", text, _time_line(limit or default or 14400.0))
    elif limit and time > limit:
        text = f"slurm.time is {format_duration(time)}, {name} allows {format_duration(limit)}: the job would not start"
        yield Finding("problem", "walltime", text, _time_line(limit), page="debug-queue.md")
    else:
        yield Finding("ok", "walltime", f"slurm.time is {format_duration(time)}")
    yield _resources(name, nodes, described)


def _preemption(site: Site, name: str, one: dict[str, str], described: Experiment | None) -> Finding:
    kind = site.config.get("PreemptType", "preempt/none")
    if kind == "preempt/none":
        return Finding("ok", "preemption", "jobs are not preempted")
    mode, grace = (
        one.get("PreemptMode") or site.config.get("PreemptMode", ""),
        read_count(one.get("GraceTime", "")) or 0,
    )
    row = site.qos.get(_qos_of(described) or one.get("QoS", ""), {})
    if kind == "preempt/qos":
        mode = site.config.get("PreemptMode", "")
        if row.get("PreemptMode", "cluster") not in ("", "cluster"):
            mode = row["PreemptMode"]
        grace = int(read_seconds(row.get("GraceTime", "")) or grace)
    mode = mode.upper()
    if mode in ("OFF", "DISABLED", ""):
        return Finding("ok", "preemption", f"jobs in {name} are not preempted ({kind}, PreemptMode=OFF)")
    if "SUSPEND" in mode:
        return Finding(
            "note", "preemption", f"jobs in {name} may be suspended ({mode}); they go on by themselves"
        )
    page = "preemptible.md"
    told = f"jobs in {name} may be preempted ({kind}, PreemptMode={mode})"
    if not grace:
        wait = site.config.get("KillWait", "30 sec")
        text = f"{told} without a grace time: a job has {wait} (KillWait) for its last checkpoint. If that is too short, "
        text += "what came after the last periodic one is trained again"
        if mode == "CANCEL":
            text += (
                ". SLURM does not bring a cancelled job back: once its checkpoint is written chainrun requeues it; killed "
                "before that, it is over, and `chainrun submit` goes on, or a next job that waits (handoff: ahead)"
            )
        ask = f"GraceTime=120 of {'the QOS' if kind == 'preempt/qos' else f'partition {name}'}"
        return Finding("warning", "preemption", text, "checkpoint: {every: 5min}", ask, page)
    user = site.parameter("SlurmctldParameters", "preempt_send_user_signal") is not None
    signal = "USR2" if user else "SIGTERM (no preempt_send_user_signal)"
    text = f"{told}: {signal} comes first, and GraceTime leaves {grace} s, in which chainrun saves and hands over"
    if grace < 30:
        text += "; a large checkpoint may take longer"
        return Finding(
            "warning", "preemption", text, "checkpoint: {every: 5min}", f"a longer GraceTime of {name}", page
        )
    return Finding("ok", "preemption", text, page=page)


def _resources(name: str, nodes: list[Nodes], described: Experiment) -> Finding:
    """Compare what is asked of each node with the nodes there are; sbatch --test-only has the last word."""
    asked = described.slurm
    cpus, gpus = asked.tasks_per_node * (asked.cpus_per_task or 1), asked.gpus_per_node
    memory = read_memory(str(asked.extra.get("mem", ""))) or 0
    wants = [f"{cpus} CPUs"] + [f"{gpus} GPUs"] * bool(gpus) + [f"{memory} MB"] * bool(memory)
    told = f"{asked.nodes} node{'s' * (asked.nodes > 1)} with {', '.join(wants)} each"
    fits = [one for one in nodes if one.cpus >= cpus and one.gpus >= gpus and one.memory >= memory]
    usable = sum(one.count for one in fits if one.usable)
    if usable >= asked.nodes:
        return Finding("ok", "resources", f"{told}: {name} has {usable} such")
    kinds = "; ".join(
        f"{one.count} with {one.cpus} CPUs, {one.gpus} GPUs, {one.memory} MB, {one.state}" for one in nodes
    )
    total = sum(one.count for one in fits)
    text = f"{told}: {name} has {total} such, {usable} of them usable now. Its nodes: {kinds or 'none'}"
    if total >= asked.nodes:
        return Finding("warning", "resources", text, ask="when its nodes are back")
    lines = []
    if not total and nodes:
        most = max(one.cpus for one in nodes)
        if cpus > most >= asked.tasks_per_node:
            lines.append(f"cpus_per_task: {most // asked.tasks_per_node}")
        if gpus > max(one.gpus for one in nodes):
            lines.append(f"gpus_per_node: {max(one.gpus for one in nodes)}")
    elif total:
        lines.append(f"nodes: {total}")
    return Finding("problem", "resources", text, f"slurm: {{{', '.join(lines)}}}" if lines else "")


def _time(described: Experiment) -> Finding:
    time, lead = described.slurm.time, submit.warning(described)
    if time is None:
        return Finding("note", "lead", "follows slurm.time")
    told = f"SLURM's warning is asked for {lead} s before the end"
    if described.slurm.lead != "auto" and lead > 0.25 * time:
        text = f"slurm.lead is {lead} s of {format_duration(time)}: that part of every job is not trained in"
        return Finding("warning", "lead", text, "slurm: {lead: auto}")
    if time < 600:
        text = f"{told}; starting Python and torch, and the save at the end, take a large part of {format_duration(time)}"
        return Finding("note", "lead", text, page="debug-queue.md")
    return Finding("ok", "lead", told)
