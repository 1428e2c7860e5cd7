"""What only an accelerator has: its random state, its graphs, its switches. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chain import cut, digest, marks, sweep
from test_loader import Noisy

from chainrun.allocation import Allocation
from chainrun.checkpoint import image, replicas
from chainrun.training import environment, rng

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 20


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels that repeat themselves: without them not even two whole runs are equal."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def network() -> torch.nn.Module:
    layers = [torch.nn.Linear(4, 32), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(32, 4)]
    return torch.nn.Sequential(*layers)


def device_marks() -> dict[str, str]:
    return {"cuda": digest([torch.cuda.get_rng_state(n) for n in range(torch.cuda.device_count())])}


def training(pin_memory: bool = False, amp: torch.dtype | None = None) -> Any:
    def train(run: Any, DataLoader: Any) -> str:
        torch.cuda.manual_seed_all(0)
        model = network().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cuda", enabled=amp is torch.float16)
        loader = DataLoader(Noisy(20), batch_size=4, shuffle=True, num_workers=1, pin_memory=pin_memory)
        run.register(model=model, optimizer=optimizer, scaler=scaler, loader=loader)
        for _ in run.epochs(4):
            for x in loader:
                with torch.autocast("cuda", dtype=amp or torch.float32, enabled=amp is not None):
                    loss = model(x.float().cuda(non_blocking=True)).square().mean()
                loss = loss + torch.rand((), device="cuda")
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                cpu = {name: value.cpu() for name, value in model.state_dict().items()}
                run.step(loss=loss, **marks(x.cpu()), **device_marks(), weights=digest(cpu))
        return digest({name: value.cpu() for name, value in model.state_dict().items()})

    return train


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_draws_on_the_device_go_on(amp: torch.dtype | None) -> None:
    """Dropout and noise of the device, with and without autocast and its scaler, at every cut."""
    sweep(training(amp=amp), STEPS, quick=True)


def test_pinned_batches_are_exact() -> None:
    """What pins them moves nothing but the batch."""
    sweep(training(pin_memory=True), STEPS, quick=True)


def test_every_visible_device_is_in_the_random_state() -> None:
    """Streams of all devices are set back, not the current one's alone."""
    state = rng.capture()
    first = [torch.rand(4, device=f"cuda:{n}").cpu() for n in range(torch.cuda.device_count())]
    rng.restore(state)
    again = [torch.rand(4, device=f"cuda:{n}").cpu() for n in range(torch.cuda.device_count())]
    assert all(map(torch.equal, first, again))


def test_a_graph_that_draws_goes_on() -> None:
    """A captured graph takes its draws from the device's generator, which a cut and a resume continue."""

    def train(run: Any, DataLoader: Any) -> str:
        torch.cuda.manual_seed_all(0)
        weight = torch.nn.Parameter(torch.zeros(64, device="cuda"))
        holder = torch.nn.ParameterList([weight])
        run.register(holder=holder)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side), torch.no_grad():  # as torch asks before a capture
            weight.add_(torch.zeros(64, device="cuda"))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            weight.mul_(0.9).add_(torch.nn.functional.dropout(torch.ones(64, device="cuda"), 0.5))
        for _ in run.steps(STEPS):
            graph.replay()
            run.step(weight=weight.sum(), **device_marks())
        return digest(weight.detach().cpu())

    sweep(train, STEPS, quick=True)


def test_switches_that_change_bits_are_noted(tmp_path: Any) -> None:
    """A resume under another TF32 or cuDNN setting is told."""
    before = environment.facts(Allocation(), {})
    torch.backends.cuda.matmul.allow_tf32 = not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    try:
        drift = environment.drift(before, environment.facts(Allocation(), {}))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = not torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    assert {line.split(":")[0] for line in drift} >= {"cudnn_benchmark", "tf32_matmul"}


def test_a_checkpoint_of_the_device_says_so() -> None:
    """One cut chain with the model on the accelerator the run offers."""

    def train(run: Any, DataLoader: Any) -> str:
        device = getattr(run, "device", torch.device("cuda:0"))
        assert device.type == "cuda"
        model = network().to(device)
        run.register(model=model)
        for _ in run.steps(4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.rand_like(parameter))
            run.step(sum=sum(p.sum() for p in model.parameters()))
        return ""

    torch.cuda.manual_seed_all(0)
    whole = cut(train)
    torch.cuda.manual_seed_all(0)
    assert whole.difference(cut(train, (2,))) is None


def device_state(value: float) -> dict[str, torch.Tensor]:
    small = {f"small{n}": torch.full((n + 1,), value + n, device="cuda") for n in range(300)}
    large = {f"large{n}": torch.full((20_000_000,), value + n, device="cuda") for n in range(3)}
    return {**small, **large, "cpu": torch.full((3,), value)}


def test_what_was_staged_is_the_state_before_what_the_device_was_given_to_do_next(tmp_path: Any) -> None:
    """Kernels that change the state right after the copy was asked for come after it; the memory is pinned once."""
    staging = image.Staging()
    state = device_state(0.0)
    for value in (1.0, 2.0, 3.0):
        for name, tensor in device_state(value).items():
            state[name].copy_(tensor)
        staging.stage(state)
        assert staging._memory is not None
        assert staging._memory._pinned
        for tensor in state.values():
            tensor.fill_(-1.0)
        size, digest = image.write(tmp_path / "a.pt", staging)
        loaded = image.read(tmp_path / "a.pt", size, digest)
        expected = device_state(value)
        assert all(torch.equal(loaded[name], expected[name].cpu()) for name in expected)


def test_a_captured_graph_that_changes_the_state_waits_too(tmp_path: Any) -> None:
    """Its replay calls no optimizer and no function of torch's on the CPU."""
    state = torch.zeros(50_000_000, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.add_(1.0)
    staging = image.Staging()
    for value in range(3):
        state.fill_(float(value))
        staging.stage({"state": state})
        for _ in range(5):
            graph.replay()
        image.write(tmp_path / "a.pt", staging)
        assert torch.equal(image.read(tmp_path / "a.pt")["state"], torch.full((50_000_000,), float(value)))


def test_the_last_save_of_a_device_is_whole(tmp_path: Any) -> None:
    """Through the ring of pinned chunks."""
    state = device_state(4.0)
    size, digest = image.write(tmp_path / "a.pt", state)
    loaded = image.read(tmp_path / "a.pt", size, digest)
    assert all(torch.equal(loaded[name], state[name].cpu()) for name in state)


def test_what_ranks_hold_alike_is_found_where_it_is() -> None:
    """Equal tensors on the device have equal marks, one bit apart they have not; large and small."""
    tree, other = ({"objects": device_state(5.0)} for _ in range(2))
    assert replicas.marks(tree) == replicas.marks(other)
    left = replicas.split(other, replicas.marks(tree))
    assert {name for name, tensor in left["objects"].items() if tensor.is_meta} >= {"large0", "small299"}
    other["objects"]["large1"].view(torch.int32)[12_345_678] ^= 1
    other["objects"]["small299"].view(torch.int32)[-1] ^= 1
    left = replicas.split(other, replicas.marks(tree))
    meta = {name for name, tensor in left["objects"].items() if tensor.is_meta}
    assert "large0" in meta
    assert not meta & {"large1", "small299"}
