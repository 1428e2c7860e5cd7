"""Every handoff is its own proof: what the next segment has is compared with what the last one would have had."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import Segment, cut, marks, metrics, plain

from chainrun.checkpoint.bits import fingerprint
from chainrun.checkpoint.store import Store, flaw, witness_file
from chainrun.rundir import RunDir
from chainrun.training import witness
from chainrun.training.stop import SegmentEnd

PROGRAM = Path(__file__).parent / "programs" / "witnessed.py"
IDENTICAL = "state, random streams and next batch identical"


class Noisy(torch.utils.data.Dataset):
    """Items with a draw from each of the three global generators."""

    offset = 0.0  # what no checkpoint knows of

    def __len__(self):
        return 12

    def __getitem__(self, index):
        draws = [random.random(), torch.rand(()).item(), np.random.rand()]
        return torch.tensor([index + self.offset, *draws])


class Average:
    """An object with state; `forgets` makes it lose the half of it at a restore."""

    forgets = False

    def __init__(self):
        self.sum, self.count = 0.0, 0

    def state_dict(self):
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
        self.sum = 0.0 if self.forgets else state["sum"]


def training(workers=0, average=Average, dataset=Noisy, **keys):
    """Return a training of eight steps over a loader."""

    def train(run, DataLoader):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        mean, noise = average(), np.random.default_rng(1)
        loader = DataLoader(dataset(), batch_size=3, shuffle=True, num_workers=workers, **keys)
        run.register(model=model, optimizer=optimizer, mean=mean, noise=noise, loader=loader)
        for _ in run.epochs(2):
            for batch in loader:
                loss = model(batch).sum() * noise.random()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                mean.sum, mean.count = mean.sum + loss.item(), mean.count + 1
                batch.zero_()  # what was handed out is the function's
                run.state["best"] = min(run.state.get("best", 9.0), loss.item())
                run.step(loss=loss, **marks(batch, model, optimizer))

    return train


def events(dir: Path) -> list[dict]:
    lines = (dir / "journal.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "witness"]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_handoff_over_a_loader_is_witnessed(tmp_path, workers):
    """State, random streams and next batch are called identical, at an epoch's end its end; the run is exact."""
    train = training(workers)
    trained = cut(train, range(1, 9), dir=tmp_path)
    assert plain(train).difference(trained) is None
    ends = {4: "end of the loop", 8: "end of the loop"}
    assert trained.said == [
        f"witnessed at step {n}: state, random streams and {ends.get(n, 'next batch')} identical"
        for n in range(1, 9)
    ]
    assert [event["identical"] for event in events(tmp_path)] == [True] * 8


def test_persistent_workers_are_witnessed(tmp_path):
    """A loader whose workers live on over the epochs is no other case."""
    train = training(2, persistent_workers=True)
    trained = cut(train, [2, 5, 6], dir=tmp_path)
    assert plain(train).difference(trained) is None
    assert trained.said == [f"witnessed at step {n}: {IDENTICAL}" for n in (2, 5, 6)]


def test_a_steps_loop_is_witnessed_without_a_batch(tmp_path):
    """Where no loader asks for the next turn, state and random streams are compared at once."""

    def train(run, DataLoader):
        weight = torch.nn.Linear(2, 2)
        run.register(weight=weight)
        for _ in run.steps(4):
            with torch.no_grad():
                weight.weight.add_(torch.rand(2, 2))
            run.step(**marks(None, weight))

    trained = cut(train, [1, 3], dir=tmp_path)
    assert plain(train).difference(trained) is None
    assert trained.said == [f"witnessed at step {n}: state and random streams identical" for n in (1, 3)]


def test_gradients_that_are_kept_are_witnessed(tmp_path):
    """Accumulated gradients belong to what is compared."""

    def train(run, DataLoader):
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.register(model=model, optimizer=optimizer)
        for n in run.steps(4):
            model(torch.rand(3, 2)).sum().backward()
            if n % 2:
                optimizer.step()
                optimizer.zero_grad()

    trained = cut(train, [1], dir=tmp_path)
    assert trained.said == ["witnessed at step 1: state and random streams identical"]
    told = witness.read(tmp_path / "checkpoints" / "step-00000001", 0)
    assert any(name.startswith("gradient of optimizer.") for name in told["state"])


def differs_in(tmp_path: Path, train, then) -> list[str]:
    """Cut a training at step 2, go on with another one, and return what is called different."""
    trained = cut([train, then], [2], dir=tmp_path)
    (event,) = events(tmp_path)
    assert not event["identical"]
    assert trained.segments == 2
    for name in event["differs"]:
        assert name in trained.said[0]
    assert trained.said[0].startswith("warning: at step 2 this differs from what the segment before had: ")
    return event["differs"]


