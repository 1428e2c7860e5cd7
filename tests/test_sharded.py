"""State in shards (`fully_shard`, tensor parallel), on several ranks: exact, resharded, and when things go wrong.

The plain program of tests/programs/sharded_plain.py never imports chainrun. Several trainings run side by side
in one program, since a start takes longer than they do.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import chainrun
from chainrun import experiment
from chainrun.checkpoint.store import Store, flaw
from chainrun.errors import CheckpointError, RegisterError, RestoreError
from chainrun.launch import submit
from chainrun.rundir import RunDir
from chainrun.training.saving import Setting

PROGRAMS = Path(__file__).parent / "programs"
sys.path.insert(0, str(PROGRAMS))
import fingerprint  # noqa: E402
import sharded_parts  # noqa: E402

# one rank's output is a view where tensor parallel ends a sharded module; nothing here writes to it
PYTHON = [sys.executable, "-W", "error", "-W", "ignore:FSDP2-wrapped module:UserWarning"]
EPOCHS, STEPS = 2, 10  # of two ranks


def created(folder: Path, kinds: str, every: int | None = None, reshard: bool = False, **args: Any) -> RunDir:
    described = {
        "name": "run",
        "function": f"{PROGRAMS / 'sharded.py'}:train",
        "args": {"folder": str(folder), "kinds": kinds, "epochs": EPOCHS, **args},
        "dir": str(folder),
        "checkpoint": {"every": every and {"steps": every}, "keep": 3, "reshard": reshard},
    }
    return submit.prepare(experiment.from_dict(described, folder), folder)[0]


def segments(run: RunDir, *each: str) -> list[list[str]]:
    """Carry a run through segments, see tests/programs/segments.py; return how their ranks ended."""
    command = [*PYTHON, str(PROGRAMS / "segments.py"), str(run.path), *each]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextlib.contextmanager
def plain(folder: Path, kinds: str, ranks: int = 2) -> Iterator[None]:
    """Run the plain program, beside what is done inside."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
        }
    command = [*PYTHON, str(PROGRAMS / "sharded_plain.py"), str(folder / "plain"), kinds, str(EPOCHS)]
    address |= {"WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(command, env={**os.environ, **address, "RANK": str(rank)}) for rank in range(ranks)
    ]
    try:
        yield
        assert [process.wait(60) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
            process.wait()


def assert_as_plain(folder: Path, ranks: int = 2) -> None:
    for rank in range(ranks):
        expected = fingerprint.read(folder / f"plain.{rank}")
        assert len(expected) == (STEPS if ranks == 2 else 6)
        assert fingerprint.read(folder / f"trace.{rank}") == expected


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return bool(a == b)


def logs(run: RunDir) -> str:
    return "".join(path.read_text() for path in sorted(run.jobs.iterdir()))


def test_sharded_training_cut_anywhere_is_the_plain_program(tmp_path):
    """Shards, mixed precision, float32 state of bfloat16 shards, tensor parallel, gradients not yet used: exact."""
    kinds = "shards mixed half tensor"
    run = created(tmp_path, kinds)
    with plain(tmp_path, kinds):
        ends = segments(run, "2:1", "2:4", "2:7", "2:")
    assert ends == [["stopped"] * 2] * 3 + [["done"] * 2], logs(run)
    assert_as_plain(tmp_path)
    checkpoint = chainrun.Checkpoint(run.checkpoint(7))
    files = checkpoint.manifest["files"]
    assert {"sharded/.metadata", "sharded/__0_0.distcp", "sharded/__1_0.distcp"} < files.keys()
    tree = torch.load(checkpoint.path / "rank-00001.pt", weights_only=True)
    assert tree["objects"]["shards"]["0.weight"].is_meta
    assert tree["objects"]["half_optimizer"]["state"][0]["momentum"].dtype == torch.float32
    assert {kind: len(found) for kind, found in tree["gradients"].items() if found} == {
        "half_optimizer": 4,
        "tensor_optimizer": 4,
    }


def test_meshes_of_two_dimensions_are_exact_too(tmp_path):
    """Shards that two pairs of ranks hold, shards of tensor parallel parts, groups of ranks, sums not made yet."""
    kinds = "hybrid plane groups sequence"
    run = created(tmp_path, kinds)
    with plain(tmp_path, kinds, ranks=4):
        ends = segments(run, "4:1", "4:4", "4:")
    assert ends == [["stopped"] * 4] * 2 + [["done"] * 4], logs(run)
    assert_as_plain(tmp_path, ranks=4)
    tree = torch.load(run.checkpoint(1) / "rank-00003.pt", weights_only=True)
    assert tree["sharded"]["gradients.sequence_optimizer.4"]["partial"]
    for rank in range(4):
        whole = torch.load(tmp_path / f"restored-3.{rank}", weights_only=True)
        loaded = chainrun.Checkpoint(run.checkpoint(4)).load(rank)
        assert all(equal(whole[kind], loaded[kind]) for kind in kinds.split())


def test_a_cut_waits_for_gradients_that_are_not_reduced_yet(tmp_path):
    """Gradients that fully_shard holds back on each rank cannot be asked for: the cut comes when they are reduced."""
    run = created(tmp_path, "local")
    with plain(tmp_path, "local"):
        ends = segments(run, "2:3", "2:")
    assert ends == [["stopped"] * 2, ["done"] * 2], logs(run)
    assert_as_plain(tmp_path)
    assert run.checkpoint(4).exists()
    assert "a stop (interrupt) waits: gradients of 'local' are still to be reduced over the ranks" in logs(
        run
    )


def test_other_ranks_go_on_with_the_same_weights(tmp_path):
    """Two ranks, then four, then one without shards: whole weights, optimizers and the place in the data are kept."""
    kinds = "shards mixed half tensor"
    run = created(tmp_path, kinds, reshard=True)
    assert segments(run, "2:7", "4:8") == [["stopped"] * 2, ["stopped"] * 4], logs(run)
    saved = chainrun.Checkpoint(run.checkpoint(7))
    for rank in range(4):
        restored = torch.load(tmp_path / f"restored-2.{rank}", weights_only=True)
        assert all(equal(restored[name], state) for name, state in saved.load(rank % 2).items())
        sampler = torch.utils.data.DistributedSampler(range(40), num_replicas=4, rank=rank, seed=0)
        sampler.set_epoch(1)  # two batches on two ranks are one on four
        batch = sharded_parts.data()[list(sampler)[4:8]]
        assert fingerprint.read(tmp_path / f"trace.{rank}")[8]["batch"] == fingerprint.of_tensors(batch)
    assert "was taken with 2 ranks, this job has 4: DTensors are laid out anew" in logs(run)
    events = [json.loads(line) for line in run.journal.read_text().splitlines()]
    assert [(e["ranks_then"], e["ranks_now"]) for e in events if e["event"] == "reshard"] == [(2, 4)]

    with pytest.raises(RestoreError, match=r"taken with 4 ranks, this job has 1.*checkpoint.reshard: true"):
        chainrun.Run(run.path)
    saved = chainrun.Checkpoint(run.checkpoint(8))
    alone = chainrun.Run(run.path, setting=Setting(reshard=True, say=lambda line: None))
    for kind, learner in sharded_parts.learners(kinds, 1).items():
        alone.register(**{kind: learner.model, f"{kind}_optimizer": learner.optimizer})
    for name, thing in alone.registered():
        assert equal(thing.state_dict(), saved.load()[name]), name
    alone._close()


def test_a_shard_that_is_torn_or_lost_leaves_the_older_checkpoint(tmp_path):
    """A rank killed in a save, a full disk on one rank, a flipped byte: an older checkpoint serves, still exact."""
    run = created(tmp_path, "shards", every=2, breaks={"2.4": "killed", "3.4": "full"})
    with plain(tmp_path, "shards"):
        ends = segments(run, "2:2", "2:", "2:6")
    assert ends == [["stopped"] * 2, ["-9"] * 2, ["stopped"] * 2], logs(run)
    starts = [e for e in map(json.loads, run.journal.read_text().splitlines()) if e["event"] == "segment"]
    assert starts[-1]["step"] == 2
    assert "no checkpoint at step 4: rank 1: " in logs(run)
    assert "File too large" in logs(run)
    committed = Store(run).committed()
    assert [(one.step, flaw(one)) for one in committed] == [(6, None), (2, None)]

    shard = run.checkpoint(6) / "sharded" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the content of sharded/__1_0.distcp has changed"):
        chainrun.Checkpoint(run.checkpoint(6)).verify()
    assert segments(run, "2:") == [["done"] * 2], logs(run)
    assert "step-00000006 cannot be trusted (the content of sharded/__1_0.distcp has changed" in logs(run)
    assert_as_plain(tmp_path)


# ---- one rank, in this process -----------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Any]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def saved_in(dir: Path, model: torch.nn.Module) -> None:
    """Make a run with one checkpoint."""
    run = chainrun.Run(dir, setting=Setting(say=lambda line: None))
    run.register(model=model)
    run.save()
    run.step()
    run._finish(None)
    run._close()


def test_state_outside_of_registered_objects_must_not_be_sharded(tmp_path, mesh):
    """A DTensor in run.state, which is there before a process group is, is an error that says so."""
    run = chainrun.Run(tmp_path)
    run.state["mean"] = torch.distributed.tensor.zeros(4, device_mesh=mesh)
    with pytest.raises(RegisterError, match=r"run.state.mean is a DTensor.*full_tensor"):
        run._finish(None)
    run._close()


def test_a_module_must_be_sharded_when_it_is_registered_as_it_was(tmp_path, mesh):
    """A plain module does not take shards, nor a sharded one plain tensors; the error says what to do."""
    sharded, unsharded = fully_shard(torch.nn.Linear(3, 2), mesh=mesh), torch.nn.Linear(3, 2)
    saved_in(tmp_path / "sharded", sharded)
    saved_in(tmp_path / "plain", unsharded)
    with pytest.raises(RestoreError, match=r"model.weight' was saved as a DTensor and is a plain tensor"):
        chainrun.Run(tmp_path / "sharded").register(model=torch.nn.Linear(3, 2))
    with pytest.raises(RestoreError, match=r"is a DTensor, in the checkpoint a plain tensor"):
        chainrun.Run(tmp_path / "plain").register(model=fully_shard(torch.nn.Linear(3, 2), mesh=mesh))
    plane = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(RestoreError, match=r"device mesh of shape \(1,\) as Shard\(0\).*checkpoint.reshard"):
        chainrun.Run(tmp_path / "sharded").register(model=fully_shard(torch.nn.Linear(3, 2), mesh=plane))


def test_gradients_added_to_used_ones_are_saved(tmp_path, mesh):
    """fully_shard adds to a gradient without torch noting a change of it; what was added is not lost."""
    model = fully_shard(torch.nn.Linear(3, 2), mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = chainrun.Run(tmp_path, setting=Setting(say=lambda line: None))
    run.register(model=model, optimizer=optimizer)
    for _ in range(2):  # used ones are seen to be replaced
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert run._tree(None)["gradients"] == {"model": {}, "optimizer": {}}
    model(torch.ones(1, 3)).sum().backward()  # on top of the first
    assert list(run._tree(None)["gradients"]["optimizer"]) == [0, 1]
    run._close()


def test_whole_parameters_left_by_an_evaluation_are_no_others(tmp_path, mesh):
    """A forward can leave whole parameters in a sharded module; a boundary right after it sees the same module."""
    model = fully_shard(torch.nn.Linear(3, 2), mesh=mesh, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters())
    run = chainrun.Run(tmp_path, setting=Setting(say=lambda line: None))
    run.register(model=model, optimizer=optimizer)
    with torch.no_grad():
        model(torch.ones(1, 3))
    run.step()
    model(torch.ones(1, 3)).sum().backward()
    run._finish(None)
    run._close()
    weight = chainrun.Checkpoint(tmp_path / "checkpoints" / "step-00000001").load()["model"]["weight"]
    assert torch.equal(weight, model.weight.full_tensor())
    resumed = chainrun.Run(tmp_path, setting=Setting(say=lambda line: None))
    assert len(resumed._registry.saved["gradients"]["optimizer"]) == 2
    resumed._close()


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")  # it shards nothing on one rank
@pytest.mark.filterwarnings("ignore:The `NO_SHARD`:FutureWarning")
def test_the_older_fully_sharded_class_is_refused(tmp_path, mesh):
    """FullyShardedDataParallel is an error that names fully_shard."""
    module = torch.nn.Sequential(
        FullyShardedDataParallel(torch.nn.Linear(3, 2), device_id=torch.device("cpu"))
    )
    with pytest.raises(RegisterError, match=r"fully_shard\(module\)"):
        chainrun.Run(tmp_path).register(model=module)
