"""Loops of every shape, cut at every boundary, equal the plain program; what cannot is refused or deferred."""

from __future__ import annotations

import collections
import io
import itertools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import (
    Segment,
    cut,
    cut_everywhere,
    digest,
    lost,
    marks,
    metrics,
    plain,
    some,
    steps_of,
    sweep,
    sweep_boundaries,
    whole,
)
from torch.utils.data import TensorDataset
from tqdm import tqdm

import chainrun
from chainrun.errors import RegisterError, RestoreError
from chainrun.training import passed_on, wrapped
from chainrun.training.stop import SegmentEnd


def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def items(n: int = 6) -> TensorDataset:
    return TensorDataset(torch.arange(3.0 * n).reshape(n, 3) / n)


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Any) -> torch.Tensor:
    loss: torch.Tensor = model(x[0] if isinstance(x, list) else x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


class Tools:
    """What most of the functions here need, registered."""

    def __init__(self, run: Any, DataLoader: Any, n: int = 6, **more: Any) -> None:
        self.run = run
        self.model, self.optimizer = parts()
        self.loader = DataLoader(items(n), batch_size=2, shuffle=True)
        run.register(model=self.model, optimizer=self.optimizer, loader=self.loader, **more)

    def learn(self, x: Any) -> None:
        """Take one optimization step; not yet the boundary."""
        self.loss = learn(self.model, self.optimizer, x)
        self.marks = {"loss": self.loss, **marks(x, self.model, self.optimizer)}

    def step(self) -> None:
        self.run.step(**self.marks)

    def result(self) -> str:
        return digest(self.model.state_dict(), self.optimizer.state_dict())


def cut_at_each_step(train: Any) -> list[Any]:
    """Check that a training cut at steps, and at all of them, is the plain one; return the cut ones."""
    reference = plain(train)
    every = range(1, steps_of(reference) + 1)
    found = []
    for cuts in [*((at,) for at in some(every)), every]:
        trained = cut(train, cuts)
        assert (cuts, reference.difference(trained)) == (cuts, None)
        found.append(trained)
    return found


# ---- what a loop's body passes on ---------------------------------------------------------------------


def after_the_loop(run: Any, t: Tools) -> None:
    for _ in run.epochs(3):
        for x in t.loader:
            loss = learn(t.model, t.optimizer, x)
            run.step(loss=loss)
        run.log(last=loss.item(), batch=x[0].sum())


def in_a_function_of_its_own(run: Any, t: Tools) -> None:
    def one_epoch(loader: Any) -> float:
        for x in loader:
            loss = learn(t.model, t.optimizer, x)
            run.step(loss=loss)
        return loss.item()

    for _ in run.epochs(3):
        run.log(last=one_epoch(t.loader), noise=torch.rand(()))


def evaluated_after(run: Any, t: Tools) -> None:
    for _ in run.epochs(3):
        for n, x in enumerate(t.loader):
            t.learn(x[0] + n)
            t.step()
        for _ in range(4):
            run.poll()
        run.log(batches=n + 1, loss=t.loss)


def evaluated_by_a_loader(run: Any, t: Tools) -> None:
    evaluation = type(t.loader)(items(4), batch_size=1)
    for epoch in run.epochs(3):
        for x in t.loader:
            value = x[0].sum()
            t.learn(x)
            t.step()
        for x in evaluation:
            value = value + x[0].sum()
            run.poll()
        run.log(value=value, noise=torch.rand(()) + epoch)


def step_for_the_rest(run: Any, t: Tools) -> None:
    for _ in run.epochs(3):
        kept = []
        for x in t.loader:
            run.state.setdefault("seen", []).append(0)
            kept = [x]
            t.learn(x)
            t.step()
        if kept:
            t.learn(kept[0])
            t.step()


@pytest.mark.parametrize(
    "loop",
    [after_the_loop, in_a_function_of_its_own, evaluated_after, evaluated_by_a_loader, step_for_the_rest],
)
def test_what_the_code_after_a_loop_reads_of_its_body(loop: Any) -> None:
    """A cut at the loop's end waits for the next turn: a resumed function gets nothing from a loop that is over."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        loop(run, t)
        return t.result()

    for trained in cut_at_each_step(train):
        assert lost(trained) == []
    whole(train, waits=True)


class Output:
    """Has an attribute of the same name, which is read in the body, and set by a constructor."""

    def __init__(self, last: torch.Tensor) -> None:
        self.last = last


class Fit:
    """A trainer, whose attributes the code after the loop reads."""

    def __init__(self, run: Any, t: Tools, how: str) -> None:
        self.run, self.t, self.how = run, t, how
        if how == "made before":
            self.last = torch.zeros(())

    def training_step(self, x: Any) -> torch.Tensor:
        out = Output(learn(self.t.model, self.t.optimizer, x))
        self.last = out.last
        return self.last

    def fit(self) -> None:
        for _ in self.run.epochs(3):
            for x in self.t.loader:
                if self.how == "in the body":
                    self.loss = learn(self.t.model, self.t.optimizer, x)
                    self.run.step(loss=self.loss)
                else:
                    self.run.step(loss=self.training_step(x))
            self.end_of_epoch()
        if self.how == "after all":
            self.end_of_epoch()

    def end_of_epoch(self) -> None:
        self.run.log(last=self.loss if self.how == "in the body" else self.last)


@pytest.mark.parametrize("how", ["in the body", "by a method", "made before", "after all"])
def test_what_the_code_after_a_loop_reads_of_an_attribute_that_its_body_sets(how: str) -> None:
    """As of a variable: a trainer that has not gone through the loop has no such attribute, or an older one."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        Fit(run, t, how).fit()
        return t.result()

    for trained in cut_at_each_step(train):
        assert lost(trained) == []


def test_an_attribute_after_all_loops_is_told_where_nothing_can_wait() -> None:
    class Loop:
        def fit(self, run: Any, t: Tools) -> None:
            for _ in range(3):
                for x in t.loader:
                    self.loss = learn(t.model, t.optimizer, x)
                    run.step(loss=self.loss)
                run.log(last=self.loss)

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        Loop().fit(run, t)
        return t.result()

    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(AttributeError, match="loss"):
            cut(train, (5,), dir=Path(folder))
        assert (
            "reads `.loss`, which only that loop gives a value"
            in (Path(folder) / "journal.jsonl").read_text()
        )


def test_training_and_evaluation_by_the_same_code() -> None:
    """Both loaders are registered: between them the cut waits, too, for what the code after the first has to read."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        loaders = {"train": t.loader, "val": DataLoader(items(4), batch_size=2)}
        run.register(val=loaders["val"])
        for _ in run.epochs(3):
            for phase in ("train", "val"):
                right = 0
                for x in loaders[phase]:
                    if phase == "train":
                        t.learn(x)
                    right += (t.model(x[0]) > 0).sum()
                    if phase == "train":
                        t.step()
                run.log(**{phase: right.double()})  # type: ignore[attr-defined]
        return t.result()

    reference = plain(train)
    for cuts in ((3,), (6,), (3, 6, 9)):
        trained = cut(train, cuts)
        assert reference.difference(trained) is None
        assert lost(trained) == []


class Meter:
    """A mean, as many trainings have one."""

    def __init__(self) -> None:
        self.sum = self.count = 0.0

    def update(self, value: float) -> None:
        self.sum, self.count = self.sum + value, self.count + 1


def kept_in_a_list(run: Any, t: Tools) -> None:
    for _ in run.epochs(3):
        losses: list[float] = []
        for x in t.loader:
            t.learn(x)
            losses.append(t.loss.item())
            t.step()
        run.log(mean=sum(losses) / len(losses))


def kept_in_a_dict(run: Any, t: Tools) -> None:
    for _ in run.epochs(3):
        kept: dict[str, Any] = collections.defaultdict(list)
        kept["sum"] = 0.0
        for x in t.loader:
            t.learn(x)
            kept["loss"].append(t.loss.item())
            kept["sum"] += t.loss.item()
            t.step()
        run.log(mean=kept["sum"] / len(kept["loss"]))


def kept_in_a_meter(run: Any, t: Tools) -> None:
    def one_epoch() -> float:
        meter = Meter()
        for x in t.loader:
            t.learn(x)
            meter.update(t.loss.item())
            t.step()
        return meter.sum / meter.count

    for _ in run.epochs(3):
        run.log(mean=one_epoch())


def kept_in_an_attribute(run: Any, t: Tools) -> None:
    for _ in run.epochs(3):
        meter = Meter()
        for x in t.loader:
            t.learn(x)
            meter.count += 1
            meter.sum += t.loss.item()
            t.step()
        run.log(mean=meter.sum / meter.count)


def kept_in_a_tensor(run: Any, t: Tools) -> None:
    for _ in run.epochs(3):
        losses = torch.zeros(3)
        for n, x in enumerate(t.loader):
            t.learn(x)
            losses[n] = t.loss.item()
            t.step()
        run.log(smallest=losses.min())


@pytest.mark.parametrize(
    "loop", [kept_in_a_list, kept_in_a_dict, kept_in_a_meter, kept_in_an_attribute, kept_in_a_tensor]
)
def test_what_a_loop_has_collected_for_the_code_after_it(loop: Any) -> None:
    """A cut at the loop's end waits for the next turn; inside of the loop it is told, as of any variable."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        loop(run, t)
        return t.result()

    reference = plain(train)
    for cuts in ((3,), (6,), (3, 6)):
        trained = cut(train, cuts)
        assert trained.stopped_at == [*cuts]
        assert reference.difference(trained) is None
        assert lost(trained) == []
    assert lost(cut(train, (4,))) != []


def test_what_is_made_before_a_loop_and_not_changed_in_it_does_not_let_a_cut_wait() -> None:
    """It is made again by a resumed turn."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for epoch in run.epochs(3):
            weights, meter = [1.0, 2.0 + epoch], Meter()
            for x in t.loader:
                first = second = weights
                t.learn([x[0] * first[0] * second[1] * (meter.count + 1 or weights[1])])
                t.step()
            run.log(weight=weights[1] + meter.count)
        return t.result()

    trained = cut(train, (3,))
    assert plain(train).difference(trained) is None
    assert not any("waits" in line for line in trained.said)


def steps_in_a_turn(run: Any, t: Tools) -> None:
    for _ in run.epochs(3):
        for _ in run.steps(2):
            loss = learn(t.model, t.optimizer, torch.randn(2, 3))
            run.log(loss=loss)
        run.log(last=loss)
        for _ in run.steps(2):
            run.log(other=learn(t.model, t.optimizer, torch.randn(2, 3)))


def the_last_of_all_epochs(run: Any, t: Tools) -> None:
    for _ in run.epochs(2):
        for x in t.loader:
            loss = learn(t.model, t.optimizer, x)
            run.step(loss=loss)
    run.log(last=loss)


def the_last_of_all_steps(run: Any, t: Tools) -> None:
    batches = iter(t.loader)
    for _ in run.steps(3):
        loss = learn(t.model, t.optimizer, next(batches))
        run.step(loss=loss)
    run.log(last=loss)


@pytest.mark.parametrize("loop", [steps_in_a_turn, the_last_of_all_epochs, the_last_of_all_steps])
def test_what_the_code_after_a_range_reads_of_its_body(loop: Any) -> None:
    """At its end a cut waits: for the next turn of `run.epochs()`, or for the function's end."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        loop(run, t)
        return t.result()

    cut_at_each_step(train)


def test_what_only_a_finished_loop_gives_a_value_is_told_where_nothing_can_wait() -> None:
    """Where a plain range is around the loop, each later cut goes through that code again; what to do is said."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for _ in range(3):
            for x in t.loader:
                loss = learn(t.model, t.optimizer, x)
                run.step(loss=loss)
            run.log(last=loss)
        return t.result()

    def fixed(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        loss = torch.zeros(())
        for _ in range(3):
            for x in t.loader:
                loss = learn(t.model, t.optimizer, x)
                run.step(loss=loss)
            run.log(last=loss)
        return t.result()

    said = cut(train).said
    assert not any("only that loop gives a value" in line for line in said)  # nothing was to be saved
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(UnboundLocalError, match="loss") as raised:
            cut(train, (5,), dir=Path(folder))
        lines = (Path(folder) / "journal.jsonl").read_text().splitlines()
        warned = [line for line in map(json.loads, lines) if "only that loop gives" in line.get("reason", "")]
        assert "reads `loss`" in warned[0]["reason"]
        assert "give the variable a value before that loop" in passed_on.explain(raised.value)
        assert cut(fixed, dir=Path(folder)).result == plain(train).result


def read_ahead(loader: Any) -> Any:
    first, current = True, None
    for batch in loader:
        following = [each.clone() for each in batch]  # as to a device
        if not first:
            yield current
        first, current = False, following
    yield current


def shuffled(loader: Any) -> Any:
    kept: list[Any] = []
    for x in loader:
        kept.append(x)
        if len(kept) == 2:
            yield kept.pop(random.randrange(2))
    yield from kept


class Ahead:
    def __init__(self, loader: Any) -> None:
        self.loader, self.kept = loader, None

    def __iter__(self) -> Any:
        for x in self.loader:
            if self.kept is not None:
                yield self.kept
            self.kept = x
        yield self.kept


@pytest.mark.parametrize(
    ("around", "where"),
    [(read_ahead, "read_ahead() .* `current`"), (shuffled, "shuffled() .* `kept`"), (Ahead, "`self.kept`")],
)
def test_a_generator_that_keeps_batches_for_later_turns_is_refused(around: Any, where: str) -> None:
    """As soon as a boundary lies between two batches, though nothing is cut."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader, n=8)
        for _ in run.epochs(2):
            for x in around(t.loader):
                t.learn(x)
                t.step()

    with pytest.raises(RegisterError, match=where.replace("()", r"\(\)")):
        cut(train)


def collected(t: Any) -> Any:
    return [t.turn(x) for x in t.loader]


def collected_by_a_call(t: Any) -> Any:
    return sum(t.turn(x) for x in t.loader)


def collected_from_a_generator(t: Any) -> Any:
    def turns() -> Any:
        for x in t.loader:
            yield t.turn(x)

    return list(turns())


def thrown_away(t: Any) -> Any:
    [t.turn(x) for x in t.loader]
    return 0


def all_thrown_away(t: Any) -> Any:
    list(t.turn(x) for x in t.loader)  # noqa: C400
    return 0


def training_with(loop: Any) -> Any:
    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, n=8)

        def turn(x: Any) -> float:
            t.learn(x)
            t.step()
            return 1.0

        t.turn = turn  # type: ignore[attr-defined]
        for _ in run.epochs(2):
            run.log(found=len(loop(t)) if loop in (collected, collected_from_a_generator) else loop(t))
        return t.result()

    return train


