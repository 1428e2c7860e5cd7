"""What a handoff costs on a real SLURM: the gap between two segments, and the walltime that is left unused.

    python benchmarks/handoff.py [--handoffs 2] [--cred-expire 120] [--segments 4] [--only gap|unused]

It starts a cluster of its own (slurm/cluster: SLURM has to be installed, or is fetched with --version) whose nodes are
idle. The gap is the time from the last boundary of one segment to the end of the first step of the next: the last
save, the handoff, the queue, Python, torch, the restore and that step. A requeued job waits for its credential to
expire, a job that was submitted ahead does not. Unused is what was left of the walltime of one minute at the stop, for
a training whose steps take 0.5 to 3 s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chainrun

SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "cluster"
STEPS = {"gap": 0.25, "unused": 0.5}  # seconds of a step, at least


def train(run: chainrun.Run, times: str, per_segment: int, steps: int, nap: float, longer: float) -> None:
    """Sleep for a training, and note when each boundary was passed."""
    import torch

    model = torch.nn.Linear(2000, 2000)  # 16 MB, and 32 of AdamW's
    optimizer = torch.optim.AdamW(model.parameters())
    run.register(model=model, optimizer=optimizer)
    before = run.global_step
    for index in run.steps(steps):
        loss = model(torch.randn(8, 2000)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(nap + (longer if index % 7 == 6 else 0.0))
        with open(times, "a") as file:
            file.write(json.dumps([run.segment, run.global_step + 1, time.time()]) + "\n")
        if run.global_step + 1 == before + per_segment:
            (Path(run.dir) / "cut").touch()


@contextmanager
def cluster(*options: str) -> Iterator[dict[str, str]]:
    """Yield the environment of a cluster that ends with this block."""
    command = [sys.executable, str(SCRIPT), "up", "--json", "--owner-pid", str(os.getpid()), *options]
    made = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    try:
        yield {**os.environ, "SLURM_CONF": made["conf"], "PATH": made["path"]}
    finally:
        subprocess.run([sys.executable, str(SCRIPT), "down", made["dir"]], check=True)


class Chain:
    """One run, submitted when it is made."""

    def __init__(self, env: dict[str, str], folder: Path, name: str, **keys: Any) -> None:
        self._env, self.run, self._times = env, folder / "runs" / name, folder / f"{name}.times"
        args = {"times": str(self._times), **keys.pop("args")}
        described = {
            "name": name,
            "function": f"{Path(__file__).resolve()}:train",
            "dir": str(folder / "runs"),
            **keys,
        }
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps({**described, "args": args}))
        subprocess.run(
            [sys.executable, "-m", "chainrun", "submit", str(file)],
            env=env,
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (self.run / "journal.jsonl").read_text().splitlines())
        return [line for line in lines if line["event"] == kind]

    def times(self) -> dict[int, list[float]]:
        """Return when the boundaries of each segment were passed."""
        found: dict[int, list[float]] = {}
        lines = self._times.read_text().splitlines() if self._times.exists() else []
        for segment, _, passed in map(json.loads, lines):
            found.setdefault(segment, []).append(passed)
        return found

    def wait(self) -> None:
        """Cut each segment where the training asks for it, until the run is done."""
        while not (self.run / "DONE").exists():
            if any((self.run / name).exists() for name in ("FAILED", "HALTED")):
                raise SystemExit(f"the chain has ended: see {self.run}")
            if (self.run / "cut").exists():
                (self.run / "cut").unlink()
                job = self.events("segment")[-1]["job"]
                subprocess.run(["scancel", "--signal=USR2", job], env=self._env, check=True)
            time.sleep(0.05)


def gaps(env: dict[str, str], folder: Path, handoff: str, handoffs: int) -> list[float]:
    """Return the seconds from one segment's last boundary to the next one's first."""
    training = {"per_segment": 8, "steps": 12 * (handoffs + 1), "nap": STEPS["gap"], "longer": 0.0}
    chain = Chain(env, folder, handoff, args=training, chain={"handoff": handoff}, slurm={"time": "20min"})
    chain.wait()
    times = chain.times()
    assert {event["how"] for event in chain.events("handoff")} == {handoff}
    return [times[segment + 1][0] - times[segment][-1] for segment in range(1, len(times))][:handoffs]


def unused(env: dict[str, str], folder: Path, segments: int) -> None:
    """Print what each segment has left of its walltime, beside what it needs at its end."""
    nap = STEPS["unused"]
    training = {"per_segment": 0, "steps": int(segments * 60 / (nap + 2.5 / 7)), "nap": nap, "longer": 2.5}
    chain = Chain(env, folder, "unused", args=training, slurm={"time": "1min"})
    chain.wait()
    times, longest = chain.times(), 0.0
    print(
        f"\nunused walltime, of 60 s a segment\n{'segment':>8}{'unused s':>10}{'save s':>8}{'longest step s':>16}{'bound s':>9}"
    )
    for stop in chain.events("stop"):
        segment = stop["segment"]
        passed = times[segment]
        longest = max([longest, *(after - before for before, after in itertools.pairwise(passed))])
        save = next(one["seconds"] for one in chain.events("checkpoint") if one["segment"] == segment)
        bound = save + longest + 15
        print(f"{segment:>8}{stop['unused_seconds']:>10.1f}{save:>8.2f}{longest:>16.2f}{bound:>9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--handoffs", type=int, default=2, help="gaps that are measured of each kind (default 2)"
    )
    parser.add_argument(
        "--cred-expire", default="120", help="lifetime of a job's credential, s (SLURM's default: 120)"
    )
    parser.add_argument(
        "--segments", type=int, default=4, help="of one minute, for the unused walltime (default 4)"
    )
    parser.add_argument("--only", choices=("gap", "unused"))
    parser.add_argument("--version", default="host", help="of slurm/cluster (default: the host's SLURM)")
    args = parser.parse_args()
    options = ["--version", args.version, "--nodes=1"]
    with tempfile.TemporaryDirectory(prefix="handoff-") as made:
        folder = Path(made)
        if args.only != "unused":
            with cluster(*options, f"--cred-expire={args.cred_expire}") as env:
                print(
                    f"gap from the last boundary to the next segment's first, credential {args.cred_expire} s"
                )
                found = {how: gaps(env, folder, how, args.handoffs) for how in ("ahead", "requeue")}
            medians = {how: statistics.median(seconds) for how, seconds in found.items()}
            for how, seconds in found.items():
                print(
                    f"{how:>8}: median {medians[how]:.1f} s of {', '.join(f'{one:.1f}' for one in seconds)}"
                )
            print(f"   ratio: {medians['requeue'] / medians['ahead']:.1f}")
        if args.only != "gap":
            with cluster(*options) as env:
                unused(env, folder, args.segments)


if __name__ == "__main__":
    main()
