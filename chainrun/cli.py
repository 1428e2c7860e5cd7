"""The commands: arguments in, lines and an exit code out."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chainrun import __version__
from chainrun.errors import EXIT_DONE, ChainrunError, UsageError

if TYPE_CHECKING:
    from chainrun.experiment import Experiment

EXAMPLES = """\
examples:
  chainrun run digits.yaml --walltime 20s      a chain on this machine, cut every 20 seconds
  chainrun submit digits.yaml args.lr=0.1      a chain on SLURM
  chainrun submit digits.yaml args.lr=0.1,0.01 'seed=range(3)' parallel=2    a grid of six chains, two at once
  chainrun doctor digits.yaml --probe          will the chain work on this cluster?
  chainrun status runs                         where every run stands
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 failed, 2 wrong input, 75 stopped, not handed over."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    # argparse ends the list of overrides at the first option: `EXP --walltime 20s args.lr=0.1`
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        code = int(options.command(options))
        sys.stdout.flush()
        return code
    except ChainrunError as error:
        print(f"chainrun: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `chainrun logs … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:  # of a command that only looks or waits; `run` saves and stops
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chainrun",
        description="Chain SLURM jobs into one PyTorch training that goes on bit for bit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"chainrun {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    submit = commands.add_parser("submit", help="submit an experiment to SLURM, or go on with its run")
    _experiment(submit)
    submit.add_argument("--dry-run", action="store_true", help="show the sbatch script, submit nothing")
    submit.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="submit so many jobs at once, each to follow the one before",
    )
    _confirmation(submit)
    submit.set_defaults(command=_submit)

    run = commands.add_parser("run", help="the same chain on this machine")
    _experiment(run)
    run.add_argument("--walltime", metavar="20s", help="cut every segment after this time")
    run.add_argument("--interrupt-at", metavar="7,14", help="cut at exactly these global steps")
    _confirmation(run)
    run.set_defaults(command=_run)

    verify = commands.add_parser("verify", help="run cut and uncut, compare every step bit for bit")
    _experiment(verify)
    verify.add_argument("--steps", type=int, default=20, metavar="N", help="how many to compare (default 20)")
    verify.add_argument("--cuts", metavar="7,14|every", help="cut after these steps (default: a few)")
    verify.add_argument("--json", action="store_true", help="print the verdict as JSON")
    verify.set_defaults(command=_verify)

    status = commands.add_parser("status", help="where runs stand")
    status.add_argument(
        "dirs", nargs="*", type=Path, metavar="DIR", help="runs, or folders of runs (default: runs)"
    )
    status.add_argument("--watch", action="store_true", help="redraw every few seconds, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="print all of it as JSON, one object a run")
    status.set_defaults(command=_status)

    logs = commands.add_parser("logs", help="the output of all segments")
    logs.add_argument("dir", type=Path, metavar="DIR")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as the log grows, over handoffs too")
    logs.add_argument("--rank", type=int, default=0, metavar="N", help="whose output (default 0)")
    logs.add_argument("--segment", type=int, metavar="K", help="of this segment alone")
    logs.add_argument("-n", "--lines", type=int, metavar="N", help="begin with the last N lines")
    logs.set_defaults(command=_logs)

    show = commands.add_parser("show", help="a run's story, or what a checkpoint holds")
    show.add_argument("path", type=Path, metavar="DIR|CHECKPOINT")
    show.add_argument("--all", action="store_true", help="of a checkpoint: list all tensors, not the largest")
    show.add_argument(
        "--rank", type=int, metavar="N", help="of a checkpoint: whose file to look into (default 0)"
    )
    show.add_argument("--verify", action="store_true", help="of a checkpoint: read and hash every file")
    show.add_argument("--json", action="store_true", help="print all of it as JSON")
    show.set_defaults(command=_show)

    report = commands.add_parser(
        "report", help="one page of a run, or of a folder of runs: time, cost, curves"
    )
    report.add_argument("dir", type=Path, metavar="DIR")
    report.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="NAME.html, with NAME.png beside it, or NAME.png alone (default: report.html in DIR)",
    )
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="write a checkpoint's weights as a safetensors file")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="NAME.safetensors")
    export.add_argument("--object", metavar="NAME", help="the registered object (default: the only module)")
    export.set_defaults(command=_export)

    cancel = commands.add_parser("cancel", help="save and end a run for good, or all runs of a sweep")
    cancel.add_argument("dir", type=Path, metavar="DIR")
    cancel.set_defaults(command=_cancel)

    doctor = commands.add_parser("doctor", help="will a chain work on this cluster, and what to set for it")
    _experiment(doctor, optional=True)
    doctor.add_argument(
        "--probe", action="store_true", help="try it on the nodes with one job of two minutes"
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(command=_doctor)

    demo = commands.add_parser("demo", help="train the digits example in a chain and compare it, bit for bit")
    demo.add_argument("--dir", type=Path, metavar="DIR", help="keep the two runs there")
    demo.set_defaults(command=_demo)
    return parser


def _experiment(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "experiment", type=Path, metavar="EXP", nargs="?" if optional else None, help="the experiment file"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="k=v",
        help="for example args.lr=0.1 slurm.time=2h; args.lr=0.1,0.01 is a sweep",
    )
    if not optional:
        parser.add_argument(
            "--override",
            action="store_true",
            help="go on with a changed experiment, and the code as it is now",
        )
        parser.add_argument("--frozen", action="store_true", help="go on with the code as it was submitted")


def _confirmation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="a sweep of more than 1000 chains is meant")