@pytest.mark.parametrize("loop", [collected, collected_by_a_call, collected_from_a_generator])
def test_what_collects_the_turns_of_a_loop_is_refused(loop: Any) -> None:
    """A list that is in no variable yet is lost by a cut: at once, though nothing is cut."""
    for cuts in ((), (3,)):
        with pytest.raises(RegisterError, match="collects what the turns over the loader"):
            cut(training_with(loop), cuts)


def test_a_cut_where_an_evaluation_begins_is_none_of_its_batches() -> None:
    """Nothing is collected over a boundary there, nor is a batch fetched ahead; cut twice, too."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        val = DataLoader(items(4), batch_size=1, shuffle=True)
        run.register(val=val)
        for _ in run.epochs(3):
            for n, x in enumerate(t.loader):
                t.learn(x)
                t.step()
                if n == 1:
                    break
            run.log(val=sum(t.model(x).sum().item() for (x,) in val))
            for n, x in enumerate(val):
                run.log(n=n, x=x[0].sum())
                if n == 1:
                    break
        return t.result()

    sweep(train, 6)


@pytest.mark.parametrize("loop", [thrown_away, all_thrown_away])
def test_a_comprehension_that_is_thrown_away_is_exact(loop: Any) -> None:
    train = training_with(loop)
    reference = plain(train)
    for at in some(range(1, steps_of(reference))):
        assert reference.difference(cut(train, (at,))) is None


def windows(loader: Any) -> Any:
    kept: list[Any] = []
    for x in loader:
        kept.append(x)
        if len(kept) == 3:
            yield kept
            kept = []
    if kept:
        yield kept


def test_the_rest_that_a_generator_gives_after_its_loop() -> None:
    """A resumed generator gets nothing from a loader that is at its end: the cut waits for the next turn."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, n=8)
        for _ in run.epochs(2):
            for window in windows(t.loader):
                for x in window:
                    t.learn(x)
                t.step()
        return t.result()

    assert steps_of(plain(train)) > 3
    cut_at_each_step(train)


