"""What is registered comes back with identical bits, or is refused with the name of what does not fit."""

from __future__ import annotations

import collections
import copy
import enum
import functools
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from chain import PlainRun, Segment, cut, cut_everywhere, digest, marks, plain, sweep
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

import chainrun
from chainrun.checkpoint import kinds
from chainrun.checkpoint.public import Checkpoint
from chainrun.errors import RegisterError, RestoreError


class Net(nn.Module):
    """Batch norm, dropout, tied weights, a buffer that counts, one that is not saved, and plain attributes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 1)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("recent", torch.zeros(3, dtype=dtype), persistent=False)
        self.calls = 0
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.count += 1
        x = self.second(self.drop(self.norm(self.first(x.to(self.recent.dtype)))))
        if self.training:
            self.recent.mul_(0.5).add_(x.detach().mean(0))
        return self.head(x + self.recent + self.calls / 10)


def training(make: Any, steps: int = 6, net: Any = Net) -> Any:
    """Return a training with what `make(model)` returns: a dict to register and a function that steps."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = net()
        things, step = make(model)
        run.register(model=model, **things)
        for n in run.steps(steps):
            x = torch.rand(4, 3)
            loss = step(n, model(x).float().square().mean())
            run.step(loss=loss, **marks((x, model.recent, model.calls), model, *things.values()))
        return digest(model.state_dict(), *(thing.state_dict() for thing in things.values()))

    return train