def test_an_object_that_loses_a_value_at_its_restore_is_named(tmp_path):
    """The one value, and nothing else."""

    class Forgetful(Average):
        forgets = True

    assert differs_in(tmp_path, training(), training(average=Forgetful)) == ["mean.sum"]


def test_a_parameter_that_is_changed_after_its_restore_is_named(tmp_path):
    """An object that disturbs the model while it is restored itself."""

    def build(disturb):
        def train(run, DataLoader):
            model = torch.nn.Linear(2, 2)

            class Late(Average):
                def load_state_dict(self, state):
                    if disturb:
                        model.weight.data[0, 0] += 1e-6

            run.register(model=model, late=Late())
            for _ in run.steps(4):
                pass

        return train

    assert differs_in(tmp_path, build(False), build(True)) == ["model.weight"]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_changed_between_two_segments_is_named(tmp_path, workers):
    """State of the data set that no checkpoint knows of shows in the next batch, with its loader's name."""

    class Moved(Noisy):
        offset = 0.5

    train, then = training(workers), training(workers, dataset=Moved)
    assert differs_in(tmp_path, train, then) == ["next batch of 'loader'"]


@pytest.mark.parametrize("stream", ["random stream numpy", "random stream 'noise'"])
def test_a_random_stream_that_is_not_as_it_was_is_named(tmp_path, monkeypatch, stream):
    """A global stream, and a registered generator."""
    given = witness.streams_in

    def other(tree, generators):
        found = given(tree, generators)
        assert stream in found
        return {**found, stream: "0"} if told else found

    monkeypatch.setattr(witness, "streams_in", other)
    train = training()
    told = []

    def then(run, DataLoader):
        told.append(True)
        train(run, DataLoader)

    assert differs_in(tmp_path, train, then) == [stream]


@pytest.mark.parametrize("content", [None, b"", b'{"testimony": {', b'{"testimony": {"state": {}}}'])
def test_a_witness_that_is_missing_or_torn_is_none(tmp_path, content):
    """One quiet line, no warning, no change of the run; and the checkpoint is as good as with it."""
    train = training()
    with Segment(tmp_path, [2]) as run, pytest.raises(SegmentEnd):
        train(run, __import__("chainrun").DataLoader)
    (checkpoint,) = Store(RunDir(tmp_path)).committed()
    file = checkpoint.path / witness_file(0)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert flaw(checkpoint) is None
    trained = cut(train, dir=tmp_path)
    assert trained.said == ["no witness at step 2: the segment before could not leave one"]
    assert trained.lines == plain(train).lines


def test_without_time_there_is_no_witness_and_no_harm(tmp_path):
    """Less than a moment left: the segment ends at once, the next one goes on exactly."""
    train, said = training(), []
    segment = Segment(tmp_path, [2], said=said)
    with segment as run, pytest.raises(SegmentEnd):
        run._watch.time_left = lambda: 0.1
        train(run, __import__("chainrun").DataLoader)
    trained = cut(train, dir=tmp_path)
    assert said == ["no witness: no time is left for one"]
    assert trained.lines == plain(train).lines == metrics(tmp_path)


def test_most_of_the_time_left_stays_for_the_handoff():
    """A quarter at most, never long, and a moment where nobody knows when the process is killed."""
    assert witness.seconds_for(8.0, "walltime") == 2.0
    assert witness.seconds_for(float("inf"), "interrupt") == 10.0
    assert witness.seconds_for(3600.0, "terminated") == 1.0
    assert witness.seconds_for(-3.0, "walltime") < 0


def test_state_too_big_for_the_time_is_left_out(tmp_path, monkeypatch):
    """The random streams and the next batch are witnessed all the same."""
    monkeypatch.setattr(witness, "RATE", 1.0)
    trained = cut(training(), [2], dir=tmp_path)
    assert "no witness of the state: 0.0 GB are too much" in trained.said[0]
    assert trained.said[1] == "witnessed at step 2: random streams and next batch identical"


def test_an_object_of_very_many_values_has_one_fingerprint(monkeypatch):
    """The file stays small; a difference is still seen."""
    monkeypatch.setattr(witness, "ENTRIES", 3)
    tree = {"objects": {"table": {n: n for n in range(4)}}, "extras": {}, "gradients": {}, "state": {}}
    before = witness.state_in(tree, [])
    assert set(before) == {"table", "run.state"}
    tree["objects"]["table"][3] = 4
    assert witness.state_in(tree, [])["table"] != before["table"]