def scaled(loader: Any) -> Any:
    factors = [torch.ones(3), torch.full((3,), 0.5)]
    for batch in tqdm(loader, file=io.StringIO()):
        x = batch
        for factor in factors:
            x = [each * factor for each in x]
        yield x


def test_a_generator_that_keeps_none_is_exact() -> None:
    """What it holds beside the batch that it gives does not matter."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for _ in run.epochs(3):
            for x in scaled(t.loader):
                t.learn(x)
                t.step()
            for x in t.loader:
                t.learn(x)
                t.step()
        return t.result()

    cut_everywhere(train, least=8)


# ---- ranges ------------------------------------------------------------------------------------------


def test_epochs_with_code_around_every_loop() -> None:
    """Draws before, between and after the loops of an epoch are the same in a resumed one."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        second = DataLoader(items(4), batch_size=2, shuffle=True)
        run.register(second=second)
        first_noise = torch.rand(3)
        for epoch in run.epochs(3):
            before = torch.rand(3), random.random(), np.random.rand()
            for x in t.loader:
                t.learn(x[0] + before[0] + first_noise)
                t.step()
            between = torch.rand(3)
            for x in second:
                t.learn(x[0] + between + epoch)
                t.step()
            run.log(after=torch.rand(()), python=random.random())
        return t.result()

    sweep(train, 15)


def test_plain_range_around_a_registered_loader() -> None:
    """``for epoch in range(n)`` works as well: finished epochs give nothing and are gone through again."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for _ in range(7):
            before = torch.rand(3)
            for x in t.loader:
                t.learn(x[0] + before)
                t.step()
        return t.result()

    sweep(train, 21)


def test_steps_without_a_loader() -> None:
    """Every turn is a boundary, and counts one step."""

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for step in run.steps(8):
            loss = learn(model, optimizer, torch.rand(2, 3) + step)
            run.log(loss=loss, **marks(loss, model, optimizer))
        return digest(model.state_dict())

    sweep(train, 8)


def test_steps_with_batches_taken_by_hand() -> None:
    """``next(it)``, begun again where it ends, as the plain program does."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        it = iter(t.loader)
        for _ in run.steps(8):
            try:
                x = next(it)
            except StopIteration:
                it = iter(t.loader)
                x = next(it)
            t.learn(x)
            t.step()
        return t.result()

    sweep(train, 8)


def test_steps_with_a_cycle_generator() -> None:
    """A generator that goes through the loader again and again."""

    def cycle(loader: Any) -> Any:
        while True:
            yield from loader

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        batches = cycle(t.loader)
        for _ in run.steps(8):
            t.learn(next(batches))
            t.step()
        return t.result()

    sweep(train, 8)


def test_steps_inside_epochs() -> None:
    """A range of steps in every epoch, with draws around it."""

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for epoch in run.epochs(3):
            noise = torch.rand(3)
            for step in run.steps(3):
                loss = learn(model, optimizer, torch.rand(2, 3) + noise + epoch + step)
                run.log(loss=loss, **marks(None, model, optimizer))
            run.log(after=torch.rand(()))
        return digest(model.state_dict())

    sweep(train, 9)


def test_several_ranges_one_after_the_other() -> None:
    """A function of two phases, each with objects of its own, registered when the phase begins."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x)
                t.step()
        head = torch.nn.Linear(3, 1)
        optimizer = torch.optim.Adam(head.parameters())
        second = DataLoader(items(8), batch_size=2, shuffle=True)
        run.register(head=head, head_optimizer=optimizer, second=second)
        noise = torch.rand(3)
        for _ in run.epochs(2):
            for x in second:
                run.step(loss=learn(head, optimizer, x[0] + noise), **marks(x, head))
        for _ in run.steps(2):
            run.log(loss=learn(head, optimizer, noise), **marks(noise, head))
        return t.result() + digest(head.state_dict())

    sweep(train, 16)


def test_full_batch_training() -> None:
    """One step an epoch, no loader."""

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        x = torch.rand(4, 3)
        for _ in run.epochs(6):
            loss = learn(model, optimizer, x + torch.rand(3))
            run.step(loss=loss, **marks(x, model, optimizer))
            x = x.clone()
            run.log(after=torch.rand(()))
        return digest(model.state_dict())

    sweep(train, 6)


def test_torch_loader_inside_epochs() -> None:
    """An unregistered loader's epoch is run again up to the boundary, from the epoch's random state."""

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        loader = torch.utils.data.DataLoader(items(), batch_size=2, shuffle=True)
        run.register(model=model, optimizer=optimizer)
        for _ in run.epochs(3):
            for x in loader:
                loss = learn(model, optimizer, x)
                run.step(loss=loss, **marks(x, model, optimizer))
            run.log(after=torch.rand(()))
        return digest(model.state_dict())

    sweep(train, 9)


def test_more_epochs_than_before() -> None:
    """A finished range may be made longer: the run goes on as if it had been that long."""

    def upto(epochs: int) -> Any:
        def train(run: Any, DataLoader: Any) -> str:
            t = Tools(run, DataLoader)
            for _ in run.epochs(epochs):
                for x in t.loader:
                    t.learn(x)
                    t.step()
            return t.result()

        return train

    reference = plain(upto(4))
    for at in (5, 6):
        assert reference.difference(cut([upto(2), upto(4)], (at,))) is None


# ---- boundaries --------------------------------------------------------------------------------------


def test_gradient_accumulation_with_one_step_for_several_batches() -> None:
    """The boundary comes every third batch; the loader goes on after exactly those."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, n=12)
        for _ in run.epochs(3):
            t.optimizer.zero_grad()
            run.state["batches"] = 0
            for x in t.loader:
                t.model(x[0]).square().mean().backward()
                run.state["batches"] += 1
                if run.state["batches"] % 3 == 0:
                    t.optimizer.step()
                    t.optimizer.zero_grad()
                    run.step(**marks(x, t.model, t.optimizer))
        return t.result()

    sweep(train, 6)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradient_accumulation_with_a_boundary_at_every_batch(to_none: bool) -> None:
    """Gradients that no optimizer step has used yet belong to the state."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, n=12)
        other = torch.nn.Linear(3, 1)
        sgd = torch.optim.SGD(other.parameters(), lr=0.1)
        run.register(other=other, sgd=sgd)
        for _ in run.epochs(2):
            for x in t.loader:
                (t.model(x[0]).square().mean() + other(x[0]).mean()).backward()
                if run.global_step % 3 == 2:
                    t.optimizer.step()
                    t.optimizer.zero_grad(set_to_none=to_none)
                if run.global_step % 4 == 3:
                    sgd.step()
                    sgd.zero_grad(set_to_none=to_none)
                run.step(**marks(x, t.model, t.optimizer, other))
        return t.result() + digest(other.state_dict())

    sweep(train, 12)


def test_two_steps_for_one_batch() -> None:
    """Both are boundaries; the cut comes when the body of both has run."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x)
                t.step()
                t.learn(x[0] + torch.rand(3))
                t.step()
                run.log(after=torch.rand(()))
        return t.result()

    reference = plain(train)
    for at in range(1, 13):
        assert reference.difference(cut(train, (at,))) is None
    whole(train, waits=True)