def _updating(optimizer: torch.optim.Optimizer, *after: Any) -> Any:
    def step(n: int, loss: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for each in after:
            each(loss)
        return loss

    return step


class MixedAdam(torch.optim.Optimizer):
    """Keeps fp32 moments and a fp32 copy of bf16 parameters, and an integer count per element."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.detach().float().clone()
                    state["moment"] = torch.zeros_like(state["master"])
                    state["count"] = torch.zeros_like(parameter, dtype=torch.int16)
                state["moment"].mul_(0.9).add_(parameter.grad.float(), alpha=1 / 3)
                state["count"] += 1
                state["master"].sub_(group["lr"] * state["moment"])
                parameter.data.copy_(state["master"])


def test_fp32_state_of_bf16_parameters_keeps_its_bits() -> None:
    """torch's own load_state_dict would round it to bf16."""

    def make(model: nn.Module) -> Any:
        optimizer = MixedAdam(model.parameters())
        return {"optimizer": optimizer}, _updating(optimizer)

    sweep(training(make, net=lambda: Net(torch.bfloat16)), 6)


def test_two_optimizers_over_parts_of_one_model() -> None:
    """Each with the gradients that it has not used yet."""

    def make(model: Any) -> Any:
        body = torch.optim.SGD([*model.first.parameters(), *model.norm.parameters()], lr=0.1, momentum=0.5)
        head = torch.optim.Adam([*model.head.parameters(), model.second.bias])

        def step(n: int, loss: torch.Tensor) -> torch.Tensor:
            loss.backward()
            for every, optimizer in ((2, body), (3, head)):
                if n % every == every - 1:
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        return {"body": body, "head": head}, step

    sweep(training(make, 8), 8)


def test_optimizers_that_share_parameters() -> None:
    """A gradient that one of them has used is still to be used by the other."""

    def make(model: Any) -> Any:
        often = torch.optim.SGD(model.parameters(), lr=0.1)
        seldom = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(n: int, loss: torch.Tensor) -> torch.Tensor:
            loss.backward()
            often.step()
            if n % 3 == 2:
                seldom.step()
                seldom.zero_grad()
            return loss

        return {"often": often, "seldom": seldom}, step

    sweep(training(make, 8), 8, quick=True)


def test_parts_that_are_frozen_and_thawed() -> None:
    """requires_grad, train and eval mode, and numbers set on modules are state."""

    def make(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(n: int, loss: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if n == 1:
                model.head.requires_grad_(False)
                model.norm.eval()
                model.drop.p = 0.5
            if n == 3:
                model.head.bias.requires_grad_(True)
                model.norm.train()
            return loss

        return {"optimizer": optimizer}, step

    sweep(training(make), 6)


def test_loose_parameters_without_an_optimizer() -> None:
    """A function that updates parameters by hand keeps gradients it has not used."""

    def train(run: Any, DataLoader: Any) -> str:
        image = nn.ParameterList([nn.Parameter(torch.rand(3))])
        run.register(image=image)
        for n in run.steps(6):
            (image[0] * torch.rand(3)).sum().backward()
            if n % 3 == 2:
                with torch.no_grad():
                    image[0] -= image[0].grad
                image[0].grad = None
            run.step(**marks(None, image))
        return digest(image.state_dict())

    sweep(train, 6)


def test_wrapped_modules_are_saved_without_their_wrappers() -> None:
    """A checkpoint of a compiled or data-parallel module fits the bare one, and back."""

    def train(wrap: Any) -> Any:
        def function(run: Any, DataLoader: Any) -> Any:
            model = nn.Linear(3, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            run.register(model=wrap(model), optimizer=optimizer)
            for _ in run.steps(6):
                run.log(loss=_updating(optimizer)(0, model(torch.rand(2, 3)).mean()))
            return list(model.state_dict())

        return function

    bare, parallel = train(lambda m: m), train(nn.DataParallel)
    compiled = train(lambda m: torch.compile(m, backend="eager"))
    reference = plain(bare)
    assert reference.difference(cut([compiled, parallel, bare, compiled], (1, 2, 3))) is None


def test_own_objects_with_state() -> None:
    """Two methods are enough; the object never gets hold of the checkpoint's own tensors."""

    class Mean:
        def __init__(self) -> None:
            self.sum, self.n = torch.zeros(3), 0

        def add(self, x: torch.Tensor) -> None:
            self.sum += x
            self.n += 1

        def state_dict(self) -> dict[str, Any]:
            return {"sum": self.sum, "n": self.n}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.sum, self.n = state["sum"], state["n"]

    def train(run: Any, DataLoader: Any) -> str:
        mean = Mean()
        run.register(mean=mean)
        mean.add(torch.ones(3))
        for _ in run.steps(4):
            mean.add(torch.rand(3))
            run.log(**marks(mean.sum, mean))
        return digest(mean.state_dict())

    sweep(train, 4)


def test_generators_of_all_kinds() -> None:
    """All four kinds, several bit generators, cached normal draws included."""

    def train(run: Any, DataLoader: Any) -> None:
        generators = {
            "pcg": np.random.default_rng(1),
            "philox": np.random.Generator(np.random.Philox(2)),
            "mersenne": np.random.Generator(np.random.MT19937(3)),
            "sfc": np.random.Generator(np.random.SFC64(4)),
            "old": np.random.RandomState(5),
            "python": random.Random(6),
            "torch": torch.Generator().manual_seed(7),
        }
        run.register(**generators)
        for _ in run.steps(6):
            draws = [
                *(generators[name].standard_normal() for name in ("pcg", "philox", "mersenne", "sfc", "old")),
                generators["pcg"].integers(2**31, dtype=np.uint32),
                generators["pcg"].spawn(1)[0].random(),
                generators["python"].gauss(0, 1),
                torch.randn((), generator=generators["torch"]).item(),
                *(random.gauss(0, 1), np.random.normal(), torch.randn(()).item()),
            ]
            run.log(draws=[float(draw) for draw in draws])

    sweep(train, 6)


# ---- refused -----------------------------------------------------------------------------------------


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    """A name stands for one object."""
    with Segment(tmp_path) as run:
        run.register(a=nn.Linear(1, 1))
        with pytest.raises(RegisterError, match=r"register\(a=...\) was called twice"):
            run.register(a=nn.Linear(1, 1))


def test_the_same_object_twice_is_refused(tmp_path: Path) -> None:
    """An object is registered once; a loader too."""
    module, loader = nn.Linear(1, 1), chainrun.DataLoader([1, 2])
    with Segment(tmp_path) as run:
        run.register(a=module, loader=loader)
        with pytest.raises(RegisterError, match="registered as 'a'; register it once"):
            run.register(b=module)
        with pytest.raises(RegisterError, match="registered as 'loader'; register it once"):
            run.register(other=loader)


@pytest.mark.parametrize("thing", [3, "text", [nn.Linear(1, 1)], nn.Linear, torch.zeros(2), None])
def test_an_object_without_state_is_refused(thing: Any, tmp_path: Path) -> None:
    """The message says where plain values go."""
    with (
        Segment(tmp_path) as run,
        pytest.raises(RegisterError, match=r"no state_dict and load_state_dict.*run\.state"),
    ):
        run.register(thing=thing)


def test_torchs_own_loader_is_refused(tmp_path: Path) -> None:
    """It cannot be resumed exactly; the message names the one that can."""
    loader = torch.utils.data.DataLoader(TensorDataset(torch.zeros(2)))
    with Segment(tmp_path) as run, pytest.raises(RegisterError, match=r"build it as chainrun\.DataLoader"):
        run.register(loader=loader)


def _two(names: tuple[str, str] = ("a", "b"), make: Any = lambda: nn.Linear(2, 2)) -> Any:
    def train(run: Any, DataLoader: Any) -> None:
        run.register(**{name: make() for name in names})
        for _ in run.steps(3):
            pass

    return train


def test_a_name_that_the_checkpoint_lacks_is_refused() -> None:
    """The message lists what it holds."""
    with pytest.raises(RestoreError, match="has no 'c', it holds a, b"):
        cut([_two(), _two(("a", "c"))], (1,))


def test_a_name_that_is_not_registered_any_more_is_refused() -> None:
    """Nothing of a checkpoint is dropped silently."""

    def one(run: Any, DataLoader: Any) -> None:
        run.register(a=nn.Linear(2, 2))
        for _ in run.steps(3):
            pass

    with pytest.raises(RestoreError, match="holds 'b', which the function has not registered"):
        cut([_two(), one], (1,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 2), r"weight has shape \(2, 3\), in the checkpoint \(2, 2\)"),
        (lambda: nn.Linear(2, 2).double(), r"weight is torch.float64, in the checkpoint torch.float32"),
        (lambda: nn.Linear(2, 2, bias=False), "bias is in the checkpoint only"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "is not in the checkpoint"),
    ],
)
def test_a_module_that_differs_is_refused_as_a_whole(make: Any, message: str) -> None:
    """Shape, dtype, missing and additional parameters: named, and nothing is restored."""
    made: list[nn.Module] = []

    def remember() -> nn.Module:
        torch.manual_seed(3)
        made.append(make())
        return made[-1]

    with pytest.raises(RestoreError, match=message):
        cut([_two(), _two(make=remember)], (1,))
    torch.manual_seed(3)
    assert digest(made[0].state_dict()) == digest(make().state_dict())


def _optimizing(*sizes: int, groups: int = 1, kind: Any = torch.optim.Adam) -> Any:
    def train(run: Any, DataLoader: Any) -> None:
        model = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in (1, 2)])
        parameters = [model[n - 1] for n in sizes]
        split = [{"params": parameters}] if groups == 1 else [{"params": [p]} for p in parameters]
        optimizer = kind(split)
        run.register(model=model, optimizer=optimizer)
        for _ in run.steps(3):
            if not run.resumed:
                sum((p**2).sum() for p in model).backward()
                optimizer.step()

    return train


