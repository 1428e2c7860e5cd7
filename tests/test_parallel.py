"""DistributedDataParallel on four ranks: a sum over more than two depends on where an element lies in its bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import chainrun

PROGRAM = Path(__file__).parent / "programs" / "parallel.py"


WHOLE = "CHAINRUN_EXACT" in os.environ  # see everywhere.py: each cut alone, and other numbers of workers


def compare(ranks: int, kind: str, tmp_path: Path, workers: int = 2) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(chainrun.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(tmp_path), str(ranks), kind, str(workers)]
    with open(tmp_path / "said", "w+") as said:
        code = subprocess.run(command, env=env, stdout=said, stderr=said, timeout=400, check=False).returncode
        said.seek(0)
        assert code == 0, said.read()


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_two_ranks_over_a_loader_are_exact_at_every_cut(kind: str, tmp_path: Path) -> None:
    """Twenty steps of DDP over a DistributedSampler, and over shards: each rank has its own streams and place."""
    # read by the training process, shards without state would share its streams: refused, see test_iterable.py
    for workers in [w for w in (0, 1, 3) if w or kind == "map"] if WHOLE else [2]:
        folder = tmp_path / str(workers)
        folder.mkdir()
        compare(2, kind, folder, workers)
        chains = {trace.parent for trace in folder.glob("*/trace.*")}
        assert len(chains) >= (21 if WHOLE else 3)


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [(4, "default"), (2, "accumulated"), (3, "static"), (2, "compressed"), (2, "attacked")],
)
def test_ranks_sum_gradients_in_the_same_order_after_a_cut(ranks: int, kind: str, tmp_path: Path) -> None:
    """Cut at several steps and at each, the ranks have the plain program's bits, however DDP is set up."""
    compare(ranks, kind, tmp_path)
    assert len(list(tmp_path.glob("*/trace.*"))) == (7 if WHOLE else 4) * ranks


ALONE = """
import sys, torch, chainrun, pytest
from chainrun.errors import RegisterError, RestoreError
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
run = chainrun.Run(sys.argv[1] + ".run")
"""


def alone(tmp_path: Path, code: str) -> None:
    """Run code on one rank whose model is wrapped."""
    env = os.environ | {
        "PYTHONPATH": f"{Path(chainrun.__file__).parents[1]}:{PROGRAM.parents[1]}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", ALONE + code, str(tmp_path / "meet")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


STEPS_THAT_ADD = """
import chain
def train(run, DataLoader):
    inner = torch.nn.Linear(1, 1)
    model = torch.nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=VIEWS)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    run.register(model=model, optimizer=optimizer)
    for n in run.steps(5):
        if n < 3:
            optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).mean()
        loss.backward()
        optimizer.step()
        run.step(loss=loss)
assert chain.plain(train).difference(chain.cut(train, (4,))) is None
"""
REFUSED = """
with pytest.raises(RestoreError, match="is used once more"):
    chain.cut(train, (3,))
"""
SAVED = """
assert chain.plain(train).difference(chain.cut(train, (3,))) is None
"""


def test_gradients_that_were_left_out_cannot_be_used_after_their_average(tmp_path: Path) -> None:
    """The buckets that they went through hold no number, and no step is done with it."""
    alone(tmp_path, STEPS_THAT_ADD.replace("VIEWS", "False") + REFUSED)


HOOKED = """
import chain
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
def train(run, DataLoader):
    inner = torch.nn.Linear(1, 1)
    model = torch.nn.parallel.DistributedDataParallel(inner)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    run.register(model=model, optimizer=optimizer)
    for n in run.steps(5):
        model(torch.ones(1, 1)).mean().backward()
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).mean()
        loss.backward()
        optimizer.step()
        run.step(loss=loss)
with pytest.raises(RestoreError, match="is used once more"):
    chain.cut(train, (3,))
"""


def test_a_hook_does_not_see_gradients_that_were_left_out(tmp_path: Path) -> None:
    """It may keep what it sees for later steps, as one that feeds errors back does."""
    alone(tmp_path, HOOKED)


def test_gradients_that_are_views_of_buckets_are_saved(tmp_path: Path) -> None:
    """They are the same tensors at each step, so that nothing is left out."""
    alone(tmp_path, STEPS_THAT_ADD.replace("VIEWS", "True") + SAVED)


def test_uneven_inputs_are_refused(tmp_path: Path) -> None:
    """Inside model.join() the ranks pass different numbers of boundaries: the first step says so."""
    alone(
        tmp_path,
        "run.register(model=model)\n"
        "with model.join(), pytest.raises(RegisterError, match='inside model.join'):\n"
        "    model(torch.ones(1, 1)).mean().backward()\n"
        "    run.step()\n",
    )


def test_a_wrapper_of_a_torch_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """When it is registered, by the name of what it does not have."""
    alone(
        tmp_path,
        "del torch.nn.parallel.DistributedDataParallel._ddp_init_helper\n"
        "with pytest.raises(RegisterError, match='has no _ddp_init_helper: .* use torch 2'):\n"
        "    run.register(model=model)\n",
    )