def _submit(options: argparse.Namespace) -> int:
    from chainrun import sweep
    from chainrun.launch import group, slurm, submit

    found = sweep.load(options.experiment, options.overrides)
    described, base = found.points[0].experiment, options.experiment.absolute().parent
    if found.axes:
        print(found.text())
    if options.dry_run:
        from chainrun.rundir import RunDir

        print(submit.script(RunDir(described.run_dir), described))
        return EXIT_DONE
    if options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: at least 1 is needed")
    sweep.confirm(found, confirmed=options.yes)
    slurm.need()
    submit.check(described)
    ways = {"override": options.override, "keep_code": options.frozen}
    if found.axes:
        return group.submit_group(found, base, **ways, jobs=options.jobs, source=options.experiment)
    run, how = submit.prepare(described, base, **ways)
    if how == "done":
        return _already_done(run.path)
    jobs = submit.submit_jobs(run, described, options.jobs)
    named = f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {', '.join(jobs)}"
    print(f"{'submitted' if how == 'new' else 'going on:'} {named}, run {run.path}")
    print(f"chainrun status {run.path}")
    return EXIT_DONE


def _run(options: argparse.Namespace) -> int:
    from chainrun import sweep
    from chainrun.durations import parse_duration
    from chainrun.launch import group, local, submit

    found = sweep.load(options.experiment, options.overrides)
    described, base = found.points[0].experiment, options.experiment.absolute().parent
    walltime = options.walltime and parse_duration(options.walltime, "--walltime")
    cuts = _steps(options.interrupt_at, "--interrupt-at")
    ways = {"override": options.override, "keep_code": options.frozen}
    if found.axes:
        print(found.text(), flush=True)
        sweep.confirm(found, confirmed=options.yes)
        return group.run_group(found, base, cuts, walltime, **ways)
    run, how = submit.prepare(described, base, **ways)
    if how == "done":
        return _already_done(run.path)
    code = local.run_chain(run, described, cuts, walltime)
    if code == EXIT_DONE:
        print(f"done: {run.path}")
    return code


def _one(options: argparse.Namespace) -> Experiment:
    """Return the experiment of a command that looks at one run; of a sweep it is the first one."""
    from chainrun import sweep

    found = sweep.load(options.experiment, options.overrides)
    if found.axes:
        print(f"of {found.text()}: the first, {found.points[0].name}", file=sys.stderr)
    return found.points[0].experiment


def _verify(options: argparse.Namespace) -> int:
    from chainrun.launch import verify

    described = _one(options)
    if options.steps < 2:
        raise UsageError(
            f"--steps {options.steps}: at least 2 are needed, one before the cut and one after it"
        )
    if options.cuts == "every":
        cuts: list[int] | None = list(range(1, options.steps))
    else:
        cuts = _steps(options.cuts, "--cuts") or None
    base = options.experiment.absolute().parent
    return verify.command(described, base, options.steps, cuts, as_json=options.json)


def _steps(text: str | None, option: str) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        steps = [0]
    if any(step < 1 for step in steps):
        raise UsageError(f"{option} {text}: give global steps from 1 on, separated by commas: 7,14")
    return steps


def _already_done(path: Path) -> int:
    print(
        f"{path} is done; its result is in {path / 'result.json'}. Choose another name or dir for a new run"
    )
    return EXIT_DONE


def _status(options: argparse.Namespace) -> int:
    from chainrun import status

    return status.status(options.dirs or [Path("runs")], as_json=options.json, watch=options.watch)


def _logs(options: argparse.Namespace) -> int:
    from chainrun import logs

    what = {"segment": options.segment, "lines": options.lines}
    return int(logs.logs(options.dir, rank=options.rank, follow=options.follow, **what))


def _show(options: argparse.Namespace) -> int:
    from chainrun import inspect_runs
    from chainrun.rundir import open_run, parse_checkpoint

    path = options.path.absolute().resolve()
    if parse_checkpoint(path.name):
        from chainrun import inspect_checkpoint

        looks = {"every": options.all, "verify": options.verify, "as_json": options.json}
        return inspect_checkpoint.show(path, rank=options.rank or 0, **looks)
    run = open_run(path)
    for option in ("all", "verify", "rank"):
        if getattr(options, option) not in (None, False):
            raise UsageError(
                f"--{option} is for a checkpoint, and {path} is a run: give one of {run.checkpoints}/step-…"
            )
    return inspect_runs.show(run, as_json=options.json)


def _report(options: argparse.Namespace) -> int:
    from chainrun import report

    return report.command(options.dir, options.output)


def _export(options: argparse.Namespace) -> int:
    from chainrun import inspect_checkpoint

    return inspect_checkpoint.export(options.checkpoint, options.output, options.object)


def _cancel(options: argparse.Namespace) -> int:
    from chainrun.launch import cancel, group
    from chainrun.rundir import is_group

    return group.cancel_group(options.dir) if is_group(options.dir) else cancel.cancel(options.dir)


def _doctor(options: argparse.Namespace) -> int:
    from chainrun.launch import doctor

    described = _one(options) if options.experiment else None
    base = options.experiment.absolute().parent if options.experiment else Path.cwd()
    return doctor.command(described, base, tries=options.probe, as_json=options.json)


def _demo(options: argparse.Namespace) -> int:
    from chainrun import demo

    return demo.demo(options.dir)


if __name__ == "__main__":
    sys.exit(main())
