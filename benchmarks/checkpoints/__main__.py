"""Checkpoints: chainrun beside torch.save, torch.distributed.checkpoint, safetensors, Lightning and Accelerate.

    python benchmarks/checkpoints durable            until the bytes are on the disk, fsync included for all
    python benchmarks/checkpoints stall              what the loop waits for a periodic save
    python benchmarks/checkpoints slowdown           steps of the loop while a save is under way
    python benchmarks/checkpoints memory             peak memory above that before the save
    python benchmarks/checkpoints start              process start to first resumed step, beside plain PyTorch
    python benchmarks/checkpoints boundary           run.step() and run.poll() with nothing due
    python benchmarks/checkpoints all                all of these on both states, and whether chainrun's promises hold

    --state transformer|small  --size 1e9  --device cpu|cuda  --rounds 5  --folder DIR  --only NAME,…

The state is a transformer's weights with AdamW moments (1 GB, 85 M parameters), or `small`: 25,000 tensors, 6,667
parameters of 1024 with moments and step counts. The methods take turns, in another order each round, after one
round that does not count. Peers: pip install -r benchmarks/requirements.txt; one that is missing is reported so.
`stall` takes every package as it comes: only chainrun and dcp call fsync by themselves. What chainrun needs to
remove the checkpoint before (`keep: 1`) is in its time, 0.15 s a GB on an ext4; what the others have left is removed
between two saves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import start
import torch
from methods import METHODS, State, opened, version

import chainrun

HERE = Path(__file__).parent
STEP_SECONDS = 0.02  # of the loop that `slowdown` trains, about
Times = dict[str, list[float]]
OURS, LAST, TORCH, ASYNC = "chainrun", "chainrun, last save", "torch.save", "dcp.async_save"
DISK, MEMORY = "limit: O_DIRECT write", "limit: copy in memory"


def take_turns(options: argparse.Namespace) -> tuple[Times, Times]:
    """Return the seconds that the loop waits, and those until all is on the disk, of every round, by method."""
    stalls: Times = {name: [] for name in options.methods}
    durables: Times = {name: [] for name in options.methods}
    state = State(options.state, options.size, options.device)
    print(
        f"\n{state.nbytes / 1e9:.2f} GB in {len(state.tensors())} tensors on {options.device}\n", flush=True
    )
    with opened(options.methods, state, options.folder) as methods:
        for turn in range(options.rounds + 1):
            # not by turns in one order: whoever follows a method meets the page cache and the disk as it left them
            for name in random.Random(turn).sample(options.methods, len(methods)):
                method = methods[name]
                method.prepare()
                began = time.perf_counter()
                method.save()
                stalled = time.perf_counter()
                method.wait()
                if turn:  # the first round warms up
                    stalls[name].append(stalled - began)
                    durables[name].append(time.perf_counter() - began)
    options.nbytes = state.nbytes
    return stalls, durables


def durable(options: argparse.Namespace) -> None:
    """Seconds until the state is on the disk."""
    options.methods = [name for name in options.methods if name != MEMORY]
    table(options, take_turns(options)[1])


def stall(options: argparse.Namespace) -> None:
    """Seconds that the loop waits for a periodic save."""
    options.methods = [name for name in options.methods if name not in (DISK, LAST)]
    table(options, take_turns(options)[0])


def table(options: argparse.Namespace, times: Times) -> None:
    """Print medians, and how many times chainrun's time each method took in the same round."""
    ours = times.get("chainrun")
    print(f"{'':32} {'median':>9} {'from':>8} {'to':>8} {'GB/s':>7}   times chainrun's")
    for name, found in times.items():
        middle = statistics.median(found)
        ratio = ours and statistics.median(a / b for a, b in zip(found, ours, strict=True))
        row = f"{middle:8.3f}s {min(found):8.3f} {max(found):8.3f} {options.nbytes / middle / 1e9:7.2f}"
        print(f"{name:32} {row}   {ratio or 0:.2f}")


