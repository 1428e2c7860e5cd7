"""Modules of all kinds: lazy, compiled, checkpointed, copied, tied, with tensors of all kinds."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import enum
import itertools
import pickle
import random
import types
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from chain import cut, cut_everywhere, digest, marks, plain, sweep, sweep_boundaries
from test_training_objects import STEPS, small, training, updating
from torch import nn, optim
from torch.nn.utils import parametrizations, prune
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from chainrun.checkpoint.objects import adapt
from chainrun.errors import RegisterError, RestoreError

# ---- averages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [True, False])
def test_exponential_moving_average(buffers: bool) -> None:
    """Averages of weights, and of buffers where asked for, go on."""

    def make(model: nn.Module) -> Any:
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        average = swa_utils.AveragedModel(
            model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=buffers
        )
        update = lambda n, loss: average.update_parameters(model)  # noqa: E731
        return {"optimizer": optimizer, "average": average}, updating(model, optimizer, update)

    cut_everywhere(training(make), least=STEPS)


def test_stochastic_weight_averaging() -> None:
    """AveragedModel, SWALR after another scheduler, and update_bn with a boundary after every batch."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = small()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        average = swa_utils.AveragedModel(model)
        first = optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        then = swa_utils.SWALR(optimizer, 0.02, anneal_epochs=2)
        loader = DataLoader(torch.randn(12, 3), batch_size=4, shuffle=True)
        things = {"model": model, "optimizer": optimizer, "average": average, "first": first, "then": then}
        run.register(**things, loader=loader)
        step = updating(model, optimizer)
        for epoch in run.epochs(3):
            for x in loader:
                run.step(loss=step(0, x), **marks(x, *things.values()))
            if epoch < 1:
                first.step()
            else:
                average.update_parameters(model)
                then.step()

        def batches() -> Any:
            for x in loader:
                yield x
                run.log(**marks(x, average))
                run.poll()

        swa_utils.update_bn(batches(), average)
        return digest(
            average.state_dict(), *(m.momentum for m in average.modules() if hasattr(m, "momentum"))
        )

    sweep_boundaries(train, 12)


