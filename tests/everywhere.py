"""The whole sweep of `make exact`: a training at every cut, with 0, 1 and 3 workers, on 1 and 2 ranks.

With CHAINRUN_EXACT in the environment, the file to which every combination adds a line, `chain.sweep` and its
kin call `everywhere` besides what they do in every test run. It goes over all that can be varied without knowing
the function: its ranges are asked for more turns until it has 20 steps, its loaders get workers where it does not
say how many, and two forked processes run it as ranks whose random streams differ and whose gradients are
averaged before every optimizer step, by torch's own hook and gloo. Each is compared with the plain program run in
the same way.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import chain
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from chainrun.errors import RegisterError, RestoreError
from chainrun.training import metrics, saving

STEPS = 20  # at least, of every training
WORKERS = (0, 1, 3)
PATIENCE = 300  # seconds for one training on two ranks; it takes a few


def everywhere(train: chain.Train, *, polls: bool = False, waits: bool = False) -> None:
    """Check that a training is the plain one with any workers, on one rank and on two, cut everywhere.

    Args:
        polls: cut at every boundary, not at steps only.
        waits: a cut may have to wait, so that there may be fewer than were asked for.
    """
    longer = _long_enough(train)
    compare = functools.partial(_compare, longer, polls, waits)
    for workers in WORKERS:
        loaders = _Loaders(workers)
        with chain.varied(loaders=loaders):
            _tell(1, loaders, compare)
            _tell(2, loaders, lambda: on_ranks(2, compare))
        if not loaders.given:
            break  # it says itself how many, or has no loader


class _Loaders:
    """Makes of a loader class one with so many workers where the function does not say how many."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.given = False  # whether there was such a loader
        self.forks = False  # whether any has workers

    def __call__(self, kind: Any) -> Any:
        def make(*args: Any, **options: Any) -> Any:
            if "num_workers" not in options:
                self.given = True
                options["num_workers"] = self.workers
            self.forks |= options["num_workers"] > 0
            return kind(*args, **options)

        return make


def _long_enough(train: chain.Train) -> chain.Train:
    """Return the training with so many times the turns in its ranges that it has 20 steps."""
    for times in (1, 2, 3, 4, 5, 7, 10):
        longer = functools.partial(_with_ranges, train, times)
        if chain.steps_of(chain.plain(longer)) >= STEPS:
            return longer
    raise AssertionError(
        f"the training has {chain.steps_of(chain.plain(longer))} steps, however long its ranges"
    )


def _with_ranges(train: chain.Train, times: int, run: Any, DataLoader: Any) -> Any:
    if times > 1:
        epochs, steps = run.epochs, run.steps
        run.epochs = lambda n: epochs(n * times)
        run.steps = lambda n: steps(n * times)
    return train(run, DataLoader)


def _compare(train: chain.Train, polls: bool, waits: bool) -> int:
    """Check every cut; return how many segments were cut."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        reference = chain.plain(train)
        count = reference.boundaries if polls else chain.steps_of(reference)
        every = range(1, count + 1)
        # every step alone where that is cheap; segments of one step; segments of some steps
        singly = [] if polls or chain.place.loaders.forks else [(step,) for step in every]
        apart = [] if singly or chain.place.loaders.workers > 1 else [every[n::6] for n in range(6)]
        chains: list[Sequence[int]] = [every] if chain.place.ranks > 1 else [(), every, *singly, *apart]
        done = 0
        _freeze()
        for cuts in chains:
            if polls:
                after = [b - a for a, b in zip((0, *cuts), cuts, strict=False)]
                trained = chain.cut(train, after=after, most=count + 2)
            else:
                trained = chain.cut(train, cuts, most=count + 2)
            difference = reference.difference(trained)
            assert difference is None, f"cut at {list(cuts)}: {difference}"
            # after the last boundary no loop may ask for a turn
            assert waits or polls or len(trained.stopped_at) >= len(cuts) - 1
            if not done:
                _freeze()
            done += len(trained.stopped_at)
        assert done >= (1 if waits else count / 2)
        return done


def _freeze() -> None:
    """Put what has been imported by now out of the garbage collector's sight: chainrun looks through all objects."""
    gc.collect()
    gc.freeze()


def also_on_ranks(compare: Callable[[], Any]) -> None:
    """In `make exact`, do the same on two ranks."""
    if chain.WHOLE:

        def count() -> int:
            compare()
            return 1

        _tell(2, _Loaders(0), lambda: on_ranks(2, count))