def all_(options: argparse.Namespace) -> None:
    """Every measure, and the promises that chainrun makes beside what came out."""
    rounds, folder, methods = options.rounds, options.folder, options.methods
    kept: dict[str, tuple[Times, Times]] = {}
    for options.state in ("transformer", "small"):
        # the packages that write a file for every few tensors take half a minute a round here
        options.rounds = rounds if options.state == "transformer" else max(2, rounds - 2)
        options.folder = fresh(folder, options.state)
        kept[options.state] = take_turns(options)
        for title, times, unfit in zip(
            ("what the loop waits for", "until all is on the disk"),
            kept[options.state],
            ((DISK, LAST), (MEMORY,)),
            strict=True,
        ):
            print(f"{options.state}, {title}")
            table(options, {name: found for name, found in times.items() if name not in unfit})
            print(flush=True)
    options.state, options.rounds, options.methods = "transformer", 2, methods
    for title, measure in (("steps meanwhile", slowdown), ("memory", memory)):
        print(f"\ntransformer, {title}")
        options.folder = fresh(folder, measure.__name__)
        measure(options)
    options.rounds, options.folder = max(3, rounds - 2), fresh(folder, "start")
    print("\nfrom the start of a process to the first resumed step", flush=True)
    starts = start_(options)
    options.folder = fresh(folder, "boundary")
    print("\na boundary with nothing due", flush=True)
    step = boundary(options)["run.step()"]

    (stalls, durables), (_, small) = kept["transformer"], kept["small"]
    promises = [
        ("durable, 1 GB: torch.save and fsync / chainrun", durables, TORCH, OURS, DISK, 2.5),
        ("durable, 25,000 tensors: torch.save and fsync / chainrun", small, TORCH, OURS, DISK, 15.0),
        ("last save, 1 GB: O_DIRECT write / chainrun", durables, DISK, LAST, None, 1 / 1.15),
        ("stall, 1 GB: copy in memory / chainrun", stalls, MEMORY, OURS, None, 1 / 1.3),
        ("stall, 1 GB: dcp.async_save / chainrun", stalls, ASYNC, OURS, MEMORY, 4.0),
    ]
    print(f"\n{'times as fast as, at least':58} {'found':>6} {'wanted':>7}          at the machine's limit")
    for name, times, other, ours, limit, wanted in promises:
        most = ratio(times, other, limit) if limit else None
        verdict(name, ratio(times, other, ours), wanted, most)
    verdict("start to first resumed step: plain PyTorch / chainrun", starts[0], 2.0, starts[1])
    verdict("a boundary with nothing due: 0.5 µs / chainrun", 0.5 / step, 1.0, None)


def verdict(name: str, found: float | None, wanted: float, most: float | None) -> None:
    """Print what came out beside what was promised, and what it would be with no work but the machine's own."""
    if found is None:
        print(f"{name:58} not measured")
        return
    word = "holds" if found >= wanted else "MISSED"
    print(f"{name:58} {found:6.2f} {wanted:7.2f}  {word:6}" + (f"  {most:6.2f}" if most else ""))