def test_code_after_the_step_runs_once() -> None:
    """What follows `run.step()` in the body has run before the cut, and does not run again."""

    def train(run: Any, DataLoader: Any) -> Any:
        t = Tools(run, DataLoader)
        for _ in run.epochs(3):
            for x in t.loader:
                t.learn(x)
                t.step()
                run.state["after"] = [*run.state.get("after", []), torch.rand(()).item()]
                run.log(after=run.state["after"][-1])
        return t.result(), run.state["after"]

    sweep(train, 9)


def test_break_right_after_the_step() -> None:
    """The boundary's loop asks for nothing more; the next loop's first turn is where the cut comes."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for _ in run.epochs(4):
            for x in t.loader:
                t.learn(x)
                t.step()
                if run.global_step % 3 == 2:
                    break
            run.log(after=torch.rand(()))
        return t.result()

    reference = plain(train)
    for at in range(1, 12):
        assert reference.difference(cut(train, (at,))) is None
    assert reference.difference(cut(train, range(1, 12))) is None
    whole(train, waits=True)


def test_break_out_of_epochs_and_steps() -> None:
    """Early stopping leaves the ranges; what follows them is trained exactly."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, n=12)
        for epoch in run.epochs(9):
            for x in t.loader:
                t.learn(x)
                t.step()
            if epoch == 1:
                break
        noise = torch.rand(3)
        for step in run.steps(9):
            t.learn(noise + step)
            t.step()
            if step == 2:
                break
        for x in t.loader:
            t.learn(x[0] + noise)
            t.step()
        return t.result()

    reference = plain(train)
    for cuts in [*((at,) for at in range(1, 22)), range(1, 22)]:
        trained = cut(train, cuts)
        assert (cuts, reference.difference(trained)) == (cuts, None)
    whole(train, waits=True)


@pytest.mark.parametrize("kind", ["registered", "unregistered", "plain"])
def test_poll_in_an_evaluation_loop(kind: str) -> None:
    """A cut within a long evaluation: sums in `run.state` where its loader is registered, else done again."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        Loader = torch.utils.data.DataLoader if kind == "plain" else DataLoader
        held_out = Loader(items(8), batch_size=2, shuffle=True)
        if kind == "registered":
            run.register(held_out=held_out)
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x)
                t.step()
            sums = run.state if kind == "registered" else {}
            sums["right"] = 0.0
            for (x,) in held_out:
                with torch.no_grad():
                    sums["right"] += t.model(x + torch.rand(3)).sum().item()
                run.poll()
            run.log(right=sums["right"], **marks(torch.rand(3), t.model))
        return t.result()

    sweep_boundaries(train, 14)


def test_poll_in_an_evaluation_inside_the_training_loop() -> None:
    """It waits for the training loop's next turn: a cut in between would need the batch again."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        held_out = DataLoader(items(4), batch_size=2, shuffle=True)
        run.register(held_out=held_out)
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x)
                t.step()
                total = 0.0
                for (y,) in held_out:
                    total += t.model(y).sum().item()
                    run.poll()
                run.log(total=total, used=x[0].sum())
        return t.result()

    sweep_boundaries(train, 17, waits=True)


def test_nested_loaders_wait_for_the_outer_one(tmp_path: Path) -> None:
    """An outer loader that holds a batch defers the cut until it is asked for the next."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        inner = DataLoader(items(4), batch_size=2, shuffle=True)
        run.register(inner=inner)
        for _ in run.epochs(2):
            for x in t.loader:
                for y in inner:
                    t.learn(x[0] + y[0])
                    t.step()
        return t.result()

    reference = plain(train)
    for at in range(1, 13):
        trained = cut(train, (at,))
        assert reference.difference(trained) is None
        if trained.stopped_at:
            assert trained.stopped_at == [at + at % 2]
    whole(train, waits=True)
    assert any("has handed out a batch that is still in use" in line for line in cut(train, (1,)).said)


def test_save_in_the_middle() -> None:
    """A checkpoint asked for by the function changes nothing, and can be gone on from."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x)
                run.save()
                t.step()
                if run.global_step == 4:
                    run.save()
            run.save()
        return t.result()

    sweep(train, 6)


def test_boundaries_outside_of_every_range() -> None:
    """``while`` and ``range`` loops of the function's own are gone through again, with a warning."""

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for _ in range(20):
            x = torch.rand(2, 3)
            run.step(loss=learn(model, optimizer, x), **marks(x, model, optimizer))
        return digest(model.state_dict())

    sweep(train, 20)
    assert any("outside of run.epochs()" in line for line in cut(train, (2,)).said)


# ---- what the function keeps -------------------------------------------------------------------------


def test_state_is_carried_and_stays_the_same_objects() -> None:
    """Lists and dicts taken out of `run.state` before the loop are still its own after a resume."""

    def train(run: Any, DataLoader: Any) -> Any:
        t = Tools(run, DataLoader)
        history = run.state.setdefault("history", [])
        nested = run.state.setdefault("nested", {"best": 0.0, "sums": torch.zeros(2)})
        sums = nested["sums"]
        for _ in run.epochs(3):
            for x in t.loader:
                t.learn(x)
                history.append(t.loss.item())
                nested["best"] = max(nested["best"], t.loss.item())
                sums += t.loss.item()
                t.step()
        kept = {k: run.state[k] for k in ("history", "nested")}
        return t.result(), digest(kept), len(kept["history"])

    reference = sweep(train, 9)
    assert reference.result[2] == 9


def test_state_is_there_from_the_first_line() -> None:
    """A resumed function finds its values before it comes to any loop."""
    seen = []

    def train(run: Any, DataLoader: Any) -> None:
        seen.append(dict(run.state))
        for step in run.steps(3):
            run.state["last"] = step

    cut(train, (2,))
    assert seen == [{}, {"last": 1}]


def test_function_that_seeds_itself() -> None:
    """Seeding in the first lines, as scripts do, does not win over the restored random state."""

    def train(run: Any, DataLoader: Any) -> str:
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        t = Tools(run, DataLoader)
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x)
                t.step()
        return t.result()

    sweep(train, 6)