def test_a_batch_of_the_users_own_class_has_a_fingerprint_of_its_content():
    """Equal content gives equal fingerprints, wherever it lies in memory; a changed tensor does not."""

    class Batch:
        def __init__(self, value):
            self.x, self.self = torch.full((3,), value), self
            self.maker = lambda: None

    assert fingerprint(Batch(1.0)) == fingerprint(Batch(1.0)) != fingerprint(Batch(2.0))


def chainrun_run(
    folder: Path, name: str, cuts: str, *, tasks: int = 1, **args
) -> tuple[str, list[dict], str]:
    """Run the program as a chain of processes; return the result, the journal and rank 0's log."""
    described = {
        "name": name,
        "function": f"{PROGRAM}:train",
        "dir": str(folder / "runs"),
        "args": {"folder": str(folder), **args},
        "local": {"tasks": tasks},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(described))
    command = [sys.executable, "-m", "chainrun", "run", str(file), "--interrupt-at", cuts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    run = RunDir(folder / "runs" / name)
    found = [json.loads(line) for line in run.journal.read_text().splitlines()]
    log = "".join(path.read_text() for path in run.logs(0))
    return run.result.read_text(), found, log


def test_two_ranks_are_witnessed_each(tmp_path):
    """Every rank leaves its own; rank 0 says the line at each handoff."""
    _, found, log = chainrun_run(tmp_path, "two", "2,5", tasks=2, workers=2, fault="none")
    assert [e["step"] for e in found if e["event"] == "witness" and e["identical"]] == [2, 5]
    assert log.count(IDENTICAL) == 2
    path = tmp_path / "runs" / "two" / "checkpoints" / "step-00000005"
    told = [witness.read(path, rank) for rank in (0, 1)]
    assert told[0]["next batch"].keys() == told[1]["next batch"].keys() == {"next batch of 'loader'"}
    assert told[0]["next batch"] != told[1]["next batch"]


@pytest.mark.parametrize(("fault", "workers"), [("hangs", 0), ("raises", 2), ("hangs", 2)])
def test_a_data_set_that_fails_behind_the_cut_does_not_hold_the_segment_up(tmp_path, fault, workers):
    """The process ends in time although its next batch hangs or raises; the next one goes on exactly."""
    whole, _, _ = chainrun_run(tmp_path, "whole", "100", workers=workers, fault="none")
    began = time.monotonic()
    result, found, log = chainrun_run(tmp_path, "bad", "3", workers=workers, fault=fault)
    assert time.monotonic() - began < 40
    assert (tmp_path / "once").exists()
    assert result == whole
    assert "no witness of the next batch: " in log
    (event,) = [event for event in found if event["event"] == "witness"]
    assert (event["identical"], event["compared"]) == (True, ["state", "random streams"])


def test_a_gradient_that_one_of_two_optimizers_has_used_is_no_difference() -> None:
    """A restored gradient is known to be used by whom it was used."""

    def train(run: Any, DataLoader: Any) -> None:
        model = torch.nn.Linear(3, 1)
        often, seldom = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=m) for m in (0.0, 0.9))
        run.register(model=model, often=often, seldom=seldom)
        for n in run.steps(12):
            model(torch.randn(4, 3)).square().mean().backward()
            if n % 2:
                often.step()
            if n % 3 == 2:
                seldom.step()
                seldom.zero_grad()
            run.step(**marks(None, model))

    trained = cut(train, (4,))
    assert plain(train).difference(trained) is None
    assert trained.said == ["witnessed at step 4: state and random streams identical"]


def long(middle: float) -> torch.Tensor:
    """Return a tensor of which torch prints the ends only."""
    tensor = torch.arange(2000.0) % 7
    tensor[999] = middle
    return tensor


KINDS: dict[str, Any] = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.view(2, 1000).to_sparse_csr(),
    "csc": lambda x: x.view(2, 1000).to_sparse_csc(),
    "bsr": lambda x: x.view(40, 50).to_sparse_bsr((2, 5)),
    "bsc": lambda x: x.view(40, 50).to_sparse_bsc((2, 5)),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 1, torch.qint8),
    "quantized by channel": lambda x: torch.quantize_per_channel(
        x.view(2, 1000), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
    ),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged),
    "mkldnn": lambda x: x.to_mkldnn(),
    "conjugate": lambda x: torch.complex(x, x).conj(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*(Sparse|sparse|quantize|nested).*")
def test_fingerprints_see_every_element_of_every_kind_of_tensor(kind: str) -> None:
    """One element in the middle, which a printed tensor does not show, is another fingerprint; a copy is none."""
    make = KINDS[kind]
    assert fingerprint(make(long(5.0))) == fingerprint(make(long(5.0)))
    assert fingerprint(make(long(5.0))) != fingerprint(make(long(3.0)))
