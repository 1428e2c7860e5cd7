"""The examples, cut anywhere and resumed, are the plain PyTorch programs in tests/plain, bit for bit.

A trace has a line for every step: fingerprints of batch, weights and optimizer, the loss's bits, and the state
of the three global random generators. The plain programs never import chainrun.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chain import some

import chainrun
from chainrun import journal
from chainrun.rundir import RunDir

PLAIN = Path(__file__).parent / "plain"
EXAMPLES = PLAIN.parents[1] / "examples"

_spec = importlib.util.spec_from_file_location("traces", PLAIN / "traces.py")
assert _spec is not None and _spec.loader is not None
traces = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(traces)

SMALL: dict[str, tuple[int, dict[str, Any]]] = {  # steps, and the arguments that give so many
    "article": (18, {"epochs": 2, "size": 34}),
    "digits": (14, {"epochs": 2, "images": 400}),
    "chargpt": (
        12,
        {
            "steps": 12,
            "batch_size": 4,
            "context": 16,
            "layers": 2,
            "heads": 2,
            "width": 32,
            "characters": 20_000,
            "evaluate_every": 4,
            "evaluate_batches": 2,
        },
    ),
}
CASES = [(name, workers) for name in ("article", "digits") for workers in (0, 2, 4)] + [("chargpt", None)]
SAVE_EVERY, KILL_AT = 4, 7

WARNINGS = [
    "error",
    "ignore:This DataLoader will create:UserWarning",  # four workers, on a machine with fewer processors
    "ignore:This process:DeprecationWarning",  # Python 3.12 on every fork beside a thread; torch forks workers
]
# a plain program, and then the proof that it was one
PLAINLY = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
assert not [name for name in sys.modules if name.split(".")[0] == "chainrun"], "chainrun was imported"
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run Python; return what it printed, and fail with it and the command where it fails."""
    line = [sys.executable, *(f"-W{warning}" for warning in WARNINGS), *map(str, command)]
    home = str(Path(chainrun.__file__).parents[1])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    with open(cwd / "output", "w+") as output:  # not a pipe: loader workers may outlive a killed parent
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(line, cwd=cwd, env=env, stdout=output, stderr=output, check=False).returncode
        output.seek(0)
        printed = output.read()
    assert code == 0, f"exit code {code} of\n  {shlex.join(line)}\n{printed}"
    return printed


@dataclass
class Trained:
    """One example with one number of workers: the plain program's folder, and one for every chain."""

    name: str
    steps: int
    args: dict[str, Any]
    folder: Path
    chains: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def plain(self) -> Path:
        return self.folder / "plain"

    def train_plainly(self) -> None:
        program, args = PLAIN / f"{self.name}.py", json.dumps(self.args)
        run("-c", PLAINLY, program, self.plain, args, cwd=self.folder)

    def train_in_chains(self, chains: dict[str, dict[str, Any]]) -> None:
        self.chains = chains
        args = json.dumps(self.args), json.dumps(chains)
        run(PLAIN / "sweep.py", self.folder, self.name, *args, cwd=self.folder)

    def check(self, chain: str) -> None:
        """Compare a chain with the plain program; name the first step, and all that differs there."""
        mine, its = traces.read(self.folder / chain), traces.read(self.plain)
        for a, b in zip(mine, its, strict=False):
            differ = [name for name in b if a[name] != b[name]]
            assert not differ, f"{chain}, {self.chains.get(chain)}: step {b['step']} differs in {differ}"
        assert len(mine) == len(its) == self.steps
        there = self.run_of(chain)
        assert list(journal.events(there, "warning")) == []  # of variables that a cut loses, say
        assert there.metrics.read_text() == (self.plain / traces.METRICS).read_text()
        final = chainrun.Checkpoint(max(there.checkpoints.iterdir()))
        assert final.manifest["result"] == json.loads((self.plain / traces.RESULT).read_text())
        assert traces.fingerprint(dict(final.load()["model"])) == its[-1]["weights"]

    def run_of(self, chain: str) -> RunDir:
        return RunDir(self.folder / chain / "run")

    def saves(self, chain: str) -> list[int]:
        """Return the steps at which a chain committed a checkpoint."""
        return [event["step"] for event in journal.events(self.run_of(chain), "checkpoint")]


def prepare(name: str, workers: int | None, folder: Path) -> Trained:
    """Run the plain program of an example in a folder."""
    steps, args = SMALL[name]
    trained = Trained(name, steps, args if workers is None else {**args, "workers": workers}, folder)
    trained.train_plainly()
    return trained


@pytest.mark.parametrize(("name", "workers"), CASES)
def test_however_it_is_cut_an_example_is_the_plain_program(
    name: str, workers: int | None, tmp_path: Path
) -> None:
    """Uncut, cut at one step, cut after every step or killed, it does what the plain program does."""
    trained = prepare(name, workers, tmp_path)  # one test, so that its chains share one import of torch
    every = list(range(1, trained.steps + 1))
    alone = some(every)
    once = {f"cut-{step}": {"cuts": [step]} for step in alone}
    killed = {"save_every": SAVE_EVERY, "kill_at": KILL_AT}
    trained.train_in_chains({"whole": {}, **once, "everywhere": {"cuts": every}, "killed": killed})

    trained.check("whole")
    assert trained.saves("whole") == [trained.steps]

    for step in alone:
        trained.check(f"cut-{step}")
        assert trained.saves(f"cut-{step}") == [step, trained.steps]

    trained.check("everywhere")
    assert trained.saves("everywhere") == [*every, trained.steps]

    trained.check("killed")  # compares what was done a second time with the first, too
    lines = (tmp_path / "killed" / traces.TRACE).read_text().splitlines()
    done = [json.loads(line)["step"] for line in lines]
    assert done == [*range(1, KILL_AT), *range(SAVE_EVERY + 1, trained.steps + 1)]


@pytest.mark.parametrize("name", SMALL)
def test_a_chain_from_the_command_line_is_the_plain_program(name: str, tmp_path: Path) -> None:
    """`chainrun run` with the example's own file, three segments in real processes, ends with the same weights."""
    trained = prepare(name, None if name == "chargpt" else 2, tmp_path)
    settings = {f"args.{key}": value for key, value in trained.args.items()}
    settings |= {
        "function": f"{PLAIN / 'traced.py'}:train",
        "args.example": name,
        "args.trace": tmp_path / "chain",
    }
    settings |= {"dir": tmp_path / "chain", "name": "run"}
    words = [f"{key}={value}" for key, value in settings.items()]
    run("-m", "chainrun", "run", EXAMPLES / f"{name}.yaml", "--interrupt-at", "3,9", *words, cwd=tmp_path)

    trained.check("chain")
    there = trained.run_of("chain")
    assert [event["step"] for event in journal.events(there, "segment")] == [0, 3, 9]
    assert json.loads(there.result.read_text()) == json.loads((trained.plain / traces.RESULT).read_text())