def fresh(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def ratio(times: Times, one: str, other: str) -> float | None:
    """Return the median of the rounds' ratios of two methods."""
    if one not in times or other not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def slowdown(options: argparse.Namespace) -> None:
    """Time of matrix-product steps while a save is under way, beside steps before it."""
    state = State(options.state, options.size, options.device)
    side = torch.randn(512, 512, device=options.device)
    work = side.clone()
    count = 1

    def step() -> float:
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(side, side, out=work)
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    count = max(1, round(STEP_SECONDS / min(step() for _ in range(5))))
    print(f"{'':32} {'before':>9} {'during':>9}   ratio  longest   steps during")
    names = [name for name in options.methods if name not in (DISK, MEMORY, LAST)]
    with opened(names, state, options.folder) as methods:
        for name, method in methods.items():
            before: list[float] = []
            during: list[float] = []
            for turn in range(options.rounds + 1):
                method.prepare()
                idle = [step() for _ in range(50)]
                method.save()
                busy = []
                while not method.is_done():
                    busy.append(step())
                method.wait()
                if turn:
                    before, during = before + idle, during + busy[:-1]  # the last is half without it
            if not during:
                print(
                    f"{name:32} {statistics.median(before) * 1e3:7.2f}ms   no step: the loop waits for all of it"
                )
                continue
            a, b = statistics.median(before), statistics.median(during)
            row = f"{a * 1e3:7.2f}ms {b * 1e3:7.2f}ms {b / a:7.2f} {max(during) * 1e3:6.1f}ms"
            print(f"{name:32} {row}   {len(during)}", flush=True)


def memory(options: argparse.Namespace) -> None:
    """Peak memory of a fresh process above that before, of the first save and the second."""
    print(f"{'':32} {'peak of 1st':>12} {'of 2nd':>9} {'kept':>9}   of the state's bytes")
    for name in options.methods:
        if name.startswith("limit"):
            continue
        again = ["--state", options.state, "--size", str(options.size), "--device", options.device]
        command = [
            sys.executable,
            str(HERE),
            "_memory",
            *again,
            "--folder",
            str(options.folder),
            "--only",
            name,
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        first, second, kept = (found[key] / 1e6 for key in ("first", "second", "kept"))
        share = f"{found['first'] / found['nbytes']:.2f} {found['second'] / found['nbytes']:.2f}"
        print(f"{name:32} {first:9.0f} MB {second:6.0f} MB {kept:6.0f} MB   {share}", flush=True)


def _memory(options: argparse.Namespace) -> None:
    state = State(options.state, options.size, options.device)
    with opened(options.methods, state, options.folder) as methods:
        (method,) = methods.values()
        before, peaks = resident("VmRSS"), []
        for _ in range(2):
            method.prepare()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
            method.save()
            method.wait()
            peaks.append(resident("VmHWM") - before)
        kept = resident("VmRSS") - before
    print(json.dumps({"first": peaks[0], "second": peaks[1], "kept": kept, "nbytes": state.nbytes}))


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def start_(options: argparse.Namespace) -> tuple[float, float]:
    """Seconds from the start of a process to the end of its first resumed step, by phases.

    Return how many times ours the plain program takes, and how many times its own time without what it loads.
    """
    from chainrun import experiment
    from chainrun.launch import local, submit
    from chainrun.rundir import RunDir

    layers = max(1, round(options.size / 85e6))
    trace = options.folder / "trace"
    args = {"trace": str(trace), "layers": layers}
    keys = {"function": f"{HERE / 'start.py'}:train", "args": args, "name": "run", "dir": str(options.folder)}
    described = experiment.from_dict(keys, options.folder)
    run = RunDir(described.run_dir)
    submit.create(run, described)
    saved = options.folder / "plain.pt"
    plain = [sys.executable, str(HERE / "start.py"), str(saved), str(trace), str(layers)]

    def chainrun_(turn: int) -> None:
        local.run_one(run, described, [turn + 1])

    def plain_(turn: int) -> None:
        subprocess.run(plain, check=True)

    starts = {"chainrun": chainrun_, "plain PyTorch": plain_}
    phases: dict[str, list[list[float]]] = {name: [] for name in starts}
    for turn in range(options.rounds + 1):
        for name, begin in list(starts.items())[:: 1 if turn % 2 else -1]:
            for path in [*run.checkpoints.rglob("*.pt"), saved] if options.cold else []:
                if path.exists():
                    drop_from_cache(path)
            began = time.time()
            begin(turn)
            times = [began, *json.loads(trace.read_text().splitlines()[-1])]
            if turn:  # the first one has nothing to restore, and leaves the checkpoint
                phases[name].append([b - a for a, b in itertools.pairwise(times)])
    print(
        f"{layers} layers, files {'not ' * options.cold}in the page cache; chainrun's imports read and verify too\n"
    )
    print(f"{'':16}" + "".join(f"{phase:>21}" for phase in start.PHASES) + f"{'in all':>12}")
    for name, rounds in phases.items():
        row = "".join(f"{statistics.median(times):20.2f}s" for times in zip(*rounds, strict=True))
        print(f"{name:16}{row}{statistics.median(map(sum, rounds)):11.2f}s")
    both = list(zip(phases["plain PyTorch"], phases["chainrun"], strict=True))
    restore = start.PHASES.index("restore")
    return (
        statistics.median(sum(plain) / sum(ours) for plain, ours in both),
        statistics.median(sum(plain) / (sum(plain) - plain[restore]) for plain, _ in both),
    )


def drop_from_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def boundary(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a boundary at which nothing is due, above those of an empty loop's turn."""
    medians: dict[str, float] = {}
    run = chainrun.Run(options.folder / "run")
    loss = torch.tensor(1.0, device=options.device)
    calls: dict[str, Callable[[], None]] = {
        "run.step()": run.step,
        "run.poll()": run.poll,
        "run.step(loss=float)": lambda: run.step(loss=1.0),
        "run.step(loss=tensor)": lambda: run.step(loss=loss),
        "a call of an empty function": lambda: None,
    }
    run._start()
    for _ in run.epochs(1):
        run.step()  # the first one looks whether something was forgotten
        for name, call in calls.items():
            found = [cost(call, 100_000) for _ in range(options.rounds)]
            medians[name] = statistics.median(found)
            print(f"{name:32} {medians[name]:7.3f} µs   from {min(found):.3f} to {max(found):.3f}")
    run._close()
    return medians


def cost(call: Callable[[], Any], turns: int) -> float:
    """Return the microseconds of this thread that a call takes: what others do on the processor is not its own."""
    began = time.thread_time()
    for _ in range(turns):
        call()
    middle = time.thread_time()
    for _ in range(turns):
        pass
    return (2 * middle - began - time.thread_time()) / turns * 1e6


MEASURES: dict[str, Callable[[argparse.Namespace], object]] = {
    "all": all_,
    "durable": durable,
    "stall": stall,
    "slowdown": slowdown,
    "memory": memory,
    "start": start_,
    "boundary": boundary,
    "_memory": _memory,  # what `memory` runs in processes of their own
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=MEASURES, metavar="MEASURE", help="one of those above")
    parser.add_argument("--state", choices=("transformer", "small"), default="transformer")
    parser.add_argument("--size", type=float, default=1e9, help="bytes of weights and moments (default 1e9)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="on the disk to measure (default: here)"
    )
    parser.add_argument("--only", help=f"of {'; '.join(METHODS)}: those given, separated by semicolons")
    parser.add_argument("--warm", dest="cold", action="store_false", help="start: files in the page cache")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    wanted = options.only.split(";") if options.only else list(METHODS)
    if unknown := [name for name in wanted if name not in METHODS]:
        parser.error(f"--only: there is no {unknown[0]!r}; there are {'; '.join(METHODS)}")
    options.methods = [name for name in wanted if version(name) is not None]
    if options.measure != "_memory":
        load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {load}, Python {platform.python_version()}"
        )
        packages = {METHODS[name].package: version(name) or "not installed" for name in wanted}
        print(", ".join(f"{package} {found}" for package, found in packages.items()))
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=options.folder) as folder:
        options.folder = Path(folder)
        MEASURES[options.measure](options)


if __name__ == "__main__":
    main()
