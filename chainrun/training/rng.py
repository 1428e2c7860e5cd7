"""All random state of a process, as bytes.

A state is a dict from the stream's name (``python``, ``numpy``, ``torch``, ``cuda:0`` …) to bytes. Bytes
travel from loader workers cheaply, go to disk as uint8 tensors that ``torch.load(weights_only=True)``
opens (NumPy's own tuple it refuses), and are compared and fingerprinted without knowing what they hold.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
from array import array
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch

from chainrun.errors import RestoreError

State: TypeAlias = dict[str, bytes]
Generator: TypeAlias = "torch.Generator | np.random.Generator | np.random.RandomState | random.Random"
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def from_tensor(state: torch.Tensor) -> bytes:
    """Return the bytes of a uint8 tensor."""
    return bytes(state.numpy().tobytes())


def to_tensor(state: bytes) -> torch.Tensor:
    """Return the form in which a state is saved: a uint8 tensor."""
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _python_bytes(state: Any) -> bytes:
    version, words, gauss = state
    return struct.pack("<B?d", version, gauss is not None, gauss or 0.0) + array("I", words).tobytes()


def _python_state(data: bytes) -> Any:
    head = struct.calcsize("<B?d")
    version, has_gauss, gauss = struct.unpack("<B?d", data[:head])
    words = array("I")
    words.frombytes(data[head:])
    return version, tuple(words), gauss if has_gauss else None


_MT19937 = struct.Struct("<B?di")  # a tag that no JSON begins with, has_gauss, gauss, pos; then the key
_TAG = 1


def _numpy_bytes(state: Any) -> bytes:
    if (
        state["bit_generator"] == "MT19937" and "gauss" in state
    ):  # the global one's, at every batch of a worker
        inner = state["state"]
        head = _MT19937.pack(_TAG, state["has_gauss"], state["gauss"], inner["pos"])
        return head + bytes(inner["key"].astype("<u4", copy=False).tobytes())

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {"dtype": value.dtype.str, "array": value.tolist()}
        return value.item()

    return json.dumps(state, default=plain).encode()  # a double's JSON form keeps all of its bits


def _numpy_state(data: bytes) -> Any:
    if data[0] == _TAG:
        _, has_gauss, gauss, pos = _MT19937.unpack_from(data)
        key = np.frombuffer(data, dtype="<u4", offset=_MT19937.size).astype(np.uint32)
        inner = {"key": key, "pos": pos}
        return {
            "bit_generator": "MT19937",
            "state": inner,
            "has_gauss": int(has_gauss),
            "gauss": gauss,
        }

    def revive(value: dict[str, Any]) -> Any:
        return np.array(value["array"], dtype=value["dtype"]) if "array" in value else value

    return json.loads(data, object_hook=revive)


def get(generator: Generator) -> bytes:
    """Return the state of one generator."""
    if isinstance(generator, torch.Generator):
        return from_tensor(generator.get_state())
    if isinstance(generator, random.Random):
        return _python_bytes(generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return _numpy_bytes(generator.get_state(legacy=False))
    state = dict(generator.bit_generator.state)
    seeds = generator.bit_generator.seed_seq
    if isinstance(seeds, np.random.SeedSequence):  # what spawn() draws from
        state["seeds"] = seeds.state
    return _numpy_bytes(state)


def put(generator: Generator, state: bytes) -> None:
    """Set the state of one generator to what `get` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(to_tensor(state))
    elif isinstance(generator, random.Random):
        generator.setstate(_python_state(state))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_numpy_state(state))
    else:
        values = _numpy_state(state)
        seeds = values.pop("seeds", None)
        generator.bit_generator.state = values
        if seeds is not None:  # as unpickling does
            sequence = np.random.SeedSequence(**{**seeds, "spawn_key": tuple(seeds["spawn_key"])})
            revive: Any = generator.bit_generator
            revive.__setstate__((revive.state, sequence))


def _accelerator() -> tuple[str, Any, int] | None:
    """Return (type, module, number of devices) of the accelerator in use, None on a CPU machine.

    A loader worker has none: a forked one must not touch the device of its parent.
    """
    if torch.utils.data.get_worker_info() is not None or not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device.type)
    return device.type, module, module.device_count()


def capture() -> State:
    """Return the state of Python's, NumPy's and torch's global generators, of every visible device too."""
    state = {
        "python": _python_bytes(random.getstate()),
        "numpy": _numpy_bytes(np.random.get_state(legacy=False)),
        "torch": from_tensor(torch.get_rng_state()),
    }
    accelerator = _accelerator()
    if accelerator:
        kind, module, count = accelerator
        if kind == "mps":
            state["mps"] = from_tensor(module.get_rng_state())
        else:
            for index in range(count):
                state[f"{kind}:{index}"] = from_tensor(module.get_rng_state(index))
    return state


def restore(state: State) -> None:
    """Set the global generators to a captured state; devices that are not here are left out."""
    random.setstate(_python_state(state["python"]))
    np.random.set_state(_numpy_state(state["numpy"]))
    torch.set_rng_state(to_tensor(state["torch"]))
    accelerator = _accelerator()
    if accelerator:
        kind, module, count = accelerator
        if kind == "mps" and "mps" in state:
            module.set_rng_state(to_tensor(state["mps"]))
        for index in range(count):
            if f"{kind}:{index}" in state:
                module.set_rng_state(to_tensor(state[f"{kind}:{index}"]), index)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Leave the global generators as they are, whatever is done inside: a state_dict() of the user's may draw."""
    state = capture()
    try:
        yield
    finally:
        if capture() != state:
            restore(state)


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, as a plain program does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_streams(seed: int, generators: list[Generator]) -> None:
    """Seed the global generators, and some others, each in its own way.

    Args:
        seed: 64 bits.
    """
    words = [seed & 0xFFFFFFFF, seed >> 32]
    random.seed(seed)
    np.random.seed(words)
    if torch.utils.data.get_worker_info() is None:
        torch.manual_seed(seed)
    else:  # a forked worker must not touch the device of its parent
        torch.default_generator.manual_seed(seed)
    for place, generator in enumerate(generators, start=1):
        if isinstance(generator, torch.Generator):
            generator.manual_seed((seed + place) % 2**64)
        elif isinstance(generator, random.Random):
            generator.seed(seed + place)
        elif isinstance(generator, np.random.RandomState):
            generator.seed([*words, place])
        else:
            kind = type(generator.bit_generator)
            generator.bit_generator.state = kind([*words, place]).state


def to_tensors(state: State) -> dict[str, torch.Tensor]:
    """Return the state in the form that is saved: one uint8 tensor a stream."""
    return {name: to_tensor(data) for name, data in state.items()}


def from_tensors(state: dict[str, torch.Tensor]) -> State:
    """Return what `to_tensors` was given."""
    return {name: from_tensor(tensor) for name, tensor in state.items()}


class Registered:
    """A generator given to `Run.register`."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": to_tensor(get(self._generator))}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        put(self._generator, from_tensor(state["generator"]))


class Inside(Registered):
    """The generators in a registered module, which draws from them."""

    def __init__(self, module: str, generators: list[Generator]) -> None:
        self._module, self._generators = module, generators

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {str(place): to_tensor(get(each)) for place, each in enumerate(self._generators)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if len(state) != len(self._generators):
            raise RestoreError(
                f"the module '{self._module}': {len(self._generators)} random generators were found in it, {len(state)} "
                "when the checkpoint was taken; build it as it was then"
            )
        for place, each in enumerate(self._generators):
            put(each, from_tensor(state[str(place)]))