def test_registered_generators_before_and_between_loops() -> None:
    """Code that runs again before a loop draws from registered generators, too, what it drew then."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        generator, old = np.random.default_rng(1), np.random.RandomState(2)
        python, own = random.Random(3), torch.Generator().manual_seed(4)
        run.register(generator=generator, old=old, python=python, own=own)

        def draw() -> float:
            child = generator.spawn(1)[0]
            draws = generator.normal(), old.normal(), python.gauss(0, 1), child.normal()
            return float(sum(draws)) + torch.rand((), generator=own).item()

        fixed = draw()
        for _ in run.epochs(3):
            before = draw()
            for x in t.loader:
                t.learn(x[0] + before + fixed + draw())
                t.step()
            between = draw()
            for x in t.loader:
                t.learn(x[0] + between)
                t.step()
            run.log(after=draw())
        return t.result()

    sweep(train, 18)


def test_metrics_hold_every_step_once(tmp_path: Path) -> None:
    """After any cuts metrics.jsonl is that of the uninterrupted run, byte for byte."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader)
        for epoch in run.epochs(3):
            for x in t.loader:
                t.learn(x)
                t.step()
            run.log(epoch=epoch, text="done")

    cut(train, (), dir=tmp_path / "whole")
    for n, cuts in enumerate([(2,), (1, 3, 4, 9), range(1, 10)]):
        cut(train, cuts, dir=tmp_path / str(n))
        whole, pieces = (tmp_path / name / "metrics.jsonl" for name in ("whole", str(n)))
        assert pieces.read_bytes() == whole.read_bytes()


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    """A segment that died after its checkpoint leaves no line twice."""

    def train(run: Any, DataLoader: Any) -> None:
        for step in run.steps(6):
            run.log(at=step)
            if step == 2:
                run.save()
            if step == 4 and not run.resumed:
                run._metrics.flush()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Segment(tmp_path) as run:
        train(run, chainrun.DataLoader)
    assert [line["at"] for line in metrics(tmp_path)] == [0, 1, 2, 3, 4]
    cut(train, dir=tmp_path)
    assert [line["at"] for line in metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]


# ---- functions that catch, and functions that change -------------------------------------------------


def test_function_that_catches_exceptions() -> None:
    """``except Exception`` around a step does not swallow the segment's end."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for _ in run.epochs(2):
            for x in t.loader:
                try:
                    t.learn(x)
                    t.step()
                except Exception:
                    raise AssertionError from None
        return t.result()

    sweep(train, 6)


def test_function_that_catches_everything() -> None:
    """A bare ``except`` does swallow it; the run is not taken for finished, and stays exact."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        try:
            for _ in run.epochs(2):
                for x in t.loader:
                    t.learn(x)
                    t.step()
        except BaseException:
            return "interrupted"
        return t.result()

    sweep(train, 6)


def test_function_with_fewer_loops_is_refused() -> None:
    """It never comes to the checkpoint's place."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader)
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x)
                t.step()

    def without_the_loop(run: Any, DataLoader: Any) -> None:
        Tools(run, DataLoader)

    with pytest.raises(RestoreError, match="returned before it came to the place"):
        cut([train, without_the_loop], (2,))


def test_function_with_more_loops_is_refused() -> None:
    """It passes over the loader before the checkpoint's place, where it did not before."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader)
        second = DataLoader(items(4), batch_size=2)
        run.register(second=second)
        for x in t.loader:
            t.learn(x)
            t.step()

    def with_another(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader)
        second = DataLoader(items(4), batch_size=2)
        run.register(second=second)
        for x in second:
            t.learn(x)
            t.step()

    with pytest.raises(RestoreError, match="its loops or its arguments have changed"):
        cut([train, with_another], (2,))


def test_a_loop_that_begins_where_the_state_says_is_refused_and_gone_on_with_from_zero() -> None:
    """The epoch is kept in run.state as in other trainers; the resumed function would skip as many as it has done."""

    def train(run: Any, DataLoader: Any, *, kept: bool = False) -> str:
        t = Tools(run, DataLoader)
        for epoch in range(run.state.get("epoch", 0) if kept else 0, 7):
            for x in t.loader:
                t.learn(x)
                t.step()
            run.state["epoch"] = epoch + 1
        return t.result()

    def keeps(run: Any, DataLoader: Any) -> str:
        return train(run, DataLoader, kept=True)

    said = r"the loop over `epoch` in train\(\) has come to 2 where it was at 1 when .* `range\(n\)` and not"
    with pytest.raises(RestoreError, match=said):
        cut([keeps, keeps], (5,))
    assert plain(train).difference(cut([keeps, train], (5,))) is None
    with pytest.raises(RestoreError, match=r"depends on run\.state, .* or `range\(n\)` from 0"):
        cut([keeps, keeps], (14,))  # there are no such turns any more
    sweep(train, 21, quick=True)


def test_a_loop_over_what_is_left_to_do_may_count_otherwise() -> None:
    """Folds that are done are in run.state; the number in front of the fold is another one after a cut."""

    def train(run: Any, DataLoader: Any) -> str:
        loaders = [DataLoader(items(4 + fold), batch_size=2, shuffle=True) for fold in range(3)]
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer, **{f"fold{n}": each for n, each in enumerate(loaders)})
        done = run.state.setdefault("done", [])
        for _, fold in enumerate([fold for fold in range(3) if fold not in done]):
            for x in loaders[fold]:
                run.step(loss=learn(model, optimizer, x))
            done.append(fold)
        return digest(model.state_dict())

    for cuts in ((1,), (3,), (6,), (2, 4, 6)):
        assert plain(train).difference(cut(train, cuts)) is None


def test_a_loops_variable_that_its_body_changes_is_no_count_of_its_turns() -> None:
    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for number in range(3):
            number *= 10  # noqa: PLW2901
            for x in t.loader:
                number += 1  # noqa: PLW2901
                t.learn(x)
                t.step()
        return t.result()

    for cuts in (range(1, 10), [5]):
        assert plain(train).difference(cut(train, cuts)) is None


def test_batch_fetched_ahead_by_hand_is_refused() -> None:
    """A batch that is fetched in one turn and used in the next is lost by a cut: refused, not replaced."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader, n=20)
        it = iter(t.loader)
        x = next(it)
        for _ in run.steps(6):
            t.learn(x)
            t.step()
            x = next(it)

    with pytest.raises((RegisterError, RestoreError), match="ahead"):
        cut(train, (3,))


def test_ranges_inside_each_other_are_refused() -> None:
    """One range at a time has its place in the checkpoint."""

    def epochs_in_steps(run: Any, DataLoader: Any) -> None:
        for _ in run.steps(2):
            for _ in run.epochs(2):
                pass

    def steps_in_steps(run: Any, DataLoader: Any) -> None:
        for _ in run.steps(2):
            for _ in run.steps(2):
                pass

    for train in (epochs_in_steps, steps_in_steps):
        with pytest.raises(RegisterError, match="cannot be resumed"):
            cut(train)


def test_segment_ends_again_for_a_function_that_trains_on() -> None:
    """Caught once, it comes again at the next boundary; nothing trained after the checkpoint stays."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x)
                try:
                    t.step()
                except SegmentEnd:
                    continue
        return t.result()

    sweep(train, 6)


# ---- iterators held by variables ---------------------------------------------------------------------


