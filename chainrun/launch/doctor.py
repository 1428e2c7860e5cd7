"""Will a chain work here? What SLURM says of itself, what the experiment asks for, and what to set or to ask for.

`judge.examine` judges what `site` has read, `local` what this machine shows, `tried` what `probe` has found on the nodes.
Each finding has a verdict, the reason, and the line for the experiment file or the question for the site.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from chainrun import function
from chainrun.checkpoint.store import Store
from chainrun.errors import EXIT_DONE, EXIT_FAILED, ClusterError, ExperimentError
from chainrun.experiment import Experiment
from chainrun.launch import probe, submit
from chainrun.launch.judge import Finding, examine, first_partition
from chainrun.launch.site import Site, read_site
from chainrun.rundir import RunDir

# kinds of filesystems, as /proc/self/mountinfo calls them
SHARED = re.compile(
    r"nfs\d?|lustre|gpfs|beegfs|fhgfs|ceph|cifs|smb3|glusterfs|pvfs2|panfs|afs|wekafs|dvs|gfs2|ocfs2|9p|orangefs|"
    r"quobyte|fuse\.(ceph.*|glusterfs|juicefs|sshfs|daos|dfuse|quobyte)"
)
LOCAL = re.compile(r"ext[234]|xfs|btrfs|zfs|f2fs|jfs|reiserfs|vfat|tmpfs|ramfs|overlay|squashfs|rootfs")
PAGES = "docs/sites/"


def command(described: Experiment | None, base: Path, *, tries: bool, as_json: bool) -> int:
    """Examine SLURM, this machine and the experiment, and print what was found.

    Args:
        base: the folder of the experiment file.
        tries: submit the probe, too.

    Returns:
        0 where a chain will work, 1 where a problem was found.
    """
    findings: dict[str, Finding] = {}

    def note(found: Iterable[Finding]) -> None:
        for one in found:
            findings[one.name] = one
            if not as_json:
                print(_show(one), flush=True)

    site = read_site()
    note(examine(site, described))
    note(local(site, described, base))
    if described is not None and site.answers and described.slurm.time is not None:
        note([_rehearse(described)])
    blocked = [name for name in _BLOCKING if name in findings and findings[name].verdict == "problem"]
    raw: dict[str, Any] | None = None
    if tries and blocked:
        note([Finding("note", "probe", f"not submitted: see {', '.join(blocked)}")])
    elif tries:
        subject = described or Experiment(name="doctor", function="none:none", dir=Path("."))
        try:
            raw = probe.probe(subject, base, described.function if described else None)
            note(tried(raw, subject))
        except ClusterError as error:
            note([Finding("problem", "probe", str(error))])
    problems = [one for one in findings.values() if one.verdict == "problem"]
    if as_json:
        told = {"works": not problems, "findings": [asdict(one) for one in findings.values()], "probe": raw}
        print(json.dumps(told, indent=1))
    else:
        print(_sum_up(findings.values(), probed=raw is not None or not site.answers))
    return EXIT_FAILED if problems else EXIT_DONE


_BLOCKING = ("SLURM", "controller", "partition", "submission", "directory", "function")


def _show(one: Finding) -> str:
    indent = " " * 24
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
    lines = [
        textwrap.fill(
            one.text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
    ]
    lines += [f"{indent}-> YAML: {one.yaml}"] * bool(one.yaml)
    lines += [f"{indent}-> ask the site for: {one.ask}"] * bool(one.ask)
    lines += [f"{indent}-> see {PAGES}{one.page}"] * bool(one.page)
    return f"{one.verdict:<8} {one.name:<14} " + "\n".join(lines).lstrip()


def _sum_up(findings: Collection[Finding], *, probed: bool) -> str:
    counts = {kind: sum(one.verdict == kind for one in findings) for kind in ("problem", "warning")}
    told = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count)
    works = f"a chain will {'not ' * bool(counts['problem'])}work here" + f": {told}" * bool(told)
    if probed:
        return works
    return f"{works}. Not tried: what only a job on the nodes can show (--probe)"


def _rehearse(described: Experiment) -> Finding:
    answer = submit.rehearse(RunDir(described.run_dir), described)
    text = answer.text.strip().splitlines()[-1] if answer.text.strip() else "no answer"
    if answer.ok:
        return Finding(
            "ok", "submission", f"sbatch --test-only takes the job: {text.removeprefix('sbatch: ')}"
        )
    return Finding("problem", "submission", f"sbatch --test-only refuses the job: {text}")


# ---- this machine ---------------------------------------------------------------------------------------


def local(site: Site, described: Experiment | None, base: Path) -> Iterator[Finding]:
    """Judge what can be seen without SLURM: the function, Python and torch, the run directory."""
    spec = None
    if described is not None:
        try:
            function.check_arguments(function.find_function(described, base), described.args)
            spec = described.function
        except ExperimentError as error:
            yield Finding("problem", "function", str(error))
    loaded = probe.load_apart(spec, base)
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    told = f"Python {platform.python_version()} ({sys.executable}), torch {torch}"
    if loaded["torch"] is None:
        yield Finding("problem", "python", f"{told}: torch cannot be imported: {loaded['error']}")
    else:
        yield Finding("ok", "python", f"{told}; jobs start this very path")
        if spec and loaded["error"]:
            yield Finding("problem", "function", loaded["error"])
        elif spec:
            yield Finding("ok", "function", f"{spec} loads, in {loaded['seconds']} s with torch")
    for name, path in (
        ("dir", described.run_dir if described else None),
        ("env", Path(sys.prefix)),
    ):
        if path is not None and site.answers:
            yield _sharing(site, described, f"shared {name}", path)
    if described is not None:
        yield _directory(RunDir(described.run_dir))


def _directory(run: RunDir) -> Finding:
    there = next(path for path in (run.path, *run.path.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        text = f"{run.path} cannot be {'written' if there == run.path else f'made: {there} is not yours to write'}"
        return Finding("problem", "directory", text, "dir: PATH")
    free = shutil.disk_usage(there).free
    told = f"{run.path} {'is there' if there == run.path else 'can be made'}, {_size(free)} free (a quota is not seen)"
    kept = Store(run).committed()
    if not kept:
        return Finding("warning" if free < 2**30 else "ok", "directory", told)
    newest = kept[0]
    from chainrun import experiment  # the run's own, frozen

    count = experiment.load(run.experiment).checkpoint.keep + 1 if run.experiment.exists() else 3
    have = sum(one.size for one in kept)
    need = max(newest.size, count * newest.size - have)
    told += f"; a checkpoint takes {_size(newest.size)}, keep + 1 of them {_size(count * newest.size)}"
    if need > free:
        text = f"{told}: {_size(need)} more are needed"
        return Finding(
            "problem", "directory", text, "checkpoint: {keep: 1}", "a larger quota, or another dir"
        )
    return Finding("ok", "directory", told)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _sharing(site: Site, described: Experiment | None, name: str, path: Path) -> Finding:
    """Whether the nodes will see a path, as far as the kind of its filesystem tells."""
    kind, mount = filesystem(path)
    told = f"{path} is on {kind} ({mount})"
    asked = first_partition(site, described)
    hosts = {host.partition(".")[0] for one in site.nodes if one.partition == asked for host in one.hosts}
    if SHARED.fullmatch(kind):
        return Finding("ok", name, f"{told}, a shared filesystem")
    if hosts and hosts <= {socket.gethostname().partition(".")[0]}:
        return Finding("ok", name, f"{told}; the nodes are this machine")
    if LOCAL.fullmatch(kind):
        text = f"{told}, which other machines do not see; --probe tries it"
        line = "dir: PATH/ON/A/SHARED/FILESYSTEM" if name == "shared dir" else ""
        return Finding("warning", name, text, line)
    return Finding("note", name, f"{told}, which may or may not be shared; --probe tries it")


def filesystem(path: Path, table: str | None = None) -> tuple[str, str]:
    """Return the type and the mount point of the filesystem that a path is on, or will be on when it is made.

    Args:
        table: the text of /proc/self/mountinfo.
    """
    if table is None:
        table = Path("/proc/self/mountinfo").read_text()
    real, best = Path(os.path.realpath(path)), ("unknown", "/")
    for line in table.splitlines():
        left, dash, right = line.partition(" - ")
        if dash:
            mount = left.split()[4].encode().decode("unicode_escape")  # \040 is a blank
            if real.is_relative_to(mount) and len(mount) >= len(
                best[1]
            ):  # of two on one place the later counts
                best = (right.split()[0], mount)
    return best


# ---- what the probe has found ---------------------------------------------------------------------------


def tried(found: dict[str, Any], described: Experiment) -> Iterator[Finding]:
    """Judge what the probe's job has found on the nodes."""
    first, nodes, job = found["first"], described.slurm.nodes, found["job"]
    log = "; its log ends: " + " | ".join(found["log"]) if found["log"] else ""
    lost = [one["node"] for one in first if one["token"] != found["token"]]
    if not first:
        text = (
            f"job {job} ended as {found['state']} and left nothing: the nodes do not see {described.run_dir.parent}, or "
            f"Python or chainrun is not at {sys.executable} there{log}"
        )
        line = "dir: PATH/ON/A/SHARED/FILESYSTEM"
        yield Finding("problem", "shared dir", text, line, page="containers.md")
        return
    head = first[0]
    if len(first) == nodes and not head.get("tried"):
        yield Finding("problem", "probe", f"job {job} ended as {found['state']} before it had tried all{log}")
        yield from _software(first)
        return
    names = ", ".join(one["node"] for one in first)
    yield Finding(
        "ok", "probe", f"job {job} ran on {names} and ended as {found['state']}; all it made is removed"
    )
    unseen = set(head.get("seen", [])) ^ {one["node"] for one in first}
    if lost or len(first) < nodes or unseen:
        text = f"{described.run_dir.parent}: {len(first)} of {nodes} nodes wrote there, {len(lost)} did not see the token"
        text += f", {head['node']} saw the files of {', '.join(head.get('seen', [])) or 'none'}{log}"
        yield Finding("problem", "shared dir", text, "dir: PATH/ON/A/SHARED/FILESYSTEM")
    else:
        text = f"{described.run_dir.parent}: what is written here is seen on {names}, and the other way round"
        yield Finding("ok", "shared dir", text)
    yield from _warned(first)
    yield from _software(first)
    yield from _handing_over(found, described)