def _tell(ranks: int, loaders: _Loaders, check: Callable[[], int]) -> None:
    """Add a line for one combination."""
    began = time.monotonic()
    result: dict[str, Any] = {}
    try:
        result["cuts"] = check()
    except (RegisterError, RestoreError) as refused:
        result["refused"] = str(refused)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    workers = loaders.workers if loaders.given else "its own"
    line = {"test": test, "workers": workers, "ranks": ranks, **result, "seconds": time.monotonic() - began}
    with open(os.environ["CHAINRUN_EXACT"], "a") as file:
        file.write(json.dumps(line) + "\n")


# ---- two ranks -------------------------------------------------------------------------------------------


def on_ranks(ranks: int, body: Callable[[], int]) -> int:
    """Run something on so many ranks, each a fork of this process; return what rank 0 returned.

    Raises:
        AssertionError: a rank failed.
        RegisterError: all ranks were refused.
    """
    with tempfile.TemporaryDirectory(dir=chain.memory()) as name:
        folder = Path(name)
        children = {}
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, ranks, folder, body)
            children[pid] = rank
        try:
            _wait(set(children))
        finally:
            for pid in children:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    if os.waitpid(pid, os.WNOHANG) == (0, 0):
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
        said = [(folder / f"said.{rank}") for rank in range(ranks)]
        found = [json.loads(file.read_text()) if file.exists() else {"failed": "no word"} for file in said]
        if all("refused" in each for each in found):
            raise RegisterError(found[0]["refused"])
        wrong = [f"rank {rank}: {each}" for rank, each in enumerate(found) if "returned" not in each]
        assert not wrong, "\n".join(wrong).replace("\\n", "\n")
        return int(found[0]["returned"])


def _wait(pids: set[int]) -> None:
    """Wait until all have ended, or one has failed, or time is over."""
    until = time.monotonic() + PATIENCE
    while pids and time.monotonic() < until:
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                pids.discard(pid)
                if status:
                    until = min(until, time.monotonic() + 5)  # the others may have something to say too
        time.sleep(0.005)


def _be_rank(rank: int, ranks: int, folder: Path, body: Callable[[], int]) -> None:
    code, said = 1, {}
    try:
        gc.freeze()
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
        )
        register_optimizer_step_pre_hook(_average)
        saving.Metrics = _MetricsOfEveryRank  # type: ignore[misc]
        with chain.varied(rank=rank, ranks=ranks, folder=folder):
            said["returned"] = body()
        code = 0
    except (RegisterError, RestoreError) as refused:
        said["refused"] = str(refused)
    except BaseException:
        said["failed"] = traceback.format_exc()  # type: ignore[assignment]
    finally:
        (folder / f"said.{rank}.part").write_text(json.dumps(said))
        (folder / f"said.{rank}.part").rename(folder / f"said.{rank}")
        os._exit(code)


class _MetricsOfEveryRank(metrics.Metrics):
    """A run keeps the metrics of rank 0; here those of the others are compared too."""

    def __init__(self, path: Path, *, active: bool, **more: Any) -> None:
        super().__init__(path.with_name(chain.metrics_file(chain.place.rank)), active=True, **more)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        super().add(step, metrics)
        if chain.place.rank:
            self.flush()

    def cut(self, size: int) -> None:
        if not chain.place.rank:  # of the others a checkpoint does not know it, and no segment died
            super().cut(size)


def _average(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Data parallelism by hand; parameters without a gradient, or with a sparse one, are left alone."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.layout == torch.strided:
                torch.distributed.all_reduce(gradient)
                gradient /= torch.distributed.get_world_size()


# ---- what came out -------------------------------------------------------------------------------------------


def summary(file: str) -> Iterator[str]:
    """Say in lines what was found in a whole run."""
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    exact = [line for line in lines if "cuts" in line]
    refused = [line for line in lines if "refused" in line]
    tests = len({line["test"] for line in lines})
    yield (
        f"{tests} tests, {len(lines)} combinations of training, workers and ranks: {len(exact)} exact over "
        f"{sum(line['cuts'] for line in exact)} cuts, {len(refused)} refused"
    )
    for ranks in sorted({line["ranks"] for line in lines}):
        for workers in (*WORKERS, "its own"):
            some = [line for line in exact if line["ranks"] == ranks and line["workers"] == workers]
            cuts = sum(line["cuts"] for line in some)
            seconds = sum(line["seconds"] for line in some)
            yield f"  {ranks} ranks, {workers} workers: {len(some)} exact, {cuts} cuts, {seconds:.0f} s"
    for line in refused:
        yield f"  refused: {line['test']}, {line['workers']} workers, {line['ranks']} ranks: {line['refused'][:120]}"