def test_iterator_that_is_held_after_a_look() -> None:
    """A named iterator, kept alive by its variable, neither defers every cut nor changes its batch."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        other = DataLoader(items(8), batch_size=2, shuffle=True)
        run.register(other=other)
        it = iter(other)
        sample = next(it)[0]
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x[0] + sample)
                t.step()
        return t.result()

    sweep(train, 6)


@pytest.mark.parametrize(("looks", "generator"), [(1, False), (3, False), (4, True), (6, False)])
def test_an_iterator_is_held_after_a_look_at_the_loader_of_the_training(looks: int, generator: bool) -> None:
    """The tutorials' first batch, or a search for a learning rate over more than an epoch."""

    def again_and_again(loader: Any) -> Any:
        while True:
            yield from loader

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        it = again_and_again(t.loader) if generator else iter(t.loader)
        for _ in range(looks):
            try:
                seen = next(it)[0]
            except StopIteration:
                it = iter(t.loader)
                seen = next(it)[0]
        for _ in run.epochs(3):
            for x in t.loader:
                t.learn(x[0] + seen)
                t.step()
        return t.result()

    sweep(train, 9, quick=True)


def test_an_iterator_is_held_after_a_look_at_the_loader_of_an_evaluation() -> None:
    """A batch to show, of a loader that each epoch goes over."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        other = DataLoader(items(4), batch_size=2, shuffle=True)
        run.register(other=other)
        it = iter(other)
        shown = next(it)[0]
        for _ in run.epochs(3):
            for x in t.loader:
                t.learn(x[0] + shown)
                t.step()
            for x in other:
                run.log(batch=x[0].sum(), noise=torch.rand(()))
                run.poll()
        return t.result()

    sweep(train, 9)


@pytest.mark.parametrize(
    ("renewal", "looks"),
    [("each epoch", 4), ("some epochs", 1), ("late", 1), ("at its end", 4)],
)
def test_an_iterator_is_made_anew_after_a_look_with_the_first(renewal: str, looks: int) -> None:
    """What was looked at is a batch of the first one at each resume, whatever the variable holds by then."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        other = DataLoader(items(8), batch_size=2, shuffle=True)
        run.register(other=other)
        it = iter(other)
        seen = [next(it)[0] for _ in range(looks)]
        weight = torch.rand(())
        for epoch in run.epochs(4):
            if {"each epoch": True, "some epochs": epoch % 2 == 0, "late": epoch == 2}.get(renewal, False):
                it = iter(other)
            part = torch.rand(())
            for x in t.loader:
                y = seen[-1]
                if renewal != "late" or epoch >= 2:
                    try:
                        y = next(it)[0]
                    except StopIteration:
                        it = iter(other)
                        y = next(it)[0]
                t.learn(x[0] * weight + y * part)
                t.step()
        return t.result()

    sweep(train, 12, quick=True)


def test_an_iterator_is_made_anew_where_a_function_has_asked_it() -> None:
    """The StopIteration holds the frames of that function, and so the iterator at its end."""

    def asked(it: Any) -> Any:
        return next(it)[0]

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        other = DataLoader(items(8), batch_size=2, shuffle=True)
        run.register(other=other)
        it = iter(other)
        for _ in run.epochs(4):
            for x in t.loader:
                try:
                    y = asked(it)
                except StopIteration:
                    it = iter(other)
                    y = asked(it)
                t.learn(x[0] + y)
                t.step()
        return t.result()

    sweep(train, 12, quick=True)


def test_an_iterator_is_made_anew_in_steps_after_a_look_with_the_first() -> None:
    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        it = iter(t.loader)
        seen = next(it)[0]
        for step in run.steps(9):
            if step % 3 == 0:
                it = iter(t.loader)
            t.learn(next(it)[0] + seen)
            run.log(noise=torch.rand(()))
        return t.result()

    sweep(train, 9)


def test_an_iterator_that_another_pass_has_overtaken_is_refused_after_a_cut_as_uncut() -> None:
    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader)
        other = DataLoader(items(8), batch_size=2, shuffle=True)
        run.register(other=other)
        it = iter(other)
        for _ in run.epochs(2):
            for n, x in enumerate(t.loader):
                t.learn(x)
                t.step()
                if n == 1:
                    t.learn(next(it))
            for y in other:
                run.log(seen=y[0].sum())

    for cuts in ((), (4,), (5,), range(1, 9)):
        with pytest.raises(
            RegisterError, match="two passes over the loader 'other' are used at the same time"
        ):
            cut(train, cuts)


def test_an_iterator_that_is_never_asked() -> None:
    """It was of no use; the loops after it are gone through all the same."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, 40)
        other = DataLoader(items(4), batch_size=2)
        run.register(other=other)
        it = iter(other)
        for x in t.loader:
            t.learn(x)
            t.step()
            for y in other:
                run.log(seen=y[0].sum())
                run.poll()
        del it
        return t.result()

    sweep(train, 20, quick=True)


def test_an_iterator_of_an_earlier_turn_beside_an_older_one() -> None:
    """Two variables hold iterators over one loader, of which the older one is used no more."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        other = DataLoader(items(100), batch_size=2, shuffle=True)
        run.register(other=other)
        it = first = iter(other)
        seen = next(first)[0]
        for epoch in run.epochs(2):
            if epoch == 0:
                it = iter(other)
            for x in t.loader:
                t.learn(x[0] + seen + next(it)[0][:1])
                t.step()
        return t.result()

    sweep(train, 6)


def test_batches_taken_by_hand_beside_the_loop() -> None:
    """More than one a turn, before and after the step: only the loop's own head is a place to cut at."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        other = DataLoader(items(16), batch_size=2, shuffle=True)
        run.register(other=other)
        for _ in run.epochs(2):
            it = iter(other)
            for x in t.loader:
                t.learn(x[0] + next(it)[0])
                t.step()
                run.log(after=next(it)[0].sum() + torch.rand(()))
        return t.result()

    sweep(train, 6)


@pytest.mark.parametrize("in_epochs", [True, False])
def test_own_loops_that_take_batches_by_hand_are_refused(in_epochs: bool) -> None:
    """``for i in range(n): next(it)`` would begin its count again; the first step says what to write."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader, n=20)
        it = iter(t.loader)
        for _ in run.epochs(1) if in_epochs else [0]:
            for _ in range(4):
                t.learn(next(it))
                t.step()

    with pytest.raises(RegisterError, match=r"taken with next\(\) in a loop of the function's own"):
        cut(train)


def test_a_batch_at_the_end_of_each_epoch_from_one_iterator() -> None:
    """It is no loop around the next epoch's: a cut in that does not wait."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        other = DataLoader(items(14), batch_size=2, shuffle=True)
        run.register(other=other)
        held = iter(other)
        for _ in run.epochs(7):
            for x in t.loader:
                t.learn(x)
                t.step()
            run.log(more=next(held)[0].sum())
        return t.result()

    sweep(train, 21, quick=True)
    assert cut(train, (5,)).stopped_at == [5]


def test_an_own_loop_over_iterators_not_all_of_which_were_asked_is_refused() -> None:
    """At its first step, not at the save that is due some day: one that waits for its turn is no loop with a head."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader)
        other = DataLoader(items(), batch_size=2)
        run.register(other=other)
        for _ in run.epochs(1):
            iterators = [iter(t.loader), iter(other)]
            for n in range(6):
                t.learn(next(iterators[n % 2]))
                t.step()

    with pytest.raises(
        RegisterError, match=r"'loader:loader' are taken with next\(\) in a loop of the function's own"
    ):
        cut(train)