# ---- modules ---------------------------------------------------------------------------------------------


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Dropout(0.2), nn.LazyLinear(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantization_aware_training() -> None:
    """The observers of weights have a shape of their own from the first batch on; they are switched off later."""
    from torch.ao import quantization

    def train(run: Any, DataLoader: Any) -> Any:
        model = nn.Sequential(
            quantization.QuantStub(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), quantization.DeQuantStub()
        )
        model.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        quantization.prepare_qat(model, inplace=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.register(model=model, optimizer=optimizer)
        for n in run.steps(6):
            if n == 3:
                model.apply(quantization.disable_observer)
            x = torch.randn(4, 3)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss, **marks(x, model, optimizer))
        return digest(model.state_dict())

    sweep(train, 6)


def test_lazy_modules() -> None:
    """Parameters that are made in the first forward have their shapes from the checkpoint afterwards."""

    def make(model: nn.Module) -> Any:
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        return {"optimizer": optimizer}, updating(model, optimizer)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules")
        cut_everywhere(training(make, net=lazy), least=STEPS)


def test_parameters_that_get_their_first_gradient_late() -> None:
    """Their moments appear in the middle of the training."""

    def make(model: Any) -> Any:
        optimizer = optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
        for each in model[0].parameters():
            each.requires_grad_(False)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            if n == 7:
                model[0].requires_grad_(True)
            if n == 13:
                model[4].requires_grad_(False)
            return updating(model, optimizer)(n, x)

        return {"optimizer": optimizer}, step

    cut_everywhere(training(make), least=STEPS)


class Tied(nn.Module):
    """A tied weight, a buffer that is a view of another, and a parameter that is a view of a flat tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.randn(12)
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.part = nn.Parameter(self.flat[3:6])
        self.register_buffer("history", torch.zeros(4, 3))
        self.register_buffer("last", self.history[3])
        self.register_buffer("hidden", self.history[0], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x)) * self.part
        if self.training:
            self.history.mul_(0.5)
            self.last.add_(x.detach().mean(0) + self.flat[4])
            self.hidden.add_(1)
        return x + self.history.sum(0)


def test_tied_weights_and_views() -> None:
    """What shared memory shares it again: the next step changes both."""

    def make(model: Any) -> Any:
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.5)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            loss = updating(model, optimizer)(n, x)
            assert model.second.weight is model.first.weight
            assert model.last.data_ptr() == model.history[3].data_ptr()
            return loss

        return {"optimizer": optimizer}, step

    cut_everywhere(training(make, net=Tied), least=STEPS)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("before", [True, False])
def test_compiled_modules(backend: str, before: bool) -> None:
    """Compiled before or after it is registered."""

    def train(run: Any, DataLoader: Any) -> Any:
        torch._dynamo.reset()
        model = bare = small()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        if before:
            model = torch.compile(model, backend=backend)
        run.register(model=model, optimizer=optimizer)
        if not before:
            model = torch.compile(model, backend=backend)
        step = updating(model, optimizer)
        for n in run.steps(6):
            x = torch.randn(4, 3)
            run.step(loss=step(n, x), **marks(x, bare, optimizer))
        return digest(bare.state_dict())

    sweep(train, 6, quick=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    """The forward that runs again in the backward draws the same dropout."""

    def make(model: Any) -> Any:
        optimizer = optim.AdamW(model.parameters(), lr=0.01)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            x = model[0](x)
            loss = model[4](checkpoint(model[1:4], x, use_reentrant=reentrant)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return {"optimizer": optimizer}, step

    cut_everywhere(training(make), least=STEPS)


def test_a_registered_copy() -> None:
    """A copy made after register() and registered itself goes on; so does the snapshot of the best weights."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = small()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        run.register(model=model, optimizer=optimizer)
        teacher = copy.deepcopy(model).eval()
        run.register(teacher=teacher)
        step = updating(model, optimizer)
        for n in run.steps(STEPS):
            x = torch.randn(4, 3)
            loss = step(n, x) + teacher(x).mean().detach()
            if n % 3 == 1:
                teacher.load_state_dict(copy.deepcopy(model).state_dict())
            if n == 9:  # all goes on with a copy of the model's present state
                run.state["best"] = copy.deepcopy(model.state_dict())
            if n == 15:
                model.load_state_dict(run.state["best"])
            run.step(loss=loss, **marks(x, model, teacher, optimizer))

    cut_everywhere(train, least=STEPS)


def test_a_module_that_changes_between_register_and_the_loop_is_refused() -> None:
    """No resume could load what is saved of it; one that changes in the loop's first turn may know a way."""

    def cut_off(model: nn.Module) -> None:
        prune.random_unstructured(model[0], "weight", 0.5)

    def compute(model: nn.Module) -> None:
        parametrizations.weight_norm(model[2])

    def note(model: nn.Module) -> None:
        model[0].register_buffer("seen", torch.zeros(2), persistent=False)

    def training_that(change: Any, *, inside: bool = False) -> Any:
        def train(run: Any, DataLoader: Any) -> None:
            model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
            run.register(model=model)
            if not inside:
                change(model)
            for n in run.steps(STEPS):
                if n == 0 and inside:
                    change(model)
                run.step(loss=model(torch.randn(4, 3)).mean())

        return train

    with pytest.raises(RegisterError, match="weight_orig' has come; '0"):
        cut(training_that(cut_off))
    with pytest.raises(RegisterError, match="'model' was changed after it was registered: '2"):
        cut(training_that(compute))
    cut_everywhere(training_that(note), least=STEPS)
    cut(training_that(cut_off, inside=True))


class Mode(enum.Enum):
    EASY = 1
    HARD = 2


class Moody(nn.Linear):
    def __init__(self, kind: type[enum.Enum]) -> None:
        super().__init__(2, 2)
        self.mode = kind(1)


def test_a_member_of_an_enumeration_in_a_module_is_left_as_it_is() -> None:
    """It is one object for all: what a module holds of it must not be written into another member."""

    class Local(enum.Enum):
        EASY = 1
        HARD = 2

    def training_with(kind: type[enum.Enum]) -> Any:
        def train(run: Any, DataLoader: Any) -> int:
            model = Moody(kind)
            run.register(model=model)
            for n in run.steps(4):
                if n == 0:
                    model.mode = kind(2)
                run.step()
            return int(model.mode.value)

        return train

    for kind in (Mode, Local):
        assert cut(training_with(kind), (1, 2, 3)).stopped_at == [1, 2, 3]
        assert [mode.value for mode in kind] == [1, 2]
    assert cut(training_with(Mode), (1, 2, 3)).result == 2


def test_a_copy_that_is_not_registered_is_refused() -> None:
    """A resumed run would make it of restored weights; one made before, or gone again, is no harm."""

    def training_with(kind: str) -> Any:
        def train(run: Any, DataLoader: Any) -> Any:
            model = small()
            frozen = (
                copy.deepcopy(model).eval() if kind == "before" else None
            )  # whose averages change in train()
            run.register(model=model)
            if kind == "gone":
                copy.deepcopy(model)
            if kind == "after":
                frozen = copy.deepcopy(nn.ModuleList([model]))
            for _ in run.steps(STEPS):
                run.step(loss=(frozen or model)(torch.randn(4, 3)).mean() if kind != "after" else 0)

        return train

    for kind in ("before", "gone"):
        cut_everywhere(training_with(kind), least=STEPS)
    with pytest.raises(RegisterError, match="'model' was copied after it was registered"):
        cut(training_with("after"))
    model = small()
    adapt("model", model)
    assert vars(pickle.loads(pickle.dumps(model)))["_chainrun_mark"] is None


# ---- kinds of tensors ------------------------------------------------------------------------------------


def _counted(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8).view(dtype)


SPARSE = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
TENSORS: dict[str, Any] = {
    **{
        str(dtype).removeprefix("torch."): lambda dtype=dtype: _counted(dtype)
        for dtype in (
            *(torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
            *(torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.complex64),
        )
    },
    "complex32": lambda: _counted(torch.complex32),
    "coo": SPARSE.to_sparse,
    "coo uncoalesced": lambda: torch.sparse_coo_tensor(
        torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (2,)
    ),
    "csr": SPARSE.to_sparse_csr,
    "csc": SPARSE.to_sparse_csc,
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantized": lambda: torch.quantize_per_tensor(torch.tensor([0.1, 0.5]), 0.1, 1, torch.qint8),
    "conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "empty": lambda: torch.empty(0, 3),
}


def bits(tensor: torch.Tensor) -> str:
    """As digest, of tensors of all layouts; the repr shows strides of views, zero points and scales."""
    if tensor.layout == torch.strided and not tensor.is_quantized:
        return digest(tensor.resolve_conj().contiguous(), tensor.stride())
    return digest(repr(tensor), str(tensor.layout))


@pytest.mark.parametrize("kind", TENSORS)
def test_kinds_of_tensors(kind: str) -> None:
    """In a buffer, saved or not, in the optimizer's state and in run.state; each is replaced on the way."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = nn.Linear(2, 1)
        model.register_buffer("saved", TENSORS[kind]())
        model.register_buffer("unsaved", TENSORS[kind](), persistent=False)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        run.register(model=model, optimizer=optimizer)
        run.state.setdefault("tensor", TENSORS[kind]())
        for n in run.steps(4):
            updating(model, optimizer)(n, torch.randn(2, 2))
            if n == 1:
                if kind != "quantized":  # torch's own load_state_dict cannot take one
                    optimizer.state[model.weight]["kind"] = TENSORS[kind]()
                model.unsaved = TENSORS[kind]()
                run.state["later"] = [TENSORS[kind]()]
            found = [model.saved, model.unsaved, run.state["tensor"], *run.state.get("later", ())]
            found += [value for value in optimizer.state[model.weight].values() if value is not None]
            run.log(**{f"tensor{i}": bits(each) for i, each in enumerate(found)}, **marks(None))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Sparse|sparse|quantize|TypedStorage|ComplexHalf).*")
        sweep(train, 4, quick=True)


REFUSED: dict[str, Any] = {
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "int4": lambda: _counted(torch.int4),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "nested strided": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_that_a_checkpoint_cannot_hold(kind: str) -> None:
    """They are refused at the save, by the place where they are."""

    def train(run: Any, DataLoader: Any) -> Any:
        run.state["odd"] = [REFUSED[kind]()]
        for _ in run.steps(3):
            pass

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(nested|Nested).*")
        with pytest.raises(RegisterError, match=r"run\.state\.odd\[0\] is a tensor that torch cannot save"):
            cut(train, (1,))


def test_settings_that_are_no_numbers() -> None:
    """A momentum of None, and a mode in a string, set inside a loop, are what they were after a cut."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mode = "plain"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if self.mode == "double" else x

    def train(run: Any, DataLoader: Any) -> str:
        norms = [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3, momentum=None)]
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), *norms, Scaled(), torch.nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.register(model=model, optimizer=optimizer)
        for step in run.steps(8):
            if step == 3:
                norms[0].momentum, norms[1].momentum, model[3].mode = None, 0.1, "double"
            loss = model(torch.randn(4, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss, **marks(None, model, optimizer))
        return digest(model.state_dict())

    sweep(train, 8, quick=True)


class Remembering(nn.Module):
    """Keeps state where state_dict() does not look; `flags` has one thing of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 3)
        self.running = torch.zeros(3)
        self.alias = self.running
        self.history: list[Any] = []
        self.shared = self.history
        self.limits = (0.0, 1.0)
        self.counts = {"calls": 0, "last": torch.zeros(3)}
        self.seen: set[int] = set()
        self.hidden = None
        self.register_buffer("mean", torch.zeros(3), persistent=False)
        self.register_buffer("scale", torch.ones(3), persistent=False)
        self.register_buffer("constant", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.line(x)
        with torch.no_grad():
            self.running.mul_(0.9).add_(x.mean(0))
            self.mean.data.mul_(0.5).add_(x.mean(0))  # no version tells
            self.scale.numpy()[0] += 0.25
        self.history.append(float(x.detach().sum()))
        self.limits = (self.limits[0] - 0.1, max(self.limits[1], self.history[-1]))
        self.counts["calls"] += 1
        self.counts["last"] = x.detach()[0]
        self.seen.add(len(self.history) % 5)
        if self.hidden is not None:
            x = x + 0.1 * self.hidden.detach()
        self.hidden = x.mean(0)  # with what it was computed from
        if len(self.history) > 3:
            self.late = [self.running * 2, "late"]
        x = x + self.alias + self.mean * self.scale + self.counts["last"] + len(self.shared) / 10
        return x * self.limits[1] + len(self.seen) + (self.late[0] if hasattr(self, "late") else 0)


def test_attributes_of_modules_that_have_changed() -> None:
    """Tensors, lists, tuples, dicts and sets, buffers written to unnoticed: exact, and shared where they were."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = nn.Sequential(Remembering(), nn.Linear(3, 1))
        optimizer = optim.SGD(model.parameters(), lr=1e-3)
        run.register(model=model, optimizer=optimizer)
        step = updating(model, optimizer)
        for n in run.steps(10):
            x = torch.randn(4, 3)
            if n == 6:
                model[0].running = torch.ones(3)  # no longer shared
            kept = {**vars(model[0]), **model[0]._buffers}
            names = ("running", "history", "limits", "mean", "scale", "hidden")
            found = [kept[name] for name in names]
            assert model[0].shared is model[0].history
            assert (model[0].alias is model[0].running) == (n < 6)
            run.step(loss=step(n, x), **marks((x, found), model, optimizer))
        return digest(model.state_dict())

    sweep(train, 10)


def test_attributes_that_have_not_changed_are_not_saved() -> None:
    """A table of a module's own, its sizes, the weights of a recurrent layer: a checkpoint gets nothing new."""
    model = nn.Sequential(Remembering(), nn.LSTM(3, 3), nn.Conv2d(1, 1, 3))
    model[0].table = {n: str(n) for n in range(1000)}
    adapted = adapt("model", model)
    before = adapted.extra()["attributes"]
    optimizer = optim.SGD(model[1].parameters(), lr=0.1)
    model[1](torch.ones(2, 3))[0].sum().backward()
    optimizer.step()
    assert before["values"] == adapted.extra()["attributes"]["values"] == {}


class Recorder:
    """A hook that keeps a running mean, and adds it."""

    def __init__(self) -> None:
        self.mean, self.calls = torch.zeros(3), 0

    def __call__(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        self.mean = self.mean * 0.9 + out.detach().mean(0) * 0.1
        return self.count(module, args, out + self.mean)

    def count(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return out / self.calls


@pytest.mark.parametrize("bound", [False, True])
def test_objects_in_hooks(bound: bool) -> None:
    """Such an object is called with the module, and no variable needs to hold it."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        hook = Recorder()
        model[0].register_forward_hook(hook.count if bound else hook)
        del hook
        loader = DataLoader(torch.randn(12, 3), batch_size=4, shuffle=True)
        run.register(model=model, optimizer=optimizer, loader=loader)
        step = updating(model, optimizer)
        for n in run.epochs(3):
            for x in loader:
                run.step(loss=step(n, x))
        return digest(model.state_dict())

    cut_everywhere(train, least=9)


def swap_a_layer(model: nn.Module) -> None:
    model[1] = nn.Tanh()  # type: ignore[operator]


def swap_a_function(model: nn.Module) -> None:
    model.act = torch.tanh


def add_a_hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, out: out * 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_a_layer, "'1' was Tanh and is ReLU here"),
        (swap_a_function, "'act' was .*tanh and is nothing here"),
        (add_a_hook, "'_forward_hooks' was .*lambda.* and is nothing here"),
    ],
)
def test_a_module_that_the_loop_changes_is_refused_where_it_is_not_changed_again(
    change: Any, message: str
) -> None:
    """At the first boundary after the resume: the head of the turn that goes on may make the change once more."""

    def training_that_changes(when: Any, before: Any = lambda run: False) -> Any:
        def train(run: Any, DataLoader: Any) -> Any:
            model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
            if before(run):
                change(model)
            optimizer = optim.SGD(model.parameters(), lr=0.1)
            loader = DataLoader(torch.randn(12, 3), batch_size=4, shuffle=True)
            run.register(model=model, optimizer=optimizer, loader=loader)
            step = updating(model, optimizer)
            for n in run.epochs(3):
                if when(n):
                    change(model)
                for x in loader:
                    run.step(loss=step(n, x))
            return digest(model.state_dict())

        return train

    once = training_that_changes(lambda n: n == 1)
    reference = plain(once)
    for cuts in ((3,), (4, 5), (6,)):  # the turn that goes on makes it again
        assert reference.difference(cut(once, cuts)) is None
    for cuts in ((7,), (8,)):
        with pytest.raises(RestoreError, match=message):
            cut(once, cuts)
    by_hand = training_that_changes(lambda n: n == 1, lambda run: run.resumed and run.global_step > 6)
    assert reference.difference(cut([once, by_hand], (7,))) is None


class Drawing(nn.Module):
    """Draws from generators of its own, and of an object in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.generator = torch.Generator().manual_seed(1)
        self.streams = {"python": random.Random(2)}
        self.noise = Noise()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rand(x.shape, generator=self.generator) * self.streams["python"].random()
        made: torch.Tensor = self.layer(x) + self.noise.level()
        return made


class Noise:
    def __init__(self) -> None:
        self.stream = np.random.default_rng(3)

    def level(self) -> float:
        return float(self.stream.random())


def test_generators_in_modules() -> None:
    """They are random state like any other, nested modules' too."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = nn.Sequential(Drawing(), nn.ReLU(), Drawing())
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(torch.randn(12, 4), batch_size=4, shuffle=True)
        run.register(model=model, optimizer=optimizer, loader=loader)
        step = updating(model, optimizer)
        for n in run.epochs(4):
            offset = model[0].noise.level()  # again in a turn that is begun again
            for x in loader:
                run.step(loss=step(n, x + offset), **marks(x, model, optimizer))
        return digest(model.state_dict())

    sweep(train, 12)


class Schedule:
    """An object of the user's own, without a state_dict."""

    def __init__(self) -> None:
        self.calls, self.inner, self.file = 0, Inner(), None

    def __call__(self) -> float:
        self.calls += 1
        self.inner.seen.append(self.calls)
        return 1 / self.calls + self.inner.seen[-1]


class Inner:
    def __init__(self) -> None:
        self.seen: collections.deque[int] = collections.deque(maxlen=3)


def test_arrays_deques_and_objects_in_modules_that_have_changed() -> None:
    """Exact, in place where others know them; what was made later comes too."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = nn.Sequential(nn.Linear(3, 1))
        model.array, model.deque = np.zeros(3), collections.deque([1], maxlen=4)
        model.number, model.schedule = np.float32(1), Schedule()  # type: ignore[assignment]
        known = model.array, model.deque, model.schedule
        optimizer = optim.SGD(model.parameters(), lr=1e-3)
        run.register(model=model, optimizer=optimizer)
        step = updating(model, optimizer)
        for n in run.steps(10):
            model.array[n % 3] += model.schedule()  # type: ignore[index, operator]
            model.deque.append(n)  # type: ignore[operator]
            model.number = model.number * np.float32(1.5)  # type: ignore[operator, assignment]
            if n == 5:
                model.late = np.ones(2, dtype=np.int64)  # type: ignore[assignment]
            assert all(a is b for a, b in zip(known, (model.array, model.deque, model.schedule), strict=True))
            found = [model.array.tolist(), [*model.deque], float(model.number), [*model.schedule.inner.seen]]  # type: ignore
            found += [model.late.tolist()] if n > 5 else []  # type: ignore[operator]
            run.step(loss=step(n, torch.randn(4, 3) + sum(found[0])), **marks(found, model, optimizer))
        assert isinstance(model.number, np.float32) and model.deque.maxlen == 4
        return digest(model.state_dict())

    sweep(train, 10)


class Stop:
    """Tells after how many losses that are no better."""

    def __init__(self) -> None:
        self.best, self.waited, self.seen = 9.0, 0, []

    def __call__(self, loss: float) -> None:
        self.waited = 0 if loss < self.best else self.waited + 1
        self.best = min(self.best, loss)
        self.seen.append(loss)


def test_settings_and_containers_of_objects_in_modules_are_exact() -> None:
    """`self.args = args`, which the training goes on to change; callbacks in a list, meters in a dict, some swapped."""

    def train(run: Any, DataLoader: Any) -> Any:
        args = argparse.Namespace(weight=1.0, of=types.SimpleNamespace(noise=1.0))
        model: Any = nn.Sequential(nn.Linear(3, 1))
        model.args, model.callbacks, model.nested = args, [Stop(), len, Stop()], {"a": (Stop(), [Stop()])}
        model.ordered = collections.OrderedDict(a=Stop(), b=1)
        known = model.callbacks[2]
        optimizer = optim.SGD(model.parameters(), lr=1e-3)
        run.register(model=model, optimizer=optimizer)
        step = updating(model, optimizer)
        for n in run.steps(10):
            stops = [*model.callbacks[::2], model.ordered["a"], model.nested["a"][0], *model.nested["a"][1]]
            numbers = [
                args.weight,
                args.of.noise,
                *(stop.best + stop.waited + sum(stop.seen) for stop in stops),
            ]
            loss = step(n, torch.randn(4, 3) + sum(numbers) / 9)
            for stop in stops[n % 2 :]:
                stop(loss.item())
            args.weight *= 0.9
            args.of.noise /= 2
            if n == 5:
                model.callbacks[::2] = [known, model.callbacks[0]]
            assert known is model.callbacks[2 if n < 5 else 0]
            run.step(loss=loss)
        return digest(model.state_dict(), numbers)

    sweep(train, 10)


def test_a_list_of_objects_in_a_module_that_grows_is_told_of() -> None:
    """The objects that have come are not made again: the resumed function has fewer of them."""

    def train(run: Any, DataLoader: Any) -> None:
        model: Any = nn.Linear(3, 1)
        model.callbacks = [Stop()]
        run.register(model=model)
        for n in run.steps(4):
            for stop in model.callbacks:
                stop(float(n))
            if n == 1:
                model.callbacks.append(Stop())

    said = cut(train, (3,)).said
    assert any("differs from what the segment before had: model.callbacks" in line for line in said), said


class Size(NamedTuple):
    width: float
    name: str


class Settings(dict):
    """Settings whose keys are attributes too."""

    __getattr__ = dict.__getitem__


@dataclasses.dataclass(frozen=True)
class Strength:
    value: float


def test_values_of_all_kinds_in_modules_are_exact_at_every_cut() -> None:
    """Members, named tuples, dicts and frozen data classes of the user's, defaultdicts, dtypes, bytes: as they were."""

    def train(run: Any, DataLoader: Any) -> Any:
        model: Any = nn.Sequential(nn.Linear(3, 1))
        model.mode, model.size, model.settings = Mode.EASY, Size(1.0, "a"), Settings(noise=1.0)
        model.strength, model.seen = Strength(1.0), collections.defaultdict(int)
        model.dtype, model.code, model.known = torch.float32, b"ab", frozenset({1})
        optimizer = optim.SGD(model.parameters(), lr=1e-3)
        run.register(model=model, optimizer=optimizer)
        step = updating(model, optimizer)
        for n in run.steps(8):
            numbers = [model.mode.value, model.size.width, model.settings.noise, model.strength.value]
            numbers += [model.seen["steps"], model.code[0], max(model.known)]
            run.step(loss=step(n, (torch.randn(4, 3) + sum(numbers) / 9).to(model.dtype).float()))
            if n == 2:
                model.mode, model.dtype = Mode.HARD, torch.bfloat16
            model.size = model.size._replace(width=model.size.width / 2)
            model.settings["noise"] *= 0.5
            model.strength = Strength(model.strength.value * 0.5)
            model.seen["steps"] += 1
            model.code, model.known = model.code[::-1], frozenset({n})
        return digest(model.state_dict()), type(model.settings).__name__, type(model.size).__name__

    cut_everywhere(train, least=8)


@dataclasses.dataclass(slots=True)
class Pace:
    rate: float


PACES = [Pace(1.0), Pace(0.5), Pace(0.25)]


def test_what_is_replaced_in_a_module_is_not_written_to() -> None:
    """Another object of the user's in its place, one of the module's own or one that others hold, is restored as that."""

    def train(run: Any, DataLoader: Any) -> Any:
        model: Any = nn.Sequential(nn.Linear(3, 1))
        model.pace, model.one, model.other = PACES[0], Strength(1.0), Schedule()
        model.another = Schedule()
        model.active = model.other
        optimizer = optim.SGD(model.parameters(), lr=1e-3)
        run.register(model=model, optimizer=optimizer)
        step = updating(model, optimizer)
        for n in run.steps(8):
            run.step(
                loss=step(
                    n,
                    torch.randn(4, 3) * (model.pace.rate + model.one.value + model.active() + model.other()),
                )
            )
            model.pace = PACES[n % 3]
            model.active = (model.other, model.another)[n % 2]
            assert [pace.rate for pace in PACES] == [1.0, 0.5, 0.25]
        return digest(model.state_dict())

    cut_everywhere(train, least=8)


def test_an_object_in_a_module_that_has_opened_a_file_is_left_alone() -> None:
    """Its count may tell that the file is open, which it is not in another process."""

    def train(run: Any, DataLoader: Any) -> int:
        model = nn.Linear(3, 1)
        model.schedule = Schedule()  # type: ignore[assignment]
        run.register(model=model)
        for _ in run.steps(4):
            model.schedule()  # type: ignore[operator]
            model.schedule.file = model.schedule.file or object()  # type: ignore
        return model.schedule.calls  # type: ignore

    assert plain(train).result == 4
    assert cut(train, (1, 3)).result == 1


def test_attributes_of_other_kinds_are_as_they_were_built() -> None:
    """An array of objects, a list that holds itself, an iterator: neither saved nor in the way."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = nn.Linear(3, 1)
        model.array, model.thing = np.array(["a"], dtype=object), object()  # type: ignore[assignment]
        model.loop = []  # type: ignore[assignment]
        model.loop.append(model.loop)  # type: ignore[operator]
        model.count = itertools.count()  # type: ignore[assignment]
        run.register(model=model)
        for _ in run.steps(4):
            model.array += "b"  # type: ignore[operator]
            next(model.count)  # type: ignore[call-overload]
        return model.array.tolist(), next(model.count)  # type: ignore[operator, call-overload]

    assert plain(train).result == (["abbbb"], 4)
    assert cut(train, (1, 3)).result == (["ab"], 1)