def _warned(first: list[dict[str, Any]]) -> Iterator[Finding]:
    end = first[0]["end"]
    if end is None:
        text = "scontrol tells no end of the job on the node: a segment stops at SLURM's warning"
        yield Finding("warning", "end", text, ask="scontrol show job on the compute nodes")
    else:
        also = " and in SLURM_JOB_END_TIME" if first[0]["end_in_environment"] else ""
        yield Finding("ok", "end", f"the job's end is known on the node, from scontrol{also}")
    deaf = [one["node"] for one in first if not one.get("warned")]
    if not deaf:
        early = [(one["end"] or end) - one["warned"] for one in first] if end else []
        when = f" {min(early):.0f} s before the end ({probe.ASKED:.0f} were asked for)" if early else ""
        yield Finding(
            "ok", "signals", f"SLURM's warning, USR2, came to Python on all {len(first)} nodes{when}"
        )
        return
    text = f"SLURM's warning, USR2, did not come to Python on {', '.join(deaf)}"
    if end is None:
        yield Finding("problem", "signals", f"{text}, and the end is not known either", page="containers.md")
    else:
        text += "; a walltime stop goes by the clock all the same, a preemption would not be seen in time"
        yield Finding("warning", "signals", text, page="containers.md")


def _software(first: list[dict[str, Any]]) -> Iterator[Finding]:
    here = (platform.python_version(), metadata.version("torch"))
    for one in first:
        loaded = one.get("loaded")
        if loaded is None:
            yield Finding("problem", "python", f"{one['node']}: the job ended while torch was being imported")
            return
        what = "torch or the function" if loaded["torch"] is None else "the function"
        if loaded["error"]:
            text = f"{one['node']}: {what} cannot be loaded: {loaded['error']}"
            yield Finding(
                "problem", "python", text, 'slurm: {setup: ["module load …"]}', page="containers.md"
            )
            return
        there = (one["python"], loaded["torch"])
        if there[0] != here[0] or there[1].partition("+")[0] != here[1].partition("+")[0]:
            text = f"{one['node']} has Python {there[0]}, torch {there[1]}; here it is Python {here[0]}, torch {here[1]}"
            yield Finding("warning", "python", text, page="containers.md")
            return
    slowest = max(one["loaded"]["seconds"] for one in first)
    gpus = min(one["loaded"]["gpus"] for one in first)
    text = f"Python {here[0]}, torch {first[0]['loaded']['torch']} on all nodes, loaded in {slowest} s; "
    yield Finding("ok", "python", f"{text}torch sees {gpus} GPUs; {first[0]['executable']}")