def test_iterator_that_is_used_by_hand_and_by_a_loop_is_refused() -> None:
    """A batch taken before the loop, and the rest by it: a resumed function would take another one."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader)
        it = iter(t.loader)
        next(it)
        for x in it:
            t.learn(x)
            t.step()

    with pytest.raises(RegisterError, match=r"taken with next\(\) before a loop went over the same iterator"):
        cut(train)


def test_pairs_of_batches() -> None:
    """A loop that takes a second batch by hand goes on at its own head."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, n=12)
        for _ in run.epochs(2):
            it = iter(t.loader)
            for x in it:
                y = next(it)
                t.learn(x[0] + y[0])
                t.step()
        return t.result()

    sweep(train, 6)


def test_draws_after_an_iterator_is_made() -> None:
    """What is drawn after ``it = iter(loader)`` is the same, wherever that iterator has come to."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        endless = DataLoader(items(8), batch_size=2, shuffle=True)
        run.register(endless=endless)
        it = iter(endless)
        noise = torch.rand(3)
        for _ in range(2):
            between = torch.rand(3)
            for x in t.loader:
                try:
                    y = next(it)
                except StopIteration:
                    it = iter(endless)
                    y = next(it)
                t.learn(x[0] + y[0][:1] + noise + between)
                t.step()
        for _ in run.epochs(2):
            held = iter(endless)
            other = torch.rand(3)
            for x in t.loader:
                t.learn(x[0] + noise + other)
                t.step()
                run.log(more=next(held)[0].sum())
                if run.global_step % 3 == 2:
                    break
        return t.result()

    reference = plain(train)
    for cuts in [*((at,) for at in range(1, 12)), range(1, 12)]:
        assert (cuts, reference.difference(cut(train, cuts))) == (cuts, None)
    whole(train, waits=True)


def renewed(run: Any, t: Tools, other: Any) -> None:
    for _ in run.epochs(4):
        held = iter(other)
        noise = torch.rand(3)
        for x in t.loader:
            t.learn(x[0] + noise)
            t.step()
            run.log(more=next(held)[0].sum())


def renewed_late(run: Any, t: Tools, other: Any) -> None:
    for _ in run.epochs(3):
        for x in t.loader:
            t.learn(x[0])
            t.step()
        held = iter(other)
        for _ in run.steps(3):
            t.learn(next(held))
            t.step()


def renewed_when_used(run: Any, t: Tools, other: Any) -> None:
    for epoch in run.epochs(4):
        if epoch % 2 == 0:
            held = iter(other)
        for x in t.loader:
            t.learn(x[0] + (next(held)[0][0] if epoch % 2 == 0 else 0))
            t.step()


def kept(run: Any, t: Tools, other: Any) -> None:
    held = None
    for _ in run.epochs(3):
        for x in t.loader:
            t.learn(x[0])
            t.step()
            if held is None:
                held = iter(other)
            t.learn(next(held)[0])


def begun_late(run: Any, t: Tools, other: Any) -> None:
    def endless() -> Any:
        while True:
            yield from other

    batches = endless()
    for _ in run.epochs(3):
        for x in t.loader:
            t.learn(x[0])
            t.step()
        run.log(more=next(batches)[0].sum())


def left_over(run: Any, t: Tools, other: Any) -> None:
    for _ in run.epochs(1):
        t.held = iter(other)  # type: ignore[attr-defined]
        for x in t.loader:
            t.learn(x[0] + next(t.held)[0][0])  # type: ignore[attr-defined]
            t.step()
    for _ in range(3):
        for x in t.loader:
            t.learn(x[0])
            t.step()


def kept_and_seldom_used(run: Any, t: Tools, other: Any) -> None:
    held = None
    for epoch in run.epochs(4):
        if held is None:
            held = iter(other)
        for x in t.loader:
            t.learn(x[0] + (next(held)[0][0] if epoch % 2 == 0 else 0))
            t.step()


def kept_by_an_object(run: Any, t: Tools, other: Any) -> None:
    for _ in run.epochs(3):
        for x in t.loader:
            t.learn(x[0])
            t.step()
        t.held = iter(other)  # type: ignore[attr-defined]
        next(t.held)  # type: ignore[attr-defined]


def made_again_at_times(run: Any, t: Tools, other: Any) -> None:
    """As many loops do that count steps."""
    for step in run.steps(8):
        if step % 3 == 0:
            held = iter(other)
        t.learn(next(held)[0])
        t.step()


def made_in_each_turn_of_a_loader(run: Any, t: Tools, other: Any) -> None:
    for _ in run.epochs(3):
        for x in t.loader:
            held = iter(other)
            t.learn(x[0] + next(held)[0][0])
            t.step()


def made_in_some_turns_of_a_loader(run: Any, t: Tools, other: Any) -> None:
    for _ in range(7):
        for n, x in enumerate(t.loader):
            if n % 2 == 0:
                held = iter(other)
            t.learn(x[0] + next(held)[0][0])
            t.step()


def in_a_list_and_a_dict(run: Any, t: Tools, other: Any) -> None:
    more = t.loader
    held: Any = [None, {"a": None}]
    for step in run.steps(8):
        if step % 3 == 0:
            held[0] = iter(other)
        if step % 4 == 0:
            held[1]["a"] = iter(more)
        try:
            x = next(held[1]["a"])[0]
        except StopIteration:
            x = torch.zeros(3)
        t.learn(x + next(held[0])[0])
        t.step()


class Source:
    """Makes its iterator when it is asked first, and at its end."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.batches = loader, None

    def batch(self) -> Any:
        if self.batches is None:
            self.batches = iter(self.loader)
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)


def of_an_object_that_makes_it(run: Any, t: Tools, other: Any) -> None:
    source = Source(other)
    for _ in run.epochs(3):
        for n, x in enumerate(t.loader):
            t.learn(x[0] + (source.batch()[0][0] if n == 1 else 0))
            t.step()


def of_a_function_around(run: Any, t: Tools, other: Any) -> None:
    held = None

    def batch(step: int) -> Any:
        nonlocal held
        if step % 3 == 0:
            held = iter(other)
        return next(held)[0]  # type: ignore[call-overload]

    for step in run.steps(8):
        t.learn(batch(step))
        t.step()


HELD = [
    *(
        renewed,
        renewed_late,
        kept,
        begun_late,
        left_over,
        renewed_when_used,
        kept_and_seldom_used,
        kept_by_an_object,
    ),
    *(
        made_again_at_times,
        made_in_each_turn_of_a_loader,
        made_in_some_turns_of_a_loader,
        in_a_list_and_a_dict,
    ),
    *(of_an_object_that_makes_it, of_a_function_around),
]