@pytest.mark.parametrize(
    "other",
    [
        _optimizing(1),
        _optimizing(1, 2, groups=2),
        _optimizing(2, 1),
        _optimizing(1, 2, kind=lambda p: torch.optim.SGD(p, lr=0.1)),
    ],
    ids=["fewer parameters", "other groups", "other order", "other kind"],
)
def test_an_optimizer_that_differs_is_refused(other: Any) -> None:
    """Other groups, another order of the parameters, another algorithm."""
    with pytest.raises(RestoreError, match="the optimizer 'optimizer' is not the one that was saved"):
        cut([_optimizing(1, 2), other], (1,))


def test_a_checkpoint_that_cannot_hold_a_value_is_refused() -> None:
    """NumPy arrays of text in `run.state` could not be opened with weights_only: the path and the type are named."""

    def train(run: Any, DataLoader: Any) -> None:
        run.state["scores"] = [np.float64(2.0), np.array(["a"])]
        for _ in run.steps(3):
            pass

    with pytest.raises(chainrun.errors.ChainrunError, match=r"state\.scores\[1\] is a numpy\.ndarray"):
        cut(train, (1,))


def test_numbers_of_numpy_stay_what_they_are(tmp_path: Path) -> None:
    """In learning rates and `run.state`; a float32 is added to otherwise. The file is one that torch alone opens."""
    kinds: list[Any] = [np.float16, np.float32, np.float64, np.int8, np.uint64, np.bool_, np.complex64]

    def train(run: Any, DataLoader: Any) -> Any:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda n: np.interp(n, [0, 3, 9], [0.1, 1, 0]))
        run.register(model=model, optimizer=optimizer, scheduler=scheduler)
        momenta = np.linspace(0.8, 0.9, 60, dtype=np.float32)
        shared = run.state.setdefault("shared", [np.float32(0.1)])
        run.state.setdefault("again", shared)
        run.state.setdefault("kinds", {kind.__name__: (kind(1), "text") for kind in kinds})
        for n in run.steps(6):
            for group in optimizer.param_groups:
                group["betas"] = (momenta[n], 0.99)
            loss = model(torch.randn(4, 2)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.state["shared"][0] += 0.1
            run.step(loss=loss, sum=float(run.state["again"][0]))
        found = [type(one[0]).__name__ for one in run.state["kinds"].values()]
        return found, type(optimizer.param_groups[0]["lr"]).__name__, digest(model.state_dict())

    trained = sweep(train, 6)
    assert trained.result[:2] == ([kind.__name__ for kind in kinds], "float64")
    cut(train, (2,), dir=tmp_path)
    file = next((tmp_path / "checkpoints").glob("step-*/rank-00000.pt"))
    assert torch.load(file, weights_only=True)["state"]["kinds"]["float32"] == (1.0, "text")


class Played(NamedTuple):
    number: int
    gain: torch.Tensor


class Settings(dict):
    """Settings whose keys are attributes too."""

    __getattr__ = dict.__getitem__


class Recent(collections.OrderedDict):
    """Forgets what was asked for longest ago."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def ask(self, key: int) -> int:
        self[key] = self.get(key, 0) + 1
        self.move_to_end(key)
        if len(self) > self.most:
            self.popitem(last=False)
        return next(iter(self))


class Itself(dict):
    """Its attributes are its keys."""

    def __init__(self, path: str) -> None:
        super().__init__(path=path)
        self.__dict__ = self


class Phase(enum.Enum):
    WARM = "warm"
    COLD = "cold"


class Parts(enum.Flag):
    HEAD = 1
    BODY = 2


def test_values_of_all_kinds_stay_what_they_are(tmp_path: Path) -> None:
    """In `run.state` and in what a state_dict() returns: a replay memory, counts by key, arrays, members, settings."""

    class Buffer:
        def __init__(self) -> None:
            self.items: Any = collections.deque(maxlen=3)

        def state_dict(self) -> Any:
            return {"items": self.items}

        def load_state_dict(self, state: Any) -> None:
            self.items = state["items"]

    def train(run: Any, DataLoader: Any) -> Any:
        buffer, known = Buffer(), collections.deque([Played(-1, torch.zeros(2))], maxlen=4)
        run.register(buffer=buffer)
        state = run.state
        state.setdefault("memory", known)
        state.setdefault("again", [state["memory"]])
        for name, value in {
            "counts": collections.defaultdict(int),
            "sums": np.zeros(3),
            "phase": Phase.WARM,
            "settings": Settings(noise=1.0),
            "seen": frozenset({0}),
            "recent": Recent(2),
            "itself": Itself("here"),
            "parts": Parts.HEAD,
            "transposed": np.arange(6.0).reshape(2, 3).T,
        }.items():
            state.setdefault(name, value)
        array = state["sums"]
        for n in run.steps(8):
            x = torch.randn(2)
            state["memory"].append(Played(n, x))
            buffer.items.append((n, x.numpy()))
            state["counts"][n % 3] += 1
            array[n % 3] += x.sum().item()
            state["seen"] |= {n}
            state["settings"]["noise"] *= 0.5
            if n == 4:
                state["phase"] = Phase.COLD
                state["parts"] |= Parts.BODY
            state["itself"].gain = state["itself"].get("gain", 0) + n
            about = [
                state["recent"].ask(n % 4 % 3),
                state["recent"].most,
                state["itself"]["gain"],
                state["parts"].value,
            ]
            about += [
                state["counts"][1],
                state["transposed"].strides,
                array.sum(),
                sorted(state["seen"]),
                state["phase"].value,
            ]
            about += [state["settings"].noise, *(float(one.gain.sum()) for one in state["memory"])]
            run.step(about=str(about), kept=str([(number, one.sum()) for number, one in buffer.items]))
        assert state["again"][0] is state["memory"] and state["memory"].maxlen == 4 and array is state["sums"]
        return [type(state[name]).__name__ for name in state], type(state["memory"][0]).__name__

    trained = sweep(train, 8)
    kinds_there = ["deque", "list", "defaultdict", "ndarray", "Phase", "Settings", "frozenset"]
    assert trained.result[0] == [*kinds_there, "Recent", "Itself", "Parts", "ndarray"]
    cut(train, (2,), dir=tmp_path)
    file = next((tmp_path / "checkpoints").glob("step-*/rank-00000.pt"))
    saved = torch.load(file, weights_only=True)
    assert saved["state"]["phase"] == "COLD"
    # what a file says of classes must not have anything called
    harmless = {"a": ["echo"], kinds.PLACES: [(["a"], ["named", "os:system"])]}
    with pytest.raises(RestoreError, match=r"the class os\.system, which is not there any more"):
        kinds.join(harmless)
    apart = Checkpoint(file.parent).load()["buffer"]
    assert type(apart["items"]).__name__ == "deque"


def test_weights_in_the_state_that_are_no_copy_are_told_of() -> None:
    """`state_dict()` gives the weights that go on to change: after a resume they would be a copy."""

    def train(run: Any, DataLoader: Any, kept: Any) -> None:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run.register(model=model, optimizer=optimizer)
        for step in run.steps(4):
            model(torch.ones(2)).sum().backward()
            optimizer.step()
            if step == 1:
                run.state["best"] = kept(model, optimizer)

    live = {"model": lambda m, o: m.state_dict(), "optimizer": lambda m, o: [o.state_dict()["state"]]}
    for name, kept in live.items():
        said = [line for line in cut(functools.partial(train, kept=kept), (1, 3)).said if "shares" in line]
        assert len(said) == 1
        assert f"shares its memory with '{name}'" in said[0]
        assert said[0].startswith("warning: run.state['best'][")
    copies = functools.partial(
        train, kept=lambda m, o: copy.deepcopy([m.state_dict(), o.state_dict()["state"]])
    )
    assert not [line for line in cut(copies, (1, 3)).said if "shares" in line]


def test_arrays_that_are_views_of_one_stay_so() -> None:
    """What is written through one of them is seen in the others, of other strides and numbers too."""

    def train(run: Any, DataLoader: Any) -> float:
        kept = run.state
        if not kept:
            whole, words = np.arange(24.0).reshape(6, 4), np.zeros(8, dtype=np.int32)
            kept.update(whole=whole, left=whole[:, :2], some=whole[::2, 2:], words=words)
            tensor = torch.zeros(3)
            kept["in a list"] = [words, {"as floats": words[3:].view(np.float32)}, tensor, tensor.numpy()[1:]]
        for step in run.steps(8):
            kept["whole"][step % 6, 1] += step
            kept["left"][0] *= 1.5
            kept["some"][1] += kept["left"][1].sum()
            words, inside, tensor, part = kept["in a list"]
            words[4] += 1
            inside["as floats"][0] += 2.5
            part += 1
            tensor[2] *= 2
            run.step(arrays=digest(*(kept[name].tolist() for name in ("whole", "left", "some", "words"))))
        assert words is kept["words"]
        return float(kept["whole"].sum() + inside["as floats"].sum() + part.sum())

    cut_everywhere(train)


def test_the_order_of_a_set_is_not_restored() -> None:
    """It depends on what was in it before: only its members are."""

    def train(run: Any, DataLoader: Any) -> list[int]:
        pool = run.state.setdefault("pool", {*range(0, 4096, 64)})
        for n in run.steps(60):
            pool.discard(64 * n)
            run.step()
        return [*pool]

    reference, trained = plain(train).result, cut(train, (59,)).result
    assert sorted(trained) == sorted(reference)
    assert trained != reference


def test_state_that_no_checkpoint_can_hold_is_refused_at_the_first_step() -> None:
    """Not at the first save, which may be that of the job's last seconds; asking for it draws nothing from the streams."""

    class Holding:
        def __init__(self, what: Any) -> None:
            self.what = what

        def state_dict(self) -> dict[str, Any]:
            torch.rand(3)
            return {"what": self.what}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.what = state["what"]

    def training(what: Any, kept: Any = None) -> Any:
        def train(run: Any, DataLoader: Any) -> None:
            run.register(holding=Holding(what))
            run.state["kept"] = kept
            for _ in run.steps(6):
                run.step(drawn=torch.rand(()))

        return train

    with pytest.raises(
        RegisterError, match=r"objects\.holding\.what is a re\.Pattern, which a checkpoint cannot hold"
    ):
        cut(training(re.compile("")))
    with pytest.raises(
        RegisterError, match=r"run\.state\.kept is a re\.Pattern, which a checkpoint cannot hold"
    ):
        cut(training(1, re.compile("")))
    sweep(training(np.float64(1)), 6)


def test_an_optimizer_whose_module_is_not_registered_is_refused() -> None:
    """A resume would bring the moments back, and fresh weights; the first step says so."""

    def train(run: Any, DataLoader: Any) -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.register(optimizer=optimizer)
        for _ in run.steps(3):
            pass

    with pytest.raises(RegisterError, match=r"trains 2 parameters, the first of shape \(1, 2\), that no"):
        cut(train)


def test_a_loose_parameter_goes_on_where_it_is_registered_as_the_refusal_says() -> None:
    """As the temperature of soft actor-critic; a list of another tensor than a Parameter has a copy of it."""

    def train(run: Any, DataLoader: Any, make: Any = nn.Parameter) -> str:
        loose = make(torch.zeros(1))
        optimizer = torch.optim.Adam([loose], lr=0.1)
        run.register(loose=nn.ParameterList([loose]), optimizer=optimizer)
        for _ in run.steps(4):
            optimizer.zero_grad()
            loss = (loose.exp() * torch.randn(1)).sum()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
        return digest(loose)

    sweep(train, 4)
    with pytest.raises(RegisterError, match=r"register torch\.nn\.ParameterList"):
        cut(lambda run, DataLoader: train(run, DataLoader, lambda tensor: tensor.requires_grad_()))


def test_a_scheduler_that_is_not_registered_is_warned_of() -> None:
    """It may be on purpose, so the run goes on."""

    def train(run: Any, DataLoader: Any) -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
        run.register(model=model, optimizer=optimizer)
        for _ in run.steps(3):
            optimizer.step()

    said = cut(train).said
    assert any("scheduler drives the optimizer 'optimizer' and is not registered" in line for line in said)


def test_the_plain_stand_in_has_what_a_run_has(tmp_path: Path) -> None:
    """The plain program of these tests may use no more than what `Run` offers."""
    with Segment(tmp_path) as run:
        missing = [
            name
            for name in vars(PlainRun())
            if name not in ("lines", "_boundaries") and not hasattr(run, name)
        ]
    assert missing == []


def test_tensors_by_modules_in_an_optimizer_are_told(tmp_path: Path) -> None:
    """No checkpoint can hold them, since a resumed run has other modules: the first step says so."""

    class Conditioned(torch.optim.SGD):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module.parameters(), lr=0.1)
            self.factors, self.names = {module: torch.eye(2)}, {module: "a name"}

    segment = Segment(tmp_path)
    with segment as run:
        model = nn.Linear(2, 2)
        run.register(model=model, optimizer=Conditioned(model))
        run.step()
    told = [line for line in segment.said if "by modules or parameters, which is not saved" in line]
    assert [line.split("'")[3] for line in told] == ["factors"]


def test_an_optimizer_that_is_not_registered_is_told(tmp_path: Path) -> None:
    """One made anew in each epoch trains registered weights, and a cut loses its moments: the first step says so."""
    segment = Segment(tmp_path)
    with segment as run:
        model = nn.Linear(2, 2)
        run.register(model=model)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        run.step()
    assert [line for line in segment.said if "Adam) that trains 'model' is not registered" in line]