def _handing_over(found: dict[str, Any], described: Experiment) -> Iterator[Finding]:
    """What of requeue, resubmit and ahead works, and whether the experiment's handoff does."""
    head, second = found["first"][0], found["second"]
    submits = head.get("sbatch") or {"ok": False, "text": "not tried, the job ended before"}
    again = second[0]["restart"] if second else None
    requeues = again == "1"
    if requeues:
        yield Finding("ok", "requeue", "the job requeued itself and came back with SLURM_RESTART_COUNT=1")
    else:
        why = head.get("requeue") or f"the job ended as {found['state']}, its second start was not seen"
        other = "chain: {handoff: resubmit}" if submits["ok"] else ""
        text = f"scontrol requeue does not work from inside a job: {why}"
        yield Finding(
            "warning", "requeue", text, other, "scontrol requeue of own jobs", "requeue-forbidden.md"
        )
    if submits["ok"]:
        yield Finding(
            "ok", "sbatch", f"works from inside a job (job {submits['text']}, held and cancelled at once)"
        )
    else:
        other = "chain: {handoff: requeue}" if requeues else ""
        text = f"does not work from inside a job: {submits['text']}"
        yield Finding("warning", "sbatch", text, other, "sbatch on compute nodes", "no-sbatch-on-nodes.md")
    asked = described.chain.handoff
    works = {"requeue": requeues, "resubmit": submits["ok"]}.get(asked, requeues or submits["ok"])
    how = "requeue" if requeues and asked != "resubmit" else "resubmit"
    if works:
        how = "ahead" if asked == "ahead" and submits["ok"] else how
        yield Finding("ok", "handoff", f"chain.handoff: {asked} will hand over by {how}")
    elif requeues or submits["ok"]:
        text = f"chain.handoff: {asked} does not work here, {how if how != asked else 'requeue'} does"
        yield Finding("problem", "handoff", text, "chain: {handoff: auto}")
    else:
        text = "neither requeue nor sbatch works from inside a job: each segment ends with a checkpoint and exit code 75"
        text += "; `chainrun submit EXP` goes on from there"
        ask = "sbatch or scontrol requeue from inside a job"
        yield Finding("problem", "handoff", text, ask=ask, page="no-sbatch-on-nodes.md")