@pytest.mark.parametrize(
    ("loop", "looked"),
    [*((loop, False) for loop in HELD), *((loop, True) for loop in (begun_late, made_again_at_times))],
)
def test_an_iterator_that_outlives_the_turn_that_made_it(loop: Any, looked: bool) -> None:
    """The variable that holds it holds it again in a resumed function, whatever that does with it."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        other = DataLoader(items(400), batch_size=2, shuffle=True)
        run.register(other=other)
        if looked:
            first = iter(other)
            t.learn(next(first)[0])
        loop(run, t, other)
        return t.result()

    cut_at_each_step(train)
    whole(train, waits=True)


def test_a_generator_of_an_earlier_turn_of_which_nothing_tells_if_it_is_used_again_is_refused() -> None:
    """What it has come to is its own: a resumed function begins it anew. Uncut it is refused too, in the second turn."""

    def endless(loader: Any) -> Any:
        while True:
            yield from loader

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader)
        other = DataLoader(items(40), batch_size=2, shuffle=True)
        run.register(other=other)
        for epoch in run.epochs(4):
            if epoch % 2 == 0:
                held = endless(other)
            for x in t.loader:
                t.learn(x[0] + (next(held)[0][0] if epoch % 2 == 0 else 0))
                t.step()

    for cuts in [(), (4,)]:
        with pytest.raises(
            RegisterError, match=r"made in an earlier turn .* Make it before the range begins"
        ):
            cut(train, cuts)


def saving_after_epochs(run: Any, DataLoader: Any) -> str:
    model, optimizer = parts()
    loader = DataLoader(items(), batch_size=2, shuffle=True)
    run.register(model=model, optimizer=optimizer, loader=loader)
    run.state["validated"] = 0.0
    for _ in run.epochs(3):
        for x in loader:
            run.step(loss=learn(model, optimizer, x), **marks(x, model))
        run.state["validated"] += float(torch.rand(()))
        run.save()
        run.state["validated"] *= 2
        run.log(validated=run.state["validated"])
    return digest(model.state_dict(), run.state)


def saving_between_loops(run: Any, DataLoader: Any) -> str:
    model, optimizer = parts()
    loader = DataLoader(items(), batch_size=2, shuffle=True)
    run.register(model=model, optimizer=optimizer, loader=loader)
    for x in loader:
        run.step(loss=learn(model, optimizer, x), **marks(x, model))
    run.state["drawn"] = float(torch.rand(()))
    run.save()
    run.state["drawn"] += 1
    for _ in run.steps(4):
        run.step(
            loss=learn(model, optimizer, torch.rand(2, 3)), drawn=run.state["drawn"], **marks(None, model)
        )
    return digest(model.state_dict(), run.state)


def saving_in_a_loop_of_its_own(run: Any, DataLoader: Any) -> str:
    model, optimizer = parts()
    run.register(model=model, optimizer=optimizer)
    run.state["turns"] = 0
    for index in range(8):
        run.step(loss=learn(model, optimizer, torch.rand(2, 3)), **marks(None, model))
        run.state["turns"] += 1
        if index == 2:
            run.save()
        run.log(turns=run.state["turns"])
    return digest(model.state_dict(), run.state)


@pytest.mark.parametrize(
    "train",
    [saving_after_epochs, saving_between_loops, saving_in_a_loop_of_its_own],
    ids=lambda f: f.__name__,
)
def test_a_checkpoint_asked_for_anywhere_can_be_gone_on_from(train: Any, tmp_path: Path) -> None:
    """save() at an epoch's end, between loops or after a step: a run killed later goes on from it exactly."""
    with Segment(tmp_path, (5,)) as run, pytest.raises(SegmentEnd):
        train(run, chainrun.DataLoader)
    saved, newest = sorted((tmp_path / "checkpoints").iterdir())
    assert saved.name < newest.name
    shutil.rmtree(newest)  # as if the job had been killed at that step
    assert plain(train).difference(cut(train, dir=tmp_path)) is None


# ---- between the loop and the loader -------------------------------------------------------------------


def _through(batches: Any) -> Any:
    yield from batches


NUMBERED: dict[str, Any] = {
    "enumerate": enumerate,
    "from 5": lambda loader: enumerate(loader, 5),
    "around a bar": lambda loader: enumerate(tqdm(loader, disable=None)),
    "inside a bar": lambda loader: tqdm(enumerate(loader), disable=None),
    "around generators": lambda loader: enumerate(_through(_through(loader))),
    "around map": lambda loader: enumerate(map(tuple, loader)),
}


@pytest.mark.parametrize("kind", NUMBERED)
def test_the_count_of_enumerate_goes_on(kind: str) -> None:
    """A loop that acts on the number of its batch: accumulation with a rest, a warm-up."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, n=8)
        for _ in run.epochs(2):
            for number, x in NUMBERED[kind](t.loader):
                t.learn(x[0] * (1 + number))
                t.step()
        return t.result()

    cut_everywhere(train, least=8)


def test_what_stands_around_a_held_iterator_may_change() -> None:
    """A second enumerate() around the same iterator counts as it says, whatever was found around it before."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, n=12)
        for _ in run.epochs(2):
            batches = iter(t.loader)
            for number, x in enumerate(batches):
                t.learn(x[0] * (1 + number))
                run.save()
                t.step()
                if number == 1:
                    break
            for number, x in enumerate(batches, 10):
                t.learn(x[0] * (1 + number))
                t.step()
        return t.result()

    cut_everywhere(train, least=12)


@pytest.mark.parametrize("kind", ["enumerate", "around a bar", "around map"])
def test_what_stands_around_a_loader_is_looked_for_once_a_pass(kind: str, monkeypatch: Any) -> None:
    """All objects of the process are asked for it, which no save should wait for again."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader, n=12)
        for _ in run.epochs(3):
            for number, x in NUMBERED[kind](t.loader):
                t.learn(x[0] * (1 + number))
                run.save()
                t.step()

    scope: dict[str, Any] = {"__name__": "chainrun.test", "look": wrapped._look, "looked": []}
    exec("def counted(iterator):\n    looked.append(1)\n    return look(iterator)", scope)  # among its frames
    monkeypatch.setattr(wrapped, "_look", scope["counted"])
    cut(train)
    assert len(scope["looked"]) == 3


def test_two_loaders_that_are_counted_together_go_on() -> None:
    """enumerate(zip(a, b)), and a count within it."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader, n=8)
        second = DataLoader(items(8), batch_size=2, shuffle=True)
        run.register(second=second)
        for _ in run.epochs(2):
            for number, (x, (inner, y)) in enumerate(zip(t.loader, enumerate(second, 1), strict=True)):
                t.learn(x[0] * (1 + number) + y[0] * inner)
                t.step()
        return t.result()

    cut_everywhere(train, least=8)


REMEMBER: dict[str, Any] = {
    "itertools.cycle": itertools.cycle,
    "itertools.islice": lambda loader: itertools.islice(loader, 3),
    "itertools.pairwise": itertools.pairwise,
    "zip": lambda loader: zip(loader, range(3), strict=False),
    "itertools.zip_longest": lambda loader: itertools.zip_longest(loader, [0]),
}


@pytest.mark.parametrize("kind", REMEMBER)
def test_iterators_that_remember_are_refused_at_the_second_batch(kind: str) -> None:
    """What they hold no checkpoint sees: said at once, and not where a cut is gone on from."""

    def train(run: Any, DataLoader: Any) -> None:
        t = Tools(run, DataLoader, n=8)
        for _ in run.epochs(2):
            for x in REMEMBER[kind](t.loader):
                t.learn(x[0][0] if isinstance(x, tuple) else x[0])
                t.step()

    with pytest.raises(RegisterError, match=rf"{kind}\(\) around the loader 'loader' begins anew"):
        cut(train)


def test_an_evaluation_of_some_batches_without_a_boundary_may_count_as_it_likes() -> None:
    """It is never cut inside."""

    def train(run: Any, DataLoader: Any) -> str:
        t = Tools(run, DataLoader)
        some = DataLoader(items(8), batch_size=2, shuffle=True)
        run.register(some=some)
        for _ in run.epochs(2):
            for x in t.loader:
                t.learn(x)
                t.step()
            for x in itertools.islice(some, 3):
                run.log(looked=t.model(x[0]).sum())
        return t.result()

    cut_everywhere(train, least=6)


def test_registering_inside_a_loop_is_refused() -> None:
    """A function resumed in a later turn would not register it."""

    def train(run: Any, DataLoader: Any) -> None:
        for _ in run.epochs(2):
            run.register(loader=DataLoader(items(), batch_size=2))

    with pytest.raises(RegisterError, match=r"register\(loader=...\) was called inside run.epochs\(\)"):
        cut(train)
